"""What a picture of the game looks like to a model: 64 x 64 RGB as Procgen draws it, or grey and of another size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dreamenv.config import check, whole

NATIVE = (64, 64, 3)
"""(H, W, C) of Procgen's own pictures."""
_LUMINANCE = np.array([0.2125, 0.7154, 0.0721])  # of Gymnasium's GrayscaleObservation


def check_frame(frame: Any, name: str = "frame_shape") -> tuple[int, int, int]:
    """Return (H, W, C) as integers; raises `ConfigError` unless it is a square of 16..128 pixels, grey or RGB."""
    valid = isinstance(frame, Sequence) and not isinstance(frame, str) and len(frame) == 3
    check(valid, f"{name} {frame!r}: expected three integers, such as (64, 64, 3)")
    height, width = (whole(n, name, 16, 128) for n in frame[:2])
    channels = whole(frame[2], name, 1, 3)
    check(height == width, f"{name} {frame!r}: must be a square, Procgen's pictures are")
    check(channels in (1, 3), f"{name} {frame!r}: must have 1 channel (grey) or 3 (RGB)")
    return height, width, channels


def observe(frames: np.ndarray, frame: tuple[int, int, int]) -> np.ndarray:
    """Procgen's frames as ones of another shape: grey if that has one channel, then resized.

    To the bit what Gymnasium's `GrayscaleObservation` and `ResizeObservation` make of them.

    Args:
        frames: uint8 (..., 64, 64, 3).
        frame: (H, W, C) of the result.

    Returns:
        uint8 (..., H, W, C); `frames` itself where nothing changes.

    Raises:
        ImportError: they must be resized and OpenCV is not installed.
    """
    if frames.shape[-3:] == frame:
        return frames
    if frame[2] == 1:
        frames = np.sum(np.multiply(frames, _LUMINANCE), axis=-1, keepdims=True).astype(np.uint8)
    if frames.shape[-3:] == frame:
        return frames
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"resizing frames needs OpenCV ({error}): pip install 'dreamenv[procgen]'") from error
    flat = frames.reshape(-1, *frames.shape[-3:])
    out = np.empty((len(flat), *frame), np.uint8)
    for i, picture in enumerate(flat):
        out[i] = cv2.resize(picture, (frame[1], frame[0]), interpolation=cv2.INTER_AREA).reshape(frame)
    return out.reshape(*frames.shape[:-3], *frame)


def as_rgb(frames: np.ndarray) -> np.ndarray:
    """Frames (..., H, W, 1 or 3) -> (..., H, W, 3), to be looked at: grey is equal red, green and blue."""
    return frames if frames.shape[-1] == 3 else np.repeat(frames, 3, -1)
