"""One contract for every world, single and in a batch: the dream, the real game, and Procgen's old gym ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.utils.env_checker import check_env

from dreamenv.errors import ConfigError, InvalidActionError, ResetError

WORLDS = ("dream", "real", "legacy")


def make(world: str, bundle: Path, **options: Any) -> gym.Env:
    if world == "dream":
        return gym.make("DreamProcgen-v0", bundle=str(bundle), device="cpu", **options)
    name = {"real": "envs:RealProcgen-v0", "legacy": "envs:LegacyProcgen-v0"}[world]
    return gym.make(name, start_level=0, num_levels=50, **options)


def make_batch(world: str, bundle: Path, n: int = 3) -> Any:
    if world == "dream":
        return gym.make_vec("DreamProcgen-v0", num_envs=n, bundle=str(bundle), device="cpu")
    return gym.make_vec("envs:RealProcgen-v0", num_envs=n, start_level=0, num_levels=50)


@pytest.mark.filterwarnings("ignore:.*old gym.*")
@pytest.mark.parametrize("world", WORLDS)
def test_a_single_world(world: str, toy_bundle: Path) -> None:
    env = make(world, toy_bundle, render_mode="rgb_array")
    assert env.observation_space == Box(0, 255, (64, 64, 3), np.uint8) and env.action_space == Discrete(15)
    assert env.metadata["render_fps"] == 15 and env.metadata["render_modes"] == ["rgb_array"]
    assert env.unwrapped.get_keys_to_action()
    check_env(env.unwrapped, skip_render_check=True)

    def play(seed: int) -> list[Any]:
        seen: list[Any] = [env.reset(seed=seed)[0].tobytes()]
        for action in (7, 7, 8, 4, 1):
            frame, reward, terminated, truncated, info = env.step(action)
            assert isinstance(reward, float) and isinstance(terminated, bool) and isinstance(truncated, bool)
            assert frame.dtype == np.uint8 and isinstance(info, dict)
            seen.append((frame.tobytes(), reward, terminated, truncated))
            if terminated or truncated:
                break
        return seen

    first = play(5)
    assert first == play(5) and first != play(6)
    shown = env.render()
    assert shown is not None and shown.shape == (64, 64, 3)
    for wrong in (15, -1, 1.5, "left", None):
        with pytest.raises(InvalidActionError):
            env.unwrapped.step(wrong)
        assert np.array_equal(env.render(), shown), "what is refused changes nothing"
    for wrong in ({"colour": 1}, 3):
        with pytest.raises(ResetError):
            env.unwrapped.reset(options=wrong)
        assert np.array_equal(env.render(), shown)
    with pytest.raises(ResetError):
        env.unwrapped.reset(seed=-1)
    env.close()


@pytest.mark.parametrize("world", WORLDS[:2])
def test_a_batch_of_worlds(world: str, toy_bundle: Path) -> None:
    envs = make_batch(world, toy_bundle)
    frames, _ = envs.reset(seed=3)
    assert frames.shape == (3, 64, 64, 3) and envs.single_action_space == Discrete(15)
    snapshot = envs.unwrapped.snapshot()
    after = [envs.step(np.full(3, a)) for a in (7, 8, 1)]
    assert np.array_equal(envs.unwrapped.restore(snapshot), frames)
    again = [envs.step(np.full(3, a)) for a in (7, 8, 1)]
    for one, two in zip(after, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))
    for wrong in (np.zeros(2, int), np.full(3, 15), np.zeros(3)):
        with pytest.raises(InvalidActionError):
            envs.step(wrong)
    one = make_batch(world, toy_bundle, 1)
    assert np.array_equal(one.reset(seed=5)[0][0], envs.reset(seed=3)[0][2]), "environment i of a batch has seed + i"
    one.close()
    envs.close()
    with pytest.raises(ConfigError, match="num_envs 0"):
        make_batch(world, toy_bundle, 0)
