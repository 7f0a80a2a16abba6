"""Muon against PyTorch's, and against the singular value decomposition."""

from __future__ import annotations

import torch
from torch import nn

from trainers.muon import Muon, orthogonal


def test_an_orthogonal_step_has_the_directions_of_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((16, 40), (40, 16), (24, 24)):
        matrix = torch.randn(shape, generator=generator) * 3e-3
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.mT @ orthogonal(matrix) @ v.mT
        values = inner.diagonal()
        assert values.min() > 0.6 and values.max() < 1.3, "its singular values are about 1"
        assert torch.allclose(inner, torch.diag(values), atol=1e-4), "and its singular vectors those of the matrix"
    assert not orthogonal(torch.zeros(4, 9)).any()
    rank_one = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 10))
    assert torch.linalg.svdvals(orthogonal(rank_one))[1] < 1e-3


def test_matrices_take_the_steps_of_pytorch_s_muon_and_vectors_those_of_adamw() -> None:
    generator = torch.Generator().manual_seed(1)
    start = {"matrix": torch.randn(12, 30, generator=generator), "vector": torch.randn(30, generator=generator)}
    ours, theirs = ({k: nn.Parameter(v.clone()) for k, v in start.items()} for _ in range(2))
    groups = [
        {"params": [ours["matrix"]], "muon": True, "weight_decay": 0.1},
        {"params": [ours["vector"]], "weight_decay": 0.0},
    ]
    own = Muon(groups, torch.bfloat16, lr=0.01, betas=(0.9, 0.99))
    muon = torch.optim.Muon([theirs["matrix"]], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([theirs["vector"]], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(5):
        for name, parameter in ours.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            theirs[name].grad = parameter.grad.clone()
        for optimizer in (own, muon, adamw):
            optimizer.step()
    assert torch.equal(ours["vector"], theirs["vector"])
    moved = (theirs["matrix"] - start["matrix"]).abs().mean()
    assert (ours["matrix"] - theirs["matrix"]).abs().mean() < 0.01 * moved, "but for how they round"
    assert [group["lr"] for group in own.param_groups] == [0.01, 0.01], "no group is lost"


def test_a_kernel_is_a_matrix_of_output_channels_by_all_else() -> None:
    generator = torch.Generator().manual_seed(2)
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last))
    flat = nn.Parameter(kernel.detach().flatten(1).clone())
    for parameter in (kernel, flat):
        optimizer = Muon([{"params": [parameter], "muon": True}], lr=0.02, weight_decay=0.0)
        parameter.grad = torch.arange(parameter.numel()).float().view(8, -1).sin().view(parameter.shape)
        optimizer.step()
    assert torch.allclose(kernel.flatten(1), flat, atol=1e-6)
