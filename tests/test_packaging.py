"""What an installation needs is there, on every Python that is promised."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from trainers.games import GamesConfig

ROOT = Path(__file__).parents[1]


def test_pinned_libraries_can_be_installed_on_the_oldest_python() -> None:
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    checked = 0
    for pin in pins:
        if pin.marker is not None and not pin.marker.evaluate(
            {"python_version": "3.10", "python_full_version": "3.10.0"}
        ):
            continue
        try:
            found = metadata.metadata(pin.name)
        except metadata.PackageNotFoundError:
            continue
        checked += 1
        wanted = SpecifierSet(found.get("Requires-Python") or "")
        assert wanted.contains("3.10.13"), f"{pin.name} wants Python {wanted}: give its pin a marker"
    assert checked > 40


def test_an_agent_s_settings_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert GamesConfig().agent_config.is_file()
