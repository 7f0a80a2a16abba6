"""The dream at its limits: bad options, seeds, actions and snapshots are typed errors; what diverges is cut off."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import dreamenv  # noqa: F401 - registers the id
from dreamenv.errors import ConfigError, InvalidActionError, ResetError, SnapshotError
from dreamenv.vector import DreamVectorEnv
from tests.conftest import same_bytes, write_toy_bundle

NOISY = {"nfe": 2, "temperature": 1.0}


BAD_RESETS = [
    {"start": 5},
    {"start": -1},
    {"start": 1.5},
    {"start": "first"},
    {"start": [0, 1, 2]},
    {"begin": 1},
    {"frames": np.zeros((2, 4, 64, 64, 3))},
    {"frames": np.zeros((2, 4, 64, 64), np.uint8)},
    {"frames": np.zeros((3, 4, 64, 64, 3), np.uint8), "actions": np.zeros((3, 3), int)},
    {"frames": np.zeros((2, 0, 64, 64, 3), np.uint8)},
    {"frames": np.zeros((2, 4, 64, 64, 3), np.uint8)},
    {"frames": np.zeros((2, 4, 64, 64, 3), np.uint8), "actions": np.full((2, 3), 15)},
    {"frames": np.zeros((2, 4, 64, 64, 3), np.uint8), "actions": np.zeros((2, 4), int)},
    {"actions": np.zeros((2, 3), int)},
    {"frames": np.zeros((2, 1, 64, 64, 3), np.uint8), "start": 0},
    {"frames": [[1], [2, 3]]},
    {"start": [[1], [2, 3]]},
    {"reset_mask": [1, 0]},
    {"reset_mask": np.ones(3, bool)},
]


@pytest.mark.parametrize("options", BAD_RESETS, ids=range(len(BAD_RESETS)))
def test_bad_reset_options_leave_the_state_alone(toy_bundle: Path, options: dict) -> None:
    envs = DreamVectorEnv(2, bundle=toy_bundle)
    envs.reset(seed=0)
    before = envs.snapshot()
    with pytest.raises(ResetError):
        envs.reset(seed=1, options=options)
    assert same_bytes(envs.snapshot(), before)


def test_seeds_beyond_63_bits_differ(toy_bundle: Path) -> None:
    envs = DreamVectorEnv(4, bundle=toy_bundle, sampler=NOISY)
    envs.reset(seed=[2**63 + 1, 2**63 + 2, 2**64 - 2, 2**64 - 1], options={"start": 0})
    frames = envs.step(np.full(4, 7))[0]
    assert len({f.tobytes() for f in frames}) == 4


@pytest.mark.parametrize("seed", [-1, 2**64, [1], [1, 2, 3], [1, "a"], 1.5, "x", True, {}])
def test_bad_seeds(toy_bundle: Path, seed: object) -> None:
    envs = DreamVectorEnv(2, bundle=toy_bundle)
    with pytest.raises(ResetError):
        envs.reset(seed=seed)  # type: ignore[arg-type]


BAD_ACTIONS = [
    -1,
    15,
    1000,
    2**40,
    1.0,
    0.5,
    float("nan"),
    float("inf"),
    "right",
    b"7",
    None,
    True,
    [],
    [1, 2],
    [[1]],
    {},
    {"a": 1},
    (3, 4),
    np.float32(3),
    np.array([1.0]),
    np.array([[3]]),
    np.array([15]),
    np.array(["7"]),
    object(),
    np.array(None),
    torch.tensor(2.5),
    1 + 2j,
    [None],
    [[1], [2, 3]],
    torch.tensor(3, dtype=torch.bfloat16),
    "",
    np.datetime64("2026-01-01"),
]


@pytest.mark.parametrize("action", BAD_ACTIONS, ids=range(len(BAD_ACTIONS)))
def test_bad_actions_are_typed_and_leave_the_state_alone(toy_bundle: Path, action: object) -> None:
    env = gym.make("DreamProcgen-v0", bundle=toy_bundle, device="cpu", disable_env_checker=True).unwrapped
    env.reset(seed=0)
    before = env.snapshot()
    with pytest.raises(InvalidActionError):
        env.step(action)
    assert same_bytes(env.snapshot(), before)


@pytest.mark.parametrize("action", [3, np.int8(3), np.uint8(3), np.array(3), np.array([3]), torch.tensor(3)])
def test_good_actions(toy_bundle: Path, action: object) -> None:
    env = gym.make("DreamProcgen-v0", bundle=toy_bundle, device="cpu", disable_env_checker=True).unwrapped
    env.reset(seed=0)
    frame = env.step(action)[0]
    env.reset(seed=0)
    assert np.array_equal(env.step(3)[0], frame)


def test_step_before_reset(toy_bundle: Path) -> None:
    with pytest.raises(ResetError, match="before reset"):
        DreamVectorEnv(1, bundle=toy_bundle).step(np.array([0]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e6])
def test_a_diverged_dream_is_truncated_and_shows_its_last_sound_frame(toy_bundle: Path, poison: float) -> None:
    envs = DreamVectorEnv(2, bundle=toy_bundle, autoreset_mode="Disabled")
    envs.reset(seed=0)
    sound, *_ = envs.step(np.array([7, 7]))
    latents = envs._state.latents.clone()
    latents[0, 0] = poison  # a context that drives the prediction out of range; the last latent stays sound
    envs._state = envs._state.replace(latents=latents)
    frames, rewards, terminated, truncated, infos = envs.step(np.array([7, 7]))
    if infos["diverged"][0]:
        assert truncated[0] or terminated[0]
        assert np.array_equal(frames[0], sound[0])
    assert not infos["diverged"][1]
    assert np.isfinite(rewards).all()
    assert infos["diverged"][0] == (not np.isfinite(poison)) or poison == 1e6


def test_truncate_above_ends_a_doubtful_episode(toy_bundle: Path) -> None:
    envs = DreamVectorEnv(
        2, bundle=toy_bundle, truncate_above=1e-9, autoreset_mode="Disabled", sampler={"temperature": 0}
    )
    envs.reset(seed=0)
    _, _, terminated, truncated, infos = envs.step(np.array([7, 7]))
    assert truncated.all() and infos["uncertain"].all() and not terminated.any()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "version", "magic", "type", "empty", "batch", "bundle"])
def test_damaged_snapshots(toy_bundle: Path, tmp_path: Path, damage: str) -> None:
    envs = DreamVectorEnv(2, bundle=toy_bundle)
    envs.reset(seed=0)
    data = envs.snapshot()
    target = envs
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    if damage == "batch":
        target = DreamVectorEnv(3, bundle=toy_bundle)
    if damage == "bundle":
        target = DreamVectorEnv(2, bundle=write_toy_bundle(tmp_path / "other", seed=1))
    broken = {
        "truncated": data[:-5],
        "flipped": bytes(flipped),
        "version": data[:8] + b"\x09" + data[9:],
        "magic": b"X" + data[1:],
        "type": "text",
        "empty": b"",
    }.get(damage, data)
    with pytest.raises(SnapshotError):
        target.restore(broken)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_envs": 0},
        {"num_envs": 1.5},
        {"num_envs": True},
        {"render_mode": "human"},
        {"truncate_above": 0.0},
        {"autoreset_mode": "Never"},
        {"sampler": {"nfe": 0}},
        {"sampler": {"steps": 3}},
        {"device": "tpu"},
        {"precision": "fp8"},
        {"exact": 1},
        {"truncate_above": "x"},
        {"device": "meta"},
    ],
    ids=str,
)
def test_bad_arguments(toy_bundle: Path, arguments: dict) -> None:
    with pytest.raises(ConfigError):
        DreamVectorEnv(**{"num_envs": 1, "bundle": toy_bundle, **arguments})
