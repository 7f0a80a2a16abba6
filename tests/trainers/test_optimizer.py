"""Muon against PyTorch's, against the singular value decomposition; which parameters take its steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamenv.errors import ConfigError
from trainers.optimizer import MuonAdamW, make_optimizer, orthogonalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_orthogonalized_matrix_has_the_singular_vectors_it_had(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((16, 40), (40, 16), (24, 24), (1, 9)):
        matrix = torch.randn(shape, generator=generator) * 3e-3
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.mT @ orthogonalize(matrix, dtype).float() @ v.mT
        values, large = inner.diagonal(), s > 0.02 * s.norm()
        assert values[large].min() > 0.6 and values.max() < 1.3, "its singular values are about 1"
        off = inner - torch.diag(values)
        assert off.abs().max() < (1e-4 if dtype == torch.float32 else 0.1), "and its singular vectors are the matrix'"
    assert not orthogonalize(torch.zeros(4, 9), dtype).any()


def test_small_singular_values_end_lower() -> None:
    values = torch.tensor([1.0, 1e-2, 1e-3, 1e-4, 0.0])
    ends = orthogonalize(torch.diag(values)).diagonal()
    assert ends[1] > 0.6 and 0.2 < ends[2] < 0.6 and 0 < ends[3] < 0.1 and ends[4] == 0


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (8, 4, 3, 3), (16, 3, 1, 1)])
def test_kernels_take_the_steps_of_pytorch_s_muon_and_vectors_those_of_adamw(shape: tuple[int, ...]) -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    kernel = start.to(memory_format=torch.channels_last) if start.ndim == 4 else start.clone()
    ours = {
        "kernel": nn.Parameter(kernel),
        "vector": nn.Parameter(torch.ones(30)),
        "unused": nn.Parameter(start.clone()),
    }
    theirs = {"kernel": nn.Parameter(start.flatten(1).clone()), "vector": nn.Parameter(torch.ones(30))}
    groups = [
        {"params": [ours["kernel"], ours["unused"]], "muon": True, "weight_decay": 0.1},
        {"params": [ours["vector"]], "weight_decay": 0.0},
    ]
    own = MuonAdamW(groups, torch.bfloat16, lr=0.01, betas=(0.9, 0.99))
    muon = torch.optim.Muon([theirs["kernel"]], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([theirs["vector"]], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(5):
        for name, parameter in theirs.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            ours[name].grad = parameter.grad.view(ours[name].shape).clone()
        for optimizer in (own, muon, adamw):
            optimizer.step()
    assert torch.equal(ours["vector"], theirs["vector"])
    moved = (theirs["kernel"] - start.flatten(1)).abs().mean()
    assert (ours["kernel"].flatten(1) - theirs["kernel"]).abs().mean() < 0.01 * moved, "but for how they round"
    assert torch.equal(ours["unused"], start), "what has no gradient does not even decay"
    assert [len(group["params"]) for group in own.param_groups] == [2, 1], "no group is lost"


class _Model(nn.Module):
    learning_rates = {"fast": 10.0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.bank, self.fast = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(3, 3))


def test_muon_is_for_the_kernels_of_convolutions() -> None:
    model, critic = _Model(), nn.Conv2d(3, 1, 3)
    names = {id(p): n for n, p in model.named_parameters()} | {
        id(p): f"critic.{n}" for n, p in critic.named_parameters()
    }
    for name, by_muon in (("muon", {"convolution.weight"}), ("adamw", set())):
        groups = make_optimizer(model, critic, name, 1e-3, 0.1, bf16=False).param_groups
        found = {names[id(p)]: group for group in groups for p in group["params"]}
        assert found.keys() == set(names.values()), "each is in a group"
        assert {n for n, group in found.items() if group.get("muon")} == by_muon
        decays = {n for n, group in found.items() if group["weight_decay"]}
        assert decays == {"convolution.weight", "linear.weight", "bank"}
        assert found["fast"]["rate"] == 10 and found["critic.weight"]["betas"] == (0.5, 0.99)
    with pytest.raises(ConfigError, match="no convolution; use adamw"):
        make_optimizer(nn.Linear(2, 2), None, "muon", 1e-3, 0.0, bf16=False)
