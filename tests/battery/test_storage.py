"""A full disk, a folder that may not be written, no home, two writers, a corrupted checkpoint."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamenv.artifacts import only_writer
from dreamenv.data import Dataset
from dreamenv.errors import BusyError, CheckpointError, StorageError
from dreamenv.models.io import load_model
from envs.collect import CollectConfig, collect
from tests.battery.common import marks
from tests.conftest import write_toy_bundle
from trainers.train import train

pytestmark = marks


def small(limit: int) -> Any:
    """No file of this child may have more bytes: what a full disk does, without one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def run(*arguments: str, cwd: Path, limit: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if environment.get(k) != "-"} | {
        k: v for k, v in environment.items() if v != "-"
    }
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    limits = None if limit is None else small(limit)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, preexec_fn=limits)


COLLECT = ("envs.collect", "--steps", "1600", "--num-envs", "8", "--shard-steps", "100", "--out", "data")
TOY: dict[str, Any] = {
    "model": {"type": "patch_autoencoder", "latent_channels": 8, "width": 8, "blocks": 1},
    "loop": {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "val_every": 100, "device": "cpu"},
}


def test_a_full_disk_is_typed_and_what_was_there_stays(tmp_path: Path) -> None:
    full = run(*COLLECT, cwd=tmp_path, limit=2_000_000)
    assert full.returncode == 2 and "error:" in full.stderr and "Traceback" not in full.stderr, full.stderr
    assert "cannot be written" in full.stderr and "MiB" in full.stderr
    done = run(*COLLECT, cwd=tmp_path)
    assert done.returncode == 0 and len(Dataset(tmp_path / "data", verify="sha256")) == 1600
    (tmp_path / "toy.yaml").write_text(
        "model: {type: patch_autoencoder, latent_channels: 8, width: 8, blocks: 1}\n"
        "task: {type: codec, data: data, val_ratio: 0.2}\n"
        "loop: {steps: 4, batch_size: 4, checkpoint_every: 2, val_every: 100, device: cpu}\n"
    )
    command = ("trainers.train", "toy.yaml", "--out", "run", "--resume")
    full = run(*command, cwd=tmp_path, limit=20_000)
    assert full.returncode == 2 and "Traceback" not in full.stderr and "error:" in full.stderr, full.stderr[-800:]
    assert run(*command, cwd=tmp_path).returncode == 0
    load_model(tmp_path / "run" / "model", "codec")


def test_too_little_room_is_found_before_anything_is_written(tmp_path: Path) -> None:
    config = CollectConfig(steps=2**40 // 12308 * 2000, out=str(tmp_path / "x"), num_envs=64, shard_steps=10**9)
    with pytest.raises(StorageError, match="need .* MiB"):
        collect(config, progress=False)
    assert not (tmp_path / "x").exists()


def test_a_path_that_cannot_be_written_is_typed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(StorageError):
        collect(CollectConfig(steps=100, num_envs=4, out=str(tmp_path / "file" / "data")), progress=False)
    with pytest.raises(StorageError):
        write_toy_bundle(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "here"
    for command in (COLLECT[:-1], ("agents.train", "--steps", "64", "--world", "real", "--out")):
        refused = run(*command, str(tmp_path / "file" / "x"), cwd=tmp_path)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr


def test_a_read_only_folder_is_typed() -> None:
    """As somebody who is not root, who may write anywhere."""
    folder = Path(tempfile.mkdtemp())
    (folder / "closed").mkdir()
    for path in (folder, folder / "closed"):
        path.chmod(0o555)
    config = CollectConfig(steps=100, num_envs=4, out=str(folder / "closed" / "data"))
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(StorageError, match="closed"):
            collect(config, progress=False)
    finally:
        os.seteuid(user)
        for path in (folder, folder / "closed"):
            path.chmod(0o755)
    assert not list((folder / "closed").iterdir())
    shutil.rmtree(folder)


def test_without_a_home_everything_works(tmp_path: Path) -> None:
    program = (
        "import gymnasium as gym, envs, dreamenv\n"
        "for name in ('DreamProcgen-v0', 'RealProcgen-v0'):\n"
        "    e = gym.make(name).unwrapped; e.reset(seed=0); s = e.snapshot(); e.step(7); e.restore(s)\n"
        "print('well')"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CONFIG_HOME")} | {"HOME": "/nonexistent/home"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "well", done.stderr


HOLD = """
import sys, time
from dreamenv.artifacts import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


def test_the_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match="another process"):
        collect(CollectConfig(steps=100, num_envs=4, out=str(folder)), progress=False)
    refused = run(*COLLECT[:-1], str(folder), cwd=tmp_path)
    assert refused.returncode == 2 and "another process is writing it" in refused.stderr
    assert not folder.exists()
    holder.kill()  # however it ends
    holder.wait()
    holder.stdout.close()
    collect(CollectConfig(steps=100, num_envs=4, out=str(folder)), progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"], "no lock is left behind"
    with only_writer(folder), pytest.raises(BusyError), only_writer(folder):
        pass


def test_two_collections_of_other_seeds_never_mix(tmp_path: Path) -> None:
    commands = [[sys.executable, "-m", *COLLECT, "--seed", str(s)] for s in (1, 2)]
    first = subprocess.Popen(commands[0], cwd=tmp_path, stderr=subprocess.DEVNULL)
    time.sleep(1.0)
    second = subprocess.Popen(commands[1], cwd=tmp_path, stderr=subprocess.DEVNULL)
    codes = {p.wait() for p in (first, second)}
    assert codes == {0, 2}
    dataset = Dataset(tmp_path / "data", verify="sha256")
    alone = collect(
        CollectConfig(steps=1600, num_envs=8, shard_steps=100, out=str(tmp_path / "alone"), seed=dataset.facts["seed"]),
        progress=False,
    )
    assert (alone / "manifest.json").read_bytes() == (tmp_path / "data" / "manifest.json").read_bytes()


def test_a_shard_of_other_settings_is_refused(tmp_path: Path) -> None:
    from dreamenv.errors import DatasetError

    one, two = (
        collect(CollectConfig(steps=200, num_envs=4, out=str(tmp_path / str(s)), seed=s), progress=False)
        for s in (1, 2)
    )
    (one / "shard-00000" / "shard.json").write_bytes((two / "shard-00000" / "shard.json").read_bytes())
    with pytest.raises(DatasetError, match="other settings"):
        Dataset(one)


def test_a_corrupted_checkpoint_gives_way_to_the_one_before(tmp_path: Path, capfd: Any) -> None:
    data = collect(CollectConfig(steps=800, num_envs=8, shard_steps=50, out=str(tmp_path / "d")), progress=False)
    values = TOY | {"task": {"type": "codec", "data": str(data), "val_ratio": 0.2}}
    train(values, tmp_path / "whole")
    whole, _ = load_model(tmp_path / "whole" / "model")
    for name in ("model.safetensors", "state.json"):
        out = tmp_path / name
        train(values, out)
        file = out / "checkpoint" / name
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 2] ^= 8
        file.write_bytes(bytes(damaged))
        train(values, out, resume=True)
        assert "Going on from the checkpoint before it" in capfd.readouterr().err
        again, _ = load_model(out / "model")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    for folder in ("checkpoint", "checkpoint-before"):
        (tmp_path / "whole" / folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError):
        train(values, tmp_path / "whole", resume=True)
