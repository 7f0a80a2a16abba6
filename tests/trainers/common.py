"""What several tests of the dynamics' training use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamenv.models.interface import Prediction, State
from trainers.tasks.dynamics import DynamicsTask, DynamicsTaskConfig

FLOW = {
    "type": "latent_flow",
    "backbone": {"type": "unet", "channels": [16, 32], "blocks": [1, 1]},
    "embedding": 32,
    "filter_bank": 4,
}


ADVERSARIAL = {"flow": {"weight": 0.3}, "squared": {"certainty": 0.5}, "adversarial": {"weight": 0.1, "judged": 2}}


def settings(latents: Path, terms: dict[str, Any] = ADVERSARIAL, **task: object) -> dict[str, Any]:
    wanted = {"type": "dynamics", "latents": str(latents), "unroll": 3, "val_ratio": 0.2, "terms": terms}
    loop = {"steps": 8, "batch_size": 4, "checkpoint_every": 3, "val_every": 100, "log_every": 1}
    return {"model": FLOW, "task": wanted | task, "loop": loop}


def dynamics_task(latents: Path, terms: dict[str, Any], **options: Any) -> DynamicsTask:
    return DynamicsTask(DynamicsTaskConfig(latents=str(latents), terms=terms, val_ratio=0.2, **options), FLOW, 0)


class Oracle(nn.Module):
    """Dreams what really came next."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__()
        self.latents, self.step = latents.float().requires_grad_(), 3

    def forward(self, state: State, action: torch.Tensor, **_: Any) -> Prediction:
        self.step += 1
        return Prediction(self.latents[:, self.step], torch.zeros(len(action), 16, 16))
