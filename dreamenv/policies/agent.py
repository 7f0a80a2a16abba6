"""Saved agents: the IMPALA network (Espeholt et al. 2018, Procgen's 16/32/32 -> 256) as JSON + safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from dreamenv.artifacts import atomic_folder, present, read_json, readable_folder, sha256_file, write_json
from dreamenv.bundle import Bundle, embedded_games, load_bundle
from dreamenv.config import check, from_dict, to_dict
from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.contract.frames import NATIVE, check_frame
from dreamenv.contract.games import GAMES, get_game
from dreamenv.device import own_settings, pick_precision
from dreamenv.errors import BundleError, ConfigError, PolicyError
from dreamenv.models.interface import to_images
from dreamenv.models.io import fill, packed, read_part
from dreamenv.world_model import WorldModel


@dataclass(frozen=True)
class ImpalaConfig:
    """Shape of the agent's network."""

    channels: tuple[int, ...] = (16, 32, 32)
    """Width of each stage; each halves the picture."""
    features: int = 256
    """Width of the last hidden layer."""
    memory: int = 0
    """Width of the LSTMs that the policy and the value each have behind it; 0 goes without."""
    greedy: bool = False
    """Whether the best action is taken (networks trained as action values) rather than one sampled."""
    frame: tuple[int, int, int] = NATIVE
    """(H, W, C) of the frames that it looks at."""
    latent: tuple[int, int, int] | None = None
    """(C, H, W) of the world model's latents that it looks at in place of frames."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(
            1 <= len(self.channels) <= 5 and 1 <= min(self.channels) and max(self.channels) <= 1024,
            f"channels {self.channels}: 1..5 stages of 1..1024",
        )
        check(1 <= self.features <= 8192, f"features {self.features}: must be 1..8192")
        check(0 <= self.memory <= 8192, f"memory {self.memory}: must be 0..8192")
        check_frame(self.frame, "frame")
        if self.latent is not None:
            c, height, width = self.latent
            sound = 1 <= c <= 1024 and 1 <= height == width <= 128
            check(sound, f"latent {self.latent}: must be a square of 1..128 cells with 1..1024 channels")


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ImpalaAgent(nn.Module):
    """Policy and value of frames, or of a world model's latents.

    Args:
        config: its shape.
        precision: "fp32", "bf16" autocast of all but the last layers, or "auto": bf16 where the hardware has it.
    """

    def __init__(self, config: ImpalaConfig, precision: str = "auto") -> None:
        super().__init__()
        self.config, self.precision = config, precision
        stages: list[nn.Module] = []
        side, _, width = config.frame if config.latent is None else config.latent[::-1]
        self.facts: dict[str, Any] = {}  # what was stored with it
        for channels in config.channels:
            stages += [nn.Conv2d(width, channels, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
            stages += [_Residual(channels), _Residual(channels)]
            width, side = channels, (side + 1) // 2
        self.trunk = nn.Sequential(
            *stages, nn.ReLU(), nn.Flatten(), nn.Linear(width * side * side, config.features), nn.ReLU()
        )
        last = config.memory or config.features
        self.actor_memory = nn.LSTM(config.features, config.memory) if config.memory else None
        self.critic_memory = nn.LSTM(config.features, config.memory) if config.memory else None
        self.policy = nn.Linear(last, NUM_ACTIONS)
        self.value = nn.Linear(last, 1)

    def forward(self, images: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Look at one frame of each of B episodes.

        Args:
            images: (B, c, h, w) in [0, 1]; or latents float32 (B, C, H, W).
            memory: float32 (4, B, M), what it remembers: hidden and cell state of the actor and of the critic; None is
                nothing.

        Returns:
            Action logits (B, 15), values (B,), and the memory after it, None where `config.memory` is 0.
        """
        device = images.device
        with torch.autocast(device.type, torch.bfloat16, enabled=pick_precision(self.precision, device) == "bf16"):
            features = self.trunk(images.contiguous(memory_format=torch.channels_last)).float()
        if self.actor_memory is None or self.critic_memory is None:
            return self.policy(features), self.value(features)[:, 0], None
        before = features.new_zeros(4, len(features), self.config.memory) if memory is None else memory
        acting, actor = self.actor_memory(features[None], (before[:1], before[1:2]))
        judging, critic = self.critic_memory(features[None], (before[2:3], before[3:]))
        return self.policy(acting[0]), self.value(judging[0])[:, 0], torch.cat([*actor, *critic])

    @torch.inference_mode()
    def probabilities(self, frames: np.ndarray, memory: Tensor | None = None) -> tuple[np.ndarray, Tensor | None]:
        """Action probabilities float64 (B, 15), and the memory, as `forward` has it.

        Args:
            frames: uint8 (B, h, w, c), or latents float32 (B, C, H, W), whichever it was trained on.
            memory: see `forward`.

        Raises:
            PolicyError: of another shape than it was trained on.
        """
        logits, _, memory = self._seeing(frames, memory)
        if self.config.greedy:
            return F.one_hot(logits.argmax(1), NUM_ACTIONS).double().cpu().numpy(), memory
        return logits.double().softmax(1).cpu().numpy(), memory

    @torch.inference_mode()
    def values(self, frames: np.ndarray) -> np.ndarray:
        """The discounted return float64 (B,) that it expects from frames (or latents) on, in the game's rewards.

        Args:
            frames: as for `probabilities`.

        Raises:
            PolicyError: of another shape than it was trained on; or it has no values, as one that takes the best
                action; or it does not say what they count in, as agents saved before that was kept.
        """
        scale = self.facts.get("reward_scale")
        if self.config.greedy or not isinstance(scale, (int, float)):
            raise PolicyError("agent: knows no values in rewards; train a PPO agent with this release and take that")
        return float(scale) * self._seeing(frames, None)[1].double().cpu().numpy()

    def _seeing(self, frames: np.ndarray, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """`forward` of uint8 frames (B, h, w, c), or of latents."""
        found, wanted = tuple(frames.shape[1:]), tuple(self.config.latent or self.config.frame)
        if found != wanted:
            raise PolicyError(f"frames {found}: this agent looks at {wanted}; take one that was trained on such frames")
        device = self.policy.weight.device
        with own_settings(device):
            shown = torch.as_tensor(frames).to(device)
            return self(to_images(shown) if self.config.latent is None else shown, memory)


def save_agent(folder: str | Path, agent: ImpalaAgent, facts: dict | None = None, bits: int = 16) -> Path:
    """Write `agent.json` and `agent.safetensors`, atomically; returns the folder.

    `bits` are those of a weight, see `dreamenv.models.io.packed`.

    Raises:
        ConfigError: other bits.
        StorageError: it cannot be written.
    """
    weights = packed(agent.state_dict(), bits)
    with atomic_folder(Path(folder)) as temporary:
        (temporary / "agent.safetensors").write_bytes(save(weights))
        write_json(
            temporary / "agent.json",
            {
                "format_version": 1,
                "network": to_dict(agent.config),
                "facts": facts or {},
                "sha256": sha256_file(temporary / "agent.safetensors"),
            },
        )
    return Path(folder)


def load_agent(folder: str | Path, precision: str = "auto") -> ImpalaAgent:
    """Load a saved agent; see `ImpalaAgent` for `precision`.

    Raises:
        PolicyError: missing, damaged, or of a newer format.
    """
    folder = readable_folder(folder)
    path = folder / "agent.json"
    description = read_json(path, PolicyError, f"is {folder} a saved agent?")
    try:
        if description["format_version"] != 1:
            raise PolicyError(f"{path}: format_version {description['format_version']!r}; this release reads 1")
        config = from_dict(ImpalaConfig, description["network"], "network")
        data = read_part(folder / "agent.safetensors", description["sha256"])
        with (
            own_settings(torch.device("cpu")),
            torch.device("meta"),
        ):  # so that a description cannot ask for more than the file holds
            size = sum(p.numel() for p in ImpalaAgent(config).parameters())
        if size > len(data):
            raise PolicyError(f"{path}: describes {size} weights, agent.safetensors has {len(data)} bytes")
        with own_settings(torch.device("cpu")), torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            agent = ImpalaAgent(config, precision)
            fill(agent, data, folder / "agent.safetensors")
        agent.facts = dict(description.get("facts") or {})
    except PolicyError as error:
        raise PolicyError(f"{error}; save the agent again") from None
    except (KeyError, TypeError, ValueError, ConfigError, BundleError) as error:
        raise PolicyError(f"{path}: is damaged ({error}); save the agent again") from None
    return agent.eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def world_model_of(agent: ImpalaAgent, folder: Path | None = None, bundle: Bundle | None = None) -> WorldModel:
    """The world model from whose latents an agent learnt.

    Args:
        agent: by its facts, `latents_sha256` says which latents these are, `bundle` is a folder and `game` a game.
        folder: where the agent was read; the bundle that it ships with is the folder around it.
        bundle: one that is loaded already.

    Raises:
        PolicyError: none of these bundles makes such latents.
    """
    facts, tried = agent.facts, [] if bundle is None else [bundle]
    game, told = str(facts.get("game", "")), facts.get("bundle")
    folders = [folder.parent] if folder is not None and present(folder.parent / "bundle.json") else []
    modes = get_game(game).distribution_modes if game in GAMES and not told else ()
    folders += [Path(str(told))] if told else [embedded_games(m)[game] for m in modes if game in embedded_games(m)]
    for each in [*tried, *folders]:
        try:
            found = each if isinstance(each, Bundle) else load_bundle(each, "cpu", game=game)
        except BundleError:
            continue
        fits = facts.get("latents_sha256", found.latents) == found.latents
        if fits and found.world_model.latent_shape == tuple(agent.config.latent or ()):
            return found.world_model
    named = ", ".join(str(each.folder if isinstance(each, Bundle) else each) for each in [*tried, *folders]) or "none"
    raise PolicyError(f"agent: learnt from latents that no bundle here makes ({named}); give it the one that does")
