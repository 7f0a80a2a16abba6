"""Every embedded game's figures in one table: `python -m dreamenv.evaluation.games FILE.md`.

Embedded games without a card are measured first, one after the other; a killed run goes on where it was. Then the
tables between a Markdown file's markers are written anew from the cards.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from dreamenv.artifacts import atomic_file
from dreamenv.bundle import embedded_games, load_bundle
from dreamenv.config import check
from dreamenv.console import run_command_line
from dreamenv.errors import ConfigError
from dreamenv.evaluation.compare import CompareConfig, compare
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
Column = tuple[str, str, str]  # title, figure, format
PICTURES: tuple[Column, ...] = (
    ("PSNR, 1 step", "psnr_1", ".1f"),
    ("copying", "copy_psnr_1", ".1f"),
    ("PSNR, 10 steps", "psnr_10", ".1f"),
    ("copying", "copy_psnr_10", ".1f"),
    ("PSNR, 30 steps", "psnr_30", ".1f"),
    ("copying", "copy_psnr_30", ".1f"),
    ("moving pixels, 1 step", "psnr_moving_1", ".1f"),
    ("copying", "copy_psnr_moving_1", ".1f"),
    ("moving pixels, 10 steps", "psnr_moving_10", ".1f"),
    ("copying", "copy_psnr_moving_10", ".1f"),
    ("still pixels, 30 steps", "psnr_still_30", ".1f"),
    ("codec alone", "autoencoder_psnr", ".1f"),
    ("SSIM, 10 steps", "ssim_10", ".2f"),
    ("perceptual distance, 10 steps", "perceptual_10", ".3f"),
)
PLAYING: tuple[Column, ...] = (
    ("delta-PSNR, 4 steps", "delta_psnr_4", ".2f"),
    ("futures matched", "branch_accuracy", ".0%"),
    ("guessing", "branch_chance", ".0%"),
    ("reward: average precision", "reward_ap", ".2f"),
    ("after 10 dreamt steps", "drifted_reward_ap", ".2f"),
    ("base rate", "reward_base_rate", ".2%"),
    ("end: average precision", "end_ap", ".2f"),
    ("after 10 dreamt steps", "drifted_end_ap", ".2f"),
    ("base rate", "end_base_rate", ".2%"),
    ("values: Pearson", "closed_loop_pearson", ".2f"),
    ("Spearman", "closed_loop_spearman", ".2f"),
    ("mean error", "closed_loop_mean_absolute_error", ".2f"),
    ("5,000 steps: diverged", "endless_diverged", ".0%"),
    ("detail kept", "endless_detail", ".2f"),
)
SHORT: tuple[Column, ...] = (
    ("PSNR, dB, 1 step", "psnr_1", ".1f"),
    ("copying", "copy_psnr_1", ".1f"),
    ("10 steps", "psnr_10", ".1f"),
    ("copying", "copy_psnr_10", ".1f"),
    ("still pixels, 30 steps", "psnr_still_30", ".1f"),
    ("reward AP", "reward_ap", ".2f"),
    ("end AP", "end_ap", ".2f"),
    ("values: Pearson", "closed_loop_pearson", ".2f"),
)
_TABLES = {"games-pictures": PICTURES, "games-playing": PLAYING, "games-short": SHORT}


def games_table(cards: dict[str, dict[str, Any]], columns: tuple[Column, ...]) -> str:
    """Markdown, a line a game and one of medians, of the figures of their cards; nothing where a card has none."""
    lines = [["game", *(title for title, *_ in columns)], ["---", *("---:" for _ in columns)]]
    for game, card in cards.items():
        lines.append([game, *(_said(card.get(key), style) for _, key, style in columns)])
    middle = []
    for _, key, style in columns:
        found = [card[key] for card in cards.values() if _known(card.get(key))]
        middle.append(_said(float(np.median(found)) if found else None, style))
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, ["median", *middle]])


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not np.isnan(value)


def _said(value: Any, style: str) -> str:
    return format(value, style) if _known(value) else ""


def measure(folder: Path, game: str, config: CompareConfig, sampler: SamplerConfig, out: Path) -> None:
    """Measure one game (needs procgen) and store the figures in the bundle as its card.

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
    asked = {"policy": config.policy, "levels": list(config.levels), "seed": config.seed}
    update_card(folder, result.figures | asked, game)


def write_tables(file: Path, tables: dict[str, str]) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a file, of each table that it has room for.

    Raises:
        ConfigError: it cannot be read, or has room for none of `_TABLES`.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    rooms = {name: (f"<!-- {name} -->", f"<!-- /{name} -->") for name in _TABLES}
    rooms = {
        name: (begin, end)
        for name, (begin, end) in rooms.items()
        if text.count(begin) == 1 == text.count(end) and text.index(begin) < text.index(end)
    }
    check(bool(rooms), f"{file}: has no room for a table, <!-- {next(iter(_TABLES))} --> and then its end")
    for name, (begin, end) in rooms.items():
        if name in tables:
            text = f"{text.split(begin)[0]}{begin}\n{tables[name]}\n{end}{text.split(end)[1]}"
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(
    files: tyro.conf.Positional[list[Path]],
    games: tuple[str, ...] = (),
    out: Path = Path("out/games"),
    clips: int = SETTINGS.clips,
    nfe: int = 1,
    again: bool = False,
) -> None:
    """Measure embedded games that are not measured yet, and write the tables.

    Args:
        files: Markdown files with markers: games-pictures, games-playing, games-short.
        games: which are measured anew; by default those without a card. The tables show all that have one.
        out: folder for reports.
        clips: held-out clips.
        nfe: network function evaluations per step.
        again: measure all of them anew.
    """
    embedded = embedded_games()
    for name in games:
        check(name in embedded, f"games {name}: not embedded; {', '.join(embedded)} are")
    config = replace(SETTINGS, clips=clips)
    for file in files:
        write_tables(file, {})
    for name in games or embedded:
        if again or games or not load_bundle(embedded[name], "cpu", game=name).card:
            measure(embedded[name], name, config, SamplerConfig(nfe=nfe), out)
    cards = {name: load_bundle(folder, "cpu", game=name).card for name, folder in embedded.items()}
    cards = {name: card for name, card in cards.items() if card}
    tables = {name: games_table(cards, columns) for name, columns in _TABLES.items()}
    for file in files:
        write_tables(file, tables)


if __name__ == "__main__":
    run_command_line(main)
