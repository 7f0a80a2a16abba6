"""Where the camera goes next: a switching linear system that sees the tiles around the player."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.models.blocks import fp32, zero_init
from dreamenv.models.tiles.player import PlayerView

_LAWS = 16  # linear laws of motion an axis
_WAVES = (4, 8, 16, 32, 64)  # waves a tile of the speed's finer features
_FINELY = (50, 10)  # units a tile in which the laws' answers are seen


class CameraMotion(PlayerView):
    """Predicts the camera's next move from the tiles around the player, the moves so far and the actions.

    Networks weigh a few linear laws of the last two moves, the place and the action, for each axis its own (mixture of
    experts, Jacobs et al. 1991). Running, falling and landing are each linear, and a law that is weighed alone is
    exact, where a network's answer is off by thousandths of a tile at every step, which add up. What weighs the laws
    sees to which
    moves they would lead, finely near rest: who would be slower than friction allows stands still.
    """

    def __init__(self, codes: int, context: int, width: int, games: int = 0) -> None:
        super().__init__(codes, context, 48)
        features = self.seen + 4 * len(_WAVES) * min(context - 1, 2) + 2 * len(_FINELY) * _LAWS + games
        self.weigh = nn.Sequential(
            nn.Linear(features, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2 * _LAWS),
        )
        self.laws = zero_init(nn.Linear(2 * min(context - 1, 2) + 2 + NUM_ACTIONS + 1 + games, 2 * _LAWS))

    def forward(
        self, recent: Tensor, place: Tensor, before: Tensor, actions: Tensor, told: Sequence[Tensor] = ()
    ) -> Tensor:
        """Predict the next move (B, 2); see `PlayerView.see`, and `Grid.told` for what it is told of games."""
        taken = F.one_hot(actions[:, -1], NUM_ACTIONS + 1).float()
        with fp32(recent):  # what is lost here adds up twice, in speed and in place
            given = torch.cat([before[:, -2:].flatten(1), place, taken, *told], 1)
            changes = self.laws(given).unflatten(1, (2, _LAWS))
            answers = (before[:, -1, :, None] + changes).detach().flatten(1)
            turn = 2 * torch.pi * before[:, -2:].detach().flatten(1)  # as of the place
            fine = [f(n * turn) for n in _WAVES for f in (torch.cos, torch.sin)]
            fine += [(n * answers).tanh() for n in _FINELY]
            seen = torch.cat([self.see(recent, place, before, actions), *fine, *told], 1)
            weights = self.weigh(seen).unflatten(1, (2, _LAWS)).softmax(2)
            return before[:, -1] + (weights * changes).sum(2)
