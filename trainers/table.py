"""Every family on the same data for the same time, in one table: `python -m trainers.table --minutes 20`.

It walks a list of recipes, each by `trainers.pipeline`. Run the same line again after a kill: what is done is skipped.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from dreamenv.artifacts import atomic_file
from dreamenv.bundle import NETWORKS, Bundle, load_bundle
from dreamenv.config import check, to_dict, whole
from dreamenv.console import errors_in_one_line
from dreamenv.contract.frames import observe
from dreamenv.contract.games import get_game
from dreamenv.evaluation.bench import bench
from dreamenv.evaluation.clips import cut_clips, play_real
from dreamenv.evaluation.controllability import DELTA_STEP, delta_psnr
from dreamenv.evaluation.figures import save_plot
from dreamenv.evaluation.imagine import open_loop
from dreamenv.evaluation.metrics import detail, psnr, squared_error
from dreamenv.evaluation.pages import markdown, rooms, write_tables
from dreamenv.evaluation.perceptual import feature_distance, features
from dreamenv.flow import SamplerConfig
from dreamenv.stages import begun, program, run_command, stage, together
from dreamenv.types import Clips
from trainers.pipeline import PipelineConfig, run_pipeline
from trainers.recipe import load_recipe

RECIPES = (
    "pixels_gray",
    "pixels_rgb",
    "predictor_conv",
    "predictor_vae",
    "predictor_patches",
    "flow_unet",
    "flow_dit",
    "flow_causal",
    "flow_shortcut",
    "tiles",
)
"""The families, simplest first."""
HORIZONS = (1, 5, 10, 30, 50)
_GREY = (84, 84, 1)
_CONTEXT = 8  # frames before each clip; a model looks at the last of them, as many as it has context


@dataclass(frozen=True)
class TableConfig:
    """What is trained and measured."""

    minutes: float = 20.0
    """Training minutes of each recipe, all its stages together."""
    game: str = "coinrun"
    """Which game."""
    steps: int = 150_000
    """Transitions of the one dataset."""
    recipes: tuple[str, ...] = RECIPES
    """Which recipes, in the table's order."""
    out: Path = Path("runs/table")
    """Run folder: a folder a recipe, table.md, table.json, losses.png."""
    clips: int = 128
    """Held-out clips that each model continues."""
    samples: int = 5
    """Dreams of each clip, of which the best counts, by two evaluations a step."""
    seconds: float = 3.0
    """Time of each measurement of speed."""
    stage_steps: int | None = None
    """Steps of every trained stage instead of minutes, for a trial."""
    jobs: int = 1
    """Recipes that are trained at the same time, each for all the minutes: one alone leaves most of a GPU idle."""
    seed: int = 0
    """Decides data, weights, clips and noise."""
    set: tuple[str, ...] = ()
    """Overrides for every trained stage, e.g. loop.val_every=10000."""
    docs: Path | None = None
    """A Markdown file whose table between the markers is replaced; losses.png is written beside it."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        get_game(self.game)
        check(self.minutes > 0, f"minutes {self.minutes}: must be > 0")
        check(bool(self.recipes), "recipes: name one or more")
        for name in self.recipes:
            self.run(name)
        for name in ("steps", "clips", "samples", "jobs"):
            whole(getattr(self, name), name, 1)
        check(self.seconds > 0, f"seconds {self.seconds}: must be > 0")
        if self.docs is not None:
            rooms(self.docs, ["families"])

    def run(self, recipe: str, data: Path | None = None) -> PipelineConfig:
        """How one recipe is trained; raises `ConfigError` if it does not suit the game."""
        shared = {name: getattr(self, name) for name in ("game", "minutes", "steps", "seed", "stage_steps", "set")}
        return PipelineConfig(**shared, recipe=recipe, out=self.out / recipe, data=data, events=0)


def held_out_clips(game: str, count: int, seed: int) -> Clips:
    """Clips of the real game (needs procgen) with eight frames of context and 50 to be predicted."""
    play = play_real(game, -(-max(2000, 100 * count) // 16), 16, seed=seed)
    return cut_clips(play, count, _CONTEXT, max(HORIZONS), seed)


def measure(bundle: Bundle, clips: Clips, samples: int, seconds: float, seed: int) -> dict[str, Any]:
    """One row: fidelity on clips of the game's own frames, which are shown to the model as it wants them, and speed.

    Args:
        bundle: which model.
        clips: real clips, frames uint8 (N, T, 64, 64, 3), with 50 steps to be predicted.
        samples: dreams of each clip by two evaluations, of which the best and the average are given.
        seconds: time of each measurement of speed.
        seed: decides the noise.
    """
    model, k = bundle.world_model, clips.context
    shown = Clips(observe(clips.frames, model.frame_shape), clips.actions, clips.level_seeds, k)
    real, sampler = shown.frames[:, k:], SamplerConfig(temperature=0.0)  # each model's mean
    dream, _ = open_loop(model, shown, sampler, seed)
    error, copied = squared_error(dream, real), squared_error(shown.frames[:, k - 1 : k], real)
    parameters = {n: sum(p.numel() for p in getattr(model, n).parameters()) for n in NETWORKS}
    row: dict[str, Any] = {"frame": list(model.frame_shape), "parameters": parameters}
    row["millions"] = sum(parameters.values()) / 1e6
    for h in HORIZONS:
        mse = float(error[:, h - 1].mean())
        row |= {f"mse_{h}": mse, f"psnr_{h}": float(psnr(mse)), f"copy_psnr_{h}": float(psnr(copied[:, h - 1].mean()))}
    grey = (
        squared_error(observe(dream[:, 9], _GREY), observe(real[:, 9], _GREY)) if real.shape[-1] == 3 else error[:, 9]
    )
    row["grey_psnr_10"] = float(psnr(grey.mean()))
    row["detail_10"] = float(detail(dream[:, 9]).mean() / detail(real[:, 9]).mean())
    row["delta_psnr"] = float(delta_psnr(model, shown, dream[:, :DELTA_STEP], sampler, seed)[-1])
    row["perceptual_10"] = float(feature_distance(features(dream[:, 9])[0], features(real[:, 9])[0]).mean())
    short = Clips(shown.frames[:, : k + 10], shown.actions[:, : k + 9], shown.level_seeds, k)
    drawn = [open_loop(model, short, SamplerConfig(nfe=2), seed + (s << 32))[0][:, 9] for s in range(samples)]
    errors = np.stack([squared_error(d, real[:, 9]).mean((1, 2)) for d in drawn])
    row |= {"best_psnr_10": float(psnr(errors.min(0).mean())), "average_psnr_10": float(psnr(errors.mean()))}
    row["spread_10"] = float(np.stack(drawn).astype(np.float32).std(0).mean())
    for speed in bench(bundle.game.name, bundle.folder, "auto", [1], 64, seconds)["rows"]:
        row[f"steps_per_s_{speed['num_envs']}"] = speed["steps_per_s"]
    return row


_COLUMNS: dict[str, tuple[str, str]] = {
    "millions": ("parameters, millions", ".2f"),
    "psnr_1": ("PSNR, 1 step", ".2f"),
    "psnr_5": ("5", ".2f"),
    "psnr_10": ("10", ".2f"),
    "psnr_30": ("30", ".2f"),
    "psnr_50": ("50", ".2f"),
    "mse_1": ("MSE, 1 step", ".5f"),
    "mse_5": ("5", ".5f"),
    "mse_10": ("10", ".5f"),
    "mse_30": ("30", ".5f"),
    "grey_psnr_10": ("PSNR as grey 84 x 84, 10 steps", ".2f"),
    "best_psnr_10": ("best sample, 10 steps", ".2f"),
    "average_psnr_10": ("average sample", ".2f"),
    "delta_psnr": ("delta-PSNR, 4 steps", ".2f"),
    "perceptual_10": ("perceptual distance, 10 steps", ".3f"),
    "detail_10": ("detail kept, 10 steps", ".2f"),
    "steps_per_s_1": ("steps/s, one", ".0f"),
    "steps_per_s_64": ("steps/s, 64", ".0f"),
}


def _with_copies(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows, and copying the last frame for both kinds of frames."""
    copies = {}
    for kind, channels in (("RGB", 3), ("grey", 1)):
        found = next((row for row in rows.values() if row["frame"][2] == channels), None)
        if found is not None:
            copied = {f"psnr_{h}": found[f"copy_psnr_{h}"] for h in HORIZONS}
            copies[f"copying the last frame, {kind}"] = {"millions": 0.0, **copied}
    return rows | copies


def write_table(out: Path, name: str, rows: dict[str, dict[str, Any]], docs: Path | None, table: str) -> None:
    """Write <out>/table.md and table.json, and the table into a Markdown file between the markers of that name."""
    files = [(out / "table.md", table + "\n"), (out / "table.json", json.dumps(rows, indent=1) + "\n")]
    for path, text in files:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if docs is not None:
        write_tables(docs, {name: table})


def losses(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Share of its time and loss of the stage that trained a recipe's dynamics last, smoothed over a twentieth."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [(int(step), name, float(value)) for step, name, value in list(csv.reader(file))[1:]]
    progress = {step: value for step, name, value in rows if name == "progress"}
    loss = {step: value for step, name, value in rows if name == "loss"}
    steps = sorted(set(progress) & set(loss))
    values = np.array([loss[s] for s in steps])
    width = max(len(values) // 20, 1)
    smooth = np.convolve(values, np.ones(width) / width, "valid")
    return np.array([progress[s] for s in steps])[width - 1 :], smooth


def _plot(path: Path, folders: dict[str, Path]) -> None:
    def draw(axes: Any) -> None:
        for name, folder in folders.items():
            progress, values = losses(folder)
            axes.plot(progress, values / values[0], label=name)
        axes.set(
            xlabel="share of the stage's time",
            ylabel="loss, relative to the first",
            yscale="log",
            title="last dynamics stage",
        )
        axes.legend(fontsize=7)

    save_plot(path, draw)


def run_table(config: TableConfig) -> dict[str, dict[str, Any]]:
    """Collect, train and measure whatever is not done yet; returns the rows.

    Raises:
        ConfigError: bad settings, or a stage that failed.
    """
    out, rows, folders = config.out, {}, {}
    free = ("out", "docs", "recipes", "jobs")
    with begun(out, {k: str(v) for k, v in to_dict(config).items() if k not in free}):
        data = out / "data"
        options = {"game": config.game, "steps": config.steps, "seed": config.seed, "out": data}
        options |= {"contingent": any(load_recipe(name).contingent for name in config.recipes)}
        stage(out, "data", lambda: run_command(program("envs.collect", **options)))
        runs = [(name, config.run(name, data)) for name in config.recipes]
        together(config.jobs, [partial(stage, out, name, lambda run=run: str(run_pipeline(run))) for name, run in runs])
        cut = None
        for name in config.recipes:
            folders[name] = out / name / load_recipe(name).learnt
            if not (out / "stages" / f"{name}-row.json").exists() and cut is None:
                cut = held_out_clips(config.game, config.clips, config.seed)

            def row(name: str = name, clips: Clips | None = cut) -> dict[str, Any]:
                assert clips is not None
                bundle = load_bundle(out / name / "bundle")
                return measure(bundle, clips, config.samples, config.seconds, config.seed)

            rows[name] = stage(out, f"{name}-row", row)
    write_table(out, "families", rows, config.docs, markdown("recipe", _with_copies(rows), _COLUMNS))
    for path in (out, *(() if config.docs is None else (config.docs.parent,))):
        _plot(path / "losses.png", folders)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `TableConfig` is an option."""
    with errors_in_one_line():
        config = tyro.cli(TableConfig, args=arguments, description=__doc__)
        run_table(config)
        print((config.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
