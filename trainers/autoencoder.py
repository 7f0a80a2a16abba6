"""Trains the frame autoencoder: weighted squared error, latent noise, variance regulariser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.data import split_levels
from dreamenv.metrics import RARE_FREQUENCY, colour_frequencies
from dreamenv.models.autoencoder import Autoencoder, to_frames, to_images
from dreamenv.models.registry import build_model
from dreamenv.noise import philox
from dreamenv.report import save_grid
from trainers.latents import training_data
from trainers.losses import (
    colour_bins,
    colour_weights,
    motion_mask,
    variance_penalty,
)


@dataclass(frozen=True)
class AutoencoderTaskConfig:
    """What the autoencoder is trained for."""

    data: str = "data/coinrun"
    """Dataset folder."""
    val_ratio: float = 0.02
    """Share of levels kept for validation."""
    latent_noise: float = 0.02
    """Standard deviation of the noise added to latents before decoding."""
    var_reg: float = 0.01
    """Weight of the variance regulariser (target 1 per channel)."""
    rare_limit: float = 12.0
    """Largest weight of a rare colour's pixels; 1 turns the weighting off."""
    motion_weight: float = 1.0
    """Added weight of pixels that moved."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(0 < self.val_ratio < 1, f"val_ratio {self.val_ratio}: must be in (0, 1)")
        check(self.latent_noise >= 0, f"latent_noise {self.latent_noise}: must be >= 0")
        check(self.var_reg >= 0, f"var_reg {self.var_reg}: must be >= 0")
        check(self.rare_limit >= 1, f"rare_limit {self.rare_limit}: must be >= 1")
        check(self.motion_weight >= 0, f"motion_weight {self.motion_weight}: must be >= 0")


class AutoencoderTask:
    """See `trainers.loop.Task`."""

    critic: nn.Module | None = None

    def __init__(self, config: AutoencoderTaskConfig, model: dict[str, Any], seed: int) -> None:
        self.config = config
        self.dataset = training_data(config.data)
        torch.manual_seed(seed)
        self.model: nn.Module = build_model(model)
        validation = [split_levels(s.level_seeds, config.val_ratio, 0) for s in self.dataset.shards]
        self._train = _indices([~v for v in validation])
        self._val = _indices(validation)
        check(len(self._train) > 0 and len(self._val) > 0,
              f"val_ratio {config.val_ratio}: leaves no levels to train on or none to validate on; collect more levels")
        rng = philox((seed, 2**63))
        sample, _ = self._gather(self._train[np.sort(rng.choice(len(self._train), min(4096, len(self._train))))])
        self._frequencies = torch.from_numpy(colour_frequencies(sample.numpy())).float()
        self._weights = colour_weights(self._frequencies, limit=config.rare_limit)
        self._begin(to_images(sample[:: max(len(sample) // 1024, 1)]))

    def _begin(self, images: Tensor) -> None:
        self.explained = cast(Autoencoder, self.model).init_pca(images)

    def batch(self, rng: np.random.Generator, size: int) -> dict[str, Tensor]:
        """Frames and the frames before them, uint8 (B, 64, 64, 3)."""
        frames, previous = self._gather(self._train[rng.integers(len(self._train), size=size)])
        return {"frames": frames, "previous": previous}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator,
             progress: float) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Weighted squared error + variance regulariser."""
        frames = batch["frames"]
        weights = self._rarity(frames)
        weights = weights * (1 + self.config.motion_weight * motion_mask(frames, batch["previous"]))
        images = to_images(frames).contiguous(memory_format=torch.channels_last)
        c, h, w = cast(Autoencoder, self.model).latent_shape
        noise = torch.randn(len(frames), c, h, w, generator=generator, device=frames.device) * self.config.latent_noise
        reconstruction, latents = model(images, noise)
        error = (reconstruction.float() - images).square().mean(1)
        reconstruction_loss = (weights * error).sum() / weights.sum()
        regulariser = variance_penalty(latents)
        psnr = -10 * error.detach().mean().log10()
        return reconstruction_loss * 100 + self.config.var_reg * regulariser, {"psnr": psnr, "var_reg": regulariser.detach()}

    def _rarity(self, frames: Tensor) -> Tensor:
        """The weight of each pixel's colour, (B, 64, 64), of frames uint8 (B, 64, 64, 3)."""
        self._weights = self._weights.to(frames.device)
        return self._weights[colour_bins(frames)]

    def stage(self, progress: float) -> int:
        """See `trainers.loop.Task`: one all along."""
        return 0

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """PSNR over validation levels, over rare colours, latent statistics; writes a picture grid."""
        autoencoder = cast(Autoencoder, model)
        device = next(model.parameters()).device
        rng = np.random.default_rng(0)
        frames, _ = self._gather(self._val[np.sort(rng.choice(len(self._val), min(512, len(self._val))))])
        errors, rare, latents, outputs = [], [], [], []
        for chunk in frames.split(64):
            images = to_images(chunk).to(device)
            z = autoencoder.encode(images)
            output = to_frames(autoencoder.decode(z)).cpu()
            error = ((output.float() - chunk.float()) / 255).square().mean(-1)
            errors.append(error.flatten())
            rare.append(error[self._frequencies[colour_bins(chunk)] < RARE_FREQUENCY])
            latents.append(z.float().cpu())
            outputs.append(output)
        save_grid(folder / f"reconstruction-{step:07d}.png", [frames[:16].numpy(), torch.cat(outputs)[:16].numpy()])
        z = torch.cat(latents)
        return {
            "psnr": float(-10 * torch.cat(errors).mean().log10()),
            "psnr_rare": float(-10 * torch.cat(rare).mean().log10()),
            "latent_var": float(z.var()), "latent_max": float(z.abs().max()),
            "latent_mean_norm": float(z.flatten(1).norm(dim=1).mean()),
        }  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """The dataset it was trained on, and the PCA's explained variance."""
        return {"data": self.dataset.facts, "pca_explained": self.explained}

    def _gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        frames = np.empty((len(indices), 64, 64, 3), np.uint8)
        previous = np.empty_like(frames)
        for row, (k, t) in enumerate(indices):
            shard = self.dataset.shards[k]
            frames[row] = shard.frames[t]
            previous[row] = shard.frames[t if shard.first[t] else t - 1]
        return torch.from_numpy(frames), torch.from_numpy(previous)


def _indices(masks: list[np.ndarray]) -> np.ndarray:
    """(shard, index) int64 pairs (N, 2) of the steps where the masks hold."""
    pairs = [np.stack([np.full(int(m.sum()), k), np.flatnonzero(m)], 1) for k, m in enumerate(masks)]
    return np.concatenate(pairs)
