"""A trained world model as a folder: save, load, verify, migrate.

`bundle.json` (format version, models, game, limits, provenance, sha256 of every part), the networks as safetensors of
16 or fewer bits a weight, `starts.safetensors` (real start contexts) and `card.json` (measured fidelity). No pickle
anywhere. A bundle of several games has starts and a card for each, `starts-<game>.safetensors` and `card-<game>.json`.
An agent may ship with it in the folder `agent`, or `agent-<game>`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from safetensors.torch import save as save_tensors

from dreamenv.artifacts import atomic_folder, parse_json, present, readable_folder, sha256_file, write_json
from dreamenv.config import check, from_dict, to_dict, unknown
from dreamenv.contract.games import GAMES, get_game
from dreamenv.description import (
    FORMAT_VERSION,
    NETWORKS,
    GameFacts,
    compute_identity,
    described_games,
    part_names,
    read_description,
)
from dreamenv.device import own_settings, pick_device, pick_precision
from dreamenv.errors import BundleError, ConfigError
from dreamenv.models.io import build_for, fill, packed, read_part
from dreamenv.models.registry import spec_of
from dreamenv.starts import Starts, pack_starts, parse_starts
from dreamenv.world_model import WorldModel

_REMEDY = "re-download or retrain"
EMBEDDED = Path(__file__).parent / "bundles"


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
class Bundle:
    """A loaded bundle, of one of its games; `identity` is the sha256 that snapshots are tied to."""

    folder: Path
    identity: str
    world_model: WorldModel
    game: GameFacts
    limits: Limits
    starts: Starts
    provenance: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    games: tuple[str, ...] = ()
    latents: str = ""
    """sha256 of the weights that make its latents: the codec's and the dynamics'."""


def latent_space(bundle: Bundle) -> Box:
    """The space of a bundle's latents, float32 (C, H, W): twice the range of training, where dreams are cut off."""
    most = 2 * bundle.limits.latent_max
    return Box(-most, most, bundle.world_model.latent_shape, np.float32)


def save_bundle(
    folder: str | Path,
    world_model: WorldModel,
    game: GameFacts,
    limits: Limits,
    starts: Starts,
    provenance: dict[str, Any],
    card: dict[str, Any] | None = None,
) -> Path:
    """Write the bundle folder of one game atomically, weights in fp16; returns it."""
    return save_bundle_of([game], folder, world_model, limits, {game.name: starts}, provenance, {game.name: card or {}})


def save_bundle_of(
    games: list[GameFacts],
    folder: str | Path,
    world_model: WorldModel,
    limits: Limits,
    starts: Mapping[str, Starts],
    provenance: dict[str, Any],
    cards: Mapping[str, dict[str, Any]],
    bits: int = 16,
    rounded: tuple[str, ...] = NETWORKS,
) -> Path:
    """Write the bundle folder of one or several games, see `save_bundle`; returns it.

    Args:
        games: in the order in which the model counts them.
        folder: of the bundle.
        world_model: whose networks are saved.
        limits: of its latents.
        starts: of each game, by name.
        provenance: where it comes from, JSON.
        cards: measured fidelity in each game, by name; a game without one gets an empty one.
        bits: of each weight, see `dreamenv.models.io.packed`.
        rounded: the networks that these bits count for; the others keep 16.

    Raises:
        ConfigError: the model is of other games, or there is no such network.
    """
    called = tuple(game.name for game in games)
    told = world_model.dynamics.games
    check(
        told == (called if len(games) > 1 else ()),
        f"games {', '.join(called)}: the model is of {', '.join(told) or 'one'}",
    )
    for network in rounded:
        if network not in NETWORKS:
            raise unknown(f"rounded {network!r}: unknown", network, NETWORKS)
    folder, names = Path(folder), part_names(called)
    networks = {n: getattr(world_model, n) for n in NETWORKS}
    with atomic_folder(folder) as temporary:
        for name, network in networks.items():
            precise = world_model.dynamics.precise if name == "dynamics" else ()
            tensors = packed(network.state_dict(), bits if name in rounded else 16, precise)
            (temporary / names["weights", name]).write_bytes(save_tensors(tensors))
        for game in games:
            (temporary / names["starts", game.name]).write_bytes(pack_starts(starts[game.name]))
            write_json(temporary / names["card", game.name], cards.get(game.name, {}))
        facts = [to_dict(game) for game in games]
        description = {
            "format_version": FORMAT_VERSION,
            **({"game": facts[0]} if len(games) == 1 else {"games": facts}),
            "limits": to_dict(limits),
            "models": {n: spec_of(m) for n, m in networks.items()},
            "provenance": provenance,
            "sha256": {part: sha256_file(temporary / part) for part in names.values()},
        }
        write_json(temporary / "bundle.json", description | {"identity": compute_identity(description)})
    return folder


def embedded_games(distribution_mode: str = "easy") -> dict[str, Path]:
    """Games in a difficulty of the bundles in the package, in order, and the folder that holds each."""
    found: dict[str, Path] = {}
    for path in sorted(EMBEDDED.glob("*/bundle.json")):
        games = described_games(read_description(path), path)
        names = [game.name for game in games if game.distribution_mode == distribution_mode]
        found |= {name: path.parent for name in names}
    return dict(sorted(found.items()))


def resolve_bundle(bundle: str | Path | None, game: str, distribution_mode: str | None = None) -> Path:
    """Return the folder of a bundle: an explicit path, or the embedded one of `game` in a difficulty, None is easy.

    Raises:
        BundleError: there is none.
    """
    if bundle is not None:
        if not isinstance(bundle, (str, Path)) or not str(bundle):
            raise BundleError(f"bundle {bundle!r}: expected the path of a bundle folder")
        return Path(bundle)
    mode = "easy" if distribution_mode is None else distribution_mode
    if not isinstance(mode, str):
        raise BundleError(f"distribution_mode {str(mode)[:80]!r}: expected a difficulty's name or None")
    embedded = embedded_games(mode)
    if not isinstance(game, str):
        raise BundleError(f"game {game!r}: expected a name, one of {', '.join(embedded) or 'none'}")
    known = get_game(game).distribution_modes if game in GAMES else (mode,)
    if mode not in known:
        raise BundleError(f"distribution_mode {mode!r}: {game} has {', '.join(known)}")
    if game not in embedded:
        raise BundleError(
            f"game {game!r}: no embedded bundle in {mode} mode; embedded are: {', '.join(embedded) or 'none'}. "
            f"Train one with: python -m trainers.pipeline --game {game}"
            + ("" if distribution_mode is None else f" --distribution-mode {mode}")
        )
    return embedded[game]


def check_mode(mode: str, distribution_mode: str | None) -> None:
    """Raise `ConfigError` unless a wanted difficulty is None or that of a bundle's game, `mode`."""
    same = distribution_mode is None or (isinstance(distribution_mode, str) and distribution_mode == mode)
    check(same, f"distribution_mode {str(distribution_mode)[:80]!r}: the bundle is of {mode}")


def agent_folder(folder: Path, game: str) -> Path:
    """Where a bundle's agent for a game is, if there is one: `agent`, or in a bundle of several games `agent-<game>`.

    Raises:
        BundleError: no bundle, or a damaged one.
    """
    return folder / ("agent" if len(bundle_games(folder)) == 1 else f"agent-{game}")


def bundled_agent(folder: Path, game: str) -> Path | None:
    """`agent_folder` where an agent ships, for `load_agent`; None if there is none."""
    agent = agent_folder(folder, game)
    return agent if present(agent / "agent.json") else None


_loaded: OrderedDict[tuple[str, ...], Bundle] = OrderedDict()
_loading = threading.Lock()
_KEPT = 20  # bundles that stay loaded: all in the package, and some


def load_bundle(
    folder: str | Path, device: str | torch.device = "auto", precision: str = "auto", game: str | None = None
) -> Bundle:
    """Load and verify a bundle; environments of one process share the networks of equal bundles.

    Every file that is of the game is read and hashed once, whether or not an equal bundle is loaded already.

    Args:
        folder: where bundle.json is.
        device: "auto", "cpu", "cuda" ...
        precision: see `dreamenv.device.pick_precision`.
        game: which game of a bundle of several; a bundle of one game is of that.

    Raises:
        BundleError: missing, altered, malformed, inconsistent, or newer than this release; names the file.
        ConfigError: an unusable device or precision.
    """
    picked = pick_device(device)
    precision = pick_precision(precision, picked)
    folder = readable_folder(folder)
    description = read_description(folder / "bundle.json")
    games = described_games(description, folder / "bundle.json")
    chosen = _chosen(games, game, folder)
    parts, digests = part_names(tuple(known.name for known in games)), description.get("sha256")
    if not isinstance(digests, dict) or set(digests) != set(parts.values()):
        raise BundleError(f"{folder / 'bundle.json'}: sha256 must name exactly {', '.join(parts.values())}; {_REMEDY}")
    names = description.get("files", {})  # as a migration called them
    if not isinstance(names, dict) or any(Path(str(names.get(p, p))).name != names.get(p, p) for p in parts.values()):
        raise BundleError(f"{folder / 'bundle.json'}: files must name the parts, each in this folder; {_REMEDY}")
    own = {k: part for k, part in parts.items() if k[0] == "weights" or k[1] == games[chosen].name}
    paths = {(k if k[0] == "weights" else (k[0], "")): folder / names.get(part, part) for k, part in own.items()}
    contents = {k: read_part(path, digests[part]) for (k, path), part in zip(paths.items(), own.values(), strict=True)}
    key = (str(folder), json.dumps(description), str(picked), precision, str(chosen))
    with _loading:
        if key not in _loaded:
            with own_settings(picked), torch.inference_mode(False):
                other = next((b for k, b in _loaded.items() if k[:-1] == key[:-1]), None)  # of another game
                networks = None if other is None else {n: getattr(other.world_model, n) for n in NETWORKS}
                where = (str(picked), precision)
                _loaded[key] = _build(folder, description, games, chosen, contents, paths, where, networks)
            while len({k[:-1] for k in _loaded}) > _KEPT:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]


def _chosen(games: list[GameFacts], game: str | None, folder: Path) -> int:
    """Which of a bundle's games is meant; that of a bundle of one game whatever is asked for."""
    names = [known.name for known in games]
    if len(names) == 1:
        return 0
    if game not in names:
        raise BundleError(f"{folder}: holds {', '.join(names)}, not {game!r}; say which with game=")
    return names.index(game)


def _build(
    folder: Path,
    description: dict[str, Any],
    games: list[GameFacts],
    chosen: int,
    parts: dict[tuple[str, str], bytes],
    paths: dict[tuple[str, str], Path],
    where: tuple[str, str],
    loaded: dict[str, Any] | None,
) -> Bundle:
    path = folder / "bundle.json"
    try:
        limits = from_dict(Limits, description["limits"], "limits")
        networks = loaded or {
            n: build_for(n, description["models"][n], parts["weights", n], f"models.{n}") for n in NETWORKS
        }
        provenance = dict(description["provenance"])
    except KeyError as error:
        raise BundleError(f"{path}: key {error} is missing; {_REMEDY}") from None
    except (ConfigError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from None
    version = 1 if "files" in description else 2  # of the names in files of weights
    for name, network in networks.items() if loaded is None else ():
        fill(network, parts["weights", name], paths["weights", name], version)
    codec, dynamics, head = (networks[name] for name in NETWORKS)
    try:
        wanted = tuple(known.name for known in games) if len(games) > 1 else ()
        check(dynamics.games == wanted, f"dynamics: of the games {dynamics.games}, the bundle of {wanted}")
        world_model = WorldModel(codec, dynamics, head, *where, chosen)
    except ConfigError as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from None
    card = parse_json(parts["card", ""], paths["card", ""], BundleError, _REMEDY)
    starts = parse_starts(parts["starts", ""], paths["starts", ""], world_model.frame_shape, _REMEDY)
    game, identity = games[chosen], description["identity"]
    if len(games) > 1:
        identity = hashlib.sha256(f"{identity} {game.name}".encode()).hexdigest()
    names = tuple(known.name for known in games)
    makers = "".join(str(description["sha256"][part_names(names)["weights", n]]) for n in ("codec", "dynamics"))
    latents = hashlib.sha256(makers.encode()).hexdigest()
    return Bundle(folder, identity, world_model, game, limits, starts, provenance, card, names, latents)


def bundle_games(folder: Path) -> dict[str, str]:
    """A bundle's games, in order, and each one's difficulty; raises `BundleError` if its description is damaged."""
    path = folder / "bundle.json"
    return {game.name: game.distribution_mode for game in described_games(read_description(path), path)}


def bundle_mode(folder: Path, game: str) -> str:
    """The difficulty of a bundle's game, by its description alone; a bundle of one game is of that."""
    games = described_games(read_description(folder / "bundle.json"), folder / "bundle.json")
    return games[_chosen(games, game, folder)].distribution_mode


def short_name(folder: Path) -> str:
    """A bundle's folder in a few words, for a person to tell it from others."""
    name = f"{folder.name} (built in)" if folder.parent == EMBEDDED else "/".join(folder.parts[-2:])
    return name.encode("utf-8", "backslashreplace").decode()  # file names need not be text


def find_bundles() -> list[Path]:
    """Folders of the embedded bundles, and of those trained below the current folder's `runs`."""
    found = [p.parent for p in sorted(EMBEDDED.glob("*/bundle.json"))]
    own = [path for depth in ("*", "*/*", "*/*/*") for path in Path("runs").glob(f"{depth}/bundle/bundle.json")]
    return found + [path.parent for path in sorted(own)]
