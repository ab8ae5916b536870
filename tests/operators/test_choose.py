"""A seed reproduces a result: engines are chosen by what is counted, whatever the clock says."""

from __future__ import annotations

import itertools
import random
import threading
import time

import numpy as np
import pytest
import torch
from support.references import problem
from torch import nn
from torch.nn import functional as F

from lightning_hessian import hessian_spectrum
from lightning_hessian.measure.budget import Budget
from lightning_hessian.operators.costs import Cost, counted
from lightning_hessian.operators.engines import autograd, linearize
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]).flatten(0, -2), batch[1].flatten())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x):
        return torch.relu(x + self.inner(x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 11)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.layers(self.words(x), mask=mask, is_causal=True))


NETWORKS = {
    "lenet": (lambda: nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 10)), (1, 12, 12)),
    "mlp": (lambda: nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 10)), (30,)),
    "group norm": (lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(144, 10)),
        (1, 8, 8)),
    "batch norm": (lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
        (1, 8, 8)),
    "decoder": (Decoder, None),
}  # fmt: skip


def network(name, count=64):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    module = make().eval()
    if shape is None:
        words = torch.randint(11, (2, count // 4, 9))
        return module, [(part[:, :-1], part[:, 1:]) for part in words]
    x, y = torch.randn(count, *shape), torch.randint(10, (count,))
    return module, list(zip(x.split(40), y.split(40), strict=True))


@pytest.fixture
def under_load():
    """A machine that is busy now and then, in two threads."""
    stop = threading.Event()
    matrix = torch.ones(200, 200)  # drawn at random it would move the seeds of the networks

    def work():
        rng = random.Random(0)
        while not stop.is_set():
            for _ in range(rng.randrange(20)):
                matrix @ matrix
            time.sleep(rng.random() / 100)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(name):
    module, batches = network(name)
    return hessian_spectrum(
        module,
        cross_entropy,
        batches,
        num_eigenvalues=3,
        trace_probes=6,
        seed=1,
        budget=Budget(products=40),
    )


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # some have not converged by then
def test_twelve_calls_with_one_seed_give_one_spectrum(name, under_load, one_thread):
    first, *others = [measured(name) for _ in range(12)]
    for other in others:
        assert other.engine == first.engine
        assert other.num_hvps == first.num_hvps
        assert np.array_equal(other.eigenvalues, first.eigenvalues)
        assert np.array_equal(other.residuals, first.residuals)
        assert other.trace == first.trace


@pytest.mark.parametrize("name", ["lenet", "decoder"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_clock_has_a_say(name, one_thread, monkeypatch):
    expected = measured(name)
    rng = random.Random(0)
    for clock in ("perf_counter", "monotonic", "process_time"):
        ticking = itertools.accumulate(iter(lambda: rng.expovariate(1), None))
        monkeypatch.setattr(time, clock, lambda ticking=ticking: next(ticking))
    found = measured(name)
    assert found.engine == expected.engine
    assert np.array_equal(found.eigenvalues, expected.eigenvalues)


def objective_of(name, count=64):
    module, batches = network(name, count)
    return Objective(module, cross_entropy, batches, ParameterSpace.select(module))


@pytest.mark.parametrize("name", NETWORKS)
def test_auto_takes_what_costs_less_in_all(name):
    """By the operations that were counted, with the making of what is made."""
    objective = objective_of(name)
    with objective.isolated():
        tangents = objective.space.split(torch.ones(objective.space.size))
        graph, line = (make(objective, 0) for make in (autograd, linearize))
        (_, retained), (_, linear) = (counted(lambda p=p: p(tangents)) for p in (graph, line))
        assert linear.seconds < retained.seconds
        repaid = retained.seconds_to_linearize / (retained.seconds - linear.seconds)
        for expected, engine in ((repaid / 10, "autograd"), (repaid * 10, "linearize")):
            operator = HessianOperator(objective, expected_products=int(expected))
            assert operator.engine.startswith(engine)  # with oneDNN where that is faster


@pytest.mark.parametrize("name", [*NETWORKS, "lstm"])
def test_kept_and_recomputed_graphs_give_the_same_digits(name):
    if name == "lstm":
        given = problem(name)
        space = ParameterSpace.select(given.module)
        objective = Objective(given.module, given.loss_fn, given.batches, space)
    else:
        objective = objective_of(name)
    vectors = torch.randn(3, objective.space.size, generator=torch.Generator().manual_seed(0))
    with objective.isolated():
        kept, mixed, anew = (
            HessianOperator(objective, memory_budget=budget, expected_products=1)
            for budget in (1e12, HessianOperator(objective)._product_bytes() * 1.5, 0)
        )
        assert [kept.engine, anew.engine] == ["autograd", "recompute"]
        assert mixed.engine == "autograd+recompute"
        for operator in (mixed, anew):
            assert torch.equal(operator.matmat(vectors), kept.matmat(vectors))
            assert torch.equal(operator.matvec(vectors[0]), kept.matvec(vectors[0]))


def test_costs_are_those_of_the_textbook():
    a, b = torch.randn(7, 5), torch.randn(5, 3)
    out = torch.zeros(7, 3)
    _, product = counted(lambda: a @ b)
    assert product == Cost(1, 2 * 7 * 5 * 3, 4 * (35 + 15 + 21))
    _, added = counted(lambda: out.addmm_(a, b))
    assert added.flops == 2 * 7 * 5 * 3
    _, pointwise = counted(lambda: a.t().exp())
    assert pointwise == Cost(1, 0, 4 * 2 * 35)
    images, kernel = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    _, convolved = counted(lambda: F.conv2d(images, kernel))
    assert convolved.flops == 2 * 2 * 6 * 6 * 4 * 3 * 9


def test_a_convolution_in_the_plain_layout_counts_for_more():
    """As it takes more time; in double precision oneDNN has no part in it."""
    images, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)

    def cost(*operands):
        return counted(lambda: F.conv2d(*operands, padding=1))[1]

    plain = cost(images, weight)
    last = cost(*(t.to(memory_format=torch.channels_last) for t in (images, weight)))
    double = cost(images.double(), weight.double())
    assert plain.flops == last.flops == double.flops == plain.plain_flops
    assert last.plain_flops == double.plain_flops == 0
    assert plain.seconds > last.seconds
