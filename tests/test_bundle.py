"""Bundles: round trip, migration, and twenty-odd ways to damage one, each refused by name."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from dreamenv.artifacts import atomic_folder, only_writer, recover_folder, sha256_file
from dreamenv.bundle import FORMAT_VERSION, NETWORKS, compute_identity, embedded_games, load_bundle, resolve_bundle
from dreamenv.commands import bench, generate, info
from dreamenv.errors import BundleError, BusyError, ConfigError
from dreamenv.models.dynamics.flow import LatentFlow
from dreamenv.models.dynamics.tiles import TileFlow
from dreamenv.play.run import PlayConfig, run
from dreamenv.rewrite import rewrite_bundle, update_card
from dreamenv.vector import DreamVectorEnv
from tests.conftest import toy_world_model


def edit_json(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "bundle.json"
        value = json.loads(path.read_text())
        change(value)
        value["identity"] = compute_identity(value)  # so that the checks behind the checksum are reached
        path.write_text(json.dumps(value))

    return apply


def edit_part(part: str, change: Callable[[bytes], bytes], fix_hash: bool = True) -> Callable[[Path], None]:
    """Alter a part; with `fix_hash`, bundle.json is made to agree, so that the deeper checks are reached."""

    def apply(folder: Path) -> None:
        (folder / part).write_bytes(change((folder / part).read_bytes()))
        if fix_hash:
            edit_json(lambda d: d["sha256"].update({part: sha256_file(folder / part)}))(folder)

    return apply


def edit_tensors(part: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def alter(data: bytes) -> bytes:
        tensors = load(data)
        change(tensors)
        return save(tensors)

    return edit_part(part, alter)


def flip(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no folder": lambda f: shutil.rmtree(f),
    "no bundle.json": lambda f: (f / "bundle.json").unlink(),
    "bundle.json empty": lambda f: (f / "bundle.json").write_text(""),
    "bundle.json cut": lambda f: (f / "bundle.json").write_text((f / "bundle.json").read_text()[:100]),
    "bundle.json a list": lambda f: (f / "bundle.json").write_text("[]"),
    "bundle.json binary": lambda f: (f / "bundle.json").write_bytes(b"\xff\xfe\x00"),
    "bundle.json nested": lambda f: (f / "bundle.json").write_text("[" * 200000),
    "a digit altered": lambda f: (f / "bundle.json").write_text(
        (f / "bundle.json").read_text().replace("50.0", "51.0")
    ),
    "a limit of zero": edit_json(lambda d: d["limits"].update(latent_max=0.0)),
    "a huge model": edit_json(lambda d: d["models"]["dynamics"].update(filter_bank=10**12)),
    "weights of integers": edit_tensors("head.safetensors", lambda t: t.update({"out.bias": np.zeros(3, np.int64)})),
    "no version": edit_json(lambda d: d.pop("format_version")),
    "newer version": edit_json(lambda d: d.update(format_version=FORMAT_VERSION + 1)),
    "ancient version": edit_json(lambda d: d.update(format_version=0)),
    "version a string": edit_json(lambda d: d.update(format_version="1")),
    "no hashes": edit_json(lambda d: d.pop("sha256")),
    "a hash missing": edit_json(lambda d: d["sha256"].pop("head.safetensors")),
    "no models": edit_json(lambda d: d.pop("models")),
    "unknown model type": edit_json(lambda d: d["models"]["dynamics"].update(type="gan")),
    "unknown model key": edit_json(lambda d: d["models"]["dynamics"].update(depth=3)),
    "wrong model": edit_json(lambda d: d["models"].update(dynamics=d["models"]["head"])),
    "model of another shape": edit_json(lambda d: d["models"]["codec"].update(width=32)),
    "context differs": edit_json(lambda d: d["models"]["head"].update(context=2)),
    "no game": edit_json(lambda d: d.pop("game")),
    "a game nobody knows": edit_json(lambda d: d["game"].update(name="tetris")),
    "a difficulty it has not": edit_json(lambda d: d["game"].update(distribution_mode="memory")),
    "no step limit": edit_json(lambda d: d["game"].update(max_steps=0)),
    "limits not numbers": edit_json(lambda d: d["limits"].update(latent_max="big")),
    "weights missing": lambda f: (f / "dynamics.safetensors").unlink(),
    "weights flipped": edit_part("dynamics.safetensors", flip, fix_hash=False),
    "weights cut": edit_part("dynamics.safetensors", lambda b: b[:-100]),
    "weights empty": edit_part("dynamics.safetensors", lambda b: b""),
    "weights header huge": edit_part("dynamics.safetensors", lambda b: struct.pack("<Q", 2**60) + b[8:]),
    "weights a pickle": edit_part("dynamics.safetensors", lambda b: b"\x80\x04K\x01."),
    "weights NaN": edit_tensors("dynamics.safetensors", lambda t: t["backbone.stem.bias"].fill(np.nan)),
    "a tensor missing": edit_tensors("codec.safetensors", lambda t: t.pop("linear_in.weight")),
    "a tensor too many": edit_tensors("head.safetensors", lambda t: t.update(extra=np.zeros(2))),
    "a tensor of another shape": edit_tensors("head.safetensors", lambda t: t.update({"out.bias": np.zeros(7)})),
    "starts cut": edit_part("starts.safetensors", lambda b: b[:64]),
    "starts without frames": edit_tensors("starts.safetensors", lambda t: t.pop("frames")),
    "starts of another dtype": edit_tensors("starts.safetensors", lambda t: t.update(frames=t["frames"].astype(float))),
    "starts with pixels missing": edit_tensors(
        "starts.safetensors", lambda t: t.update(frames=t["frames"][:-20].copy())
    ),
    "starts not packed": edit_tensors("starts.safetensors", lambda t: t["frames"].fill(1)),
    "starts with a bad action": edit_tensors("starts.safetensors", lambda t: t["actions"].fill(15)),
    "card flipped": edit_part("card.json", lambda b: b + b" ", fix_hash=False),
    "card not JSON": edit_part("card.json", lambda b: b"{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused(toy_bundle: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(toy_bundle, folder)
    load_bundle(folder, "cpu")
    DAMAGES[damage](folder)
    with pytest.raises(BundleError, match=str(folder)):
        load_bundle(folder, "cpu")


def test_round_trip_keeps_the_weights_to_half_precision(toy_bundle: Path) -> None:
    loaded, original = load_bundle(toy_bundle, "cpu"), toy_world_model()
    for name in NETWORKS:
        a, b = getattr(loaded.world_model, name).state_dict(), getattr(original, name).state_dict()
        for key in a:
            assert torch.equal(a[key], b[key].half().float()), key
    assert loaded.world_model.head.config == original.head.config


@pytest.mark.parametrize("bits", [6, 8, 11])
def test_weights_of_few_bits_are_within_half_a_step(toy_bundle: Path, tmp_path: Path, bits: int) -> None:
    small = rewrite_bundle(toy_bundle, tmp_path / "small", bits)
    old, new = load_bundle(toy_bundle, "cpu", "fp32"), load_bundle(small, "cpu", "fp32")
    for name in NETWORKS:
        a, b = (getattr(each.world_model, name).state_dict() for each in (old, new))
        for key, value in a.items():
            rows, found = (x.flatten(1) if x.ndim > 1 else x for x in (value, b[key]))
            step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1) if value.ndim > 1 else torch.zeros(1)
            assert ((rows - found).abs() <= 0.51 * step + 1e-6).all(), key
            assert value.ndim < 2 or not torch.equal(value, b[key]) or not value.any() or value.numel() < 64, key
    sizes = [sum(f.stat().st_size for f in path.glob("[cdh]*.safetensors")) for path in (toy_bundle, small)]
    assert bits / 16 - 0.05 < sizes[1] / sizes[0] < bits / 16 + 0.25
    frames = []
    for folder in (toy_bundle, small):
        envs = DreamVectorEnv(2, bundle=folder, precision="fp32", sampler={"temperature": 0.0})
        envs.reset(seed=1)
        frames.append(np.stack([envs.step(np.array([7, 2]))[0] for _ in range(4)]).astype(float))
    assert 0 < np.abs(frames[0] - frames[1]).mean() < (4 if bits >= 8 else 8)
    again = load_bundle(rewrite_bundle(small, tmp_path / "again", bits), "cpu", "fp32")
    assert torch.allclose(again.world_model.head.out.weight, new.world_model.head.out.weight, atol=1e-4)  # pyright: ignore
    for wrong in (4, 13):
        with pytest.raises(ConfigError, match=f"bits {wrong}"):
            rewrite_bundle(toy_bundle, tmp_path / "tiny", wrong)


def test_only_the_networks_asked_for_are_rounded_and_not_what_adds_up(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatentFlow, "precise", ("condition.",))
    small = load_bundle(rewrite_bundle(toy_bundle, tmp_path / "small", 8, ("dynamics",)), "cpu", "fp32").world_model
    old = load_bundle(toy_bundle, "cpu", "fp32").world_model
    for name in NETWORKS:
        now = getattr(small, name).state_dict()
        changed = {key for key, value in getattr(old, name).state_dict().items() if not torch.equal(value, now[key])}
        assert bool(changed) == (name == "dynamics") and not any(key.startswith("condition.") for key in changed)
    with pytest.raises(ConfigError, match="rounded 'heads'.*head"):
        rewrite_bundle(toy_bundle, tmp_path / "none", 8, ("heads",))
    before = {path.name: path.read_bytes() for path in toy_bundle.iterdir()}
    with pytest.raises(ConfigError, match="is the old bundle"):
        rewrite_bundle(toy_bundle, toy_bundle.parent / "." / toy_bundle.name, 8)
    assert before == {path.name: path.read_bytes() for path in toy_bundle.iterdir()}
    assert TileFlow.precise == ("motion.",)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("out.weight:scale"),
        lambda t: t.update({"out.weight:scale": t["out.weight:scale"][:-1]}),
        lambda t: t.update({"out.weight:scale": t["out.weight:scale"].astype(np.int64)}),
        lambda t: t["out.weight:scale"].fill(np.nan),
        lambda t: t.update({"out.bias:scale": t["out.bias"]}),
        lambda t: t.update({"else:scale": t["out.bias"]}),
    ],
)
def test_damaged_scales_are_refused(change: Callable[[dict], object], toy_bundle: Path, tmp_path: Path) -> None:
    folder = rewrite_bundle(toy_bundle, tmp_path / "small", 8)
    load_bundle(folder, "cpu")
    edit_tensors("head.safetensors", change)(folder)
    with pytest.raises(BundleError, match=str(folder)):
        load_bundle(folder, "cpu")


GOLDEN = Path(__file__).parent / "golden"


def dreamt(bundle: Path, nfe: int) -> tuple[np.ndarray, np.ndarray]:
    """What `tests/golden` holds of the release that wrote version 1: frames after 0, 1, 4 and 12 steps, and infos."""
    envs: Any = gym.make_vec(
        "DreamProcgen-v0",
        num_envs=2,
        device="cpu",
        precision="fp32",
        sampler={"nfe": nfe},
        autoreset_mode="SameStep",
        bundle=str(bundle),
    )
    frames, infos = [envs.reset(seed=4)[0]], []
    for t in range(12):
        observation, *_, info = envs.step(np.array([7, 8] if t % 3 else [5, 1]))
        frames.append(observation)
        infos.append(np.stack([info["uncertainty"], info["end_probability"]]))
    envs.close()
    return np.stack(frames)[[0, 1, 4, 12]], np.stack(infos)


@pytest.mark.parametrize("nfe", [1, 2])
@pytest.mark.parametrize("name", ["patches", "tiles"])
def test_a_bundle_of_version_1_dreams_what_it_dreamt(name: str, nfe: int, tmp_path: Path) -> None:
    folder = GOLDEN / f"bundle-v1-{name}"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    golden = np.load(GOLDEN / "golden.npz")
    rewritten = rewrite_bundle(folder, tmp_path / "new")
    assert json.loads((rewritten / "bundle.json").read_text())["format_version"] == FORMAT_VERSION
    for bundle in (folder, rewritten):
        frames, infos = dreamt(bundle, nfe)
        off = np.abs(frames.astype(int) - golden[f"v1_{name}_nfe{nfe}_frames"])
        assert off.max() <= 2 and (off > 0).mean() < 1e-3  # another machine may round otherwise
        np.testing.assert_allclose(infos, golden[f"v1_{name}_nfe{nfe}_infos"], rtol=1e-3, atol=1e-5)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["patches", "tiles"])
def test_a_snapshot_of_version_2_goes_on(name: str) -> None:
    """It was taken after the twelve steps of the golden run with two evaluations."""
    envs = DreamVectorEnv(2, bundle=GOLDEN / f"bundle-v1-{name}", device="cpu", precision="fp32", sampler={"nfe": 2})
    restored = envs.restore((GOLDEN / f"snapshot-v2-{name}.bin").read_bytes())
    assert np.array_equal(restored, np.load(GOLDEN / "golden.npz")[f"v1_{name}_nfe2_frames"][-1])
    assert envs.step(np.array([7, 8]))[0].shape == (2, 64, 64, 3)


def test_a_card_is_not_written_into_an_older_format(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "bundle-v1-tiles", tmp_path / "old")
    with pytest.raises(BundleError, match="older format"):
        update_card(tmp_path / "old", {"psnr_10": 1.0})


def test_files_are_read_once(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toy_bundle, tmp_path / "bundle")
    read: list[str] = []
    original = os.open

    def counted(path: Any, *arguments: Any, **options: Any) -> int:
        read.append(Path(path).name)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    load_bundle(tmp_path / "bundle", "cpu")
    assert [read.count(f"{name}.safetensors") for name in NETWORKS] == [1, 1, 1]


def test_update_card_changes_nothing_else(toy_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(toy_bundle, folder)
    before = load_bundle(folder, "cpu")
    update_card(folder, {"psnr_10": 20.5})
    with only_writer(folder), pytest.raises(BusyError):
        update_card(folder, {"psnr_10": 1.0})
    after = load_bundle(folder, "cpu")
    assert after.card == {"psnr_10": 20.5} and after.identity == before.identity


def test_a_reader_finds_a_bundle_that_its_writer_has_set_aside(toy_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_bundle, tmp_path / ".bundle.replaced")
    assert load_bundle(tmp_path / "bundle", "cpu").game.name == "coinrun"
    assert [p.name for p in tmp_path.iterdir()] == [".bundle.replaced"]  # it reads, and leaves repairs to the writer


def test_a_bundle_in_the_working_directory(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toy_bundle)
    assert load_bundle(".", "cpu").game.name == "coinrun"
    for nothing in ("", 5):
        with pytest.raises(BundleError):
            resolve_bundle(nothing, "coinrun")  # type: ignore[arg-type]


def test_unknown_game() -> None:
    with pytest.raises(BundleError, match="no embedded bundle"):
        resolve_bundle(None, "tetris")


def test_an_atomic_folder_survives_a_failing_writer_and_a_killed_swap(tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["artefact"]
    folder.rename(tmp_path / ".artefact.replaced")  # killed between the two renames
    recover_folder(folder)
    assert (folder / "a").read_text() == "old"


def test_the_difficulty_decides_the_embedded_bundle(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mode = load_bundle(toy_bundle, "cpu").game.distribution_mode
    other = {"easy": "hard", "hard": "easy"}[mode]
    monkeypatch.setattr("dreamenv.bundle.EMBEDDED", toy_bundle.parent)
    assert embedded_games(mode) == {"coinrun": toy_bundle} and embedded_games(other) == {}
    assert resolve_bundle(None, "coinrun", mode) == toy_bundle
    with pytest.raises(BundleError, match=f"no embedded bundle in {other} mode.*--distribution-mode {other}"):
        DreamVectorEnv(1, "coinrun", distribution_mode=other)
    with pytest.raises(ConfigError, match=f"distribution_mode '{other}': the bundle is of {mode}"):
        DreamVectorEnv(1, bundle=toy_bundle, device="cpu", distribution_mode=other)
    with pytest.raises(BundleError, match="'esay': coinrun has easy, hard"):
        resolve_bundle(None, "coinrun", "esay")
    assert DreamVectorEnv(1, "coinrun", device="cpu", distribution_mode=mode).bundle.folder == toy_bundle
    info(distribution_mode=mode)
    assert json.loads(capsys.readouterr().out)["folder"] == str(toy_bundle)
    with pytest.raises(BundleError, match=f"no embedded bundle in {other} mode"):
        info(distribution_mode=other)
    asked: dict[str, Any] = {"bundle": toy_bundle, "distribution_mode": other}
    film = PlayConfig(headless=tmp_path / "film.gif", world="dream", device="cpu", **asked)
    for command in (lambda: info(**asked), lambda: bench(**asked), lambda: run(film), lambda: generate(**asked)):
        with pytest.raises(ConfigError, match=f"distribution_mode '{other}': the bundle is of {mode}"):
            command()
