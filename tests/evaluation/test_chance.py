"""What chance leaves to know: reseeded games, and how far their futures are apart."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreamenv.bundle import embedded_games, load_bundle
from dreamenv.errors import ConfigError, PolicyError, ResetError, SnapshotError
from dreamenv.evaluation.chance import _errors, chance
from dreamenv.evaluation.clips import moments, real_envs
from dreamenv.evaluation.compare import CompareConfig, _left_to_chance
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, save_agent
from envs.procgen import RealProcgenVectorEnv
from envs.states import reseeded


def play(env: RealProcgenVectorEnv, steps: int, seed: int = 0) -> np.ndarray:
    """Frames uint8 (T, N, 64, 64, 3) of random actions that `seed` decides."""
    actions = np.random.default_rng(seed).integers(15, size=(steps, env.num_envs))
    return np.stack([env.step(a)[0] for a in actions])


@pytest.mark.parametrize(("game", "by_chance"), [("bigfish", True), ("bossfight", True), ("maze", False)])
def test_other_random_numbers_change_what_is_left_to_chance_and_nothing_else(game: str, by_chance: bool) -> None:
    env = RealProcgenVectorEnv(3, game, start_level=10000, num_levels=100)
    env.reset(seed=4)
    play(env, 20)
    moment = env.snapshot()
    own = play(env, 40, 1)
    futures = []
    for seed in (5, 5, 2**63 - 1):
        shown = env.restore(moment)
        env.reseed(seed)
        assert np.array_equal(env._envs.observe()[1]["rgb"], shown), "what the game itself shows"
        futures.append(play(env, 40, 1))
    assert np.array_equal(futures[0], futures[1])
    for a, b in ((own, futures[0]), (futures[0], futures[2])):
        apart = [bool((a[:, i] != b[:, i]).any()) for i in range(3)]
        assert apart == [by_chance] * 3
    env.close()


def test_an_environment_gets_the_numbers_of_its_place_in_any_batch() -> None:
    seen = []
    for n in (1, 4):
        env = RealProcgenVectorEnv(n, "bigfish")
        env.reset(options={"level": np.full(n, 7)})
        env.reseed(3)
        seen.append(np.stack([env.step(np.full(n, 4))[0] for _ in range(60)], 1))
        env.close()
    assert np.array_equal(seen[0][0], seen[1][0])
    assert not np.array_equal(seen[1][0], seen[1][1]), "each has numbers of its own"


def test_reseeding_refuses_what_it_cannot_do() -> None:
    env = RealProcgenVectorEnv(1, "maze")
    with pytest.raises(ResetError, match="reset"):
        env.reseed(0)
    env.reset(seed=0)
    for wrong in (-1, 2**63, 1.5, None, True):
        with pytest.raises(ConfigError, match="seed"):
            env.reseed(wrong)  # pyright: ignore[reportArgumentType]
    env.close()
    with pytest.raises(SnapshotError, match="no random generator"):
        reseeded(b"nothing", (0,))
    words = b"1 " * 624
    for wrong in (b"\0\0\0\0" + words + b"624", b"\xff\x7f\0\0" + words + b"24", words + b"624"):
        with pytest.raises(SnapshotError, match="not as long"):
            reseeded(wrong, (0,))
    for position in (b"624", b"24", b"2"):  # whatever follows, a digit too, is kept
        text = words + position
        changed = reseeded(b"7" + len(text).to_bytes(4, "little") + text + b"5!", (0,))
        assert changed[:1] == b"7" and changed[-2:] == b"5!"
        length = int.from_bytes(changed[1:5], "little")
        assert len(changed) == 1 + 4 + length + 2 and len(changed[5 : 5 + length].split()) == 625


def test_the_best_prediction_of_a_coin_is_the_middle() -> None:
    """Half of the picture is black in one future and white in the other, the rest stands still."""
    last = np.zeros((1, 64, 64, 3), np.uint8)
    futures = np.zeros((2, 6, 64, 64, 3), np.uint8)
    futures[1, 2:, :32] = 255
    found = _errors(futures, last, np.array([1, 5]))
    assert found.best[0] == found.copied[0] == found.wrong[0] == 0 and found.still[0] == 64 * 64
    assert found.best[1] == pytest.approx(
        0.25
    )  # 2 runs: the sum of two squared halves, by one, over half of the picture
    assert found.copied[1] == pytest.approx(0.25), "black is right in one run and wrong in half of the other's picture"
    assert found.still[1] == pytest.approx((64 * 64 + 32 * 64) / 2)
    assert found.wrong[1] == pytest.approx(32 * 64 / 2), "what stands still in the black future is white in the other"
    moving = np.full((2, 6, 64, 64, 3), 9, np.uint8)
    assert not _errors(moving, last, np.array([1])).still.any()


def test_what_chance_leaves_of_games() -> None:
    facts = {game: load_bundle(embedded_games()[game], "cpu", game=game).game for game in ("maze", "bossfight")}
    certain = chance(facts["maze"], 12, 10)
    assert certain["chance_moments"] == 12
    for step in (1, 5, 10):
        assert certain[f"chance_psnr_{step}"] == certain[f"chance_psnr_still_{step}"] == 100
    open_to = chance(facts["bossfight"], 12, 10)
    assert 15 < open_to["chance_psnr_10"] < open_to["chance_psnr_5"] < 50
    assert 15 < open_to["chance_psnr_still_10"] < 60
    assert chance(facts["bossfight"], 12, 10) == open_to
    assert 3 < open_to["chance_psnr_5"] - open_to["chance_copy_psnr_5"] < 40
    for wrong in ({"count": 0}, {"steps": 0}, {"runs": 1}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong)).replace("count", "moments")):
            chance(facts["maze"], **({"count": 2, "steps": 2} | wrong))
    with pytest.raises(ConfigError, match="steps 500"):
        chance(facts["maze"], 2, 500)
    with pytest.raises(PolicyError, match="fly"):
        chance(facts["maze"], 2, 5, policy="fly")


def test_who_looks_would_tell_what_chance_did(tmp_path: Path) -> None:
    save_agent(tmp_path / "agent", ImpalaAgent(ImpalaConfig(channels=(4, 4, 4), features=8)), {})
    maze = load_bundle(embedded_games()["maze"], "cpu", game="maze").game
    with pytest.raises(ConfigError, match="goes by what it sees"):
        chance(maze, 2, 5, policy=f"random=0.5,agent:{tmp_path / 'agent'}=0.5")


def test_where_few_moments_are_found_they_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    maze = load_bundle(embedded_games()["maze"], "cpu", game="maze").game
    monkeypatch.setattr("dreamenv.evaluation.chance._ROUNDS", 2)
    assert chance(maze, 30, 5)["chance_moments"] == 6, "a tenth of them a round"
    monkeypatch.setattr("dreamenv.evaluation.chance._ROUNDS", 0)
    assert chance(maze, 30, 5) == {"chance_moments": 0}


def test_a_comparison_goes_on_where_chance_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maze = load_bundle(embedded_games()["maze"], "cpu", game="maze").game
    config = CompareConfig(horizon=6, branches=2)
    assert _left_to_chance(maze, config, (64, 64, 3))["chance_moments"] == 2
    save_agent(tmp_path / "agent", ImpalaAgent(ImpalaConfig(channels=(4, 4, 4), features=8)), {})
    assert _left_to_chance(maze, replace(config, policy=f"agent:{tmp_path / 'agent'}"), (64, 64, 3)) == {}
    monkeypatch.setattr("envs.states._GENERATOR", re.compile(rb"another build of Procgen"))
    assert _left_to_chance(maze, config, (64, 64, 3)) == {}


@pytest.mark.parametrize("context", [1, 3, 9])  # 9: further back than the last moment
def test_a_moment_holds_the_last_frames_and_the_actions_between_them(context: int) -> None:
    envs = real_envs("maze", 4, (10000, 100), "easy")
    played = moments(envs, "random", np.random.default_rng(0), context, 5)
    found = [next(played) for _ in range(3)]
    assert [m.past_whole.all() for m in found] == [len(m.past[0]) == context for m in found]
    assert [m.past.shape[1] for m in found] == [min(context, 6 + 5 * i) for i in range(3)]
    before, moment = found[1:]
    assert moment.age.tolist() == [15] * 4 and moment.history.shape == (4, context - 1)
    whole = moments(envs, "random", np.random.default_rng(0), 6, 5)  # the same play, of which more is kept
    next(whole), next(whole)
    actions = next(whole).history
    frames = [envs.unwrapped.restore(before.state), *(envs.step(a)[0] for a in actions.T)]
    n = min(context, 6)
    assert np.array_equal(np.stack(frames[-n:], 1), moment.past[:, -n:])
    assert np.array_equal(actions[:, 5 - (n - 1) :], moment.history[:, context - n :])
    assert np.array_equal(envs.unwrapped.restore(moment.state), moment.past[:, -1])
    envs.close()
