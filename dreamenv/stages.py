"""Programs of several stages, each resumable: a run folder remembers its settings and which stages are done."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreamenv.artifacts import check_same, only_writer, present, read_json, write_json
from dreamenv.errors import ConfigError


@contextmanager
def begun(out: Path, settings: dict[str, str]) -> Iterator[None]:
    """Begin a run folder, or go on with one that was begun with the same settings, and hold it meanwhile.

    Raises:
        ConfigError: it was begun with others.
        BusyError: another process is working in it.
        StorageError: it cannot be written.
    """
    with only_writer(out):
        if present(out / "pipeline.json"):
            before = read_json(out / "pipeline.json", ConfigError, "delete the run folder")
            unset = str(None)  # what an older release did not know it left unset
            then, now = ({k: v for k, v in s.items() if v != unset} for s in (before, settings))
            check_same(out, then, now, ConfigError)
        write_json(out / "pipeline.json", settings)
        yield


def stage(out: Path, name: str, work: Callable[[], Any]) -> Any:
    """Do `work` unless this run folder has done it before; returns what it returned, then or now.

    Args:
        out: run folder.
        name: of the stage.
        work: its result must be JSON, or it is not kept.

    Raises:
        ConfigError: the record of an earlier run is damaged.
    """
    marker = out / "stages" / f"{name}.json"
    if present(marker):
        print(f"[{name}] done before", flush=True)
        return read_json(marker, ConfigError, "delete it to run the stage again").get("result")
    print(f"[{name}]", flush=True)
    result = work()
    kept = result if isinstance(result, (str, int, float, dict, list)) else None
    write_json(marker, {"done": True, "result": kept})
    return kept


def together(jobs: int, works: Sequence[Callable[[], Any]]) -> None:
    """Do all of `works`, `jobs` of them at the same time; the first error is raised when all have ended."""
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result()


def program(name: str, *positional: Any, **options: Any) -> list[str]:
    """The command `python -m name`: None and False leave an option out, True is a switch, a list is several values."""
    command = [sys.executable, "-m", name, *map(str, positional)]
    for key, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        command += [f"--{key.replace('_', '-')}", *map(str, values)]
    return command


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1  # of Linux: prctl(2)
_DIE_WITH_PARENT = _die_with_parent if sys.platform.startswith("linux") else None
"""A stage whose program was killed would write on, while the same program, started again, does its work anew."""


def run_command(command: list[str]) -> str:
    """Run one stage's program, its standard output shown as it comes; returns the last line of that.

    Raises:
        ConfigError: it ended with an error.
    """
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_DIE_WITH_PARENT) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        raise ConfigError(f"stage command ended with status {process.returncode}: {' '.join(command)}")
    return last
