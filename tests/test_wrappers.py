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
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import vector as vector_wrappers

from dreamenv.bundle import EMBEDDED, load_bundle
from dreamenv.errors import ConfigError, SnapshotError
from dreamenv.flow import SamplerConfig
from dreamenv.vector import DreamVectorEnv
from dreamenv.wrappers import FrameStackObservation, LatentObservation, UncertaintyPenalty
from tests.conftest import of_all, write_toy_bundle

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
    own = [np.abs(p.astype(int) - shown[i].astype(int)).mean() for i, p in enumerate(pictures)]
    assert max(own) < 15
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


def test_an_agent_may_be_shown_latents_and_nothing_is_drawn(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"bundle": toy_bundle, "max_episode_steps": 5, "autoreset_mode": "SameStep"}
    pixels = DreamVectorEnv(3, **options)
    latents = DreamVectorEnv(3, **options, observations="latent", render_mode="rgb_array")
    model = pixels.bundle.world_model
    assert latents.single_observation_space.shape == model.latent_shape
    seen, shown = pixels.reset(seed=3)[0], latents.reset(seed=3)[0]
    drawn = []
    render = DreamVectorEnv._render
    monkeypatch.setattr(DreamVectorEnv, "_render", lambda self, state: drawn.append(self) or render(self, state))
    for t in range(7):
        assert latents.observation_space.contains(shown)
        decoded = model.decode(torch.from_numpy(shown)).numpy()
        assert np.array_equal(decoded, seen), t
        actions = np.full(3, t)
        (seen, *told, infos), (shown, *also, extra) = pixels.step(actions), latents.step(actions)
        assert all(np.array_equal(a, b) for a, b in zip(told, also, strict=True))
        for i in np.flatnonzero(infos.get("_final_obs", [])):
            last = model.decode(torch.from_numpy(extra["final_obs"][i][None])).numpy()
            assert np.array_equal(last[0], infos["final_obs"][i]) and t == 4
    assert latents not in drawn and drawn
    assert np.array_equal(np.stack(latents.render() or ()), seen) and latents in drawn
    data, kept = latents.snapshot(), shown
    latents.step(np.zeros(3, int))
    assert np.array_equal(latents.restore(data), kept) and np.array_equal(pixels.restore(data), seen)
    assert latents.branch(data, 2, 1).step(np.zeros(2, int))[0].shape == (2, *model.latent_shape)
    single = gym.make("DreamProcgen-v0", bundle=str(toy_bundle), observations="latent")
    assert single.observation_space.contains(single.reset(seed=0)[0]) and single.spec is not None
    with pytest.raises(ConfigError, match="observations 'rgb'"):
        DreamVectorEnv(1, bundle=toy_bundle, observations="rgb")


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("world", WORLDS)
def test_the_game_is_shown_as_latents_too(
    toy_bundle: Path, world: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(toy_bundle)
    monkeypatch.setattr(type(bundle.world_model.dynamics), "smooth", of_all)
    ids = {"dream": ("DreamProcgen-v0", {"bundle": bundle}), "real": ("envs:RealProcgen-v0", {})}
    name, options = ids[world]
    plain, envs = (gym.make_vec(name, num_envs=2, autoreset_mode=mode, max_episode_steps=6, **options) for _ in "ab")
    envs = LatentObservation(envs, bundle)
    frame, shown = plain.reset(seed=1)[0], envs.reset(seed=1)[0]
    frames, taken = [[f] for f in frame], [[], []]
    for t in range(9):
        for i in range(2):
            past = np.stack(frames[i])[None], np.array([taken[i]], np.int64)
            begun = bundle.world_model.start(*past).latents[0, -1].numpy()
            assert np.allclose(shown[i], begun, atol=1e-5), (t, i)
        assert envs.observation_space.contains(shown)
        actions = np.array([t, 14 - t])
        over = mode == "NextStep" and t == 6
        if mode == "Disabled" and t == 6:
            mask = {"reset_mask": np.array([True, False])}
            frame, shown = plain.reset(seed=2, options=mask)[0], envs.reset(seed=2, options=mask)[0]
            assert np.allclose(shown[0], bundle.world_model.start(frame[:1, None], np.zeros((1, 0))).latents[0, -1])
            past = np.stack(frames[1])[None], np.array([taken[1]], np.int64)
            assert np.allclose(shown[1], bundle.world_model.start(*past).latents[0, -1], atol=1e-5), "not reset"
            return
        frame, _, terminated, truncated, infos = plain.step(actions)
        data, before = envs.snapshot(), shown
        shown, *_, extra = envs.step(actions)
        assert np.array_equal(envs.restore(data), before)
        again, *_, extra = envs.step(actions)
        assert np.array_equal(shown, again), "a snapshot holds what was seen"
        assert truncated.all() == (t == 5)
        for i in range(2):
            if mode == "SameStep" and truncated[i]:
                past = np.stack([*frames[i], infos["final_obs"][i]])[None], np.array([[*taken[i], actions[i]]])
                begun = bundle.world_model.start(*past).latents[0, -1].numpy()
                assert np.allclose(extra["final_obs"][i], begun, atol=1e-5)
            fresh = over or (mode == "SameStep" and truncated[i])
            frames[i] = [frame[i]] if fresh else [*frames[i], frame[i]]
            taken[i] = [] if fresh else [*taken[i], int(actions[i])]
    for wrong in (plain.unwrapped.snapshot(), data[:-1], b""):  # pyright: ignore
        with pytest.raises(SnapshotError):
            envs.restore(wrong)
    with pytest.raises(ConfigError, match="looks at"):
        LatentObservation(FrameStackObservation(envs.env, 2), bundle)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_uncertainty_costs(toy_bundle: Path, mode: str) -> None:
    options: dict[str, Any] = {"bundle": toy_bundle, "max_episode_steps": 3, "autoreset_mode": mode}
    plain, envs = DreamVectorEnv(3, **options), UncertaintyPenalty(DreamVectorEnv(3, **options), 2.5)
    plain.reset(seed=0), envs.reset(seed=0)
    for t in range(6):
        _, rewards, _, truncated, infos = plain.step(np.full(3, t))
        _, less, *_, told = envs.step(np.full(3, t))
        error = infos["uncertainty"]
        if mode == "SameStep" and truncated.any():
            error = infos["final_info"]["uncertainty"]
        assert np.array_equal(told["paid"], rewards) and np.allclose(less, rewards - 2.5 * error)
        if "final_info" in told:
            assert np.array_equal(told["final_info"]["paid"], rewards) and told["final_info"]["_paid"].all()
        assert (error > 0).all() != (mode == "NextStep" and t == 3)


def test_a_diverged_dream_costs_what_the_others_do(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = UncertaintyPenalty(DreamVectorEnv(3, bundle=toy_bundle), 1.0)
    envs.reset(seed=0)
    step = DreamVectorEnv.step
    errors = [np.full(3, np.inf), np.array([0.5, np.inf, 0.2]), np.full(3, np.inf)]

    def diverge(self: Any, actions: Any) -> Any:
        seen, _, terminated, truncated, infos = step(self, actions)
        return seen, np.zeros(3), terminated, truncated, infos | {"uncertainty": errors.pop(0)}

    monkeypatch.setattr(DreamVectorEnv, "step", diverge)
    wanted = [[0, 0, 0], [-0.5, -0.5, -0.2], [-0.5, -0.5, -0.5]]
    assert [envs.step(np.zeros(3, int))[1].tolist() for _ in range(3)] == wanted
    for weight in (-1, np.inf, "x", None, True):
        with pytest.raises(ConfigError, match="weight"):
            UncertaintyPenalty(envs.env, weight)  # pyright: ignore[reportArgumentType]
    real = UncertaintyPenalty(gym.make_vec("envs:RealProcgen-v0", num_envs=1), 1.0)
    real.reset(seed=0)
    with pytest.raises(ConfigError, match="only dreams"):
        real.step(np.zeros(1, int))


@pytest.mark.parametrize("wrapper", ["frames", "latents"])
def test_gymnasium_s_own_batches_are_reset_in_part(wrapper: str, toy_bundle: Path) -> None:
    """They take the mask out of the options."""
    options: dict[str, Any] = {
        "vectorization_mode": "sync",
        "vector_kwargs": {"autoreset_mode": AutoresetMode.DISABLED},
    }
    envs: Any = gym.make_vec("DreamProcgen-v0", num_envs=2, bundle=str(toy_bundle), **options)
    assert isinstance(envs, gym.vector.SyncVectorEnv)
    bundle = load_bundle(toy_bundle)
    envs = FrameStackObservation(envs, 3) if wrapper == "frames" else LatentObservation(envs, bundle)
    envs.reset(seed=0)
    for action in (3, 4, 5):
        before = envs.step(np.full(2, action))[0]
    after, _ = envs.reset(seed=9, options={"reset_mask": np.array([True, False])})
    assert np.array_equal(after[1], before[1]) and not np.array_equal(after[0], before[0])
    if wrapper == "latents":
        assert envs._seen.arrays()["known"].tolist() == [1, 4]
