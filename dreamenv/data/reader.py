"""Memory-mapped reading of dataset folders; damaged ones are refused by the name of the damaged file."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamenv.artifacts import checksum, open_array, present, read_json, sha256_file
from dreamenv.data.manifest import OPTIONAL, games_of, read_manifest
from dreamenv.data.writer import COLUMNS
from dreamenv.errors import DatasetError

_HEADER = 4096  # bytes; more than any .npy file of ours begins with


@dataclass(frozen=True)
class Shard:
    """Memory-mapped columns of one shard, the optional ones in `columns`; see `dreamenv.data.writer`."""

    name: str
    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    first: np.ndarray
    level_seeds: np.ndarray
    policies: np.ndarray
    columns: dict[str, np.ndarray]
    game: str = ""

    def __len__(self) -> int:
        """Steps in the shard."""
        return len(self.actions)


class Dataset:
    """A complete dataset folder, opened read-only.

    Args:
        folder: where `manifest.json` is.
        verify: "size" checks every file's header and length (fast); "sha256" also every byte.

    Attributes:
        manifest: the parsed manifest.
        facts: how it was collected (game, levels, policy mix ...).
        games: names of its games, usually one.
        shards: list of `Shard`.

    Raises:
        DatasetError: missing, incomplete, truncated, altered, or of another format; names the file.
    """

    def __init__(self, folder: str | Path, verify: str = "size") -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            have, all_shards = len(self.manifest["shards"]), self.manifest["facts"]["num_shards"]
            raise DatasetError(
                f"{self.folder / 'manifest.json'}: {have} of {all_shards} shards; "
                "run the same collection again to finish it"
            )
        self.facts: dict[str, Any] = self.manifest["facts"]
        self.games = games_of(self.manifest)
        if verify == "sha256":  # before any of it is parsed
            with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
                list(pool.map(self._check_bytes, self.manifest["shards"]))
        # one by one: NumPy parses each header as Python source, which CPython 3.11 cannot do in two threads at once
        self.shards = [self._open(entry) for entry in self.manifest["shards"]]

    def facts_of(self, game: str) -> dict[str, Any]:
        """What is known of one of its games: `max_steps`, `action_meanings`, `distribution_mode` ..."""
        return self.facts | self.facts.get("games", {}).get(game, {})

    @property
    def modes(self) -> dict[str, str]:
        """The difficulty of each of its games, in order."""
        return {game: self.facts_of(game).get("distribution_mode", "") for game in self.games}

    def __len__(self) -> int:
        """Steps in the dataset."""
        return sum(len(s) for s in self.shards)

    def _check_bytes(self, entry: dict[str, Any]) -> None:
        for name in (*COLUMNS, *self.manifest["columns"]):
            path = self.folder / entry["name"] / f"{name}.npy"
            dtype, shape = (COLUMNS | OPTIONAL)[name]
            size = entry["steps"] * np.dtype(dtype).itemsize * math.prod(shape)
            if not path.is_file() or not 0 <= path.stat().st_size - size <= _HEADER:
                raise DatasetError(f"{path}: missing, or not of its {size} bytes; collect the dataset again")
            if sha256_file(path) != entry["sha256"].get(name):
                raise DatasetError(f"{path}: sha256 differs from manifest.json; collect the dataset again")

    def _open(self, entry: dict[str, Any]) -> Shard:
        settings = self.folder / entry["name"] / "shard.json"
        if present(settings):  # not in older or merged ones
            made = read_json(settings, DatasetError, "collect the dataset again").get("settings")
            if made != checksum(self.facts):
                raise DatasetError(f"{settings.parent}: was collected with other settings; collect the dataset again")
        columns = {}
        optional = self.manifest["columns"]
        for name, (dtype, shape) in (COLUMNS | {n: OPTIONAL[n] for n in optional}).items():
            path = self.folder / entry["name"] / f"{name}.npy"
            column = open_array(path, DatasetError, "delete the shard and its manifest entry, or collect again")
            if column.dtype != dtype or column.shape != (entry["steps"], *shape):
                raise DatasetError(
                    f"{path}: holds {column.dtype} {column.shape}, the manifest says {dtype} "
                    f"{(entry['steps'], *shape)}; collect the dataset again"
                )
            columns[name] = column
        further = {name: columns.pop(name) for name in optional}
        return Shard(entry["name"], **columns, columns=further, game=entry.get("game", self.games[0]))
