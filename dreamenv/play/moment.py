"""One moment of play: what there is to show of it, everything needed to go back to it, and the file that holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dreamenv.artifacts import atomic_file
from dreamenv.contract.actions import NOOP
from dreamenv.contract.snapshot import pack, unpack
from dreamenv.errors import SnapshotError
from dreamenv.evaluation.metrics import psnr


@dataclass(frozen=True)
class Moment:
    """What there is to show of one moment.

    Attributes:
        dream, real: uint8 (64, 64, 3); `real` is None while there is no real game.
        action: what led here.
        step: steps since the start.
        rewards: total so far, of each world.
        ended: of each world: "", or why it is over.
        reward_probability, end_probability, uncertainty: what the dream said of its last step.
        psnr: of the dream against the real game, dB, of the mean squared error of all steps since they last agreed.
    """

    dream: np.ndarray
    real: np.ndarray | None
    action: int = NOOP
    step: int = 0
    rewards: dict[str, float] = field(default_factory=lambda: {"dream": 0.0, "real": 0.0})
    ended: dict[str, str] = field(default_factory=lambda: {"dream": "", "real": ""})
    reward_probability: float = 0.0
    end_probability: float = 0.0
    uncertainty: float = 0.0
    psnr: float | None = None


@dataclass(frozen=True)
class Past:
    """Everything that a session needs to go back to a moment."""

    moment: Moment
    dream: bytes
    real: bytes | None
    history: tuple[tuple[np.ndarray, ...], tuple[int, ...]]
    errors: tuple[float, int]
    level: int
    taken: tuple[int, ...]
    mark: tuple[int, bool] = (0, True)


def mean_psnr(errors: tuple[float, int]) -> float | None:
    """PSNR, dB, of (summed mean squared error, steps); None before the first step."""
    total, count = errors
    return float(psnr(total / count)) if count else None


def save_moment(path: Path, past: Past) -> None:
    """Write a moment of both worlds to a file, atomically."""
    m = past.moment
    arrays = {
        "dream": np.frombuffer(past.dream, np.uint8),
        "dream_frame": m.dream,
        "frames": np.stack(past.history[0]) if past.history[0] else np.zeros((0, 64, 64, 3), np.uint8),
        "actions": np.array(past.history[1], np.int64),
        "taken": np.array(past.taken, np.int64),
    }
    if past.real is not None and m.real is not None:
        arrays |= {"real": np.frombuffer(past.real, np.uint8), "real_frame": m.real}
    meta = {
        "action": m.action,
        "step": m.step,
        "rewards": m.rewards,
        "ended": m.ended,
        "errors": list(past.errors),
        "outlook": [m.reward_probability, m.end_probability, m.uncertainty],
        "level": past.level,
    }
    data = pack("moment", meta, arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def load_moment(path: Path, with_real: bool) -> Past:
    """Read what `save_moment` wrote.

    Args:
        path: the file.
        with_real: whether there is a real game to put back; if not, the file's is left out.

    Raises:
        SnapshotError: no such file, damaged, or without the real game where one is needed.
    """
    try:
        meta, arrays = unpack("moment", path.read_bytes())
    except OSError as error:
        raise SnapshotError(f"{path}: nothing saved there ({error.strerror}); save a moment first") from None
    if not with_real:
        arrays.pop("real", None)
    real = arrays["real"].tobytes() if "real" in arrays else None
    if with_real and real is None:
        raise SnapshotError(f"{path}: was saved without the real game; load it in a window without one")
    errors = float(meta["errors"][0]), int(meta["errors"][1])
    outlook = [float(x) for x in meta["outlook"]]
    moment = Moment(
        arrays["dream_frame"].copy(),
        None if real is None else arrays["real_frame"].copy(),
        meta["action"],
        meta["step"],
        meta["rewards"],
        meta["ended"],
        *outlook,
        psnr=mean_psnr(errors),
    )
    history = tuple(arrays["frames"]), tuple(arrays["actions"].tolist())
    return Past(
        moment, arrays["dream"].tobytes(), real, history, errors, meta["level"], tuple(arrays["taken"].tolist())
    )
