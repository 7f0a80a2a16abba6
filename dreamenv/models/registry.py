"""`{"type": name, **config}` -> a model, for every kind of part; a new one registers itself, no list is edited.

A part is found because its module is found: every module of a kind's home package is imported once, and so is what
installed distributions name in the entry-point group `dreamenv.models`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from dreamenv.config import from_dict, to_dict, unknown
from dreamenv.errors import ConfigError

HOMES: list[str] = [f"dreamenv.models.{name}" for name in ("codecs", "dynamics", "backbones", "heads")]
"""Packages whose modules register parts; the trainers add their own."""
_PARTS: dict[str, dict[str, tuple[type, type]]] = {}
_walked: set[str] = set()
C = TypeVar("C", bound=type)


def register(kind: str, name: str, config: type) -> Callable[[C], C]:
    """Class decorator: make a class available as `{"type": name}` of its kind.

    Args:
        kind: "codec", "dynamics", "backbone", "head", "task" or "term".
        name: what configurations say.
        config: the frozen dataclass that is the class's first argument.

    Raises:
        ConfigError: another class has that name.
    """

    def decorate(cls: C) -> C:
        parts = _PARTS.setdefault(kind, {})
        known = parts.get(name)
        if known is not None and known[0].__qualname__ != cls.__qualname__:
            raise ConfigError(f"{kind} {name!r}: is registered by {known[0].__module__} already; choose another name")
        parts[name] = (cls, config)
        return cls

    return decorate


def discover() -> None:
    """Import every module of the home packages, and the installed entry points, once."""
    for home in [h for h in HOMES if h not in _walked]:
        _walked.add(home)
        for module in pkgutil.iter_modules(importlib.import_module(home).__path__, f"{home}."):
            importlib.import_module(module.name)
    if "entry points" not in _walked:
        _walked.add("entry points")
        for point in entry_points(group="dreamenv.models"):
            point.load()


def types(kind: str) -> list[str]:
    """The registered names of one kind."""
    discover()
    return sorted(_PARTS.get(kind, {}))


def lookup(kind: str, name: Any, where: str) -> tuple[type, type]:
    """The class and the configuration registered under a name.

    Raises:
        ConfigError: no such name; the nearest is given, `where` says which key of the configuration.
    """
    names = types(kind)
    if not isinstance(name, str) or name not in names:
        raise unknown(f"{where}.type: {name!r} is unknown", name, names)
    return _PARTS[kind][name]


def build(kind: str, spec: Any, *arguments: Any, where: str = "") -> Any:
    """Build `{"type": name, **config}`.

    Args:
        kind: of what.
        spec: the mapping.
        arguments: handed to the class after its configuration.
        where: the key by which errors name the mapping; the kind by default.

    Raises:
        ConfigError: unknown type or key (the nearest is named), or a bad value.
    """
    where = where or kind
    if not isinstance(spec, dict) or "type" not in spec:
        raise ConfigError(f"{where}.type: missing; give one of {', '.join(types(kind))}")
    cls, config = lookup(kind, spec["type"], where)
    return cls(from_dict(config, {k: v for k, v in spec.items() if k != "type"}, where), *arguments)


def locate(part: Any) -> tuple[str, str]:
    """The kind and the name under which an object's class is registered; raises `ConfigError` where it is not."""
    for kind, parts in _PARTS.items():
        for name, (cls, _) in parts.items():
            if type(part) is cls:
                return kind, name
    raise ConfigError(
        f"class {type(part).__name__} is not registered; decorate it with dreamenv.models.registry.register"
    )


def spec_of(part: Any) -> dict[str, Any]:
    """The mapping from which `build` makes the same architecture; raises `ConfigError` if it is not registered."""
    return {"type": locate(part)[1], **to_dict(part.config)}
