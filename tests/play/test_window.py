"""The window: what is drawn, and a game in it on SDL's dummy display."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pygame
import pytest

import dreamenv.play.events
import dreamenv.play.window
from dreamenv.bundle import Bundle, embedded_games, find_bundles
from dreamenv.contract.actions import NAMES, NOOP
from dreamenv.data import Dataset
from dreamenv.errors import ConfigError
from dreamenv.play.run import PlayConfig, run
from dreamenv.play.screen import KEYS, Screen, View
from dreamenv.play.session import Session
from dreamenv.play.window import Window

RIGHT = NAMES.index("right")


# -- what is drawn
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [Screen.size(6, 2), Screen.size(12, 2), (1300, 470), (700, 900), Screen.size(4, 1)])
def test_no_text_is_cut_or_overlaps(session: Session, size: tuple[int, int]) -> None:
    for _ in range(3):
        session.step(RIGHT)
    screen, surface = Screen(), pygame.Surface(size)
    menu = [("coinrun (built in)", "bundle in somewhere/rather/deep/coinrun")]
    menu += [(f"game {i}", "real game alone") for i in range(40)]
    common: dict[str, Any] = {
        "game": "coinrun",
        "bundle": "coinrun (built in)",
        "meanings": ("run left", "jump", "drop through a crate") * 5,
        "uncertainty": [0.1, 9.9, 0.3] * 60,
        "latency": 0.0678,
        "fps": 14.98,
        "rewind": 10.0,
        "message": "the dream goes on from the real frames",
        "futures": session.branch(2),
        "menu": menu,
        "selected": 30,
    }
    views = [
        View(
            session.moment,
            shown,
            paused=paused,
            filming=12345,
            recording=12345,
            overlay=overlay,
            slow=not paused,
            **common,
        )
        for shown in (("real", "dream"), ("dream",))
        for paused in (True, False)
        for overlay in ("", "help", "menu", "branches")
    ]
    for view in views:
        screen.draw(surface, view)
        drawn = screen.lines.texts
        assert len(drawn) >= 9
        for text, place, box in drawn:
            assert box.contains(place), f"{text!r} at {place} leaves {box}, {view.overlay or 'no'} overlay"
            assert surface.get_rect().contains(box)
        for i, (text, place, _) in enumerate(drawn):
            hit = place.collidelist([p for _, p, _ in drawn[i + 1 :]])
            assert hit < 0, f"{text!r} overlaps {drawn[i + 1 + hit][0]!r}, {view.overlay or 'no'} overlay"


def test_the_games_pixels_are_enlarged_whole(session: Session) -> None:
    screen, surface = Screen(), pygame.Surface(Screen.size(6, 2))
    screen.draw(surface, View(session.moment, ("real", "dream"), "coinrun", "x"))
    picture = pygame.surfarray.array3d(surface).swapaxes(0, 1)
    for i, frame in enumerate((session.moment.real, session.moment.dream)):
        left = Screen.GAP + i * (384 + Screen.GAP)
        shown = picture[Screen.GAP + Screen.HEADER :, left:][:384, :384]
        assert np.array_equal(shown, np.asarray(frame).repeat(6, 0).repeat(6, 1))


def test_every_key_of_the_help_does_something() -> None:
    folder = Path(dreamenv.play.window.__file__).parent
    source = "".join((folder / name).read_text() for name in ("events.py", "window.py"))
    named = {
        "arrows": "keys_to_action",
        "D A W S Q E": "keys_to_action",
        "TAB": "K_TAB",
        "BACKSPACE": "K_BACKSPACE",
        "[  ]": "K_LEFTBRACKET",
        ",  .": "K_COMMA",
        "-  =": "K_MINUS",
        "F5  F9": "K_F9",
        "9  0": "K_9",
        "ESC": "K_ESCAPE",
        "F11": "K_F11",
    }
    for key, _ in KEYS:
        assert named.get(key, f"K_{key.lower()}") in source, key


# -- the window
# ----------------------------------------------------------------------------------------------------------


class Script:
    """Stands in for `pygame.event.wait`: what happens at each call; key presses are released at the next."""

    def __init__(self, keys: list[list[int]], monkeypatch: pytest.MonkeyPatch, every: int = 6) -> None:
        self.keys, self.calls, self.every = keys, 0, every
        self.real_wait = pygame.event.wait
        monkeypatch.setattr(pygame.event, "wait", self.wait)

    def wait(self, timeout: int = 0) -> pygame.event.Event:
        self.calls += 1
        turn, rest = divmod(self.calls, self.every)
        if rest == 0 and turn - 1 < len(self.keys):
            for key in self.keys[turn - 1]:
                for kind in (pygame.KEYDOWN, pygame.KEYUP):
                    pygame.event.post(pygame.event.Event(kind, key=key, mod=0))
        elif turn - 1 >= len(self.keys):
            pygame.event.post(pygame.event.Event(pygame.QUIT))
        return self.real_wait(min(timeout, 3))


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("dream", "film", "real game"))}


def test_a_game_in_the_window(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    k = pygame
    script = [
        [],
        [k.K_v],
        [k.K_x],
        [k.K_RIGHT],
        [k.K_UP],
        [k.K_TAB],
        [k.K_TAB],
        [k.K_p],
        [k.K_o],
        [k.K_p],
        [k.K_F5],
        [k.K_RIGHT],
        [k.K_F9],
        [k.K_b],
        [],
        [],
        [],
        [k.K_RIGHT],
        [k.K_RETURN],
        [],
        [],
        [],
        [],
        [k.K_h],
        [k.K_ESCAPE],
        [k.K_m],
        [k.K_DOWN],
        [k.K_ESCAPE],
        [k.K_g],
        [],
        [k.K_g],
        [k.K_RIGHTBRACKET],
        [k.K_COMMA],
        [k.K_0],
        [k.K_EQUALS],
        [k.K_r],
        [k.K_f],
        [],
        [k.K_f],
        [k.K_BACKSPACE],
        [k.K_n],
        [],
        [k.K_x],
        [k.K_v],
        [],
        [],
        [k.K_ESCAPE],
        [k.K_ESCAPE],
    ]
    Script(script, monkeypatch, every=25)
    figures = run(PlayConfig(bundle=toy_bundle, scale=2, fps=60.0, device="cpu", out=tmp_path / "out"))
    assert figures["steps"] > 50 and figures["latency_median"] is not None and figures["latency_median"] < 1
    assert not pygame.display.get_init() and not threads()
    written = sorted(p.name.split("-")[0] for p in (tmp_path / "out").iterdir())
    assert written == ["episode", "film", "moment.bin"]
    recorded = Dataset(next((tmp_path / "out").glob("episode-*")), verify="sha256")
    assert len(recorded) > 20 and recorded.facts["world"] in ("dream", "real")


@pytest.mark.slow
def test_a_thousand_random_keys(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = (
        "TAB",
        "BACKSPACE",
        "RETURN",
        "LEFTBRACKET",
        "RIGHTBRACKET",
        "COMMA",
        "PERIOD",
        "MINUS",
        "EQUALS",
        "F5",
        "F9",
        "UP",
        "DOWN",
        "LEFT",
        "RIGHT",
        *"abdefghmnopqrsvwx",
        "9",
        "0",
        "z",
        "F1",
    )
    known = [getattr(pygame, f"K_{name}") for name in names]
    rng = np.random.default_rng(0)
    Script([[int(k) for k in rng.choice(known, 2)] for _ in range(500)], monkeypatch, every=4)
    monkeypatch.setattr(dreamenv.play.events, "find_bundles", lambda: [toy_bundle])
    figures = run(PlayConfig(bundle=toy_bundle, scale=1, fps=200.0, device="cpu", out=tmp_path / "out"))
    assert figures["steps"] > 0 and not threads()
    for path in (tmp_path / "out").glob("*"):
        assert not path.name.startswith("."), f"{path.name}: half written"


def test_a_gamepad_presses_keys(toy_bundle: Path, calm_bundle: Bundle, tmp_path: Path) -> None:
    window = Window(lambda *_: Session(calm_bundle), toy_bundle, "coinrun", 1, 15.0, tmp_path)
    try:
        event = pygame.event.Event
        for given, expected in (
            (event(pygame.JOYAXISMOTION, axis=0, value=0.9), "right"),
            (event(pygame.JOYBUTTONDOWN, button=0), "right+up"),
            (event(pygame.JOYAXISMOTION, axis=0, value=-0.8), "left+up"),
            (event(pygame.JOYBUTTONUP, button=0), "left"),
            (event(pygame.JOYAXISMOTION, axis=0, value=0.1), "noop"),
            (event(pygame.JOYHATMOTION, value=(1, -1)), "right+down"),
            (event(pygame.JOYHATMOTION, value=(0, 0)), "noop"),
            (event(pygame.JOYBUTTONDOWN, button=1), "d"),
        ):
            assert window._handle(given)
            window._tapped.clear()  # as the next step does
            assert NAMES[window.held_action()] == expected
        assert not window.paused
        window._handle(event(pygame.JOYBUTTONDOWN, button=7))
        assert window.paused
    finally:
        window._close()


def test_no_display_is_a_clear_error(toy_bundle: Path) -> None:
    environment = {**os.environ, "SDL_VIDEODRIVER": "x11", "DISPLAY": ":999"}
    done = subprocess.run(
        [sys.executable, "-m", "dreamenv", "play", "--bundle", str(toy_bundle)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "--headless" in done.stderr


_FILM = {"headless": Path("x.mp4"), "player": "random"}


def test_without_a_window_somebody_plays(toy_bundle: Path, tmp_path: Path) -> None:
    """The bundle's agent, or chance where it ships none: the embedded one has one, the toy has not."""
    films = {}
    for name, bundle in (("toy", toy_bundle), ("embedded", None)):
        path = tmp_path / f"{name}.gif"
        films[name] = run(PlayConfig(bundle=bundle, world="dream", headless=path, steps=12, scale=1, device="cpu"))
        assert films[name]["steps"] == 12 and iio.imread(path).shape[0] >= 10
        again = iio.imread(path)
        assert np.abs(np.diff(again.astype(int), axis=0)).max() > 0, "something moves"


@pytest.mark.parametrize(
    "bad",
    [
        {"scale": 0},
        {"scale": 33},
        {"fps": 0.0},
        {"fps": -1.0},
        {"player": "nobody"},
        {"player": "agent"},
        {"world": "moon"},
        _FILM | {"headless": Path("x.avi")},
        _FILM | {"actions": "fly"},
        _FILM | {"steps": 0},
    ],
)
def test_bad_arguments(toy_bundle: Path, bad: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        run(PlayConfig(bundle=toy_bundle, **{"device": "cpu", **bad}))
    assert not list(tmp_path.iterdir()) and not threads()


@pytest.mark.parametrize("name", ["dreamenv:DreamProcgen-v0", "envs:RealProcgen-v0"])
def test_gymnasiums_own_play_works(name: str, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    # gymnasium asks for a Tk backend when it is imported, which fails without a display once pyplot draws elsewhere
    monkeypatch.setattr(matplotlib, "use", lambda *_, **__: None)
    from gymnasium.utils.play import play

    options = {"bundle": str(toy_bundle)} if "Dream" in name else {}
    env = gym.make(name, render_mode="rgb_array", **options)
    seen: list[int] = []
    events = iter(
        [
            [(pygame.KEYDOWN, pygame.K_RIGHT)],
            [(pygame.KEYDOWN, pygame.K_UP)],
            [(pygame.KEYUP, pygame.K_RIGHT)],
            [(pygame.KEYDOWN, pygame.K_ESCAPE)],
        ]
    )
    monkeypatch.setattr(pygame.event, "get", lambda: [pygame.event.Event(kind, key=key) for kind, key in next(events)])
    play(
        env, fps=1000, zoom=2, seed=0, callback=lambda before, after, action, *rest: seen.append(int(action)), noop=NOOP
    )
    assert [NAMES[a] for a in seen] == ["right", "right+up", "up", "up"][: len(seen)] and len(seen) >= 3


def test_bundles_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_bundle: Path) -> None:

    monkeypatch.chdir(tmp_path)
    embedded = find_bundles()
    assert embedded == sorted({folder for mode in ("easy", "hard") for folder in embedded_games(mode).values()})
    shutil.copytree(toy_bundle, tmp_path / "runs" / "mine" / "bundle")
    assert find_bundles() == [*embedded, Path("runs/mine/bundle")]
