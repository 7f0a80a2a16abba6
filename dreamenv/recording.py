"""What is played, kept: films of the window, and episodes in the dataset format."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np

from dreamenv.artifacts import atomic_file
from dreamenv.config import check
from dreamenv.data.writer import COLUMNS, DatasetWriter
from dreamenv.errors import ConfigError


class FilmRecorder:
    """Writes pictures, uint8 (H, W, 3) of one size, to an .mp4 or .gif while they come, in a thread of its own.

    The file appears when `close` is called; a killed process leaves none rather than half of one.

    Args:
        path: where; its ending decides the format.
        fps: pictures per second.

    Raises:
        ConfigError: another ending.
    """

    def __init__(self, path: Path, fps: float) -> None:
        check(path.suffix in (".mp4", ".gif"), f"film {path}: must end in .mp4 or .gif")
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
        try:
            first = self._next()
            if first is None:
                return
            shape = (first.shape[0] // 2 * 2, first.shape[1] // 2 * 2)  # H.264 has no odd sizes
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path) as temporary:
                (self._gif if self.path.suffix == ".gif" else self._mp4)(temporary, first, shape)
        except Exception as error:  # noqa: BLE001 - told by close(), in the thread that asked
            self._problem = error
            while not self._ended:
                self._next()

    def _next(self) -> np.ndarray | None:
        picture = self._pictures.get()
        self._ended = picture is None
        return picture

    def _fitted(self, first: np.ndarray, shape: tuple[int, int]) -> Any:
        picture: np.ndarray | None = first
        while picture is not None:
            fitted = np.zeros((*shape, 3), np.uint8)
            h, w = min(shape[0], picture.shape[0]), min(shape[1], picture.shape[1])
            fitted[:h, :w] = picture[:h, :w]
            yield fitted
            picture = self._next()

    def _mp4(self, temporary: Path, first: np.ndarray, shape: tuple[int, int]) -> None:
        import av

        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=round(self.fps))
            stream.height, stream.width = shape
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "18", "preset": "ultrafast"}
            for picture in self._fitted(first, shape):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))

    def _gif(self, temporary: Path, first: np.ndarray, shape: tuple[int, int]) -> None:
        from PIL import Image

        pictures = (Image.fromarray(p).quantize(256, dither=Image.Dither.NONE) for p in self._fitted(first, shape))
        head = next(pictures)
        head.save(temporary, format="gif", save_all=True, append_images=pictures, duration=round(1000 / self.fps), loop=0,
                  optimize=False)  # fmt: skip


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
            **facts, "world": world, "policy": "played", "policy_mix": [["played", 1.0]], "start_level": levels[0],
            "num_levels": levels[1], "seed": 0, "num_envs": 1, "num_shards": 1,
        }  # fmt: skip
        self._rows: list[dict[str, Any]] = []
        self._fresh = True

    def __len__(self) -> int:
        """Steps so far."""
        return len(self._rows)

    def add(self, frame: Any, action: int, reward: float, ended: str, level: int) -> None:
        """Append one step: what was seen, done and earned, and why it ended the episode, if it did."""
        self._rows.append({
            "frames": frame, "actions": action, "rewards": reward, "terminated": ended == "the end",
            "truncated": bool(ended) and ended != "the end", "first": self._fresh, "level_seeds": level, "policies": 0,
            "camera": (np.nan, np.nan),
        })  # fmt: skip
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
        columns = {name: np.stack([np.asarray(row[name], dtype) for row in self._rows]).reshape(-1, *shape)
                   for name, (dtype, shape) in COLUMNS.items()}  # fmt: skip
        writer = DatasetWriter(self.folder, self._facts | {"steps": len(self._rows), "seq_len": len(self._rows)})
        writer.commit(writer.write_shard(0, columns))
        return self.folder
