"""The bank of start contexts: packed small, unpacked to the byte, whichever release packed it."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from dreamenv.errors import BundleError
from dreamenv.starts import Starts, pack_starts, parse_starts

SHAPE = (64, 64, 3)


def bank(count: int) -> Starts:
    """Pictures of two backgrounds, each with a square somewhere."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, *SHAPE), dtype=np.uint8)[np.arange(count) % 2][:, None].copy()
    for frame, (y, x) in zip(frames[:, 0], rng.integers(0, 60, (count, 2)), strict=True):
        frame[y : y + 4, x : x + 4] = 255
    return Starts(frames, np.zeros((count, 0), np.uint8), np.arange(count, dtype=np.int32))


def same(a: Starts, b: Starts) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("frames", "actions", "level_seeds"))


def test_pictures_that_share_a_background_take_little_room() -> None:
    starts = bank(200)
    packed = pack_starts(starts)
    assert len(packed) < 200 * 300, "a background alone has 12 KB"
    assert same(parse_starts(packed, Path("s"), SHAPE, "retrain"), starts)


def test_banks_of_older_releases_are_read() -> None:
    starts = bank(3)
    flat = np.frombuffer(zlib.compress(starts.frames.tobytes(), 9), np.uint8)
    zipped = save({"frames": flat, "actions": starts.actions, "level_seeds": starts.level_seeds})
    plain = save({"frames": starts.frames, "actions": starts.actions, "level_seeds": starts.level_seeds})
    for packed in (zipped, plain):
        assert same(parse_starts(packed, Path("s"), SHAPE, "retrain"), starts)


@pytest.mark.parametrize("cut", [1, 20, 400])
def test_a_bank_cut_short_is_refused(cut: int) -> None:
    arrays = load(pack_starts(bank(5)))
    arrays["frames"] = arrays["frames"][:-cut].copy()
    with pytest.raises(BundleError, match="cut short"):
        parse_starts(save(arrays), Path("s"), SHAPE, "retrain")


def test_a_bank_of_more_pictures_than_it_says_is_refused() -> None:
    arrays = load(pack_starts(bank(5)))
    arrays |= {name: arrays[name][:4].copy() for name in ("actions", "level_seeds")}
    with pytest.raises(BundleError, match="goes on"):
        parse_starts(save(arrays), Path("s"), SHAPE, "retrain")
