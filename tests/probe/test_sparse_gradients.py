"""Embeddings with sparse gradients are measured as those with dense ones are, by every function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian import block_structure, gradient_structure, hessian_spectrum, layer_spectra
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError

pytestmark = pytest.mark.filterwarnings("ignore:Finite differences")


class Functional(nn.Module):
    """Asks for sparse gradients in a call, where no attribute of a module says so."""

    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight, sparse=True).mean(1)


class Mean(nn.Module):
    def __init__(self, num: int, width: int, *, sparse: bool) -> None:
        super().__init__()
        self.rows = nn.Embedding(num, width, sparse=sparse)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x).mean(1)


ENGINES = ("auto", "autograd", "recompute", "linearize", "finite_difference")
KINDS = {
    "embedding": lambda: Mean(7, 3, sparse=True),
    "bag": lambda: nn.EmbeddingBag(7, 3, sparse=True, mode="mean"),
    "bag of sums": lambda: nn.Sequential(nn.EmbeddingBag(7, 3, sparse=True, mode="sum"), Third()),
    "functional": lambda: Functional(7, 3),
}


class Third(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 3


class Net(nn.Module):
    def __init__(self, rows: nn.Module) -> None:
        super().__init__()
        self.rows, self.last = rows, nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.rows(x)))


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def problem(kind: str) -> tuple[Net, list, Tensor, np.ndarray]:
    """Returns a module, its data, its dense Hessian (torch's own) and gradients of samples."""
    torch.manual_seed(0)
    module = Net(KINDS[kind]()).double()
    x, y = torch.randint(6, (30, 3)), torch.randint(4, (30,))  # the last row is in no sample
    parameters = list(module.parameters())
    shapes = [p.shape for p in parameters]
    flat = torch.cat([p.detach().flatten() for p in parameters])

    def loss(vector: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        table, weight, bias = (p.view(shape) for p, shape in zip(parts, shapes, strict=True))
        return F.cross_entropy(torch.tanh(table[x].mean(1)) @ weight.T + bias, y)

    dense = torch.autograd.functional.hessian(loss, flat)
    gradients = [
        torch.autograd.functional.jacobian(lambda v, i=i: loss(v, x[i, None], y[i, None]), flat)
        for i in range(30)
    ]
    return module, [(x, y)], dense, torch.stack(gradients).numpy()


@pytest.mark.parametrize(
    "engine", ["auto", "autograd", "recompute", "linearize", "finite_difference"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_hessian(kind, engine):
    module, batches, dense, _ = problem(kind)
    if "bag" in kind and engine in ("autograd", "recompute", "linearize"):
        pytest.skip("torch has no second derivative of a bag")
    objective = Objective(module, loss_fn, batches, ParameterSpace.select(module))
    if kind == "functional" and engine == "linearize":  # sparse tensors have no forward derivative
        with objective.isolated(), pytest.raises(MeasurementError, match="Use hvp='autograd'"):
            HessianOperator(objective, engine)
        return
    with objective.isolated():
        operator = HessianOperator(objective, engine)
        found = torch.stack([operator.matvec(e) for e in torch.eye(operator.size).double()])
    assert torch.allclose(found, dense, atol=1e-7)
    assert [m.sparse for m in module.modules() if hasattr(m, "sparse")] == [True] * (
        kind != "functional"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_function_measures_them(kind):
    module, batches, dense, gradients = problem(kind)
    expected = torch.linalg.eigvalsh(dense).flip(0)[:2].numpy()
    spectrum = hessian_spectrum(module, loss_fn, batches, num_eigenvalues=2, tol=1e-6)
    np.testing.assert_allclose(spectrum.eigenvalues, expected, rtol=1e-5)
    blocks = block_structure(module, loss_fn, batches, blocks={"rows": "rows.*", "last": "last.*"})
    norms = [[dense[a, b].norm() for b in (slice(21), slice(21, None))] for a in
             (slice(21), slice(21, None))]  # fmt: skip
    np.testing.assert_allclose(blocks.frobenius, norms, rtol=1e-5)
    layers = layer_spectra(module, loss_fn, batches, layers={"rows": "rows.*"}, num_eigenvalues=1)
    top = torch.linalg.eigvalsh(dense[:21, :21])[-1]
    np.testing.assert_allclose(layers["rows"].eigenvalues, [float(top)], rtol=1e-4)
    found = gradient_structure(module, loss_fn, batches, batch_size=1, num_gradients=30)
    covariance = np.linalg.eigvalsh(np.cov(gradients.T))[::-1][:5]
    np.testing.assert_allclose(found.covariance[:5], covariance, rtol=1e-8)
