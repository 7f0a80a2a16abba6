"""The fidelity table, made from a bundle's card; `python -m dreamenv.evaluation.card FILE.md` writes it in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamenv.bundle import load_bundle, resolve_bundle
from dreamenv.console import run_command_line
from dreamenv.contract.games import get_game
from dreamenv.errors import ConfigError
from dreamenv.evaluation.pages import write_tables


def fidelity_table(card: dict[str, Any], game: str) -> str:
    """Markdown of the main figures of a game's card, as `dreamenv compare --card` stores them, beside published ones.

    Raises:
        ConfigError: the card lacks a figure: it is empty, or an older release measured it.
    """
    sampled = card.get("nfe", 1) > 1
    try:
        published = get_game(game).published
        rows = [*_open_loop(card, sampled), *_others(card, published)]
        levels = card["levels"]
        head = (
            f"{card['clips']} clips, levels {levels[0]}-{sum(levels) - 1}",
            f"dream, {card['nfe']} NFE",
            "its mean, 1 NFE",
            "copy last frame",
            "published",
        )
    except KeyError as error:
        raise ConfigError(
            f"card: has no figure {error}; measure it anew with dreamenv compare --thorough --card"
        ) from None
    columns = [0, 1, *([2] if sampled else []), 3, *([4] if published else [])]  # one evaluation is the mean
    return "\n".join("| " + " | ".join(row[c] for c in columns) + " |" for row in (head, ("---",) * 5, *rows))


Row = tuple[str, str, str, str, str]
_NAMED = {
    "psnr_mean_10": ("mean of the clips' PSNR, dB, 10 steps", ".2f"),
    "ssim_10": ("SSIM, 10 steps", ".2f"),
    "psnr_moving_10": ("PSNR of moving pixels, dB, 10 steps", ".2f"),
    "detail_10": ("detail kept (1 is all), 10 steps", ".2f"),
    "perceptual_10": ("perceptual distance, 10 steps (0 is equal, 2 the most)", ".3f"),
}


def _open_loop(card: dict[str, Any], sampled: bool) -> list[Row]:
    """Rows that stand beside the mean's and those of copying."""
    horizons = [h for h in (1, 5, 10, 30, 50) if f"psnr_{h}" in card]
    named = {f"psnr_{h}": (f"PSNR after {h} {'step' if h == 1 else 'steps'}, dB", ".2f") for h in horizons} | _NAMED
    return [
        (
            name,
            format(card[key], style),
            format(card[f"predictor_{key}"], style) if sampled else "",
            format(card[f"copy_{key}"], style),
            "",
        )
        for key, (name, style) in named.items()
    ]


def _others(card: dict[str, Any], published: dict[str, str]) -> list[Row]:
    """Rows of one figure each, beside published ones."""
    c = card
    rows = [
        ("random player: PSNR after 10 steps, dB", f"{c['random_psnr_10']:.2f}"),
        ("random player: mean of the clips' PSNR, dB, 10 steps", f"{c['random_psnr_mean_10']:.2f}"),
        ("mean PSNR of all frames up to the 10th, dB", f"{c['psnr_frames']:.2f}"),
        ("the same, random player", f"{c['random_psnr_frames']:.2f}", "random_psnr_frames"),
        (
            "the same, random player, from one frame of context",
            f"{c['random_one_frame_psnr_frames']:.2f}",
            "random_one_frame_psnr_frames",
        ),
        ("autoencoder alone, dB", f"{c['autoencoder_psnr']:.2f}", "autoencoder_psnr"),
        ("autoencoder alone, pixels of rare colours, dB", f"{c['autoencoder_psnr_rare']:.2f}"),
        ("delta-PSNR, 4 steps, dB", f"{c['delta_psnr_4']:.2f}", "delta_psnr_4"),
        ("delta-PSNR, 4 steps, dB, random player", f"{c['random_delta_psnr_4']:.2f}"),
        (
            f"futures matched to the real future of the same action, {c['branch_steps']} steps",
            f"{c['branch_accuracy']:.1%}",
        ),
        ("the same by guessing", f"{c['branch_chance']:.1%}"),
        ("best time shift of frames (0 is right)", str(c["frame_offset"])),
        ("best time shift of actions (0 is right)", str(c["action_offset"])),
        *_outcomes(c),
        ("end of episode: calibration error", f"{c['end_calibration_error']:.4f}"),
        ("end of episode, where it is likely: calibration error", f"{c['end_calibration_error_likely']:.3f}"),
        (
            f"value of {len(c['closed_loop_policies'])} policies, dream against real: Pearson, 95 % interval",
            _correlation(c, "pearson"),
            "closed_loop_pearson",
        ),
        ("the same: Spearman, 95 % interval", _correlation(c, "spearman")),
        ("the same: mean absolute error of the return", f"{c['closed_loop_mean_absolute_error']:.2f}"),
        (
            f"{c['endless_dreams']} dreams of {c['endless_steps']:,} steps: share that diverged",
            f"{c['endless_diverged']:.0%}",
        ),
        ("uncertainty against the true error, Spearman", f"{c['uncertainty_error_spearman']:.2f}"),
        *_samples(c),
    ]
    return [(row[0], row[1], "", "", published.get(row[2], "") if len(row) > 2 else "") for row in rows]


def _samples(card: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of several dreams of each clip, where the model draws samples."""
    if "samples" not in card:
        return []
    what = f"of {card['samples']} samples by {card['samples_nfe']} evaluations, dB, {card['samples_horizon']} steps"
    names = (
        ("best", "samples_best_psnr"),
        ("average", "samples_mean_psnr"),
        ("one the model is surest of", "samples_selected_psnr"),
    )
    return [(f"PSNR of the {name} {what}", f"{card[key]:.2f}") for name, key in names]


def _outcomes(card: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of each outcome that occurred on real and on dreamt contexts."""
    keys = sorted(k[:-3] for k in card if k.endswith("_ap") and not k.startswith("drifted_"))
    own = [key for key in keys if key.startswith("reward_")]
    if "reward" in keys and len(own) == 1 and card[f"{own[0]}_events"] == card["reward_events"]:
        keys.remove("reward")  # all rewards are that one
    rows = []
    for key in keys:
        if card[f"{key}_ap"] is not None and card[f"drifted_{key}_ap"] is not None:
            name = key.replace("_", " ")
            rows += [
                (f"{name}: average precision", f"{card[f'{key}_ap']:.3f}"),
                (f"{name}: average precision after {card['drift']} dreamt steps", f"{card[f'drifted_{key}_ap']:.3f}"),
                (f"{name}: share of steps, which is what guessing scores", f"{card[f'{key}_base_rate']:.2%}"),
            ]
    return rows


def _correlation(card: dict[str, Any], name: str) -> str:
    """A correlation of values with its interval; nothing where it is not defined."""
    value = card[f"closed_loop_{name}"]
    if value is None:
        return ""
    low, high = card[f"closed_loop_{name}_ci"]
    return f"{value:.2f}, {low:.2f} to {high:.2f}"


def write_table(path: Path, card: dict[str, Any], game: str, distribution_mode: str = "easy") -> None:
    """Replace the table between the markers of a Markdown file by that of a game's card in a difficulty.

    The markers are `fidelity`, or of another difficulty than easy for example `fidelity-hard`.

    Raises:
        ConfigError: it has no markers.
    """
    marker = "fidelity" if distribution_mode == "easy" else f"fidelity-{distribution_mode}"
    write_tables(path, {marker: fidelity_table(card, game)})


def main(file: Path, game: str, distribution_mode: str = "easy") -> None:
    """Write the table of a game's embedded bundle into a file.

    Args:
        file: a Markdown file with the two markers.
        game: which game.
        distribution_mode: Procgen's difficulty.
    """
    folder = resolve_bundle(None, game, distribution_mode)
    write_table(file, load_bundle(folder, "cpu", game=game).card, game, distribution_mode)


if __name__ == "__main__":
    run_command_line(main, positional=True)
