"""The bank of real start contexts of a bundle, packed and unpacked."""

from __future__ import annotations

import lzma
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from dreamenv.artifacts import parse_tensors
from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.errors import BundleError

_LIMIT = 2**28  # bytes of frames, unpacked
_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0, "lc": 4, "lp": 0}
]  # for bytes, not words
_XZ = b"\xfd7zXZ\x00"  # how an .xz stream begins; zlib's, of bundles before version 3, begin otherwise


@dataclass(frozen=True)
class Starts:
    """Bank of real start contexts.

    Attributes:
        frames: uint8 (S, T, h, w, c).
        actions: uint8 (S, T - 1).
        level_seeds: int32 (S,).
    """

    frames: np.ndarray
    actions: np.ndarray
    level_seeds: np.ndarray


def pack_starts(starts: Starts) -> bytes:
    """A bank as a safetensors file, its frames compressed as one: many of a game's pictures share a background."""
    packed = lzma.compress(np.ascontiguousarray(starts.frames).tobytes(), lzma.FORMAT_XZ, filters=_FILTERS)
    packed = np.frombuffer(packed, np.uint8)
    return save_arrays({"frames": packed, "actions": starts.actions, "level_seeds": starts.level_seeds})


def parse_starts(data: bytes, path: Path, frame: tuple[int, int, int], remedy: str) -> Starts:
    """Read what `pack_starts` wrote, of frames (H, W, C); raises `BundleError`, naming `path`, if it is damaged."""
    arrays = parse_tensors(load_arrays, data, path, BundleError, remedy)
    try:
        frames, actions, levels = (arrays[k] for k in ("frames", "actions", "level_seeds"))
        if frames.ndim == 1 and frames.dtype == np.uint8 and actions.ndim == 2:  # packed; older ones are as they are
            shape = (actions.shape[0], actions.shape[1] + 1, *frame)
            if math.prod(shape) > _LIMIT:
                raise ValueError(f"{math.prod(shape)} bytes of frames, at most {_LIMIT} are read")
            frames = np.frombuffer(bytearray(_unpacked(frames.tobytes(), math.prod(shape) + 1)), np.uint8)
            frames = frames.reshape(shape)
    except (KeyError, ValueError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise BundleError(f"{path}: is malformed ({error}); {remedy}") from None
    s, t = frames.shape[:2] if frames.ndim == 5 else (0, 0)
    sound = s >= 1 and t >= 1 and frames.shape[2:] == frame and frames.dtype == np.uint8 and levels.shape == (s,)
    sound = sound and actions.shape == (s, t - 1) and actions.dtype == np.uint8 and not (actions >= NUM_ACTIONS).any()
    if not sound:
        raise BundleError(
            f"{path}: frames {frames.dtype} {frames.shape}, actions {actions.shape}, level_seeds {levels.shape} are "
            f"not a bank of start contexts; {remedy}"
        )
    return Starts(frames, actions, levels)


def _unpacked(packed: bytes, most: int) -> bytes:
    """What was compressed, at most so many bytes of it: a damaged file must not fill the memory."""
    xz = packed.startswith(_XZ)
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**27) if xz else zlib.decompressobj()
    unpacked = stream.decompress(packed, most)
    if not stream.eof or stream.unused_data:
        raise ValueError(f"it goes on after {len(unpacked)} bytes, or is cut short")
    return unpacked
