"""The dataset of short sequences against the arrays on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dreamenv.contract.frames import observe
from dreamenv.data import Dataset
from dreamenv.data.offline import OfflineDataset
from dreamenv.errors import ConfigError, DatasetError
from envs.collect import CollectConfig, collect


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("offline") / "d"
    settings = CollectConfig(out=str(out), steps=3000, num_envs=8, shard_steps=250, policy="biased", num_levels=50)
    return collect(settings, progress=False)


def test_a_sample_is_what_the_shards_hold(folder: Path) -> None:
    data, raw = OfflineDataset(folder, 3, 2), Dataset(folder)
    assert len(data) > 1000
    ended = 0
    for index in np.random.default_rng(0).choice(len(data), 200):
        sample = data[int(index)]
        shard, start = raw.shards[data._shard[index]], data._start[index]
        frames = np.moveaxis(np.array(shard.frames[start : start + 5]), -1, 1).astype(np.float32) / 255
        assert np.array_equal(sample.past_frames, frames[:3]) and np.array_equal(sample.future_frames, frames[3:])
        assert sample.past_frames.dtype == torch.float32
        assert sample.past_actions.tolist() == shard.actions[start : start + 2].tolist()
        assert sample.future_actions.tolist() == shard.actions[start + 2 : start + 4].tolist()
        inside = slice(start, start + 4)
        assert not (shard.terminated[inside] | shard.truncated[inside]).any(), "a sample stays in one episode"
        assert bool(sample.done) == bool(shard.terminated[start + 4] | shard.truncated[start + 4])
        ended += bool(sample.done)
    assert 0 < ended < 200


def test_grey_ones_have_no_channels_and_loaders_batch_them(folder: Path) -> None:
    data = OfflineDataset(folder, frame=(84, 84, 1))
    sample, raw = data[7], Dataset(folder)
    start = data._start[7]
    expected = observe(np.array(raw.shards[data._shard[7]].frames[start : start + 4]), (84, 84, 1))[..., 0]
    assert np.array_equal(sample.past_frames, expected.astype(np.float32) / 255)
    loader = DataLoader(data, batch_size=6, num_workers=1, multiprocessing_context="spawn")
    batch = next(iter(loader))
    assert batch.past_frames.shape == batch.future_frames.shape == (6, 4, 84, 84)
    assert batch.past_actions.shape == (6, 3) and batch.future_actions.shape == (6, 4) and batch.done.shape == (6,)
    assert len(pickle.dumps(data)) < 200_000, "a worker opens the folder, it is not sent the frames"


def test_levels_are_in_one_part_alone(folder: Path) -> None:
    def levels(split: str, seed: int = 0) -> set[int]:
        data = OfflineDataset(folder, split=split, val_ratio=0.3, seed=seed)  # type: ignore[arg-type]
        shards = data.data.shards
        return {int(shards[k].level_seeds[s]) for k, s in zip(data._shard, data._start, strict=True)}

    train, val = levels("train"), levels("val")
    assert train and val and not train & val and train | val == levels("all")
    assert levels("val", 1) != val


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(DatasetError, match="successive frames"):
        OfflineDataset(folder, 900, 900)
    with pytest.raises(ConfigError, match="n_future 0"):
        OfflineDataset(folder, n_future=0)
    with pytest.raises(IndexError, match="sequences"):
        OfflineDataset(folder)[10**9]
