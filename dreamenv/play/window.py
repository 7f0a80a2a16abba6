"""The window: both worlds side by side under one pair of hands. Press H in it for the keys.

The model steps on a worker thread; this one only listens and draws, so the window never freezes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dreamenv.bundle import short_name
from dreamenv.errors import ConfigError, DreamenvError
from dreamenv.play.events import Input
from dreamenv.play.keys import Gamepads, pressed_action
from dreamenv.play.moment import Moment
from dreamenv.play.recording import FilmRecorder
from dreamenv.play.screen import Meter, Screen, View
from dreamenv.play.session import Session

_END_SECONDS = 1.5
_REWIND_STEPS = 2
_MESSAGE_SECONDS = 4.0


class Window(Input):
    """The window and its loop; `dreamenv.play.run.run` makes one.

    Args:
        open_session: bundle folder, game -> a session on it.
        folder: the first bundle's folder.
        game: which of its games, where it holds several.
        scale: window pixels per game pixel, to begin with.
        fps: steps per second, to begin with.
        out: folder for films, recorded episodes and the saved moment.

    Raises:
        ConfigError: no display.
    """

    def __init__(
        self, open_session: Callable[[Path, str], Session], folder: Path, game: str, scale: int, fps: float, out: Path
    ) -> None:
        import pygame

        self._pygame = pygame
        self._open, self.out, self.fps = open_session, out, fps
        try:
            pygame.display.init()
            self._surface = pygame.display.set_mode(Screen.size(scale, 2), pygame.RESIZABLE)
        except pygame.error as error:
            raise ConfigError(
                f"display: none to open a window on ({error}); 'dreamenv play --headless film.mp4' films a "
                "game without one, 'dreamenv demo' measures it too"
            ) from None
        self._done_event, self._loaded_event = pygame.event.custom_type(), pygame.event.custom_type()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dream")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="real game")
        self._jobs: deque[tuple[Future[Any], Callable[[Any], None] | None, Session | None]] = deque()
        self._pads = Gamepads()
        self._screen = Screen()
        self._pressed: set[int] = set()
        self._tapped: set[int] = set()  # a key pressed and released between two frames still counts once
        self._pressed_at: float | None = None
        self.paused, self._single, self._overlay = False, False, ""
        self._futures: np.ndarray | None = None
        self._chosen, self._selected, self._tick = 4, 0, 0
        self._menu: list[tuple[str, str, Callable[[], None]]] = []
        self._film: FilmRecorder | None = None
        self._message, self._message_until = "", 0.0
        self.latency, self._between, self.step_time = Meter(2000), Meter(30), Meter(2000)
        self._uncertainty: deque[float] = deque(maxlen=150)
        self.steps = 0
        self._last_step: float | None = None
        self._over_since: float | None = None
        self._due, self._last_tick, self._hurried = 0.0, 0.0, False
        self._names = 0
        self._windowed: tuple[int, int] | None = None  # the window's size while the screen is full
        self._dirty = True
        try:
            self._adopt(folder, open_session(folder, game))
        except BaseException:
            pygame.quit()
            raise

    # -- sessions ------------------------------------------------------------------------------------------------------

    def _adopt(self, folder: Path, session: Session, game: str | None = None) -> None:
        self.folder, self.session = folder, session
        self._moment = session.moment
        self._uncertainty.clear()
        self._pygame.display.set_caption(f"dreamenv: {session.game}")
        self._load_real(game)

    def _load_real(self, game: str | None = None) -> None:
        session = self.session

        def load() -> None:
            session.load_real(game)
            self._wake(self._loaded_event)

        self._loader.submit(load)

    def _wake(self, kind: int) -> None:
        with contextlib.suppress(self._pygame.error):  # the window may be gone
            self._pygame.event.post(self._pygame.event.Event(kind))

    def _ask(self, job: Callable[[], Any], then: Callable[[Any], None] | None = None) -> None:
        """Run `job` on the worker, and `then` with its result here."""
        future = self._worker.submit(job)
        self._jobs.append((future, then, getattr(self, "session", None)))
        future.add_done_callback(lambda _: self._wake(self._done_event))

    def _collect(self) -> None:
        while self._jobs and self._jobs[0][0].done():
            future, then, session = self._jobs.popleft()
            self._dirty = True
            try:
                result = future.result()
            except (DreamenvError, OSError) as error:
                self._say(str(error))
                continue
            if isinstance(result, Moment):
                if session is not self.session:  # of a bundle that was left meanwhile
                    continue
                self._moment = result
            if then is not None:
                then(result)

    def _say(self, message: str) -> None:
        self._message, self._message_until, self._dirty = message, time.perf_counter() + _MESSAGE_SECONDS, True

    def _new_path(self, kind: str) -> Path:
        self._names += 1
        return self.out / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{self._names}"

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Play until the window is closed; returns counts, rates and delays (seconds)."""
        pygame = self._pygame
        self._due = time.perf_counter()
        try:
            while True:
                now = time.perf_counter()
                wait = max(self._due - now, 0.0) if not self._jobs else 0.05
                first = pygame.event.wait(max(int(1000 * wait), 1))
                for event in (first, *pygame.event.get()):
                    if not self._handle(event):
                        return self.figures()
                self._collect()
                now = time.perf_counter()
                if self._message and now > self._message_until:
                    self._message, self._dirty = "", True
                if now >= self._due and not self._jobs:
                    self._due = (
                        now + 1 / self.fps if self._hurried else max(self._due + 1 / self.fps, now - 0.5 / self.fps)
                    )
                    self._hurried, self._last_tick = False, now
                    self._advance()
                if self._dirty:
                    self._draw()
        finally:
            self._close()

    def _advance(self) -> None:
        """What happens at each tick of the game's clock."""
        session = self.session
        if self._overlay:
            self._tick += 1
            self._dirty |= self._overlay == "branches"
            self._stand_still()
            return
        if self._pygame.K_BACKSPACE in self._pressed | self._tapped:
            self._stand_still()
            self._ask(lambda: session.rewind(_REWIND_STEPS), lambda _: self._film_picture())
            return
        if self.paused and not self._single:
            self._stand_still()
            return
        self._single = False
        if all(self._moment.ended[world] for world in session.shown):  # long enough on show to be seen, and rewound
            self._over_since = self._over_since or time.perf_counter()
            if time.perf_counter() - self._over_since < _END_SECONDS:
                self._stand_still()
                return
        self._over_since = None
        action = self.held_action()
        self._tapped.clear()
        pressed_at, self._pressed_at = self._pressed_at, None
        asked = time.perf_counter()

        def after(moment: Moment) -> None:
            now = time.perf_counter()
            self.steps += 1
            self.step_time.add(now - asked)
            if self._last_step is not None:
                self._between.add(now - self._last_step)
            self._last_step = now
            self._uncertainty.append(moment.uncertainty)
            self._draw()
            if pressed_at is not None:
                self.latency.add(time.perf_counter() - pressed_at)
            self._film_picture()

        self._ask(lambda: session.step(action), after)

    def _stand_still(self) -> None:
        """A tick without a step: what was pressed is void, delays are not counted over it; a film goes on."""
        self._tapped.clear()
        self._pressed_at = self._last_step = None
        self._film_picture()

    def _film_picture(self) -> None:
        if self._film is not None:
            if self._dirty:
                self._draw()
            self._film.add(self._pygame.surfarray.array3d(self._surface).swapaxes(0, 1))

    def held_action(self) -> int:
        """The action of the keys and the gamepad now held, or pressed since the last step."""
        return pressed_action(self._pressed | self._tapped | self._pads.held)

    def figures(self) -> dict[str, Any]:
        """What was measured so far; delays in seconds from a key to its picture, None before the first."""
        interval = self._between.quantile(0.5)
        return {
            "steps": self.steps,
            "frames_per_s": None if interval is None else 1 / interval,
            "latency_median": self.latency.quantile(0.5),
            "latency_p95": self.latency.quantile(0.95),
            "step_median": self.step_time.quantile(0.5),
            "step_p95": self.step_time.quantile(0.95),
        }

    def _draw(self) -> None:
        session, interval = self.session, self._between.quantile(0.5)
        recorder = session.recorder  # the worker may end it meanwhile
        slow = interval is not None and interval > 1.2 / self.fps
        view = View(
            self._moment,
            session.shown,
            session.game,
            short_name(self.folder),
            session.player,
            session.sampler,
            session.action_meanings,
            self.fps,
            0.0 if interval is None else 1 / interval,
            self.latency.quantile(0.5),
            slow,
            self.paused,
            session.following,
            session.can_rewind / self.fps,
            None if self._film is None else self._film.count,
            None if recorder is None else len(recorder),
            self._message,
            list(self._uncertainty),
            self._overlay,
            self._futures,
            self._tick,
            self._chosen,
            [(n, w) for n, w, _ in self._menu],
            self._selected,
            session.noisy,
        )
        self._screen.draw(self._surface, view)
        self._pygame.display.flip()
        self._dirty = False

    def _close(self) -> None:
        """Finish recordings, stop both threads, release everything; nothing of that keeps the rest from happening."""
        self._worker.shutdown(wait=True)
        for future, _, _ in self._jobs:
            if future.exception() is None and isinstance(opened := future.result(), Session):
                opened.close()
        self._jobs.clear()
        try:
            for finish in (None if self._film is None else self._film.close, self.session.stop_recording):
                try:
                    if finish is not None and (path := finish()) is not None:
                        print(f"written: {path}")
                except (DreamenvError, OSError) as error:
                    print(f"error: {error}", file=sys.stderr)
        finally:
            self._loader.shutdown(wait=True, cancel_futures=True)
            self.session.close()
            self._pygame.quit()
