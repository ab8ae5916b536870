"""Activation checkpointing: a segment computed again sees what its forward pass saw."""

from __future__ import annotations

import copy
import functools
import random

import pytest
import torch
import torch.utils.checkpoint as checkpointing
from support.states import assert_same, module_state
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lightning_hessian import block_structure, gradient_structure, hessian_spectrum
from lightning_hessian.measure.options import LossOptions
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError

ENGINES = ("auto", "linearize", "autograd", "recompute", "finite_difference")


def plain(segment: nn.Module, x: Tensor) -> Tensor:
    return segment(x)


def kept(segment: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(segment, x, use_reentrant=False)


def of_a_function(segment: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda given: segment(given) + 0 * given.sum(), x, use_reentrant=False)


def nested(segment: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(
        lambda given: kept(segment, 2 * given), x / 2, use_reentrant=False, determinism_check="none"
    )


def in_parts(segment: nn.Module, x: Tensor) -> Tensor:
    return checkpoint_sequential(segment, 2, x, use_reentrant=False)


def without_early_stop(segment: nn.Module, x: Tensor) -> Tensor:
    with checkpointing.set_checkpoint_early_stop(False):
        return kept(segment, x)


def without_generators(segment: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(segment, x, use_reentrant=False, preserve_rng_state=False)


def selective(segment: nn.Module, x: Tensor) -> Tensor:
    chosen = [torch.ops.aten.addmm.default, torch.ops.aten.tanh.default]
    contexts = functools.partial(checkpointing.create_selective_checkpoint_contexts, chosen)
    return checkpoint(segment, x, use_reentrant=False, context_fn=contexts)


WAYS = {
    way.__name__: way
    for way in (
        kept, of_a_function, nested, in_parts, without_early_stop, without_generators, selective
    )
}  # fmt: skip


class Counting(nn.Module):
    """Scales by how often it has been called, as a schedule held in a module does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, {"sums": [torch.zeros(())]}
        self.register_buffer("moving", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.moving.mul_(1.1)
        self.seen["sums"][0].add_(1)
        return x * (1 + 0.1 * self.calls) * self.moving * (1 + 0.1 * self.seen["sums"][0])


class Drawing(nn.Module):
    """Draws from Python's generator, from torch's, and from one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        own = torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
        return F.dropout(x, 0.3, self.training) * (1 + 0.3 * random.random()) * (1 + 0.1 * own)


SEGMENTS = {
    "batch norm": lambda: [nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()],
    "dropout": lambda: [nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.3)],
    "own generators": lambda: [nn.Linear(5, 5), Drawing(), nn.Tanh()],
    "spectral norm": lambda: [
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)), nn.Tanh()
    ],
    "old spectral norm": lambda: [nn.utils.spectral_norm(nn.Linear(5, 5)), nn.Tanh()],
    "counters": lambda: [nn.Linear(5, 5), Counting(), nn.Tanh()],
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, parts: list[nn.Module], way=plain) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 5), nn.Linear(5, 3)
        self.segment = nn.Sequential(*parts)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.way(self.segment, torch.tanh(self.before(x))))


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def pair(segment: str, way, dtype=torch.float64) -> tuple[Net, Net, list]:
    """Returns the same network without and with checkpointing, in training, and a batch."""
    torch.manual_seed(0)
    module = Net(SEGMENTS[segment]()).to(dtype).train()
    other = copy.deepcopy(module)
    other.way = way
    return module, other, [(torch.randn(20, 4, dtype=dtype) + 1, torch.randint(3, (20,)))]


def matrix(module: nn.Module, batches: list, engine: str) -> Tensor:
    objective = Objective(
        module, cross_entropy, batches, ParameterSpace.select(module), mode="train", seed=1
    )
    with objective.isolated():
        operator = HessianOperator(objective, engine)
        rows = [operator.matvec(e) for e in torch.eye(operator.size, dtype=operator.dtype)[::3]]
    return torch.stack(rows)


@functools.cache
def reference(segment: str) -> Tensor:
    """Without checkpointing, from graphs that are retained; checked against differences below."""
    module, _, batches = pair(segment, plain)
    return matrix(module, batches, "autograd")


@pytest.mark.parametrize("segment", SEGMENTS)
def test_the_reference_is_the_derivative_of_gradients(segment):
    """Central differences of gradients that autograd computes on a copy of the module."""
    module, _, batches = pair(segment, plain)
    objective = Objective(
        module, cross_entropy, batches, ParameterSpace.select(module), mode="train", seed=1
    )
    point = torch.nn.utils.parameters_to_vector(module.parameters()).detach()

    def gradient(vector: Tensor) -> Tensor:
        with objective.isolated():
            leaves = [part.clone().requires_grad_() for part in objective.space.split(vector)]
            loss = objective.batch_loss(leaves, 0)
            return objective.space.flatten(torch.autograd.grad(loss, leaves))

    for row, e in zip(reference(segment)[:4], torch.eye(len(point)).double()[::3], strict=False):
        found = (gradient(point + 1e-5 * e) - gradient(point - 1e-5 * e)) / 2e-5
        assert torch.allclose(found, row, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Finite differences")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("segment", "way"),
    [("batch norm", way) for way in WAYS]
    + [("dropout", "without_generators"), ("spectral norm", "nested")]
    + [(segment, "kept") for segment in SEGMENTS if segment != "batch norm"]
    + [("counters", "nested"), ("own generators", "nested")],
)
def test_every_engine_measures_what_it_measures_without_checkpointing(segment, way, engine):
    if engine == "linearize" and segment not in ("batch norm", "counters"):
        pytest.skip("not linearised without checkpointing either: it draws, or lacks a derivative")
    if engine == "finite_difference" and "spectral" in segment:
        pytest.skip("autograd holds the vectors of a spectral norm fixed, and differences do not")
    _, module, batches = pair(segment, WAYS[way])
    before = module_state(module)
    found = matrix(module, batches, engine)
    assert_same(before, module_state(module))
    expected = reference(segment)
    tolerance = 1e-6 if engine == "finite_difference" else 1e-10
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.filterwarnings("ignore:.*eigenvalues converged")
@pytest.mark.parametrize("segment", ["batch norm", "old spectral norm", "counters"])
def test_every_function_measures_the_same_and_leaves_all_as_it_was(segment):
    found = []
    for module in pair(segment, kept)[:2]:
        batches = pair(segment, kept)[2]
        before = module_state(module)
        spectrum = hessian_spectrum(
            module,
            cross_entropy,
            batches,
            num_eigenvalues=2,
            loss_options=LossOptions(mode="train"),
        )
        blocks = block_structure(
            module, cross_entropy, batches, loss_options=LossOptions(mode="train")
        )
        gradients = gradient_structure(
            module, cross_entropy, batches, batch_size=5, num_gradients=24, mode="train"
        )
        assert_same(before, module_state(module))
        found.append(
            [*spectrum.eigenvalues, spectrum.trace, *blocks.frobenius.flatten(),
             *gradients.covariance[:5]]
        )  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_single_precision_under_checkpointing(engine, dtype):
    found = []
    for module in pair("batch norm", kept, torch.float32)[:2]:
        module = module.to(dtype).eval()
        batches = [(torch.ones(6, 4).cumsum(0).to(dtype), torch.arange(6) % 3)]
        objective = Objective(module, cross_entropy, batches, ParameterSpace.select(module))
        with objective.isolated():
            operator = HessianOperator(objective, engine)
            assert operator.dtype == torch.float32
            found.append(operator.matvec(torch.ones(operator.size)))
    tolerance = 5e-3 if engine == "finite_difference" else 1e-5
    assert torch.allclose(*found, rtol=tolerance, atol=tolerance * float(found[0].abs().max()))


# Reentrant checkpointing has no gradient by chosen tensors ----------------------------------------


def reentrant(segment: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(segment, x, use_reentrant=True)


class _Foreign(torch.autograd.Function):
    """As fairscale and DeepSpeed write it."""

    @staticmethod
    def forward(ctx, run, x, _):
        ctx.run = run
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, gradient):
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "Checkpointing is not compatible with .grad(), please use .backward() if possible"
            )


def foreign(segment: nn.Module, x: Tensor) -> Tensor:
    return _Foreign.apply(segment, x, None)


def first_of_all(segment: nn.Module, x: Tensor) -> Tensor:
    """Of data, which carry no gradient: torch only warns that there will be none."""
    return segment(x) + reentrant(nn.Tanh(), torch.ones(5, dtype=x.dtype))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", [reentrant, foreign, first_of_all])
def test_reentrant_checkpointing_is_refused_with_the_remedy(way, engine):
    _, module, batches = pair("batch norm", way)
    before = module_state(module)
    with pytest.raises(MeasurementError, match="use_reentrant=False"):
        matrix(module, batches, engine)
    with pytest.raises(MeasurementError, match="use_reentrant=False"):
        gradient_structure(module, cross_entropy, batches, batch_size=1, num_gradients=20)
    assert_same(before, module_state(module))


def test_torchs_checkpointing_is_as_it_was_after_a_measurement():
    names = ("_checkpoint_without_reentrant_generator", "CheckpointFunction")
    before = [getattr(checkpointing, name) for name in names]
    _, module, batches = pair("batch norm", reentrant)
    with pytest.raises(MeasurementError):
        matrix(module, batches, "autograd")
    assert [getattr(checkpointing, name) for name in names] == before
