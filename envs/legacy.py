"""The legacy path: Procgen's old gym ids through Shimmy, with seeding and mid-episode reset repaired.

Shimmy's wrapper calls `seed()` of gym3's `ToGymEnv`, which takes no argument, and a reset of that environment in the
middle of an episode is silently ignored. Here `reset` installs a fresh game state, as `RealProcgenVectorEnv` does.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from dreamenv.config import check
from dreamenv.contract.actions import check_action, keys_to_action
from dreamenv.contract.games import SEED_LIMIT, check_levels, get_game
from dreamenv.contract.resets import check_options, check_seeds
from dreamenv.errors import ResetError
from envs.making import fresh_state, no_collection, quiet_import


class LegacyProcgenEnv(gymnasium.Env):
    """`gym.make("procgen:procgen-coinrun-v0")` as a Gymnasium environment.

    Args:
        gym_id: an id that procgen registers with the old gym, "procgen:procgen-<game>-v0".
        render_mode: None or "rgb_array" (the observation's 64 x 64 pixels).
        start_level, num_levels, distribution_mode: as in `RealProcgenVectorEnv`.

    Raises:
        ConfigError: an id of another form, or an unknown game.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(
        self,
        gym_id: str = "procgen:procgen-coinrun-v0",
        render_mode: str | None = None,
        start_level: int = 0,
        num_levels: int = 10000,
        distribution_mode: str = "easy",
    ) -> None:
        prefix, suffix = "procgen:procgen-", "-v0"
        check(
            isinstance(gym_id, str) and gym_id.startswith(prefix) and gym_id.endswith(suffix),
            f"gym_id {gym_id!r}: expected {prefix}<game>{suffix}",
        )
        check(render_mode in (None, "rgb_array"), f"render_mode {render_mode!r}: must be None or 'rgb_array'")
        self.game = get_game(gym_id[len(prefix) : -len(suffix)])
        self.render_mode = render_mode
        check_levels(self.game, start_level, num_levels, distribution_mode)
        self._options = {"start_level": start_level, "num_levels": num_levels, "distribution_mode": distribution_mode}
        with quiet_import(), no_collection():
            import gym
            from shimmy.openai_gym_compatibility import GymV21CompatibilityV0

            inner: Any = gym.make(gym_id, disable_env_checker=True, apply_api_compatibility=False, **self._options)
            self._shimmy = GymV21CompatibilityV0(env=inner.unwrapped)
        self._gym3: Any = inner.unwrapped.env  # the batch of one behind gym3's ToGymEnv
        self.observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(15)
        self._frame = np.zeros((64, 64, 3), np.uint8)
        self._steps = 0
        self._playing = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new episode, in mid-episode too; raises `ResetError` for options (there are none)."""
        check_options(options, ())
        (seed,) = check_seeds([seed], 1, 2**63)
        super().reset(seed=seed)
        rand_seed = int(self.np_random.integers(SEED_LIMIT)) if seed is None else seed % SEED_LIMIT
        self._base().set_state([fresh_state(rand_seed, env_name=self.game.name, **self._options)])
        self._frame = self._base().observe()[1]["rgb"][0].copy()
        self._steps, self._playing = 0, True
        return self._frame.copy(), self._info()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Advance by one action; at the end the last frame is repeated, for Procgen shows no terminal one."""
        action = check_action(action)
        if not self._playing:
            raise ResetError("step() outside an episode: call reset() first")
        frame, reward, done, _, _ = self._shimmy.step(action)
        self._steps += 1
        self._playing = not done
        completed = bool(done) and bool(self._base().get_info()[0]["prev_level_complete"])
        truncated = bool(done) and self._steps >= self.game.max_steps and not completed
        if not done:
            self._frame = np.array(frame)
        return self._frame.copy(), float(reward), bool(done) and not truncated, truncated, self._info()

    def render(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the current frame, uint8 (64, 64, 3), or None without a render mode."""
        return None if self.render_mode is None else self._frame.copy()

    def get_keys_to_action(self) -> dict[tuple[int, ...], int]:
        """Return key-code combinations -> action."""
        return keys_to_action()

    def _info(self) -> dict[str, Any]:
        return {"level_seed": int(self._base().get_info()[0]["level_seed"]), "episode_step": self._steps}

    def _base(self) -> Any:
        env = self._gym3
        while not hasattr(env, "set_state"):
            env = env.env
        return env
