"""Dreams without a reset: does the picture hold?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dreamenv.bundle import Bundle
from dreamenv.config import check
from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.contract.noise import philox
from dreamenv.evaluation.imagine import step_noise
from dreamenv.evaluation.metrics import detail
from dreamenv.flow import SamplerConfig
from dreamenv.policies.simple import make_policy
from dreamenv.types import Clips, State


def endless(
    bundle: Bundle,
    clips: Clips,
    steps: int = 5000,
    num_envs: int = 1,
    policy: str = "random",
    sampler: SamplerConfig | None = None,
    shown: tuple[int, ...] = (1, 100, 1000, 5000),
    seed: int = 0,
) -> dict[str, Any]:
    """Dream on from real contexts without any reset, ends of episodes ignored, and watch whether the picture holds.

    Args:
        bundle: whose dreams.
        clips: real clips; their contexts are where the dreams start, their frames the reference.
        steps: how long.
        num_envs: how many dreams.
        policy: who plays, see `dreamenv.policies.simple.make_policy`.
        sampler: how the dream is drawn.
        shown: steps whose frames are kept.
        seed: decides actions and noise.

    Raises:
        ConfigError, PolicyError: `steps` < 1, an unknown policy.

    Returns:
        `diverged`: share of dreams whose latent left the trained range at least once (they start again);
        `step` (T,), and at those steps the means `latent_rms`, `detail` (see `dreamenv.evaluation.metrics.detail`) and
        `brightness` in 0..1; the same of the clips' real frames as `real_latent_rms` ...; and `frames` uint8
        (num_envs, S, 64, 64, 3) after the steps `shown` (S,) that were reached.
    """
    check(steps >= 1, f"steps {steps}: must be >= 1")
    sampler = sampler or SamplerConfig()
    model, k = bundle.world_model, clips.context
    begin = np.resize(np.arange(len(clips.frames)), num_envs)
    state = start = model.start(clips.frames[begin, :k], clips.actions[begin, : k - 1])
    actor, rng = make_policy(policy, np.ones(NUM_ACTIONS)), philox((seed, 0xE0D1E55))
    real = _statistics(model.encode(clips.frames[:256, -1]), clips.frames[:256, -1])
    lost, frames = np.zeros(num_envs, bool), clips.frames[begin, k - 1]
    rows, kept = [], []
    for t in range(1, steps + 1):
        noise = step_noise(model, sampler, seed, np.arange(num_envs), t)
        actions = actor.act(frames, np.full(num_envs, t == 1), rng)
        state = model.step(state, actions, noise, sampler).state
        gone = bundle.limits.exceeded(state.latents[:, -1])
        if gone.any():
            lost |= gone.cpu().numpy()
            state = State.where(gone, start, state)
        watched = t in shown or t == steps or t % max(steps // 100, 1) == 0
        if watched or actor.looks:
            frames = model.render(state).numpy()
        if watched:
            rows.append((t, *_statistics(state.latents[:, -1], frames)))
        if t in shown:
            kept.append(frames)
    names = ("latent_rms", "detail", "brightness")
    film = np.stack(kept, 1) if kept else np.zeros((num_envs, 0, *model.frame_shape), np.uint8)
    found = {"diverged": float(lost.mean()), "frames": film, "shown": [t for t in shown if t <= steps]}
    found |= dict(zip(("step", *names), np.array(rows).T, strict=True))
    return found | {f"real_{n}": v for n, v in zip(names, real, strict=True)}


def _statistics(latents: torch.Tensor, frames: np.ndarray) -> tuple[float, float, float]:
    """Root mean square of latents, detail and brightness of frames."""
    return float(latents.square().mean().sqrt()), float(detail(frames).mean()), float(frames.mean() / 255)
