"""A window to play in: arrow keys, TAB between the dream and the real game, R for a new start, ESC to quit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from dreamenv.actions import NOOP, keys_to_action
from dreamenv.bundle import load_bundle, resolve_bundle
from dreamenv.config import check
from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig

_BAR = 46
_HELP = "arrows move, tab world, r restart, esc quit"


class _World:
    """One environment with its frame and score; the real one is made when first asked for."""

    def __init__(self, name: str, env: gym.Env, seed: int) -> None:
        self.name, self.env = name, env
        self.frame, _ = env.reset(seed=seed)
        self.total, self.step_count, self.over = 0.0, 0, ""

    def reset(self) -> None:
        self.frame, _ = self.env.reset()
        self.total, self.step_count, self.over = 0.0, 0, ""

    def act(self, action: int) -> None:
        if self.over:
            self.reset()
            return
        self.frame, reward, terminated, truncated, _ = self.env.step(action)
        self.total += float(reward)
        self.step_count += 1
        self.over = "the end" if terminated else "time is up" if truncated else ""


def pressed_action(pressed: set[int]) -> int:
    """Return the action of the largest key combination that is held down; no-op without one."""
    fits = [(len(keys), action) for keys, action in keys_to_action().items() if set(keys) <= pressed]
    return max(fits)[1] if fits else NOOP


def run(game: str, bundle: Path | None, world: Literal["dream", "real"], scale: int, fps: float, sampler: SamplerConfig,
        device: str, seed: int) -> dict[str, Any]:  # fmt: skip
    """Open the window and play until it is closed; returns the steps taken in each world.

    Raises:
        ConfigError: no display, or a scale or fps outside its range.
    """
    check(1 <= scale <= 32, f"scale {scale}: must be in 1..32")
    check(0 < fps <= 1000, f"fps {fps}: must be in 0..1000")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import pygame

    loaded = load_bundle(resolve_bundle(bundle, game), device)
    facts = loaded.game
    try:
        pygame.display.init()
        window = pygame.display.set_mode((64 * scale, 64 * scale + _BAR))
    except pygame.error as error:
        raise ConfigError(f"display: none to open a window on ({error}); use 'dreamenv demo' for a film instead") from None
    pygame.font.init()
    font = pygame.font.Font(None, 20)
    pygame.display.set_caption(f"dreamenv: {facts.name}")

    worlds: dict[str, _World] = {}
    steps = {"dream": 0, "real": 0}

    def enter(name: str) -> _World:
        if name not in worlds:
            if name == "dream":
                env = gym.make("dreamenv:DreamProcgen-v0", bundle=loaded, sampler=sampler)
            else:
                env = gym.make("envs:RealProcgen-v0", game=facts.name, distribution_mode=facts.distribution_mode)
            worlds[name] = _World(name, env, seed)
        return worlds[name]

    now = enter(world)
    clock = pygame.time.Clock()
    pressed: set[int] = set()
    tapped: set[int] = set()  # a key pressed and released between two frames still counts once
    try:
        while True:
            for event in pygame.event.get():
                if event.type == pygame.QUIT or (event.type == pygame.KEYDOWN and event.key == pygame.K_ESCAPE):
                    return steps
                if event.type == pygame.KEYDOWN:
                    pressed.add(event.key)
                    tapped.add(event.key)
                    if event.key == pygame.K_TAB:
                        now = enter("real" if now.name == "dream" else "dream")
                    elif event.key == pygame.K_r:
                        now.reset()
                elif event.type == pygame.KEYUP:
                    pressed.discard(event.key)
            now.act(pressed_action(pressed | tapped))
            tapped.clear()
            steps[now.name] += 1
            picture = pygame.surfarray.make_surface(np.ascontiguousarray(now.frame.swapaxes(0, 1)))
            window.blit(pygame.transform.scale(picture, (64 * scale, 64 * scale)), (0, 0))
            window.fill((20, 20, 20), (0, 64 * scale, 64 * scale, _BAR))
            state = f"{now.name}   step {now.step_count}   reward {now.total:g}   {now.over}"
            for line, (text, shade) in enumerate(((state, 230), (_HELP, 150))):
                window.blit(font.render(text, True, (shade, shade, shade)), (8, 64 * scale + 6 + 20 * line))
            pygame.display.flip()
            clock.tick(fps)
    finally:
        for one in worlds.values():
            one.env.close()
        pygame.quit()
