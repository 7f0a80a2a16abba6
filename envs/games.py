"""The 16 Procgen games: step limits, rewards, score ranges, and what the actions do.

Step limits and rewards were read from the game sources of procgen 0.10 (`procgen/src/games/*.cpp`), score ranges
from Cobbe et al. 2020 (arXiv 1912.01588), appendix C.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dreamenv.actions import NAMES, NUM_ACTIONS
from dreamenv.config import check
from dreamenv.errors import ConfigError

_MOVE = {n: f"move {n}" for n in ("left", "right", "up", "down", "left+down", "left+up", "right+down", "right+up")}
_PLATFORM = {
    "left": "run left", "right": "run right", "up": "jump", "left+up": "jump left", "right+up": "jump right",
    "left+down": "run left", "right+down": "run right",
}  # fmt: skip
_TURN = {"left": "turn left", "right": "turn right", "up": "thrust forward", "down": "thrust backward"}
_TURN |= {f"{a}+{b}": f"{_TURN[a]} and {_TURN[b]}" for a in ("left", "right") for b in ("up", "down")}


@dataclass(frozen=True)
class Game:
    """What is fixed about one Procgen game.

    Attributes:
        name: Procgen's name.
        max_steps: step limit; reaching it truncates the episode.
        rewards: every non-zero reward one event can give (events in one step add up).
        easy: (min, max) return used to normalise scores in easy mode.
        hard: the same in hard mode.
        meanings: what each of the 15 actions does; "nothing" where the game ignores it.
        bias: unnormalised weights of actions for the game-biased exploration policy.
    """

    name: str
    max_steps: int
    rewards: tuple[float, ...]
    easy: tuple[float, float]
    hard: tuple[float, float]
    meanings: tuple[str, ...]
    bias: tuple[float, ...]

    @property
    def distribution_modes(self) -> tuple[str, ...]:
        """The difficulties this game has; Procgen ends the process on any other."""
        extra = {"extreme": _EXTREME, "memory": _MEMORY}
        return ("easy", "hard", *(mode for mode, games in extra.items() if self.name in games))


_EXTREME = ("chaser", "dodgeball", "leaper", "starpilot")
_MEMORY = ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner")
SEED_LIMIT = 2**31 - 1
"""Procgen's level seeds and rand_seed are signed 32-bit integers."""


def check_levels(game: Game, start_level: int, num_levels: int, distribution_mode: str) -> None:
    """Raise `ConfigError` unless Procgen takes these options (it ends the process on some that it does not)."""
    for name, value in (("start_level", start_level), ("num_levels", num_levels)):
        check(isinstance(value, int) and not isinstance(value, bool), f"{name} {value!r}: must be an integer")
    check(0 <= start_level <= SEED_LIMIT, f"start_level {start_level}: must be in 0..{SEED_LIMIT}")
    check(0 <= num_levels <= SEED_LIMIT - start_level, f"num_levels {num_levels}: the range leaves 32 bits")
    check(num_levels > 0 or start_level == 0,
          f"start_level {start_level} is ignored by Procgen when num_levels is 0: give num_levels >= 1")
    check(distribution_mode in game.distribution_modes,
          f"distribution_mode {distribution_mode!r}: {game.name} has {', '.join(game.distribution_modes)}")


def _game(name: str, max_steps: int, rewards: tuple[float, ...], easy: tuple[float, float], hard: tuple[float, float],
          acts: dict[str, str], bias: dict[str, float]) -> Game:  # fmt: skip
    meanings = tuple(acts.get(n, "nothing") for n in NAMES)
    main = {meaning: name for name, meaning in reversed(acts.items())}  # the first action of each meaning
    weights = tuple(bias.get(n, 1.0 if n in main.values() else 0.1) for n in NAMES)
    return Game(name, max_steps, rewards, easy, hard, meanings, weights)


_RIGHTWARD = {"right": 4.0, "right+up": 5.0, "up": 1.0, "left": 0.6, "left+up": 0.6, "noop": 0.3}
_FIRE = {"d": "fire"}
GAMES: dict[str, Game] = {
    g.name: g
    for g in (
        _game("bigfish", 6000, (1, 10), (1, 40), (0, 40), _MOVE, {}),
        _game("bossfight", 4000, (1, 10), (0.5, 13), (0.5, 13), _MOVE | _FIRE, {"d": 4.0}),
        _game("caveflyer", 1000, (3, 10), (3.5, 12), (2, 13.4), _TURN | _FIRE, {"up": 4.0, "d": 2.0}),
        _game("chaser", 1000, (0.04, 10), (0.5, 13), (0.5, 14.2), _MOVE, {}),
        _game("climber", 1000, (1, 10), (2, 12.6), (1, 12.6), _PLATFORM, {"up": 3.0, "left+up": 3.0, "right+up": 3.0}),
        _game("coinrun", 1000, (10,), (5, 10), (5, 10), _PLATFORM | {"down": "drop through a crate"},
              _RIGHTWARD | {"down": 0.1}),
        _game("dodgeball", 1000, (2, 10), (1.5, 19), (1.5, 19), _MOVE | {"d": "throw a ball"}, {"d": 3.0}),
        _game("fruitbot", 1000, (-4, 1, 10), (-1.5, 32.4), (-0.5, 27.2),
              {"left": "move left", "right": "move right", "d": "throw a key"}, {"left": 3.0, "right": 3.0}),
        _game("heist", 1000, (10,), (3.5, 10), (2, 10), _MOVE, {}),
        _game("jumper", 1000, (10,), (3, 10), (1, 10), _PLATFORM, {"left+up": 3.0, "right+up": 3.0, "up": 2.0}),
        _game("leaper", 500, (10,), (3, 10), (1.5, 10), _MOVE, {"up": 5.0}),
        _game("maze", 500, (10,), (5, 10), (4, 10), _MOVE, {}),
        _game("miner", 1000, (1, 10), (1.5, 13), (1.5, 20), _MOVE, {}),
        _game("ninja", 1000, (10,), (3.5, 10), (2, 10),
              _PLATFORM | {"d": "throw ahead", "a": "throw ahead and up", "w": "throw up", "s": "throw ahead and down"},
              _RIGHTWARD),
        _game("plunder", 4000, (1, 10), (4.5, 30), (3, 30),
              {"left": "move left", "right": "move right", "d": "fire"}, {"d": 3.0}),
        _game("starpilot", 1000, (1, 10), (2.5, 64), (1.5, 35),
              _MOVE | {"d": "fire forward", "a": "fire backward"}, {"d": 4.0}),
    )
}  # fmt: skip
assert all(len(g.bias) == NUM_ACTIONS for g in GAMES.values())


def get_game(name: str) -> Game:
    """Return the facts of one game.

    Raises:
        ConfigError: no such game; the nearest name is given.
    """
    if not isinstance(name, str) or name not in GAMES:
        near = difflib.get_close_matches(str(name), GAMES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"game {name!r}: unknown; did you mean {near!r}? There are: {', '.join(GAMES)}")
    return GAMES[name]
