"""Atomic files and folders: a killed process leaves the old artefact or the new one, never a half."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` with the same ending; on success fsync it and rename it over `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial.{path.name}")
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling folder; on success fsync its files and move it to `path`.

    An older folder at `path` is set aside first and removed last, so it survives a failure of the writer.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    aside = path.with_name(f".{path.name}.replaced")
    recover_folder(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _fsync(file)
        _fsync(temporary)
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        _fsync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Finish or undo an `atomic_folder` swap that was killed between its two renames; for the folder's writer only."""
    path = Path(path).absolute()
    aside = path.with_name(f".{path.name}.replaced")
    if aside.exists():
        if path.exists():
            shutil.rmtree(aside)
        else:
            os.replace(aside, path)


def readable_folder(path: str | Path) -> Path:
    """Where a reader finds a folder: at `path`, or set aside if its writer is, or was killed, between two renames."""
    path = Path(path).absolute()
    aside = path.with_name(f".{path.name}.replaced")
    return aside if aside.exists() and not path.exists() else path


def read_json(path: Path, error: type[Exception], remedy: str) -> dict[str, Any]:
    """Read a JSON object; raises `error`, which names the file and the remedy, where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError:
        raise error(f"{path}: not found; {remedy}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: is not JSON ({str(problem)[:200]}); {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: is not a JSON object; {remedy}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused (they are not JSON)."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
