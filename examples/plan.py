"""Play the real game without ever having trained an agent: dream ahead, and do what went best in the dreams.

    python examples/plan.py --game coinrun --levels 10

Every few steps the present moment is fanned out into many futures, each with actions of its own; the actions of the
future with the highest expected return are then taken (random shooting; with `--rounds 2` or more the best futures say
which actions the next ones try: the cross-entropy method, Rubinstein 1999). `--agent bundled` asks a trained agent what
the moments at which futures stop are worth. Needs `pip install dreamenv[procgen]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro

import dreamenv  # noqa: F401 - registers DreamProcgen-v0
from dreamenv.bundle import bundled_agent
from dreamenv.config import check
from dreamenv.policies.agent import load_agent

ACTIONS = 15
Judge = Callable[[np.ndarray], np.ndarray] | None
"""The value float64 (N,) of pictures uint8 (N, h, w, c)."""


@dataclass
class Args:
    """The planner's settings."""

    game: str = "coinrun"
    levels: int = 10
    """Held-out levels to play, an episode each."""
    futures: int = 64
    horizon: int = 16
    """Steps that each future is dreamt."""
    every: int = 4
    """Steps taken before the next plan."""
    rounds: int = 1
    keep: float = 0.85
    """Chance that a future goes on with the action before: keys that change every step lead nowhere."""
    elite: float = 0.1
    """Share of the futures that teach the next round."""
    gamma: float = 0.99
    agent: str = ""
    """Whose value counts beyond the horizon: none, "bundled", or a folder that agents.train has written."""
    limit: int = 500
    """Steps after which an episode is given up."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no plan."""
        for name in ("levels", "futures", "horizon", "every", "rounds", "limit"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be >= 1")
        check(self.every <= self.horizon, f"every {self.every}: must be at most the horizon, {self.horizon}")


def propose(args: Args, chances: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Actions (futures, horizon) drawn from chances (horizon, 15), each kept for a while."""
    drawn = (rng.random((args.futures, args.horizon, 1)) > chances.cumsum(1)).sum(2).clip(max=ACTIONS - 1)
    kept = rng.random(drawn.shape) < args.keep
    for t in range(1, args.horizon):
        drawn[:, t] = np.where(kept[:, t], drawn[:, t - 1], drawn[:, t])
    return drawn


def returns_of(args: Args, dream: Any, moment: bytes, actions: np.ndarray, judge: Judge) -> np.ndarray:
    """Expected discounted return float64 (futures,) of actions (futures, horizon) from a snapshot on."""
    futures = dream.branch(moment, len(actions))
    total, alive = np.zeros(len(actions)), np.ones(len(actions))
    for t in range(args.horizon):
        _, _, terminated, truncated, infos = futures.step(actions[:, t])
        total += args.gamma**t * alive * infos["expected_reward"]
        alive *= (1 - infos["end_probability"]) * ~(terminated | truncated)  # what begins then is another episode
    return total if judge is None else total + args.gamma**args.horizon * alive * judge(np.stack(futures.render()))


def plan(
    args: Args, dream: Any, frames: list, taken: list, rng: np.random.Generator, judge: Judge = None
) -> np.ndarray:
    """The next actions (every,), after real frames and the actions between them."""
    dream.reset(seed=args.seed, options={"frames": np.stack(frames)[None], "actions": np.array([taken], np.int64)})
    moment = dream.snapshot()
    chances = np.full((args.horizon, ACTIONS), 1 / ACTIONS)
    for _ in range(args.rounds):
        actions = propose(args, chances, rng)
        returns = returns_of(args, dream, moment, actions, judge)
        best = actions[np.argsort(-returns)[: max(int(args.elite * args.futures), 1)]]
        chances = (np.eye(ACTIONS)[best].mean(0) + 0.02) / (1 + 0.02 * ACTIONS)
    return best[0, : args.every]


def judge_of(args: Args, bundle: Path) -> Judge:
    """The value of the agent that was asked for."""
    if not args.agent:
        return None
    folder = bundled_agent(bundle, args.game) if args.agent == "bundled" else Path(args.agent)
    check(folder is not None, f"agent bundled: none ships with {args.game}; train one with agents.train")
    return load_agent(str(folder)).values


def main(args: Args) -> dict[str, float]:
    """Play, and return the mean return."""
    real = gym.make("envs:RealProcgen-v0", game=args.game, start_level=10_000, num_levels=1000)
    how: dict[str, Any] = {"observations": "latent", "render_mode": "rgb_array"}  # draws only what it is asked for
    dream: Any = gym.make_vec("DreamProcgen-v0", num_envs=1, game=args.game, sampler={"temperature": 0.0}, **how)
    judge = judge_of(args, dream.bundle.folder)
    context = dream.bundle.world_model.context
    rng, returns = np.random.default_rng(args.seed), []
    for level in range(10_000, 10_000 + args.levels):
        frame, _ = real.reset(seed=args.seed, options={"level": level})
        frames, taken, earned, over, steps = [frame], [], 0.0, False, 0
        while not over and steps < args.limit:
            for action in plan(args, dream, frames, taken, rng, judge):
                frame, reward, terminated, truncated, _ = real.step(int(action))
                frames, taken = [*frames, frame][-context:], [*taken, action][1 - context :]
                earned, steps, over = earned + float(reward), steps + 1, terminated or truncated
                if over or steps == args.limit:
                    break
        returns.append(earned)
        print(f"level {level}: {earned:g} after {steps} steps, mean {np.mean(returns):.2f}", flush=True)
    real.close()
    dream.close()
    return {"mean_return": float(np.mean(returns)), "episodes": len(returns)}


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Args, description=__doc__))))
