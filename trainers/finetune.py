"""Trains a bundle on: `python -m trainers.finetune --data data/new --minutes 30 --out runs/finetuned`.

The codec stays as it is, so that latents keep their meaning; the dynamics and the head go on from the bundle's weights.
Resumable at every stage, like `trainers.pipeline`, whose last stages these are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dreamenv.bundle import Bundle, bundle_games, load_bundle, resolve_bundle
from dreamenv.config import check, to_dict
from dreamenv.console import errors_in_one_line
from dreamenv.contract.games import get_game, named
from dreamenv.data import Dataset
from dreamenv.errors import ConfigError
from dreamenv.models.io import save_model
from dreamenv.models.registry import spec_of
from dreamenv.stages import begun, stage
from trainers.dreams import dreams_for
from trainers.encode import load_codec
from trainers.pipeline import encode, make_bundle, train_stage
from trainers.recipe import check_values, fed, load_recipe, recipes
from trainers.train import override

_SHARES = {"dynamics": 0.97, "head": 0.03}  # of the minutes: the head soon knows its events
# what training decides of a head, and what it takes from the codec
_MEASURED = ("rewards", "terminated", "games", "owners", "bias", "scale", "latent", "grid")


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train on, and for how long."""

    data: Path
    """Dataset folder; `python -m dreamenv.data.merge` makes one of several."""
    out: Path
    """Run folder; the new bundle is <out>/bundle."""
    bundle: Path | None = None
    """Bundle to go on from; the embedded one by default."""
    game: str = "coinrun"
    """Which embedded bundle. A bundle of several games goes on with all of them."""
    recipe: str = ""
    """Whose last stages to take; by default that of the bundle, or of its game."""
    minutes: float = 30.0
    """Wall-clock budget of both trainings together, nearly all for the dynamics: the head soon knows its events."""
    steps: int | None = None
    """Optimiser steps of each training, instead of minutes."""
    batch_size: int = 18
    """Of the dynamics."""
    latents: Path | None = None
    """Folder of the encoded frames, <out>/latents by default; runs that share one encode each frame once."""
    outcome: float = 0.01
    """Weight of the outcome head's cross-entropy in the training of the dynamics."""
    starts: int | None = None
    """Start contexts in the new bundle, of each game; by default as many as the old one has of its first."""
    seed: int = 0
    """Decides everything but the wall clock."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        get_game(self.game)
        check(self.minutes > 0, f"minutes {self.minutes}: must be > 0")
        check(self.steps is None or self.steps >= 1, f"steps {self.steps}: must be >= 1")
        check(self.outcome >= 0, f"outcome {self.outcome}: must be >= 0")
        check(self.starts is None or self.starts >= 1, f"starts {self.starts}: must be >= 1")
        check(self.batch_size >= 1, f"batch_size {self.batch_size}: must be >= 1")


def unpack(bundle: Bundle, out: Path) -> None:
    """Write a bundle's networks as the model folders `codec`, `before` (the dynamics) and `head-before` of a run."""
    model, limits = bundle.world_model, to_dict(bundle.limits)
    trained = bundle.provenance.get("trained_steps", {})
    steps = int(trained.get("codec", trained.get("autoencoder", 0)))
    save_model(out / "codec" / "model", model.codec, {"from_bundle": bundle.identity, "step": steps})
    _, digest = load_codec(out / "codec" / "model")
    facts: dict[str, Any] = {"from_bundle": bundle.identity, "codec_sha256": digest, "step": 0}
    save_model(out / "before" / "model", model.dynamics, facts | limits)
    save_model(out / "head-before" / "model", model.head, facts)


def recipe_of(config: FinetuneConfig, bundle: Bundle) -> str:
    """The recipe that was asked for, the bundle's own, the game's or the first one that trains such dynamics."""
    if config.recipe or bundle.provenance.get("recipe"):
        return config.recipe or bundle.provenance["recipe"]
    wanted = spec_of(bundle.world_model.dynamics)["type"]
    for name in (get_game(config.game).recipe, *recipes()):
        recipe = load_recipe(name)
        if (
            "dynamics" in recipe.finetune
            and recipe.stages[recipe.finetune["dynamics"]["stage"]]["model"]["type"] == wanted
        ):
            return name
    raise ConfigError(f"bundle {bundle.folder}: no recipe trains {wanted}; name one with --recipe")


def stage_values(config: FinetuneConfig, bundle: Bundle, kind: str, latents: Path) -> dict[str, Any]:
    """The sections model, task and loop by which a bundle's "dynamics" or "head" go on."""
    out = config.out
    recipe = load_recipe(recipe_of(config, bundle))
    known = [name for name in recipes() if load_recipe(name).finetune]
    check(kind in recipe.finetune, f"recipe {recipe.name}: does not go on from a bundle; these do: {', '.join(known)}")
    chosen = recipe.finetune[kind]
    made: dict[str, Any] = {stage: out / stage for stage in recipe.stages}
    dreams = dreams_for(config.minutes, config.steps)
    values = recipe.values(chosen["stage"], made | dreams)
    spec = json.loads(json.dumps(spec_of(getattr(bundle.world_model, kind))))
    for key, value in values["model"].items():  # what older bundles lack begins without effect
        if spec["type"] == values["model"]["type"] and isinstance(value, bool):
            spec[key] = value
    before = {"dynamics": "before", "head": "head-before"}[kind]
    values["model"] = {k: v for k, v in spec.items() if kind == "dynamics" or k not in _MEASURED}
    values["task"] |= {"latents": str(latents), "init_from": str(out / before / "model")}
    budget = {"steps": config.steps} if config.steps else {"minutes": config.minutes * _SHARES[kind]}
    values["loop"] |= budget | {"seed": config.seed}
    if kind == "dynamics":
        values["loop"]["batch_size"] = config.batch_size
        judge = {"weight": config.outcome, "head": str(out / "head-before" / "model")}
        values["task"]["terms"]["outcome"] = values["task"]["terms"].get("outcome", {}) | judge
    else:
        values["task"] = (
            {"dreams": dreams["dreams"]} | values["task"] | {"also": "", "dynamics": str(out / "dynamics" / "model")}
        )
    return override(values, tuple(f"{k}={json.dumps(v)}" for k, v in chosen.get("set", {}).items()))


def finetune(config: FinetuneConfig) -> Path:
    """Run all stages, skipping those that are done; returns the new bundle's folder.

    Raises:
        ConfigError: a bad setting, or a run folder begun with others.
        BundleError, DatasetError: the bundle or the data is damaged or does not fit.
    """
    out, latents = config.out, config.latents or config.out / "latents"
    bundle = load_bundle(resolve_bundle(config.bundle, config.game), "cpu", game=config.game)
    data, own = Dataset(config.data), bundle_games(bundle.folder)
    games = data.modes
    check(
        len(games) == 1 == len(own) or list(games.items()) == list(own.items()),
        f"data {config.data}: is of {named(games)}, the bundle of {named(own)}; they must be the same",
    )
    columns = data.manifest["columns"]
    stages = {
        kind: fed(stage_values(config, bundle, kind, latents), columns, f"{kind}, data {config.data}")
        for kind in ("dynamics", "head")
    }
    for values in stages.values():
        check_values(values)
    with begun(out, {k: str(v) for k, v in to_dict(config).items() if k != "out"}):
        stage(out, "unpack", lambda: unpack(bundle, out))
        stage(out, "encode", lambda: encode(config.data, out / "codec" / "model", latents))
        for kind, values in stages.items():
            stage(out, kind, lambda v=values, k=kind: train_stage(v, out / k))
        parts = {"codec": "codec", "dynamics": "dynamics", "head": "head"}
        recipe = recipe_of(config, bundle)
        starts = config.starts or len(bundle.starts.frames)
        stage(out, "bundle", lambda: make_bundle(out, config.data, starts, parts, recipe))
    return out / "bundle"


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `FinetuneConfig` is an option."""
    with errors_in_one_line():
        bundle = finetune(tyro.cli(FinetuneConfig, args=arguments, description=__doc__))
        print(json.dumps({"bundle": str(bundle)}))


if __name__ == "__main__":
    main()
