"""Dataset folders: `manifest.json` + `shard-00000/*.npy`, each shard renamed into place, the manifest last.

One shard holds E environments x T steps, or parts of them, environment-major and flat, so time runs along axis 0 within
a segment:

| file | dtype, shape | at index t |
|---|---|---|
| frames.npy | uint8 (S, 64, 64, 3) | the observation |
| actions.npy | uint8 (S,) | the action taken at it |
| rewards.npy | float32 (S,) | the reward that action earned |
| terminated.npy, truncated.npy | bool (S,) | whether that action ended the episode |
| first.npy | bool (S,) | an episode or a segment starts here: t - 1 is not its past |
| level_seeds.npy | int32 (S,) | the level being played |
| policies.npy | uint8 (S,) | which component of the policy mix acted |
| shard.json | | a digest of the settings that made the shard |
| camera.npy | float32 (S, 2) | the picture's top left corner in tiles, x right, y down; only of games that scroll |
| contingent.npy | uint8 (S, 512) | a bit of each pixel of the next frame, see below; only if asked for |

`contingent` says where one action of another meaning, drawn at random, showed another colour: row by row, the highest
bit first. It is 0 where either action ended the episode.

A terminal transition keeps its reward and flags; there is no next frame, because Procgen never shows one.

In a dataset of several games the manifest's facts have `games`, what is known of each by name, and each shard's entry
has the `game` that it is of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamenv.artifacts import atomic_folder, check_same, checksum, present, recover_folder, sha256_file, write_json
from dreamenv.data.manifest import FORMAT_VERSION, OPTIONAL, read_manifest, shard_name
from dreamenv.errors import DatasetError

COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "frames": ("uint8", (64, 64, 3)),
    "actions": ("uint8", ()),
    "rewards": ("float32", ()),
    "terminated": ("bool", ()),
    "truncated": ("bool", ()),
    "first": ("bool", ()),
    "level_seeds": ("int32", ()),
    "policies": ("uint8", ()),
}
"""What every dataset has."""


class DatasetWriter:
    """Writes shards of one dataset, in any order, and resumes a folder that was begun with the same facts.

    Args:
        folder: the dataset folder.
        facts: JSON-able description of the collection (game, levels, policy mix, seed, number of shards ...);
            it is stored in the manifest and must be equal for a resume.
        columns: which of `OPTIONAL` there are.

    Raises:
        DatasetError: the folder holds a dataset that was begun with other facts.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any], columns: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        self.facts = json.loads(json.dumps(facts))
        self.columns = COLUMNS | {name: OPTIONAL[name] for name in columns}
        self._optional = list(columns)
        self._shards: dict[int, dict[str, Any]] = {}
        if present(self.folder / "manifest.json"):
            old = read_manifest(self.folder)
            check_same(self.folder, old["facts"], self.facts, DatasetError)
            self._shards = {s["index"]: s for s in old["shards"]}

    @property
    def done(self) -> set[int]:
        """Indices of the shards that are complete on disk."""
        return set(self._shards)

    def write_shard(self, index: int, columns: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write one shard folder atomically and return its manifest entry (see `commit`).

        Raises:
            DatasetError: a column is missing or has another dtype or shape.
        """
        length = len(columns["frames"])
        for name, (dtype, shape) in self.columns.items():
            column = columns.get(name)
            if column is None or column.dtype != dtype or column.shape != (length, *shape):
                found = "nothing" if column is None else f"{column.dtype} {column.shape}"
                raise DatasetError(f"column {name}: expected {dtype} {(length, *shape)}, got {found}")
        path = self.folder / shard_name(index)
        with atomic_folder(path) as temporary:
            for name in self.columns:
                np.save(temporary / f"{name}.npy", columns[name], allow_pickle=False)
            write_json(temporary / "shard.json", {"settings": checksum(self.facts)})
            hashes = {name: sha256_file(temporary / f"{name}.npy") for name in self.columns}
        done = columns["terminated"] | columns["truncated"]
        values, counts = np.unique(columns["rewards"], return_counts=True)
        return {
            "index": index,
            "name": path.name,
            "steps": length,
            "episodes": int(done.sum()),
            "rewards": {repr(float(v)): int(c) for v, c in zip(values, counts, strict=True)},
            "levels": [int(columns["level_seeds"].min()), int(columns["level_seeds"].max())],
            "sha256": hashes,
        }

    def commit(self, entry: dict[str, Any]) -> None:
        """Add a written shard to the manifest, atomically."""
        self._shards[entry["index"]] = entry
        shards = [self._shards[i] for i in sorted(self._shards)]
        complete = len(shards) == self.facts["num_shards"]
        write_json(
            self.folder / "manifest.json",
            {
                "format_version": FORMAT_VERSION,
                "complete": complete,
                "columns": self._optional,
                "facts": self.facts,
                "steps": sum(s["steps"] for s in shards),
                "episodes": sum(s["episodes"] for s in shards),
                "reward_set": sorted({float(v) for s in shards for v in s["rewards"]}),
                "shards": shards,
            },
        )

    def recover(self) -> None:
        """Finish or undo shard swaps that a kill interrupted."""
        for index in range(self.facts["num_shards"]):
            recover_folder(self.folder / shard_name(index))
