"""Bundles written anew: `python -m dreamenv.rewrite OLD NEW` makes one of today's format of an older one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dreamenv.artifacts import atomic_folder, only_writer, read_json, readable_folder, sha256_file, write_json
from dreamenv.bundle import bundle_games, bundled_agent, compute_identity, load_bundle, part_names, save_bundle_of
from dreamenv.config import check
from dreamenv.console import run_command_line
from dreamenv.description import NETWORKS
from dreamenv.errors import BundleError
from dreamenv.policies.agent import load_agent, save_agent


def update_card(folder: str | Path, card: dict[str, Any], game: str | None = None) -> None:
    """Replace a bundle's measured fidelity in a game, atomically; everything else keeps its bytes.

    Raises:
        BundleError: it is of an older version, or no bundle.
        BusyError: another process is writing it.
    """
    folder = readable_folder(folder)
    with only_writer(folder):
        _update_card(folder, card, game)


def _update_card(folder: Path, card: dict[str, Any], game: str | None) -> None:
    path = folder / "bundle.json"
    loaded = load_bundle(folder, "cpu", game=game)
    name = part_names(loaded.games)["card", loaded.game.name]
    description = read_json(path, BundleError, "re-download or retrain")
    if description["format_version"] == 1:  # later ones keep their version: only the card changes
        raise BundleError(f"{path}: is of an older format, 1; rewrite it with python -m dreamenv.rewrite OLD NEW")
    with atomic_folder(folder) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        write_json(temporary / name, card)
        description["sha256"][name] = sha256_file(temporary / name)
        write_json(temporary / "bundle.json", description | {"identity": compute_identity(description)})


def rewrite_bundle(folder: str | Path, out: str | Path, bits: int = 16, rounded: tuple[str, ...] = NETWORKS) -> Path:
    """Write a bundle of any readable version as one of this version, its agents too; returns the new folder.

    Args:
        folder: the old one.
        out: the new one.
        bits: of each weight, the agents' too. With 16 a bundle of 16 bits dreams the same; fewer make it smaller and
            round its weights, see `dreamenv.models.io.packed`.
        rounded: which of the networks codec, dynamics and head the bits count for; all by default.

    Raises:
        BundleError: the old one is missing or damaged.
        ConfigError: other bits, no such network, or the new one in the place of the old.
    """
    same = Path(out).resolve() == Path(folder).resolve()
    check(not same, f"out {out}: is the old bundle; write the new one into another folder")
    each = [load_bundle(folder, "cpu", "fp32", game) for game in bundle_games(readable_folder(folder))]
    old, games = each[0], [one.game for one in each]
    starts, cards = {one.game.name: one.starts for one in each}, {one.game.name: one.card for one in each}
    shipped = [(one, agent) for one in each if (agent := bundled_agent(old.folder, one.game.name)) is not None]
    agents = [(one, agent, load_agent(agent, "fp32")) for one, agent in shipped]
    save_bundle_of(games, out, old.world_model, old.limits, starts, old.provenance, cards, bits, rounded)
    for one, agent, network in agents:
        if network.facts.get("latents_sha256") == one.latents:  # rounded otherwise, they are the same latents
            network.facts["latents_sha256"] = load_bundle(out, "cpu", game=one.game.name).latents
        save_agent(Path(out) / agent.name, network, network.facts, bits)
    return Path(out)


if __name__ == "__main__":
    print(run_command_line(rewrite_bundle, positional=True))
