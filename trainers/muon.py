"""Muon: steps of a kernel that change all its directions alike, with AdamW for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, chosen by Jordan et al. to be steep at zero; singular values end between 0.7 and 1.2."""
_ITERATIONS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """AdamW in which the parameters of groups with `muon: True` take orthogonal steps (Jordan et al. 2024).

    A gradient's momentum is a matrix of output channels by all else. Its singular values are all made about 1, so that
    directions that are seldom seen are learnt as fast as the others. Steps are as large as AdamW's in the root mean
    square (Liu et al. 2025, arXiv 2502.16982), so both take the same learning rate and weight decay.

    `torch.optim.Muon` does the same to matrices only, and always in bfloat16, which many CPUs do slowly.

    Args:
        groups: of parameters; those with `muon: True` must have two dimensions or more.
        dtype: in which steps are made orthogonal.
        **options: AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of each parameter that has a gradient."""
        groups = self.param_groups
        for group in groups:
            if group.get("muon"):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._turn(parameter, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups

    def _turn(self, parameter: Tensor, rate: float, decay: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - _MOMENTUM)
        matrix = gradient.lerp(average, _MOMENTUM).flatten(1)  # Nesterov's
        step = orthogonal(matrix, self.dtype).to(parameter.dtype).view(parameter.shape)
        parameter.mul_(1 - rate * decay).add_(step, alpha=-0.2 * max(matrix.shape) ** 0.5 * rate)


def orthogonal(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U V^T of a matrix U S V^T, about: singular values of 0.7 to 1.2, by Newton and Schulz's iteration, in `dtype`."""
    a, b, c = _COEFFICIENTS
    x = matrix.to(dtype)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.mT
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
