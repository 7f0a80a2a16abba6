"""What keys, the mouse and gamepads do in the window."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dreamenv.bundle import bundle_games, find_bundles, short_name
from dreamenv.contract.actions import keys_to_action
from dreamenv.errors import BundleError, ConfigError
from dreamenv.play.keys import Gamepads
from dreamenv.play.recording import FilmRecorder
from dreamenv.play.screen import Screen
from dreamenv.play.session import Session
from dreamenv.play.timeline import futures_grid

_HURRY = 0.6
"""Share of a step's time after which a new key press brings the next step: an answer sooner, for a beat that gives a
little."""
HORIZON = 15
"""Steps of an imagined future."""
_NFES, _ODD_NFES = (1, 2, 3, 4, 6, 8, 12, 16), (1, 3, 5, 7, 9, 15)


class Input:
    """The part of `Window` that answers to events; see there for what the attributes are."""

    session: Session
    out: Path
    fps: float
    paused: bool
    _pygame: Any
    _open: Callable[[Path, str], Session]
    _surface: Any
    _screen: Screen
    _pads: Gamepads
    _jobs: deque[Any]
    _futures: np.ndarray | None
    _menu: list[tuple[str, str, Callable[[], None]]]
    _film: FilmRecorder | None
    _pressed: set[int]
    _tapped: set[int]
    _pressed_at: float | None
    _windowed: tuple[int, int] | None
    _overlay: str
    _single: bool
    _dirty: bool
    _chosen: int
    _selected: int
    _tick: int
    _done_event: int
    _last_tick: float
    _loaded_event: int
    _ask: Callable[..., None]
    _say: Callable[[str], None]
    _collect: Callable[[], None]
    _adopt: Callable[..., None]
    _load_real: Callable[..., None]
    _new_path: Callable[[str], Path]

    # -- events --------------------------------------------------------------------------------------------------------

    def _handle(self, event: Any) -> bool:
        """React to one event; False ends the loop."""
        pygame = self._pygame
        if event.type == pygame.QUIT:
            return False
        if event.type == pygame.KEYDOWN:
            if event.key == pygame.K_ESCAPE:
                if not self._overlay:
                    return False
                self._overlay = ""
            elif self._overlay:
                self._pressed.add(event.key)
                self._overlay_key(event.key)
            else:
                self._pressed.add(event.key)
                self._tapped.add(event.key)
                if self._pressed_at is None and any(event.key in keys for keys in keys_to_action()):
                    self._pressed_at = time.perf_counter()
                    sooner = self._last_tick + _HURRY / self.fps
                    if sooner < self._due:
                        self._due, self._hurried = sooner, True
                self._command(event.key, event.mod if hasattr(event, "mod") else 0)
            self._dirty = True
        elif event.type == pygame.KEYUP:
            self._pressed.discard(event.key)
        elif event.type == pygame.WINDOWFOCUSLOST:
            self._pressed.clear()
            self._tapped.clear()
            self._pads.clear()
        elif event.type == self._loaded_event:
            self._ask(self.session.look)
            if self.session.real_problem:
                self._say(self.session.real_problem)
        elif event.type == pygame.VIDEORESIZE:
            self._surface = pygame.display.get_surface() or self._surface
            self._dirty = True
        elif event.type in (pygame.WINDOWEXPOSED, pygame.WINDOWSIZECHANGED):
            self._dirty = True
        elif event.type == pygame.MOUSEBUTTONDOWN and self._overlay == "branches" and event.button == 1:
            cell = self._screen.cell_at(self._surface.get_size(), event.pos)
            if cell is not None:
                self._chosen = cell
                self._overlay_key(pygame.K_RETURN)
        else:
            before = self._pads.held
            if self._pads.handle(event):
                self.paused, self._dirty = not self.paused, True
            self._tapped |= self._pads.held - before
        return True

    def _command(self, key: int, modifiers: int) -> None:
        """Keys that are not the game's."""
        pygame, session = self._pygame, self.session
        if key == pygame.K_TAB:
            self._ask(session.next_mode, self._say_modes)
        elif key == pygame.K_r:
            self._ask(session.synchronise, lambda _: self._say("the dream goes on from the real frames"))
        elif key == pygame.K_f:
            following = not session.following
            self._ask(lambda: session.follow(following))
            self._say("the dream follows the real game, one step ahead" if following else "the dream drifts on alone")
        elif key == pygame.K_n:
            self._ask(session.new_start)
        elif key == pygame.K_p:
            self.paused = not self.paused
        elif key == pygame.K_o:
            self.paused, self._single = True, True
        elif key == pygame.K_F5:
            path = self._moment_path()
            self._ask(lambda: session.save(path), lambda _: self._say(f"saved to {path}"))
        elif key == pygame.K_F9:
            path = self._moment_path()
            self._ask(lambda: session.load(path), lambda _: self._say("back at the saved moment"))
        elif key == pygame.K_b:
            if not self._jobs or self._jobs[-1][1] != self._show_futures:
                self._ask(lambda: session.branch(HORIZON), self._show_futures)
        elif key == pygame.K_g:
            self._say(
                {"human": "you play", "agent": "the agent plays", "random": "a random policy plays"}[
                    session.next_player()
                ]
            )
        elif key in (pygame.K_LEFTBRACKET, pygame.K_RIGHTBRACKET):
            steps = _NFES if session.sampler.solver == "euler" else _ODD_NFES
            self._set(nfe=_beside(steps, session.sampler.nfe, 1 if key == pygame.K_RIGHTBRACKET else -1))
        elif key in (pygame.K_COMMA, pygame.K_PERIOD):
            change = 0.1 if key == pygame.K_PERIOD else -0.1
            self._set(temperature=round(min(max(session.sampler.temperature + change, 0), 3), 1))
        elif key in (pygame.K_9, pygame.K_0):
            change = 0.25 if key == pygame.K_0 else -0.25
            self._set(guidance_scale=round(min(max(session.sampler.guidance_scale + change, 0), 5), 2))
        elif key in (pygame.K_MINUS, pygame.K_EQUALS):
            self.fps = min(max(self.fps + (1 if key == pygame.K_EQUALS else -1), 1.0), 60.0)
        elif key == pygame.K_v:
            self._toggle_film(".gif" if modifiers & pygame.KMOD_SHIFT else ".mp4")
        elif key == pygame.K_x:
            self._toggle_recording()
        elif key == pygame.K_m:
            self._open_menu()
        elif key == pygame.K_h:
            self._overlay = "help"
        elif key == pygame.K_F11:
            self._toggle_full_screen()

    def _toggle_full_screen(self) -> None:
        display, before = self._pygame.display, self._windowed
        self._windowed = self._surface.get_size() if before is None else None
        if before is None:
            self._surface = display.set_mode(display.get_desktop_sizes()[0], self._pygame.FULLSCREEN)
        else:
            self._surface = display.set_mode(before, self._pygame.RESIZABLE)

    def _overlay_key(self, key: int) -> None:
        pygame = self._pygame
        enter = key in (pygame.K_RETURN, pygame.K_KP_ENTER, pygame.K_SPACE)
        x = {pygame.K_LEFT: -1, pygame.K_RIGHT: 1}.get(key, 0)
        y = {pygame.K_UP: -1, pygame.K_DOWN: 1}.get(key, 0)
        if self._overlay == "help" and key == pygame.K_h:
            self._overlay = ""
        elif self._overlay == "menu":
            self._selected = (self._selected + y) % max(len(self._menu), 1)
            if key == pygame.K_m:
                self._overlay = ""
            elif enter and self._menu:
                self._overlay = ""
                self._menu[self._selected][2]()
        elif self._overlay == "branches":
            column, row = self._chosen % 3 + x, self._chosen // 3 + y
            self._chosen = min(max(column, 0), 2) + 3 * min(max(row, 0), 2)
            if key == pygame.K_b:
                self._overlay = ""
            elif enter:
                self._overlay, cell, session = "", self._chosen, self.session
                name = list(futures_grid(session.action_meanings).values())[cell]
                self._ask(lambda: session.adopt(cell, HORIZON), lambda _: self._say(f"lived: {name}"))

    def _say_modes(self, _: str) -> None:
        if not self.session.paired:
            self._say(self.session.real_problem or "only one world is loaded")

    def _show_futures(self, futures: np.ndarray) -> None:
        if not self._jobs:  # else something else was asked for meanwhile
            self._futures, self._tick, self._chosen, self._overlay = futures, 0, 4, "branches"

    def _set(self, **changes: Any) -> None:
        try:
            self.session.sampler = replace(self.session.sampler, **changes)
        except ConfigError as error:
            self._say(str(error))

    def _moment_path(self) -> Path:
        return self.out / "moment.bin"

    def _toggle_film(self, suffix: str) -> None:
        if self._film is None:
            self._film = FilmRecorder(self._new_path("film").with_suffix(suffix), self.fps)
            self._say("filming; V ends it")
            return
        film, self._film = self._film, None
        self._ask(film.close, self._say_written)

    def _say_written(self, path: Path | None) -> None:
        self._say("nothing to write" if path is None else f"written: {path}")

    def _toggle_recording(self) -> None:
        session = self.session
        if session.recorder is None:
            folder = self._new_path("episode")
            self._ask(lambda: session.record(folder), lambda _: self._say("recording the episode; X ends it"))
        else:
            self._ask(session.stop_recording, self._say_written)

    def _open_menu(self) -> None:
        def to_bundle(folder: Path, game: str) -> Callable[[], None]:
            def chosen(session: Session) -> None:
                old, self._overlay = self.session, ""

                def leave() -> Path | None:
                    try:
                        return old.stop_recording()
                    finally:
                        old.close()

                self._ask(leave, lambda path: None if path is None else self._say_written(path))
                self._adopt(folder, session)

            return lambda: self._ask(lambda: self._open(folder, game), chosen)

        def to_game(name: str) -> Callable[[], None]:
            return lambda: self._load_real(name)

        self._menu = []
        for folder in find_bundles():
            games = _games_of(folder)
            for game, mode in games.items():
                name = f"{short_name(folder)}: {game}" if len(games) > 1 else short_name(folder)
                name += "" if mode == "easy" else f", {mode}"
                self._menu.append((name, f"bundle in {folder}", to_bundle(folder, game)))
        games = () if self.session.real is None else self.session.real.vector.metadata["games"]
        dreamt = self.session.bundle.game.name
        kinds = {name: "real game, with its dream" if name == dreamt else "real game alone" for name in games}
        self._menu += [(name, kind, to_game(name)) for name, kind in kinds.items()]
        self._selected, self._overlay = 0, "menu"


def _games_of(folder: Path) -> dict[str, str]:
    """A bundle's games and difficulties; one without a name if it is damaged, for whoever opens it is told why."""
    try:
        return bundle_games(folder)
    except BundleError:
        return {"": "easy"}


def _beside(values: Sequence[int], value: int, direction: int) -> int:
    if direction > 0:
        return min((v for v in values if v > value), default=value)
    return max((v for v in values if v < value), default=value)
