"""The battery: long tests of reliability, whole by `make battery`, in small by `make test-all`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

FULL = os.environ.get("DREAMENV_BATTERY") == "full"
marks = [pytest.mark.slow, pytest.mark.timeout(4 * 3600 if FULL else 300)]


def many(full: int, small: int) -> int:
    """How many, in full or in small."""
    return full if FULL else small


def record(name: str, **figures: Any) -> None:
    """Keep what a whole run measured in out/battery, for docs/reliability.md."""
    print(name, json.dumps(figures))
    if FULL:
        folder = Path("out/battery")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
