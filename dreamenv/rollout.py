"""Real clips and the dream's open-loop continuation of them: same start, same actions."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch

from dreamenv.actions import NOOP
from dreamenv.bundle import Bundle
from dreamenv.config import check
from dreamenv.data.windows import HELD_OUT_FROM, Windows
from dreamenv.flow import SamplerConfig
from dreamenv.noise import draw_step, philox
from dreamenv.policies import make_policy
from dreamenv.types import Clips, Segment

HELD_OUT = (HELD_OUT_FROM, 1000)
"""First level and number of the held-out levels; no model or agent ever trains on them."""


def play_real(game: str, steps: int, num_envs: int = 32, policy: str = "mix", levels: tuple[int, int] = HELD_OUT,
              distribution_mode: str = "easy", seed: int = 0) -> Segment:  # fmt: skip
    """Play the real game for `steps` steps in each of `num_envs` environments (needs procgen).

    Raises:
        ConfigError: `steps` < 1, `seed` < 0, or what the environment refuses.
    """
    check(steps >= 1, f"steps {steps}: must be >= 1")
    check(0 <= seed < 2**63, f"seed {seed}: must be in 0..2^63-1")
    envs: Any = gym.make_vec("envs:RealProcgen-v0", num_envs=num_envs, game=game, start_level=levels[0],
                             num_levels=levels[1], distribution_mode=distribution_mode)  # fmt: skip
    actor = make_policy(policy, np.asarray(envs.unwrapped.game.bias))
    rng = philox((seed, 0xC11B5))
    frames, infos = envs.reset(seed=rng.integers(2**31 - 1, size=num_envs).tolist())
    first = np.ones(num_envs, bool)
    rows: list[tuple[np.ndarray, ...]] = []
    for _ in range(steps):
        actions = actor.act(frames, first, rng)
        following, rewards, terminated, truncated, after = envs.step(actions)
        rows.append((frames, actions, rewards.astype(np.float32), terminated, truncated, first, infos["level_seed"]))
        frames, infos, first = following, after, terminated | truncated
    envs.close()
    return Segment(*(np.stack(column, 1) for column in zip(*rows, strict=True)))


def cut_clips(play: Segment, count: int, context: int, horizon: int, seed: int = 0) -> Clips:
    """Cut `count` random clips out of played games.

    Raises:
        ConfigError: the games hold fewer such windows.
    """
    check(count >= 1, f"clips {count}: must be >= 1")
    check(horizon >= 1, f"horizon {horizon}: must be >= 1")
    n, t = play.first.shape
    first = play.first.copy()
    first[:, 0] = True
    windows = Windows([first.reshape(-1)], context + horizon)
    check(len(windows) >= count, f"clips {count}: only {len(windows)} windows of {context + horizon} steps were played; "
                                 "ask for fewer clips or a shorter horizon")  # fmt: skip
    chosen = np.sort(np.random.default_rng(seed).choice(len(windows), count, replace=False))
    start = windows.start[chosen]
    indices = start[:, None] + np.arange(context + horizon)
    frames = play.frames.reshape(n * t, 64, 64, 3)[indices]
    return Clips(frames, play.actions.reshape(-1)[indices[:, :-1]], play.level_seeds.reshape(-1)[start], context)


def open_loop(bundle: Bundle, clips: Clips, sampler: SamplerConfig, seed: int = 0,
              batch: int = 64) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Dream on from each clip's context under the clip's own actions.

    Returns:
        uint8 frames (N, H, 64, 64, 3), and the uncertainty float32 (N, H).
    """
    model, k = bundle.world_model, clips.context
    frames = np.empty((len(clips.frames), clips.horizon, 64, 64, 3), np.uint8)
    uncertainty = np.empty(frames.shape[:2], np.float32)
    for at in range(0, len(frames), batch):
        rows = slice(at, min(at + batch, len(frames)))
        state = model.start(clips.frames[rows, :k], clips.actions[rows, : k - 1])
        for h in range(clips.horizon):
            noise = None
            if sampler.stochastic:
                each = [draw_step(seed + i, 0, 0, h, model.latent_shape)[1] for i in range(rows.start, rows.stop)]
                noise = np.stack(cast(list[np.ndarray], each))
            imagined = model.step(state, clips.actions[rows, k - 1 + h], noise, sampler)
            state = imagined.state
            frames[rows, h] = model.decode(state.latents[:, -1]).numpy()
            uncertainty[rows, h] = imagined.uncertainty.float().cpu().numpy()
    return frames, uncertainty


def outcome_scores(bundle: Bundle, play: Segment, negatives: int = 20000, seed: int = 0,
                   batch: int = 256) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Score the outcome head on real contexts: every rewarded or terminal step, and a sample of the others.

    Returns:
        probabilities float64 (M, outcomes), rewards (M,), terminated bool (M,), weights (M,): how many real steps
        each stands for.
    """
    model = bundle.world_model
    n, t = play.first.shape
    event = (play.rewards != 0) | play.terminated
    start = np.maximum.accumulate(np.where(play.first, np.arange(t), 0), axis=1)
    common = np.argwhere(~event)
    kept = np.random.default_rng(seed).permutation(len(common))[:negatives]
    chosen = np.concatenate([np.argwhere(event), common[kept]])
    weights = np.ones(len(chosen))
    weights[int(event.sum()) :] = len(common) / max(len(kept), 1)
    steps = np.empty((len(chosen), len(model.rewards)))
    for at in range(0, len(chosen), batch):
        env, now = chosen[at : at + batch].T
        raw = now[:, None] + np.arange(-model.context + 1, 1)
        index = np.maximum(raw, start[env, now][:, None])
        frames, actions = play.frames[env[:, None], index], play.actions[env[:, None], index]
        state = model.start(frames, np.where(raw == index, actions, NOOP)[:, :-1])
        with torch.inference_mode():
            taken = torch.cat([state.actions, torch.as_tensor(actions[:, -1:]).to(model.device)], 1)
            steps[at : at + batch] = model.head.log_probabilities(state.latents, taken).exp().double().cpu().numpy()
    env, now = chosen.T
    return steps, play.rewards[env, now], play.terminated[env, now], weights
