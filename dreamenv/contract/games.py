"""THE table of the 16 Procgen games: limits, rewards, scores, what actions do, what a picture shows, which recipe.

Step limits and rewards were read from the game sources of procgen 0.10 (`procgen/src/games/*.cpp`), score ranges
from Cobbe et al. 2020 (arXiv 1912.01588), appendix C. Views follow from `basic-abstract-game.cpp` and were measured
against how pictures move (`tests/envs/test_camera.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dreamenv.config import check, unknown
from dreamenv.contract.actions import NAMES, NUM_ACTIONS

_MOVE = {n: f"move {n}" for n in ("left", "right", "up", "down", "left+down", "left+up", "right+down", "right+up")}
_PLATFORM = {
    "left": "run left",
    "right": "run right",
    "up": "jump",
    "left+up": "jump left",
    "right+up": "jump right",
    "left+down": "run left",
    "right+down": "run right",
}
_TURN = {"left": "turn left", "right": "turn right", "up": "thrust forward", "down": "thrust backward"}
_TURN |= {f"{a}+{b}": f"{_TURN[a]} and {_TURN[b]}" for a in ("left", "right") for b in ("up", "down")}


@dataclass(frozen=True)
class View:
    """What a picture shows of a level; the picture is always square.

    Attributes:
        tiles: difficulty -> tiles that a picture shows each way.
        scrolls: whether the camera moves, (x, y), in easy and hard mode.
        player: difficulty -> where the player's middle is in the picture, in parts of its width and height; nan in a
            direction in which it moves about. Empty where nothing scrolls.
        level: difficulty -> the level's width and height in tiles. Empty where nothing scrolls.
        tail: bytes of the game's own that its saved state holds after the level's tiles; the drawing state, from which
            `envs.states.camera_of` reads the camera, lies before these.
    """

    tiles: dict[str, int]
    scrolls: tuple[bool, bool] = (False, False)
    player: dict[str, tuple[float, float]] = field(default_factory=dict)
    level: dict[str, tuple[int, int]] = field(default_factory=dict)
    tail: int = 0

    def camera(self, mode: str) -> bool:
        """Whether the camera moves in this difficulty, and where it is can be read."""
        return any(self.scrolls) and mode in self.level

    def has(self, what: str, mode: str) -> bool:
        """Whether "camera" is known, or "player" is at a fixed place in the picture, in this difficulty."""
        if what == "player":
            return mode in self.player and not any(math.isnan(p) for p in self.player[mode])
        return what == "camera" and self.camera(mode)


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
        view: what a picture shows of a level.
        recipe: by which `trainers.pipeline` makes its bundle, see `trainers/recipes`.
        published: figures that others published of their models of it, by the name of our figure that is nearest. They
            are of other levels, players and renderings, so they say what is usual and no more.
        death: whether an episode that ends without a reward has ended in the player's death. In heist and maze only the
            goal ends one, in plunder the time does.
    """

    name: str
    max_steps: int
    rewards: tuple[float, ...]
    easy: tuple[float, float]
    hard: tuple[float, float]
    meanings: tuple[str, ...]
    bias: tuple[float, ...]
    view: View
    recipe: str
    published: dict[str, str]
    death: bool

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
    check(
        num_levels > 0 or start_level == 0,
        f"start_level {start_level} is ignored by Procgen when num_levels is 0: give num_levels >= 1",
    )
    check(
        isinstance(distribution_mode, str) and distribution_mode in game.distribution_modes,
        f"distribution_mode {distribution_mode!r}: {game.name} has {', '.join(game.distribution_modes)}",
    )


# fmt: off
_MIDDLE, _NAN = (0.5, 0.5), float("nan")
_STILL = {
    "bigfish": (20, 20), "bossfight": (20, 20), "chaser": (11, 13, 19), "dodgeball": (20, 20, 20), "heist": (9, 13),
    "leaper": (9, 15, 20), "maze": (15, 25), "miner": (10, 20), "plunder": (20, 20), "starpilot": (16, 16, 16),
}
_VIEWS: dict[str, View] = {
    name: View(dict(zip(("easy", "hard", "extreme"), tiles, strict=False))) for name, tiles in _STILL.items()
} | {
    "coinrun": View({"easy": 13, "hard": 13}, (True, True), {"easy": _MIDDLE, "hard": _MIDDLE},
                    {"easy": (64, 64), "hard": (64, 64)}, 28),
    "ninja": View({"easy": 10, "hard": 16}, (True, True), {"easy": _MIDDLE, "hard": _MIDDLE},
                  {"easy": (64, 64), "hard": (64, 64)}, 32),
    "jumper": View({"easy": 12, "hard": 16, "memory": 16}, (True, True),
                   {"easy": _MIDDLE, "hard": _MIDDLE, "memory": _MIDDLE},
                   {"easy": (20, 20), "hard": (40, 40), "memory": (45, 45)}, 28),
    "caveflyer": View({"easy": 10, "hard": 16, "memory": 16}, (True, True),
                      {"easy": _MIDDLE, "hard": _MIDDLE, "memory": _MIDDLE},
                      {"easy": (30, 30), "hard": (40, 40), "memory": (60, 60)}, 0),
    "climber": View({"easy": 16, "hard": 20}, (False, True), {"easy": (_NAN, 0.84375), "hard": (_NAN, 0.875)},
                    {"easy": (16, 64), "hard": (20, 64)}, 28),
    "fruitbot": View({"easy": 10, "hard": 20}, (False, True), {"easy": (_NAN, 0.92), "hard": (_NAN, 0.96)},
                     {"easy": (10, 60), "hard": (20, 60)}, 12),
}
_RECIPES: dict[str, str] = {"coinrun": "patches"}  # of those whose best is not canvas
_NO_DEATH = ("heist", "maze", "plunder")
_PUBLISHED: dict[str, dict[str, str]] = {
    # GenieRedux: Kazemi et al. 2024 (arXiv 2409.06445), who measured Jafar (Willi et al. 2024) too
    # WorldGym: Quevedo et al. 2025, of policies for robots
    "coinrun": {
        "random_psnr_frames": "GenieRedux, guided: 38.31; Jafar: 12.66",
        "random_one_frame_psnr_frames": "GenieRedux, guided: 34.44",
        "autoencoder_psnr": "GenieRedux tokenizer: 38.25",
        "delta_psnr_4": "GenieRedux: 1.89",
        "closed_loop_pearson": "WorldGym: 0.78",
    }
}
_RIGHTWARD = {"right": 4.0, "right+up": 5.0, "up": 1.0, "left": 0.6, "left+up": 0.6, "noop": 0.3}
_FIRE = {"d": "fire"}
_ACTIONS: dict[str, tuple[dict[str, str], dict[str, float]]] = {  # what they do, and the biased player's weights
    "bigfish": (_MOVE, {}),
    "bossfight": (_MOVE | _FIRE, {"d": 4.0}),
    "caveflyer": (_TURN | _FIRE, {"up": 4.0, "d": 2.0}),
    "chaser": (_MOVE, {}),
    "climber": (_PLATFORM, {"up": 3.0, "left+up": 3.0, "right+up": 3.0}),
    "coinrun": (_PLATFORM | {"down": "drop through a crate"}, _RIGHTWARD | {"down": 0.1}),
    "dodgeball": (_MOVE | {"d": "throw a ball"}, {"d": 3.0}),
    "fruitbot": ({"left": "move left", "right": "move right", "d": "throw a key"}, {"left": 3.0, "right": 3.0}),
    "heist": (_MOVE, {}),
    "jumper": (_PLATFORM, {"left+up": 3.0, "right+up": 3.0, "up": 2.0}),
    "leaper": (_MOVE, {"up": 5.0}),
    "maze": (_MOVE, {}),
    "miner": (_MOVE, {}),
    "ninja": (_PLATFORM | {"d": "throw ahead", "a": "throw ahead and up", "w": "throw up", "s": "throw ahead and down"},
              _RIGHTWARD),
    "plunder": ({"left": "move left", "right": "move right", "d": "fire"}, {"d": 3.0}),
    "starpilot": (_MOVE | {"d": "fire forward", "a": "fire backward"}, {"d": 4.0}),
}
_TABLE = (  # step limit, rewards, score range in easy and in hard mode
    ("bigfish", 6000, (1, 10), (1, 40), (0, 40)),
    ("bossfight", 4000, (1, 10), (0.5, 13), (0.5, 13)),
    ("caveflyer", 1000, (3, 10), (3.5, 12), (2, 13.4)),
    ("chaser", 1000, (0.04, 10), (0.5, 13), (0.5, 14.2)),
    ("climber", 1000, (1, 10), (2, 12.6), (1, 12.6)),
    ("coinrun", 1000, (10,), (5, 10), (5, 10)),
    ("dodgeball", 1000, (2, 10), (1.5, 19), (1.5, 19)),
    ("fruitbot", 1000, (-4, 1, 10), (-1.5, 32.4), (-0.5, 27.2)),
    ("heist", 1000, (10,), (3.5, 10), (2, 10)),
    ("jumper", 1000, (10,), (3, 10), (1, 10)),
    ("leaper", 500, (10,), (3, 10), (1.5, 10)),
    ("maze", 500, (10,), (5, 10), (4, 10)),
    ("miner", 1000, (1, 10), (1.5, 13), (1.5, 20)),
    ("ninja", 1000, (10,), (3.5, 10), (2, 10)),
    ("plunder", 4000, (1, 10), (4.5, 30), (3, 30)),
    ("starpilot", 1000, (1, 10), (2.5, 64), (1.5, 35)),
)
# fmt: on


def _row(
    name: str, max_steps: int, rewards: tuple[float, ...], easy: tuple[float, float], hard: tuple[float, float]
) -> Game:
    acts, bias = _ACTIONS[name]
    meanings = tuple(acts.get(n, "nothing") for n in NAMES)
    main = {meaning: action for action, meaning in reversed(acts.items())}  # the first action of each meaning
    weights = tuple(bias.get(n, 1.0 if n in main.values() else 0.1) for n in NAMES)
    recipe = _RECIPES.get(name, "canvas")
    published, death = _PUBLISHED.get(name, {}), name not in _NO_DEATH
    return Game(name, max_steps, rewards, easy, hard, meanings, weights, _VIEWS[name], recipe, published, death)


GAMES: dict[str, Game] = {row[0]: _row(*row) for row in _TABLE}
assert all(len(g.bias) == NUM_ACTIONS for g in GAMES.values())


def named(modes: Mapping[str, str]) -> str:
    """Games and the difficulty of each, in words: "ninja in easy, coinrun in hard"."""
    return ", ".join(f"{game} in {mode}" for game, mode in modes.items())


def get_game(name: str) -> Game:
    """Return the facts of one game.

    Raises:
        ConfigError: no such game; the nearest name is given.
    """
    if not isinstance(name, str) or name not in GAMES:
        raise unknown(f"game {name!r}: unknown", name, GAMES)
    return GAMES[name]
