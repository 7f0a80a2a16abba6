"""Trains a frame codec: weighted squared error, latent noise, variance regulariser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.contract.frames import NATIVE, observe
from dreamenv.contract.noise import philox
from dreamenv.data import split_levels
from dreamenv.evaluation.figures import save_grid
from dreamenv.evaluation.metrics import RARE_FREQUENCY, colour_bins, colour_frequencies, psnr, ssim
from dreamenv.models.interface import Codec, to_frames, to_images
from dreamenv.models.io import initialise
from dreamenv.models.registry import build, register
from trainers.batch import Batch
from trainers.encode import check_columns, training_data
from trainers.pixels import colour_weights, motion_mask, variance_penalty

EXAMINED = 128
"""Validation frames of which the loss and SSIM are."""


@dataclass(frozen=True)
class CodecTaskConfig:
    """What a codec is trained for."""

    data: str
    """Dataset folder."""
    init_from: str = ""
    """Model folder to start from; empty starts anew."""
    val_ratio: float = 0.02
    """Share of levels kept for validation."""
    loss: Literal["squared", "huber"] = "squared"
    """Error of a pixel: its square, or Huber's with threshold 1, which in [0, 1] is half of that."""
    latent_noise: float = 0.02
    """Standard deviation of the noise added to latents before decoding; a variational codec multiplies it by its own,
    and wants 1."""
    var_reg: float = 0.01
    """Weight of the variance regulariser."""
    var_target: float = 1.0
    """Variance of each channel that it asks for."""
    divergence: float = 0.0
    """Weight of the latents' divergence from a standard normal distribution, for a variational codec."""
    rare_limit: float = 12.0
    """Largest weight of a rare colour's pixels; 1 turns the weighting off."""
    motion_weight: float = 1.0
    """Added weight of pixels that moved."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(0 < self.val_ratio < 1, f"val_ratio {self.val_ratio}: must be in (0, 1)")
        check(self.latent_noise >= 0, f"latent_noise {self.latent_noise}: must be >= 0")
        check(self.loss in ("squared", "huber"), f"loss {self.loss!r}: must be 'squared' or 'huber'")
        check(self.var_reg >= 0, f"var_reg {self.var_reg}: must be >= 0")
        check(self.var_target > 0, f"var_target {self.var_target}: must be > 0")
        check(self.divergence >= 0, f"divergence {self.divergence}: must be >= 0")
        check(self.rare_limit >= 1, f"rare_limit {self.rare_limit}: must be >= 1")
        check(self.motion_weight >= 0, f"motion_weight {self.motion_weight}: must be >= 0")


@dataclass(frozen=True)
class CodecBatch(Batch):
    """Frames and the frames before them, uint8 (B, h, w, c), as the codec is shown them."""

    frames: Tensor
    previous: Tensor


@register("task", "codec", CodecTaskConfig)
class CodecTask:
    """See `trainers.tasks.interface.Task`."""

    kind = "codec"
    auxiliary: nn.Module | None = None

    def __init__(self, config: CodecTaskConfig, model: dict[str, Any], seed: int) -> None:
        self.config = config
        self.dataset = training_data(config.data)
        torch.manual_seed(seed)
        self.model: Codec = build("codec", self.complete(model), where="model")
        trainable = any(p.numel() for p in self.model.parameters())
        check(trainable, f"model.type {model['type']!r}: has nothing to train; a recipe builds it instead")
        check_columns(self.dataset, self.model)
        validation = [split_levels(s.level_seeds, config.val_ratio, 0) for s in self.dataset.shards]
        self._train = _indices([~v for v in validation])
        self._val = _indices(validation)
        check(
            len(self._train) > 0 and len(self._val) > 0,
            f"val_ratio {config.val_ratio}: leaves no levels to train on or none to validate on; collect more levels",
        )
        rng = philox((seed, 2**63))
        sample, _ = self.gather(self._train[np.sort(rng.choice(len(self._train), min(4096, len(self._train))))])
        self._frequencies = torch.from_numpy(colour_frequencies(sample.numpy())).float()
        self._weights = colour_weights(self._frequencies, limit=config.rare_limit)
        begin = getattr(self.model, "init_pca", None)
        self.explained = None if begin is None else begin(to_images(sample[:: max(len(sample) // 1024, 1)]))
        if config.init_from:
            initialise(self.model, config.init_from)

    def complete(self, model: dict[str, Any]) -> dict[str, Any]:
        """The model's specification with what follows from the data."""
        return model

    def batch(self, rng: np.random.Generator, size: int) -> Any:
        """Draw frames of training levels."""
        return CodecBatch(*self.gather(self._train[rng.integers(len(self._train), size=size)]))

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted error of the pixels + variance regulariser + divergence."""
        weights = self.rarity(batch.frames)
        weights = weights * (1 + self.config.motion_weight * motion_mask(batch.frames, batch.previous))
        images = to_images(batch.frames).contiguous(memory_format=torch.channels_last)
        shape = (len(images), *self.model.spec.shape)
        noise = torch.randn(shape, generator=generator, device=images.device) * self.config.latent_noise
        config, made = self.config, model(images, noise)
        error = (made.images.float() - images).square().mean(1)
        regulariser = variance_penalty(made.latents, target=config.var_target)
        lost = (
            error if config.loss == "squared" else F.huber_loss(made.images.float(), images, reduction="none").mean(1)
        )
        total = (weights * lost).sum() / weights.sum() * 100 + config.var_reg * regulariser
        metrics = {"psnr": -10 * error.detach().mean().log10(), "var_reg": regulariser.detach()}
        if config.divergence:
            total = total + config.divergence * made.divergence
            metrics["divergence"] = made.divergence.detach()
        return total, metrics

    def rarity(self, frames: Tensor) -> Tensor:
        """The weight of each pixel's colour, (B, h, w), of frames uint8 (B, h, w, c)."""
        self._weights = self._weights.to(frames.device)
        return self._weights[colour_bins(frames)]

    def rare(self, frames: Tensor) -> Tensor:
        """Bool (B, h, w): pixels whose colour is rare."""
        return self._frequencies.to(frames.device)[colour_bins(frames)] < RARE_FREQUENCY

    def graph_key(self, progress: float) -> int | None:
        """See `trainers.tasks.interface.Task`: one all along."""
        return 0

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Loss, MSE, PSNR, SSIM, PSNR of rare colours, latent statistics, on validation levels; writes a grid."""
        assert isinstance(model, Codec)
        device = next(model.parameters()).device
        rng = np.random.default_rng(0)
        chosen = self._val[np.sort(rng.choice(len(self._val), min(512, len(self._val))))]
        frames, previous = self.gather(chosen)
        generator = torch.Generator(device).manual_seed(0)
        losses, latents, outputs = [], [], []
        for chunk, before in zip(frames.split(64), previous.split(64), strict=True):
            z = model.encode(to_images(chunk).to(device))
            outputs.append(to_frames(model.decode(z)).cpu())
            latents.append(z.float().cpu())
            if len(losses) < EXAMINED // 64:
                losses.append(float(self.loss(model, CodecBatch(chunk, before).to(device), generator, 1.0)[0]))
        output = torch.cat(outputs)
        save_grid(folder / f"reconstruction-{step:07d}.png", [frames[:16].numpy(), output[:16].numpy()])
        rare = squared(output, frames)[self.rare(frames)]
        return {
            "loss": float(np.mean(losses)),
            **reconstruction_figures(frames, output, EXAMINED),
            "psnr_rare": float(-10 * rare.mean().log10()),
            **latent_statistics(torch.cat(latents)[:, : model.content_channels]),
        }

    def facts(self) -> dict[str, Any]:
        """The dataset it was trained on, and the explained variance where it began as PCA."""
        return {"data": self.dataset.facts, "pca_explained": self.explained}

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Frames at (shard, index) pairs (N, 2), and the frames before them, uint8 (N, h, w, c)."""
        frames = np.empty((len(indices), *NATIVE), np.uint8)
        previous = np.empty_like(frames)
        for row, (k, t) in enumerate(indices):
            shard = self.dataset.shards[k]
            frames[row] = shard.frames[t]
            previous[row] = shard.frames[t if shard.first[t] else t - 1]
        shown, before = (torch.from_numpy(observe(x, self.model.frame)) for x in (frames, previous))
        return shown, before


def reconstruction_figures(frames: Tensor, output: Tensor, examined: int | None = None) -> dict[str, float]:
    """MSE on the [0, 1] scale, PSNR in dB and SSIM of reconstructed frames uint8 (B, h, w, c) beside the true ones.

    SSIM takes as long as all else: it is that of the first `examined` frames.
    """
    mse, some = float(squared(output, frames).mean()), slice(0, examined)
    return {
        "mse": mse,
        "psnr": float(psnr(mse)),
        "ssim": float(ssim(output[some].numpy(), frames[some].numpy()).mean()),
    }


def latent_statistics(latents: Tensor) -> dict[str, float]:
    """Variance, largest absolute value and mean norm of latents (B, C, H, W)."""
    return {
        "latent_var": float(latents.var()),
        "latent_max": float(latents.abs().max()),
        "latent_mean_norm": float(latents.flatten(1).norm(dim=1).mean()),
    }


def squared(output: Tensor, frames: Tensor) -> Tensor:
    """Squared error (B, h, w) of uint8 frames on the [0, 1] scale, averaged over channels."""
    return ((output.float() - frames.float()) / 255).square().mean(-1)


def _indices(masks: list[np.ndarray]) -> np.ndarray:
    """(shard, index) int64 pairs (N, 2) of the steps where the masks hold."""
    pairs = [np.stack([np.full(int(m.sum()), k), np.flatnonzero(m)], 1) for k, m in enumerate(masks)]
    return np.concatenate(pairs)
