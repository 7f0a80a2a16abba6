"""Playing without a window: keys, the session, films, recordings, the viewer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import av
import gymnasium as gym
import numpy as np
import pygame
import pytest
from PIL import Image

from dreamenv.bundle import Bundle, load_bundle
from dreamenv.contract.actions import COMBOS, NAMES, NOOP
from dreamenv.data import Dataset
from dreamenv.errors import ConfigError, DatasetError, SnapshotError
from dreamenv.flow import SamplerConfig
from dreamenv.play.headless import film, parse_script
from dreamenv.play.keys import pressed_action
from dreamenv.play.recording import FilmRecorder
from dreamenv.play.session import Session
from dreamenv.play.timeline import GRID
from dreamenv.play.viewer import Viewer
from dreamenv.play.viewer import run as run_viewer
from tests.conftest import MEAN, same_bytes, write_toy_bundle

RIGHT, UP = NAMES.index("right"), NAMES.index("up")


def real_frames(level: int, actions: list[int]) -> list[np.ndarray]:
    env = gym.make("envs:RealProcgen-v0", num_levels=10000)
    frames = [env.reset(options={"level": level})[0], *[env.step(a)[0] for a in actions]]
    env.close()
    return frames


# -- keys
# ----------------------------------------------------------------------------------------------------------------


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


# -- the session
# ---------------------------------------------------------------------------------------------------------


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


def test_a_real_game_that_loads_late_catches_up(calm_bundle: Bundle) -> None:
    session = Session(calm_bundle, seed=3)
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
    assert (
        back.step == 2 and np.array_equal(back.dream, moments[1].dream) and np.array_equal(back.real, moments[1].real)
    )
    again = [session.step(a) for a in (RIGHT, RIGHT, NOOP, UP)]
    for a, b in zip(again, moments[2:], strict=True):
        assert np.array_equal(a.dream, b.dream) and np.array_equal(a.real, b.real) and a.psnr == b.psnr
    assert session.rewind(100).step == 0 and session.rewind().step == 0


def test_a_saved_moment_is_loaded_elsewhere(session: Session, calm_bundle: Bundle, tmp_path: Path) -> None:
    session.sampler = SamplerConfig(nfe=2)  # the other session's too, so that its noise has to come from the file
    for a in (RIGHT, UP, RIGHT):
        session.step(a)
    session.save(tmp_path / "deep" / "moment.bin")
    after = [session.step(a) for a in (RIGHT, NOOP)]
    other = Session(calm_bundle, SamplerConfig(nfe=2), seed=9)
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
    for i in range(3):
        alone = model.decode(model.encode(real[i][None]))[0].numpy()  # in another batch, which rounds otherwise
        assert np.abs(shard.frames[i].astype(int) - alone).max() <= 1
    assert Dataset(folder).facts["world"] == "dream"


def test_synchronising_and_following(session: Session) -> None:
    for _ in range(5):
        session.step(RIGHT)
    session.synchronise()
    model, real = session.bundle.world_model, session.moment.real
    alone = model.decode(model.encode(real[None]))[
        0
    ].numpy()  # in another batch than the session's, which rounds otherwise
    assert np.abs(session.moment.dream.astype(int) - alone).max() <= 1
    assert session.moment.psnr is None
    frames = real_frames(5, [RIGHT] * 7)
    session.follow(True)
    moments = [session.step(RIGHT) for _ in range(2)]
    alone = gym.make("dreamenv:DreamProcgen-v0", bundle=session.bundle, sampler=asdict(MEAN))
    for i, moment in enumerate(moments):  # each is one step from the real frames before it
        history = {"frames": np.stack(frames[2 + i : 6 + i]), "actions": np.full(3, RIGHT)}
        alone.reset(options=history)
        assert np.array_equal(moment.dream, alone.step(RIGHT)[0])


def test_chance_and_agents_take_over(calm_bundle: Bundle, tmp_path: Path) -> None:
    from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, save_agent

    save_agent(tmp_path / "agent", ImpalaAgent(ImpalaConfig(channels=(4, 4, 4), features=8)))
    session = Session(calm_bundle, agent=str(tmp_path / "agent"), seed=0)
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


# -- films and recordings
# ------------------------------------------------------------------------------------------------


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
    from trainers.encode import training_data

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
    command = [
        sys.executable,
        "-m",
        "dreamenv",
        "play",
        "--bundle",
        str(toy_bundle),
        "--headless",
        str(tmp_path / "cli.gif"),
        "--player",
        "random",
        "--steps",
        "5",
        "--scale",
        "2",
    ]
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
    for k, episode, step in (
        (pygame.K_RIGHT, 0, 1),
        (pygame.K_END, 0, 3),
        (pygame.K_RIGHT, 0, 3),
        (pygame.K_DOWN, 1, 0),
        (pygame.K_DOWN, 1, 0),
        (pygame.K_LEFT, 1, 0),
        (pygame.K_UP, 0, 0),
    ):
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
    assert (
        facts["level"] == "6"
        and facts["action"] == "right"
        and facts["policy"] == "played"
        and facts["step"] == "2 of 3"
    )
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
