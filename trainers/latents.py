"""Datasets encoded once: latents in RAM, next to the actions, rewards and flags of the frames they came from.

`python -m trainers.latents DATA AUTOENCODER OUT` encodes a dataset folder with an autoencoder's model folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamenv.actions import NOOP
from dreamenv.artifacts import atomic_file, read_json, readable_folder, write_json
from dreamenv.bundle import pick_device
from dreamenv.data import HELD_OUT_FROM, Dataset, Windows, split_levels
from dreamenv.errors import BundleError, DatasetError, DreamenvError
from dreamenv.memory import keep_freed_memory
from dreamenv.metrics import colour_frequencies
from dreamenv.models.autoencoder import Autoencoder, to_images
from dreamenv.models.io import load_model
from dreamenv.models.tile import TileAutoencoder, phase_of
from dreamenv.world_model import FrameCodec
from trainers.losses import colour_bins, colour_weights

_BATCH = {"cpu": 64, "cuda": 1024}  # frames encoded at once


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


def check_camera(dataset: Dataset) -> None:
    """Raise `DatasetError` if some step's camera position is not known."""
    for shard in dataset.shards:
        if not np.isfinite(shard.camera).all():
            raise DatasetError(f"{dataset.folder}: {shard.name} has steps without a camera position, which a tile autoencoder "
                               "needs; collect coinrun, or train another autoencoder")  # fmt: skip


def encode_dataset(data: Path, autoencoder: Path, out: Path, device: str = "auto") -> Path:
    """Encode every frame; resumes shard by shard. Returns `out`.

    Writes per shard `latents-<frames>.npy` float16 (S, C, H, W) and `importance-<frames>.npy` uint8 (S, H, W): the mean
    rare-colour weight of each cell's pixels, times 16; and `latents.json` last. <frames> begins the sha256 of the shard's
    frames, so one folder serves a dataset that grows by merging: what it has encoded before is not encoded again.
    """
    dataset = training_data(data)
    model, digest = load_autoencoder(autoencoder)
    if model.camera_channels:
        check_camera(dataset)
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    marker = out / "identity.json"
    identity = {"autoencoder": digest}
    if not marker.exists() or read_json(marker, DatasetError, "delete it and encode again") != identity:
        for stale in out.glob("*.npy"):
            stale.unlink()
        write_json(marker, identity)
    (out / "latents.json").unlink(missing_ok=True)
    target = pick_device(device)
    model = model.to(target, memory_format=torch.channels_last)
    size = _BATCH.get(target.type, 64)
    rng = np.random.default_rng(0)
    sample = np.concatenate([s.frames[np.sort(rng.choice(len(s), min(len(s), 256), replace=False))] for s in dataset.shards])
    weights = colour_weights(torch.from_numpy(colour_frequencies(sample)).float())
    for shard, name in zip(dataset.shards, _names(dataset), strict=True):
        paths = [out / f"{kind}-{name}.npy" for kind in ("latents", "importance")]
        if all(p.exists() for p in paths):
            continue
        latents = np.empty((len(shard), *model.latent_shape), np.float16)
        importance = np.empty((len(shard), *model.latent_shape[1:]), np.uint8)
        with torch.no_grad(), torch.autocast(target.type, torch.bfloat16, enabled=False):
            for at in range(0, len(shard), size):
                frames = torch.from_numpy(np.array(shard.frames[at : at + size])).to(target)
                images = to_images(frames).contiguous(memory_format=torch.channels_last)
                if isinstance(model, TileAutoencoder):
                    camera = torch.from_numpy(np.array(shard.camera[at : at + size])).to(target)
                    encoded = model.encode(images, phase_of(camera))
                else:
                    encoded = model.encode(images)
                latents[at : at + size] = encoded.half().cpu().numpy()
                cells = model.pool(weights.to(target)[colour_bins(frames)], encoded)
                importance[at : at + size] = (cells * 16).round().clamp(0, 255).byte().cpu().numpy()
        if model.camera_channels:
            latents[:, -2:] = camera_moves(shard.camera, shard.first)[..., None, None]
        for path, array in zip(paths, (latents, importance), strict=True):
            with atomic_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)
        print(f"encoded {shard.name}", flush=True)
    write_json(out / "latents.json", {"data": str(data), "autoencoder": str(autoencoder), "autoencoder_sha256": digest})
    return out


def camera_moves(camera: np.ndarray, first: np.ndarray) -> np.ndarray:
    """How far each picture's camera is from that of the one before, (S, 2) in tiles; 0 at the start of an episode."""
    return np.where(np.asarray(first)[:, None], 0, np.diff(camera, axis=0, prepend=camera[:1]))


def load_autoencoder(folder: str | Path) -> tuple[FrameCodec, str]:
    """Return a trained autoencoder and the sha256 of its weights; raises `BundleError` if it is none."""
    model, _ = load_model(folder)
    if not isinstance(model, Autoencoder | TileAutoencoder):
        raise BundleError(f"{folder}: is a {type(model).__name__}, expected an autoencoder")
    return model, read_json(readable_folder(folder) / "model.json", BundleError, "train it again")["sha256"]


def _names(dataset: Dataset) -> list[str]:
    return [entry["sha256"]["frames"][:16] for entry in dataset.manifest["shards"]]


class LatentDataset:
    """All latents of a dataset, flat in time, in RAM.

    Attributes:
        latents: float16 (N, C, H, W).
        importance: uint8 (N, H, W), 16 x the cell's mean rare-colour weight.
        actions: int64 (N,); rewards: float32 (N,); terminated: bool (N,).
        camera: float32 (N, 2), where the picture's corner lies, in tiles; nan where that is not known.
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
        if encoded != {"autoencoder": digest}:
            raise DatasetError(f"{self.folder}: was encoded by another autoencoder; encode again")
        shards, names = self.dataset.shards, _names(self.dataset)
        total = len(self.dataset)

        def columns(kind: str) -> np.ndarray:
            out: np.ndarray | None = None
            at = 0
            for shard, name in zip(shards, names, strict=True):
                path = self.folder / f"{kind}-{name}.npy"
                try:
                    part = np.load(path, mmap_mode="r", allow_pickle=False)
                except (OSError, ValueError, EOFError) as error:
                    raise DatasetError(f"{path}: missing or damaged ({error}); encode the dataset again") from None
                if len(part) != len(shard):
                    raise DatasetError(f"{path}: has {len(part)} steps, its shard {len(shard)}; delete it, encode again")
                if out is None:
                    out = np.empty((total, *part.shape[1:]), part.dtype)
                out[at : at + len(part)] = part
                at += len(part)
            if out is None:
                raise DatasetError(f"{self.facts['data']}: has no shards; collect some")
            return out

        self.latents, self.importance = columns("latents"), columns("importance")
        self.actions = np.concatenate([s.actions for s in shards]).astype(np.int64)
        self.rewards = np.concatenate([s.rewards for s in shards])
        self.terminated = np.concatenate([s.terminated for s in shards])
        self.camera = np.concatenate([s.camera for s in shards])
        first = np.concatenate([s.first for s in shards])
        self.start = np.maximum.accumulate(np.where(first, np.arange(total), 0))
        self.first = first
        levels = np.concatenate([s.level_seeds for s in shards])
        self.validation = split_levels(levels, val_ratio, 0)

    def windows(self, length: int, validation: bool) -> np.ndarray:
        """Start indices int64 (W,) of windows of `length` observations in one part of the split."""
        return Windows([self.first], length, [self.validation == validation]).start

    def gather(self, indices: np.ndarray) -> Tensor:
        """Latents float16 (B, T, C, H, W) at flat indices (B, T), in the order of time; the camera rests where one repeats."""
        out = self.latents[indices]
        if self.autoencoder.camera_channels:
            out[:, 1:, -2:] *= (indices[:, 1:] != indices[:, :-1])[:, :, None, None, None]
        return torch.from_numpy(out)

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


def channel_weights(autoencoder: FrameCodec, latents: Tensor) -> Tensor:
    """How much squared pixel error a unit error in each latent channel causes, (C,), of mean 1; 0 for the camera's."""
    camera = autoencoder.camera_channels
    with torch.no_grad():
        base = autoencoder.decode(latents)
        effect = []
        for c in range(latents.shape[1] - camera):
            moved = latents.clone()
            moved[:, c] += 0.2 * torch.sign(torch.randn(latents.shape[0], *latents.shape[2:],
                                                        generator=torch.Generator().manual_seed(c)))  # fmt: skip
            effect.append((autoencoder.decode(moved) - base).square().mean())
    weights = torch.stack(effect)
    return torch.cat([weights / weights.mean(), torch.zeros(camera)])


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(encode_dataset))
    except DreamenvError as error:
        raise SystemExit(f"error: {error}") from None
