"""What playing leaves behind: films, recordings, and the viewer of datasets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pygame
import pytest
from PIL import Image

from dreamenv.bundle import load_bundle
from dreamenv.contract.actions import NAMES, NOOP
from dreamenv.data import Dataset
from dreamenv.errors import ConfigError, DatasetError
from dreamenv.play.headless import film, parse_script
from dreamenv.play.recording import FilmRecorder
from dreamenv.play.session import Session
from dreamenv.play.viewer import Viewer
from dreamenv.play.viewer import run as run_viewer
from dreamenv.stages import program
from dreamenv.video import check_film
from tests.conftest import write_toy_bundle
from tests.play.common import RIGHT, UP, real_frames


def test_a_film_that_cannot_be_written_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_film(Path("film.mp4"))
    monkeypatch.setitem(sys.modules, "av", None)
    check_film(Path("film.gif"))
    with pytest.raises(ConfigError, match=r"film film.mp4: needs av: pip install 'dreamenv\[play\]'"):
        check_film(Path("film.mp4"))
    with pytest.raises(ConfigError, match="must end in .mp4 or .gif"):
        check_film(Path("film.avi"))


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


@pytest.mark.slow
def test_without_a_display(session: Session, toy_bundle: Path, tmp_path: Path) -> None:
    result = film(session, tmp_path / "film.mp4", 12, parse_script("right*3,up"), scale=2)
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 12 == result["steps"]
    assert session.moment.step == 12
    options = {"bundle": toy_bundle, "headless": tmp_path / "cli.gif", "player": "random", "steps": 5, "scale": 2}
    command = program("dreamenv", "play", **options)
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
