"""Programs of several stages, each resumable: a run folder remembers its settings and which stages are done."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamenv.artifacts import read_json, write_json
from dreamenv.errors import ConfigError


def begin(out: Path, settings: dict[str, str]) -> None:
    """Begin a run folder, or go on with one that was begun with the same settings.

    Raises:
        ConfigError: it was begun with others.
    """
    if (out / "pipeline.json").exists():
        begun = read_json(out / "pipeline.json", ConfigError, "delete the run folder")
        for key in sorted(set(begun) | set(settings)):
            if begun.get(key) != settings.get(key):
                raise ConfigError(
                    f"{out}: was begun with {key} = {begun.get(key)}, now {settings.get(key)}; "
                    "use the same settings to resume, or another --out"
                )
    write_json(out / "pipeline.json", settings)


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
    if marker.exists():
        print(f"[{name}] done before", flush=True)
        return read_json(marker, ConfigError, "delete it to run the stage again").get("result")
    print(f"[{name}]", flush=True)
    result = work()
    kept = result if isinstance(result, (str, int, float, dict, list)) else None
    write_json(marker, {"done": True, "result": kept})
    return kept


def run_command(command: list[str]) -> str:
    """Run one stage's program, its standard output shown as it comes; returns the last line of that.

    Raises:
        ConfigError: it ended with an error.
    """
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        raise ConfigError(f"stage command ended with status {process.returncode}: {' '.join(command)}")
    return last
