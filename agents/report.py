"""Does an agent exploit the dream's errors? Its dream return against its real return, level by level.

`python -m agents.report --agent bundled --out out/agent` plays the same held-out levels in both worlds several times
and writes `report.html`: by how much the dream overestimates the agent, and a scatter plot of levels. Then the keys
that the agent pressed in the dream are pressed in the game: a table says in which situations the two part, and film
strips show it. `--before AGENT` holds another agent beside it.
"""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from agents.evaluate import evaluate
from agents.replay import FATES, GRACE, Replays, optimism, replay
from agents.saved import agent_facts
from dreamenv.artifacts import atomic_file, present, write_json
from dreamenv.bundle import bundled_agent, resolve_bundle
from dreamenv.config import check
from dreamenv.console import errors_in_one_line
from dreamenv.evaluation.clips import HELD_OUT
from dreamenv.evaluation.figures import save_grid, save_plot
from dreamenv.evaluation.report import document, embed, table
from dreamenv.flow import SamplerConfig

_BESIDE = {
    "real_return": "return in the game",
    "dream_return": "in the dream",
    "same_keys_optimism": "dream minus game, same keys",
}


@dataclass(frozen=True)
class ReportConfig:
    """What is played."""

    agent: str = "bundled"
    """random, bundled, an agent's folder, or a policy specification."""
    before: str | None = None
    """Another agent, such as one trained without what this one was trained with; its own report goes to out/before."""
    out: Path = Path("out/agent")
    """Folder for report.html, metrics.json and pictures."""
    game: str = "coinrun"
    """Which game."""
    bundle: Path | None = None
    """Bundle folder of the dream; the embedded one by default."""
    levels: int = 64
    """Held-out levels."""
    repeats: int = 4
    """Episodes on each, in each world."""
    limit: int = 300
    """Steps after which an episode is cut off, in both worlds."""
    nfe: int = SamplerConfig.nfe
    """Network function evaluations of the dream's steps."""
    films: int = 3
    """Dreams filmed at each extreme."""
    seed: int = 0
    """Decides actions and noise."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(2 <= self.levels <= HELD_OUT[1], f"levels {self.levels}: must be in 2..{HELD_OUT[1]}")
        check(self.repeats >= 1, f"repeats {self.repeats}: must be >= 1")
        check(self.films >= 0, f"films {self.films}: must be >= 0")


def play(config: ReportConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns of every episode, float64 (levels, repeats): real, and dreamt from the same first frames."""
    first = HELD_OUT[0]
    returns = np.zeros((2, config.levels, config.repeats))
    for w, world in enumerate(("real", "dream")):
        for r in range(config.repeats):
            result = evaluate(
                config.agent,
                world,
                config.game,
                (first, first + config.levels),
                config.levels,
                config.bundle,
                config.nfe,
                config.seed + r,
                limit=config.limit,
            )
            returns[w, result.levels - first, r] = result.episodes.returns
    return returns[0], returns[1]


def learnt_from(facts: dict[str, Any]) -> tuple[int, int] | tuple[None, None]:
    """How many imagined and how many real steps an agent learnt from, with those of the agents it went on from.

    Args:
        facts: see `agents.saved.agent_facts`; where they do not say, the answer is (None, None). What a critic learnt
            from is real, and counts once.
    """
    imagined, real, critics = 0, 0, list[dict[str, Any]]()
    before: dict[str, Any] | None = facts
    while before is not None:
        share = {"dream": 1.0, "mix": float(before.get("share", 0.5)), "real": 0.0}.get(str(before.get("world")))
        critic = before.get("critic") or {"real_steps": 0}
        if share is None or "steps" not in before or "real_steps" not in critic:
            return None, None
        dreamt = round(share * before["steps"])
        real += before["steps"] - dreamt + (0 if critic in critics else critic["real_steps"])
        critics.append(critic)
        imagined, before = imagined + dreamt, before.get("from")
    return imagined, real


def report(config: ReportConfig) -> dict[str, Any]:
    """Play, write everything into `config.out`, and return the figures.

    Raises:
        ConfigError, PolicyError: a bad setting, or no such agent.
    """
    before = None
    shutil.rmtree(config.out / "before", ignore_errors=True)  # of an earlier report
    if config.before is not None:
        before = report(replace(config, agent=config.before, before=None, out=config.out / "before"))
    real, dream = play(config)
    replays = replay(config.agent, config.game, config.bundle, config.levels, config.limit, config.nfe, config.seed)
    figures = (
        optimism(real, dream, seed=config.seed)
        | replays.figures(config.seed)
        | {"agent": config.agent, "levels": config.levels, "repeats": config.repeats, "limit": config.limit}
    )
    shipped = (
        bundled_agent(resolve_bundle(config.bundle, config.game), config.game) if config.agent == "bundled" else None
    )
    folder = shipped or Path(config.agent)
    figures["imagined_steps"], figures["real_steps"] = learnt_from(
        agent_facts(folder) if present(folder / "agent.json") else {}
    )
    out = config.out

    def draw(axes: Any) -> None:
        points, counts = np.unique(np.stack([real.mean(1), dream.mean(1)], 1), axis=0, return_counts=True)
        axes.axline((0, 0), slope=1, color="grey", lw=1)
        axes.scatter(*points.T, s=20 + 25 * counts, alpha=0.7)
        for (x, y), n in zip(points, counts, strict=True):
            axes.annotate(str(n), (x, y), ha="center", va="center", fontsize=7)
        axes.set(xlabel="mean return in the real game", ylabel="mean return in the dream", title="levels, and how many")

    save_plot(out / "scatter.png", draw, (5, 4.5))
    rows, strips = _partings(config, replays)
    if strips:
        width = max(len(s) for s in strips)
        blank = np.zeros((width, *strips[0].shape[1:]), np.uint8)
        save_grid(out / "films.png", [np.concatenate([s, blank[len(s) :]]) for s in strips])
    else:
        (out / "films.png").unlink(missing_ok=True)  # of an earlier report
    figures |= {} if before is None else {"before": before}
    write_json(out / "metrics.json", {"figures": figures, "levels": rows})
    parts = _page(config, figures, rows)
    with atomic_file(out / "report.html") as temporary:
        temporary.write_text(document(f"{config.agent}: does it exploit the dream's errors?", parts), encoding="utf-8")
    return figures


def _partings(config: ReportConfig, replays: Replays) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """The dreams whose keys earn most less in the game, or most more: rows of figures, and frames of both worlds."""
    gap = replays.dream - replays.game
    order = np.argsort(gap, kind="stable")
    chosen = [("overestimated", int(i)) for i in order[::-1][: config.films] if gap[i] > 0]
    chosen += [("underestimated", int(i)) for i in order[: config.films] if gap[i] < 0]
    rows, strips = [], []
    for kind, i in chosen:
        shown = np.unique(np.linspace(0, replays.lengths[i] - 1, 12).round().astype(int))
        strips += [film[i][shown] for film in (replays.game_films, replays.dream_films)]
        returns = {"game": float(replays.game[i]), "dream": float(replays.dream[i])}
        rows.append({"level": int(replays.levels[i]), "kind": kind, **returns, "steps": int(replays.lengths[i])})
    return rows, strips


def _page(config: ReportConfig, figures: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """The parts of report.html."""
    low, high = figures["optimism_ci"]
    alone_low, alone_high = figures["same_keys_optimism_ci"]
    verdict = (
        "The dream overestimates this agent."
        if low > 0
        else "The dream underestimates this agent."
        if high < 0
        else "No difference between the worlds is proven."
    )
    learnt = ""
    if figures["imagined_steps"] is not None:
        learnt = (
            f"<p>It learnt from {figures['imagined_steps']:,} imagined and {figures['real_steps']:,} real steps.</p>"
        )
    shown = [figures["before"], figures] if "before" in figures else [figures]
    return [
        f"<h1>{html.escape(config.agent)}: dream return against real return</h1>",
        f"<p>{config.levels} levels that nobody trained on, {config.repeats} episodes each in both worlds from the "
        f"same first frames, cut off after {config.limit} steps.</p>",
        learnt,
        f"<p>Real return {figures['real_return']:.2f}, dream return {figures['dream_return']:.2f}: optimism "
        f"{figures['optimism']:+.2f} ({low:+.2f} to {high:+.2f}, 95 % bootstrap over levels). <b>{verdict}</b></p>",
        embed(config.out / "scatter.png", "scatter", "plot"),
        "<h2>The same keys in both worlds</h2>",
        f"<p>The game has {GRACE} steps more than the dream took. It goes on where it has neither earned nor ended by "
        "then.</p>",
        f"<p>The agent played one dream of each level, and its keys were pressed in the game. "
        f"{figures['dreams_paid']} dreams earned something; for {figures['dreams_paid_alone']} of them the game paid "
        f"nothing. Dreams paid {figures['same_keys_optimism']:+.2f} more ({alone_low:+.2f} to {alone_high:+.2f}).</p>",
        table(_situations(shown), {"agent": "agent", "dream": "dreams that", **{f: f"the game {f}" for f in FATES}}),
        table(shown, {"agent": "agent", **_BESIDE}) if len(shown) > 1 else "",
        "<h2>Where they part</h2>",
        table(
            rows,
            {"level": "level", "kind": "", "game": "return in the game", "dream": "in the dream", "steps": "steps"},
        )
        if rows
        else "<p>They part nowhere.</p>",
        "<p>Start to end of each dream: upper row the game, lower row the dream.</p>" if rows else "",
        embed(config.out / "films.png", "films"),
    ]


def _situations(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each agent and fate of a dream: how many there are with each fate of the game."""
    rows = [(f["agent"], *row) for f in shown for row in f["situations"].items()]
    return [{"agent": agent, "dream": fate, **counts} for agent, fate, counts in rows]


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `ReportConfig` is an option; the last line printed is JSON."""
    with errors_in_one_line():
        figures = report(tyro.cli(ReportConfig, args=arguments, description=__doc__))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
