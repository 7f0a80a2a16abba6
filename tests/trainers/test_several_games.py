"""One model of several games: one dataset, one training, one bundle, in which `game=` decides what is dreamt."""

from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.evaluate import evaluate
from agents.worlds import dataset_starts
from dreamenv.bundle import bundle_games, bundled_agent, load_bundle
from dreamenv.data import Dataset
from dreamenv.data.merge import merge
from dreamenv.errors import BundleError, ConfigError, DatasetError, PolicyError, SnapshotError
from dreamenv.evaluation.closed_loop import play_both
from dreamenv.evaluation.demo import demo
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.dynamics.canvas import CanvasFlow
from dreamenv.models.io import load_model
from dreamenv.models.registry import build
from dreamenv.play.run import PlayConfig, run
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, save_agent
from dreamenv.rewrite import rewrite_bundle, update_card
from dreamenv.vector import DreamVectorEnv
from envs.collect import CollectConfig, collect
from tests import toys as toys  # registers a head
from tests.here import all_here, brief
from trainers.encode import encode_dataset
from trainers.finetune import FinetuneConfig, finetune
from trainers.latent_data import LatentDataset
from trainers.models import of_game
from trainers.pipeline import PipelineConfig, run_pipeline
from trainers.tasks.outcome import OutcomeTask, OutcomeTaskConfig
from trainers.train import train

GAMES = ("starpilot", "chaser", "maze")  # dense and sparse rewards, 1,000 and 500 steps; their order must not matter
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
    small = ("loop.batch_size=6", "task.val_ratio=0.2", "head:model.width=16", *brief("canvas"))
    shape = ("channels=[16, 16]", "blocks=[1, 1]")
    settings = (*small, *(f"{s}:model.backbone.{value}" for s in ("predictor", "dynamics") for value in shape))
    out = tmp_path_factory.mktemp("several") / "run"
    with pytest.MonkeyPatch.context() as patch:
        all_here(patch)  # each process of its own would take seconds to load
        return run_pipeline(
            PipelineConfig(
                game="maze", recipe="canvas", data=data, out=out, stage_steps=2, starts=3, set=settings, events=0
            )
        )


def test_a_merged_dataset_knows_the_game_of_each_step(parts: list[Path], data: Path, tmp_path: Path) -> None:
    merged = Dataset(data, verify="sha256")
    assert merged.games == GAMES and merged.facts["games"]["maze"]["max_steps"] == 500
    own = [len(Dataset(part)) for part in parts]
    assert [sum(len(s) for s in merged.shards if s.game == g) for g in GAMES] == own
    for part, game in zip(parts, GAMES, strict=True):
        first = next(s for s in merged.shards if s.game == game)
        assert np.array_equal(first.frames, Dataset(part).shards[0].frames)
    with pytest.raises(DatasetError, match="say --several"):
        merge(parts, tmp_path / "x")


@pytest.mark.parametrize("games", [None, {}, [], {"maze": {}}, {"maze": {"max_steps": 500}}, {"maze": None}])
def test_damaged_facts_of_games_are_refused(data: Path, tmp_path: Path, games: object) -> None:
    folder = tmp_path / "d"
    shutil.copytree(data, folder, copy_function=os.link)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["facts"]["games"] = games
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=r"manifest\.json"):
        Dataset(folder)


def test_a_shard_of_no_known_game_is_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "d", copy_function=os.link)
    path = tmp_path / "d" / "manifest.json"
    for bad in ([], "pong", 3):
        manifest = json.loads(path.read_text())
        manifest["shards"][1]["game"] = bad
        path.unlink()
        path.write_text(json.dumps(manifest))
        with pytest.raises(DatasetError, match="shard-00001 is of game"):
            Dataset(tmp_path / "d")


def test_each_game_has_its_own_outcomes(data: Path, bundle: Path) -> None:
    latents = LatentDataset(bundle.parent / "latents")
    for number, game in enumerate(GAMES):
        loaded = load_bundle(bundle, "cpu", game=game)
        model, own = loaded.world_model, latents.game == number
        state = model.start(loaded.starts.frames, loaded.starts.actions)
        probabilities = model.outcomes(state, np.zeros(len(loaded.starts.frames), np.int64)).exp().numpy()
        seen = set(np.unique(np.round(latents.rewards[own].astype(np.float64), 4)).tolist())
        assert set(model.rewards.tolist()) == seen and np.allclose(probabilities.sum(1), 1, atol=1e-5)
        assert probabilities.shape[1] == len(model.rewards) == len(model.terminated) and (probabilities > 0).all()
        assert loaded.game.max_steps == Dataset(data).facts["games"][game]["max_steps"]
        held = np.concatenate([s.frames[:] for s in latents.dataset.shards if s.game == game])
        assert {f[-1].tobytes() for f in loaded.starts.frames} <= {f.tobytes() for f in held}


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
    with pytest.raises(BundleError, match="starpilot, chaser, maze, not 'coinrun'"):
        gym.make("DreamProcgen-v0", bundle=str(bundle))


def test_the_model_is_told_which_game_it_is(bundle: Path) -> None:
    """From one state two games go on differently, and a snapshot is of one of them."""
    maze, chaser = (load_bundle(bundle, "cpu", "fp32", game=g) for g in ("maze", "chaser"))
    frames, actions = maze.starts.frames[:1], maze.starts.actions[:1]
    models, still = [deepcopy(b.world_model) for b in (maze, chaser)], SamplerConfig(temperature=0.0)
    for model in models:  # a toy has not learnt to draw anything yet
        torch.manual_seed(0)
        torch.nn.init.normal_(model.dynamics.out.weight, std=0.1)
    steps = [m.step(m.start(frames, actions), np.array([7]), None, still) for m in models]
    assert not torch.equal(steps[0].state.latents, steps[1].state.latents)
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
        PipelineConfig(game="coinrun", recipe="canvas", data=data, out=tmp_path, events=0)
    with pytest.raises(ConfigError, match="say --events 0"):
        PipelineConfig(game="maze", recipe="patches", data=data, out=tmp_path, events=100)
    with pytest.raises(ConfigError, match="maze in easy, the data of coinrun in easy"):
        PipelineConfig(game="coinrun", event_data=data, out=tmp_path)  # said before hours are spent on the rest
    with pytest.raises(DatasetError):
        PipelineConfig(game="coinrun", event_data=tmp_path / "nowhere", out=tmp_path)
    with pytest.raises(ConfigError, match="pixels_gray has no use for it"):
        PipelineConfig(game="maze", recipe="pixels_gray", data=data, event_data=data, out=tmp_path)
    with pytest.raises(ConfigError, match="ended with status"):
        run_pipeline(PipelineConfig(game="maze", recipe="pixels_gray", data=data, out=tmp_path / "p", stage_steps=1))
    told = {"games": ["maze", "heist"], "owners": [0, 0, 1]}
    with pytest.raises(ConfigError, match="the grid is of 0"):
        build("head", {"type": "player_head", **told})
    with pytest.raises(ConfigError, match="this head cannot be told"):
        build("head", {"type": "toy_head", **told})
    for owners in ([0, 0, 0], [0, 1, 10**12], [0, 1], [-1, 0, 1]):
        with pytest.raises(ConfigError, match="owners"):
            build("head", {"type": "picture_head", **told, "owners": owners})


@pytest.mark.parametrize("kind", ["latent_predictor", "latent_flow", "canvas_flow"])
def test_dynamics_heed_the_game(kind: str) -> None:
    torch.manual_seed(0)
    backbone = {"type": "unet", "channels": [16, 16], "blocks": [1, 1]}
    spec = {"type": kind, "games": ["maze", "heist"], "backbone": backbone, "embedding": 32}
    if kind == "canvas_flow":
        spec |= {"latent": {"shape": [48, 16, 16], "layout": "pixels of patches"}}
    model = build("dynamics", spec)
    for parameter in model.parameters():  # much of it begins at zero
        torch.nn.init.normal_(parameter, std=0.1)
    shape = model.spec.shape
    begun = model.begin(torch.randn(2, 4, *shape), torch.zeros(2, 3, dtype=torch.int64))
    action, noise = torch.tensor([7, 7]), torch.randn(2, *shape)
    found = [
        sample(model, begun.replace(game=torch.tensor([0, game])), action, noise, SamplerConfig(nfe=2)).latent
        for game in (0, 1)
    ]
    assert torch.equal(found[0][0], found[1][0]) and not torch.allclose(found[0][1], found[1][1])


def test_fine_tuning_goes_on_with_the_same_games(
    parts: list[Path], data: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.finetune.train_stage", lambda values, out: train(values, out, resume=True))
    monkeypatch.setattr("trainers.finetune.encode", encode_dataset)
    options = {"bundle": bundle, "game": "maze", "steps": 2, "batch_size": 4, "starts": 3}
    tuned = finetune(FinetuneConfig(data=data, out=tmp_path / "tuned", **options))  # pyright: ignore
    assert tuple(bundle_games(tuned)) == GAMES
    assert [len(load_bundle(b, "cpu", game="chaser").world_model.rewards) for b in (tuned, bundle)].count(2) in (0, 2)
    other = merge(parts[::-1], tmp_path / "other", several=True)
    for wrong in (other, parts[0]):
        with pytest.raises(ConfigError, match="must be the same"):
            finetune(FinetuneConfig(data=wrong, out=tmp_path / "wrong", **options))  # pyright: ignore


def test_a_bundle_of_several_is_rewritten_whole(bundle: Path, tmp_path: Path) -> None:
    written = rewrite_bundle(bundle, tmp_path / "new")
    assert tuple(bundle_games(written)) == GAMES
    for game in GAMES:
        old, new = (load_bundle(folder, "cpu", game=game) for folder in (bundle, written))
        assert np.array_equal(old.starts.frames, new.starts.frames) and old.identity == new.identity


def test_the_games_of_a_bundle_share_its_networks(bundle: Path) -> None:
    first, second = (load_bundle(bundle, "cpu", game=game) for game in GAMES[:2])
    assert first.world_model.dynamics is second.world_model.dynamics and first.identity != second.identity


def test_each_game_of_a_bundle_has_its_own_agent(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    save_agent(tmp_path / "b" / "agent-maze", ImpalaAgent(ImpalaConfig((4,), 8)), {"game": "maze"})
    for folder in (tmp_path / "b", rewrite_bundle(tmp_path / "b", tmp_path / "again")):
        assert [bundled_agent(folder, game) for game in GAMES] == [None, None, folder / "agent-maze"]
        assert evaluate("bundled", "dream", "maze", episodes=1, limit=3, bundle=folder).figures["episodes"] == 1
        assert list(play_both(load_bundle(folder, "cpu", game="maze"), ("bundled",), 1, limit=3)) == ["bundled"]
        with pytest.raises(PolicyError, match="ships none"):
            evaluate("bundled", "dream", "chaser", episodes=1, limit=3, bundle=folder)


def test_dreams_start_from_moments_of_their_own_game(data: Path) -> None:
    own = {f.tobytes() for shard in Dataset(data).shards if shard.game == "chaser" for f in shard.frames}
    starts = dataset_starts(data, "chaser", 20, 4)
    assert {f.tobytes() for f in starts.frames.reshape(-1, 64, 64, 3)} <= own
    with pytest.raises(DatasetError, match="not of coinrun"):
        dataset_starts(data, "coinrun", 20, 4)


def test_one_game_of_several_is_played_and_judged(bundle: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.gif"
    run(PlayConfig(game="chaser", bundle=bundle, headless=film, player="random", steps=4, device="cpu"))
    assert film.stat().st_size > 0
    figures = demo(tmp_path / "demo", "starpilot", bundle, 4, 4, 4, 640, device="cpu")["figures"]
    own = {f"reward_{r:g}" for r in load_bundle(bundle, "cpu", game="starpilot").world_model.rewards if r}
    assert {name.removesuffix("_ap") for name in figures if name.startswith("reward") and name.endswith("_ap")} == {
        *own,
        "reward",
    }


def test_a_head_hears_of_a_context_as_of_one_that_was_seen_for_long(bundle: Path) -> None:
    run = bundle.parent
    config = OutcomeTaskConfig(
        latents=str(run / "latents"), dynamics=str(run / "rested" / "model"), dreams=0, val_ratio=0.2
    )
    task = OutcomeTask(config, {"type": "feature_head", "width": 16}, 0)
    dynamics, _ = load_model(run / "rested" / "model", "dynamics")
    assert isinstance(dynamics, CanvasFlow)
    now = np.array([10, 40, 70, 900, 2000, 3500])
    context, actions = task.moments.contexts(now)
    context, game = context.float(), task.moments.game_of(now)
    aged = torch.arange(len(now)) > 2
    state = dynamics.begin(context, actions[:, :-1])
    new = dynamics.hints(of_game(state, game), actions[:, -1])["features"]
    for frame in context.repeat(1, 3, 1, 1, 1).unbind(1):  # a dream that goes through the same pictures again
        state = dynamics.advance(state, actions[:, 0], frame)
    state = state.replace(actions=actions[:, :-1])
    old = dynamics.hints(of_game(state, game), actions[:, -1])["features"]
    told = task._hints(context, actions, game, aged)["features"]
    assert torch.allclose(told, torch.where(aged.view(-1, 1, 1, 1), old, new), atol=1e-5)
    assert not torch.allclose(old, new, atol=1e-3)


def test_a_dreamt_moment_has_the_hints_of_its_own_dream(bundle: Path) -> None:
    run = bundle.parent
    files = {"latents": str(run / "latents"), "dynamics": str(run / "rested" / "model")}
    task = OutcomeTask(OutcomeTaskConfig(**files, dreams=24, drift=6, val_ratio=0.2), {"type": "feature_head"}, 0)
    assert task.renew(0) and task.dreams is not None and task.val_dreams is not None
    dynamics, _ = load_model(run / "rested" / "model", "dynamics")
    assert isinstance(dynamics, CanvasFlow)
    dreams = task.dreams.rows(np.arange(0, len(task.dreams.begin), 5))
    assert len(set(dreams.depth)) > 3
    for i, (begin, depth) in enumerate(zip(dreams.begin, dreams.depth, strict=True)):
        context, taken = task.moments.contexts(np.array([begin]))
        state = of_game(dynamics.begin(context.float(), taken[:, :-1]), task.moments.game_of(np.array([begin])))
        for step in range(begin, begin + depth):
            action = torch.from_numpy(task.moments.taken(np.array([step])))
            state = dynamics.advance(state, action, dynamics.predict(state, action).latent)
        action = torch.from_numpy(task.moments.taken(dreams.steps[[i]]))
        assert torch.allclose(dreams.contexts[i].float(), state.latents[0], atol=1e-2)
        assert torch.allclose(
            dreams.hints["features"][i].float(), dynamics.hints(state, action)["features"][0], atol=2e-2
        )
    batch = task.batch(np.random.default_rng(0), 12)
    assert batch.hints["features"].shape == (6, 16, 16, 16), "of the dreamt half alone"
