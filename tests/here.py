"""Programs run in the process of the test, which has loaded already what each takes seconds to load."""

from __future__ import annotations

import io
import runpy
import sys
import warnings
from contextlib import redirect_stdout

import pytest

import agents.benchmark
import agents.real_steps
import agents.rounds  # noqa: F401
import trainers.games
import trainers.objectives
import trainers.table  # noqa: F401
from dreamenv.stages import run_command
from trainers.recipe import load_recipe


def run_here(command: list[str]) -> str:
    """Run the command `python -m name ...` in this process, one at a time; returns the last line that it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), warnings.catch_warnings():
        few = ["--clips", "4"] if command[2] == "trainers.choose" else []  # of 48: what a toy dreams is noise
        patch.setattr(sys, "argv", [*command[2:], *few])
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # the program is imported already
        warnings.filterwarnings("ignore", "rich is experimental")  # so is Stable-Baselines3's progress bar
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    return (printed.getvalue().splitlines() or [""])[-1]


def brief(recipe: str) -> tuple[str, ...]:
    """Settings with which the validations of a recipe's dynamics and its head's dreams take a moment only."""
    tasks = {name: stage.get("task") or {} for name, stage in load_recipe(recipe).stages.items()}
    windows = [f"{name}:task.val_windows=8" for name, task in tasks.items() if task.get("type") == "dynamics"]
    dreaming = [name for name, task in tasks.items() if task.get("type") == "outcome" and task.get("dreams")]
    return (*windows, *(f"{name}:task.drift=4" for name in dreaming))


def all_here(patch: pytest.MonkeyPatch) -> None:
    """Let every program that has stages run them in this process."""
    for name, module in list(sys.modules.items()):
        own = name.partition(".")[0] in ("dreamenv", "trainers", "agents")
        if own and getattr(module, "run_command", None) is run_command:
            patch.setattr(module, "run_command", run_here)
