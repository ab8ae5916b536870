"""Cross-entropy in chunks of tokens against ``F.cross_entropy(F.linear(...))`` in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.references import dense_hessian
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, vmap
from torch.nn import functional as F

from lightning_hessian import block_structure, hessian_spectrum
from lightning_hessian.losses import linear_cross_entropy
from lightning_hessian.operators.costs import counted
from lightning_hessian.operators.engines import linearize
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import ArgumentError

WIDTH, ENTRIES, TOKENS = 4, 7, 10
IGNORED = [1, 4, 9]
EXACT = ("linearize", "autograd", "recompute")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Predictor(nn.Module):
    """A hidden layer and a last layer over a small vocabulary."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(3, WIDTH)
        self.head = nn.Linear(WIDTH, ENTRIES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


def plain_loss(module, batch, **options):
    inputs, targets = batch
    logits = F.linear(module(inputs), module.head.weight, module.head.bias)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)


def chunked_loss(module, batch, **options):
    inputs, targets = batch
    head = module.head
    return linear_cross_entropy(
        module(inputs), head.weight, targets, head.bias, chunk_size=4, **options
    )


def ragged_batch(dtype=torch.float64):
    """Two sequences of five tokens, some of which do not count."""
    targets = torch.randint(ENTRIES, (TOKENS,))
    targets[IGNORED] = -100
    return torch.randn(2, 5, 3, dtype=dtype), targets.view(2, 5)


def flat_losses(**options):
    """Returns the plain and the chunked loss of one vector: hidden states, weight and bias."""
    sizes = TOKENS * WIDTH, ENTRIES * WIDTH, ENTRIES
    targets = ragged_batch()[1].flatten()

    def parts(x):
        hidden, weight, bias = x.split(sizes)
        return hidden.view(TOKENS, WIDTH), weight.view(ENTRIES, WIDTH), bias

    def plain(x):
        return F.cross_entropy(F.linear(*parts(x)), targets, **options)

    def chunked(x):
        hidden, weight, bias = parts(x)
        return linear_cross_entropy(hidden, weight, targets, bias, chunk_size=4, **options)

    return plain, chunked, torch.randn(sum(sizes), dtype=torch.float64)


# As a function ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}])
def test_loss_gradient_and_hessian_are_those_of_the_plain_loss(options):
    plain, chunked, x = flat_losses(**options)
    torch.testing.assert_close(chunked(x), plain(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad(chunked)(x), grad(plain)(x), rtol=1e-12, atol=1e-14)
    expected = jacfwd(grad(plain))(x)
    ways = {
        "forward over reverse": jacfwd(grad(chunked))(x),
        "reverse over reverse": jacrev(grad(chunked))(x),
        "reverse over forward": jacrev(jacfwd(chunked))(x),
        "autograd": torch.autograd.functional.hessian(chunked, x),
        "autograd, batched": torch.autograd.functional.hessian(chunked, x, vectorize=True),
    }
    for way, found in ways.items():
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13, msg=way)


def test_forward_over_forward_is_refused():
    """Without a word torch would leave out a part of it; see `linear.nesting`."""
    _, chunked, x = flat_losses()
    with pytest.raises(NotImplementedError, match="jacfwd"):
        jacfwd(jacfwd(chunked))(x)


def test_several_points_and_several_sets_of_targets_at_once():
    plain, chunked, x = flat_losses()
    points = torch.randn(3, len(x), dtype=torch.float64)
    torch.testing.assert_close(vmap(grad(chunked))(points), vmap(grad(plain))(points))
    curved = vmap(jacfwd(grad(chunked)))(points)
    torch.testing.assert_close(curved, vmap(jacfwd(grad(plain)))(points))
    hidden = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    weight = torch.randn(ENTRIES, WIDTH, dtype=torch.float64)
    targets = torch.randint(ENTRIES, (3, TOKENS))
    found = vmap(lambda h, t: linear_cross_entropy(h, weight, t))(hidden, targets)
    torch.testing.assert_close(
        found, vmap(lambda h, t: F.cross_entropy(h @ weight.T, t))(hidden, targets)
    )


def test_targets_of_another_index_may_be_left_out():
    hidden, weight = torch.randn(6, WIDTH), torch.randn(ENTRIES, WIDTH)
    targets = torch.tensor([0, 3, 0, 5, 6, 1])
    found = linear_cross_entropy(hidden, weight, targets, ignore_index=0)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, targets, ignore_index=0))


def test_where_no_token_counts_the_mean_is_nan_and_the_sum_is_flat():
    hidden = torch.randn(6, WIDTH, requires_grad=True)
    weight, targets = torch.randn(ENTRIES, WIDTH), torch.full((6,), -100)
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    assert F.cross_entropy(hidden @ weight.T, targets).isnan()
    total = linear_cross_entropy(hidden, weight, targets, reduction="sum")
    assert total == 0
    assert not torch.autograd.grad(total, hidden)[0].any()


def test_tokens_far_out_neither_overflow_nor_lose_their_gradient():
    hidden, weight = torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [-1.0]])
    targets = torch.tensor([0, 0])
    losses = [
        linear_cross_entropy(hidden, weight, targets),
        F.cross_entropy(hidden @ weight.T, targets),
    ]
    assert losses[0] == losses[1] == 1e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_the_plain_loss_on_upcast_logits(dtype):
    exact = torch.randn(32, 16), torch.randn(50, 16) / 4
    targets = torch.randint(50, (32,))
    hidden, weight = (value.to(dtype).requires_grad_() for value in exact)
    found = linear_cross_entropy(hidden, weight, targets, chunk_size=8)
    plain = F.cross_entropy((hidden @ weight.T).float(), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(found, weight)[0]
    theirs = torch.autograd.grad(plain, weight)[0]
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=2e-3)


def test_autocast_casts_what_it_casts_for_a_linear_layer():
    hidden, weight = torch.randn(8, WIDTH), torch.randn(ENTRIES, WIDTH)
    targets = torch.randint(ENTRIES, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets)
        plain = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, linear_cross_entropy(hidden, weight, targets))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"hidden": torch.zeros(6, 3)}, "hidden"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, "targets"),
        ({"targets": torch.zeros(6)}, "targets"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"reduction": "none"}, "reduction"),
    ],
)
def test_misuse_is_told_by_name(change, name):
    given = {
        "hidden": torch.zeros(6, WIDTH),
        "weight": torch.zeros(ENTRIES, WIDTH),
        "targets": torch.zeros(6, dtype=torch.long),
    }
    with pytest.raises(ArgumentError, match=f"^{name}="):
        linear_cross_entropy(**{**given, **change})


# As the loss of a measurement -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "bias"),
    [
        *((engine, bias) for engine in EXACT for bias in (True, False)),
        ("compile", True),
        ("finite_difference", True),
    ],
)
def test_every_engine_finds_the_dense_hessian(engine, bias):
    module, batch = Predictor(bias=bias).double(), ragged_batch()
    expected = dense_hessian(module, plain_loss, batch)
    objective = Objective(module, chunked_loss, [batch], ParameterSpace.select(module, None))
    with objective.isolated():
        operator = HessianOperator(objective, engine)
        found = operator.matmat(torch.eye(len(expected), dtype=torch.float64))
    error = float((found - expected).norm() / expected.norm())
    assert error < (1e-10 if engine != "finite_difference" else 1e-3)


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("parameters", ["head.*", "body.*"])
def test_some_of_the_parameters_alone(engine, parameters):
    module, batch = Predictor().double(), ragged_batch()
    names = [n for n, _ in module.named_parameters() if n.startswith(parameters[:4])]
    expected = dense_hessian(module, plain_loss, batch, names)
    for selection, view in ((parameters, None), (None, names)):
        objective = Objective(
            module, chunked_loss, [batch], ParameterSpace.select(module, selection)
        )
        with objective.isolated():
            operator = HessianOperator(objective, engine)
            operator = operator if view is None else operator.restricted(view)
            found = operator.matmat(torch.eye(len(expected), dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_a_block_of_a_linearisation_computes_no_more_than_it_needs():
    """The last layer alone: logits, their change and one product, of seven."""
    module, batch = Predictor(bias=False).double(), ragged_batch()
    objective = Objective(module, chunked_loss, [batch], ParameterSpace.select(module, None))
    with objective.isolated():
        whole = linearize(objective, 0)
        point = objective.point()
        tangents = tuple(torch.randn_like(value) for value in point)
        last = objective.space.places(["head.weight"])
        restricted = whole.restricted(last, point)
        chosen = tuple(tangents[i] for i in last)
        costs = [counted(lambda: whole(tangents))[1], counted(lambda: restricted(chosen))[1]]
    product = 2 * TOKENS * WIDTH * ENTRIES
    body = 2 * TOKENS * 3 * WIDTH
    assert costs[1].flops == 3 * product
    assert costs[0].flops >= 7 * product
    assert costs[0].flops <= 7 * product + 4 * body


def test_several_vectors_at_once_share_the_logits():
    """`torch.vmap` over a product asks the kernel once, with all directions."""
    module, batch = Predictor().double(), ragged_batch()
    objective = Objective(module, chunked_loss, [batch], ParameterSpace.select(module, None))
    with objective.isolated():
        product = linearize(objective, 0).batchable
        vectors = torch.randn(3, objective.space.size, dtype=torch.float64)
        split, flatten = objective.space.split, objective.space.flatten
        found, cost = counted(lambda: torch.vmap(lambda v: flatten(product(split(v))))(vectors))
        one_by_one = torch.stack([flatten(product(split(v))) for v in vectors])
        single = counted(lambda: flatten(product(split(vectors[0]))))[1]
    torch.testing.assert_close(found, one_by_one, rtol=1e-10, atol=1e-13)
    logits = 2 * TOKENS * WIDTH * ENTRIES
    assert cost.flops <= 3 * single.flops - 2 * logits


def test_a_graph_keeps_nothing_of_the_size_of_the_logits():
    module, (inputs, targets) = Predictor(), ragged_batch(torch.float32)
    largest = max(value.numel() for value in module.parameters())
    inputs, targets = inputs.repeat(20, 1, 1), targets.repeat(20, 1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t.detach(), lambda t: t
    ):
        loss = chunked_loss(module, (inputs, targets))
        torch.autograd.grad(loss, module.parameters(), create_graph=True)
    assert max(saved) <= max(largest, targets.numel() * WIDTH)


def test_spectra_and_blocks_come_out_alike():
    module, batch = Predictor(), ragged_batch(torch.float32)
    found, plain = (
        hessian_spectrum(module, loss, [batch], num_eigenvalues=5, tol=1e-5)
        for loss in (chunked_loss, plain_loss)
    )
    torch.testing.assert_close(
        torch.as_tensor(found.eigenvalues), torch.as_tensor(plain.eigenvalues), rtol=1e-4, atol=1e-6
    )
    ratios = [
        block_structure(module, loss, [batch], blocks="layer").frobenius
        for loss in (chunked_loss, plain_loss)
    ]
    torch.testing.assert_close(
        torch.as_tensor(ratios[0]), torch.as_tensor(ratios[1]), rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
@pytest.mark.parametrize("engine", EXACT)
def test_memory_at_a_large_vocabulary(engine):
    """1024 tokens and 50,000 entries: a quarter of the memory, 1.2 times the time."""
    script = Path(__file__).parents[2] / "benchmarks" / "language.py"
    found = []
    for form in ("plain", "chunked"):
        arguments = ["--one", "vocabulary", form, engine, "128", "3"]
        run = subprocess.run(
            [sys.executable, script, *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=script.parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        found.append(json.loads(run.stdout))
    plain, chunked = found
    assert chunked["mib"] <= plain["mib"] / 4
    assert chunked["seconds"] <= 1.2 * plain["seconds"]
