"""Long runs: no NaN, no leak of memory, descriptors or threads; the same bytes in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gymnasium.vector import AutoresetMode

from dreamenv.bundle import embedded_games
from dreamenv.description import read_description
from envs.procgen import RealProcgenVectorEnv
from tests.battery.common import FULL, many, marks, record
from tests.battery.endurance import resident

pytestmark = [*marks, pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")]


def alone(world: str, mode: AutoresetMode, cores: int, bundle: Path, steps: int = 15625) -> dict[str, Any]:
    """In a process of its own: what other tests have freed would hide what grows, or be taken anew."""
    command = [sys.executable, "-m", "tests.battery.endurance", world, mode.value, str(steps), str(cores), str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


EACH_MODE = [(world, 1, mode) for world in ("dream", "real") for mode in AutoresetMode]
# threads do not depend on the mode, so the short battery tries them in one
TWO_CORES = [("dream", 2, mode) for mode in AutoresetMode]


@pytest.mark.parametrize(
    ("world", "cores", "mode"), EACH_MODE + (TWO_CORES if FULL else TWO_CORES[:1]), ids=lambda x: getattr(x, "value", x)
)
def test_nothing_grows(world: str, cores: int, mode: AutoresetMode, toy_bundle: Path) -> None:
    own = {"mib_per_100000_steps": 0.0, "growth_mib": 0.0}
    if FULL:
        figures, limit = alone(world, mode, cores, toy_bundle), 1.0
        if world == "real":  # Procgen itself grows
            own = alone("procgen", mode, 1, toy_bundle)
            figures["procgen_mib_per_100000_steps"] = own["mib_per_100000_steps"]
    else:  # few steps say little of a slope
        figures, limit = alone(world, mode, cores, toy_bundle, 300), 100.0
    record(f"endurance-{world}-{cores}-{mode.value}", **figures)
    assert figures["descriptors"][0] == figures["descriptors"][1]
    assert figures["threads"][0] == figures["threads"][1]
    assert figures["mib_per_100000_steps"] <= own["mib_per_100000_steps"] + limit
    assert figures["growth_mib"] < own["growth_mib"] + 20


def test_resets_leak_nothing_of_the_real_game() -> None:
    envs = RealProcgenVectorEnv(1)
    for i in range(40):
        envs.reset(seed=i)
    before, count = resident(), many(8_000, 400)
    for i in range(count // 2):
        envs.reset(seed=i)
        envs.reset(options={"level": i})
    grown = (resident() - before) * 1024 / count
    envs.close()
    record("resets", resets=count, kib_per_reset=grown)
    assert grown < 2.0, "KiB a reset; it was 9 to 30"


PROGRAM = """
    import hashlib, sys
    import numpy as np
    from dreamenv.vector import DreamVectorEnv
    folder, game, seed, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    envs = DreamVectorEnv(4, bundle=folder, game=game, device="cpu", precision="fp32", sampler={"nfe": 2})
    rng = np.random.default_rng(seed)
    digest = hashlib.sha256(envs.reset(seed=seed)[0].tobytes())
    for _ in range(steps // 4):
        for x in envs.step(rng.integers(15, size=4))[:4]:
            digest.update(np.ascontiguousarray(x).tobytes())
    print(digest.hexdigest())
"""


EACH = {
    read_description(folder / "bundle.json")["models"]["dynamics"]["type"]: game
    for game, folder in embedded_games().items()
}
"""One game of each kind of dynamics in the package."""


@pytest.mark.parametrize("game", list(embedded_games()) if FULL else list(EACH.values()))
def test_another_process_dreams_the_same(game: str) -> None:
    import textwrap

    for seed in range(many(3, 1)):
        steps = str(many(10_000, 80))
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(embedded_games()[game]), game, str(seed), steps]
        seen = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
        assert len(seen) == 1 and len(seen.pop()) == 65
    record(f"determinism-{game}", seeds=many(3, 1), steps=many(10_000, 80))
