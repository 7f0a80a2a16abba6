"""What a configuration leaves out because it follows from the codec."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor

from dreamenv.config import check
from dreamenv.models.interface import Codec, State
from dreamenv.models.registry import lookup


def of_game(state: State, game: Tensor | None) -> State:
    """A state that says which of several games it is of, int64 (B,); the same state where there is but one."""
    return state if game is None else state.replace(game=game)


def completed(kind: str, model: dict[str, Any], codec: Codec, **more: Any) -> dict[str, Any]:
    """The specification of a model on a codec's latents, with what `Codec.shared` says where it says nothing itself.

    Args:
        kind: "dynamics" or "head".
        model: its specification; `type` is required.
        codec: whose latents it works on.
        more: further values that follow from elsewhere, taken where the configuration has such a field.

    Raises:
        ConfigError: an unknown type.
    """
    _, config = lookup(kind, model.get("type"), "model")
    known = {f.name for f in fields(config)}
    return {name: value for name, value in (codec.shared() | more).items() if name in known} | model


def check_games(known: int, games: tuple[str, ...], model: dict[str, Any]) -> None:
    """Raise `ConfigError` unless a model knows as many games as its data holds."""
    check(
        known == len(games),
        f"model.type {model.get('type')!r}: knows {known} games, the data holds {', '.join(games)}; train a model that "
        "has a setting games, or one game alone",
    )
