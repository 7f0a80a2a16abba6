"""Checks of `reset`'s arguments, shared by both worlds: they raise `ResetError` before anything changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.errors import ResetError


def as_array(value: Any, name: str) -> np.ndarray:
    """Return `value` as an array; raises `ResetError` where NumPy cannot."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ResetError(f"{name}: not an array ({error})") from None


def check_options(options: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """Return the options as a new dict; raises `ResetError` for an unknown one."""
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ResetError(f"options {options!r}: expected a dict")
    if unknown := set(options) - set(known):
        raise ResetError(
            f"reset option {sorted(map(str, unknown))[0]!r}: unknown; there are {', '.join(known) or 'none'}"
        )
    return dict(options)


def check_seeds(seed: Any, n: int, limit: int) -> list[int | None]:
    """Return one seed or None per environment: an int gives seed + i to environment i.

    Raises:
        ResetError: not an integer in 0..limit - 1, another number of them, or another type.
    """
    if isinstance(seed, np.ndarray) and seed.ndim == 0:
        seed = seed[()]
    if seed is None or (isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)):
        seeds: list[Any] = [None if seed is None else int(seed) + i for i in range(n)]
    elif isinstance(seed, (list, tuple, np.ndarray)):
        seeds = list(seed)
    else:
        raise ResetError(f"seed {seed!r}: expected an integer, {n} of them, or None")
    if len(seeds) != n:
        raise ResetError(f"{len(seeds)} seeds for {n} environments: give one for each")
    for s in seeds:
        if s is not None and (not isinstance(s, (int, np.integer)) or isinstance(s, bool) or not 0 <= s < limit):
            raise ResetError(f"seed {s!r}: expected an integer in 0..{limit - 1}, or None")
    return [None if s is None else int(s) for s in seeds]


def check_mask(options: dict[str, Any], n: int, started: bool) -> np.ndarray:
    """Return `options["reset_mask"]` as bool (n,), all True where it is not given.

    Raises:
        ResetError: another shape or dtype, or a partial mask before the first reset.
    """
    mask = as_array(options.get("reset_mask", np.ones(n, bool)), "reset_mask")
    if mask.shape != (n,) or mask.dtype != bool:
        raise ResetError(f"reset_mask of shape {mask.shape} and dtype {mask.dtype}: expected bool ({n},)")
    if not started and not mask.all():
        raise ResetError("reset_mask on the first reset: every environment must be reset once")
    return mask


def check_level(options: dict[str, Any], n: int, limit: int) -> np.ndarray | None:
    """Return `options["level"]`, one for all or one each, as integers (n,), or None where it is not given.

    Raises:
        ResetError: another shape or dtype, or a level outside 0..`limit`.
    """
    level = options.get("level")
    if level is None:
        return None
    try:
        levels = np.broadcast_to(as_array(level, "level"), (n,))
    except ValueError:
        raise ResetError(f"level {level!r}: expected one integer or {n} of them") from None
    if levels.dtype.kind not in "iu" or levels.min() < 0 or levels.max() > limit:
        raise ResetError(f"level {levels.tolist()}: expected integers in 0..{limit}")
    return levels


def check_history(frames: Any, actions: Any, n: int, frame: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return real history as uint8 (N, T, *frame) and int64 (N, T - 1).

    Raises:
        ResetError: another dtype or shape, T < 1, or an action outside 0..14.
    """
    frames = as_array(frames, "frames")
    shaped = frames.ndim == 5 and frames.shape[0] == n and frames.shape[2:] == frame and frames.shape[1] >= 1
    if frames.dtype != np.uint8 or not shaped:
        raise ResetError(
            f"frames of dtype {frames.dtype} and shape {frames.shape}: expected uint8 "
            f"({n}, T >= 1, {', '.join(map(str, frame))})"
        )
    t = frames.shape[1]
    actions = np.zeros((n, 0), np.int64) if actions is None else as_array(actions, "actions")
    if actions.size == 0:
        actions = actions.reshape(n, 0).astype(np.int64)
    if actions.shape != (n, t - 1) or actions.dtype.kind not in "iu":
        raise ResetError(
            f"actions of dtype {actions.dtype} and shape {actions.shape}: expected integers ({n}, {t - 1})"
        )
    if ((actions < 0) | (actions >= NUM_ACTIONS)).any():
        raise ResetError(f"actions {actions.min()}..{actions.max()}: expected 0..{NUM_ACTIONS - 1}")
    return np.ascontiguousarray(frames), np.ascontiguousarray(actions, np.int64)


def check_start(
    options: dict[str, Any], n: int, size: int, frame: tuple[int, int, int]
) -> tuple[np.ndarray | None, tuple[np.ndarray, np.ndarray] | None]:
    """Where dreams are asked to start.

    Args:
        options: of `reset`.
        n: how many dreams.
        size: of the bank of starts.
        frame: (H, W, C) of a picture.

    Returns:
        Indices (n,) into the bank, or None; and frames (n, T, H, W, C) with the actions between them, or None.

    Raises:
        ResetError: a start of the wrong type, shape or range.
    """
    start = options.get("start")
    if "frames" in options:
        if start is not None:
            raise ResetError("options 'start' and 'frames' exclude each other: give one")
        return None, check_history(options["frames"], options.get("actions"), n, frame)
    if "actions" in options:
        raise ResetError("option 'actions' without 'frames': give the frames they lead between")
    if start is None or (isinstance(start, str) and start == "random"):
        return None, None
    try:
        chosen = np.broadcast_to(as_array(start, "start"), (n,))
    except ValueError:
        raise ResetError(f"start {start!r}: expected one index or {n} of them") from None
    if chosen.dtype.kind not in "iu" or (chosen < 0).any() or (chosen >= size).any():
        raise ResetError(f"start {start!r}: expected integers in 0..{size - 1}, or 'random'")
    return chosen, None
