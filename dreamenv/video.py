"""Films: uint8 frames to an .mp4 (H.264) or a .gif, through imageio's PyAV and Pillow plugins (extra `play`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from dreamenv.artifacts import atomic_file
from dreamenv.config import check

_NEEDS = {".mp4": {"imageio": "imageio", "av": "av"}, ".gif": {"imageio": "imageio", "pillow": "PIL"}}
"""Of each kind of film, the distributions that write it and their modules."""


def check_film(path: Path) -> None:
    """Raise `ConfigError` unless a film's path ends in .mp4 or .gif, and the packages that write it are there."""
    check(path.suffix in _NEEDS, f"film {path}: must end in {' or '.join(_NEEDS)}")
    missing = [name for name, module in _NEEDS[path.suffix].items() if find_spec(module) is None]
    check(not missing, f"film {path}: needs {', '.join(missing)}: pip install 'dreamenv[play]'")


def save_video(path: Path, frames: Iterable[np.ndarray], fps: float = 15) -> int:
    """Write frames as they come; the file appears, whole, when they end.

    Args:
        path: ending in .mp4 or .gif. H.264 has no odd sizes: a last odd row or column is left out.
        frames: each uint8 (H, W, 3). One of another size than the first is padded with black or cut at the right and
            bottom.
        fps: frames per second.

    Returns:
        How many there were; with none there is no file.

    Raises:
        ConfigError: another ending, or a package is missing.
    """
    check_film(path)
    pictures = _fitted(frames)
    first = next(pictures, None)
    if first is None:
        return 0
    with atomic_file(path) as temporary:
        return (_gif if path.suffix == ".gif" else _mp4)(temporary, _chain(first, pictures), fps)


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _fitted(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """All of the first one's even size, contiguous."""
    size: tuple[int, int] | None = None
    for frame in frames:
        size = size or (frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2)
        frame = frame[: size[0], : size[1]]
        missing = [(0, wanted - found) for wanted, found in zip(size, frame.shape[:2], strict=True)]
        yield np.ascontiguousarray(np.pad(frame, (*missing, (0, 0))) if any(b for _, b in missing) else frame)


def _mp4(path: Path, frames: Iterator[np.ndarray], fps: float) -> int:
    import imageio.v3 as iio

    count = 0
    with iio.imopen(path, "w", plugin="pyav", extension=".mp4") as file:
        file.init_video_stream("libx264", fps=fps, pixel_format="yuv420p")
        for frame in frames:
            file.write_frame(frame)
            count += 1
    return count


def _gif(path: Path, frames: Iterator[np.ndarray], fps: float) -> int:
    import imageio.v3 as iio

    film = np.stack(list(frames))
    iio.imwrite(path, film, plugin="pillow", extension=".gif", duration=round(1000 / fps), loop=0, optimize=False)
    return len(film)
