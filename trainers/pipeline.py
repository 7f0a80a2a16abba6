"""From the real game to a bundle in one go, resumable at every stage: `python -m trainers.pipeline --game coinrun`.

It walks a recipe (`trainers/recipes`), on CPU or GPU. Run the same line again after a kill: finished stages are
skipped, the interrupted one goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
import yaml

from dreamenv.artifacts import atomic_file, read_json
from dreamenv.bundle import GameFacts, Limits, load_bundle, save_bundle_of
from dreamenv.config import check, from_dict, to_dict
from dreamenv.console import errors_in_one_line
from dreamenv.contract.games import get_game, named
from dreamenv.data import Dataset
from dreamenv.data.manifest import read_manifest
from dreamenv.errors import BundleError, ConfigError
from dreamenv.models.interface import Codec, Dynamics, OutcomeHead
from dreamenv.models.io import load_model, save_model
from dreamenv.models.registry import build
from dreamenv.policies.simple import parse_mix
from dreamenv.stages import begun, program, run_command, stage
from dreamenv.world_model import WorldModel
from trainers.bank import start_bank
from trainers.dreams import dreams_for
from trainers.recipe import Recipe, check_build, check_values, fed, filled, load_recipe
from trainers.train import check_overrides, of_stage, override


@dataclass(frozen=True)
class PipelineConfig:
    """What to make, and how much time to spend."""

    game: str = "coinrun"
    """Game name; with data of several games, one of them."""
    recipe: str = ""
    """A recipe of `trainers/recipes`, or the path of a YAML file; the game's own by default."""
    minutes: float = 90.0
    """Training minutes in all; collecting, encoding and dreaming come on top, for 90 about a quarter more on two
    cores."""
    out: Path | None = None
    """Run folder, runs/<game> by default; the bundle is <out>/bundle."""
    data: Path | None = None
    """A dataset of the game, or of several and this one, to train on, in place of collecting one."""
    steps: int | None = None
    """Transitions to collect; the recipe's number by default."""
    events: int | None = None
    """Further transitions to play, of which only what leads to rewards and ends of episodes is kept: the heads learn
    rare outcomes from it too. The recipe's number by default; 0 goes without."""
    event_data: Path | None = None
    """A dataset of such events, of the games of `data`, in place of collecting one."""
    policy: str = "mix"
    """See `python -m envs.collect --help`."""
    contingent: bool | None = None
    """False leaves out which pixels depend on the action, for which the game is stepped twice, and the loss term that
    wants it; by default the recipe decides."""
    distribution_mode: str = "easy"
    """Procgen's difficulty."""
    seed: int = 0
    """Decides everything but the wall clock."""
    workers: int = 0
    """Processes that collect; 0: one a core, up to 8, for 200,000 steps or more."""
    stage_steps: int | None = None
    """Steps of every trained stage instead of minutes: a run that can be repeated bit for bit."""
    starts: int = 60
    """Start contexts in the bundle, of each game."""
    bank_kib: int | None = None
    """Most KiB that the start contexts of a game take; there are fewer where their pictures have more in them."""
    set: tuple[str, ...] = ()
    """Overrides for every trained stage, e.g. loop.batch_size=256; prefix one stage as unrolled:loop.lr=0.001."""

    def __post_init__(self) -> None:
        """Validate everything, the stages' settings too; raises `ConfigError`."""
        game = get_game(self.game)
        modes = game.distribution_modes
        mode = self.distribution_mode
        check(mode in modes, f"distribution_mode {mode!r}: {game.name} has {', '.join(modes)}")
        parse_mix(self.policy)
        check(self.minutes > 0, f"minutes {self.minutes}: must be > 0")
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be in 0..2^63-1")
        check(self.steps is None or self.steps >= 1, f"steps {self.steps}: must be >= 1")
        check(self.events is None or self.events >= 0, f"events {self.events}: must be >= 0")
        check(self.workers >= 0, f"workers {self.workers}: must be >= 0")
        check(self.starts >= 1, f"starts {self.starts}: must be >= 1")
        check(self.bank_kib is None or self.bank_kib >= 1, f"bank_kib {self.bank_kib}: must be >= 1")
        check(self.stage_steps is None or self.stage_steps >= 1, f"stage_steps {self.stage_steps}: must be >= 1")
        recipe = load_recipe(self.recipe or game.recipe)
        needs = " and ".join(recipe.needs)
        check(recipe.suits(game, mode), f"recipe {recipe.name!r}: needs a known {needs}, {game.name} in {mode} has not")
        object.__setattr__(self, "recipe", self.recipe or game.recipe)
        object.__setattr__(self, "out", self.out or Path("runs") / self.game)
        check_overrides(self.set, recipe.trained)
        given = {game.name: mode} if self.data is None else Dataset(self.data).modes
        if self.data is not None:
            check(given.get(game.name) == mode, f"data {self.data}: is of {named(given)}, not of {game.name} in {mode}")
            for name, difficulty in given.items():
                suits = recipe.suits(get_game(name), difficulty)
                check(suits, f"recipe {recipe.name!r}: needs a known {needs}, {name} in {difficulty} has not")
            several = len(given) > 1
            events = self.numbers(recipe)["events"]
            check(
                self.event_data is not None or not (several and events),
                f"events {events}: are of one game, the data of several; say --events 0, or give --event-data",
            )
        useful = self.event_data is None or bool(recipe.events)
        check(useful, f"event_data {self.event_data}: recipe {recipe.name} has no use for it")
        if self.event_data is not None:
            found = Dataset(self.event_data).modes
            check(found == given, f"event_data {self.event_data}: is of {named(found)}, the data of {named(given)}")
        made = self.numbers(recipe) | {name: Path(name) for name in recipe.stages}
        for name, settings in recipe.stages.items():
            if "build" in settings:
                check_build(name, settings)
            if "choose" in settings:
                wanted = set(filled(settings["choose"], made, f"{recipe.name}.{name}"))
                check(wanted == {"dynamics", "latents"}, f"{recipe.name}.{name}.choose: must name dynamics and latents")
        for name in recipe.trained:
            try:
                check_values(self.stage_values(recipe, name, made))
            except ConfigError as error:
                raise ConfigError(f"stage {name}: {error}") from None

    def given(self, recipe: Recipe, name: str) -> Path | None:
        """The dataset that a stage which collects need not collect, if there is one."""
        if name == recipe.data:
            return self.data
        return self.event_data if name == recipe.events else None

    def numbers(self, recipe: Recipe) -> dict[str, int]:
        """What `{steps}`, `{events}`, `{dreams}` and `{renewed-dreams}` stand for."""
        asked = {"steps": self.steps, "events": self.events}
        given = {name: value for name, value in asked.items() if value is not None}
        return {"steps": 450_000, "events": 0} | recipe.defaults | given | dreams_for(self.minutes, self.stage_steps)

    def stage_values(self, recipe: Recipe, name: str, made: dict[str, Any]) -> dict[str, Any]:
        """The sections model, task and loop of one stage."""
        values = recipe.values(name, made)
        minutes = self.minutes * float(recipe.stages[name].get("share", 0))
        budget = {"steps": self.stage_steps} if self.stage_steps else {"minutes": minutes}
        values["loop"] |= budget | {"seed": self.seed}
        return override(values, of_stage(self.set, name))


def run_pipeline(config: PipelineConfig) -> Path:
    """Run every stage that is not done yet and return the bundle folder.

    Raises:
        ConfigError: bad settings, or a stage that failed (its log says why).
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    check(
        world == 1, f"WORLD_SIZE {world}: the pipeline is one process; run it without torchrun, or use trainers.train"
    )
    out, recipe = config.out, load_recipe(config.recipe)
    assert out is not None
    with begun(out, {k: str(v) for k, v in to_dict(config).items() if k not in ("out", "workers")}):
        _run(config, recipe, out)
    return out / "bundle"


def _run(config: PipelineConfig, recipe: Recipe, out: Path) -> None:
    made: dict[str, Any] = dict(config.numbers(recipe))
    for name, settings in recipe.stages.items():
        where, work = out / name, _work(config, recipe, name, settings, made)
        if work is not None:
            stage(out, name, work)
        trained = "model" in settings or "choose" in settings
        made[name] = "" if work is None else where / "model" if trained else where
        if (given := config.given(recipe, name)) is not None:
            made[name] = given
    data = made[recipe.data]
    bundled = partial(make_bundle, out, data, config.starts, recipe.bundle, recipe.name, kib=config.bank_kib)
    stage(out, "bundle", bundled)


def _work(
    config: PipelineConfig, recipe: Recipe, name: str, settings: dict[str, Any], made: dict[str, Any]
) -> Callable[[], Any] | None:
    """What one stage does; None if there is nothing to do: nothing to collect, or nothing collected to encode."""
    assert config.out is not None
    out = config.out / name
    if "collect" in settings:
        wanted = filled(settings["collect"], made, name)
        given = config.given(recipe, name) is not None
        return partial(_collect, config, name, wanted, out) if wanted["steps"] and not given else None
    if "encode" in settings:
        wanted = filled(settings["encode"], made, name)
        return partial(encode, wanted["data"], wanted["codec"], out) if wanted["data"] else None
    if "choose" in settings:
        wanted = filled(settings["choose"], made, name)
        return partial(run_command, program("trainers.choose", wanted["dynamics"], wanted["latents"], out / "model"))
    if "build" in settings:
        return partial(build_model, settings["build"], settings["model"], out / "model")
    check(
        "task" in settings, f"recipe {recipe.name}: stage {name} says neither collect, encode, choose, build nor task"
    )
    return lambda: train_stage(_fed(config.stage_values(recipe, name, made), made[recipe.data], name), out)


def _fed(values: dict[str, Any], data: Path, stage_name: str) -> dict[str, Any]:
    """A stage's sections, less the loss terms for which the data lack a column."""
    return fed(values, read_manifest(data)["columns"], f"stage {stage_name}, data {data}")


def _collect(config: PipelineConfig, name: str, wanted: dict[str, Any], out: Path) -> str:
    """Collect in a process of its own; what is not the main data is of other levels and actions."""
    seed = config.seed if "events" not in wanted else (config.seed + 1) % 2**63
    settings = {"game": config.game, "policy": config.policy, "seed": seed, "workers": config.workers}
    settings |= {"distribution_mode": config.distribution_mode, "out": out, **wanted}
    if config.contingent is not None and "contingent" in wanted:
        settings["contingent"] = config.contingent
    return run_command(program("envs.collect", **settings))


def build_model(kind: str, model: dict[str, Any], folder: Path) -> None:
    """Write the model folder of a model that needs no training."""
    save_model(folder, build(kind, model), {"step": 0})


def train_stage(values: dict[str, Any], out: Path) -> None:
    """Run `trainers.train` on the sections model, task and loop in a process of its own; resumes."""
    file = out.with_name(f"{out.name}.yaml")
    with atomic_file(file) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    run_command(program("trainers.train", file, out=out, resume=True))


def encode(data: Path | str, codec: Path | str, latents: Path) -> None:
    """Encode a dataset with a trained codec, in a process of its own."""
    run_command(program("trainers.encode", data, codec, latents))


def make_bundle(
    out: Path,
    data: Path,
    starts: int,
    stages: dict[str, str],
    recipe: str,
    name: str = "bundle",
    kib: int | None = None,
) -> Path:
    """Compose <out>/<name> from trained stages.

    Args:
        out: run folder.
        data: the dataset that was trained on, of one or several games; its first frames are the start contexts.
        starts: how many of these, of each game.
        stages: which are the codec, the dynamics and the head.
        recipe: by which they were trained.
        name: of the bundle's folder.
        kib: most KiB that the start contexts of a game take, see `start_bank`.

    Raises:
        BundleError: a stage is missing or damaged.
        ConfigError: they belong to different codecs.
    """
    parts, facts = {}, {}
    for kind in ("codec", "dynamics", "head"):
        parts[kind], facts[kind] = load_model(out / stages[kind] / "model", kind)
    codec, dynamics, head = parts["codec"], parts["dynamics"], parts["head"]
    assert isinstance(codec, Codec) and isinstance(dynamics, Dynamics) and isinstance(head, OutcomeHead)
    digest = read_json(out / stages["codec"] / "model" / "model.json", BundleError, "train it again")["sha256"]
    if not digest == facts["dynamics"]["codec_sha256"] == facts["head"]["codec_sha256"]:
        raise ConfigError(f"{out}: dynamics or head were trained on another codec; delete them and run again")
    dataset = Dataset(data)
    collected = dataset.facts
    of_each = {n: dataset.facts_of(n) for n in dataset.games}
    games = [GameFacts(n, of_each[n]["distribution_mode"], of_each[n]["max_steps"]) for n in dataset.games]
    limits = from_dict(Limits, {k: facts["dynamics"][k] for k in ("latent_max", "latent_rms_max")})
    provenance = {
        "recipe": recipe,
        "data": collected,
        "steps": dataset.manifest["steps"],
        "stages": stages,
        "trained_steps": {kind: facts[kind]["step"] for kind in parts},
        "outcome_share": facts["head"]["outcome_share"],
        "heads_also": facts["head"].get("also"),
    }
    world_model = WorldModel(codec, dynamics, head)
    banks = {n: start_bank(dataset, starts, codec.frame, n, kib) for n in dataset.games}
    bundle = save_bundle_of(games, out / name, world_model, limits, banks, provenance, {})
    for game in dataset.games:
        load_bundle(bundle, "cpu", game=game)  # what was written must be readable
    return bundle


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `PipelineConfig` is an option."""
    with errors_in_one_line():
        config = tyro.cli(PipelineConfig, args=arguments, description=__doc__)
        bundle = run_pipeline(config)
        print(json.dumps({"bundle": str(bundle), "config": {k: str(v) for k, v in to_dict(config).items()}}))


if __name__ == "__main__":
    main()
