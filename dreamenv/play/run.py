"""Play in a window, or film a game without one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dreamenv.bundle import Bundle, bundle_mode, bundled_agent, check_mode, load_bundle, resolve_bundle, short_name
from dreamenv.config import check
from dreamenv.evaluation.clips import parse_levels
from dreamenv.flow import SamplerConfig
from dreamenv.play.headless import film, parse_script
from dreamenv.play.session import Mode, Session
from dreamenv.play.window import Window


@dataclass(frozen=True)
class PlayConfig:
    """What is played, how it is dreamt, and what is filmed."""

    game: str = "coinrun"
    """Which embedded bundle dreams, or which game of a bundle of several."""
    bundle: Path | None = None
    """A bundle folder instead."""
    distribution_mode: str | None = None
    """Procgen's difficulty, which decides the embedded bundle; easy by default."""
    world: Mode = "both"
    """What is shown first."""
    scale: int = 6
    """Window pixels per game pixel."""
    fps: float = 15.0
    """Steps per second."""
    nfe: int = SamplerConfig.nfe
    """Network function evaluations per step."""
    solver: Literal["euler", "heun"] = "euler"
    """Euler or Heun."""
    temperature: float = 1.0
    """Scales the dream's noise."""
    guidance: float = 1.0
    """How far to push the dream towards the action; 1 is off, else each evaluation costs two."""
    device: str = "auto"
    """auto, cpu, cuda ..."""
    seed: int = 0
    """Decides levels, noise and the random policy."""
    agent: str | None = None
    """A saved agent's folder; by default the one that ships with the bundle."""
    player: str = "human"
    """Who begins: human, agent or random. Without a window the agent plays for a human, or
    the random policy where there is none."""
    levels: str = "0:10000"
    """first:last+1 level of the real game."""
    out: Path = Path("out/play")
    """Folder for films, recorded episodes and the saved moment."""
    headless: Path | None = None
    """Film to this .mp4 or .gif instead of opening a window."""
    steps: int = 300
    """How many to film."""
    actions: str | None = None
    """What to do in the film, e.g. "right*20,right+up*3"; else the player chooses."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(1 <= self.scale <= 32, f"scale {self.scale}: must be in 1..32")
        check(0 < self.fps <= 1000, f"fps {self.fps}: must be in 0..1000")
        worlds = get_args(Mode)
        check(self.world in worlds, f"world {self.world!r}: must be one of {', '.join(worlds)}")
        check(self.steps >= 1, f"steps {self.steps}: must be >= 1")

    @property
    def sampler(self) -> SamplerConfig:
        """How the dream is drawn."""
        return SamplerConfig(self.nfe, self.solver, self.temperature, self.guidance)


def run(config: PlayConfig) -> dict[str, Any]:
    """Open the window and play until it is closed, or film a game without one.

    Returns:
        Counts and rates, see `Window.figures` and `film`.

    Raises:
        ConfigError: no display, or an argument outside its range.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    sampler, levels = config.sampler, parse_levels(config.levels)
    folder = first = resolve_bundle(config.bundle, config.game, config.distribution_mode)
    check_mode(bundle_mode(folder, config.game), config.distribution_mode)
    script = None if config.actions is None else parse_script(config.actions)

    def open_session(folder: Path, game: str) -> Session:
        loaded: Bundle = load_bundle(folder, config.device, game=game)
        asked = (folder, game) == (first, config.game)  # what the menu opens has its own agent, and a person plays
        agent, player = (config.agent, config.player) if asked else (None, "human")
        shipped = bundled_agent(folder, game)
        known = agent != "bundled" or shipped is not None
        check(known, f"agent 'bundled': {folder} ships none; give an agent's folder")
        chosen = (None if shipped is None else str(shipped)) if agent in (None, "bundled") else agent
        players = ["human", *(["agent"] if chosen is not None else []), "random"]
        check(player in players, f"player {player!r}: must be one of {', '.join(players)}")
        session = Session(loaded, sampler, config.world, chosen, levels, config.seed)
        session.player = player
        return session

    if config.headless is None:
        return Window(open_session, folder, config.game, config.scale, config.fps, config.out).run()
    session = open_session(folder, config.game)
    if script is None and config.player == "human":  # nobody is at the controls
        session.player = "agent" if "agent" in session.players else "random"
    try:
        if config.world != "dream":
            session.load_real()
            session.new_start()
        return film(session, config.headless, config.steps, script, config.scale, config.fps, short_name(folder))
    finally:
        session.close()
