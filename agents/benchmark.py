"""Agents that learn in the dream against agents that learn in the game: `python -m agents.benchmark --games coinrun`.

For each game and seed PPO is trained once in the real game and once only in the dream, with the same settings and for
as many steps of an environment. They, a random player and the best player that always holds the same keys are then
judged in the real game, on held-out levels. Run the same line again after a kill: what is done is skipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from agents.critic import check_minutes, critic_command
from agents.evaluate import evaluate
from agents.train import CONFIGS, TrainConfig, load_algorithm, load_resumable
from agents.worlds import TRAIN_LEVELS, check_lengths
from dreamenv.artifacts import atomic_file
from dreamenv.bundle import bundle_mode, load_bundle, resolve_bundle
from dreamenv.config import each_once, to_dict, whole
from dreamenv.console import errors_in_one_line
from dreamenv.contract.actions import NAMES
from dreamenv.contract.games import GAMES, Game, get_game
from dreamenv.device import pick_device
from dreamenv.evaluation.clips import HELD_OUT
from dreamenv.evaluation.controllability import distinct_actions
from dreamenv.evaluation.metrics import interval
from dreamenv.evaluation.pages import markdown, rooms, write_tables
from dreamenv.policies.simple import make_policy
from dreamenv.stages import begun, program, run_command, stage, together

TABLE = "agents-games"
"""The markers between which a Markdown file takes the table."""
_WORLDS = ("real", "dream")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Who is trained and how they are judged."""

    games: tuple[str, ...] = ("coinrun",)
    """Which games; `--games all` is all sixteen."""
    steps: int = 1_000_000
    """Environment steps of each training, imagined or real."""
    seeds: tuple[int, ...] = (0,)
    """One agent of each world for each seed."""
    config: Path = CONFIGS / "ppo_hasty.yaml"
    """The algorithm, of both worlds."""
    horizon: int | None = None
    """Cut dreams off after so many steps; None leaves the game's own limit."""
    choose: int = 0
    """Imagined steps between evaluations in dreams that begin elsewhere; the agent that did best in one is taken from
    the dream then. 0 takes the last. The game is never asked."""
    choose_nfe: int | None = None
    """Network function evaluations of the dreams in which it is chosen; `nfe` by default."""
    choose_limit: int | None = None
    """Steps after which they are cut off; the game's own limit by default."""
    nfe: int = 1
    """Network function evaluations of the dreams' steps."""
    penalty: float = 0.0
    """Take so much of the dream's uncertainty from each reward, see `agents.train`."""
    critic_minutes: float = 0.0
    """Minutes of training for each game's critic, which says what a dream that is cut off was still worth, see
    `agents.critic`; 0 for none. Dreams then start in the play that it learnt from, not in the bundle's bank."""
    critic_steps: int = 393_216
    """Steps of that play, in training levels of the real game. The run folder keeps it: 12 KB a step."""
    critic_policy: str = "biased=0.8,sticky=0.1,random=0.1"
    """Who plays it, see `envs.collect`; none of them learns."""
    learnable: bool = False
    """Train in dreams only of games in which PPO in the game surely beats a random player: where it does not, so many
    steps teach nothing that a dream could be compared with."""
    bundle: Path | None = None
    """Bundle folder of the dreams; the embedded one by default. Its difficulty is that of the game."""
    episodes: int = 500
    """Held-out levels that each player is judged on, an episode each."""
    tried: int = 64
    """Training levels on which the actions are tried, of which the best is held."""
    limit: int | None = None
    """Steps after which an episode that is judged is cut off; the game's own limit by default."""
    out: Path = Path("runs/benchmark")
    """Run folder: the agents, benchmark.json, benchmark.md."""
    docs: Path | None = None
    """A Markdown file whose table between the markers `agents-games` is replaced."""
    jobs: int = 1
    """Agents trained at the same time."""
    device: str = "auto"
    """Where they are trained: auto, cpu, cuda ..."""

    def __post_init__(self) -> None:
        """Validate all before any of it is trained; raises `ConfigError`, `PolicyError` or `BundleError`."""
        if self.games == ("all",):
            object.__setattr__(self, "games", tuple(GAMES))
        each_once(self.games, "games")
        each_once(self.seeds, "seeds")
        for name in ("steps", "critic_steps", "episodes", "tried", "jobs"):
            whole(getattr(self, name), name, 1)
        whole(self.choose, "choose", 0)
        check_minutes(self.critic_minutes)
        load_resumable(self.config)
        pick_device(self.device)
        for game in self.games:
            check_lengths(game, horizon=self.horizon, limit=self.limit)
            make_policy(self.critic_policy, np.asarray(get_game(game).bias))  # raises
            load_bundle(resolve_bundle(self.bundle, game), "cpu", game=game)
            for seed in self.seeds:
                self.run(game, "dream", seed)
        if self.docs is not None:
            rooms(self.docs, [TABLE])

    def run(self, game: str, world: str, seed: int) -> TrainConfig:
        """How one agent is trained; raises `ConfigError` for bad settings."""
        out = self.out / game / f"{world}-{seed}"
        shared: dict[str, Any] = {"game": game, "world": world, "seed": seed, "out": out}
        shared |= {"steps": self.steps, "config": self.config, "eval_episodes": 0, "device": self.device}
        shared |= {"bundle": self.bundle}
        if world == "dream":
            shared |= {name: getattr(self, name) for name in ("horizon", "nfe", "penalty")}
        if world == "dream" and self.critic_minutes:
            shared |= {"critic": self.out / game / "critic" / "agent", "starts": self.out / game / "play"}
        if world == "dream" and self.choose:
            shared |= {"judge": "dream", "eval_every": self.choose, "eval_episodes": 64}
            shared |= {"eval_nfe": self.choose_nfe, "eval_limit": self.choose_limit}
        return TrainConfig(**shared, resume=True)


def run_benchmark(config: BenchmarkConfig) -> dict[str, dict[str, Any]]:
    """Train and judge whatever is not done yet.

    Returns:
        A row for each game: mean returns and 95 % intervals of `random`, `constant`, `real` and `dream` (over agents
        and levels), those scaled to Procgen's range, and what share of the way from random to real the dream's agent
        goes; None where PPO in the game is not sure to beat random. With `learnable` there is no `dream` there either.

    Raises:
        ConfigError: bad settings, or a training that failed.
    """
    out = config.out
    free = ("out", "docs", "games", "seeds", "jobs", "device", "learnable")
    settings = {k: str(v) for k, v in to_dict(config).items() if k not in free}
    with begun(out, settings | {"algorithm": str(to_dict(load_algorithm(config.config)))}):
        rows: dict[str, dict[str, Any]] = {game: {} for game in config.games}
        for world in _WORLDS:
            asked = [game for game in config.games if world == "real" or rows[game]["learnt"] or not config.learnable]
            if world == "dream" and config.critic_minutes:
                together(config.jobs, [partial(_critic, config, game) for game in asked])
            agents = [(game, world, seed) for game in asked for seed in config.seeds]
            together(config.jobs, [partial(_train, config, *agent) for agent in agents])
            for game in asked:
                rows[game] |= _players(config, get_game(game)) if world == "real" else {}
                rows[game] |= _trained(config, game, world, rows[game])
    table = table_of(rows)
    for path, text in ((out / "benchmark.md", table), (out / "benchmark.json", json.dumps(rows, indent=1))):
        with atomic_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    if config.docs is not None:
        write_tables(config.docs, {TABLE: table})
    return rows


def _critic(config: BenchmarkConfig, game: str) -> None:
    """Record play of a game by players that learn nothing, and train a critic on it."""
    play, mode = config.out / game / "play", bundle_mode(resolve_bundle(config.bundle, game), game)
    recorded = {"steps": config.critic_steps, "policy": config.critic_policy, "limit": _PLAYED}
    commands = {
        "play": program("envs.collect", game=game, out=play, seed=_PLAY_SEED, distribution_mode=mode, **recorded),
        "critic": critic_command(
            play, config.out / game / "critic", config.critic_minutes, config.config, device=config.device
        ),
    }
    for name, command in commands.items():
        stage(config.out, f"{game}-{name}", lambda command=command: run_command(command))


_PLAYED = 256
"""Steps after which a recorded episode ends: many levels rather than long waits."""
_PLAY_SEED = 81


def _train(config: BenchmarkConfig, game: str, world: str, seed: int) -> None:
    options = {name: getattr(config.run(game, world, seed), name) for name in _OPTIONS}
    command = program("agents.train", **options)
    stage(config.out, f"{game}-{world}-{seed}", lambda: json.loads(run_command(command)))


_OPTIONS = (
    *("world", "game", "steps", "out", "config", "bundle", "horizon", "nfe", "penalty", "critic", "starts"),
    *("judge", "eval_every", "eval_episodes", "eval_nfe", "eval_limit", "device", "seed", "resume"),
)


def _judged(config: BenchmarkConfig, game: Game, name: str, agent: str, held_out: bool = True) -> dict[str, Any]:
    """How an agent fares in the real game."""
    first, count = HELD_OUT if held_out else TRAIN_LEVELS
    episodes = config.episodes if held_out else config.tried

    def work() -> dict[str, Any]:
        where = ("real", game.name, (first, first + count), episodes, config.bundle)
        found = evaluate(agent, *where, limit=config.limit)
        return found.figures | {"returns": found.episodes.returns.tolist()}

    return stage(config.out, f"{game.name}-judged-{name}", work)


def _players(config: BenchmarkConfig, game: Game) -> dict[str, Any]:
    """The figures of the players that learn nothing: a random one, and who holds the best keys."""
    facts = load_bundle(resolve_bundle(config.bundle, game.name), "cpu", game=game.name).game
    tried = {NAMES[action]: f"hold:{NAMES[action]}" for action in distinct_actions(facts)}
    means = {a: _judged(config, game, f"try-{n}", a, held_out=False)["mean_return"] for n, a in tried.items()}
    best = max(means, key=lambda action: means[action])
    low, high = game.hard if facts.distribution_mode == "hard" else game.easy
    row: dict[str, Any] = {"held": best.partition(":")[2], "range": [low, high], "steps": config.steps}
    for player, name, agent in (("random", "random", "random"), ("constant", best.replace(":", "-"), best)):
        row |= _figures(player, [_judged(config, game, name, agent)], row["range"])
    return row


def _trained(config: BenchmarkConfig, game: str, world: str, row: dict[str, Any]) -> dict[str, Any]:
    """The figures of the agents of one world, beside those that `row` has of others."""
    kept = "best" if world == "dream" and config.choose else "agent"
    runs = {seed: str(config.run(game, world, seed).out / kept) for seed in config.seeds}
    judged = [_judged(config, get_game(game), f"{world}-{seed}", folder) for seed, folder in runs.items()]
    figures = _figures(world, judged, row["range"])
    if world == "real":  # not learnt: the way is no longer than what these levels can tell
        return figures | {"learnt": beats(figures | row, "real", "random"), "share": None}
    share = share_of_the_way(row["random"], row["real"], figures["dream"]) if row["learnt"] else None
    return figures | {"seeds": list(config.seeds), "kept": kept, "share": share}


def _figures(player: str, judged: list[dict[str, Any]], limits: list[float]) -> dict[str, Any]:
    """Mean return of one or more agents, its interval, each agent's own, and the mean in Procgen's range."""
    returns = np.array([each["returns"] for each in judged])
    found: dict[str, Any] = {player: float(returns.mean()), f"{player}_seeds": returns.mean(1).tolist()}
    found[f"{player}_low"], found[f"{player}_high"] = interval(bootstrap(returns))
    found[f"{player}_scaled"] = (found[player] - limits[0]) / (limits[1] - limits[0])
    return found


def bootstrap(returns: np.ndarray, draws: int = 10_000) -> np.ndarray:
    """Means float64 (draws,) of returns (seeds, levels) drawn anew: agents, and levels, which all of them play."""
    rng, (seeds, levels) = np.random.default_rng(0), returns.shape
    return np.array(
        [
            returns[np.ix_(rng.integers(seeds, size=seeds), rng.integers(levels, size=levels))].mean()
            for _ in range(draws)
        ]
    )


def beats(row: dict[str, Any], player: str, other: str) -> bool:
    """Whether a player surely earns more than another one: the whole of its 95 % interval lies above the other's."""
    return row[f"{player}_low"] > row[f"{other}_high"]


def share_of_the_way(random: float, real: float, dream: float) -> float | None:
    """(dream - random) / (real - random); None where the agent of the real game is no better than random."""
    return (dream - random) / (real - random) if real > random else None


_COLUMNS = {
    "random": ("random", ".2f"),
    "held": ("held keys", ""),
    "constant": ("holding them", ".2f"),
    "real": ("PPO in the game", ".2f"),
    "real_low": ("from", ".2f"),
    "real_high": ("to", ".2f"),
    "dream": ("PPO in the dream", ".2f"),
    "dream_low": ("from", ".2f"),
    "dream_high": ("to", ".2f"),
    "dream_scaled": ("dream, in Procgen's range", ".3f"),
    "share": ("share of the way", ".2f"),
}


def table_of(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown, and the median of each figure where there are several games."""
    known = {game: {k: v for k, v in row.items() if v is not None} for game, row in rows.items()}
    if len(rows) > 1:
        shared, compared = {}, sum("share" in row for row in known.values())
        for name in ("dream_scaled", "share"):
            values = [row[name] for row in known.values() if name in row]
            shared |= {name: float(np.median(values))} if values else {}
        known["median" if compared == len(rows) else f"median, share of {compared} games"] = shared
    return markdown("game", known, _COLUMNS)


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `BenchmarkConfig` is an option; the table is printed last."""
    with errors_in_one_line():
        config = tyro.cli(BenchmarkConfig, args=arguments, description=__doc__)
        print(table_of(run_benchmark(config)))


if __name__ == "__main__":
    main()
