"""What a run writes down: its configuration and code, metrics.csv, TensorBoard, and W&B where it is asked for."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

import dreamenv
from dreamenv.artifacts import atomic_file, write_json


def write_run(folder: Path, settings: dict[str, Any]) -> None:
    """Write config.yaml, from which `trainers.train` repeats the run, and run.json: the code and the command."""
    with atomic_file(folder / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    write_json(folder / "run.json", code_version() | {"command": sys.argv})


def code_version() -> dict[str, Any]:
    """Versions of dreamenv (with the commit, in a git checkout), torch and Python."""
    root = Path(dreamenv.__file__).parents[1]
    commit: str | None = None
    if (root / ".git").exists():
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            commit = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            commit = None
    python = ".".join(map(str, sys.version_info[:3]))
    return {"dreamenv": dreamenv.__version__, "commit": commit, "torch": torch.__version__, "python": python}


class Log:
    """metrics.csv in long form (step, name, value), TensorBoard if installed, W&B if asked for.

    Args:
        folder: the run folder.
        step: from which it goes on; later rows are dropped.
        wandb_project: empty turns W&B off.
        settings: the configuration, which TensorBoard and W&B get too.
    """

    def __init__(self, folder: Path, step: int, wandb_project: str, settings: dict[str, Any]) -> None:
        path = folder / "metrics.csv"
        rows = []
        if path.exists():  # a resumed run repeats the steps after its checkpoint: drop their old rows
            with open(path, newline="") as file:
                rows = [
                    r
                    for r in csv.reader(file)
                    if len(r) == 3 and r[0].isascii() and r[0].isdigit() and int(r[0]) <= step
                ]
        with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([["step", "name", "value"], *rows])
        self._file = open(path, "a", newline="")  # noqa: SIM115 - kept open for the run
        self._csv = csv.writer(self._file)
        self._board: Any = None
        self._wandb: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
            text = yaml.safe_dump(settings, sort_keys=False).replace("\n", "\n    ")
            self._board.add_text("config", f"    {text}", step)
        except ImportError:
            pass
        if wandb_project:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb = wandb.init(project=wandb_project, name=folder.name, dir=str(folder), config=settings)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one step's values."""
        self._csv.writerows([step, name, f"{value:.6g}"] for name, value in values.items())
        self._file.flush()
        print(f"step {step}: " + " ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
