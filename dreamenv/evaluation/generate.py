"""Clips of a bundle's dreams as films or as a dataset, and a grid of pictures that is the same for every bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dreamenv.bundle import Bundle
from dreamenv.config import check, to_dict
from dreamenv.contract.frames import NATIVE
from dreamenv.contract.games import get_game
from dreamenv.contract.noise import philox
from dreamenv.data import DatasetWriter
from dreamenv.evaluation.figures import save_grid
from dreamenv.evaluation.imagine import imagine
from dreamenv.flow import SamplerConfig
from dreamenv.policies.simple import make_policy
from dreamenv.vector import DreamVectorEnv
from dreamenv.video import save_video

_TOGETHER = 64  # clips dreamt at once
_GRID = (8, 12, 4)  # starts, pictures of each, steps between two pictures
_FUTURES = (4, 24)  # dreams of one start, steps
_TRIED = 60  # starts


@dataclass(frozen=True)
class Generated:
    """N dreamt clips, flat in time: clip after clip.

    Attributes:
        frames: uint8 (S, h, w, c); actions: int64 (S,), taken at them; rewards: float32 (S,), what they earned.
        terminated, truncated: bool (S,), whether they ended the episode; first: bool (S,), where a clip begins.
        level_seeds: int64 (S,), of the start contexts.
    """

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    first: np.ndarray
    level_seeds: np.ndarray


def generate(
    bundle: Bundle, clips: int, steps: int, policy: str = "mix", sampler: SamplerConfig | None = None, seed: int = 0
) -> Generated:
    """Dream clips from the bundle's start contexts; each ends with its episode, or after `steps` frames.

    Args:
        bundle: whose dreams.
        clips: how many.
        steps: most frames of each.
        policy: who acts, see `dreamenv.policies.simple.make_policy`.
        sampler: how the dream is drawn.
        seed: decides starts, actions and noise.

    Raises:
        ConfigError: a value outside its range.
        PolicyError: an unknown policy.
    """
    check(clips >= 1, f"clips {clips}: must be >= 1")
    check(0 <= seed < 2**63, f"seed {seed}: must be in 0..2^63-1")
    check(1 <= steps <= bundle.game.max_steps, f"steps {steps}: must be in 1..{bundle.game.max_steps}")
    bias = np.asarray(get_game(bundle.game.name).bias)
    parts: list[tuple[np.ndarray, ...]] = []
    for at in range(0, clips, _TOGETHER):
        n, rng = min(_TOGETHER, clips - at), philox((seed, at))
        actor = make_policy(policy, bias)
        envs = DreamVectorEnv(n, bundle=bundle, sampler=sampler, autoreset_mode="NextStep")
        frames, info = envs.reset(seed=seed + at)
        levels = bundle.starts.level_seeds[info["start"]].astype(np.int64)
        first, running, rows = np.ones(n, bool), np.ones(n, bool), []
        for _ in range(steps):
            actions = actor.act(frames, first, rng)
            following, rewards, terminated, truncated, _ = envs.step(actions)
            rows.append((running, frames, actions, rewards.astype(np.float32), terminated, truncated))
            running, first, frames = running & ~(terminated | truncated), np.zeros(n, bool), following
            if not running.any():
                break
        envs.close()
        kept, *columns = (np.stack(column, 1) for column in zip(*rows, strict=True))
        begins = np.zeros_like(kept)
        begins[:, 0] = True
        columns += [begins, np.broadcast_to(levels[:, None], kept.shape)]
        parts.append(tuple(column[kept] for column in columns))
    return Generated(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def save_films(out: Path, made: Generated, fps: float = 15) -> list[Path]:
    """Write each clip as clip-0000.mp4 and so on."""
    starts = [*np.flatnonzero(made.first), len(made.first)]
    paths = []
    for i, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        paths.append(out / f"clip-{i:04d}.mp4")
        save_video(paths[-1], made.frames[begin:end], fps)
    return paths


def save_dataset(out: Path, made: Generated, bundle: Bundle, policy: str, sampler: SamplerConfig, seed: int) -> Path:
    """Write the clips as a dataset folder; its facts say that it is of a dream.

    Raises:
        ConfigError: the bundle's frames are not Procgen's own, 64 x 64 RGB.
    """
    shape = made.frames.shape[1:]
    check(shape == NATIVE, f"frames {shape}: a dataset holds {NATIVE} frames; write films")
    lowest, highest = int(made.level_seeds.min()), int(made.level_seeds.max())
    facts = {
        "world": "dream",
        "game": bundle.game.name,
        "distribution_mode": bundle.game.distribution_mode,
        "max_steps": bundle.game.max_steps,
        "action_meanings": list(bundle.game.action_meanings),
        "start_level": lowest,
        "num_levels": highest - lowest + 1,
        "policy": policy,
        "policy_mix": [[policy, 1.0]],
        "backend": f"bundle {bundle.identity[:12]}",
        "sampler": to_dict(sampler),
        "seed": seed,
        "num_envs": int(made.first.sum()),
        "num_shards": 1,
    }
    writer = DatasetWriter(out, facts)
    columns = {
        "frames": made.frames,
        "actions": made.actions.astype(np.uint8),
        "rewards": made.rewards,
        "terminated": made.terminated,
        "truncated": made.truncated,
        "first": made.first,
        "level_seeds": made.level_seeds.astype(np.int32),
        "policies": np.zeros(len(made.first), np.uint8),
    }
    if 0 not in writer.done:
        writer.commit(writer.write_shard(0, columns))
    return out


def save_qualitative_grid(path: Path, bundle: Bundle, sampler: SamplerConfig) -> None:
    """Write a PNG of eight dreams, a row each, under actions that are the same for every bundle.

    Each begins at a start context of the bundle's bank, evenly spread over it, and holds each of a few random actions
    for four steps; a picture is shown after each four.
    """
    count, shown, held = _GRID
    bank = bundle.starts
    rows = np.linspace(0, len(bank.frames) - 1, count).round().astype(int)
    actions = np.random.default_rng(0).integers(0, 15, (count, shown - 1)).repeat(held, 1)
    dream, _ = imagine(bundle.world_model, bank.frames[rows], bank.actions[rows].astype(np.int64), actions, sampler)
    pictures = np.concatenate([bank.frames[rows][:, -1:], dream[:, held - 1 :: held]], 1)
    save_grid(path, list(pictures), 1 if pictures.shape[2] > 64 else 2)


def save_futures(path: Path, bundle: Bundle, sampler: SamplerConfig, seed: int = 0) -> int:
    """Write a PNG of several dreams of one start under the same actions, a row each: what the noise alone decides.

    Of up to 60 starts, spread over the bundle's bank, it is the one whose dreams end furthest apart.

    Args:
        path: the PNG.
        bundle: whose dreams.
        sampler: how they are drawn.
        seed: decides actions and noise.

    Returns:
        The index of the start in the bank.

    Raises:
        ConfigError: no noise reaches the dream.
    """
    model, bank, (count, steps) = bundle.world_model, bundle.starts, _FUTURES
    check(
        sampler.stochastic(model.dynamics),
        f"nfe {sampler.nfe}, temperature {sampler.temperature:g}: no noise reaches these dreams; give nfe 2 or more",
    )
    check(0 <= seed < 2**63, f"seed {seed}: must be in 0..2^63-1")
    rng = philox((seed, 0xF07))
    tried = np.linspace(0, len(bank.frames) - 1, min(len(bank.frames), _TRIED)).astype(np.int64)
    actions = rng.integers(0, 15, (len(tried), steps // 4)).repeat(4, 1)
    frames, history = bank.frames[tried], bank.actions[tried].astype(np.int64)
    draws = [imagine(model, frames, history, actions, sampler, seed + (s << 32))[0] for s in range(count)]
    last = np.stack([d[:, -1] for d in draws]).astype(np.float32)
    widest = int(last.std(0).mean((1, 2, 3)).argmax())
    rows = [np.concatenate([frames[widest, -1:], d[widest, 1::2]]) for d in draws]
    save_grid(path, rows, 1 if rows[0].shape[1] > 64 else 2)
    return int(tried[widest])
