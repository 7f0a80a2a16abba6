"""The benchmark of agents, and the planner."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image
from scipy import stats

import agents.benchmark
import agents.real_steps
from agents.benchmark import BenchmarkConfig, beats, bootstrap, run_benchmark, share_of_the_way, table_of
from agents.evaluate import evaluate
from agents.real_steps import RealStepsConfig, run_real_steps
from agents.saved import agent_facts
from agents.ship import ship
from dreamenv.data import Dataset
from dreamenv.errors import BundleError, ConfigError, PolicyError
from dreamenv.evaluation.metrics import interval
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, load_agent, save_agent
from dreamenv.vector import DreamVectorEnv
from tests.here import brief

ALGORITHM = """
algorithm: PPO
num_envs: 2
settings: {n_steps: 8, batch_size: 8, n_epochs: 1}
network: {channels: [4, 4, 4], features: 8}
"""


def test_what_share_of_the_way_from_random_to_real() -> None:
    assert share_of_the_way(2.0, 6.0, 5.0) == 0.75 and share_of_the_way(2.0, 6.0, 1.0) == -0.25
    assert share_of_the_way(2.0, 2.0, 3.0) is None
    rows = {
        name: {"random": 1.0, "real": 3.0, "share": share} for name, share in zip("abc", (0.1, None, 0.5), strict=True)
    }
    last = table_of(rows).splitlines()[-1]
    assert last.startswith("| median, share of 2 games |") and last.endswith(" 0.30 |")
    assert "| median |" in table_of({name: rows[name] for name in "ac"})


def test_intervals_count_the_agents_and_the_levels_that_all_of_them_play() -> None:
    alike = np.tile([0.0, 10.0], (3, 50))  # each level always earns the same: three agents tell no more than one
    assert bootstrap(alike).std() == pytest.approx(bootstrap(alike[:1]).std(), rel=0.05)
    assert bootstrap(alike).std() == pytest.approx(5 / 100**0.5, rel=0.05)
    apart = np.repeat([[0.0], [10.0]], 1000, 1)  # each agent always earns the same: only which one was drawn matters
    assert bootstrap(apart).std() == pytest.approx(5 / 2**0.5, rel=0.05)


def test_one_lucky_episode_does_not_beat_a_player() -> None:
    """A t-test of the two means is not significant either."""
    returns = np.zeros((2, 500))
    returns[0, :3], returns[1, :8], returns[1, 8] = 1, 1, 11
    row: dict[str, float] = {}
    for who, each in zip("ab", returns, strict=True):
        row[f"{who}_low"], row[f"{who}_high"] = interval(bootstrap(each[None]))
    assert row["b_low"] > returns[0].mean() and not beats(row, "b", "a") and not beats(row, "a", "b")
    assert stats.ttest_ind(*returns).pvalue > 0.05
    surely = row | {"b_low": row["a_high"] + 0.01}
    assert beats(surely, "b", "a") and not beats(surely, "a", "b")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_agents_of_both_worlds_are_trained_and_judged_once(
    toy_bundle: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.yaml").write_text(ALGORITHM)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- agents-games -->\n<!-- /agents-games -->\nafter\n")
    shared: dict[str, Any] = {"steps": 16, "config": tmp_path / "small.yaml", "bundle": toy_bundle, "horizon": 9}
    shared |= {"episodes": 5, "tried": 2, "limit": 30, "out": tmp_path / "out", "docs": page}
    shared |= {"critic_minutes": 0.01, "critic_steps": 8000}
    row = run_benchmark(BenchmarkConfig(**shared))["coinrun"]
    alone = evaluate("random", episodes=5, limit=30).figures
    assert row["random"] == alone["mean_return"] and row["random_scaled"] == pytest.approx((row["random"] - 5) / 5)
    folders = {world: tmp_path / "out" / "coinrun" / f"{world}-0" / "agent" for world in ("real", "dream")}
    for world, folder in folders.items():
        judged = evaluate(str(folder), episodes=5, limit=30).figures
        assert row[world] == judged["mean_return"] and row[f"{world}_low"] <= row[world] <= row[f"{world}_high"]
    assert "| coinrun |" in page.read_text() and page.read_text().endswith("after\n")
    critic, (real, dream) = tmp_path / "out" / "coinrun" / "critic", (agent_facts(folders[w]) for w in folders)
    assert dream["critic"] == agent_facts(critic / "agent")["critic"] and "critic" not in real
    assert 0 < dream["critic"]["pictures"] <= len(Dataset(tmp_path / "out" / "coinrun" / "play")) < 8200
    home = shutil.copytree(toy_bundle, tmp_path / "home")
    written = tmp_path / "out" / "benchmark.json"
    for high, ships in ((row["dream_low"], False), (row["dream_low"] - 0.1, True)):
        written.write_text(json.dumps({"coinrun": row | {"random_high": high}}))
        told = ship(tmp_path / "out", bundle=home)["coinrun"]
        assert told.startswith("none: from ") == (not ships) and (home / "agent").exists() == ships
    shipped = load_agent(home / "agent")
    assert shipped.facts["real_return"] == row["dream"] and shipped.facts["world"] == "dream"
    learnt = load_agent(tmp_path / "out" / "coinrun" / "dream-0" / "agent")
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    assert np.abs(shipped.probabilities(frames)[0] - learnt.probabilities(frames)[0]).max() < 0.01
    before = (home / "agent" / "agent.json").read_bytes()
    for wrong, named in (({"kib": 1}, "kib 1: the agents take"), ({"games": ("maze",)}, "games maze: not in")):
        with pytest.raises(ConfigError, match=named):
            ship(tmp_path / "out", bundle=home, **wrong)
    assert (home / "agent" / "agent.json").read_bytes() == before
    written.write_text(json.dumps({"coinrun": row}))
    monkeypatch.setattr(agents.benchmark, "run_command", None)  # a second run trains nothing
    monkeypatch.setattr(agents.benchmark, "evaluate", None)
    assert run_benchmark(BenchmarkConfig(**shared))["coinrun"] == row
    with pytest.raises(ConfigError, match="steps"):
        run_benchmark(BenchmarkConfig(**(shared | {"steps": 32})))
    judged = tmp_path / "out" / "stages" / "coinrun-judged-real-0.json"
    for earned, learnt in ((100.0, True), (-1.0, False)):  # where PPO in the game learns nothing nobody has to dream
        judged.write_text(json.dumps({"done": True, "result": {"returns": [earned] * 5}}))
        found = run_benchmark(BenchmarkConfig(**(shared | {"learnable": True, "docs": None})))["coinrun"]
        assert (found["learnt"], "dream" in found, found["share"] is None) == (learnt, learnt, not learnt)
    assert "not learnable" in ship(tmp_path / "out", bundle=home)["coinrun"]
    wrongs: list[dict[str, Any]]
    wrongs = [
        {"games": ("maze", "maze")},
        {"seeds": ()},
        {"episodes": 0},
        {"choose": -1},
        {"critic_minutes": -1},
        {"critic_steps": 0},
        {"horizon": 10**6},
        {"games": ("x",)},
        {"device": "y"},
    ]
    choosing: dict[str, Any] = shared | {"choose": 8, "choose_nfe": 4, "choose_limit": 7}
    chosen = BenchmarkConfig(**choosing)
    asked = {world: chosen.run("coinrun", world, 0) for world in ("real", "dream")}
    assert (asked["dream"].judge, asked["dream"].eval_every) == ("dream", 8) and asked["real"].eval_every == 0
    assert (asked["dream"].eval_nfe, asked["dream"].eval_limit) == (4, 7) and asked["real"].eval_nfe is None
    with pytest.raises(PolicyError, match="nobody"):
        BenchmarkConfig(critic_policy="biased=0.5,nobody=0.5")
    with pytest.raises(BundleError):
        BenchmarkConfig(bundle=tmp_path / "nowhere")
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            BenchmarkConfig(**wrong)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_how_many_real_steps_it_takes_is_one_command_that_resumes(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.yaml").write_text(ALGORITHM)
    page = tmp_path / "page.md"
    page.write_text("<!-- agents-steps -->\n<!-- /agents-steps -->\n")
    shared: dict[str, Any] = {"games": ("dodgeball",), "steps": (4000,), "imagined": 16, "stage_steps": 2, "limit": 20}
    shared |= {"critic_minutes": 0.01}
    shared |= {
        "config": tmp_path / "small.yaml",
        "recipe": "predictor_patches",
        "episodes": 5,
        "horizon": 9,
        "docs": page,
    }
    shared |= {"set": ("loop.batch_size=4", "task.val_ratio=0.2", *brief("predictor_patches")), "out": tmp_path / "out"}
    rows = run_real_steps(RealStepsConfig(**shared))
    assert [row["steps"] for row in rows] == [4000]
    for row in rows:
        here = tmp_path / "out" / "dodgeball" / str(row["steps"])
        assert row["steps"] <= len(Dataset(here / "model" / "data")) < row["steps"] + 200
        dream, critic = (agent_facts(here / name / "agent") for name in ("dream", "critic"))
        assert dream["world"] == "dream" and dream["critic"] == critic["critic"]
        assert 0 < critic["critic"]["pictures"] <= len(Dataset(here / "model" / "data"))
        for world in ("real", "dream"):
            judged = evaluate(str(here / world / "agent"), game="dodgeball", episodes=5, limit=20).figures
            assert row[world] == judged["mean_return"] and row[f"{world}_low"] <= row[world] <= row[f"{world}_high"]
    assert "| dodgeball, 4,000 |" in page.read_text()
    with Image.open(tmp_path / "out" / "real_steps.png") as plot:
        assert plot.width > 500
    monkeypatch.setattr(agents.real_steps, "run_command", None)  # a second run trains nothing
    monkeypatch.setattr(agents.real_steps, "evaluate", None)
    assert run_real_steps(RealStepsConfig(**shared)) == rows
    wrongs: list[dict[str, Any]]
    wrongs = [{"steps": (5, 5)}, {"steps": ()}, {"steps": (0,)}, {"minutes": 0}, {"games": ("x",)}, {"horizon": 10**6}]
    wrongs += [{"critic_minutes": minutes} for minutes in (-1, float("inf"), float("nan"))]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            RealStepsConfig(**wrong)


def test_the_planner_finds_what_the_dream_rewards(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a dream that pays for one action and ends with another, the plan takes the one and leaves the other."""
    made = gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda name, **o: made(name, bundle=str(toy_bundle), **o))
    program = runpy.run_path("examples/plan.py")
    args: Any = program["Args"](futures=256, horizon=6, every=6, rounds=5, keep=0.0, elite=0.1, gamma=1.0)
    dream: Any = gym.make_vec("DreamProcgen-v0", num_envs=1, sampler={"temperature": 0.0})
    outcomes = DreamVectorEnv._outcomes

    def pay(self: Any, imagined: Any, uniforms: np.ndarray) -> Any:
        rewards, ends, details = outcomes(self, imagined, uniforms)
        taken = imagined.state.actions[:, -1].numpy()
        details["expected_reward"] = (taken == 7) * 1.0 + (taken == 3) * 2.0
        details["end_probability"] = (taken == 3) * 1.0
        return rewards, ends & False, details

    monkeypatch.setattr(DreamVectorEnv, "_outcomes", pay)
    frames = [np.zeros((64, 64, 3), np.uint8)] * 3
    actions = program["plan"](args, dream, frames, [1, 2], np.random.default_rng(0))
    assert actions.shape == (6,) and (actions[:5] == 7).sum() >= 4 and 3 not in actions[:5]


def test_plans_that_are_none_are_refused(toy_bundle: Path, tmp_path: Path) -> None:
    program = runpy.run_path("examples/plan.py")
    for wrong in ({"rounds": 0}, {"every": 0}, {"every": 9, "horizon": 8}, {"futures": 0}):
        with pytest.raises(ConfigError):
            program["Args"](**wrong)
    with pytest.raises(ConfigError, match="none ships with coinrun"):
        program["judge_of"](program["Args"](agent="bundled"), toy_bundle)
    agent = ImpalaAgent(ImpalaConfig(channels=(4, 4, 4), features=8))
    judge = program["judge_of"](program["Args"](agent=str(save_agent(tmp_path / "old", agent))), toy_bundle)
    with pytest.raises(PolicyError, match="knows no values"):
        judge(np.zeros((2, 64, 64, 3), np.uint8))


def test_a_plan_heeds_what_the_moments_are_worth_at_which_futures_stop(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no reward is in reach, the plan ends in the picture that the judge likes best, and that is not dead."""
    made = gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda name, **o: made(name, bundle=str(toy_bundle), **o))
    program = runpy.run_path("examples/plan.py")
    args: Any = program["Args"](futures=8, horizon=3, every=3, gamma=0.5)
    how: dict[str, Any] = {"observations": "latent", "render_mode": "rgb_array"}
    dream: Any = gym.make_vec("DreamProcgen-v0", num_envs=1, sampler={"temperature": 0.0}, **how)
    frames = [np.zeros((64, 64, 3), np.uint8)] * 3
    dream.reset(seed=0, options={"frames": np.stack(frames)[None], "actions": np.array([[1, 2]])})
    moment, actions = dream.snapshot(), np.random.default_rng(0).integers(15, size=(8, 3))

    def bright(pictures: np.ndarray) -> np.ndarray:
        assert pictures.shape == (8, 64, 64, 3) and pictures.dtype == np.uint8
        return 1000.0 * pictures.mean((1, 2, 3), dtype=float)

    returns = [program["returns_of"](args, dream, moment, actions, judge) for judge in (None, bright)]
    dreams = dream.branch(moment, 8)
    alive = np.ones(8)
    for t in range(3):
        _, _, terminated, truncated, infos = dreams.step(actions[:, t])
        alive *= (1 - infos["end_probability"]) * ~(terminated | truncated)
    gained = returns[1] - returns[0]
    assert gained == pytest.approx(0.125 * alive * bright(np.stack(dreams.render())), rel=1e-9)
    assert gained.max() > gained.min()


@pytest.mark.slow
def test_the_planner_plays_the_real_game(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda name, **o: made(name, bundle=str(toy_bundle), **o))
    program = runpy.run_path("examples/plan.py")
    args: Any = program["Args"](levels=2, futures=4, horizon=3, every=2, limit=12)
    found = program["main"](args)
    assert found["episodes"] == 2 and 0 <= found["mean_return"] <= 10
