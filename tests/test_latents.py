"""Dreams and games shown as latents, dreams whose uncertainty costs, and Gymnasium's own batches reset in part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from dreamenv.bundle import load_bundle
from dreamenv.errors import ConfigError, SnapshotError
from dreamenv.vector import DreamVectorEnv
from dreamenv.wrappers import FrameStackObservation, LatentObservation, UncertaintyPenalty
from tests.conftest import of_all

WORLDS = ("dream", "real")


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
    other = replace(bundle, latents="of another model")
    with pytest.raises(SnapshotError, match="another model"):
        LatentObservation(envs.env, other).restore(data)
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
    assert [envs.step(np.zeros(3, int))[1].tolist() for _ in range(2)] == wanted[:2]
    data, again = envs.snapshot(), UncertaintyPenalty(DreamVectorEnv(3, bundle=toy_bundle), 1.0)
    again.reset(seed=1)
    again.restore(data)
    errors *= 2
    for one in (envs, again):
        assert one.step(np.zeros(3, int))[1].tolist() == wanted[2], "a snapshot holds the largest error so far"
    for wrong in (DreamVectorEnv.snapshot(envs.env), data[:-1], b""):  # pyright: ignore[reportArgumentType]
        with pytest.raises(SnapshotError):
            again.restore(wrong)
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
