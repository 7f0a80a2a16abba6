"""Procgen's 15 discrete actions, shared by both worlds (source: `procgen/env.py::get_combos`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dreamenv.errors import InvalidActionError

COMBOS: tuple[tuple[str, ...], ...] = (
    ("LEFT", "DOWN"),
    ("LEFT",),
    ("LEFT", "UP"),
    ("DOWN",),
    (),
    ("UP",),
    ("RIGHT", "DOWN"),
    ("RIGHT",),
    ("RIGHT", "UP"),
    ("D",),
    ("A",),
    ("W",),
    ("S",),
    ("Q",),
    ("E",),
)
NUM_ACTIONS = len(COMBOS)
NOOP = COMBOS.index(())
NAMES = tuple("+".join(c).lower() or "noop" for c in COMBOS)
# SDL key codes, so that nothing here needs pygame
_KEY_CODES = {"RIGHT": 1073741903, "LEFT": 1073741904, "DOWN": 1073741905, "UP": 1073741906}


def keys_to_action() -> dict[tuple[int, ...], int]:
    """Return SDL/pygame key-code combinations -> action, as `gymnasium.utils.play` wants them."""
    return {
        tuple(sorted(_KEY_CODES.get(key, ord(key.lower()[0])) for key in combo)): action
        for action, combo in enumerate(COMBOS)
        if combo  # no keys at all are the caller's no-op
    }


def _as_array(actions: Any) -> np.ndarray:
    try:
        if hasattr(actions, "detach"):  # a torch tensor, on whatever device
            actions = actions.detach().cpu().numpy()
        return np.asarray(actions)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidActionError(f"action {actions!r}: not an array ({error}); pass integers") from None


def check_action(action: Any) -> int:
    """Return a single action as an int.

    Raises:
        InvalidActionError: not one integer in 0..14.
    """
    array = _as_array(action)
    return int(check_actions(array[None] if array.ndim == 0 else array, 1)[0])


def check_actions(actions: Any, num_envs: int) -> np.ndarray:
    """Return actions as an int64 array of shape (num_envs,).

    Raises:
        InvalidActionError: another shape, a dtype that is not integer, or a value outside 0..14.
    """
    array = _as_array(actions)
    if array.shape != (num_envs,):
        raise InvalidActionError(f"actions of shape {array.shape}: expected ({num_envs},), one integer per environment")
    if array.dtype.kind not in "iu":
        raise InvalidActionError(f"actions of dtype {array.dtype}: expected integers in 0..{NUM_ACTIONS - 1}")
    bad = array[(array < 0) | (array >= NUM_ACTIONS)]
    if bad.size:
        raise InvalidActionError(f"action {bad[0]} is outside Discrete({NUM_ACTIONS}): use 0..{NUM_ACTIONS - 1}")
    return array.astype(np.int64)
