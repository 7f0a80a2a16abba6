"""SB3 algorithms by name, and what they learnt as a saved agent: JSON and safetensors, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sb3_contrib
import stable_baselines3
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from agents.ars import ARS, ImpalaARSPolicy
from agents.extractor import ImpalaExtractor
from dreamenv.artifacts import read_json
from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.errors import ConfigError, PolicyError
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, load_agent, save_agent

_HEADS = {
    "action_net.": "policy.",
    "value_net.": "value.",
    "lstm_actor.": "actor_memory.",
    "lstm_critic.": "critic_memory.",
}  # an actor-critic's, and the saved agent's names
ACTOR_CRITIC = ("PPO", "A2C", "TRPO", "MaskablePPO", "RecurrentPPO")
_GREEDY = ("DQN", "QRDQN", "ARS")  # they take the best action, and learn no value that an agent keeps
ALGORITHMS = ACTOR_CRITIC + _GREEDY
_POLICIES = {"RecurrentPPO": "CnnLstmPolicy", "ARS": ImpalaARSPolicy}


def algorithm_class(name: str) -> type[BaseAlgorithm]:
    """Return an SB3 or sb3-contrib algorithm.

    Raises:
        ConfigError: unknown, or its policy is not one network from a frame to actions.
    """
    if name not in ALGORITHMS:
        raise ConfigError(f"algorithm {name!r}: there are {', '.join(ALGORITHMS)}")
    return (
        ARS if name == "ARS" else getattr(stable_baselines3 if hasattr(stable_baselines3, name) else sb3_contrib, name)
    )


def make_algorithm(
    name: str,
    envs: Any,
    settings: Mapping[str, Any],
    network: ImpalaConfig,
    seed: int,
    precision: str = "auto",
    **options: Any,
) -> BaseAlgorithm:
    """Build an algorithm with the IMPALA network; RecurrentPPO has LSTMs behind it, as wide unless `network` says.

    Raises:
        ConfigError: an unknown algorithm, or settings that it refuses.
    """
    policy = {
        "features_extractor_class": ImpalaExtractor,
        "net_arch": [],
        "features_extractor_kwargs": {
            "channels": network.channels,
            "features": network.features,
            "precision": precision,
        },
    }
    if name == "ARS":  # where all weights are zero a deep network has no slope; every environment plays for a candidate
        settings = {"zero_policy": False, "n_eval_episodes": envs.num_envs} | dict(settings)
    recurrent = name == "RecurrentPPO"
    if recurrent:
        policy["lstm_hidden_size"] = network.memory or network.features
    elif network.memory:
        raise ConfigError(f"memory {network.memory}: {name} has none; set it to 0, or take RecurrentPPO")
    try:
        model = algorithm_class(name)(
            _POLICIES.get(name, "CnnPolicy"), envs, policy_kwargs=policy, seed=seed, **settings, **options
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"settings {dict(settings)}: {name} refuses them ({error})") from None
    for module in model.policy.modules():  # only now: SB3's orthogonal initialisation wants contiguous weights
        if isinstance(module, ImpalaExtractor):
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return model


class ForeignPolicy:
    """An SB3 zip of whoever's, as a policy of ours; see `dreamenv.policies.simple.VectorPolicy`.

    Args:
        path: the zip.
        algorithm: SB3's or sb3-contrib's name of what saved it.
        trust: an SB3 zip holds pickled objects: loading it runs code that its author chose.

    Raises:
        PolicyError: it is not trusted, missing, damaged, or for other observations or actions.
    """

    remembers, looks = True, True  # it may

    def __init__(self, path: Path, algorithm: str, trust: bool) -> None:
        if not trust:
            raise PolicyError(
                f"{path}: an SB3 zip holds pickled code that would run here; pass --trust if you know where it "
                "is from, or save agents with agents.train, which needs no pickle"
            )
        try:
            self._model = algorithm_class(algorithm).load(path, device="cpu")
        except Exception as error:  # noqa: BLE001 - unpickling may raise anything
            raise PolicyError(
                f"{path}: cannot be loaded as {algorithm} ({error}); name what saved it with --algorithm"
            ) from None
        spaces = self._model.observation_space, self._model.action_space
        shape = tuple(int(n) for n in spaces[0].shape or ())
        picture = len(shape) == 3 and min(shape) in (1, 3)
        if not picture or getattr(spaces[1], "n", None) != NUM_ACTIONS:
            raise PolicyError(f"{path}: takes {spaces[0]} and gives {spaces[1]}; expected frames and 15 actions")
        self._path, self._shape, self._channels_first = path, shape, shape[0] in (1, 3)
        self._state: tuple[np.ndarray, ...] | None = None
        self._greedy = algorithm in _GREEDY  # those explore by streams of their own, which no seed reaches

    def act(self, observations: np.ndarray, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `VectorPolicy.act`; draws from `rng`, so that a seed decides it."""
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.integers(2**63)))
            if self._state is not None and self._state[0].shape[1] != len(first):
                self._state = None
            seen = observations.transpose(0, 3, 1, 2) if self._channels_first else observations
            if seen.shape[1:] != self._shape:
                raise PolicyError(f"{self._path}: looks at frames {self._shape}, these are {seen.shape[1:]}")
            actions, self._state = self._model.predict(seen, self._state, first, deterministic=self._greedy)
        return np.asarray(actions, np.int64)


def to_agent(model: BaseAlgorithm) -> ImpalaAgent:
    """The network that `model` acts by; DQN and QRDQN act greedily on their (mean) action values, ARS on its scores."""
    name = type(model).__name__
    weights: dict[str, Tensor] = {}
    state = model.policy.state_dict()
    if name in ACTOR_CRITIC:
        trunk, heads = "features_extractor.", _HEADS
    elif name == "DQN":
        trunk, heads = "q_net.features_extractor.", {"q_net.q_net.0.": "policy."}
    elif name == "ARS":
        trunk, heads = "features_extractor.", {"action_net.0.": "policy."}
    elif name == "QRDQN":
        trunk, heads = "quantile_net.features_extractor.", {"quantile_net.quantile_net.0.": "policy."}
    else:
        raise ConfigError(f"algorithm {name!r}: there are {', '.join(ALGORITHMS)}")
    for key, value in state.items():
        if key.startswith(trunk):
            weights[key[len(trunk) :]] = value
        for prefix, target in heads.items():
            if key.startswith(prefix):
                weights[target + key[len(prefix) :]] = value
    if name == "QRDQN":  # (quantiles * actions, F) -> the mean quantile's (actions, F)
        actions = int(model.action_space.n)  # pyright: ignore
        for key in ("policy.weight", "policy.bias"):
            weights[key] = weights[key].unflatten(0, (-1, actions)).mean(0)
    if name in _GREEDY:
        weights |= {"value.weight": torch.zeros(1, weights["policy.weight"].shape[1]), "value.bias": torch.zeros(1)}
    extractor = next(m for m in model.policy.modules() if isinstance(m, ImpalaExtractor))
    memory = weights["policy.weight"].shape[1] if name == "RecurrentPPO" else 0
    shape = replace(extractor.config, memory=memory, greedy=name in _GREEDY)
    with torch.random.fork_rng():  # its initial weights must not take from the run's random stream
        agent = ImpalaAgent(shape, extractor.precision)
    agent.load_state_dict(weights)
    return agent.eval()


def go_on_from(model: BaseAlgorithm, folder: Path) -> None:
    """Give an actor-critic algorithm the weights of a saved agent, those of its value too.

    Raises:
        PolicyError: not a saved agent, or one of another shape.
        ConfigError: an algorithm that does not learn an actor and a critic, as an agent keeps them.
    """
    if type(model).__name__ not in ACTOR_CRITIC:
        raise ConfigError(
            f"agent {folder}: {type(model).__name__} cannot go on from one, only {', '.join(ACTOR_CRITIC)} can"
        )
    weights = load_agent(folder).state_dict()
    state = model.policy.state_dict()
    for key, value in weights.items():
        prefix = next((own for own, saved in _HEADS.items() if key.startswith(saved)), "")
        targets = (
            [prefix + key.partition(".")[2]]
            if prefix
            else [n for n in state if n.endswith(f"features_extractor.{key}")]
        )
        for target in targets:
            if target not in state or state[target].shape != value.shape:
                raise PolicyError(
                    f"agent {folder}: has another shape ({key} is {tuple(value.shape)}); set network in the YAML "
                    "file to that of its agent.json"
                )
            state[target].copy_(value)
    model.policy.load_state_dict(state)


def agent_facts(folder: Path) -> dict[str, Any]:
    """What is stored with a saved agent: its world, steps ..., and as "from" those of the agent it went on from.

    Raises:
        PolicyError: no agent there, or a damaged one.
    """
    facts = read_json(folder / "agent.json", PolicyError, "train the agent again").get("facts", {})
    if not isinstance(facts, dict):
        raise PolicyError(f"{folder / 'agent.json'}: facts {str(facts)[:40]!r} is no mapping; train the agent again")
    return facts


def save_algorithm(folder: Path, model: BaseAlgorithm, facts: dict[str, Any]) -> Path:
    """Save what `model` learnt; every policy specification can name the folder as agent:FOLDER.

    The fact `reward_scale` is what its values count in: rewards were divided by it while it learnt.
    """
    normaliser = model.get_vec_normalize_env()
    scale = 1.0
    if normaliser is not None and normaliser.norm_reward:
        scale = float(np.sqrt(normaliser.ret_rms.var + normaliser.epsilon))
    learnt = {"algorithm": type(model).__name__, "steps": int(model.num_timesteps), "reward_scale": scale}
    return save_agent(folder, to_agent(model), facts | learnt)
