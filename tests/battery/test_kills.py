"""SIGKILL at random moments: what comes out at the end has the bytes of a run that nobody disturbed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.battery.common import many, marks, record
from tests.conftest import write_toy_bundle

pytestmark = marks
_TIMED = ("metrics.csv", "run.json", "config.yaml", "progress", "tensorboard", "events.out", ".lock", "pipeline.json")


def contents(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Digests of the files that must come out the same."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = str(path.relative_to(folder))
        if path.is_file() and any(n in relative for n in names) and not any(t in relative for t in _TIMED):
            found[relative] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def finish(command: list[str], where: Path) -> float:
    began = time.monotonic()
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.monotonic() - began


def disturb(command: list[str], where: Path, seconds: float, rng: np.random.Generator) -> bool:
    """Start a program and kill it at some moment; returns whether it had not ended yet."""
    process = subprocess.Popen(
        command, cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(rng.uniform(0.0, 1.0) * seconds)
        return False
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)  # itself alone: what it has started must end by itself
        process.wait()
        return True


TOY = """
model: {{type: patch_autoencoder, latent_channels: 8, width: 8, blocks: 1}}
task: {{type: codec, data: {data}, val_ratio: 0.2}}
loop: {{steps: 12, batch_size: 4, checkpoint_every: 2, val_every: 6, device: cpu}}
"""
PPO = """
algorithm: PPO
num_envs: 4
network: {channels: [4, 4], features: 8}
settings: {n_steps: 8, batch_size: 16, n_epochs: 1}
"""
SMALL = [*("model.latent_channels=8", "loop.batch_size=4", "loop.checkpoint_every=1", "task.val_ratio=0.3")]


def commands(name: str, root: Path) -> tuple[list[str], tuple[str, ...]]:
    """The program, resuming, and which of its files count."""
    python = [sys.executable, "-m"]
    if name == "collect":
        return [
            *(*python, "envs.collect", "--steps", "1600", "--num-envs", "8", "--shard-steps", "20"),
            *("--out", "out", "--policy", "random=0.5,sticky=0.5"),
        ], ("manifest.json", ".npy")
    if name == "train":
        (root / "toy.yaml").write_text(TOY.format(data=root / "data"))
        return [*python, "trainers.train", str(root / "toy.yaml"), "--out", "out", "--resume"], (
            "model/",
            "checkpoint/model",
            "checkpoint/optimizer",
        )
    if name == "agents.train":
        (root / "ppo.yaml").write_text(PPO)
        return [
            *(*python, "agents.train", "--world", "dream", "--bundle", str(root / "bundle"), "--steps", "192"),
            *("--config", str(root / "ppo.yaml"), "--checkpoint-every", "1", "--eval-episodes", "2"),
            *("--out", "out", "--resume", "--precision", "fp32"),
        ], ("out/agent/", "checkpoint/arrays")
    return [
        *(*python, "trainers.pipeline", "--game", "coinrun", "--recipe", "patches", "--out", "out", "--steps", "2000"),
        *("--stage-steps", "2", "--starts", "3", "--events", "0", "--workers", "1"),
        *("--set", "loop.batch_size=4", "loop.checkpoint_every=1", "loop.device=cpu"),
    ], ("out/bundle/",)


@pytest.mark.parametrize("name", ["collect", "train", "agents.train", "pipeline"])
def test_a_killed_run_ends_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    if name == "agents.train":
        write_toy_bundle(root / "bundle")
    if name == "train":
        setup = [sys.executable, "-m", "envs.collect", "--steps", "800", "--num-envs", "8", "--shard-steps", "50"]
        subprocess.run([*setup, "--out", str(root / "data")], check=True, capture_output=True)
    if name == "pipeline" and many(0, 1):
        pytest.skip("minutes; part of the whole battery")
    command, names = commands(name, root)
    (tmp_path / "whole").mkdir()
    seconds = finish(command, tmp_path / "whole")
    whole = contents(tmp_path / "whole", names)
    assert whole
    rng = np.random.default_rng(0)
    wanted, kills, runs = many(100, 2), 0, 0
    while kills < wanted:
        where = tmp_path / f"run-{runs}"
        where.mkdir()
        for _ in range(min(10, wanted - kills)):
            killed = disturb(command, where, min(seconds, 15.0), rng)
            kills += killed
            if not killed:
                break
        finish(command, where)
        assert contents(where, names) == whole, f"run {runs}"
        runs += 1
    record(f"kills-{name}", kills=kills, runs=runs, seconds_undisturbed=seconds)
