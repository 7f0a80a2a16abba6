"""Encoded datasets: latents next to the actions, rewards and flags of the frames they came from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamenv.artifacts import open_array, read_json, sha256_file
from dreamenv.contract.actions import NOOP
from dreamenv.contract.frames import observe
from dreamenv.data import Dataset, Windows, split_levels
from dreamenv.errors import DatasetError
from dreamenv.models.interface import Codec
from trainers.encode import FORMAT_VERSION, latents_identity, load_codec, shard_names

_PROBED = 64  # latents that tell how much each channel weighs
_REMEDY = "encode the dataset: python -m trainers.encode DATA CODEC OUT"


class Joined:
    """Arrays (n, ...) one after the other, read where they are asked: memory-mapped files fill no memory of their own.

    Attributes:
        shape: of all of them as one; dtype: of each.
    """

    def __init__(self, parts: list[np.ndarray]) -> None:
        self._parts = parts
        self._begin = np.cumsum([0] + [len(part) for part in parts])
        self.shape, self.dtype = (int(self._begin[-1]), *parts[0].shape[1:]), parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray | slice) -> np.ndarray:
        """The entries (..., *shape[1:]) at indices int64 (...) from 0 on, or where bool (len(self),) says so."""
        wanted = np.arange(*indices.indices(len(self))) if isinstance(indices, slice) else np.asarray(indices)
        wanted = np.flatnonzero(wanted) if wanted.dtype == bool else wanted
        flat = wanted.reshape(-1)
        out = np.empty((len(flat), *self.shape[1:]), self.dtype)
        which = np.searchsorted(self._begin, flat, side="right") - 1
        for k in np.unique(which):
            rows = np.flatnonzero(which == k)
            out[rows] = self._parts[k][flat[rows] - self._begin[k]]
        return out.reshape(*wanted.shape, *self.shape[1:])


class LatentDataset:
    """All latents of a dataset, flat in time, in memory-mapped files.

    Attributes:
        stored: (N, C, H, W), latents as the codec stores them; see `latents_at`.
        importance: uint8 (N, H, W), 16 x the cell's mean rare-colour weight.
        actions: int64 (N,); rewards: float32 (N,); terminated: bool (N,).
        game: int64 (N,), which of the dataset's games a step is of.
        columns: the optional columns of the dataset that the codec wants, each (N, ...).
        contingent: uint8 (N, 512), see `dreamenv.data.writer`; None if the dataset has no such column.
        start: int64 (N,), index of the first step of each step's episode or segment.
        validation: bool (N,), steps of validation levels.
        codec: the one that encoded them.

    Raises:
        DatasetError: not encoded, encoded incompletely, or by an older release.
    """

    def __init__(self, folder: Path, val_ratio: float = 0.02) -> None:
        self.folder = Path(folder)
        path = self.folder / "latents.json"
        self.facts = read_json(path, DatasetError, _REMEDY)
        if self.facts.get("format_version") != FORMAT_VERSION:
            found = self.facts.get("format_version", 1)
            raise DatasetError(f"{path}: format_version {found}, this release reads {FORMAT_VERSION}; encode again")
        if missing := {"data", "codec", "codec_sha256"} - set(self.facts):
            raise DatasetError(f"{path}: key {sorted(missing)[0]} is missing; encode again")
        self.dataset = Dataset(self.facts["data"])
        self.codec: Codec
        self.codec, digest = load_codec(self.facts["codec"])
        encoded = read_json(self.folder / "identity.json", DatasetError, "encode the dataset again")
        if encoded != latents_identity(self.codec, digest):
            raise DatasetError(f"{self.folder}: was encoded by another codec, or an older release; encode again")
        latent = self.codec.spec.shape
        stored = str(self.codec.stored).removeprefix("torch.")
        self._shapes = {"latents": (stored, latent), "importance": ("uint8", latent[1:])}
        self._digests = read_json(self.folder / "files.json", DatasetError, "encode the dataset again")
        shards = self.dataset.shards
        self.stored, self.importance = self._read("latents"), self._read("importance")
        self._frames = Joined([s.frames for s in shards])
        self.actions = np.concatenate([s.actions for s in shards]).astype(np.int64)
        self.rewards = np.concatenate([s.rewards for s in shards])
        self.terminated = np.concatenate([s.terminated for s in shards])
        self.columns = {n: np.concatenate([s.columns[n] for s in shards]) for n in self.codec.columns}
        has = "contingent" in self.dataset.manifest["columns"]
        self.contingent = Joined([s.columns["contingent"] for s in shards]) if has else None
        self.games = self.dataset.games
        self.game = np.concatenate([np.full(len(s), self.games.index(s.game), np.int64) for s in shards])
        self.first = np.concatenate([s.first for s in shards])
        self.start = np.maximum.accumulate(np.where(self.first, np.arange(len(self.first)), 0))
        levels = np.concatenate([s.level_seeds for s in shards])
        self.validation = split_levels(levels, val_ratio, 0)

    def _read(self, kind: str) -> Joined:
        """All shards' files of one kind."""
        parts = []
        for shard, name in zip(self.dataset.shards, shard_names(self.dataset), strict=True):
            path = self.folder / f"{kind}-{name}.npy"
            shape, dtype = (len(shard), *self._shapes[kind][1]), self._shapes[kind][0]
            size = np.dtype(dtype).itemsize * math.prod(shape)
            if path.is_file() and not 0 <= path.stat().st_size - size <= 4096:
                raise DatasetError(f"{path}: is not of its {size} bytes; delete it and encode again")
            if path.is_file() and sha256_file(path) != self._digests.get(path.name):
                raise DatasetError(f"{path}: sha256 differs from files.json; delete it and encode again")
            part = open_array(path, DatasetError, "encode the dataset again")
            if part.shape != shape or part.dtype != dtype:
                raise DatasetError(
                    f"{path}: holds {part.dtype} {part.shape}, expected {dtype} {shape}; delete it and encode again"
                )
            parts.append(part)
        if not parts:
            raise DatasetError(f"{self.facts['data']}: has no shards; collect some")
        return Joined(parts)

    def windows(self, length: int, validation: bool) -> np.ndarray:
        """Start indices int64 (W,) of windows of `length` observations in one part of the split."""
        return Windows([self.first], length, [self.validation == validation]).start

    def latents_at(self, indices: np.ndarray | slice) -> Tensor:
        """Latents float16 (..., C, H, W) at flat indices (...)."""
        return self.codec.unpack(torch.from_numpy(self.stored[indices]))

    def probed(self) -> Tensor:
        """A few latents of the whole dataset, always the same, float32 (B, C, H, W)."""
        drawn = np.random.default_rng(0).choice(len(self.stored), _PROBED)
        return self.latents_at(np.sort(drawn)).float()

    def gather(self, indices: np.ndarray) -> Tensor:
        """Latents float16 (B, T, C, H, W) at flat indices (B, T), in time's order; one may repeat the one before."""
        repeated = np.zeros(indices.shape, bool)
        repeated[:, 1:] = indices[:, 1:] == indices[:, :-1]
        return self.codec.hold(self.latents_at(indices), torch.from_numpy(repeated))

    def contexts(self, now: np.ndarray, length: int, after: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Indices and actions of contexts that end at `now` (B,), padded at the start of an episode.

        A short history repeats its first observation, with no-ops between: what an environment does after reset.

        Returns:
            indices int64 (B, length + after) of observations, and actions int64 (B, length + after): entry j is
            taken at observation j.
        """
        raw = now[:, None] + np.arange(-length + 1, after + 1)
        indices = np.maximum(raw, self.start[now][:, None])
        return indices, np.where(raw == indices, self.actions[np.minimum(indices, len(self.actions) - 1)], NOOP)

    def changes(self, now: np.ndarray, channels: Tensor) -> np.ndarray:
        """How much the latents change from steps (B,) to the next, float64 (B,): squares, weighted by (C, 1, 1)."""
        found = np.empty(len(now))  # filled in place: small arrays kept between large ones would hold these open
        for at in range(0, len(now), 256):
            part = now[at : at + 256]
            change = self.latents_at(part + 1).float() - self.latents_at(part).float()
            found[at : at + 256] = (change.square() * channels).mean((1, 2, 3)).numpy()
        return found

    def game_of(self, now: np.ndarray) -> Tensor | None:
        """Which games the steps (B,) are of, int64 (B,); None where there is but one."""
        return None if len(self.games) == 1 else torch.from_numpy(self.game[now])

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """The frames at flat indices as the codec is shown them, uint8 (..., h, w, c)."""
        out = observe(self._frames[indices.reshape(-1)], self.codec.frame)
        return out.reshape(*indices.shape, *out.shape[1:])


def channel_weights(codec: Codec, latents: Tensor) -> Tensor:
    """How much squared pixel error a unit error in each channel causes, (C,), of mean 1; 0 for known quantities."""
    content = codec.content_channels
    with torch.no_grad():
        base = codec.decode(latents)
        effect = []
        for c in range(content):
            moved = latents.clone()
            noise = torch.randn(latents.shape[0], *latents.shape[2:], generator=torch.Generator().manual_seed(c))
            moved[:, c] += 0.2 * torch.sign(noise)
            effect.append((codec.decode(moved) - base).square().mean())
    weights = torch.stack(effect)
    return torch.cat([weights / weights.mean(), torch.zeros(latents.shape[1] - content)])
