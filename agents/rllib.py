"""Ray RLlib's PPO in the dream, on one machine or a cluster: the same gym id, one native batch in each worker.

`python -m agents.rllib --runners 8 --envs 64 --iterations 500 --out runs/agents/rllib`. Needs `pip install
dreamenv[rllib]`; `--address auto` joins a running cluster. Procgen's settings (Cobbe et al. 2020) where RLlib has them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.wrappers.vector import DtypeObservation, RescaleObservation

from dreamenv.bundle import resolve_bundle
from dreamenv.config import check
from dreamenv.console import errors_in_one_line
from dreamenv.errors import DreamenvError


@dataclass(frozen=True)
class RllibConfig:
    """One run."""

    iterations: int = 100
    """Training iterations."""
    runners: int = 2
    """Worker processes that dream."""
    envs: int = 32
    """Dreams in each."""
    batch: int = 4096
    """Environment steps of one iteration."""
    game: str = "coinrun"
    """Which game."""
    bundle: Path | None = None
    """Bundle folder of the dream; the embedded one by default. Every node must have it."""
    nfe: int = 1
    """Network function evaluations of the dream's steps."""
    learners: int = 0
    """Learner processes with a GPU each; 0 learns in the main one."""
    address: str | None = None
    """Ray cluster to join ("auto", or host:port); None starts a local one."""
    out: Path = Path("runs/agents/rllib")
    """Folder for RLlib's checkpoint."""
    seed: int = 0
    """Decides what RLlib's own randomness allows."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        for name in ("iterations", "runners", "envs", "batch"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be >= 1")
        check(self.learners >= 0, f"learners {self.learners}: must be >= 0")


def make_dreams(context: dict[str, Any]) -> gym.vector.VectorEnv:
    """One worker's dreams, `gym.make_vec("DreamProcgen-v0")` frames as float32 in [0, 1], as RLlib's networks want.

    Args:
        context: `num_envs`, and arguments of `DreamVectorEnv`.
    """
    context = dict(context)
    envs = gym.make_vec("dreamenv:DreamProcgen-v0", num_envs=context.pop("num_envs", 1), **context)
    return RescaleObservation(DtypeObservation(envs, np.float32), 0.0, 1.0)


def algorithm_config(config: RllibConfig) -> Any:
    """Return RLlib's `PPOConfig` for `DreamProcgen-v0`."""
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
    from ray.tune.registry import register_env

    bundle = resolve_bundle(config.bundle, config.game).resolve()
    register_env("DreamProcgen-v0", make_dreams)
    algorithm = PPOConfig().environment(
        "DreamProcgen-v0",
        env_config={
            "bundle": str(bundle),
            "game": config.game,
            "sampler": {"nfe": config.nfe},
            "autoreset_mode": "NextStep",
        },
    )
    algorithm = algorithm.env_runners(
        num_env_runners=config.runners,
        num_envs_per_env_runner=config.envs,
        gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT.value,
        rollout_fragment_length="auto",
    )
    algorithm = algorithm.learners(num_learners=config.learners, num_gpus_per_learner=1 if config.learners else 0)
    model = DefaultModelConfig(
        conv_filters=[(16, 8, 4), (32, 4, 2), (32, 3, 1)],
        conv_activation="relu",
        head_fcnet_hiddens=[256],
        vf_share_layers=True,
    )
    return (
        algorithm.rl_module(model_config=model)
        .debugging(seed=config.seed, log_level="ERROR")
        .training(
            train_batch_size_per_learner=config.batch,
            minibatch_size=min(2048, config.batch),
            num_epochs=3,
            lr=5e-4,
            gamma=0.999,
            lambda_=0.95,
            clip_param=0.2,
            vf_clip_param=10.0,
            entropy_coeff=0.01,
            vf_loss_coeff=0.5,
            grad_clip=0.5,
        )
    )


def train(config: RllibConfig) -> dict[str, Any]:
    """Train, checkpoint, and return the environment steps and the last mean return."""
    import ray

    options: dict[str, Any] = {"address": config.address} if config.address else {"num_cpus": config.runners + 1}
    ray.init(include_dashboard=False, log_to_driver=False, **options)
    try:
        algorithm = algorithm_config(config).build_algo()
        result: dict[str, Any] = {}
        for _ in range(config.iterations):
            result = algorithm.train()
            played = result.get("env_runners", {})
            if not played.get("num_env_steps_sampled"):
                raise DreamenvError(
                    f"workers: none of {config.runners} answered; their logs are in Ray's session folder"
                )
            print(
                f"iteration {result['training_iteration']}: {result['num_env_steps_sampled_lifetime']:.0f} steps, "
                f"return {played.get('episode_return_mean', float('nan')):.2f}",
                flush=True,
            )
        config.out.mkdir(parents=True, exist_ok=True)
        algorithm.save_to_path(str(config.out.resolve()))
        algorithm.stop()
        value = float(result["env_runners"].get("episode_return_mean", float("nan")))
        return {
            "steps": int(result["num_env_steps_sampled_lifetime"]),
            "mean_return": value if value == value else None,
            "runners": config.runners,
            "checkpoint": str(config.out),
        }
    finally:
        ray.shutdown()


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `RllibConfig` is an option; the last line printed is JSON."""
    with errors_in_one_line():
        print(json.dumps(train(tyro.cli(RllibConfig, args=arguments, description=__doc__))))


if __name__ == "__main__":
    main()
