"""What a configuration leaves out because it follows from the codec."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor

from dreamenv.config import check
from dreamenv.models.interface import Codec, State
from dreamenv.models.registry import lookup


def told_apart(games: tuple[str, ...]) -> tuple[str, ...]:
    """The setting `games` of models of a dataset: none where it is of one game."""
    return games if len(games) > 1 else ()


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


def check_told(known: tuple[str, ...], games: tuple[str, ...], name: str) -> None:
    """Raise `ConfigError`, which begins with `name`, unless a model is told just the games of its data apart."""
    check(
        known == told_apart(games),
        f"{name}: is of {', '.join(known) or 'one game'}, the data of {', '.join(games)}; models with a setting games "
        "can learn several, all others one game alone",
    )
