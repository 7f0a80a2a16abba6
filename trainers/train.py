"""Train one model: `python -m trainers.train FILE.yaml [--minutes M] [--resume]`.

A file has the sections model, task and loop.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from dreamenv.config import check, from_dict, load_yaml, to_dict
from dreamenv.console import errors_in_one_line
from dreamenv.device import keep_freed_memory, pick_device
from dreamenv.errors import ConfigError
from dreamenv.models.registry import lookup
from trainers.loop import Loop, LoopConfig
from trainers.recipe import check_values
from trainers.tasks.interface import Task


@dataclass(frozen=True)
class TrainArguments:
    """Train one model from a YAML file with the sections model, task and loop."""

    config: Annotated[Path, tyro.conf.Positional]
    """The YAML file; a run folder's config.yaml repeats that run."""
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


def build_task(values: dict[str, Any], seed: int) -> Task:
    """Build the task of a configuration; raises `ConfigError`."""
    check_values({"loop": {}} | values)  # before any data is read: its errors name the nearest type or key
    settings = values["task"]
    cls, config = lookup("task", settings["type"], "task")
    filled = from_dict(config, {k: v for k, v in settings.items() if k != "type"}, "task")
    return cls(filled, values["model"], seed)


def check_overrides(items: Sequence[str], stages: Sequence[str]) -> None:
    """Raise `ConfigError` for an override that is not `[stage:]section.key=value`, or names no stage that trains."""
    for item in items:
        name, separator, assignment = item.partition(":")
        prefixed = bool(separator) and "=" not in name
        check(not prefixed or name in stages, f"set {item!r}: there is no stage {name!r}, only {', '.join(stages)}")
        check("=" in (assignment if prefixed else item), f"set {item!r}: expected [stage:]section.key=value")


def of_stage(items: Sequence[str], stage: str) -> tuple[str, ...]:
    """Of overrides `[stage:]section.key=value`, those for one stage: its own, and those that name none."""
    mine = []
    for item in items:
        prefix, separator, rest = item.partition(":")
        if not separator or "=" in prefix:
            mine.append(item)
        elif prefix == stage:
            mine.append(rest)
    return tuple(mine)


def override(values: dict[str, Any], assignments: tuple[str, ...]) -> dict[str, Any]:
    """Return `values` with "section.key=yaml value" assignments applied; raises `ConfigError`."""
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
        except (yaml.YAMLError, RecursionError) as error:
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
    settings = {"model": values["model"], "task": values["task"], "loop": to_dict(loop)}
    return Loop(loop, task, out, settings).run(resume)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    args = tyro.cli(TrainArguments, args=arguments, description=__doc__)
    with errors_in_one_line():
        keep_freed_memory()
        values = override(load_yaml(args.config), args.set)
        loop = from_dict(LoopConfig, values.get("loop", {}), "loop")
        if args.minutes is not None:
            loop = replace(loop, minutes=args.minutes)
        if args.steps is not None:
            loop = replace(loop, steps=args.steps, minutes=None)
        values["loop"] = to_dict(loop)
        figures = train(values, args.out or Path("runs") / args.config.stem, args.resume)
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
