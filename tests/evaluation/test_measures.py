"""Every measure on cases whose answer is known: above all, the real game played as its own dream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch

from dreamenv.bundle import load_bundle
from dreamenv.contract.actions import NOOP
from dreamenv.errors import ConfigError
from dreamenv.evaluation.clips import cut_clips, play_real
from dreamenv.evaluation.compare import CompareConfig
from dreamenv.evaluation.controllability import (
    action_shifts,
    branch_accuracy,
    branch_dream,
    branch_real,
    delta_psnr,
    distinct_actions,
    frame_shifts,
)
from dreamenv.evaluation.imagine import CachedEncoder, open_loop
from dreamenv.evaluation.metrics import colour_frequencies
from dreamenv.evaluation.open_loop import compare_open_loop
from dreamenv.evaluation.outcomes import OutcomeScores, outcome_confusion, outcome_figures, outcome_scores
from dreamenv.flow import SamplerConfig
from dreamenv.types import Clips, Segment
from dreamenv.world_model import WorldModel

CONTEXT, HORIZON = 4, 8


@dataclass
class Moment:
    """A state of the double below: its frames in the place of latents."""

    latents: torch.Tensor
    snapshots: list[bytes]
    last: list[int]


class RealAsDream:
    """The real game behind the world model's interface; `late` applies each action one step late, `blind` never."""

    def __init__(self, known: dict[bytes, bytes], env: Any, late: bool = False, blind: bool = False) -> None:
        self.known, self.env, self.late, self.blind = known, env, late, blind
        self.context, self.frame_shape = CONTEXT, (64, 64, 3)
        self.dynamics = SimpleNamespace(deterministic=True)

    def start(self, frames: np.ndarray, actions: np.ndarray) -> Moment:
        snapshots = [self.known[f.tobytes()] for f in frames]
        return Moment(torch.from_numpy(frames[:, -1:].copy()), snapshots, actions[:, -1].tolist())

    def step(self, state: Moment, actions: np.ndarray, noise: None, sampler: SamplerConfig) -> Any:
        frames, snapshots = [], []
        for snapshot, before, action in zip(state.snapshots, state.last, actions.tolist(), strict=True):
            self.env.restore(snapshot)
            frames.append(self.env.step([NOOP if self.blind else before if self.late else action])[0][0])
            snapshots.append(self.env.snapshot())
        after = Moment(torch.from_numpy(np.stack(frames))[:, None], snapshots, actions.tolist())
        return SimpleNamespace(state=after, uncertainty=torch.zeros(len(frames)))

    def encode(self, frames: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(frames.copy())

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def render(self, state: Moment) -> torch.Tensor:
        return state.latents[:, -1]


@pytest.fixture(scope="module")
def recorded() -> Any:
    """A random player's clips of the real game, and how to get back to every frame of them."""
    env: Any = gym.make_vec(
        "envs:RealProcgen-v0", num_envs=1, game="coinrun", start_level=10000, num_levels=50
    ).unwrapped
    rng = np.random.default_rng(0)
    known: dict[bytes, bytes] = {}
    clips, actions = [], []
    for seed in range(16):
        frame, _ = env.reset(seed=seed)
        frames, taken = [frame[0]], []
        for _ in range(CONTEXT + HORIZON + 10):
            taken.append(int(rng.integers(15)))
            frame, _, terminated, truncated, _ = env.step([taken[-1]])
            assert not (terminated | truncated).any()
            frames.append(frame[0])
            known[np.stack(frames[-CONTEXT:]).tobytes()] = env.snapshot()  # one frame may belong to several states
        clips.append(np.stack(frames[11:]))
        actions.append(taken[11:])
    film = Clips(np.stack(clips), np.array(actions), np.zeros(16, np.int64), CONTEXT)
    yield SimpleNamespace(env=env, known=known, clips=film)
    env.close()


def double(recorded: Any, **flaws: bool) -> WorldModel:
    return cast(WorldModel, RealAsDream(recorded.known, recorded.env, **flaws))


def test_the_real_game_as_its_own_dream_is_perfect(recorded: Any) -> None:
    clips = recorded.clips
    result = compare_open_loop(double(recorded), clips, colour_frequencies(clips.frames), SamplerConfig(nfe=1))
    figures = result.figures
    assert figures["psnr_frames"] == 60
    for h in (1, 5):
        assert figures[f"psnr_{h}"] == 100 and figures[f"psnr_mean_{h}"] == 60 and figures[f"mse_{h}"] == 0
        assert figures[f"ssim_{h}"] == pytest.approx(1) and figures[f"detail_{h}"] == pytest.approx(1)
        assert figures[f"copy_psnr_{h}"] < 40 and figures[f"copy_ssim_{h}"] < 0.99
    model = double(recorded)
    assert delta_psnr(model, clips, result.dream, SamplerConfig(nfe=1))[3] > 50
    shifts = action_shifts(model, clips, result.dream, SamplerConfig(nfe=1))
    assert shifts[0] == 100 and max(shifts[-1], shifts[1]) < 50
    shifts = frame_shifts(clips, result.dream)
    assert shifts[0] == 100 and max(shifts[-1], shifts[1]) < 50


def test_a_model_blind_to_actions_has_no_controllability(recorded: Any) -> None:
    model = double(recorded, blind=True)
    dream, _ = open_loop(model, recorded.clips, SamplerConfig(nfe=1))
    assert np.abs(delta_psnr(model, recorded.clips, dream, SamplerConfig(nfe=1))).max() == 0
    assert len(set(action_shifts(model, recorded.clips, dream, SamplerConfig(nfe=1)).values())) == 1


def test_a_model_trained_off_by_one_is_caught(recorded: Any) -> None:
    model = double(recorded, late=True)
    dream, _ = open_loop(model, recorded.clips, SamplerConfig(nfe=1))
    shifts = action_shifts(model, recorded.clips, dream, SamplerConfig(nfe=1))
    assert max(shifts, key=lambda s: shifts[s]) == 1  # it wants its actions one step early
    dream, _ = open_loop(double(recorded), recorded.clips, SamplerConfig(nfe=1))
    shifts = frame_shifts(
        recorded.clips, np.concatenate([recorded.clips.frames[:, CONTEXT - 1 : CONTEXT], dream[:, :-1]], 1)
    )
    assert max(shifts, key=lambda s: shifts[s]) == -1  # and one that shows each frame a step late


GAME: Any = SimpleNamespace(
    name="coinrun",
    distribution_mode="easy",
    action_meanings=(
        "run left",
        "run left",
        "jump left",
        "nothing",
        "nothing",
        "jump",
        "run right",
        "run right",
        "jump right",
        *("nothing",) * 6,
    ),
)


def test_branches_are_the_real_game_under_each_distinct_action() -> None:
    assert distinct_actions(GAME).tolist() == [1, 2, NOOP, 5, 7, 8]
    branches = branch_real(GAME, 40, CONTEXT, 3, seed=1)
    assert branches.real.shape == (40, 6, 3, 64, 64, 3) and branches.context.shape == (40, CONTEXT, 64, 64, 3)
    assert branches.history.shape == (40, CONTEXT - 1)
    perfect = branch_accuracy(branches.real[:, :, -1], branches.real[:, :, -1])
    assert perfect["accuracy"] == 1 and 1 / 6 <= perfect["chance"] < 0.6 and 2 < perfect["distinct"] <= 6
    blind = np.repeat(branches.real[:, 2:3, -1], 6, 1)  # "nothing", whatever the action
    assert branch_accuracy(branches.real[:, :, -1], blind)["accuracy"] == pytest.approx(perfect["chance"], abs=0.12)
    with pytest.raises(ConfigError, match="branch_steps"):
        branch_real(GAME, 10, CONTEXT, 999)
    still = np.repeat(branches.context[:, None, -1], 6, 1)
    assert branch_accuracy(branches.real[:, :, -1], still)["accuracy"] < 0.6
    same = np.zeros((2, 6, 64, 64, 3), np.uint8)
    assert branch_accuracy(same, same)["accuracy"] == 0  # nothing to tell apart, so nothing is claimed


def test_branching_hands_the_dream_the_right_actions() -> None:
    """A model that paints the action it is given: every branch must show its own action, from its own context."""

    class Painter(RealAsDream):
        def start(self, frames: np.ndarray, actions: np.ndarray) -> Moment:
            return Moment(torch.from_numpy(frames[:, -1:].copy()), [], [])

        def step(self, state: Moment, actions: np.ndarray, noise: None, sampler: SamplerConfig) -> Any:
            painted = state.latents.clone()
            painted[..., 0] = torch.as_tensor(actions)[:, None, None, None].byte()
            return SimpleNamespace(state=Moment(painted, [], []), uncertainty=torch.zeros(len(actions)))

    branches = branch_real(GAME, 5, CONTEXT, 2, seed=2)
    dream = branch_dream(cast(WorldModel, Painter({}, None)), branches, SamplerConfig(nfe=1))
    assert (dream[..., 0] == branches.actions[None, :, None, None, None]).all()
    assert (dream[..., 1:] == branches.context[:, None, None, -1, :, :, 1:]).all()


MODEL: Any = SimpleNamespace(rewards=np.array([0.0, 0.0, 10.0]), terminated=np.array([False, True, True]))


def test_an_oracle_of_outcomes_is_perfect_and_a_constant_is_calibrated_but_blind() -> None:
    rng = np.random.default_rng(0)
    actual = rng.choice(3, 5000, p=[0.9, 0.06, 0.04])
    rewards, ended, weights = MODEL.rewards[actual], MODEL.terminated[actual], np.ones(5000)
    oracle = OutcomeScores(np.eye(3)[actual], rewards, ended, weights)
    figures = outcome_figures(MODEL, oracle, "x_")
    assert figures["x_death_ap"] == figures["x_reward_10_ap"] == figures["x_end_ap"] == 1
    assert figures["x_end_calibration_error"] == 0 and figures["x_death_events"] == (actual == 1).sum()
    assert (outcome_confusion(MODEL, oracle) == np.diag(np.bincount(actual))).all()
    rates = np.bincount(actual) / 5000
    constant = outcome_figures(MODEL, OutcomeScores(np.tile(rates, (5000, 1)), rewards, ended, weights))
    assert constant["death_ap"] == pytest.approx(rates[1]) and constant["end_calibration_error"] < 1e-9
    deathless = outcome_figures(MODEL, oracle, "x_", death=False)
    assert deathless == {name: value for name, value in figures.items() if not name.startswith("x_death")}


def test_a_remembering_model_encodes_no_picture_twice(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_bundle(toy_bundle, "cpu").world_model
    pictures = np.random.default_rng(0).integers(256, size=(6, 64, 64, 3), dtype=np.uint8)
    asked: list[int] = []
    plain = WorldModel.encode

    def counted(self: WorldModel, frames: Any) -> torch.Tensor:
        asked.append(len(frames))
        return plain(self, frames)

    monkeypatch.setattr(WorldModel, "encode", counted)
    remembering = CachedEncoder(model)
    for rows in ([0, 1, 1, 2], [2, 0], [3, 2, 3]):
        torch.testing.assert_close(remembering.encode(pictures[rows]), plain(model, pictures[rows]))
    assert asked == [3, 1]
    state, again = (m.start(pictures[None, :5], np.zeros((1, 4), np.int64)) for m in (model, remembering))
    torch.testing.assert_close(state.latents, again.latents)
    assert asked == [3, 1, 4, 1], "of the context's last four pictures only one is new"


def test_drifted_contexts_are_dreamt_from_the_right_moment(toy_bundle: Path) -> None:
    """With a dream that never changes the picture, asking after d steps is asking at the frame d steps before."""
    model = load_bundle(toy_bundle, "cpu").world_model
    play = play_real("coinrun", 40, 4, "biased", seed=3)
    seen: list[tuple[int, int]] = []

    class Probe:
        context, rewards, dynamics = model.context, model.rewards, model.dynamics

        def start(self, frames: np.ndarray, history: np.ndarray) -> Any:
            return SimpleNamespace(frame=frames[:, -1], actions=[])

        def step(self, state: Any, actions: np.ndarray, noise: None, sampler: SamplerConfig) -> Any:
            return SimpleNamespace(state=SimpleNamespace(frame=state.frame, actions=[*state.actions, actions]))

        def outcomes(self, state: Any, actions: np.ndarray) -> torch.Tensor:
            for row, frame in enumerate(state.frame):
                (e, t), *more = np.argwhere((play.frames == frame).all((2, 3, 4))).tolist()
                line = [a[row] for a in (*state.actions, actions)]
                matches = [m for m in ([e, t], *more) if play.actions[m[0], m[1] : m[1] + 4].tolist() == line]
                assert matches, "the actions from the context on must be the real ones"
                seen.append(tuple(matches[0]))
            return torch.zeros(len(state.frame), 3)

    scores = outcome_scores(cast(WorldModel, Probe()), play, SamplerConfig(nfe=1), drift=3, negatives=20)
    assert len(seen) == len(scores.rewards) >= 20
    assert not any(play.first[e, t + 1 : t + 4].any() for e, t in seen), "no drift across an episode's end"


def test_a_sample_of_many_events_stands_for_all_of_them() -> None:
    rewards = np.zeros((2, 50), np.float32)
    rewards[:, ::2] = 1
    nothing = np.zeros((2, 50), bool)
    actions, levels = np.full((2, 50), 4), np.zeros((2, 50), np.int64)
    frames = np.zeros((2, 50, 64, 64, 3), np.uint8)
    play = Segment(frames, actions, rewards, nothing, nothing, nothing, levels)

    class Probe:
        context, rewards = 4, np.array([0.0, 1.0])
        dynamics = None

        def start(self, frames: np.ndarray, history: np.ndarray) -> np.ndarray:
            return frames

        def outcomes(self, state: np.ndarray, actions: np.ndarray) -> torch.Tensor:
            return torch.zeros(len(state), 2)

    scores = outcome_scores(cast(WorldModel, Probe()), play, SamplerConfig(nfe=1), negatives=20, events=5)
    assert (scores.rewards == 1).sum() == 5 and len(scores.rewards) == 25
    assert [scores.weights[scores.rewards == r].sum() for r in (0, 1)] == pytest.approx([50, 50])


def test_the_best_of_several_samples_is_measured_though_the_sampler_draws_none(toy_bundle: Path, recorded: Any) -> None:
    model, clips = load_bundle(toy_bundle, "cpu").world_model, recorded.clips
    few = Clips(clips.frames[:3], clips.actions[:3], clips.level_seeds[:3], CONTEXT)
    frequencies = colour_frequencies(few.frames)
    found = compare_open_loop(model, few, frequencies, SamplerConfig(nfe=1), samples=3).figures
    asked = compare_open_loop(model, few, frequencies, SamplerConfig(nfe=2), samples=3).figures
    assert found["samples_nfe"] == 2 and found["samples"] == 3 and found["nfe"] == 1
    names = ("samples_best_psnr", "samples_mean_psnr", "samples_selected_psnr", "samples_diversity")
    assert [found[n] for n in names] == [asked[n] for n in names]
    assert found["samples_best_psnr"] > found["samples_mean_psnr"] and found["samples_diversity"] > 0
    assert found["samples_best_psnr"] >= found["samples_selected_psnr"]


def test_clips_never_cross_an_episode_and_too_few_are_refused() -> None:
    play = play_real("coinrun", 60, 4, "biased", seed=0)
    clips = cut_clips(play, 20, CONTEXT, 5)
    for frames, actions in zip(clips.frames, clips.actions, strict=True):
        (e, t), *_ = np.argwhere((play.frames == frames[0]).all((2, 3, 4)))
        assert play.frames[e, t : t + 9].tobytes() == frames.tobytes() and not play.first[e, t + 1 : t + 9].any()
        assert play.actions[e, t : t + 8].tolist() == actions.tolist()
    with pytest.raises(ConfigError, match="windows"):
        cut_clips(play, 10_000, CONTEXT, 5)


@pytest.mark.parametrize(
    "bad",
    [{"clips": 0}, {"horizon": 5}, {"samples": 0}, {"drift": -1}, {"seed": -1}, {"limit": 0}, {"endless_dreams": 0}],
)
def test_a_bad_comparison_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        CompareConfig(**cast(Any, bad))
