"""Clips of dreams as films and datasets, and the pictures that are the same for every bundle."""

from __future__ import annotations

import re
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from dreamenv.bundle import Bundle
from dreamenv.commands import generate as command
from dreamenv.data import Dataset
from dreamenv.errors import ConfigError
from dreamenv.evaluation.generate import generate, save_dataset, save_films, save_futures, save_qualitative_grid
from dreamenv.flow import SamplerConfig
from dreamenv.vector import DreamVectorEnv

ROOT = Path(__file__).parents[2]


def test_clips_are_what_the_environment_shows(calm_bundle: Bundle) -> None:
    made = generate(calm_bundle, 3, 12, "biased", seed=5)
    starts = [*np.flatnonzero(made.first), len(made.first)]
    assert len(starts) == 4 and made.frames.shape == (36, 64, 64, 3), "calm dreams do not end"
    envs = DreamVectorEnv(3, bundle=calm_bundle)
    frames, info = envs.reset(seed=5)
    for t in range(12):
        rows = np.array(starts[:-1]) + t
        assert np.array_equal(made.frames[rows], frames)
        assert np.array_equal(made.level_seeds[rows], calm_bundle.starts.level_seeds[info["start"]])
        frames, rewards, *_ = envs.step(made.actions[rows])
        assert np.array_equal(made.rewards[rows], rewards.astype(np.float32))
    again = generate(calm_bundle, 3, 12, "biased", seed=5)
    assert np.array_equal(again.frames, made.frames)
    with pytest.raises(ConfigError, match="steps 101"):
        generate(calm_bundle, 1, 101)


def test_they_are_written_as_films_and_as_a_dataset(calm_bundle: Bundle, tmp_path: Path) -> None:
    made = generate(calm_bundle, 2, 9, "biased")
    films = save_films(tmp_path / "films", made)
    assert [len(iio.imread(film, plugin="pyav")) for film in films] == [9, 9]
    folder = save_dataset(tmp_path / "data", made, calm_bundle, "biased", SamplerConfig(), 0)
    data = Dataset(folder, verify="sha256")
    assert len(data) == 18 and np.array_equal(data.shards[0].frames, made.frames)
    assert data.facts["world"] == "dream" and data.facts["backend"] == f"bundle {calm_bundle.identity[:12]}"
    assert data.shards[0].first.sum() == 2


def test_the_command_takes_the_sampler_from_a_file(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "sampler.yaml"
    file.write_text("nfe: 3\nsolver: heun\ntemperature: 0.5\n")
    for form in ("video", "grid", "futures"):
        command(tmp_path / form, bundle=toy_bundle, form=form, clips=1, steps=4, sampler=file, device="cpu")  # type: ignore[arg-type]
    assert (tmp_path / "video" / "clip-0000.mp4").exists() and (tmp_path / "futures" / "futures.png").exists()
    assert iio.imread(tmp_path / "grid" / "grid.png").shape == (8 * 128, 12 * 128, 3)
    assert '"clips": 1' in capsys.readouterr().out
    assert DreamVectorEnv(1, bundle=toy_bundle, sampler=str(file)).sampler == SamplerConfig(3, "heun", 0.5)
    file.write_text("nfe: 3\nheat: 1\n")
    with pytest.raises(ConfigError, match="heat"):
        command(tmp_path / "x", bundle=toy_bundle, sampler=file)


def test_open_futures_and_a_fixed_grid(calm_bundle: Bundle, tmp_path: Path) -> None:
    start = save_futures(tmp_path / "a.png", calm_bundle, SamplerConfig(nfe=2))
    picture = iio.imread(tmp_path / "a.png")
    assert 0 <= start < 5 and picture.shape == (4 * 128, 13 * 128, 3)
    rows = picture.reshape(4, 128, 13, 128, 3).swapaxes(1, 2)
    assert np.array_equal(rows[0, 0], rows[1, 0]) and not np.array_equal(rows[0, -1], rows[1, -1])
    with pytest.raises(ConfigError, match="no noise"):
        save_futures(tmp_path / "b.png", calm_bundle, SamplerConfig(nfe=1))
    for name in ("c.png", "d.png"):
        save_qualitative_grid(tmp_path / name, calm_bundle, SamplerConfig())
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes()


def test_the_founding_documents_files_exist() -> None:
    text = (ROOT / "docs" / "founding-document.md").read_text()
    named = set(re.findall(r"`([\w/.-]+\.(?:py|yaml))`", text))
    assert len(named) > 40 and not [name for name in sorted(named) if not (ROOT / name).exists()]
