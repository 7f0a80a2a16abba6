"""A dataset folder as a `torch.utils.data.Dataset` of short sequences, read from disk sample by sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from dreamenv.config import check
from dreamenv.contract.frames import NATIVE, check_frame, observe
from dreamenv.data.reader import Dataset
from dreamenv.data.windows import Windows, split_levels
from dreamenv.errors import DatasetError


class Sequence(NamedTuple):
    """One sample.

    Attributes:
        past_frames: float32 (n_past, c, h, w) in [0, 1]; grey ones have no channel axis, (n_past, h, w).
        past_actions: int64 (n_past - 1,), those between them.
        future_actions: int64 (n_future,), each leads to one of the frames that follow.
        future_frames: float32 (n_future, c, h, w), or (n_future, h, w).
        done: bool (), whether the episode ends with the action taken at the last of them.
    """

    past_frames: Tensor
    past_actions: Tensor
    future_actions: Tensor
    future_frames: Tensor
    done: Tensor


class OfflineDataset(TorchDataset[Sequence]):
    """All sequences of `n_past + n_future` frames inside one episode, for any PyTorch `DataLoader`.

    Args:
        folder: a dataset folder, see `python -m envs.collect`.
        n_past, n_future: frames given, and frames to predict.
        frame: (H, W, C) of a frame; (84, 84, 1) is grey and resized as in `envs.wrappers.grayscale_stack`.
        split: "train", "val" or "all". Levels are wholly in one part.
        val_ratio: share of levels in "val".
        seed: decides which.

    Raises:
        DatasetError: damaged, or no episode is long enough.
        ConfigError: a value outside its range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> data = OfflineDataset("data/coinrun", frame=(84, 84, 1))
        >>> batch = next(iter(DataLoader(data, batch_size=32, shuffle=True)))
    """

    def __init__(
        self,
        folder: str | Path,
        n_past: int = 4,
        n_future: int = 4,
        frame: tuple[int, int, int] = NATIVE,
        split: Literal["train", "val", "all"] = "all",
        val_ratio: float = 0.1,
        seed: int = 0,
    ) -> None:
        check(n_past >= 1, f"n_past {n_past}: must be >= 1")
        check(n_future >= 1, f"n_future {n_future}: must be >= 1")
        check(split in ("train", "val", "all"), f"split {split!r}: must be 'train', 'val' or 'all'")
        check(0 <= val_ratio <= 1, f"val_ratio {val_ratio}: must be in 0..1")
        self.folder, self.n_past, self.n_future, self.frame = (
            Path(folder),
            n_past,
            n_future,
            check_frame(frame, "frame"),
        )
        self.split = split
        self.data = Dataset(folder)
        parts = [split_levels(s.level_seeds, val_ratio, seed) for s in self.data.shards]
        keep = None if split == "all" else [part == (split == "val") for part in parts]
        windows = Windows([s.first for s in self.data.shards], n_past + n_future, keep)
        if not len(windows):
            raise DatasetError(
                f"{folder}: has no {n_past + n_future} successive frames in split {split!r}; collect more"
            )
        self._shard, self._start = windows.shard, windows.start

    def __len__(self) -> int:
        """How many sequences."""
        return len(self._start)

    def __getitem__(self, index: int) -> Sequence:
        """One of them."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index}: there are {len(self)} sequences")
        shard, start = self.data.shards[self._shard[index]], int(self._start[index])
        middle, end = start + self.n_past, start + self.n_past + self.n_future
        frames = torch.from_numpy(observe(np.array(shard.frames[start:end]), self.frame)).movedim(-1, 1)
        images = frames.float().div_(255)
        images = images[:, 0] if self.frame[2] == 1 else images
        actions = torch.from_numpy(shard.actions[start : end - 1].astype(np.int64))
        done = torch.tensor(bool(shard.terminated[end - 1] or shard.truncated[end - 1]))
        return Sequence(
            images[: self.n_past],
            actions[: middle - start - 1],
            actions[middle - start - 1 :],
            images[self.n_past :],
            done,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory maps, which a loader's worker opens itself."""
        return {name: value for name, value in self.__dict__.items() if name != "data"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the folder again."""
        self.__dict__.update(state)
        self.data = Dataset(self.folder)
