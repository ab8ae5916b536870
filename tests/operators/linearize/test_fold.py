"""Folded graphs against the functions they were traced from, and what the rules did to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_hessian.operators.linearize.fold import batchable, fold
from lightning_hessian.operators.linearize.trace import trace


def folded(function: Callable[..., Sequence[Tensor]], *shapes: tuple[int, ...]):
    """Returns the folded function, with the names of its operations."""
    inputs = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    product = fold(trace(function, inputs))
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


aten = torch.ops.aten
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
        found = torch.vmap(lambda vector: batchable(product)(vector))(vectors)
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


def convolved(bias: bool, stride: int):
    """A convolution of constant images and its gradient by the weights, and shapes of inputs."""
    images = torch.randn(6, 2, 9, 8, dtype=torch.float64)
    settings = {"stride": stride, "padding": (1, 2), "dilation": (1, 2)}
    weight_shape, out = (4, 2, 3, 3), nn.functional.conv2d(
        images, torch.zeros(4, 2, 3, 3, dtype=torch.float64), **settings
    ).shape  # fmt: skip

    def function(weight: Tensor, b: Tensor, gradient: Tensor) -> list[Tensor]:
        forward = nn.functional.conv2d(images, weight, b if bias else None, **settings)
        backward = aten.convolution_backward(
            gradient, images, weight, [4], [stride] * 2, [1, 2], [1, 2], False, [0, 0], 1,
            [False, True, False],
        )[1]  # fmt: skip
        return [forward, backward]

    return function, (weight_shape, (4,), tuple(out))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_constant_images(bias, stride):
    function, shapes = convolved(bias, stride)
    product, operations = folded(function, *shapes)
    assert operations == ["convolution.default", "convolution_backward.default", "getitem"]
    assert len(list(product.buffers())) == 1  # the images
    assert_same(function, product, *shapes)


def pooled(stride: int):
    """Convolution, rectifier and pooling, as they stand in a linearised gradient; both ways."""
    torch.manual_seed(2)
    images = torch.randn(5, 2, 9, 8, dtype=torch.float64)
    before = nn.functional.conv2d(images, torch.randn(3, 2, 3, 3, dtype=torch.float64))
    values, at = nn.functional.max_pool2d(before.relu(), 2, stride, return_indices=True)

    def function(weight: Tensor, bias: Tensor, gradient: Tensor) -> list[Tensor]:
        masked = aten.threshold_backward(nn.functional.conv2d(images, weight, bias), before, 0)
        chosen = masked.view(5, 3, -1).gather(-1, at.view(5, 3, -1)).view(values.shape)
        back = aten.max_pool2d_with_indices_backward(
            gradient * 2, before, [2, 2], [stride] * 2, [0, 0], [1, 1], False, at
        )
        back = aten.threshold_backward(back, before, 0)
        by_weight = aten.convolution_backward(
            back, images, weight, [3], [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
            [False, True, False],
        )[1]  # fmt: skip
        return [chosen, by_weight, back.sum([0, 2, 3])]

    return function, ((3, 2, 3, 3), (3,), tuple(values.shape))


@pytest.mark.parametrize("stride", [1, 2])
def test_pooling_by_maxima(stride):
    function, shapes = pooled(stride)
    product, _ = folded(function, *shapes)
    assert_same(function, product, *shapes)  # what is kept from one call does no harm in the next
    several = [torch.randn(4, *shape, dtype=torch.float64) for shape in shapes]
    for found, expected in zip(
        torch.vmap(batchable(product))(*several), torch.vmap(function)(*several), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "split",
    [
        lambda y: y.unsafe_chunk(2, 1),
        lambda y: y.unsafe_split(3, 1),
        lambda y: y.unsafe_split_with_sizes([3, 2], 1),
        lambda y: y.split(3, 1),
        lambda y: y.unbind(1),
    ],
)
def test_what_is_written_into_a_part_of_a_constant_is_made_anew(split):
    """As the cells of recurrent networks write their activations into the parts of a product."""

    def function(x: Tensor) -> list[Tensor]:
        parts = split(A @ B)
        parts[0].sigmoid_()
        parts[1].tanh_().mul_(2)
        return [parts[0].sum() * x + parts[1].sum()]

    product, _ = folded(function, (5, 5))
    assert_same(function, product, (5, 5))


def test_a_constant_that_is_written_to_is_read_as_it_was_at_that_moment():
    kept = C.clone()

    def function(x: Tensor) -> list[Tensor]:
        attention = A @ B
        before = x * attention
        attention.add_(kept)  # as masks are added to the scores of attention
        between = x * attention[1:].sum()
        attention[0].mul_(2)
        attention.t()[1].copy_(kept[0])
        after = x @ attention.softmax(1)
        return [before, between, after, attention + x, attention]

    product, operations = folded(function, (5, 5))
    assert not {"add_.Tensor", "copy_.default", "_softmax.default"} & set(operations)
    assert_same(function, product, (5, 5))
    assert torch.equal(kept, C)


def test_constants_from_outside_and_inputs_are_not_written_to():
    outside = A.clone()

    def function(x: Tensor) -> list[Tensor]:
        y = x * 1
        outside_copy = outside.view(25)
        outside_copy = outside_copy.clone()
        outside_copy[:5].add_(1)
        y[0].copy_(outside_copy[:5])
        z = torch.zeros(5, 5, dtype=x.dtype)
        z[1].copy_(y[1])  # what depends on the input makes all that lies there depend on it
        return [y, z + outside, z.t() @ outside]

    product, _ = folded(function, (5, 5))
    assert_same(function, product, (5, 5))
    assert torch.equal(outside, A)


def test_what_is_drawn_is_drawn_anew():
    product, operations = folded(lambda x: [x * torch.rand(5, 5, dtype=x.dtype)], (5, 5))
    assert "rand.default" in operations
    x = torch.ones(5, 5, dtype=torch.float64)
    assert not torch.equal(product(x)[0], product(x)[0])
