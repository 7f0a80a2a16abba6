"""What version 1 of bundles and model folders called things: read as what it was, written as version 2 alone.

Version 1 had one list of types for all kinds, wrote a U-Net's levels beside the dynamics' own settings, called the
codec "autoencoder", and kept the game's facts in each bundle.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from dreamenv.errors import BundleError

_TYPES = {
    "autoencoder": ("codec", "patch_autoencoder"),
    "tile_autoencoder": ("codec", "tile_autoencoder"),
    "latent_flow": ("dynamics", "latent_flow"),
    "tile_flow": ("dynamics", "tile_flow"),
    "outcome_head": ("head", "picture_head"),
    "tile_outcome_head": ("head", "player_head"),
}
_BACKBONE = re.compile(r"^(stem|down|up|out_norm)\.")


def spec_from_1(spec: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind and the specification of a model of version 1; an unknown type is left for the registry to refuse."""
    spec = dict(spec)
    name = spec.pop("type", None)
    kind, new = _TYPES.get(name, ("codec", name)) if isinstance(name, str) else ("codec", name)
    if kind in ("dynamics", "head"):
        tiles = new in ("tile_flow", "player_head")
        channels, size = spec.pop("latent_channels", 28 if tiles else 16), spec.pop("latent_size", 16)
        spec["latent"] = {"shape": [channels, size, size], "layout": "tiles" if tiles else "patches"}
        spec["latent"]["known"] = 4 if tiles else 0
    if kind == "dynamics":
        levels = {key: spec.pop(key) for key in ("channels", "blocks") if key in spec}
        spec["backbone"] = {"type": "unet", **levels}
    return kind, {"type": new, **spec}


def model_from_1(description: dict[str, Any]) -> dict[str, Any]:
    """`model.json` of version 1 as one of version 2."""
    kind, spec = spec_from_1(description["model"])
    facts = {k.replace("autoencoder_sha256", "codec_sha256"): v for k, v in description["facts"].items()}
    return {**description, "format_version": 2, "kind": kind, "model": spec, "facts": facts}


def tensors_from_1(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of version 1 by their names of version 2: a U-Net is a part that dynamics hold."""
    if "out_norm.weight" not in tensors:  # no dynamics
        return tensors
    return {f"backbone.{k}" if _BACKBONE.match(k) else k: v for k, v in tensors.items()}


def bundle_from_1(description: dict[str, Any]) -> dict[str, Any]:
    """`bundle.json` of version 1 as one of version 2; `files` says where its parts are."""
    models = {name: spec_from_1(spec) for name, spec in description["models"].items()}
    recipe = "tiles" if models["dynamics"][1]["type"] == "tile_flow" else "patches"
    game = {key: description["game"][key] for key in ("name", "distribution_mode", "max_steps")}
    digests = {name.replace("autoencoder.", "codec."): value for name, value in description["sha256"].items()}
    return {
        **description,
        "format_version": 2,
        "game": game,
        "provenance": {"recipe": recipe, **description["provenance"]},
        "models": {"codec": models["autoencoder"][1], "dynamics": models["dynamics"][1], "head": models["head"][1]},
        "sha256": digests,
        "files": {"codec.safetensors": "autoencoder.safetensors"},
    }


def bundle_from_2(description: dict[str, Any]) -> dict[str, Any]:
    """`bundle.json` of version 2 as one of version 3, which packs start frames otherwise: their bytes say how."""
    dynamics = description["models"]["dynamics"]
    if dynamics.get("type") == "canvas_flow" and dynamics.get("motion"):
        raise BundleError("its canvas_flow moves cells as no release does any more; retrain")
    return {**description, "format_version": 3}


def bundle_from_3(description: dict[str, Any]) -> dict[str, Any]:
    """`bundle.json` of version 3 as one of version 4, whose weights may be of 8 bits: their files say so."""
    return {**description, "format_version": 4}


def bundle_from_4(description: dict[str, Any]) -> dict[str, Any]:
    """`bundle.json` of version 4 as one of version 5, whose weights may be of 5..12 bits: their files say so."""
    return {**description, "format_version": 5}
