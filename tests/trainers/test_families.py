"""Every family from the real game to a bundle by its recipe, and the objectives against closed forms."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecTransposeImage

from agents.adapter import NativeVecEnv
from dreamenv.bundle import load_bundle
from dreamenv.errors import ConfigError
from dreamenv.evaluation.compare import CompareConfig, compare
from dreamenv.evaluation.report import save_comparison
from dreamenv.flow import SamplerConfig
from dreamenv.models.io import load_model
from dreamenv.play.run import PlayConfig, run
from dreamenv.play.session import Session
from envs.collect import CollectConfig, collect
from envs.wrappers import grayscale_stack
from tests.here import brief
from trainers.eval_autoencoder import evaluate
from trainers.pipeline import PipelineConfig, run_pipeline
from trainers.recipe import load_recipe
from trainers.table import RECIPES, TableConfig, run_table
from trainers.tasks.pixel import moving_mask
from trainers.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SMALL = {
    "pixels": ("dynamics:model.width=8", "dynamics:model.embedding=4"),
    "predictor": ("dynamics:model.backbone.channels=[16, 16, 16]", "codec:model.width=16"),
    "flow": ("codec:model.width=16", "dynamics:model.backbone.channels=[16, 16, 16]"),
    "flow_dit": tuple(f"dynamics:model.backbone.{x}" for x in ("width=16", "depth=1", "features=16")),
    "flow_causal": ("dynamics:model.width=16", "dynamics:model.depth=1"),
    "canvas": tuple(f"{stage}:model.backbone.channels=[16, 16, 16]" for stage in ("predictor", "dynamics")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("families") / "d"
    wanted = CollectConfig(out=str(out), steps=3000, num_envs=8, shard_steps=250, policy="biased", num_levels=60)
    return collect(wanted, progress=False)


def made(name: str, data: Path, out: Path) -> Path:
    sizes = SMALL.get(name) or SMALL[name.split("_")[0]]
    small = ("loop.batch_size=4", "task.val_ratio=0.2", "head:model.width=16", *sizes, *brief(name))
    return run_pipeline(PipelineConfig(recipe=name, data=data, out=out, stage_steps=2, starts=3, set=small, events=0))


CASES = [(n, "fp32") for n in ("pixels_gray", "predictor_vae", "flow_dit", "flow_causal", "flow_shortcut", "canvas")]
CASES += [
    ("pixels_gray", "bf16"),
    ("flow_causal", "bf16"),
]  # the others differ from these in little, and are checked below


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_recipe_makes_a_bundle_that_is_an_environment(
    name: str, precision: str, data: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DREAMENV_PRECISION", precision)
    folder = made(name, data, tmp_path / "run")
    bundle = load_bundle(folder, "cpu")
    model = bundle.world_model
    assert model.precision == precision and bundle.provenance["recipe"] == name
    env = gym.make("DreamProcgen-v0", bundle=str(folder), device="cpu", render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    assert observation.shape == model.frame_shape == env.observation_space.shape
    first = [env.step(a)[0] for a in (7, 4, 1)]
    env.reset(seed=0)
    assert all(np.array_equal(env.step(a)[0], seen) for a, seen in zip((7, 4, 1), first, strict=True))
    assert env.render().shape == (*model.frame_shape[:2], 3)  # type: ignore[union-attr]
    env.close()
    if name != "pixels_gray":
        return
    film = run(PlayConfig(bundle=folder, world="both", headless=tmp_path / "film.gif", steps=4, scale=1, device="cpu"))
    assert film["steps"] == 4 and (tmp_path / "film.gif").stat().st_size > 1000


def test_a_grey_bundle_is_measured_played_and_learnt_in(data: Path, tmp_path: Path, in_process: None) -> None:
    bundle = load_bundle(made("pixels_gray", data, tmp_path / "run"), "cpu")
    config = CompareConfig(
        clips=4, random_clips=4, examined=4, steps=2000, horizon=8, negatives=20, branches=2, policies=("random",),
        episodes=2, limit=4, endless_steps=10, drift=2, samples=2,
    )  # fmt: skip
    result = compare(bundle, config, SamplerConfig())
    assert 0 < result.figures["psnr_1"] < 60 and "samples" not in result.figures, "no noise reaches it"
    assert save_comparison(tmp_path / "report", bundle, config, result).exists()
    envs = gym.make_vec(
        "DreamProcgen-v0", num_envs=2, bundle=str(bundle.folder), autoreset_mode="SameStep", device="cpu"
    )
    agent = PPO("CnnPolicy", VecTransposeImage(NativeVecEnv(envs)), n_steps=8, batch_size=8, device="cpu")
    assert agent.learn(32).num_timesteps == 32 and agent.observation_space.shape == (1, 84, 84)
    session = Session(bundle)
    with pytest.raises(ConfigError, match="cannot be recorded"):
        session.record(tmp_path / "x")
    session.close()


def test_the_wrapper_stack_sees_what_a_grey_model_is_shown() -> None:
    grey = gym.make("envs:RealProcgen-v0", game="maze", frame_shape=(84, 84, 1))
    stacked = grayscale_stack(gym.make("envs:RealProcgen-v0", game="maze"))
    frame, stack = grey.reset(seed=3)[0], stacked.reset(seed=3)[0]
    for action in (7, 1, 5, 3):
        assert stack.shape == (4, 84, 84) and np.array_equal(stack[-1], frame[..., 0].astype(np.float32) / 255)
        frame, stack = grey.step(action)[0], stacked.step(action)[0]


def test_the_table_is_one_command_that_resumes(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = [{"num_envs": 1, "steps_per_s": 30.0}, {"num_envs": 64, "steps_per_s": 90.0}]
    monkeypatch.setattr("trainers.table.bench", lambda *_: {"rows": speeds})  # 64 of these take long; tested elsewhere
    monkeypatch.setattr("trainers.table.HORIZONS", (1, 5, 10))
    docs = tmp_path / "docs" / "t.md"
    docs.parent.mkdir()
    docs.write_text("before\n<!-- families -->\nold\n<!-- /families -->\nafter\n")
    config = TableConfig(
        steps=3000,
        recipes=("pixels_gray", "predictor_conv"),
        out=tmp_path / "table",
        clips=4,
        samples=2,
        seconds=0.1,
        stage_steps=2,
        set=("loop.batch_size=4",),
        docs=docs,
    )
    rows = run_table(config)
    assert set(rows) == {"pixels_gray", "predictor_conv"} and rows["pixels_gray"]["frame"] == [84, 84, 1]
    for row in rows.values():
        assert row["best_psnr_10"] == pytest.approx(row["average_psnr_10"]), "these have no noise"
        assert row["psnr_10"] == pytest.approx(-10 * np.log10(row["mse_10"]), abs=1e-3)
    grey = rows["pixels_gray"]
    assert grey["grey_psnr_10"] == pytest.approx(grey["psnr_10"], abs=1e-3)
    text = docs.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "| predictor_conv |" in text and "old" not in text
    assert (docs.parent / "losses.png").stat().st_size > 1000
    written = (tmp_path / "table" / "stages" / "pixels_gray-row.json").stat().st_mtime_ns
    assert run_table(config) == json.loads((tmp_path / "table" / "table.json").read_text())
    assert (tmp_path / "table" / "stages" / "pixels_gray-row.json").stat().st_mtime_ns == written
    docs.write_text("no markers")
    with pytest.raises(ConfigError, match="needs one"):
        TableConfig(docs=docs)


def test_a_codec_is_measured_alone_and_its_best_is_kept(data: Path, tmp_path: Path) -> None:
    model = {"type": "conv_autoencoder", "width": 8, "downsample": 8, "latent_channels": 4}
    loop = {"steps": 20, "batch_size": 8, "val_every": 10, "best": "-loss", "keep_every": 10, "precision": "fp32"}
    task = {"type": "codec", "data": str(data), "val_ratio": 0.2, "loss": "huber", "var_target": 0.5}
    last = train({"model": model, "task": task, "loop": loop}, tmp_path / "run")
    assert {"loss", "mse", "psnr", "ssim", "latent_var", "latent_mean_norm"} <= set(last)
    _, facts = load_model(tmp_path / "run" / "best", "codec")
    text = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    losses = {int(r.split(",")[0]): float(r.split(",")[2]) for r in text if ",val_loss," in r}
    assert facts["best"] == pytest.approx(min(losses.values()), rel=1e-4)
    assert losses[facts["step"]] == pytest.approx(facts["best"], rel=1e-4)
    assert sorted(p.name for p in (tmp_path / "run" / "models").iterdir()) == ["step-0000010", "step-0000020"]
    figures = evaluate(tmp_path / "run" / "model", data, tmp_path / "out", frames=64, film=5, device="cpu")
    assert figures["psnr"] == pytest.approx(-10 * np.log10(figures["mse"]), abs=1e-6) and figures["frames"] == 64
    for name in ("reconstruction.png", "reconstruction.mp4", "metrics.json"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    with pytest.raises(ConfigError, match="loop.best"):
        train({"model": model, "task": task, "loop": loop | {"best": "beauty"}}, tmp_path / "other")


def test_a_variational_codec_trains(data: Path, tmp_path: Path) -> None:
    model = {"type": "conv_autoencoder", "width": 8, "latent_channels": 4, "variational": True}
    task = {"type": "codec", "data": str(data), "val_ratio": 0.2, "latent_noise": 1.0, "divergence": 0.01}
    loop = {"steps": 60, "batch_size": 8, "lr": 3e-3, "log_every": 1}
    train({"model": model, "task": task, "loop": loop}, tmp_path / "run")
    rows = [r.split(",") for r in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    loss = [float(r[2]) for r in rows if r[1] == "loss"]
    assert loss[-1] < loss[0] / 2 and any(r[1] == "divergence" for r in rows)


def test_the_pixel_model_learns(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamenv.models.io import save_model
    from dreamenv.models.registry import build

    save_model(tmp_path / "codec", build("codec", {"type": "pixels"}), {"step": 0})
    model = {"type": "pixel_world_model", "width": 8, "embedding": 4}
    task = {"type": "pixel", "data": str(data), "codec": str(tmp_path / "codec"), "val_ratio": 0.2}
    loop = {"steps": 60, "batch_size": 8, "lr": 3e-3, "schedule": "one_cycle", "weight_decay": 0.0, "log_every": 1}
    with monkeypatch.context() as bare, pytest.raises(ConfigError, match=r"needs pillow: pip install"):
        bare.setitem(sys.modules, "PIL", None)  # known before training, not when its first film is written
        train({"model": model, "task": task, "loop": loop}, tmp_path / "bare")
    figures = train({"model": model, "task": task, "loop": loop}, tmp_path / "run")
    rows = [r.split(",") for r in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    found = [float(r[2]) for r in rows if r[1] == "psnr"]
    assert np.mean(found[-5:]) > found[0] + 1 and figures["psnr_1"] > 9
    assert list((tmp_path / "run" / "pictures").glob("rollout-*.gif"))


def test_moving_pixels_and_those_around_them() -> None:
    last, future = torch.zeros(1, 1, 3, 20, 20), torch.zeros(1, 2, 3, 20, 20)
    future[0, 1, 2, 10, 6] = 0.2
    future[0, 1, 0, 2, 2] = 0.05  # too little
    mask = moving_mask(future, last, 0.1, 5)
    expected = torch.zeros(20, 20)
    expected[8:13, 4:9] = 1
    assert mask.shape == (1, 2, 1, 20, 20) and not mask[0, 0].any() and torch.equal(mask[0, 1, 0], expected)


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    for name in RECIPES:
        PipelineConfig(recipe=name)  # names and values of every stage
    base, dit = load_recipe("flow_unet"), load_recipe("flow_dit")
    assert dit.stages["dynamics"]["model"]["backbone"]["type"] == "dit"
    assert dit.stages["dynamics"]["task"] == base.stages["dynamics"]["task"] and dit.bundle == base.bundle
    assert dit.stages["codec"] == load_recipe("predictor_patches").stages["codec"]
    own = tmp_path / "mine.yaml"
    own.write_text("extends: flow_unet\nstages: {head: {share: 0.2}}\n")
    assert load_recipe(str(own)).stages["head"]["share"] == 0.2
    own.write_text("extends: flow_nothing\n")
    with pytest.raises(ConfigError, match="extends 'flow_nothing'"):
        load_recipe(str(own))
