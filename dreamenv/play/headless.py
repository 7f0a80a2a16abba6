"""A game without a window, played by a script, an agent or a random policy, filmed as the window would show it."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamenv.config import check
from dreamenv.contract.actions import NAMES, NOOP
from dreamenv.play.recording import FilmRecorder
from dreamenv.play.screen import Screen, View
from dreamenv.play.session import Session


def parse_script(script: str) -> list[int]:
    """Parse actions such as "right*20,right+up,noop*5" by the names of `dreamenv.contract.actions.NAMES`.

    Raises:
        ConfigError: an unknown action, or a count that is no integer in 1..100000.
    """
    actions: list[int] = []
    for part in script.split(","):
        name, star, times = part.strip().partition("*")
        check(name in NAMES, f"action {name!r} in {script!r}: there are {', '.join(NAMES)}")
        counted = not star or (times.isdecimal() and 1 <= int(times) <= 100000)
        check(counted, f"count {times!r} in {script!r}: must be in 1..100000")
        actions += [NAMES.index(name)] * (int(times) if star else 1)
    return actions


def film(
    session: Session,
    path: Path,
    steps: int,
    script: Sequence[int] | None = None,
    scale: int = 4,
    fps: float = 15.0,
    bundle_name: str = "",
) -> dict[str, Any]:
    """Play without a window and film what it would show.

    Args:
        session: both worlds; a real game still loading is not waited for.
        path: an .mp4 or .gif.
        steps: how many.
        script: actions, repeated from the start when they end; None lets the session's player choose.
        scale: window pixels per game pixel.
        fps: of the film.
        bundle_name: what the panel calls the bundle.

    Returns:
        The steps filmed, the path, and the rewards of the last episode.
    """
    check(steps >= 1, f"steps {steps}: must be >= 1")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import pygame

    recorder, screen = FilmRecorder(path, fps), Screen()
    surface = pygame.Surface(Screen.size(scale, len(session.shown)))
    uncertainty: deque[float] = deque(maxlen=150)
    began = time.perf_counter()
    if script:
        session.player = "human"
    try:
        for t in range(steps):
            moment = session.step(NOOP if not script else script[t % len(script)])
            uncertainty.append(moment.uncertainty)
            screen.draw(
                surface,
                View(
                    moment,
                    session.shown,
                    session.game,
                    bundle_name,
                    "script" if script else session.player,
                    session.sampler,
                    meanings=session.action_meanings,
                    target_fps=fps,
                    fps=(t + 1) / (time.perf_counter() - began),
                    uncertainty=list(uncertainty),
                    noisy=session.noisy,
                ),
            )
            recorder.add(pygame.surfarray.array3d(surface).swapaxes(0, 1))
    finally:
        written = recorder.close()
    return {"steps": steps, "film": str(written), "rewards": session.moment.rewards}
