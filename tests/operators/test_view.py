"""Views of the operator on some parameters, against the blocks of the dense Hessian."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from support.operators import as_matrix, reference
from support.references import Problem, cross_entropy, in_double, ragged, trainable
from torch import Tensor, nn

from lightning_hessian.operators.costs import counted
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace

NETWORKS = ("mlp", "convolution", "multihead_attention", "tied_embedding", "lstm")
KEEPING = ("linearize", "autograd")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

CASES = [
    (name, engine)
    for name in NETWORKS
    for engine in (*KEEPING, "recompute", "finite_difference")
    if (name, engine) != ("lstm", "linearize")  # refused or right: see test_hessian.py
]


def selections(module: nn.Module) -> dict[str, list[str]]:
    """Returns the last layer, every second tensor, and a single one in the middle."""
    names = list(trainable(module))
    return {"late": names[-2:], "spread": names[::2], "one": [names[len(names) // 2]]}


def block_of(module: nn.Module, hessian: Tensor, names: list[str]) -> Tensor:
    """Returns the rows and columns of the dense matrix that belong to some tensors."""
    owners = [name for name, p in trainable(module).items() for _ in range(p.numel())]
    chosen = torch.tensor([owner in names for owner in owners])
    return hessian[chosen][:, chosen]


@contextmanager
def operator_of(given: Problem, engine: str, dtype: torch.dtype = torch.float64):
    module, batches = given.module, given.batches
    if engine == "linearize":  # it takes a second to make
        batches = [given.whole]
    if dtype == torch.float64:
        module, batches = in_double(module), in_double(batches)
    objective = Objective(module, given.loss_fn, batches, ParameterSpace.select(module))
    with objective.isolated():
        yield HessianOperator(objective, engine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "engine"), CASES)
def test_a_view_is_the_block_of_the_dense_hessian(name, engine, dtype):
    if (name, engine, dtype) == ("convolution", "finite_difference", torch.float32):
        pytest.skip("the corners of max-pooling lie within the steps of single precision")
    given, hessian = reference(name)
    tolerance = TOLERANCE[dtype]
    if engine == "finite_difference":
        tolerance = 100 * torch.finfo(dtype).eps ** (2 / 3)
    with operator_of(given, engine, dtype) as whole:
        for names in selections(given.module).values():
            expected = block_of(given.module, hessian, names)
            view = whole.restricted(names)
            found = as_matrix(view)
            assert (view.size, view.dtype) == (len(expected), dtype)
            assert view.matvec(torch.ones(view.size, dtype=dtype)).dtype == dtype
            departure = (found - expected).norm() / hessian.norm()
            assert float(departure) < tolerance


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_a_view_of_a_view_is_the_smaller_block(name, engine):
    given, hessian = reference(name)
    names = list(trainable(given.module))
    fewer = names[-2:]
    with operator_of(given, engine) as whole:
        view = whole.restricted(names[1:])
        nested = as_matrix(view.restricted(fewer))
        direct = as_matrix(whole.restricted(fewer))
        assert view.size == whole.size - trainable(given.module)[names[0]].numel()
    torch.testing.assert_close(nested, direct, rtol=1e-12, atol=1e-14)
    if engine != "finite_difference":
        torch.testing.assert_close(
            nested, block_of(given.module, hessian, fewer), rtol=0, atol=1e-10
        )


def test_names_in_any_order_lie_as_in_the_whole():
    given, hessian = reference("mlp")
    with operator_of(given, "autograd") as whole:
        found = as_matrix(whole.restricted(["2.bias", "0.weight"]))
    expected = block_of(given.module, hessian, ["0.weight", "2.bias"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("engine", KEEPING)
def test_several_vectors_at_once_are_those_one_by_one(engine):
    given, _ = reference("convolution")
    with operator_of(given, engine) as whole:
        view = whole.restricted(["4.weight"])
        vectors = torch.randn(5, view.size, dtype=torch.float64)
        expected = torch.stack([view.matvec(vector) for vector in vectors])
        torch.testing.assert_close(view.matmat(vectors), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ["linearize", "autograd", "recompute"])
def test_a_view_leaves_the_whole_and_other_views_as_they_are(engine):
    given, _ = reference("mlp")
    with operator_of(given, engine) as whole:
        before = as_matrix(whole)
        first, second = whole.restricted(["0.weight"]), whole.restricted(["2.weight"])
        alone = as_matrix(first)
        as_matrix(second)
        assert torch.equal(as_matrix(first), alone)
        assert torch.equal(as_matrix(whole), before)


def test_products_of_views_count_as_those_of_the_whole():
    given, _ = reference("mlp")
    told: list[int] = []
    with operator_of(given, "autograd") as whole:
        whole.on_product = told.append
        view = whole.restricted(["2.weight"])
        view.matvec(torch.ones(view.size, dtype=torch.float64))
        view.matmat(torch.ones(3, view.size, dtype=torch.float64))
        whole.matvec(torch.ones(whole.size, dtype=torch.float64))
        assert whole.num_products == sum(told) == 5


# What a view costs ------------------------------------------------------------------------------


def deep() -> Problem:
    """Eight layers of one width: the last holds about an eighth of all numbers."""
    torch.manual_seed(0)
    layers = [part for _ in range(7) for part in (nn.Linear(24, 24), nn.Tanh())]
    module = nn.Sequential(*layers, nn.Linear(24, 3)).eval()
    whole = (torch.randn(64, 24), torch.randint(3, (64,)))
    return Problem(module, cross_entropy, ragged(*whole, sizes=(40, 24)), whole)


def cost(operator):
    vector = torch.ones(operator.size, dtype=operator.dtype)
    operator.matvec(vector)
    return counted(lambda: operator.matvec(vector))[1]


@pytest.mark.parametrize("engine", KEEPING)
def test_a_view_of_a_late_layer_costs_what_the_layer_costs(engine):
    """The products of one layer, forth and back, instead of those of eight: counted, not timed."""
    with operator_of(deep(), engine) as whole:
        of_all = cost(whole)
        late, early = (
            cost(whole.restricted(["14.weight", "14.bias"])),
            cost(whole.restricted(["0.weight", "0.bias"])),
        )
    assert late.flops < of_all.flops / 8
    assert late.operations < of_all.operations / 4
    assert late.bytes < of_all.bytes / 4
    assert late.flops < early.flops < of_all.flops
