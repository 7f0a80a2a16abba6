"""Pictures, plots and videos of frames. Needs the `play` extra (pillow, av, matplotlib), imported where used."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dreamenv.artifacts import atomic_file


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Repeat pixels of uint8 (..., H, W, 3) to (..., scale * H, scale * W, 3)."""
    return frames.repeat(scale, -3).repeat(scale, -2)


def save_grid(path: Path, rows: list[np.ndarray], scale: int = 2) -> None:
    """Write rows of frames, each uint8 (T, 64, 64, 3), as one PNG, enlarged by whole pixels."""
    from PIL import Image

    picture = np.concatenate([np.concatenate(list(r), 1) for r in rows], 0)
    with atomic_file(path) as temporary:
        Image.fromarray(enlarge(picture, scale)).save(temporary, format="png")


def side_by_side(columns: dict[str, np.ndarray], scale: int = 4, gap: int = 8) -> np.ndarray:
    """Compose labelled columns of equally many frames, each uint8 (T, 64, 64, 3), into one film uint8 (T, H, W, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    width, top = 64 * scale, 24
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
        film[:, top : top + width, left : left + width] = enlarge(frames[:length], scale)
    return film


def save_video(path: Path, film: np.ndarray, fps: int = 15) -> None:
    """Write uint8 (T, H, W, 3) as .mp4 (H.264; odd sizes lose a row or column) or .gif, by the path's ending."""
    film = film[:, : film.shape[1] // 2 * 2, : film.shape[2] // 2 * 2]
    with atomic_file(path) as temporary:
        if path.suffix == ".gif":
            from PIL import Image

            images = [Image.fromarray(f).quantize(256, dither=Image.Dither.NONE) for f in film]
            images[0].save(temporary, format="gif", save_all=True, append_images=images[1:], duration=round(1000 / fps),
                           loop=0, optimize=False)  # fmt: skip
            return
        import av

        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height = film.shape[2], film.shape[1]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "18", "preset": "veryfast"}
            for picture in film:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
            container.mux(stream.encode(None))


def save_horizon_plot(path: Path, curves: dict[str, np.ndarray], title: str) -> None:
    """Plot PSNR in dB, each curve (H,), against the number of steps dreamt, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    for name, curve in curves.items():
        axes.plot(np.arange(1, len(curve) + 1), curve, label=name)
    axes.set(xlabel="steps dreamt without looking", ylabel="PSNR against the real game, dB", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
