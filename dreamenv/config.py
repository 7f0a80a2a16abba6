"""Frozen dataclasses <-> YAML. The dataclass is the schema; an unknown key names its nearest neighbour."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dreamenv.artifacts import read_file
from dreamenv.errors import ConfigError

T = TypeVar("T")
_YAML_LIMIT = 2**20  # bytes


def check(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds: the one-line validator for `__post_init__`."""
    if not condition:
        raise ConfigError(message)


def unknown(what: str, name: Any, known: Iterable[str]) -> ConfigError:
    """The error "WHAT is unknown" with the nearest of the `known` names, and all of them."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"{what}; {hint}There are: {', '.join(names) or 'none'}")


def check_games(games: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless names of games tell several apart: none, or 2 to 1024 different ones."""
    sound = len(games) != 1 and len(games) <= 1024 and len(set(games)) == len(games)
    check(sound, f"games {', '.join(games[:16])}: must be none or 2..1024 different ones")


def each_once(values: Iterable[Any], name: str) -> None:
    """Raise `ConfigError` unless there are values, all different."""
    found = list(values)
    check(bool(found), f"{name}: name one or more")
    twice = next((value for k, value in enumerate(found) if value in found[:k]), None)
    check(twice is None, f"{name}: {twice} is named twice")


def whole(value: Any, name: str, least: int, most: int | None = None) -> int:
    """Return `value` as an int; raises `ConfigError` unless it is an integer, NumPy's too, in least..most."""
    limits = f"an integer >= {least}" if most is None else f"an integer in {least}..{most}"
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else least - 1
    check(number >= least and (most is None or number <= most), f"{name} {value!r}: must be {limits}")
    return number


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain dicts and lists, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return plain(dataclasses.asdict(config))


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Build the dataclass `cls` from a mapping, recursively.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a missing required key, or a value
            of another type; the message starts with the dotted path of the key.
    """
    name = where or cls.__name__
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: expected a mapping of keys, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise unknown(f"{path}: unknown key", key, fields)
        built[key] = _convert(hints[key], value, path)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in built:
            raise ConfigError(f"{where + '.' if where else ''}{key}: required by {cls.__name__} and missing; add it")
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}" if where else str(error)) from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if not isinstance(value, str | int) or value not in args:
            raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) != 1:
            raise TypeError(f"{path}: only 'X | None' unions are supported in configs")
        return _convert(options[0], value, path)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise ConfigError(f"{path}: expected {len(args)} entries, got {len(value)}")
        return tuple(_convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        return {_convert(args[0], k, path): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ConfigError(f"{path}: {str(value)[:40]} is not finite; give a finite number")
        return number
    if isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise ConfigError(f"{path}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping, with the safe loader.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something other than a mapping.
    """
    try:
        values = yaml.safe_load(read_file(Path(path), ConfigError, "give the path of a YAML file", _YAML_LIMIT))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, got {type(values).__name__}")
    return values
