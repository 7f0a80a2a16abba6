"""How an agent is trained and judged on the way; exact resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from agents.benchmark import BenchmarkConfig
from agents.evaluate import Evaluation, evaluate
from agents.real_steps import RealStepsConfig
from agents.report import learnt_from
from agents.rounds import LoopConfig
from agents.saved import agent_facts, go_on_from, make_algorithm, to_agent
from agents.train import AlgorithmConfig, TrainConfig, load_algorithm, train
from agents.worlds import dataset_starts, dream_world, make_world, real_world
from dreamenv.bundle import load_bundle, resolve_bundle, save_bundle
from dreamenv.errors import CheckpointError, ConfigError, DatasetError, PolicyError
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, load_agent
from dreamenv.world_model import WorldModel
from envs.collect import CollectConfig, collect
from tests.agents.common import SETTINGS, config, dreams
from tests.conftest import MEAN, same_bytes, write_toy_bundle


def test_what_cannot_be_trained_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SAC"):
        make_algorithm("SAC", dreams(toy_bundle), {}, ImpalaConfig(), 0)
    with pytest.raises(ConfigError, match="refuses"):
        make_algorithm("PPO", dreams(toy_bundle), {"no_such": 1}, ImpalaConfig(), 0)
    (tmp_path / "c.yaml").write_text("algoritm: PPO\n")
    with pytest.raises(ConfigError, match="algorithm"):
        load_algorithm(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("algorithm: SAC\n")
    with pytest.raises(ConfigError, match="algorithm 'SAC': there are PPO"):
        load_algorithm(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("algorithm: DQN\n")
    for plan in (BenchmarkConfig, RealStepsConfig):  # both go on after a kill
        with pytest.raises(ConfigError, match="DQN saves no checkpoints"):
            plan(config=tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="DQN saves no checkpoints"):
        LoopConfig(agent_config=tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="horizon 1001"):
        LoopConfig(horizon=1001)
    with pytest.raises(ConfigError, match="would overwrite it"):
        TrainConfig(agent=tmp_path / "run" / "agent", out=tmp_path / "x" / ".." / "run")
    wrongs: list[dict[str, Any]] = [{"horizon": 9}, {"starts": tmp_path}, {"truncate_above": 1.0}, {"penalty": 1.0}]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} .*: is for dreams"):
            TrainConfig(world="real", **wrong)
    with pytest.raises(ConfigError, match="the bundle is of easy"):
        make_world("dream", "coinrun", 2, toy_bundle, distribution_mode="hard")


def test_where_two_models_disagree_the_dream_is_unsure(toy_bundle: Path, tmp_path: Path) -> None:
    one, stranger = load_bundle(toy_bundle, "cpu"), load_bundle(write_toy_bundle(tmp_path / "other", seed=5), "cpu")
    dynamics = stranger.world_model.dynamics
    second = WorldModel(one.world_model.codec, dynamics, one.world_model.head)
    save_bundle(tmp_path / "second", second, one.game, one.limits, one.starts, {"toy": True})
    plain = dream_world(one, 3, sampler=MEAN)
    same, apart = (dream_world(one, 3, sampler=MEAN, vote=folder) for folder in (toy_bundle, tmp_path / "second"))
    for world in (plain, same, apart):
        world.envs.reset(seed=1)
    for t in range(4):
        state = plain.envs._state
        steps = [model.step(state, np.full(3, t), None, MEAN).state for model in (one.world_model, second)]
        off = (steps[0].latents[:, -1] - steps[1].latents[:, -1]).square().mean((1, 2, 3)).sqrt().numpy()
        seen = [world.envs.step(np.full(3, t)) for world in (plain, same, apart)]
        assert all(np.array_equal(a, b) for other in seen[1:] for a, b in zip(seen[0][:4], other[:4], strict=True))
        assert not seen[1][4]["uncertainty"].any() and off.min() > 1e-3
        assert np.allclose(seen[2][4]["uncertainty"], off, rtol=1e-3)
    with pytest.raises(ConfigError, match="codecs differ"):
        dream_world(one, 3, vote=stranger.folder)
    with pytest.raises(ConfigError, match="is for dreams"):
        TrainConfig(world="real", vote=toy_bundle)


@pytest.mark.slow
def test_a_dreamer_can_be_judged_in_other_dreams_alone(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds: list[str] = []

    def watched(agent: Any, world: str, *args: Any, **options: Any) -> Evaluation:
        worlds.append(world)
        return evaluate(agent, world, *args, **options)

    monkeypatch.setattr("agents.keeper.evaluate", watched)
    result = train(config(tmp_path, toy_bundle, judge="dream", eval_every=128))
    assert worlds == ["dream", "dream"] and "real" not in result
    kept = tmp_path / "run" / "best"
    again = evaluate(str(kept), "dream", levels=(0, 10_000), episodes=2, bundle=toy_bundle, nfe=1)
    assert agent_facts(kept)["dream_return"] == again.figures["mean_return"] >= result["dream"]["mean_return"]
    other = {"judge": "dream", "eval_nfe": 3, "eval_limit": 5}
    found = train(config(tmp_path, toy_bundle, out=tmp_path / "other", **other))
    last = str(tmp_path / "other" / "agent")
    asked: dict[str, Any] = {"levels": (0, 10_000), "episodes": 2, "bundle": toy_bundle, "nfe": 3}
    again, whole = (evaluate(last, "dream", **asked, limit=limit).figures for limit in (5, None))
    assert found["dream"]["mean_length"] == again["mean_length"] < whole["mean_length"]
    assert found["dream"]["mean_return"] == again["mean_return"]
    for wrong in ({"judge": "game"}, {"eval_nfe": 0}, {"eval_limit": 1001}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} .*: must be"):
            config(tmp_path, toy_bundle, **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("world", ["dream", "mix", "real"])
def test_a_resumed_run_ends_with_the_same_bytes(world: str, toy_bundle: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"world": world, "share": 0.25, "horizon": None if world == "real" else 30}
    options |= {"penalty": 0.5} if world == "dream" else {}
    whole = train(config(tmp_path, toy_bundle, out=tmp_path / "whole", **options))
    train(config(tmp_path, toy_bundle, out=tmp_path / "parts", steps=128, **options))
    parts = train(config(tmp_path, toy_bundle, out=tmp_path / "parts", resume=True, **options))
    assert whole["steps"] == parts["steps"] == 256
    for name in ("agent/agent.safetensors", "checkpoint/arrays.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    shares = whole["shares"]
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0 and shares["update"] > 0
    assert (shares["decode"] > 0) == (world != "real")
    assert (tmp_path / "whole" / "best" / "agent.json").exists()
    imagined = {"dream": 256, "mix": 64, "real": 0}[world]
    assert learnt_from(agent_facts(Path(whole["agent"]))) == (imagined, 256 - imagined)
    assert (tmp_path / "whole" / "progress.csv").stat().st_size > 100


@pytest.mark.slow
def test_an_evaluation_that_is_killed_is_made_up_for(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returns: list[Any] = [1.0, KeyboardInterrupt(), 5.0, 2.0]  # the second evaluation is cut off

    def killed(*args: Any, **options: Any) -> Any:
        found = returns.pop(0)
        if isinstance(found, BaseException):
            raise found
        return SimpleNamespace(figures={"mean_return": found, "success_rate": 0.0, "mean_length": 1.0})

    monkeypatch.setattr("agents.keeper.evaluate", killed)
    every: dict[str, Any] = {"eval_every": 64, "judge": "dream", "steps": 192}
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, toy_bundle, **every))
    train(config(tmp_path, toy_bundle, resume=True, **every))
    assert not returns and agent_facts(tmp_path / "run" / "best")["dream_return"] == 5.0


@pytest.mark.slow
def test_the_end_of_a_run_is_saved_though_its_evaluation_fails(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.keeper.evaluate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config(tmp_path, toy_bundle, steps=64))
    assert agent_facts(tmp_path / "run" / "agent")["steps"] == 64


@pytest.mark.slow
def test_an_agent_of_latents_is_judged_with_the_embedded_bundle(tmp_path: Path) -> None:
    latent = load_bundle(resolve_bundle(None, "maze"), "cpu", game="maze").world_model.latent_shape
    network = ImpalaAgent(ImpalaConfig((4,), 8, latent=latent))  # as while it learns: no facts say whose latents
    assert evaluate(network, "real", "maze", episodes=1, limit=2).figures["mean_length"] == 2


@pytest.mark.slow
def test_the_real_game_is_as_difficult_as_asked(tmp_path: Path) -> None:
    easy, hard = (make_world("real", "maze", 2, distribution_mode=mode) for mode in (None, "hard"))
    alone = real_world("maze", 2, distribution_mode="hard")
    for envs in (easy, hard, alone):
        envs.seed(3)
    frames = [np.asarray(envs.reset()) for envs in (easy, hard, alone)]
    assert np.array_equal(frames[1], frames[2]) and not np.array_equal(frames[0], frames[1])
    data = collect(CollectConfig(out=str(tmp_path / "d"), steps=200, num_envs=4, shard_steps=50), progress=False)
    with pytest.raises(DatasetError, match="coinrun in easy, the dream in hard"):
        dataset_starts(data, "coinrun", 3, 4, distribution_mode="hard")


@pytest.mark.slow
def test_an_agent_goes_on_from_a_saved_one(toy_bundle: Path, tmp_path: Path) -> None:
    first = Path(train(config(tmp_path, toy_bundle, out=tmp_path / "first", steps=64))["agent"])
    fresh = make_algorithm("PPO", dreams(toy_bundle, 2), SETTINGS["PPO"], ImpalaConfig((4, 8), 16), 5, "fp32")
    go_on_from(fresh, first)
    frames = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    assert np.array_equal(to_agent(fresh).probabilities(frames)[0], load_agent(first, "fp32").probabilities(frames)[0])
    tensor = fresh.policy.obs_to_tensor(frames.transpose(0, 3, 1, 2))[0]
    with torch.no_grad():
        values = cast(Any, fresh.policy).predict_values(tensor)[:, 0]
        assert torch.equal(values, load_agent(first, "fp32")(tensor.float() / 255)[1])
    one, two = (
        train(config(tmp_path, toy_bundle, out=tmp_path / n, steps=64, **extra))["agent"]
        for n, extra in (("anew", {}), ("on", {"agent": first}))
    )
    weights = [(Path(folder) / "agent.safetensors").read_bytes() for folder in (first, one, two)]
    assert same_bytes(weights[0], weights[1]) and not same_bytes(weights[0], weights[2])
    assert [learnt_from(agent_facts(Path(folder))) for folder in (first, two)] == [(64, 0), (128, 0)]
    assert learnt_from({"world": "real", "steps": 5, "from": {"world": "mix", "steps": 8}}) == (4, 9)
    told = {"world": "dream", "steps": 5, "critic": {"real_steps": 70}}
    assert learnt_from(told) == (5, 70) and learnt_from(told | {"from": told}) == (10, 70), "one critic"
    assert learnt_from(told | {"from": told | {"critic": {"real_steps": 8}}}) == (10, 78)
    assert learnt_from(told | {"critic": {"agent": "unknown"}}) == (None, None)
    assert learnt_from({}) == (None, None)
    other = make_algorithm("PPO", dreams(toy_bundle, 2), SETTINGS["PPO"], ImpalaConfig((4, 4), 16), 0)
    with pytest.raises(PolicyError, match="another shape"):
        go_on_from(other, first)
    dqn = make_algorithm("DQN", dreams(toy_bundle, 2), SETTINGS["DQN"], ImpalaConfig((4, 8), 16), 0)
    with pytest.raises(ConfigError, match="DQN cannot go on"):
        go_on_from(dqn, first)


def test_a_damaged_or_foreign_checkpoint_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    train(config(tmp_path, toy_bundle, steps=64))
    with pytest.raises(CheckpointError, match="another configuration"):
        train(config(tmp_path, toy_bundle, steps=128, seed=1, resume=True))
    victim = tmp_path / "run" / "checkpoint" / "arrays.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    shutil.rmtree(tmp_path / "run" / "checkpoint-before", ignore_errors=True)
    with pytest.raises(CheckpointError, match="sha256"):
        train(config(tmp_path, toy_bundle, steps=128, resume=True))


def test_the_default_settings_are_procgens() -> None:
    algorithm = load_algorithm(Path("agents/configs/ppo.yaml"))
    assert isinstance(algorithm, AlgorithmConfig) and algorithm.algorithm == "PPO" and algorithm.num_envs == 64
    s = algorithm.settings
    assert algorithm.num_envs * s["n_steps"] // s["batch_size"] == 8 and s["gamma"] == 0.999 and s["gae_lambda"] == 0.95
