"""Trains the autoencoder on the grid of tiles: a code must draw its tile now and, from other phases, some steps later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.errors import ConfigError
from dreamenv.metrics import RARE_FREQUENCY
from dreamenv.models.autoencoder import to_frames, to_images
from dreamenv.models.io import load_model
from dreamenv.models.tile import SCALE, TileAutoencoder, phase_of, shown
from dreamenv.report import save_grid
from trainers.autoencoder import AutoencoderTask, AutoencoderTaskConfig
from trainers.latents import check_camera
from trainers.losses import colour_bins, motion_mask, variance_penalty

_PARTS = ("all", "decoder", "reader")
_LIMIT = 0.01  # squared error from which on a pixel is taken for one that changed


@dataclass(frozen=True)
class TileAutoencoderTaskConfig(AutoencoderTaskConfig):
    """What the tile autoencoder is trained for."""

    init_from: str = ""
    """Model folder to start from; empty starts anew."""
    learns: str = "all"
    """What is trained: "all"; "decoder", and the phase reader, while latents keep their meaning; "reader", only that."""
    later: int = 16
    """Most steps between the two pictures of a sample."""
    carried: float = 1.0
    """Weight of the later picture's error, drawn from the earlier one's codes, beside that of its own."""
    agreement: float = 0.05
    """Weight of the difference between a tile's codes in the two pictures."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        super().__post_init__()
        check(self.learns in _PARTS, f"learns {self.learns!r}: must be one of {', '.join(_PARTS)}")
        check(self.learns == "all" or bool(self.init_from), f"learns {self.learns!r}: needs init_from, a trained autoencoder")
        check(1 <= self.later <= 1000, f"later {self.later}: must be 1..1000")
        check(self.carried >= 0, f"carried {self.carried}: must be >= 0")
        check(self.agreement >= 0, f"agreement {self.agreement}: must be >= 0")


class TileAutoencoderTask(AutoencoderTask):
    """See `trainers.loop.Task`."""

    config: TileAutoencoderTaskConfig

    def __init__(self, config: TileAutoencoderTaskConfig, model: dict[str, Any], seed: int) -> None:
        super().__init__(config, model, seed)
        check_camera(self.dataset)
        if config.init_from:
            try:
                self.model.load_state_dict(load_model(config.init_from)[0].state_dict())
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise ConfigError(f"init_from {config.init_from}: holds another architecture ({reason})") from None
        model_ = cast(TileAutoencoder, self.model)
        model_.tiles_in.requires_grad_(config.learns == "all")
        model_.tiles_out.requires_grad_(config.learns != "reader")
        self._begins = [np.maximum.accumulate(np.where(s.first, np.arange(len(s)), 0)) for s in self.dataset.shards]

    def _begin(self, images: Tensor) -> None:
        """The tile autoencoder begins at random."""

    def batch(self, rng: np.random.Generator, size: int) -> dict[str, Tensor]:
        """Frames, the frames before them and earlier ones, uint8 (B, 64, 64, 3), with the cameras of first and last (B, 2)."""
        return self._pairs(self._train[rng.integers(len(self._train), size=size)], rng)

    def _pairs(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        frames, previous = self._gather(indices)
        back = rng.integers(1, self.config.later, size=len(indices), endpoint=True)
        before = np.array([(k, max(t - n, self._begins[k][t])) for (k, t), n in zip(indices, back, strict=True)])
        cameras = [torch.from_numpy(np.stack([self.dataset.shards[k].camera[t] for k, t in i])) for i in (indices, before)]
        return {"frames": frames, "previous": previous, "earlier": self._gather(before)[0],
                "camera": cameras[0], "earlier_camera": cameras[1]}  # fmt: skip

    def loss(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator,
             progress: float) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Weighted squared error now and later, agreement of the codes, variance regulariser, error of the phase reader."""
        config, frames = self.config, batch["frames"]
        cameras = [batch["camera"], batch["earlier_camera"]]
        phase, earlier_phase = (phase_of(c) for c in cameras)
        by = cameras[0].floor() - cameras[1].floor()
        images = to_images(frames).contiguous(memory_format=torch.channels_last)
        if config.learns == "reader":
            reading = _misread(cast(TileAutoencoder, model).reader(images), phase)
            return reading, {"reading": reading.detach()}
        earlier = to_images(batch["earlier"]).contiguous(memory_format=torch.channels_last)
        size = (2 * len(frames), *cast(TileAutoencoder, self.model).latent_shape)
        noise = torch.randn(size, generator=generator, device=frames.device)[:, :-4] * config.latent_noise
        own, later, codes, carried, answers = model(images, phase, earlier, earlier_phase, by, noise)
        rarity = self._rarity(frames)
        weights = rarity * (1 + config.motion_weight * motion_mask(frames, batch["previous"]))
        error = (own.float() - images).square().mean(1)
        total = (weights * error).sum() / weights.sum() * 100
        known = carried[:, -1:] > 0.99
        seen = cast(TileAutoencoder, self.model).spread_out(known.float(), phase) * rarity
        changed = (later.float() - images).square().mean(1)
        total = total + config.carried * 100 * (seen * changed * _LIMIT / (changed + _LIMIT)).sum() / seen.sum().clamp_min(1)
        both = known & (shown(phase) > 0.99)
        difference = (carried[:, :-1] - codes.float()).square()
        agreement = (difference / (1 + difference) * both).sum() / both.sum().clamp_min(1) / codes.shape[1]
        regulariser = variance_penalty(codes, shown(phase) > 0.99)
        reading = _misread(answers, phase)
        total = total + config.agreement * agreement + config.var_reg * regulariser + 0.1 * reading
        return total, {"psnr": -10 * error.detach().mean().log10(), "reading": reading.detach(),
                       "agreement": agreement.detach(), "var_reg": regulariser.detach()}  # fmt: skip

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """PSNR over validation levels and over rare colours, the phase being read; writes a picture grid.

        Also the PSNR with the true phase, that of later pictures where they had been seen, and the reader's error in pixels.
        """
        autoencoder = cast(TileAutoencoder, model)
        device = next(model.parameters()).device
        rng = np.random.default_rng(0)
        chosen = self._val[np.sort(rng.choice(len(self._val), min(512, len(self._val))))]
        columns: dict[str, list[Tensor]] = {name: [] for name in ("known", "read", "rare", "carried", "phase", "latents")}
        grid = []
        for at in range(0, len(chosen), 64):
            batch = {name: value.to(device) for name, value in self._pairs(chosen[at : at + 64], rng).items()}
            frames = batch["frames"]
            phase, before = phase_of(batch["camera"]), phase_of(batch["earlier_camera"])
            images, earlier = to_images(frames), to_images(batch["earlier"])
            read = autoencoder.encode(images)
            output = to_frames(autoencoder.decode(read))
            error = _squared(output, frames)
            by = batch["camera"].floor() - batch["earlier_camera"].floor()
            none = torch.zeros(2 * len(frames), autoencoder.config.codes, 1, 1, device=device)
            own, later, _, carried, _ = model(images, phase, earlier, before, by, none)
            seen = autoencoder.spread_out((carried[:, -1:] > 0.99).float(), phase) > 0
            off = (autoencoder.read_phase(images) - phase + 0.5) % 1 - 0.5
            columns["known"].append(_squared(to_frames(own), frames).flatten())
            columns["read"].append(error.flatten())
            columns["rare"].append(error[self._frequencies.to(device)[colour_bins(frames)] < RARE_FREQUENCY])
            columns["carried"].append(_squared(to_frames(later), frames)[seen])
            columns["phase"].append(off.abs().flatten() * SCALE)
            columns["latents"].append(read.flatten(1))
            grid.append([x.cpu().numpy() for x in (frames, output, to_frames(later))])
        save_grid(folder / f"reconstruction-{step:07d}.png", [row[:16] for row in grid[0]])
        all_of = {name: torch.cat(values).float().cpu() for name, values in columns.items()}

        def decibel(name: str) -> float:
            return float(-10 * all_of[name].mean().log10())

        return {
            "psnr": decibel("read"), "psnr_rare": decibel("rare"), "psnr_known_phase": decibel("known"),
            "psnr_later": decibel("carried"), "median_later": float(all_of["carried"].median()) * 255**2,
            "phase_error": float(all_of["phase"].mean()), "phase_misread": float((all_of["phase"] > 0.5).float().mean()),
            "latent_max": float(all_of["latents"].abs().max()),
        }  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """The dataset it was trained on."""
        return {"data": self.dataset.facts}


def _misread(answers: Tensor, phase: Tensor) -> Tensor:
    """Mean squared error of the phase reader's answers (B, 4) for phases (B, 2)."""
    angle = 2 * torch.pi * phase
    return (answers.float() - torch.cat([angle.cos(), angle.sin()], 1)).square().mean()


def _squared(output: Tensor, frames: Tensor) -> Tensor:
    return ((output.float() - frames.float()) / 255).square().mean(-1)
