"""What else a program has set up in its process: torch's global settings, forks, threads, gym's notices."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from dreamenv import bundle as bundles
from dreamenv.bundle import load_bundle
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, load_agent, save_agent
from dreamenv.vector import DreamVectorEnv
from tests.conftest import same_bytes


@contextlib.contextmanager
def switched(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """Set something of torch's, and hold that it is still so in the end."""
    before = get()
    put(value)
    try:
        yield
        assert get() == value, "left as it was"
    finally:
        put(before)


def default_device(value: str | None) -> None:
    torch.set_default_device(value)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "float64": lambda: switched(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: switched(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "meta": lambda: switched(
        lambda: torch.get_default_device().type, lambda d: default_device(None if d == "cpu" else d), "meta"
    ),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "grad": lambda: torch.enable_grad(),
    "no grad": lambda: torch.no_grad(),
    "inference": lambda: torch.inference_mode(),
    "deterministic": lambda: switched(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "matmul": lambda: switched(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "three threads": lambda: switched(torch.get_num_threads, torch.set_num_threads, 3),
    "detect anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
}
needs_mps_warning = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")


def bytes_of(bundle: Path, agent: Path, exact: bool) -> bytes:
    """Everything a user may do, as bytes: load, reset, step, branch, restore, act."""
    out: list[Any] = []
    for n in (1, 3):
        envs = DreamVectorEnv(n, bundle=bundle, device="cpu", precision="fp32", sampler={"nfe": 2}, exact=exact)
        first = envs.reset(seed=4)[0]
        out.append(first)
        for action in (7, 8, 1):
            out += envs.step(np.full(n, action))[:4]
        snapshot = envs.snapshot()
        out.append(envs.branch(snapshot, 2).step(np.array([7, 1]))[0])
        out.append(envs.restore(snapshot))
        out.append(envs.reset(options={"frames": first[:, None]})[0])
        out.append(envs.select([0]).step([3])[0])
    env = gym.make("dreamenv:DreamProcgen-v0", bundle=str(bundle), device="cpu", precision="fp32")
    out += [env.reset(seed=1)[0], env.step(7)[0]]
    if not exact:
        out.append(load_agent(agent, "fp32").probabilities(first)[0])
    return b"".join(np.ascontiguousarray(x).tobytes() for x in out)


@pytest.fixture(scope="module")
def saved_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_agent(tmp_path_factory.mktemp("agent") / "a", ImpalaAgent(ImpalaConfig((4, 8), 16)))


@needs_mps_warning
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded before", "loaded under it"])
@pytest.mark.parametrize("name", SETTINGS)
def test_torchs_settings_matter_nothing_and_stay(name: str, loaded: bool, toy_bundle: Path, saved_agent: Path) -> None:
    exact = name == "three threads"  # a batch at once is rounded otherwise by another number of threads
    plain = bytes_of(toy_bundle, saved_agent, exact)
    if not loaded:
        bundles._loaded.clear()
    torch.manual_seed(7)
    np.random.seed(7)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    with SETTINGS[name]():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        autocast, threads = torch.is_autocast_enabled("cpu"), torch.get_num_threads()
        found = bytes_of(toy_bundle, saved_agent, exact)
        assert (grad, inference) == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        assert (autocast, threads) == (torch.is_autocast_enabled("cpu"), torch.get_num_threads())
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])
    bundles._loaded.clear()  # what was loaded under another setting is as good
    assert found == plain and bytes_of(toy_bundle, saved_agent, exact) == plain


def test_a_bundle_loaded_in_inference_mode_can_be_trained(toy_bundle: Path) -> None:
    bundles._loaded.clear()
    with torch.inference_mode():
        model = load_bundle(toy_bundle, "cpu").world_model
    weight = next(model.dynamics.parameters())
    weight.requires_grad_(True)
    (weight * 2).sum().backward()
    assert weight.grad is not None
    bundles._loaded.clear()


FORKED = """
    import sys
    import dreamenv, gymnasium as gym, torch
    from dreamenv.vector import DreamVectorEnv
    import numpy as np
    torch.set_num_threads(2)
    envs = DreamVectorEnv(16, bundle=sys.argv[1])
    envs.reset(seed=0)
    envs.step(np.zeros(16, int))          # torch has used its threads
    batch = gym.make_vec("DreamProcgen-v0", 2, "async", {"context": sys.argv[2]}, bundle=sys.argv[1], device="cpu")
    frames, _ = batch.reset(seed=0)
    for _ in range(3):
        batch.step([7, 8])
    batch.close()
    print(torch.get_num_threads(), frames.shape)
"""


def run(program: str, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} | environment
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_process_made_after_torch_has_used_its_threads_steps(method: str, toy_bundle: Path) -> None:
    if method == "spawn":  # it imports the main program, which -c has none of
        program = FORKED.replace("    import sys\n", "    import sys\n    if __name__ != '__main__': sys.exit()\n", 1)
    else:
        program = FORKED
    done = run(program, str(toy_bundle), method)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "2 (2, 64, 64, 3)"


@pytest.mark.slow
def test_torchs_threads_do_not_spin_for_long() -> None:
    """GOMP_SPINCOUNT is set before torch is loaded, unless the caller has set it, and children inherit it."""
    show = "import os, dreamenv.vector; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run(show).stdout.strip() == "1000"
    assert run(show, GOMP_SPINCOUNT="5").stdout.strip() == "5"
    for module in ("trainers.train", "agents.train", "envs.collect"):
        early = f"import os, sys, {module}; print(os.environ.get('GOMP_SPINCOUNT'))"
        assert run(early).stdout.strip() == "1000", module


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every step of a world model: how many environments, and torch's threads."""
    from dreamenv.world_model import WorldModel

    seen: list[tuple[int, int]] = []
    step = WorldModel.step

    def noted(self: WorldModel, state: Any, *arguments: Any) -> Any:
        seen.append((len(state.latents), torch.get_num_threads()))
        return step(self, state, *arguments)

    monkeypatch.setattr(WorldModel, "step", noted)
    return seen


def dreamt(bundle: Path, n: int, seed: int, exact: bool = False) -> list[np.ndarray]:
    envs = DreamVectorEnv(n, bundle=bundle, device="cpu", exact=exact)
    envs.reset(seed=seed)
    return [np.concatenate([np.asarray(x).reshape(n, -1) for x in envs.step(np.full(n, a))[:4]], 1) for a in (7, 1)]


def test_one_environment_uses_one_thread_and_a_few_use_torchs(toy_bundle: Path, steps: list[tuple[int, int]]) -> None:
    with switched(torch.get_num_threads, torch.set_num_threads, 2):
        dreamt(toy_bundle, 1, 0)
        dreamt(toy_bundle, 4, 0)
    assert steps == [(1, 1)] * 2 + [(4, 2)] * 2


def test_each_core_steps_its_own_part_of_a_batch(toy_bundle: Path, steps: list[tuple[int, int]]) -> None:
    with switched(torch.get_num_threads, torch.set_num_threads, 1):
        parts = [dreamt(toy_bundle, 8, 0), dreamt(toy_bundle, 12, 8)]
        single = dreamt(toy_bundle, 3, 0, exact=True)
    steps.clear()
    with switched(torch.get_num_threads, torch.set_num_threads, 2):
        whole = dreamt(toy_bundle, 20, 0)
        assert sorted(steps) == [(8, 1)] * 2 + [(12, 1)] * 2
        for together, first, second in zip(whole, *parts, strict=True):
            assert np.array_equal(together, np.concatenate([first, second]))
        assert all(np.array_equal(a, b) for a, b in zip(dreamt(toy_bundle, 3, 0, exact=True), single, strict=True))
        assert steps[4:] == [(1, 1)] * 6
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [torch.get_num_threads()] == [2]
    steps.clear()
    with switched(torch.get_num_threads, torch.set_num_threads, 5):
        dreamt(toy_bundle, 20, 0)
    assert sorted(steps) == [(8, 2)] * 2 + [(12, 2)] * 2, "cores without a part of their own help the others"


def test_an_error_in_one_part_is_raised(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamenv.world_model import WorldModel

    envs = DreamVectorEnv(16, bundle=toy_bundle, device="cpu")
    envs.reset(seed=0)
    before = envs.snapshot()
    step = WorldModel.step

    def broken(self: WorldModel, state: Any, actions: Any, *rest: Any) -> Any:
        if actions[0] == 7:
            raise MemoryError("no room")
        return step(self, state, actions, *rest)

    with switched(torch.get_num_threads, torch.set_num_threads, 2), monkeypatch.context() as patch:
        patch.setattr(WorldModel, "step", broken)
        with pytest.raises(MemoryError):
            envs.step([0] * 8 + [7] * 8)
        assert torch.get_num_threads() == 2
    assert same_bytes(envs.snapshot(), before)


@pytest.mark.slow
def test_programs_that_make_both_worlds_say_nothing_of_old_gym(toy_bundle: Path) -> None:
    program = """
        import sys, gymnasium as gym, dreamenv, envs
        gym.make("DreamProcgen-v0", bundle=sys.argv[1]).reset(seed=0)
        gym.make("RealProcgen-v0").reset(seed=0)
        gym.make("LegacyProcgen-v0").reset(seed=0)
        import agents.train
    """
    done = run(program, str(toy_bundle))
    assert done.returncode == 0 and "gym" not in done.stderr.lower(), done.stderr


def test_nothing_but_json_is_printed_by_info(toy_bundle: Path) -> None:
    command = [sys.executable, "-m", "dreamenv", "info", "--bundle", str(toy_bundle)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.dumps(done.stdout)
