"""The optimizers: AdamW, and Muon for convolutions' kernels beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dreamenv.config import check

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's, steep at zero
_ITERATIONS = 5
_MOMENTUM = 0.95


def make_optimizer(
    model: nn.Module, auxiliary: nn.Module | None, name: str, rate: float, decay: float, bf16: bool
) -> MuonAdamW:
    """The optimizer of a training.

    Args:
        model: what is trained. Its `learning_rates`, if it has any, say of parameters, by name, how many times as fast
            they learn, by AdamW and without decay.
        auxiliary: networks that are trained against it, by an AdamW of less memory; None where there are none.
        name: adamw for all weights, or muon for the kernels of convolutions.
        rate: learning rate.
        decay: decoupled weight decay of all that is no vector.
        bf16: whether Muon may orthogonalize in bfloat16.

    Raises:
        ConfigError: Muon for a model without convolutions.
    """
    named, rates = dict(model.named_parameters()), getattr(model, "learning_rates", {})
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)] if name == "muon" else []
    check(name != "muon" or bool(convolutions), "optimizer 'muon': the model has no convolution; use adamw")
    kernels, slow = {id(m.weight) for m in convolutions}, [p for n, p in named.items() if n not in rates]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in slow if id(p) in kernels], "weight_decay": decay, "muon": True, "cycles": False},
        {"params": [p for p in slow if p.ndim >= 2 and id(p) not in kernels], "weight_decay": decay},
        {"params": [p for p in slow if p.ndim < 2], "weight_decay": 0.0},
        *({"params": [named[n]], "weight_decay": 0.0, "rate": faster} for n, faster in rates.items()),
    ]
    if auxiliary is not None:
        groups.append(
            {"params": list(auxiliary.parameters()), "weight_decay": 0.0, "betas": (0.5, 0.99), "cycles": False}
        )
    return MuonAdamW(groups, torch.bfloat16 if bf16 else torch.float32, lr=rate, betas=(0.9, 0.99), fused=True)


class MuonAdamW(torch.optim.AdamW):
    """AdamW in which the parameters of groups with `muon: True` take orthogonalized steps instead.

    The method is Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The momentum of a
    parameter's gradient is read as a matrix, its first dimension by all others, whose large and small singular values
    are brought near one another. So directions that are seldom seen are learnt nearly as fast as the others. Steps have
    about AdamW's root mean square (Liu et al. 2025, arXiv 2502.16982), so both take the same learning rate and decay.

    `torch.optim.Muon` does the same to matrices only, and always in bfloat16, which is slow on CPUs without it.

    Args:
        groups: of parameters; those with `muon: True` must have two dimensions or more. Their state is
            `momentum_buffer`, of the parameter's shape.
        dtype: in which steps are orthogonalized: float32 or bfloat16.
        **options: AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change each parameter that has a gradient, by its group's `lr` and `weight_decay`."""
        groups = self.param_groups
        for group in groups:
            if group.get("muon"):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._muon_step(parameter, parameter.grad, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups

    def _muon_step(self, parameter: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - _MOMENTUM)
        matrix = gradient.lerp(average, _MOMENTUM).flatten(1)  # Nesterov's momentum
        step = orthogonalize(matrix, self.dtype).to(parameter.dtype).reshape(parameter.shape)
        parameter.mul_(1 - rate * decay).add_(step, alpha=-0.2 * max(matrix.shape) ** 0.5 * rate)


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T of a matrix U S V^T, by five of Newton and Schulz's iterations (Jordan et al. 2024).

    Singular values above a hundredth of the matrix' norm end at 0.7 to 1.2, smaller ones lower; zero stays zero but for
    rounding, which in bfloat16 fills empty directions.

    Args:
        matrix: (M, N), floating.
        dtype: of the iterations.

    Returns:
        (M, N) of `dtype`.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.to(dtype)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.mT
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
