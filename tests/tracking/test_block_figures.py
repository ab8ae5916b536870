"""Figures: what the pixels and the labels say, and which record can be drawn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.references import cross_entropy, problem
from torch import nn

from lightning_hessian import block_structure
from lightning_hessian.results import BlockStructure
from lightning_hessian.tracking.block_figures import (
    block_heatmap,
    density_plot,
    entries_image,
    heterogeneity_heatmap,
)


@pytest.fixture(scope="module")
def measured() -> BlockStructure:
    given = problem("convolution")
    return block_structure(
        given.module, given.loss_fn, given.batches, densities=True, return_matrix=True
    )


def image_of(figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def test_heatmaps_show_the_numbers(measured):
    np.testing.assert_allclose(image_of(block_heatmap(measured)), measured.frobenius)
    np.testing.assert_allclose(image_of(block_heatmap(measured, ratios=True)), measured.ratios)
    np.testing.assert_allclose(image_of(heterogeneity_heatmap(measured)), measured.heterogeneity)
    axes = block_heatmap(measured).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "4"]
    assert f"{measured.off_diagonal_ratio:.3g}" in axes.get_title()
    assert type(axes.images[0].norm).__name__ == "LogNorm"


def test_entries_show_the_matrix(measured):
    found = image_of(entries_image(measured))
    exact = np.abs(measured.matrix)
    high = exact.max()
    np.testing.assert_allclose(
        found, np.clip(exact, max(exact[exact > 0].min(), high * 1e-6), None)
    )


def test_large_matrices_are_shrunk_by_their_largest_entries(measured):
    side = 1700
    matrix = np.full((side, side), 1e-3)
    matrix[1234, 17] = 5.0  # one bright entry must not be lost
    large = dataclasses.replace(measured, matrix=matrix, sizes=(1000, 700))
    found = image_of(entries_image(large))
    assert max(found.shape) <= 800
    assert found.max() == 5.0


def test_many_blocks_are_labelled_by_group():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 5))
    batches = [(torch.randn(4, 3), torch.randint(5, (4,)))]
    found = block_structure(net, cross_entropy, batches, blocks="neuron", exact=False)
    axes = block_heatmap(found).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "2"]


def test_densities_are_drawn_by_name(measured, tmp_path):
    figure = density_plot(measured)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == list(measured.names)
    figure.savefig(tmp_path / "densities.png")
    assert (tmp_path / "densities.png").stat().st_size > 1000


def test_what_was_not_measured_cannot_be_drawn(measured):
    bare = dataclasses.replace(measured, densities=None, heterogeneity=None, matrix=None)
    with pytest.raises(ValueError, match="densities=True"):
        heterogeneity_heatmap(bare)
    with pytest.raises(ValueError, match="densities=True"):
        density_plot(bare)
    with pytest.raises(ValueError, match="return_matrix=True"):
        entries_image(bare)
    zero = dataclasses.replace(measured, frobenius=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="All values are zero"):
        block_heatmap(zero)


def test_negligible_blocks_do_not_stretch_the_colours(measured):
    tiny = dataclasses.replace(measured, frobenius=np.array([[1.0, 0.0], [0.0, 1e-30]]))
    norm = block_heatmap(tiny).axes[0].images[0].norm
    assert norm.vmin == pytest.approx(1e-6)
    assert norm.vmax == 1.0
