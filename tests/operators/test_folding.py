"""Folded graphs against the functions they were traced from, and what the rules did to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_hessian.operators import folding
from lightning_hessian.operators.folding import fold


def folded(function: Callable[..., Sequence[Tensor]], *shapes: tuple[int, ...]):
    """Returns the folded function, with the names of its operations."""
    inputs = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    product = fold(make_fx(function)(*inputs), inputs)
    operations = [
        getattr(node.target, "__name__", str(node.target))
        for node in product.graph.nodes
        if node.op == "call_function"
    ]
    return product, operations


def assert_same(function: Callable[..., Sequence[Tensor]], product, *shapes) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):  # nothing may be left over from one call to the next
        inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        kept = [value.clone() for value in inputs]
        for found, expected in zip(product(*inputs), function(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(value, old) for value, old in zip(inputs, kept, strict=True))


A, B, C = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0)).double()


def test_what_follows_from_constants_is_computed_once():
    def function(x: Tensor) -> list[Tensor]:
        return [(A @ B).exp().sin() @ x]

    product, operations = folded(function, (5, 5))
    assert operations == ["mm.default"]
    assert_same(function, product, (5, 5))


def test_zeros_fall_away():
    def function(x: Tensor) -> list[Tensor]:
        return [torch.zeros_like(x) + (x - (A - A)) * 2.0 + 0 * B]

    product, operations = folded(function, (5, 5))
    assert operations == ["mul.Tensor"]
    assert_same(function, product, (5, 5))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: [A @ x + x @ B + (x @ C)], (5, 5)),
        (lambda x: [(x @ A).view(25) + x.view(25)], (5, 5)),
        (lambda x: [torch.bmm(x, x.new_ones(2, 3, 3)) + torch.bmm(x * 2, x.new_ones(2, 3, 3))],
         (2, 3, 3)),
    ],
)  # fmt: skip
def test_sums_of_products(function, shape):
    product, _ = folded(function, shape)
    assert_same(function, product, shape)


def test_products_are_added_up_where_they_lie():
    _, operations = folded(lambda x: [A @ x + x @ B + x * C], (5, 5))
    assert operations == ["mm.default", "addmm_.default", "addcmul_.default"]


def test_the_batchable_form_needs_no_loop():
    def function(x: Tensor) -> list[Tensor]:
        return [A @ x + x @ B + x * C, torch.bmm(x[None], B[None]) + torch.bmm(A[None], x[None])]

    product, operations = folded(function, (5, 5))
    assert {"addmm_.default", "baddbmm_.default", "addcmul_.default"} <= set(operations)
    vectors = torch.randn(3, 5, 5, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a batching rule that is missing
        found = torch.vmap(lambda vector: folding.batchable(product)(vector))(vectors)
    for i, vector in enumerate(vectors):
        for part, expected in zip(found, function(vector), strict=True):
            torch.testing.assert_close(part[i], expected, rtol=1e-12, atol=1e-12)
    assert_same(function, product, (5, 5))  # which is as it was


def test_what_is_read_twice_is_not_written_over():
    def function(x: Tensor) -> list[Tensor]:
        first = A @ x
        second = first + x @ B
        third = first * second
        flat = third.view(25)
        return [second, third - second, flat + first.view(25), (first - 1) * third]

    product, _ = folded(function, (5, 5))
    assert_same(function, product, (5, 5))


def test_inputs_and_constants_are_not_written_over():
    constant = A.clone()

    def function(x: Tensor) -> list[Tensor]:
        return [x.view(5, 5) + constant, constant * 2 + x, x * x, x.t() + B]

    product, _ = folded(function, (5, 5))
    assert_same(function, product, (5, 5))
    assert torch.equal(constant, A)


def test_what_traced_code_writes_over_keeps_its_order():
    def function(x: Tensor) -> list[Tensor]:
        y = A @ x
        before = y @ B
        z = y + torch.zeros_like(x)  # were this y itself, the next line would change y
        z.mul_(3)
        after = before + y @ C  # y is read before it is changed
        y.add_(1)
        halves = after.clone().split(3)
        halves[0].mul_(2)
        return [after, y, z, torch.cat(halves)]

    product, _ = folded(function, (5, 5))
    assert_same(function, product, (5, 5))


def test_a_constant_that_is_written_over_is_made_anew():
    def function(x: Tensor) -> list[Tensor]:
        weight = A.exp()
        weight.add_(x)
        return [weight @ x]

    product, _ = folded(function, (5, 5))
    assert_same(function, product, (5, 5))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_constant_images_use_patches(monkeypatch, bias, stride):
    images = torch.randn(6, 2, 9, 8, dtype=torch.float64)
    settings = {"stride": stride, "padding": (1, 2), "dilation": (1, 2)}
    weight_shape, out = (4, 2, 3, 3), nn.functional.conv2d(
        images, torch.zeros(4, 2, 3, 3, dtype=torch.float64), **settings
    ).shape  # fmt: skip

    def function(weight: Tensor, b: Tensor, gradient: Tensor) -> list[Tensor]:
        forward = nn.functional.conv2d(images, weight, b if bias else None, **settings)
        backward = torch.ops.aten.convolution_backward(
            gradient, images, weight, [4], [stride] * 2, [1, 2], [1, 2], False, [0, 0], 1,
            [False, True, False],
        )[1]  # fmt: skip
        return [forward, backward]

    shapes = (weight_shape, (4,), tuple(out))
    times = iter([1.0, 2.0, 3.0, 4.0])  # whatever the clock says, the patches are faster
    monkeypatch.setattr(folding, "_seconds", lambda work: (work(), next(times))[1])
    product, operations = folded(function, *shapes)
    assert operations == ["_convolved", "_weight_gradient"]
    assert len(list(product.buffers())) == 1  # both use the same
    assert_same(function, product, *shapes)


def test_slower_patches_are_not_used(monkeypatch):
    images = torch.randn(6, 2, 9, 8, dtype=torch.float64)
    times = iter([2.0, 1.0])
    monkeypatch.setattr(folding, "_seconds", lambda work: next(times))
    _, operations = folded(lambda w: [nn.functional.conv2d(images, w)], (4, 2, 3, 3))
    assert operations == ["convolution.default"]
