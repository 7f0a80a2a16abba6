"""Time in a session: back, to a saved moment, and ahead into imagined futures."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from dreamenv.bundle import Bundle
from dreamenv.config import check
from dreamenv.contract.actions import COMBOS, NAMES, NOOP
from dreamenv.env import DreamEnv
from dreamenv.errors import SnapshotError
from dreamenv.play.moment import Moment, Past, load_moment, save_moment
from dreamenv.play.recording import EpisodeRecorder

GRID = tuple(
    COMBOS.index(c)
    for c in (
        ("LEFT", "UP"),
        ("UP",),
        ("RIGHT", "UP"),
        ("LEFT",),
        (),
        ("RIGHT",),
        ("LEFT", "DOWN"),
        ("DOWN",),
        ("RIGHT", "DOWN"),
    )
)
"""The actions of a 3 x 3 grid of futures, as the arrow keys lie."""
_FIRE = COMBOS.index(("D",))


def futures_grid(meanings: Sequence[str]) -> dict[int, str]:
    """The nine actions whose futures are shown, as the arrow keys lie, and their names, where actions mean that.

    In the middle is fire, or nothing where fire does nothing.
    """
    fires = bool(meanings) and meanings[_FIRE] != meanings[NOOP]
    actions = [_FIRE if action == NOOP and fires else action for action in GRID]
    return {action: meanings[action] if action == _FIRE else NAMES[action] for action in actions}


class Timeline:
    """The part of `Session` that moves in time; see there for what the attributes are."""

    bundle: Bundle
    dream: DreamEnv
    real: Any
    moment: Moment
    recorder: EpisodeRecorder | None
    player: str
    following: bool
    _past: deque[Past]
    _frames: deque[np.ndarray]
    _actions: deque[int]
    _errors: Any
    _level: Any
    _taken: list[int]

    @property
    def paired(self) -> bool:
        """Whether the real game is the one dreamt of."""
        raise AssertionError("a session says")

    @property
    def game(self) -> str:
        """The game on show."""
        raise AssertionError("a session says")

    @property
    def over(self) -> bool:
        """Whether no world on show goes on."""
        raise AssertionError("a session says")

    def step(self, action: int = NOOP) -> Moment:
        """See `Session.step`."""
        raise AssertionError("a session steps")

    def _take_real_in(self) -> None:
        raise AssertionError("a session knows its real game")

    # -- time ----------------------------------------------------------------------------------------------------------

    def _now(self) -> Past:
        real = None if self.real is None else self.real.snapshot()
        return Past(
            self.moment,
            self.dream.snapshot(),
            real,
            (tuple(self._frames), tuple(self._actions)),
            self._errors,
            self._level,
            tuple(self._taken),
            (0, True) if self.recorder is None else self.recorder.mark(),
        )

    def _go(self, past: Past) -> Moment:
        dream = self.dream.snapshot()
        self.dream.restore(past.dream)
        if self.real is not None and past.real is not None:
            try:
                self.real.restore(past.real)
            except SnapshotError:  # of another game: neither world moves
                self.dream.restore(dream)
                raise
        k = self.bundle.world_model.context
        self._frames, self._actions = deque(past.history[0], maxlen=k), deque(past.history[1], maxlen=k - 1)
        self._errors, self._level, self._taken = past.errors, past.level, list(past.taken)
        self.moment = past.moment
        return self.moment

    def rewind(self, steps: int = 1) -> Moment:
        """Take back up to `steps` steps, as far as memory goes; a recording takes them back too."""
        self._take_real_in()
        past = None
        for _ in range(min(steps, len(self._past))):
            past = self._past.pop()
        if past is None:
            return self.moment
        if self.recorder is not None:
            self.recorder.rewind(past.mark)
        return self._go(past)

    @property
    def can_rewind(self) -> int:
        """Steps that can be taken back."""
        return len(self._past)

    def save(self, path: Path) -> None:
        """Write this moment of both worlds to a file."""
        self._take_real_in()
        save_moment(path, self._now())

    def load(self, path: Path) -> Moment:
        """Go to a saved moment.

        Raises:
            SnapshotError: no such file, damaged, or of another bundle or game.
        """
        self._take_real_in()
        self._go(load_moment(path, self.real is not None))
        self._past.clear()
        if self.recorder is not None:
            self.recorder.cut()
        return self.moment

    # -- futures -------------------------------------------------------------------------------------------------------

    def branch(self, horizon: int = 15) -> np.ndarray:
        """Imagine nine futures, one for each action of `futures_grid`: uint8 (9, horizon + 1, 64, 64, 3), now first.

        Raises:
            ConfigError: the dream has ended, or there is none of this game.
        """
        self._take_real_in()
        check(self.real is None or self.paired, f"branch: there is no dream of {self.game}")
        check(not self.moment.ended["dream"], "branch: the dream has ended; synchronise it or start anew")
        grid = list(futures_grid(self.bundle.game.action_meanings))
        envs = self.dream.branch(self.dream.snapshot(), len(grid))
        envs.autoreset_mode = AutoresetMode.SAME_STEP  # so that one that ends does not stop the others
        frames = [np.repeat(self.moment.dream[None], len(grid), 0)]
        over = np.zeros(len(grid), bool)
        for _ in range(horizon):
            dreamt, _, terminated, truncated, info = envs.step(np.array(grid))
            ending = (terminated | truncated) & ~over
            frames.append(np.where(over[:, None, None, None], frames[-1], dreamt))
            for i in np.flatnonzero(ending):
                frames[-1][i] = info["final_obs"][i]
            over |= ending
        envs.close()
        return np.stack(frames, 1)

    def adopt(self, cell: int, horizon: int) -> Moment:
        """Live one of the nine futures as `branch` showed it: `horizon` steps of its action, in both worlds."""
        check(0 <= cell < len(GRID), f"cell {cell}: must be in 0..{len(GRID) - 1}")
        action = list(futures_grid(self.bundle.game.action_meanings))[cell]
        fan = self.dream.branch(self.dream.snapshot(), len(GRID))
        chosen = fan.branch(fan.snapshot(), 1, index=cell)  # with that future's own noise
        self.dream.restore(chosen.snapshot())
        player, following = self.player, self.following
        self.player, self.following = "human", False
        try:
            for _ in range(horizon):
                if self.moment.ended["dream"] or self.over:
                    break
                self.step(action)
        finally:
            self.player, self.following = player, following
        return self.moment
