"""Puts agents that learnt in dreams into the bundles that dreamt for them: `python -m agents.ship runs/benchmark`.

Of each game that `agents.benchmark` has judged, the best agent of a dream ships if it surely beats a random player of
the real game: if its 95 % interval lies above the whole of that player's. It then plays in `dreamenv play`, and every
program knows it as `bundled`.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tyro

from agents.benchmark import beats
from dreamenv.artifacts import read_json
from dreamenv.bundle import agent_folder, resolve_bundle
from dreamenv.config import check, whole
from dreamenv.console import errors_in_one_line
from dreamenv.errors import ConfigError
from dreamenv.policies.agent import ImpalaAgent, load_agent, save_agent


def size_of(folder: Path) -> int:
    """Bytes of the files of a saved agent."""
    return sum(path.stat().st_size for path in folder.iterdir())


def ship(
    runs: tyro.conf.Positional[Path],
    games: tuple[str, ...] = (),
    bundle: Path | None = None,
    bits: int = 8,
    kib: int = 3072,
) -> dict[str, str]:
    """Put agents into bundles, once all of them are known to be sound and to fit.

    The values in a bundle's card may count the agent that it shipped before: measure them anew.

    Args:
        runs: run folder of `agents.benchmark`, which has ended.
        games: which of its games; all by default.
        bundle: the bundle's folder; by default those in the package.
        bits: of each weight, 8 or 16.
        kib: most KiB that the agents may take together.

    Returns:
        Of each game, where its agent is now, or why none ships.

    Raises:
        ConfigError: no such run or game, or too little room.
        PolicyError: an agent that is missing or damaged.
    """
    whole(kib, "kib", 1)
    rows = read_json(runs / "benchmark.json", ConfigError, "run agents.benchmark to its end first")
    for game in games:
        check(game in rows, f"games {game}: not in {runs}, which judged {', '.join(rows)}")
    found: dict[str, str] = {}
    agents: dict[str, ImpalaAgent] = {}
    for game in games or rows:
        row = rows[game]
        if "dream" not in row:
            found[game] = "none: not learnable in so many steps, so none learnt in dreams"
            continue
        if not beats(row, "dream", "random"):
            low, high = row["dream_low"], row["random_high"]
            found[game] = f"none: from {low:.2f} on, where a random player earns up to {high:.2f}"
            continue
        best = int(np.argmax(row["dream_seeds"]))
        agents[game] = load_agent(runs / game / f"dream-{row['seeds'][best]}" / row["kept"], "fp32")
        agents[game].facts |= {"real_return": row["dream_seeds"][best], "random_return": row["random"]}
    homes = {game: agent_folder(resolve_bundle(bundle, game), game) for game in agents}
    with TemporaryDirectory() as folder:
        sizes = {game: size_of(save_agent(Path(folder) / game, a, a.facts, bits)) for game, a in agents.items()}
    size, names = sum(sizes.values()), ", ".join(f"{game} {size}" for game, size in sizes.items())
    check(size <= kib * 1024, f"kib {kib}: the agents take {size} bytes ({names}); name fewer games, or allow more")
    for game, agent in agents.items():
        found[game] = str(save_agent(homes[game], agent, agent.facts, bits))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line; the last line printed is JSON."""
    with errors_in_one_line():
        print(json.dumps(tyro.cli(ship, args=arguments, description=__doc__)))


if __name__ == "__main__":
    main()
