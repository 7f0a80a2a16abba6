"""The head on the dynamics' features: what is told in one place is known in all, and wrong features are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.errors import ConfigError
from dreamenv.models.heads.features import FeatureHeadConfig, FeatureOutcomeHead
from dreamenv.models.interface import LatentSpec, State
from dreamenv.models.registry import build
from dreamenv.world_model import WorldModel

SHAPE = (12, 8, 8)


def head(**options: Any) -> FeatureOutcomeHead:
    torch.manual_seed(0)
    return FeatureOutcomeHead(FeatureHeadConfig(LatentSpec(SHAPE), context=2, width=16, features=4, **options))


def moments(places: Tensor, touching: Tensor) -> tuple[State, Tensor, dict[str, Tensor]]:
    """Two things at a place (B, 2), one beside the other where they touch, else two cells apart."""
    count = len(places)
    found = 0.1 * torch.randn(count, 4, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    rows, (down, across) = torch.arange(count), places.T
    found[rows, 0, down, across] += 3
    found[rows, 1, down, across + torch.where(touching, 1, 3)] += 3
    state = State({"latents": torch.zeros(count, 2, *SHAPE), "actions": torch.zeros(count, 1, dtype=torch.int64)})
    return state, torch.zeros(count, dtype=torch.int64), {"features": found}


def test_a_touch_learnt_on_one_side_is_known_on_the_other() -> None:
    model, draw = head(), torch.Generator().manual_seed(2)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    down = torch.arange(8)

    def batch(rows: Tensor) -> tuple[tuple[State, Tensor, dict[str, Tensor]], Tensor]:
        touching = torch.rand(len(rows), generator=draw) < 0.5
        across = torch.randint(0, 5, (len(rows),), generator=draw)
        return moments(torch.stack([rows, across], 1), touching), touching.long()

    for _ in range(150):
        asked, labels = batch(down[:4].repeat(8))
        loss = F.cross_entropy(model.logits(*asked), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        asked, labels = batch(down[5:].repeat(40))
        right = (model.logits(*asked).argmax(1) == labels).float().mean()
    assert right > 0.9, "it was never shown a touch in these rows"


def test_actions_count() -> None:
    model = head()
    for film in model.films:
        torch.nn.init.normal_(film.weight, std=0.3)
    state, action, hints = moments(torch.tensor([[2, 2]]), torch.tensor([True]))
    assert not torch.equal(model.logits(state, action, hints), model.logits(state, action + 3, hints))


@pytest.mark.parametrize("hints", [{}, {"features": torch.zeros(1, 5, 8, 8)}, {"features": torch.zeros(1, 4, 4, 4)}])
def test_other_features_are_refused(hints: dict[str, Tensor]) -> None:
    state, action, _ = moments(torch.tensor([[2, 2]]), torch.tensor([True]))
    with pytest.raises(ConfigError, match=r"needs \(4, 8, 8\) from the dynamics"):
        head().logits(state, action, hints)


def test_a_model_whose_dynamics_hint_nothing_is_refused() -> None:
    codec = build("codec", {"type": "exact_patches"})
    spec = {"latent": {"shape": [48, 16, 16], "layout": "pixels of patches"}}
    flow = build("dynamics", spec | {"type": "latent_flow"})
    with pytest.raises(ConfigError, match=r"needs the hints .*features.* hint nothing"):
        WorldModel(codec, flow, build("head", spec | {"type": "feature_head"}))
    canvas = build("dynamics", spec | {"type": "canvas_flow"})
    with pytest.raises(ConfigError, match=r"needs the hints .*7, 16, 16.* of the dynamics"):
        WorldModel(codec, canvas, build("head", spec | {"type": "feature_head", "features": 7}))
