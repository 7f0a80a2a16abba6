"""Playing: the session without a window, what is drawn, the window on SDL's dummy display, recordings, the viewer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import numpy as np
import pygame
import pytest
from PIL import Image

import dreamenv.play
from dreamenv.actions import COMBOS, NAMES, NOOP
from dreamenv.bundle import Bundle, load_bundle
from dreamenv.controls import pressed_action
from dreamenv.data import Dataset
from dreamenv.errors import ConfigError, DatasetError, SnapshotError
from dreamenv.filming import film, parse_script
from dreamenv.flow import SamplerConfig
from dreamenv.play import Window, find_bundles, run
from dreamenv.recording import FilmRecorder
from dreamenv.screen import KEYS, Screen, View
from dreamenv.session import GRID, Session
from dreamenv.viewer import Viewer
from dreamenv.viewer import run as run_viewer
from tests.conftest import same_bytes, write_toy_bundle

RIGHT, UP = NAMES.index("right"), NAMES.index("up")


MEAN = SamplerConfig(nfe=1)  # without noise, so that an environment of another seed dreams the same


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_toy_bundle(tmp_path_factory.mktemp("calm") / "toy", calm=30.0), "cpu")


@pytest.fixture
def session(bundle: Bundle) -> Iterator[Session]:
    session = Session(bundle, MEAN, seed=1)
    session.load_real()
    session.new_start(level=5)
    yield session
    session.close()


def real_frames(level: int, actions: list[int]) -> list[np.ndarray]:
    env = gym.make("envs:RealProcgen-v0", num_levels=10000)
    frames = [env.reset(options={"level": level})[0], *[env.step(a)[0] for a in actions]]
    env.close()
    return frames


# -- keys ----------------------------------------------------------------------------------------------------------------


def test_key_combinations_are_the_games_own() -> None:
    assert pressed_action(set()) == NOOP
    assert COMBOS[pressed_action({pygame.K_RIGHT})] == ("RIGHT",)
    assert COMBOS[pressed_action({pygame.K_RIGHT, pygame.K_UP})] == ("RIGHT", "UP")
    assert COMBOS[pressed_action({pygame.K_d})] == ("D",)
    assert pressed_action({pygame.K_F1}) == NOOP


def test_scripts_are_parsed_or_refused() -> None:
    assert parse_script("right*3, up,noop*2") == [RIGHT] * 3 + [UP] + [NOOP] * 2
    for bad in ("fly", "right*0", "right*x", "", "right*100001", "right**2"):
        with pytest.raises(ConfigError, match="action|count"):
            parse_script(bad)


# -- the session ---------------------------------------------------------------------------------------------------------


def test_both_worlds_are_stepped_from_one_start(session: Session) -> None:
    actions = [RIGHT, RIGHT, UP, NOOP, RIGHT]
    expected = real_frames(5, actions)
    alone = gym.make("dreamenv:DreamProcgen-v0", bundle=session.bundle, sampler=asdict(MEAN))
    dream = [alone.reset(seed=0, options={"frames": expected[0][None]})[0]]
    errors = []
    for i, action in enumerate(actions):
        moment = session.step(action)
        dream.append(alone.step(action)[0])
        assert np.array_equal(moment.real, expected[i + 1]) and np.array_equal(moment.dream, dream[-1])
        errors.append(np.mean((dream[-1].astype(float) - expected[i + 1]) ** 2) / 255**2)
        assert moment.psnr == pytest.approx(-10 * np.log10(np.mean(errors)), abs=1e-4)
    assert moment.step == 5 and moment.action == RIGHT and session.shown == ("real", "dream")


def test_a_real_game_that_loads_late_catches_up(bundle: Bundle) -> None:
    session = Session(bundle, seed=3)
    assert session.shown == ("dream",) and session.moment.real is None
    level = session._level
    for _ in range(6):
        session.step(RIGHT)
    with pytest.raises(ConfigError, match="real game"):
        session.synchronise()
    session.load_real()
    moment = session.step(UP)
    assert np.array_equal(moment.real, real_frames(level, [RIGHT] * 6 + [UP])[-1])
    assert session.shown == ("real", "dream") and moment.step == 7
    session.close()


def test_rewind_replays_to_the_byte(session: Session) -> None:
    session.sampler = SamplerConfig(nfe=2)
    moments = [session.step(a) for a in (RIGHT, UP, RIGHT, RIGHT, NOOP, UP)]
    assert session.can_rewind == 6
    back = session.rewind(4)
    assert back.step == 2 and np.array_equal(back.dream, moments[1].dream) and np.array_equal(back.real, moments[1].real)
    again = [session.step(a) for a in (RIGHT, RIGHT, NOOP, UP)]
    for a, b in zip(again, moments[2:], strict=True):
        assert np.array_equal(a.dream, b.dream) and np.array_equal(a.real, b.real) and a.psnr == b.psnr
    assert session.rewind(100).step == 0 and session.rewind().step == 0


def test_a_saved_moment_is_loaded_elsewhere(session: Session, bundle: Bundle, tmp_path: Path) -> None:
    session.sampler = SamplerConfig(nfe=2)  # the other session's too, so that its noise has to come from the file
    for a in (RIGHT, UP, RIGHT):
        session.step(a)
    session.save(tmp_path / "deep" / "moment.bin")
    after = [session.step(a) for a in (RIGHT, NOOP)]
    other = Session(bundle, SamplerConfig(nfe=2), seed=9)
    other.load_real()
    other.new_start()
    assert other.load(tmp_path / "deep" / "moment.bin").step == 3
    for expected, a in zip(after, (RIGHT, NOOP), strict=True):
        moment = other.step(a)
        assert np.array_equal(moment.dream, expected.dream) and np.array_equal(moment.real, expected.real)
        assert moment.psnr == pytest.approx(expected.psnr) and moment.rewards == expected.rewards
    other.close()
    data = (tmp_path / "deep" / "moment.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[:-100])
    (tmp_path / "flipped.bin").write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    before = session.moment
    for name in ("cut.bin", "flipped.bin", "missing.bin"):
        with pytest.raises(SnapshotError):
            session.load(tmp_path / name)
    assert session.moment is before


def test_futures_are_what_then_happens(session: Session) -> None:
    session.step(RIGHT)
    futures = session.branch(4)
    assert futures.shape == (9, 5, 64, 64, 3) and futures.dtype == np.uint8
    assert (futures[:, 0] == session.moment.dream).all()
    cell = GRID.index(UP)
    lived = session.adopt(cell, 4)
    assert np.abs(futures[cell, -1].astype(int) - lived.dream).max() <= 1  # a batch of nine rounds otherwise than one
    assert lived.step == 5 and np.array_equal(lived.real, real_frames(5, [RIGHT] + [UP] * 4)[-1])
    with pytest.raises(ConfigError, match="cell"):
        session.adopt(9, 4)


def test_a_future_is_lived_with_its_own_noise(session: Session) -> None:
    session.sampler = SamplerConfig(nfe=2)
    session.step(RIGHT)
    futures = session.branch(3)
    cell = GRID.index(NAMES.index("left"))
    lived = session.adopt(cell, 3)
    assert np.abs(futures[cell, -1].astype(int) - lived.dream).mean() < 0.5  # a batch of nine rounds otherwise than one
    session.rewind(3)
    own = [session.step(GRID[cell]) for _ in range(3)][-1]
    assert np.abs(own.dream.astype(int) - lived.dream).mean() < 0.5, "a rewound future keeps its noise"


def test_another_game_ends_the_recording(session: Session, tmp_path: Path) -> None:
    session.record(tmp_path / "played")
    session.step(RIGHT)
    session.load_real("maze")
    session.step(UP)
    assert session.recorder is None and Dataset(tmp_path / "played").facts["game"] == "coinrun"
    for _ in range(3):
        session.step(UP)
    session.load_real("coinrun")
    assert session.step(UP).step == 1 and session.paired, "back from another game both worlds start anew"


def test_a_moment_of_another_game_moves_neither_world(session: Session, tmp_path: Path) -> None:
    session.step(RIGHT)
    session.save(tmp_path / "m.bin")
    session.load_real("maze")
    before = session.step(UP)
    dream = session.dream.snapshot()
    with pytest.raises(SnapshotError):
        session.load(tmp_path / "m.bin")
    assert session.moment is before and same_bytes(session.dream.snapshot(), dream)


def test_rewinding_a_recording_past_an_end(tmp_path: Path) -> None:
    """The real game ends, the dream goes on, all is taken back: only what was recorded since is forgotten."""
    session = Session(load_bundle(write_toy_bundle(tmp_path / "long", max_steps=1000, calm=30.0), "cpu"))
    session.load_real()
    session.new_start(level=5)
    session.record(tmp_path / "played")
    while not session.moment.ended["real"] and session.moment.step < 900:
        if session.moment.step % 8 == 0:
            session.synchronise()  # an untrained dream does not hold for long
        session.step(RIGHT if session.moment.step % 5 else NAMES.index("right+up"))
    assert session.recorder is not None and not session.moment.ended["dream"]
    rows = len(session.recorder)
    for _ in range(5):
        session.step(NOOP)
    assert len(session.recorder) == rows
    session.rewind(5)
    assert len(session.recorder) == rows and session.moment.ended["real"]
    session.rewind(2)
    assert len(session.recorder) == rows - 2 and not session.moment.ended["real"]
    session.close()


def test_a_followed_dream_is_recorded_from_what_it_went_on_from(session: Session, tmp_path: Path) -> None:
    session.mode = "dream"
    session.record(tmp_path / "played")
    session.follow(True)
    for _ in range(3):
        session.step(RIGHT)
    session.follow(False)
    session.step(RIGHT)
    folder = session.stop_recording()
    assert folder is not None
    shard = Dataset(folder).shards[0]
    model, real = session.bundle.world_model, real_frames(5, [RIGHT] * 3)
    assert shard.first.tolist() == [True, True, True, False]
    assert all(np.array_equal(shard.frames[i], model.decode(model.encode(real[i][None]))[0].numpy()) for i in range(3))
    assert Dataset(folder).facts["world"] == "dream"


def test_synchronising_and_following(session: Session) -> None:
    for _ in range(5):
        session.step(RIGHT)
    session.synchronise()
    model, real = session.bundle.world_model, session.moment.real
    assert np.array_equal(session.moment.dream, model.decode(model.encode(real[None]))[0].numpy())
    assert session.moment.psnr is None
    frames = real_frames(5, [RIGHT] * 7)
    session.follow(True)
    moments = [session.step(RIGHT) for _ in range(2)]
    alone = gym.make("dreamenv:DreamProcgen-v0", bundle=session.bundle, sampler=asdict(MEAN))
    for i, moment in enumerate(moments):  # each is one step from the real frames before it
        history = {"frames": np.stack(frames[2 + i : 6 + i]), "actions": np.full(3, RIGHT)}
        alone.reset(options=history)
        assert np.array_equal(moment.dream, alone.step(RIGHT)[0])


def test_chance_and_agents_take_over(bundle: Bundle, tmp_path: Path) -> None:
    from dreamenv.models.impala import ImpalaAgent, ImpalaConfig, save_agent

    save_agent(tmp_path / "agent", ImpalaAgent(ImpalaConfig(channels=(4, 4, 4), features=8)))
    session = Session(bundle, agent=str(tmp_path / "agent"), seed=0)
    assert [session.next_player() for _ in range(3)] == ["agent", "random", "human"]
    for player in ("agent", "random"):
        session.player = player
        assert len({session.step(NOOP).action for _ in range(30)}) > 3
    session.close()


def test_another_real_game_is_played_alone(session: Session) -> None:
    session.load_real("bigfish")
    moment = session.step(UP)
    assert session.game == "bigfish" and session.shown == ("real",) and not session.paired
    assert "move up" in session.action_meanings and moment.psnr is None
    with pytest.raises(ConfigError, match="bigfish"):
        session.branch(3)
    session.load_real("nonsense")
    assert "nonsense" in session.real_problem
    session.load_real("coinrun")
    session.step(UP)
    assert session.paired


def test_an_end_stays_on_show_and_then_starts_anew(toy_bundle: Path, tmp_path: Path) -> None:
    session = Session(load_bundle(write_toy_bundle(tmp_path / "short", max_steps=5), "cpu"), seed=0)
    while not session.over:
        session.step(NOOP)
    assert session.moment.ended["dream"] in ("the end", "time is up")
    assert session.step(NOOP).step == 0 and not session.over
    session.close()


# -- what is drawn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [Screen.size(6, 2), Screen.size(12, 2), (1300, 470), (700, 900), Screen.size(4, 1)])
def test_no_text_is_cut_or_overlaps(session: Session, size: tuple[int, int]) -> None:
    for _ in range(3):
        session.step(RIGHT)
    screen, surface = Screen(), pygame.Surface(size)
    menu = [("coinrun (built in)", "bundle in somewhere/rather/deep/coinrun")]
    menu += [(f"game {i}", "real game alone") for i in range(40)]
    common: dict[str, Any] = {
        "game": "coinrun", "bundle": "coinrun (built in)", "meanings": ("run left", "jump", "drop through a crate") * 5,
        "uncertainty": [0.1, 9.9, 0.3] * 60, "latency": 0.0678, "fps": 14.98, "rewind": 10.0,
        "message": "the dream goes on from the real frames", "futures": session.branch(2), "menu": menu, "selected": 30,
    }  # fmt: skip
    views = [View(session.moment, shown, paused=paused, filming=12345, recording=12345, overlay=overlay, slow=not paused,
                  **common)
             for shown in (("real", "dream"), ("dream",)) for paused in (True, False)
             for overlay in ("", "help", "menu", "branches")]  # fmt: skip
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
    source = Path(sys.modules["dreamenv.play"].__file__ or "").read_text()
    named = {"arrows": "keys_to_action", "D A W S Q E": "keys_to_action", "TAB": "K_TAB", "BACKSPACE": "K_BACKSPACE",
             "[  ]": "K_LEFTBRACKET", ",  .": "K_COMMA", "-  =": "K_MINUS", "F5  F9": "K_F9", "9  0": "K_9",
             "ESC": "K_ESCAPE", "F11": "K_F11"}  # fmt: skip
    for key, _ in KEYS:
        assert named.get(key, f"K_{key.lower()}") in source, key


# -- the window ----------------------------------------------------------------------------------------------------------


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
    script = [[], [k.K_v], [k.K_x], [k.K_RIGHT], [k.K_UP], [k.K_TAB], [k.K_TAB], [k.K_p], [k.K_o], [k.K_p], [k.K_F5],
              [k.K_RIGHT], [k.K_F9], [k.K_b], [], [], [], [k.K_RIGHT], [k.K_RETURN], [], [], [], [], [k.K_h], [k.K_ESCAPE],
              [k.K_m], [k.K_DOWN], [k.K_ESCAPE], [k.K_g], [], [k.K_g], [k.K_RIGHTBRACKET], [k.K_COMMA], [k.K_0], [k.K_EQUALS],
              [k.K_r], [k.K_f], [], [k.K_f], [k.K_BACKSPACE], [k.K_n], [], [k.K_x], [k.K_v], [], [], [k.K_ESCAPE],
              [k.K_ESCAPE]]  # fmt: skip
    Script(script, monkeypatch, every=25)
    figures = run("coinrun", toy_bundle, "both", 2, 60.0, SamplerConfig(), "cpu", 0, out=tmp_path / "out")
    assert figures["steps"] > 50 and figures["latency_median"] is not None and figures["latency_median"] < 1
    assert not pygame.display.get_init() and not threads()
    written = sorted(p.name.split("-")[0] for p in (tmp_path / "out").iterdir())
    assert written == ["episode", "film", "moment.bin"]
    recorded = Dataset(next((tmp_path / "out").glob("episode-*")), verify="sha256")
    assert len(recorded) > 20 and recorded.facts["world"] in ("dream", "real")


def test_a_thousand_random_keys(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("TAB", "BACKSPACE", "RETURN", "LEFTBRACKET", "RIGHTBRACKET", "COMMA", "PERIOD", "MINUS", "EQUALS", "F5", "F9",
             "UP", "DOWN", "LEFT", "RIGHT", *"abdefghmnopqrsvwx", "9", "0", "z", "F1")  # fmt: skip
    known = [getattr(pygame, f"K_{name}") for name in names]
    rng = np.random.default_rng(0)
    Script([[int(k) for k in rng.choice(known, 2)] for _ in range(500)], monkeypatch, every=4)
    monkeypatch.setattr(dreamenv.play, "find_bundles", lambda: [toy_bundle])
    figures = run("coinrun", toy_bundle, "both", 1, 200.0, SamplerConfig(), "cpu", 0, out=tmp_path / "out")
    assert figures["steps"] > 0 and not threads()
    for path in (tmp_path / "out").glob("*"):
        assert not path.name.startswith("."), f"{path.name}: half written"


def test_a_gamepad_presses_keys(toy_bundle: Path, bundle: Bundle, tmp_path: Path) -> None:
    window = Window(lambda _: Session(bundle), toy_bundle, 1, 15.0, tmp_path)
    try:
        event = pygame.event.Event
        for given, expected in (
            (event(pygame.JOYAXISMOTION, axis=0, value=0.9), "right"), (event(pygame.JOYBUTTONDOWN, button=0), "right+up"),
            (event(pygame.JOYAXISMOTION, axis=0, value=-0.8), "left+up"), (event(pygame.JOYBUTTONUP, button=0), "left"),
            (event(pygame.JOYAXISMOTION, axis=0, value=0.1), "noop"), (event(pygame.JOYHATMOTION, value=(1, -1)), "right+down"),
            (event(pygame.JOYHATMOTION, value=(0, 0)), "noop"), (event(pygame.JOYBUTTONDOWN, button=1), "d"),
        ):  # fmt: skip
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
    done = subprocess.run([sys.executable, "-m", "dreamenv", "play", "--bundle", str(toy_bundle)], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2 and "--headless" in done.stderr


_FILM = {"headless": Path("x.mp4"), "player": "random"}


@pytest.mark.parametrize("bad", [
    {"scale": 0}, {"scale": 33}, {"fps": 0.0}, {"fps": -1.0}, {"player": "nobody"}, {"player": "agent"}, {"world": "moon"},
    _FILM | {"headless": Path("x.avi")}, _FILM | {"player": "human"}, _FILM | {"actions": "fly"}, _FILM | {"steps": 0},
])  # fmt: skip
def test_bad_arguments(toy_bundle: Path, bad: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        run("coinrun", toy_bundle, **{"device": "cpu", **bad})
    assert not list(tmp_path.iterdir()) and not threads()


# -- films and recordings ------------------------------------------------------------------------------------------------


def test_films_hold_every_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [np.full((33, 49, 3), rng.integers(256), np.uint8) for _ in range(7)] + [np.zeros((20, 60, 3), np.uint8)]
    for name in ("a.mp4", "a.gif"):
        recorder = FilmRecorder(tmp_path / name, 15)
        for picture in pictures:
            recorder.add(picture)
        assert recorder.close() == tmp_path / name
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 8 and frames[0].shape == (32, 48, 3)
    assert all(abs(int(f[8, 8, 0]) - int(p[8, 8, 0])) <= 4 for f, p in zip(frames, pictures, strict=True))
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 8 and gif.size == (48, 32)
    blocked = FilmRecorder(tmp_path / "a.mp4" / "below.gif", 15)  # a file is no folder
    for picture in pictures:
        blocked.add(picture)
    with pytest.raises(ConfigError, match="could not be written"):
        blocked.close()
    assert FilmRecorder(tmp_path / "none.mp4", 15).close() is None and not (tmp_path / "none.mp4").exists()


def test_what_is_played_can_train(session: Session, tmp_path: Path) -> None:
    from trainers.latents import training_data

    session.record(tmp_path / "played")
    actions = [RIGHT, UP, RIGHT, NOOP, RIGHT, RIGHT]
    for a in actions[:4]:
        session.step(a)
    session.rewind(1)
    for a in actions[3:]:
        session.step(a)
    session.new_start(level=7)
    session.step(UP)
    folder = session.stop_recording()
    assert folder is not None
    dataset = training_data(folder)
    shard = dataset.shards[0]
    frames = real_frames(5, actions)
    assert shard.actions.tolist() == [*actions, UP] and shard.level_seeds.tolist() == [5] * 6 + [7]
    assert shard.first.tolist() == [True] + [False] * 5 + [True]
    assert all(np.array_equal(shard.frames[i], frames[i]) for i in range(6))
    assert dataset.facts["world"] == "real" and dataset.manifest["complete"]
    assert session.stop_recording() is None


def test_without_a_display(session: Session, toy_bundle: Path, tmp_path: Path) -> None:
    result = film(session, tmp_path / "film.mp4", 12, parse_script("right*3,up"), scale=2)
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 12 == result["steps"]
    assert session.moment.step == 12
    command = [sys.executable, "-m", "dreamenv", "play", "--bundle", str(toy_bundle), "--headless", str(tmp_path / "cli.gif"),
               "--player", "random", "--steps", "5", "--scale", "2"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("SDL_VIDEODRIVER", "DISPLAY")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 5
    with Image.open(tmp_path / "cli.gif") as gif:
        assert gif.n_frames == 5


def test_the_viewer_walks_through_episodes(session: Session, tmp_path: Path) -> None:
    session.record(tmp_path / "played")
    for level, steps in ((5, 4), (6, 3)):
        session.new_start(level=level)
        for _ in range(steps):
            session.step(RIGHT)
    session.stop_recording()
    viewer = Viewer(Dataset(tmp_path / "played"))
    assert [e.end - e.start for e in viewer.episodes] == [4, 3] and len(viewer) == 4
    surface = pygame.Surface(Viewer.size(8))
    key = lambda k: viewer.handle(pygame.event.Event(pygame.KEYDOWN, key=k), surface.get_size())  # noqa: E731
    for k, episode, step in ((pygame.K_RIGHT, 0, 1), (pygame.K_END, 0, 3), (pygame.K_RIGHT, 0, 3), (pygame.K_DOWN, 1, 0),
                             (pygame.K_DOWN, 1, 0), (pygame.K_LEFT, 1, 0), (pygame.K_UP, 0, 0)):  # fmt: skip
        assert key(k) and (viewer.episode, viewer.step) == (episode, step)
    key(pygame.K_SPACE)
    for _ in range(10):
        viewer.advance()
    assert viewer.step == 3 and not viewer.playing
    viewer.go(1)
    viewer.draw(surface)
    bar = viewer.bar(surface.get_size())
    middle = pygame.event.Event(pygame.MOUSEBUTTONDOWN, button=1, pos=(bar.x + bar.width // 2, bar.centery))
    viewer.handle(middle, surface.get_size())
    assert viewer.step == 1
    facts = dict(viewer.facts())
    assert facts["level"] == "6" and facts["action"] == "right" and facts["policy"] == "played" and facts["step"] == "2 of 3"
    viewer.draw(surface)
    for text, place, box in viewer.lines.texts:
        assert box.contains(place), text
    result = run_viewer(tmp_path / "played", 1, 4, 15.0, tmp_path / "view.mp4")
    assert result["steps"] == 3 and (tmp_path / "view.mp4").exists()
    with pytest.raises(ConfigError, match="episode 2"):
        Viewer(Dataset(tmp_path / "played"), 2)
    with pytest.raises(DatasetError):
        run_viewer(tmp_path / "nothing")
    assert not key(pygame.K_ESCAPE)


@pytest.mark.parametrize("name", ["dreamenv:DreamProcgen-v0", "envs:RealProcgen-v0"])
def test_gymnasiums_own_play_works(name: str, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    # gymnasium asks for a Tk backend when it is imported, which fails without a display once pyplot draws elsewhere
    monkeypatch.setattr(matplotlib, "use", lambda *_, **__: None)
    from gymnasium.utils.play import play

    options = {"bundle": str(toy_bundle)} if "Dream" in name else {}
    env = gym.make(name, render_mode="rgb_array", **options)
    seen: list[int] = []
    events = iter([[(pygame.KEYDOWN, pygame.K_RIGHT)], [(pygame.KEYDOWN, pygame.K_UP)], [(pygame.KEYUP, pygame.K_RIGHT)],
                   [(pygame.KEYDOWN, pygame.K_ESCAPE)]])  # fmt: skip
    monkeypatch.setattr(pygame.event, "get", lambda: [pygame.event.Event(kind, key=key) for kind, key in next(events)])
    play(env, fps=1000, zoom=2, seed=0, callback=lambda before, after, action, *rest: seen.append(int(action)), noop=NOOP)
    assert [NAMES[a] for a in seen] == ["right", "right+up", "up", "up"][: len(seen)] and len(seen) >= 3


def test_bundles_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_bundle: Path) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    embedded = find_bundles()
    assert [p.name for p in embedded] == ["coinrun"]
    shutil.copytree(toy_bundle, tmp_path / "runs" / "mine" / "bundle")
    assert find_bundles() == [*embedded, Path("runs/mine/bundle")]
