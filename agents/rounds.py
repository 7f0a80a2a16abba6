"""The loop: collect with agents, train the world model on, train agents in it, and collect with those.

`python -m agents.rounds --rounds 2 --out runs/loop --data data/coinrun`. Every stage is a program of its own that could
be run by hand; a killed loop goes on where it was with the same line. Controllability is measured before the first
round and after each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from agents.critic import check_minutes, critic_command
from agents.train import CONFIGS, load_resumable
from agents.worlds import check_lengths
from dreamenv.bundle import bundle_mode, resolve_bundle
from dreamenv.config import check, to_dict
from dreamenv.console import errors_in_one_line
from dreamenv.errors import ConfigError
from dreamenv.stages import begun, program, run_command, stage

SHOWN = ("delta_psnr_4", "random_delta_psnr_4", "branch_accuracy", "psnr_1", "psnr_10")
"""What is measured before the first round and after each."""


@dataclass(frozen=True)
class LoopConfig:
    """One loop; each round begins with the bundle and the agent of the one before."""

    rounds: int = 2
    """How many."""
    out: Path = Path("runs/loop")
    """Run folder; the last bundle is <out>/round-<rounds>/model/bundle."""
    data: Path | None = None
    """Dataset that every round's training also uses."""
    bundle: Path | None = None
    """Bundle to begin with; the embedded one by default."""
    agent: Path | None = None
    """Agent to begin with; by default the first round collects without."""
    game: str = "coinrun"
    """Which game."""
    collect_steps: int = 200_000
    """Real steps collected in each round."""
    expert: float = 0.4
    """Share of episodes that the agent plays as it is."""
    explorer: float = 0.4
    """Share that it plays with every fifth action random; the rest is the game's mix of simple policies."""
    contingent: bool | None = None
    """Also record which pixels depend on the action, see `envs.collect`: for bundles of a recipe that wants it, such as
    `canvas`. What `data` holds must say so too."""
    collect_limit: int | None = None
    """Steps after which an episode that is collected is cut off; the game's own limit by default."""
    minutes: float = 30.0
    """Training of the world model, each round; 0 leaves it as it is."""
    model_steps: int | None = None
    """Optimiser steps of each of its trainings, instead of minutes."""
    critic_minutes: float = 0.0
    """Training of a critic on each round's play, by whose values dreams end, see `agents.critic`; 0 goes without. With
    it dreams of 16 steps are long enough."""
    agent_steps: int = 500_000
    """Dreamt steps the agent learns from, each round; from the second on it is the agent of the round before that goes
    on."""
    agent_config: Path = CONFIGS / "ppo_hasty.yaml"
    """Its algorithm."""
    horizon: int = 64
    """Length of the dreams it learns in."""
    nfe: int = 1
    """Network function evaluations of those dreams' steps; see `agents.train`."""
    eval_every: int = 0
    """Dreamt steps between looks at its real return on training levels; see `agents.train`."""
    episodes: int = 200
    """Real episodes on held-out levels that evaluate it."""
    clips: int = 128
    """Held-out clips that evaluate the bundle."""
    seed: int = 0
    """Decides everything but the wall clock."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        for name in ("rounds", "collect_steps", "agent_steps", "horizon", "nfe", "episodes", "clips"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be >= 1")
        check_lengths(self.game, horizon=self.horizon, collect_limit=self.collect_limit)
        load_resumable(self.agent_config)
        check_minutes(self.critic_minutes)
        check(self.minutes >= 0, f"minutes {self.minutes}: must be >= 0")
        check(self.eval_every >= 0, f"eval_every {self.eval_every}: must be >= 0")
        check(
            self.expert >= 0 and self.explorer >= 0 and self.expert + self.explorer <= 1,
            f"expert {self.expert}, explorer {self.explorer}: must be >= 0 and add up to at most 1",
        )


def collection_policy(agent: Path | None, expert: float, explorer: float) -> str:
    """The policy mix of one round, see `dreamenv.policies.simple.make_policy`."""
    if agent is None:
        return "mix"
    parts = {f"agent:{agent}": expert, f"agent:{agent}:0.2": explorer}
    rest = 1 - expert - explorer
    parts |= {
        "random": 0.2 * rest,
        "sticky": 0.2 * rest,
        "biased": 0.575 * rest,
        "hold:noop": 0.025 * rest,
    }  # few, but long
    return ",".join(f"{name}={weight:.6g}" for name, weight in parts.items() if weight > 1e-9)


def _last(command: list[str]) -> dict[str, Any]:
    line = run_command(command)
    try:
        return dict(json.loads(line))
    except ValueError:
        raise ConfigError(f"{' '.join(command)}: its last line is no JSON, {line[:200]!r}") from None


def loop(config: LoopConfig) -> list[dict[str, Any]]:
    """Run every round; returns what was measured before the first and after each.

    Raises:
        ConfigError: a bad setting, another loop's run folder, or a stage that failed.
    """
    out = config.out
    with begun(out, {k: str(v) for k, v in to_dict(config).items() if k not in ("out", "rounds")}):
        return _rounds(config, out)


def _rounds(config: LoopConfig, out: Path) -> list[dict[str, Any]]:
    bundle, agent = resolve_bundle(config.bundle, config.game), config.agent
    rows = [{"round": 0, **stage(out, "measure-0", partial(_measure, config, bundle, out / "compare-0"))}]
    sources = [] if config.data is None else [config.data]
    for r in range(1, config.rounds + 1):
        row, bundle, agent = _round(config, r, sources, bundle, agent)
        rows.append(row)
    return rows


def _round(
    config: LoopConfig, r: int, sources: list[Path], bundle: Path, agent: Path | None
) -> tuple[dict[str, Any], Path, Path]:
    """One round: what was measured, the new bundle and the new agent; `sources` grows by what was collected."""
    out, here = config.out, config.out / f"round-{r}"
    collected, merged, trained = here / "data", here / "merged", here / "agent"
    policy, steps = collection_policy(agent, config.expert, config.explorer), config.collect_steps
    options: dict[str, Any] = {"game": config.game, "steps": steps, "policy": policy, "seed": config.seed + r}
    options |= {"distribution_mode": bundle_mode(bundle, config.game), "limit": config.collect_limit}
    options |= {"contingent": config.contingent}
    stage(out, f"collect-{r}", partial(run_command, program("envs.collect", out=collected, **options)))
    sources.append(collected)
    merging = program("dreamenv.data.merge", *sources, out=merged)
    stage(out, f"merge-{r}", partial(run_command, merging))
    row: dict[str, Any] = {"round": r}
    if config.minutes or config.model_steps:
        bundle = _model(config, r, merged, bundle)
        row |= stage(out, f"measure-{r}", partial(_measure, config, bundle, here / "compare"))
    critic = _critic(config, r, collected) if config.critic_minutes else None
    learning = program(
        "agents.train",
        world="dream",
        game=config.game,
        bundle=bundle,
        steps=config.agent_steps,
        starts=merged,
        critic=critic,
        config=config.agent_config,
        horizon=config.horizon,
        out=trained,
        seed=config.seed,
        agent=agent if r > 1 else None,
        nfe=config.nfe,
        eval_every=config.eval_every,
        eval_episodes=None if config.eval_every else 0,  # it is judged below, once it has learnt
        resume=True,
    )
    stage(out, f"agent-{r}", partial(run_command, learning))
    agent = trained / "agent"
    return row | stage(out, f"judge-{r}", partial(_evaluate, config, bundle, agent)), bundle, agent


def _model(config: LoopConfig, r: int, data: Path, bundle: Path) -> Path:
    """The bundle, trained on with all that was collected so far."""
    out = config.out / f"round-{r}" / "model"
    options: dict[str, Any] = {"minutes": config.minutes or None, "steps": config.model_steps, "seed": config.seed}
    options |= {"bundle": bundle, "game": config.game, "latents": config.out / "latents"}
    stage(config.out, f"model-{r}", partial(run_command, program("trainers.finetune", data=data, out=out, **options)))
    return out / "bundle"


def _critic(config: LoopConfig, r: int, data: Path) -> Path:
    """What the play of this round was worth: the newest agent's, so that the next one improves on it."""
    out = config.out / f"round-{r}" / "critic"
    command = critic_command(data, out, config.critic_minutes, config.agent_config, config.seed)
    stage(config.out, f"critic-{r}", partial(run_command, command))
    return out / "agent"


def _measure(config: LoopConfig, bundle: Path, folder: Path) -> dict[str, Any]:
    """A short comparison of a bundle with the real game, in a process of its own."""
    clips = config.clips
    options = {
        "bundle": bundle,
        "game": config.game,
        "out": folder,
        "seed": config.seed,
        "clips": clips,
        "random_clips": clips,
    }
    options |= {"branches": clips, "horizon": 10, "steps": max(400 * clips, 6400), "samples": 1, "negatives": 1000}
    options |= {"drift": 0, "endless_steps": 0}
    figures = _last(program("dreamenv", "compare", **options, policies=[]))
    return {name: figures.get(name) for name in SHOWN}


def _evaluate(config: LoopConfig, bundle: Path, agent: Path) -> dict[str, Any]:
    """What an agent earns in the real game, as difficult as in the bundle, in a process of its own."""
    options = {
        "game": config.game,
        "distribution_mode": bundle_mode(bundle, config.game),
        "episodes": config.episodes,
        "seed": config.seed,
    }
    figures = _last(program("agents.evaluate", agent=agent, **options))
    return {"real_return": figures["mean_return"], "real_return_ci": figures["ci"]}


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `LoopConfig` is an option; the last line printed is JSON."""
    with errors_in_one_line():
        rows = loop(tyro.cli(LoopConfig, args=arguments, description=__doc__))
    for row in rows:
        print("   ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
