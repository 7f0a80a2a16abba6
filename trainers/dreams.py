"""Dreams from real contexts along real actions: what a head will be asked about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dreamenv.device import pick_precision
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.interface import Dynamics
from trainers.models import of_game
from trainers.moments import Moments

TOGETHER = {"cpu": 128, "cuda": 1024}
"""Dreams dreamt at once."""


@dataclass(frozen=True)
class DreamtMoments:
    """Moments of dreams, at which a head is asked.

    Attributes:
        contexts: float16 (N, K, C, H, W), the last latents of each dream, the current one last.
        hints: float16 (N, ...), what the dynamics hint of each moment's step, of the dream's own state.
        begin: int64 (N,), the step of the data at which each dream begins.
        depth: int64 (N,), how many steps it has dreamt.
        kind: int64 (N,): `EVENT`, `NEAR` or `CALM`.
    """

    contexts: Tensor
    hints: dict[str, Tensor]
    begin: np.ndarray
    depth: np.ndarray
    kind: np.ndarray

    @property
    def steps(self) -> np.ndarray:
        """The step of the data int64 (N,) that each moment is as of."""
        return self.begin + self.depth

    def rows(self, index: np.ndarray) -> DreamtMoments:
        """Some of them, by int64 (M,) or bool (N,)."""
        at = torch.from_numpy(np.arange(len(self.begin))[index])
        hints = {name: hint[at] for name, hint in self.hints.items()}
        return DreamtMoments(self.contexts[at], hints, self.begin[index], self.depth[index], self.kind[index])


EVENT, NEAR, CALM = range(3)
"""Kinds of dreamt moments: a rare outcome, shortly before one, and any moment of a dream that ends anywhere."""


def shared_out(length: np.ndarray, together: int) -> list[tuple[np.ndarray, int]]:
    """Share dreams of lengths int64 (D,) out to batches: their rows, at most `together`, and the evaluations a step.

    Dreams of about one length are dreamt together, few on for others' sake, and half of each length with either: the
    long ones are the uneventful, and what two evaluations draw must not be taken for a sign of that.
    """
    order, batches = np.argsort(length, kind="stable"), []
    for at in range(0, len(order), 2 * together):
        block = order[at : at + 2 * together]
        batches += [(block[i::2], i + 1) for i in range(min(2, len(block)))]
    return batches


def dream(
    dynamics: Dynamics, moments: Moments, begin: np.ndarray, asked: np.ndarray, hinted: bool, rng: np.random.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dream from steps of the data along the actions that were taken there, and keep some moments.

    Args:
        dynamics: which; it dreams on its device.
        moments: whose steps they are.
        begin: int64 (D,), where the dreams begin.
        asked: int64 (N, 2), the moments to keep: of which dream, and after how many steps.
        hinted: whether what the dynamics hint is kept too.
        rng: of the noise.

    Returns:
        Their contexts float16 (N, K, C, H, W), and hints float16 (N, ...) by name.
    """
    length = np.zeros(len(begin), np.int64)
    np.maximum.at(length, asked[:, 0], asked[:, 1])
    contexts = torch.zeros(len(asked), dynamics.context, *dynamics.spec.shape, dtype=torch.float16)
    hints = {n: torch.zeros(len(asked), *shape, dtype=torch.float16) for n, shape in dynamics.hinted.items() if hinted}
    bar = tqdm(total=int(length.sum()), desc="dream", unit="step", unit_scale=True)
    device = next(dynamics.parameters()).device
    bf16 = pick_precision("auto", device) == "bf16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for rows, nfe in shared_out(length, TOGETHER.get(device.type, 128)):
            sampler = SamplerConfig(nfe=1 if dynamics.deterministic else nfe)
            place = np.full(len(begin), -1)
            place[rows] = np.arange(len(rows))
            own = place[asked[:, 0]]  # the row here of each moment's dream, -1 if it is not here
            context, taken = moments.contexts(begin[rows])
            game = moments.game_of(begin[rows])
            context = context.float().to(device)
            state = dynamics.begin(context, taken[:, : dynamics.context - 1].to(device))
            state = of_game(state, None if game is None else game.to(device))
            for step in range(length[rows].max() + 1):
                action = torch.from_numpy(moments.taken(begin[rows] + np.minimum(step, length[rows]))).to(device)
                here = np.flatnonzero((own >= 0) & (asked[:, 1] == step))
                if len(here):
                    at = torch.from_numpy(own[here]).to(device)
                    there, kept = torch.from_numpy(here), state.rows(at)
                    contexts[there] = kept.latents.half().cpu()
                    for name, hint in dynamics.hints(kept, action[at]).items() if hints else ():
                        hints[name][there] = hint.half().cpu()
                if step == length[rows].max():
                    break
                noise = torch.from_numpy(rng.standard_normal(context[:, 0].shape, np.float32)).to(device)
                prediction = sample(dynamics, state, action, noise, sampler)
                state = dynamics.advance(state, action, prediction.latent)
            bar.update(int(length[rows].sum()))
    bar.close()
    return contexts, hints


def dreams_for(minutes: float, steps: int | None) -> dict[str, int]:
    """How many dreams a training is worth that takes so many minutes in all, or steps if given.

    Returns:
        What a recipe calls `{dreams}`, dreamt once, and `{renewed-dreams}`, dreamt anew again and again.
    """
    worth = int(40 * minutes) if steps is None else 16 * steps
    return {name: max(min(most, worth), 2) for name, most in (("dreams", 8192), ("renewed-dreams", 512))}
