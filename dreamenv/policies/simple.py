"""Action sources that need no training: random, sticky, held, biased, saved agents, and mixtures of them.

They drive the real game and the dream alike: collection, demos and comparisons all use this one implementation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dreamenv.contract.actions import NAMES, NUM_ACTIONS
from dreamenv.contract.frames import NATIVE
from dreamenv.errors import PolicyError

if TYPE_CHECKING:
    from torch import Tensor

    from dreamenv.bundle import Bundle
    from dreamenv.history import LatentHistory
    from dreamenv.policies.agent import ImpalaAgent
    from dreamenv.world_model import WorldModel

DEFAULT_MIX = "random=0.1,sticky=0.2,biased=0.7"


class VectorPolicy(Protocol):
    """Chooses actions for N environments at once.

    Attributes:
        remembers: whether it goes by what it saw before, so that it has to be asked about the same N at every step.
        looks: whether it goes by what it is shown at all; who does not may be shown anything.
    """

    remembers: bool
    looks: bool

    def act(self, observations: np.ndarray, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return int64 actions (N,) for uint8 observations (N, h, w, c); `first` bool (N,) marks new episodes."""
        ...


class StickyPolicy:
    """Keeps its action with probability `stickiness`, else draws from `weights` (uniform when None)."""

    remembers, looks = True, False

    def __init__(self, stickiness: float, weights: np.ndarray | None = None) -> None:
        weights = np.ones(NUM_ACTIONS) if weights is None else np.asarray(weights, float)
        self.stickiness = stickiness
        self._cumulative = np.cumsum(weights / weights.sum())
        self._last: np.ndarray | None = None

    def act(self, observations: np.ndarray, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `VectorPolicy.act`."""
        n = len(first)
        draw = np.searchsorted(self._cumulative, rng.random(n)).clip(max=NUM_ACTIONS - 1)
        keep = (rng.random(n) < self.stickiness) & ~first
        self._last = draw if self._last is None else np.where(keep, self._last, draw)
        return self._last.astype(np.int64)


class HoldPolicy:
    """Always the same action: a policy of known, low skill."""

    remembers, looks = False, False

    def __init__(self, action: int) -> None:
        self.action = action

    def act(self, observations: np.ndarray, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `VectorPolicy.act`."""
        return np.full(len(first), self.action, np.int64)


class AgentPolicy:
    """A saved agent (`agent.json` + `agent.safetensors`), sampled from, epsilon-greedy towards uniform actions.

    One that learnt from a world model's latents sees frames through that model's codec.

    Args:
        agent: the network, or the folder of one.
        epsilon: chance of a uniform action.
        bundle: whose latents it learnt from, if it did; by default the one that it ships with, or that it names.

    Attributes:
        frame: (H, W, C) of the frames that it looks at.

    Raises:
        PolicyError: no such agent, or no bundle makes the latents that it learnt from.
    """

    looks = True

    def __init__(self, agent: str | ImpalaAgent, epsilon: float = 0.0, bundle: Bundle | None = None) -> None:
        from dreamenv.policies.agent import load_agent, world_model_of  # need torch: only when an agent is asked for

        self._agent = load_agent(agent) if isinstance(agent, str) else agent
        where = Path(agent) if isinstance(agent, str) else None
        self._model = None if self._agent.config.latent is None else world_model_of(self._agent, where, bundle)
        self.epsilon, self.remembers = epsilon, self._agent.config.memory > 0 or self._model is not None
        self.frame = self._agent.config.frame if self._model is None else self._model.frame_shape
        self._memory: Tensor | None = None
        self._history: LatentHistory | None = None
        self._taken = np.zeros(0, np.int64)

    def act(self, observations: np.ndarray, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `VectorPolicy.act`."""
        if self._memory is not None:  # a new episode begins without; so does a batch of another size
            fresh = self._memory.new_tensor(~first)[:, None]
            self._memory = self._memory * fresh if self._memory.shape[1] == len(first) else None
        shown = observations if self._model is None else self._latents(self._model, observations, first)
        probabilities, self._memory = self._agent.probabilities(shown, self._memory)
        probabilities = (1 - self.epsilon) * probabilities + self.epsilon / NUM_ACTIONS
        uniform = rng.random((len(first), 1))
        self._taken = (probabilities.cumsum(1) < uniform).sum(1).clip(max=NUM_ACTIONS - 1)
        return self._taken.copy()

    def _latents(self, model: WorldModel, frames: np.ndarray, first: np.ndarray) -> np.ndarray:
        """What the world model makes of the frames (N, h, w, c) so far."""
        from dreamenv.history import LatentHistory

        if self._history is None or self._history.size != len(first):
            self._history, self._taken = LatentHistory(model, len(first)), np.zeros(len(first), np.int64)
        self._history.forget(first)
        self._history.look(frames, self._taken)
        return self._history.latents()


class MixturePolicy:
    """Gives each environment one of several policies, drawn anew by weight for every episode.

    Attributes:
        component: int64 (N,), the index of the policy now playing each environment.
        frame: (H, W, C) of the frames that its agent, if any, looks at.
    """

    remembers = True

    def __init__(self, policies: list[VectorPolicy], weights: list[float]) -> None:
        self.policies = policies
        self.weights = np.asarray(weights, float) / np.sum(weights)
        self.looks = any(policy.looks for policy in policies)
        self.frame = next((policy.frame for policy in policies if isinstance(policy, AgentPolicy)), NATIVE)
        self.component: np.ndarray | None = None

    def act(self, observations: np.ndarray, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `VectorPolicy.act`."""
        draw = rng.choice(len(self.policies), len(first), p=self.weights)
        self.component = draw if self.component is None else np.where(first, draw, self.component)
        actions = np.zeros(len(first), np.int64)
        for index, policy in enumerate(self.policies):
            mine = self.component == index
            if policy.remembers:
                actions[mine] = policy.act(observations, first, rng)[mine]
            elif mine.any():  # the others, a network first of all, look only at those they play
                actions[mine] = policy.act(observations[mine], first[mine], rng)
        return actions


def parse_mix(spec: str) -> list[tuple[str, float]]:
    """Parse "random=0.2,biased=0.8" (or one bare name) into (name, weight) pairs; "mix" is `DEFAULT_MIX`.

    Raises:
        PolicyError: an empty part, or a weight that is not a positive number.
    """
    parts = (DEFAULT_MIX if spec == "mix" else spec).split(",")
    pairs = []
    for part in parts:
        name, separator, weight = part.strip().rpartition("=") if "=" in part else (part.strip(), "", "1")
        try:
            value = float(weight)
        except ValueError:
            value = float("nan")
        if not name or not np.isfinite(value) or value <= 0:
            raise PolicyError(
                f"policy {part!r} in {spec!r}: expected name=weight with weight > 0, e.g. random=0.2,biased=0.8"
            )
        pairs.append((name, value))
    return pairs


def make_policy(spec: str, bias: np.ndarray | None = None) -> MixturePolicy:
    """Build a policy from its specification.

    Args:
        spec: "random", "sticky", "held" (an action for each episode), "biased", "hold:ACTION" (as "hold:right+up"),
            "agent:FOLDER" or "agent:FOLDER:EPSILON", "mix", or a weighted mixture such as
            "random=0.2,agent:runs/a:0.1=0.8".
        bias: action weights (15,) of the game, for "biased".

    Raises:
        PolicyError: an unknown name or a bad parameter.
    """
    pairs = parse_mix(spec)
    return MixturePolicy([_component(name, bias) for name, _ in pairs], [weight for _, weight in pairs])


def _component(name: str, bias: np.ndarray | None) -> VectorPolicy:
    if name == "random":
        return StickyPolicy(0.0)
    if name == "sticky":
        return StickyPolicy(0.85)
    if name == "held":
        return StickyPolicy(1.0)
    if name == "biased":
        if bias is None:
            raise PolicyError("policy 'biased' needs the game's action weights; use 'sticky' where they are not known")
        return StickyPolicy(0.75, bias)
    if name.startswith("hold:"):
        if (held := name[len("hold:") :]) not in NAMES:
            raise PolicyError(f"policy {name!r}: unknown action {held!r}; there are {', '.join(NAMES)}")
        return HoldPolicy(NAMES.index(held))
    if name.startswith("agent:"):
        path, separator, epsilon = name[len("agent:") :].rpartition(":")
        try:
            value = float(epsilon) if separator else 0.0
        except ValueError:
            path, value = name[len("agent:") :], 0.0
        if not separator:
            path = epsilon
        if not 0 <= value <= 1:
            raise PolicyError(f"policy {name!r}: epsilon {value} must be in 0..1")
        return AgentPolicy(path, value)
    known = "random, sticky, held, biased, hold:ACTION, agent:FOLDER[:EPSILON] and mix"
    raise PolicyError(f"policy {name!r}: unknown; there are {known}")
