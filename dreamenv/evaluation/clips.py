"""Real clips and the dream's open-loop continuation of them: same start, same actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch

from dreamenv.config import check
from dreamenv.contract.actions import NOOP
from dreamenv.contract.noise import draw_step, philox
from dreamenv.data.windows import HELD_OUT_FROM, Windows
from dreamenv.flow import SamplerConfig
from dreamenv.policies.simple import make_policy
from dreamenv.types import Clips, Segment
from dreamenv.world_model import WorldModel

HELD_OUT = (HELD_OUT_FROM, 1000)
"""First level and number of the held-out levels; no model or agent ever trains on them."""


def parse_levels(text: str) -> tuple[int, int]:
    """Parse "FIRST:END" into the first level and the number of levels.

    Raises:
        ConfigError: not two integers, or an empty or negative range.
    """
    first, colon, end = text.partition(":")
    check(
        bool(colon) and first.isdecimal() and end.isdecimal() and int(first) < int(end),
        f"levels {text!r}: expected FIRST:END with FIRST < END, such as 10000:11000",
    )
    return int(first), int(end) - int(first)


def play_real(
    game: str,
    steps: int,
    num_envs: int = 32,
    policy: str = "mix",
    levels: tuple[int, int] = HELD_OUT,
    distribution_mode: str = "easy",
    seed: int = 0,
) -> Segment:
    """Play the real game for `steps` steps in each of `num_envs` environments (needs procgen).

    Raises:
        ConfigError: `steps` < 1, `seed` < 0, or what the environment refuses.
    """
    check(steps >= 1, f"steps {steps}: must be >= 1")
    check(0 <= seed < 2**63, f"seed {seed}: must be in 0..2^63-1")
    envs: Any = gym.make_vec(
        "envs:RealProcgen-v0",
        num_envs=num_envs,
        game=game,
        start_level=levels[0],
        num_levels=levels[1],
        distribution_mode=distribution_mode,
    )
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
    check(
        len(windows) >= count,
        f"clips {count}: only {len(windows)} windows of {context + horizon} steps were played; "
        "ask for fewer clips or a shorter horizon",
    )
    chosen = np.sort(np.random.default_rng(seed).choice(len(windows), count, replace=False))
    start = windows.start[chosen]
    indices = start[:, None] + np.arange(context + horizon)
    frames = play.frames.reshape(n * t, 64, 64, 3)[indices]
    return Clips(frames, play.actions.reshape(-1)[indices[:, :-1]], play.level_seeds.reshape(-1)[start], context)


class Remembering(WorldModel):
    """A world model that encodes no picture twice: measures begin dreams at the same few contexts again and again.

    For one program that encodes the same pictures in the same order only, for which pictures come first decides in what
    company they are encoded, and so their last bits. It keeps all of them, 40 KiB each.
    """

    def __init__(self, model: WorldModel) -> None:
        self.__dict__.update(model.__dict__)
        self._known: dict[bytes, torch.Tensor] = {}

    def encode(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """See `WorldModel.encode`."""
        each = [frame.tobytes() for frame in np.asarray(frames)]
        new = {key: i for i, key in enumerate(each) if key not in self._known}
        if new:
            self._known.update(zip(new, super().encode(frames[list(new.values())]), strict=True))
        return torch.stack([self._known[key] for key in each])


def imagine(
    model: WorldModel,
    frames: np.ndarray,
    history: np.ndarray,
    actions: np.ndarray,
    sampler: SamplerConfig,
    seed: int = 0,
    batch: int = 64,
    keys: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Dream on from real contexts under given actions.

    Args:
        model: the world model.
        frames: uint8 (N, T, 64, 64, 3), real context.
        history: integers (N, T - 1), the actions between them.
        actions: integers (N, H), the actions to dream under.
        sampler: how it is drawn.
        seed: decides the noise, together with each row's key.
        batch: rows dreamt at once; it decides nothing.
        keys: integers (N,), rows of one key share their noise; by default each row has its own.

    Returns:
        uint8 frames (N, H, 64, 64, 3), and the uncertainty float32 (N, H).
    """
    n, horizon = actions.shape
    keys = np.arange(n) if keys is None else keys
    dream = np.empty((n, horizon, 64, 64, 3), np.uint8)
    uncertainty = np.empty((n, horizon), np.float32)
    for at in range(0, n, batch):
        rows = slice(at, min(at + batch, n))
        state = model.start(frames[rows], history[rows])
        for h in range(horizon):
            imagined = model.step(state, actions[rows, h], step_noise(model, sampler, seed, keys[rows], h), sampler)
            state = imagined.state
            dream[rows, h] = model.render(state).numpy()
            uncertainty[rows, h] = imagined.uncertainty.float().cpu().numpy()
    return dream, uncertainty


def open_loop(model: WorldModel, clips: Clips, sampler: SamplerConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`imagine` each clip's future from its context, under its own actions."""
    k = clips.context
    return imagine(model, clips.frames[:, :k], clips.actions[:, : k - 1], clips.actions[:, k - 1 :], sampler, seed)


def step_noise(model: WorldModel, sampler: SamplerConfig, seed: int, keys: np.ndarray, step: int) -> np.ndarray | None:
    """Standard normal float32 (B, C, h, w) of the keys (B,) at one step; None if the sampler needs none."""
    if not sampler.stochastic:
        return None
    each = [draw_step(seed + int(i), 0, 0, step, model.latent_shape)[1] for i in keys]
    return np.stack(cast(list[np.ndarray], each))


@dataclass(frozen=True)
class OutcomeScores:
    """What the outcome head said at M real moments, and what happened.

    Attributes:
        probabilities: float64 (M, outcomes).
        rewards: (M,) real rewards; terminated: bool (M,) real ends.
        weights: float64 (M,), how many real steps each stands for.
    """

    probabilities: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    weights: np.ndarray


def outcome_scores(
    model: WorldModel,
    play: Segment,
    sampler: SamplerConfig,
    drift: int = 0,
    negatives: int = 20000,
    seed: int = 0,
    batch: int = 64,
) -> OutcomeScores:
    """Score the outcome head at every rewarded or terminal step, and at a sample of the others.

    Args:
        model: the world model.
        play: real games.
        sampler: how the dream is drawn.
        drift: steps that the dream went on alone, under the real actions, before the head is asked; 0 asks it on the
            real context.
        negatives: how many uneventful steps.
        seed: decides which, and the noise.
        batch: rows at once.

    Raises:
        ConfigError: no episode is as long as `drift`.
    """
    n, t = play.first.shape
    first = play.first.copy()
    first[:, 0] = True
    start = np.maximum.accumulate(np.where(first, np.arange(t), 0), axis=1)
    possible = np.arange(t) - start >= drift
    check(bool(possible.any()), f"drift {drift}: no episode was that long; ask for less, or play more steps")
    event = ((play.rewards != 0) | play.terminated) & possible
    common = np.argwhere(~event & possible)
    kept = np.random.default_rng(seed).permutation(len(common))[:negatives]
    chosen = np.concatenate([np.argwhere(event), common[kept]])
    weights = np.ones(len(chosen))
    weights[int(event.sum()) :] = len(common) / max(len(kept), 1)
    probabilities = np.empty((len(chosen), len(model.rewards)))
    for at in range(0, len(chosen), batch):
        rows = slice(at, min(at + batch, len(chosen)))
        env, now = chosen[rows].T
        raw = now[:, None] - drift + np.arange(-model.context + 1, 1)
        index = np.maximum(raw, start[env, now][:, None])
        history = np.where(raw == index, play.actions[env[:, None], index], NOOP)[:, :-1]
        state = model.start(play.frames[env[:, None], index], history)
        for d in range(drift):
            noise = step_noise(model, sampler, seed, np.arange(rows.start, rows.stop), d)
            state = model.step(state, play.actions[env, now - drift + d], noise, sampler).state
        probabilities[rows] = model.outcomes(state, play.actions[env, now]).exp().double().cpu().numpy()
    env, now = chosen.T
    return OutcomeScores(probabilities, play.rewards[env, now], play.terminated[env, now], weights)
