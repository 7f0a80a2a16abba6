"""Playing without a window: keys, the session, films, recordings, the viewer."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pygame
import pytest

from dreamenv.bundle import Bundle, Starts, load_bundle
from dreamenv.contract.actions import COMBOS, NAMES, NOOP
from dreamenv.contract.games import get_game
from dreamenv.data import Dataset
from dreamenv.errors import ConfigError, SnapshotError
from dreamenv.flow import SamplerConfig
from dreamenv.play.headless import parse_script
from dreamenv.play.keys import pressed_action
from dreamenv.play.run import PlayConfig, run
from dreamenv.play.session import Session
from dreamenv.play.timeline import GRID, futures_grid
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, save_agent
from tests.conftest import MEAN, same_bytes, write_toy_bundle
from tests.play.common import RIGHT, UP, real_frames


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


def begun_in(bundle: Bundle, levels: list[int], keys: list[int]) -> Bundle:
    """The bundle with starts in levels of the real game, each after some keys."""
    frames = np.stack([real_frames(level, keys)[-1:] for level in levels])
    starts = Starts(frames, np.zeros((len(levels), 0), np.uint8), np.array(levels, np.int32))
    return replace(bundle, starts=starts)


def test_a_real_game_that_loads_late_catches_up(calm_bundle: Bundle) -> None:
    session = Session(begun_in(calm_bundle, [3, 8], []), seed=3)
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


@pytest.mark.parametrize("levels, keys", [((0, 10_000), [RIGHT] * 9), ((10_000, 1000), [])])
def test_a_real_game_that_cannot_catch_up_begins_anew(
    calm_bundle: Bundle, levels: tuple[int, int], keys: list[int]
) -> None:
    session = Session(begun_in(calm_bundle, [3], keys), levels=levels, seed=3)
    session.step(RIGHT)
    session.load_real()
    moment = session.look()
    assert moment.step == 0 and levels[0] <= session._level < sum(levels)
    assert np.array_equal(moment.real, real_frames(session._level, [])[-1])
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


def test_fire_is_among_the_futures_of_games_that_have_it() -> None:
    grids = {name: futures_grid(get_game(name).meanings) for name in ("maze", "dodgeball", "ninja")}
    assert [grid.get(9) for grid in grids.values()] == [None, "throw a ball", "throw ahead"]
    assert [len(grid) for grid in grids.values()] == [9, 9, 9] and [list(grid)[4] for grid in grids.values()] == [
        4,
        9,
        9,
    ]
    assert list(grids["ninja"].values())[:2] == ["left+up", "up"]
    assert tuple(futures_grid(())) == GRID


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


def test_who_plays_is_asked_of_the_first_game_only(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(toy_bundle, tmp_path / "with-agent")
    save_agent(folder / "agent", ImpalaAgent(ImpalaConfig(channels=(4, 4, 4), features=8)))
    opened: list[tuple[str, ...]] = []

    def look(open_session: Any, *args: Any) -> Any:
        for place in (folder, toy_bundle, folder):
            session = open_session(place, "coinrun")
            opened.append((session.player, *session.players))
            session.close()
        return SimpleNamespace(run=dict)

    monkeypatch.setattr("dreamenv.play.run.Window", look)
    for agent in (None, "bundled", str(folder / "agent")):
        run(PlayConfig(bundle=folder, player="agent", agent=agent, device="cpu"))
    first, other = ("agent", "human", "agent", "random"), ("human", "human", "random")
    assert opened == [first, other, first] * 3
