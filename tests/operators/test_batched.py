"""Products with several vectors: those with each, whether looped over or batched."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from support.operators import distance
from support.references import PROBLEMS, Problem, in_double, problem
from torch import Tensor

from lightning_hessian.operators import batched
from lightning_hessian.operators.batched import BatchedProducts
from lightning_hessian.operators.costs import Cost
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace

NETWORKS = ("mlp", "convolution", "multihead_attention")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


@functools.cache
def reference(name: str) -> tuple[Problem, Tensor]:
    given = problem(name)
    return given, given.hessian()


def objective_of(name: str, dtype=torch.float64) -> Objective:
    given, _ = reference(name)
    module, batches = given.module, given.batches
    if dtype == torch.float64:
        module, batches = in_double(module), in_double(batches)
    space = ParameterSpace.select(module)
    return Objective(module, given.loss_fn, batches, space, mode=given.mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", ["linearize", "autograd", "recompute", "finite_difference"])
@pytest.mark.parametrize(("name", "size"), [(name, 4) for name in NETWORKS] + [("mlp", None)])
def test_products_with_several_vectors_are_those_with_each(name, size, engine, dtype):
    if (name, engine, dtype) == ("convolution", "finite_difference", torch.float32):
        pytest.skip("stumbles over the kinks of the pooling layer, and is refused")
    objective, (_, dense) = objective_of(name, dtype), reference(name)
    with objective.isolated():
        operator = HessianOperator(objective, engine)
        operator._batched = BatchedProducts(objective.space, operator._product_bytes, size=size)
        vectors = torch.randn(30, operator.size, generator=torch.Generator().manual_seed(1))
        vectors = vectors.to(dtype)
        expected = torch.stack([operator.matvec(vector) for vector in vectors])
        found = operator.matmat(vectors)
    if size is None:  # as by default on the CPU: to the bit
        assert torch.equal(found, expected)
    assert operator.num_products == 60
    assert not found.requires_grad
    assert distance(found, expected) < TOLERANCE[dtype]
    if engine != "finite_difference":  # which stumbles over the kinks of a pooling layer
        exact = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
        assert distance(found, vectors.double() @ dense) < exact


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_retained_graph_can_be_applied_in_one_batch(name):
    """Every kind of network, every chunk by vmap: no fall-back."""
    objective, (_, dense) = objective_of(name), reference(name)
    with objective.isolated():
        operator = HessianOperator(objective, "autograd")
        operator._batched = BatchedProducts(objective.space, operator._product_bytes, size=16)
        vectors = torch.randn(60, operator.size, dtype=torch.float64)
        found = operator.matmat(vectors)
    assert operator._batched.size == 16
    assert distance(found, vectors @ dense) < 1e-10


def undecided(objective: Objective, operator: HessianOperator) -> BatchedProducts:
    """Returns what chooses a size, as on a device where the loop is not the rule."""
    products = BatchedProducts(objective.space, operator._product_bytes)
    products.size = None
    return products


def test_a_chunk_is_as_large_as_the_memory_allows(monkeypatch):
    objective = objective_of("mlp")
    with objective.isolated():
        operator = HessianOperator(objective, "autograd")
        vectors = torch.randn(60, operator.size, dtype=torch.float64)
        sizes = []
        for room in (1e9, 5, 0):
            monkeypatch.setattr(
                batched, "free_bytes", lambda _, room=room: 4 * room * operator._product_bytes()
            )
            products = undecided(objective, operator)
            products(operator.products[0], vectors)
            sizes.append(products.size)
    assert sizes == [16, 5, 1]


def test_products_that_fill_a_device_are_not_batched():
    """By what they cost, which is counted: the same on every call."""
    small, large = (Cost(100, flops, 10**5) for flops in (10**6, 10**10))
    assert (small.vectors_at_once, large.vectors_at_once) == (16, 1)
    assert Cost(0, 0, 0).vectors_at_once == 16


def space_of(size: int) -> ParameterSpace:
    return ParameterSpace.select(torch.nn.Linear(size, 1, bias=False).double())


def test_what_cannot_be_batched_is_looped_over():
    def squares(tangents):
        if float(tangents[0].sum()) == 1e9:  # looks at a value, which vmap forbids
            raise AssertionError
        return [tangents[0] ** 2]

    products = BatchedProducts(space_of(5), lambda: 1, size=16)
    vectors = torch.randn(40, 5, dtype=torch.float64)
    assert torch.equal(products(squares, vectors), vectors**2)
    assert products.size == 1


def test_a_batched_product_that_differs_is_noticed():
    def wrong(tangents):
        batching = torch._C._functorch.is_batchedtensor(tangents[0])
        return [tangents[0] * (3.0 if batching else 2.0)]

    products = BatchedProducts(space_of(5), lambda: 1, size=16)
    vectors = torch.randn(40, 5, dtype=torch.float64)
    assert torch.equal(products(wrong, vectors), 2 * vectors)
    assert products.size == 1


@pytest.mark.parametrize("counts", [[1] * 7, [3, 1, 9], [50], [2, 2, 2, 40, 1]])
def test_no_product_is_lost_or_swapped(counts):
    products = BatchedProducts(space_of(4), lambda: 1, size=16)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    for count, seed in zip(counts, itertools.count()):
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(count, 4, dtype=torch.float64, generator=generator)
        found = products(lambda t: [t[0] * weights], vectors)
        assert torch.equal(found, vectors * weights)
