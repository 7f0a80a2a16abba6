"""Evaluates an agent, by default in the real game on levels that nobody trained on.

`python -m agents.evaluate --agent runs/agents/dream/agent --world real --levels 10000:11000 --episodes 200`.
`--agent random` is the uniform policy, `--agent bundled` the one shipped with the bundle. The last line is JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from dreamenv.artifacts import present
from dreamenv.bundle import bundle_mode, bundled_agent, load_bundle, resolve_bundle
from dreamenv.config import check
from dreamenv.console import errors_in_one_line
from dreamenv.contract.frames import NATIVE
from dreamenv.contract.games import get_game
from dreamenv.contract.noise import philox
from dreamenv.errors import PolicyError
from dreamenv.evaluation.clips import HELD_OUT, parse_levels, real_envs
from dreamenv.evaluation.closed_loop import Episodes, play_episodes
from dreamenv.evaluation.figures import side_by_side
from dreamenv.evaluation.metrics import interval
from dreamenv.flow import SamplerConfig
from dreamenv.policies.agent import ImpalaAgent
from dreamenv.policies.simple import AgentPolicy, VectorPolicy, make_policy
from dreamenv.vector import DreamVectorEnv
from dreamenv.video import save_video

_BATCH = 100
_LEVELS = (HELD_OUT[0], sum(HELD_OUT))


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        figures: `mean_return`, `ci` (95 % bootstrap), `success_rate`, `mean_length`, `episodes`, and what was asked.
        episodes: every episode; frames: uint8 (T, 64, 64, 3) of the first few.
        levels: int64 (E,), the level of each.
    """

    figures: dict[str, Any]
    episodes: Episodes
    levels: np.ndarray
    frames: list[np.ndarray]


def evaluate(
    agent: str | ImpalaAgent | VectorPolicy,
    world: str = "real",
    game: str = "coinrun",
    levels: tuple[int, int] = _LEVELS,
    episodes: int = 200,
    bundle: Path | None = None,
    nfe: int = SamplerConfig.nfe,
    seed: int = 0,
    films: int = 0,
    distribution_mode: str | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Play one episode on each of `episodes` levels, to its end.

    A dream starts from the real first frame of its level, so worlds can be compared level by level.

    Args:
        agent: "random", "bundled", an agent's folder, any policy specification, a network, or any policy.
        world: "real" or "dream".
        game: which game.
        levels: first level, and the one after the last.
        episodes: how many; levels repeat only if there are fewer of them.
        bundle: bundle folder of the dream; the embedded one by default.
        nfe: network function evaluations of the dream's steps.
        seed: decides levels, actions and noise.
        films: how many episodes to keep the frames of.
        distribution_mode: Procgen's difficulty; that of `bundle` by default, without one "easy".
        limit: steps after which an episode is cut off; the game's own by default.

    Raises:
        ConfigError, PolicyError: a value outside its range, no such agent.
    """
    first, end = levels
    _check(world, episodes, first, end)
    chosen = first + philox((seed, 0xE7A1)).choice(end - first, episodes, replace=episodes > end - first)
    told = (bundle, game, distribution_mode)
    dreamt = load_bundle(resolve_bundle(*told), "cpu", game=game) if world == "dream" else None
    mode = distribution_mode or ("easy" if bundle is None else bundle_mode(resolve_bundle(bundle, game), game))
    played, films_kept = [], []
    longest = get_game(game).max_steps
    check(limit is None or 1 <= limit <= longest, f"limit {limit}: must be in 1..{longest}")
    for at in range(0, episodes, _BATCH):
        batch, policy = chosen[at : at + _BATCH], policy_of(agent, *told)
        frame = getattr(policy, "frame", NATIVE) if dreamt is None else dreamt.world_model.frame_shape
        envs = real_envs(game, len(batch), (first, end - first), mode, frame)
        frames, _ = envs.reset(seed=seed + at, options={"level": batch})
        if dreamt is not None:
            envs.close()
            envs = DreamVectorEnv(len(batch), bundle=dreamt, sampler={"nfe": nfe}, autoreset_mode="SameStep")
            frames, _ = envs.reset(seed=seed + at, options={"frames": frames[:, None]})
        rng, filmed = philox((seed, at)), films if at == 0 else 0
        episode, film = play_episodes(envs, frames, policy, limit or longest, rng, filmed)
        envs.close()
        played.append(episode)
        films_kept += film
    every = Episodes(*(np.concatenate([getattr(p, n) for p in played]) for n in ("returns", "lengths", "ended")))
    name = agent if isinstance(agent, str) else "network"
    figures = {"world": world, "game": game, "levels": [first, end], "seed": seed, "agent": name}
    return Evaluation(_figures(every, seed) | figures, every, chosen, films_kept)


def _check(world: str, episodes: int, first: int, end: int) -> None:
    check(world in ("real", "dream"), f"world {world!r}: must be 'real' or 'dream'")
    check(episodes >= 1, f"episodes {episodes}: must be >= 1")
    check(0 <= first < end, f"levels {first}:{end}: the first must be >= 0 and less than the end")


def _figures(every: Episodes, seed: int) -> dict[str, Any]:
    """Mean return with its 95 % bootstrap interval, success rate and length."""
    episodes = len(every.returns)
    draws = np.random.default_rng(seed).integers(episodes, size=(10000, episodes))
    return {
        "mean_return": float(every.returns.mean()),
        "ci": list(interval(every.returns[draws].mean(1))),
        "success_rate": float((every.returns > 0).mean()),
        "mean_length": float(every.lengths.mean()),
        "episodes": episodes,
    }


def policy_of(
    agent: str | ImpalaAgent | VectorPolicy, bundle: Path | None, game: str, distribution_mode: str | None = None
) -> VectorPolicy:
    """Who plays; see `evaluate` for what may be asked for.

    Raises:
        PolicyError: no such agent.
    """
    if isinstance(agent, ImpalaAgent) and agent.config.latent is not None:  # its facts may not say from whose latents
        return AgentPolicy(agent, bundle=load_bundle(resolve_bundle(bundle, game, distribution_mode), game=game))
    loaded = None if bundle is None else load_bundle(bundle, game=game)  # it may have learnt from the latents of that
    if isinstance(agent, ImpalaAgent):
        return AgentPolicy(agent, bundle=loaded)
    if not isinstance(agent, str):
        return agent
    if agent == "bundled":
        folder = resolve_bundle(bundle, game, distribution_mode)
        if (found := bundled_agent(folder, game)) is None:
            raise PolicyError(f"agent 'bundled': {folder} ships none; train one with python -m agents.train")
        return AgentPolicy(str(found))
    if present(Path(agent) / "agent.json"):
        return AgentPolicy(agent, bundle=loaded)
    return make_policy(agent, np.asarray(get_game(game).bias))


@dataclass(frozen=True)
class _Arguments:
    """Evaluate an agent; the last line printed is JSON."""

    agent: str
    """random, bundled, an agent's folder, a policy specification, or (with --trust) an SB3 zip."""
    trust: bool = False
    """Run the code that a foreign SB3 zip holds."""
    algorithm: str = "PPO"
    """What saved the zip."""
    world: Literal["real", "dream"] = "real"
    """Where it plays."""
    game: str = "coinrun"
    """Which game."""
    levels: str = f"{_LEVELS[0]}:{_LEVELS[1]}"
    """First level, and the one after the last."""
    episodes: int = 200
    """How many, one on each level."""
    bundle: Path | None = None
    """Bundle folder of the dream, and of the bundled agent."""
    distribution_mode: str | None = None
    """Procgen's difficulty; that of the bundle by default, without one easy."""
    nfe: int = SamplerConfig.nfe
    """Network function evaluations of the dream's steps."""
    limit: int | None = None
    """Steps after which an episode is cut off; the game's own limit by default."""
    video: Path | None = None
    """Write the first four episodes side by side to this .mp4 or .gif."""
    seed: int = 0
    """Decides levels, actions and noise."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    with errors_in_one_line():
        args = tyro.cli(_Arguments, args=arguments, description=__doc__)
        first, count = parse_levels(args.levels)
        foreign = None
        if args.agent.endswith(".zip"):
            from agents.saved import ForeignPolicy  # needs SB3, whose import is slow and loud

            foreign = ForeignPolicy(Path(args.agent), args.algorithm, args.trust)
        result = evaluate(
            foreign or args.agent,
            args.world,
            args.game,
            (first, first + count),
            args.episodes,
            args.bundle,
            args.nfe,
            args.seed,
            films=4 if args.video else 0,
            distribution_mode=args.distribution_mode,
            limit=args.limit,
        )
        if args.video:
            longest = max(len(f) for f in result.frames)
            films = {
                f"level {level}": np.concatenate([f, np.repeat(f[-1:], longest - len(f), 0)])
                for f, level in zip(result.frames, result.levels, strict=False)
            }
            save_video(args.video, side_by_side(films))
        print(json.dumps(result.figures | {"agent": args.agent}))


if __name__ == "__main__":
    main()
