"""Datasets encoded once: latents in RAM, next to the actions, rewards and flags of the frames they came from.

`python -m trainers.latents DATA AUTOENCODER OUT` encodes a dataset folder with an autoencoder's model folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamenv.actions import NOOP
from dreamenv.artifacts import atomic_file, read_json, readable_folder, write_json
from dreamenv.bundle import pick_device
from dreamenv.data import HELD_OUT_FROM, Dataset, Windows, split_levels
from dreamenv.errors import BundleError, DatasetError, DreamenvError
from dreamenv.memory import keep_freed_memory
from dreamenv.models.autoencoder import Autoencoder, to_images
from dreamenv.models.io import load_model


def training_data(folder: str | Path) -> Dataset:
    """Open a dataset to train on, every byte verified.

    Raises:
        DatasetError: damaged, or it holds held-out levels.
    """
    dataset = Dataset(folder, verify="sha256")
    for shard in dataset.shards:
        if (highest := int(shard.level_seeds.max())) >= HELD_OUT_FROM:
            raise DatasetError(f"{folder}: {shard.name} holds level {highest}; levels from {HELD_OUT_FROM} on are held "
                               "out, collect others to train on")  # fmt: skip
    return dataset


def encode_dataset(data: Path, autoencoder: Path, out: Path, device: str = "auto") -> Path:
    """Encode every frame; resumes shard by shard. Returns `out`.

    Writes per shard `latents-00000.npy` float16 (S, C, H, W) and `importance-00000.npy` uint8 (S, H, W): the rarity of what
    each cell shows (`PatchRarity`), times 16; and `latents.json` last.
    """
    dataset = training_data(data)
    model, digest = load_autoencoder(autoencoder)
    identity = _identity(dataset, digest)
    out.mkdir(parents=True, exist_ok=True)
    marker = out / "identity.json"
    if not marker.exists() or read_json(marker, DatasetError, "delete it and encode again") != identity:
        for stale in out.glob("*.npy"):
            stale.unlink()
        (out / "latents.json").unlink(missing_ok=True)
        write_json(marker, identity)
    target = pick_device(device)
    model = model.to(target, memory_format=torch.channels_last)
    numbers = [shard.name[6:] for shard in dataset.shards]
    for shard, number in zip(dataset.shards, numbers, strict=True):
        if (path := out / f"latents-{number}.npy").exists():
            continue
        latents = np.empty((len(shard), *model.latent_shape), np.float16)
        with torch.no_grad(), torch.autocast(target.type, torch.bfloat16, enabled=False):
            for at in range(0, len(shard), 256):
                frames = torch.from_numpy(np.array(shard.frames[at : at + 256])).to(target)
                latents[at : at + 256] = model.encode(to_images(frames)).half().cpu().numpy()
        _save(path, latents)
        print(f"encoded {shard.name}", flush=True)
    missing = [n for n in numbers if not (out / f"importance-{n}.npy").exists()]
    if missing:
        rng, each = np.random.default_rng(0), -(-4096 // len(numbers))
        parts = [np.load(out / f"latents-{n}.npy", mmap_mode="r", allow_pickle=False) for n in numbers]
        sample = np.concatenate([p[np.sort(rng.choice(len(p), min(len(p), each), replace=False))] for p in parts])
        probe = torch.from_numpy(sample).float()
        rarity = PatchRarity(probe, channel_weights(model.cpu(), probe[:256]))
    for number in missing:
        latents = np.load(out / f"latents-{number}.npy", allow_pickle=False)
        weights = torch.cat([rarity(torch.from_numpy(latents[at : at + 512]).float()) for at in range(0, len(latents), 512)])
        _save(out / f"importance-{number}.npy", (weights * 16).round().clamp(1, 255).byte().numpy())
        print(f"weighed {number}", flush=True)
    write_json(out / "latents.json", {"data": str(data), "autoencoder": str(autoencoder), "autoencoder_sha256": digest})
    return out


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


class PatchRarity:
    """How rare what a latent cell shows is: the inverse root frequency of its cluster, relative to equal shares.

    A coin, a saw, lava and the player are a few cells each; a squared error that counts every cell alike lets them dissolve.
    Their colours need not be rare (a saw is as grey as the walls), their patches are. Clusters are those of k-means on the
    cells, in the metric of pixel error, begun by k-means++ (Arthur & Vassilvitskii 2007), which seeds rare patches too.

    Args:
        latents: float32 (N, C, H, W), a sample.
        channels: (C,), see `channel_weights`.
        clusters: how many.
        limits: smallest and largest weight.
        seed: decides the seeding.
    """

    def __init__(self, latents: Tensor, channels: Tensor, clusters: int = 512, limits: tuple[float, float] = (0.25, 8.0),
                 seed: int = 0) -> None:  # fmt: skip
        self._scale = channels.sqrt()
        cells = self._cells(latents)
        generator = torch.Generator().manual_seed(seed)
        few = cells[torch.randperm(len(cells), generator=generator)[:30000]]
        centres, nearest = few[:1], (few - few[:1]).square().sum(1)
        for _ in range(min(clusters, len(few)) - 1):
            if not nearest.any():  # fewer different cells than clusters
                break
            new = few[torch.multinomial(nearest, 1, generator=generator)]
            centres, nearest = torch.cat([centres, new]), torch.minimum(nearest, (few - new).square().sum(1))
        many = cells[torch.randperm(len(cells), generator=generator)[:200000]]
        for _ in range(12):
            label = torch.cdist(many, centres).argmin(1)
            counts = torch.bincount(label, minlength=len(centres)).float()
            sums = torch.zeros_like(centres).index_add_(0, label, many)
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        self._centres = centres
        share = torch.bincount(self._labels(cells), minlength=len(centres)).float() / len(cells)
        self._weights = (1 / len(centres) / share.clamp_min(1e-9)).sqrt().clamp(*limits)

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> weights (B, H, W)."""
        b, _, h, w = latents.shape
        return self._weights[self._labels(self._cells(latents))].view(b, h, w)

    def _cells(self, latents: Tensor) -> Tensor:
        return (latents * self._scale[:, None, None]).permute(0, 2, 3, 1).flatten(0, 2)

    def _labels(self, cells: Tensor) -> Tensor:
        half = self._centres.square().sum(1) / 2  # nearest = largest x.c - |c|^2 / 2
        return torch.cat([(part @ self._centres.T - half).argmax(1) for part in cells.split(65536)])


def load_autoencoder(folder: str | Path) -> tuple[Autoencoder, str]:
    """Return a trained autoencoder and the sha256 of its weights; raises `BundleError` if it is none."""
    model, _ = load_model(folder)
    if not isinstance(model, Autoencoder):
        raise BundleError(f"{folder}: is a {type(model).__name__}, expected an autoencoder")
    return model, read_json(readable_folder(folder) / "model.json", BundleError, "train it again")["sha256"]


def _identity(dataset: Dataset, autoencoder_sha256: str) -> dict[str, Any]:
    return {"autoencoder": autoencoder_sha256, "shards": [s["sha256"] for s in dataset.manifest["shards"]]}


class LatentDataset:
    """All latents of a dataset, flat in time, in RAM.

    Attributes:
        latents: float16 (N, C, H, W).
        importance: uint8 (N, H, W), 16 x the rarity of what the cell shows.
        actions: int64 (N,); rewards: float32 (N,); terminated: bool (N,).
        start: int64 (N,), index of the first step of each step's episode or segment.
        validation: bool (N,), steps of validation levels.
        autoencoder: the one that encoded them.

    Raises:
        DatasetError: not encoded, or encoded incompletely.
    """

    def __init__(self, folder: Path, val_ratio: float = 0.02) -> None:
        self.folder = Path(folder)
        self.facts = read_json(self.folder / "latents.json", DatasetError, "encode the dataset: python -m trainers.latents")
        if missing := {"data", "autoencoder", "autoencoder_sha256"} - set(self.facts):
            raise DatasetError(f"{self.folder / 'latents.json'}: key {sorted(missing)[0]} is missing; encode again")
        self.dataset = Dataset(self.facts["data"])
        self.autoencoder, digest = load_autoencoder(self.facts["autoencoder"])
        encoded = read_json(self.folder / "identity.json", DatasetError, "encode the dataset again")
        if encoded != _identity(self.dataset, digest):
            raise DatasetError(f"{self.folder}: was encoded from another dataset or by another autoencoder; encode again")
        shards = self.dataset.shards
        total = len(self.dataset)

        def columns(kind: str) -> np.ndarray:
            out: np.ndarray | None = None
            at = 0
            for shard in shards:
                path = self.folder / f"{kind}-{shard.name[6:]}.npy"
                try:
                    part = np.load(path, mmap_mode="r", allow_pickle=False)
                except (OSError, ValueError, EOFError) as error:
                    raise DatasetError(f"{path}: missing or damaged ({error}); encode the dataset again") from None
                if out is None:
                    out = np.empty((total, *part.shape[1:]), part.dtype)
                out[at : at + len(part)] = part
                at += len(part)
            if out is None or at != total:
                raise DatasetError(f"{self.folder}: {kind} has {at} steps, the dataset {total}; delete it, encode again")
            return out

        self.latents, self.importance = columns("latents"), columns("importance")
        self.actions = np.concatenate([s.actions for s in shards]).astype(np.int64)
        self.rewards = np.concatenate([s.rewards for s in shards])
        self.terminated = np.concatenate([s.terminated for s in shards])
        first = np.concatenate([s.first for s in shards])
        self.start = np.maximum.accumulate(np.where(first, np.arange(total), 0))
        self.first = first
        levels = np.concatenate([s.level_seeds for s in shards])
        self.validation = split_levels(levels, val_ratio, 0)

    def windows(self, length: int, validation: bool) -> np.ndarray:
        """Start indices int64 (W,) of windows of `length` observations in one part of the split."""
        return Windows([self.first], length, [self.validation == validation]).start

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

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """Original frames uint8 (..., 64, 64, 3) at flat indices."""
        flat = indices.reshape(-1)
        ends = np.cumsum([len(s) for s in self.dataset.shards])
        shard = np.searchsorted(ends, flat, side="right")
        out = np.stack([self.dataset.shards[k].frames[i - (ends[k - 1] if k else 0)] for k, i in zip(shard, flat, strict=True)])
        return out.reshape(*indices.shape, *out.shape[1:])


def channel_weights(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """How much squared pixel error a unit error in each latent channel causes, (C,), normalised to mean 1."""
    with torch.no_grad():
        base = autoencoder.decode(latents)
        effect = []
        for c in range(latents.shape[1]):
            moved = latents.clone()
            moved[:, c] += 0.2 * torch.sign(torch.randn(latents.shape[0], *latents.shape[2:],
                                                        generator=torch.Generator().manual_seed(c)))  # fmt: skip
            effect.append((autoencoder.decode(moved) - base).square().mean())
    weights = torch.stack(effect)
    return weights / weights.mean()


if __name__ == "__main__":
    import tyro

    keep_freed_memory()
    try:
        tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(encode_dataset))
    except DreamenvError as error:
        raise SystemExit(f"error: {error}") from None
