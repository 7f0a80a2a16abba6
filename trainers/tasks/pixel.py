"""Trains the pixel world model: cross-entropy of several next frames, moving pixels weighted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.data.offline import OfflineDataset
from dreamenv.evaluation.figures import save_grid, side_by_side
from dreamenv.evaluation.metrics import psnr, squared_error
from dreamenv.models.dynamics.pixel import PixelWorldModel
from dreamenv.models.interface import NULL_ACTION, State, to_frames
from dreamenv.models.io import initialise
from dreamenv.models.registry import build, register
from dreamenv.video import check_film, save_video
from trainers.batch import Batch
from trainers.encode import load_codec, training_data
from trainers.models import check_told, completed

_HORIZON = 10  # steps of the validation's open loop


@dataclass(frozen=True)
class PixelTaskConfig:
    """What the pixel world model is trained for."""

    data: str
    """Dataset folder."""
    codec: str
    """Model folder of the codec `pixels`, which says what a frame is."""
    init_from: str = ""
    """Model folder to start from; empty starts anew."""
    motion_tau: float = 0.1
    """A pixel moves if it differs by more than this from the last frame that was given, on the [0, 1] scale."""
    motion_weight: float = 5.0
    """Added weight of pixels that move, and of those around them."""
    dilate: int = 5
    """Side in pixels of the square by which the moving ones are widened."""
    unknown: float = 0.5
    """Share of samples of which only the first future action is told, as when the model is used as an environment."""
    val_ratio: float = 0.02
    """Share of levels kept for validation."""
    val_seed: int = 0
    """Decides which."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(0 <= self.motion_tau < 1, f"motion_tau {self.motion_tau}: must be in [0, 1)")
        check(self.motion_weight >= 0, f"motion_weight {self.motion_weight}: must be >= 0")
        check(self.dilate >= 1 and self.dilate % 2 == 1, f"dilate {self.dilate}: must be odd, >= 1")
        check(0 <= self.unknown <= 1, f"unknown {self.unknown}: must be in 0..1")
        check(0 < self.val_ratio < 1, f"val_ratio {self.val_ratio}: must be in (0, 1)")


@dataclass(frozen=True)
class PixelBatch(Batch):
    """Images (B, K, c, h, w) in [0, 1], actions int64 (B, K - 1) and (B, F), and the images that follow (B, F, ...)."""

    past: Tensor
    past_actions: Tensor
    future_actions: Tensor
    future: Tensor


@register("task", "pixel", PixelTaskConfig)
class PixelTask:
    """See `trainers.tasks.interface.Task`."""

    kind = "dynamics"
    auxiliary: nn.Module | None = None

    def __init__(self, config: PixelTaskConfig, model: dict[str, Any], seed: int) -> None:
        check_film(Path("rollout.gif"))  # which every validation writes, the last too
        self.config = config
        self.dataset = training_data(config.data)
        self.codec, self._digest = load_codec(config.codec)
        torch.manual_seed(seed)
        self.model: PixelWorldModel = build("dynamics", completed("dynamics", model, self.codec), where="model")
        check_told((), self.dataset.games, f"model.type {model.get('type')!r}")
        found = isinstance(self.model, PixelWorldModel)
        check(found, f"model.type {model.get('type')!r}: the task pixel trains a pixel_world_model")
        spec = self.model.spec
        check(spec == self.codec.spec, f"model.latent {spec}: the codec's latents are {self.codec.spec}")
        if config.init_from:
            initialise(self.model, config.init_from)
        shape = self.model.config
        self._train = self._open("train", shape.future)
        self._val, self._films = self._open("val", shape.future), self._open("val", _HORIZON)

    def _open(self, split: Any, future: int) -> OfflineDataset:
        config, k = self.config, self.model.config.context
        return OfflineDataset(config.data, k, future, self.codec.frame, split, config.val_ratio, config.val_seed)

    def batch(self, rng: np.random.Generator, size: int) -> PixelBatch:
        """Draw sequences of training levels; of some all future actions but the first are unknown."""
        hidden = rng.random(size) < self.config.unknown
        return self._gather(self._train, rng.integers(len(self._train), size=size), hidden)

    def _gather(self, data: OfflineDataset, indices: np.ndarray, hidden: np.ndarray) -> PixelBatch:
        samples = [data[int(i)] for i in indices]
        past, taken, future_actions, future = (torch.stack([s[j] for s in samples]) for j in range(4))
        if data.frame[2] == 1:
            past, future = past.unsqueeze(2), future.unsqueeze(2)
        future_actions[torch.from_numpy(hidden), 1:] = NULL_ACTION
        return PixelBatch(past, taken, future_actions, future)

    def loss(
        self, model: nn.Module, batch: PixelBatch, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Binary cross-entropy of all future frames, moving pixels weighted."""
        state, future = State({"latents": batch.past, "actions": batch.past_actions}), batch.future_actions
        logits = model(state, future[:, 0], future=future)
        entropy = F.binary_cross_entropy_with_logits(logits, batch.future, reduction="none")
        moving = moving_mask(batch.future, batch.past[:, -1:], self.config.motion_tau, self.config.dilate)
        weights = 1 + self.config.motion_weight * moving
        loss = (weights * entropy).sum() / (weights.sum() * entropy.shape[2])
        mse = (logits.detach().sigmoid() - batch.future).square().mean()
        return loss, {"psnr": -10 * mse.log10(), "moving": moving.mean()}

    def graph_key(self, progress: float) -> int | None:
        """See `trainers.tasks.interface.Task`: one all along."""
        return 0

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Loss with all actions known, and open-loop MSE and PSNR after 1, 5, 10 steps; a strip and a film."""
        assert isinstance(model, PixelWorldModel)
        device, rng = next(model.parameters()).device, np.random.default_rng(0)
        losses, generator = [], torch.Generator(device).manual_seed(0)
        for _ in range(4):
            batch = self._gather(self._val, rng.integers(len(self._val), size=32), np.zeros(32, bool)).to(device)
            losses.append(float(self.loss(model, batch, generator, 1.0)[0]))
        chosen = rng.choice(len(self._films), min(64, len(self._films)), replace=False)
        clips = self._gather(self._films, chosen, np.zeros(len(chosen), bool)).to(device)
        state, dream = model.begin(clips.past, clips.past_actions), []
        for h in range(_HORIZON):
            action = clips.future_actions[:, h]
            prediction = model.predict(state, action)
            state = model.advance(state, action, prediction.latent)
            dream.append(to_frames(prediction.latent).cpu().numpy())
        frames, real = np.stack(dream, 1), to_frames(clips.future).cpu().numpy()
        errors = squared_error(frames, real)
        save_grid(
            folder / f"prediction-{step:07d}.png",
            [row for pair in zip(real[:4], frames[:4], strict=True) for row in pair],
        )
        save_video(folder / f"rollout-{step:07d}.gif", side_by_side({"real": real[0], "dream": frames[0]}), fps=5)
        figures = {"loss": float(np.mean(losses))}
        for h in (1, 5, 10):
            mse = float(errors[:, h - 1].mean())
            figures |= {f"mse_{h}": mse, f"psnr_{h}": float(psnr(mse))}
        return figures

    def facts(self) -> dict[str, Any]:
        """The data it was trained on, and the range of images."""
        return {
            "data": self.dataset.facts,
            "codec_sha256": self._digest,
            "latent_max": 1.0,
            "latent_rms": 1.0,
            "latent_rms_max": 1.0,
        }


def moving_mask(future: Tensor, last: Tensor, threshold: float, dilate: int) -> Tensor:
    """Float (B, F, 1, h, w), 1 where images (B, F, c, h, w) differ from the last (B, 1, c, h, w), or a pixel near does.

    Args:
        future: images in [0, 1].
        last: the last frame that was given.
        threshold: difference of any channel from which on a pixel counts as moving.
        dilate: side in pixels of the max-pooling that widens the mask; odd.
    """
    moved = ((future - last).abs().amax(2, keepdim=True) > threshold).float()
    return F.max_pool2d(moved.flatten(0, 1), dilate, 1, dilate // 2).unflatten(0, moved.shape[:2])
