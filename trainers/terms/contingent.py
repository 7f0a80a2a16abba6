"""What the actions decide: the error of the pixels that another action would have shown otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.contract.frames import NATIVE
from dreamenv.errors import ConfigError
from dreamenv.models.interface import to_images
from dreamenv.models.registry import register
from trainers.latent_data import Joined, LatentDataset
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term

_SIDES = NATIVE[:2]
_LEAST = 8  # pixels: where fewer are contingent, each counts as if there were so many
_SAMPLED = 1024  # steps of a game that tell what copying costs


@dataclass(frozen=True)
class ContingentConfig:
    """Settings of the error of contingent pixels."""

    weight: float = 0.5
    """Its weight: with 1, to be as wrong as copying in contingent pixels costs as much as in whole pictures."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")


@register("term", "contingent", ContingentConfig)
class Contingent(Term):
    """Squared error where the action decides what is seen, of decoded pixels: their mean in each sample.

    In many games the player is a few pixels of thousands. A squared error of the whole picture hardly sees it, so
    dreams lose it first, and with it all that an agent does. Contingent regions (Bellemare et al. 2012) are found by
    trying another action from the same moment: `envs.collect` with `contingent`. Where that uses up other random
    numbers, what they decide is among them. Samples count alike, whether a few pixels turn with the player or the whole
    picture scrolls. Those without any such pixel count as without error.

    The errors are divided by what copying the frame before costs in such pixels of that game, and multiplied by what it
    costs in the batch's whole pictures, by the `squared` term. So the weight means the same in every game.
    """

    columns = ("contingent",)
    config: ContingentConfig

    def __init__(self, config: ContingentConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        found, codec = setting.data.contingent, setting.codec
        where = setting.data.facts["data"]
        if found is None:
            raise ConfigError(f"task.terms.contingent: {where} has no column contingent; collect it with --contingent")
        sound = codec.frame == NATIVE and not codec.keeps
        check(sound, f"task.terms.contingent: wants frames {NATIVE} that latents alone decode to; leave the term out")
        self._found = found
        copied = torch.tensor([_copied(setting.data, found, game) for game in range(len(setting.data.games))])
        without = [name for name, cost in zip(setting.data.games, copied.tolist(), strict=True) if not cost]
        check(
            not without,
            f"task.terms.contingent: in {', '.join(without)} of {where} no action decides anything; leave the term out",
        )
        self._copied = copied

    def extra(self, rng: np.random.Generator, indices: np.ndarray, live: np.ndarray) -> dict[str, Tensor]:
        """Which pixels are contingent, bool (B, U, 64, 64)."""
        u = live.shape[1]
        bits = np.unpackbits(self._found[indices[:, -u - 1 : -1]], axis=-1).astype(bool)
        return {"contingent": torch.from_numpy(bits.reshape(*live.shape, *_SIDES))}

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        total, metrics = torch.zeros((), device=batch.actions.device), {}
        own, steps, k = rollouts.batch, rollouts.mean.steps, rollouts.dynamics.context
        self._copied = self._copied.to(batch.actions.device)  # once: no copy may come into a CUDA graph
        copied = self._copied[0] if own.game is None else self._copied[own.game]
        for u, step in enumerate(steps):
            counts = (own.extra["contingent"][:, u] & own.live[:, u, None, None]).float()
            off = rollouts.decoded(step.prediction.latent) - rollouts.decoded(step.target)
            share = (_means(off, counts) / copied).mean()
            whole = (rollouts.error(own.latents[:, k - 1 + u], step.target) * step.live * step.cells).mean()
            total = total + self.config.weight * whole * share / len(steps)
            if u in (0, len(steps) - 1):
                metrics[f"contingent_{u + 1}"] = share.detach()
        return total, metrics


def _means(off: Tensor, counts: Tensor) -> Tensor:
    """Mean squares (B,) of differences (B, 3, 64, 64) where `counts` (B, 64, 64) is 1."""
    return (off.square().mean(1) * counts).sum((1, 2)) / counts.sum((1, 2)).clamp_min(_LEAST)


def _copied(data: LatentDataset, found: Joined, game: int) -> float:
    """What copying the frame before costs in the contingent pixels of a game, the mean of some of its steps."""
    usable = np.flatnonzero(~data.first[1:] & (data.game[:-1] == game) & ~data.validation[:-1])
    steps = usable[:: max(len(usable) // _SAMPLED, 1)]
    if not len(steps):
        return 0.0
    pairs = to_images(torch.from_numpy(data.frames(steps[:, None] + np.arange(2))).flatten(0, 1)).unflatten(0, (-1, 2))
    counts = torch.from_numpy(np.unpackbits(found[steps], axis=-1).reshape(-1, *_SIDES)).float()
    return float(_means(pairs[:, 1] - pairs[:, 0], counts).mean())
