"""Trains a bundle on: `python -m trainers.finetune --data data/new --minutes 30 --out runs/finetuned`.

The autoencoder stays as it is, so that latents keep their meaning; the dynamics and the heads go on from the bundle's weights.
Resumable at every stage, like `trainers.pipeline`, whose last stages these are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

from dreamenv.artifacts import atomic_file
from dreamenv.bundle import Bundle, load_bundle, resolve_bundle
from dreamenv.config import check, load_yaml, to_dict
from dreamenv.errors import DreamenvError
from dreamenv.models.io import save_model
from dreamenv.models.registry import model_spec
from dreamenv.stages import begin, stage
from trainers.heads import dreams_for
from trainers.latents import load_autoencoder
from trainers.pipeline import CONFIGS, encode, make_bundle, train_stage


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
    """Which embedded bundle."""
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
    starts: int = 60
    """Start contexts in the new bundle."""
    seed: int = 0
    """Decides everything but the wall clock."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.minutes > 0, f"minutes {self.minutes}: must be > 0")
        check(self.steps is None or self.steps >= 1, f"steps {self.steps}: must be >= 1")
        check(self.outcome >= 0, f"outcome {self.outcome}: must be >= 0")
        check(self.starts >= 1, f"starts {self.starts}: must be >= 1")
        check(self.batch_size >= 1, f"batch_size {self.batch_size}: must be >= 1")


def unpack(bundle: Bundle, out: Path) -> None:
    """Write a bundle's networks as the model folders `autoencoder`, `before` (the dynamics) and `heads-before` of a run."""
    model, limits = bundle.world_model, to_dict(bundle.limits)
    trained = bundle.provenance.get("trained_steps", {})
    facts: dict[str, Any] = {"from_bundle": bundle.identity, "step": int(trained.get("autoencoder", 0))}
    save_model(out / "autoencoder" / "model", model.autoencoder, facts)
    _, digest = load_autoencoder(out / "autoencoder" / "model")
    facts = {"from_bundle": bundle.identity, "autoencoder_sha256": digest, "step": 0}
    save_model(out / "before" / "model", model.dynamics, facts | limits)
    save_model(out / "heads-before" / "model", model.head, facts)


def finetune(config: FinetuneConfig) -> Path:
    """Run all stages, skipping those that are done; returns the new bundle's folder.

    Raises:
        ConfigError: a bad setting, or a run folder begun with others.
        BundleError, DatasetError: the bundle or the data is damaged or does not fit.
    """
    out = config.out
    begin(out, {k: str(v) for k, v in to_dict(config).items() if k != "out"})
    bundle = load_bundle(resolve_bundle(config.bundle, config.game), "cpu")
    latents = config.latents or out / "latents"
    stage(out, "unpack", lambda: unpack(bundle, out))
    stage(out, "encode", lambda: encode(config.data, out / "autoencoder" / "model", latents))
    for name, source, model, share in (
        ("dynamics", "settled", bundle.world_model.dynamics, 0.97), ("heads", "heads", bundle.world_model.head, 0.03),
    ):  # fmt: skip
        file = out / f"{name}.yaml"
        spec = {k: v for k, v in model_spec(model).items() if k not in ("rewards", "terminated", "bias", "scale")}
        with atomic_file(file) as temporary:
            values = load_yaml(CONFIGS / f"{source}.yaml")
            if name == "dynamics" and spec["type"] == "latent_flow":  # older bundles lack it; its weights begin at zero
                spec["global_noise"] = values["model"]["global_noise"]
            values["model"] = json.loads(json.dumps(spec))
            temporary.write_text(yaml.safe_dump(values))
        before = "before" if name == "dynamics" else "heads-before"
        changed = {"task.latents": str(latents), "task.init_from": str(out / before / "model"), "loop.seed": config.seed}
        if name == "dynamics":
            changed |= {"loop.batch_size": config.batch_size, "task.outcome": config.outcome,
                        "task.head": str(out / "heads-before" / "model")}  # fmt: skip
            if spec["type"] == "tile_flow":
                changed["task.camera"] = 0.0  # its motion has learnt over its own path; single steps would spoil that
        else:
            changed |= {"task.dynamics": str(out / "dynamics" / "model"),
                        "task.dreams": dreams_for(config.minutes, config.steps)}  # fmt: skip
        budget = ["--steps", str(config.steps)] if config.steps else ["--minutes", str(config.minutes * share)]
        stage(out, name, lambda f=file, n=name, v=changed, b=budget: train_stage(f, out / n, v, b))
    stage(out, "bundle", lambda: make_bundle(out, config.data, config.starts, "dynamics"))
    return out / "bundle"


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `FinetuneConfig` is an option."""
    try:
        bundle = finetune(tyro.cli(FinetuneConfig, args=arguments, description=__doc__))
    except DreamenvError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps({"bundle": str(bundle)}))


if __name__ == "__main__":
    main()
