"""What the actions decide: the error of the pixels that another action would have shown otherwise."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.contract.frames import NATIVE
from dreamenv.models.blocks import fp32
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term

_SIDES = NATIVE[:2]
_LEAST = 8  # pixels: where fewer are contingent, each counts as if there were so many
_TINY = 1e-6  # squared error of copying below which there is nothing to learn


@dataclass(frozen=True)
class ContingentConfig:
    """Settings of the error of contingent pixels."""

    weight: float = 0.5
    """Its weight: with 1, to err by as much as copying does in contingent pixels costs as much as to err so in whole
    pictures."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")


@register("term", "contingent", ContingentConfig)
class Contingent(Term):
    """Squared error where the action decides what is seen, of decoded pixels: their mean in each sample.

    In many games the player is a few pixels of thousands. A squared error of the whole picture hardly sees it, so
    dreams lose it first, and with it all that an agent does. Contingent regions (Bellemare et al. 2012) are found by
    trying another action from the same moment: `envs.collect` with `contingent`. Samples count alike, whether a few
    pixels turn with the player or the whole picture scrolls. Those without any such pixel count as without error.

    The errors are divided by what copying the frame before costs in such pixels, and multiplied by what it costs in
    whole pictures, by the `squared` term. So the weight means the same in every game.
    """

    columns = ("contingent",)
    config: ContingentConfig

    def __init__(self, config: ContingentConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        found, codec = setting.data.contingent, setting.codec
        check(
            found is not None,
            f"task.terms.contingent: {setting.data.facts['data']} does not say which pixels are; collect it with "
            "--contingent",
        )
        assert found is not None
        sound = codec.frame == NATIVE and not codec.keeps
        check(sound, f"task.terms.contingent: wants pictures of {NATIVE} from latents alone; leave it out")
        self._found = found

    def extra(self, rng: np.random.Generator, indices: np.ndarray, live: np.ndarray) -> dict[str, Tensor]:
        """Which pixels are contingent, bool (B, U, 64, 64)."""
        u = live.shape[1]
        bits = np.unpackbits(self._found[indices[:, -u - 1 : -1]], axis=-1).astype(bool)
        return {"contingent": torch.from_numpy(bits.reshape(*live.shape, *_SIDES))}

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        total, metrics = torch.zeros((), device=batch.actions.device), {}
        found, steps, k = rollouts.batch.extra["contingent"], rollouts.mean.steps, rollouts.dynamics.context
        for u, step in enumerate(steps):
            counts = (found[:, u] & rollouts.batch.live[:, u, None, None]).float()
            before, target = rollouts.batch.latents[:, k - 1 + u].float(), step.target.float()
            true = self._decoded(rollouts, target)
            error = self._mean(self._decoded(rollouts, step.prediction.latent.float()) - true, counts)
            copied = self._mean(self._decoded(rollouts, before) - true, counts)
            whole = (rollouts.error(before, target) * step.live * step.cells).mean()
            total = total + self.config.weight * whole * error / copied.clamp_min(_TINY) / len(steps)
            if u in (0, len(steps) - 1):
                metrics[f"contingent_{u + 1}"] = (error / copied.clamp_min(_TINY)).detach()
        return total, metrics

    @staticmethod
    def _decoded(rollouts: Rollouts, latents: Tensor) -> Tensor:
        """The images (B, 3, 64, 64) of latents."""
        with contextlib.nullcontext() if rollouts.codec.autocast else fp32(latents):
            return rollouts.codec.decode(latents).float()

    @staticmethod
    def _mean(off: Tensor, counts: Tensor) -> Tensor:
        """Mean over samples of the mean square of differences (B, 3, 64, 64) where (B, 64, 64) is 1."""
        return ((off.square().mean(1) * counts).sum((1, 2)) / counts.sum((1, 2)).clamp_min(_LEAST)).mean()
