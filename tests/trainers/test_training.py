"""The loop: resume to the same bytes after SIGKILL, schedules, refusals; and the whole way through the real CLI."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from dreamenv.bundle import pick_precision
from dreamenv.errors import BundleError, CheckpointError, ConfigError, DatasetError
from dreamenv.models.io import load_model
from envs.collect import CollectConfig, collect
from trainers.batch import Batch
from trainers.loop import Loop, LoopConfig, learning_rate
from trainers.prefetch import prefetch
from trainers.train import train

TINY_AE = {"type": "patch_autoencoder", "latent_channels": 8, "width": 16, "blocks": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "d"
    settings = CollectConfig(out=str(out), steps=4000, num_envs=8, shard_steps=250, policy="biased")
    return collect(settings, progress=False)


def config(data: Path, **loop: object) -> dict:
    every = {"checkpoint_every": 5, "val_every": 30, "log_every": 10}
    task = {"type": "codec", "data": str(data), "val_ratio": 0.2}
    return {"model": TINY_AE, "task": task, "loop": {"steps": 60, "batch_size": 4, **every, **loop}}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_improves_on_pca_and_logs(data: Path, tmp_path: Path) -> None:
    before = train(config(data, steps=1, lr=1e-6), tmp_path / "a")
    after = train(config(data, steps=150, batch_size=16), tmp_path / "b")
    assert after["psnr"] > before["psnr"] + 0.5
    assert list((tmp_path / "b" / "pictures").glob("*.png")) and list((tmp_path / "b" / "tensorboard").iterdir())
    model, facts = load_model(tmp_path / "b" / "model")
    assert facts["step"] == 150 and not model.training


def test_a_checkpoint_of_another_configuration_or_a_damaged_one_is_refused(data: Path, tmp_path: Path) -> None:
    train(config(data, steps=5), tmp_path / "run")
    with pytest.raises(CheckpointError, match="another configuration"):
        train(config(data, steps=5, lr=1e-4), tmp_path / "run", resume=True)
    victim = tmp_path / "run" / "checkpoint" / "ema.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ema"):
        train(config(data, steps=5), tmp_path / "run", resume=True)
    (tmp_path / "run" / "checkpoint" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="state.json"):
        train(config(data, steps=5), tmp_path / "run", resume=True)
    (tmp_path / "run" / "model" / "model.json").write_text("[]")
    with pytest.raises(BundleError, match="model.json"):
        load_model(tmp_path / "run" / "model")


@pytest.mark.slow
def test_a_minute_budget_ends_on_time(data: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    train(config(data, steps=None, minutes=0.05, val_every=1000), tmp_path / "run")
    assert time.monotonic() - began < 20
    state = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())
    assert 3.0 <= state["elapsed"] < 6.0


def test_the_schedule_warms_up_and_decays() -> None:
    c = LoopConfig(lr=1.0, warmup=0.1, final_lr=0.2)
    rates = [learning_rate(c, p) for p in np.linspace(0, 1, 101)]
    assert rates[5] == pytest.approx(0.5) and max(rates) == pytest.approx(1.0) and rates[100] == pytest.approx(0.2)
    assert rates[55] == pytest.approx(0.6, abs=0.01) and all(
        a >= b for a, b in zip(rates[10:], rates[11:], strict=False)
    )


class _Sum(nn.Module):
    learning_rates = {"fast": 10.0}

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))


@dataclass(frozen=True)
class Ones(Batch):
    one: Tensor


class _Less:
    """Makes a sum small: each number's slope is one."""

    auxiliary = None

    def __init__(self) -> None:
        self.model = _Sum()

    def batch(self, rng: np.random.Generator, size: int) -> Ones:
        return Ones(torch.ones(size))

    def loss(self, model: nn.Module, batch: Ones, *_: object) -> tuple[Tensor, dict[str, Tensor]]:
        return sum(p.sum() for p in model.parameters()) * batch.one.mean(), {}


def test_some_parameters_learn_faster_and_do_not_decay(tmp_path: Path) -> None:
    """AdamW's first step is the learning rate along the slope's sign, and as much of the weight as decays."""
    task = _Less()
    loop = Loop(LoopConfig(steps=1, lr=1e-2, warmup=0.0, weight_decay=0.5, device="cpu"), task, tmp_path, {})
    loop.update(0, Ones(torch.ones(1)))
    torch.testing.assert_close(task.model.slow, torch.full((3, 3), 1 - 0.01 * 0.5 - 0.01))
    torch.testing.assert_close(task.model.fast, torch.full((3, 3), 1 - 0.1))


def test_workers_change_no_weight(data: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        train(config(data, steps=6, workers=workers), tmp_path / str(workers))
    for name in ("model/model", "checkpoint/optimizer"):
        own, theirs = ((tmp_path / workers / f"{name}.safetensors").read_bytes() for workers in ("0", "2"))
        assert own == theirs, name
    assert not multiprocessing.active_children()


def test_workers_hand_on_errors_as_they_are() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise DatasetError("item 2: is damaged")
        return item * item

    made = prefetch(make, [0, 1, 2, 3], 2, torch.device("cpu"))
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(DatasetError, match="^item 2: is damaged$"):
        next(made)


class _Noisy:
    """Fits a layer to noise, twice as hard in the second half of the training."""

    auxiliary = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 8)

    def batch(self, rng: np.random.Generator, size: int) -> Ones:
        return Ones(torch.from_numpy(rng.standard_normal((size, 8), np.float32)))

    def graph_key(self, progress: float) -> int:
        return int(progress >= 0.5)

    def loss(
        self, model: nn.Module, batch: Ones, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noise = torch.randn(batch.one.shape, generator=generator, device=batch.one.device)
        return (1 + self.graph_key(progress)) * (model(batch.one) - noise).square().mean(), {"noise": noise.mean()}

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        return {}

    def facts(self) -> dict[str, object]:
        return {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_recorded_steps_learn_what_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("save_model", "save_checkpoint"):  # a bare layer is no registered model
        monkeypatch.setattr(f"trainers.loop.{name}", lambda *_: None)
    weights = []
    for graphs in (False, True):
        settings = LoopConfig(
            steps=12, lr=0.1, batch_size=16, device="cuda", precision="fp32", cuda_graphs=graphs, workers=1
        )
        loop = Loop(settings, _Noisy(), tmp_path / str(graphs), {})
        loop.run()
        recorded = loop.recorded
        assert loop.step == 12 and (recorded.key == 1 if recorded is not None else not graphs)
        weights.append({name: value.clone() for name, value in loop.model.state_dict().items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_together(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config(data, steps=6)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "trainers.train", str(path), "--out", str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True)
    assert load_model(tmp_path / "run" / "model")[1]["step"] == 6


def test_bf16_is_chosen_by_the_hardware_unless_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DREAMENV_PRECISION", raising=False)
    cpu = torch.device("cpu")
    assert pick_precision("bf16", cpu) == "bf16" and pick_precision("fp32", torch.device("cuda")) == "fp32"
    assert pick_precision("auto", torch.device("cuda")) == "bf16"
    capable = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert (pick_precision("auto", cpu) == "bf16") == capable
    with pytest.raises(ConfigError, match="fp8"):
        pick_precision("fp8", cpu)
    for said in ("fp32", "bf16"):
        monkeypatch.setenv("DREAMENV_PRECISION", said)
        assert pick_precision("auto", cpu) == pick_precision("auto", torch.device("cuda")) == said
        assert pick_precision("fp32", cpu) == "fp32", "who asks for one gets it"
    monkeypatch.setenv("DREAMENV_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="fp8"):
        pick_precision("auto", cpu)


@pytest.mark.slow
def test_a_run_keeps_its_configuration_and_repeats_from_it(data: Path, tmp_path: Path) -> None:
    train(config(data, steps=3, precision="fp32"), tmp_path / "run")
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert set(kept) == {"model", "task", "loop"} and kept["loop"]["steps"] == 3 and kept["task"]["data"] == str(data)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["torch"] == torch.__version__ and told["command"] and told["dreamenv"]
    train(kept, tmp_path / "again")
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "again"))
    assert one == two


def test_older_checkpoints_and_altered_states_are_refused(data: Path, tmp_path: Path) -> None:
    train(config(data, steps=5), tmp_path / "run")
    path = tmp_path / "run" / "checkpoint" / "state.json"
    state = json.loads(path.read_text())
    for changed, message in (
        ({k: v for k, v in state.items() if k != "format_version"}, "format_version 1"),
        (state | {"format_version": 9}, "format_version 9"),
        (state | {"step": 72}, "checksum"),
        (state | {"elapsed": -1.0}, "checksum"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            train(config(data, steps=5), tmp_path / "run", resume=True)


def test_a_model_folder_of_version_1_is_read(data: Path, tmp_path: Path) -> None:
    train(config(data, steps=2), tmp_path / "run")
    path = tmp_path / "run" / "model" / "model.json"
    now = json.loads(path.read_text())
    old = {"model": now["model"] | {"type": "autoencoder"}, "facts": now["facts"], "sha256": now["sha256"]}
    path.write_text(json.dumps(old))
    model, facts = load_model(tmp_path / "run" / "model", "codec")
    assert type(model).__name__ == "PatchAutoencoder" and facts["step"] == 2
    path.write_text(json.dumps(now | {"format_version": 3}))
    with pytest.raises(BundleError, match="format_version 3"):
        load_model(tmp_path / "run" / "model")
    path.write_text(json.dumps(now))
    with pytest.raises(BundleError, match="is a codec .*expected a head"):
        load_model(tmp_path / "run" / "model", "head")
