"""Several datasets as one: `python -m dreamenv.data.merge data/a data/b --out data/ab`.

Columns are hard-linked where the file system can, else copied; only `policies.npy` is written anew, because its numbers
count the components of its own dataset's policy mix. Datasets of several games become one for a model of all of them:
each shard then says which game it is of.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from dreamenv.artifacts import atomic_folder, only_writer, sha256_file
from dreamenv.console import run_command_line
from dreamenv.data.manifest import shard_name
from dreamenv.data.reader import Dataset
from dreamenv.data.writer import DatasetWriter
from dreamenv.errors import DatasetError

SEVERAL = "several"
"""What the facts of a dataset of several games say in the place of a game."""
_OF_A_GAME = ("max_steps", "action_meanings", "distribution_mode")
_SAME = ("events", "most")


def merge(sources: list[Path], out: Path, several: bool = False) -> Path:
    """Merge complete datasets into the folder `out` and return it; a killed merge is finished by the same call.

    The result has the optional columns that all of them have.

    Args:
        sources: dataset folders.
        out: the new dataset folder.
        several: whether they may be of several games.

    Raises:
        DatasetError: a source is damaged, of another game, or imagined; or `out` holds something else.
    """
    datasets = _opened(sources, several)
    first = datasets[0].facts
    shards = [(dataset, entry) for dataset in datasets for entry in dataset.manifest["shards"]]
    ends = [d.facts["start_level"] + d.facts["num_levels"] for d in datasets]
    begin = min(d.facts["start_level"] for d in datasets)
    offsets = np.cumsum([0] + [len(d.facts["policy_mix"]) for d in datasets])
    if offsets[-1] > 256:
        raise DatasetError(f"merge: {offsets[-1]} policies in all; the format counts at most 256")
    total = sum(d.manifest["steps"] for d in datasets)
    facts: dict[str, Any] = {
        **_game_facts(datasets),
        **{key: first[key] for key in (*_SAME, "backend") if key in first},
        "start_level": begin,
        "num_levels": max(ends) - begin,
        "seed": 0,
        "policy": "merged",
        "num_shards": len(shards),
        "steps": total,
        "num_envs": 0,
        "shard_steps": 0,
        "seq_len": 0,
        "policy_mix": [[n, w * d.manifest["steps"] / total] for d in datasets for n, w in d.facts["policy_mix"]],
        "merged": [{"steps": d.manifest["steps"], "facts": d.facts} for d in datasets],
    }
    optional = [c for c in datasets[0].manifest["columns"] if all(c in d.manifest["columns"] for d in datasets)]
    with only_writer(out):
        _write(datasets, out, facts, optional, offsets)
    return out


def _write(datasets: list[Dataset], out: Path, facts: dict[str, Any], optional: list[str], offsets: np.ndarray) -> None:
    writer = DatasetWriter(out, facts, optional)
    writer.recover()
    index = 0
    for k, dataset in enumerate(datasets):
        for entry, shard in zip(dataset.manifest["shards"], dataset.shards, strict=True):
            if index not in writer.done:
                target = out / shard_name(index)
                with atomic_folder(target) as temporary:
                    for name in writer.columns:
                        if name != "policies":
                            _link(dataset.folder / entry["name"] / f"{name}.npy", temporary / f"{name}.npy")
                    policies = (shard.policies.astype(np.int64) + offsets[k]).astype(np.uint8)
                    np.save(temporary / "policies.npy", policies, allow_pickle=False)
                    digest = sha256_file(temporary / "policies.npy")
                kept = {name: entry["sha256"][name] for name in writer.columns}
                own = {"index": index, "name": target.name, "sha256": kept | {"policies": digest}}
                writer.commit(entry | own | ({"game": shard.game} if "games" in facts else {}))
            index += 1


def _game_facts(datasets: list[Dataset]) -> dict[str, Any]:
    """What the datasets' game is, or their games are."""
    games: dict[str, dict[str, Any]] = {}
    for dataset in datasets:
        shared = {key: dataset.facts[key] for key in _OF_A_GAME if key in dataset.facts}
        for name, own in dataset.facts.get("games", {dataset.games[0]: {}}).items():
            known = shared | own
            before = games.setdefault(name, known)
            for key in _OF_A_GAME:
                if before.get(key) != known.get(key):
                    raise DatasetError(
                        f"{dataset.folder}: {key} of {name} is {known.get(key)!r}, before it was {before.get(key)!r}; "
                        "merge datasets that were collected alike"
                    )
    if len(games) == 1 and not any("games" in dataset.facts for dataset in datasets):
        ((name, known),) = games.items()
        return {"game": name, **known}
    return {"game": SEVERAL, "games": games}


def _opened(sources: list[Path], several: bool) -> list[Dataset]:
    """The sources, if they belong together."""
    if not sources:
        raise DatasetError("merge: no datasets given; name one or more folders")
    datasets = [Dataset(source) for source in sources]
    first = datasets[0].facts
    for dataset in datasets:
        if not several and dataset.games != datasets[0].games:
            raise DatasetError(
                f"{dataset.folder}: is of {', '.join(dataset.games)}, {datasets[0].folder} of "
                f"{', '.join(datasets[0].games)}; say --several to make a dataset of several games"
            )
        for key in _SAME:
            if dataset.facts.get(key) != first.get(key):
                raise DatasetError(
                    f"{dataset.folder}: {key} is {dataset.facts.get(key)!r}, that of {datasets[0].folder} is "
                    f"{first.get(key)!r}; merge datasets that were collected alike"
                )
        _check_facts(dataset)
        if dataset.facts.get("world", "real") != "real":
            raise DatasetError(f"{dataset.folder}: holds imagined episodes; merge real ones")
    return datasets


def _check_facts(dataset: Dataset) -> None:
    """Raise `DatasetError` unless the manifest has what a merge needs of it."""
    facts, where = dataset.facts, dataset.folder / "manifest.json"
    for name in ("start_level", "num_levels"):
        if type(facts.get(name)) is not int or not 0 <= facts[name] < 2**31:
            raise DatasetError(f"{where}: {name} {facts.get(name)!r} is no number of levels; collect the dataset again")
    mix = facts.get("policy_mix")
    pairs = mix if isinstance(mix, list) and mix else [None]
    for pair in pairs:
        name, share = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if not isinstance(name, str) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise DatasetError(f"{where}: policy_mix {str(mix)[:80]} is no list of [name, share]; collect it again")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def main(sources: Annotated[list[Path], tyro.conf.Positional], out: Path, several: bool = False) -> None:
    """Merge datasets of one game, or of several.

    Args:
        sources: dataset folders.
        out: the new dataset folder.
        several: whether they may be of several games.
    """
    print(merge(sources, out, several))


if __name__ == "__main__":
    run_command_line(main)
