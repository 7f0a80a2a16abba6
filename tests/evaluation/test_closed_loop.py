"""Policies that play in both worlds, and dreams without end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dreamenv.bundle import GameFacts, Limits, load_bundle
from dreamenv.errors import ConfigError, PolicyError
from dreamenv.evaluation.closed_loop import Episodes, agreement, play_both, play_episodes, standard_policies
from dreamenv.evaluation.stability import endless
from dreamenv.policies.simple import make_policy
from dreamenv.types import Clips
from dreamenv.vector import DreamVectorEnv
from tests.conftest import write_toy_bundle


def test_agreement_of_known_worlds() -> None:
    rng = np.random.default_rng(0)

    def episodes(p: float) -> Episodes:
        won = rng.random(400) < p
        return Episodes(won * 10.0, np.full(400, 7), won)

    worlds = {f"p{i}": episodes(p) for i, p in enumerate(np.linspace(0, 1, 8))}
    equal = agreement({k: (v, v) for k, v in worlds.items()}, replicates=200)
    assert (
        equal["pearson"] == pytest.approx(1)
        and equal["spearman"] == pytest.approx(1)
        and equal["mean_absolute_error"] == 0
    )
    upside_down = {k: (a, b) for (k, a), b in zip(worlds.items(), reversed(worlds.values()), strict=True)}
    turned = agreement(upside_down, replicates=200)
    assert turned["spearman"] == pytest.approx(-1) and turned["pearson"] < -0.98
    nothing = Episodes(np.zeros(400), np.full(400, 7), np.zeros(400, bool))
    unknown = agreement({k: (nothing, v) for k, v in worlds.items()}, replicates=20)
    assert unknown["pearson"] is None and unknown["spearman"] is None and unknown["mean_absolute_error"] > 1
    row = equal["policies"][4]
    mean, spread = worlds["p4"].returns.mean(), worlds["p4"].returns.std() / 20
    assert row["real_return"] == pytest.approx(mean) and row["dream_success"] == pytest.approx(mean / 10)
    assert row["real_return_ci"] == pytest.approx([mean - 1.96 * spread, mean + 1.96 * spread], abs=0.15)


def test_policies_play_the_same_levels_in_both_worlds(tmp_path: Path) -> None:
    bundle = load_bundle(write_toy_bundle(tmp_path / "toy", limits=Limits(1e6, 1e6)), "cpu")  # none diverges
    results = play_both(bundle, ("hold:right", "random"), episodes=5, limit=40, seed=4)
    again = play_both(bundle, ("hold:right", "random"), episodes=5, limit=40, seed=4)
    for name, pair in results.items():
        for one, other in zip(pair, again[name], strict=True):
            assert one.returns.tolist() == other.returns.tolist() and one.lengths.tolist() == other.lengths.tolist()
            assert one.returns.shape == (5,) and (one.lengths <= 40).all() and (one.lengths[~one.ended] == 40).all()
    with pytest.raises(ConfigError, match="limit"):
        play_both(bundle, ("random",), 2, limit=101)
    with pytest.raises(PolicyError, match="hold:fly"):
        play_both(bundle, ("hold:fly",), 2, limit=5)


@pytest.mark.parametrize(
    ("game", "held"),
    [
        ("coinrun", {"noop", "right+up", "right", "up", "left", "left+up", "down"}),
        ("bossfight", {"noop", "d", "left", "down", "up", "right", "left+down", "left+up"}),  # d fires
        ("climber", {"noop", "up", "left+up", "right+up", "left", "right"}),  # knows no more
        ("plunder", {"noop", "d", "left", "right"}),
    ],
)
def test_each_game_is_judged_by_the_actions_that_it_has(game: str, held: set[str]) -> None:
    policies = standard_policies(GameFacts(game, "easy", 100))
    assert {p.removeprefix("hold:") for p in policies if p.startswith("hold:")} == held
    assert policies[0] == "hold:noop" and policies[len(held) :][:5] == ("random", "sticky", "held", "biased", "mix")
    agents = policies[len(held) + 5 :]
    assert agents[-1] == "bundled" and len(agents) == 8, "the agent, ever less at random"
    assert [float(agent.partition(":")[2]) for agent in agents[:-1]] == [0.9, 0.75, 0.6, 0.5, 0.4, 0.25, 0.1]


@pytest.mark.slow
def test_by_default_the_game_s_own_limit_and_policies_count(tmp_path: Path) -> None:
    bundle = load_bundle(write_toy_bundle(tmp_path / "toy", calm=9.0, limits=Limits(1e6, 1e6)), "cpu")
    results = play_both(bundle, episodes=2)
    assert tuple(results) == tuple(p for p in standard_policies(bundle.game) if "bundled" not in p), "no agent ships"
    still = results["hold:noop"]
    assert [e.lengths.max() for e in still] == [bundle.game.max_steps] * 2


def test_dreams_that_have_ended_are_dropped_and_the_rest_play_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(write_toy_bundle(tmp_path / "toy", calm=1.5, limits=Limits(1e6, 1e6)), "cpu")
    envs = DreamVectorEnv(12, bundle=bundle, exact=True)
    policy, rng, frames = make_policy("sticky"), np.random.default_rng(0), envs.reset(seed=3)[0]
    first, (over, ended) = np.ones(12, bool), np.zeros((2, 12), bool)
    returns, lengths = np.zeros(12), np.zeros(12, int)
    shown = []
    for _ in range(25):  # here every environment goes on to the last step
        shown.append(frames)
        frames, rewards, terminated, truncated, _ = envs.step(policy.act(frames, first, rng))
        first = terminated | truncated
        returns, lengths, ended, over = (
            returns + rewards * ~over,
            lengths + ~over,
            ended | (terminated & ~over),
            over | first,
        )
    sizes, step = [], DreamVectorEnv.step
    monkeypatch.setattr(
        DreamVectorEnv, "step", lambda self, actions: (sizes.append(self.num_envs), step(self, actions))[1]
    )
    frames, _ = envs.reset(seed=3)
    episodes, films = play_episodes(envs, frames, make_policy("sticky"), 25, np.random.default_rng(0), 2)
    assert sizes[0] == 12 and sizes == [int((lengths > t).sum()) for t in range(len(sizes))]
    assert episodes.returns.tolist() == returns.tolist() and episodes.returns.any()
    assert episodes.lengths.tolist() == lengths.tolist() and len(set(lengths)) > 3
    assert episodes.ended.tolist() == ended.tolist()
    for i, film in enumerate(films):
        assert np.array_equal(film, np.stack(shown)[: lengths[i], i])
    monkeypatch.setattr(DreamVectorEnv, "_render", None)  # nobody looks, so nothing is drawn
    unseen, _ = play_episodes(envs, frames, make_policy("sticky"), 25, np.random.default_rng(0))
    assert all(np.array_equal(getattr(unseen, k), getattr(episodes, k)) for k in ("returns", "lengths", "ended"))


def test_an_endless_dream_counts_what_leaves_the_range(toy_bundle: Path) -> None:
    bundle = load_bundle(toy_bundle, "cpu")
    frames = np.random.default_rng(0).integers(0, 256, (5, 6, 64, 64, 3), dtype=np.uint8)
    clips = Clips(frames, np.zeros((5, 5), np.int64), np.zeros(5, np.int64), context=4)
    result = endless(bundle, clips, 6, 3, shown=(1, 6, 50))
    assert result["shown"] == [1, 6]
    assert result["frames"].shape == (3, 2, 64, 64, 3) and result["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert result["diverged"] == 0 and result["real_brightness"] == pytest.approx(0.5, abs=0.02)
    tight = SimpleNamespace(exceeded=lambda latents: torch.ones(len(latents), dtype=torch.bool))
    broken: Any = SimpleNamespace(world_model=bundle.world_model, limits=tight)
    assert endless(broken, clips, 3, 3)["diverged"] == 1
