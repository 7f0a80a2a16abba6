"""Learning from parts of pictures: the same square of every step, whose rim goes on from the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreamenv.errors import ConfigError
from dreamenv.models.interface import Prediction, State
from dreamenv.models.io import save_model
from dreamenv.models.registry import build
from envs.collect import CollectConfig, collect
from trainers.crop import cropped
from trainers.encode import encode_dataset
from trainers.rollout import DynamicsBatch, RolloutConfig, Rollouts
from trainers.tasks.dynamics import DynamicsTask, DynamicsTaskConfig

CANVAS = {"type": "canvas_flow", "backbone": {"type": "unet", "channels": [16, 16], "blocks": [1, 1]}, "embedding": 16}
B, K, U, SIDE = 64, 2, 3, 16


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("crop")
    asked = CollectConfig(game="maze", out=str(root / "d"), steps=1600, num_envs=8, shard_steps=100, policy="biased")
    data = collect(asked, progress=False)
    save_model(root / "codec", build("codec", {"type": "exact_patches"}), {})
    return encode_dataset(data, root / "codec", root / "latents", "cpu")


def task(encoded: Path, model: dict[str, Any] = CANVAS, **options: Any) -> DynamicsTask:
    return DynamicsTask(DynamicsTaskConfig(latents=str(encoded), val_ratio=0.2, **options), model, 0)


def places() -> DynamicsBatch:
    """Pictures whose first two channels are row and column; cell (i, i) changes at the first predicted step."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    latents = torch.from_numpy(np.stack([rows, columns, 0 * rows])).float().expand(B, K + U, 3, SIDE, SIDE).clone()
    for i in range(B):
        latents[i, K:, 2, i % SIDE, i % SIDE] = 1
    importance = torch.from_numpy(rows * SIDE + columns).to(torch.uint8).expand(B, U, SIDE, SIDE)
    actions, live = torch.zeros(B, K + U, dtype=torch.long), torch.ones(B, U, dtype=torch.bool)
    return DynamicsBatch(latents, actions, importance, live)


@pytest.mark.parametrize("around", [0.0, 1.0])
def test_squares_are_the_same_in_all_steps_and_are_laid_around_what_changes(around: float) -> None:
    batch = cropped(np.random.default_rng(0), places(), K, 8, around)
    rows, columns, changed = batch.latents.unbind(2)
    assert batch.latents.shape == (B, K + U, 3, 8, 8) and batch.rim is not None
    corner = torch.stack([rows[:, 0, 0, 0], columns[:, 0, 0, 0]], 1)
    assert len(set(map(tuple, corner.tolist()))) > 16
    assert torch.equal(rows, (corner[:, 0, None] + torch.arange(8))[:, None, :, None].expand_as(rows))
    assert torch.equal(columns, (corner[:, 1, None] + torch.arange(8))[:, None, None, :].expand_as(columns))
    assert torch.equal(batch.importance.float(), (rows * SIDE + columns)[:, :U])
    edges = (0, SIDE - 1)
    for i in range(B):
        for y in range(8):
            for x in range(8):
                at = [(y, float(rows[i, 0, y, x])), (x, float(columns[i, 0, y, x]))]
                assert bool(batch.rim[i, y, x]) == any(a in (0, 7) and cell not in edges for a, cell in at)
    counts = (changed[:, K].bool() & ~batch.rim).flatten(1).any(1)
    assert counts.all() if around else not counts.all()


def test_a_square_of_the_whole_picture_is_the_picture(encoded: Path) -> None:
    whole, part = (task(encoded, crop=crop).batch(np.random.default_rng(3), 8) for crop in (0, 16))
    assert whole.rim is None and part.rim is not None and not part.rim.any()
    assert whole.past is not None and part.past is not None and torch.equal(whole.past, part.past)
    assert torch.equal(whole.latents, part.latents) and torch.equal(whole.importance, part.importance)


def test_the_rim_goes_on_from_the_truth_and_does_not_count(encoded: Path) -> None:
    made = task(encoded, crop=8, unroll=3, pad=0.0)
    batch = made.batch(np.random.default_rng(1), 16).to(torch.device("cpu"))

    def wrong(state: State, action: torch.Tensor, **_: Any) -> Prediction:
        return Prediction(state.latents[:, -1] + 1, torch.zeros(len(action), 8, 8), parts={})

    rollouts = Rollouts(
        wrong,  # pyright: ignore[reportArgumentType]
        made.model,
        made.codec,
        made.channels,
        batch,
        RolloutConfig(3, 0.0, 0.0, 0.0, 1.0),
        None,
        torch.Generator(),
    )
    assert batch.rim is not None and batch.rim.any() and not batch.rim.all()
    rim, live = batch.rim[:, None].expand(-1, 48, -1, -1), batch.live
    for u, step in enumerate(rollouts.mean.steps):
        going = rollouts.mean.trail[:, 4 + u]
        assert torch.equal(going[rim], batch.latents[:, 4 + u][rim])
        assert not step.error[batch.rim].any() and bool((step.error[live[:, u]][~batch.rim[live[:, u]]] > 0).any())
        before = rollouts.mean.trail[:, 3 + u]
        assert torch.equal(going[~rim], (before + 1)[~rim])


@pytest.mark.parametrize(
    ("options", "model", "said"),
    [
        ({"crop": 3}, CANVAS, "crop 3: must be 0, or 4..256"),
        ({"crop": 20}, CANVAS, "crop 20: .* have 16 cells; use 0..16"),
        ({"crop": 8}, CANVAS | {"backbone": {"type": "dit"}}, "CanvasFlow wants whole pictures; set crop to 0"),
        ({"crop": 8, "terms": {"squared": {}, "perceptual": {}}}, CANVAS, "terms perceptual want whole pictures"),
    ],
)
def test_what_needs_whole_pictures_is_refused(
    encoded: Path, options: dict[str, Any], model: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        task(encoded, model, **options)
