"""Whatever a forward or a backward pass writes to is as before: every batch, every function."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.states import assert_same, module_state
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian import block_structure, gradient_structure, hessian_spectrum, layer_spectra
from lightning_hessian.measure.budget import Budget
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError

pytestmark = pytest.mark.filterwarnings("ignore:.*eigenvalues converged")

MARK = 100.0
"""In the inputs of the batches on which the module writes."""


class Pair(NamedTuple):
    first: Tensor
    second: list[Tensor]


@dataclass
class Meter:
    total: Tensor = field(default_factory=lambda: torch.zeros(2))
    values: list = field(default_factory=list)

    def __call__(self, value: Tensor) -> None:
        self.total += value.sum()
        self.values.append(float(value.sum()))


class Slotted:
    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = torch.zeros(2)


def counter() -> Any:
    count = torch.zeros(1)
    calls = 0

    def counted() -> int:
        nonlocal calls
        calls += 1
        count.add_(1)
        return calls

    return counted


class Writing(nn.Module):
    """Two layers; on some batches it does one thing more, chosen by name."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3, max_norm=1.0)
        self.layer, self.tied = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.tied.weight = self.layer.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unregistered = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))]
        self.old_norm = nn.utils.spectral_norm(nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)
        self.register_buffer("buffer", torch.zeros(3))
        self.register_buffer("shared", self.buffer)
        self.plain = torch.zeros(3)
        self.nested = {"a": [torch.zeros(2), (torch.zeros(1), np.zeros(2))]}
        self.named = Pair(torch.zeros(1), [torch.zeros(1)])
        self.meter, self.slotted, self.counted = Meter(), Slotted(), counter()
        self.row = self.layer.weight.data[0]
        self.aliases = [self.layer.weight, self.head.bias]
        self.generator, self.numbers = torch.Generator().manual_seed(1), random.Random(2)
        self.array = np.random.default_rng(3)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        marked = x[:, 0] > MARK / 2
        x = x - MARK * marked[:, None]
        if bool(marked.any()):
            x = x + 0 * WRITES[self.write](self, x)
        h = torch.tanh(self.tied(self.layer(x))) + self.old_norm(self.frozen(x))
        return self.head(h)


def _with_max_norm(m: Writing, x: Tensor) -> Tensor:
    return m.embedding(torch.arange(len(x)) % 6)


def _under_no_grad(action):
    @functools.wraps(action)
    def write(m: Writing, x: Tensor) -> float:
        with torch.no_grad():
            action(m, x)
        return 0.0

    return write


def _toggle(m: Writing, x: Tensor) -> None:
    m.head.bias.requires_grad_(False)


def _in_backward(action):
    """Writes when the gradient comes by, on the module that the hook finds."""

    def write(m: Writing, x: Tensor) -> Tensor:
        h = m.layer(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: action(m, gradient.detach()))
        return 0 * h

    return write


def _backward_weights(m: Writing, gradient: Tensor) -> None:
    m.frozen.weight.data.add_(1.0)
    m.embedding.weight.data.mul_(1.5)


def _backward_attributes(m: Writing, gradient: Tensor) -> None:
    m.plain += 1
    m.plain = m.plain + 1
    m.nested["a"].append(gradient)
    m.nested["a"][0].add_(1)
    m.meter(torch.ones(2))
    m.buffer.add_(1)
    m.new = gradient


WRITES = {
    "embedding with max_norm": _with_max_norm,
    "weights clamped": _under_no_grad(lambda m, x: m.layer.weight.clamp_(-0.01, 0.01)),
    "weights through data": _under_no_grad(lambda m, x: m.layer.weight.data.mul_(1.1)),
    "data replaced": _under_no_grad(lambda m, x: setattr(m.head.bias, "data", m.head.bias + 1)),
    "teacher moved": _under_no_grad(lambda m, x: m.frozen.weight.mul_(0.9).add_(m.layer.weight)),
    "zero's sign": _under_no_grad(lambda m, x: m.frozen.bias.data.abs_()),
    "unregistered module": _under_no_grad(lambda m, x: m.unregistered[0].train()(x.repeat(2, 1))),
    "unregistered weights": _under_no_grad(lambda m, x: m.unregistered[0][0].weight.add_(1)),
    "shared buffer": _under_no_grad(lambda m, x: m.shared.add_(1)),
    "buffer replaced": _under_no_grad(lambda m, x: setattr(m, "buffer", m.buffer + 1)),
    "attribute": _under_no_grad(lambda m, x: m.plain.add_(1)),
    "nested attributes": _under_no_grad(
        lambda m, x: (m.nested["a"][0].add_(1), m.nested["a"][1][0].add_(1), m.nested.clear())
    ),
    "array in a tuple": _under_no_grad(lambda m, x: m.nested["a"][1][1].__iadd__(1)),
    "named tuple": _under_no_grad(lambda m, x: (m.named.first.add_(1), m.named.second.append(1))),
    "object": _under_no_grad(lambda m, x: m.meter(x)),
    "object with slots": _under_no_grad(lambda m, x: m.slotted.total.add_(1)),
    "closure": _under_no_grad(lambda m, x: m.counted()),
    "view of a parameter": _under_no_grad(lambda m, x: m.row.add_(1)),
    "parameters in a list": _under_no_grad(lambda m, x: m.aliases[0].add_(1)),
    "generators of its own": _under_no_grad(
        lambda m, x: (torch.rand(1, generator=m.generator), m.numbers.random(), m.array.random())
    ),
    "flag": _under_no_grad(_toggle),
    "backward: weights": _in_backward(_backward_weights),
    "backward: attributes": _in_backward(_backward_attributes),
}


def deep_state(module: Writing) -> dict:
    """Returns all that the module holds, with what its objects, generators and closures hold."""
    state = module_state(module)
    hidden = module.unregistered[0].state_dict()
    state |= {f"hidden {name}": tensor.tolist() for name, tensor in hidden.items()}
    state["meter"] = (module.meter.total.tolist(), list(module.meter.values))
    state["slots"] = module.slotted.total.tolist()
    state["closure"] = [
        c.cell_contents.tolist() if isinstance(c.cell_contents, Tensor) else c.cell_contents
        for c in module.counted.__closure__
    ]
    state["generators"] = (
        module.generator.get_state().tolist(), module.numbers.getstate(),
        module.array.bit_generator.state["state"],
    )  # fmt: skip
    state["row"] = module.row.data_ptr() == module.layer.weight.data_ptr()
    state["needs"] = [p.requires_grad for p in module.parameters()]
    state["bits"] = [p.detach().view(torch.int32).tolist() for p in module.parameters()]
    return state


def problem(write: str) -> tuple[Writing, list[tuple[Tensor, Tensor]]]:
    """Returns a module and batches, of which it writes on the second and fourth only."""
    torch.manual_seed(0)
    module = Writing(write).eval()
    with torch.no_grad():
        module.embedding.weight.mul_(5)
        module.frozen.bias[0] = -0.0
    batches = []
    for i in range(4):
        x, y = torch.randn(6, 3), torch.randint(2, (6,))
        batches.append((x + MARK * (i % 2), y))
    return module, batches


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


FUNCTIONS = {
    "spectrum": lambda m, b, hvp: hessian_spectrum(
        m, loss_fn, b, num_eigenvalues=2, trace_probes=2, hvp=hvp, budget=Budget(products=6)
    ),
    "blocks": lambda m, b, hvp: block_structure(m, loss_fn, b, exact=False, hvp=hvp),
    "layers": lambda m, b, hvp: layer_spectra(
        m,
        loss_fn,
        b,
        layers={"a": "layer.*"},
        num_eigenvalues=1,
        trace_probes=2,
        hvp=hvp,
        budget=Budget(products=6),
    ),
    "gradients": lambda m, b, hvp: gradient_structure(
        m, loss_fn, b, batch_size=6, num_gradients=20
    ),
    "gradients of samples": lambda m, b, hvp: gradient_structure(
        m, loss_fn, b, batch_size=1, num_gradients=24
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_function_leaves_all_as_it_was(write):
    module, batches = problem(write)
    for name, measure in FUNCTIONS.items():
        before = deep_state(module)
        measure(module, batches, "autograd")
        try:
            assert_same(before, deep_state(module))
        except AssertionError as error:
            raise AssertionError(f"{name} changed {write}") from error


@pytest.mark.parametrize("engine", ["linearize", "recompute", "finite_difference", "auto"])
@pytest.mark.parametrize(
    "write",
    ["embedding with max_norm", "weights through data", "teacher moved", "backward: weights"],
)
@pytest.mark.filterwarnings("ignore:Finite differences")
def test_every_engine_leaves_all_as_it_was(write, engine):
    module, batches = problem(write)
    before = deep_state(module)
    objective = Objective(module, loss_fn, batches, ParameterSpace.select(module))
    with objective.isolated():
        try:
            operator = HessianOperator(objective, engine)
            operator.matvec(torch.ones(operator.size))
        except MeasurementError:  # a number is read off a tensor; differences show the writing
            assert engine in ("linearize", "finite_difference")
    assert_same(before, deep_state(module))


@pytest.mark.parametrize("write", ["embedding with max_norm", "teacher moved", "weights clamped"])
def test_every_batch_is_evaluated_at_the_parameters_as_they_were(write):
    """The first batches too, after others have written; against copies of the module."""
    module, batches = problem(write)
    expected = [float(loss_fn(copy.deepcopy(module), batch)) for batch in batches]
    objective = Objective(module, loss_fn, batches, ParameterSpace.select(module))
    with objective.isolated():
        for _ in range(2):
            found = [float(objective.batch_loss(objective.point(), i)) for i in range(4)]
            assert found == pytest.approx(expected, rel=1e-6)


def test_a_retained_graph_keeps_its_digits_when_a_later_batch_writes():
    module, batches = problem("teacher moved")
    other = copy.deepcopy(module)
    other.write = "generators of its own"  # nothing that the loss depends on
    vector = torch.randn(sum(p.numel() for p in module.parameters() if p.requires_grad))
    found = []
    for measured, batch in ((module, batches), (other, batches[:1])):
        space = ParameterSpace.select(measured)
        objective = Objective(measured, loss_fn, batch, space)
        with objective.isolated():
            first = HessianOperator(objective, "autograd")
            for i in range(len(batch)):
                objective.batch_loss(objective.point(), i)
            product = first.products[0](space.split(vector))
            found.append(space.flatten(product))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-7)


def test_an_attribute_that_holds_a_parameter_is_differentiated():
    """A penalty over a list of weights is part of the loss; H of sum(w ** 3) is 6 w."""

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1, bias=False)
            self.decayed = {"weights": [self.layer.weight]}

        def forward(self, x: Tensor) -> Tensor:
            return sum(w.pow(3).sum() for w in self.decayed["weights"])

    module = Penalised().double()
    space = ParameterSpace.select(module)
    objective = Objective(module, lambda m, x: m(x), [torch.zeros(1, 3).double()], space)
    with objective.isolated():
        found = HessianOperator(objective, "autograd").matvec(torch.ones(3).double())
    assert torch.allclose(found, 6 * module.layer.weight.detach().flatten())


def test_gradients_that_a_backward_pass_accumulates_are_as_they_were():
    """A reversible layer runs a backward pass of its own inside that of the loss."""

    class Accumulating(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                torch.autograd.backward(ctx.layer(x.detach()).sum())
            return gradient, None

    class Reversible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(Accumulating.apply(torch.tanh(self.layer(x)), self.layer))

    module = Reversible()
    module.layer.weight.grad = torch.ones(3, 3)
    before = module_state(module)
    gradient_structure(
        module, lambda m, x: m(x).square().mean(), [torch.randn(40, 3)], batch_size=2,
        num_gradients=20, tests=False,
    )  # fmt: skip
    assert_same(before, module_state(module))
