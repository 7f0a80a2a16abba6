"""A whole recipe at toy size, and works at the same time."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest

from dreamenv.bundle import load_bundle
from dreamenv.errors import ConfigError
from dreamenv.models.codecs.tiles import TileAutoencoder
from dreamenv.models.dynamics.tiles import TileFlow
from dreamenv.models.heads.player import PlayerOutcomeHead
from dreamenv.stages import together
from trainers.pipeline import PipelineConfig, run_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_recipe_makes_a_bundle_of_tiles(tmp_path: Path, precision: str, in_process: None) -> None:
    small = (
        *(
            f"{name}:model.backbone.channels=[16, 16, 16]"
            for name in ("predictor", "unrolled", "camera", "flow", "settled")
        ),
        "codec:model.width=16",
        "heads:task.dreams=8",
        "heads:task.drift=4",
        "loop.batch_size=4",
    )
    config = PipelineConfig(
        out=tmp_path / "run", steps=3000, events=3000, stage_steps=2, starts=2, recipe="tiles", set=small
    )
    bundle = load_bundle(run_pipeline(config), "cpu")
    model = bundle.world_model
    assert isinstance(model.codec, TileAutoencoder) and isinstance(model.dynamics, TileFlow)
    assert isinstance(model.head, PlayerOutcomeHead) and bundle.provenance["heads_also"]["events"] == 16
    done = {p.stem for p in (tmp_path / "run" / "stages").iterdir()}
    assert {"latents-events", "camera", "settled", "heads", "bundle"} <= done


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
