"""The SB3 adapter against SB3's own `DummyVecEnv`, and the worlds that agents learn in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecTransposeImage

from agents.adapter import NativeVecEnv
from agents.worlds import MixedVecEnv, dataset_starts, dream_world, make_world, real_world
from dreamenv.bundle import load_bundle
from dreamenv.env import DreamEnv
from dreamenv.errors import ConfigError, InvalidActionError
from dreamenv.policies.simple import make_policy
from dreamenv.vector import DreamVectorEnv
from envs.collect import CollectConfig, collect
from tests.agents.common import dreams


@pytest.mark.slow
def test_a_batch_is_what_dummy_vec_env_makes_of_single_dreams(toy_bundle: Path) -> None:
    """Same observations, rewards, ends, terminal observations and truncations over several episodes."""
    batch = dreams(toy_bundle, 3, exact=True)
    single = DummyVecEnv([lambda: DreamEnv(bundle=str(toy_bundle)) for _ in range(3)])
    for envs in (batch, single):
        envs.seed(7)
    assert (batch.reset() == single.reset()).all()
    rng, ends, cut = np.random.default_rng(0), 0, 0
    for _ in range(230):
        actions = rng.integers(15, size=3)
        ours, theirs = batch.step(actions), single.step(actions)
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            assert cast(Any, a).dtype == cast(Any, b).dtype and (a == b).all()
        for mine, other, done in zip(ours[3], theirs[3], ours[2], strict=True):
            assert mine["TimeLimit.truncated"] == other["TimeLimit.truncated"]
            assert ("terminal_observation" in mine) == ("terminal_observation" in other) == bool(done)
            if done:
                ends, cut = ends + 1, cut + mine["TimeLimit.truncated"]
                assert (mine["terminal_observation"] == other["terminal_observation"]).all()
            assert mine["uncertainty"] == other["uncertainty"] and mine["dream_step"] == other["dream_step"]
    assert ends > cut >= 1


def test_what_it_returns_is_fresh_writable_and_distinct(toy_bundle: Path) -> None:
    envs = dreams(toy_bundle)
    first = cast(np.ndarray, envs.reset())
    observations, rewards, dones, infos = envs.step(np.zeros(3, np.int64))
    kept = cast(np.ndarray, observations).copy()
    for array in (first, observations, rewards, dones):
        cast(np.ndarray, array)[:] = 0
    infos[0]["mine"] = 1
    assert "mine" not in infos[1] and rewards.dtype == np.float32 and dones.dtype == bool
    again = dreams(toy_bundle)
    again.seed(3)
    envs.seed(3)
    assert (again.reset() == envs.reset()).all() and kept.any()
    assert len({id(i) for i in infos}) == 3 and len(envs.reset_infos) == 3


def test_seeds_options_attributes_and_methods(toy_bundle: Path) -> None:
    envs = dreams(toy_bundle, render_mode="rgb_array")
    envs.seed(5)
    first = envs.reset()
    envs.seed(5)
    assert (envs.reset() == first).all() and envs._seeds == [None] * 3
    envs.set_options({"start": 2})
    envs.reset()
    assert [i["start"] for i in envs.reset_infos] == [2, 2, 2]
    envs.set_options([{"start": i} for i in (4, 0, 1)])
    envs.reset()
    assert [i["start"] for i in envs.reset_infos] == [4, 0, 1]
    envs.set_options([{"start": 1}, {}, {}])
    with pytest.raises(ConfigError, match="start"):
        envs.reset()
    envs.set_options()
    assert envs.get_attr("num_envs") == [3, 3, 3] and envs.get_attr("exact", indices=[1]) == [False]
    with pytest.raises(AttributeError):
        envs.get_attr("no_such_thing")
    assert not envs.has_attr("no_such_thing") and envs.has_attr("sampler")
    envs.set_attr("truncate_above", 9.0)
    assert envs.get_attr("truncate_above", 0) == [9.0]
    with pytest.raises(ConfigError, match="batch"):
        envs.set_attr("truncate_above", 9.0, indices=[0])
    snapshot = envs.env_method("snapshot")[0]
    after = envs.step(np.full(3, 7))[0]
    envs.env_method("restore", snapshot, indices=[0])
    assert (envs.step(np.full(3, 7))[0] == after).all()
    assert envs.env_is_wrapped(gym.Wrapper) == [False] * 3
    picture = envs.render()
    assert picture is not None and picture.shape == (128, 128, 3) and len(envs.get_images()) == 3
    with pytest.raises(InvalidActionError):
        envs.step(np.array([0, 15, 0]))
    with pytest.raises(ConfigError, match="SAME_STEP"):
        NativeVecEnv(DreamVectorEnv(2, bundle=toy_bundle, autoreset_mode="Disabled"))


def test_sb3_wrappers_work_on_it(toy_bundle: Path) -> None:
    envs = VecFrameStack(VecTransposeImage(VecMonitor(dreams(toy_bundle))), 4)
    assert envs.reset().shape == (3, 12, 64, 64)
    episodes = []
    for _ in range(110):
        _, _, _, infos = envs.step(np.zeros(3, np.int64))
        episodes += [i["episode"] for i in infos if "episode" in i]
    assert episodes and all(1 <= e["l"] <= 100 for e in episodes)


def test_the_real_game_gives_no_terminal_observation() -> None:
    envs = real_world("coinrun", 8)
    envs.seed(0)
    envs.reset()
    policy, rng, ends = make_policy("biased", np.asarray(envs.get_attr("game")[0].bias)), np.random.default_rng(0), 0
    for _ in range(150):
        frames, rewards, dones, infos = envs.step(policy.act(np.zeros((8, 1)), np.zeros(8, bool), rng))
        assert all("terminal_observation" not in i for i in infos)
        for done, info, fresh in zip(dones, infos, envs.reset_infos, strict=True):
            if done:
                ends += 1
                assert info["episode_step"] > 0 and fresh["episode_step"] == 0
    assert ends > 0


def test_a_mix_is_its_parts(toy_bundle: Path) -> None:
    mixed = make_world("mix", "coinrun", 4, toy_bundle, "cpu", share=0.5)
    assert isinstance(mixed, MixedVecEnv) and mixed.leaders == [0, 2]
    alone = [dream_world(load_bundle(toy_bundle, "cpu"), 2), real_world("coinrun", 2)]
    mixed.seed(3)
    alone[0].seed(3)
    alone[1].seed(5)
    assert (mixed.reset() == np.concatenate([cast(np.ndarray, e.reset()) for e in alone])).all()
    for step in range(20):
        actions = np.array([7, 1, 7, step % 15])
        ours = mixed.step(actions)
        theirs = [alone[0].step(actions[:2]), alone[1].step(actions[2:])]
        for i in range(3):
            assert (ours[i] == np.concatenate([cast(np.ndarray, t[i]) for t in theirs])).all()
        assert len(ours[3]) == 4 and "level_seed" in ours[3][3] and "uncertainty" in ours[3][0]
    assert mixed.get_attr("num_envs") == [2, 2, 2, 2] and len(mixed.env_method("snapshot", indices=[0, 2])) == 2
    for bad in ({"world": "moon"}, {"world": "mix", "share": 1.0}, {"world": "mix", "share": 0.0}):
        with pytest.raises(ConfigError):
            make_world(**cast(Any, {"world": "mix", "game": "coinrun", "num_envs": 4, "bundle": toy_bundle, **bad}))


def test_short_dreams_start_from_real_contexts(toy_bundle: Path, tmp_path: Path) -> None:
    wanted = CollectConfig(out=str(tmp_path / "d"), steps=400, num_envs=4, shard_steps=50, policy="biased")
    data = collect(wanted, progress=False)
    starts = dataset_starts(data, "coinrun", 30, 4)
    assert starts.frames.shape == (30, 4, 64, 64, 3) and starts.actions.shape == (30, 3)
    envs = dream_world(load_bundle(toy_bundle, "cpu"), 3, horizon=5, starts=starts)
    model = load_bundle(toy_bundle, "cpu").world_model
    real = model.render(model.start(starts.frames, starts.actions.astype(np.int64))).numpy()
    for frame in cast(np.ndarray, envs.reset()):
        assert np.abs(frame.astype(int) - real).max((1, 2, 3)).min() <= 1, "rounding depends on the batch"
    lengths = []
    for _ in range(20):
        _, _, dones, infos = envs.step(np.zeros(3, np.int64))
        lengths += [i["dream_step"] for i, d in zip(infos, dones, strict=True) if d]
    assert lengths and max(lengths) == 5
    with pytest.raises(ConfigError, match="horizon"):
        dream_world(load_bundle(toy_bundle, "cpu"), 3, horizon=0)
