"""Closed forms against autograd, limits against simulation, densities against their moments."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor, nn
from torch.func import grad, jacfwd
from torch.nn import functional as F

from lightning_hessian import block_structure
from lightning_hessian.statistics import theory

SAMPLES, INPUTS, HIDDEN, CLASSES = 12, 4, 3, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = normal(SAMPLES, INPUTS)
LABELS = torch.arange(SAMPLES) % CLASSES
TARGETS = normal(SAMPLES, CLASSES, seed=1)
V_LINEAR = normal(CLASSES, INPUTS, seed=2)
W, V = normal(HIDDEN, INPUTS, seed=3), normal(CLASSES, HIDDEN, seed=4)


def half_squared_error(outputs: Tensor) -> Tensor:
    return (outputs - TARGETS).square().sum(1).mean() / 2


def cross_entropy(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, LABELS)


def by_autograd(loss, *weights: Tensor, hidden: bool) -> np.ndarray:
    def flat_loss(flat: Tensor) -> Tensor:
        parts = [p.view_as(w) for p, w in zip(flat.split([w.numel() for w in weights]), weights,
                                              strict=True)]  # fmt: skip
        if hidden:
            return loss(torch.relu(X @ parts[0].T) @ parts[1].T)
        return loss(X @ parts[0].T)

    return jacfwd(grad(flat_loss))(torch.cat([w.flatten() for w in weights])).numpy()


# Closed forms -----------------------------------------------------------------------------------


def test_case_1_linear_squared_error():
    expected = by_autograd(half_squared_error, V_LINEAR, hidden=False)
    found = theory.linear_mse_hessian(X, CLASSES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_case_2_linear_cross_entropy():
    expected = by_autograd(cross_entropy, V_LINEAR, hidden=False)
    found = theory.linear_cross_entropy_hessian(X, V_LINEAR)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_case_3_hidden_squared_error():
    expected = by_autograd(half_squared_error, W, V, hidden=True)
    found = theory.hidden_mse_hessian(X, TARGETS, W, V)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_case_4_hidden_cross_entropy():
    expected = by_autograd(cross_entropy, W, V, hidden=True)
    found = theory.hidden_cross_entropy_hessian(X, LABELS, W, V)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_no_matrix_of_classes_for_each_sample():
    """At N = 5000, C = 500 (HBS) the C x C matrices of all samples would take 10 GB."""
    rng = np.random.default_rng(0)
    inputs, labels = rng.standard_normal((200, 3)), rng.integers(200, size=200)
    tracemalloc.start()
    theory.hidden_cross_entropy_hessian(
        inputs, labels, rng.standard_normal((2, 3)), rng.standard_normal((200, 2))
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 200 * 200 * 8 / 6


@pytest.mark.parametrize("case", [3, 4])
def test_block_structure_measures_the_closed_forms(case):
    """Blocks of a network against blocks of the formula: neither knows of the other."""
    net = nn.Sequential(
        nn.Linear(INPUTS, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, CLASSES, bias=False)
    ).double()
    with torch.no_grad():
        net[0].weight.copy_(W)
        net[2].weight.copy_(V)
    loss = half_squared_error if case == 3 else cross_entropy
    found = block_structure(net, lambda net, batch: loss(net(batch)), [X], blocks="neuron",
                            return_matrix=True)  # fmt: skip
    expected = (
        theory.hidden_mse_hessian(X, TARGETS, W, V)
        if case == 3
        else theory.hidden_cross_entropy_hessian(X, LABELS, W, V)
    )
    np.testing.assert_allclose(found.matrix, expected, rtol=0, atol=1e-12)
    assert found.sizes == (INPUTS,) * HIDDEN + (HIDDEN,) * CLASSES
    if case == 3:  # H_vv is strictly block-diagonal with the squared loss
        assert found.frobenius[HIDDEN, HIDDEN + 1] == 0


def test_extreme_logits_do_not_overflow():
    found = theory.linear_cross_entropy_hessian(1e3 * X.numpy(), V_LINEAR)
    assert np.isfinite(found).all()


# Theorem 1 --------------------------------------------------------------------------------------


def measured_class_ratio(classes: int, inputs: int, samples: int, seed: int = 0) -> float:
    """Ratio of mean squared norms, measured on up to eight rows of a linear model's weight."""
    torch.manual_seed(seed)
    net = nn.Linear(inputs, classes, bias=False)
    nn.init.normal_(net.weight, std=inputs**-0.5)
    batch = (torch.randn(samples, inputs), torch.randint(classes, (samples,)))
    blocks = {f"class {i}": f"weight[{i}:{i + 1}]" for i in range(min(classes, 8))}
    found = block_structure(
        net, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), [batch],
        blocks=blocks, exact=False, rel_error=0.03, hvp="autograd",
    )  # fmt: skip
    squared = np.square(found.frobenius)
    off = ~np.eye(len(squared), dtype=bool)
    return float(squared[off].mean() / np.diagonal(squared).mean())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_theorem_1_at_many_classes(gamma):
    """C = 1000, d = 1000: C^2 times the measured ratio is within 15 % of the limit."""
    ratio = measured_class_ratio(1000, 1000, int(1000 / gamma))
    assert 1000**2 * ratio == pytest.approx(theory.class_ratio_limit(gamma), rel=0.15)


def test_theorem_1_over_the_number_of_classes():
    """Slope -2 over C = 10, 100, 1000; at each C the ratio is that of the finite-C theory."""
    counts = np.array([10, 100, 1000])
    ratios = np.array(
        [np.mean([measured_class_ratio(c, 800, 800, seed) for seed in range(3)]) for c in counts]
    )
    slope = np.polyfit(np.log(counts), np.log(ratios), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)
    for count, ratio in zip(counts, ratios, strict=True):
        assert ratio == pytest.approx(theory.class_ratio(1.0, int(count)), rel=0.15)


def test_the_finite_ratio_tends_to_the_limit():
    for gamma in (0.5, 1.0, 2.0):
        limit = theory.class_ratio_limit(gamma)
        scaled = [c**2 * theory.class_ratio(gamma, c) for c in (10, 100, 1000, 4000)]
        assert scaled[:3] == sorted(scaled[:3])
        assert scaled[-1] == pytest.approx(limit, rel=0.03)


def test_the_finite_ratio_for_two_classes_is_one():
    assert theory.class_ratio(0.7, 2) == pytest.approx(1, abs=1e-12)


# Theorem 2 --------------------------------------------------------------------------------------


def expected_squares(classes: int, loss: str, seeds: range) -> dict[str, float]:
    """Ratios of expected squared norms of H_ww and H_vv, from 8 rows of W and 24 of V."""
    inputs = samples = 100
    sums = {"ww": np.zeros(2), "vv": np.zeros(2)}
    for seed in seeds:
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(inputs, 8, bias=False), nn.ReLU(), nn.Linear(8, classes, bias=False)
        )
        nn.init.normal_(net[0].weight, std=inputs**-0.5)
        nn.init.normal_(net[2].weight, std=8**-0.5)
        batch = (torch.randn(samples, inputs), torch.randint(classes, (samples,)))

        def loss_fn(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            if loss == "cross_entropy":
                return F.cross_entropy(net(batch[0]), batch[1])
            return net(batch[0]).square().sum(1).mean() / 2

        rows = {f"w{i}": f"0.weight[{i}:{i + 1}]" for i in range(8)}
        rows |= {f"v{i}": f"2.weight[{i}:{i + 1}]" for i in range(24)}
        found = block_structure(net, loss_fn, [batch], blocks=rows, exact=False, hvp="autograd")
        squared = np.square(found.frobenius)
        for family, part in (("ww", squared[:8, :8]), ("vv", squared[8:, 8:])):
            off = ~np.eye(len(part), dtype=bool)
            sums[family] += part[off].mean(), np.diagonal(part).mean()
    return {family: off / on for family, (off, on) in sums.items()}


def test_theorem_2_slopes():
    """From C = 100 on: at C = 10 the cross-entropy's H_ww is not near its asymptote yet."""
    counts, seeds = (100, 300, 1000), range(8)
    for loss, families in (("cross_entropy", ("ww", "vv")), ("squared_error", ("ww",))):
        ratios = [expected_squares(count, loss, seeds) for count in counts]
        for family in families:
            values = [ratio[family] for ratio in ratios]
            slope = np.polyfit(np.log(counts), np.log(values), 1)[0]
            expected = -2 if (family, loss) == ("vv", "cross_entropy") else -1  # HBS eq. 28
            assert slope == pytest.approx(expected, abs=0.15), (family, loss)
            if loss == "squared_error":
                for count, value in zip(counts, values, strict=True):
                    assert value == pytest.approx(theory.hidden_ratio_mse(1.0, count), rel=0.35)


# Limiting spectra -------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("variance", [1.0, 2.5])
def test_marchenko_pastur_moments(ratio, variance):
    """Mass min(1, 1 / ratio), mean and second moment of the law."""
    low, high = theory.marchenko_pastur_edges(ratio, variance)

    def moment(power: int) -> float:
        return integrate.quad(
            lambda x: x**power * float(theory.marchenko_pastur(x, ratio, variance)), low, high,
            limit=500,
        )[0]  # fmt: skip

    assert moment(0) == pytest.approx(min(1, 1 / ratio), rel=1e-3)
    assert moment(1) == pytest.approx(variance, rel=1e-4)
    assert moment(2) == pytest.approx(variance**2 * (1 + ratio), rel=1e-4)
    assert theory.marchenko_pastur([low - 0.1, high + 0.1], ratio, variance).tolist() == [0, 0]


def test_semicircle_moments():
    for variance in (1.0, 4.0):
        edge = 2 * math.sqrt(variance)
        for power, expected in ((0, 1.0), (2, variance), (4, 2 * variance**2)):
            found = integrate.quad(
                lambda x, k=power, v=variance: x**k * theory.semicircle(x, v), -edge, edge
            )[0]
            assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.class_ratio_limit(0), "gamma=0 .*positive"),
        (lambda: theory.class_ratio(1.0, 1), "num_classes=1"),
        (lambda: theory.marchenko_pastur(1.0, -1), "ratio=-1"),
        (lambda: theory.semicircle(1.0, 0), "variance=0"),
        (lambda: theory.linear_mse_hessian([1.0, 2.0], 2), r"inputs=.*shape is \(2,\)"),
    ],
)
def test_misuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
