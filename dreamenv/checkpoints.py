"""Checkpoints as folders: `state.json` with a checksum of its own, and tensors whose digests it holds. No pickle.

The checkpoint before is kept beside each, and taken where the last one is damaged.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamenv.artifacts import (
    TENSORS_LIMIT,
    atomic_folder,
    checksum,
    read_file,
    read_json,
    recover_folder,
    sha256_file,
    write_json,
)
from dreamenv.errors import CheckpointError

REMEDY = "delete the checkpoint to start anew"


def before(folder: Path) -> Path:
    """Where the checkpoint before is kept."""
    return folder.with_name(f"{folder.name}-before")


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from; an interrupted move is finished first."""
    recover_folder(folder)
    return folder.exists() or before(folder).exists()


def discard(folder: Path) -> None:
    """Remove a checkpoint and the one before it."""
    for path in (folder, before(folder)):
        shutil.rmtree(path, ignore_errors=True)


def write(folder: Path, version: int, identity: str, state: dict[str, Any], parts: Mapping[str, bytes]) -> None:
    """Write a checkpoint atomically.

    Args:
        folder: of the checkpoint.
        version: of the format.
        identity: names the configuration; only the same one may go on from it.
        state: JSON.
        parts: name -> bytes of a safetensors file.
    """
    with atomic_folder(folder, before(folder)) as temporary:
        for name, data in parts.items():
            (temporary / f"{name}.safetensors").write_bytes(data)
        digests = {name: sha256_file(temporary / f"{name}.safetensors") for name in parts}
        whole = {**state, "format_version": version, "identity": identity, "sha256": digests}
        write_json(temporary / "state.json", whole | {"checksum": checksum(whole)})


def read(folder: Path, version: int, identity: str, parts: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the state and the parts of a checkpoint, or of the one before where this one is damaged, and say so.

    Raises:
        CheckpointError: both are damaged, or it is of another version or configuration.
    """
    try:
        state, data = _read(folder, version, parts)
    except CheckpointError as error:
        if not before(folder).exists():
            raise
        try:
            state, data = _read(before(folder), version, parts)
        except CheckpointError:
            raise error from None
        print(f"{error}. Going on from the checkpoint before it.", file=sys.stderr, flush=True)
    if state["identity"] != identity:
        raise CheckpointError(f"{folder}: was made with another configuration; use the same one, or another --out")
    return state, data


def _read(folder: Path, version: int, parts: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, bytes]]:
    path = folder / "state.json"
    state = read_json(path, CheckpointError, REMEDY)
    found = state.get("format_version", 1)
    if found != version:
        raise CheckpointError(f"{path}: format_version {found!r}; this release resumes {version}; {REMEDY}")
    if state.pop("checksum", None) != checksum(state):
        raise CheckpointError(f"{path}: its contents do not match its checksum, it was altered; {REMEDY}")
    digests = state.get("sha256")
    if not isinstance(digests, dict) or set(digests) != set(parts) or not isinstance(state.get("identity"), str):
        raise CheckpointError(f"{path}: identity or sha256 is missing or of another type; {REMEDY}")
    names = {name: folder / f"{name}.safetensors" for name in parts}
    data = {n: read_file(p, CheckpointError, REMEDY, TENSORS_LIMIT, str(digests[n])) for n, p in names.items()}
    return state, data
