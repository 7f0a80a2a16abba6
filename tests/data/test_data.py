"""Collection and datasets: what is stored is what was played, nothing is lost to a kill, damage is named."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamenv.data import Dataset, DatasetWriter, Windows, split_levels
from dreamenv.errors import DatasetError
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, save_agent
from dreamenv.policies.simple import make_policy
from dreamenv.stages import program
from envs.collect import CollectConfig, _before_events, collect
from envs.procgen import RealProcgenVectorEnv
from trainers.encode import training_data

SMALL = {"steps": 1600, "num_envs": 4, "shard_steps": 100, "num_levels": 50, "policy": "biased"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect(CollectConfig(out=str(tmp_path_factory.mktemp("data") / "small"), **SMALL), progress=False)


def tree_hash(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_headers_are_parsed_one_at_a_time(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy parses a header as Python source; two threads that parse at once break CPython 3.11 now and then."""
    load, threads = np.lib.format.open_memmap, []

    def noted(*args: Any, **settings: Any) -> Any:
        threads.append(threading.get_ident())
        return load(*args, **settings)

    monkeypatch.setattr(np.lib.format, "open_memmap", noted)
    Dataset(small, verify="sha256")
    assert threads and set(threads) == {threading.get_ident()}


def test_what_is_stored_is_what_was_played(small: Path) -> None:
    """Replay the stored actions in a fresh real environment from the stored level: every frame and reward agrees."""
    dataset = Dataset(small, verify="sha256")
    assert len(dataset) == 1600 and dataset.facts["policy_mix"] == [["biased", 1.0]]
    replayed = 0
    for shard in dataset.shards:
        starts = np.flatnonzero(shard.first)
        for start, stop in zip(starts, [*starts[1:], len(shard)], strict=True):
            env = RealProcgenVectorEnv(1, num_levels=50)
            frames, _ = env.reset(options={"level": int(shard.level_seeds[start])})
            for t in range(start, stop):
                assert np.array_equal(frames[0], shard.frames[t])
                frames, rewards, terminated, truncated, _ = env.step(shard.actions[t : t + 1])
                assert rewards[0] == shard.rewards[t] and terminated[0] == shard.terminated[t]
                assert truncated[0] == shard.truncated[t]
                replayed += 1
            env.close()
    assert replayed == 1600 and any(s.terminated.any() for s in dataset.shards)
    assert max(s.level_seeds.max() for s in dataset.shards) < 50


def test_the_same_settings_give_the_same_bytes_in_any_number_of_workers(small: Path, tmp_path: Path) -> None:
    again = collect(CollectConfig(out=str(tmp_path / "two"), workers=2, **SMALL), progress=False)
    assert tree_hash(again) == tree_hash(small)
    assert tree_hash(collect(CollectConfig(out=str(tmp_path / "other"), seed=1, **SMALL), progress=False)) != tree_hash(
        small
    )


def test_short_episodes_show_more_levels(tmp_path: Path) -> None:
    shared = {"game": "maze", "steps": 2000, "num_envs": 4, "shard_steps": 500, "policy": "random"}
    whole, cut = (
        Dataset(collect(CollectConfig(out=str(tmp_path / str(limit)), limit=limit, **shared), progress=False))  # pyright: ignore
        for limit in (0, 50)
    )
    assert "limit" not in whole.facts and cut.facts["limit"] == 50 and cut.facts["max_steps"] == 500
    levels = [len(np.unique(np.concatenate([s.level_seeds for s in data.shards]))) for data in (whole, cut)]
    assert levels[1] >= 40 > 2 * levels[0]
    shard = cut.shards[0]
    begun = np.flatnonzero(shard.first)
    assert np.diff([*begun, len(shard)]).max() == 50
    last = begun[begun % 500 > 0] - 1  # a game of the batch is stored behind the other
    assert (shard.truncated[last] ^ shard.terminated[last]).all() and shard.truncated[last].sum() >= 30


def test_ends_are_the_last_steps_of_episodes_that_ended(small: Path, tmp_path: Path) -> None:
    ends = Dataset(
        collect(CollectConfig(out=str(tmp_path / "ends"), events=7, **SMALL), progress=False), verify="sha256"
    )
    columns = ("frames", "actions", "rewards", "terminated", "level_seeds")
    wanted: list[list[np.ndarray]] = []
    for shard in Dataset(small).shards:
        starts = np.flatnonzero(shard.first)
        for start, stop in zip(starts, [*starts[1:], len(shard)], strict=True):
            if shard.terminated[stop - 1]:
                wanted.append([getattr(shard, name)[max(start, stop - 7) : stop] for name in columns])
    for name, parts in zip(columns, zip(*wanted, strict=True), strict=True):
        assert np.array_equal(np.concatenate([getattr(s, name) for s in ends.shards]), np.concatenate(parts))
    first = np.concatenate([s.first for s in ends.shards])
    assert np.flatnonzero(first).tolist() == np.cumsum([0] + [len(w[0]) for w in wanted])[:-1].tolist()


def test_what_leads_to_rewards_and_real_ends_is_kept() -> None:
    terminated, truncated = np.zeros((2, 6, 9), bool)
    terminated[0, [2, 4]] = terminated[1, 8] = truncated[2, 5] = terminated[3, 7] = truncated[3, 2] = True
    rewards = np.zeros((6, 9))
    rewards[4, [2, 3]] = rewards[5, 5] = rewards[1, 8] = 1
    truncated[5, 4] = True

    def rows(most: int) -> list[str]:
        config, rng = CollectConfig(events=3, most=most), np.random.default_rng(0)
        kept = _before_events(rewards, terminated, truncated, config, rng)
        return ["".join("x" if k else "." for k in row) for row in kept]

    assert rows(0) == ["xxxxx....", "......xxx", ".........", ".....xxx.", "xxxx.....", ".....x..."]
    assert rows(3) == rows(0), "three rewards, three ends, one that is both"
    some = rows(1)
    assert some[1] == "......xxx", "of each kind one: there is but one end with a reward"
    assert some[0] in ("xxx......", "...xx....", ".........") and some[3] in (".....xxx.", ".........")
    assert [some[0], some[3]].count(".........") == [some[4], some[5]].count(".........") == 1


def test_a_shard_without_an_end_is_not_empty(tmp_path: Path) -> None:
    out = collect(CollectConfig(out=str(tmp_path / "calm"), steps=4, num_envs=4, events=5), progress=False)
    assert len(Dataset(out, verify="sha256")) == 1


def collection(out: Path) -> list[str]:
    """The command that collects what `small` holds."""
    options = {"out": out, "steps": 1600, "num_envs": 4, "shard_steps": 100, "num_levels": 50, "policy": "biased"}
    return program("envs.collect", **options)


def test_killed_ten_times_it_ends_with_the_same_bytes(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = collection(out)
    rng = random.Random(0)
    kills = 0
    while kills < 10:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        entries = (
            len(json.loads((out / "manifest.json").read_text())["shards"]) if (out / "manifest.json").exists() else 0
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:  # into the work, past the imports
            if list(out.glob("*")) and (kills % 2 or len(list(out.glob("shard-*"))) > min(entries, 3)):
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if (
            kills < 10
            and (out / "manifest.json").exists()
            and json.loads((out / "manifest.json").read_text())["complete"]
        ):
            shutil.rmtree(out)  # finished before it was killed: begin again and go on killing
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert tree_hash(out) == tree_hash(small)
    Dataset(out, verify="sha256")


def test_other_settings_do_not_continue_a_dataset(small: Path) -> None:
    with pytest.raises(DatasetError, match="seed"):
        collect(CollectConfig(out=str(small), **{**SMALL, "seed": 5}), progress=False)


@pytest.mark.slow
def test_killed_workers_do_not_spoil_the_resume(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "workers"
    command = [*collection(out), "--workers", "2"]
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not list(out.glob("shard-*")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert tree_hash(out) == tree_hash(small)


MANIFEST_DAMAGES: dict[str, dict] = {
    "version": {"format_version": 99},
    "half": {"complete": False},
    "hole": {"shards": []},
    "no shards": {"shards": None},
    "bad entry": {"shards": [{}]},
    "no facts": {"facts": {}},
    "miscounted": {"steps": 5},
    "nested": {"facts": [[]]},
}


@pytest.mark.parametrize(
    "damage", ["altered", "truncated", "missing", "pickled", "manifest", "none", *MANIFEST_DAMAGES]
)
def test_a_damaged_dataset_is_refused_by_name(small: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    victim, manifest = folder / "shard-00001" / "rewards.npy", folder / "manifest.json"
    name = "manifest.json"
    if damage == "altered":
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(bytes(data))
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-7])
    elif damage == "missing":
        victim.unlink()
    elif damage == "pickled":
        np.save(victim, np.array([{}], dtype=object), allow_pickle=True)
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "none":
        shutil.rmtree(folder)
    else:
        value = json.loads(manifest.read_text())
        value.update(MANIFEST_DAMAGES[damage])
        manifest.write_text(json.dumps(value))
    if damage in ("altered", "truncated", "missing", "pickled"):
        name = "rewards.npy"
    with pytest.raises(DatasetError, match=name):
        Dataset(folder, verify="sha256")
    if name == "manifest.json" and damage != "none":
        with pytest.raises(DatasetError, match=name if damage != "half" else "complete"):
            collect(CollectConfig(out=str(folder), **SMALL), progress=False)


def test_nothing_trains_on_held_out_levels(tmp_path: Path) -> None:
    settings = {**SMALL, "steps": 16, "start_level": 10000}
    out = collect(CollectConfig(out=str(tmp_path / "held-out"), **settings), progress=False)
    assert Dataset(out).shards[0].level_seeds.min() >= 10000
    with pytest.raises(DatasetError, match="held out"):
        training_data(out)


def test_the_writer_refuses_a_wrong_column(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="actions"):
        DatasetWriter(tmp_path, {"num_shards": 1}).write_shard(0, {"frames": np.zeros((2, 64, 64, 3), np.uint8)})
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=3), st.integers(1, 8))
def test_windows_never_cross_an_episode_and_miss_none(flags: list[list[bool]], length: int) -> None:
    first = [np.array([True, *f[1:]]) for f in flags]
    windows = Windows(first, length)
    expected = {
        (k, s) for k, f in enumerate(first) for s in range(len(f) - length + 1) if not f[s + 1 : s + length].any()
    }
    assert set(zip(windows.shard.tolist(), windows.start.tolist(), strict=True)) == expected and len(windows) == len(
        expected
    )


def test_levels_are_split_whole_and_in_proportion() -> None:
    levels = np.arange(20000).repeat(2)
    validation = split_levels(levels, 0.1, seed=3)
    assert np.array_equal(validation[::2], validation[1::2])
    assert abs(validation.mean() - 0.1) < 0.01
    assert not np.array_equal(validation, split_levels(levels, 0.1, seed=4))
    assert np.array_equal(split_levels(levels[100:], 0.1, seed=3), validation[100:])


def test_policies_do_what_their_names_say(tmp_path: Path) -> None:
    rng, first, n = np.random.default_rng(0), np.zeros(1000, bool), 1000
    frames = np.zeros((n, 64, 64, 3), np.uint8)

    def histogram(spec: str, steps: int = 30, bias: np.ndarray | None = None) -> tuple[np.ndarray, float]:
        policy = make_policy(spec, bias)
        actions = np.stack([policy.act(frames, first, rng) for _ in range(steps)])
        return np.bincount(actions.ravel(), minlength=15) / actions.size, float((actions[1:] == actions[:-1]).mean())

    uniform, repeat = histogram("random")
    assert np.abs(uniform - 1 / 15).max() < 0.01 and abs(repeat - 1 / 15) < 0.01
    _, repeat = histogram("sticky")
    assert abs(repeat - (0.85 + 0.15 / 15)) < 0.01
    held, repeat = histogram("held")
    assert repeat == 1 and (held > 0.03).all(), "another action in each episode, and no other in it"
    bias = np.zeros(15)
    bias[[7, 8]] = 1, 3
    biased, _ = histogram("biased", bias=bias)
    assert abs(biased[8] - 0.75) < 0.05 and biased[[7, 8]].sum() == 1
    agent = ImpalaAgent(ImpalaConfig(channels=(4,), features=8))
    agent.policy.weight.data.zero_()
    agent.policy.bias.data = np.log(9.0) * (__import__("torch").arange(15) == 3)
    folder = save_agent(tmp_path / "agent", agent)
    chosen, _ = histogram(f"agent:{folder}", 5)
    assert abs(chosen[3] - 9 / 23) < 0.03
    explored, _ = histogram(f"agent:{folder}:0.5", 5)
    assert abs(explored[3] - (0.5 * 9 / 23 + 0.5 / 15)) < 0.03
    mixture = make_policy(f"random=1,agent:{folder}:1.0=3")
    mixture.act(frames, np.ones(n, bool), rng)
    assert abs((mixture.component == 1).mean() - 0.75) < 0.05


def test_a_saved_agent_collects(tmp_path: Path) -> None:
    folder = save_agent(tmp_path / "agent", ImpalaAgent(ImpalaConfig(channels=(4,), features=8)))
    out = collect(
        CollectConfig(out=str(tmp_path / "d"), steps=64, num_envs=4, policy=f"agent:{folder}:0.1"), progress=False
    )
    assert len(Dataset(out)) == 64
    assert os.path.exists(out / "shard-00000" / "frames.npy")


def test_a_dataset_of_version_2_had_a_camera_in_every_game(tmp_path: Path) -> None:
    out = collect(CollectConfig(out=str(tmp_path / "d"), steps=64, num_envs=4, shard_steps=16), progress=False)
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["columns"] == ["camera"]
    old = {k: v for k, v in manifest.items() if k != "columns"} | {"format_version": 2}
    path.write_text(json.dumps(old))
    assert np.isfinite(Dataset(out).shards[0].columns["camera"]).all()
    still = collect(
        CollectConfig(out=str(tmp_path / "m"), game="maze", steps=64, num_envs=4, shard_steps=16), progress=False
    )
    assert Dataset(still).shards[0].columns == {} and not list(still.rglob("camera.npy"))
    path.write_text(json.dumps(manifest | {"columns": ["smell"]}))
    with pytest.raises(DatasetError, match="smell"):
        Dataset(out)


def test_a_collection_goes_where_its_game_is() -> None:
    assert CollectConfig(game="maze").out == "data/maze" and CollectConfig(game="maze", out="x").out == "x"
