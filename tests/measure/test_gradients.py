"""Gradients against a loop of backward passes, spectra against the explicit n x n matrices."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support.gradient_oracles import (
    classifier,
    cross_entropy,
    explicit,
    gradient_source,
    in_batches,
    loop_gradients,
)
from support.references import PROBLEMS, in_double, problem
from torch import Tensor, nn

from lightning_hessian import GradientStructure, MeasurementError, gradient_structure
from lightning_hessian.isolation.context import isolated
from lightning_hessian.operators.gradients.gram import gram_matrix
from lightning_hessian.operators.gradients.history import GradientCovariance, GradientHistory
from lightning_hessian.operators.gradients.rows import MiniBatchGradients, adam_preconditioner
from lightning_hessian.solvers.lanczos import lanczos


def _rows(source: MiniBatchGradients, module: nn.Module) -> np.ndarray:
    with isolated(module):
        return source.rows(0, source.num_gradients).double().numpy()


def _assert_spectrum(found: np.ndarray, expected: np.ndarray, largest: float) -> None:
    """To 1e-6 of each eigenvalue, where rounding leaves that much of it."""
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-6, atol=1e-13 * largest)


# Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "batch_norm_in_training"])
@pytest.mark.parametrize("per_sample", [True, False], ids=["per sample", "mini-batches"])
def test_gradients_against_a_loop(name: str, per_sample: bool) -> None:
    case = problem(name)
    batches = in_batches(case.whole, 1 if per_sample else 2)
    source = gradient_source(case.module, case.loss_fn, batches)
    expected = loop_gradients(case.module, case.loss_fn, batches)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(_rows(source, case.module), expected, rtol=1e-4, atol=1e-5 * scale)
    if name != "lstm":  # which depends on the kernel that torch chooses
        assert source.engine == ("vmap" if per_sample else "autograd")
    losses = [case.loss_fn(case.module, batch).item() for batch in batches]
    np.testing.assert_allclose(source.losses, losses, rtol=1e-5)


def test_vmap_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (whole,) = classifier(50)
    monkeypatch.setattr(MiniBatchGradients, "_chunk", lambda self: 7)
    source = gradient_source(module, cross_entropy, in_batches(whole, 1))
    expected = loop_gradients(module, cross_entropy, in_batches(whole, 1))
    np.testing.assert_allclose(_rows(source, module), expected, rtol=1e-4, atol=1e-6)
    assert (source.engine, source.num_computed) == ("vmap", 50)


def _reads_a_value(module: nn.Module, batch: Any) -> Tensor:
    loss = cross_entropy(module, batch)
    return loss * 2 if float(loss.detach()) > 1.0 else loss


def _draws_a_number(module: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(module, batch) * (1 + torch.rand(()))


@pytest.mark.parametrize("loss_fn", [_reads_a_value, _draws_a_number])
def test_what_vmap_cannot_do_is_done_by_autograd(loss_fn: Any) -> None:
    module, (whole,) = classifier(10)
    source = gradient_source(module, loss_fn, in_batches(whole, 1))
    first = _rows(source, module)
    assert source.engine == "autograd"
    np.testing.assert_array_equal(_rows(source, module), first)
    if loss_fn is _reads_a_value:
        expected = loop_gradients(module, loss_fn, in_batches(whole, 1))
        np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-6)


def test_batch_norm_in_training_mode() -> None:
    case = problem("batch_norm_in_training")
    batches = in_batches(case.whole, 5)
    source = gradient_source(case.module, case.loss_fn, batches, mode="train")
    with isolated(case.module, training=True):
        found = source.rows(0, 2).numpy()
    reference = case.reference_module()
    np.testing.assert_allclose(
        found, loop_gradients(reference, case.loss_fn, batches), rtol=1e-4, atol=1e-6
    )


def test_a_gradient_is_the_same_whenever_it_is_asked_for() -> None:
    module, data = classifier()
    module.insert(2, nn.Dropout(0.5))
    source = gradient_source(
        module, cross_entropy, data, batch_size=6, num_minibatches=30, mode="train"
    )  # fmt: skip
    with isolated(module, training=True):
        whole = source.rows(0, 30)
        parts = torch.cat([source.rows(20, 30), source.rows(0, 20)])
    torch.testing.assert_close(torch.cat([parts[10:], parts[:10]]), whole, rtol=0, atol=0)
    assert len(whole.unique(dim=0)) == 30


def test_clipping_is_that_of_torch() -> None:
    module, (whole,) = classifier()
    batches = in_batches(whole, 4)
    expected = loop_gradients(module, cross_entropy, batches)
    norms = np.linalg.norm(expected, axis=1)
    limit = float(np.median(norms))
    for row in expected:
        parameter = nn.Parameter(torch.zeros(len(row), dtype=torch.float64))
        parameter.grad = torch.from_numpy(row)
        nn.utils.clip_grad_norm_([parameter], limit)
        row[:] = parameter.grad.numpy()
    found = _rows(gradient_source(module, cross_entropy, batches, clip_norm=limit), module)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (np.linalg.norm(found, axis=1) > 0.999 * limit).mean() == pytest.approx(0.5, abs=0.04)


def test_adam_is_the_update_that_torch_tends_to() -> None:
    """With the parameters fixed, Adam's v tends to the mean square that preconditions here."""
    module, (whole,) = classifier()
    batches = in_batches(whole, 4)
    gradients = loop_gradients(module, cross_entropy, batches)
    parameter = nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, 0.9999))
    for index in np.random.default_rng(0).integers(len(gradients), size=20_000):
        parameter.grad = torch.from_numpy(gradients[index])
        adam.step()
    parameter.data.zero_()
    parameter.grad = torch.from_numpy(gradients[0])
    adam.step()
    expected = -parameter.detach().numpy()
    source = gradient_source(in_double(module), cross_entropy, in_double(batches))
    with isolated(module):
        source.precondition(adam_preconditioner(source))
        found = source.rows(0, 1)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0.1)


# Spectra -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "batch_norm_in_training"])
def test_spectra_against_explicit_matrices(name: str) -> None:
    case = problem(name)
    module, batches = in_double(case.module), in_double(in_batches(case.whole, 1))
    gradients = loop_gradients(module, case.loss_fn, batches)
    found = gradient_structure(module, case.loss_fn, batches, tests=False)
    for centred, values in ((False, found.second_moment), (True, found.covariance)):
        expected = explicit(gradients, centred=centred)
        assert len(values) == min(10 - centred, gradients.shape[1])
        _assert_spectrum(values, expected, expected[0])
    assert found.second_moment_trace == pytest.approx((gradients**2).sum() / 10)
    assert found.covariance_trace == pytest.approx(gradients.var(axis=0, ddof=1).sum())
    assert found.mean_gradient_norm == pytest.approx(np.linalg.norm(gradients.mean(axis=0)))


@pytest.mark.parametrize("num_gradients", [2, 30, 57, 120], ids=lambda t: f"T={t}")
@pytest.mark.parametrize("tests", [False, True], ids=["streamed", "stored"])
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_more_and_fewer_gradients_than_parameters(
    num_gradients: int, tests: bool, double: bool
) -> None:
    if tests and num_gradients < 20:
        pytest.skip("tests need 20 gradients")
    module, (whole,) = classifier(240)
    if double:
        module, whole = in_double(module), in_double(whole)
    batches = in_batches(whole, 2)[:num_gradients]
    expected = explicit(loop_gradients(module, cross_entropy, batches), centred=True)
    found = gradient_structure(module, cross_entropy, batches, tests=tests)
    assert len(found.covariance) == min(num_gradients - 1, 57)
    assert found.dtype == ("float64" if double else "float32")
    tolerance = 1e-13 if double else 1e-6
    np.testing.assert_allclose(
        found.covariance, expected[: len(found.covariance)],
        rtol=1e-6, atol=tolerance * expected[0],
    )  # fmt: skip


def test_small_eigenvalues_of_float32_gradients() -> None:
    """Squares of rounding, not rounding, are what float32 gradients leave uncertain."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(60, 40)))
    right, _ = np.linalg.qr(rng.normal(size=(500, 40)))
    sizes = np.logspace(0, -4.5, 40)
    gradients = (left * sizes) @ right.T
    gram = gram_matrix(GradientHistory(gradients.astype(np.float32)), memory_budget=1e9)
    found = np.sqrt(np.linalg.eigvalsh(gram.numpy())[::-1][:40])
    np.testing.assert_allclose(found, sizes, rtol=1e-2)
    np.testing.assert_allclose(found[:20], sizes[:20], rtol=1e-5)


@pytest.mark.parametrize("tests", [False, True], ids=["streamed", "stored"])
@pytest.mark.parametrize("variant", ["clipped", "adam", "both"])
def test_variants(tests: bool, variant: str) -> None:
    module, (whole,) = classifier()
    module, batches = in_double(module), in_double(in_batches(whole, 4))
    gradients = loop_gradients(module, cross_entropy, batches)
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    options: dict[str, Any] = {}
    if variant != "adam":
        options["clip_norm"] = float(np.median(norms))
        gradients *= np.minimum(1, options["clip_norm"] / norms)
    if variant != "clipped":
        options["preconditioner"] = "adam"
        gradients /= np.sqrt((gradients**2).mean(axis=0)) + 1e-8
    found = gradient_structure(module, cross_entropy, batches, tests=tests, **options)
    for centred, values in ((False, found.second_moment), (True, found.covariance)):
        expected = explicit(gradients, centred=centred)
        _assert_spectrum(values, expected, expected[0])


def test_eigenvectors_of_the_covariance() -> None:
    module, (whole,) = classifier()
    batches = in_batches(whole, 4)
    found = gradient_structure(module, cross_entropy, batches, num_eigenvectors=5, tests=False)
    vectors = found.eigenvectors.double().numpy()
    covariance = np.cov(loop_gradients(module, cross_entropy, batches).T)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(
        vectors @ covariance, found.covariance[:5, None] * vectors, atol=1e-5 * found.covariance[0]
    )


@pytest.mark.parametrize("centred", [False, True])
def test_the_operator_has_the_same_spectrum_by_lanczos(centred: bool) -> None:
    module, (whole,) = classifier(480)
    module, batches = in_double(module), in_double(in_batches(whole, 4))
    found = gradient_structure(module, cross_entropy, batches)
    source = gradient_source(module, cross_entropy, batches)
    with isolated(module):
        history = GradientHistory.collect(source)
    operator = GradientCovariance(history, centred=centred)
    ritz = lanczos(operator, 6, tol=1e-8)
    expected = found.covariance if centred else found.second_moment
    np.testing.assert_allclose(ritz.values, expected[:6], rtol=1e-8)
    vectors = torch.randn(3, history.size, dtype=torch.float64)
    torch.testing.assert_close(operator.matmat(vectors)[1], operator.matvec(vectors[1]))


def test_leading_eigenvalues_stand_above_rounding() -> None:
    """Forty gradients of which only three differ have a covariance of rank two."""
    module, (whole,) = classifier(12)
    three = in_batches(whole, 4)
    found = gradient_structure(module, cross_entropy, [three[i % 3] for i in range(40)])
    assert len(found.covariance) == 39
    assert len(found.leading) == 2


# Promises ------------------------------------------------------------------------------------


def _state(module: nn.Module) -> Any:
    return (
        copy.deepcopy(module.state_dict()),
        [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        [part.training for part in module.modules()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_model_is_left_as_it_was(batch_size: int, mode: Any) -> None:
    case = problem("transformer_encoder" if batch_size == 1 else "batch_norm")
    module = case.module.train()
    case.loss_fn(module, case.whole).backward()
    before = _state(module)
    data = [tuple(part.repeat_interleave(4, 0) for part in case.whole)]
    gradient_structure(
        module, case.loss_fn, data, batch_size=batch_size, num_gradients=30, mode=mode
    )
    torch.testing.assert_close(_state(module), before, rtol=0, atol=0)


def test_inside_inference_mode() -> None:
    module, data = classifier()
    expected = gradient_structure(module, cross_entropy, data, batch_size=4)
    with torch.inference_mode():
        found = gradient_structure(module, cross_entropy, data, batch_size=4)
    np.testing.assert_array_equal(found.covariance, expected.covariance)


def test_selected_parameters_and_the_mean_loss() -> None:
    module, (whole,) = classifier()
    batches = in_batches(whole, 4)
    found = gradient_structure(module, cross_entropy, batches, parameters="2.*")
    gradients = loop_gradients(module, cross_entropy, batches)[:, 36:]
    np.testing.assert_allclose(
        found.covariance, explicit(gradients, centred=True)[: len(found.covariance)],
        rtol=1e-3, atol=1e-9,
    )  # fmt: skip
    assert found.num_parameters == 21
    assert found.loss == pytest.approx(cross_entropy(module, whole).item(), rel=1e-5)
    assert (found.num_gradients, found.batch_size, found.engine) == (30, None, "autograd")


def test_the_seed_draws_the_minibatches() -> None:
    module, data = classifier()

    def measured(seed: int) -> GradientStructure:
        return gradient_structure(
            module, cross_entropy, data, batch_size=4, num_gradients=50, seed=seed
        )

    first, again, other = measured(0), measured(0), measured(1)
    np.testing.assert_array_equal(first.covariance, again.covariance)
    np.testing.assert_array_equal(first.iteration_tests.p_values, again.iteration_tests.p_values)
    assert not np.allclose(first.covariance, other.covariance, rtol=1e-3)


def test_sums_of_samples_have_a_covariance_inverse_to_their_number() -> None:
    """SG section 5.1: with mini-batches drawn at random, C is that of one sample over B."""
    module, data = classifier(2000)
    traces = {
        size: gradient_structure(
            module, cross_entropy, data, batch_size=size, num_gradients=600, tests=False
        ).covariance_trace
        for size in (1, 4, 16)
    }
    assert traces[1] / traces[4] == pytest.approx(4, rel=0.15)
    assert traces[1] / traces[16] == pytest.approx(16, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gradients": 1, "tests": False}, "num_gradients=1.*at least 2"),
        ({"num_gradients": 19}, "num_gradients=19.*too few: tests need 20"),
        ({"batch_size": 60}, "num_gradients=2 .*too few: tests need 20"),
        ({"num_eigenvalues": 0}, "num_eigenvalues=0"),
        ({"preconditioner": "lion"}, "preconditioner='lion'.*'adam'"),
        ({"clip_norm": 0.0}, "clip_norm=0"),
        ({"mode": "test"}, "mode='test'"),
        ({"max_tested": 0}, "max_tested=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 121}, "batch_size=121, but the data hold 120 samples. Lower"),
        ({"parameters": "2.bias"}, "3 parameters are too few to be tested.*tests=False"),
    ],
)
def test_misuse_is_refused(arguments: dict[str, Any], message: str) -> None:
    module, data = classifier()
    with pytest.raises(ValueError, match=message):
        gradient_structure(module, cross_entropy, data, **{"batch_size": 4, **arguments})


def test_nan_and_missing_gradients_are_said() -> None:
    module, data = classifier()
    data[0][0][7, 0] = float("nan")
    with pytest.raises(MeasurementError, match=r"gradient of mini-batch \d+ is NaN .*is nan\)"):
        gradient_structure(module, cross_entropy, data, batch_size=4)
    module, data = classifier()
    with pytest.raises(MeasurementError, match=r"carries no gradient.*not detached"):
        gradient_structure(
            module, lambda m, b: cross_entropy(m, b).detach(), data, batch_size=4
        )  # fmt: skip


def test_no_warnings() -> None:
    module, data = classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_structure(module, cross_entropy, data, batch_size=1)
