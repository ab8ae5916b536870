"""The figures of the papers' pages: what they draw, their size, and that the pages link them."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from lightning_hessian import fit_power_law

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "papers"))  # last: the modules there have plain names

charts, fits, hpl, made, pages, rows, sg = map(
    importlib.import_module, ("charts", "fits", "hpl", "made", "pages", "rows", "sg")
)
DOCS = ROOT / "docs" / "papers"
MOST_BYTES = 60_000


def _write(folder, row, seed, numbers):
    about = {"test_loss": 0.1 * (1 + len(row.id) % 5)}
    content = {"seed": seed, "settings": f"seed{seed}", "about": about,
               "numbers": dict.fromkeys(made.PROTOCOLS[row.paper], numbers)}  # fmt: skip
    (folder / row.id).mkdir(exist_ok=True)
    (folder / row.id / f"seed{seed}.json").write_text(json.dumps(content))
    return numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results for every row there is, of nine samples of a power law, two seeds for some rows."""
    folder = tmp_path_factory.mktemp("results")
    rng, found = np.random.default_rng(0), {}
    laws = [fits._law((rng.pareto(1.1, 1200) + 1) * 1e-3, 1000) for _ in range(9)]
    for i, row in enumerate((*hpl.ROWS, *sg.ROWS)):
        for seed in range(2 if "epoch" in row.id else 1):
            numbers = {**laws[(i + 4 * seed) % 9], "rate": 0.7, "gaussian_rate": 0.2}
            numbers["lambda_1"] = numbers["spectrum"]["values"][0]
            found.setdefault(row.id, []).append(_write(folder, row, seed, numbers))
    read = {"hpl": made.read(hpl.ROWS, folder), "sg": made.read(sg.ROWS, folder)}
    return read, found


def test_every_figure_can_be_drawn_and_is_small(whole):
    drawn = charts.pictures(whole[0])
    assert list(drawn) == [f"{chart.name}.png" for chart in charts.CHARTS]
    assert len(set(drawn)) == len(charts.CHARTS)
    for name, content in drawn.items():
        assert 2000 < len(content) < MOST_BYTES, name
    for paper, of_paper in whole[0].items():
        assert charts.sorted_out(paper, of_paper)[1] == []


def _chart(name, read):
    chart = next(chart for chart in charts.CHARTS if chart.name == name)
    chosen = chart.chosen(read[name.split("-")[0]])
    return chart, chosen, chart.draw(chart, chosen)


def test_distances_are_the_printed_ones_and_the_mean_of_the_seeds(whole):
    read, found = whole
    _, _, figure = _chart("hpl-epochs", read)
    (axes,) = figure.axes
    named = {container.get_label(): container.lines[0] for container in axes.containers}
    converged, pooled = named["converged"], named["pooled"]
    lines = {line.get_label(): line for line in axes.lines}
    printed, critical = lines["printed"], lines["$d_c$"]
    epochs = [1, 2, 3, 10, 20, 30, 50]
    assert list(printed.get_xdata()) == epochs
    assert list(printed.get_ydata()) == [0.0321, 0.0298, 0.0354, 0.0291, 0.0268, 0.0068, 0.009]
    names = [f"hpl-7-mnist-epoch{epoch}" for epoch in epochs[:-1]] + ["hpl-7-mnist-sgd"]
    expected = [np.mean([numbers["d_ks"] for numbers in found[name]]) for name in names]
    np.testing.assert_allclose(np.asarray(converged.get_ydata(), float), expected)
    np.testing.assert_allclose(np.asarray(pooled.get_ydata(), float), expected)
    assert list(critical.get_ydata()) == [0.043, 0.043]


def test_spectra_keep_the_law_that_they_were_drawn_from(whole):
    read, _ = whole
    _, chosen, figure = _chart("hpl-spectra-widths", read)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert len(axes.lines) == len(chosen) == 6
    for line, one in zip(axes.lines, chosen, strict=True):
        numbers = one.first("converged")
        ranks, values = line.get_xdata(), line.get_ydata()
        assert 40 <= len(ranks) <= fits.MOST_RANKS
        assert (ranks[0], ranks[-1]) == (1, 1000)
        slope = np.polyfit(np.log(ranks[-30:]), np.log(values[-30:]), 1)[0]
        assert -slope == pytest.approx(numbers["s"], rel=0.15)


def test_thinned_values_are_those_at_their_ranks():
    values = np.sort(np.random.default_rng(1).pareto(1.0, 500) + 1)[::-1]
    found = fits._law(values, 400)
    at = np.array(found["spectrum"]["ranks"]) - 1
    np.testing.assert_array_equal(found["spectrum"]["values"], values[at])
    assert found["d_ks"] == fit_power_law(values, 400).ks_distance


def test_squares_are_coloured_by_what_agrees(whole):
    read, _ = whole
    _, chosen, figure = _chart("sg-verdicts", read)
    (axes,) = figure.axes
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    found = [made.verdict(one, "gradients") for one in chosen]
    assert f"same ({found.count(True)})" in labels
    assert f"other ({found.count(False)})" in labels
    squares = [points for points in axes.collections if len(points.get_offsets())]
    assert len(squares) == len(chosen) == len(sg.ROWS)


def test_slopes_stand_beside_the_printed_ones(whole):
    read, _ = whole
    _, chosen, figure = _chart("sg-slopes", read)
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [float(one.row.printed.s) for one in chosen]
    assert list(line.get_ydata()) == [one.first("gradients")["s"] for one in chosen]


def test_optimizers_are_the_points_of_sharpness_over_slope(whole):
    read, found = whole
    _, chosen, figure = _chart("hpl-sharpness-cifar10", read)
    ids = [one.row.id for one in chosen]
    assert len(ids) == 11
    assert "hpl-8-cifar10-random" not in ids
    left, right = figure.axes
    points = [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in left.lines]
    slopes = [found[name][0]["s"] for name in ids]
    sharpness = [found[name][0]["lambda_1"] for name in ids]
    assert points == list(zip(slopes, sharpness, strict=True))
    losses = [one.own[0]["about"]["test_loss"] for one in chosen]
    assert [float(p.get_ydata()[0]) for p in right.lines] == losses
    for axes, values in ((left, sharpness), (right, losses)):
        expected = scipy.stats.pearsonr(slopes, values)
        low, high = expected.confidence_interval()
        assert axes.get_title().startswith(
            f"Pearson {expected.statistic:.2f} ({low:.2f} to {high:.2f})"
        )


def test_an_optimizer_has_a_mark_of_its_own_hollow_where_the_law_is_rejected(whole):
    read, found = whole
    _, chosen, figure = _chart("hpl-sharpness-mnist", read)
    points = figure.axes[0].lines
    names = [point.get_label() for point in points]
    assert [text.get_text() for text in figure.legends[0].texts] == names
    assert names[:2] == ["SGD", "Vanilla SGD"]
    assert len({(p.get_marker(), p.get_color()) for p in points}) == len(points) == 11
    assert [p.get_fillstyle() == "full" for p in points] == [
        found[one.row.id][0]["power_law"] for one in chosen
    ]


@pytest.mark.parametrize(("accuracy", "is_drawn"), [(0.19, False), (0.21, True)])
def test_a_network_at_chance_is_no_point_of_sharpness(whole, accuracy, is_drawn):
    read, _ = whole
    chart = next(chart for chart in charts.CHARTS if chart.name == "hpl-sharpness-cifar10")
    one = next(one for one in read["hpl"] if one.row.id == "hpl-8-cifar10-vanilla-sgd")
    about = {**one.own[0]["about"], "test_accuracy": accuracy}
    one = replace(one, own=({**one.own[0], "about": about},))
    assert (one in chart.chosen([one])) is is_drawn


def test_figures_without_results_are_left_out_by_name(tmp_path):
    nothing = made.read(hpl.ROWS, tmp_path)
    drawn, left = charts.sorted_out("hpl", nothing)
    assert drawn == []
    text = pages.page("hpl", nothing)
    assert "Not drawn yet" in text
    assert all(chart.title in text for chart in left)
    assert ".png" not in text


def test_the_pages_link_the_figures_that_are_there():
    linked = set()
    for page in DOCS.glob("*.md"):
        linked |= set(re.findall(r"\]\(([\w-]+\.png)\)", page.read_text()))
    there = {path.name: path.stat().st_size for path in DOCS.glob("*.png")}
    assert linked == set(there), "run examples/papers/pages.py"
    assert all(size < MOST_BYTES for size in there.values())
