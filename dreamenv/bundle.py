"""A trained world model as a folder: save, load, verify, migrate.

`bundle.json` (format version, models, game, limits, provenance, sha256 of every part), the networks as fp16
safetensors, `starts.safetensors` (real start contexts) and `card.json` (measured fidelity). No pickle anywhere. A
bundle of several games has starts and a card for each, `starts-<game>.safetensors` and `card-<game>.json`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from dreamenv.artifacts import atomic_folder, parse_json, present, read_json, readable_folder, sha256_file, write_json
from dreamenv.config import check, from_dict, to_dict
from dreamenv.contract.games import get_game
from dreamenv.device import own_settings, pick_device, pick_precision
from dreamenv.errors import BundleError, ConfigError
from dreamenv.models.io import build_for, fill, read_part
from dreamenv.models.migrations import bundle_from_1
from dreamenv.models.registry import spec_of
from dreamenv.starts import Starts, pack_starts, parse_starts
from dreamenv.world_model import WorldModel

FORMAT_VERSION = 2
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: bundle_from_1}
"""Version -> function that turns that version's description into the next one's, in memory."""
NETWORKS = ("codec", "dynamics", "head")
_REMEDY = "re-download or retrain"
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


def part_names(games: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """The file of each part: ("weights", network), and ("starts" or "card", game)."""
    names = {("weights", n): f"{n}.safetensors" for n in NETWORKS}
    for game in games:
        mark = f"-{game}" if len(games) > 1 else ""
        names |= {("starts", game): f"starts{mark}.safetensors", ("card", game): f"card{mark}.json"}
    return names


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
) -> Path:
    """Write the bundle folder of one or several games, in the order in which the model counts them; returns it."""
    folder, names = Path(folder), part_names(tuple(game.name for game in games))
    networks = {n: getattr(world_model, n) for n in NETWORKS}
    with atomic_folder(folder) as temporary:
        for name, network in networks.items():
            tensors = {k: v.detach().cpu().half().contiguous() for k, v in network.state_dict().items()}
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


def compute_identity(description: dict[str, Any]) -> str:
    """sha256 of all that decides what a bundle dreams: its description but for the cards, which are measurements."""
    kept = {k: v for k, v in description.items() if k != "identity"}
    if isinstance(kept.get("sha256"), dict):
        kept["sha256"] = {k: v for k, v in kept["sha256"].items() if not k.startswith("card")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def embedded_games() -> dict[str, Path]:
    """Games of the bundles in the package, in order, and the folder that holds each."""
    found: dict[str, Path] = {}
    for path in sorted(EMBEDDED.glob("*/bundle.json")):
        described = read_json(path, BundleError, _REMEDY)
        names = [facts["name"] for facts in (described["games"] if "games" in described else [described["game"]])]
        found |= {name: path.parent for name in names if len(names) == 1 or name not in found}
    return dict(sorted(found.items()))


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
        raise BundleError(f"game {game!r}: expected a name, such as {next(iter(embedded_games()))!r}")
    embedded = embedded_games()
    if game not in embedded:
        raise BundleError(
            f"game {game!r}: no embedded bundle; embedded are: {', '.join(embedded) or 'none'}. "
            f"Train one with: python -m trainers.pipeline --game {game}"
        )
    return embedded[game]


def bundled_agent(folder: Path) -> Path | None:
    """Folder of the agent that ships with a bundle, for `dreamenv.policies.agent.load_agent`; None if there is none."""
    agent = folder / "agent"
    return agent if present(agent / "agent.json") else None


_loaded: OrderedDict[tuple[str, ...], Bundle] = OrderedDict()
_loading = threading.Lock()
_KEPT = 4  # bundles that stay loaded


def load_bundle(
    folder: str | Path, device: str | torch.device = "auto", precision: str = "auto", game: str | None = None
) -> Bundle:
    """Load and verify a bundle; environments of one process share the networks of equal bundles.

    Every file is read and hashed once, whether or not an equal bundle is loaded already.

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
    description = _read_description(folder / "bundle.json")
    games = _games(description, folder / "bundle.json")
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
                _loaded[key] = _build(folder, description, games, chosen, contents, paths, str(picked), precision)
            while len(_loaded) > _KEPT:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]


def _games(description: dict[str, Any], path: Path) -> list[GameFacts]:
    """What a description says of its games."""
    try:
        facts = description["games"] if "games" in description else [description["game"]]
        if not isinstance(facts, list) or not facts:
            raise TypeError(f"games {str(facts)[:80]}: expected a list of facts")
        games = [from_dict(GameFacts, each, "game") for each in facts]
    except KeyError as error:
        raise BundleError(f"{path}: key {error} is missing; {_REMEDY}") from None
    except (ConfigError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from None
    names = [game.name for game in games]
    if len(set(names)) < len(names):
        raise BundleError(f"{path}: games {', '.join(names)}: one is named twice; {_REMEDY}")
    return games


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
    device: str,
    precision: str,
) -> Bundle:
    path = folder / "bundle.json"
    try:
        limits = from_dict(Limits, description["limits"], "limits")
        networks = {n: build_for(n, description["models"][n], parts["weights", n], f"models.{n}") for n in NETWORKS}
        provenance = dict(description["provenance"])
    except KeyError as error:
        raise BundleError(f"{path}: key {error} is missing; {_REMEDY}") from None
    except (ConfigError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from None
    version = 1 if "files" in description else FORMAT_VERSION
    for name, network in networks.items():
        fill(network, parts["weights", name], paths["weights", name], version)
    codec, dynamics, head = (networks[name] for name in NETWORKS)
    try:
        check(dynamics.games == len(games), f"dynamics: know {dynamics.games} games, the bundle is of {len(games)}")
        world_model = WorldModel(codec, dynamics, head, device, precision, chosen)
    except ConfigError as error:
        raise BundleError(f"{path}: {error}; {_REMEDY}") from None
    card = parse_json(parts["card", ""], paths["card", ""], BundleError, _REMEDY)
    starts = parse_starts(parts["starts", ""], paths["starts", ""], world_model.frame_shape, _REMEDY)
    game, identity = games[chosen], description["identity"]
    if len(games) > 1:
        identity = hashlib.sha256(f"{identity} {game.name}".encode()).hexdigest()
    names = tuple(known.name for known in games)
    return Bundle(folder, identity, world_model, game, limits, starts, provenance, card, names)


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


def short_name(folder: Path) -> str:
    """A bundle's folder in a few words, for a person to tell it from others."""
    name = f"{folder.name} (built in)" if folder.parent == EMBEDDED else "/".join(folder.parts[-2:])
    return name.encode("utf-8", "backslashreplace").decode()  # file names need not be text


def find_bundles() -> list[Path]:
    """Folders of the embedded bundles, and of those trained below the current folder's `runs`."""
    found = [p.parent for p in sorted(EMBEDDED.glob("*/bundle.json"))]
    return found + [p.parent for p in sorted(Path("runs").glob("*/bundle/bundle.json"))]
