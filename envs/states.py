"""What a game of Procgen saves of itself, as far as it is read or changed here."""

from __future__ import annotations

import re
import struct

import numpy as np

from dreamenv.contract.games import View

_GENERATOR = re.compile(rb"(?:\d{1,10} ){624}\d{1,3}")  # the text of C++'s std::mt19937: its words and a position
_LENGTH = struct.Struct("<i")  # before each text


def reseeded(state: bytes, seed: tuple[int, ...]) -> bytes:
    """A game's state with other random numbers to come; all else is as it was.

    Args:
        state: what the game saved.
        seed: decides the numbers; integers >= 0.

    Raises:
        ValueError: there is no random generator in it.
    """
    parts, end = [], 0
    for i, found in enumerate(_GENERATOR.finditer(state)):
        begin = found.start() - _LENGTH.size
        if _LENGTH.unpack_from(state, begin)[0] != len(found.group()):
            raise ValueError("state: a random generator's text is not as long as is said before it")
        fresh = np.random.MT19937([*seed, i]).state["state"]
        text = " ".join(str(word) for word in [*fresh["key"], fresh["pos"]]).encode()
        parts += [state[end:begin], _LENGTH.pack(len(text)), text]
        end = found.end()
    if not parts:
        raise ValueError("state: no random generator found in it")
    return b"".join([*parts, state[end:]])


def camera_of(state: bytes, view: View, distribution_mode: str) -> tuple[float, float]:
    """Where the picture's top left corner lies, in tiles, x to the right and y downwards, of a game that scrolls."""
    columns, rows = view.level[distribution_mode]
    behind = 4 + view.tail + 4 * columns * rows + 12 + 24  # a mark, the game's own, the tiles, their numbers, this
    unit, extent, x, y = np.frombuffer(state, "<f4", 4, len(state) - behind)
    return x / unit, -extent - y / unit
