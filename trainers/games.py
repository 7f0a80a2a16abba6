"""From the real games to a bundle of each, or one of all: `python -m trainers.games --minutes 90`.

For each game a short agent is trained in the real game, which then plays for the data beside random, sticky and biased
players; first frames of many levels become the places where dreams start. Then a model of each game is trained, or one
of all. Run the same line again after a kill: finished stages are skipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from dreamenv.config import check, each_once, to_dict, whole
from dreamenv.console import errors_in_one_line
from dreamenv.contract.games import GAMES, get_game
from dreamenv.data.merge import merge
from dreamenv.models.registry import lookup
from dreamenv.policies.simple import parse_mix
from dreamenv.stages import begun, program, run_command, stage, together
from trainers.pipeline import PipelineConfig, run_pipeline
from trainers.recipe import load_recipe

_AGENT = Path(__file__).parents[1] / "agents" / "configs" / "ppo_hasty.yaml"


@dataclass(frozen=True)
class GamesConfig:
    """What to make, and how much time to spend."""

    games: tuple[str, ...] = tuple(GAMES)
    """Which games."""
    minutes: float = 90.0
    """Training minutes of the models in all; agents, collecting and encoding come on top."""
    shared: bool = False
    """One model of all the games, in place of one a game that gets its share of the minutes; needs a recipe."""
    recipe: str = ""
    """By which the models are trained; each game's own by default."""
    out: Path = Path("runs/games")
    """Run folder; the bundle of one game is <out>/<game>/model/bundle, that of all <out>/all/bundle."""
    steps: int = 49_152
    """Transitions of each game."""
    limit: int = 128
    """Of these, steps after which an episode is left for one of another level; 0 plays each to its end, and where
    episodes are long few levels are seen."""
    event_steps: int = 2_000_000
    """Further transitions of each game, of which only what leads to rewards and ends is kept, for the head; 0 goes
    without."""
    policy: str = "mix"
    """Who plays them beside the agent; see `python -m envs.collect --help`."""
    agent_steps: int = 500_000
    """Steps for which each game's agent is trained in the real game; 0 goes without agents."""
    agent_share: float = 0.4
    """Share of the episodes that the agent plays."""
    agent_config: Path = _AGENT
    """The agent's algorithm."""
    starts: int = 2000
    """Places where dreams start, of each game."""
    bank_kib: int = 400
    """Most KiB that these take of each game; there are fewer where their pictures have more in them."""
    distribution_mode: str = "easy"
    """Procgen's difficulty."""
    jobs: int = 1
    """Games whose agents are trained and data collected at the same time; and models, where there is one a game."""
    stage_steps: int | None = None
    """Steps of every trained stage instead of minutes, for a trial."""
    seed: int = 0
    """Decides everything but the wall clock."""
    set: tuple[str, ...] = ()
    """Overrides for every trained stage, as in `trainers.pipeline`."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        each_once(self.games, "games")
        for name in self.games:
            get_game(name)
        for name in ("steps", "starts", "bank_kib", "jobs"):
            whole(getattr(self, name), name, 1)
        for name in ("limit", "agent_steps", "event_steps"):
            check(getattr(self, name) >= 0, f"{name} {getattr(self, name)}: must be >= 0")
        check(0 < self.agent_share < 1, f"agent_share {self.agent_share}: must be between 0 and 1")
        check(0 <= self.seed < 2**31 - 1, f"seed {self.seed}: must be in 0..2^31-2")
        parse_mix(mixed(self.policy, f"agent:{self.out}:0.1", self.agent_share))
        if self.agent_steps:
            check(self.agent_config.is_file(), f"agent_config {self.agent_config}: there is no such file")
        for game in self.games:
            self.run(game)
        if self.together:
            _check_told(self.recipe)

    @property
    def together(self) -> bool:
        """Whether there is one model of several games."""
        return len(self.games) > 1 and self.shared

    def run(self, game: str, data: Path | None = None, events: Path | None = None) -> PipelineConfig:
        """How a model that knows a game is trained; raises `ConfigError` for bad settings."""
        where = self.out / "all" if self.together else self.out / game / "model"
        names = ("recipe", "starts", "bank_kib", "distribution_mode", "stage_steps", "seed", "set")
        minutes = self.minutes if self.together else self.minutes / len(self.games)
        shared = {name: getattr(self, name) for name in names}
        return PipelineConfig(**shared, game=game, minutes=minutes, out=where, data=data, event_data=events, events=0)

    def events(self, game: str) -> dict[str, Any]:
        """How the recipe of a model that knows a game collects what leads to events; empty where it does not."""
        recipe = load_recipe(self.run(game).recipe)
        return recipe.stages[recipe.events]["collect"] if self.event_steps and recipe.events else {}


def _check_told(name: str) -> None:
    """Raise `ConfigError` unless a recipe's models can learn several games."""
    check(bool(name), "recipe '': a model of several games needs one, such as canvas")
    for stage_name, settings in load_recipe(name).stages.items():
        if "task" not in settings:
            continue
        kind = lookup("task", settings["task"].get("type"), stage_name)[0].kind
        shape = lookup(kind, settings["model"].get("type"), stage_name)[1]
        told = kind == "codec" or "games" in {f.name for f in fields(shape)}
        check(told, f"recipe {name}: its {settings['model']['type']} cannot be told games; leave out --shared")


def run_games(config: GamesConfig) -> list[Path]:
    """Do whatever is not done yet; returns the bundles' folders.

    Raises:
        ConfigError: bad settings, or a stage that failed.
    """
    free = ("out", "jobs")
    with begun(config.out, {k: str(v) for k, v in to_dict(config).items() if k not in free}):
        together(config.jobs, [partial(_collect, config, game) for game in config.games])
        sets = [config.games] if config.together else [(game,) for game in config.games]
        together(config.jobs, [partial(_train, config, games) for games in sets])
    return [Path(config.run(games[0]).out or "", "bundle") for games in sets]


def _collect(config: GamesConfig, game: str) -> None:
    """The agent of a game, and its data."""
    out, agent, policy = config.out / game, config.out / game / "agent", config.policy
    seed, mode = config.seed, config.distribution_mode
    if config.agent_steps:
        options: dict[str, Any] = {"world": "real", "game": game, "steps": config.agent_steps, "seed": seed}
        options |= {
            "distribution_mode": mode,
            "config": config.agent_config,
            "eval-episodes": 0,
            "resume": True,
            "out": agent,
        }
        stage(config.out, f"{game}-agent", lambda: run_command(program("agents.train", **options)))
        policy = mixed(config.policy, f"agent:{agent / 'agent'}:0.1", config.agent_share)
    marks = {"contingent": load_recipe(config.run(game).recipe).contingent}
    shared = {"game": game, "distribution_mode": mode}
    played = shared | {"steps": config.steps, "policy": policy, "seed": seed, "out": out / "data", "workers": 1}
    cut = {"limit": config.limit or None}
    stage(config.out, f"{game}-data", lambda: run_command(program("envs.collect", **played, **marks, **cut)))
    if how := config.events(game):
        rare = played | how | {"steps": config.event_steps, "seed": seed + 2, "out": out / "events", "num-envs": 64}
        stage(config.out, f"{game}-events", lambda: run_command(program("envs.collect", **rare)))
    firsts = {"steps": config.starts, "num-envs": config.starts, "shard-steps": 1, "seed": seed + 1, "workers": 1}
    begin = shared | firsts | marks | {"out": out / "starts"}
    stage(config.out, f"{game}-starts", lambda: run_command(program("envs.collect", **begin)))


def mixed(policy: str, other: str, share: float) -> str:
    """A mix of players in which another has a share, and those of `policy` share the rest as before."""
    pairs = parse_mix(policy)
    total = sum(weight for _, weight in pairs)
    kept = [f"{name}={weight / total * (1 - share):.6g}" for name, weight in pairs]
    return ",".join([*kept, f"{other}={share:.6g}"])


def _train(config: GamesConfig, games: tuple[str, ...]) -> None:
    """The model that knows some games, on the data of all of them."""
    run = config.run(games[0])
    where = Path(run.out or "")
    name = "all" if config.together else games[0]

    def merged(kind: str, parts: tuple[str, ...]) -> Path:
        sources = [config.out / game / part for game in games for part in parts]
        out = where.parent / f"{where.name}-{kind}"
        stage(config.out, f"{name}-merged-{kind}", lambda: str(merge(sources, out, several=config.together)))
        return out

    data = merged("data", ("data", "starts"))
    events = merged("events", ("events",)) if config.events(games[0]) else None
    stage(config.out, f"{name}-model", lambda: str(run_pipeline(config.run(games[0], data, events))))


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `GamesConfig` is an option."""
    with errors_in_one_line():
        config = tyro.cli(GamesConfig, args=arguments, description=__doc__)
        print(json.dumps({"bundles": [str(path) for path in run_games(config)]}))


if __name__ == "__main__":
    main()
