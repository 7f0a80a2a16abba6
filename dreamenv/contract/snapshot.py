"""The one snapshot layout of both worlds: magic, version, checksum, signature, safetensors payload. Never a pickle."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from dreamenv.artifacts import parse_tensors
from dreamenv.contract.signing import sign, signed
from dreamenv.errors import SnapshotError

_MAGIC = b"DREAMSNP"
_VERSION = 4  # 3: the tensors of a dream's state are called state.<name>; 4: signed
_OLDEST = 2
_HEADER = struct.Struct("<8sI32s")
_SIGNATURE = 32
_REMEDY = "take it again"


def pack(world: str, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """Return snapshot bytes of `arrays` with JSON-able `meta`; `world` names who may restore them."""
    header = json.dumps({"world": world, "meta": meta}, sort_keys=True)  # one key: safetensors does not order several
    payload = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata={"dreamenv": header})
    return _HEADER.pack(_MAGIC, _VERSION, hashlib.sha256(payload).digest()) + sign(payload) + payload


def unpack(world: str, data: bytes, trust: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return (meta, arrays) of snapshot bytes.

    Args:
        world: who restores them.
        data: what `pack` returned.
        trust: False asks for the signature of this user's programs, see `dreamenv.contract.signing`.

    Raises:
        SnapshotError: not bytes, not a snapshot, another version, damaged, of another world, or not signed.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise SnapshotError(f"snapshot of type {type(data).__name__}: expected the bytes that snapshot() returned")
    data = bytes(data)
    if len(data) < _HEADER.size or data[:8] != _MAGIC:
        raise SnapshotError(f"{len(data)} bytes: not a dreamenv snapshot; pass what snapshot() returned")
    _, version, digest = _HEADER.unpack_from(data)
    if not _OLDEST <= version <= _VERSION:
        raise SnapshotError(f"snapshot version {version}: this release reads versions {_OLDEST}..{_VERSION}; {_REMEDY}")
    at = _HEADER.size + (_SIGNATURE if version >= 4 else 0)
    payload = data[at:]
    if hashlib.sha256(payload).digest() != digest:
        raise SnapshotError(f"snapshot checksum differs: the bytes are truncated or altered; {_REMEDY}")
    if not trust and not signed(payload, data[_HEADER.size : at]):
        raise SnapshotError(
            "snapshot is not signed by this user: a forged one can end the process in the game's own code; "
            "pass trust=True if you know where it is from"
        )
    arrays = parse_tensors(load, payload, "snapshot", SnapshotError, _REMEDY)
    meta, found = _read_header(payload)
    if found != world:
        raise SnapshotError(f"snapshot of a {found} world cannot be restored into a {world} world")
    if version == 2 and world == "dream":
        arrays = _from_2(arrays)
    return meta, arrays


def _read_header(payload: bytes) -> tuple[dict[str, Any], str]:
    try:
        (length,) = struct.unpack_from("<Q", payload)
        header = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["dreamenv"])
        meta, world = header["meta"], header["world"]
    except (KeyError, TypeError, ValueError, RecursionError, struct.error):
        meta, world = None, None
    if not isinstance(meta, dict) or not isinstance(world, str):
        raise SnapshotError(f"snapshot header is malformed; {_REMEDY}")
    return meta, world


def check_arrays(arrays: dict[str, np.ndarray], expected: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Raise `SnapshotError` unless arrays have the names, the shapes and the dtypes (name -> both) that they should."""
    for name in sorted(set(expected) | set(arrays)):
        found = (arrays[name].shape, str(arrays[name].dtype)) if name in arrays else None
        if found != expected.get(name):
            raise SnapshotError(f"snapshot: {name} is {found}, expected {expected.get(name)}; {_REMEDY}")


def check_range(name: str, values: np.ndarray, least: int, most: int) -> None:
    """Raise `SnapshotError` unless all integers are in least..most."""
    if values.size and (values.min() < least or values.max() > most):
        raise SnapshotError(f"snapshot: {name} {values.min()}..{values.max()} is outside {least}..{most}; {_REMEDY}")


def _from_2(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Version 2 called the canvas "memory", and had an empty one where dynamics keep none."""
    arrays = dict(arrays)
    memory = arrays.pop("memory", None)
    for name in ("latents", "actions"):
        if name in arrays:
            arrays[f"state.{name}"] = arrays.pop(name)
    return arrays if memory is None or not memory.size else {**arrays, "state.canvas": memory}
