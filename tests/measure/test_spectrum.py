"""The front door: spectra of small networks on real data against dense float64 Hessians."""

from __future__ import annotations

import copy
import functools
import time
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from support.references import (
    cross_entropy,
    dense_hessian,
    ragged,
)
from torch import Tensor, nn

from lightning_hessian import HessianSpectrum, MeasurementError, hessian_spectrum
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.options import LossOptions


@dataclass(frozen=True)
class Digits:
    """A network trained on digits, its data, and its dense Hessian with eigenvalues descending."""

    module: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    hessian: Tensor
    eigenvalues: np.ndarray


@functools.cache
def digits_data() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32)[:300], torch.tensor(data.target)[:300]


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Two layers, 1,960 parameters, 300 samples in batches of 128, 128 and 44."""
    x, y = digits_data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 26), nn.Tanh(), nn.Linear(26, 10))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(module, (x, y)).backward()
        optimizer.step()
    module.zero_grad()
    hessian = dense_hessian(module, cross_entropy, (x, y))
    eigenvalues = scipy.linalg.eigvalsh(hessian.numpy())[::-1]
    return Digits(module, ragged(x, y, sizes=(128, 128, 44)), hessian, eigenvalues)


@pytest.fixture(scope="module")
def spectrum(digits) -> HessianSpectrum:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return hessian_spectrum(
            digits.module, cross_entropy, digits.batches, return_eigenvectors=True
        )


def residuals_of(hessian: Tensor, spectrum: HessianSpectrum) -> np.ndarray:
    vectors, values = spectrum.eigenvectors.double(), torch.from_numpy(spectrum.eigenvalues.copy())
    return (vectors @ hessian - values[:, None] * vectors).norm(dim=1).numpy()


# Real data --------------------------------------------------------------------------------------


def test_the_top_50_are_those_of_the_dense_hessian(digits, spectrum):
    exact = digits.eigenvalues[:50]
    assert spectrum.num_converged == 50
    assert spectrum.eigenvalues.dtype == np.float64
    assert (np.abs(spectrum.eigenvalues - exact) / exact).max() < 1e-4
    rounding = 1e-6 * exact[0]  # of the products, beside a reference in float64
    assert (np.abs(spectrum.eigenvalues - exact) <= spectrum.residuals + rounding).all()


def test_residuals_are_honest(digits, spectrum):
    residuals, rounding = residuals_of(digits.hessian, spectrum), 1e-6 * digits.eigenvalues[0]
    assert (residuals <= 1.05 * spectrum.residuals + rounding).all()
    assert (spectrum.residuals <= 1e-3 * spectrum.eigenvalues).all()
    # ... and no empty promise: within ten times what is true.
    assert (spectrum.residuals <= 10 * residuals + 10 * rounding).all()


def test_eigenvectors_are_orthonormal_and_flat_in_the_order_of_the_parameters(digits, spectrum):
    vectors = spectrum.eigenvectors
    assert vectors.shape == (50, 1960)
    assert float((vectors @ vectors.T - torch.eye(50)).abs().max()) < 1e-5
    exact = scipy.linalg.eigh(digits.hessian.numpy(), subset_by_index=(1959, 1959))[1][:, 0]
    assert abs(float(vectors[0].double() @ torch.from_numpy(exact))) == pytest.approx(1, abs=1e-5)


def test_the_trace_is_within_its_standard_error(digits, spectrum):
    exact = float(digits.hessian.trace())
    assert 0 < spectrum.trace_std_error < 0.1 * exact
    assert abs(spectrum.trace - exact) < 4 * spectrum.trace_std_error


def test_the_lowest_eigenvalue_is_found(digits, spectrum):
    assert spectrum.lambda_min == pytest.approx(digits.eigenvalues[-1], rel=1e-3)
    assert spectrum.lambda_min < 0


def test_the_record_says_how_it_was_measured(digits, spectrum):
    assert spectrum.num_parameters == 1960
    assert spectrum.num_samples == 300
    assert spectrum.loss == pytest.approx(
        cross_entropy(digits.module, digits_data()).item(), rel=1e-5
    )
    assert 66 < spectrum.num_hvps < 500
    assert spectrum.seconds > 0
    assert spectrum.engine in ("linearize", "linearize_onednn", "autograd")
    assert spectrum.dtype == "float32"
    assert spectrum.leading.tolist() == spectrum.eigenvalues.tolist()


def test_no_eigenvectors_unless_asked_for(digits):
    found = hessian_spectrum(digits.module, cross_entropy, digits.batches, num_eigenvalues=2)
    assert found.eigenvectors is None


@pytest.mark.parametrize("hvp", ["linearize", "autograd", "recompute"])
def test_engines_find_the_same(digits, hvp):
    found = hessian_spectrum(
        digits.module, cross_entropy, digits.batches, num_eigenvalues=5, trace_probes=2, hvp=hvp
    )
    assert found.engine == hvp
    np.testing.assert_allclose(found.eigenvalues, digits.eigenvalues[:5], rtol=1e-5)


@pytest.mark.parametrize("parameters", ["0.weight", "re:^2", lambda name, p: p.ndim == 1])
def test_a_selection_has_the_spectrum_of_its_block(digits, parameters):
    rows = {
        "0.weight": slice(0, 1664),
        "re:^2": slice(1690, 1960),
    }.get(parameters, np.r_[1664:1690, 1950:1960])
    block = digits.hessian.numpy()[rows][:, rows]
    exact = scipy.linalg.eigvalsh(block)[::-1][:8]
    found = hessian_spectrum(
        digits.module, cross_entropy, digits.batches, num_eigenvalues=8, parameters=parameters
    )
    assert found.num_parameters == len(block)
    np.testing.assert_allclose(found.eigenvalues, exact, rtol=1e-4)
    trace = float(np.trace(block))
    assert abs(found.trace - trace) < 4 * found.trace_std_error + 1e-5 * trace


def test_all_eigenvalues_and_so_the_trace_exactly(digits):
    found = hessian_spectrum(
        digits.module, cross_entropy, digits.batches, num_eigenvalues=26, parameters="0.bias",
        tol=1e-2,
    )  # fmt: skip
    block = digits.hessian[1664:1690, 1664:1690]
    exact = scipy.linalg.eigvalsh(block.numpy())[::-1]
    np.testing.assert_allclose(found.eigenvalues, exact, atol=1e-6 * exact[0])
    assert found.trace == pytest.approx(float(block.trace()), rel=1e-5)
    if found.num_converged == 26:
        assert found.trace_std_error == 0.0


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_inside_validation_it_is_the_same(digits, spectrum, context):
    """Validation runs without gradients, `trainer.validate` in inference mode, batches included."""
    module = copy.deepcopy(digits.module)
    with context():
        batches = [(x.clone(), y.clone()) for x, y in digits.batches]
        found = hessian_spectrum(module, cross_entropy, batches, return_eigenvectors=True)
    np.testing.assert_allclose(found.eigenvalues, spectrum.eigenvalues, rtol=1e-6)
    assert found.trace == pytest.approx(spectrum.trace, rel=1e-6)


def test_inside_autocast_it_is_the_same(digits, spectrum):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hessian_spectrum(digits.module, cross_entropy, digits.batches)
    np.testing.assert_allclose(found.eigenvalues, spectrum.eigenvalues, rtol=1e-6)


def test_the_same_seed_gives_the_same_digits(digits):
    first, second, other = (
        hessian_spectrum(
            digits.module, cross_entropy, digits.batches, num_eigenvalues=5, hvp="autograd",
            seed=seed,
        )
        for seed in (1, 1, 2)
    )  # fmt: skip
    assert np.array_equal(first.eigenvalues, second.eigenvalues)
    assert first.trace == second.trace != other.trace
    np.testing.assert_allclose(first.eigenvalues, other.eigenvalues, rtol=1e-5)


def test_double_precision_is_used_where_the_module_has_it(digits):
    module = copy.deepcopy(digits.module).double()
    batches = [(x.double(), y) for x, y in digits.batches]
    found = hessian_spectrum(module, cross_entropy, batches, num_eigenvalues=10, tol=1e-9)
    assert found.dtype == "float64"
    np.testing.assert_allclose(found.eigenvalues, digits.eigenvalues[:10], rtol=1e-12)


def test_a_generator_of_batches_is_read_once(digits):
    found = hessian_spectrum(
        digits.module, cross_entropy, (batch for batch in digits.batches), num_eigenvalues=2
    )
    assert found.num_samples == 300


@pytest.mark.parametrize("num_eigenvalues", [5, 10, 12, 30])
def test_a_classifier_at_zero_has_each_eigenvalue_nine_times(num_eigenvalues):
    """At uniform predictions H is (I/10 - 1/100) kron the second moment of the inputs."""
    x, y = digits_data()
    module = nn.Linear(64, 10)
    with torch.no_grad():
        module.weight.zero_(), module.bias.zero_()
    inputs = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    moments = scipy.linalg.eigvalsh((inputs.T @ inputs / len(x)).numpy())[::-1]
    exact = np.repeat(moments / 10, 9)[:num_eigenvalues]
    found = hessian_spectrum(module, cross_entropy, [(x, y)], num_eigenvalues=num_eigenvalues)
    assert found.num_converged == num_eigenvalues
    np.testing.assert_allclose(found.eigenvalues, exact, rtol=1e-4)


def test_a_loss_that_is_linear_has_a_spectrum_of_zeros():
    found = hessian_spectrum(
        nn.Linear(4, 2), lambda module, x: module(x).mean(), [torch.randn(3, 4)], num_eigenvalues=3
    )
    assert found.eigenvalues.tolist() == [0.0] * 3
    assert (found.trace, found.trace_std_error, found.lambda_min) == (0.0, 0.0, 0.0)


def test_training_mode_measures_dropout_as_drawn_and_evaluation_without():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    batches = [(torch.randn(20, 5), torch.randint(3, (20,)))]
    evaluated, trained, again = (
        hessian_spectrum(
            module, cross_entropy, batches, num_eigenvalues=4, loss_options=LossOptions(mode=mode)
        )
        for mode in ("eval", "train", "train")
    )
    exact = dense_hessian(copy.deepcopy(module).eval(), cross_entropy, batches[0])
    top = scipy.linalg.eigvalsh(exact.numpy())[::-1][:4]
    np.testing.assert_allclose(evaluated.eigenvalues, top, rtol=1e-4)
    assert np.array_equal(trained.eigenvalues, again.eigenvalues)
    assert abs(trained.eigenvalues[0] / top[0] - 1) > 0.01
    assert trained.engine in ("autograd", "recompute")


# Bounds -----------------------------------------------------------------------------------------


def test_the_bound_on_products_is_kept_and_reported(digits):
    with pytest.warns(UserWarning, match=r"of 50 eigenvalues converged.*allow more or lower"):
        found = hessian_spectrum(
            digits.module, cross_entropy, digits.batches, budget=Budget(products=80)
        )
    assert found.num_hvps == 80
    assert 0 < found.num_converged < 50
    assert len(found.eigenvalues) == 50
    converged = found.eigenvalues[found.converged]
    nearest = np.abs(converged[:, None] - digits.eigenvalues).min(1)
    assert (nearest <= found.residuals[found.converged] + 1e-6).all()
    exact = float(digits.hessian.trace())
    assert abs(found.trace - exact) < 4 * found.trace_std_error


def test_no_time_leaves_what_there_is(digits, monkeypatch):
    """The clock jumps at the first product."""
    products, clock = [], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 1e6 * bool(products))
    with pytest.warns(UserWarning, match="the time was up"):
        found = hessian_spectrum(
            digits.module, cross_entropy, digits.batches, budget=Budget(seconds=1e5),
            on_progress=lambda *now: products.append(now),
        )  # fmt: skip
    assert found.trace is None
    assert found.trace_std_error is None
    assert found.lambda_min is None  # one Ritz value, far from converged
    assert found.num_converged == 0
    assert found.num_hvps <= 2


@pytest.mark.parametrize("hvp", ["auto", "linearize", "autograd", "recompute"])
def test_making_ready_ends_when_the_time_is_up(hvp):
    """Each evaluation takes 20 ms, so that hardly more than 30 of at least 60 fit into 0.6 s."""
    evaluated = []

    def slow(module, batch):
        evaluated.append(batch)
        time.sleep(0.02)
        return torch.nn.functional.mse_loss(module(batch), batch.new_zeros(len(batch), 1))

    batches = [torch.randn(4, 3) for _ in range(20)]
    options = {"num_eigenvalues": 2, "trace_probes": 0, "hvp": hvp}
    with pytest.raises(MeasurementError, match="time was up while products were made ready"):
        hessian_spectrum(
            torch.nn.Linear(3, 1), slow, batches, budget=Budget(seconds=0.6), **options
        )
    assert len(evaluated) <= 31
    evaluated.clear()
    hessian_spectrum(torch.nn.Linear(3, 1), slow, batches, **options)
    assert len(evaluated) >= 60


def test_no_trace_unless_asked_for(digits):
    found = hessian_spectrum(
        digits.module, cross_entropy, digits.batches, num_eigenvalues=3, trace_probes=0
    )
    assert (found.trace, found.trace_std_error) == (None, None)


def test_what_rounding_holds_up_is_reported():
    torch.manual_seed(0)
    module, x = nn.Linear(30, 1), torch.randn(5, 30)
    with pytest.warns(UserWarning, match=r"5 of 20.*too small beside lambda_1"):
        found = hessian_spectrum(
            module, lambda module, x: module(x).square().mean(), [x], num_eigenvalues=20
        )
    assert found.num_converged == 5
    assert len(found.leading) == 5
