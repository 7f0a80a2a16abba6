"""The SB3 adapter against SB3's own `DummyVecEnv`, and saved agents against the policies they came from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import VecNormalize

from agents.evaluate import evaluate
from agents.saved import ALGORITHMS, agent_facts, make_algorithm, save_algorithm, to_agent
from agents.train import TrainConfig, train
from agents.worlds import TimedVecEnv
from dreamenv.bundle import load_bundle
from dreamenv.errors import ConfigError, PolicyError
from dreamenv.policies.agent import ImpalaConfig, load_agent
from dreamenv.policies.simple import AgentPolicy
from dreamenv.rewrite import rewrite_bundle
from tests.agents.common import SETTINGS, SMALL, config, dreams
from tests.conftest import of_all, write_toy_bundle


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_saved_agent_acts_as_the_algorithm_that_learnt_it(name: str, toy_bundle: Path, tmp_path: Path) -> None:
    model = make_algorithm(name, dreams(toy_bundle, 2), SETTINGS[name], ImpalaConfig((4, 8), 16), 0, "fp32")
    model.learn(32, **({"use_masking": False} if name == "MaskablePPO" else {}))
    frames = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    saved = load_agent(save_algorithm(tmp_path / "agent", model, {}), "fp32")
    ours, _ = saved.probabilities(frames)
    exact, _ = to_agent(model).probabilities(frames)
    if name in ("DQN", "QRDQN", "ARS"):
        assert (exact.argmax(1) == model.predict(frames.transpose(0, 3, 1, 2), deterministic=True)[0]).all()
        assert set(np.unique(ours)) == {0.0, 1.0}
    elif name != "RecurrentPPO":  # which has a test of its own
        tensor = model.policy.obs_to_tensor(frames.transpose(0, 3, 1, 2))[0]
        with torch.no_grad():
            theirs = cast(Any, model.policy).get_distribution(tensor).distribution.probs.numpy()
        assert exact == pytest.approx(theirs, abs=1e-6) and ours == pytest.approx(theirs, abs=2e-3)
    assert not list(tmp_path.rglob("*.zip")) and not list(tmp_path.rglob("*.pkl"))


def test_values_count_in_the_rewards_of_the_game(toy_bundle: Path, tmp_path: Path) -> None:
    """As SB3's critic, times what its normaliser divides a reward by."""
    envs = VecNormalize(dreams(toy_bundle, 2), norm_obs=False)
    model = make_algorithm("PPO", envs, SETTINGS["PPO"], ImpalaConfig((4, 8), 16), 0, "fp32")
    model.learn(32)
    frames = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        theirs = cast(Any, model.policy).predict_values(torch.as_tensor(frames.transpose(0, 3, 1, 2)))[:, 0].numpy()
    ours = load_agent(save_algorithm(tmp_path / "agent", model, {}), "fp32").values(frames)
    scale = 1e-5 / envs.normalize_reward(np.full(1, 1e-5))[0]
    assert ours == pytest.approx(theirs * scale, rel=1e-2) and ours.std() > 0
    model = make_algorithm("DQN", dreams(toy_bundle, 2), SETTINGS["DQN"], ImpalaConfig((4, 8), 16), 0, "fp32")
    with pytest.raises(PolicyError, match="knows no values"):
        load_agent(save_algorithm(tmp_path / "greedy", model, {})).values(frames)


@pytest.mark.parametrize("name", ["PPO", "RecurrentPPO", "QRDQN"])
def test_an_agent_of_latents_acts_as_the_algorithm_that_learnt_it(name: str, toy_bundle: Path, tmp_path: Path) -> None:
    envs = dreams(toy_bundle, 2, observations="latent")
    model = make_algorithm(name, envs, SETTINGS[name], ImpalaConfig((4, 8), 16), 0, "fp32")
    model.learn(32)
    seen = np.stack([envs.observation_space.sample() for _ in range(8)]) / 10
    saved = load_agent(save_algorithm(tmp_path / "agent", model, {}), "fp32")
    assert saved.config.latent == envs.observation_space.shape
    chosen = to_agent(model).probabilities(seen)[0].argmax(1)
    assert (chosen == model.predict(seen, deterministic=True)[0]).all()
    kept = saved.probabilities(seen)[0]
    if name == "QRDQN":  # a saved one takes the best action always, and values that hardly differ may change places
        assert (kept.max(1) == 1).all() and (kept.argmax(1) == chosen).mean() > 0.5
    else:
        assert kept == pytest.approx(to_agent(model).probabilities(seen)[0], abs=5e-3)
    with pytest.raises(PolicyError, match="looks at"):
        saved.probabilities(np.zeros((2, 64, 64, 3), np.uint8))


@pytest.mark.parametrize("world", ["dream", "mix", "real"])
def test_an_agent_learns_from_latents_and_plays_the_game_through_the_codec(
    world: Any, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "settings: {n_steps: 4, batch_size: 8, n_epochs: 1}\nnetwork: {channels: [4], features: 8}\n"
    (tmp_path / "small.yaml").write_text(f"algorithm: PPO\nnum_envs: 4\n{small}")
    shared: dict[str, Any] = {"steps": 16, "config": tmp_path / "small.yaml", "bundle": toy_bundle, "eval_episodes": 1}
    found = train(TrainConfig(world=world, out=tmp_path / "out", observations="latent", **shared))
    bundle, folder = load_bundle(toy_bundle, "cpu"), found["agent"]
    assert agent_facts(Path(folder))["latents_sha256"] == bundle.latents
    episodes = [evaluate(folder, world, episodes=2, limit=9, bundle=toy_bundle).figures for world in ("real", "dream")]
    assert [each["episodes"] for each in episodes] == [2, 2]
    monkeypatch.setattr(type(bundle.world_model.dynamics), "smooth", of_all)
    policy, network = AgentPolicy(folder), load_agent(folder)
    assert policy.looks and policy.remembers and policy.frame == (64, 64, 3)
    frames: list[list[np.ndarray]] = [[], []]
    taken: list[list[int]] = [[], []]
    asked, rng = [], np.random.default_rng(0)
    probabilities = network.probabilities
    policy._agent.probabilities = lambda shown, memory: asked.append(shown) or probabilities(shown, memory)  # pyright: ignore
    for t in range(7):
        first = np.array([t == 0, t in (0, 4)])
        picture = rng.integers(256, size=(2, 64, 64, 3), dtype=np.uint8)
        for i in np.flatnonzero(first):
            frames[i], taken[i] = [], []
        actions = policy.act(picture, first, rng)
        for i in range(2):
            frames[i].append(picture[i])
            begun = bundle.world_model.start(np.stack(frames[i])[None], np.array([taken[i]], np.int64))
            assert np.allclose(asked[-1][i], begun.latents[0, -1].numpy(), atol=1e-5)
            taken[i].append(int(actions[i]))
    facts = json.loads((Path(folder) / "agent.json").read_text())
    other = write_toy_bundle(tmp_path / "other", seed=1)
    for told in (str(other), str(tmp_path / "gone"), 3):  # the bundle has moved: give it, or put the agent into it
        (Path(folder) / "agent.json").write_text(json.dumps(facts | {"facts": facts["facts"] | {"bundle": told}}))
        with pytest.raises(PolicyError, match="learnt from latents that no bundle here makes"):
            AgentPolicy(folder, bundle=load_bundle(other, "cpu"))
        assert AgentPolicy(folder, bundle=bundle).frame == (64, 64, 3)
        assert evaluate(folder, "real", episodes=1, limit=3, bundle=toy_bundle).figures["episodes"] == 1
    home = tmp_path / "home"
    shutil.copytree(toy_bundle, home)
    shutil.copytree(folder, home / "agent")
    assert AgentPolicy(str(home / "agent")).looks
    moved = rewrite_bundle(home, tmp_path / "small", 8)
    assert AgentPolicy(str(moved / "agent")).looks, "its latents are rounded, and still those that it learnt from"


def test_a_recurrent_agent_remembers_as_the_algorithm_that_learnt_it(toy_bundle: Path, tmp_path: Path) -> None:
    """Sequences of three environments, one of which begins anew in the middle, against sb3-contrib's own prediction."""
    network = ImpalaConfig((4, 8), 16, memory=24)
    model = make_algorithm("RecurrentPPO", dreams(toy_bundle, 3), SETTINGS["RecurrentPPO"], network, 0, "fp32")
    model.learn(48)
    policy = AgentPolicy(to_agent(model))
    assert load_agent(save_algorithm(tmp_path / "agent", model, {})).config.memory == 24 and policy.remembers
    rng = np.random.default_rng(0)
    states = None
    for step in range(6):
        frames = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
        first = np.array([step == 0, step in (0, 3), step == 0])
        _, states = model.predict(frames.transpose(0, 3, 1, 2), states, first)
        policy.act(frames, first, rng)
        assert states is not None and policy._memory is not None
        assert policy._memory[:2].numpy() == pytest.approx(np.concatenate(states), abs=1e-5)
    alone = AgentPolicy(to_agent(model))
    alone.act(frames, np.ones(3, bool), rng)
    assert policy._memory is not None and alone._memory is not None
    assert (policy._memory[:2] - alone._memory[:2]).abs().max() > 1e-3, "it does remember"
    policy.act(frames[:2], np.zeros(2, bool), rng)  # another batch begins anew
    with pytest.raises(ConfigError, match="memory 24: PPO has none"):
        make_algorithm("PPO", dreams(toy_bundle), {}, network, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MaskablePPO", "RecurrentPPO"])
def test_contributed_algorithms_resume_to_the_same_bytes(name: str, toy_bundle: Path, tmp_path: Path) -> None:
    def settings(**changes: Any) -> TrainConfig:
        made = config(tmp_path, toy_bundle, **changes)
        made.config.write_text(json.dumps(json.loads(made.config.read_text()) | {"algorithm": name}))
        return made

    whole = train(settings(out=tmp_path / "whole"))
    train(settings(out=tmp_path / "parts", steps=128))
    parts = train(settings(out=tmp_path / "parts", resume=True))
    assert whole["steps"] == parts["steps"] == 256
    for file in ("agent/agent.safetensors", "checkpoint/arrays.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file


def test_ars_counts_the_steps_that_were_taken(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path, toy_bundle)
    made.config.write_text(
        json.dumps({"algorithm": "ARS", "num_envs": 4, "network": SMALL, "settings": {"n_delta": 1}})
    )
    taken, step_wait = [0], TimedVecEnv.step_wait

    def counted(self: TimedVecEnv) -> Any:
        taken[0] += self.num_envs
        return step_wait(self)

    monkeypatch.setattr(TimedVecEnv, "step_wait", counted)
    assert train(made)["steps"] == taken[0] >= 256
    assert load_agent(tmp_path / "run" / "agent").config.greedy
    with pytest.raises(ConfigError, match="no checkpoints"):
        train(replace(made, resume=True))
