"""Windows of consecutive transitions that never cross an episode, and the split of a dataset by level."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

HELD_OUT_FROM = 10000
"""First level that no model or agent ever trains on."""


def split_levels(level_seeds: np.ndarray, val_ratio: float, seed: int) -> np.ndarray:
    """Return bool (S,): True where a step belongs to a validation level.

    A level is wholly in one part; which part depends on (seed, level) alone, so it is the same in every shard.
    The hash is SplitMix64 (Steele et al. 2014).
    """
    with np.errstate(over="ignore"):
        x = level_seeds.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2**53 < val_ratio


class Windows:
    """Start indices of all windows of `length` consecutive observations inside one episode of one shard.

    A window at s covers observations s .. s + length - 1, and actions s .. s + length - 2 lead from each to the next.
    Its last observation may be an episode's last; none of its earlier ones is.

    Args:
        first: per shard, bool (S,), see `dreamenv.data.writer`.
        length: observations in a window.
        keep: per shard, bool (S,); a window is kept if its first step is. Default: all.

    Attributes:
        shard: int32 (W,) the shard of each window.
        start: int64 (W,) its first index there.
    """

    def __init__(self, first: Sequence[np.ndarray], length: int, keep: Sequence[np.ndarray] | None = None) -> None:
        shards, starts = [], []
        for k, flags in enumerate(first):
            flags = np.asarray(flags)
            boundaries = np.concatenate([[0], np.cumsum(flags)])  # boundaries[i] = starts before index i
            valid = np.arange(max(len(flags) - length + 1, 0))
            inside = boundaries[valid + length] == boundaries[valid + 1]
            if keep is not None:
                inside &= np.asarray(keep[k])[valid]
            starts.append(valid[inside])
            shards.append(np.full(int(inside.sum()), k, np.int32))
        self.length = length
        self.shard = np.concatenate(shards) if shards else np.zeros(0, np.int32)
        self.start = np.concatenate(starts) if starts else np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.start)
