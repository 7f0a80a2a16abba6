"""`model.type` -> class and config: old and new models share training, bundles and evaluation (SEED phase 0)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from dreamenv.config import from_dict, to_dict
from dreamenv.errors import ConfigError

_MODELS: dict[str, tuple[type[nn.Module], type]] = {}
M = TypeVar("M", bound=type[nn.Module])


def register_model(name: str, config: type) -> Callable[[M], M]:
    """Class decorator: make `cls(config)` available as `model.type: name`; the config is a frozen dataclass."""

    def decorate(cls: M) -> M:
        _MODELS[name] = (cls, config)
        return cls

    return decorate


def model_types() -> list[str]:
    """Return the registered names."""
    import dreamenv.models.autoencoder
    import dreamenv.models.heads
    import dreamenv.models.latent_flow
    import dreamenv.models.tile
    import dreamenv.models.tile_flow  # noqa: F401 - importing registers

    return sorted(_MODELS)


def build_model(spec: dict[str, Any], where: str = "model") -> nn.Module:
    """Build `{"type": name, **config}`.

    Raises:
        ConfigError: unknown type or key (the nearest is named), or a bad value.
    """
    if not isinstance(spec, dict) or "type" not in spec:
        raise ConfigError(f"{where}.type: missing; give one of {', '.join(model_types())}")
    values = dict(spec)
    name = values.pop("type")
    if not isinstance(name, str) or name not in model_types():
        near = difflib.get_close_matches(str(name), _MODELS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{where}.type: {name!r} is unknown; did you mean {near!r}? "
                          f"There are: {', '.join(model_types())}")  # fmt: skip
    cls, config = _MODELS[name]
    return cls(from_dict(config, values, where))


def model_spec(model: nn.Module) -> dict[str, Any]:
    """Return the dictionary from which `build_model` makes the same architecture."""
    for name, (cls, _) in _MODELS.items():
        if type(model) is cls:
            return {"type": name, **to_dict(model.config)}
    raise ConfigError(f"model of class {type(model).__name__} is not registered")
