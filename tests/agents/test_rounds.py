"""Merging datasets, fine-tuning a bundle, and the loop around them, at toy size through the real programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import agents.rounds
from agents.rounds import SHOWN, LoopConfig, collection_policy, loop
from dreamenv.artifacts import read_json, write_json
from dreamenv.bundle import GameFacts, Limits, Starts, load_bundle, save_bundle
from dreamenv.data import Dataset
from dreamenv.data.merge import merge
from dreamenv.errors import ConfigError, DatasetError, DreamenvError
from dreamenv.models.codecs.tiles import TileAutoencoder, TileAutoencoderConfig
from dreamenv.models.dynamics.tiles import TileFlow, TileFlowConfig
from dreamenv.models.heads.player import PlayerHeadConfig, PlayerOutcomeHead
from dreamenv.models.interface import LatentSpec
from dreamenv.policies.agent import load_agent
from dreamenv.policies.simple import make_policy, parse_mix
from dreamenv.stages import run_command, stage
from dreamenv.world_model import WorldModel
from envs.collect import CollectConfig, collect
from tests.battery.common import FULL


def gather(out: Path, seed: int, policy: str = "random=0.5,sticky=0.5", **options: object) -> Path:
    return collect(
        CollectConfig(steps=1600, out=str(out), num_envs=8, shard_steps=100, seed=seed, policy=policy, **options),  # pyright: ignore
        progress=False,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data")
    return [gather(folder / "a", 1), gather(folder / "b", 2, "biased")]


def test_a_merged_dataset_is_its_parts_in_order(two: list[Path], tmp_path: Path) -> None:
    merged = Dataset(merge(two, tmp_path / "ab"), verify="sha256")
    parts = [shard for source in two for shard in Dataset(source).shards]
    assert len(merged.shards) == len(parts) == 4 and len(merged) == 3200
    for mine, part in zip(merged.shards, parts, strict=True):
        for column in ("frames", "actions", "rewards", "terminated", "truncated", "first", "level_seeds"):
            assert np.array_equal(getattr(mine, column), getattr(part, column))
    assert {name for name, _ in merged.facts["policy_mix"]} == {"random", "sticky", "biased"}
    assert sum(weight for _, weight in merged.facts["policy_mix"]) == pytest.approx(1)
    assert set(np.unique(merged.shards[0].policies)) <= {0, 1} and set(np.unique(merged.shards[3].policies)) == {2}
    assert merged.manifest["episodes"] == sum(Dataset(s).manifest["episodes"] for s in two)
    before = (tmp_path / "ab" / "manifest.json").read_bytes()
    merge(two, tmp_path / "ab")
    assert (tmp_path / "ab" / "manifest.json").read_bytes() == before


def test_a_killed_merge_is_finished(two: list[Path], tmp_path: Path) -> None:
    whole = merge(two, tmp_path / "whole")
    part = merge(two, tmp_path / "part")
    manifest = read_json(part / "manifest.json", DatasetError, "")
    entries = manifest["shards"][:2]
    write_json(
        part / "manifest.json",
        manifest | {"shards": entries, "complete": False, "steps": sum(e["steps"] for e in entries)},
    )
    (part / "shard-00003" / "frames.npy").unlink()
    merge(two, part)
    assert (part / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    Dataset(part, verify="sha256")


def test_what_does_not_belong_together_is_refused(two: list[Path], tmp_path: Path) -> None:
    maze = gather(tmp_path / "maze", 1, game="maze")
    with pytest.raises(DatasetError, match="is of maze, .* of coinrun"):
        merge([two[0], maze], tmp_path / "x")
    hard = gather(tmp_path / "hard", 3, distribution_mode="hard")
    for sources in ([two[0], hard], [two[0], maze, hard]):
        with pytest.raises(DatasetError, match="distribution_mode of coinrun is 'hard', before it was 'easy'"):
            merge(sources, tmp_path / "x", several=len(sources) > 2)
    manifest = read_json(maze / "manifest.json", DatasetError, "")
    (maze / "shard-00000" / "shard.json").unlink()  # which names the settings that made it
    (maze / "shard-00001" / "shard.json").unlink()
    write_json(maze / "manifest.json", manifest | {"facts": Dataset(two[0]).facts | {"events": 16}})
    with pytest.raises(DatasetError, match="events is 16"):
        merge([two[0], maze], tmp_path / "x")
    write_json(maze / "manifest.json", manifest | {"facts": manifest["facts"] | {"world": "dream"}})
    with pytest.raises(DatasetError, match="imagined"):
        merge([maze], tmp_path / "x")
    with pytest.raises(DatasetError):
        merge([two[0], tmp_path / "nothing"], tmp_path / "x")
    with pytest.raises(DatasetError, match="no datasets"):
        merge([], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_rounds_policy() -> None:
    assert collection_policy(None, 0.4, 0.4) == "mix"
    pairs = dict(parse_mix(collection_policy(Path("runs/a"), 0.4, 0.4)))
    expected = {
        "agent:runs/a": 0.4,
        "agent:runs/a:0.2": 0.4,
        "random": 0.04,
        "sticky": 0.04,
        "biased": 0.115,
        "hold:noop": 0.005,
    }
    assert pairs == pytest.approx(expected)
    assert dict(parse_mix(collection_policy(Path("a"), 1.0, 0.0))) == {"agent:a": 1.0}
    with pytest.raises(ConfigError, match="expert"):
        LoopConfig(expert=0.7, explorer=0.4)


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def work() -> dict[str, int]:
        calls.append(1)
        return {"answer": 42}

    assert stage(tmp_path, "one", work) == stage(tmp_path, "one", work) == {"answer": 42}
    assert len(calls) == 1
    assert run_command([sys.executable, "-c", "print('a'); print('b')"]) == "b"
    with pytest.raises(ConfigError, match="status 3"):
        run_command([sys.executable, "-c", "raise SystemExit(3)"])


def small_bundle(folder: Path, data: Path) -> Path:
    """A bundle of tiles, small and untrained."""
    torch.manual_seed(0)
    latent = LatentSpec((10, 16, 16), "tiles", 4)
    backbone = {"type": "unet", "channels": (16, 32), "blocks": (1, 1)}
    model = WorldModel(
        TileAutoencoder(TileAutoencoderConfig(codes=6, width=16, blocks=1, orders=5)),
        TileFlow(TileFlowConfig(latent=latent, backbone=backbone, embedding=32, motion=16)),
        PlayerOutcomeHead(PlayerHeadConfig(latent=latent, width=8, bias=(4.0, 0.0, 0.0))),
    )
    shard = Dataset(data).shards[0]
    starts = Starts(
        np.array(shard.frames[:10]).reshape(5, 2, 64, 64, 3),
        np.array(shard.actions[:10:2])[:, None],
        np.arange(5, dtype=np.int32),
    )
    return save_bundle(folder, model, GameFacts("coinrun", "easy", 1000), Limits(1e6, 1e6), starts, {})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rounds_end_to_end_and_resumed(two: list[Path], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Collect, merge, fine-tune, measure, train, evaluate. A second run finds all stages done.

    Twice in the battery, each program in a process of its own.
    """
    if not FULL:
        request.getfixturevalue("in_process")
    toy = tmp_path / "ppo.yaml"
    toy.write_text(
        "algorithm: PPO\nnum_envs: 8\nnetwork: {channels: [4, 4, 4], features: 8}\n"
        "settings: {n_steps: 16, batch_size: 64, n_epochs: 1}\n"
    )
    out = tmp_path / "loop"
    options = {
        "data": two[0],
        "bundle": small_bundle(tmp_path / "small", two[0]),
        "collect_steps": 2000,
        "model_steps": 2,
        "agent_steps": 128,
        "agent_config": toy,
        "episodes": 8,
        "clips": 8,
        "horizon": 8,
    }
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    command = [sys.executable, "-m", "agents.rounds", "--rounds", "1", "--out", str(out), *arguments]
    if FULL:
        rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    else:
        rows = loop(LoopConfig(rounds=1, out=out, **options))  # pyright: ignore[reportArgumentType]
    assert [row["round"] for row in rows] == [0, 1] and "real_return" in rows[1]
    assert np.isfinite([row[k] for row in rows for k in SHOWN]).all()
    assert len({row["psnr_1"] for row in rows}) == 2  # another bundle was measured
    assert loop(LoopConfig(rounds=1, out=out, **options)) == rows, "every stage is done"  # pyright: ignore
    if FULL:
        more = loop(LoopConfig(rounds=2, out=out, **options))  # pyright: ignore[reportArgumentType]
        assert more[:2] == rows and more[2]["round"] == 2
        one, two_ = (load_bundle(out / f"round-{r}" / "model" / "bundle", "cpu") for r in (1, 2))
        assert one.identity != two_.identity
        collected = Dataset(out / "round-2" / "data").facts["policy_mix"]
        assert collected[0][0].startswith("agent:") and make_policy(collected[0][0])
        assert len(Dataset(out / "round-2" / "merged").facts["merged"]) == 3
    with pytest.raises(DreamenvError, match="begun with"):
        loop(LoopConfig(rounds=2, out=out, **options | {"episodes": 9}))  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rounds_may_leave_the_model_and_train_a_critic(
    two: list[Path], tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents.rounds, "_measure", lambda *_: {})
    toy = tmp_path / "ppo.yaml"
    toy.write_text(
        "algorithm: PPO\nnum_envs: 8\nnetwork: {channels: [4, 4, 4], features: 8}\n"
        "settings: {n_steps: 16, batch_size: 64, n_epochs: 1, gamma: 0.9}\n"
    )
    bundle = small_bundle(tmp_path / "small", two[0])
    options: dict[str, Any] = {"collect_steps": 4000, "collect_limit": 40, "minutes": 0, "critic_minutes": 0.01}
    options |= {"agent_steps": 128, "agent_config": toy, "episodes": 4, "clips": 4, "horizon": 4, "bundle": bundle}
    _, row = loop(LoopConfig(rounds=1, out=tmp_path / "loop", **options))
    here = tmp_path / "loop" / "round-1"
    assert set(row) == {"round", "real_return", "real_return_ci"} and not (here / "model").exists()
    assert Dataset(here / "data").facts["limit"] == 40
    assert load_agent(here / "critic" / "agent").facts["critic"]["discount"] == 0.9
    learnt = load_agent(here / "agent" / "agent").facts
    assert learnt["critic"]["discount"] == 0.9 and 0 < learnt["critic"]["pictures"] <= 4000
    for name in ("minutes", "critic_minutes"):
        with pytest.raises(ConfigError, match=f"{name} -1: must be >= 0"):
            LoopConfig(**cast(Any, {name: -1}))
    with pytest.raises(ConfigError, match="collect_limit 0"):
        LoopConfig(collect_limit=0)
