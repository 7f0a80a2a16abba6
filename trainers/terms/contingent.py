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
_SAMPLED = 4096  # steps that tell how many pixels are contingent


@dataclass(frozen=True)
class ContingentConfig:
    """Settings of the error of contingent pixels."""

    weight: float = 0.5
    """Its weight."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")


@register("term", "contingent", ContingentConfig)
class Contingent(Term):
    """Squared error of decoded pixels, in [0, 1], where the action decides what is seen: mean over such pixels.

    In many games the player is a few pixels of thousands. A squared error of the whole picture hardly sees it, so
    dreams lose it first, and with it all that an agent does. Contingent regions (Bellemare et al. 2012) are found by
    trying another action from the same moment: `envs.collect` with `contingent`. The error is divided by how many
    pixels of the data are contingent, not of the batch, so that samples in which more depends on the action count more.
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
        sample = found[:: max(len(found) // _SAMPLED, 1)]
        self._found, self._share = found, float(np.unpackbits(sample).mean())
        check(self._share > 0, "task.terms.contingent: no action decides anything in this data; leave it out")

    def extra(self, rng: np.random.Generator, indices: np.ndarray, live: np.ndarray) -> dict[str, Tensor]:
        """Which pixels are contingent, bool (B, U, 64, 64)."""
        u = live.shape[1]
        bits = np.unpackbits(self._found[indices[:, -u - 1 : -1]], axis=-1).astype(bool)
        return {"contingent": torch.from_numpy(bits.reshape(*live.shape, *_SIDES))}

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        total, metrics = torch.zeros((), device=batch.actions.device), {}
        found, steps = rollouts.batch.extra["contingent"], rollouts.mean.steps
        size = found[:, 0].numel() * self._share
        for u, step in enumerate(steps):
            predicted = step.prediction.latent.float()
            with contextlib.nullcontext() if rollouts.codec.autocast else fp32(predicted):
                off = rollouts.codec.decode(predicted) - rollouts.codec.decode(step.target.float())
            counts = found[:, u] * rollouts.batch.live[:, u, None, None]
            error = (off.float().square().mean(1) * counts).sum() / size
            total = total + self.config.weight * error / len(steps)
            if u in (0, len(steps) - 1):
                metrics[f"contingent_{u + 1}"] = error.detach()
        return total, metrics
