"""Measures a bundle against the real game on held-out levels: every figure that its card and report show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dreamenv.bundle import Bundle, GameFacts
from dreamenv.config import check
from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.contract.games import get_game
from dreamenv.errors import SnapshotError
from dreamenv.evaluation.chance import chance
from dreamenv.evaluation.clips import HELD_OUT, cut_clips, play_real
from dreamenv.evaluation.closed_loop import agreement, play_both
from dreamenv.evaluation.controllability import (
    DELTA_STEP,
    action_shifts,
    branch_accuracy,
    branch_dream,
    branch_real,
    delta_psnr,
    frame_shifts,
)
from dreamenv.evaluation.imagine import CachedEncoder, imagine, open_loop
from dreamenv.evaluation.metrics import colour_frequencies, frame_psnr, psnr, squared_error
from dreamenv.evaluation.open_loop import FRAMES, Comparison, add_perceptual, compare_open_loop
from dreamenv.evaluation.outcomes import outcome_figures, outcome_scores
from dreamenv.evaluation.stability import endless
from dreamenv.flow import SamplerConfig
from dreamenv.policies.simple import make_policy
from dreamenv.world_model import WorldModel


@dataclass(frozen=True)
class CompareConfig:
    """How much is measured. Whole episodes in both worlds (`policies`, `episodes`) take most of the time."""

    clips: int = 256
    """Real clips, each of which the model continues."""
    horizon: int = 50
    """Steps dreamt in each. The game is run again, with other random numbers, for as many."""
    random_clips: int = 128
    """More of them, of ten steps, of a player whose every action is random."""
    examined: int = 64
    """Clips used for the perceptual distance; the Fréchet distance and the codec's upper bound use twice as many."""
    policy: str = "mix"
    """Who plays the real game for clips, events and branches; see `dreamenv.policies.simple.make_policy`. What chance
    leaves to know is measured only of players that do not look at the pictures."""
    levels: tuple[int, int] = HELD_OUT
    """First level and number of levels."""
    steps: int = 30_000
    """Real steps played for clips and events."""
    samples: int = 3
    """Dreams of each clip, for the best, the mean and the spread: by two evaluations if the sampler draws none."""
    branches: int = 128
    """Real moments branched under every distinct action, and as many that are run again with other random numbers."""
    branch_steps: int = 4
    """Steps each branch holds its action."""
    negatives: int = 2_000
    """Uneventful real steps at which the outcome head is evaluated; on drifted contexts an eighth."""
    events: int = 20_000
    """Rewarded or terminal real steps at which it is, at most."""
    drift: int = 10
    """Steps dreamt before the outcome head is evaluated on a drifted context."""
    policies: tuple[str, ...] | None = None
    """Policies played in both worlds; the game's standard ones if not given, an empty list skips it."""
    episodes: int = 40
    """Episodes of each policy in each world."""
    limit: int | None = None
    """Steps after which these episodes are cut off, in both worlds; the game's own limit if not given."""
    endless_steps: int = 5000
    """Steps dreamt without a reset; 0 skips it."""
    endless_dreams: int = 1
    """How many of these rollouts."""
    seed: int = 0
    """Decides levels, actions and noise."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        for name in (
            "clips",
            "random_clips",
            "examined",
            "steps",
            "samples",
            "branches",
            "branch_steps",
            "negatives",
            "events",
            "episodes",
            "endless_dreams",
        ):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be >= 1")
        check(self.limit is None or self.limit >= 1, f"limit {self.limit}: must be >= 1 or None")
        check(self.horizon >= 6, f"horizon {self.horizon}: must be >= 6")
        for name in ("drift", "endless_steps"):
            check(getattr(self, name) >= 0, f"{name} {getattr(self, name)}: must be >= 0")
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be in 0..2^63-1")

    @property
    def closed_loop(self) -> bool:
        """Whether policies are played in both worlds."""
        return self.policies is None or bool(self.policies)

    def thorough(self) -> CompareConfig:
        """Twice as many steps, and so other clips; twice the negatives and so on, four long dreams. For cards."""
        names = ("random_clips", "examined", "steps", "negatives")
        twice = {name: 2 * getattr(self, name) for name in names}
        return replace(self, **twice, endless_dreams=4 * self.endless_dreams)

    def quick(self) -> CompareConfig:
        """Less of everything, with wider errors, and no closed loop, in which so few steps would tell nothing."""
        return replace(
            self,
            clips=min(self.clips, 16),
            random_clips=min(self.random_clips, 16),
            horizon=min(self.horizon, 30),
            steps=min(self.steps, 4_000),
            samples=1,
            negatives=min(self.negatives, 160),
            policies=(),
            branches=min(self.branches, 12),
            endless_steps=min(self.endless_steps, 100),
        )


def _random_player(
    model: WorldModel, game: GameFacts, config: CompareConfig, sampler: SamplerConfig
) -> dict[str, float]:
    """Figures on clips of a player whose every action is random, so that none gives away the next."""
    seed = config.seed
    mode, frame = game.distribution_mode, model.frame_shape
    play = play_real(game.name, 150, 32, "random", config.levels, mode, seed, frame)
    clips = cut_clips(play, config.random_clips, model.context, FRAMES, seed)
    dream, _ = open_loop(model, clips, sampler, seed)
    real, k = clips.frames[:, model.context :], model.context
    error = squared_error(dream, real)
    single, _ = imagine(
        model, clips.frames[:, k - 1 : k], clips.actions[:, :0], clips.actions[:, k - 1 :], sampler, seed
    )
    delta = delta_psnr(model, clips, dream[:, :DELTA_STEP], sampler, seed)
    alone = squared_error(single, real)
    figures = {
        "random_delta_psnr_4": float(delta[DELTA_STEP - 1]),
        "random_psnr_frames": float(frame_psnr(error).mean()),
        f"random_one_frame_psnr_{FRAMES}": float(psnr(alone[:, -1].mean())),
        "random_one_frame_psnr_frames": float(frame_psnr(alone).mean()),
    }
    for h in (1, FRAMES):
        figures |= {
            f"random_psnr_{h}": float(psnr(error[:, h - 1].mean())),
            f"random_psnr_mean_{h}": float(frame_psnr(error[:, h - 1]).mean()),
        }
    figures |= {f"action_shift_{s}": v for s, v in action_shifts(model, clips, dream, sampler, seed).items()}
    return figures | {f"frame_shift_{s}": v for s, v in frame_shifts(clips, dream).items()}


def _branched(
    model: WorldModel, game: GameFacts, config: CompareConfig, sampler: SamplerConfig, result: Comparison
) -> dict[str, float]:
    """Figures of real moments continued under every distinct action; the branches themselves go to the result."""
    count, steps, seed = config.branches, config.branch_steps, config.seed
    where = (config.levels, config.policy, seed)
    real = branch_real(game, count, model.context, steps, *where, frame=model.frame_shape)
    dreamt = branch_dream(model, real, sampler, seed)
    result.branches = real, dreamt
    figures = {f"branch_{k}": v for k, v in branch_accuracy(real.real[:, :, -1], dreamt[:, :, -1]).items()}
    return figures | {"branches": len(dreamt), "branch_steps": steps}


def _left_to_chance(game: GameFacts, config: CompareConfig, frame: tuple[int, int, int]) -> dict[str, float]:
    """Figures of what chance leaves to know; none of players that look, or if Procgen's numbers cannot be changed."""
    if make_policy(config.policy, np.ones(NUM_ACTIONS)).looks:
        return {}
    try:
        return chance(game, config.branches, config.horizon, config.levels, config.policy, config.seed, frame=frame)
    except SnapshotError:  # other builds of Procgen save their random generators otherwise
        return {}


def compare(
    bundle: Bundle, config: CompareConfig, sampler: SamplerConfig, progress: Callable[[str], None] = lambda stage: None
) -> Comparison:
    """Measure everything (needs procgen); `progress` is told each stage as it begins.

    Raises:
        ConfigError: a value outside its range, or too few real steps for the clips.
        PolicyError: an unknown policy.
    """
    model, game, seed = CachedEncoder(bundle.world_model), bundle.game, config.seed
    progress("playing the real game")
    steps, mode, frame = -(-config.steps // 32), game.distribution_mode, model.frame_shape
    play = play_real(game.name, steps, 32, config.policy, config.levels, mode, seed, frame)
    frequencies = colour_frequencies(play.frames[:, :: max(play.frames.shape[1] // 128, 1)])
    clips = cut_clips(play, config.clips, model.context, config.horizon, seed)
    progress("open loop")
    result = compare_open_loop(model, clips, frequencies, sampler, seed, config.samples, 2 * config.examined)
    figures = result.figures
    progress("perceptual distance")
    add_perceptual(result, config.examined)
    progress("outcomes")
    death, judged = get_game(game.name).death, {"seed": seed, "events": config.events}
    result.outcomes["real"] = outcome_scores(bundle.world_model, play, sampler, negatives=config.negatives, **judged)
    figures |= outcome_figures(model, result.outcomes["real"], death=death) | {"steps": int(play.first.size)}
    if config.drift:
        progress("outcomes after drift")
        asked = max(config.negatives // 8, 1)
        result.outcomes["drifted"] = outcome_scores(bundle.world_model, play, sampler, config.drift, asked, **judged)
        figures |= outcome_figures(model, result.outcomes["drifted"], "drifted_", death) | {"drift": config.drift}
    progress("controllability")
    delta = delta_psnr(model, clips, result.dream[:, :DELTA_STEP], sampler, seed)
    figures |= {f"delta_psnr_{h}": float(delta[h - 1]) for h in (1, DELTA_STEP)}
    figures |= _random_player(model, game, config, sampler)
    for kind in ("action", "frame"):
        figures[f"{kind}_offset"] = max((-1, 0, 1), key=lambda s, kind=kind: figures[f"{kind}_shift_{s}"])
    progress("branches")
    figures |= _branched(model, game, config, sampler, result)
    progress("other random numbers")
    figures |= _left_to_chance(game, config, frame)
    if config.closed_loop:
        progress("closed loop")
        result.episodes = play_both(
            bundle, config.policies, config.episodes, config.limit, sampler, config.levels, seed
        )
        figures |= {f"closed_loop_{k}": v for k, v in agreement(result.episodes, seed=seed).items()}
        figures |= {"closed_loop_episodes": config.episodes, "closed_loop_limit": config.limit or game.max_steps}
    if config.endless_steps:
        progress("endless dream")
        result.endless = endless(bundle, clips, config.endless_steps, config.endless_dreams, sampler=sampler, seed=seed)
        figures |= {
            "endless_steps": config.endless_steps,
            "endless_dreams": config.endless_dreams,
            "endless_diverged": result.endless["diverged"],
            "endless_latent_rms": float(result.endless["latent_rms"][-1]),
            "endless_detail": float(result.endless["detail"][-1] / result.endless["real_detail"]),
        }
    return result
