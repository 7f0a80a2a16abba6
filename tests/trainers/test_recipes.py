"""A whole recipe at toy size, and works at the same time."""

from __future__ import annotations

import dataclasses
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dreamenv.bundle import load_bundle
from dreamenv.contract.games import get_game
from dreamenv.data.merge import merge
from dreamenv.errors import ConfigError
from dreamenv.models.codecs.tiles import TileAutoencoder
from dreamenv.models.dynamics.tiles import TileFlow
from dreamenv.models.heads.player import PlayerOutcomeHead
from dreamenv.models.interface import LatentSpec
from dreamenv.models.io import load_model, save_model
from dreamenv.models.tiles.grid import Grid
from dreamenv.stages import together
from dreamenv.vector import DreamVectorEnv
from envs.collect import CollectConfig, collect
from trainers.finetune import FinetuneConfig, finetune, stage_values
from trainers.pipeline import PipelineConfig, run_pipeline
from trainers.recipe import RECIPES, check_values
from trainers.tasks.outcome import OutcomeTask, OutcomeTaskConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


LONG = ("unrolled", "flow", "settled")  # stages of the recipe that a short one can do without
SMALL = (
    "codec:model.width=16",
    *(f"{name}:model.backbone.channels=[16, 16, 16]" for name in ("predictor", "camera")),
    "heads:task.dreams=8",
    "heads:task.drift=4",
    "predictor:task.val_windows=8",
    "loop.batch_size=4",
)


def test_a_recipe_makes_a_bundle_of_tiles(tmp_path: Path, in_process: None) -> None:
    more = [f"{name}:model.backbone.channels=[16, 16, 16]" for name in LONG]
    more += [f"{name}:task.val_windows=8" for name in LONG]
    config = PipelineConfig(
        out=tmp_path / "run", steps=3000, events=3000, stage_steps=2, starts=2, recipe="tiles", set=(*SMALL, *more)
    )
    bundle = load_bundle(run_pipeline(config), "cpu")
    model = bundle.world_model
    assert isinstance(model.codec, TileAutoencoder) and isinstance(model.dynamics, TileFlow)
    assert isinstance(model.head, PlayerOutcomeHead) and bundle.provenance["heads_also"]["events"] == 16
    done = {p.stem for p in (tmp_path / "run" / "stages").iterdir()}
    assert {"latents-events", "camera", "settled", "heads", "bundle"} <= done


def test_a_recipe_makes_a_bundle_of_tiles_of_games_of_different_difficulties(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each game is shown by its own number of tiles, and dreamt of with its own outcomes alone."""
    monkeypatch.setenv("DREAMENV_PRECISION", "bf16")
    modes, merged = {"ninja": "easy", "coinrun": "hard"}, []
    for name, steps, more in (("plain", 1600, {}), ("events", 8000, {"events": 16, "seed": 3})):
        parts = []
        for game, mode in modes.items():
            own: dict[str, Any] = {"steps": steps, "num_envs": 8, "shard_steps": steps // 16, "num_levels": 60, **more}
            config = CollectConfig(
                game=game, distribution_mode=mode, policy="biased", out=str(tmp_path / game / name), **own
            )
            parts.append(collect(config, progress=False))
        merged.append(merge(parts, tmp_path / name, several=True))
    data, events = merged
    recipe = yaml.safe_load((RECIPES / "tiles.yaml").read_text())
    recipe["stages"] = {name: stage for name, stage in recipe["stages"].items() if name not in LONG}
    recipe["stages"]["outcomes"]["task"]["dynamics"] = recipe["stages"]["camera"]["task"]["init_from"] = "{predictor}"
    del recipe["finetune"]
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipe, sort_keys=False))
    shared: dict[str, Any] = {"recipe": str(short), "data": data, "event_data": events, "stage_steps": 2, "starts": 2}
    config = PipelineConfig(game="ninja", out=tmp_path / "run", events=0, set=(*SMALL, "task.val_ratio=0.2"), **shared)
    folder = run_pipeline(config)
    for i, (game, mode) in enumerate(modes.items()):
        bundle = load_bundle(folder, "cpu", game=game)
        model = bundle.world_model
        assert bundle.game.distribution_mode == mode and model.codec.games == tuple(modes)
        assert isinstance(model.codec, TileAutoencoder) and model.codec.config.grid.views == (10, 13)
        latents = model.encode(bundle.starts.frames[0])
        shown = model.codec.visible(latents).sum((1, 2))  # in tiles
        assert torch.allclose(shown, torch.full_like(shown, get_game(game).view.tiles[mode] ** 2), atol=1e-3)
        envs = DreamVectorEnv(2, bundle=bundle)
        envs.reset(seed=1)
        for action in range(15):
            frames, *_ = envs.step(np.full(2, action))
            assert frames.shape == (2, 64, 64, 3) and frames.std() > 0
        owners = model.head.config.owners
        assert len(model.rewards) == owners.count(i) < len(owners) and set(owners) == {0, 1}
        envs.close()
    head = load_model(tmp_path / "run" / "outcomes" / "model", "head")[0]
    assert isinstance(head, PlayerOutcomeHead)
    spec = LatentSpec((head.spec.shape[0] - 1, *head.spec.shape[1:]), head.spec.layout, head.spec.known - 1)
    alone: dict[str, Any] = {"games": (), "owners": (), "grid": Grid(view=13)}
    alone |= {"rewards": (0.0, 10.0), "terminated": (False, True), "bias": ()}
    save_model(tmp_path / "one", PlayerOutcomeHead(dataclasses.replace(head.config, latent=spec, **alone)), {})
    values = yaml.safe_load((tmp_path / "run" / "outcomes.yaml").read_text())
    told = {name: value for name, value in values["task"].items() if name != "type"}
    wanted = OutcomeTaskConfig(**(told | {"init_from": str(tmp_path / "one")}))
    task = OutcomeTask(wanted, values["model"], 0)
    owners = [game for game, *_ in task.outcomes]
    assert task.outcomes and owners.count(0) > 1 < owners.count(1), "its own outcomes, of both games"
    bundle = load_bundle(folder, "cpu", game="coinrun")
    more = FinetuneConfig(data=data, bundle=folder, game="coinrun", recipe="tiles", out=tmp_path / "more")
    for kind in ("dynamics", "head"):
        check_values(stage_values(more, bundle, kind, tmp_path / "latents"))
    with pytest.raises(ConfigError, match="is of ninja in easy, coinrun in hard, not of coinrun in easy"):
        PipelineConfig(game="coinrun", out=tmp_path / "wrong", events=0, **shared)
    own = {"steps": 4000, "num_envs": 4, "shard_steps": 500, "num_levels": 60, "events": 16}
    easy = collect(CollectConfig(game="coinrun", policy="biased", out=str(tmp_path / "easy"), **own), progress=False)
    merged = merge([tmp_path / "ninja" / "events", easy], tmp_path / "both", several=True)
    with pytest.raises(
        ConfigError, match="is of ninja in easy, coinrun in easy, the data of ninja in easy, coinrun in"
    ):
        PipelineConfig(game="ninja", out=tmp_path / "other", events=0, **(shared | {"event_data": merged}))
    with pytest.raises(ConfigError, match="is of ninja in easy, coinrun in easy, the bundle of ninja in easy, coinrun"):
        finetune(dataclasses.replace(more, data=merged))


def test_works_are_done_at_the_same_time_and_none_is_lost_by_the_failure_of_another() -> None:
    meeting, ended = threading.Barrier(3), []

    def work(name: str) -> None:
        meeting.wait(20)
        if name == "bad":
            raise ConfigError(name)
        ended.append(name)

    with pytest.raises(ConfigError, match="bad"):
        together(3, [partial(work, name) for name in ("bad", "a", "b")])
    assert sorted(ended) == ["a", "b"]
