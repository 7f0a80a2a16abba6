"""Whatever is refused changes nothing, to the byte, in both worlds, alone and in a batch; what is good is taken."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from dreamenv.contract import signing, snapshot
from dreamenv.errors import ClosedError, ConfigError, DreamenvError, ResetError, SnapshotError
from dreamenv.models.interface import NULL_ACTION
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


def crafted(data: bytes, change: Callable[[dict[str, Any], dict[str, np.ndarray]], Any]) -> bytes:
    """A snapshot whose checksum and signature are right and whose content is not what the environment wrote."""
    world = json.loads(snapshot_header(data))["world"]
    meta, arrays = snapshot.unpack(world, data)
    arrays = {k: v.copy() for k, v in arrays.items()}
    change(meta, arrays)
    return snapshot.pack(world, meta, arrays)


def snapshot_header(data: bytes) -> str:
    payload = data[snapshot._HEADER.size + snapshot._SIGNATURE :]
    (length,) = struct.unpack_from("<Q", payload)
    return json.loads(payload[8 : 8 + length])["__metadata__"]["dreamenv"]


def put(name: str, value: Any, at: Any = 0) -> Callable[[dict[str, Any], dict[str, np.ndarray]], Any]:
    def change(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        arrays[name].reshape(-1)[at] = value

    return change


DREAM_FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, np.ndarray]], Any]] = {
    "no bundle": lambda m, a: m.pop("bundle"),
    "bundle a list": lambda m, a: m.update(bundle=[1]),
    "no starts": lambda m, a: a.pop("starts"),
    "one tensor more": lambda m, a: a.update(extra=np.zeros(2)),
    "latents empty": lambda m, a: a.update({"state.latents": a["state.latents"][:0]}),
    "one row only": lambda m, a: a.update({k: v[:1] for k, v in a.items() if k == "steps"}),
    "actions of float64": lambda m, a: a.update({"state.actions": a["state.actions"].astype(float)}),
    "actions 127": put("state.actions", 127),
    "actions -1": put("state.actions", -1),
    "latents nan": put("state.latents", np.nan),
    "latents infinite": put("state.latents", np.inf),
    "start beyond the bank": put("starts", 5),
    "start -2": put("starts", -2),
    "steps -1": put("steps", -1),
    "steps 2^62": put("steps", 2**62),
    "episodes -1": put("episodes", -1),
    "frames of another size": lambda m, a: a.update(frames=a["frames"][:, :32]),
}


@pytest.mark.parametrize("name", DREAM_FORGERIES)
def test_a_forged_dream_is_refused_whole(name: str, toy_bundle: Path) -> None:
    envs = make("dream", toy_bundle, 2)
    envs.reset(seed=0)
    before = envs.snapshot()
    with pytest.raises(SnapshotError):
        envs.restore(crafted(before, DREAM_FORGERIES[name]))
    assert same_bytes(envs.snapshot(), before)
    assert NULL_ACTION == 15


def test_the_real_game_takes_over_only_what_this_user_signed(toy_bundle: Path, tmp_path: Path) -> None:
    envs = make("real", toy_bundle, 2)
    envs.reset(seed=0)
    before = envs.snapshot()
    unsigned = before[: snapshot._HEADER.size] + bytes(32) + before[snapshot._HEADER.size + 32 :]
    with pytest.raises(SnapshotError, match="trust=True"):
        envs.restore(unsigned)
    assert same_bytes(envs.snapshot(), before)
    envs.step([7, 7])
    envs.restore(unsigned, trust=True)
    assert same_bytes(envs.snapshot(), before)
    program = (
        "import sys, gymnasium as gym, envs; from dreamenv.errors import SnapshotError\n"
        "e = gym.make_vec('RealProcgen-v0', num_envs=2, num_levels=50).unwrapped\n"
        "try: print(e.restore(open(sys.argv[1], 'rb').read()).sum())\n"
        "except SnapshotError as error: print('refused')"
    )
    (tmp_path / "s.bin").write_bytes(before)
    seen = {}
    for home in (os.environ.get("XDG_CONFIG_HOME"), str(tmp_path / "another")):
        env = dict(os.environ) | ({} if home is None else {"XDG_CONFIG_HOME": home})
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "s.bin")], env=env, capture_output=True, text=True
        )
        seen[home] = done.stdout.strip()
    assert list(seen.values()) == [str(int(envs._frames.sum())), "refused"], "the same user, and another"


@pytest.mark.parametrize(
    "change",
    [
        lambda m, a: m.pop("options"),
        lambda m, a: m.update(num_envs="2"),
        lambda m, a: a.pop("state.0"),
        lambda m, a: a.pop("pinned"),
        lambda m, a: a.update(frames=a["frames"][:, :1]),
        lambda m, a: a.update({"state.0": np.zeros((2, 2), np.uint8)}),
        lambda m, a: a.update({"state.1": np.zeros(2**21, np.uint8)}),
    ],
    ids=range(7),
)
def test_a_malformed_snapshot_of_the_real_game_is_refused_whole(change: Any, toy_bundle: Path) -> None:
    envs = make("real", toy_bundle, 2)
    envs.reset(seed=0)
    before = envs.snapshot()
    with pytest.raises(SnapshotError):
        envs.restore(crafted(before, change), trust=True)
    assert same_bytes(envs.snapshot(), before)


def test_the_key_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    signing.user_key.cache_clear()
    try:
        key = signing.user_key()
        path = tmp_path / "dreamenv" / "snapshot.key"
        assert path.read_bytes() == key and len(key) == 32 and path.stat().st_mode & 0o077 == 0
        signing.user_key.cache_clear()
        assert signing.user_key() == key
        monkeypatch.setenv("XDG_CONFIG_HOME", "/dev/null/nowhere")
        signing.user_key.cache_clear()
        assert signing.user_key() != key, "where it cannot be kept it is this process's own"
        assert signing.signed(b"x", signing.sign(b"x")) and not signing.signed(b"y", signing.sign(b"x"))
    finally:
        signing.user_key.cache_clear()


def headers(payload: dict[str, Any]) -> bytes:
    """A snapshot whose safetensors header says anything; the checksum is right."""
    import hashlib

    text = json.dumps(payload).encode()
    body = struct.pack("<Q", len(text)) + text
    return snapshot._HEADER.pack(b"DREAMSNP", 3, hashlib.sha256(body).digest()) + body


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": {}},
        {"__metadata__": {"dreamenv": "[1]"}},
        {"__metadata__": {"dreamenv": "{}"}},
        {"__metadata__": {"dreamenv": '{"world": "dream", "meta": [1]}'}},
        {"__metadata__": {"dreamenv": "[" * 100_000}},
        {"x": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}},
        {"x": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F32", "shape": [2**50, 0], "data_offsets": [0, 0]}},
    ],
    ids=range(10),
)
def test_a_malformed_header_is_typed(header: dict[str, Any], toy_bundle: Path) -> None:
    envs = make("dream", toy_bundle, 1)
    with pytest.raises(SnapshotError):
        envs.restore(headers(header))


def test_a_snapshot_of_before_is_read(toy_bundle: Path) -> None:
    """Version 3 had no signature, and of the real game not whether a finished one stands at its next level."""
    import hashlib

    envs = make("real", toy_bundle, 2)
    envs.reset(seed=0)
    frames = envs.step([7, 8])[0]
    data = envs.snapshot()
    payload = data[snapshot._HEADER.size + snapshot._SIGNATURE :]
    arrays = load(payload)
    arrays.pop("advanced")
    old = save(arrays, metadata={"dreamenv": snapshot_header(data)})
    old = snapshot._HEADER.pack(b"DREAMSNP", 3, hashlib.sha256(old).digest()) + old
    envs.step([1, 1])
    assert np.array_equal(envs.restore(old, trust=True), frames)
