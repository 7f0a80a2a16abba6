"""Programs run in the process of the test, which has loaded already what each takes seconds to load."""

from __future__ import annotations

import io
import runpy
import sys
import warnings
from contextlib import redirect_stdout

import pytest

from dreamenv.stages import run_command


def run_here(command: list[str]) -> str:
    """Run `python -m name ...` in this process, which has loaded already what that takes seconds to load."""
    if command[2] == "agents.train":  # the libraries that it uses warn
        return run_command(command)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), warnings.catch_warnings():
        patch.setattr(sys, "argv", command[2:])
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # the program is imported already
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    return (printed.getvalue().splitlines() or [""])[-1]
