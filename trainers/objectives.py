"""What each term of the loss costs and brings: `python -m trainers.objectives --minutes 10`.

One codec, one head, and for each objective dynamics that are trained for the same time from the same first weights. Run
the same line again after a kill: what is done is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from dreamenv.bundle import load_bundle
from dreamenv.config import check, to_dict, unknown, whole
from dreamenv.console import errors_in_one_line
from dreamenv.contract.games import get_game
from dreamenv.evaluation.pages import markdown, rooms
from dreamenv.stages import begun, program, run_command, stage, together
from dreamenv.types import Clips
from trainers.pipeline import encode, make_bundle, train_stage
from trainers.recipe import check_values, load_recipe
from trainers.table import held_out_clips, measure, write_table
from trainers.train import check_overrides, of_stage, override

_RECIPE = "flow_unet"
_SQUARED, _FLOW = "{squared: {}}", "{squared: {}, flow: {weight: 0.5}}"
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "squared": (f"task.terms={_SQUARED}",),
    "squared, teacher forcing": (f"task.terms={_SQUARED}", "task.own_inputs=[0, 0]"),
    "squared, scheduled sampling": (f"task.terms={_SQUARED}", "task.own_inputs=[0, 1]"),
    "squared, one step": (f"task.terms={_SQUARED}", "task.unroll=1"),
    "huber": ("task.terms={huber: {delta: 0.5}}",),
    "flow": (f"task.terms={_FLOW}",),
    "flow, velocity": (f"task.terms={_FLOW}", "model.parameterisation=velocity"),
    "flow, logit-normal times": ("task.terms={squared: {}, flow: {weight: 0.5, times: logit_normal}}",),
    "flow, energy": ("task.terms={squared: {}, flow: {weight: 0.5}, energy: {}}",),
    "flow, shortcut": ("task.terms={squared: {}, flow: {weight: 0.5}, shortcut: {}}", "model.shortcut=4"),
    "picture": ("task.terms={squared: {}, picture: {}}",),
    "perceptual": ("task.terms={squared: {}, perceptual: {}}",),
    "adversarial, latents": ("task.terms={squared: {}, flow: {weight: 0.3}, adversarial: {}}",),
    "adversarial, pictures": ("task.terms={squared: {}, pixel_adversarial: {}}",),
    "inverse": ("task.terms={squared: {}, inverse: {}}",),
}
"""What is compared: settings of the recipe's dynamics stage."""


@dataclass(frozen=True)
class ObjectivesConfig:
    """What is trained and measured."""

    minutes: float = 10.0
    """Training minutes of the dynamics of each objective; the codec gets as many, the head a third."""
    game: str = "coinrun"
    """Which game."""
    steps: int = 150_000
    """Transitions of the one dataset."""
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    """Which, in the table's order."""
    out: Path = Path("runs/objectives")
    """Run folder: table.md and table.json, and what was trained."""
    clips: int = 128
    """Held-out clips that each model continues."""
    samples: int = 5
    """Dreams of each clip, of which the best counts, by two evaluations a step."""
    seconds: float = 3.0
    """Time of each measurement of speed."""
    stage_steps: int | None = None
    """Steps of every training instead of minutes, for a trial."""
    jobs: int = 1
    """Objectives that are trained at the same time, each for all the minutes: one alone leaves most of a GPU idle."""
    seed: int = 0
    """Decides data, weights, clips and noise."""
    set: tuple[str, ...] = ()
    """Overrides for every training, e.g. loop.batch_size=16; prefix codec, head or dynamics: dynamics:loop.lr=0.001."""
    docs: Path | None = None
    """A Markdown file whose table between the markers `objectives` is replaced."""

    def __post_init__(self) -> None:
        """Validate everything, the stages' settings too; raises `ConfigError`."""
        get_game(self.game)
        check(self.minutes > 0, f"minutes {self.minutes}: must be > 0")
        check(bool(self.objectives), "objectives: name one or more")
        for name in ("steps", "clips", "samples", "jobs"):
            whole(getattr(self, name), name, 1)
        if self.docs is not None:
            rooms(self.docs, ["objectives"])
        check_overrides(self.set, load_recipe(_RECIPE).trained)
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise unknown(f"objective {name!r}: unknown", name, OBJECTIVES)
            check_values(self.values("dynamics", name))

    def values(self, stage: str, objective: str = "") -> dict[str, Any]:
        """The sections model, task and loop of the codec, the head, or an objective's dynamics."""
        recipe = load_recipe(_RECIPE)
        made = {n: self.out / n / "model" if "model" in s else self.out / n for n, s in recipe.stages.items()}
        values = recipe.values(stage, made)
        minutes = self.minutes / 3 if stage == "head" else self.minutes
        values["loop"] |= {"steps": self.stage_steps} if self.stage_steps else {"minutes": minutes}
        values["loop"] |= {"seed": self.seed}
        return override(values, (*OBJECTIVES.get(objective, ()), *of_stage(self.set, stage)))


_COLUMNS: dict[str, tuple[str, str]] = {
    "trained_steps": ("steps in that time", ",d"),
    "psnr_1": ("PSNR, 1 step", ".2f"),
    "psnr_10": ("10", ".2f"),
    "psnr_30": ("30", ".2f"),
    "psnr_50": ("50", ".2f"),
    "best_psnr_10": ("best sample, 10 steps", ".2f"),
    "average_psnr_10": ("average sample", ".2f"),
    "delta_psnr": ("delta-PSNR, 4 steps", ".2f"),
    "perceptual_10": ("perceptual distance, 10 steps", ".3f"),
    "detail_10": ("detail kept, 10 steps", ".2f"),
}


def _train(config: ObjectivesConfig, name: str, folder: str) -> None:
    """Dynamics of one objective, and their bundle."""
    out, parts = config.out, {"codec": "codec", "dynamics": folder, "head": "head"}
    stage(out, folder, lambda: train_stage(config.values("dynamics", name), out / folder))
    stage(out, f"{folder}-bundle", lambda: make_bundle(out, out / "data", 20, parts, _RECIPE, f"{folder}-bundle").name)


def run_objectives(config: ObjectivesConfig) -> dict[str, dict[str, Any]]:
    """Collect, train and measure whatever is not done yet; returns the rows.

    Raises:
        ConfigError: bad settings, or a stage that failed.
    """
    out, rows, cut = config.out, {}, None
    free = ("out", "docs", "objectives", "jobs")
    with begun(out, {k: str(v) for k, v in to_dict(config).items() if k not in free}):
        options = {"game": config.game, "steps": config.steps, "seed": config.seed, "out": out / "data"}
        stage(out, "data", lambda: run_command(program("envs.collect", **options)))
        stage(out, "codec", lambda: train_stage(config.values("codec"), out / "codec"))
        stage(out, "latents", lambda: encode(out / "data", out / "codec" / "model", out / "latents"))
        stage(out, "head", lambda: train_stage(config.values("head"), out / "head"))
        folders = {n: f"dynamics-{i:02d}" for i, n in enumerate(OBJECTIVES) if n in config.objectives}
        together(config.jobs, [partial(_train, config, name, folder) for name, folder in folders.items()])
        for name, folder in folders.items():
            if not (out / "stages" / f"{folder}-row.json").exists() and cut is None:
                cut = held_out_clips(config.game, config.clips, config.seed)

            def row(folder: str = folder, clips: Clips | None = cut) -> dict[str, Any]:
                assert clips is not None
                bundle = load_bundle(out / f"{folder}-bundle")
                found = measure(bundle, clips, config.samples, config.seconds, config.seed)
                return found | {"trained_steps": bundle.provenance["trained_steps"]["dynamics"]}

            rows[name] = stage(out, f"{folder}-row", row)
    write_table(out, "objectives", rows, config.docs, markdown("objective", rows, _COLUMNS))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `ObjectivesConfig` is an option."""
    with errors_in_one_line():
        config = tyro.cli(ObjectivesConfig, args=arguments, description=__doc__)
        run_objectives(config)
        print((config.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
