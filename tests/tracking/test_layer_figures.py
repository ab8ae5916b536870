"""Layers over the depth: each point is the statistic of its layer, in order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.references import dense_hessian
from torch import nn

from lightning_hessian import layer_spectra
from lightning_hessian.results import HessianSpectrum
from lightning_hessian.tracking.drawings import hessian_drawings
from lightning_hessian.tracking.layer_figures import depth_plot
from lightning_hessian.tracking.style import render

DEPTH, COUNT = 4, 6


def spectrum(values: np.ndarray, *, converged: bool = True) -> HessianSpectrum:
    flags = np.full(len(values), converged)
    return HessianSpectrum(
        values, np.abs(values) * 1e-6, flags, 1.0, 0.1, None, 1.0, 500, 100, 300, 1.0,
        "autograd", "float32",
    )  # fmt: skip


def several(count: int) -> dict[str, HessianSpectrum]:
    """Spectra whose largest values span decades, by names as deep models have them."""
    rng = np.random.default_rng(4)
    return {
        f"layers_{i:02}_self_attn_q_proj": spectrum(
            np.sort(stats.pareto(1 + 0.1 * i).rvs(60, random_state=rng))[::-1]
            * 10.0 ** (-4 * i / count)
        )
        for i in range(count)
    }


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    parts = [part for _ in range(DEPTH) for part in (nn.Linear(4, 4), nn.Tanh())]
    batch = torch.randn(30, 4), torch.randint(3, (30,))
    loss_fn = lambda module, given: nn.functional.cross_entropy(  # noqa: E731
        module(given[0]), given[1]
    )
    return nn.Sequential(*parts, nn.Linear(4, 3)).double(), loss_fn, (batch[0].double(), batch[1])


def test_the_points_are_those_of_dense_blocks_in_the_order_of_the_network(network: Any) -> None:
    module, loss_fn, batch = network
    spectra = layer_spectra(module, loss_fn, [batch], num_eigenvalues=COUNT)
    figure = depth_plot(spectra)
    largest, slopes, distances = (axes.lines[0].get_ydata() for axes in figure.axes)
    names = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
    assert names == [str(2 * i) for i in range(DEPTH + 1)]
    for i, name in enumerate(names):
        block = dense_hessian(module, loss_fn, batch, [f"{name}.weight", f"{name}.bias"])
        values = np.sort(torch.linalg.eigvalsh(block.detach()).numpy())[::-1][:COUNT]
        assert largest[i] == pytest.approx(values[0], rel=1e-3)
        values = values[: len(spectra[name].leading)]
        logarithms = np.log(values / values[-1])
        assert slopes[i] == pytest.approx(logarithms.mean(), rel=0.02)
        expected = stats.ks_1samp(logarithms, stats.expon(scale=logarithms.mean()).cdf)
        assert distances[i] == pytest.approx(expected.statistic, abs=0.02)


def test_a_layer_without_a_fit_leaves_a_gap() -> None:
    spectra = several(4)
    spectra["layers_02_self_attn_q_proj"] = spectrum(np.ones(5), converged=False)
    for axes in depth_plot(spectra).axes:
        assert np.isnan(axes.lines[0].get_ydata()).tolist() == [False, False, True, False]


def test_three_layers_make_a_depth() -> None:
    whole, layers = spectrum(np.array([3.0, 2.0, 1.0])), several(3)
    assert "layers" in hessian_drawings(whole, None, [], layers=layers)
    del layers["layers_00_self_attn_q_proj"]
    assert "layers" not in hessian_drawings(whole, None, [], layers=layers)
    with pytest.raises(ValueError, match="2 layers"):
        depth_plot(layers)


@pytest.mark.parametrize("count", [3, 16, 48, 300])
def test_names_do_not_overlap_and_none_is_cut(count: int) -> None:
    figure = depth_plot(several(count), title="step 10")
    render(figure)
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [text.get_window_extent() for text in figure.axes[-1].get_xticklabels()]
    assert 3 <= len(boxes) <= 48
    for box in boxes:
        assert -1 <= box.x0 <= box.x1 <= width + 1
        assert -1 <= box.y0 <= box.y1 <= height + 1
    for left, right in itertools.pairwise(boxes):
        assert left.x1 - right.x0 <= 2
