"""Snapshots that were forged: refused whole, in both worlds; what this user signed is taken."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from dreamenv.contract import signing, snapshot
from dreamenv.errors import SnapshotError
from dreamenv.models.interface import NULL_ACTION
from tests.conftest import same_bytes
from tests.test_refusals import make


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
