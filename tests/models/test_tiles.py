"""Networks on the grid of tiles, against a made-up level whose codes are known."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save as save_tensors
from torch import Tensor

from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.codecs.tiles import TileAutoencoder, TileAutoencoderConfig
from dreamenv.models.dynamics.tiles import TileFlow, TileFlowConfig
from dreamenv.models.heads.player import PlayerHeadConfig, PlayerOutcomeHead
from dreamenv.models.interface import LatentSpec, State
from dreamenv.models.io import fill
from dreamenv.models.tiles.camera import CameraMotion
from dreamenv.models.tiles.canvas import MARGIN, remember
from dreamenv.models.tiles.grid import Grid, crossed, move_window, moves, phase_of, phases, with_camera
from dreamenv.models.tiles.player import place_in_tile
from tests.conftest import predicted
from tests.tiles import GRID, LATENT, seen_from, untrained_flow, walk


@pytest.fixture(scope="module")
def level() -> Tensor:
    return torch.randn(6, 60, 60, generator=torch.Generator().manual_seed(0))


def test_a_picture_shows_thirteen_tiles_each_way_at_any_phase() -> None:
    share = GRID.shown(torch.rand(50, 2))
    assert torch.allclose(share.sum((1, 2, 3)), torch.full((50,), float(GRID.view**2)), atol=1e-3)
    assert GRID.shown(torch.zeros(1, 2))[0, 0, 1:14, 1:14].min() == 1


def test_a_window_that_moves_keeps_what_it_knew() -> None:
    values = torch.randn(4, 3, GRID.window, GRID.window)
    by = torch.tensor([[0, 0], [2, -1], [-3, 4], [20, 0]])
    moved = move_window(values, by)
    assert torch.equal(moved[0], values[0])
    assert torch.equal(moved[1, :, 1:, :-2], values[1, :, :-1, 2:])
    assert not moved[1, :, 0].any() and not moved[1, :, :, -2:].any()
    assert torch.equal(moved[2, :, :-4, 3:], values[2, :, 4:, :-3])
    assert not moved[3].any()


def test_phases_stay_below_one_in_half_precision() -> None:
    assert (phase_of(torch.tensor([0.99999, 3.9999, -1e-6])).half() < 1).all()
    assert torch.equal(phase_of(torch.tensor([2.25, -0.25])), torch.tensor([0.25, 0.75]))


def test_tracking_finds_the_moves_of_a_level_in_which_things_move(level: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    steps = (torch.rand(32, 3, 2, generator=generator) - 0.5) * torch.tensor([1.0, 3.0])
    latents = walk(level, torch.rand(32, 2, generator=generator) * 3 + 20, steps)
    given = latents.clone()
    given[:, :, -2:] = 0.7  # must not be believed
    given[:, :, :6] += 0.1 * torch.randn(given[:, :, :6].shape, generator=generator)
    given[:, 1:, :6, 6:10, 6:10] += 3 * torch.randn(32, 3, 6, 4, 4, generator=generator)  # a crowd in the middle
    autoencoder = TileAutoencoder(TileAutoencoderConfig(codes=6, width=16, blocks=1))
    tracked = autoencoder.sequence(given)
    assert torch.allclose(moves(tracked)[:, 1:], steps, atol=2e-3)
    assert not moves(tracked)[:, 0].any() and torch.equal(tracked[:, :, :-2], given[:, :, :-2])


def test_what_stands_still_is_copied_exactly_from_any_picture_of_the_context(level: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    steps = (torch.rand(16, 4, 2, generator=generator) - 0.5) * 3
    steps[:8, 2], steps[:8, 3] = steps[:8, 2].abs(), -steps[:8, 2].abs()  # there and back
    latents = walk(level, torch.rand(16, 2, generator=generator) * 3 + 20, steps)
    model = untrained_flow()
    before, after = phases(latents[:, 3]), phases(latents[:, 4])
    move = after - before + crossed(before, steps[:, 3], after)
    clean = predicted(model, latents[:, :4], torch.zeros(16, 4, dtype=torch.int64), hints={"move": move}).latent
    target, window = latents[:, 4], (before + move + 1e-6).floor()
    known = move_window(GRID.shown(phases(latents[:, 3])), window) > 0.99
    seen = known.expand(-1, 6, -1, -1) & (GRID.shown(after) > 0)
    assert seen.float().mean() > 0.4 and torch.equal(clean[:, :6][seen], target[:, :6][seen])
    back = (GRID.shown(after) > 0)[:8].expand(-1, 6, -1, -1)  # where the camera was a step before, all is known
    earlier = GRID.shown(phases(latents[:8, 2])) > 0.99
    two = window[:8] + crossed(phases(latents[:8, 2]), steps[:8, 2], before[:8])
    again = back & (move_window(earlier.float(), two) > 0.99)
    assert torch.equal(clean[:8, :6][again], target[:8, :6][again])
    assert not clean[:, :6][(GRID.shown(after) == 0).expand(-1, 6, -1, -1)].any()


def test_a_canvas_holds_all_that_was_seen_within_its_reach(level: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    steps = (torch.rand(8, 20, 2, generator=generator) - 0.5) * 3
    latents, poses = walk(level, torch.full((8, 2), 25.3), steps), 25.3 + F.pad(steps.cumsum(1), (0, 0, 1, 0))
    windows = poses.floor()
    canvas = remember(GRID, None, latents[:, 0], torch.zeros(8, 2))
    for t in range(1, 21):
        canvas = remember(GRID, canvas, latents[:, t], windows[:, t] - windows[:, t - 1])
    truth = torch.stack([level[:, y - 9 : y + 23, x - 9 : x + 23] for x, y in windows[:, -1].long()])
    whole = torch.zeros(
        8, (GRID.window + 2 * MARGIN), (GRID.window + 2 * MARGIN), dtype=torch.bool
    )  # tiles that some picture showed whole, counted one by one
    for b, t in itertools.product(range(8), range(21)):
        first = (
            (poses[b, t] - 1e-4).ceil() - windows[b, -1] + 9
        )  # the level's tile x is the canvas's tile x - window + 9
        last = (poses[b, t] + GRID.view + 1e-4).floor() - windows[b, -1] + 9
        (x, y), (right, down) = (p.clamp(0, (GRID.window + 2 * MARGIN)).int().tolist() for p in (first, last))
        whole[b, y:down, x:right] = True
    assert 0.2 < whole.float().mean() < 0.95  # a row is lost for good
    assert torch.equal(canvas[:, :6].movedim(1, -1)[whole], truth.movedim(1, -1)[whole])
    assert (canvas[:, 6][whole] > 0.99).all() and not canvas[:, :6].movedim(1, -1)[canvas[:, 6] == 0].any()


def test_the_camera_goes_where_it_was_going_before_anything_is_learnt(level: Tensor) -> None:
    steps = torch.full((4, 3, 2), 0.3) * torch.tensor([1.0, -0.5])
    latents = walk(level, torch.full((4, 2), 20.25), steps)
    clean = predicted(untrained_flow(), latents, torch.zeros(4, 4, dtype=torch.int64)).latent
    assert torch.allclose(moves(clean), steps[:, -1])
    expected = phase_of(torch.full((4, 2), 20.25) + steps.sum(1) + steps[:, -1])
    assert torch.allclose(phases(clean), expected, atol=1e-3)


@pytest.mark.parametrize(
    "sampler", [SamplerConfig(guidance_scale=3.0), SamplerConfig(nfe=3, solver="heun", guidance_scale=2.0)]
)
def test_guidance_and_samplers_keep_one_window(level: Tensor, sampler: SamplerConfig) -> None:
    latents = walk(level, torch.full((2, 2), 20.9), torch.full((2, 3, 2), 0.3))
    model = untrained_flow()
    for parameter in model.motion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # another action, another move
    actions = torch.zeros(2, 4, dtype=torch.int64)
    noise = torch.randn(2, 10, GRID.window, GRID.window, generator=torch.Generator().manual_seed(0))
    state = model.begin(latents, actions[:, :-1])
    guided = sample(model, state, actions[:, -1], noise, sampler).latent
    plain = sample(model, state, actions[:, -1], noise, replace(sampler, guidance_scale=1.0)).latent
    assert torch.allclose(
        guided, plain, atol=1e-5
    )  # an untrained U-Net changes nothing: there is nothing to extrapolate


def test_decoding_depends_on_the_phase_and_pooling_inverts_it() -> None:
    torch.manual_seed(0)
    autoencoder = TileAutoencoder(TileAutoencoderConfig(codes=6, width=16, blocks=1))
    phase = torch.tensor([[0.0, 0.0], [0.5, 0.25]])
    latents = with_camera(torch.randn(1, 6, GRID.window, GRID.window).expand(2, -1, -1, -1), phase, torch.zeros(2, 2))
    images = autoencoder.decode(latents)
    assert images.shape == (2, 3, 64, 64) and not torch.allclose(images[0], images[1], atol=1e-2)
    tiles = torch.randn(2, 1, GRID.window, GRID.window)
    pooled = autoencoder.pool(autoencoder.spread_out(tiles, phase), latents)
    inside = GRID.shown(phase)[:, 0] > 0.5
    assert (
        torch.allclose(pooled[inside], tiles[:, 0][inside], atol=1e-5)
        and not pooled[GRID.shown(phase)[:, 0] == 0].any()
    )


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (TileAutoencoderConfig, {"codes": 0}, "codes 0"),
        (TileAutoencoderConfig, {"orders": 99}, "orders 99"),
        (TileFlowConfig, {"latent": LatentSpec((10, 20, 20), "tiles", 4)}, "16 x 16"),
        (TileFlowConfig, {"latent": LatentSpec((10, 16, 16))}, "must be of layout 'tiles'"),
        (PlayerHeadConfig, {"latent": LatentSpec((10, 16, 16))}, "must be of layout 'tiles'"),
        (Grid, {"view": 1}, "view 1"),
        (Grid, {"player": (0.5, 1.5)}, "player"),
        (TileFlowConfig, {"context": 1}, "context 1"),
        (TileFlowConfig, {"motion": 2}, "motion 2"),
    ],
)
def test_bad_shapes_are_refused(config: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**values)


@pytest.mark.slow
def test_a_camera_learns_when_friction_brings_it_to_rest() -> None:
    """Against the law itself: a push, drag, and rest below a threshold, to which a speed comes close."""
    torch.manual_seed(0)
    motion, generator = CameraMotion(1, 4, 32), torch.Generator().manual_seed(0)
    laws = list(motion.laws.parameters())
    others = [p for name, p in motion.named_parameters() if not name.startswith("laws")]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": laws, "lr": 1e-2}], lr=1e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)

    def errors(size: int) -> Tensor:
        push = torch.randint(-1, 2, (size, 2), generator=generator)
        speed = 0.12 * torch.rand(size, 2, generator=generator) - 0.06
        move = 0.97 * speed + 0.015 * push
        move = move * (move.abs() >= 0.0149)
        actions = (3 * push[:, 0] + push[:, 1] + 4)[:, None].expand(-1, 4)
        place = torch.rand(size, 2, generator=generator)
        return motion(torch.zeros(size, 3, 7, 7), place, speed[:, None].expand(-1, 3, -1), actions) - move

    for _ in range(300):
        optimizer.zero_grad()
        F.smooth_l1_loss(off := errors(512), torch.zeros_like(off), beta=0.005).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        wrong = (errors(4096).abs() > 0.005).float().mean()
    assert wrong < 0.12  # 0.17 if what weighs the laws does not see their answers


def test_readings_are_moved_onto_the_nearest_path(level: Tensor) -> None:
    """Of a camera that goes straight on, as all do before training: the straight line of ordinary least squares."""
    backbone = {"type": "unet", "channels": (8,), "blocks": (1,)}
    model = TileFlow(TileFlowConfig(latent=LATENT, backbone=backbone, embedding=8, motion=8)).eval()
    rng = np.random.default_rng(0)
    pose = torch.from_numpy(
        rng.uniform(5, 6, (16, 1, 2)) + rng.uniform(-0.3, 0.3, (16, 1, 2)) * np.arange(4)[:, None]
    ).float()
    misread = torch.from_numpy(rng.normal(size=(16, 4, 2)) * 0.004).float()
    misread[-1, 2] += 0.5  # no straight line is near
    read = pose + misread
    read = read.where((read.floor() == pose.floor()).all(2, keepdim=True), pose)
    latents = torch.stack([seen_from(level, read[:, i]) for i in range(4)], 1)
    step = torch.cat([torch.zeros(16, 1, 2), read.diff(dim=1)], 1)
    latents = torch.stack([with_camera(latents[:, i, :6], phases(latents[:, i]), step[:, i]) for i in range(4)], 1)
    with torch.no_grad():
        settled = model.smooth(latents, torch.zeros(16, 3, dtype=torch.int64))
        two = model.smooth(latents[:, :2], torch.zeros(16, 1, dtype=torch.int64))
    line = np.stack(
        [[np.polyval(np.polyfit(np.arange(4), y, 1), np.arange(4)) for y in rows.T] for rows in read.numpy()], 0
    )
    line = torch.from_numpy(line).mT.float()
    line[-1] = read[-1]
    np.testing.assert_allclose(moves(settled)[:, 1:], line.diff(dim=1), atol=2e-4)
    inside = (line.floor() == read.floor()).all(2)
    np.testing.assert_allclose(phases(settled)[inside], phase_of(line)[inside], atol=2e-4)
    assert torch.equal(settled[:, :, :6], latents[:, :, :6]) and torch.equal(two, latents[:, :2])
    off, before = (moves(x)[:-1, 1:] - pose[:-1].diff(dim=1) for x in (settled, latents))
    assert off.norm() < 0.6 * before.norm()


def test_a_dream_comes_back_to_ground_that_it_left_long_ago(level: Tensor) -> None:
    """Up by nine tiles in six steps and down again: the ground was out of the picture for longer than the context."""
    jump = torch.tensor([[0.0, -1.5]] * 6 + [[0.0, 1.5]] * 6)[None]
    latents = walk(level, torch.full((1, 2), 25.25), jump)
    model, action = untrained_flow(), torch.zeros(1, dtype=torch.int64)
    state = model.begin(latents[:, :1], torch.zeros(1, 0, dtype=torch.int64))
    for t in range(12):
        target = latents[:, t + 1]
        hints = {"move": jump[:, t]}
        forgetful = model.begin(state.latents, state.actions)
        kept, short = (model.align(model.predict(s, action, hints=hints).latent, target) for s in (state, forgetful))
        state = model.advance(state, action, kept)
    seen = (GRID.shown(phases(latents[:, 0])) > 0.99).expand(-1, 6, -1, -1)
    assert torch.equal(kept[:, :6][seen], latents[:, 0, :6][seen])
    assert (short[:, :6][seen] == latents[:, 0, :6][seen]).float().mean() < 0.95  # a row is lost for good


def asked(head: PlayerOutcomeHead, context: Tensor, action: int, move: Tensor | None) -> Tensor:
    """The head's log-probabilities after `action` was held."""
    actions = torch.full((len(context), 4), action)
    state = State({"latents": context, "actions": actions[:, :-1]})
    return head.log_probabilities(state, actions[:, -1], {} if move is None else {"move": move})


def test_an_outcome_head_sees_what_surrounds_the_player_and_no_more(level: Tensor) -> None:
    head = PlayerOutcomeHead(PlayerHeadConfig(latent=LATENT, width=8)).eval()
    context, move = walk(level, torch.tensor([[20.3, 14.2]]), torch.zeros(1, 3, 2)), torch.full((1, 2), 0.1)
    far, near = torch.ones(16, 16), torch.zeros(16, 16)
    far[4:12, 4:12], near[6:9, 6:9] = 0, 1  # the player is in the middle of 13 tiles that begin at one
    answers = []
    for where in (far, near):
        changed = context.clone()
        changed[:, :, :-4] += where
        answers.append(asked(head, changed, 7, move))
    assert torch.equal(answers[0], asked(head, context, 7, move)) and not torch.allclose(*answers)
    assert not torch.allclose(answers[0], asked(head, context, 1, move))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(asked(head, context, 7, move), answers[0])


def test_the_player_is_looked_for_where_the_game_shows_it(level: Tensor) -> None:
    """With the player at the left and low in a view of ten tiles, other tiles decide."""
    grid = Grid(view=10, player=(0.25, 0.75))
    tile, place = place_in_tile(grid, torch.zeros(1, 2))
    assert grid.window == 16 and tile.tolist() == [[3, 8]] and place.tolist() == [[0.5, 0.5]]
    head = PlayerOutcomeHead(PlayerHeadConfig(latent=LATENT, grid=grid, width=8)).eval()
    context, move = torch.zeros(1, 4, 10, 16, 16), torch.zeros(1, 2)
    base = asked(head, context, 7, move)
    for at, felt in (((8, 3), True), ((11, 6), True), ((8, 8), False), ((12, 3), False), ((3, 8), False)):
        changed = context.clone()
        changed[:, :, :6, at[0], at[1]] += 1
        assert torch.equal(asked(head, changed, 7, move), base) != felt, at


def test_an_outcome_head_on_tiles_is_told_the_next_move(level: Tensor, tmp_path: Path) -> None:
    head = PlayerOutcomeHead(PlayerHeadConfig(latent=LATENT, width=8)).eval()
    context = walk(level, torch.tensor([[20.3, 14.2]]), torch.zeros(1, 3, 2))
    rest, falling = torch.zeros(1, 2), torch.tensor([[0.0, 0.2]])
    assert not torch.allclose(asked(head, context, 7, rest), asked(head, context, 7, falling))
    with pytest.raises(ConfigError, match="next move"):
        asked(head, context, 7, None)
    name, seen = "decide.0.weight", head.view.seen
    older = {k: v[:, :seen].contiguous() if k == name else v for k, v in head.state_dict().items()}
    (tmp_path / "older.safetensors").write_bytes(save_tensors(older))
    fill(head, (tmp_path / "older.safetensors").read_bytes(), tmp_path / "older.safetensors")
    assert torch.equal(asked(head, context, 7, rest), asked(head, context, 7, falling)), "heads of before were not told"
    assert torch.equal(head.state_dict()[name][:, :seen], older[name])
