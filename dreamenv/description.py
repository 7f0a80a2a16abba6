"""bundle.json: what a bundle says of itself, read and checked without its networks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamenv.artifacts import read_json
from dreamenv.config import check, from_dict
from dreamenv.contract.games import get_game
from dreamenv.errors import BundleError, ConfigError
from dreamenv.models.migrations import bundle_from_1, bundle_from_2, bundle_from_3, bundle_from_4

FORMAT_VERSION = 5
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: bundle_from_1,
    2: bundle_from_2,
    3: bundle_from_3,
    4: bundle_from_4,
}
"""Version -> function that turns that version's description into the next one's, in memory."""
NETWORKS = ("codec", "dynamics", "head")
_REMEDY = "re-download or retrain"


@dataclass(frozen=True)
class GameFacts:
    """Which game a bundle is of; all else about it is in the table of games."""

    name: str
    """Procgen's name."""
    distribution_mode: str
    """Procgen's difficulty."""
    max_steps: int
    """Step limit; reaching it truncates."""

    def __post_init__(self) -> None:
        """Validate; raises `ConfigError`."""
        modes = get_game(self.name).distribution_modes
        check(
            self.distribution_mode in modes,
            f"distribution_mode {self.distribution_mode!r}: {self.name} has {', '.join(modes)}",
        )
        check(self.max_steps >= 1, f"max_steps {self.max_steps}: must be >= 1")

    @property
    def action_meanings(self) -> tuple[str, ...]:
        """What each of the 15 actions does."""
        return get_game(self.name).meanings


def part_names(games: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """The file of each part: ("weights", network), and ("starts" or "card", game)."""
    names = {("weights", n): f"{n}.safetensors" for n in NETWORKS}
    for game in games:
        mark = f"-{game}" if len(games) > 1 else ""
        names |= {("starts", game): f"starts{mark}.safetensors", ("card", game): f"card{mark}.json"}
    return names


def compute_identity(description: dict[str, Any]) -> str:
    """sha256 of all that decides what a bundle dreams: its description but for the cards, which are measurements."""
    kept = {k: v for k, v in description.items() if k != "identity"}
    if isinstance(kept.get("sha256"), dict):
        kept["sha256"] = {k: v for k, v in kept["sha256"].items() if not k.startswith("card")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_description(path: Path) -> dict[str, Any]:
    """Read bundle.json, the version first; older ones are migrated in memory and keep their identity."""
    description = read_json(path, BundleError, "is this a bundle folder? Re-download or retrain")
    version = description.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise BundleError(f"{path}: format_version {version!r} is not an integer; {_REMEDY}")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version {version} is newer than this release reads ({FORMAT_VERSION}); upgrade dreamenv"
        )
    if description.get("identity") != compute_identity(description):
        raise BundleError(f"{path}: its contents do not match its identity, it was altered; {_REMEDY}")
    description = {key: value for key, value in description.items() if key != "files"}  # migrations alone say that
    while version < FORMAT_VERSION:
        if version not in MIGRATIONS:
            raise BundleError(f"{path}: format_version {version} is too old to migrate; retrain")
        try:
            description = MIGRATIONS[version](description)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path}: is no bundle of version {version} ({error!r}); {_REMEDY}") from None
        version += 1
    return description


def described_games(description: dict[str, Any], path: Path) -> list[GameFacts]:
    """What a description, read from `path`, says of its games; raises `BundleError` if that is malformed."""
    try:
        facts = description["games"] if "games" in description else [description["game"]]
        if not isinstance(facts, list) or not facts:
            raise TypeError(f"games {str(facts)[:80]}: expected a list of facts")
        games = [from_dict(GameFacts, each, "game") for each in facts]
    except KeyError as error:
        raise BundleError(f"{path}: key {error} is missing; {_REMEDY}") from None
    except (ConfigError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from None
    names = [game.name for game in games]
    if len(set(names)) < len(names):
        raise BundleError(f"{path}: games {', '.join(names)}: one is named twice; {_REMEDY}")
    return games
