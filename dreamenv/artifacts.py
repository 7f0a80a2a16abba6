"""Atomic files and folders: a killed process leaves the old artefact or the new one, never a half."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tokenize
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError

from dreamenv.errors import BusyError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")
JSON_LIMIT = 2**26
TENSORS_LIMIT = 2**33
_STORAGE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EISDIR,
    errno.EEXIST,
}
# NumPy parses a header as Python source
_BAD_HEADER = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    EOFError,
    OverflowError,
    MemoryError,
    RecursionError,
    tokenize.TokenError,
)


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn what the system says of a full disk or a folder that may not be written into a `StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        # NumPy's tofile knows no errno: "4096 requested and 0 written"
        if error.errno not in _STORAGE and not (error.errno is None and "written" in str(error)):
            raise
        reason = error.strerror or os.strerror(errno.ENOSPC)
        raise StorageError(
            f"{error.filename or path}: cannot be written ({reason}; {free_bytes(path) / 2**20:.0f} MiB are free "
            "there); make room, or choose a folder that may be written"
        ) from None


def check_same(where: Path, before: Mapping[str, Any], now: Mapping[str, Any], error: type[Exception]) -> None:
    """Raise `error` unless what a folder was begun with is what it is to go on with."""
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key):
            raise error(
                f"{where}: was begun with {key} = {before.get(key)!r}, now {now.get(key)!r}; use the same settings to "
                "resume, or another folder"
            )


def free_bytes(path: str | Path) -> int:
    """Bytes that are free where `path` is, or would be."""
    at = Path(path).absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    try:
        return shutil.disk_usage(at).free
    except OSError:
        return 0


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Hold a folder while writing it, by a lock beside it that ends with this process, however that ends.

    It is a POSIX record lock: forked workers do not inherit it. Where the system has none nothing is held.

    Raises:
        BusyError: another process, or another thread of this one, holds it.
        StorageError: the lock cannot be written.
    """
    folder = Path(folder).absolute()
    path = folder.with_name(f".{folder.name}.lock")
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = None if path in _held else _lock(path)
    if descriptor is None:
        raise BusyError(f"{folder}: another process is writing it; wait until that has ended, or choose another folder")
    _held.add(path)
    try:
        with storage_errors(folder):
            yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        _held.discard(path)


_held: set[Path] = set()


def _lock(path: Path) -> int | None:
    """Return the descriptor of a lock file that is now this process's, or None if it is another's."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # its holder removed the file between the opening and the locking


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` with the same ending; on success fsync it and rename it over `path`."""
    path = Path(path)
    temporary = path.with_name(f".partial.{path.name}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """Where the folder that was at `path` is between the two renames of a swap."""
    return path.with_name(f".{path.name}.replaced")


@contextmanager
def atomic_folder(path: Path, before: Path | None = None) -> Iterator[Path]:
    """Yield an empty temporary sibling folder; on success fsync its files and move it to `path`.

    An older folder at `path` is set aside first and removed last, so it survives a failure of the writer. Where
    `before` is given it is kept there instead.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.partial")
    aside = _aside(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise StorageError(f"{path}: is a file, no folder; choose another folder")
        recover_folder(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _fsync(file)
            _fsync(temporary)
            if path.exists():
                os.replace(path, aside)
            os.replace(temporary, path)
            _fsync(path.parent)
            if before is not None and aside.exists():
                shutil.rmtree(before, ignore_errors=True)
                os.replace(aside, before)
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Finish or undo an `atomic_folder` swap that was killed between its two renames; for the folder's writer only."""
    path = Path(path).absolute()
    aside = _aside(path)
    if aside.exists():
        if path.exists():
            shutil.rmtree(aside)
        else:
            os.replace(aside, path)


def readable_folder(path: str | Path) -> Path:
    """Where a reader finds a folder: at `path`, or set aside if its writer is, or was killed, between two renames."""
    path = Path(path).absolute()
    if not path.name:
        return path
    aside = _aside(path)
    try:
        return aside if aside.exists() and not path.exists() else path
    except (OSError, ValueError):  # a name that no file can have: opening it will say so
        return path


def read_file(path: Path, error: type[Exception], remedy: str, limit: int, sha256: str | None = None) -> bytes:
    """Read a whole file, before anything of it is believed.

    Args:
        path: a regular file, or a link to one.
        error: what to raise; the message names the file and the remedy.
        remedy: what the user can do.
        limit: bytes that it may have.
        sha256: hexadecimal digest that its bytes must have.

    Raises:
        error: missing, no regular file, too large, unreadable, or of another digest.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait otherwise
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise error(f"{path}: is no regular file; {remedy}")
            if facts.st_size > limit:
                raise error(f"{path}: has {facts.st_size} bytes, at most {limit} are read; {remedy}")
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise error(f"{path}: missing; {remedy}") from None
    except (OSError, ValueError) as problem:  # ValueError: a name that no file can have
        raise (
            problem if isinstance(problem, error) else error(f"{path}: cannot be read ({problem}); {remedy}")
        ) from None
    if len(data) > limit:
        raise error(f"{path}: has more than {limit} bytes; {remedy}")
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise error(f"{path}: sha256 differs from its description, it was altered; {remedy}")
    return data


def parse_json(data: bytes, path: Path | str, error: type[Exception], remedy: str) -> dict[str, Any]:
    """Parse a JSON object; raises `error`, which names the file and the remedy, where it is none."""
    try:
        value = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: is not JSON ({str(problem)[:200]}); {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: is not a JSON object; {remedy}")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def present(path: Path) -> bool:
    """Whether anything is at `path`, be it a broken link: what is optional is missing only where nothing is."""
    return os.path.lexists(path)


def read_json(path: Path, error: type[Exception], remedy: str) -> dict[str, Any]:
    """Read a JSON object; raises `error`, which names the file and the remedy, where there is none."""
    return parse_json(read_file(path, error, remedy, JSON_LIMIT), path, error, remedy)


def parse_tensors(
    load: Callable[[bytes], dict[str, T]], data: bytes, path: Path | str, error: type[Exception], remedy: str
) -> dict[str, T]:
    """Parse the bytes of a safetensors file by `load`, the library's own for torch or NumPy; raises `error`."""
    try:
        return load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, RuntimeError, MemoryError) as problem:
        raise error(f"{path}: is malformed ({type(problem).__name__}: {str(problem)[:200]}); {remedy}") from None


def open_array(path: Path, error: type[Exception], remedy: str) -> np.ndarray:
    """Map a .npy file into memory, read-only; raises `error` where it is none, or holds Python objects."""
    if path.exists() and not path.is_file():
        raise error(f"{path}: is no regular file; {remedy}")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise error(f"{path}: missing; {remedy}") from None
    except _BAD_HEADER as problem:
        raise error(f"{path}: truncated or altered ({str(problem)[:200]}); {remedy}") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused (they are not JSON)."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def checksum(value: Any) -> str:
    """sha256 of what is JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
