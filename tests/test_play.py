"""The window, on SDL's dummy display: keys reach the game, TAB reaches the other world, ESC leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pygame
import pytest

from dreamenv.actions import COMBOS, NOOP
from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig
from dreamenv.play import pressed_action, run


def test_key_combinations_are_the_games_own() -> None:
    assert pressed_action(set()) == NOOP
    assert COMBOS[pressed_action({pygame.K_RIGHT})] == ("RIGHT",)
    assert COMBOS[pressed_action({pygame.K_RIGHT, pygame.K_UP})] == ("RIGHT", "UP")
    assert COMBOS[pressed_action({pygame.K_d})] == ("D",)
    assert pressed_action({pygame.K_F1}) == NOOP


def test_play_switch_worlds_reset_and_quit(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = [[], [pygame.K_RIGHT], [pygame.K_UP], [pygame.K_r], [pygame.K_TAB], [pygame.K_RIGHT], [], [pygame.K_TAB], [],
              [pygame.K_ESCAPE]]  # fmt: skip
    frames = iter(script)

    def events() -> list[pygame.event.Event]:
        return [pygame.event.Event(kind, key=key) for key in next(frames) for kind in (pygame.KEYDOWN, pygame.KEYUP)]

    monkeypatch.setattr(pygame.event, "get", events)
    steps = run("coinrun", toy_bundle, "dream", 2, 500.0, SamplerConfig(), "cpu", 0)
    assert steps == {"dream": 6, "real": 3}
    assert not pygame.display.get_init()


def test_no_display_is_a_clear_error(toy_bundle: Path) -> None:
    environment = {**os.environ, "SDL_VIDEODRIVER": "x11", "DISPLAY": ":999"}
    done = subprocess.run([sys.executable, "-m", "dreamenv", "play", "--bundle", str(toy_bundle)], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2 and "dreamenv demo" in done.stderr


@pytest.mark.parametrize(("scale", "fps"), [(0, 15.0), (33, 15.0), (8, 0.0), (8, -1.0)])
def test_bad_arguments(toy_bundle: Path, scale: int, fps: float) -> None:
    with pytest.raises(ConfigError):
        run("coinrun", toy_bundle, "dream", scale, fps, SamplerConfig(), "cpu", 0)
