"""One moment of play: what there is to show of it, everything needed to go back to it, and the file that holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dreamenv.artifacts import atomic_file, read_file
from dreamenv.config import check, from_dict
from dreamenv.contract.actions import NOOP, NUM_ACTIONS
from dreamenv.contract.games import SEED_LIMIT
from dreamenv.contract.snapshot import check_arrays, check_range, pack, unpack
from dreamenv.errors import ConfigError, SnapshotError
from dreamenv.evaluation.metrics import psnr

_LIMIT = 2**28  # bytes of a file


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
        "frames": np.stack(past.history[0]) if past.history[0] else np.zeros((0, *m.dream.shape), np.uint8),
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
    remedy = "save a moment first"
    meta, arrays = unpack("moment", read_file(path, SnapshotError, remedy, _LIMIT))
    try:
        facts = from_dict(_Facts, meta, "moment")
    except ConfigError as error:
        raise SnapshotError(f"{path}: is damaged ({error}); save it again") from None
    if not with_real:
        arrays.pop("real", None)
        arrays.pop("real_frame", None)
    elif "real" not in arrays:
        raise SnapshotError(f"{path}: was saved without the real game; load it in a window without one")
    shapes = {n: arrays[n].shape for n in ("dream", "real", "frames", "taken") if n in arrays}
    sized = {n: (s[0] if s else 0) for n, s in shapes.items()}
    frame = arrays["dream_frame"].shape if "dream_frame" in arrays else ()
    expected = {n: ((sized[n],), "uint8") for n in ("dream", "real") if n in sized}
    expected |= {
        n: (frame if len(frame) == 3 else (0, 0, 0), "uint8") for n in ("dream_frame", "real_frame") if n in arrays
    }
    count = sized.get("frames", 0)
    expected |= {"dream": ((sized.get("dream", 0),), "uint8"), "dream_frame": (frame, "uint8")}
    expected |= {"frames": ((count, *frame), "uint8"), "actions": ((max(count - 1, 0),), "int64")}
    expected |= {"taken": ((sized.get("taken", 0),), "int64")}
    check_arrays(arrays, expected)
    for name in ("actions", "taken"):
        check_range(name, arrays[name], 0, NUM_ACTIONS - 1)
    real = arrays["real"].tobytes() if "real" in arrays else None
    moment = Moment(
        arrays["dream_frame"].copy(),
        None if real is None else arrays["real_frame"].copy(),
        facts.action,
        facts.step,
        facts.rewards,
        facts.ended,
        *facts.outlook,
        psnr=mean_psnr(facts.errors),
    )
    history = tuple(arrays["frames"]), tuple(arrays["actions"].tolist())
    taken = tuple(arrays["taken"].tolist())
    return Past(moment, arrays["dream"].tobytes(), real, history, facts.errors, facts.level, taken)


@dataclass(frozen=True)
class _Facts:
    """What a file says of a moment beside its arrays."""

    action: int
    step: int
    rewards: dict[str, float]
    ended: dict[str, str]
    errors: tuple[float, int]
    outlook: tuple[float, float, float]
    level: int

    def __post_init__(self) -> None:
        check(0 <= self.action < NUM_ACTIONS, f"action {self.action}: must be in 0..{NUM_ACTIONS - 1}")
        check(self.step >= 0, f"step {self.step}: must be >= 0")
        for name in ("rewards", "ended"):
            worlds = sorted(getattr(self, name))
            check(worlds == ["dream", "real"], f"{name} {worlds}: must be of dream and real")
        check(self.errors[0] >= 0 and self.errors[1] >= 0, f"errors {self.errors}: must be >= 0")
        check(0 <= self.level <= SEED_LIMIT, f"level {self.level}: must be in 0..{SEED_LIMIT}")
