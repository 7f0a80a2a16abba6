"""Banks of start contexts: the real moments from which a bundle's dreams may start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from dreamenv.contract.frames import NATIVE, observe
from dreamenv.data.reader import Dataset
from dreamenv.starts import Starts, pack_starts

_LATE = 64  # steps into an episode; the recipes cut off episodes after 128
_MOMENTS = 8  # of a level, where the pictures of levels are dear
_FIRST, _NEAR = 64, 1.1  # places that are packed first, and how nearly they must fill their room
_Item = TypeVar("_Item")
Places = list[tuple[int, int]]  # (shard, step)


def start_bank(
    dataset: Dataset, count: int, frame: tuple[int, int, int] = NATIVE, game: str | None = None, kib: int | None = None
) -> Starts:
    """Frames where dreams may start.

    First frames of different levels, evenly spread over those that there are. Where episodes are long, so that a
    quarter of all steps lie 64 steps or more into theirs, half of the bank are such later moments, evenly spread too.

    If so many do not fit, there are fewer of them, or eight moments of each of still fewer levels: whichever has more
    places times the square root of its levels. A new level teaches more than a new moment of a level. But pictures of
    one level share a background, so where these do not pack well a new moment takes a tenth of the bytes.

    Args:
        dataset: of recorded play.
        count: how many frames; fewer where there are not so many.
        frame: (H, W, C) of a frame.
        game: of whose part of the dataset; None for all.
        kib: most KiB that they take, packed, though one frame is taken at least; None for no limit.

    Returns:
        The bank: frames uint8 (S, 1, *frame), without actions, with the level of each.
    """
    bank = _fitting(_of_levels, dataset, count, frame, game, kib)
    if kib is None or len(bank.frames) == len(_of_levels(dataset, game, count)):
        return bank
    if not _of_moments(dataset, game, count):
        return bank
    return max(bank, _fitting(_of_moments, dataset, count, frame, game, kib), key=_worth)


def _worth(bank: Starts) -> float:
    return len(bank.frames) * math.sqrt(len(np.unique(bank.level_seeds)))


def _fitting(
    choose: Callable[[Dataset, str | None, int], Places],
    dataset: Dataset,
    count: int,
    frame: tuple[int, int, int],
    game: str | None,
    kib: int | None,
) -> Starts:
    """A bank of at most `count` chosen places, of so many that they fit, or of one."""
    n, fitting, shrunk = count if kib is None else min(count, _FIRST), None, False
    while True:
        chosen = choose(dataset, game, n)
        frames = np.stack([dataset.shards[k].frames[t] for k, t in chosen])[:, None]
        levels = np.array([dataset.shards[k].level_seeds[t] for k, t in chosen], np.int32)
        bank = Starts(observe(frames, frame), np.zeros((len(chosen), 0), np.uint8), levels)
        room = math.inf if kib is None else kib * 1024 / len(pack_starts(bank))  # as often it would fit
        if room >= 1 or n == 1:
            if n >= count or shrunk or room < _NEAR:
                return bank
            fitting, n = bank, min(count, int(n * room))
        else:
            n, shrunk = max(int(0.9 * n * room), 1), True
            if fitting is not None and n <= len(fitting.frames):
                return fitting


def _of_levels(dataset: Dataset, game: str | None, count: int) -> Places:
    """First frames of many levels, and later moments if episodes are long."""
    first: dict[int, tuple[int, int]] = {}
    later: Places = []
    steps = 0
    for k, shard in enumerate(dataset.shards):
        if game not in (None, shard.game):
            continue
        for t in np.flatnonzero(shard.first):
            first.setdefault(int(shard.level_seeds[t]), (k, int(t)))
        age = np.arange(len(shard)) - np.maximum.accumulate(np.where(shard.first, np.arange(len(shard)), 0))
        later += [(k, int(t)) for t in np.flatnonzero(age >= _LATE)]
        steps += len(shard)
    late = count // 2 if 4 * len(later) >= steps else 0
    begins = [first[level] for level in sorted(first)]
    return _spread(begins, count - late) + _spread(later, late)


def _of_moments(dataset: Dataset, game: str | None, count: int) -> Places:
    """Eight moments of the longest episode of each of few levels, first frames first; none if all are too short."""
    longest: dict[int, tuple[int, int, int]] = {}  # level -> length, shard, first step
    for k, shard in enumerate(dataset.shards):
        if game not in (None, shard.game):
            continue
        begins = np.flatnonzero(shard.first).tolist()
        for t, end in zip(begins, [*begins[1:], len(shard)], strict=True):
            level = int(shard.level_seeds[t])
            longest[level] = max(longest.get(level, (0, 0, 0)), (end - t, k, t))
    played = [longest[level] for level in sorted(longest) if longest[level][0] >= _MOMENTS]
    levels = _spread(played, max(count // _MOMENTS, 1))
    return [(k, t + length * j // _MOMENTS) for j in range(_MOMENTS) for length, k, t in levels][:count]


def _spread(items: list[_Item], count: int) -> list[_Item]:
    """`count` of the items, or all if there are fewer, evenly spread."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]
