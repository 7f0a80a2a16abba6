"""What a game of Procgen saves of itself, as far as it is read or changed here."""

from __future__ import annotations

import re
import struct

import numpy as np

from dreamenv.contract.games import View
from dreamenv.errors import SnapshotError

_GENERATOR = re.compile(rb"(?:\d{1,10} ){624}\d")  # how the text of a std::mt19937 begins: its words, its position
_LENGTH = struct.Struct("<i")  # of each text, before it


def reseeded(state: bytes, seed: tuple[int, ...]) -> bytes:
    """A game's state with other random numbers to come; all else is as it was.

    Args:
        state: what the game saved.
        seed: decides the numbers; integers >= 0.

    Raises:
        SnapshotError: no random generator is found in it, as Procgen saves one on Linux.
    """
    parts, end = [], 0
    for i, found in enumerate(_GENERATOR.finditer(state)):
        begin = found.start() - _LENGTH.size
        length = _LENGTH.unpack_from(state, begin)[0] if begin >= end else -1
        old = state[found.start() : found.start() + max(length, 0)]
        if len(old) != length or not re.fullmatch(rb"[\d ]+", old):
            raise SnapshotError("state: a random generator is not as long as is said before it; use procgen 0.10.7")
        fresh = np.random.MT19937([*seed, i]).state["state"]
        text = " ".join(str(word) for word in [*fresh["key"], fresh["pos"]]).encode()
        parts += [state[end:begin], _LENGTH.pack(len(text)), text]
        end = found.start() + length
    if not parts:
        raise SnapshotError("state: no random generator found in it; use procgen 0.10.7 on Linux")
    return b"".join([*parts, state[end:]])


def camera_of(state: bytes, view: View, distribution_mode: str) -> tuple[float, float]:
    """Where the picture's top left corner lies, in tiles, x to the right and y downwards, of a game that scrolls.

    Args:
        state: what the game saved.
        view: what its pictures show; its `camera` must be known in this difficulty.
        distribution_mode: Procgen's difficulty.
    """
    columns, rows = view.level[distribution_mode]
    behind = 4 + view.tail + 4 * columns * rows + 12 + 24  # a mark, the game's own, the tiles, their numbers, this
    unit, extent, x, y = np.frombuffer(state, "<f4", 4, len(state) - behind)
    return x / unit, -extent - y / unit
