"""The key by which this library knows the snapshots that this user's programs took.

A snapshot of the real game holds a memory image that Procgen takes over unchecked: a forged one ends the process. So
what is restored must be signed (HMAC, RFC 2104), or be trusted by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from functools import cache
from pathlib import Path

_SIZE = 32


@cache
def user_key() -> bytes:
    """The key of this user, made on first use, in `dreamenv/snapshot.key` of the user's configuration folder.

    Where there is no such folder, or it cannot be written, the key is this process's own.
    """
    try:
        config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        return _stored(Path(config) / "dreamenv" / "snapshot.key")
    except (OSError, RuntimeError):  # RuntimeError: nobody's home
        return os.urandom(_SIZE)


def _stored(path: Path) -> bytes:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.urandom(_SIZE))
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    with open(path, "rb") as file:
        key = file.read(_SIZE)
    if len(key) != _SIZE:
        raise OSError(f"{path}: is no key")
    return key


def sign(payload: bytes) -> bytes:
    """HMAC-SHA256 of a snapshot's payload, 32 bytes."""
    return hmac.new(user_key(), payload, hashlib.sha256).digest()


def signed(payload: bytes, signature: bytes) -> bool:
    """Whether this user's programs signed a payload."""
    return hmac.compare_digest(sign(payload), signature)
