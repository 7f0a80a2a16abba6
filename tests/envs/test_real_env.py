"""The real game under our contract, checked against procgen itself."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import envs  # noqa: F401 - registers the ids
from dreamenv.contract.games import GAMES
from dreamenv.errors import ConfigError, InvalidActionError, ResetError, SnapshotError
from envs.procgen import RealProcgenEnv, RealProcgenVectorEnv, make_procgen
from envs.wrappers import extract_rgb, grayscale_stack
from tests.conftest import same_bytes


def test_the_table_covers_all_games() -> None:
    make_procgen(num=1, env_name="coinrun").close()
    from procgen.env import ENV_NAMES

    assert sorted(GAMES) == sorted(ENV_NAMES)
    assert all(
        len(g.meanings) == len(g.bias) == 15 and g.easy[0] < g.easy[1] and g.hard[0] < g.hard[1] for g in GAMES.values()
    )


@pytest.mark.parametrize("env_id", ["envs:RealProcgen-v0", "envs:LegacyProcgen-v0"])
def test_checkers_of_gymnasium_and_sb3(env_id: str) -> None:
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    env = gym.make(env_id, render_mode="rgb_array").unwrapped
    check_env(env)
    sb3_check_env(env)
    env.close()


@pytest.mark.parametrize("game", sorted(GAMES))
def test_steps_and_snapshots_of_every_game(game: str) -> None:
    vector = RealProcgenVectorEnv(2, game)
    vector.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        vector.step(rng.integers(15, size=2))
    data = vector.snapshot()
    actions = rng.integers(15, size=(60, 2))
    first = [vector.step(a) for a in actions]
    other = RealProcgenVectorEnv(2, game)
    other.restore(data)
    second = [other.step(a) for a in actions]
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
        assert np.array_equal(a[2], b[2]) and np.array_equal(a[3], b[3])
        assert np.array_equal(a[4]["level_seed"], b[4]["level_seed"])


def test_the_steps_are_those_of_procgen() -> None:
    """Level 7, played through ours and through procgen's own batch, frame by frame."""
    own = make_procgen(num=1, env_name="coinrun", start_level=7, num_levels=1, distribution_mode="easy", rand_seed=99)
    env = RealProcgenEnv("coinrun", start_level=7, num_levels=1)
    frame, info = env.reset(seed=0)
    assert info["level_seed"] == 7
    rng = np.random.default_rng(1)
    for _ in range(300):
        assert np.array_equal(frame, own.observe()[1]["rgb"][0])
        action = rng.integers(15)
        own.act(np.array([action]))
        reward, _, first = own.observe()
        frame, own_reward, terminated, truncated, _ = env.step(action)
        assert own_reward == reward[0] and (terminated or truncated) == first[0]
        if first[0]:
            frame, _ = env.reset()


def test_one_seed_one_future_in_any_batch() -> None:
    def run(vector: RealProcgenVectorEnv, column: int, seed: int) -> list:
        frames, infos = vector.reset(seed=seed)
        out = [(frames[column].tobytes(), infos["level_seed"][column])]
        for action in np.random.default_rng(0).choice([7, 8], 300):
            frames, *_, infos = vector.step(np.full(vector.num_envs, action))
            out.append((frames[column].tobytes(), infos["level_seed"][column]))
        return out

    wide = run(RealProcgenVectorEnv(5), 3, 10)
    assert run(RealProcgenVectorEnv(1), 0, 13) == wide
    assert run(RealProcgenVectorEnv(1), 0, 14) != wide
    assert len({level for _, level in wide}) > 1  # the levels after the first are decided by the seed too


def test_reset_in_mid_episode_starts_a_new_episode_of_the_masked_ones_only() -> None:
    vector = RealProcgenVectorEnv(3)
    vector.reset(seed=0)
    for _ in range(10):
        before, *_ = vector.step(np.array([7, 7, 7]))
    after, infos = vector.reset(options={"reset_mask": np.array([False, True, False])})
    assert np.array_equal(after[[0, 2]], before[[0, 2]]) and not np.array_equal(after[1], before[1])
    assert infos["episode_step"].tolist() == [10, 0, 10]


def test_levels_stay_in_their_range_and_can_be_chosen() -> None:
    vector = RealProcgenVectorEnv(8, start_level=10000, num_levels=3)
    seen = set()
    for seed in range(6):
        seen |= set(vector.reset(seed=seed * 8)[1]["level_seed"].tolist())
    assert seen == {10000, 10001, 10002}
    _, infos = vector.reset(options={"level": np.arange(8) + 50})
    assert infos["level_seed"].tolist() == list(range(50, 58))


def test_a_chosen_level_is_left_at_the_next_reset_and_snapshots_keep_to_their_range() -> None:
    env = RealProcgenEnv(start_level=0, num_levels=5)
    assert env.reset(seed=0, options={"level": 10500})[1]["level_seed"] == 10500
    assert {env.reset()[1]["level_seed"] for _ in range(6)} <= set(range(5))
    held_out = RealProcgenEnv(start_level=10000, num_levels=5)
    held_out.reset(seed=0)
    with pytest.raises(SnapshotError, match="start_level"):
        env.restore(held_out.snapshot())


def test_the_time_limit_truncates_and_death_terminates() -> None:
    vector = RealProcgenVectorEnv(4, "maze")
    vector.reset(seed=0)
    for t in range(1, 501):  # nobody moves, so nothing but time ends an episode
        _, rewards, terminated, truncated, _ = vector.step(np.full(4, 4))
        assert not terminated.any() and truncated.all() == (t == 500)
    runner = RealProcgenVectorEnv(16)
    runner.reset(seed=0)
    ends = []
    for _ in range(300):
        _, rewards, terminated, truncated, _ = runner.step(np.random.default_rng(_).choice([7, 8], 16))
        assert not truncated.any()
        ends += rewards[terminated].tolist()
    assert set(ends) == {0.0, 10.0}


def test_next_step_mode_is_same_step_mode_with_a_step_for_each_reset() -> None:
    """Environment by environment: the same frames, rewards and levels, but that the reset takes a step of its own."""
    n, steps = 6, 400
    same = RealProcgenVectorEnv(n, autoreset_mode="SameStep", max_episode_steps=40)
    following = RealProcgenVectorEnv(n, max_episode_steps=40)
    assert following.autoreset_mode is AutoresetMode.NEXT_STEP
    actions = np.random.default_rng(0).choice([7, 7, 8, 5, 1], (n, steps))
    took, resetting = np.zeros(n, int), np.zeros(n, bool)
    seen: list[list] = [[] for _ in range(n)]
    frames, infos = following.reset(seed=3)
    for _ in range(steps // 2):
        chosen = np.where(resetting, 14, actions[np.arange(n), took])
        frames, rewards, terminated, truncated, infos = following.step(chosen)
        for i in range(n):
            if resetting[i]:
                assert rewards[i] == 0 and not terminated[i] and not truncated[i] and infos["episode_step"][i] == 0
                seen[i][-1] = (*seen[i][-1][:3], frames[i].tobytes(), infos["level_seed"][i])
            else:
                seen[i].append((rewards[i], terminated[i], truncated[i], frames[i].tobytes(), infos["level_seed"][i]))
                took[i] += 1
        resetting = terminated | truncated
    same.reset(seed=3)
    cut = 0
    for t in range(took.min()):
        before = frames
        frames, rewards, terminated, truncated, infos = same.step(actions[:, t])
        for i in range(n):
            if t < len(seen[i]) - 1:
                assert seen[i][t] == (
                    rewards[i],
                    terminated[i],
                    truncated[i],
                    frames[i].tobytes(),
                    infos["level_seed"][i],
                )
            if truncated[i]:
                cut += 1
                assert infos["final_info"]["episode_step"][i] == 40
                assert not np.array_equal(infos["final_obs"][i], before[i]) and infos["_final_obs"][i]
    assert cut and took.min() > 100 and any(s[1] for row in seen for s in row)


def test_disabled_mode_resets_an_episode_that_was_cut_short() -> None:
    def play(limit: int | None) -> list[int]:
        vector = RealProcgenVectorEnv(1, "maze", autoreset_mode="Disabled", max_episode_steps=limit)
        levels = [vector.reset(seed=0)[1]["level_seed"][0]]
        for _ in range(3):
            for _ in range(10):
                *_, truncated, _ = vector.step(np.array([4]))
            assert truncated[0] == (limit is not None)
            levels.append(vector.reset(options={"reset_mask": np.array([True])})[1]["level_seed"][0])
        return levels

    assert play(10) == play(None) and len(set(play(10))) > 2


def test_the_single_env_repeats_its_last_frame_at_the_end() -> None:
    env = RealProcgenEnv()
    last, _ = env.reset(seed=1)
    for action in np.random.default_rng(0).choice([7, 8], 900):
        frame, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
        last = frame
    assert terminated and np.array_equal(frame, last)
    with pytest.raises(ResetError):
        env.step(7)
    fresh, info = env.reset()
    assert info["episode_step"] == 0 and not np.array_equal(fresh, last)


def test_large_rendering_shows_the_same_moment() -> None:
    large = RealProcgenVectorEnv(2, render_mode="rgb_array", render_size=512)
    frames, _ = large.reset(seed=0)
    for _ in range(15):
        frames, *_ = large.step(np.array([7, 8]))
    pictures = large.render()
    assert pictures is not None and pictures[0].shape == (512, 512, 3)
    for picture, frame in zip(pictures, frames, strict=True):
        small = picture.reshape(64, 8, 64, 8, 3).mean((1, 3))
        assert np.abs(small - frame).mean() < 20
        assert np.abs(small - frame[:, ::-1]).mean() > np.abs(small - frame).mean()


def test_legacy_seed_and_mid_episode_reset() -> None:
    env = gym.make("envs:LegacyProcgen-v0", gym_id="procgen:procgen-coinrun-v0", disable_env_checker=True)
    a, _ = env.reset(seed=1)
    for _ in range(10):
        moved = env.step(7)[0]
    b, _ = env.reset(seed=1)
    c, _ = env.reset(seed=2)
    d, _ = env.reset()
    assert np.array_equal(a, b) and not np.array_equal(a, moved)
    assert not np.array_equal(b, c) and not np.array_equal(c, d)


def test_single_envs_type_their_errors_and_end_their_episodes() -> None:
    for env_id in ("envs:RealProcgen-v0", "envs:LegacyProcgen-v0"):
        env = gym.make(env_id, disable_env_checker=True).unwrapped
        with pytest.raises(ResetError):
            env.step(7)
        for bad in ({"seed": -1}, {"seed": 1.5}, {"options": {"begin": 1}}):
            with pytest.raises(ResetError):
                env.reset(**bad)
        env.reset(seed=1)
        done = False
        for action in np.random.default_rng(0).choice([7, 8], 900):
            _, _, terminated, truncated, _ = env.step(action)
            if done := terminated or truncated:
                break
        assert done
        with pytest.raises(ResetError):
            env.step(7)
    with pytest.raises(ConfigError):
        gym.make("envs:LegacyProcgen-v0", distribution_mode="nightmare")
    with pytest.raises(ConfigError):
        gym.make("envs:LegacyProcgen-v0", gym_id="procgen-coinrun-v0")


def test_the_wrapper_stack_of_the_seed_document() -> None:
    env = grayscale_stack(RealProcgenEnv())
    stack, _ = env.reset(seed=0)
    assert stack.shape == (4, 84, 84) and stack.dtype == np.float32 and 0 <= stack.min() and stack.max() <= 1
    following = env.step(7)[0]
    assert np.array_equal(following[:3], stack[1:]) and following in env.observation_space

    class DictEnv(RealProcgenEnv):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gym.spaces.Dict({"rgb": self.observation_space})

        def reset(self, **kwargs):
            frame, info = super().reset(**kwargs)
            return {"rgb": frame}, info

        def step(self, action):
            frame, *rest = super().step(action)
            return {"rgb": frame}, *rest

    assert np.array_equal(grayscale_stack(DictEnv()).reset(seed=0)[0], stack)
    with pytest.raises(ConfigError, match="image"):
        extract_rgb(DictEnv(), "image")


@pytest.mark.parametrize(
    "arguments",
    [
        {"game": "coin"},
        {"game": 3},
        {"num_envs": 0},
        {"num_envs": True},
        {"num_levels": 2.5},
        {"start_level": "5"},
        {"distribution_mode": "extreme"},
        {"autoreset_mode": "Never"},
        {"num_threads": -1},
        {"start_level": -1},
        {"start_level": 5, "num_levels": 0},
        {"num_levels": 2**31},
        {"distribution_mode": "nightmare"},
        {"autoreset_mode": np.array([1, 2])},
        {"num_envs": 10**6},
        {"max_episode_steps": 0},
        {"render_mode": "ansi"},
        {"render_size": 100},
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ConfigError):
        RealProcgenVectorEnv(**arguments)


def test_bad_calls_leave_the_state_alone() -> None:
    vector = RealProcgenVectorEnv(2)
    with pytest.raises(ResetError):
        vector.step(np.array([0, 0]))
    vector.reset(seed=0)
    before = vector.snapshot()
    for bad in ([0], [0, 15], [0.0, 1.0], "ab"):
        with pytest.raises(InvalidActionError):
            vector.step(bad)
    for options in ({"level": -1}, {"level": [1, 2, 3]}, {"reset_mask": [True, False, True]}, {"start": 0}):
        with pytest.raises(ResetError):
            vector.reset(options=options)
    for options in ([1], {"reset_mask": [[True], [True, False]]}):
        with pytest.raises(ResetError):
            vector.reset(options=options)  # type: ignore[arg-type]
    for seed in (-1, [1], [1, -2], 1.5, "x", True):
        with pytest.raises(ResetError):
            vector.reset(seed=seed)
    assert same_bytes(vector.snapshot(), before)
    with pytest.raises(SnapshotError):
        RealProcgenVectorEnv(3).restore(before)
    with pytest.raises(SnapshotError):
        RealProcgenVectorEnv(2, "maze").restore(before)


def test_gymnasium_play_finds_the_keys() -> None:
    keys = RealProcgenEnv().get_keys_to_action()
    assert len(keys) == 14 and set(keys.values()) == set(range(15)) - {4}, "no keys at all are the caller's no-op"
