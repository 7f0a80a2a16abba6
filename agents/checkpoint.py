"""Checkpoints of an on-policy run between two rollouts, with the environments' own state: a resume changes nothing."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize, unwrap_vec_wrapper

from dreamenv import checkpoints
from dreamenv.artifacts import parse_tensors
from dreamenv.errors import CheckpointError

FORMAT_VERSION = 2


def save_checkpoint(folder: Path, model: OnPolicyAlgorithm, identity: str) -> None:
    """Write everything the next rollout depends on into `folder`, atomically; `identity` names the configuration."""
    arrays = {f"policy.{k}": v.detach().cpu().numpy() for k, v in model.policy.state_dict().items()}
    for index, parameter in enumerate(model.policy.parameters()):
        for name, value in model.policy.optimizer.state.get(parameter, {}).items():
            arrays[f"optimizer.{index}.{name}"] = value.detach().cpu().numpy()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    arrays |= {"rng.torch": torch.get_rng_state().numpy(), "rng.numpy": np.asarray(keys)}
    if model.device.type == "cuda":
        arrays["rng.cuda"] = torch.cuda.get_rng_state(model.device).numpy()
    arrays |= {"last_obs": np.asarray(model._last_obs), "last_episode_starts": np.asarray(model._last_episode_starts)}
    if (memory := getattr(model, "_last_lstm_states", None)) is not None:  # RecurrentPPO's
        arrays |= {f"memory.{i}": x.cpu().numpy() for i, x in enumerate((*memory.pi, *memory.vf))}
    assert model.env is not None
    for i, data in enumerate(model.env.env_method("snapshot", indices=_leaders(model.env))):
        arrays[f"env.{i}"] = np.frombuffer(data, np.uint8)
    state: dict[str, Any] = {
        "steps": model.num_timesteps,
        "updates": model._n_updates,
        "progress_remaining": model._current_progress_remaining,
        "numpy": [kind, int(position), int(has_gauss), float(cached)],
        "episodes": [[float(e["r"]), int(e["l"]), float(e["t"])] for e in model.ep_info_buffer or ()],
    }
    if (monitor := unwrap_vec_wrapper(model.env, VecMonitor)) is not None:
        assert isinstance(monitor, VecMonitor)
        arrays |= {"monitor.returns": monitor.episode_returns, "monitor.lengths": monitor.episode_lengths}
    if (scaler := unwrap_vec_wrapper(model.env, VecNormalize)) is not None:
        assert isinstance(scaler, VecNormalize)
        arrays |= {
            "scaler.returns": scaler.returns,
            "scaler.mean": np.asarray(scaler.ret_rms.mean),
            "scaler.var": np.asarray(scaler.ret_rms.var),
        }
        state["scaler_count"] = float(scaler.ret_rms.count)
    data = save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
    checkpoints.write(folder, FORMAT_VERSION, identity, state, {"arrays": data})


def load_checkpoint(folder: Path, model: OnPolicyAlgorithm, identity: str) -> bool:
    """Continue from `folder` if there is a checkpoint; returns whether there was.

    Raises:
        CheckpointError: it is damaged and so is the one before, or it belongs to another configuration.
    """
    if not checkpoints.exists(folder):
        return False
    state, parts = checkpoints.read(folder, FORMAT_VERSION, identity, ("arrays",))
    arrays = parse_tensors(load, parts["arrays"], folder / "arrays", CheckpointError, checkpoints.REMEDY)
    for name, array in arrays.items():
        if name.startswith(("policy.", "optimizer.")) and not np.isfinite(array).all():
            raise CheckpointError(f"{folder}: {name} is not finite; {checkpoints.REMEDY}")
    assert model.env is not None
    expected = (model.n_envs, *(model.env.observation_space.shape or ()))
    if arrays.get("last_obs", np.zeros(0)).shape not in (expected, (expected[0], *expected[-1:], *expected[1:-1])):
        raise CheckpointError(f"{folder}: last_obs is not of {expected}; {checkpoints.REMEDY}")
    try:
        _restore(model, state, arrays)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[-1]
        raise CheckpointError(f"{folder}: does not fit this run ({reason}); {checkpoints.REMEDY}") from None
    return True


def _restore(model: OnPolicyAlgorithm, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    model.policy.load_state_dict({k[7:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("policy.")})
    for index, parameter in enumerate(model.policy.parameters()):
        prefix = f"optimizer.{index}."
        moments = {k[len(prefix) :]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}
        if moments:
            model.policy.optimizer.state[parameter] = {
                k: v if k == "step" else v.to(parameter) for k, v in moments.items()
            }
    assert model.env is not None
    model.env.reset()
    snapshots = [arrays[f"env.{i}"].tobytes() for i in range(len(_leaders(model.env)))]
    for index, data in zip(_leaders(model.env), snapshots, strict=True):
        model.env.env_method("restore", data, indices=[index])
    model._last_obs, model._last_episode_starts = arrays["last_obs"], arrays["last_episode_starts"]
    if (memory := getattr(model, "_last_lstm_states", None)) is not None:
        before = [torch.from_numpy(arrays[f"memory.{i}"]).to(model.device) for i in range(4)]
        model._last_lstm_states = type(memory)(tuple(before[:2]), tuple(before[2:]))  # pyright: ignore[reportAttributeAccessIssue]
    model.num_timesteps, model._n_updates = state["steps"], state["updates"]
    model._current_progress_remaining = state["progress_remaining"]
    model.ep_info_buffer = deque(
        ({"r": r, "l": n, "t": t} for r, n, t in state["episodes"]), maxlen=model._stats_window_size
    )
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    if (monitor := unwrap_vec_wrapper(model.env, VecMonitor)) is not None:
        assert isinstance(monitor, VecMonitor)
        monitor.episode_returns, monitor.episode_lengths = arrays["monitor.returns"], arrays["monitor.lengths"]
    if (scaler := unwrap_vec_wrapper(model.env, VecNormalize)) is not None:
        assert isinstance(scaler, VecNormalize)
        scaler.returns = arrays["scaler.returns"]
        moments = scaler.ret_rms
        # safetensors keeps them as (1,), which numpy would promote the rewards by; () as before divides in their own
        # precision
        moments.mean, moments.var = (
            arrays[f"scaler.{name}"].reshape(np.shape(moments.mean)) for name in ("mean", "var")
        )
        moments.count = state["scaler_count"]
    kind, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, arrays["rng.numpy"], position, has_gauss, cached))
    torch.set_rng_state(torch.from_numpy(arrays["rng.torch"]))
    if "rng.cuda" in arrays and model.device.type == "cuda":
        torch.cuda.set_rng_state(torch.from_numpy(arrays["rng.cuda"]), model.device)


def _leaders(envs: Any) -> list[int]:
    """The first environment of each native batch behind `envs`: a batch has one snapshot for all of its own."""
    return list(getattr(envs.unwrapped, "leaders", [0]))
