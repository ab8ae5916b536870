"""Stability of networks with BatchNorm, whose running statistics training does not use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hessian import Absent, LossOptions, Scalars, Session, StabilityInstrument, Training


def network(kind: str, bias: bool) -> nn.Module:
    """Return a network whose first layer feeds a norm; its bias is part of it or not."""
    torch.manual_seed(0)
    flat = kind in ("BatchNorm1d", "frozen")
    first = nn.Linear(6, 5, bias=bias) if flat else nn.Conv2d(1, 5, 3, bias=bias)
    if bias:
        nn.init.zeros_(first.bias)
    norm: nn.Module = nn.BatchNorm1d(5) if flat else getattr(nn, kind)(5, affine=True)
    if kind == "InstanceNorm2d":
        norm = nn.InstanceNorm2d(5, affine=True, track_running_stats=True)
    torch.manual_seed(1)
    head = nn.Linear(5, 3) if flat else nn.Sequential(nn.Flatten(), nn.Linear(5 * 16, 3))
    return nn.Sequential(first, norm, nn.Tanh(), head).double()


def batches(kind: str) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    shape = (6,) if kind in ("BatchNorm1d", "frozen") else (1, 6, 6)
    inputs = torch.randn(24, *shape, dtype=torch.float64)
    return list(zip(inputs.split(12), torch.randint(3, (24,)).split(12), strict=True))


def loss_fn(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def measured(kind: str, mode: str, *, bias: bool, optimizer: Any) -> Scalars | Absent:
    module = network(kind, bias).train()
    if kind == "frozen":
        module[1].requires_grad_(False).eval()
    made = optimizer([p for p in module.parameters() if p.requires_grad])
    for _ in range(4):
        made.zero_grad()
        for batch in batches(kind):
            loss_fn(module, batch).backward()
        made.step()
    options = LossOptions(mode=mode)
    with Session(
        module, loss_fn, batches(kind), training=Training((made,)), loss_options=options,
        hvp="autograd",
    ) as session:  # fmt: skip
        return StabilityInstrument(tol=1e-9, max_products=60).measure(session, None)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


KINDS = ["BatchNorm1d", "BatchNorm2d", "InstanceNorm2d"]


@pytest.mark.parametrize("kind", KINDS)
def test_by_running_statistics_there_is_no_ratio_and_why_is_said(kind: str) -> None:
    found = measured(kind, "eval", bias=True, optimizer=adam)
    assert not {"ratio", "sharpness", "threshold"} & found.scalars().keys()
    assert found.scalars()["lambda_1"] > 0
    (said,) = found.absent()
    assert 'LossOptions(mode="train")' in said


@pytest.mark.parametrize("kind", KINDS)
def test_by_those_of_the_batch_a_bias_before_it_changes_nothing(kind: str) -> None:
    """Training does not feel that bias, so the network without it is the reference."""
    found = measured(kind, "train", bias=True, optimizer=adam).scalars()
    reference = measured(kind, "train", bias=False, optimizer=adam).scalars()
    assert found["ratio"] == pytest.approx(reference["ratio"], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("BatchNorm1d", sgd), ("frozen", adam)], ids=["SGD", "frozen"]
)
def test_where_nothing_is_scaled_or_the_norm_is_frozen_there_is_one(
    kind: str, optimizer: Any
) -> None:
    assert measured(kind, "eval", bias=True, optimizer=optimizer).scalars()["ratio"] > 0
