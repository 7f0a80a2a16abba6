"""Dreams from real contexts along real actions, dreamt once before training: what a head will be asked about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dreamenv.device import pick_precision
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.interface import Dynamics
from trainers.models import of_game

TOGETHER = {"cpu": 128, "cuda": 1024}
"""Dreams dreamt at once."""


@dataclass(frozen=True)
class Dreams:
    """Dreams from real contexts, along the real actions.

    Attributes:
        latents: float16 (D, K + S, C, H, W): the real context, then what was dreamt.
        begin: int64 (D,), the step at which each begins; length: int64 (D,), how many of its steps are meant.
        eventful: the first so many end at a rare outcome.
    """

    latents: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    eventful: int

    def contexts(self, row: np.ndarray, depth: np.ndarray, context: int) -> Tensor:
        """The contexts float16 (B, K, C, H, W) after `depth` dreamt steps."""
        return torch.from_numpy(self.latents[row[:, None], depth[:, None] + np.arange(context)])


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
    dynamics: Dynamics,
    contexts: Callable[[np.ndarray], tuple[Tensor, Tensor, Tensor | None]],
    actions: Callable[[np.ndarray], np.ndarray],
    begin: np.ndarray,
    ends: np.ndarray,
    longest: int,
    rng: np.random.Generator,
    device: torch.device,
) -> np.ndarray:
    """Dream from the steps `begin` (D,) to the steps `ends` (D,).

    Args:
        dynamics: which.
        contexts: steps (B,) -> their contexts (B, K, C, H, W), actions int64 (B, K), and games int64 (B,) if several.
        actions: steps (B,) -> the actions int64 (B,) taken at them.
        begin: int64 (D,).
        ends: int64 (D,), at most `longest` later.
        longest: S.
        rng: of the noise.
        device: where.

    Returns:
        float16 (D, K + S, C, H, W): the real context, then what was dreamt; zeros beyond a dream's end.
    """
    k, length = dynamics.context, ends - begin
    latents = np.zeros((len(begin), k + longest, *dynamics.spec.shape), np.float16)
    bar = tqdm(total=int(length.sum()), desc="dream", unit="step", unit_scale=True)
    dynamics = dynamics.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    bf16 = pick_precision("auto", device) == "bf16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for rows, nfe in shared_out(length, TOGETHER.get(device.type, 128)):
            sampler = SamplerConfig(nfe=nfe)
            context, taken, game = contexts(begin[rows])
            context = context.float().to(device)
            latents[rows, :k] = context.half().cpu().numpy()
            state = dynamics.begin(context, taken[:, : k - 1].to(device))
            state = of_game(state, None if game is None else game.to(device))
            for step in range(length[rows].max()):
                now = np.minimum(begin[rows] + step, ends[rows])
                noise = torch.from_numpy(rng.standard_normal(context[:, 0].shape, np.float32)).to(device)
                action = torch.from_numpy(actions(now)).to(device)
                prediction = sample(dynamics, state, action, noise, sampler)
                state = dynamics.advance(state, action, prediction.latent)
                latents[rows, k + step] = prediction.latent.half().cpu().numpy()
            bar.update(int(length[rows].sum()))
    bar.close()
    return latents


def dreams_for(most: int, minutes: float, steps: int | None) -> int:
    """How many dreams, up to `most`, a training is worth that takes so many minutes in all, or steps if given."""
    return max(min(most, int(40 * minutes) if steps is None else 64 * steps), 2)
