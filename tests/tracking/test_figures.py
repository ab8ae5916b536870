"""What the figures draw is what the records say, and all of it can be read."""

from __future__ import annotations

import io
import random
import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from support.references import problem

from lightning_hessian import block_structure, eigengaps, fit_power_law, hessian_spectrum
from lightning_hessian.results import HessianSpectrum, SpectralDensity
from lightning_hessian.tracking.block_figures import block_heatmap, heterogeneity_heatmap
from lightning_hessian.tracking.correlation_figures import scatter_plot
from lightning_hessian.tracking.density_figures import spectral_density_plot
from lightning_hessian.tracking.figures import (
    cutoff_plot,
    eigengap_plot,
    eigengap_theory_plot,
    emergence_plot,
    rank_plot,
)
from lightning_hessian.tracking.style import COLOURS, few_ticks, new_figure, render

VALUES = np.sort(stats.pareto(0.9).rvs(120, random_state=np.random.default_rng(5)))[::-1]


def spectrum(values: np.ndarray = VALUES, converged: np.ndarray | None = None) -> HessianSpectrum:
    flags = np.ones(len(values), bool) if converged is None else converged
    return HessianSpectrum(
        values, np.abs(values) * 1e-6, flags, 1.0, 0.1, None, 1.0, 500, 100, 300, 1.0,
        "autograd", "float32",
    )  # fmt: skip


def history(count: int = 9) -> list[dict[str, float]]:
    rng = np.random.default_rng(2)
    return [
        {"step": 10 * i, "val_loss": 1 / i + 0.1 * rng.random(), "d_ks": 0.3 / i, "s_hat": i**0.3}
        for i in range(1, count + 1)
    ]


def densities(count: int = 3) -> dict[str, SpectralDensity]:
    rng = np.random.default_rng(3)
    return {
        f"a.rather.long.name.of.layer.{i}": SpectralDensity(
            np.sort(rng.normal(size=60) * 10.0 ** rng.integers(-3, 3, 60)), np.full(60, 1 / 60),
            60, 60, True,
        )
        for i in range(count)
    }  # fmt: skip


@pytest.fixture(scope="module")
def blocks() -> Any:
    given = problem("convolution")
    return block_structure(given.module, given.loss_fn, given.batches, densities=True)


def all_figures(blocks: Any) -> dict[str, Any]:
    long = "0123456789" * 3
    return {
        "rank": rank_plot({"Hessian": spectrum()}, title="step 132"),
        "rank of two": rank_plot({"at initialisation": spectrum(VALUES[::-1][:90][::-1] * 1e-5),
                                  "after 15 epochs": spectrum()}),
        "rank of one": rank_plot({"Hessian": spectrum(np.array([2.0]))}),
        "cutoff": cutoff_plot(VALUES, title="step 132"),
        "cutoff of few": cutoff_plot(VALUES[:5]),
        "eigengaps": eigengap_plot(VALUES, title="step 132"),
        "eigengaps of theory": eigengap_theory_plot(VALUES, title="step 132"),
        "emergence": emergence_plot([(1000 * i, VALUES / i) for i in range(1, 90)]),
        "density": spectral_density_plot(VALUES, densities()),
        "density of many": spectral_density_plot(VALUES, densities(30)),
        "density alone": spectral_density_plot(VALUES),
        "blocks": block_heatmap(blocks),
        "heterogeneity": heterogeneity_heatmap(blocks),
        "scatter": scatter_plot(history(), ["d_ks", "s_hat"], "val_loss"),
        "scatter of many": scatter_plot(
            [{**row, **{f"statistic_{i}": row["d_ks"] * (i - 4) for i in range(9)}, long: 1e-5 * i}
             for i, row in enumerate(history())],
            ["d_ks", "s_hat", *(f"statistic_{i}" for i in range(9))], long),
    }  # fmt: skip


def _drawn_texts(figure: Any) -> list[tuple[str, Any, float]]:
    """Text, box in pixels and height in pixels of what is written on a drawn figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    undrawn = set()  # ticks outside the view are there, but are not drawn
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        drawn = {id(tick) for tick in axis._update_ticks()}
        ticks = [*axis.majorTicks, *axis.minorTicks]
        undrawn |= {id(t) for tick in ticks if id(tick) not in drawn for t in tick.findobj(Text)}
    boxes = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and id(text) not in undrawn:
            box = text.get_window_extent(renderer)
            if box.width and box.height:
                boxes.append((text.get_text(), box, text.get_fontsize() * 110 / 72))
    return boxes


@pytest.mark.parametrize("name", [
    "rank", "rank of two", "rank of one", "cutoff", "cutoff of few", "eigengaps",
    "eigengaps of theory", "emergence", "density", "density of many", "density alone", "blocks",
    "heterogeneity", "scatter", "scatter of many",
])  # fmt: skip
def test_nothing_is_cut_nothing_overlaps_and_all_can_be_read(blocks: Any, name: str) -> None:
    figure = all_figures(blocks)[name]
    boxes = _drawn_texts(figure)
    width, height = figure.get_size_inches() * 110
    assert len(boxes) > 5
    for text, box, size in boxes:
        assert -1 <= box.x0 <= box.x1 <= width + 1, f"{text!r} is cut at a side"
        assert -1 <= box.y0 <= box.y1 <= height + 1, f"{text!r} is cut above or below"
        assert size >= 8, f"{text!r} is too small to read"
    for i, (text, box, _) in enumerate(boxes):
        for other, second, _ in boxes[i + 1 :]:
            across = min(box.x1, second.x1) - max(box.x0, second.x0)
            along = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert min(across, along) <= 2, f"{text!r} overlaps {other!r}"


def test_units_stand_at_the_axes(blocks: Any) -> None:
    for name, figure in all_figures(blocks).items():
        labels = " ".join(axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes)
        if "heterogeneity" in name or "scatter" in name or "cutoff" in name:
            continue  # numbers without unit
        assert "loss" in labels, name


def test_the_rank_plot_shows_points_line_cutoff_outliers_and_verdict() -> None:
    values = np.concatenate([[900.0, 850.0, 800.0], 1.0 / np.arange(1.0, 98.0) ** 0.8])
    converged = np.ones(100, bool)
    converged[60] = False  # the fit ends before it
    figure = rank_plot({"H": spectrum(values, converged)})
    (axes,) = figure.axes
    fit = fit_power_law(values[:60])
    line, cutoff = axes.lines
    np.testing.assert_allclose(line.get_ydata()[-1], fit.cutoff)
    slope, _ = np.polyfit(np.log(line.get_xdata()), np.log(line.get_ydata()), 1)
    assert slope == pytest.approx(-fit.slope)
    assert cutoff.get_ydata()[0] == fit.cutoff == values[59]
    rings, filled, hollow = axes.collections
    assert [len(points.get_offsets()) for points in (rings, filled, hollow)] == [3, 99, 1]
    np.testing.assert_array_equal(rings.get_offsets()[:, 1], values[:3])
    np.testing.assert_array_equal(hollow.get_offsets()[:, 0], [61])
    (legend,) = figure.legends
    (text,) = [entry.get_text() for entry in legend.get_texts()]
    word = "power law" if fit.ks_distance < fit.critical_value else "no power law"
    assert f"{fit.ks_distance:.3f}" in text
    assert f"{fit.critical_value:.3f}, {word}, 3 outliers" in text


def test_the_gaps_are_drawn_both_ways() -> None:
    figure = eigengap_plot(VALUES)
    left, right = figure.axes
    gaps = -np.diff(VALUES)
    np.testing.assert_allclose(left.collections[0].get_offsets()[:, 1], gaps)
    np.testing.assert_allclose(right.collections[0].get_offsets()[:, 1], np.sort(gaps)[::-1])
    found = eigengaps(VALUES)
    (line,) = left.lines
    expected = stats.linregress(np.log(line.get_xdata()), np.log(line.get_ydata()))
    assert expected.slope == pytest.approx(-found.rank_slope)
    assert f"{found.rank_slope:.2f}" in left.get_legend().get_texts()[0].get_text()
    assert f"{found.fit.ks_distance:.3f}" in right.get_legend().get_texts()[0].get_text()


def test_gaps_and_bounds_stand_beside_those_of_the_law() -> None:
    """The closed forms of HPL eq. 7 and 11 to 14, written out."""
    left, right = eigengap_theory_plot(VALUES).axes
    fit = fit_power_law(VALUES)
    s, k = fit.slope, np.arange(1.0, len(VALUES))
    first = VALUES[-1] * len(VALUES) ** s
    gaps = -np.diff(VALUES)
    np.testing.assert_allclose(left.collections[0].get_offsets()[:, 1], gaps)
    from_values, of_law, approximate = (line.get_ydata() for line in left.lines)
    np.testing.assert_allclose(from_values, VALUES[:-1] * (1 - (k / (k + 1)) ** s), rtol=1e-9)
    np.testing.assert_allclose(of_law, first * (k**-s - (k + 1) ** -s), rtol=1e-9)
    np.testing.assert_allclose(approximate, first * (k + 1) ** -(s + 1), rtol=1e-9)
    measured = right.collections[0].get_offsets()[:, 1]
    assert measured[0] == pytest.approx(2 / gaps[0])
    np.testing.assert_allclose(measured[1:], 2 / np.minimum(gaps[1:], gaps[:-1]))
    np.testing.assert_allclose(right.lines[0].get_ydata(), 2 * (k + 1) ** (s + 1) / first)


def test_bounds_rest_on_gaps_that_are_known_on_both_sides() -> None:
    residuals = np.full(len(VALUES), 1e-12)
    residuals[10] = VALUES[0]
    left, right = eigengap_theory_plot(VALUES, residuals).axes
    unknown = {10, 11}  # ranks whose gap below is one of eigenvalue 11
    ranks = set(range(1, len(VALUES)))
    assert set(left.collections[0].get_offsets()[:, 0]) == ranks - unknown
    assert set(right.collections[0].get_offsets()[:, 0]) == ranks - unknown - {12}


def test_the_distance_by_cutoff_is_that_of_every_fit() -> None:
    (axes,) = cutoff_plot(VALUES).axes
    distances, critical, best, whole = axes.lines
    for k, distance in zip(*distances.get_data(), strict=True):
        assert distance == pytest.approx(fit_power_law(VALUES, int(k)).ks_distance)
    np.testing.assert_allclose(critical.get_ydata(), 1.36 / np.sqrt(critical.get_xdata()))
    assert whole.get_xdata()[0] == 120
    later = distances.get_xdata() >= 10
    assert best.get_ydata()[0] <= np.min(distances.get_ydata()[later]) + 1e-12


def test_the_emergence_runs_from_dark_to_light() -> None:
    spectra = [(10 * i, VALUES / i) for i in range(1, 201)]
    axes = emergence_plot(spectra).axes[0]
    assert len(axes.lines) == 60
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), spectra[0][1])
    np.testing.assert_array_equal(axes.lines[-1].get_ydata(), spectra[-1][1])
    lightness = [np.dot(line.get_color()[:3], (0.2126, 0.7152, 0.0722)) for line in axes.lines]
    assert np.all(np.diff(lightness) > -1e-3)
    assert lightness[-1] > lightness[0] + 0.4


def test_the_density_of_the_leading_eigenvalues_is_normalised() -> None:
    axes = spectral_density_plot(VALUES).axes[0]
    (line,) = axes.lines
    mass = np.trapezoid(line.get_ydata() * line.get_xdata(), np.log(line.get_xdata()))
    assert mass == pytest.approx(1, abs=0.1)  # a few bins of a curve, up to the largest value
    heights = axes.collections[0].get_offsets()
    ratio = heights[:, 1] / np.interp(heights[:, 0], line.get_xdata(), line.get_ydata())
    assert np.median(ratio) == pytest.approx(1, abs=0.35)


def test_the_scatter_says_r_interval_and_n() -> None:
    rows = history()
    figure = scatter_plot(rows, ["d_ks", "s_hat", "absent"], "val_loss")
    assert len(figure.axes) == 2
    for axes, name in zip(figure.axes, ["d_ks", "s_hat"], strict=True):
        x, y = ([row[key] for row in rows] for key in (name, "val_loss"))
        np.testing.assert_allclose(axes.collections[0].get_offsets(), np.stack([x, y], 1))
        expected = stats.pearsonr(x, y)
        low, high = expected.confidence_interval()
        steps = stats.pearsonr(np.diff(x), np.diff(y))[0]
        ranks = stats.spearmanr(x, y)[0]
        assert axes.get_title() == (
            f"r = {expected[0]:.2f} [{low:.2f}, {high:.2f}], n = 9\n"
            f"r of differences {steps:.2f}, ranks {ranks:.2f}"
        )
        assert axes.get_xscale() == ("log" if max(x) > 20 * min(x) else "linear")
    assert "4 points" in scatter_plot(rows[:3], ["d_ks"], "val_loss").axes[0].get_title()


def test_what_cannot_be_drawn_says_why() -> None:
    with pytest.raises(ValueError, match="no positive eigenvalue"):
        rank_plot({"H": spectrum(-VALUES[::-1])})
    with pytest.raises(ValueError, match="no spectrum with positive"):
        emergence_plot([])
    with pytest.raises(ValueError, match="No measurement has"):
        scatter_plot(history(), ["d_ks"], "accuracy")
    with pytest.raises(ValueError, match="no density"):
        spectral_density_plot(np.array([]))


# As files -------------------------------------------------------------------------------------


def test_a_figure_becomes_png_svg_and_pdf() -> None:
    def figure() -> Any:
        return rank_plot({"H": spectrum()})

    png = render(figure())
    assert png == render(figure()), "the same figure is the same picture"
    image = Image.open(io.BytesIO(png))
    assert image.size == (704, 528)
    assert len(png) < 40_000
    found = {colour for _, colour in image.convert("RGB").getcolors(100_000)}
    blue = tuple(bytes.fromhex(COLOURS[0][1:]))
    assert min(np.abs(np.subtract(colour, blue)).max() for colour in found) < 12
    svg = ET.fromstring(render(figure(), "svg"))
    assert svg.tag.endswith("svg")
    assert not [node for node in svg.iter() if node.tag.endswith("image")], "pixels in a vector"
    assert render(figure(), "pdf").startswith(b"%PDF")


def test_colours_are_told_apart_by_colour_blind_readers() -> None:
    """By the simulation of deuteranopia of Vienot, Brettel and Mollon (1999), in linear RGB."""
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLOURS]) ** 2.2
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714],
                       [0.0299566, 0.184309, 1.46709]])  # fmt: skip
    lms = rgb @ to_lms.T
    lms[:, 1] = 0.494207 * lms[:, 0] + 1.24827 * lms[:, 2]
    seen = np.clip(lms @ np.linalg.inv(to_lms).T, 0, 1) ** (1 / 2.2)
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert distances[np.triu_indices(len(COLOURS), 1)].min() > 0.1


def test_global_state_is_left_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams), matplotlib.get_backend()
    generators = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for kind in ("png", "svg", "pdf"):
        render(rank_plot({"H": spectrum()}), kind)
        render(scatter_plot(history(), ["d_ks"], "val_loss"), kind)
        render(spectral_density_plot(VALUES, densities()), kind)
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == before
    assert random.getstate() == generators[0]
    np.testing.assert_array_equal(np.random.get_state()[1], generators[1])
    assert torch.equal(torch.get_rng_state(), generators[2])


def test_pyplot_knows_of_no_figure() -> None:
    from matplotlib import pyplot

    open_before = pyplot.get_fignums()
    figure = eigengap_plot(VALUES)
    render(figure)
    assert pyplot.get_fignums() == open_before


def test_a_spectrum_that_was_measured() -> None:
    given = problem("convolution")
    found = hessian_spectrum(given.module, given.loss_fn, given.batches, num_eigenvalues=12)
    png = render(rank_plot({"Hessian": found}))
    assert re.match(rb"\x89PNG", png)


@pytest.mark.parametrize(("low", "high"), [(0.46, 0.78), (2.8, 3.3), (900.0, 20_000.0)])
def test_every_logarithmic_axis_has_numbers_that_can_be_read(low: float, high: float) -> None:
    figure, axes = new_figure(3.0, 3.0)
    axes.plot([1, 2], [low, high])
    axes.set_yscale("log")
    few_ticks(axes)
    figure.canvas.draw()
    bottom, top = axes.get_ylim()
    seen = [t.get_text() for t in axes.get_yticklabels() if bottom <= t.get_position()[1] <= top]
    assert 2 <= len(seen) <= 8
    assert all(re.fullmatch(r"\d+(\.\d+)?", text) for text in seen)
