"""Pictures and videos of frames: rows of uint8 (T, 64, 64, 3)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dreamenv.artifacts import atomic_file


def save_grid(path: Path, rows: list[np.ndarray], scale: int = 2) -> None:
    """Write rows of frames, each uint8 (T, 64, 64, 3), as one PNG, enlarged by whole pixels."""
    from PIL import Image

    picture = np.concatenate([np.concatenate(list(r), 1) for r in rows], 0)
    picture = picture.repeat(scale, 0).repeat(scale, 1)
    with atomic_file(path) as temporary:
        Image.fromarray(picture).save(temporary, format="png")
