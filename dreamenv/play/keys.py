"""From keys and gamepads to the game's fifteen actions."""

from __future__ import annotations

import contextlib
from typing import Any

from dreamenv.contract.actions import NOOP, keys_to_action


def pressed_action(pressed: set[int]) -> int:
    """Return the action of the largest key combination that is held down; no-op without one."""
    fits = [(len(keys), action) for keys, action in keys_to_action().items() if set(keys) <= pressed]
    return max(fits)[1] if fits else NOOP


class Gamepads:
    """Gamepads as keys: stick or cross for the arrows, buttons for jump and the game's other actions."""

    def __init__(self) -> None:
        import pygame

        self._pygame = pygame
        self._keys: dict[int, int] = {}  # axis, cross or button -> the key it stands for, 0 for none
        self._joysticks: dict[int, Any] = {}
        with contextlib.suppress(pygame.error):  # a game without a gamepad
            pygame.joystick.init()

    @property
    def held(self) -> set[int]:
        """The keys now held."""
        return set(self._keys.values()) - {0}

    def clear(self) -> None:
        """Let go of everything."""
        self._keys.clear()

    def handle(self, event: Any) -> bool:
        """Take in one event; returns whether it was the start button."""
        pygame = self._pygame
        if event.type == pygame.JOYDEVICEADDED:
            with contextlib.suppress(pygame.error):
                self._joysticks[event.device_index] = pygame.joystick.Joystick(event.device_index)
        elif event.type == pygame.JOYDEVICEREMOVED:
            self.clear()
        elif event.type == pygame.JOYAXISMOTION and event.axis < 2:
            keys = ((pygame.K_LEFT, pygame.K_RIGHT), (pygame.K_UP, pygame.K_DOWN))[event.axis]
            self._keys[event.axis] = keys[0] if event.value < -0.5 else keys[1] if event.value > 0.5 else 0
        elif event.type == pygame.JOYHATMOTION:
            x, y = event.value
            self._keys[2] = {-1: pygame.K_LEFT, 1: pygame.K_RIGHT}.get(x, 0)
            self._keys[3] = {-1: pygame.K_DOWN, 1: pygame.K_UP}.get(y, 0)
        elif event.type in (pygame.JOYBUTTONDOWN, pygame.JOYBUTTONUP):
            down = event.type == pygame.JOYBUTTONDOWN
            key = dict(enumerate((pygame.K_UP, pygame.K_d, pygame.K_a, pygame.K_w, pygame.K_s, pygame.K_q))).get(
                event.button
            )
            if key is not None:
                self._keys[16 + event.button] = key if down else 0
            elif down and event.button == 7:
                return True
        return False
