"""From the real game to a bundle in one go, resumable at every stage.

`python -m trainers.pipeline --game coinrun --minutes 90 --out runs/coinrun`:
collect -> autoencoder -> encode -> predictor -> unrolled -> flow -> outcomes -> settled -> heads -> bundle, on CPU or GPU
(of latents on tiles also the camera's motion, after settled; for the heads also ends of more episodes).
Run the same line again after a kill: finished stages are skipped, the interrupted one goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import tyro

from dreamenv.bundle import GameFacts, Limits, Starts, load_bundle, save_bundle
from dreamenv.config import check, from_dict, to_dict
from dreamenv.data import Dataset
from dreamenv.errors import ConfigError, DreamenvError
from dreamenv.models.heads import OutcomeHead
from dreamenv.models.io import load_model
from dreamenv.stages import begin, run_command, stage
from dreamenv.world_model import Dynamics, FrameCodec, WorldModel
from trainers.heads import dreams_for

CONFIGS = Path(__file__).parent / "configs"
_SHARES = {"autoencoder": 0.10, "predictor": 0.12, "unrolled": 0.30, "flow": 0.22, "outcomes": 0.04, "settled": 0.21,
           "heads": 0.01}  # fmt: skip
"""How the minutes are divided between the trained stages."""
_TILE_SHARES = {"autoencoder": 0.30, "predictor": 0.08, "unrolled": 0.13, "flow": 0.04, "outcomes": 0.03, "settled": 0.16,
                "camera": 0.25, "heads": 0.01}  # fmt: skip
_TILE_FLOW = {"type": "tile_flow"}
_TILE_HEAD = {"type": "tile_outcome_head", "width": 64, "latent_channels": 28}
_TILE_MODELS = {"autoencoder": {"type": "tile_autoencoder"}, "outcomes": _TILE_HEAD, "heads": _TILE_HEAD}
"""Architectures of the stages whose latents lie on the level's grid of tiles; `_TILE_FLOW` where nothing is said."""
_ENDS = 16  # steps kept of an episode of which only the end is: 12 before it that are drawn too, and their contexts
_TILED = ("coinrun",)
"""Games whose camera `envs.collect` knows."""


@dataclass(frozen=True)
class PipelineConfig:
    """What to make, and how much time to spend."""

    game: str = "coinrun"
    """Game name."""
    minutes: float = 90.0
    """Training minutes in all; collecting, encoding and dreaming come on top, for 90 about a quarter more on two cores."""
    out: Path = Path("runs/coinrun")
    """Run folder; the bundle is <out>/bundle."""
    steps: int = 450_000
    """Transitions to collect."""
    ends: int | None = None
    """Further transitions to play, of which only the ends of episodes are kept: the heads learn rare outcomes from them too.
    None: a million for latents on tiles, else 0."""
    policy: str = "mix"
    """See `python -m envs.collect --help`."""
    distribution_mode: str = "easy"
    """Procgen's difficulty."""
    seed: int = 0
    """Decides everything but the wall clock."""
    workers: int = 0
    """Processes that collect; 0: one a core, up to 8, for 200,000 steps or more."""
    stage_steps: int | None = None
    """Steps of every trained stage instead of minutes: a run that can be repeated bit for bit."""
    starts: int = 60
    """Start contexts in the bundle."""
    latents: Literal["patches", "tiles"] = "patches"
    """What the latents' cells are: patches of the picture (`dreamenv.models.autoencoder`), or tiles of the level's own grid
    (`dreamenv.models.tile`), for coinrun, whose camera is known. Tiles are far better once the camera's motion is learnt; the
    whole pipeline has not been run on them since that works from nothing (docs/experiments.md, runs 48 and 49)."""
    set: tuple[str, ...] = ()
    """Overrides for every trained stage, e.g. loop.batch_size=256; prefix one stage as unrolled:loop.lr=0.001."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.minutes > 0, f"minutes {self.minutes}: must be > 0")
        for item in self.set:
            stage, separator, assignment = item.partition(":")
            prefixed = bool(separator) and "=" not in stage
            check(not prefixed or stage in _TILE_SHARES,
                  f"set {item!r}: there is no stage {stage!r}, only {', '.join(_TILE_SHARES)}")
            check("=" in (assignment if prefixed else item), f"set {item!r}: expected [stage:]section.key=value")
        check(self.latents in ("patches", "tiles"), f"latents {self.latents!r}: must be patches or tiles")
        check(self.latents != "tiles" or self.game in _TILED,
              f"latents 'tiles': the camera of {self.game} is not known, only that of {', '.join(_TILED)}; use patches")
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be in 0..2^63-1")
        check(self.steps >= 1, f"steps {self.steps}: must be >= 1")
        check(self.ends is None or self.ends >= 0, f"ends {self.ends}: must be >= 0")
        check(self.starts >= 1, f"starts {self.starts}: must be >= 1")
        check(self.stage_steps is None or self.stage_steps >= 1, f"stage_steps {self.stage_steps}: must be >= 1")


def run_pipeline(config: PipelineConfig) -> Path:
    """Run every stage that is not done yet and return the bundle folder.

    Raises:
        ConfigError: bad settings, or a stage that failed (its log says why).
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    check(world == 1, f"WORLD_SIZE {world}: the pipeline is one process; run it without torchrun, or use trainers.train")
    out = config.out
    begin(out, {k: str(v) for k, v in to_dict(config).items() if k not in ("out", "workers")})
    data, latents = out / "data", out / "latents"

    def collect(steps: int, seed: int, folder: Path, *more: str) -> str:
        settings = {"game": config.game, "steps": steps, "policy": config.policy, "seed": seed, "workers": config.workers,
                    "distribution-mode": config.distribution_mode, "out": folder}  # fmt: skip
        options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        return run_command([sys.executable, "-m", "envs.collect", *options, *more])

    stage(out, "collect", lambda: collect(config.steps, config.seed, data))
    stage(out, "autoencoder", lambda: _train(config, "autoencoder", {"data": str(data)}))
    stage(out, "encode", lambda: encode(data, out / "autoencoder" / "model", latents))
    task: dict[str, Any] = {"latents": str(latents)}
    also: dict[str, Any] = {}
    tiles = config.latents == "tiles"
    played = (1_000_000 if tiles else 0) if config.ends is None else config.ends
    if played:
        ends, seed = out / "ends", (config.seed + 1) % 2**63
        stage(out, "ends", lambda: collect(played, seed, ends, "--ends", str(_ENDS)))
        also = {"also": str(out / "latents-ends")}
        stage(out, "encode-ends", lambda: encode(ends, out / "autoencoder" / "model", out / "latents-ends"))
    stage(out, "predictor", lambda: _train(config, "predictor", task))
    stage(out, "unrolled", lambda: _train(config, "unrolled", task | {"init_from": str(out / "predictor" / "model")}))
    stage(out, "flow", lambda: _train(config, "flow", task | {"init_from": str(out / "unrolled" / "model")}))
    outcomes, last = str(out / "outcomes" / "model"), "settled"
    moving = {"dynamics": str(out / "flow" / "model"), "dreams": 0} if tiles else {}
    stage(out, "outcomes", lambda: _train(config, "outcomes", task | also | moving))
    answering = {"init_from": str(out / "flow" / "model"), "head": outcomes}
    stage(out, "settled", lambda: _train(config, "settled", task | answering))
    dreams = {"dreams": dreams_for(config.minutes, config.stage_steps)}
    if tiles:
        following = {"init_from": str(out / "settled" / "model")}
        stage(out, "camera", lambda: _train(config, "camera", task | dreams | following))
        last = "camera"
    dreaming = {"init_from": outcomes, "dynamics": str(out / last / "model")}
    stage(out, "heads", lambda: _train(config, "heads", task | also | dreams | dreaming))
    stage(out, "bundle", lambda: make_bundle(out, data, config.starts, last))
    return out / "bundle"


def train_stage(file: Path, out: Path, values: dict[str, Any], budget: list[str], more: Sequence[str] = ()) -> None:
    """Run `trainers.train` on a YAML file with some values replaced; resumes.

    Args:
        file: the configuration.
        out: run folder of this one training.
        values: dotted name -> value, replaced in the file's.
        budget: "--minutes" or "--steps", and how many.
        more: further assignments, as `trainers.train --set` takes them.
    """
    run_command([sys.executable, "-m", "trainers.train", str(file), "--out", str(out), "--resume", *budget, "--set",
              *(f"{k}={json.dumps(v)}" for k, v in values.items()), *more])  # fmt: skip


def _train(config: PipelineConfig, name: str, task: dict[str, Any]) -> None:
    more, tiles = [], config.latents == "tiles"
    for item in config.set:
        prefix, separator, rest = item.partition(":")
        if not separator or "=" in prefix:
            more.append(item)
        elif prefix == name:
            more.append(rest)
    budget = (["--steps", str(config.stage_steps)] if config.stage_steps else
              ["--minutes", str(config.minutes * (_TILE_SHARES if tiles else _SHARES)[name])])  # fmt: skip
    values = {f"task.{k}": v for k, v in task.items()} | {"loop.seed": config.seed}
    if tiles:
        values["model"] = _TILE_MODELS.get(name, _TILE_FLOW)
    train_stage(CONFIGS / f"{name}.yaml", config.out / name, values, budget, more)


def encode(data: Path, autoencoder: Path, latents: Path) -> None:
    """Encode a dataset with a trained autoencoder, in a process of its own."""
    run_command([sys.executable, "-m", "trainers.latents", str(data), str(autoencoder), str(latents)])


def make_bundle(out: Path, data: Path, starts: int, dynamics: str = "settled") -> Path:
    """Compose <out>/bundle from the trained stages; `dynamics` names the stage to take.

    Raises:
        BundleError: a stage is missing or damaged, or they belong to different autoencoders.
    """
    autoencoder, ae_facts = load_model(out / "autoencoder" / "model")
    flow, facts = load_model(out / dynamics / "model")
    head, head_facts = load_model(out / "heads" / "model")
    digest = json.loads((out / "autoencoder" / "model" / "model.json").read_text())["sha256"]
    if not digest == facts["autoencoder_sha256"] == head_facts["autoencoder_sha256"]:
        raise ConfigError(f"{out}: dynamics or heads were trained on another autoencoder; delete them and run again")
    dataset = Dataset(data)
    collected = dataset.facts
    game = GameFacts(collected["game"], collected["distribution_mode"], collected["max_steps"],
                     tuple(collected["action_meanings"]))  # fmt: skip
    model = WorldModel(cast(FrameCodec, autoencoder), cast(Dynamics, flow), cast(OutcomeHead, head))
    limits = from_dict(Limits, {k: facts[k] for k in ("latent_max", "latent_rms_max")})
    provenance = {"data": collected, "steps": dataset.manifest["steps"], "dynamics_stage": dynamics,
                  "trained_steps": {"autoencoder": ae_facts["step"], dynamics: facts["step"], "heads": head_facts["step"]},
                  "outcome_share": head_facts["outcome_share"], "heads_also": head_facts.get("also")}  # fmt: skip
    bundle = save_bundle(out / "bundle", model, game, limits, start_bank(dataset, starts), provenance)
    load_bundle(bundle, "cpu")  # what was written must be readable
    return bundle


def start_bank(dataset: Dataset, count: int) -> Starts:
    """First frames of `count` different levels, evenly spread over the dataset's."""
    first: dict[int, tuple[int, int]] = {}
    for k, shard in enumerate(dataset.shards):
        began = np.flatnonzero(shard.first)
        after_end = began[(began == 0) | (shard.terminated | shard.truncated)[began - 1]]
        for t in after_end:
            first.setdefault(int(shard.level_seeds[t]), (k, int(t)))
    levels = sorted(first)
    chosen = [levels[i] for i in np.unique(np.linspace(0, len(levels) - 1, min(count, len(levels))).round().astype(int))]
    frames = np.stack([dataset.shards[k].frames[t] for k, t in (first[level] for level in chosen)])[:, None]
    return Starts(frames, np.zeros((len(chosen), 0), np.uint8), np.array(chosen, np.int32))


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `PipelineConfig` is an option."""
    try:
        config = tyro.cli(PipelineConfig, args=arguments, description=__doc__)
        bundle = run_pipeline(config)
    except DreamenvError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps({"bundle": str(bundle), "config": {k: str(v) for k, v in to_dict(config).items()}}))


if __name__ == "__main__":
    main()
