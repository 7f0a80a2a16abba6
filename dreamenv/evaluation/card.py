"""The fidelity table, made from a bundle's card; `python -m dreamenv.evaluation.card FILE.md` writes it in place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dreamenv.artifacts import atomic_file
from dreamenv.bundle import load_bundle, resolve_bundle
from dreamenv.errors import ConfigError

_BEGIN, _END = "<!-- fidelity -->", "<!-- /fidelity -->"


def fidelity_table(card: dict[str, Any]) -> str:
    """Markdown of the main figures of a card, as `dreamenv compare --card` stores them, beside published ones.

    Raises:
        ConfigError: the card lacks a figure: it is empty, or an older release measured it.
    """
    rows: list[tuple[str, str, str, str, str]] = []
    sampled = card.get("nfe", 1) > 1

    def add(what: str, dream: str, mean: str = "", copy: str = "", published: str = "") -> None:
        rows.append((what, dream, mean, copy, published))

    try:
        for h in (h for h in (1, 5, 10, 30, 50) if f"psnr_{h}" in card):
            mean = f"{card[f'predictor_psnr_{h}']:.2f}" if sampled else ""
            copied = f"{card[f'copy_psnr_{h}']:.2f}"
            steps = f"{h} step" if h == 1 else f"{h} steps"
            add(f"PSNR after {steps}, dB", f"{card[f'psnr_{h}']:.2f}", mean, copied)
        named = {
            "psnr_mean_10": "mean of the clips' PSNR, dB",
            "ssim_10": "SSIM",
            "psnr_moving_10": "PSNR of moving pixels, dB",
            "detail_10": "detail kept (1 is all)",
        }
        for key, name in named.items():
            mean = f"{card[f'predictor_{key}']:.2f}" if sampled else ""
            add(f"{name}, 10 steps", f"{card[key]:.2f}", mean, f"{card[f'copy_{key}']:.2f}")
        mean = f"{card['predictor_perceptual_10']:.3f}" if sampled else ""
        add(
            "perceptual distance, 10 steps (0 is equal, 2 the most)",
            f"{card['perceptual_10']:.3f}",
            mean,
            f"{card['copy_perceptual_10']:.3f}",
        )
        add(
            "random player: PSNR after 10 steps, dB (mean of clips)",
            f"{card['random_psnr_10']:.2f} ({card['random_psnr_mean_10']:.2f})",
        )
        add(
            "random player: mean PSNR of all frames up to the 10th, dB (the mix of players)",
            f"{card['random_psnr_frames']:.2f} ({card['psnr_frames']:.2f})",
            published="GenieRedux, guided: 38.31; Jafar: 12.66",
        )
        add(
            "the same from one frame of context",
            f"{card['random_one_frame_psnr_frames']:.2f}",
            published="GenieRedux, guided: 34.44",
        )
        add(
            "autoencoder alone, dB (rare colours)",
            f"{card['autoencoder_psnr']:.2f} ({card['autoencoder_psnr_rare']:.2f})",
            published="GenieRedux tokenizer: 38.25",
        )
        add(
            "delta-PSNR, 4 steps, dB (random player)",
            f"{card['delta_psnr_4']:.2f} ({card['random_delta_psnr_4']:.2f})",
            published="GenieRedux: 1.89",
        )
        add(
            f"branches nearest their own real one, {card['branch_steps']} steps",
            f"{card['branch_accuracy']:.1%} (guessing: {card['branch_chance']:.1%})",
        )
        add("best time shift of frames / actions (0 is right)", f"{card['frame_offset']} / {card['action_offset']}")
        for key in sorted(k[:-3] for k in card if k.endswith("_ap") and not k.startswith("drifted_")):
            if card[f"{key}_ap"] is None or card[f"drifted_{key}_ap"] is None:
                continue
            add(
                f"{key.replace('_', ' ')}: average precision (after {card['drift']} dreamt steps; base rate)",
                f"{card[f'{key}_ap']:.3f} ({card[f'drifted_{key}_ap']:.3f}; {card[f'{key}_base_rate']:.2%})",
            )
        add(
            "end of episode: calibration error (where likely)",
            f"{card['end_calibration_error']:.4f} ({card['end_calibration_error_likely']:.3f})",
        )
        add(
            f"value of {len(card['closed_loop_policies'])} policies, dream against real: Pearson",
            f"{card['closed_loop_pearson']:.2f} ({_interval(card['closed_loop_pearson_ci'])})",
            published="WorldGym: 0.78",
        )
        add("the same: Spearman", f"{card['closed_loop_spearman']:.2f} ({_interval(card['closed_loop_spearman_ci'])})")
        add("the same: mean absolute error of the return", f"{card['closed_loop_mean_absolute_error']:.2f}")
        add(
            f"{card['endless_dreams']} dreams of {card['endless_steps']:,} steps: share that diverged",
            f"{card['endless_diverged']:.0%}",
        )
        add("uncertainty against the true error, Spearman", f"{card['uncertainty_error_spearman']:.2f}")
    except KeyError as error:
        raise ConfigError(
            f"card: has no figure {error}; measure it anew with dreamenv compare --thorough --card"
        ) from None
    head = (
        f"{card['clips']} clips, levels {card['levels'][0]}-{sum(card['levels']) - 1}",
        f"dream, {card['nfe']} NFE",
        "its mean, 1 NFE",
        "copy last frame",
        "published",
    )
    columns = [0, 1, 2, 3, 4] if sampled else [0, 1, 3, 4]  # one evaluation is the mean
    return "\n".join("| " + " | ".join(row[c] for c in columns) + " |" for row in (head, ("---",) * 5, *rows))


def _interval(pair: list[float]) -> str:
    return f"{pair[0]:.2f} to {pair[1]:.2f}"


def write_table(path: Path, card: dict[str, Any]) -> None:
    """Replace the table between the markers of a Markdown file.

    Raises:
        ConfigError: it has no markers.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise ConfigError(f"{path}: needs one {_BEGIN} and one {_END}")
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    with atomic_file(path) as temporary:
        temporary.write_text(f"{before}{_BEGIN}\n{fidelity_table(card)}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]), load_bundle(resolve_bundle(None, "coinrun"), "cpu").card)
