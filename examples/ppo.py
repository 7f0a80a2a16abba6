"""PPO in one file, straight on `gym.make_vec("DreamProcgen-v0")`: no agent library, in the manner of CleanRL.

    python examples/ppo.py --steps 200000 --out runs/agents/plain
    python -m agents.evaluate --agent runs/agents/plain --episodes 200

Schulman et al. 2017 with Procgen's settings (Cobbe et al. 2020). `--world envs:RealProcgen-v0` learns in the real game
instead.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical

import dreamenv  # noqa: F401 - registers DreamProcgen-v0
from dreamenv.config import check
from dreamenv.models.interface import to_images
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, save_agent


@dataclass
class Args:
    """PPO's settings."""

    world: str = "DreamProcgen-v0"
    game: str = "coinrun"
    steps: int = 1_000_000
    num_envs: int = 64
    rollout: int = 256
    """Steps of each environment between updates."""
    minibatches: int = 8
    epochs: int = 3
    lr: float = 5e-4
    gamma: float = 0.999
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    value: float = 0.5
    max_grad_norm: float = 0.5
    reward_scale: float = 0.1
    """The rarest rewards of most games, such as CoinRun's coin, are worth 10."""
    out: Path = Path("runs/agents/plain")
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot learn."""
        for name in ("steps", "num_envs", "rollout", "minibatches", "epochs"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be >= 1")
        check(self.reward_scale > 0, f"reward_scale {self.reward_scale}: must be > 0")
        most = self.rollout * self.num_envs // 2  # advantages are measured by their deviation, of two or more
        check(self.minibatches <= most, f"minibatches {self.minibatches}: must be at most {most} (rollout, num_envs)")


def learn(args: Args, agent: ImpalaAgent, optimizer: torch.optim.Optimizer, *rollout: torch.Tensor) -> None:
    """PPO's epochs over frames, actions, their log-probabilities, advantages, targets and values, each (T, N, ...)."""
    flat = [x.flatten(0, 1) for x in rollout]
    for _ in range(args.epochs):
        for rows in torch.randperm(len(flat[0])).chunk(args.minibatches):
            seen, act, old, advantage, target, before = (x[rows] for x in flat)
            logits, value, _ = agent(to_images(seen))
            policy = Categorical(logits=logits)
            ratio = (policy.log_prob(act) - old).exp()
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            gain = torch.min(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage).mean()
            clipped = before + (value - before).clamp(-args.clip, args.clip)
            error = torch.max((value - target).square(), (clipped - target).square()).mean() / 2
            optimizer.zero_grad()
            (-gain + args.value * error - args.entropy * policy.entropy().mean()).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()


def main(args: Args) -> dict[str, float]:
    """Learn, save the agent, and return how it went."""
    torch.manual_seed(args.seed)
    envs = gym.make_vec(args.world, num_envs=args.num_envs, game=args.game, autoreset_mode="SameStep")
    agent = ImpalaAgent(ImpalaConfig())
    nn.init.orthogonal_(agent.policy.weight, 0.01)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, eps=1e-5)

    t, n = args.rollout, args.num_envs
    frames = torch.zeros(t, n, 64, 64, 3, dtype=torch.uint8)
    actions = torch.zeros(t, n, dtype=torch.int64)
    log_probs, rewards, values = torch.zeros(t, n), torch.zeros(t, n), torch.zeros(t + 1, n)
    ends = torch.zeros(t, n)
    frame, _ = envs.reset(seed=args.seed)
    returns, running, began, taken = [], np.zeros(n), time.perf_counter(), 0
    while taken < args.steps:
        for i in range(t):
            frames[i] = torch.from_numpy(frame)
            with torch.inference_mode():
                logits, values[i], _ = agent(to_images(frames[i]))
            policy = Categorical(logits=logits)
            actions[i] = policy.sample()
            log_probs[i] = policy.log_prob(actions[i])
            frame, reward, terminated, truncated, infos = envs.step(actions[i].numpy())
            over = terminated | truncated
            rewards[i] = torch.from_numpy(reward * args.reward_scale)
            if truncated.any() and "final_obs" in infos:  # what was cut off would have gone on: add its value
                cut = np.flatnonzero(truncated & infos["_final_obs"])
                last = torch.from_numpy(np.stack([infos["final_obs"][k] for k in cut]))
                with torch.inference_mode():
                    rewards[i, cut] += args.gamma * agent(to_images(last))[1]
            ends[i] = torch.from_numpy(over)
            running += reward
            returns += running[over].tolist()
            running[over] = 0
        taken += t * n
        with torch.inference_mode():
            values[t] = agent(to_images(torch.from_numpy(frame)))[1]

        advantages, gae = torch.zeros(t, n), torch.zeros(n)
        for i in reversed(range(t)):
            delta = rewards[i] + args.gamma * values[i + 1] * (1 - ends[i]) - values[i]
            advantages[i] = gae = delta + args.gamma * args.gae_lambda * (1 - ends[i]) * gae
        targets = advantages + values[:t]

        learn(args, agent, optimizer, frames, actions, log_probs, advantages, targets, values[:t])
        recent = float(np.mean(returns[-100:])) if returns else float("nan")
        print(f"{taken} steps, {taken / (time.perf_counter() - began):.0f} steps/s, return {recent:.2f}", flush=True)
    envs.close()
    world = "dream" if "Dream" in args.world else "real"
    facts = {"world": world, "game": args.game, "steps": taken, "seed": args.seed}
    save_agent(args.out, agent, facts | {"reward_scale": 1 / args.reward_scale})
    return {"steps": taken, "return": recent}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
