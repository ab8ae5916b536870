"""Protocols, densities, storage and checkpoints of the front door, against dense Hessians."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from support.references import dense_hessian, problem
from torch import nn

from lightning_hessian import (
    HessianSpectrumCallback,
    fit_power_law,
    hessian_spectrum,
    layer_spectra,
)
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.layers import layer_groups
from lightning_hessian.measure.options import LossOptions, PooledSLQ
from lightning_hessian.solvers.storage import BasisStorage
from lightning_hessian.tracking.scalars import spectrum_scalars


@pytest.fixture(scope="module")
def given():
    """A convolution with 55 + 33 parameters, its batches and its eigenvalues."""
    network = problem("convolution")
    hessian = network.hessian()
    return network, hessian, scipy.linalg.eigvalsh(hessian.numpy())[::-1]


def spectrum_of(given, **options):
    network, _, _ = given
    return hessian_spectrum(network.module, network.loss_fn, network.batches, **options)


# The papers' protocol ---------------------------------------------------------------------------


def test_pooled_values_are_labelled_and_fitted_like_the_papers_do(given):
    _, _, exact = given
    n = len(exact)
    found = spectrum_of(given, protocol=PooledSLQ(), seed=1)
    assert (found.protocol, found.num_runs) == ("pooled_slq", 3)
    # No more steps than there are parameters, and none beyond an invariant subspace.
    assert 3 * n // 2 < len(found.eigenvalues) <= 3 * n
    assert found.num_hvps == len(found.eigenvalues) + 16
    np.testing.assert_allclose(found.eigenvalues[:30], np.repeat(exact[:10], 3), rtol=1e-3)
    assert found.num_copies >= 20
    # All positive ones are fitted, converged or not; the record says how many have.
    assert len(found.leading) == (found.eigenvalues > 0).sum()
    assert found.num_converged < len(found.eigenvalues)
    scalars, _ = spectrum_scalars(found)
    assert scalars["num_fitted"] == len(found.leading)
    assert scalars["num_converged"] == found.num_converged
    assert scalars["d_ks"] == fit_power_law(found.leading).ks_distance
    assert found.trace == pytest.approx(exact.sum(), abs=4 * found.trace_std_error)


def test_few_steps_leave_most_unconverged_and_say_so(given):
    _, _, exact = given
    found = spectrum_of(
        given, protocol=PooledSLQ(num_runs=2, num_steps=20), num_eigenvalues=30, trace_probes=0
    )
    assert found.num_hvps == 40
    assert len(found.eigenvalues) == 30
    assert 0 < found.num_converged < 30
    nearest = np.abs(found.eigenvalues[:, None] - exact).min(1)
    assert (nearest <= found.residuals + 1e-6 * exact[0]).all()
    converged = spectrum_of(given, num_eigenvalues=10)
    assert (converged.protocol, converged.num_runs, converged.num_copies) == ("converged", 1, 0)
    assert converged.num_converged == 10


def test_a_bound_cuts_the_runs_short_with_a_warning(given):
    with pytest.warns(UserWarning, match="pools 30 Ritz values instead of 60"):
        found = spectrum_of(
            given, protocol=PooledSLQ(num_steps=20), budget=Budget(products=34), trace_probes=4
        )
    assert found.num_hvps == 34


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "slq"}, "protocol='slq'.*PooledSLQ"),
        ({"protocol": "pooled_slq"}, "protocol='pooled_slq'.*PooledSLQ"),
        ({"protocol": PooledSLQ(), "checkpoint": "run"}, "keeps no checkpoint"),
        ({"basis": "disk"}, "basis='disk'.*BasisStorage"),
    ],
)
def test_what_makes_no_sense_is_refused(given, options, message):
    with pytest.raises(ValueError, match=message):
        spectrum_of(given, **options)
    if "checkpoint" not in options:
        with pytest.raises(ValueError, match=message):
            HessianSpectrumCallback(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PooledSLQ(num_steps=0), "num_steps=0.*at least 1"),
        (lambda: PooledSLQ(num_runs=0), "num_runs=0.*from 1 to 1,000"),
        (lambda: BasisStorage(tier="tape"), "tier='tape'.*'disk'"),
        (lambda: BasisStorage(dtype="int8"), "dtype='int8'.*'bfloat16'"),
        (lambda: LossOptions(mode="test"), "mode='test'.*'eval', 'train'"),
        (lambda: LossOptions(batch_weight=3), "batch_weight=3"),
    ],
)
def test_options_that_make_no_sense_are_refused_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Densities --------------------------------------------------------------------------------------


def test_the_density_has_the_moments_of_the_dense_hessian(given):
    _, hessian, exact = given
    found = spectrum_of(given, num_eigenvalues=5, density=True)
    assert found.density.exact  # so few parameters that all eigenvalues cost no more
    np.testing.assert_allclose(found.density.nodes[::-1], exact, atol=1e-6)
    assert found.density.moment(1) == pytest.approx(float(hessian.trace()) / len(exact), rel=1e-5)


def test_a_density_comes_free_with_pooled_values(given):
    _, hessian, exact = given
    options = {"protocol": PooledSLQ(num_runs=3, num_steps=20), "trace_probes": 0}
    found = spectrum_of(given, density=True, **options)
    assert found.num_hvps == 60
    off_diagonal = hessian - hessian.diagonal().diag()
    std_error = float(2 * off_diagonal.square().sum() / 3) ** 0.5  # of three probes of signs
    estimate = found.density.moment(1) * len(exact)
    assert estimate == pytest.approx(float(hessian.trace()), abs=3 * std_error)
    assert spectrum_of(given, **options).density is None


def test_a_density_without_products_left_is_absent_and_said_why(given):
    with pytest.warns(UserWarning, match="no density of the whole spectrum"):
        found = spectrum_of(
            given,
            num_eigenvalues=2,
            density=True,
            trace_probes=0,
            budget=Budget(products=25),
            tol=1e-9,
        )
    assert found.density is None
    assert found.num_hvps <= 25


# Storage and checkpoints ------------------------------------------------------------------------


def test_storage_reaches_the_solver(given, tmp_path):
    _, _, exact = given
    on_disk = spectrum_of(given, num_eigenvalues=6, basis=BasisStorage(tier=f"disk:{tmp_path}"))
    np.testing.assert_allclose(on_disk.eigenvalues, exact[:6], rtol=1e-4)
    small = spectrum_of(
        given,
        num_eigenvalues=6,
        basis=BasisStorage(memory=40 * 4 * len(exact)),
        return_eigenvectors=True,
    )
    np.testing.assert_allclose(small.eigenvalues, exact[:6], rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not all converge
        rounded = spectrum_of(
            given, num_eigenvalues=6, basis=BasisStorage(dtype="bfloat16"), return_eigenvectors=True
        )
    assert rounded.eigenvectors.dtype == torch.float32
    overlap = (rounded.eigenvectors[0] @ small.eigenvectors[0]).abs()
    assert float(overlap) == pytest.approx(1, abs=1e-3)


def test_a_measurement_out_of_time_goes_on_from_its_checkpoint(given, tmp_path):
    file, options = tmp_path / "run", {"num_eigenvalues": 8, "trace_probes": 0, "tol": 1e-4}
    whole = spectrum_of(given, **options)
    with pytest.warns(UserWarning, match="the bound on products was reached"):
        spectrum_of(given, checkpoint=file, budget=Budget(products=12), **options)
    assert file.exists()
    found = spectrum_of(given, checkpoint=file, **options)
    assert np.array_equal(found.eigenvalues, whole.eigenvalues)
    assert found.num_hvps == whole.num_hvps
    assert not file.exists()


# Layers -----------------------------------------------------------------------------------------


def test_each_layer_has_the_spectrum_of_its_diagonal_block(given):
    network, _, _ = given
    spectra = layer_spectra(
        network.module, network.loss_fn, network.batches, layers={"conv": "0.*", "head": "4.*"}
    )
    assert list(spectra) == ["conv", "head"]
    for name, glob in (("conv", "0"), ("head", "4")):
        part = network.module.get_submodule(glob)
        block = dense_hessian(
            network.module, network.loss_fn, network.whole,
        )  # fmt: skip
        sizes = [p.numel() for p in network.module.get_submodule("0").parameters()]
        cut = sum(sizes)
        block = block[:cut, :cut] if name == "conv" else block[cut:, cut:]
        exact = scipy.linalg.eigvalsh(block.numpy())[::-1]
        found = spectra[name]
        assert found.num_parameters == sum(p.numel() for p in part.parameters())
        assert len(found.eigenvalues) == min(50, len(exact))
        np.testing.assert_allclose(
            found.eigenvalues, exact[: len(found.eigenvalues)], atol=1e-5 * exact[0]
        )


def test_every_module_is_a_layer(given):
    network, _, _ = given
    assert list(layer_groups(network.module, "layer")) == ["0", "4"]
    nested = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    assert list(layer_groups(nested, "layer")) == ["a_0", "b"]


def test_layers_out_of_bounds_are_left_out_and_named(given):
    network, _, _ = given
    with pytest.warns(UserWarning, match="Layers without a spectrum: head"):
        spectra = layer_spectra(
            network.module,
            network.loss_fn,
            network.batches,
            num_eigenvalues=5,
            layers={"conv": "0.*", "head": "4.*"},
            budget=Budget(products=30),
        )
    assert list(spectra) == ["conv"]
    assert spectra["conv"].num_hvps <= 30
    with pytest.warns(UserWarning, match="Layers without a spectrum: conv, head"):
        spectra = layer_spectra(
            network.module,
            network.loss_fn,
            network.batches,
            layers={"conv": "0.*", "head": "4.*"},
            budget=Budget(seconds=0),
        )
    assert spectra == {}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("block", "layers='block'.*'layer'"),
        ({}, "names no layer"),
        ({"conv.0": "0.*"}, "letters, digits and underscores"),
        ({"a/b": "0.*"}, "letters, digits and underscores"),
        ({"Conv": "0.*", "conv": "4.*"}, "differ by case only"),
        ({"conv": "conv.*"}, "matches no parameter"),
    ],
)
def test_layers_that_make_no_sense_are_refused(given, layers, message):
    with pytest.raises(ValueError, match=message):
        layer_groups(given[0].module, layers)


def test_layers_whose_names_become_alike_are_refused():
    module = nn.ModuleDict({"a_0": nn.Linear(2, 2), "a": nn.Sequential(nn.Linear(2, 2))})
    with pytest.raises(ValueError, match="both be called 'a_0'"):
        layer_groups(module, "layer")
