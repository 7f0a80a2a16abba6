"""One model of several games: one dataset, one training, one bundle, in which `game=` decides what is dreamt."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from dreamenv.bundle import load_bundle
from dreamenv.data import Dataset
from dreamenv.data.merge import merge
from dreamenv.errors import BundleError, ConfigError, DatasetError, SnapshotError
from dreamenv.rewrite import update_card
from dreamenv.vector import DreamVectorEnv
from envs.collect import CollectConfig, collect
from trainers.latent_data import LatentDataset
from trainers.pipeline import PipelineConfig, run_pipeline

GAMES = ("chaser", "maze", "starpilot")  # sparse and dense rewards, 500 and 1,000 steps
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("games")
    shared = {"steps": 1600, "num_envs": 8, "shard_steps": 100, "num_levels": 60, "policy": "biased"}
    return [collect(CollectConfig(game=g, out=str(folder / g), **shared), progress=False) for g in GAMES]  # pyright: ignore


@pytest.fixture(scope="module")
def data(parts: list[Path]) -> Path:
    return merge(parts, parts[0].parent / "all", several=True)


@pytest.fixture(scope="module")
def bundle(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = (
        "loop.batch_size=6",
        "task.val_ratio=0.2",
        "head:model.width=16",
        "dynamics:model.backbone.channels=[16, 16]",
    )
    settings = (*small, "dynamics:model.backbone.blocks=[1, 1]")
    out = tmp_path_factory.mktemp("several") / "run"
    return run_pipeline(
        PipelineConfig(game="maze", recipe="canvas", data=data, out=out, stage_steps=2, starts=3, set=settings)
    )


def test_a_merged_dataset_knows_the_game_of_each_step(parts: list[Path], data: Path, tmp_path: Path) -> None:
    merged = Dataset(data, verify="sha256")
    assert merged.games == GAMES and merged.facts["games"]["maze"]["max_steps"] == 500
    own = [len(Dataset(part)) for part in parts]
    assert [sum(len(s) for s in merged.shards if s.game == g) for g in GAMES] == own
    for part, game in zip(parts, GAMES, strict=True):
        first = next(s for s in merged.shards if s.game == game)
        assert np.array_equal(first.frames, Dataset(part).shards[0].frames)
    with pytest.raises(DatasetError, match="several"):
        merge(parts, tmp_path / "x")


def test_each_game_has_its_own_outcomes(data: Path, bundle: Path) -> None:
    latents = LatentDataset(bundle.parent / "latents")
    for number, game in enumerate(GAMES):
        loaded = load_bundle(bundle, "cpu", game=game)
        model, own = loaded.world_model, latents.game == number
        state = model.start(loaded.starts.frames, loaded.starts.actions)
        probabilities = model.outcomes(state, np.zeros(len(loaded.starts.frames), np.int64)).exp().numpy()
        possible = probabilities.max(0) > 0
        seen = set(np.unique(np.round(latents.rewards[own].astype(np.float64), 4)).tolist())
        assert set(model.rewards[possible].tolist()) == seen and np.allclose(probabilities.sum(1), 1)
        assert loaded.game.max_steps == Dataset(data).facts["games"][game]["max_steps"]
        assert set(loaded.starts.level_seeds) <= set(np.concatenate([s.level_seeds for s in latents.dataset.shards]))


def test_game_decides_what_one_bundle_dreams(bundle: Path) -> None:
    seen = {}
    for game in GAMES:
        env = gym.make("DreamProcgen-v0", game=game, bundle=str(bundle), device="cpu")
        start, _ = env.reset(seed=0)
        seen[game] = start, env.step(7)[0]
        env.reset(seed=0)
        assert np.array_equal(env.step(7)[0], seen[game][1])
        env.close()
    for frames in zip(*seen.values(), strict=True):
        assert len({frame.tobytes() for frame in frames}) == len(GAMES)
    with pytest.raises(BundleError, match="chaser, maze, starpilot, not 'coinrun'"):
        gym.make("DreamProcgen-v0", bundle=str(bundle))


def test_the_model_is_told_which_game_it_is(bundle: Path) -> None:
    """From one state two games go on differently, and a snapshot is of one of them."""
    maze, chaser = (load_bundle(bundle, "cpu", "fp32", game=g) for g in ("maze", "chaser"))
    frames, actions = maze.starts.frames[:1], maze.starts.actions[:1]
    logits = [b.world_model.outcomes(b.world_model.start(frames, actions), np.array([7])) for b in (maze, chaser)]
    assert not np.allclose(*(x.exp().numpy() for x in logits))
    envs = [DreamVectorEnv(2, bundle=b) for b in (maze, chaser)]
    for env in envs:
        env.reset(seed=1)
    moment = envs[0].snapshot()
    after = envs[0].step(np.array([1, 7]))[0]
    envs[0].restore(moment)
    assert np.array_equal(envs[0].step(np.array([1, 7]))[0], after)
    with pytest.raises(SnapshotError, match="load the bundle"):
        envs[1].restore(moment)


def test_each_game_has_its_own_card(bundle: Path) -> None:
    update_card(bundle, {"psnr_1": 30.0}, "maze")
    assert load_bundle(bundle, "cpu", game="maze").card == {"psnr_1": 30.0}
    assert load_bundle(bundle, "cpu", game="chaser").card == {}


def test_a_model_of_one_game_refuses_several(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not of coinrun"):
        PipelineConfig(game="coinrun", recipe="canvas", data=data, out=tmp_path)
    with pytest.raises(ConfigError):
        run_pipeline(PipelineConfig(game="maze", recipe="pixels_gray", data=data, out=tmp_path / "p", stage_steps=1))
