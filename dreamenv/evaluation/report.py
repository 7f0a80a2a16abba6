"""A comparison written to a folder: figures, tables, pictures, films, and one HTML page that opens offline."""

from __future__ import annotations

import base64
import csv
import html
import re
from pathlib import Path
from typing import Any

import numpy as np

from dreamenv.artifacts import atomic_file, write_json
from dreamenv.bundle import Bundle
from dreamenv.config import to_dict
from dreamenv.evaluation.compare import CompareConfig
from dreamenv.evaluation.figures import (
    save_calibration_plot,
    save_endless_plot,
    save_grid,
    save_horizon_plot,
    save_value_plot,
    side_by_side,
)
from dreamenv.evaluation.open_loop import Comparison
from dreamenv.evaluation.outcomes import outcome_confusion, outcome_curve
from dreamenv.video import save_video

_SHOWN = (1, 3, 5, 10, 15, 20, 30, 40, 50, 75, 100)
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:14px;margin:1em 0}
td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img,video{max-width:100%;image-rendering:pixelated}
img.plot{image-rendering:auto;max-width:38em}.note{color:#666;font-size:14px}"""


def save_comparison(out: Path, bundle: Bundle, config: CompareConfig, result: Comparison) -> Path:
    """Write everything a comparison found into `out`; returns the page's path.

    Files: metrics.json, open_loop.csv, policies.csv, horizon.png, film_strip.png, side_by_side.mp4, calibration.png,
    branches.png, policies.png, endless.png, endless_frames.png (as far as it was measured), and report.html.
    """
    model, figures = bundle.world_model, result.figures
    curves = {k: [round(float(v), 3) for v in curve] for k, curve in result.curves.items()}
    everything = {"bundle": bundle.identity, "config": to_dict(config), "figures": figures, "curves": curves}
    write_json(out / "metrics.json", everything)
    _save_csv(out / "open_loop.csv", result.table)
    k, horizon = result.clips.context, result.clips.horizon
    motion = np.abs(np.diff(result.clips.frames[:, ::4].astype(np.int16), axis=1)).mean((1, 2, 3, 4))
    lively = np.argsort(-motion, kind="stable")
    # every other one is a clip in which much moves, the rest are as they came
    shown = list(dict.fromkeys(i for pair in zip(lively[:4], range(4), strict=False) for i in pair))
    steps = np.array([s for s in _SHOWN if s <= horizon])
    real = result.clips.frames[:, k:]
    save_grid(out / "film_strip.png", [x[i][steps - 1] for i in shown for x in (real, result.dream)])
    start = result.clips.frames[:, :k]
    worlds = {"real": real, "dream": result.dream}
    films = [side_by_side({n: np.concatenate([start[i], x[i]]) for n, x in worlds.items()}, 3) for i in shown[:4]]
    save_video(
        out / "side_by_side.mp4",
        np.concatenate([np.concatenate(films[:2], 2), np.concatenate(films[2:4], 2)], 1)
        if len(films) == 4
        else films[0],
    )
    save_horizon_plot(
        out / "horizon.png", result.curves, f"{bundle.game.name}, {len(real)} clips, {figures['nfe']} NFE"
    )
    curves = {name: outcome_curve(model, scores) for name, scores in result.outcomes.items()}
    if curves:
        save_calibration_plot(out / "calibration.png", curves)
    if result.branches:
        branches, dreamt = result.branches
        save_grid(
            out / "branches.png", [x[i, :, -1] for i in range(min(3, len(dreamt))) for x in (branches.real, dreamt)]
        )
    if result.episodes:
        rows = figures["closed_loop_policies"]
        _save_csv(out / "policies.csv", rows)
        save_value_plot(out / "policies.png", rows)
    if result.endless:
        save_endless_plot(out / "endless.png", result.endless)
        save_grid(out / "endless_frames.png", [row for row in result.endless["frames"] if len(row)])
    page = out / "report.html"
    with atomic_file(page) as temporary:
        temporary.write_text(_page(out, bundle, config, result, steps), encoding="utf-8")
    return page


def _save_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " to ".join(_number(v) for v in value)
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 0.1 and value else f"{value:.2f}"
    return html.escape(str(value))


def table(rows: list[dict[str, Any]], names: dict[str, str]) -> str:
    """HTML table of some columns; `names` maps each row's keys to headings."""
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names.values())
    body = "".join("<tr>" + "".join(f"<td>{_number(row[k])}</td>" for k in names) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def embed(path: Path, alt: str, kind: str = "") -> str:
    """HTML of a PNG or MP4 with its bytes inside, or nothing if there is no such file; `kind` is its CSS class."""
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".mp4":
        return f'<video controls loop muted src="data:video/mp4;base64,{data}"></video>'
    return f'<img class="{kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def document(title: str, parts: list[str]) -> str:
    """One HTML page that needs no other file."""
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return head + "\n".join(parts)


def _page(out: Path, bundle: Bundle, config: CompareConfig, result: Comparison, steps: np.ndarray) -> str:
    parts = _seen(out, bundle, config, result, steps)
    if "delta_psnr_4" in result.figures:
        parts += _controllability(out, result.figures)
    if result.outcomes:
        parts += _outcomes(out, bundle, config, result)
    if result.episodes:
        parts += _closed_loop(out, result)
    if result.endless:
        parts += _endless(out, result)
    return document(f"{bundle.game.name}: dream against reality", parts)


def _seen(out: Path, bundle: Bundle, config: CompareConfig, result: Comparison, steps: np.ndarray) -> list[str]:
    """Films, strips and the open loop."""
    f = result.figures
    first, last = config.levels[0], config.levels[0] + config.levels[1] - 1
    return [
        f"<h1>{html.escape(bundle.game.name)}: the dream against the real game</h1>",
        f"<p>{f['clips']} real clips on levels {first} to {last}, played by <code>{html.escape(config.policy)}</code>. "
        f"The dream sees {f['context']} real frames and then only the actions; {f['nfe']} network evaluations a step, "
        f"solver {f['solver']}, temperature {f['temperature']:g}, seed {config.seed}.</p>"
        f"<p class=note>Bundle {bundle.identity[:16]}, {html.escape(bundle.game.distribution_mode)} mode.</p>",
        "<h2>What it looks like</h2>",
        embed(out / "side_by_side.mp4", ""),
        f"<p>Upper rows real, lower rows dreamt; steps {', '.join(map(str, steps))}.</p>",
        embed(out / "film_strip.png", "film strip"),
        "<h2>Open loop</h2>",
        embed(out / "horizon.png", "PSNR by step", "plot"),
        table(
            result.table,
            {
                "what": "",
                "step": "step",
                "psnr": "PSNR",
                "psnr_mean": "mean of clips' PSNR",
                "ssim": "SSIM",
                "psnr_moving": "moving pixels",
                "psnr_still": "still pixels",
                "psnr_rare": "rare colours",
                "detail": "detail",
                "perceptual": "perceptual distance",
            },
        ),
        "<p class=note>PSNR in dB, of the mean squared error over all clips unless it says otherwise. Detail is the "
        "mean difference of neighbouring pixels relative to the real frames': 1 is as crisp, less is fog. The "
        "perceptual distance compares EfficientNet-Lite0 features: 0 is equal, 2 as far as can be; neither LPIPS nor "
        "FID.</p>",
        *_chance(f),
        f"<p>Fréchet distance of the dreamt frames' features from the real ones': {_number(f.get('frechet'))}.</p>",
        *(
            [
                f"<p>{config.samples} samples of each clip, {f['samples_horizon']} steps: "
                f"mean {f['samples_mean_psnr']:.2f} dB, "
                f"best {f['samples_best_psnr']:.2f} dB; they differ by a mean squared error "
                f"of {f['samples_diversity']:.4f}.</p>"
            ]
            if "samples_horizon" in f
            else []
        ),
        f"<p>The model's own uncertainty ranks the error of its first step with Spearman "
        f"{f['uncertainty_error_spearman']:.2f}.</p>",
    ]


def _chance(f: dict[str, Any]) -> list[str]:
    """How far the game's own chance lets its pictures be told."""
    best = {key.rpartition("_")[2]: v for key, v in f.items() if re.fullmatch(r"chance_psnr_\d+", key)}
    if not best:
        return []
    said = ", ".join(f"{value:.1f} dB after {step}" for step, value in best.items())
    return [
        f"<p>The real game was run again from {f['chance_moments']} moments with the same actions and other random "
        f"numbers. No model can do better there, on average, than {said} steps. A model that sees only pictures may "
        "reach less: what the game has decided already, though it shows it later, is the same in all runs.</p>"
    ]


def _controllability(out: Path, f: dict[str, Any]) -> list[str]:
    """Whether the dream does what it is told."""
    return [
        "<h2>Does it do what it is told?</h2>",
        f"<p>Under random instead of the true actions PSNR falls by {f['delta_psnr_4']:.2f} dB after 4 steps "
        "(delta-PSNR). On clips of a random player the PSNR itself is "
        f"{f['random_psnr_1']:.2f} dB after one step and {f['random_psnr_10']:.2f} dB after ten (mean of clips "
        f"{f['random_psnr_mean_10']:.2f} dB; from one frame of context "
        f"{f['random_one_frame_psnr_10']:.2f} dB; the mean PSNR of all frames up to the tenth, as GenieRedux states "
        "it, "
        f"{f['random_psnr_frames']:.2f} dB, from one frame {f['random_one_frame_psnr_frames']:.2f} dB), and "
        "random actions "
        "other than its own cost "
        f"{f['random_delta_psnr_4']:.2f} dB after four.</p>",
        f"<p>{f['branches']} real moments, branched under every distinct action for {f['branch_steps']} steps: of "
        f"the dreamt branches, {f['branch_accuracy']:.1%} lie nearest to their own real branch "
        f"(guessing: {f['branch_chance']:.1%}; {f['branch_distinct']:.1f} different pictures a moment).</p>",
        f"<p>On the random player's clips, best time shift of the actions: {f['action_offset']}, of the frames: "
        f"{f['frame_offset']} (0 is right).</p>",
        "<p>Three moments, one column for each action: upper rows real, lower rows dreamt.</p>",
        embed(out / "branches.png", "branches"),
    ]


def _outcomes(out: Path, bundle: Bundle, config: CompareConfig, result: Comparison) -> list[str]:
    """What the head says of reward and end, on real and on dreamt contexts."""
    f, model = result.figures, bundle.world_model
    parts = ["<h2>Reward and end of the episode</h2>", embed(out / "calibration.png", "calibration", "plot")]
    names = [f"reward {r:g}{', end' if t else ''}" for r, t in zip(model.rewards, model.terminated, strict=True)]
    for name, scores in result.outcomes.items():
        prefix = "drifted_" if name == "drifted" else ""
        keys = [
            k[len(prefix) : -3]
            for k in f
            if k.startswith(prefix) and k.endswith("_ap") and k.startswith("drifted_") == bool(prefix)
        ]
        rows = [{"what": k} | {c: f[f"{prefix}{k}_{c}"] for c in ("ap", "base_rate", "events")} for k in keys]
        title = f"contexts dreamt for {config.drift} steps" if prefix else "real contexts"
        parts.append(
            f"<h3>On {title}</h3>"
            + table(rows, {"what": "", "ap": "average precision", "base_rate": "base rate", "events": "events"})
        )
        matrix = outcome_confusion(model, scores)
        parts.append(
            table(
                [
                    {"what": f"really {n}"} | {str(j): float(v) for j, v in enumerate(row)}
                    for n, row in zip(names, matrix, strict=True)
                ],
                {"what": "steps"} | {str(j): f"said {n}" for j, n in enumerate(names)},
            )
        )
    return parts


def _closed_loop(out: Path, result: Comparison) -> list[str]:
    """Values of policies in both worlds."""
    f = result.figures

    def said(key: str) -> str:
        value = f[f"closed_loop_{key}"]
        return "unknown, all are the same" if value is None else f"{value:.2f} ({_number(f[f'closed_loop_{key}_ci'])})"

    return [
        "<h2>Closed loop</h2>",
        f"<p>{len(result.episodes)} policies, {f['closed_loop_episodes']} episodes each from the same first frames, "
        f"cut off after {f['closed_loop_limit']} steps. Value in the dream against value in the game: Pearson "
        f"{said('pearson')}, Spearman {said('spearman')}, mean absolute error "
        f"{f['closed_loop_mean_absolute_error']:.2f}; 95 % bootstrap intervals.</p>",
        embed(out / "policies.png", "values", "plot"),
        table(
            f["closed_loop_policies"],
            {
                "policy": "policy",
                "real_return": "real return",
                "real_return_ci": "95 %",
                "dream_return": "dream return",
                "dream_return_ci": "95 %",
                "real_length": "real length",
                "dream_length": "dream length",
                "real_success": "real success",
                "dream_success": "dream success",
            },
        ),
    ]


def _endless(out: Path, result: Comparison) -> list[str]:
    """Dreams without a reset."""
    f, endless = result.figures, result.endless or {}
    return [
        "<h2>Endless dream</h2>",
        f"<p>{f['endless_dreams']} dreams of {f['endless_steps']} steps of random play without a reset: "
        f"{f['endless_diverged']:.0%} of them left the trained range. Frames after "
        f"{', '.join(map(str, endless['shown']))} steps, one row for each dream:</p>",
        embed(out / "endless_frames.png", "frames"),
        embed(out / "endless.png", "statistics", "plot"),
    ]
