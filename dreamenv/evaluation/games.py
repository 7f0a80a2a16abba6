"""Every embedded game's figures in one table: `python -m dreamenv.evaluation.games FILE.md`.

Embedded games without a card are measured first; a killed run goes on where it was. Then the
tables between a Markdown file's markers are written anew from the cards.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from dreamenv.bundle import embedded_games, load_bundle
from dreamenv.config import check
from dreamenv.console import run_command_line
from dreamenv.contract.games import GAMES
from dreamenv.evaluation.compare import CompareConfig, compare
from dreamenv.evaluation.pages import markdown, rooms, write_tables
from dreamenv.evaluation.report import save_comparison
from dreamenv.flow import SamplerConfig
from dreamenv.rewrite import update_card

SETTINGS = CompareConfig(
    steps=16_000,
    samples=1,
    negatives=1000,
    events=500,
    horizon=30,
    branches=64,
    random_clips=64,
    examined=16,
    episodes=16,
    limit=200,
)
"""What each game is measured with: whole episodes of twenty policies in sixteen games would take days."""
Columns = dict[str, tuple[str, str]]  # figure -> its title and format
PICTURES: Columns = {
    "psnr_1": ("PSNR, 1 step", ".1f"),
    "copy_psnr_1": ("copying", ".1f"),
    "chance_psnr_1": ("at best", ".1f"),
    "psnr_10": ("PSNR, 10 steps", ".1f"),
    "copy_psnr_10": ("copying", ".1f"),
    "chance_psnr_10": ("at best", ".1f"),
    "psnr_30": ("PSNR, 30 steps", ".1f"),
    "copy_psnr_30": ("copying", ".1f"),
    "chance_psnr_30": ("at best", ".1f"),
    "psnr_moving_1": ("moving pixels, 1 step", ".1f"),
    "copy_psnr_moving_1": ("copying", ".1f"),
    "psnr_moving_10": ("moving pixels, 10 steps", ".1f"),
    "copy_psnr_moving_10": ("copying", ".1f"),
    "psnr_moving_30": ("moving pixels, 30 steps", ".1f"),
    "copy_psnr_moving_30": ("copying", ".1f"),
    "psnr_still_30": ("still pixels, 30 steps", ".1f"),
    "chance_psnr_still_30": ("the game again", ".1f"),
    "autoencoder_psnr": ("codec alone", ".1f"),
    "ssim_10": ("SSIM, 10 steps", ".2f"),
    "copy_ssim_10": ("copying", ".2f"),
    "perceptual_10": ("perceptual distance, 10 steps", ".3f"),
    "copy_perceptual_10": ("copying", ".3f"),
}
PLAYING: Columns = {
    "delta_psnr_4": ("delta-PSNR, 4 steps", ".2f"),
    "branch_accuracy": ("futures matched", ".0%"),
    "branch_chance": ("guessing", ".0%"),
    "reward_ap": ("reward: average precision", ".2f"),
    "drifted_reward_ap": ("after 10 dreamt steps", ".2f"),
    "reward_base_rate": ("base rate", ".2%"),
    "end_ap": ("end: average precision", ".2f"),
    "drifted_end_ap": ("after 10 dreamt steps", ".2f"),
    "end_base_rate": ("base rate", ".2%"),
    "closed_loop_pearson": ("values: Pearson", ".2f"),
    "closed_loop_spearman": ("Spearman", ".2f"),
    "closed_loop_mean_absolute_error": ("mean error", ".2f"),
    "endless_detail": ("5,000 steps: detail kept", ".2f"),
}
SHORT: Columns = {
    "psnr_1": ("PSNR, dB, 1 step", ".1f"),
    "copy_psnr_1": ("copying", ".1f"),
    "psnr_10": ("10 steps", ".1f"),
    "copy_psnr_10": ("copying", ".1f"),
    "branch_accuracy": ("futures matched", ".0%"),
    "reward_ap": ("reward AP", ".2f"),
    "end_ap": ("end AP", ".2f"),
    "closed_loop_pearson": ("values: Pearson", ".2f"),
}
_GOALS = "games-goals"
_TABLES = {"games-pictures": PICTURES, "games-playing": PLAYING, "games-short": SHORT}


@dataclass(frozen=True)
class Goal:
    """What a figure of each game's card should reach.

    Attributes:
        title: what is meant, in words.
        figure: its name in a card.
        least: what it should be at least; or, if `most`, at most.
        over: the figure from which that is counted; empty counts from 0.
        standing: whether only games whose camera stands still are meant.
        most: whether `least` is the most that it should be.
        style: how it is formatted, finer than what a game that just misses it lacks.
        bound: the figure of which chance allows no more, where there is one; and from which it is counted.
    """

    title: str
    figure: str
    least: float
    over: str = ""
    standing: bool = False
    most: bool = False
    style: str = ".2f"
    bound: tuple[str, str] | None = None

    def values(self, cards: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """Of each game that is meant and has the figure: the figure, less the one from which it is counted."""
        meant = {game: card for game, card in cards.items() if not (self.standing and any(GAMES[game].view.scrolls))}
        return {
            game: card[self.figure] - (card[self.over] if self.over else 0)
            for game, card in meant.items()
            if _known(card.get(self.figure)) and (not self.over or _known(card.get(self.over)))
        }

    def allowed(self, cards: Mapping[str, Mapping[str, Any]]) -> str:
        """In how many games chance does not forbid it, of those where that is known; empty without a bound."""
        if self.bound is None:
            return ""
        found = replace(self, figure=self.bound[0], over=self.bound[1]).values(cards)
        return f"{sum(value >= self.least for value in found.values())} of {len(found)}" if found else ""


GOALS = (
    Goal("PSNR over copying, 1 step, dB", "psnr_1", 3, "copy_psnr_1", bound=("chance_psnr_1", "chance_copy_psnr_1")),
    Goal(
        "PSNR over copying, 10 steps, dB", "psnr_10", 3, "copy_psnr_10", bound=("chance_psnr_10", "chance_copy_psnr_10")
    ),
    Goal("moving pixels over copying, 1 step, dB", "psnr_moving_1", 0, "copy_psnr_moving_1"),
    Goal("moving pixels over copying, 10 steps, dB", "psnr_moving_10", 0, "copy_psnr_moving_10"),
    Goal("SSIM over copying, 10 steps", "ssim_10", 0, "copy_ssim_10", style=".3f"),
    Goal(
        "copying's perceptual distance less the dream's, 10 steps",
        "copy_perceptual_10",
        0,
        "perceptual_10",
        style=".3f",
    ),
    Goal("still pixels where the camera stands, 30 steps, dB", "psnr_still_30", 45, standing=True, style=".1f"),
    Goal("average precision of rewards", "reward_ap", 0.8),
    Goal("average precision of rewards after 10 dreamt steps", "drifted_reward_ap", 0.8),
    Goal("average precision of ends", "end_ap", 0.8),
    Goal("average precision of ends after 10 dreamt steps", "drifted_end_ap", 0.8),
    Goal("Pearson of policies' values", "closed_loop_pearson", 0.95),
    Goal("detail after 5,000 steps by the game's own, which noise would multiply", "endless_detail", 2, most=True),
)
"""What we want of every game. The numbers are ours."""
_GOAL_COLUMNS: Columns = {
    "least": ("wanted", ""),
    "median": ("median", ""),
    "reached": ("games that reach it", ""),
    "allowed": ("games where chance does not forbid it", ""),
    "missed": ("the others", ""),
}


def goals_table(cards: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a line a goal: the median, how many games reach it, and what the others have, the worst first."""
    rows = {}
    for goal in GOALS:
        sign = -1 if goal.most else 1
        found = sorted(goal.values(cards).items(), key=lambda item: sign * item[1])
        missed = [f"{game} {value:{goal.style}}" for game, value in found if sign * value < sign * goal.least]
        rows[goal.title] = {
            "least": f"at {'most' if goal.most else 'least'} {goal.least:g}",
            "median": format(np.median([value for _, value in found]), goal.style) if found else "",
            "reached": f"{len(found) - len(missed)} of {len(found)}",
            "allowed": goal.allowed(cards),
            "missed": ", ".join(missed),
        }
    return markdown("goal", rows, _GOAL_COLUMNS)


def games_table(cards: dict[str, dict[str, Any]], columns: Columns) -> str:
    """Markdown, a line a game and one of medians, of the figures of their cards; nothing where a card has none."""
    rows = {game: {key: card[key] for key in columns if _known(card.get(key))} for game, card in cards.items()}
    found = {key: [row[key] for row in rows.values() if key in row] for key in columns}
    return markdown("game", rows | {"median": {key: np.median(v) for key, v in found.items() if v}}, columns)


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not np.isnan(value)


def measure(folder: Path, game: str, config: CompareConfig, sampler: SamplerConfig, out: Path) -> dict[str, Any]:
    """Measure one game (needs procgen): the figures of its card.

    Args:
        folder: of the bundle.
        game: which of its games.
        config: how much is measured.
        sampler: how dreams are drawn.
        out: folder for the report.
    """
    bundle = load_bundle(folder, "auto", game=game)
    result = compare(bundle, config, sampler, lambda stage: print(f"[{game}] {stage}", flush=True))
    save_comparison(out / game, bundle, config, result)
    return result.figures | {"policy": config.policy, "levels": list(config.levels), "seed": config.seed}


def measure_all(
    wanted: dict[str, Path], config: CompareConfig, sampler: SamplerConfig, out: Path, jobs: int = 1
) -> None:
    """Measure games, `jobs` at a time, and store each one's figures in its bundle as its card as soon as it has them.

    Args:
        wanted: game -> folder of its bundle.
        config: how much is measured.
        sampler: how dreams are drawn.
        out: folder for the reports.
        jobs: processes, which share the threads that PyTorch is to use.
    """
    if jobs == 1:
        for game, folder in wanted.items():
            update_card(folder, measure(folder, game, config, sampler, out), game)
        return
    threads = max(torch.get_num_threads() // jobs, 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        begun = {pool.submit(measure, folder, game, config, sampler, out): game for game, folder in wanted.items()}
        try:
            for done in as_completed(begun):
                update_card(wanted[begun[done]], done.result(), begun[done])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(
    files: tyro.conf.Positional[list[Path]],
    games: tuple[str, ...] = (),
    out: Path = Path("out/games"),
    clips: int = SETTINGS.clips,
    nfe: int = 1,
    again: bool = False,
    jobs: int = 1,
) -> None:
    """Measure embedded games that are not measured yet, and write the tables.

    Args:
        files: Markdown files with markers: games-pictures, games-playing, games-short, games-goals.
        games: which are measured anew; by default those without a card. The tables show all that have one.
        out: folder for reports.
        clips: held-out clips.
        nfe: network function evaluations per step.
        again: measure anew all games but those whose card is of more real steps than would be played here.
        jobs: games that are measured at a time, each in a process.
    """
    check(1 <= jobs <= 256, f"jobs {jobs}: must be 1..256")
    embedded = embedded_games()
    for name in games:
        check(name in embedded, f"games {name}: not embedded; {', '.join(embedded)} are")
    config = replace(SETTINGS, clips=clips)
    for file in files:
        rooms(file, [*_TABLES, _GOALS])
    before = {name: load_bundle(folder, "cpu", game=name).card for name, folder in embedded.items()}
    chosen = games or tuple(n for n, card in before.items() if not card or (again and card["steps"] <= config.steps))
    measure_all({name: embedded[name] for name in chosen}, config, SamplerConfig(nfe=nfe), out, jobs)
    cards = {name: load_bundle(folder, "cpu", game=name).card for name, folder in embedded.items()}
    cards = {name: card for name, card in cards.items() if card}
    tables = {name: games_table(cards, columns) for name, columns in _TABLES.items()} | {_GOALS: goals_table(cards)}
    for file in files:
        write_tables(file, tables)


if __name__ == "__main__":
    run_command_line(main)
