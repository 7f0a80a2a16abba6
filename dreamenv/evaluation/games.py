"""Every embedded game's figures in one table: `python -m dreamenv.evaluation.games FILE.md`.

Embedded games without a card are measured first; a killed run goes on where it was. Then the
tables between a Markdown file's markers are written anew from the cards.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from dreamenv.bundle import embedded_games, load_bundle
from dreamenv.config import check
from dreamenv.console import run_command_line
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
"""What each game is measured with: whole episodes of ten policies in sixteen games would take a day."""
Columns = dict[str, tuple[str, str]]  # figure -> its title and format
PICTURES: Columns = {
    "psnr_1": ("PSNR, 1 step", ".1f"),
    "copy_psnr_1": ("copying", ".1f"),
    "psnr_10": ("PSNR, 10 steps", ".1f"),
    "copy_psnr_10": ("copying", ".1f"),
    "psnr_30": ("PSNR, 30 steps", ".1f"),
    "copy_psnr_30": ("copying", ".1f"),
    "psnr_moving_1": ("moving pixels, 1 step", ".1f"),
    "copy_psnr_moving_1": ("copying", ".1f"),
    "psnr_moving_10": ("moving pixels, 10 steps", ".1f"),
    "copy_psnr_moving_10": ("copying", ".1f"),
    "psnr_still_30": ("still pixels, 30 steps", ".1f"),
    "autoencoder_psnr": ("codec alone", ".1f"),
    "ssim_10": ("SSIM, 10 steps", ".2f"),
    "perceptual_10": ("perceptual distance, 10 steps", ".3f"),
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
    "psnr_still_30": ("still pixels, 30 steps", ".1f"),
    "reward_ap": ("reward AP", ".2f"),
    "end_ap": ("end AP", ".2f"),
    "closed_loop_pearson": ("values: Pearson", ".2f"),
}
_TABLES = {"games-pictures": PICTURES, "games-playing": PLAYING, "games-short": SHORT}


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
        files: Markdown files with markers: games-pictures, games-playing, games-short.
        games: which are measured anew; by default those without a card. The tables show all that have one.
        out: folder for reports.
        clips: held-out clips.
        nfe: network function evaluations per step.
        again: measure all of them anew.
        jobs: games that are measured at a time, each in a process.
    """
    check(1 <= jobs <= 256, f"jobs {jobs}: must be 1..256")
    embedded = embedded_games()
    for name in games:
        check(name in embedded, f"games {name}: not embedded; {', '.join(embedded)} are")
    config = replace(SETTINGS, clips=clips)
    for file in files:
        rooms(file, _TABLES)
    chosen = [n for n in games or embedded if again or games or not load_bundle(embedded[n], "cpu", game=n).card]
    measure_all({name: embedded[name] for name in chosen}, config, SamplerConfig(nfe=nfe), out, jobs)
    cards = {name: load_bundle(folder, "cpu", game=name).card for name, folder in embedded.items()}
    cards = {name: card for name, card in cards.items() if card}
    tables = {name: games_table(cards, columns) for name, columns in _TABLES.items()}
    for file in files:
        write_tables(file, tables)


if __name__ == "__main__":
    run_command_line(main)
