"""Measure a codec alone: `python -m trainers.eval_autoencoder CODEC DATA OUT`, where CODEC is its model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamenv.artifacts import write_json
from dreamenv.config import check
from dreamenv.console import run_command_line
from dreamenv.contract.frames import observe
from dreamenv.data import Dataset, Shard
from dreamenv.device import pick_device
from dreamenv.evaluation.figures import save_grid, side_by_side
from dreamenv.models.interface import Codec, to_frames, to_images
from dreamenv.video import save_video
from trainers.encode import load_codec
from trainers.tasks.codec import latent_statistics, reconstruction_figures

_BATCH = 64


def reconstruct(codec: Codec, shard: Shard, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What a codec makes of a shard's frames.

    Args:
        codec: on the device.
        shard: with the columns that the codec wants, or without: it then reads them off the pictures.
        rows: int64 (N,).
        device: where.

    Returns:
        The frames as the codec is shown them and as it draws them, uint8 (N, h, w, c); latents float32 (N, C, H, W).
    """
    frames, outputs, latents = [], [], []
    with torch.no_grad():
        for at in range(0, len(rows), _BATCH):
            part = rows[at : at + _BATCH]
            shown = torch.from_numpy(observe(np.array(shard.frames[part]), codec.frame))
            columns = {
                n: torch.from_numpy(np.array(shard.columns[n][part])).to(device)
                for n in codec.columns
                if n in shard.columns
            }
            if codec.games:
                columns["game"] = torch.full((len(part),), codec.games.index(shard.game), device=device)
            z = codec.encode(to_images(shown).to(device), **columns)
            frames.append(shown)
            outputs.append(to_frames(codec.decode(z)).cpu())
            latents.append(z.float().cpu())
    return torch.cat(frames), torch.cat(outputs), torch.cat(latents)


def evaluate(
    codec: Path, data: Path, out: Path, frames: int = 1024, film: int = 100, device: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Write metrics.json, reconstruction.png and reconstruction.mp4 of a codec into `out`.

    Args:
        codec: a codec's model folder, of any type.
        data: a dataset folder, such as one of held-out levels (`python -m envs.collect --start-level 10000`).
        out: folder for the results.
        frames: how many frames are measured, drawn from all shards.
        film: frames of the film, successive ones.
        device: auto, cpu, cuda ...
        seed: decides which frames.

    Returns:
        The contents of metrics.json: MSE, PSNR and SSIM of the reconstruction; variance, largest absolute value and
        mean norm of the latents, and the smallest and largest variance of a channel.

    Raises:
        BundleError, DatasetError: the codec or the data is damaged.
    """
    check(frames >= 1, f"frames {frames}: must be >= 1")
    check(film >= 1, f"film {film}: must be >= 1")
    check(0 <= seed < 2**63, f"seed {seed}: must be in 0..2^63-1")
    target = pick_device(device)
    model, digest = load_codec(codec)
    model = model.to(target)
    dataset, rng = Dataset(data), np.random.default_rng(seed)
    known = not model.games or set(dataset.games) <= set(model.games)
    check(known, f"data {data}: is of {', '.join(dataset.games)}, the codec of {', '.join(model.games)}")
    ends = np.cumsum([0] + [len(shard) for shard in dataset.shards])
    chosen = np.sort(rng.choice(len(dataset), min(frames, len(dataset)), replace=False))
    parts = [
        reconstruct(model, shard, rows, target)
        for shard, begin, end in zip(dataset.shards, ends, ends[1:], strict=False)
        if len(rows := chosen[(chosen >= begin) & (chosen < end)] - begin)
    ]
    real, drawn, latents = (torch.cat(column) for column in zip(*parts, strict=True))
    content = latents[:, : model.content_channels]
    variance = content.var((0, 2, 3))
    figures: dict[str, Any] = {
        "codec_sha256": digest,
        "frames": len(real),
        "latent_shape": list(model.spec.shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        **reconstruction_figures(real, drawn),
        **latent_statistics(content),
        "channel_var_min": float(variance.min()),
        "channel_var_max": float(variance.max()),
    }
    shard = dataset.shards[0]
    first, second, _ = reconstruct(model, shard, np.arange(min(film, len(shard))), target)
    save_video(out / "reconstruction.mp4", side_by_side({"real": first.numpy(), "decoded": second.numpy()}))
    at = np.linspace(0, len(real) - 1, 16).astype(int)
    save_grid(out / "reconstruction.png", [real[at].numpy(), drawn[at].numpy()])
    write_json(out / "metrics.json", figures)
    return figures


if __name__ == "__main__":
    print(json.dumps(run_command_line(evaluate, positional=True)))
