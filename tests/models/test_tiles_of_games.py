"""Tiles of several games, each of which shows another number of them, against networks of each game alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreamenv.errors import ConfigError
from dreamenv.models.codecs.tiles import TileAutoencoder, TileAutoencoderConfig
from dreamenv.models.dynamics.tiles import TileFlow, TileFlowConfig
from dreamenv.models.heads.player import PlayerHeadConfig, PlayerOutcomeHead
from dreamenv.models.interface import LatentSpec
from dreamenv.models.io import initialise, save_model
from dreamenv.models.tiles.grid import Grid, moves
from dreamenv.models.tiles.player import place_in_tile
from tests.tiles import BACKBONE

GAMES, VIEWS = ("coinrun", "ninja", "jumper"), (13, 10, 12)
ALL = Grid(views=VIEWS)
ALONE = [Grid(view=view) for view in VIEWS]  # all with windows of sixteen tiles
SPECS = [LatentSpec((10, 16, 16), "tiles", 4), LatentSpec((11, 16, 16), "tiles", 5)]
SHAPE = {"backbone": BACKBONE, "embedding": 32, "motion": 16}


def shaken(network: nn.Module) -> nn.Module:
    """Nothing is left at zero, so that every part has a say."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network.eval()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def codecs() -> list[TileAutoencoder]:
    """One of all games, and one of each alone, with the same weights."""
    shape = {"codes": 6, "width": 16, "blocks": 1, "orders": 5}
    every = shaken(TileAutoencoder(TileAutoencoderConfig(**shape, grid=ALL, games=GAMES)))  # pyright: ignore
    alone = [TileAutoencoder(TileAutoencoderConfig(**shape, grid=grid)) for grid in ALONE]  # pyright: ignore
    for one in alone:
        one.load_state_dict(every.state_dict())
    return [every, *(one.eval() for one in alone)]  # pyright: ignore[reportReturnType]


def test_a_small_view_lies_in_a_window_for_larger_ones() -> None:
    both, small, phase = Grid(view=16, views=(10, 16)), Grid(view=10), torch.rand(6, 2)
    assert (both.window, small.window) == (20, 16)
    shown, cosines = both.shown(phase, torch.zeros(6)), both.cosines(phase[:, 0], 3, torch.zeros(6))
    assert torch.equal(shown[..., :16, :16], small.shown(phase)) and not shown[..., 16:, :].any()
    assert torch.allclose(cosines[..., :48], small.cosines(phase[:, 0], 3), atol=1e-5) and not cosines[..., 48:].any()


def test_each_game_keeps_its_own_grid() -> None:
    phase, game = torch.rand(12, 2), torch.arange(12) % 3
    tile, place = place_in_tile(ALL, phase, game)
    for i, grid in enumerate(ALONE):
        at = game == i
        assert torch.equal(ALL.shown(phase, game)[at], grid.shown(phase[at]))
        assert torch.allclose(ALL.waves(phase, game)[at], grid.waves(phase[at]), atol=1e-5)
        assert torch.allclose(ALL.cosines(phase[:, 0], 8, game)[at], grid.cosines(phase[at, 0], 8), atol=1e-4)
        own = place_in_tile(grid, phase[at])
        assert torch.equal(tile[at], own[0]) and torch.allclose(place[at], own[1], atol=1e-6)


def test_a_codec_of_several_games_is_one_of_each() -> None:
    every, *alone = codecs()
    assert every.spec == SPECS[1] and alone[0].spec == SPECS[0]
    images, game, camera = torch.rand(6, 3, 64, 64), torch.arange(6) % 3, torch.rand(6, 2) * 9
    for columns in ({}, {"camera": camera}):
        latents = every.encode(images, game=game, **columns)
        assert torch.equal(latents[:, 6, 0, 0], game.float())
        drawn, part, shown = every.decode(latents), every.pool(images[:, 0], latents), every.visible(latents)
        for i, one in enumerate(alone):
            at = game == i
            own = one.encode(images[at], **{name: value[at] for name, value in columns.items()})
            assert torch.allclose(latents[at][:, [*range(6), *range(7, 11)]], own, atol=1e-4)
            assert torch.allclose(drawn[at], one.decode(own), atol=1e-3)  # of colours up to nine
            assert torch.allclose(part[at], one.pool(images[at, 0], own), atol=1e-4)
            assert torch.allclose(shown[at], one.visible(own), atol=1e-5)
    noised = every.noised(latents, torch.ones_like(latents))
    assert torch.equal(noised[:, 6:], latents[:, 6:]) and torch.allclose(noised[:, :6], latents[:, :6] + 1)
    with pytest.raises(ConfigError, match="say which of them"):
        every.encode(images)


def dreamt(model: TileFlow, head: PlayerOutcomeHead, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Three steps on from four latents (B, 4, C, H, W), and what the head expects of them."""
    actions = torch.tensor([[7, 8, 1]]).expand(len(latents), -1)
    state, made, said = model.begin(latents, actions), [], []
    for key in (8, 0, 5):
        action = torch.full((len(latents),), key)
        prediction = model.predict(state, action)
        said.append(head.logits(state, action, prediction.hints))
        state = model.advance(state, action, prediction.latent)
        made.append(prediction.latent)
    return torch.stack(made, 1), torch.stack(said, 1)


@torch.no_grad()
def test_what_begins_with_one_games_weights_dreams_each_game_as_that_alone(tmp_path: Path) -> None:
    """Which game it is counts for nothing at first but in its grid; once it counts, games differ."""
    every, *alone = codecs()
    game = torch.tensor([0, 1, 2, 0, 1, 2])
    frames = torch.rand(6, 4, 3, 64, 64)
    latents = every.encode(frames.flatten(0, 1), game=game.repeat_interleave(4)).unflatten(0, (6, 4))
    latents = every.sequence(latents)
    first = shaken(TileFlow(TileFlowConfig(latent=SPECS[0], grid=ALONE[0], **SHAPE)))  # pyright: ignore
    save_model(tmp_path / "one", first, {})
    several = TileFlow(TileFlowConfig(latent=SPECS[1], grid=ALL, games=GAMES, **SHAPE)).eval()  # pyright: ignore
    initialise(several, str(tmp_path / "one"))
    outcomes = {"rewards": (0.0, 10.0, 0.0), "terminated": (False, True, True), "width": 8}
    own = PlayerHeadConfig(latent=SPECS[1], grid=ALL, games=GAMES, owners=(0, 1, 2), **outcomes)  # pyright: ignore
    heads = [shaken(PlayerOutcomeHead(own))]
    for grid in ALONE:
        one = PlayerOutcomeHead(PlayerHeadConfig(latent=SPECS[0], grid=grid, **outcomes))  # pyright: ignore
        weights = {k: v for k, v in heads[0].state_dict().items() if k in one.state_dict()}
        told = heads[0].state_dict()["decide.0.weight"]
        heads[0].state_dict()["decide.0.weight"][:, -3:] = 0
        one.load_state_dict(weights | {"decide.0.weight": told[:, :-3]}, strict=False)
        heads.append(one.eval())
    made, said = dreamt(several, heads[0], latents)  # pyright: ignore[reportArgumentType]
    assert torch.equal(made[:, :, 6, 0, 0], game[:, None].expand(-1, 3).float())
    for i, (grid, codec) in enumerate(zip(ALONE, alone, strict=True)):
        at = game == i
        model = TileFlow(dataclasses.replace(first.config, grid=grid)).eval()  # pyright: ignore
        model.load_state_dict(first.state_dict())
        begun = codec.sequence(latents[at][:, :, [*range(6), *range(7, 11)]])
        assert torch.allclose(moves(begun), moves(latents[at]), atol=1e-5)
        alone_made, alone_said = dreamt(model, heads[1 + i], begun)  # pyright: ignore[reportArgumentType]
        assert torch.allclose(made[at][:, :, [*range(6), *range(7, 11)]], alone_made, atol=2e-4)
        assert torch.allclose(said[at], alone_said, atol=2e-4)
    settled = several.smooth(latents, torch.zeros(6, 3, dtype=torch.int64))
    assert torch.equal(settled[:, :, :7], latents[:, :, :7])
    weights = heads[0].state_dict()["decide.0.weight"]
    for told, change in (
        (several.condition[0].weight, lambda m, s: (m - made)[:, :, :6]),  # pyright: ignore
        (several.motion.laws.weight, lambda m, s: moves(m) - moves(made)),
        (several.motion.weigh[0].weight, lambda m, s: moves(m) - moves(made)),  # pyright: ignore
        (weights, lambda m, s: s - said),
    ):
        before = told.clone()
        nn.init.normal_(told[:, -3:], std=0.5)
        now = change(*dreamt(several, heads[0], latents))  # pyright: ignore[reportArgumentType]
        assert now.abs().max() > 1e-4  # of nothing, before it was told
        told.copy_(before)


@torch.no_grad()
def test_a_head_of_one_game_lends_what_it_sees_and_not_its_outcomes(tmp_path: Path) -> None:
    one = shaken(PlayerOutcomeHead(PlayerHeadConfig(latent=SPECS[0], grid=ALONE[0], width=8)))
    save_model(tmp_path / "one", one, {})
    outcomes = {"rewards": (0.0, 10.0, 0.0, 3.0), "terminated": (False, True, False, False), "owners": (0, 0, 1, 2)}
    config = PlayerHeadConfig(latent=SPECS[1], grid=ALL, games=GAMES, width=8, **outcomes)  # pyright: ignore
    several = PlayerOutcomeHead(config)
    last = several.decide[4].weight.clone()  # pyright: ignore[reportCallIssue]
    initialise(several, str(tmp_path / "one"))
    assert torch.equal(several.decide[4].weight, last)  # pyright: ignore[reportArgumentType]
    first = several.decide[0].weight  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(first[:, :-3], one.decide[0].weight) and not first[:, -3:].any()  # pyright: ignore
    assert all(torch.equal(a, b) for a, b in zip(several.view.parameters(), one.view.parameters(), strict=True))  # pyright: ignore


def test_games_and_grids_must_fit() -> None:
    with pytest.raises(ConfigError, match="the most of"):
        Grid(view=10, views=VIEWS)
    for config in (
        lambda: TileAutoencoderConfig(grid=ALL),
        lambda: TileAutoencoderConfig(games=GAMES),
        lambda: TileFlowConfig(latent=SPECS[1], grid=ALL, games=GAMES[:2]),
    ):
        with pytest.raises(ConfigError, match="games.*grid is of"):
            config()
    with pytest.raises(ConfigError, match="5 channels of it known"):
        TileFlowConfig(latent=SPECS[0], grid=ALL, games=GAMES)
