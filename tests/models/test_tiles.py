"""Latents on the grid of tiles: against the game's own camera, a made-up level whose codes are known, and as far as a
dream."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save as save_tensors
from torch import Tensor

from dreamenv.artifacts import sha256_file
from dreamenv.bundle import GameFacts, Limits, Starts, load_bundle, save_bundle
from dreamenv.data import Dataset
from dreamenv.data.writer import DatasetWriter
from dreamenv.errors import BundleError, ConfigError, DatasetError
from dreamenv.flow import SamplerConfig
from dreamenv.models.codecs.patches import PatchAutoencoder, PatchAutoencoderConfig
from dreamenv.models.codecs.tiles import (
    MEMORY,
    SCALE,
    VIEW,
    WINDOW,
    TileAutoencoder,
    TileAutoencoderConfig,
    crossed,
    move_window,
    moves,
    phase_of,
    phases,
    remember,
    shown,
    with_camera,
)
from dreamenv.models.dynamics.flow import LatentFlow, LatentFlowConfig, draw_next
from dreamenv.models.dynamics.tiles import CameraMotion, TileFlow, TileFlowConfig
from dreamenv.models.interface import OutcomeHead, OutcomeHeadConfig, PlayerOutcomeHead
from dreamenv.models.io import load_model, load_weights, save_model
from dreamenv.world_model import WorldModel
from envs.collect import CollectConfig, collect
from envs.procgen import RealProcgenVectorEnv
from trainers.encode import encode_dataset
from trainers.latent_data import LatentDataset
from trainers.pipeline import PipelineConfig, run_pipeline
from trainers.tasks.camera import CameraTask, CameraTaskConfig
from trainers.tasks.dynamics import DynamicsTask, DynamicsTaskConfig
from trainers.tasks.outcome import OutcomeTask, OutcomeTaskConfig
from trainers.train import train

AUTOENCODER = {"type": "tile_autoencoder", "codes": 6, "width": 16, "blocks": 1, "orders": 5}
FLOW = {
    "type": "tile_flow",
    "latent_channels": 10,
    "channels": [16, 32],
    "blocks": [1, 1],
    "embedding": 32,
    "motion": 16,
}


def seen_from(level: Tensor, pose: Tensor) -> Tensor:
    """The latents (B, c + 4, H, W) of a made-up level (c, Y, X) for cameras at `pose` (B, 2), without moves."""
    begin = pose.floor().long() - 1
    codes = torch.stack([level[:, y : y + WINDOW, x : x + WINDOW] for x, y in begin])
    phase = phase_of(pose)
    return with_camera(codes * (shown(phase) > 0), phase, torch.zeros_like(phase))


def walk(level: Tensor, start: Tensor, steps: Tensor) -> Tensor:
    """Latents (B, T, C, H, W), moves included, of cameras that start at (B, 2) and make `steps` (B, T - 1, 2)."""
    poses = torch.cat([start[:, None], start[:, None] + steps.cumsum(1)], 1)
    latents = torch.stack([seen_from(level, pose) for pose in poses.unbind(1)], 1)
    latents[:, 1:, -2:] = steps[..., None, None]
    return latents


@pytest.fixture(scope="module")
def level() -> Tensor:
    return torch.randn(6, 60, 60, generator=torch.Generator().manual_seed(0))


def test_camera_tells_how_the_picture_moved() -> None:
    envs = RealProcgenVectorEnv(8, start_level=0, num_levels=100)
    rng = np.random.default_rng(0)
    frames, _ = envs.reset(seed=1)
    camera, held = envs.camera(), rng.integers(15, size=8)
    followed, stayed, mirrored = [], [], []
    for t in range(60):
        held = np.where(rng.random(8) < 0.2, rng.choice([5, 7, 8], 8), held)
        following, _, terminated, truncated, _ = envs.step(held)
        now = envs.camera()
        for i in np.flatnonzero(~(terminated | truncated)):
            dx, dy = np.round((now[i] - camera[i]) * SCALE).astype(int)
            if abs(dx) + abs(dy) >= 2 and max(abs(dx), abs(dy)) < 20 and t > 3:
                inner = following[i, 20:44, 20:44].astype(float)
                followed.append(np.abs(inner - frames[i, 20 + dy : 44 + dy, 20 + dx : 44 + dx]).mean())
                stayed.append(np.abs(inner - frames[i, 20:44, 20:44]).mean())
                mirrored.append(np.abs(inner - frames[i, 20 - dy : 44 - dy, 20 - dx : 44 - dx]).mean())
        frames, camera = following, now
    assert len(followed) > 50 and np.mean(followed) < 0.8 * np.mean(stayed)
    assert np.mean(followed) < 0.6 * np.mean(mirrored)
    envs.close()
    other = RealProcgenVectorEnv(1, "maze", num_levels=10)
    other.reset(seed=0)
    assert np.isnan(other.camera()).all() and other.camera().shape == (1, 2)
    other.close()


def test_a_picture_shows_thirteen_tiles_each_way_at_any_phase() -> None:
    share = shown(torch.rand(50, 2))
    assert torch.allclose(share.sum((1, 2, 3)), torch.full((50,), float(VIEW**2)), atol=1e-3)
    assert shown(torch.zeros(1, 2))[0, 0, 1:14, 1:14].min() == 1


def test_a_window_that_moves_keeps_what_it_knew() -> None:
    values = torch.randn(4, 3, WINDOW, WINDOW)
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
    tracked = autoencoder.track(given)
    assert torch.allclose(moves(tracked)[:, 1:], steps, atol=2e-3)
    assert not moves(tracked)[:, 0].any() and torch.equal(tracked[:, :, :-2], given[:, :, :-2])


def untrained_flow() -> TileFlow:
    torch.manual_seed(0)
    return TileFlow(
        TileFlowConfig(latent_channels=10, channels=(16, 32), blocks=(1, 1), embedding=32, motion=16)
    ).eval()


def test_what_stands_still_is_copied_exactly_from_any_picture_of_the_context(level: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    steps = (torch.rand(16, 4, 2, generator=generator) - 0.5) * 3
    steps[:8, 2], steps[:8, 3] = steps[:8, 2].abs(), -steps[:8, 2].abs()  # there and back
    latents = walk(level, torch.rand(16, 2, generator=generator) * 3 + 20, steps)
    model, zero = untrained_flow(), torch.zeros(16)
    before, after = phases(latents[:, 3]), phases(latents[:, 4])
    move = after - before + crossed(before, steps[:, 3], after)
    clean, _ = model(None, zero, latents[:, :4], torch.zeros(16, 4, dtype=torch.int64), zero, move=move)
    target, window = latents[:, 4], (before + move + 1e-6).floor()
    known = move_window(shown(phases(latents[:, 3])), window) > 0.99
    seen = known.expand(-1, 6, -1, -1) & (shown(after) > 0)
    assert seen.float().mean() > 0.4 and torch.equal(clean[:, :6][seen], target[:, :6][seen])
    back = (shown(after) > 0)[:8].expand(-1, 6, -1, -1)  # where the camera was a step before, all is known
    earlier = shown(phases(latents[:8, 2])) > 0.99
    two = window[:8] + crossed(phases(latents[:8, 2]), steps[:8, 2], before[:8])
    again = back & (move_window(earlier.float(), two) > 0.99)
    assert torch.equal(clean[:8, :6][again], target[:8, :6][again])
    assert not clean[:, :6][(shown(after) == 0).expand(-1, 6, -1, -1)].any()


def test_memory_holds_all_that_was_seen_within_its_reach(level: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    steps = (torch.rand(8, 20, 2, generator=generator) - 0.5) * 3
    latents, poses = walk(level, torch.full((8, 2), 25.3), steps), 25.3 + F.pad(steps.cumsum(1), (0, 0, 1, 0))
    windows = poses.floor()
    memory = remember(None, latents[:, 0], torch.zeros(8, 2))
    for t in range(1, 21):
        memory = remember(memory, latents[:, t], windows[:, t] - windows[:, t - 1])
    truth = torch.stack([level[:, y - 9 : y + 23, x - 9 : x + 23] for x, y in windows[:, -1].long()])
    whole = torch.zeros(8, MEMORY, MEMORY, dtype=torch.bool)  # tiles that some picture showed whole, counted one by one
    for b, t in itertools.product(range(8), range(21)):
        first = (
            (poses[b, t] - 1e-4).ceil() - windows[b, -1] + 9
        )  # the level's tile x is the memory's tile x - window + 9
        last = (poses[b, t] + VIEW + 1e-4).floor() - windows[b, -1] + 9
        (x, y), (right, down) = (p.clamp(0, MEMORY).int().tolist() for p in (first, last))
        whole[b, y:down, x:right] = True
    assert 0.2 < whole.float().mean() < 0.95  # a row is lost for good
    assert torch.equal(memory[:, :6].movedim(1, -1)[whole], truth.movedim(1, -1)[whole])
    assert (memory[:, 6][whole] > 0.99).all() and not memory[:, :6].movedim(1, -1)[memory[:, 6] == 0].any()


def test_a_dream_comes_back_to_ground_that_it_left_long_ago(level: Tensor) -> None:
    """Up by nine tiles in six steps and down again: the ground was out of the picture for longer than the context."""
    jump = torch.tensor([[0.0, -1.5]] * 6 + [[0.0, 1.5]] * 6)[None]
    latents = walk(level, torch.full((1, 2), 25.25), jump)
    model, zero = untrained_flow(), torch.zeros(1)
    context = torch.cat([latents[:, :1]] * 4, 1)
    memory, clean = model.recall(context), latents[:, 0]
    actions = torch.zeros(1, 4, dtype=torch.int64)
    for t in range(12):
        move = jump[:, t]
        kept, _ = model(None, zero, context, actions, zero, move=move, memory=memory)
        short, _ = model(None, zero, context, actions, zero, move=move)
        kept, short = (with_camera(c[:, :6], phases(latents[:, t + 1]), move) for c in (kept, short))
        memory, clean = model.remember(memory, clean, kept), kept
        context = torch.cat([context[:, 1:], kept[:, None]], 1)
    seen = (shown(phases(latents[:, 0])) > 0.99).expand(-1, 6, -1, -1)
    assert torch.equal(kept[:, :6][seen], latents[:, 0, :6][seen])
    assert (short[:, :6][seen] == latents[:, 0, :6][seen]).float().mean() < 0.95  # a row is lost for good


def test_the_camera_goes_where_it_was_going_before_anything_is_learnt(level: Tensor) -> None:
    steps = torch.full((4, 3, 2), 0.3) * torch.tensor([1.0, -0.5])
    latents = walk(level, torch.full((4, 2), 20.25), steps)
    zero = torch.zeros(4)
    clean, _ = untrained_flow()(None, zero, latents, torch.zeros(4, 4, dtype=torch.int64), zero)
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
    noise = torch.randn(2, 10, WINDOW, WINDOW, generator=torch.Generator().manual_seed(0))
    guided, _ = draw_next(model, latents, actions, noise, sampler)
    plain, _ = draw_next(model, latents, actions, noise, replace(sampler, guidance_scale=1.0))
    assert torch.allclose(
        guided, plain, atol=1e-5
    )  # an untrained U-Net changes nothing: there is nothing to extrapolate


def test_decoding_depends_on_the_phase_and_pooling_inverts_it() -> None:
    torch.manual_seed(0)
    autoencoder = TileAutoencoder(TileAutoencoderConfig(codes=6, width=16, blocks=1))
    phase = torch.tensor([[0.0, 0.0], [0.5, 0.25]])
    latents = with_camera(torch.randn(1, 6, WINDOW, WINDOW).expand(2, -1, -1, -1), phase, torch.zeros(2, 2))
    images = autoencoder.decode(latents)
    assert images.shape == (2, 3, 64, 64) and not torch.allclose(images[0], images[1], atol=1e-2)
    tiles = torch.randn(2, 1, WINDOW, WINDOW)
    pooled = autoencoder.pool(autoencoder.spread_out(tiles, phase), latents)
    inside = shown(phase)[:, 0] > 0.5
    assert torch.allclose(pooled[inside], tiles[:, 0][inside], atol=1e-5) and not pooled[shown(phase)[:, 0] == 0].any()


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (TileAutoencoderConfig, {"codes": 0}, "codes 0"),
        (TileAutoencoderConfig, {"orders": 99}, "orders 99"),
        (TileFlowConfig, {"latent_channels": 4}, "latent_channels 4"),
        (TileFlowConfig, {"context": 1}, "context 1"),
        (TileFlowConfig, {"motion": 2}, "motion 2"),
    ],
)
def test_bad_shapes_are_refused(config: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**values)


def loop(steps: int, batch: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": batch,
        "lr": 2e-3,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 10,
        "ema": 0.9,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a tile autoencoder, its latents, dynamics and a head, each trained for a few steps."""
    out = tmp_path_factory.mktemp("tile")
    data = str(out / "data")
    collect(CollectConfig(steps=4096, out=data, num_envs=16, num_levels=40, policy="biased"), progress=False)
    task = {"data": data, "val_ratio": 0.2}
    train({"model": AUTOENCODER, "task": task, "loop": loop(120, 16)}, out / "ae")
    encode_dataset(Path(data), out / "ae" / "model", out / "latents", "cpu")
    task = {"latents": str(out / "latents"), "val_ratio": 0.2}
    train({"model": FLOW, "task": task | {"unroll": 2, "flow": 0.5}, "loop": loop(60, 16)}, out / "flow")
    head = {"type": "player_head", "latent_channels": 10, "width": 16}
    dreaming = {"dynamics": str(out / "flow" / "model"), "dreams": 16, "drift": 4}
    train({"model": head, "task": task | dreaming, "loop": loop(10, 16)}, out / "head")
    return out


def test_training_reads_phases_and_draws_pictures(trained: Path) -> None:
    data = LatentDataset(trained / "latents", 0.2)
    autoencoder = cast(TileAutoencoder, data.codec)
    rng = np.random.default_rng(0)
    chosen = np.flatnonzero(data.validation)[rng.choice(int(data.validation.sum()), 64, replace=False)]
    frames = torch.from_numpy(data.frames(chosen))
    images = frames.movedim(-1, 1).float() / 255
    with torch.no_grad():
        error = (autoencoder.decode(torch.from_numpy(data.latents[chosen]).float()) - images).square().mean()
        flat = (images.mean((0, 2, 3), keepdim=True) - images).square().mean()
    assert error < 0.4 * flat
    camera = torch.from_numpy(np.concatenate([s.camera for s in data.dataset.shards])[chosen])
    off = (autoencoder.read_phase(images) - phase_of(camera) + 0.5) % 1 - 0.5
    assert off.abs().median() < 0.15  # by chance 0.25
    assert torch.allclose(phases(torch.from_numpy(data.latents[chosen])), phase_of(camera), atol=1e-3)


def test_the_phase_reader_trains_alone(trained: Path, tmp_path: Path) -> None:
    task = {"data": str(trained / "data"), "val_ratio": 0.2, "learns": "reader"}
    with pytest.raises(ConfigError, match="needs init_from"):
        train({"model": AUTOENCODER, "task": task, "loop": loop(2, 16)}, tmp_path / "none")
    task["init_from"] = str(trained / "ae" / "model")
    train({"model": AUTOENCODER, "task": task, "loop": loop(20, 16)}, tmp_path / "reader")
    before, after = (load_model(folder / "model")[0].state_dict() for folder in (trained / "ae", tmp_path / "reader"))
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"reader"}


def test_latents_hold_the_moves_and_padding_stands_still(trained: Path) -> None:
    data = LatentDataset(trained / "latents", 0.2)
    camera = np.concatenate([s.camera for s in data.dataset.shards])
    now = np.flatnonzero(~data.first)[:200]
    found = moves(data.gather(now[:, None]))[:, 0].numpy()
    np.testing.assert_allclose(found, camera[now] - camera[now - 1], atol=1e-3)
    moving = now[np.abs(camera[now] - camera[now - 1]).max(1) > 0.1][:3]
    repeated = data.gather(np.repeat(moving[:, None], 3, 1))
    assert moves(repeated)[:, 0].abs().max() > 0.09 and not moves(repeated)[:, 1:].any()


def test_dynamics_follow_the_camera(trained: Path) -> None:
    rows = (trained / "flow" / "metrics.csv").read_text().splitlines()
    values: dict[str, list[float]] = {}
    for row in rows[1:]:
        _, name, value = row.split(",")
        values.setdefault(name, []).append(float(value))
    data = LatentDataset(trained / "latents", 0.2)
    resting = moves(torch.from_numpy(data.latents[data.validation])).norm(dim=1).mean()
    assert values["val_camera_1"][-1] < 0.7 * resting and values["val_camera_1"][-1] < values["val_camera_10"][-1]
    assert 0 < values["error_2"][-1] < 0.8 * values["error_2"][0]


def test_following_the_camera_trains_its_motion_alone(trained: Path, tmp_path: Path) -> None:
    task = {
        "type": "camera",
        "latents": str(trained / "latents"),
        "val_ratio": 0.2,
        "unroll": 5,
        "dreams": 200,
        "hard": 0.4,
        "init_from": str(trained / "flow" / "model"),
    }
    train({"model": FLOW, "task": task, "loop": loop(80, 32)}, tmp_path / "camera")
    before, after = (load_model(folder / "model")[0].state_dict() for folder in (trained / "flow", tmp_path / "camera"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"motion"}
    off = []
    for folder in (trained / "flow", tmp_path / "camera"):
        rows = [row.split(",") for row in (folder / "metrics.csv").read_text().splitlines()]
        off.append(next(float(value) for _, name, value in rows if name == "val_camera_5"))
    assert off[1] < off[0]


def test_a_camera_learns_from_nothing_for_its_laws_learn_faster(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"type": "camera", "latents": str(trained / "latents"), "val_ratio": 0.2, "unroll": 1, "pad": 0.0}
    run = {"model": FLOW, "task": task, "loop": loop(300, 128)}
    faster = train(run, tmp_path / "faster")["camera_1"]
    monkeypatch.setattr(TileFlow, "learning_rates", {})
    assert faster < 0.8 * train(run, tmp_path / "as-networks")["camera_1"]


def test_a_camera_learns_when_friction_brings_it_to_rest() -> None:
    """Against the law itself: a push, drag, and rest below a threshold, to which a speed comes within half a
    thousandth."""
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


def test_readings_settle_on_the_nearest_path(level: Tensor) -> None:
    """Of a camera that goes straight on, as all do before training: the straight line of ordinary least squares."""
    model = TileFlow(TileFlowConfig(latent_channels=10, channels=(8,), blocks=(1,), embedding=8, motion=8)).eval()
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
        settled = model.settle(latents, torch.zeros(16, 3, dtype=torch.int64))
        two = model.settle(latents[:, :2], torch.zeros(16, 1, dtype=torch.int64))
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


def test_camera_training_seeks_what_is_hard(trained: Path) -> None:
    """Against a camera that goes on as it went, as all do before training: its errors are the changes of the true
    move."""
    path = CameraTask(CameraTaskConfig(latents=str(trained / "latents"), val_ratio=0.2, unroll=5, hard=0.9), FLOW, 0)
    data, rng = path.task.data, np.random.default_rng(0)
    now = path.task.train[data.first[path.task.train - 3]]  # a context of four that begins the episode
    move = np.diff(data.camera[now[:, None] + np.arange(-1, 2)], axis=1)
    expected = np.minimum(np.linalg.norm(move[:, 1] - move[:, 0], axis=1), 0.1)
    hard = path._hard
    assert hard is not None
    found = np.diff(hard, prepend=0)
    np.testing.assert_allclose(found[now], expected, atol=1e-3)
    assert not found[data.validation].any()

    def calm(moments: np.ndarray) -> float:
        """The share of samples in which the camera goes straight on for all steps."""
        return float((found[moments[:, None] + np.arange(5)].max(1) < 1e-5).mean())

    assert calm(path.moments(rng, 4000)) < 0.3 * calm(path.task.moments(rng, 4000))


def test_energy_score_and_outcomes_train_on_tiles_too(trained: Path, tmp_path: Path) -> None:
    task = {
        "latents": str(trained / "latents"),
        "val_ratio": 0.2,
        "unroll": 2,
        "energy": 0.4,
        "head": str(trained / "head" / "model"),
        "outcome": 0.01,
    }
    figures = train({"model": FLOW, "task": task, "loop": loop(2, 6)}, tmp_path / "settled")
    assert np.isfinite(list(figures.values())).all() and "sampled_psnr_10" in figures


def test_an_outcome_head_sees_what_surrounds_the_player_and_no_more(level: Tensor) -> None:
    head = PlayerOutcomeHead(OutcomeHeadConfig(latent=LatentSpec((10, 16, 16)), width=8)).eval()
    context = walk(level, torch.tensor([[20.3, 14.2]]), torch.zeros(1, 3, 2))
    actions, move = torch.full((1, 4), 7), torch.full((1, 2), 0.1)
    far, near = torch.ones(WINDOW, WINDOW), torch.zeros(WINDOW, WINDOW)
    far[4:12, 4:12], near[6:9, 6:9] = 0, 1  # the player is in the middle of 13 tiles that begin at one
    answers = []
    for where in (far, near):
        changed = context.clone()
        changed[:, :, :-4] += where
        answers.append(head.log_probabilities(changed, actions, move))
    assert torch.equal(answers[0], head.log_probabilities(context, actions, move)) and not torch.allclose(*answers)
    assert not torch.allclose(answers[0], head.log_probabilities(context, torch.full((1, 4), 1), move))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.log_probabilities(context, actions, move), answers[0])


def test_an_outcome_head_on_tiles_is_told_the_next_move(level: Tensor, tmp_path: Path) -> None:
    head = PlayerOutcomeHead(OutcomeHeadConfig(latent=LatentSpec((10, 16, 16)), width=8)).eval()
    context, actions = walk(level, torch.tensor([[20.3, 14.2]]), torch.zeros(1, 3, 2)), torch.full((1, 4), 7)
    rest, falling = torch.zeros(1, 2), torch.tensor([[0.0, 0.2]])
    assert not torch.allclose(head(context, actions, rest), head(context, actions, falling))
    with pytest.raises(ConfigError, match="next move"):
        head(context, actions)
    older = {
        k: v[:, : head.view.seen].contiguous() if k == "decide.0.weight" else v for k, v in head.state_dict().items()
    }
    (tmp_path / "older.safetensors").write_bytes(save_tensors(older))
    load_weights(head, tmp_path / "older.safetensors", sha256_file(tmp_path / "older.safetensors"))
    assert torch.equal(head(context, actions, rest), head(context, actions, falling)), "heads of before were not told"
    assert torch.equal(head.decide[0].weight[:, : head.view.seen], older["decide.0.weight"])


@pytest.mark.parametrize(
    "sampler",
    [SamplerConfig(), SamplerConfig(nfe=2), SamplerConfig(nfe=3, solver="heun"), SamplerConfig(guidance_scale=2.0)],
)
def test_what_a_step_says_of_outcomes_is_what_the_state_says(
    sampler: SamplerConfig, trained: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(make_tile_bundle(trained, tmp_path / "bundle"), "cpu")
    model = bundle.world_model
    state = model.start(bundle.starts.frames, bundle.starts.actions)
    rng = np.random.default_rng(0)
    for _ in range(3):
        actions = rng.integers(15, size=5)
        noise = rng.standard_normal((5, *model.latent_shape), np.float32)
        imagined = model.step(state, actions, noise, sampler)
        assert torch.equal(imagined.log_probabilities, model.outcomes(state, actions))
        context, taken = state.latents, torch.cat([state.actions, torch.from_numpy(actions)[:, None]], 1)
        move = moves(imagined.state.latents)[:, -1]
        assert torch.equal(imagined.log_probabilities, model.head.log_probabilities(context, taken, move))
        state = imagined.state


def test_outcomes_are_learnt_from_ends_of_more_episodes_too(trained: Path, tmp_path: Path) -> None:
    ends = collect(
        CollectConfig(
            out=str(tmp_path / "ends"),
            ends=12,
            steps=2000,
            num_envs=8,
            shard_steps=250,
            num_levels=300,
            policy="biased",
            seed=5,
        ),
        progress=False,
    )
    encode_dataset(ends, trained / "ae" / "model", tmp_path / "latents", "cpu")
    spec = {"type": "player_head", "latent_channels": 10, "width": 8}
    config = OutcomeTaskConfig(
        latents=str(trained / "latents"),
        also=str(tmp_path / "latents"),
        val_ratio=0.2,
        dynamics=str(trained / "flow" / "model"),
        dreams=0,
    )
    task = OutcomeTask(config, spec, 0)
    with pytest.raises(ConfigError, match="needs them for the player's move"):
        OutcomeTask(replace(config, dynamics=""), spec, 0)
    own, also = LatentDataset(trained / "latents", 0.2), LatentDataset(tmp_path / "latents", 0.2)
    batch = task.batch(np.random.default_rng(0), 100)
    seen = [0, 0]
    for latent, action, label in zip(
        batch["context"][:, -1].numpy(), batch["actions"][:, -1], batch["labels"], strict=True
    ):
        for k, data in enumerate((own, also)):
            here = np.flatnonzero((data.latents == latent).all((1, 2, 3)) & (data.actions == int(action)))
            if len(here):
                assert (data.rewards[here[0]] > 0 or data.terminated[here[0]]) == (label > 0) and not data.validation[
                    here[0]
                ]
                seen[k] += int(label > 0)
                break
        else:
            raise AssertionError("a context of neither dataset")
    assert min(seen) > 0
    dreaming = OutcomeTask(replace(config, dreams=60, drift=6), spec, 0)
    for dreams, part in ((dreaming._dreams, False), (dreaming._val_dreams, True)):
        assert dreams is not None
        into = np.zeros(2, int)
        for row in range(dreams.eventful):
            now = int(dreams.begin[row])
            k, data = int(now >= len(own.start)), (own, also)[int(now >= len(own.start))]
            begin = now - k * len(own.start)
            end = begin + int(dreams.length[row])
            assert np.array_equal(dreams.latents[row, 3], data.latents[begin]) and data.validation[end] == part
            assert data.terminated[end] and data.start[end] == data.start[begin] and begin - data.start[begin] >= 3 * k
            into[k] += 1
        assert into.min() > 0 or part, "dreams lead to events of both"
    task = {"latents": config.latents, "also": config.also, "dynamics": config.dynamics, "dreams": 0, "val_ratio": 0.2}
    figures = train({"model": spec, "task": task, "loop": loop(2, 8)}, tmp_path / "head")
    assert np.isfinite(figures["nll"])
    with pytest.raises(ConfigError, match="ends of episodes only"):
        DynamicsTask(DynamicsTaskConfig(latents=str(tmp_path / "latents")), FLOW, 0)
    save_model(tmp_path / "other", TileAutoencoder(TileAutoencoderConfig(codes=6, width=16, blocks=1, orders=5)), {})
    encode_dataset(ends, tmp_path / "other", tmp_path / "others", "cpu")
    with pytest.raises(ConfigError, match="another autoencoder"):
        OutcomeTask(replace(config, also=str(tmp_path / "others")), spec, 0)


def make_tile_bundle(trained: Path, folder: Path) -> Path:
    networks = [load_model(trained / name / "model")[0] for name in ("ae", "flow", "head")]
    model = WorldModel(cast(TileAutoencoder, networks[0]), cast(TileFlow, networks[1]), cast(OutcomeHead, networks[2]))
    shard = Dataset(trained / "data").shards[0]
    starts = Starts(
        np.array(shard.frames[:10]).reshape(5, 2, 64, 64, 3),
        np.array(shard.actions[:10:2])[:, None],
        np.arange(5, dtype=np.int32),
    )
    return save_bundle(folder, model, GameFacts("coinrun", "easy", 100), Limits(50.0, 20.0), starts, {})


def test_a_bundle_of_tiles_dreams_and_repeats_itself(trained: Path, tmp_path: Path) -> None:
    bundle = make_tile_bundle(trained, tmp_path / "bundle")
    runs = []
    for nfe in (1, 2):
        for _ in range(2):
            envs = gym.make_vec("DreamProcgen-v0", num_envs=3, bundle=str(bundle), sampler={"nfe": nfe})
            frames, _ = envs.reset(seed=3)
            for action in (7, 7, 8, 5):
                frames, *_ = envs.step(np.full(3, action))
            envs.close()
            runs.append(frames)
    assert runs[0].shape == (3, 64, 64, 3) and np.array_equal(runs[0], runs[1]) and np.array_equal(runs[2], runs[3])


def test_pipeline_makes_a_bundle_of_tiles(tmp_path: Path) -> None:
    stages = ("predictor", "unrolled", "camera", "flow", "settled")
    small = (
        *(f"{name}:model.channels=[16, 16, 16]" for name in stages),
        "autoencoder:model.width=16",
        "heads:task.dreams=8",
        "heads:task.drift=4",
        "loop.batch_size=4",
    )
    config = PipelineConfig(
        out=tmp_path / "run", steps=3000, ends=3000, stage_steps=2, starts=2, latents="tiles", set=small
    )
    bundle = load_bundle(run_pipeline(config), "cpu")
    model = bundle.world_model
    assert isinstance(model.codec, TileAutoencoder) and isinstance(model.dynamics, TileFlow)
    assert isinstance(model.head, PlayerOutcomeHead) and bundle.provenance["heads_also"]["ends"] == 16
    done = {p.stem for p in (tmp_path / "run" / "stages").iterdir()}
    assert {"encode-ends", "camera", "settled", "heads", "bundle"} <= done
    with pytest.raises(ConfigError, match="maze"):
        PipelineConfig(game="maze", latents="tiles")


def test_tile_and_other_networks_do_not_mix(trained: Path, tmp_path: Path) -> None:
    bundle = make_tile_bundle(trained, tmp_path / "bundle")
    model = load_bundle(bundle, "cpu").world_model
    other = PatchAutoencoder(PatchAutoencoderConfig(latent_channels=10, width=16, blocks=1))
    other.init_pca(torch.rand(16, 3, 64, 64))
    patches = LatentFlow(LatentFlowConfig(latent_channels=10, channels=(16,), blocks=(1,)))
    mixed = [WorldModel(other, model.dynamics, model.head), WorldModel(other, patches, model.head)]
    starts = Starts(np.zeros((1, 1, 64, 64, 3), np.uint8), np.zeros((1, 0), np.uint8), np.zeros(1, np.int32))
    for i, networks in enumerate(mixed):
        with pytest.raises(BundleError, match="disagree"):
            load_bundle(
                save_bundle(
                    tmp_path / f"mixed-{i}", networks, GameFacts("coinrun", "easy", 100), Limits(50.0, 20.0), starts, {}
                ),
                "cpu",
            )
    wrong = {
        "model": {"type": "latent_flow", "latent_channels": 10, "channels": [16], "blocks": [1]},
        "task": {"latents": str(trained / "latents"), "val_ratio": 0.2},
        "loop": loop(1, 2),
    }
    with pytest.raises(ConfigError, match="tile_flow goes with"):
        train(wrong, tmp_path / "wrong")


def test_data_without_a_camera_is_refused(trained: Path, tmp_path: Path) -> None:
    shard = Dataset(trained / "data").shards[0]
    columns = {name: np.array(getattr(shard, name)) for name in shard.__dataclass_fields__ if name != "name"}
    columns["camera"] = np.full_like(columns["camera"], np.nan)
    facts = Dataset(trained / "data").facts | {"num_shards": 1}
    writer = DatasetWriter(tmp_path / "blind", facts)
    writer.commit(writer.write_shard(0, columns))
    with pytest.raises(DatasetError, match="without a camera position"):
        encode_dataset(tmp_path / "blind", trained / "ae" / "model", tmp_path / "latents", "cpu")


def test_half_precision_hardly_changes_a_picture(trained: Path) -> None:
    networks = [load_model(trained / name / "model")[0] for name in ("ae", "flow", "head")]
    frames = np.array(Dataset(trained / "data").shards[0].frames[:16])
    drawn = []
    for precision in ("fp32", "bf16"):
        model = WorldModel(*cast(Any, networks), precision=precision)
        latents = model.encode(frames)
        assert latents.dtype == torch.float32
        drawn.append(model.decode(latents).numpy().astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 2 and not np.array_equal(drawn[0], 0 * drawn[0])
