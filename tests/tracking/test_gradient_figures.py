"""The figures draw what the records say."""

from __future__ import annotations

import numpy as np
import pytest
from support.gradient_oracles import classifier, cross_entropy

from lightning_hessian import gradient_structure, hessian_spectrum
from lightning_hessian.tracking.gradient_figures import ratio_plot, spectra_plot


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


def test_they_can_be_saved(measured: tuple, tmp_path: object) -> None:
    for i, figure in enumerate((spectra_plot(*measured), ratio_plot(*measured))):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000
