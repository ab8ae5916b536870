"""The figures draw what the records say."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot
from support.gradient_oracles import classifier, cross_entropy, loop_gradients

from lightning_hessian import fit_power_law, gradient_structure, hessian_spectrum
from lightning_hessian.probe.minibatches import draw_minibatches
from lightning_hessian.tracking.gradient_figures import magnitude_plot, ratio_plot, spectra_plot


@pytest.fixture(scope="module")
def measured() -> tuple:
    module, data = classifier()
    structure = gradient_structure(module, cross_entropy, data, batch_size=4, num_gradients=60)
    return structure, hessian_spectrum(module, cross_entropy, data, num_eigenvalues=20)


def _drawn(axes: object) -> list[np.ndarray]:
    return [np.asarray(points.get_offsets())[:, 1] for points in axes.collections]


def test_spectra_of_h_and_c_on_one_plot(measured: tuple) -> None:
    structure, hessian = measured
    (axes,) = spectra_plot(structure, hessian).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    covariance, second_moment, curvature = _drawn(axes)
    np.testing.assert_array_equal(covariance, structure.leading)
    np.testing.assert_array_equal(second_moment, structure.second_moment[: len(second_moment)])
    np.testing.assert_array_equal(curvature, hessian.leading)
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert [label.split(":")[0] for label in labels] == [
        "covariance C", "second moment", "Hessian H",
    ]  # fmt: skip
    assert len(axes.lines) == 3
    (alone,) = spectra_plot(structure).axes
    assert len(_drawn(alone)) == 2


def test_ratio_by_rank(measured: tuple) -> None:
    structure, hessian = measured
    (axes,) = ratio_plot(structure, hessian).axes
    count = min(len(structure.leading), len(hessian.leading))
    expected = structure.leading[:count] / hessian.leading[:count]
    np.testing.assert_allclose(_drawn(axes)[0], expected)
    heights = [line.get_ydata()[0] for line in axes.lines]
    assert heights[0] == pytest.approx(np.exp(np.log(expected).mean()))
    assert heights[1] == 1 / 4


def test_magnitudes_of_the_median_gradient_and_of_the_median_parameter(measured: tuple) -> None:
    """Those of a loop of backward passes, sorted by NumPy, on logarithmic axes."""
    structure, _ = measured
    module, data = classifier()
    drawn = draw_minibatches(data, batch_size=4, num_minibatches=60)
    rows = np.abs(loop_gradients(module, cross_entropy, [drawn[i] for i in range(60)]))
    (axes,) = magnitude_plot(structure).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    shown = _drawn(axes)
    for tests, table, points in (
        (structure.dimension_tests, rows, shown[0]),
        (structure.iteration_tests, rows.T, shown[1]),
    ):
        typical = tests.typical
        expected = np.sort(table[typical.index])[::-1]
        np.testing.assert_allclose(typical.values, expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(points, typical.values)
        assert typical.num_entries == table.shape[1]
        middle = tests.ks_distances[typical.index]
        below, above = (tests.ks_distances < middle).sum(), (tests.ks_distances > middle).sum()
        assert abs(int(below) - int(above)) <= 1
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    fit = fit_power_law(structure.dimension_tests.typical.values)
    assert f"{fit.ks_distance:.3f}" in labels[0]
    assert fit.ks_distance == pytest.approx(np.sort(structure.dimension_tests.ks_distances)[30])


def test_the_record_draws_its_entries_where_it_has_them(measured: tuple) -> None:
    structure, _ = measured
    _, axes = pyplot.subplots()
    assert structure.plot(ax=axes, entries=True) is axes
    assert "magnitude" in axes.get_ylabel()
    pyplot.close("all")
    module, data = classifier()
    bare = gradient_structure(module, cross_entropy, data, batch_size=4, tests=False)
    with pytest.raises(ValueError, match="tests=True"):
        bare.plot(entries=True)
    assert not pyplot.get_fignums()


def test_magnitudes_of_rows_that_were_chosen() -> None:
    module, data = classifier()
    found = gradient_structure(
        module, cross_entropy, data, batch_size=4, num_gradients=60, max_tested=20, momentum=0.5
    )
    whole = gradient_structure(
        module, cross_entropy, data, batch_size=4, num_gradients=60, momentum=0.5
    )
    for few, all_of_them in (
        (found.dimension_tests, whole.dimension_tests),
        (found.iteration_tests, whole.iteration_tests),
    ):
        middle = np.sort(few.ks_distances)[10]
        assert all_of_them.ks_distances[few.typical.index] == pytest.approx(middle)


def test_they_can_be_saved(measured: tuple, tmp_path: object) -> None:
    for i, figure in enumerate((spectra_plot(*measured), ratio_plot(*measured))):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000
