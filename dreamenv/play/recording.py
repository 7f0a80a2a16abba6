"""What is played, kept: films of the window, and episodes in the dataset format."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dreamenv.artifacts import only_writer
from dreamenv.data.writer import COLUMNS, DatasetWriter
from dreamenv.errors import ConfigError
from dreamenv.video import check_film, save_video


class FilmRecorder:
    """Writes pictures, uint8 (H, W, 3), to an .mp4 or .gif while they come, in a thread of its own; see `save_video`.

    The file appears when `close` is called; a killed process leaves none rather than half of one.

    Args:
        path: where; its ending decides the format.
        fps: pictures per second.

    Raises:
        ConfigError: another ending.
    """

    def __init__(self, path: Path, fps: float) -> None:
        check_film(path)
        self.path, self.fps, self.count = path, fps, 0
        self._pictures: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=256)
        self._problem: Exception | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._write, name="film", daemon=True)
        self._thread.start()

    def add(self, picture: np.ndarray) -> None:
        """Append one picture; one of another size than the first is padded or cut at the right and the bottom."""
        self.count += 1
        if self._problem is None:
            self._pictures.put(picture)

    def close(self) -> Path | None:
        """Finish the file and return its path; None if nothing was added.

        Raises:
            ConfigError: it could not be written; there is no file then.
        """
        self._pictures.put(None)
        self._thread.join()
        if self._problem is not None:
            raise ConfigError(f"film {self.path}: could not be written ({self._problem}); choose another folder")
        return self.path if self.count else None

    def _write(self) -> None:
        coming = self._coming()
        try:
            save_video(self.path, coming, self.fps)
        except Exception as error:  # noqa: BLE001 - told by close(), in the thread that asked
            self._problem = error
            for _ in self._coming() if not self._ended else ():
                pass

    def _coming(self) -> Iterator[np.ndarray]:
        while (picture := self._pictures.get()) is not None:
            yield picture
        self._ended = True


class EpisodeRecorder:
    """Collects played steps and writes them as a dataset folder of one shard: see `dreamenv.data.writer`.

    Args:
        folder: where.
        world: "real" or "dream".
        facts: the game as the dataset's manifest describes it: `game`, `distribution_mode`, `max_steps`,
            `action_meanings`, `backend`.
        levels: the real game's level range.
    """

    def __init__(self, folder: Path, world: str, facts: dict[str, Any], levels: tuple[int, int]) -> None:
        self.folder, self.world = folder, world
        self._facts: dict[str, Any] = {
            **facts,
            "world": world,
            "policy": "played",
            "policy_mix": [["played", 1.0]],
            "start_level": levels[0],
            "num_levels": levels[1],
            "seed": 0,
            "num_envs": 1,
            "num_shards": 1,
        }
        self._rows: list[dict[str, Any]] = []
        self._fresh = True

    def __len__(self) -> int:
        """Steps so far."""
        return len(self._rows)

    def add(self, frame: Any, action: int, reward: float, ended: str, level: int) -> None:
        """Append one step: what was seen, done and earned, and why it ended the episode, if it did."""
        self._rows.append(
            {
                "frames": frame,
                "actions": action,
                "rewards": reward,
                "terminated": ended == "the end",
                "truncated": bool(ended) and ended != "the end",
                "first": self._fresh,
                "level_seeds": level,
                "policies": 0,
            }
        )
        self._fresh = bool(ended)

    def cut(self) -> None:
        """What comes next does not follow from what came before."""
        self._fresh = True

    def mark(self) -> tuple[int, bool]:
        """Where the recording stands, for `rewind`."""
        return len(self._rows), self._fresh

    def rewind(self, mark: tuple[int, bool]) -> None:
        """Forget what was added since `mark`."""
        del self._rows[mark[0] :]
        self._fresh = mark[1]

    def save(self) -> Path | None:
        """Write the folder and return it; None if there was no step."""
        if not self._rows:
            return None
        columns = {
            name: np.stack([np.asarray(row[name], dtype) for row in self._rows]).reshape(-1, *shape)
            for name, (dtype, shape) in COLUMNS.items()
        }
        with only_writer(self.folder):
            writer = DatasetWriter(self.folder, self._facts | {"steps": len(self._rows), "seq_len": len(self._rows)})
            writer.commit(writer.write_shard(0, columns))
        return self.folder
