"""Evaluating agents: whole episodes on held-out levels, from Python and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.evaluate import evaluate
from agents.worlds import make_world, real_world
from dreamenv.bundle import load_bundle, resolve_bundle
from dreamenv.errors import ConfigError, PolicyError
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, load_agent, save_agent


def test_evaluation_is_one_whole_episode_on_each_level() -> None:
    first = evaluate("hold:right", "real", episodes=12, seed=3)
    again = evaluate("hold:right", "real", episodes=12, seed=3)
    assert first.figures == again.figures and len(set(first.levels.tolist())) == 12
    assert first.levels.min() >= 10000 and first.levels.max() < 11000
    single: Any = gym.make("envs:RealProcgen-v0", game="coinrun", start_level=10000, num_levels=1000)
    for i in range(4):  # played again, one by one, in the single environment
        single.reset(options={"level": int(first.levels[i])})
        total, length, done = 0.0, 0, False
        while not done:
            _, reward, terminated, truncated, _ = single.step(7)
            total, length, done = total + reward, length + 1, terminated or truncated
        assert (total, length) == (first.episodes.returns[i], first.episodes.lengths[i])
    single.close()
    low, high = first.figures["ci"]
    assert (
        low <= first.figures["mean_return"] <= high
        and first.figures["success_rate"] == first.figures["mean_return"] / 10
    )


@pytest.mark.slow
def test_the_real_game_is_as_difficult_as_the_bundle() -> None:
    folder = resolve_bundle(None, "coinrun", "hard")
    shared: dict[str, Any] = {"episodes": 2, "limit": 3, "films": 2}
    hard, told, easy = (
        evaluate("hold:right", "real", "coinrun", **shared, **which).frames
        for which in ({"bundle": folder}, {"distribution_mode": "hard"}, {})
    )
    assert all(np.array_equal(a, b) for a, b in zip(hard, told, strict=True))
    assert not any(np.array_equal(a[0], b[0]) for a, b in zip(hard, easy, strict=True))
    latent = make_world("real", "coinrun", 2, folder, "cpu", observations="latent")
    bundle = load_bundle(folder, "cpu", game="coinrun")
    same = real_world("coinrun", 2, distribution_mode="hard", frame=(64, 64, 3), seen_by=bundle)
    for envs in (latent, same):
        envs.seed(3)
    assert np.array_equal(np.asarray(latent.reset()), np.asarray(same.reset()))


def test_evaluation_from_the_command_line(toy_bundle: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "agents.evaluate", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(
        "--agent",
        "random",
        "--world",
        "dream",
        "--bundle",
        str(toy_bundle),
        "--levels",
        "10000:10100",
        "--episodes",
        "5",
        "--video",
        str(tmp_path / "film.mp4"),
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["episodes"] == 5 and set(figures) >= {"mean_return", "ci", "success_rate"}
    assert (tmp_path / "film.mp4").stat().st_size > 1000
    bad = run("--agent", "random", "--levels", "5")
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
    with pytest.raises(PolicyError, match="bundled"):
        evaluate("bundled", "dream", bundle=toy_bundle, episodes=1)
    with pytest.raises(PolicyError, match="unknown"):
        evaluate("nobody", episodes=1)


def test_an_agent_of_8_bits_acts_as_one_of_16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    agent = ImpalaAgent(ImpalaConfig((8, 16), 32), "fp32")
    agent.policy.weight.data.mul_(30)  # so that it prefers some actions
    frames = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    half, byte = (save_agent(tmp_path / str(bits), agent, {"steps": 3}, bits) for bits in (16, 8))
    sizes = [(folder / "agent.safetensors").stat().st_size for folder in (half, byte)]
    assert sizes[1] < 0.6 * sizes[0]
    first, second = (load_agent(folder, "fp32") for folder in (half, byte))
    assert first.facts == second.facts == {"steps": 3}
    (before, _), (after, _) = first.probabilities(frames), second.probabilities(frames)
    assert before.max() > 0.15 and 0 < np.abs(before - after).max() < 0.02
    with pytest.raises(ConfigError, match="bits 4"):
        save_agent(tmp_path / "4", agent, bits=4)
    assert not (tmp_path / "4").exists()
