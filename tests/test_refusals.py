"""Whatever is refused changes nothing, to the byte, in both worlds, alone and in a batch; what is good is taken."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from dreamenv.errors import ClosedError, ConfigError, DreamenvError, ResetError
from tests.conftest import same_bytes

WORLDS = ("dream", "real")


def make(world: str, bundle: Path, n: int | None = None, **options: Any) -> Any:
    """The environment itself, without Gymnasium's wrappers; a batch of n, or a single one."""
    if world == "dream":
        name, options = "dreamenv:DreamProcgen-v0", {"bundle": str(bundle), "device": "cpu", **options}
    else:
        name, options = "envs:RealProcgen-v0", {"num_levels": 50, **options}
    env = gym.make(name, **options) if n is None else gym.make_vec(name, num_envs=n, **options)
    return env.unwrapped


FRAMES = np.zeros((2, 3, 64, 64, 3), np.uint8)


REFUSED: dict[str, Callable[[Any, bytes], Any]] = {
    "seed -1": lambda e, s: e.reset(seed=-1),
    "seed 2^64": lambda e, s: e.reset(seed=2**64),
    "seed float": lambda e, s: e.reset(seed=np.float64(3)),
    "seed bool": lambda e, s: e.reset(seed=np.bool_(True)),
    "seed text": lambda e, s: e.reset(seed="3"),
    "seeds, too many": lambda e, s: e.reset(seed=[1, 2, 3]),
    "seeds, a float among them": lambda e, s: e.reset(seed=[1, 2.5]),
    "options no dict": lambda e, s: e.reset(seed=3, options=[1]),
    "options unknown": lambda e, s: e.reset(seed=3, options={"colour": 1}),
    "options, the other world's": lambda e, s: e.reset(seed=3, options={"level": -1, "start": -1}),
    "mask ragged": lambda e, s: e.reset(seed=3, options={"reset_mask": [[True], [True, False]]}),
    "mask of integers": lambda e, s: e.reset(seed=3, options={"reset_mask": [1, 0]}),
    "frames without a batch": lambda e, s: e.reset(seed=3, options={"frames": FRAMES[0, 0]}),
    "frames of float": lambda e, s: e.reset(seed=3, options={"frames": FRAMES.astype(float)}),
    "frames and a start": lambda e, s: e.reset(seed=3, options={"frames": FRAMES, "start": 0}),
    "actions of frames out of range": lambda e, s: e.reset(
        seed=3, options={"frames": FRAMES, "actions": np.full((2, 2), 15)}
    ),
    "frames on the meta device": lambda e, s: e.reset(options={"frames": torch.empty(2, 1, 4, device="meta")}),
    "level beyond 32 bits": lambda e, s: e.reset(options={"level": 2**31}),
    "level ragged": lambda e, s: e.reset(options={"level": [[1], [2, 3]]}),
    "action 15": lambda e, s: e.step(np.full(getattr(e, "num_envs", 1), 15)),
    "action float": lambda e, s: e.step(np.full(getattr(e, "num_envs", 1), 1.0)),
    "action None": lambda e, s: e.step(None),
    "action on the meta device": lambda e, s: e.step(torch.empty(2, device="meta", dtype=torch.int64)),
    "snapshot text": lambda e, s: e.restore("snapshot"),
    "snapshot empty": lambda e, s: e.restore(b""),
    "snapshot cut short": lambda e, s: e.restore(s[:-1]),
    "snapshot altered": lambda e, s: e.restore(s[:-1] + bytes([s[-1] ^ 1])),
    "snapshot of the future": lambda e, s: e.restore(s[:8] + struct.pack("<I", 99) + s[12:]),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("n", [None, 2], ids=["single", "batch"])
def test_what_is_refused_changes_nothing(n: int | None, world: str, name: str, toy_bundle: Path) -> None:
    env = make(world, toy_bundle, n)
    env.reset(seed=5)
    env.step(7 if n is None else [7, 8])
    before = env.snapshot()
    drawn = env.np_random.bit_generator.state
    with pytest.raises(DreamenvError):
        REFUSED[name](env, before)
    assert same_bytes(env.snapshot(), before) and env.np_random.bit_generator.state == drawn
    other = make(world, toy_bundle, n)
    other.restore(before)
    for action in (7, 1):
        a, b = (e.step(action if n is None else [action, 4]) for e in (env, other))
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    env.close()
    other.close()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("seed", [np.int64(5), np.uint8(5), np.array(5)], ids=["int64", "uint8", "array"])
def test_numpy_integers_are_seeds(world: str, seed: Any, toy_bundle: Path) -> None:
    for n in (None, 2):
        env = make(world, toy_bundle, n)
        first = env.reset(seed=5)[0]
        assert np.array_equal(env.reset(seed=seed)[0], first)
        assert env.np_random.bit_generator.state == np.random.default_rng(5).bit_generator.state or n is not None
        env.close()
    through = gym.make("dreamenv:DreamProcgen-v0", bundle=str(toy_bundle)) if world == "dream" else None
    if through is not None:
        through.reset(seed=int(seed))


def test_frames_with_negative_strides_are_history(toy_bundle: Path) -> None:
    env = make("dream", toy_bundle)
    history = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    actions = np.array([1, 2, 3])
    plain = env.reset(options={"frames": history.copy(), "actions": actions})[0]
    turned = env.reset(options={"frames": history[::-1].copy()[::-1], "actions": actions[::-1].copy()[::-1]})[0]
    assert np.array_equal(plain, turned)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("n", [None, 2], ids=["single", "batch"])
def test_a_closed_environment_says_so(n: int | None, world: str, toy_bundle: Path) -> None:
    env = make(world, toy_bundle, n)
    env.reset(seed=0)
    data = env.snapshot()
    env.close()
    env.close()  # twice does no harm
    calls: list[Callable[[], Any]] = [
        lambda: env.reset(seed=0),
        lambda: env.step(7 if n is None else [7, 7]),
        env.snapshot,
        lambda: env.restore(data),
    ]
    if world == "dream":
        calls.append(lambda: env.branch(data, 2))
    for call in calls:
        with pytest.raises(ClosedError, match="after close"):
            call()


@pytest.mark.parametrize("world", WORLDS)
def test_a_snapshot_before_the_first_reset_is_refused(world: str, toy_bundle: Path) -> None:
    for n in (None, 2):
        env = make(world, toy_bundle, n)
        with pytest.raises(ResetError, match="before reset"):
            env.snapshot()
        env.close()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    "options",
    [
        {"n": 10**6},
        {"n": 2.0},
        {"autoreset_mode": np.array([1, 2])},
        {"render_mode": np.array(["rgb_array"])},
        {"max_episode_steps": 0},
        {"max_episode_steps": True},
    ],
    ids=str,
)
def test_odd_arguments(world: str, options: dict[str, Any], toy_bundle: Path) -> None:
    with pytest.raises(ConfigError):
        make(world, toy_bundle, **{"n": 2, **options})


@pytest.mark.parametrize(
    "call",
    [
        lambda e, s: setattr(e, "sampler", {"nfe": 0}),
        lambda e, s: setattr(e, "sampler", 3),
        lambda e, s: e.branch(s, 0),
        lambda e, s: e.branch(s, True),
        lambda e, s: e.branch(s, 2, index=True),
        lambda e, s: e.branch(s, 2, index=2),
        lambda e, s: e.select([[0], [1, 2]]),
        lambda e, s: e.select([]),
        lambda e, s: e.select([2]),
        lambda e, s: e.select(torch.empty(1, device="meta")),
    ],
    ids=range(10),
)
def test_odd_arguments_of_a_dream(call: Callable[[Any, bytes], Any], toy_bundle: Path) -> None:
    envs = make("dream", toy_bundle, 2)
    envs.reset(seed=0)
    before = envs.snapshot()
    with pytest.raises(DreamenvError):
        call(envs, before)
    assert same_bytes(envs.snapshot(), before) and envs.sampler.nfe == 1
    envs.sampler = {"nfe": 2}
    assert envs.sampler.nfe == 2
