"""Parameters that move the loss and get no gradient have rows and columns of zeros."""

from __future__ import annotations

import pytest
import torch
from support.operators import as_matrix, dense_by_autograd, distance, hessian
from support.references import cross_entropy, finite_difference_hessian
from torch import Tensor, nn
from torch.nn import functional as F


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 3, padding_idx=2)
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.words(x)).mean(1))


class Bag(Padded):
    """Has no second derivative, so that differences serve."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 3, mode="mean", padding_idx=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bag(x)


class PartlyFrozen(nn.Module):
    """The first two rows of a weight are detached, as where new words are trained beside old."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(7, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.words.weight[:2].detach(), self.words.weight[2:]])
        return self.out(torch.tanh(F.embedding(x, weight)).mean(1))


class ZeroAdapter(nn.Module):
    """A low-rank update that starts at zero: its first factor has no gradient, and a Hessian."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(7, 3), nn.Linear(3, 3)
        self.first = nn.Parameter(torch.randn(2, 3))
        self.second = nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.words(x)).mean(1)
        return self.out(h) + h @ self.first.T @ self.second.T


SKIPPING = {"padded": Padded, "partly frozen": PartlyFrozen, "zero adapter": ZeroAdapter}


def words(count: int = 20):
    x = torch.randint(7, (count, 4))
    x[:, -1:] = 2
    return x, torch.randint(3, (count,))


@pytest.mark.parametrize("engine", ["linearize", "autograd", "recompute", "finite_difference"])
@pytest.mark.parametrize("name", SKIPPING)
def test_rows_without_gradient_are_zero_and_so_are_columns(name, engine):
    module = SKIPPING[name]().double()
    batches = [words(), words(12)]
    expected = sum(
        share * dense_by_autograd(module, cross_entropy, batch)
        for share, batch in zip((20 / 32, 12 / 32), batches, strict=True)
    )
    with hessian(module, cross_entropy, batches, engine) as operator:
        found = as_matrix(operator)
    assert distance(found, expected) < (1e-7 if engine == "finite_difference" else 1e-12)
    dead = ~expected.any(1)
    assert not found[dead].any()
    assert not found[:, dead].any()


def test_a_padding_row_that_differences_would_move_stays():
    module = Bag().double()
    measured = hessian(module, cross_entropy, [words()])
    with pytest.warns(UserWarning, match="Finite differences"):
        operator = measured.__enter__()
    found = as_matrix(operator)
    measured.__exit__(None, None, None)
    expected = finite_difference_hessian(module, cross_entropy, words())
    assert found.shape == expected.shape
    rows = torch.arange(6, 9)  # of the padding word
    assert not found[rows].any()
    assert not found[:, rows].any()
    assert distance(found, found.T) < 1e-7
