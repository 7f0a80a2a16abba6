"""What several tests of agents use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.adapter import NativeVecEnv
from dreamenv.vector import DreamVectorEnv


def dreams(bundle: Path, n: int = 3, **options: Any) -> NativeVecEnv:
    return NativeVecEnv(DreamVectorEnv(n, bundle=bundle, **{"autoreset_mode": "SameStep"} | options))
