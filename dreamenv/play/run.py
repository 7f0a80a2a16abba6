"""Play in a window, or film a game without one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dreamenv.bundle import Bundle, bundled_agent, load_bundle, resolve_bundle, short_name
from dreamenv.config import check
from dreamenv.flow import SamplerConfig
from dreamenv.play.headless import film, parse_script
from dreamenv.play.session import Mode, Session
from dreamenv.play.window import Window


def run(
    game: str = "coinrun",
    bundle: Path | None = None,
    world: Mode = "both",
    scale: int = 6,
    fps: float = 15.0,
    sampler: SamplerConfig | None = None,
    device: str = "auto",
    seed: int = 0,
    agent: str | None = None,
    player: str = "human",
    levels: tuple[int, int] = (0, 10000),
    out: Path = Path("out/play"),
    headless: Path | None = None,
    steps: int = 300,
    actions: str | None = None,
) -> dict[str, Any]:
    """Open the window and play until it is closed, or film a game without one.

    Args:
        game: which embedded bundle dreams.
        bundle: a bundle folder instead.
        world: "both", "dream" or "real".
        scale: window pixels per game pixel.
        fps: steps per second.
        sampler: how the dream is drawn.
        device: "auto", "cpu" ...
        seed: decides levels, noise and chance.
        agent: a saved agent's folder; by default the bundle's own, if it ships one.
        player: who is at the controls: "human", "agent" or "random"; without a window a human is the bundle's agent, or
            chance where it ships none.
        levels: first level and number of levels.
        out: folder for films, recorded episodes and the saved moment.
        headless: film to this .mp4 or .gif instead of opening a window.
        steps: steps filmed.
        actions: what a person would do in the film, see `parse_script`.

    Returns:
        Counts and rates, see `Window.figures` and `film`.

    Raises:
        ConfigError: no display, or an argument outside its range.
    """
    check(1 <= scale <= 32, f"scale {scale}: must be in 1..32")
    check(0 < fps <= 1000, f"fps {fps}: must be in 0..1000")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

    def open_session(folder: Path) -> Session:
        loaded: Bundle = load_bundle(folder, device)
        shipped = bundled_agent(folder)
        check(
            agent != "bundled" or shipped is not None, f"agent 'bundled': {folder} ships none; give an agent's folder"
        )
        chosen = (None if shipped is None else str(shipped)) if agent in (None, "bundled") else agent
        session = Session(loaded, sampler, world, chosen, levels, seed)
        check(player in session.players, f"player {player!r}: must be one of {', '.join(session.players)}")
        session.player = player
        return session

    folder = resolve_bundle(bundle, game)
    if headless is None:
        return Window(open_session, folder, scale, fps, out).run()
    script = None if actions is None else parse_script(actions)
    session = open_session(folder)
    if script is None and player == "human":  # nobody is at the controls
        session.player = "agent" if "agent" in session.players else "random"
    try:
        if world != "dream":
            session.load_real()
            session.new_start()
        return film(session, headless, steps, script, scale, fps, short_name(folder))
    finally:
        session.close()
