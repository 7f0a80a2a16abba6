"""Trains an agent in the real game, in the dream, or in both at once.

`python -m agents.train --world dream --game coinrun --steps 1000000 --out runs/agents/dream`. The run folder holds
`agent/` (JSON + safetensors), `best/` by the evaluations on the way, `checkpoint/`, `progress.csv` and
TensorBoard's files. Run the same line with `--resume` after a kill.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import tyro
from stable_baselines3.common.callbacks import CallbackList, ProgressBarCallback
from stable_baselines3.common.logger import Logger, make_output_format
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.keeper import Keeper, run_facts
from agents.saved import ACTOR_CRITIC, ALGORITHMS, go_on_from, make_algorithm, save_algorithm
from agents.worlds import TimedVecEnv, check_lengths, make_world, time_shares
from dreamenv import checkpoints
from dreamenv.artifacts import checksum, only_writer
from dreamenv.config import check, from_dict, load_yaml, to_dict, whole
from dreamenv.console import errors_in_one_line
from dreamenv.device import keep_freed_memory
from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig
from dreamenv.policies.agent import ImpalaConfig

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class AlgorithmConfig:
    """How an agent learns; one YAML file."""

    algorithm: str = "PPO"
    """PPO, A2C, TRPO, RecurrentPPO, MaskablePPO, DQN, QRDQN or ARS: all of Stable-Baselines3 and sb3-contrib for
    discrete actions."""
    num_envs: int = 64
    """Environments in the batch."""
    normalize_reward: bool = True
    """Divide rewards by the running deviation of the discounted return (observations are never normalised)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of the algorithm's constructor."""
    network: ImpalaConfig = field(default_factory=ImpalaConfig)
    """Shape of the agent's network."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.num_envs >= 1, f"num_envs {self.num_envs}: must be >= 1")
        known = self.algorithm in ALGORITHMS
        check(known, f"algorithm {self.algorithm!r}: there are {', '.join(ALGORITHMS)}")

    @property
    def discount(self) -> float:
        """What a step's wait leaves of a reward."""
        return self.settings.get("gamma", 0.99)


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    world: Literal["real", "dream", "mix"] = "dream"
    """Where it learns."""
    game: str = "coinrun"
    """Which game."""
    steps: int = 1_000_000
    """Environment steps in all."""
    out: Path = Path("runs/agents/dream")
    """Run folder."""
    config: Path = CONFIGS / "ppo.yaml"
    """The algorithm's YAML file."""
    bundle: Path | None = None
    """Bundle folder of the dream; the embedded one by default."""
    distribution_mode: str | None = None
    """Procgen's difficulty; that of the bundle by default, without one easy."""
    agent: Path | None = None
    """Saved agent to go on from; its steps do not count among `steps`."""
    horizon: int | None = None
    """Cut dreams off after so many steps."""
    truncate_above: float | None = None
    """End dreams whose uncertainty exceeds this."""
    penalty: float = 0.0
    """Take so much of the dream's uncertainty from each reward (MOPO, Yu et al. 2020)."""
    vote: Path | None = None
    """Bundle of a second model on the same latents, such as one fine-tuned on other data: how far the two disagree is
    the dream's uncertainty then, for `penalty` and `truncate_above`."""
    critic: Path | None = None
    """Saved agent, as `agents.critic` trains from real play: a dream that is cut off pays what its last picture was
    still worth by its values. So dreams can be as short as 16 steps."""
    starts: Path | None = None
    """Dataset folder whose real contexts dreams start from, instead of the bundle's bank."""
    share: float = 0.5
    """Share of dreams in the mix."""
    observations: Literal["pixels", "latent"] = "pixels"
    """What the agent looks at: pictures, or the bundle's latents. In the dream no picture is drawn for these; in the
    game the bundle's codec makes them."""
    nfe: int = 1
    """Network function evaluations of the dream's steps; one, which dreams the mean, teaches at less cost."""
    judge: Literal["other", "real", "dream"] = "other"
    """Where it is evaluated: in the other world, or in the one named. `dream` for an agent that learns in the dream
    begins at first frames of levels, not at the starts it learns from, and asks the game for no reward."""
    eval_every: int = 0
    """Environment steps between evaluations; 0 evaluates at the end only. The best agent so far is kept in `best/`."""
    eval_episodes: int = 64
    """Episodes of each evaluation, on training levels; 0 evaluates never, for games that no bundle knows yet."""
    eval_nfe: int | None = None
    """Network function evaluations of the dreams it is evaluated in; by default those it learns in. Dreams of four
    invent fewer rewards than those of one (lab book, run A15)."""
    eval_limit: int | None = None
    """Steps after which an episode of an evaluation is cut off; the game's own limit by default."""
    checkpoint_every: int = 10
    """Rollouts between checkpoints."""
    device: str = "auto"
    """auto, cpu, cuda ..."""
    precision: str = "auto"
    """The network's: fp32, bf16, or auto: bf16 where the hardware has it."""
    seed: int = 0
    """Decides everything but the wall clock."""
    resume: bool = False
    """Go on from the checkpoint, if there is one."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        for name in ("steps", "checkpoint_every"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be >= 1")
        for name in ("eval_every", "eval_episodes"):
            check(getattr(self, name) >= 0, f"{name} {getattr(self, name)}: must be >= 0")
        SamplerConfig(nfe=self.nfe)  # raises
        whole(1 if self.eval_nfe is None else self.eval_nfe, "eval_nfe", 1, 256)
        check_lengths(self.game, eval_limit=self.eval_limit)
        check(self.penalty >= 0, f"penalty {self.penalty}: must be >= 0")
        for name in ("horizon", "truncate_above", "penalty", "vote", "critic", "starts"):
            value = getattr(self, name)
            check(not value or self.world != "real", f"{name} {value}: is for dreams; leave it out in the real game")
        inside = self.agent is not None and self.agent.resolve().is_relative_to(self.out.resolve())
        check(not inside, f"agent {self.agent}: this run would overwrite it; give another --out")
        known = self.observations in ("pixels", "latent")
        places = ("other", "real", "dream")
        check(self.judge in places, f"judge {self.judge!r}: must be one of {', '.join(places)}")
        check(known, f"observations {self.observations!r}: must be 'pixels' or 'latent'")
        check(not self.eval_every or self.eval_episodes > 0, f"eval_every {self.eval_every}: needs eval_episodes")
        known = self.precision in ("auto", "fp32", "bf16")
        check(known, f"precision {self.precision!r}: must be 'auto', 'fp32' or 'bf16'")
        check(0 <= self.seed < 2**31, f"seed {self.seed}: must be in 0..2^31-1")


def _made(config: TrainConfig, algorithm: AlgorithmConfig) -> tuple[Any, TimedVecEnv, Any]:
    """The world, the same with its time measured and rewards normalised if asked for, and the algorithm on it."""
    dreaming = {
        "horizon": config.horizon,
        "truncate_above": config.truncate_above,
        "sampler": {"nfe": config.nfe},
        "penalty": config.penalty,
        "vote": config.vote,
        "critic": config.critic,
        "discount": algorithm.discount,
    }
    options: dict[str, Any] = {} if config.world == "real" else dreaming
    options |= {"observations": config.observations, "distribution_mode": config.distribution_mode}
    where = (config.world, config.game, algorithm.num_envs, config.bundle, config.device, config.starts, config.share)
    inner = make_world(*where, **options)
    timed = TimedVecEnv(inner)
    envs: VecEnv = timed
    if algorithm.normalize_reward:
        envs = VecNormalize(timed, norm_obs=False, norm_reward=True, gamma=algorithm.discount)
    how = (algorithm.settings, algorithm.network, config.seed, config.precision)
    return inner, timed, make_algorithm(algorithm.algorithm, envs, *how, device=config.device)


def train(config: TrainConfig, progress: bool = False) -> dict[str, Any]:
    """Train one agent and save it as `<out>/agent`.

    Returns:
        `agent` (its folder), `steps`, `steps_per_s`, `shares` of the time (see `time_shares`), and the
        last evaluation's figures.

    Raises:
        ConfigError: bad settings.
        CheckpointError: `resume` finds a damaged checkpoint, or one of another configuration.
        BusyError: another process is writing `config.out`.
        StorageError: it cannot be written.
    """
    algorithm = load_algorithm(config.config)
    with only_writer(config.out):
        return _train(config, algorithm, progress)


def _train(config: TrainConfig, algorithm: AlgorithmConfig, progress: bool) -> dict[str, Any]:
    free = ("out", "resume", "config", "steps", "device")
    described = {k: str(v) for k, v in to_dict(config).items() if k not in free and v is not None}
    identity = checksum([described, to_dict(algorithm)])
    inner, timed, model = _made(config, algorithm)
    if config.agent is not None:
        go_on_from(model, config.agent)
    if config.resume and not isinstance(model, OnPolicyAlgorithm):
        raise ConfigError(f"resume: {algorithm.algorithm} saves no checkpoints; train it anew")
    if not config.resume:  # a fresh start leaves nothing behind that a later resume could pick up
        checkpoints.discard(config.out / "checkpoint")
        for stale in ("best", "agent"):
            shutil.rmtree(config.out / stale, ignore_errors=True)
    resumed = config.resume and load_checkpoint(config.out / "checkpoint", model, identity)
    suffix = f"-{model.num_timesteps}" if resumed else ""  # a resumed run leaves the earlier progress.csv alone
    formats = ["csv"] + (["tensorboard"] if find_spec("tensorboard") else [])
    config.out.mkdir(parents=True, exist_ok=True)
    outputs = [make_output_format(name, str(config.out), suffix) for name in formats]
    model.set_logger(Logger(str(config.out), outputs))
    keeper = Keeper(config, identity)
    try:
        seconds, steps, figures = _learn(config, algorithm, model, keeper, resumed, progress)
    finally:
        model.logger.close()
        timed.close()
    return {
        "agent": str(config.out / "agent"),
        "steps": model.num_timesteps,
        "steps_per_s": steps / seconds if steps else 0.0,
        "shares": time_shares(inner, timed.seconds, keeper.collecting, seconds) if steps else {},
        keeper.where: figures,
    }


def _learn(
    config: TrainConfig, algorithm: AlgorithmConfig, model: Any, keeper: Keeper, resumed: bool, progress: bool
) -> tuple[float, int, dict[str, Any]]:
    """Learn what is left, save the agent and evaluate it: seconds of learning, steps, and the evaluation's figures."""
    if resumed:
        keeper.resume(model.num_timesteps)
    before, began = model.num_timesteps, time.perf_counter()
    if (left := config.steps - before) > 0:
        callbacks = CallbackList([keeper, *([ProgressBarCallback()] if progress else [])])
        masks = algorithm.algorithm == "MaskablePPO"  # every action is always allowed
        extra: dict[str, Any] = {"use_masking": False} if masks else {}
        model.learn(left, callbacks, reset_num_timesteps=not resumed, **extra)
    seconds = time.perf_counter() - began
    keeper.init_callback(model)
    if isinstance(model, OnPolicyAlgorithm):
        save_checkpoint(config.out / "checkpoint", model, keeper.identity)
    save_algorithm(config.out / "agent", model, run_facts(config))
    figures = keeper.judge() if config.eval_episodes else {}
    model.logger.dump(model.num_timesteps)
    return seconds, model.num_timesteps - before, figures


def load_algorithm(path: Path) -> AlgorithmConfig:
    """Read an algorithm's YAML file.

    Raises:
        ConfigError: unreadable, an unknown key, or a value outside its range.
    """
    return from_dict(AlgorithmConfig, load_yaml(path))


def load_resumable(path: Path) -> AlgorithmConfig:
    """Read the YAML file of an algorithm whose killed runs can go on.

    Raises:
        ConfigError: as `load_algorithm`, or an algorithm that saves no checkpoints.
    """
    algorithm = load_algorithm(path)
    name, able = algorithm.algorithm, ", ".join(ACTOR_CRITIC)
    check(name in ACTOR_CRITIC, f"config {path}: {name} saves no checkpoints, and no agent to go on from; {able} do")
    return algorithm


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `TrainConfig` is an option; the last line printed is JSON."""
    with errors_in_one_line():
        config = tyro.cli(TrainConfig, args=arguments, description=__doc__)
        keep_freed_memory()
        print(json.dumps(train(config, progress=True)))


if __name__ == "__main__":
    main()
