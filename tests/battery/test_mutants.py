"""Damaged artefacts of every format: a typed error or what was there, quickly, in little memory, and no code runs."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from dreamenv.bundle import compute_identity, load_bundle
from dreamenv.config import from_dict, to_dict
from dreamenv.data import Dataset
from dreamenv.errors import DreamenvError
from dreamenv.models.io import load_model, save_model
from dreamenv.play.moment import load_moment
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, load_agent, save_agent
from envs.collect import CollectConfig, collect
from tests.battery.common import many, marks, record
from tests.battery.malicious import MALICIOUS
from tests.conftest import toy_world_model, write_toy_bundle
from trainers.checkpoint import load_checkpoint
from trainers.loop import Loop, LoopConfig
from trainers.train import build_task, train

pytestmark = marks
SECONDS, MIB = 2.0, 2048.0


def digest(*arrays: Any) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(np.asarray(array)).tobytes())
    return total.hexdigest()


def weights(network: torch.nn.Module) -> str:
    return digest(*[v.numpy() for _, v in sorted(network.state_dict().items())])


def read_bundle(folder: Path) -> str:
    bundle = load_bundle(folder, "cpu", "fp32")
    model = bundle.world_model
    return digest(bundle.starts.frames) + "".join(weights(m) for m in (model.codec, model.dynamics, model.head))


def read_dataset(folder: Path) -> str:
    dataset = Dataset(folder, verify="sha256")
    return digest(*[getattr(s, n) for s in dataset.shards for n in ("frames", "actions", "rewards", "first")])


def content(path: Path) -> bytes:
    """A regular file's bytes, if it is one: a snapshot is bytes, and reading its file is the caller's."""
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size < 2**30 else b""
    except OSError:
        return b""


def read_moment(path: Path) -> str:
    past = load_moment(path / "moment.bin", with_real=False)
    return digest(past.moment.dream, past.taken) + hashlib.sha256(past.dream).hexdigest() + str(past.errors)


TRAINING: dict[str, Any] = {
    "model": {"type": "patch_autoencoder", "latent_channels": 8, "width": 8, "blocks": 1},
    "loop": {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "val_every": 100, "device": "cpu"},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[Path], str]]]:
    """Of each format a folder, and how to read it."""
    root = tmp_path_factory.mktemp("good")
    made: dict[str, tuple[Path, Callable[[Path], str]]] = {}
    bundle = write_toy_bundle(root / "bundle")
    made["bundle"] = bundle, read_bundle
    save_model(root / "model", toy_world_model().dynamics, {"step": 1})
    made["model"] = root / "model", lambda p: weights(load_model(p)[0])
    torch.manual_seed(0)
    save_agent(root / "agent", ImpalaAgent(ImpalaConfig((4, 8), 16)), {"steps": 3})
    made["agent"] = root / "agent", lambda p: weights(load_agent(p))
    data = collect(CollectConfig(steps=400, out=str(root / "data"), num_envs=4, shard_steps=50), progress=False)
    made["dataset"] = data, read_dataset

    values = TRAINING | {"task": {"type": "codec", "data": str(data), "val_ratio": 0.2}}
    train(values, root / "run")
    loop_config = from_dict(LoopConfig, values["loop"], "loop")
    settings = {"model": values["model"], "task": values["task"], "loop": to_dict(loop_config)}
    loop = Loop(loop_config, build_task(values, loop_config.seed), root / "run", settings)
    kept = root / "checkpoint"
    shutil.copytree(root / "run" / "checkpoint", kept)

    def read_checkpoint(folder: Path) -> str:
        shutil.rmtree(root / "run" / "checkpoint", ignore_errors=True)
        shutil.rmtree(root / "run" / "checkpoint-before", ignore_errors=True)
        if folder == kept:
            shutil.copytree(folder, root / "run" / "checkpoint")
        else:  # moved, not copied: it may hold a link to a device without end
            os.replace(folder, root / "run" / "checkpoint")
        load_checkpoint(loop)
        moments = [v for p in loop.parameters for _, v in sorted(loop.optimizer.state[p].items())]
        averages = [v for _, v in sorted(loop.ema.items())]
        return f"{loop.step} {loop.elapsed} {weights(loop.model)} {digest(*averages, *moments)}"

    made["checkpoint"] = kept, read_checkpoint
    for world in ("dream", "real"):
        options = {"bundle": str(bundle), "device": "cpu"} if world == "dream" else {"num_levels": 5}
        env: Any = gym.make({"dream": "dreamenv:DreamProcgen-v0", "real": "envs:RealProcgen-v0"}[world], **options)
        env = env.unwrapped
        env.reset(seed=0)
        env.step(7)
        (root / world).mkdir()
        (root / world / "snapshot.bin").write_bytes(env.snapshot())
        made[f"snapshot-{world}"] = root / world, lambda p, e=env: digest(e.restore(content(p / "snapshot.bin")))
    from dreamenv.flow import SamplerConfig
    from dreamenv.play.session import Session

    session = Session(load_bundle(bundle, "cpu"), SamplerConfig(), "dream", None, (0, 10000), 0)
    session.new_start()
    session.step(7)
    (root / "moment").mkdir()
    session.save(root / "moment" / "moment.bin")
    session.close()
    made["moment"] = root / "moment", read_moment
    return made


def mutate(folder: Path, rng: np.random.Generator) -> str:
    """Damage one file of a folder in one of several ways; returns how."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    file = files[rng.integers(len(files))]
    data = bytearray(file.read_bytes())
    kind = ["bit", "byte", "cut", "grow", "zero", "remove", "swap"][rng.integers(7)]
    at = int(rng.integers(max(len(data), 1)))
    if kind == "bit" and data:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "byte" and data:
        data[at] = int(rng.integers(256))
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "remove":
        file.unlink()
        return f"{file.name} removed"
    else:
        other = int(rng.integers(max(len(data), 1)))
        if data:
            data[at], data[other] = data[other], data[at]
    file.write_bytes(bytes(data))
    return f"{file.name} {kind} at {at}"


FORMATS = ("bundle", "model", "agent", "dataset", "checkpoint", "snapshot-dream", "snapshot-real", "moment")


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_refused_or_read_as_it_was(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    folder, read = good[name]
    whole = read(folder)
    rng = np.random.default_rng(FORMATS.index(name))
    count, refused, slowest = many(10_000, 40), 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(count):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "x")
        how = mutate(tmp_path / "x", rng)
        began = time.perf_counter()
        try:
            assert read(tmp_path / "x") == whole, how
        except DreamenvError:
            refused += 1
        slowest = max(slowest, time.perf_counter() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    record(f"mutants-{name}", mutants=count, refused=refused, slowest_s=slowest, peak_growth_mib=grown)
    assert refused and grown < MIB and slowest < SECONDS


def values_of(rng: np.random.Generator) -> Any:
    odd = [
        None,
        True,
        -1,
        0,
        2**64,
        1e308,
        -1e-308,
        "",
        "x" * 1000,
        [],
        [1] * 50,
        {},
        {"a": {"b": []}},
        "../../x",
        [[]],
    ]
    return odd[rng.integers(len(odd))]


def change_json(value: Any, rng: np.random.Generator) -> Any:
    """Put something else in one place of a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = sorted(value)[rng.integers(len(value))]
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: change_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = int(rng.integers(len(value)))
        return [change_json(v, rng) if i == at else v for i, v in enumerate(value)]
    return values_of(rng)


@pytest.mark.parametrize("name", ["bundle", "model", "agent", "dataset"])
def test_a_description_that_lies_is_typed(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    """The checksums are right, the content is not: whatever it says, no raw error, no giant allocation."""
    folder, read = good[name]
    file = {"bundle": "bundle.json", "model": "model.json", "agent": "agent.json", "dataset": "manifest.json"}[name]
    shutil.copytree(folder, tmp_path / "x")
    plain = json.loads((folder / file).read_text())
    rng = np.random.default_rng(1)
    count, refused, slowest = many(3_000, 60), 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(count):
        changed = change_json(plain, rng)
        if name == "bundle" and isinstance(changed, dict):
            changed = changed | {"identity": compute_identity(changed)}
        (tmp_path / "x" / file).write_text(json.dumps(changed))
        began = time.perf_counter()
        try:
            read(tmp_path / "x")
        except DreamenvError:
            refused += 1
        slowest = max(slowest, time.perf_counter() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    record(f"lies-{name}", mutants=count, refused=refused, slowest_s=slowest, peak_growth_mib=grown)
    assert refused and grown < MIB and slowest < SECONDS


@pytest.mark.parametrize("what", MALICIOUS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_malicious_file_runs_nothing(name: str, what: str, good: dict[str, Any], tmp_path: Path) -> None:
    folder, read = good[name]
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    flag = tmp_path / "ran"
    for file in files if many(1, 0) else sorted(files, key=lambda f: f.suffix != ".json")[:2]:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "x")
        MALICIOUS[what](tmp_path / "x" / file, flag)
        began = time.perf_counter()
        try:
            read(tmp_path / "x")
            raise AssertionError(f"{file} was accepted")
        except DreamenvError:
            pass
        assert time.perf_counter() - began < SECONDS + 1 and not flag.exists()
