"""The command line, as a user types it: from the real game to a dream, help, and mistakes told in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dreamenv import commands
from dreamenv.bundle import load_bundle
from dreamenv.cli import COMMANDS

SHAPE = ("backbone={type: unet, channels: [16, 32], blocks: [1, 1]}", "embedding=32", "filter_bank=4")
TINY = [
    "--set",
    "loop.batch_size=4",
    "codec:model.width=16",
    "codec:model.blocks=1",
    "codec:model.latent_channels=8",
    *[f"dynamics:model.{k}" for k in SHAPE],
    "dynamics:task.unroll=2",
    "dynamics:task.val_windows=8",
    "head:model.width=16",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_from_the_real_game_to_a_dream_through_the_command_line(tmp_path: Path) -> None:
    """Collect, train every stage, bundle, measure, film and bench: each command as a user would type it."""

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    out = tmp_path / "run"
    pipeline = [
        "trainers.pipeline",
        "--game",
        "coinrun",
        "--recipe",
        "predictor_patches",
        "--steps",
        "3000",
        "--stage-steps",
        "8",
        "--starts",
        "4",
        "--out",
        str(out),
        *TINY,
    ]
    first = json.loads(run(*pipeline).splitlines()[-1])
    bundle = load_bundle(first["bundle"], "cpu")
    assert bundle.starts.frames.shape == (4, 1, 64, 64, 3) and bundle.world_model.rewards.tolist()[0] == 0.0
    weights = (out / "bundle" / "dynamics.safetensors").read_bytes()
    (out / "stages" / "dynamics.json").unlink()  # as if it had been killed there: it goes on from its checkpoint
    assert "[codec] done before" in run(*pipeline)
    assert (out / "bundle" / "dynamics.safetensors").read_bytes() == weights

    small = ["--bundle", str(out / "bundle"), "--clips", "8", "--horizon", "5"]
    compared = run(
        "dreamenv",
        "compare",
        *small,
        "--steps",
        "1600",
        "--out",
        str(tmp_path / "compare"),
        "--nfe",
        "2",
        "--card",
        "--horizon",
        "6",
        "--drift",
        "2",
        "--branches",
        "3",
        "--episodes",
        "1",
        "--limit",
        "5",
        "--endless-steps",
        "7",
        "--random-clips",
        "4",
        "--thorough",
        "--policies",
        "random",
        "hold:right",
    )
    written = {p.name for p in (tmp_path / "compare").iterdir()}
    assert written == {
        "report.html",
        "metrics.json",
        "open_loop.csv",
        "policies.csv",
        "horizon.png",
        "film_strip.png",
        "side_by_side.mp4",
        "calibration.png",
        "branches.png",
        "policies.png",
        "endless.png",
        "endless_frames.png",
    }
    page = (tmp_path / "compare" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7 and "//" not in re.sub(r"base64,[^\"]*", "", page)
    figures = json.loads(compared.splitlines()[-1])
    assert f"was run again from {figures['chance_moments']} moments" in page and figures["chance_psnr_5"] > 20
    assert figures["clips"] == 8 and 5 < figures["psnr_1"] < 60 and figures["autoencoder_psnr"] > figures["psnr_5"]
    assert [figures[k] for k in ("steps", "closed_loop_episodes", "endless_dreams")] == [3200, 1, 4]
    assert load_bundle(out / "bundle", "cpu").card == figures
    run("dreamenv", "demo", *small, "--out", str(tmp_path / "demo"))
    made = {p.name: p.stat().st_size for p in (tmp_path / "demo").iterdir()}
    assert set(made) == {"side_by_side.mp4", "side_by_side.gif", "horizon.png", "film_strip.png", "metrics.json"}
    assert all(size > 1000 for size in made.values())
    assert json.loads(run("dreamenv", "info", "--bundle", str(out / "bundle")))["card"] == figures
    timed = ("dreamenv", "bench", "--bundle", str(out / "bundle"), "--num-envs", "4", "--seconds", "0.2")
    bench = json.loads(run(*timed, "--nfe", "1,2").splitlines()[-1])
    assert len(bench["rows"]) == 4 and bench["peak_memory_mib"] > 50
    bench = json.loads(run(*timed, "--nfe", "1", "--observations", "latent").splitlines()[-1])
    assert [row["num_envs"] for row in bench["rows"]] == [1, 4]


@pytest.mark.parametrize("command", [[], ["demo"], ["play"], ["compare"], ["bench"], ["info"]])
def test_every_command_has_help(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dreamenv", *command, "--help"], capture_output=True, text=True, check=True
    )
    assert all(
        name in done.stdout for name in (["demo", "play", "compare", "bench", "info"] if not command else ["--bundle"])
    )


@pytest.mark.parametrize(
    ("command", "problem"),
    [(["info", "--bundle", "."], "bundle.json"), (["compare", "--quick", "--thorough"], "exclude each other")],
)
def test_a_user_error_is_one_line(command: list[str], problem: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dreamenv", *command], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert problem in done.stderr
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_help_comes_without_torch_and_says_what_the_commands_say() -> None:
    script = (
        "import sys; sys.argv = ['dreamenv', '--help']\nfrom dreamenv.cli import main\nmain()\n"
        "print('torch' in sys.modules, 'tyro' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    for name, line in COMMANDS.items():
        assert line in done.stdout and (getattr(commands, name).__doc__ or "").startswith(line)
    unknown = subprocess.run([sys.executable, "-m", "dreamenv", "dance"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and "there are demo, play" in unknown.stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--game", "coinrn"], "did you mean 'coinrun'"),
        (["--recipe", "tile"], "did you mean 'tiles'"),
        (["--game", "maze", "--recipe", "tiles"], "maze in easy has not"),
        (["--set", "flow:task.unrol=2"], "did you mean 'unroll'"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(options: list[str], problem: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainers.pipeline", *options]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    said = re.sub(r"[\s│]+", " ", done.stderr)  # without the frame that tyro draws around it
    assert done.returncode == 2 and problem in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())
