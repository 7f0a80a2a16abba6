"""All of Gymnasium's wrappers, single and of batches, over both worlds; films; frame stacks; specs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import vector as vector_wrappers

from dreamenv.bundle import EMBEDDED, load_bundle
from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig
from dreamenv.wrappers import FrameStackObservation
from tests.conftest import write_toy_bundle, write_toy_bundle_of_games

WORLDS = ("dream", "real")
OLD = tuple(map(int, gym.__version__.split(".")[:2])) < (1, 4)
SPACE = Box(0, 255, (64, 64, 3), np.float32)
RENDERED = {"RenderCollection", "RecordVideo", "AddRenderObservation"}
SINGLE: dict[str, dict[str, Any]] = {
    "DelayObservation": {"delay": 2},
    "DtypeObservation": {"dtype": np.float32},
    "DiscretizeObservation": {"bins": 2, "multidiscrete": True},
    "FlattenObservation": {},
    "FrameStackObservation": {"stack_size": 4},
    "GrayscaleObservation": {},
    "TransformObservation": {"func": lambda x: x.astype(np.float32), "observation_space": SPACE},
    "MaxAndSkipObservation": {},
    "NormalizeObservation": {},
    "AddRenderObservation": {"render_only": False},
    "ResizeObservation": {"shape": (32, 32)},
    "ReshapeObservation": {"shape": (64, 192)},
    "RescaleObservation": {"min_obs": np.float32(0), "max_obs": np.float32(1)},
    "TimeAwareObservation": {"flatten": False},
    "TransformAction": {"func": lambda a: 14 - a, "action_space": None},
    "StickyAction": {"repeat_action_probability": 0.5},
    "RepeatAction": {"num_repeats": 2},
    "ClipReward": {"min_reward": -1, "max_reward": 1},
    "TransformReward": {"func": lambda r: 2 * r},
    "NormalizeReward": {},
    "TimeLimit": {"max_episode_steps": 3},
    "Autoreset": {},
    "PassiveEnvChecker": {},
    "OrderEnforcing": {},
    "RecordEpisodeStatistics": {},
    "AddWhiteNoise": {"probability_of_noise_per_pixel": 0.5},
    "ObstructView": {"obstructed_pixels_ratio": 0.5, "obstruction_width": 8},
    "RenderCollection": {},
    "NumpyToTorch": {},
}
BATCH: dict[str, dict[str, Any]] = {
    "VectorizeTransformObservation": {"wrapper": wrappers.ResizeObservation, "shape": (32, 32)},
    "VectorizeTransformAction": {
        "wrapper": wrappers.TransformAction,
        "func": lambda a: 14 - a,
        "action_space": gym.spaces.Discrete(15),
    },
    "VectorizeTransformReward": {"wrapper": wrappers.ClipReward, "max_reward": 1},
    "DictInfoToList": {},
    "TransformObservation": {"func": lambda x: x.astype(np.float32), "single_observation_space": SPACE},
    "FlattenObservation": {},
    "GrayscaleObservation": {},
    "ResizeObservation": {"shape": (32, 32)},
    "ReshapeObservation": {"shape": (64, 192)},
    "RescaleObservation": {"min_obs": 0.0, "max_obs": 1.0},
    "DtypeObservation": {"dtype": np.float32},
    "NormalizeObservation": {},
    "TransformAction": {"func": lambda a: 14 - a},
    "TransformReward": {"func": lambda r: 2 * r},
    "ClipReward": {"min_reward": -1, "max_reward": 1},
    "NormalizeReward": {},
    "RecordEpisodeStatistics": {},
    "NumpyToTorch": {},
}
OTHERS = {
    "vector": "the package of the others",
    "AtariPreprocessing": "wants Atari's emulator",
    "FilterObservation": "wants a dictionary or a tuple of observations",
    "ClipAction": "wants actions of a Box",
    "RescaleAction": "wants actions of a Box",
    "DiscretizeAction": "wants actions of a Box",
    "HumanRendering": "opens a window; tests/play does so",
    "ArrayConversion": "NumpyToTorch is one",
    "JaxToNumpy": "wants Jax",
    "JaxToTorch": "wants Jax",
    "RecordVideo": "below",
}


def make(world: str, bundle: Path, **options: Any) -> gym.Env:
    if world == "dream":
        return gym.make("dreamenv:DreamProcgen-v0", bundle=str(bundle), device="cpu", **options)
    return gym.make("envs:RealProcgen-v0", num_levels=50, **options)


def make_batch(world: str, bundle: Path, n: int = 3, **options: Any) -> VectorEnv:
    if world == "dream":
        return gym.make_vec("dreamenv:DreamProcgen-v0", num_envs=n, bundle=str(bundle), device="cpu", **options)
    return gym.make_vec("envs:RealProcgen-v0", num_envs=n, num_levels=50, **options)


def test_no_wrapper_is_forgotten() -> None:
    """Of the pinned Gymnasium; an older one lacks some."""
    assert set(wrappers.__all__) - set(SINGLE) - set(OTHERS) == set()
    assert set(vector_wrappers.__all__) - set(BATCH) - set(OTHERS) == set()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", SINGLE)
def test_a_wrapper(name: str, world: str, toy_bundle: Path) -> None:
    if not hasattr(wrappers, name):
        pytest.skip(f"this Gymnasium has no {name}")
    env = make(world, toy_bundle, render_mode="rgb_array" if name in RENDERED else None)
    limits = name == "TimeAwareObservation"
    env = getattr(wrappers, name)(wrappers.TimeLimit(env, 50) if limits else env, **SINGLE[name])
    seen, _ = env.reset(seed=0)
    for action in (7, 8, 7, 1, 5, 7):
        assert name == "NumpyToTorch" or seen in env.observation_space
        seen, reward, terminated, truncated, _ = env.step(action)
        assert np.isfinite(float(reward))
        if (terminated or truncated) and name != "Autoreset":
            seen, _ = env.reset()
    env.close()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", BATCH)
def test_a_wrapper_of_batches(name: str, world: str, tmp_path: Path) -> None:
    if not hasattr(vector_wrappers, name):
        pytest.skip(f"this Gymnasium has no {name}")
    envs = getattr(vector_wrappers, name)(
        make_batch(world, write_toy_bundle(tmp_path / "b", calm=30.0), max_episode_steps=4), **BATCH[name]
    )
    seen, _ = envs.reset(seed=0)
    torches = name == "NumpyToTorch"
    actions: Any = torch.tensor([7, 8, 4]) if torches else np.array([7, 8, 4])
    for _ in range(10):
        own = torches or (OLD and name == "NormalizeObservation")  # of another dtype than it says
        assert own or seen in envs.observation_space
        seen, rewards, *_ = envs.step(actions)
        assert np.isfinite(np.asarray(rewards)).all()
    envs.close()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_statistics_count_every_step(world: str, mode: str, tmp_path: Path) -> None:
    if mode == "SameStep" and OLD:
        pytest.skip("Gymnasium counts one step too few here before 1.4, whatever the environment")
    envs = make_batch(world, write_toy_bundle(tmp_path / "b", calm=30.0), 2, max_episode_steps=5, autoreset_mode=mode)
    envs = vector_wrappers.RecordEpisodeStatistics(envs)
    envs.reset(seed=0)
    lengths = []
    for _ in range(24):
        infos = envs.step(np.array([4, 4]))[4]
        if "episode" in infos:
            lengths += infos["episode"]["l"][infos["_episode"]].tolist()
    envs.close()
    assert lengths and set(lengths) == {5}


@pytest.mark.filterwarnings("ignore:pkg_resources is deprecated")
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["single", "batch", "sb3"])
def test_films(kind: str, world: str, tmp_path: Path) -> None:
    """Of a held action: a picture for each step, and each is the environment's own, but for compression."""
    if kind == "batch" and not hasattr(vector_wrappers, "RecordVideo"):
        pytest.skip("this Gymnasium films no batches")
    bundle = EMBEDDED / "coinrun"  # a toy's pictures are noise, which no film keeps
    shown: list[np.ndarray] = []
    if kind == "single":
        env: Any = make(world, bundle, render_mode="rgb_array")
        film: Any = wrappers.RecordVideo(env, str(tmp_path / "film"), episode_trigger=lambda _: True)
        film.reset(seed=0)
        shown.append(env.render())
        for _ in range(6):
            film.step(7)
            shown.append(env.render())
    else:
        mode = "SameStep" if kind == "sb3" else "NextStep"
        env = make_batch(world, bundle, 1, render_mode="rgb_array", autoreset_mode=mode)
        if kind == "sb3":
            from stable_baselines3.common.vec_env import VecVideoRecorder

            from agents.adapter import NativeVecEnv

            film = VecVideoRecorder(NativeVecEnv(env), str(tmp_path / "film"), lambda step: step == 0, video_length=6)
            film.seed(0)
            film.reset()
        else:
            film = vector_wrappers.RecordVideo(
                env, str(tmp_path / "film"), step_trigger=lambda step: step == 0, video_length=6
            )
            film.reset(seed=0)
        shown.append(env.render()[0])
        for _ in range(6):
            film.step(np.array([7]))
            shown.append(env.render()[0])
    film.close()
    (path,) = (tmp_path / "film").glob("*.mp4")
    pictures = iio.imread(path, plugin="pyav")
    assert 5 <= len(pictures) <= 7 and pictures.shape[1:] == (64, 64, 3)
    first = int(kind == "batch")  # Gymnasium films a batch from its first step on
    own = [np.abs(p.astype(int) - shown[i].astype(int)).mean() for i, p in enumerate(pictures, first)]
    assert max(own) < 10
    assert own[-1] < np.abs(pictures[-1].astype(int) - shown[0].astype(int)).mean()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_frame_stacks_of_a_batch_are_those_of_its_environments(world: str, mode: str, tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "b", calm=30.0)
    options = {"exact": True} if world == "dream" else {}
    envs = FrameStackObservation(make_batch(world, bundle, 2, max_episode_steps=5, autoreset_mode=mode, **options), 3)
    singles = [
        wrappers.FrameStackObservation(make(world, bundle, max_episode_steps=5), 3, padding_type="reset")
        for _ in range(2)
    ]
    assert envs.single_observation_space == singles[0].observation_space
    stacks, _ = envs.reset(seed=3)
    own = [env.reset(seed=3 + i)[0] for i, env in enumerate(singles)]
    waiting = np.zeros(2, bool)
    for t in range(14):
        assert np.array_equal(stacks, own), t
        if mode == "Disabled" and waiting.any():
            stacks, _ = envs.reset(options={"reset_mask": waiting})
            own = [env.reset()[0] if waiting[i] else own[i] for i, env in enumerate(singles)]
            assert np.array_equal(stacks, own)
        stacks, _, terminated, truncated, infos = envs.step(np.array([7, 4]))
        over, before = terminated | truncated, own
        for i, env in enumerate(singles):
            if mode == "NextStep" and waiting[i]:
                own[i] = env.reset()[0]
                continue
            own[i], _, ended, cut, _ = env.step([7, 4][i])
            assert over[i] == (ended or cut)
            if mode == "SameStep" and over[i]:
                if truncated[i]:
                    assert np.array_equal(infos["final_obs"][i], own[i])
                own[i] = env.reset()[0]
        waiting = over
        assert len(before) == 2
    with pytest.raises(ConfigError, match="stack_size 0"):
        FrameStackObservation(envs, 0)


def test_a_spec_is_json_and_makes_the_same_environment(toy_bundle: Path, tmp_path: Path) -> None:
    loaded = load_bundle(toy_bundle, "cpu")
    for bundle in (toy_bundle, str(toy_bundle), loaded):
        sampler = SamplerConfig(nfe=2)
        env = gym.make("dreamenv:DreamProcgen-v0", bundle=bundle, sampler=sampler, truncate_above=np.float64(50.0))
        spec = env.spec
        assert spec is not None
        again = gym.make(EnvSpec.from_json(spec.to_json()))
        assert json.loads(spec.to_json())["kwargs"]["bundle"] == str(toy_bundle)
        assert np.array_equal(env.reset(seed=1)[0], again.reset(seed=1)[0])
        assert np.array_equal(env.step(7)[0], again.step(7)[0])
    several = write_toy_bundle_of_games(tmp_path / "games", ("maze", "heist"))
    for game in ("maze", "heist"):
        spec = gym.make("dreamenv:DreamProcgen-v0", bundle=load_bundle(several, "cpu", game=game)).spec
        assert spec is not None and spec.make().unwrapped.bundle.game.name == game  # pyright: ignore
    envs = gym.make_vec("dreamenv:DreamProcgen-v0", num_envs=2, bundle=toy_bundle, autoreset_mode="SameStep")
    assert envs.spec is not None
    repeated: Any = gym.make_vec(EnvSpec.from_json(envs.spec.to_json()))
    assert repeated.num_envs == 2 and repeated.unwrapped.autoreset_mode.value == "SameStep"


@pytest.mark.parametrize("world", WORLDS)
def test_minari_recovers_the_environment(world: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import minari

        env = make(world, write_toy_bundle(tmp_path / "b", calm=30.0))
        frame, _ = env.reset(seed=0)
        steps = [env.step(7) for _ in range(5)]
        episode = minari.data_collector.EpisodeBuffer(
            id=0,
            seed=0,
            observations=[frame, *[s[0] for s in steps]],
            actions=[7] * 5,
            rewards=[s[1] for s in steps],
            terminations=[s[2] for s in steps],
            truncations=[s[3] for s in steps],
        )
        made = minari.create_dataset_from_buffers(
            "dream/test-v0", buffer=[episode], env=env, algorithm_name="held", author="nobody", data_format="arrow"
        )
        env.close()
        recovered = minari.load_dataset("dream/test-v0").recover_environment()
    assert made.total_steps == 5
    assert np.array_equal(recovered.reset(seed=0)[0], frame)
    recovered.close()
