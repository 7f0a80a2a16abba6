"""Environment specs that are JSON: Gymnasium stores the arguments of `gym.make`, whatever they are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec


class JsonSpec:
    """Mixin of an environment: whatever `gym.make` stores as its `spec` has arguments that are JSON.

    So `spec.to_json()` and `spec.make()` work, in another process too.
    """

    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """What `gym.make` made this of."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            spec = copy.copy(spec)
            bundle: Any = spec.kwargs.get("bundle")
            held = {"game": bundle.game.name} if hasattr(bundle, "folder") else {}  # its folder may hold several games
            spec.kwargs = {name: _plain(value) for name, value in (spec.kwargs | held).items()}
        self._spec = spec


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "folder"):  # a loaded bundle: where it was loaded from
        value = value.folder
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
