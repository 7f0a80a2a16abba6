"""Both worlds as state machines: any order of calls, held against a model that knows what must come (Hypothesis)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from dreamenv.errors import ClosedError, DreamenvError, InvalidActionError, ResetError
from tests.battery.common import many, marks
from tests.conftest import write_toy_bundle

pytestmark = marks


class Worlds(RuleBasedStateMachine):
    """One batch that is used in any order, and a second one that repeats from each snapshot what the first did."""

    world, bundle = "dream", ""

    def make(self, mode: str) -> Any:
        options = (
            {"bundle": self.bundle, "device": "cpu", "exact": True} if self.world == "dream" else {"num_levels": 20}
        )
        name = {"dream": "dreamenv:DreamProcgen-v0", "real": "envs:RealProcgen-v0"}[self.world]
        made = gym.make_vec(name, num_envs=2, autoreset_mode=mode, max_episode_steps=6, **options)
        return made.unwrapped

    @initialize(mode=st.sampled_from(["NextStep", "SameStep", "Disabled"]))
    def begin(self, mode: str) -> None:
        self.mode = mode
        self.envs, self.shadow = self.make(mode), self.make(mode)
        self.started = self.closed = False
        self.over = np.zeros(2, bool)
        self.frames: Any = None
        self.saved: list[tuple[bytes, np.ndarray, np.ndarray]] = []
        self.since: list[tuple[str, Any, Any]] = []  # what was done since the last snapshot, and what came

    def note(self, call: str, argument: Any, result: Any) -> None:
        if self.saved:
            self.since.append((call, argument, result))

    @precondition(lambda self: not self.closed)
    @rule(seed=st.one_of(st.none(), st.integers(0, 2**31)), masked=st.booleans())
    def reset(self, seed: int | None, masked: bool) -> None:
        mask = np.array([True, False]) if masked and self.started else np.ones(2, bool)
        if not self.started and seed is None:
            seed = 1  # nobody can repeat the other kind
        options = {"reset_mask": mask}
        before = None if self.frames is None else self.frames.copy()
        frames, _ = self.envs.reset(seed=seed, options=options)
        if before is not None and not mask.all():
            assert np.array_equal(frames[1], before[1])
        self.started, self.frames = True, frames
        self.over &= ~mask
        self.note("reset", (seed, options), frames)

    @precondition(lambda self: not self.closed)
    @rule(actions=st.lists(st.integers(0, 14), min_size=2, max_size=2))
    def step(self, actions: list[int]) -> None:
        if not self.started or (self.mode == "Disabled" and self.over.any()):
            with pytest.raises(ResetError):
                self.envs.step(actions)
            return
        frames, rewards, terminated, truncated, infos = self.envs.step(actions)
        assert frames.dtype == np.uint8 and np.isfinite(rewards).all() and not (terminated & truncated).any()
        if self.mode == "NextStep":
            assert not (terminated | truncated)[self.over].any() and not rewards[self.over].any()
        self.over = terminated | truncated if self.mode != "SameStep" else np.zeros(2, bool)
        self.frames = frames
        self.note("step", actions, (frames, rewards, terminated, truncated))

    @precondition(lambda self: not self.closed)
    @rule(wrong=st.sampled_from([[15, 0], [0], [0.5, 1.0], "x", None]))
    def a_wrong_step_changes_nothing(self, wrong: Any) -> None:
        before = self.envs.snapshot() if self.started else None
        with pytest.raises(InvalidActionError):
            self.envs.step(wrong)
        assert before is None or self.envs.snapshot() == before

    @precondition(lambda self: not self.closed and self.started)
    @rule()
    def save(self) -> None:
        self.saved.append((self.envs.snapshot(), self.frames.copy(), self.over.copy()))
        self.since = []

    @precondition(lambda self: not self.closed and self.saved)
    @rule(which=st.integers(0, 100))
    def restore(self, which: int) -> None:
        data, frames, over = self.saved[which % len(self.saved)]
        assert np.array_equal(self.envs.restore(data), frames)
        self.frames, self.over = frames.copy(), over.copy()
        self.saved.append((data, frames, over))
        self.since = []

    @precondition(lambda self: not self.closed and self.saved and self.since)
    @rule()
    def what_followed_a_snapshot_follows_again(self) -> None:
        if any(call == "reset" and argument[0] is None for call, argument, _ in self.since) and self.world == "real":
            return  # which level comes next may be drawn from the environment's own generator
        self.shadow.restore(self.saved[-1][0])
        for call, argument, result in self.since:
            if call == "step":
                again = self.shadow.step(argument)[:4]
                assert all(np.array_equal(a, b) for a, b in zip(result, again, strict=True))
            else:
                again = self.shadow.reset(seed=argument[0], options=argument[1])[0]
                assert np.array_equal(result, again)

    @precondition(lambda self: not self.closed and self.saved and self.world == "dream")
    @rule(n=st.integers(1, 3), index=st.integers(0, 1))
    def branch(self, n: int, index: int) -> None:
        data, frames, _ = self.saved[-1]
        fan = self.envs.branch(data, n, index)
        assert fan.num_envs == n and np.array_equal(fan._frames, np.repeat(frames[index : index + 1], n, 0))
        fan.close()

    @precondition(lambda self: not self.closed)
    @rule(really=st.integers(0, 9))
    def close(self, really: int) -> None:
        if really:
            return
        self.envs.close()
        self.closed = True

    @precondition(lambda self: self.closed)
    @rule()
    def nothing_works_after_close(self) -> None:
        for call in (lambda: self.envs.reset(seed=0), lambda: self.envs.step([1, 1]), self.envs.snapshot):
            with pytest.raises(ClosedError):
                call()

    def teardown(self) -> None:
        if hasattr(self, "envs"):
            self.envs.close()
            self.shadow.close()


@pytest.mark.parametrize("world", ["dream", "real"])
def test_any_order_of_calls(world: str, tmp_path: Path) -> None:
    bundle = str(write_toy_bundle(tmp_path / "b", calm=2.0))
    machine = type("Machine", (Worlds,), {"world": world, "bundle": bundle})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=many(400, 8),
            stateful_step_count=many(60, 20),
            deadline=None,
            suppress_health_check=checks,
            derandomize=True,
            database=None,
        ),
    )


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(-3, 20), max_size=4),
    st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
    st.sampled_from(
        [
            np.zeros(2),
            np.zeros((2, 1), int),
            np.array(None),
            np.array(["a", "b"]),
            np.datetime64("2026-01-01"),
            object(),
        ]
    ),
    st.complex_numbers(allow_nan=True),
)


@pytest.mark.parametrize("world", ["dream", "real"])
@pytest.mark.parametrize(
    "call", ["step", "seed", "options", "mask", "start", "frames", "level", "restore", "branch", "select", "sampler"]
)
def test_anything_as_an_argument(call: str, world: str, toy_bundle: Path) -> None:
    """Two hundred odd values each: taken, or refused with a typed error and nothing changed."""
    from hypothesis import given

    if world == "real" and call in ("start", "frames", "branch", "select", "sampler"):
        pytest.skip("a call of the dream only")
    name = {"dream": "dreamenv:DreamProcgen-v0", "real": "envs:RealProcgen-v0"}[world]
    options: dict[str, Any] = {"bundle": str(toy_bundle), "device": "cpu"} if world == "dream" else {"num_levels": 20}
    envs: Any = gym.make_vec(name, num_envs=2, **options).unwrapped
    envs.reset(seed=0)
    good = envs.snapshot()
    calls = {
        "step": lambda v: envs.step(v),
        "seed": lambda v: envs.reset(seed=v),
        "options": lambda v: envs.reset(options=v),
        "mask": lambda v: envs.reset(options={"reset_mask": v}),
        "start": lambda v: envs.reset(options={"start": v}),
        "frames": lambda v: envs.reset(options={"frames": v}),
        "level": lambda v: envs.reset(options={"level": v}),
        "restore": lambda v: envs.restore(v),
        "branch": lambda v: envs.branch(good, v if not isinstance(v, int) or v < 100 else -1).close(),
        "select": lambda v: envs.select(v).close(),
        "sampler": lambda v: setattr(envs, "sampler", v),
    }

    @settings(max_examples=many(200, 25), deadline=None, derandomize=True, database=None)
    @given(ODD)
    def try_it(value: Any) -> None:
        before = envs.snapshot()
        try:
            calls[call](value)
        except DreamenvError:
            assert envs.snapshot() == before

    try_it()
    envs.close()
