"""Encode a dataset once: `python -m trainers.encode DATA CODEC OUT`, where CODEC is a codec's model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamenv.artifacts import atomic_file, only_writer, present, read_json, readable_folder, sha256_file, write_json
from dreamenv.console import run_command_line
from dreamenv.contract.frames import observe
from dreamenv.data import HELD_OUT_FROM, Dataset, Shard
from dreamenv.device import keep_freed_memory, pick_device
from dreamenv.errors import BundleError, DatasetError
from dreamenv.evaluation.metrics import colour_bins, colour_frequencies
from dreamenv.models.interface import Codec, to_images
from dreamenv.models.io import load_model
from trainers.pixels import colour_weights

FORMAT_VERSION = 3
_REMEDY = "delete it and encode again"
_BATCH = {"cpu": 64, "cuda": 1024}  # frames encoded at once


def training_data(folder: str | Path) -> Dataset:
    """Open a dataset to train on, every byte verified.

    Raises:
        DatasetError: damaged, or it holds held-out levels.
    """
    dataset = Dataset(folder, verify="sha256")
    for shard in dataset.shards:
        if (highest := int(shard.level_seeds.max())) >= HELD_OUT_FROM:
            raise DatasetError(
                f"{folder}: {shard.name} holds level {highest}; levels from {HELD_OUT_FROM} on are held out, collect "
                "others to train on"
            )
    return dataset


def check_columns(dataset: Dataset, codec: Codec) -> None:
    """Raise `DatasetError` if the data lacks what a codec wants beside the frames, or is of other games."""
    if codec.games and codec.games != dataset.games:
        raise DatasetError(
            f"{dataset.folder}: is of {', '.join(dataset.games)}, the codec tells {', '.join(codec.games)} apart; "
            "train one on this data"
        )
    for shard in dataset.shards:
        where = f"{dataset.folder}: {shard.name}"
        if missing := set(codec.columns) - set(shard.columns):
            raise DatasetError(
                f"{where} has no column {sorted(missing)[0]}, which a {type(codec).__name__} needs; collect a game "
                "that has it, or train another codec"
            )
        codec.check_columns(shard.columns, where)


def load_codec(folder: str | Path) -> tuple[Codec, str]:
    """Return a trained codec and the sha256 of its weights; raises `BundleError` if it is none."""
    model, _ = load_model(folder, "codec")
    assert isinstance(model, Codec)
    return model, read_json(readable_folder(folder) / "model.json", BundleError, "train it again")["sha256"]


def shard_names(dataset: Dataset) -> list[str]:
    """What the encoded files of each shard are called after: the beginning of its frames' sha256."""
    return [entry["sha256"]["frames"][:16] for entry in dataset.manifest["shards"]]


def encode_dataset(data: Path, codec: Path, out: Path, device: str = "auto") -> Path:
    """Encode every frame; resumes shard by shard. Returns `out`.

    Writes per shard `latents-<frames>.npy` (S, C, H, W), float16 or what `Codec.stored` says, and
    `importance-<frames>.npy` uint8 (S, H, W), the mean rare-colour weight of each cell's pixels, times 16; `files.json`
    with their digests; `latents.json` last. <frames> begins the sha256 of the shard's frames, so one folder serves a
    dataset that grows by merging: what it has encoded before is not encoded again.

    Args:
        data: dataset folder.
        codec: a codec's model folder.
        out: folder of the latents.
        device: auto, cpu, cuda ...

    Raises:
        DatasetError: the data is damaged, or lacks a column that the codec wants.
        BundleError: the model folder holds no codec.
    """
    dataset = training_data(data)
    model, digest = load_codec(codec)
    check_columns(dataset, model)
    keep_freed_memory()
    with only_writer(out):
        _encode_missing(dataset, model, digest, out, device)
        facts = {"format_version": FORMAT_VERSION, "data": str(data), "codec": str(codec), "codec_sha256": digest}
        write_json(out / "latents.json", facts)
    return out


def latents_identity(codec: Codec, digest: str) -> dict[str, Any]:
    """What decides the bytes of encoded latents beside the frames: the codec's weights, and how it stores them."""
    stored = str(codec.stored).removeprefix("torch.")
    return {"format_version": FORMAT_VERSION, "codec": digest} | ({} if stored == "float16" else {"stored": stored})


def _encode_missing(dataset: Dataset, model: Codec, digest: str, out: Path, device: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    marker = out / "identity.json"
    identity = latents_identity(model, digest)
    if not present(marker) or read_json(marker, DatasetError, _REMEDY) != identity:
        for stale in out.glob("*.npy"):
            stale.unlink()
        (out / "files.json").unlink(missing_ok=True)
        write_json(marker, identity)
    digests = read_json(out / "files.json", DatasetError, _REMEDY) if present(out / "files.json") else {}
    (out / "latents.json").unlink(missing_ok=True)
    target = pick_device(device)
    model = model.to(target, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    weights = _rarity(dataset, model.frame).to(target)
    for shard, name in zip(dataset.shards, shard_names(dataset), strict=True):
        paths = [out / f"{kind}-{name}.npy" for kind in ("latents", "importance")]
        if all(p.exists() and p.name in digests for p in paths):
            continue
        game = dataset.games.index(shard.game) if model.games else None
        for path, array in zip(paths, _encode(shard, model, weights, target, game), strict=True):
            with atomic_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)
            digests[path.name] = sha256_file(path)
        write_json(out / "files.json", digests)
        print(f"encoded {shard.name}", flush=True)


def _rarity(dataset: Dataset, frame: tuple[int, int, int]) -> torch.Tensor:
    """The weight of each colour bin, (4096,), by a sample of the dataset's frames, shown as `frame`."""
    rng = np.random.default_rng(0)
    picked = [(s, np.sort(rng.choice(len(s), min(len(s), 256), replace=False))) for s in dataset.shards]
    sample = np.concatenate([shard.frames[rows] for shard, rows in picked])
    return colour_weights(torch.from_numpy(colour_frequencies(observe(sample, frame))).float())


def _encode(
    shard: Shard, model: Codec, weights: torch.Tensor, device: torch.device, game: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Latents, as the codec stores them, and importance uint8 of one shard, which is of the game of that number."""
    size, shape = _BATCH.get(device.type, 64), model.spec.shape
    latents = torch.empty((len(shard), *shape), dtype=torch.float16)
    importance = np.empty((len(shard), *shape[1:]), np.uint8)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=False):
        for at in range(0, len(shard), size):
            rows = slice(at, at + size)
            frames = torch.from_numpy(observe(np.array(shard.frames[rows]), model.frame)).to(device)
            images = to_images(frames).contiguous(memory_format=torch.channels_last)
            columns = {n: torch.from_numpy(np.array(shard.columns[n][rows])).to(device) for n in model.columns}
            told = {} if game is None else {"game": torch.full((len(images),), game, device=device)}
            encoded = model.encode(images, **columns, **told)
            latents[rows] = encoded.half().cpu()
            cells = model.pool(weights[colour_bins(frames)], encoded)
            importance[rows] = (cells * 16).round().clamp(0, 255).byte().cpu().numpy()
    columns = {n: torch.from_numpy(np.array(shard.columns[n]))[None] for n in model.columns}
    first = torch.from_numpy(np.array(shard.first))[None]
    whole = model.sequence(latents[None], first, **columns)[0]
    return torch.cat([model.pack(part) for part in whole.split(1024)]).numpy(), importance


if __name__ == "__main__":
    run_command_line(encode_dataset, positional=True)
