"""A trained world model as a folder: save, load, verify, migrate.

`bundle.json` (format version, models, game, limits, provenance, sha256 of every part), the networks as fp16
safetensors, `starts.safetensors` (real start contexts) and `card.json` (measured fidelity). No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors

from dreamenv.artifacts import (
    atomic_folder,
    parse_json,
    parse_tensors,
    present,
    read_json,
    readable_folder,
    sha256_file,
    write_json,
)
from dreamenv.config import check, from_dict, to_dict
from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.contract.games import get_game
from dreamenv.device import own_settings, pick_device, pick_precision
from dreamenv.errors import BundleError, ConfigError
from dreamenv.models.io import build_for, fill, read_part
from dreamenv.models.migrations import bundle_from_1
from dreamenv.models.registry import spec_of
from dreamenv.world_model import WorldModel

FORMAT_VERSION = 2
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: bundle_from_1}
"""Version -> function that turns that version's description into the next one's, in memory."""
NETWORKS = ("codec", "dynamics", "head")
_PARTS = (*(f"{n}.safetensors" for n in NETWORKS), "starts.safetensors", "card.json")
_REMEDY = "re-download or retrain"
_STARTS_LIMIT = 2**28  # bytes of frames, unpacked
EMBEDDED = Path(__file__).parent / "bundles"


@dataclass(frozen=True)
class GameFacts:
    """Which game a bundle is of; all else about it is in the table of games."""

    name: str
    """Procgen's name."""
    distribution_mode: str
    """Procgen's difficulty."""
    max_steps: int
    """Step limit; reaching it truncates."""

    def __post_init__(self) -> None:
        """Validate; raises `ConfigError`."""
        modes = get_game(self.name).distribution_modes
        check(
            self.distribution_mode in modes,
            f"distribution_mode {self.distribution_mode!r}: {self.name} has {', '.join(modes)}",
        )
        check(self.max_steps >= 1, f"max_steps {self.max_steps}: must be >= 1")

    @property
    def action_meanings(self) -> tuple[str, ...]:
        """What each of the 15 actions does."""
        return get_game(self.name).meanings


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
        frames: uint8 (S, T, h, w, c).
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


def save_bundle(
    folder: str | Path,
    world_model: WorldModel,
    game: GameFacts,
    limits: Limits,
    starts: Starts,
    provenance: dict[str, Any],
    card: dict[str, Any] | None = None,
) -> Path:
    """Write a bundle folder atomically, weights in fp16; returns it."""
    folder = Path(folder)
    networks = {n: getattr(world_model, n) for n in NETWORKS}
    with atomic_folder(folder) as temporary:
        for name, network in networks.items():
            tensors = {k: v.detach().cpu().half().contiguous() for k, v in network.state_dict().items()}
            (temporary / f"{name}.safetensors").write_bytes(save_tensors(tensors))
        packed = np.frombuffer(zlib.compress(np.ascontiguousarray(starts.frames).tobytes(), 9), np.uint8)
        arrays = {"frames": packed, "actions": starts.actions, "level_seeds": starts.level_seeds}
        (temporary / "starts.safetensors").write_bytes(save_arrays(arrays))
        write_json(temporary / "card.json", card or {})
        description = {
            "format_version": FORMAT_VERSION,
            "game": to_dict(game),
            "limits": to_dict(limits),
            "models": {n: spec_of(m) for n, m in networks.items()},
            "provenance": provenance,
            "sha256": {part: sha256_file(temporary / part) for part in _PARTS},
        }
        write_json(temporary / "bundle.json", description | {"identity": compute_identity(description)})
    return folder


def compute_identity(description: dict[str, Any]) -> str:
    """sha256 of all that decides what a bundle dreams: its description but for the card, which is a measurement."""
    kept = {k: v for k, v in description.items() if k != "identity"}
    if isinstance(kept.get("sha256"), dict):
        kept["sha256"] = {k: v for k, v in kept["sha256"].items() if k != "card.json"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def embedded_games() -> list[str]:
    """Games of the bundles in the package."""
    return sorted(p.parent.name for p in EMBEDDED.glob("*/bundle.json"))


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
        raise BundleError(f"game {game!r}: expected a name, such as {embedded_games()[0]!r}")
    folder = EMBEDDED / game
    if game not in embedded_games():
        raise BundleError(
            f"game {game!r}: no embedded bundle; embedded are: {', '.join(embedded_games()) or 'none'}. "
            f"Train one with: python -m trainers.pipeline --game {game}"
        )
    return folder


def bundled_agent(folder: Path) -> Path | None:
    """Folder of the agent that ships with a bundle, for `dreamenv.policies.agent.load_agent`; None if there is none."""
    agent = folder / "agent"
    return agent if present(agent / "agent.json") else None


_loaded: OrderedDict[tuple[str, ...], Bundle] = OrderedDict()
_loading = threading.Lock()
_KEPT = 4  # bundles that stay loaded


def load_bundle(folder: str | Path, device: str | torch.device = "auto", precision: str = "auto") -> Bundle:
    """Load and verify a bundle; environments of one process share the networks of equal bundles.

    Every file is read and hashed once, whether or not an equal bundle is loaded already.

    Raises:
        BundleError: missing, altered, malformed, inconsistent, or newer than this release; names the file.
        ConfigError: an unusable device or precision.
    """
    picked = pick_device(device)
    precision = pick_precision(precision, picked)
    folder = readable_folder(folder)
    description = _read_description(folder / "bundle.json")
    digests = description.get("sha256")
    if not isinstance(digests, dict) or set(digests) != set(_PARTS):
        raise BundleError(f"{folder / 'bundle.json'}: sha256 must name exactly {', '.join(_PARTS)}; {_REMEDY}")
    names = description.get("files", {})  # as a migration called them
    if not isinstance(names, dict) or any(Path(str(names.get(p, p))).name != names.get(p, p) for p in _PARTS):
        raise BundleError(f"{folder / 'bundle.json'}: files must name the parts, each in this folder; {_REMEDY}")
    paths = {part: folder / names.get(part, part) for part in _PARTS}
    parts = {part: read_part(path, digests[part]) for part, path in paths.items()}
    key = (str(folder), json.dumps(description), str(picked), precision)
    with _loading:
        if key not in _loaded:
            with own_settings(picked), torch.inference_mode(False):
                _loaded[key] = _build(folder, description, parts, paths, str(picked), precision)
            while len(_loaded) > _KEPT:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]


def _build(
    folder: Path,
    description: dict[str, Any],
    parts: dict[str, bytes],
    paths: dict[str, Path],
    device: str,
    precision: str,
) -> Bundle:
    path = folder / "bundle.json"
    try:
        game = from_dict(GameFacts, description["game"], "game")
        limits = from_dict(Limits, description["limits"], "limits")
        networks = {
            n: build_for(n, description["models"][n], parts[f"{n}.safetensors"], f"models.{n}") for n in NETWORKS
        }
        provenance = dict(description["provenance"])
    except KeyError as error:
        raise BundleError(f"{path}: key {error} is missing; {_REMEDY}") from None
    except (ConfigError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from None
    version = 1 if "files" in description else FORMAT_VERSION
    for name, network in networks.items():
        part = f"{name}.safetensors"
        fill(network, parts[part], paths[part], version)
    try:
        world_model = WorldModel(networks["codec"], networks["dynamics"], networks["head"], device, precision)
    except ConfigError as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from None
    card = parse_json(parts["card.json"], paths["card.json"], BundleError, _REMEDY)
    starts = _read_starts(parts["starts.safetensors"], paths["starts.safetensors"], world_model.frame_shape)
    return Bundle(folder, description["identity"], world_model, game, limits, starts, provenance, card)


def _read_description(path: Path) -> dict[str, Any]:
    """Read bundle.json, the version first; older ones are migrated in memory and keep their identity."""
    description = read_json(path, BundleError, "is this a bundle folder? Re-download or retrain")
    version = description.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise BundleError(f"{path}: format_version {version!r} is not an integer; {_REMEDY}")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version {version} is newer than this release reads ({FORMAT_VERSION}); upgrade dreamenv"
        )
    if description.get("identity") != compute_identity(description):
        raise BundleError(f"{path}: its contents do not match its identity, it was altered; {_REMEDY}")
    description = {key: value for key, value in description.items() if key != "files"}  # migrations alone say that
    while version < FORMAT_VERSION:
        if version not in MIGRATIONS:
            raise BundleError(f"{path}: format_version {version} is too old to migrate; retrain")
        try:
            description = MIGRATIONS[version](description)
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path}: is no bundle of version {version} ({error!r}); {_REMEDY}") from None
        version += 1
    return description


def _read_starts(data: bytes, path: Path, frame: tuple[int, int, int]) -> Starts:
    arrays = parse_tensors(load_arrays, data, path, BundleError, _REMEDY)
    try:
        frames, actions, levels = (arrays[k] for k in ("frames", "actions", "level_seeds"))
        if frames.ndim == 1 and frames.dtype == np.uint8 and actions.ndim == 2:  # packed; older ones are as they are
            shape = (actions.shape[0], actions.shape[1] + 1, *frame)
            if math.prod(shape) > _STARTS_LIMIT:
                raise ValueError(f"{math.prod(shape)} bytes of frames, at most {_STARTS_LIMIT} are read")
            unpacked = zlib.decompressobj().decompress(frames.tobytes(), math.prod(shape) + 1)
            frames = np.frombuffer(bytearray(unpacked), np.uint8).reshape(shape)
    except (KeyError, ValueError, zlib.error) as error:
        raise BundleError(f"{path}: is malformed ({error}); {_REMEDY}") from None
    s, t = frames.shape[:2] if frames.ndim == 5 else (0, 0)
    sound = s >= 1 and t >= 1 and frames.shape[2:] == frame and frames.dtype == np.uint8 and levels.shape == (s,)
    sound = sound and actions.shape == (s, t - 1) and actions.dtype == np.uint8 and not (actions >= NUM_ACTIONS).any()
    if not sound:
        raise BundleError(
            f"{path}: frames {frames.dtype} {frames.shape}, actions {actions.shape}, level_seeds {levels.shape} are "
            f"not a bank of start contexts; {_REMEDY}"
        )
    return Starts(frames, actions, levels)


def short_name(folder: Path) -> str:
    """A bundle's folder in a few words, for a person to tell it from others."""
    name = f"{folder.name} (built in)" if folder.parent == EMBEDDED else "/".join(folder.parts[-2:])
    return name.encode("utf-8", "backslashreplace").decode()  # file names need not be text


def find_bundles() -> list[Path]:
    """Folders of the embedded bundles, and of those trained below the current folder's `runs`."""
    found = [p.parent for p in sorted(EMBEDDED.glob("*/bundle.json"))]
    return found + [p.parent for p in sorted(Path("runs").glob("*/bundle/bundle.json"))]
