"""The one snapshot layout of both worlds: magic, version, checksum, safetensors payload. Never a pickle."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dreamenv.errors import SnapshotError

_MAGIC = b"DREAMSNP"
_VERSION = 3  # 3: the tensors of a dream's state are called state.<name>
_OLDEST = 2
_HEADER = struct.Struct("<8sI32s")


def pack(world: str, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """Return snapshot bytes of `arrays` with JSON-able `meta`; `world` names who may restore them."""
    header = json.dumps({"world": world, "meta": meta}, sort_keys=True)  # one key: safetensors does not order several
    payload = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata={"dreamenv": header})
    return _HEADER.pack(_MAGIC, _VERSION, hashlib.sha256(payload).digest()) + payload


def unpack(world: str, data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return (meta, arrays) of snapshot bytes.

    Raises:
        SnapshotError: not bytes, not a snapshot, another version, damaged, or of another world.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise SnapshotError(f"snapshot of type {type(data).__name__}: expected the bytes that snapshot() returned")
    data = bytes(data)
    if len(data) < _HEADER.size or data[:8] != _MAGIC:
        raise SnapshotError(f"{len(data)} bytes: not a dreamenv snapshot; pass what snapshot() returned")
    _, version, digest = _HEADER.unpack_from(data)
    if not _OLDEST <= version <= _VERSION:
        raise SnapshotError(
            f"snapshot version {version}: this release reads versions {_OLDEST}..{_VERSION}; take it again"
        )
    payload = data[_HEADER.size :]
    if hashlib.sha256(payload).digest() != digest:
        raise SnapshotError("snapshot checksum differs: the bytes are truncated or altered; take it again")
    try:
        arrays = load(payload)
    except SafetensorError as error:
        raise SnapshotError(f"snapshot payload is malformed ({error}); take it again") from None
    (length,) = struct.unpack_from("<Q", payload)
    header = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["dreamenv"])
    if header["world"] != world:
        raise SnapshotError(f"snapshot of a {header['world']} world cannot be restored into a {world} world")
    if version == 2 and world == "dream":
        arrays = _from_2(arrays)
    return header["meta"], arrays


def _from_2(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Version 2 called the canvas "memory", and had an empty one where dynamics keep none."""
    arrays = dict(arrays)
    memory = arrays.pop("memory", None)
    for name in ("latents", "actions"):
        if name in arrays:
            arrays[f"state.{name}"] = arrays.pop(name)
    return arrays if memory is None or not memory.size else {**arrays, "state.canvas": memory}
