"""How many steps of the real game does it take? `python -m agents.real_steps --games coinrun --steps 50000 200000`.

For each game and number of steps a world model is trained on just so many, an agent in its dreams only, and beside
them PPO that gets just those steps of the game. Both are judged on held-out levels. Run the same line again after a
kill: what is done is skipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from agents.critic import check_minutes, critic_command
from agents.evaluate import evaluate
from agents.train import CONFIGS, load_algorithm, load_resumable
from agents.worlds import check_lengths
from dreamenv.artifacts import atomic_file
from dreamenv.config import check, each_once, to_dict, whole
from dreamenv.console import errors_in_one_line
from dreamenv.device import pick_device
from dreamenv.evaluation.figures import save_plot
from dreamenv.evaluation.pages import markdown, rooms, write_tables
from dreamenv.stages import begun, program, run_command, stage

TABLE = "agents-steps"
"""The markers between which a Markdown file takes the table."""
_WORLDS = {"real": "PPO in the game", "dream": "PPO in the dream of a model of these steps"}


@dataclass(frozen=True)
class RealStepsConfig:
    """Who is trained on how much."""

    games: tuple[str, ...] = ("coinrun",)
    """Which games."""
    steps: tuple[int, ...] = (50_000, 200_000, 600_000)
    """Steps of the real game that a world model, or an agent of the game, learns from."""
    imagined: int = 1_000_000
    """Imagined steps of each agent of a dream."""
    minutes: float = 90.0
    """Training minutes of each world model."""
    config: Path = CONFIGS / "ppo_hasty.yaml"
    """The algorithm, of both worlds."""
    horizon: int = 64
    """Length of the dreams, which begin at moments of the real steps."""
    critic_minutes: float = 0.0
    """Minutes of training for each model's critic, which says what a dream that is cut off was still worth, see
    `agents.critic`; 0 for none. It learns from the same real steps as the model."""
    recipe: str = ""
    """Of the world models, see `trainers.pipeline`; each game's own by default."""
    set: tuple[str, ...] = ()
    """Overrides for the world models' stages, see `trainers.pipeline`."""
    stage_steps: int | None = None
    """Steps of each of these stages, instead of minutes."""
    episodes: int = 500
    """Held-out levels that each agent is judged on, an episode each."""
    limit: int | None = None
    """Steps after which an episode that is judged is cut off; the game's own limit by default."""
    out: Path = Path("runs/real_steps")
    """Run folder: models, agents, real_steps.json, real_steps.md and real_steps.png."""
    docs: Path | None = None
    """A Markdown file whose table between the markers `agents-steps` is replaced."""
    device: str = "auto"
    """Where agents are trained: auto, cpu, cuda ..."""
    seed: int = 0
    """Decides everything but the wall clock."""

    def __post_init__(self) -> None:
        """Validate what can be before anything is trained; raises `ConfigError`."""
        each_once(self.games, "games")
        each_once(self.steps, "steps")
        for steps in self.steps:
            whole(steps, "steps", 1)
        for name in ("imagined", "episodes"):
            whole(getattr(self, name), name, 1)
        check(self.minutes > 0, f"minutes {self.minutes}: must be > 0")
        check_minutes(self.critic_minutes)
        load_resumable(self.config)
        pick_device(self.device)
        for game in self.games:
            check_lengths(game, horizon=self.horizon, limit=self.limit)
        if self.docs is not None:
            rooms(self.docs, [TABLE])


def run_real_steps(config: RealStepsConfig) -> list[dict[str, Any]]:
    """Train and judge whatever is not done yet.

    Returns:
        A row for each game and number of steps: `game`, `steps`, and of `real` and `dream` the mean return, with its
        95 % interval from `_low` to `_high`.

    Raises:
        ConfigError: bad settings, or a training that failed.
    """
    free = ("out", "docs", "games", "steps", "device")
    settings = {k: str(v) for k, v in to_dict(config).items() if k not in free}
    with begun(config.out, settings | {"algorithm": str(to_dict(load_algorithm(config.config)))}):
        rows = [_row(config, game, steps) for game in config.games for steps in config.steps]
    table = table_of(rows)
    for name, text in (("real_steps.md", table), ("real_steps.json", json.dumps(rows, indent=1))):
        with atomic_file(config.out / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    save_plot(config.out / "real_steps.png", lambda axes: _draw(axes, rows))
    if config.docs is not None:
        write_tables(config.docs, {TABLE: table})
    return rows


def _row(config: RealStepsConfig, game: str, steps: int) -> dict[str, Any]:
    here = config.out / game / str(steps)
    shared: dict[str, Any] = {"game": game, "config": config.config, "eval_episodes": 0, "device": config.device}
    shared |= {"seed": config.seed, "resume": True}
    model: dict[str, Any] = {"game": game, "steps": steps, "events": 0, "minutes": config.minutes, "seed": config.seed}
    model |= {"recipe": config.recipe or None, "stage_steps": config.stage_steps, "set": list(config.set) or None}
    model |= {"contingent": "False"}  # which would step the game twice as often
    dream = {"steps": config.imagined, "bundle": here / "model" / "bundle", "starts": here / "model" / "data"}
    commands = {"model": program("trainers.pipeline", out=here / "model", **model)}
    if config.critic_minutes:
        play = here / "model" / "data"
        commands["critic"] = critic_command(
            play, here / "critic", config.critic_minutes, config.config, config.seed, config.device
        )
        dream |= {"critic": here / "critic" / "agent"}
    commands |= {
        "dream": program("agents.train", world="dream", out=here / "dream", horizon=config.horizon, **dream, **shared),
        "real": program("agents.train", world="real", out=here / "real", steps=steps, **shared),
    }
    for name, command in commands.items():
        stage(config.out, f"{game}-{steps}-{name}", lambda command=command: run_command(command))
    row: dict[str, Any] = {"game": game, "steps": steps}
    for world in _WORLDS:

        def judged(world: str = world) -> dict[str, Any]:
            agent = str(here / world / "agent")
            return evaluate(agent, "real", game, episodes=config.episodes, limit=config.limit).figures

        found = stage(config.out, f"{game}-{steps}-judged-{world}", judged)
        row[world], (row[f"{world}_low"], row[f"{world}_high"]) = found["mean_return"], found["ci"]
    return row


_COLUMNS = {
    "real": (_WORLDS["real"], ".2f"),
    "real_low": ("from", ".2f"),
    "real_high": ("to", ".2f"),
    "dream": (_WORLDS["dream"], ".2f"),
    "dream_low": ("from", ".2f"),
    "dream_high": ("to", ".2f"),
}


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    return markdown("real steps", {f"{row['game']}, {row['steps']:,}": row for row in rows}, _COLUMNS)


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Mean returns and their intervals by the number of real steps, two lines a game."""
    for n, game in enumerate(dict.fromkeys(row["game"] for row in rows)):
        own = sorted((row for row in rows if row["game"] == game), key=lambda row: row["steps"])
        for world, style in (("real", "--"), ("dream", "-")):
            means = [row[world] for row in own]
            around = [
                [row[world] - row[f"{world}_low"] for row in own],
                [row[f"{world}_high"] - row[world] for row in own],
            ]
            line = {"linestyle": style, "marker": "o", "color": f"C{n}", "label": f"{game}: {_WORLDS[world]}"}
            axes.errorbar([row["steps"] for row in own], means, around, capsize=3, **line)
    axes.set(xscale="log", xlabel="steps of the real game", ylabel="mean return on held-out levels")
    axes.legend(fontsize=8)


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `RealStepsConfig` is an option; the table is printed last."""
    with errors_in_one_line():
        config = tyro.cli(RealStepsConfig, args=arguments, description=__doc__)
        print(table_of(run_real_steps(config)))


if __name__ == "__main__":
    main()
