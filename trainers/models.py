"""What a configuration leaves out because it follows from the codec."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dreamenv.models.interface import Codec
from dreamenv.models.registry import lookup


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
