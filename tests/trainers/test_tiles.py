"""Training on the grid of tiles: codec, dynamics, camera and head, each for a few steps, as far as a dream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch

from dreamenv.bundle import GameFacts, Limits, Starts, load_bundle, save_bundle
from dreamenv.data import Dataset
from dreamenv.data.writer import COLUMNS, DatasetWriter
from dreamenv.errors import ConfigError, DatasetError
from dreamenv.flow import SamplerConfig
from dreamenv.models.codecs.patches import PatchAutoencoder, PatchAutoencoderConfig
from dreamenv.models.codecs.tiles import TileAutoencoder, TileAutoencoderConfig
from dreamenv.models.dynamics.flow import LatentFlow, LatentFlowConfig
from dreamenv.models.dynamics.tiles import TileFlow
from dreamenv.models.io import load_model, save_model
from dreamenv.models.tiles.grid import moves, phase_of, phases
from dreamenv.world_model import WorldModel
from envs.collect import CollectConfig, collect
from tests.tiles import CODEC, FLOW
from trainers.dreams import EVENT
from trainers.encode import encode_dataset
from trainers.latent_data import LatentDataset
from trainers.tasks.camera import CameraTask, CameraTaskConfig
from trainers.tasks.dynamics import DynamicsTask, DynamicsTaskConfig
from trainers.tasks.outcome import OutcomeTask, OutcomeTaskConfig
from trainers.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


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
    task = {"type": "tile_codec", "data": data, "val_ratio": 0.2}
    train({"model": CODEC, "task": task, "loop": loop(120, 16)}, out / "ae")
    encode_dataset(Path(data), out / "ae" / "model", out / "latents", "cpu")
    task = {"latents": str(out / "latents"), "val_ratio": 0.2}
    terms = {"flow": {"weight": 0.5}, "squared": {}, "hints": {}}
    moving = {"type": "dynamics", "unroll": 2, "terms": terms}
    train({"model": FLOW, "task": task | moving, "loop": loop(60, 16)}, out / "flow")
    head = {"type": "player_head", "width": 16}
    dreaming = {"type": "outcome", "dynamics": str(out / "flow" / "model"), "dreams": 16, "drift": 4}
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
        error = (autoencoder.decode(data.latents_at(chosen).float()) - images).square().mean()
        flat = (images.mean((0, 2, 3), keepdim=True) - images).square().mean()
    assert error < 0.4 * flat
    camera = torch.from_numpy(data.columns["camera"][chosen])
    off = (autoencoder.read_phase(images) - phase_of(camera) + 0.5) % 1 - 0.5
    assert off.abs().median() < 0.15  # by chance 0.25
    assert torch.allclose(phases(data.latents_at(chosen)), phase_of(camera), atol=1e-3)


def test_the_phase_reader_trains_alone(trained: Path, tmp_path: Path) -> None:
    task = {"type": "tile_codec", "data": str(trained / "data"), "val_ratio": 0.2, "learns": "reader"}
    with pytest.raises(ConfigError, match="needs init_from"):
        train({"model": CODEC, "task": task, "loop": loop(2, 16)}, tmp_path / "none")
    task["init_from"] = str(trained / "ae" / "model")
    train({"model": CODEC, "task": task, "loop": loop(20, 16)}, tmp_path / "reader")
    before, after = (load_model(folder / "model")[0].state_dict() for folder in (trained / "ae", tmp_path / "reader"))
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"reader"}


def test_latents_hold_the_moves_and_padding_stands_still(trained: Path) -> None:
    data = LatentDataset(trained / "latents", 0.2)
    camera = data.columns["camera"]
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
    resting = moves(data.latents_at(data.validation)).norm(dim=1).mean()
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


def test_camera_training_seeks_what_is_hard(trained: Path) -> None:
    """Against a camera that goes on as it went, as all do before training: it errs by the changes of the true move."""
    path = CameraTask(CameraTaskConfig(latents=str(trained / "latents"), val_ratio=0.2, unroll=5, hard=0.9), FLOW, 0)
    data, rng = path.task.data, np.random.default_rng(0)
    now = path.task.train[data.first[path.task.train - 3]]  # a context of four that begins the episode
    move = np.diff(data.columns["camera"][now[:, None] + np.arange(-1, 2)], axis=1)
    expected = np.minimum(np.linalg.norm(move[:, 1] - move[:, 0], axis=1), 0.1)
    hard = path.hard
    assert hard is not None
    found = np.diff(hard, prepend=0)
    np.testing.assert_allclose(found[now], expected, atol=1e-3)
    assert not found[data.validation].any()

    def calm(moments: np.ndarray) -> float:
        """The share of samples in which the camera goes straight on for all steps."""
        return float((found[moments[:, None] + np.arange(5)].max(1) < 1e-5).mean())

    assert calm(path.moments(rng, 4000)) < 0.3 * calm(path.task.moments(rng, 4000))


def test_energy_score_and_outcomes_train_on_tiles_too(trained: Path, tmp_path: Path) -> None:
    judge = {"weight": 0.01, "head": str(trained / "head" / "model")}
    terms = {"squared": {}, "hints": {}, "picture": {}, "energy": {"weight": 0.4}, "outcome": judge}
    task = {"type": "dynamics", "latents": str(trained / "latents"), "val_ratio": 0.2, "unroll": 2, "terms": terms}
    figures = train({"model": FLOW, "task": task, "loop": loop(2, 6)}, tmp_path / "settled")
    assert np.isfinite(list(figures.values())).all() and "sampled_psnr_10" in figures


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
        hints = {"move": moves(imagined.state.latents)[:, -1]}
        told = model.head.log_probabilities(state, torch.from_numpy(actions), hints)
        assert torch.equal(imagined.log_probabilities, told)
        state = imagined.state


def test_outcomes_are_learnt_from_ends_of_more_episodes_too(trained: Path, tmp_path: Path) -> None:
    ends = collect(
        CollectConfig(
            out=str(tmp_path / "ends"),
            events=12,
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
    spec = {"type": "player_head", "width": 8}
    config = OutcomeTaskConfig(
        latents=str(trained / "latents"),
        also=str(tmp_path / "latents"),
        val_ratio=0.2,
        dynamics=str(trained / "flow" / "model"),
        dreams=0,
    )
    task = OutcomeTask(config, spec, 0)
    with pytest.raises(ConfigError, match="needs them for their hints"):
        OutcomeTask(replace(config, dynamics=""), spec, 0)
    own, also = LatentDataset(trained / "latents", 0.2), LatentDataset(tmp_path / "latents", 0.2)
    batch = task.batch(np.random.default_rng(0), 100)
    seen = [0, 0]
    for latent, action, label in zip(batch.context[:, -1].numpy(), batch.actions[:, -1], batch.labels, strict=True):
        for k, data in enumerate((own, also)):
            here = np.flatnonzero((data.stored[:] == latent).all((1, 2, 3)) & (data.actions == int(action)))
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
    assert dreaming.renew(0)
    for dreams, part in ((dreaming.dreams, False), (dreaming.val_dreams, True)):
        assert dreams is not None
        into = np.zeros(2, int)
        for row in np.flatnonzero(dreams.kind == EVENT):
            now, end = int(dreams.begin[row]), int(dreams.steps[row])
            k, data = int(now >= len(own.start)), (own, also)[int(now >= len(own.start))]
            begin, end = now - k * len(own.start), end - k * len(own.start)
            assert data.terminated[end] and data.start[end] == data.start[begin] and begin - data.start[begin] >= 3 * k
            assert data.validation[end] == part
            into[k] += 1
        assert into.min() > 0 or part, "dreams lead to events of both"
    task = {
        "type": "outcome",
        "latents": config.latents,
        "also": config.also,
        "dynamics": config.dynamics,
        "dreams": 0,
        "val_ratio": 0.2,
    }
    figures = train({"model": spec, "task": task, "loop": loop(2, 8)}, tmp_path / "head")
    assert np.isfinite(figures["nll"])
    with pytest.raises(ConfigError, match="what leads to events only"):
        DynamicsTask(DynamicsTaskConfig(latents=str(tmp_path / "latents")), FLOW, 0)
    save_model(tmp_path / "other", TileAutoencoder(TileAutoencoderConfig(codes=6, width=16, blocks=1, orders=5)), {})
    encode_dataset(ends, tmp_path / "other", tmp_path / "others", "cpu")
    with pytest.raises(ConfigError, match="was not encoded by the codec of"):
        OutcomeTask(replace(config, also=str(tmp_path / "others")), spec, 0)


def make_tile_bundle(trained: Path, folder: Path) -> Path:
    networks = [load_model(trained / name / "model")[0] for name in ("ae", "flow", "head")]
    model = WorldModel(*cast(Any, networks))
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


def test_networks_on_other_latents_do_not_mix(trained: Path, tmp_path: Path) -> None:
    model = load_bundle(make_tile_bundle(trained, tmp_path / "bundle"), "cpu").world_model
    other = PatchAutoencoder(PatchAutoencoderConfig(latent_channels=10, width=16, blocks=1))
    patches = LatentFlow(
        LatentFlowConfig(latent=other.spec, backbone={"type": "unet", "channels": [16], "blocks": [1]})
    )
    for networks in ((other, model.dynamics, model.head), (other, patches, model.head)):
        with pytest.raises(ConfigError, match="disagrees with the codec on the latents"):
            WorldModel(*networks)
    wrong = {
        "model": {"type": "latent_flow", "latent": {"shape": [10, 16, 16], "layout": "patches"}},
        "task": {"type": "dynamics", "latents": str(trained / "latents"), "val_ratio": 0.2},
        "loop": loop(1, 2),
    }
    with pytest.raises(ConfigError, match="model.latent .*patches.* the latents of .* are .*tiles"):
        train(wrong, tmp_path / "wrong")
    wrong["model"], wrong["task"] = FLOW, wrong["task"] | {"type": "tile_codec"}
    with pytest.raises(ConfigError):
        train(wrong, tmp_path / "wrong")


def test_data_without_a_camera_is_refused(trained: Path, tmp_path: Path) -> None:
    data = Dataset(trained / "data")
    shard = data.shards[0]
    columns = {name: np.array(getattr(shard, name)) for name in COLUMNS}
    facts = data.facts | {"num_shards": 1}
    blind = DatasetWriter(tmp_path / "blind", facts)
    blind.commit(blind.write_shard(0, columns))
    with pytest.raises(DatasetError, match="has no column camera"):
        encode_dataset(tmp_path / "blind", trained / "ae" / "model", tmp_path / "latents", "cpu")
    unknown = DatasetWriter(tmp_path / "unknown", facts, ["camera"])
    nowhere = np.full_like(shard.columns["camera"], np.nan)
    unknown.commit(unknown.write_shard(0, columns | {"camera": nowhere}))
    with pytest.raises(DatasetError, match="without a camera position"):
        encode_dataset(tmp_path / "unknown", trained / "ae" / "model", tmp_path / "latents", "cpu")


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
