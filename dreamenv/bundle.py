"""A trained world model as a folder: save, load, verify, migrate.

`bundle.json` (format version, models, game facts, limits, provenance, sha256 of every part), the networks as fp16
safetensors, `starts.safetensors` (real start contexts) and `card.json` (measured fidelity). No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors
from torch import nn

from dreamenv.actions import NUM_ACTIONS
from dreamenv.artifacts import atomic_folder, read_json, readable_folder, sha256_file, write_json
from dreamenv.config import check, from_dict, to_dict
from dreamenv.errors import BundleError, ConfigError
from dreamenv.models.autoencoder import Autoencoder
from dreamenv.models.heads import OutcomeHead, PictureOutcomeHead, TileOutcomeHead
from dreamenv.models.io import load_weights
from dreamenv.models.latent_flow import LatentFlow
from dreamenv.models.registry import build_model, model_spec
from dreamenv.models.tile import TileAutoencoder
from dreamenv.models.tile_flow import TileFlow
from dreamenv.world_model import Dynamics, FrameCodec, WorldModel

FORMAT_VERSION = 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version -> function that turns that version's description into the next one's, in memory."""
_NETWORKS: dict[str, tuple[type[nn.Module], ...]] = {
    "autoencoder": (Autoencoder, TileAutoencoder), "dynamics": (LatentFlow, TileFlow),
    "head": (PictureOutcomeHead, TileOutcomeHead),
}  # fmt: skip
_PARTS = (*(f"{n}.safetensors" for n in _NETWORKS), "starts.safetensors", "card.json")
_REMEDY = "re-download or retrain"
EMBEDDED = Path(__file__).parent / "bundles"


@dataclass(frozen=True)
class GameFacts:
    """What the bundle knows about its game."""

    name: str
    """Procgen's name."""
    distribution_mode: str
    """Procgen's difficulty."""
    max_steps: int
    """Step limit; reaching it truncates."""
    action_meanings: tuple[str, ...]
    """What each of the 15 actions does."""


@dataclass(frozen=True)
class Limits:
    """The range of latents seen in training; beyond twice of it a dream has diverged."""

    latent_max: float
    """Largest absolute value."""
    latent_rms_max: float
    """Largest root mean square of one latent."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.latent_max > 0, f"latent_max {self.latent_max}: must be > 0")
        check(self.latent_rms_max > 0, f"latent_rms_max {self.latent_rms_max}: must be > 0")

    def exceeded(self, latents: torch.Tensor) -> torch.Tensor:
        """Bool (B,): latents (B, C, h, w) that are beyond twice the range, or not finite."""
        flat = latents.flatten(1)
        sound = (flat.abs().amax(1) <= 2 * self.latent_max) & (flat.square().mean(1).sqrt() <= 2 * self.latent_rms_max)
        return ~sound  # NaN compares false, so it counts as beyond


@dataclass(frozen=True)
class Starts:
    """Bank of real start contexts.

    Attributes:
        frames: uint8 (S, T, 64, 64, 3).
        actions: uint8 (S, T - 1).
        level_seeds: int32 (S,).
    """

    frames: np.ndarray
    actions: np.ndarray
    level_seeds: np.ndarray


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; `identity` is the sha256 that snapshots are tied to."""

    folder: Path
    identity: str
    world_model: WorldModel
    game: GameFacts
    limits: Limits
    starts: Starts
    provenance: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)


def save_bundle(folder: str | Path, world_model: WorldModel, game: GameFacts, limits: Limits, starts: Starts,
                provenance: dict[str, Any], card: dict[str, Any] | None = None) -> Path:  # fmt: skip
    """Write a bundle folder atomically, weights in fp16; returns it."""
    folder = Path(folder)
    networks = {n: getattr(world_model, n) for n in _NETWORKS}
    with atomic_folder(folder) as temporary:
        for name, network in networks.items():
            tensors = {k: v.detach().cpu().half().contiguous() for k, v in network.state_dict().items()}
            (temporary / f"{name}.safetensors").write_bytes(save_tensors(tensors))
        packed = np.frombuffer(zlib.compress(np.ascontiguousarray(starts.frames).tobytes(), 9), np.uint8)
        arrays = {"frames": packed, "actions": starts.actions, "level_seeds": starts.level_seeds}
        (temporary / "starts.safetensors").write_bytes(save_arrays(arrays))
        write_json(temporary / "card.json", card or {})
        description = {
            "format_version": FORMAT_VERSION, "game": to_dict(game), "limits": to_dict(limits),
            "models": {n: model_spec(m) for n, m in networks.items()}, "provenance": provenance,
            "sha256": {part: sha256_file(temporary / part) for part in _PARTS},
        }  # fmt: skip
        write_json(temporary / "bundle.json", description | {"identity": compute_identity(description)})
    return folder


def compute_identity(description: dict[str, Any]) -> str:
    """sha256 of all that decides what a bundle dreams: its description but for the card, which is a measurement."""
    kept = {k: v for k, v in description.items() if k != "identity"}
    if isinstance(kept.get("sha256"), dict):
        kept["sha256"] = {k: v for k, v in kept["sha256"].items() if k != "card.json"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def resolve_bundle(bundle: str | Path | None, game: str) -> Path:
    """Return the folder of a bundle: an explicit path, or the embedded one of `game`.

    Raises:
        BundleError: there is none.
    """
    if bundle is not None:
        if not isinstance(bundle, (str, Path)) or not str(bundle):
            raise BundleError(f"bundle {bundle!r}: expected the path of a bundle folder")
        return Path(bundle)
    if not isinstance(game, str):
        raise BundleError(f"game {game!r}: expected a name, such as 'coinrun'")
    folder = EMBEDDED / game
    if not (folder / "bundle.json").exists():
        known = sorted(p.parent.name for p in EMBEDDED.glob("*/bundle.json"))
        raise BundleError(f"game {game!r}: no embedded bundle; embedded are: {', '.join(known) or 'none'}. "
                          f"Train one with: python -m trainers.pipeline --game {game}")  # fmt: skip
    return folder


def bundled_agent(folder: Path) -> Path | None:
    """Folder of the agent that ships with a bundle (see `dreamenv.models.impala.load_agent`); None if there is none."""
    agent = folder / "agent"
    return agent if (agent / "agent.json").exists() else None


def pick_device(device: str | torch.device) -> torch.device:
    """Return a usable device; "auto" is the GPU if there is one.

    Raises:
        ConfigError: no such device, or not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.zeros(1, device=picked).cpu()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"device {device!r}: not usable here ({str(error).splitlines()[0]}); "
                          "use 'auto' or 'cpu'") from None  # fmt: skip
    return picked


def pick_precision(precision: str, device: torch.device) -> str:
    """Return "fp32" or "bf16"; "auto" is bf16 on CUDA and on CPUs with instructions for it, where batches gain a third or more.

    Raises:
        ConfigError: another name.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision {precision!r}: must be 'auto', 'fp32' or 'bf16'")
    if precision != "auto":
        return precision
    if device.type == "cpu":
        asked = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("amx_tile", "avx512_bf16"))
        return "bf16" if any(supported() for supported in asked) else "fp32"
    return "bf16" if device.type == "cuda" else "fp32"


def load_bundle(folder: str | Path, device: str | torch.device = "auto", precision: str = "auto") -> Bundle:
    """Load and verify a bundle; environments of one process share the networks of equal bundles.

    Raises:
        BundleError: missing, altered, malformed, inconsistent, or newer than this release; names the file.
        ConfigError: an unusable device or precision.
    """
    picked = pick_device(device)
    precision = pick_precision(precision, picked)
    folder = readable_folder(folder)
    path = folder / "bundle.json"
    description = _read_description(path)
    digests = description.get("sha256")
    if not isinstance(digests, dict) or set(digests) != set(_PARTS):
        raise BundleError(f"{path}: sha256 must name exactly {', '.join(_PARTS)}; re-download or retrain")
    for part in _PARTS:
        if not (folder / part).is_file():
            raise BundleError(f"{folder / part}: missing; re-download or retrain")
        if sha256_file(folder / part) != digests[part]:
            raise BundleError(f"{folder / part}: sha256 differs from bundle.json; re-download or retrain")
    return _load(folder, json.dumps(description), str(picked), precision)


@lru_cache(maxsize=4)
def _load(folder: Path, text: str, device: str, precision: str) -> Bundle:
    path, description = folder / "bundle.json", json.loads(text)
    try:
        game = from_dict(GameFacts, description["game"], "game")
        limits = from_dict(Limits, description["limits"], "limits")
        networks = {n: build_model(description["models"][n], f"models.{n}") for n in _NETWORKS}
        provenance = dict(description["provenance"])
    except KeyError as error:
        raise BundleError(f"{path}: key {error} is missing; re-download or retrain") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: {error}; re-download or retrain") from None
    for name, network in networks.items():
        if type(network) not in _NETWORKS[name]:
            raise BundleError(f"{path}: models.{name} is a {type(network).__name__}, which is no {name}; retrain")
        load_weights(network, folder / f"{name}.safetensors", description["sha256"][f"{name}.safetensors"])
    autoencoder, dynamics = cast(FrameCodec, networks["autoencoder"]), cast(Dynamics, networks["dynamics"])
    head = cast(OutcomeHead, networks["head"])
    c, h, _ = autoencoder.latent_shape
    if not (dynamics.config.latent_channels == head.config.latent_channels == c and head.config.latent_size == h
            and head.config.context == dynamics.config.context
            and isinstance(autoencoder, TileAutoencoder) == isinstance(dynamics, TileFlow)
            and (isinstance(autoencoder, TileAutoencoder) or not isinstance(head, TileOutcomeHead))):  # fmt: skip
        raise BundleError(f"{path}: autoencoder, dynamics and head disagree on the latents or context length; retrain")
    if len(game.action_meanings) != NUM_ACTIONS or game.max_steps < 1:
        raise BundleError(f"{path}: game needs {NUM_ACTIONS} action_meanings and max_steps >= 1; re-download or retrain")
    world_model = WorldModel(autoencoder, dynamics, head, device, precision)
    card = read_json(folder / "card.json", BundleError, _REMEDY)
    return Bundle(folder, compute_identity(description), world_model, game, limits, _load_starts(folder), provenance, card)


def _read_description(path: Path) -> dict[str, Any]:
    """Read bundle.json, the version first; older ones are migrated in memory."""
    description = read_json(path, BundleError, "is this a bundle folder? Re-download or retrain")
    version = description.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise BundleError(f"{path}: format_version {version!r} is not an integer; {_REMEDY}")
    if version > FORMAT_VERSION:
        raise BundleError(f"{path}: format_version {version} is newer than this release reads ({FORMAT_VERSION}); "
                          "upgrade dreamenv")  # fmt: skip
    if version == FORMAT_VERSION and description.get("identity") != compute_identity(description):
        raise BundleError(f"{path}: its contents do not match its identity, it was altered; {_REMEDY}")
    while version < FORMAT_VERSION:
        if version not in MIGRATIONS:
            raise BundleError(f"{path}: format_version {version} is too old to migrate; retrain")
        description = MIGRATIONS[version](description)
        version += 1
    return description


def _load_starts(folder: Path) -> Starts:
    path = folder / "starts.safetensors"
    try:
        arrays = load_arrays(path.read_bytes())
        frames, actions, levels = (arrays[k] for k in ("frames", "actions", "level_seeds"))
        if frames.ndim == 1 and frames.dtype == np.uint8 and actions.ndim == 2:  # packed; older bundles have them as they are
            shape = (actions.shape[0], actions.shape[1] + 1, 64, 64, 3)
            unpacked = zlib.decompressobj().decompress(frames.tobytes(), math.prod(shape) + 1)
            frames = np.frombuffer(bytearray(unpacked), np.uint8).reshape(shape)
    except (SafetensorError, KeyError, ValueError, zlib.error) as error:
        raise BundleError(f"{path}: is malformed ({error}); re-download or retrain") from None
    s, t = frames.shape[:2] if frames.ndim == 5 else (0, 0)
    if (s < 1 or t < 1 or frames.shape[2:] != (64, 64, 3) or frames.dtype != np.uint8 or levels.shape != (s,)
            or actions.shape != (s, t - 1) or actions.dtype != np.uint8 or (actions >= NUM_ACTIONS).any()):  # fmt: skip
        raise BundleError(f"{path}: frames {frames.dtype} {frames.shape}, actions {actions.shape}, level_seeds "
                          f"{levels.shape} are not a bank of start contexts; re-download or retrain")  # fmt: skip
    return Starts(frames, actions, levels)


def update_card(folder: str | Path, card: dict[str, Any]) -> None:
    """Replace a bundle's measured fidelity, atomically; everything else keeps its bytes."""
    folder = readable_folder(folder)
    description = _read_description(folder / "bundle.json")
    with atomic_folder(folder) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        write_json(temporary / "card.json", card)
        description["sha256"]["card.json"] = sha256_file(temporary / "card.json")
        write_json(temporary / "bundle.json", description | {"identity": compute_identity(description)})


def short_name(folder: Path) -> str:
    """A bundle's folder in a few words, for a person to tell it from others."""
    return f"{folder.name} (built in)" if folder.parent == EMBEDDED else "/".join(folder.parts[-2:])


def find_bundles() -> list[Path]:
    """Folders of the embedded bundles, and of those trained below the current folder's `runs`."""
    found = [p.parent for p in sorted(EMBEDDED.glob("*/bundle.json"))]
    return found + [p.parent for p in sorted(Path("runs").glob("*/bundle/bundle.json"))]
