"""Configs: round trip, and thirty ways to get one wrong, each with a message that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dreamenv.config import from_dict, load_yaml, to_dict
from dreamenv.errors import ConfigError, PolicyError
from dreamenv.flow import SamplerConfig
from dreamenv.models.backbones.unet import UNetConfig
from dreamenv.models.codecs.patches import PatchAutoencoderConfig
from dreamenv.models.dynamics.flow import LatentFlowConfig
from dreamenv.models.interface import LatentSpec
from dreamenv.models.registry import build, spec_of, types
from dreamenv.policies.simple import make_policy
from envs.collect import CollectConfig
from trainers.loop import LoopConfig
from trainers.pipeline import PipelineConfig
from trainers.tasks.camera import CameraTaskConfig
from trainers.tasks.codec import CodecTaskConfig
from trainers.tasks.dynamics import DynamicsTaskConfig
from trainers.tasks.outcome import OutcomeTaskConfig
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
    (PatchAutoencoderConfig, {"patch": 3}, "2, 4 or 8"),
    (PatchAutoencoderConfig, {"latent_channels": 49}, "1..48"),
    (PatchAutoencoderConfig, {"width": "wide"}, "expected int"),
    (UNetConfig, {"channels": []}, "1..5 levels"),
    (UNetConfig, {"channels": [64, "x"], "blocks": [1, 1]}, r"channels\[1\]"),
    (UNetConfig, {"blocks": [1]}, "one entry per level"),
    (LatentFlowConfig, {"filter_size": 4}, "odd"),
    (LatentFlowConfig, {"contxt": 4}, "did you mean 'context'"),
    (LoopConfig, {"steps": None}, "steps or minutes"),
    (LoopConfig, {"lr": 0}, "lr 0"),
    (LoopConfig, {"batch_size": -1}, "batch_size -1"),
    (LoopConfig, {"precision": "fp16"}, "bf16"),
    (LoopConfig, {"minutes": -5.0}, "minutes -5"),
    (LoopConfig, {"ema": 1.0}, "ema 1.0"),
    (CodecTaskConfig, {"data": "d", "val_ratio": 0}, "val_ratio"),
    (DynamicsTaskConfig, {"latents": "l", "unroll": 0}, "1..64"),
    (DynamicsTaskConfig, {"latents": "l", "context_noise": 3.0}, "0..2"),
    (OutcomeTaskConfig, {"latents": "l", "balance": 0.9, "near": 0.2}, "near"),
    (CollectConfig, {"game": "coinrum"}, "did you mean 'coinrun'"),
    (CollectConfig, {"steps": 0}, "steps 0"),
    (CollectConfig, {"start_level": 9000, "num_levels": 5000}, "held-out"),
    (CollectConfig, {"distribution_mode": "extreme"}, "coinrun has easy, hard"),
    (CollectConfig, {"seed": 2**64}, "seed"),
    (PipelineConfig, {"set": ["unroled:loop.lr=1"]}, "no stage 'unroled'"),
    (PipelineConfig, {"recipe": "tile"}, "did you mean 'tiles'"),
    (PipelineConfig, {"game": "coinrn"}, "did you mean 'coinrun'"),
    (PipelineConfig, {"game": "maze", "recipe": "tiles"}, "maze in easy has not"),
    (PipelineConfig, {"game": "climber", "recipe": "tiles"}, "climber in easy has not"),
    (PipelineConfig, {"distribution_mode": "memory"}, "coinrun has easy, hard"),
    (PipelineConfig, {"set": ["flow:task.unrol=3"]}, "stage flow: task.unrol: unknown key; did you mean 'unroll'"),
    (PipelineConfig, {"set": ["flow:task.terms.flwo.weight=3"]}, "did you mean 'flow'"),
    (DynamicsTaskConfig, {"latents": "l", "terms": {}}, "one or more"),
    (PipelineConfig, {"events": -1}, "events -1"),
    (CollectConfig, {"events": -1}, "events -1"),
    (CollectConfig, {"most": -1}, "most -1"),
    (CameraTaskConfig, {"latents": "l", "hard": 1.0}, "hard 1.0"),
    (LoopConfig, {"lr": 10**400}, "finite"),
    (LatentFlowConfig, {"filter_bank": 10**12}, "0..512"),
    (PipelineConfig, {"minutes": 0.0}, "minutes 0"),
]


@pytest.mark.parametrize(
    ("cls", "values", "message"), CASES, ids=[f"{c.__name__}-{i}" for i, (c, _, _) in enumerate(CASES)]
)
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
    with pytest.raises(ConfigError, match="missing"):
        load_yaml(tmp_path / "none.yaml")


def test_round_trip() -> None:
    config = LatentFlowConfig(latent=LatentSpec((3, 8, 8)), backbone={"type": "unet", "channels": [16, 32]}, gate=True)
    assert from_dict(LatentFlowConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    "spec", [{}, {"type": "latent_flou"}, {"type": "latent_flow", "chanels": [8]}, [], {"type": 3}]
)
def test_a_bad_model_spec(spec: dict) -> None:
    with pytest.raises(ConfigError):
        build("dynamics", spec)
    with pytest.raises(ConfigError):
        build_task({"model": spec, "task": {"type": "dynamics", "latents": "nowhere"}}, 0)


@pytest.mark.parametrize("task", [{"type": "camra"}, {"type": ["camera"]}, {"type": "camera", "flow": 1.0}, ["camera"]])
def test_a_bad_task(task: Any) -> None:
    with pytest.raises(ConfigError):
        build_task({"model": {"type": "tile_flow"}, "task": task}, 0)


def test_every_model_type_rebuilds_from_its_spec() -> None:
    for kind, name in [(k, name) for k in ("codec", "dynamics", "head") for name in types(k)]:
        model = build(kind, {"type": name})
        again = build(kind, json.loads(json.dumps(spec_of(model))))
        assert {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in again.state_dict().items()
        }


def test_unknown_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="modle"):
        train({"modle": {}}, tmp_path)


@pytest.mark.parametrize("assignment", ["loop.lr", "=3", "loop.lr.x=1", "loop.lr=[1"])
def test_bad_override(assignment: str) -> None:
    with pytest.raises(ConfigError):
        override({"loop": {"lr": 1}}, (assignment,))


@pytest.mark.parametrize(
    "spec", ["", "randm", "random=0", "random=-1", "random=x", "agent:nowhere", "biased", "random,,"]
)
def test_bad_policies(spec: str) -> None:
    with pytest.raises(PolicyError):
        make_policy(spec)
