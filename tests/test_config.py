"""Configs: round trip, and thirty ways to get one wrong, each with a message that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dreamenv.config import from_dict, load_yaml, to_dict
from dreamenv.errors import ConfigError, PolicyError
from dreamenv.flow import SamplerConfig
from dreamenv.models.autoencoder import AutoencoderConfig
from dreamenv.models.latent_flow import LatentFlowConfig
from dreamenv.models.registry import build_model, model_spec, model_types
from dreamenv.policies import make_policy
from envs.collect import CollectConfig
from trainers.autoencoder import AutoencoderTaskConfig
from trainers.camera import CameraTaskConfig
from trainers.dynamics import DynamicsTaskConfig
from trainers.heads import HeadsTaskConfig
from trainers.loop import LoopConfig
from trainers.pipeline import PipelineConfig
from trainers.train import build_task, override, train

CASES = [
    (SamplerConfig, {"nfe": 0}, "nfe 0"),
    (SamplerConfig, {"nfe": 2.0}, "nfe"),
    (SamplerConfig, {"nfe": True}, "nfe"),
    (SamplerConfig, {"solver": "rk4"}, "euler"),
    (SamplerConfig, {"solver": "heun", "nfe": 2}, "odd"),
    (SamplerConfig, {"temperature": -1}, "temperature"),
    (SamplerConfig, {"temperature": float("nan")}, "finite"),
    (SamplerConfig, {"temprature": 1.0}, "did you mean 'temperature'"),
    (SamplerConfig, {"guidance_scale": 1e9}, "0..20"),
    (SamplerConfig, [1, 2], "mapping"),
    (AutoencoderConfig, {"patch": 3}, "2, 4 or 8"),
    (AutoencoderConfig, {"latent_channels": 49}, "1..48"),
    (AutoencoderConfig, {"width": "wide"}, "expected int"),
    (LatentFlowConfig, {"channels": []}, "1..5 levels"),
    (LatentFlowConfig, {"channels": [64, "x"], "blocks": [1, 1]}, r"channels\[1\]"),
    (LatentFlowConfig, {"blocks": [1]}, "one entry per level"),
    (LatentFlowConfig, {"filter_size": 4}, "odd"),
    (LatentFlowConfig, {"contxt": 4}, "did you mean 'context'"),
    (LoopConfig, {"steps": None}, "steps or minutes"),
    (LoopConfig, {"lr": 0}, "lr 0"),
    (LoopConfig, {"batch_size": -1}, "batch_size -1"),
    (LoopConfig, {"precision": "fp16"}, "bf16"),
    (LoopConfig, {"minutes": -5.0}, "minutes -5"),
    (LoopConfig, {"ema": 1.0}, "ema 1.0"),
    (AutoencoderTaskConfig, {"val_ratio": 0}, "val_ratio"),
    (DynamicsTaskConfig, {"unroll": 0}, "1..64"),
    (DynamicsTaskConfig, {"context_noise": 3.0}, "0..2"),
    (HeadsTaskConfig, {"balance": 0.9, "near": 0.2}, "near"),
    (CollectConfig, {"game": "coinrum"}, "did you mean 'coinrun'"),
    (CollectConfig, {"steps": 0}, "steps 0"),
    (CollectConfig, {"start_level": 9000, "num_levels": 5000}, "held-out"),
    (CollectConfig, {"distribution_mode": "extreme"}, "coinrun has easy, hard"),
    (CollectConfig, {"seed": 2**64}, "seed"),
    (PipelineConfig, {"set": ["unroled:loop.lr=1"]}, "no stage 'unroled'"),
    (PipelineConfig, {"latents": "tile"}, "'tile'"),
    (PipelineConfig, {"ends": -1}, "ends -1"),
    (CollectConfig, {"ends": -1}, "ends -1"),
    (CameraTaskConfig, {"hard": 1.0}, "hard 1.0"),
    (LoopConfig, {"lr": 10**400}, "finite"),
    (LatentFlowConfig, {"filter_bank": 10**12}, "0..512"),
    (PipelineConfig, {"minutes": 0.0}, "minutes 0"),
]


@pytest.mark.parametrize(("cls", "values", "message"), CASES, ids=[f"{c.__name__}-{i}" for i, (c, _, _) in enumerate(CASES)])
def test_a_bad_config_says_what_is_wrong(cls: type, values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(cls, values)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "", "a: !!python/object/apply:os.system ['true']\n"])
def test_a_bad_yaml_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="c.yaml"):
        load_yaml(path)


def test_a_missing_yaml_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "none.yaml")


def test_round_trip() -> None:
    config = LatentFlowConfig(channels=(16, 32), blocks=(1, 2))
    assert from_dict(LatentFlowConfig, to_dict(config)) == config


@pytest.mark.parametrize("spec", [{}, {"type": "latent_flou"}, {"type": "latent_flow", "chanels": [8]}, [], {"type": 3}])
def test_a_bad_model_spec(spec: dict) -> None:
    with pytest.raises(ConfigError):
        build_model(spec)
    with pytest.raises(ConfigError):
        build_task({"model": spec}, 0)


@pytest.mark.parametrize("task", [{"type": "camra"}, {"type": ["camera"]}, {"type": "camera", "flow": 1.0}, ["camera"]])
def test_a_bad_task(task: Any) -> None:
    with pytest.raises(ConfigError):
        build_task({"model": {"type": "tile_flow"}, "task": task}, 0)
    with pytest.raises(ConfigError, match="latent_flow"):
        build_task({"model": {"type": "latent_flow"}, "task": {"type": "camera"}}, 0)


def test_every_model_type_rebuilds_from_its_spec() -> None:
    for name in model_types():
        model = build_model({"type": name})
        again = build_model(model_spec(model))
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}


def test_unknown_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="modle"):
        train({"modle": {}}, tmp_path)


@pytest.mark.parametrize("assignment", ["loop.lr", "=3", "loop.lr.x=1", "loop.lr=[1"])
def test_bad_override(assignment: str) -> None:
    with pytest.raises(ConfigError):
        override({"loop": {"lr": 1}}, (assignment,))


@pytest.mark.parametrize("spec", ["", "randm", "random=0", "random=-1", "random=x", "agent:nowhere", "biased", "random,,"])
def test_bad_policies(spec: str) -> None:
    with pytest.raises(PolicyError):
        make_policy(spec)
