"""Trains the autoencoder on the grid of tiles: a code must draw its tile now and, shifted, some steps later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.contract.games import get_game
from dreamenv.evaluation.figures import save_grid
from dreamenv.models.codecs.tiles import TileAutoencoder
from dreamenv.models.interface import to_frames, to_images
from dreamenv.models.registry import register
from dreamenv.models.tiles.grid import phase_of
from trainers.batch import Batch
from trainers.pixels import motion_mask, variance_penalty
from trainers.tasks.codec import (
    EXAMINED,
    CodecTask,
    CodecTaskConfig,
    latent_statistics,
    reconstruction_figures,
    squared,
)

_PIXELS = 64  # of a picture each way
_PARTS = ("all", "decoder", "reader")
_LIMIT = 0.01  # squared error from which on a pixel is taken for one that changed


@dataclass(frozen=True)
class TileCodecTaskConfig(CodecTaskConfig):
    """What the tile autoencoder is trained for."""

    learns: str = "all"
    """What is trained: "all"; "decoder", and the phase reader, while latents keep their meaning; "reader", only
    that."""
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
        begun = self.learns == "all" or bool(self.init_from)
        check(begun, f"learns {self.learns!r}: needs init_from, a trained codec")
        check(1 <= self.later <= 1000, f"later {self.later}: must be 1..1000")
        check(self.carried >= 0, f"carried {self.carried}: must be >= 0")
        check(self.agreement >= 0, f"agreement {self.agreement}: must be >= 0")


@dataclass(frozen=True)
class TileCodecBatch(Batch):
    """Frames, those before them and earlier ones, uint8 (B, 64, 64, 3); cameras of first and last, float32 (B, 2).

    And which of several games each is of, int64 (B,); None where there is but one.
    """

    frames: Tensor
    previous: Tensor
    earlier: Tensor
    camera: Tensor
    earlier_camera: Tensor
    game: Tensor | None = None


@register("task", "tile_codec", TileCodecTaskConfig)
class TileCodecTask(CodecTask):
    """See `trainers.tasks.interface.Task`."""

    config: TileCodecTaskConfig
    model: TileAutoencoder  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: TileCodecTaskConfig, model: dict[str, Any], seed: int) -> None:
        super().__init__(config, model, seed)
        found = isinstance(self.model, TileAutoencoder)
        check(found, f"model.type {model.get('type')!r}: the task tile_codec trains a tile_autoencoder")
        self.model.tiles_in.requires_grad_(config.learns == "all")
        self.model.tiles_out.requires_grad_(config.learns != "reader")
        shards = self.dataset.shards
        self._begins = [np.maximum.accumulate(np.where(s.first, np.arange(len(s)), 0)) for s in shards]

    def complete(self, model: dict[str, Any]) -> dict[str, Any]:
        """The grid as the game shows it, or several games do."""
        names = self.dataset.games
        modes = [self.dataset.facts_of(name)["distribution_mode"] for name in names]
        shown = [get_game(name).view for name in names]
        players = [view.player.get(mode, (0.5, 0.5)) for view, mode in zip(shown, modes, strict=True)]
        for name, player in zip(names, players, strict=True):
            check(
                not any(math.isnan(p) for p in player) and player == players[0],
                f"data {self.config.data}: {name}'s player is at {player} in the picture, not at one fixed place; use "
                "another codec",
            )
        views = [view.tiles[mode] for view, mode in zip(shown, modes, strict=True)]
        grid: dict[str, Any] = {"view": max(views), "player": list(players[0])}
        if len(names) == 1:
            return {"grid": grid} | model
        return {"grid": grid | {"views": views}, "games": list(names)} | model

    def batch(self, rng: np.random.Generator, size: int) -> TileCodecBatch:
        """Draw pairs of frames of training levels."""
        return self._pairs(self._train[rng.integers(len(self._train), size=size)], rng)

    def _pairs(self, indices: np.ndarray, rng: np.random.Generator) -> TileCodecBatch:
        frames, previous = self.gather(indices)
        back = rng.integers(1, self.config.later, size=len(indices), endpoint=True)
        before = np.array([(k, max(t - n, self._begins[k][t])) for (k, t), n in zip(indices, back, strict=True)])
        shards = self.dataset.shards
        cameras = [
            torch.from_numpy(np.stack([shards[k].columns["camera"][t] for k, t in i])) for i in (indices, before)
        ]
        game = None
        if self.model.games:
            game = torch.from_numpy(np.array([self.model.games.index(shards[k].game) for k, _ in indices]))
        return TileCodecBatch(frames, previous, self.gather(before)[0], cameras[0], cameras[1], game)

    def loss(
        self, model: nn.Module, batch: TileCodecBatch, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted squared error now and later, agreement of the codes, variance regulariser, the reader's error."""
        config, frames, grid = self.config, batch.frames, self.model.config.grid
        phase, earlier_phase = phase_of(batch.camera), phase_of(batch.earlier_camera)
        by = batch.camera.floor() - batch.earlier_camera.floor()
        images = to_images(frames).contiguous(memory_format=torch.channels_last)
        if config.learns == "reader":
            reading = _reading_error(self.model.reader(images, grid.tiles(batch.game, 2)), phase)
            return reading, {"reading": reading.detach()}
        earlier = to_images(batch.earlier).contiguous(memory_format=torch.channels_last)
        size = (2 * len(frames), *self.model.spec.shape)
        noise = torch.randn(size, generator=generator, device=frames.device)[:, : -grid.known] * config.latent_noise
        given = () if batch.game is None else (batch.game,)
        own, later, codes, carried, answers = model(images, phase, earlier, earlier_phase, by, noise, *given)
        rarity = self.rarity(frames)
        weights = rarity * (1 + config.motion_weight * motion_mask(frames, batch.previous))
        error = (own.float() - images).square().mean(1)
        total = (weights * error).sum() / weights.sum() * 100
        known = carried[:, -1:] > 0.99
        seen = self.model.spread_out(known.float(), phase, batch.game) * rarity
        changed = (later.float() - images).square().mean(1)
        total = total + config.carried * 100 * (
            seen * changed * _LIMIT / (changed + _LIMIT)
        ).sum() / seen.sum().clamp_min(1)
        whole = grid.shown(phase, batch.game) > 0.99
        difference = (carried[:, :-1] - codes.float()).square()
        both = known & whole
        agreement = (difference / (1 + difference) * both).sum() / both.sum().clamp_min(1) / codes.shape[1]
        regulariser = variance_penalty(codes, whole)
        reading = _reading_error(answers, phase)
        total = total + config.agreement * agreement + config.var_reg * regulariser + 0.1 * reading
        return total, {
            "psnr": -10 * error.detach().mean().log10(),
            "reading": reading.detach(),
            "agreement": agreement.detach(),
            "var_reg": regulariser.detach(),
        }

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Loss, MSE, PSNR, SSIM, PSNR of rare colours on validation levels, the phase being read; writes a grid.

        Also the PSNR with the true phase, that of later pictures where they had been seen, the reader's error in
        pixels, and the codes' statistics.
        """
        assert isinstance(model, TileAutoencoder)
        device = next(model.parameters()).device
        rng = np.random.default_rng(0)
        chosen = self._val[np.sort(rng.choice(len(self._val), min(512, len(self._val))))]
        names = ("known", "rare", "carried", "phase", "latents")
        columns: dict[str, list[Tensor]] = {name: [] for name in names}
        pictures: list[list[Tensor]] = []
        generator, losses = torch.Generator(device).manual_seed(0), []
        for at in range(0, len(chosen), 64):
            batch = self._pairs(chosen[at : at + 64], rng).to(device)
            found, drawn = self._measure(model, batch)
            for name in names:
                columns[name].append(found[name])
            pictures.append(drawn)
            if at < EXAMINED:
                losses.append(float(self.loss(model, batch, generator, 1.0)[0]))
        frames, output, later = (torch.cat(row) for row in zip(*pictures, strict=True))
        save_grid(folder / f"reconstruction-{step:07d}.png", [x[:16].numpy() for x in (frames, output, later)])
        all_of = {name: torch.cat(values).float().cpu() for name, values in columns.items()}
        decibel = {name: float(-10 * all_of[name].mean().log10()) for name in ("known", "rare", "carried")}
        return {
            "loss": float(np.mean(losses)),
            **reconstruction_figures(frames, output, EXAMINED),
            "psnr_rare": decibel["rare"],
            "psnr_known_phase": decibel["known"],
            "psnr_later": decibel["carried"],
            "median_later": float(all_of["carried"].median()) * 255**2,
            "phase_error": float(all_of["phase"].mean()),
            "phase_misread": float((all_of["phase"] > 0.5).float().mean()),
        } | latent_statistics(all_of["latents"])

    def _measure(self, model: TileAutoencoder, batch: TileCodecBatch) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Squared errors and the like of one batch, flat; frames, those drawn of them and later ones, on the CPU."""
        frames, phase, before = batch.frames, phase_of(batch.camera), phase_of(batch.earlier_camera)
        images, earlier = to_images(frames), to_images(batch.earlier)
        told = {} if batch.game is None else {"game": batch.game}
        read = model.encode(images, **told)
        output = to_frames(model.decode(read))
        error = squared(output, frames)
        by = batch.camera.floor() - batch.earlier_camera.floor()
        none = torch.zeros(2 * len(frames), model.config.codes, 1, 1, device=frames.device)
        own, later, _, carried, _ = model(images, phase, earlier, before, by, none, batch.game)
        seen = model.spread_out((carried[:, -1:] > 0.99).float(), phase, batch.game) > 0
        off = (model.read_phase(images, batch.game) - phase + 0.5) % 1 - 0.5
        found = {
            "known": squared(to_frames(own), frames).flatten(),
            "rare": error[self.rare(frames)],
            "carried": squared(to_frames(later), frames)[seen],
            "phase": (off.abs() * (_PIXELS / model.config.grid.tiles(batch.game, 1))).flatten(),
            "latents": read[:, : model.content_channels],
        }
        return found, [x.cpu() for x in (frames, output, to_frames(later))]

    def facts(self) -> dict[str, Any]:
        """The dataset it was trained on."""
        return {"data": self.dataset.facts}


def _reading_error(answers: Tensor, phase: Tensor) -> Tensor:
    """Mean squared error of the phase reader's answers (B, 4) for phases (B, 2)."""
    angle = 2 * torch.pi * phase
    return (answers.float() - torch.cat([angle.cos(), angle.sin()], 1)).square().mean()
