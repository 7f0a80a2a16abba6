"""An agent's report, foreign agents, the bundled one, RLlib, the one-file PPO, and a training killed at random
moments."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import DQN, PPO

import agents.report
from agents.adapter import NativeVecEnv
from agents.evaluate import evaluate
from agents.replay import Replays, optimism, replay
from agents.report import ReportConfig, report
from agents.saved import ForeignPolicy, agent_facts
from agents.train import TrainConfig, train
from dreamenv.artifacts import read_json
from dreamenv.bundle import Limits, load_bundle
from dreamenv.device import keep_freed_memory
from dreamenv.errors import ConfigError, PolicyError
from dreamenv.evaluation.closed_loop import play_both
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, load_agent, save_agent
from dreamenv.stages import program
from dreamenv.vector import DreamVectorEnv
from tests.conftest import write_toy_bundle

ANY = ("maze", "starpilot", "coinrun")
"""Games of different kinds of dynamics, with and without a camera that moves."""


def test_optimism_in_closed_form() -> None:
    real = np.array([[10.0, 10.0], [0.0, 0.0], [10.0, 0.0], [0.0, 0.0]])
    same = optimism(real, real)
    assert same["optimism"] == 0 and same["optimism_ci"] == [0, 0] and same["level_pearson"] == pytest.approx(1)
    overestimated = optimism(real, np.clip(real + 5, 0, 10))
    assert (
        overestimated["optimism"]
        == pytest.approx(overestimated["dream_return"] - overestimated["real_return"])
        == pytest.approx(3.125)
    )
    low, high = overestimated["optimism_ci"]
    assert 0 < low < 3.125 < high <= 5
    assert optimism(real, real * 0)["level_pearson"] is None


def test_a_dream_that_overestimates_is_caught(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_agent(
        tmp_path / "agent", ImpalaAgent(ImpalaConfig(channels=(4, 4, 4), features=8)), {"world": "dream", "steps": 1234}
    )
    config = ReportConfig(
        agent=str(tmp_path / "agent"), out=tmp_path / "out", bundle=toy_bundle, levels=4, repeats=2, limit=12, films=1
    )
    real = np.zeros((4, 2))
    dreamt = real + np.array([[0.0], [10], [10], [10]])
    monkeypatch.setattr(agents.report, "play", lambda c: (real, dreamt if c.agent != "random" else real))
    films = [np.zeros((3, 64, 64, 3), np.uint8)] * 4
    dream, game = np.array([10.0, 10, 0, 10]), np.array([10.0, 0, 0, 10])
    ended = np.array([True, True, False, True]), np.array([True, True, True, True])
    found = Replays(np.arange(10000, 10004), np.full(4, 3), dream, game, *ended, films, films)
    monkeypatch.setattr(agents.report, "replay", lambda *_: found)
    figures = report(config)
    assert figures["optimism"] == 7.5 and figures["imagined_steps"] == 1234 and figures["real_steps"] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "The dream overestimates this agent." in page and "1,234 imagined" in page and page.count("data:image/png") == 2
    )
    assert (figures["dreams_paid"], figures["dreams_paid_alone"], figures["same_keys_optimism"]) == (3, 1, 2.5)
    none = {"earns": 0, "ends": 0, "goes on": 0}
    earning, going = {"earns": 2, "ends": 1, "goes on": 0}, {"earns": 0, "ends": 1, "goes on": 0}
    assert figures["situations"] == {"earns": earning, "ends": none, "goes on": going}
    rows = read_json(tmp_path / "out" / "metrics.json", PolicyError, "")["levels"]
    assert rows == [{"level": 10001, "kind": "overestimated", "game": 0.0, "dream": 10.0, "steps": 3}]
    monkeypatch.setattr(agents.report, "replay", lambda *_: replace(found, dream=game))
    report(config)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "They part nowhere." in page and page.count("data:image/png") == 1, "no films of an earlier report"
    both = report(replace(config, before="random"))
    assert (
        both["before"]["agent"] == "random"
        and (both["before"]["optimism"], both["optimism"]) == (0, 7.5)
        and both["before"]["situations"]["ends"] == none | {"ends": 1}
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<td>random</td>") == 4 and (tmp_path / "out" / "before" / "report.html").exists()


def test_both_worlds_are_played_on_the_same_levels(toy_bundle: Path) -> None:
    real, dream = agents.report.play(
        ReportConfig(agent="hold:right", bundle=toy_bundle, levels=6, repeats=1, limit=150)
    )
    assert real.shape == dream.shape == (6, 1)
    for level in range(6):
        alone = evaluate("hold:right", "real", levels=(10000 + level, 10001 + level), episodes=1, limit=150)
        assert alone.figures["mean_return"] == real[level, 0]


def test_the_keys_of_a_dream_are_pressed_in_the_game(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", calm=30.0, limits=Limits(1e6, 1e6))  # dreams that last
    found = replay("hold:right+up", "coinrun", bundle, levels=8, limit=80)
    assert sorted(found.levels) == list(range(10000, 10008)) and (found.lengths == 80).all()
    returns, ended, env = [], [], gym.make("envs:RealProcgen-v0", game="coinrun")
    for level, steps, film in zip(found.levels, found.lengths, found.game_films, strict=True):
        frames, earned, terminated = [env.reset(seed=0, options={"level": int(level)})[0]], 0.0, False
        for _ in range(steps + 5):
            frame, reward, terminated, _, _ = env.step(8)
            frames.append(frame)
            earned += float(reward)
            if terminated:
                break
        returns.append(earned)
        ended.append(terminated)
        seen = min(len(frames) - 1, steps)
        assert film.shape == (steps, 64, 64, 3) and np.array_equal(film[:seen], frames[:seen])
        assert (film[seen:] == film[seen - 1]).all(), "what comes after an end is another episode"
    env.close()
    assert found.game.tolist() == returns and sum(returns) > 0
    assert any((film[-1] == film[-2]).all() for film in found.game_films), "some end before their dream"
    assert found.game_ended.tolist() == ended and any(ended) and not found.dream_ended.any()


def test_a_foreign_zip_needs_trust(toy_bundle: Path, tmp_path: Path) -> None:
    envs = NativeVecEnv(DreamVectorEnv(2, bundle=toy_bundle, autoreset_mode="SameStep"))
    PPO("CnnPolicy", envs, n_steps=8, batch_size=8, device="cpu").save(tmp_path / "foreign.zip")
    with pytest.raises(PolicyError, match="--trust"):
        ForeignPolicy(tmp_path / "foreign.zip", "PPO", trust=False)
    policy = ForeignPolicy(tmp_path / "foreign.zip", "PPO", trust=True)
    a, b = (evaluate(policy, episodes=3, limit=20, seed=1).figures for _ in range(2))
    assert a == b and a["mean_length"] > 1
    DQN("CnnPolicy", envs, buffer_size=8, learning_starts=0, device="cpu").save(tmp_path / "dqn.zip")
    greedy = ForeignPolicy(tmp_path / "dqn.zip", "DQN", trust=True)  # saved while it explored at random
    frames, first = np.zeros((64, 64, 64, 3), np.uint8), np.ones(64, bool)
    acts = np.stack([greedy.act(frames, first, np.random.default_rng(seed)) for seed in range(9)])
    assert (acts == acts[0, 0]).all(), "one picture, one action, whatever else drew numbers meanwhile"
    (tmp_path / "broken.zip").write_bytes(b"nothing")
    with pytest.raises(PolicyError, match="cannot be loaded"):
        ForeignPolicy(tmp_path / "broken.zip", "PPO", trust=True)
    command = [sys.executable, "-m", "agents.evaluate", "--agent", str(tmp_path / "foreign.zip"), "--episodes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--trust" in done.stderr


@pytest.mark.slow
def test_the_agent_that_ships_with_a_bundle(tmp_path: Path) -> None:
    folder = write_toy_bundle(tmp_path / "bundle")
    save_agent(folder / "agent", ImpalaAgent(ImpalaConfig(channels=(4, 4, 4), features=8)))
    assert evaluate("bundled", "dream", bundle=folder, episodes=2, limit=5).figures["episodes"] == 2
    loaded = load_bundle(folder, "cpu")
    assert list(play_both(loaded, ("random", "bundled:0.5", "bundled"), 2, limit=4)) == [
        "random",
        "bundled:0.5",
        "bundled",
    ]
    shutil.move(folder / "agent", tmp_path / "agent")
    assert list(play_both(loaded, ("random", "bundled"), 2, limit=4)) == ["random"], "left out where none ships"
    shutil.move(tmp_path / "agent", folder / "agent")
    options = {"bundle": folder, "player": "agent", "world": "dream", "steps": 4, "scale": 2}
    command = program("dreamenv", "play", **options, headless=tmp_path / "film.mp4")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rllib_trains_on_the_same_id_with_two_workers(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "agents.rllib",
        "--iterations",
        "1",
        "--runners",
        "2",
        "--envs",
        "2",
        "--batch",
        "64",
        "--game",
        "maze",
        "--out",
        str(tmp_path / "rllib"),
    ]
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] >= 64 and result["runners"] == 2 and any((tmp_path / "rllib").iterdir())


def test_ppo_in_one_file(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium as gym

    made = gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda name, **o: made(name, bundle=str(toy_bundle), **o))
    program = runpy.run_path("examples/ppo.py")
    args: Any = program["Args"](steps=128, num_envs=4, rollout=16, minibatches=2, epochs=1, out=tmp_path / "plain")
    assert program["main"](args)["steps"] == 128
    assert load_agent(tmp_path / "plain").probabilities(np.zeros((2, 64, 64, 3), np.uint8))[0].shape == (2, 15)
    assert load_agent(tmp_path / "plain").facts["reward_scale"] == 10, "its values count in tenths of the rewards"
    wrongs: list[dict[str, Any]] = [{"steps": 0}, {"num_envs": 1, "rollout": 8, "minibatches": 8}, {"reward_scale": 0}]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match=list(wrong)[-1]):
            program["Args"](**wrong)


TORCHRL = """
import gymnasium as gym
import torch
from torchrl.envs import GymWrapper
import dreamenv
for game in {games!r}:
    env = GymWrapper(gym.make("DreamProcgen-v0", game=game))
    seen = env.rollout(3, break_when_any_done=False)  # a game may end in its first steps
    assert seen["pixels"].shape == (3, 64, 64, 3) and seen["pixels"].dtype == torch.uint8
    assert seen["next", "reward"].shape == (3, 1)
    envs = GymWrapper(gym.make_vec("DreamProcgen-v0", num_envs=2, game=game, autoreset_mode="SameStep"))
    assert envs.rollout(3, break_when_any_done=False)["observation"].shape == (2, 3, 64, 64, 3)
    print(game)
"""


@pytest.mark.slow
def test_torchrl_wraps_any_game() -> None:
    code = TORCHRL.format(games=ANY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(ANY) <= set(done.stdout.splitlines())  # TorchRL logs there too


@pytest.mark.parametrize("game", ANY)
@pytest.mark.parametrize("algorithm", ["PPO", "RecurrentPPO"])
def test_stable_baselines_learns_any_game(algorithm: str, game: str, tmp_path: Path) -> None:
    settings = "settings: {n_steps: 4, batch_size: 8, n_epochs: 1}\nnetwork: {channels: [4], features: 8}\n"
    (tmp_path / "small.yaml").write_text(f"algorithm: {algorithm}\nnum_envs: 2\n{settings}")
    shared: Any = {"steps": 8, "config": tmp_path / "small.yaml", "eval_episodes": 0}
    assert train(TrainConfig(game=game, out=tmp_path / "out", **shared))["steps"] == 8
    assert evaluate(str(tmp_path / "out" / "agent"), "real", game, episodes=2, limit=5).figures["game"] == game


@pytest.mark.parametrize("game", ANY)
def test_the_one_file_ppo_learns_any_game(game: str, tmp_path: Path) -> None:
    program = runpy.run_path("examples/ppo.py")
    args: Any = program["Args"](game=game, steps=8, num_envs=2, rollout=4, minibatches=2, epochs=1, out=tmp_path / "a")
    assert program["main"](args)["steps"] == 8 and agent_facts(tmp_path / "a")["game"] == game


def test_freed_memory_is_kept_on_linux() -> None:
    assert keep_freed_memory() == (sys.platform.startswith("linux") and shutil.which("ldd") is not None)
