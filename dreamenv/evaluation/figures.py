"""Pictures, plots and videos of frames. Needs the `play` extra (pillow, av, matplotlib), imported where used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dreamenv.artifacts import atomic_file
from dreamenv.contract.frames import as_rgb


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Repeat pixels of uint8 (..., H, W, 3) to (..., scale * H, scale * W, 3)."""
    return frames.repeat(scale, -3).repeat(scale, -2)


def save_grid(path: Path, rows: list[np.ndarray], scale: int = 2) -> None:
    """Write rows of frames, each uint8 (T, h, w, 1 or 3), as one PNG, enlarged by whole pixels."""
    from PIL import Image

    picture = as_rgb(np.concatenate([np.concatenate(list(r), 1) for r in rows], 0))
    with atomic_file(path) as temporary:
        Image.fromarray(enlarge(picture, scale)).save(temporary, format="png")


def side_by_side(columns: dict[str, np.ndarray], scale: int = 4, gap: int = 8) -> np.ndarray:
    """Compose labelled columns of as many frames, each uint8 (T, h, h, 1 or 3), into one film uint8 (T, H, W, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    width, top = next(iter(columns.values())).shape[-2] * scale, 24
    length = min(len(f) for f in columns.values())
    film = np.full((length, top + width + gap, len(columns) * (width + gap) + gap, 3), 24, np.uint8)
    header = Image.fromarray(film[0])
    draw = ImageDraw.Draw(header)
    font = ImageFont.load_default(size=14)
    for i, name in enumerate(columns):
        draw.text((gap + i * (width + gap), 4), name, fill=(230, 230, 230), font=font)
    film[:] = np.asarray(header)
    for i, frames in enumerate(columns.values()):
        left = gap + i * (width + gap)
        film[:, top : top + width, left : left + width] = enlarge(as_rgb(frames[:length]), scale)
    return film


def save_plot(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (7, 4)) -> None:
    """Make a PNG of one Matplotlib axes that `draw` fills."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, dpi=110)
    draw(axes)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


def save_horizon_plot(path: Path, curves: dict[str, np.ndarray], title: str) -> None:
    """Plot PSNR in dB, each curve (H,), against the number of steps dreamt, as PNG."""

    def draw(axes: Any) -> None:
        for name, curve in curves.items():
            axes.plot(np.arange(1, len(curve) + 1), curve, label=name)
        axes.set(xlabel="steps dreamt without looking", ylabel="PSNR against the real game, dB", title=title)
        axes.legend()

    save_plot(path, draw)


def save_calibration_plot(path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Plot frequency against confidence, see `dreamenv.evaluation.metrics.calibration_curve`, as PNG."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="grey", lw=1)
        for name, (confidence, frequency, _) in curves.items():
            axes.plot(confidence, frequency, "o-", label=name)
        axes.set(xlabel="predicted probability that the episode ends", ylabel="how often it did", title="calibration")
        axes.legend()

    save_plot(path, draw, (5, 4))


def save_value_plot(path: Path, policies: list[dict[str, Any]]) -> None:
    """Scatter each policy's dream value against its real value, with intervals, as PNG; see `closed_loop.agreement`."""

    def draw(axes: Any) -> None:
        for row in policies:
            x, y = row["real_return"], row["dream_return"]
            spread = [
                [[v - row[f"{w}_return_ci"][0]], [row[f"{w}_return_ci"][1] - v]] for w, v in (("real", x), ("dream", y))
            ]
            axes.errorbar(x, y, xerr=np.maximum(spread[0], 0), yerr=np.maximum(spread[1], 0), fmt="o", capsize=2, ms=4)
            axes.annotate(row["policy"], (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
        values = [row[f"{world}_return"] for row in policies for world in ("real", "dream")]
        span = [1.1 * min([0.0, *values]), 1.1 * max([1.0, *values])]
        axes.plot(span, span, color="grey", lw=1)
        axes.set(xlabel="mean return in the real game", ylabel="mean return in the dream", title="value of policies")

    save_plot(path, draw, (5, 4.5))


def save_endless_plot(path: Path, endless: dict[str, Any]) -> None:
    """Plot a long dream's statistics relative to those of real frames, as PNG; see `stability.endless`."""

    def draw(axes: Any) -> None:
        for name in ("latent_rms", "detail", "brightness"):
            axes.plot(endless["step"], endless[name] / endless[f"real_{name}"], label=name.replace("_", " "))
        axes.axhline(1, color="grey", lw=1)
        axes.set(
            xlabel="steps without a reset", ylabel="relative to real frames", title="endless dream", ylim=(0, None)
        )
        axes.legend()

    save_plot(path, draw)
