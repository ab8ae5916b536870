"""Traced graphs against the functions, and against torch's own tracer."""

from __future__ import annotations

import linecache

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_hessian.operators.linearize.fold import batchable, fold, fold_restricted
from lightning_hessian.operators.linearize.trace import trace

A = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()


def plain(x: Tensor) -> list[Tensor]:
    """Products, several results of one operation, numbers, and a constant."""
    first, second = (A @ x).split(2)
    values, at = first.max(dim=1)
    return [values * 2, second - A[2:], at, x.new_ones(3)]


def writing(x: Tensor) -> list[Tensor]:
    """Writes to memory through views, to what it made itself."""
    kept = torch.zeros(4, 4, dtype=x.dtype)
    kept[0].copy_(x[1])
    kept.t().add_(x).mul_(2)
    return [kept, kept[0] + 1]


def differentiating(x: Tensor) -> list[Tensor]:
    """A gradient inside."""
    return [torch.func.grad(lambda y: nn.functional.log_softmax(y @ A, dim=1).square().sum())(x)]


def composed(x: Tensor) -> list[Tensor]:
    """Modules and operations that consist of others."""
    layer = nn.functional.linear(x, A, A[0])
    return [nn.functional.layer_norm(layer, (4,)), torch.einsum("ij,kj->ik", x, layer)]


@pytest.mark.parametrize("function", [plain, writing, differentiating, composed])
def test_the_graph_does_what_the_function_does(function):
    generator = torch.Generator().manual_seed(1)
    given, other = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    kept = A.clone()
    traced, reference = trace(function, [given]).module(), make_fx(function)(given)
    for value in (given, other, other):  # nothing may be left over from one call to the next
        for found, expected in zip(traced(value), function(value), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(A, kept)
    names = [
        {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        for graph in (traced, reference)
    ]
    # A constant that is written to is copied first, and seen through views of the copy.
    assert names[0] <= names[1] | {"aten.clone.default", "aten.as_strided.default"}


def test_only_what_depends_on_the_inputs_is_in_the_graph():
    def function(x: Tensor) -> list[Tensor]:
        scores = (A @ A).softmax(1)
        scores.add_(1)
        read = scores * x
        scores.mul_(2)  # what has been read of it stays
        return [read + scores * x, torch.zeros_like(x) + x]

    graph = trace(function, [A])
    assert [str(node.target) for node in graph.operations] == [
        "aten.mul.Tensor", "aten.mul.Tensor", "aten.add.Tensor", "aten.add.Tensor",
    ]  # fmt: skip
    assert len(graph.constants) == 3
    for found, expected in zip(graph.module()(A), function(A), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_function_may_write_to_its_inputs_and_to_what_lies_beside_them():
    """The first write is noticed late: the function is traced again, with copies of its inputs."""
    kept = A.clone()

    def function(x: Tensor) -> list[Tensor]:
        y = x @ A
        x[0].add_(y[1])
        x.t()[1].mul_(2)
        return [x + y, x[0] * 1]

    module = trace(function, [torch.zeros_like(A)]).module()
    for value in (A, A + 1, A):
        given = value.clone()
        found = module(given)
        assert torch.equal(given, value)
        for one, expected in zip(found, function(given), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(A, kept)


def test_what_was_written_to_can_be_put_back_before_the_second_time():
    counter, resets = torch.zeros(4, 4, dtype=A.dtype), []

    def function(x: Tensor) -> list[Tensor]:
        counter.add_(1)
        y = counter @ x
        x.mul_(2)
        return [y + x]

    def put_back() -> None:
        resets.append(float(counter[0, 0]))
        counter.zero_()

    module = trace(function, [torch.zeros_like(A)], before_again=put_back).module()
    assert resets == [1.0]
    expected = torch.ones_like(A) @ A + 2 * A
    torch.testing.assert_close(module(A)[0], expected, rtol=1e-12, atol=1e-12)


def test_memory_that_comes_to_vary_is_seen_through_all_its_views():
    def function(x: Tensor) -> list[Tensor]:
        kept = torch.ones(5, 4, dtype=x.dtype)
        column, part = kept.t()[2], kept[1:]
        before = part * x
        kept[3].copy_(x[0])
        part[0].mul_(3)
        return [before, part + x, column[1:] * x[0], kept.t() @ kept]

    module = trace(function, [torch.zeros_like(A)]).module()
    for value in (A, A.t().contiguous(), A):
        for one, expected in zip(module(value), function(value), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


def test_what_is_written_to_from_outside_afterwards_was_copied():
    """Buffers that a forward pass writes to are put back once it has been traced."""
    buffer = A.clone()

    def function(x: Tensor) -> list[Tensor]:
        buffer.add_(1)
        return [buffer @ x]

    expected = (A + 1) @ A
    module = trace(function, [torch.zeros_like(A)]).module()
    buffer.copy_(A)
    torch.testing.assert_close(module(A)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_number_that_depends_on_a_tensor_is_refused():
    with pytest.raises(RuntimeError, match="turns a tensor into a number"):
        trace(lambda x: [x * float(x.sum())], [A])
    with pytest.raises(RuntimeError, match="turns a tensor into a number"):
        trace(lambda x: [x if torch.equal(x, A) else A], [A])


def test_a_draw_is_no_constant():
    with pytest.raises(RuntimeError, match="turns a tensor into a number"):
        trace(lambda x: [x * float(torch.rand(3).sum())], [A])


def test_a_constant_that_was_written_to_is_none_any_more():
    def writes(x: Tensor) -> list[Tensor]:
        kept = torch.zeros(4, 4, dtype=x.dtype)
        kept[0].copy_(x[1])
        return [x * float(kept[2].sum())]  # another view of the same memory

    with pytest.raises(RuntimeError, match="turns a tensor into a number"):
        trace(writes, [A])


def test_a_number_that_follows_from_constants_is_one():
    """As where a model asks whether a mask is full, or notes its loss."""
    mask = torch.ones(4, dtype=torch.bool)

    def function(x: Tensor) -> list[Tensor]:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(A, x)
            scale = float(dual.exp().sum().detach()) if bool(mask.all()) else 0.0
            return [forward_ad.unpack_dual(dual * scale).tangent]

    traced = trace(function, [torch.zeros_like(A)]).module()
    torch.testing.assert_close(traced(A)[0], A * A.exp().sum())


def test_tensors_from_outside_are_held_not_copied():
    (held,) = trace(lambda x: [A @ x], [A.clone()]).constants.values()
    assert held.data_ptr() == A.data_ptr()


def test_no_source_text_stays_behind():
    """torch.fx keeps the code of each graph for tracebacks, until the process ends."""

    def texts() -> tuple[int, int]:
        kept = torch.fx.graph_module._loader.eval_cache
        return len(kept), sum(name.startswith("<eval_with_key>") for name in linecache.cache)

    before = texts()
    folded = fold(trace(lambda x, y: [A @ x + y, A.t() @ y], [A, A]))
    batchable(folded)
    restricted = fold_restricted(folded, [0], [A, A])
    assert texts() == before
    torch.testing.assert_close(restricted(A)[0], A @ A)
    make_fx(plain)(A)(A)  # the reference does leave some: the count sees it
    assert texts() != before
