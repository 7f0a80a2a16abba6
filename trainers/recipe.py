"""Recipes: the stages from the real game to a bundle, as data (`trainers/recipes/*.yaml`).

A stage collects, encodes, builds a model that needs no training, trains one, or chooses what one leaves open. `{name}`
in its settings is what the stage of that name made: a dataset, a folder of latents, or a model folder; `{steps}`,
`{events}`, `{dreams}` and `{renewed-dreams}` are numbers that the pipeline decides. A recipe may say which other one it
`extends`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from dreamenv.config import check, from_dict, load_yaml, unknown
from dreamenv.contract.games import Game
from dreamenv.errors import ConfigError
from dreamenv.models.registry import lookup
from trainers.loop import LoopConfig

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        name: of its file.
        needs: what the game must have, see `View.has` in `dreamenv.contract.games`.
        defaults: numbers that `{steps}` and `{events}` stand for unless the pipeline is told others.
        stages: name -> settings, in order.
        bundle: which stages are the codec, the dynamics and the head.
        finetune: which stages train a bundle's dynamics and head on, with what is set otherwise then.
    """

    name: str
    needs: tuple[str, ...]
    defaults: dict[str, int]
    stages: dict[str, dict[str, Any]]
    bundle: dict[str, str]
    finetune: dict[str, dict[str, Any]]

    @property
    def data(self) -> str:
        """The stage that collects what is trained on."""
        return next(name for name, settings in self.stages.items() if "collect" in settings)

    @property
    def events(self) -> str:
        """The stage that collects rare events; empty if none does."""
        return next((name for name, settings in self.stages.items() if "events" in settings.get("collect", ())), "")

    @property
    def contingent(self) -> bool:
        """Whether it wants data that say which pixels depend on the action."""
        return bool(self.stages[self.data]["collect"].get("contingent"))

    @property
    def trained(self) -> list[str]:
        """Names of the stages that train."""
        return [name for name, stage in self.stages.items() if "task" in stage]

    @property
    def learnt(self) -> str:
        """The stage that trains the bundle's dynamics last."""
        name = self.bundle["dynamics"]
        while "choose" in self.stages[name]:
            name = self.stages[name]["choose"]["dynamics"].strip("{}")
        return name

    def suits(self, game: Game, mode: str) -> bool:
        """Whether a game in a difficulty has what is needed."""
        return all(game.view.has(need, mode) for need in self.needs)

    def values(self, stage: str, made: dict[str, Any]) -> dict[str, Any]:
        """The sections model, task and loop of a stage, with `{name}` filled in.

        Raises:
            ConfigError: no such stage, or it names something that `made` has not.
        """
        if stage not in self.trained:
            raise ConfigError(f"stage {stage!r}: recipe {self.name} trains {', '.join(self.trained)}")
        settings = self.stages[stage]
        where = f"{self.name}.{stage}"
        return {
            "model": copy.deepcopy(settings["model"]),
            "task": filled(settings["task"], made, f"{where}.task"),
            "loop": {"steps": None, **settings.get("loop", {})},
        }


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """Read a recipe: one of the package by its name, or a YAML file by its path.

    Raises:
        ConfigError: there is none, or it is malformed.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.exists():
        raise unknown(f"recipe {name!r}: unknown", name, recipes())
    values = _read(path)
    models = values.pop("models", {})
    further = set(values) - {f.name for f in fields(Recipe)}
    check(not further, f"{path}: {sorted(further)[:1]} is not a part of a recipe")
    for part in ("stages", "bundle"):
        check(isinstance(values.get(part), dict), f"{path}: {part} is missing")
    for stage, settings in values["stages"].items():
        check(isinstance(settings, dict), f"{path}: stages.{stage}: expected settings, got {settings!r}")
        if isinstance(settings.get("model"), str):
            known = settings["model"] in models
            check(known, f"{path}: stages.{stage}.model: there is no model {settings['model']!r}")
            settings["model"] = copy.deepcopy(models[settings["model"]])
    return Recipe(
        name=path.stem,
        needs=tuple(values.get("needs", ())),
        defaults=values.get("defaults", {}),
        stages=values["stages"],
        bundle=values["bundle"],
        finetune=values.get("finetune", {}),
    )


def _read(path: Path, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's file, and what it takes over from the one that it `extends`: models and keys of stages, each whole."""
    own = load_yaml(path)
    base = own.pop("extends", None)
    if base is None:
        return own
    check(base in recipes(), f"{path}: extends {base!r}; there are {', '.join(recipes())}")
    check(base not in below, f"{path}: extends {base}, which extends this one")
    values = _read(RECIPES / f"{base}.yaml", (*below, path.stem))
    for part, settings in own.items():
        before = values.get(part, {})
        check(
            isinstance(settings, dict) or not isinstance(before, dict) or not before,
            f"{path}: {part}: expected settings, got {settings!r}",
        )
        if part in ("stages", "finetune"):
            for name, keys in settings.items():
                check(isinstance(keys, dict), f"{path}: {part}.{name}: expected settings, got {keys!r}")
            settings = {name: {**before.get(name, {}), **keys} for name, keys in settings.items()}
        values[part] = {**before, **settings} if isinstance(settings, dict) else settings
    return values


def fed(values: dict[str, Any], columns: Sequence[str], where: str) -> dict[str, Any]:
    """A stage's sections, less the loss terms that need optional columns which the data lack; says which.

    Args:
        values: the sections.
        columns: the optional columns of the data.
        where: what the data and the stage are called.

    Raises:
        ConfigError: an unknown term, or no term is left.
    """
    terms = values["task"].get("terms", {})
    needed = {name: lookup("term", name, "task.terms")[0].columns for name in terms}
    lacking = {name: sorted(set(needs) - set(columns)) for name, needs in needed.items()}
    for name, missing in lacking.items():
        if missing:
            print(f"{where}: without the term {name}, for there is no column {', '.join(missing)}", file=sys.stderr)
    kept = {name: settings for name, settings in terms.items() if not lacking[name]}
    check(bool(kept) or not terms, f"{where}: has no column for any of its terms; collect it with those")
    return values if kept == terms else values | {"task": values["task"] | {"terms": kept}}


def filled(value: Any, made: dict[str, Any], where: str) -> Any:
    """`value` with each string `{name}` in it replaced by what was made; raises `ConfigError` for an unknown name."""
    if isinstance(value, dict):
        return {k: filled(v, made, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [filled(v, made, where) for v in value]
    if isinstance(value, str) and value.startswith("{") and value.endswith("}"):
        check(value[1:-1] in made, f"{where}: {value} is made by no earlier stage")
        found = made[value[1:-1]]
        return str(found) if isinstance(found, Path) else found
    return value


def check_build(stage: str, settings: dict[str, Any]) -> None:
    """Raise `ConfigError` for a misspelt name or a bad value of a model that is built and not trained."""
    model = settings.get("model")
    if not isinstance(model, dict):
        raise ConfigError(f"{stage}.model: expected the model to build, got {model!r}")
    _, shape = lookup(str(settings["build"]), model.get("type"), f"{stage}.model")
    from_dict(shape, {k: v for k, v in model.items() if k != "type"}, f"{stage}.model")


def check_values(values: dict[str, Any]) -> None:
    """Raise `ConfigError` for a misspelt name or a bad value in model, task and loop, without reading data."""
    for name in ("model", "task", "loop"):
        check(isinstance(values.get(name), dict), f"{name}: expected a section of keys, got {values.get(name)!r}")
    cls, config = lookup("task", values["task"].get("type"), "task")
    from_dict(config, {k: v for k, v in values["task"].items() if k != "type"}, "task")
    for term, settings in values["task"].get("terms", {}).items():
        from_dict(lookup("term", term, f"task.terms.{term}")[1], settings, f"task.terms.{term}")
    model = values["model"]
    _, shape = lookup(getattr(cls, "kind", ""), model.get("type"), "model")
    assert is_dataclass(shape)
    from_dict(shape, {k: v for k, v in model.items() if k != "type"}, "model")
    from_dict(LoopConfig, values["loop"], "loop")
