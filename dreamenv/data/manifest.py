"""`manifest.json`: what a dataset folder says of itself, checked before anything is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamenv.artifacts import read_json
from dreamenv.errors import DatasetError

FORMAT_VERSION = 3
OPTIONAL: dict[str, tuple[str, tuple[int, ...]]] = {"camera": ("float32", (2,)), "contingent": ("uint8", (512,))}
"""What a dataset may have besides what every one has, dtype and shape of a step; its manifest names them."""
_COLUMNS_OF_2 = ["camera"]  # version 2 had this one in every dataset
_REMEDY = "collect the dataset again"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a manifest whose structure is sound; it may be incomplete.

    Raises:
        DatasetError: missing, not JSON, of another format, or with entries that contradict one another.
    """
    path = folder / "manifest.json"
    manifest = read_json(path, DatasetError, "collect one with: python -m envs.collect")
    version = manifest.get("format_version")
    if version == 2:
        manifest = {**manifest, "columns": _COLUMNS_OF_2}
    elif version != FORMAT_VERSION:
        raise DatasetError(f"{path}: format_version {version!r}; this release reads 2 and {FORMAT_VERSION}; {_REMEDY}")
    columns = manifest.get("columns")
    if not isinstance(columns, list) or not set(map(str, columns)) <= set(OPTIONAL):
        raise DatasetError(f"{path}: columns {columns!r}: there are {', '.join(OPTIONAL)}; {_REMEDY}")
    facts, shards = manifest.get("facts"), manifest.get("shards")
    if not isinstance(facts, dict) or not isinstance(shards, list) or type(facts.get("num_shards")) is not int:
        raise DatasetError(f"{path}: facts, facts.num_shards or shards is missing or of another type; {_REMEDY}")
    for entry in shards:
        sound = (
            isinstance(entry, dict) and isinstance(entry.get("sha256"), dict) and isinstance(entry.get("rewards"), dict)
        )
        counts = [entry.get(k) for k in ("index", "steps", "episodes")] if sound else []
        if not sound or not all(type(n) is int and 0 <= n < 2**48 for n in counts):
            raise DatasetError(f"{path}: a shard's entry is damaged; {_REMEDY}")
        if entry.get("name") != shard_name(entry["index"]):
            raise DatasetError(f"{path}: shard {entry['index']} is named {entry.get('name')!r}; {_REMEDY}")
    if "games" in facts:
        _check_games(path, facts["games"], shards, facts["num_shards"])
    indices = [entry["index"] for entry in shards]
    if indices != sorted(set(indices)) or any(not 0 <= i < facts["num_shards"] for i in indices):
        raise DatasetError(f"{path}: shard indices {indices[:8]} are not distinct and in order; {_REMEDY}")
    if manifest.get("steps") != sum(entry["steps"] for entry in shards):
        raise DatasetError(f"{path}: steps {manifest.get('steps')!r} is not the sum over its shards; {_REMEDY}")
    if manifest.get("complete") is not (len(shards) == facts["num_shards"]):
        raise DatasetError(
            f"{path}: complete {manifest.get('complete')!r} with {len(shards)} of {facts['num_shards']} "
            f"shards; {_REMEDY}"
        )
    return manifest


def _check_games(path: Path, games: Any, shards: list[dict[str, Any]], whole: int) -> None:
    """Raise `DatasetError` unless each game's facts are there, and when all `whole` shards are there, some of each."""
    sound = isinstance(games, dict) and games and all(isinstance(g, dict) for g in games.values())
    if not sound or not all(type(g.get("max_steps")) is int and g["max_steps"] >= 1 for g in games.values()):
        raise DatasetError(f"{path}: facts.games {str(games)[:80]} is not what is known of each game; {_REMEDY}")
    named = [entry.get("game") for entry in shards]
    for entry, game in zip(shards, named, strict=True):
        if not isinstance(game, str) or game not in games:
            raise DatasetError(f"{path}: {entry['name']} is of game {game!r}, not of {', '.join(games)}; {_REMEDY}")
    missing = [game for game in games if game not in named]
    if missing and len(shards) == whole:
        raise DatasetError(f"{path}: no shard is of {', '.join(missing)}; {_REMEDY}")


def games_of(manifest: dict[str, Any]) -> tuple[str, ...]:
    """The games of a dataset, in the order in which a model of several counts them."""
    facts = manifest["facts"]
    return tuple(facts["games"]) if "games" in facts else (str(facts.get("game")),)


def shard_name(index: int) -> str:
    """Folder name of one shard."""
    return f"shard-{index:05d}"
