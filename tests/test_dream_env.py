"""The dream as an environment: Gymnasium's and SB3's own checks, seeding, batches, autoreset, snapshots."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import dreamenv  # noqa: F401 - registers the id
from dreamenv.errors import ConfigError, ResetError
from dreamenv.vector import DreamVectorEnv
from tests.conftest import write_toy_bundle

NOISY = {"nfe": 2, "temperature": 1.0}


def actions_for(steps: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(15, size=(steps, n))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, dreamenv; raise SystemExit('torch' in sys.modules or 'tyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("sampler", [None, NOISY])
def test_gymnasium_check_env(toy_bundle: Path, sampler: dict | None) -> None:
    env = gym.make("DreamProcgen-v0", bundle=toy_bundle, sampler=sampler, render_mode="rgb_array", device="cpu")
    check_env(env.unwrapped)
    assert env.unwrapped.render().shape == (64, 64, 3)


def test_sb3_check_env(toy_bundle: Path) -> None:
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    sb3_check_env(gym.make("dreamenv:DreamProcgen-v0", bundle=toy_bundle, device="cpu").unwrapped)


def test_make_vec_is_native(toy_bundle: Path) -> None:
    envs = gym.make_vec("DreamProcgen-v0", num_envs=3, bundle=toy_bundle, device="cpu")
    assert isinstance(envs.unwrapped, DreamVectorEnv)
    observations, _ = envs.reset(seed=1)
    assert observations in envs.observation_space
    step = envs.step(envs.action_space.sample())
    assert step[0] in envs.observation_space
    assert step[1].dtype == np.float64 and step[2].dtype == bool and step[3].dtype == bool


SCRIPT = """
import sys, hashlib, numpy as np, gymnasium as gym, dreamenv
env = gym.make("DreamProcgen-v0", bundle=sys.argv[1], sampler={"nfe": 2}, device="cpu")
digest = hashlib.sha256()
frame, _ = env.reset(seed=7)
for action in np.random.default_rng(0).integers(15, size=int(sys.argv[2])):
    digest.update(frame.tobytes())
    frame, reward, terminated, truncated, info = env.step(action)
    digest.update(repr((reward, terminated, truncated, info["uncertainty"])).encode())
    if terminated or truncated:
        frame, _ = env.reset()
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_a_thousand_steps_are_byte_equal_in_two_processes(toy_bundle: Path) -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(toy_bundle), "1000"], capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) == 65


def test_the_seed_decides_and_the_global_rng_does_not(toy_bundle: Path) -> None:
    def run(seed: int) -> bytes:
        envs = DreamVectorEnv(2, bundle=toy_bundle, sampler=NOISY)
        first, _ = envs.reset(seed=seed)
        frames = [first] + [envs.step(a)[0] for a in actions_for(20, 2)]
        return np.stack(frames).tobytes()

    torch.manual_seed(0)
    np.random.seed(0)
    a = run(3)
    torch.manual_seed(1)
    np.random.seed(1)
    assert run(3) == a
    assert run(4) != a


@pytest.mark.parametrize("n", [1, 3, 8, 64])
@pytest.mark.parametrize("sampler", [None, NOISY])
def test_an_environment_dreams_the_same_in_any_batch(toy_bundle: Path, n: int, sampler: dict | None) -> None:
    index = n // 2
    steps = 12 if n < 64 else 6
    actions = actions_for(steps, n)

    def rollout(envs: DreamVectorEnv, seed: int, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        frames = [envs.reset(seed=seed)[0]]
        rewards = []
        for a in own:
            frame, reward, *_ = envs.step(a)
            frames.append(frame)
            rewards.append(reward)
        return np.stack(frames), np.stack(rewards)

    alone = rollout(DreamVectorEnv(1, bundle=toy_bundle, sampler=sampler), 100 + index, actions[:, index : index + 1])
    exact = rollout(DreamVectorEnv(n, bundle=toy_bundle, sampler=sampler, exact=True), 100, actions)
    fast = rollout(DreamVectorEnv(n, bundle=toy_bundle, sampler=sampler), 100, actions)
    assert np.array_equal(exact[0][:, index], alone[0][:, 0])
    assert np.array_equal(exact[1][:, index], alone[1][:, 0])
    difference = np.abs(fast[0][:2, index].astype(int) - alone[0][:2, 0].astype(int))
    assert (difference <= 1).mean() >= 0.999


def test_step_limit_truncates_and_autoresets_in_the_same_step(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "b", max_steps=5)
    envs = DreamVectorEnv(2, bundle=bundle, sampler={"temperature": 0}, autoreset_mode="SameStep")
    envs.reset(seed=0)
    for t in range(1, 13):
        frames, _, terminated, truncated, infos = envs.step(np.array([4, 4]))
        assert not terminated.any()
        assert truncated.all() == (t % 5 == 0)
        assert infos["dream_step"].tolist() == [t % 5] * 2
        if truncated.all():
            assert infos["_final_obs"].all() and infos["final_obs"][0].shape == (64, 64, 3)
            assert not np.array_equal(infos["final_obs"][0], frames[0])
            assert infos["final_info"]["dream_step"].tolist() == [5, 5]
        else:
            assert "final_obs" not in infos


def test_next_step_mode_resets_on_the_following_step(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "b", max_steps=5)
    envs = DreamVectorEnv(1, bundle=bundle, sampler={"temperature": 0})
    assert envs.autoreset_mode is AutoresetMode.NEXT_STEP, "as Gymnasium's own"
    same = DreamVectorEnv(1, bundle=bundle, sampler={"temperature": 0}, autoreset_mode="SameStep")
    envs.reset(seed=0)
    same.reset(seed=0)
    for _ in range(5):
        a, b = envs.step(np.array([3])), same.step(np.array([3]))
    assert a[3].all() and np.array_equal(a[0][0], b[4]["final_obs"][0])
    following = envs.step(np.array([3]))
    assert np.array_equal(following[0], b[0])  # the next episode's first frame, the action ignored
    assert following[1][0] == 0 and not following[2].any() and not following[3].any()
    assert np.array_equal(envs.step(np.array([8]))[0], same.step(np.array([8]))[0])


def test_disabled_mode_waits_for_the_reset_mask(tmp_path: Path) -> None:
    envs = DreamVectorEnv(
        2,
        bundle=write_toy_bundle(tmp_path / "b", max_steps=3),
        autoreset_mode=AutoresetMode.DISABLED,
        sampler={"temperature": 0},
    )
    envs.reset(seed=0)
    for _ in range(3):
        frames, *_, truncated, _ = envs.step(np.array([1, 2]))
    assert truncated.all()
    with pytest.raises(ResetError, match="finished"):
        envs.step(np.array([1, 2]))
    again, _ = envs.reset(options={"reset_mask": np.array([True, False])})
    assert np.array_equal(again[1], frames[1]) and not np.array_equal(again[0], frames[0])
    with pytest.raises(ResetError, match="environment 1"):
        envs.step(np.array([1, 2]))


def test_rewards_terminate_and_come_in_real_magnitudes(tmp_path: Path) -> None:

    from dreamenv.bundle import load_bundle

    loaded = load_bundle(write_toy_bundle(tmp_path / "b"), "cpu")
    loaded.world_model.head.prior.copy_(torch.tensor([-50.0, -50.0, 50.0]))
    envs = DreamVectorEnv(3, bundle=replace(loaded, identity="coins"), autoreset_mode="SameStep")
    envs.reset(seed=0)
    _, rewards, terminated, truncated, infos = envs.step(np.array([7, 7, 7]))
    assert rewards.tolist() == [10.0] * 3 and terminated.all() and not truncated.any()
    assert infos["final_info"]["expected_reward"] == pytest.approx([10.0] * 3)


@pytest.mark.slow
def test_snapshot_restore_and_replay_over_200_steps(toy_bundle: Path, tmp_path: Path) -> None:
    envs = DreamVectorEnv(3, bundle=toy_bundle, sampler=NOISY)
    envs.reset(seed=5)
    for a in actions_for(30, 3, 1):
        envs.step(a)
    data = envs.snapshot()
    actions = actions_for(200, 3, 2)

    def replay() -> str:
        digest = hashlib.sha256()
        for a in actions:
            frames, rewards, terminated, truncated, _ = envs.step(a)
            digest.update(frames.tobytes() + rewards.tobytes() + terminated.tobytes() + truncated.tobytes())
        return digest.hexdigest()

    first = replay()
    restored = envs.restore(data)
    assert restored.shape == (3, 64, 64, 3)
    assert replay() == first
    (tmp_path / "snapshot").write_bytes(data)
    script = (
        "import sys, hashlib, numpy as np\nfrom dreamenv.vector import DreamVectorEnv\n"
        "envs = DreamVectorEnv(3, bundle=sys.argv[1], sampler={'nfe': 2})\n"
        "envs.restore(open(sys.argv[2], 'rb').read())\ndigest = hashlib.sha256()\n"
        "for a in np.random.default_rng(2).integers(15, size=(200, 3)):\n"
        "    f, r, te, tr, _ = envs.step(a)\n"
        "    digest.update(f.tobytes() + r.tobytes() + te.tobytes() + tr.tobytes())\n"
        "print(digest.hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(toy_bundle), str(tmp_path / "snapshot")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == first


def test_branch_zero_is_the_original_future_and_the_others_are_not(toy_bundle: Path) -> None:
    envs = DreamVectorEnv(2, bundle=toy_bundle, sampler=NOISY, exact=True)
    envs.reset(seed=5)
    envs.step(np.array([7, 8]))
    data = envs.snapshot()
    fan = envs.branch(data, 4, index=1)
    actions = actions_for(10, 1, 3)[:, 0]
    own = np.stack([envs.step(np.array([0, a]))[0][1] for a in actions])
    fanned = np.stack([fan.step(np.full(4, a))[0] for a in actions])
    assert np.array_equal(fanned[:, 0], own)
    assert not np.array_equal(fanned[:, 1], fanned[:, 0]) and not np.array_equal(fanned[:, 2], fanned[:, 1])


def test_selected_environments_go_on_as_they_would_have(toy_bundle: Path) -> None:
    envs = DreamVectorEnv(5, bundle=toy_bundle, sampler=NOISY, exact=True)
    with pytest.raises(ResetError, match="reset"):
        envs.select([0])
    envs.reset(seed=5)
    now = envs.step(actions_for(1, 5)[0])[0]
    rows = np.array([4, 1])
    some, blind = envs.select(rows), envs.select(rows, draw=False)
    begun = np.zeros(2, bool)
    assert some.num_envs == 2 and some.exact and some.truncate_above == envs.truncate_above
    for actions in actions_for(30, 5, 3):  # beyond the end of some episodes
        every, part = envs.step(actions), some.step(actions[rows])
        assert all(np.array_equal(a[rows], b) for a, b in zip(every[:4], part[:4], strict=True))
        assert np.array_equal(every[4]["dream_step"][rows], part[4]["dream_step"])
        unseen = blind.step(actions[rows])
        assert all(np.array_equal(a, b) for a, b in zip(part[1:4], unseen[1:4], strict=True))
        begun |= part[2] | part[3]
        assert np.array_equal(unseen[0][~begun], now[rows][~begun])
    assert np.array_equal(blind.select([0]).step([7])[0], unseen[0][:1])
    for bad in ([], [5], [-1], [0.0], [[0]]):
        with pytest.raises(ConfigError, match="rows"):
            envs.select(bad)


def test_reset_from_real_history(toy_bundle: Path) -> None:
    rng = np.random.default_rng(0)
    frames, actions = rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8), rng.integers(15, size=5)
    env = gym.make("DreamProcgen-v0", bundle=toy_bundle, device="cpu").unwrapped
    a, info = env.reset(seed=0, options={"frames": frames, "actions": actions})
    assert info["start"] == -1
    model = env.bundle.world_model
    alone = model.decode(model.encode(frames[-1:]))[
        0
    ].numpy()  # encoded in a batch of another size: rounding may differ
    assert np.abs(a.astype(int) - alone).max() <= 1
    step = env.step(7)[0]
    env.reset(seed=0, options={"frames": frames[2:], "actions": actions[2:]})  # only the last four count
    assert np.array_equal(env.step(7)[0], step)
    env.reset(seed=0, options={"frames": frames[-1:]})
    short = env.step(7)[0]
    env.reset(seed=0, options={"frames": frames[[-1, -1, -1, -1]], "actions": np.array([4, 4, 4])})
    # a short history is padded with its first frame and no-ops
    assert (np.abs(env.step(7)[0].astype(int) - short) <= 1).mean() > 0.999


def test_reset_options_choose_the_start(toy_bundle: Path) -> None:
    envs = DreamVectorEnv(3, bundle=toy_bundle)
    assert envs.reset(seed=0, options={"start": 2})[1]["start"].tolist() == [2, 2, 2]
    assert envs.reset(seed=0, options={"start": [0, 1, 4]})[1]["start"].tolist() == [0, 1, 4]
    drawn = {tuple(envs.reset(seed=s, options={"start": "random"})[1]["start"].tolist()) for s in range(10)}
    assert len(drawn) > 3
