"""What an agent's training does between rollouts: checkpoints, evaluations, and keeping the best agent."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from agents.checkpoint import save_checkpoint
from agents.evaluate import evaluate
from agents.saved import agent_facts, save_algorithm, to_agent
from agents.worlds import TRAIN_LEVELS
from dreamenv.artifacts import present
from dreamenv.bundle import load_bundle, resolve_bundle

if TYPE_CHECKING:
    from agents.train import TrainConfig


class Keeper(BaseCallback):
    """Between rollouts: checkpoint, evaluate, keep the best."""

    def __init__(self, config: TrainConfig, identity: str) -> None:
        super().__init__()
        self.config, self.identity = config, identity
        self.where = config.judge if config.judge != "other" else {"dream": "real"}.get(config.world, "dream")
        self.rollouts, self.evaluated, self.best = 0, 0, float("-inf")
        self.collecting, self._began = 0.0, time.perf_counter()

    def resume(self, steps: int) -> None:
        """Go on after `steps`: remember the best so far, and do not make up for evaluations of before."""
        self.evaluated = steps
        if present(self.config.out / "best" / "agent.json"):
            self.best = float(agent_facts(self.config.out / "best").get(f"{self.where}_return", "-inf"))

    def _on_rollout_start(self) -> None:
        steps, every = self.model.num_timesteps, self.config.eval_every
        if every and steps // every > self.evaluated // every:  # before the checkpoint: a kill meanwhile repeats it
            self.evaluated = steps
            self.judge()
            save_algorithm(self.config.out / "agent", self.model, run_facts(self.config))
        if (
            isinstance(self.model, OnPolicyAlgorithm)
            and self.rollouts
            and self.rollouts % self.config.checkpoint_every == 0
        ):
            self.save()
        self.rollouts += 1
        self._began = time.perf_counter()

    def _on_rollout_end(self) -> None:
        self.collecting += time.perf_counter() - self._began

    def _on_step(self) -> bool:
        return True

    def save(self) -> None:
        """Write a checkpoint, and the agent as it is now."""
        save_checkpoint(self.config.out / "checkpoint", cast(OnPolicyAlgorithm, self.model), self.identity)
        save_algorithm(self.config.out / "agent", self.model, run_facts(self.config))

    def judge(self) -> dict[str, Any]:
        """Evaluate without touching the run's random streams; keeps the agent if it is the best so far."""
        where, state = self.where, torch.get_rng_state()
        figures = evaluate(
            to_agent(self.model).cpu(),
            where,
            self.config.game,
            (TRAIN_LEVELS[0], sum(TRAIN_LEVELS)),  # the first, and the one after the last
            self.config.eval_episodes,
            bundle=self.config.bundle,
            nfe=self.config.eval_nfe or self.config.nfe,
            limit=self.config.eval_limit,
            seed=self.config.seed,
            distribution_mode=self.config.distribution_mode,
        ).figures
        torch.set_rng_state(state)
        for name in ("mean_return", "success_rate", "mean_length"):
            self.logger.record(f"{where}/{name}", figures[name])
        if figures["mean_return"] > self.best:
            self.best = figures["mean_return"]
            save_algorithm(
                self.config.out / "best", self.model, run_facts(self.config) | {f"{where}_return": self.best}
            )
        return figures


def run_facts(config: TrainConfig) -> dict[str, Any]:
    """What is saved with an agent: where it learnt, on which levels, from whom it went on, and what its critic saw."""
    before: dict[str, Any] = {} if config.agent is None else {"from": agent_facts(config.agent)}
    if config.observations == "latent":
        folder = resolve_bundle(config.bundle, config.game, config.distribution_mode)
        bundle = load_bundle(folder, "cpu", game=config.game)
        before |= {"latents_sha256": bundle.latents}
        before |= {} if config.bundle is None else {"bundle": str(config.bundle.resolve())}
    if config.critic is not None:
        before |= {"critic": agent_facts(config.critic).get("critic", {"agent": config.critic.name})}
    mixed = {"share": config.share} if config.world == "mix" else {}
    return {
        "world": config.world,
        "game": config.game,
        "seed": config.seed,
        "levels": list(TRAIN_LEVELS),
        **mixed,
        **before,
    }
