"""Pixels that depend on the action: what is recorded of the real game, and the loss term that asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dreamenv.contract.games import GAMES
from dreamenv.data import Dataset, DatasetWriter
from dreamenv.data.writer import COLUMNS
from dreamenv.errors import ConfigError
from dreamenv.models.io import save_model
from dreamenv.models.registry import build
from envs.collect import CollectConfig, _others, collect, make_envs
from trainers.encode import encode_dataset
from trainers.recipe import fed
from trainers.tasks.dynamics import DynamicsTask, DynamicsTaskConfig

CANVAS = {"type": "canvas_flow", "backbone": {"type": "unet", "channels": [16, 16], "blocks": [1, 1]}, "embedding": 16}
PLAY: dict[str, Any] = {"game": "starpilot", "steps": 1600, "num_envs": 4, "shard_steps": 400, "policy": "random"}
SHORT: dict[str, Any] = {"game": "jumper", "steps": 800, "num_envs": 4, "shard_steps": 50, "limit": 30, "policy": "mix"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect(CollectConfig(out=str(tmp_path_factory.mktemp("c") / "d"), contingent=True, **PLAY), progress=False)


@pytest.fixture(scope="module")
def latents(data: Path) -> Path:
    save_model(data.parent / "codec", build("codec", {"type": "exact_patches"}), {})
    return encode_dataset(data, data.parent / "codec", data.parent / "latents", "cpu")


def pixels(dataset: Dataset) -> np.ndarray:
    """Bool (N, 64, 64)."""
    found = np.concatenate([shard.columns["contingent"] for shard in dataset.shards])
    return np.unpackbits(found, axis=1).reshape(-1, 64, 64).astype(bool)


def test_they_are_where_another_action_shows_something_else(data: Path) -> None:
    """Play the same game again, and at some steps try every other action: one of them tells just these pixels."""
    dataset = Dataset(data, verify="sha256")
    shard, marked = dataset.shards[0], pixels(dataset)
    frames, actions = (x.reshape(4, 400, *x.shape[1:]) for x in (shard.frames, shard.actions))
    marked = marked.reshape(4, 400, 64, 64)
    envs = make_envs(CollectConfig(**PLAY))
    envs.reset(options={"level": shard.level_seeds.reshape(4, 400)[:, 0].astype(np.int64)})
    whole = ~shard.terminated.reshape(4, 400)
    compared = 0
    for t in range(40):
        moment = envs.snapshot()
        taken = envs.step(actions[:, t])[0]
        others = []
        for k in range(1, 15):
            envs.restore(moment)
            seen, _, terminated, _, _ = envs.step((actions[:, t].astype(np.int64) + k) % 15)
            others.append((seen != taken).any(-1) & ~terminated[:, None, None])
        envs.restore(moment)
        envs.step(actions[:, t])
        for i in np.flatnonzero(whole[:, : t + 1].all(1)):
            assert np.array_equal(taken[i], frames[i, t + 1])
            assert any(np.array_equal(marked[i, t], other[i]) for other in others)
            compared += 1
    envs.close()
    assert compared > 100 and 0.001 < marked.mean() < 0.01, "the ship and what it fires are a few pixels"


def test_nothing_else_is_played_for_it(tmp_path: Path) -> None:
    """In a game that scrolls, in several shards, of players that repeat themselves and episodes that are left early."""
    plain = Dataset(collect(CollectConfig(out=str(tmp_path / "plain"), **SHORT), progress=False))
    asked = Dataset(collect(CollectConfig(out=str(tmp_path / "c"), contingent=True, **SHORT), progress=False))
    assert plain.manifest["columns"] == ["camera"] and asked.manifest["columns"] == ["camera", "contingent"]
    assert "contingent" not in plain.facts and asked.facts["contingent"] is True
    assert len(plain.shards) == len(asked.shards) == 4 and pixels(asked).any()
    for one, other in zip(plain.shards, asked.shards, strict=True):
        for name in ("frames", "actions", "rewards", "first", "truncated", "level_seeds"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert np.array_equal(one.columns["camera"], other.columns["camera"])


def test_the_other_action_is_never_one_of_the_same_meaning(tmp_path: Path) -> None:
    """In plunder eleven of fifteen actions do nothing; the other three meanings move or fire at once, and are tried."""
    asked: dict[str, Any] = {"game": "plunder", "steps": 400, "num_envs": 4, "shard_steps": 100, "policy": "hold:noop"}
    dataset = Dataset(collect(CollectConfig(out=str(tmp_path / "d"), contingent=True, **asked), progress=False))
    empty = ~pixels(dataset).any((1, 2))
    assert empty.mean() < 0.2
    for game in GAMES.values():
        others = _others(game)
        assert others.shape == (15, len(set(game.meanings)) - 1)
        for action, row in enumerate(others):
            assert sorted([game.meanings[action], *(game.meanings[k] for k in row)]) == sorted(set(game.meanings))


def test_no_pixel_is_marked_where_an_episode_ends(data: Path) -> None:
    dataset = Dataset(data)
    ended = np.concatenate([shard.terminated | shard.truncated for shard in dataset.shards])
    assert ended.any() and not pixels(dataset)[ended].any()


def task(latents: Path, **options: Any) -> DynamicsTask:
    plain = {"val_ratio": 0.2, "pad": 0.0, "drop_actions": 0.0, "context_noise": 0.0}
    return DynamicsTask(DynamicsTaskConfig(str(latents), **plain | options), CANVAS, 0)  # pyright: ignore


def test_the_error_is_that_of_these_pixels(data: Path, latents: Path) -> None:
    """Of a model that copies it is one step's change, then two steps', as shares of what copying costs."""
    asked = task(latents, terms={"contingent": {"weight": 2.0}}, unroll=2, importance=0.0)
    nn.init.zeros_(asked.model.out.weight)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        asked.model.out.bias.fill_(-12.0)  # type: ignore[union-attr]  # nothing is new
    now = asked.train[:: len(asked.train) // 50]
    batch = asked.batch(np.random.default_rng(0), len(now), now).to(torch.device("cpu"))
    loss, metrics = asked.loss(asked.model, batch, torch.Generator().manual_seed(0), 0.0)
    dataset = Dataset(data)
    frames = np.concatenate([shard.frames for shard in dataset.shards]) / 255.0
    marked = pixels(dataset)

    def errors(before: np.ndarray, at: np.ndarray) -> np.ndarray:
        sums = (np.square(frames[at + 1] - frames[before]).mean(-1) * marked[at]).sum((1, 2))
        return sums / np.maximum(marked[at].sum((1, 2)), 8)

    follows = np.concatenate([~shard.first for shard in dataset.shards])[1:]
    steps = np.flatnonzero(follows & ~asked.data.validation[:-1])
    copied = errors(steps, steps).mean()
    shares = [errors(now, now + u).mean() / copied for u in (0, 1)]
    assert min(shares) > 0.1 and shares[0] != pytest.approx(shares[1], rel=0.03)
    assert [float(metrics[f"contingent_{u}"]) for u in (1, 2)] == pytest.approx(shares, rel=1e-2)
    whole = [16 * np.square(frames[now + u + 1] - frames[now + u]).mean() for u in (0, 1)]  # latents are four times
    assert loss.item() == pytest.approx(2 * np.mean(np.multiply(whole, shares)), rel=1e-2)


def test_steps_that_do_not_count_and_pasts_cut_short(data: Path, latents: Path) -> None:
    asked = task(latents, terms={"contingent": {}}, unroll=3, pad=0.9)
    found, rng = pixels(Dataset(data)), np.random.default_rng(0)
    now = asked.train[:: len(asked.train) // 40]
    batch = asked._gathered(rng, now, now + 1)
    assert batch.live.tolist() == [[True, False, False]] * len(now)
    assert torch.equal(batch.extra["contingent"][:, 0], torch.from_numpy(found[now]))
    whole = asked._gathered(rng, now, now + 3)
    for u in range(3):
        assert torch.equal(whole.extra["contingent"][:, u], torch.from_numpy(found[now + u]))
    lone = asked.loss(asked.model, batch.to(torch.device("cpu")), torch.Generator().manual_seed(0), 0.0)[1]
    assert float(lone["contingent_1"]) > 0 == float(lone["contingent_3"])


def test_what_cannot_be_asked_for(data: Path, latents: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="crop 8: terms contingent want whole pictures"):
        task(latents, terms={"squared": {}, "contingent": {}}, crop=8)
    with pytest.raises(ConfigError, match="weight -1"):
        task(latents, terms={"contingent": {"weight": -1.0}})
    plain = collect(CollectConfig(out=str(tmp_path / "d"), **PLAY), progress=False)
    without = encode_dataset(plain, data.parent / "codec", tmp_path / "latents", "cpu")
    with pytest.raises(ConfigError, match="has no column contingent; collect it with --contingent"):
        task(without, terms={"contingent": {}})
    still = DatasetWriter(tmp_path / "still", Dataset(data).facts, ["contingent"])
    for i, shard in enumerate(Dataset(data).shards):
        columns = {name: np.array(getattr(shard, name)) for name in COLUMNS}
        still.commit(still.write_shard(i, columns | {"contingent": np.zeros_like(shard.columns["contingent"])}))
    nothing = encode_dataset(tmp_path / "still", data.parent / "codec", tmp_path / "nothing", "cpu")
    with pytest.raises(ConfigError, match="in starpilot of .* no action decides anything"):
        task(nothing, terms={"contingent": {}})


def test_a_stage_goes_without_what_its_data_lack(capsys: pytest.CaptureFixture[str]) -> None:
    terms: dict[str, Any] = {"squared": {}, "contingent": {"weight": 1.0}}
    values = {"task": {"type": "dynamics", "terms": terms}, "loop": {}}
    assert fed(values, ["contingent"], "here") == values and not capsys.readouterr().err
    assert fed(values, ["camera"], "here")["task"]["terms"] == {"squared": {}}
    assert "here: without the term contingent, for there is no column contingent" in capsys.readouterr().err
    assert values["task"]["terms"] == terms, "what was given stays as it was"
    assert fed({"task": {"type": "outcome"}}, [], "here") == {"task": {"type": "outcome"}}
    with pytest.raises(ConfigError, match="here: has no column for any of its terms"):
        fed({"task": {"terms": {"contingent": {}}}}, [], "here")
