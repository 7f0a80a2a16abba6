"""Train one model: `python -m trainers.train trainers/configs/autoencoder.yaml [--minutes M] [--resume]`."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from dreamenv.bundle import pick_device
from dreamenv.config import check, from_dict, load_yaml, to_dict
from dreamenv.errors import ConfigError, DreamenvError
from dreamenv.memory import keep_freed_memory
from dreamenv.models.registry import build_model
from trainers.loop import Loop, LoopConfig

_TASKS = {
    "autoencoder": ("trainers.autoencoder", "AutoencoderTask"),
    "tile_autoencoder": ("trainers.tile_autoencoder", "TileAutoencoderTask"),
    "latent_flow": ("trainers.dynamics", "DynamicsTask"),
    "tile_flow": ("trainers.dynamics", "DynamicsTask"),
    "outcome_head": ("trainers.heads", "HeadsTask"),
    "tile_outcome_head": ("trainers.heads", "HeadsTask"),
}
_SPECIAL = {"camera": ("trainers.camera", "CameraTask")}  # by task.type


@dataclass(frozen=True)
class TrainArguments:
    """Train one model from a YAML file with the sections model, task and loop."""

    config: Annotated[Path, tyro.conf.Positional]
    """The YAML file."""
    out: Path | None = None
    """Run folder; default runs/<name of the file>."""
    minutes: float | None = None
    """Wall-clock budget, instead of the file's."""
    steps: int | None = None
    """Step budget, instead of the file's."""
    resume: bool = False
    """Go on from the run folder's checkpoint, if there is one."""
    set: tuple[str, ...] = ()
    """Overrides such as task.data=data/maze loop.lr=0.001."""


def build_task(values: dict[str, Any], seed: int) -> Any:
    """Build the task that trains a config's model; raises `ConfigError`."""
    model = values.get("model", {})
    build_model(model)  # before any data is read: its errors name the nearest type or key
    settings, (module, name) = values.get("task", {}), _TASKS[model["type"]]
    if isinstance(settings, dict) and "type" in settings:
        kind, settings = settings["type"], {k: v for k, v in settings.items() if k != "type"}
        check(isinstance(kind, str) and kind in _SPECIAL, f"task.type {kind!r}: must be {', '.join(_SPECIAL)}, or left out")
        module, name = _SPECIAL[kind]
    tasks = importlib.import_module(module)  # each needs other libraries
    config = from_dict(getattr(tasks, f"{name}Config"), settings, "task")
    return getattr(tasks, name)(config, model, seed)


def override(values: dict[str, Any], assignments: tuple[str, ...]) -> dict[str, Any]:
    """Return `values` with "section.key=yaml value" assignments applied; raises `ConfigError`."""
    import yaml

    values = copy.deepcopy(values)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        *sections, key = path.split(".")
        if not separator or not key:
            raise ConfigError(f"--set {assignment!r}: expected section.key=value")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {assignment!r}: {section!r} is not a section")
        try:
            target[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {assignment!r}: {' '.join(str(error).split())}") from None
    return values


def train(values: dict[str, Any], out: Path, resume: bool = False) -> dict[str, float]:
    """Train the model that `values` (model, task, loop) describes into `out`; returns the last validation.

    Raises:
        ConfigError, DatasetError, CheckpointError: as their names say.
    """
    if unknown := set(values) - {"model", "task", "loop"}:
        raise ConfigError(f"{sorted(unknown)[0]}: unknown section; there are model, task and loop")
    loop = from_dict(LoopConfig, values.get("loop", {}), "loop")
    pick_device(loop.device)
    task = build_task(values, loop.seed)
    budget = {k: v for k, v in to_dict(loop).items() if k not in ("log_every", "wandb", "workers", "cuda_graphs")}
    identity = {"model": values["model"], "task": values.get("task", {}), "loop": budget}
    return Loop(loop, task, out, identity).run(resume)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    args = tyro.cli(TrainArguments, args=arguments, description=__doc__)
    keep_freed_memory()
    try:
        values = override(load_yaml(args.config), args.set)
        loop = from_dict(LoopConfig, values.get("loop", {}), "loop")
        if args.minutes is not None:
            loop = replace(loop, minutes=args.minutes)
        if args.steps is not None:
            loop = replace(loop, steps=args.steps, minutes=None)
        values["loop"] = to_dict(loop)
        figures = train(values, args.out or Path("runs") / args.config.stem, args.resume)
        print(json.dumps(figures))
    except DreamenvError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
