"""Records show themselves: lines, pictures, tables, in notebooks and without what is not there."""

from __future__ import annotations

import base64
import dataclasses
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image
from support.references import problem

import lightning_hessian
from lightning_hessian import (
    block_structure,
    correlation_report,
    fit_power_law,
    gradient_structure,
    hessian_spectrum,
)
from lightning_hessian.histories.run_table import RunRecord, RunTable

matplotlib.use("agg")

MOST_LINES, MOST_WIDE = 9, 140


def _table(name: str = "run {}") -> RunTable:
    rng = np.random.default_rng(0)
    runs = []
    for i in range(5):
        loss = 1 / np.arange(1, 13) + 0.1 * i + 0.01 * rng.random(12)
        series = {"val_loss": loss, "hessian/trace": 100 * loss, "hessian/d_ks": rng.random(12)}
        runs.append(
            RunRecord(str(i), name.format(i), "here", "csv", {"lr": i}, np.arange(12.0), series)
        )
    return RunTable(tuple(runs))


def _made(kind: str) -> Any:
    given = problem("convolution")
    measured = (given.module, given.loss_fn, given.batches)
    if kind == "spectrum":
        return hessian_spectrum(*measured, num_eigenvalues=12)
    if kind == "fit":
        return fit_power_law(np.random.default_rng(1).pareto(1.0, 60) + 1, alternatives=True)
    if kind == "blocks":
        return block_structure(*measured, densities=True)
    if kind == "gradients":
        return gradient_structure(*measured, batch_size=4, num_gradients=20)
    return _table() if kind == "runs" else correlation_report(_table())


KINDS = ("spectrum", "fit", "blocks", "gradients", "runs", "report")


@pytest.fixture(scope="module")
def made() -> Callable[[str], Any]:
    found: dict[str, Any] = {}
    return lambda kind: (
        found.setdefault(kind, None) or found.update({kind: _made(kind)}) or found[kind]
    )


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += f"{data}\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_repr_is_a_few_lines_and_a_summary_says_more(made: Any, kind: str) -> None:
    record = made(kind)
    lines = repr(record).splitlines()
    assert 3 <= len(lines) <= MOST_LINES
    assert all(len(line) <= MOST_WIDE for line in lines)
    assert not re.search(r"\bnan\b|array\(|object at", repr(record))
    told = record.summary().splitlines()
    assert len(told) > len(lines) or kind == "report"
    assert told[0] == lines[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_shows_the_same_lines_and_a_picture(made: Any, kind: str) -> None:
    record = made(kind)
    page = _Page(record._repr_html_())
    lines = repr(record).splitlines()
    assert lines[0] in page.words
    for line in lines[1:]:
        name, text = re.split(r"\s{2,}", line.strip(), maxsplit=1)
        assert name in page.words
        assert text in page.words
    (picture,) = [found["src"] for tag, found in page.tags if tag == "img"]
    kept = base64.b64decode(str(picture).removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(kept))
    assert 300 <= image.width <= 500
    assert len(set(image.convert("L").tobytes())) > 10, "the picture is empty"
    assert len(record._repr_html_()) < 60_000


@pytest.mark.parametrize("kind", KINDS)
def test_plot_draws_where_it_is_told_to_and_else_on_a_figure_of_pyplot(
    made: Any, kind: str
) -> None:
    pyplot.close("all")
    axes = Figure().subplots()
    assert made(kind).plot(axes) is axes
    assert pyplot.get_fignums() == []
    assert axes.lines or axes.collections or axes.images
    assert axes.get_xlabel() or axes.images
    own = made(kind).plot()
    assert pyplot.figure(pyplot.get_fignums()[0]) is own.figure
    pyplot.close("all")


def test_a_spectrum_says_and_draws_its_numbers(made: Any) -> None:
    record = made("spectrum")
    text = repr(record)
    assert f"lambda_1 = {record.eigenvalues[0]:.5g}" in text
    assert f"trace       {record.trace:.4g} ± " in re.sub(r"(trace)\s+", r"\1       ", text)
    assert "12, all converged" in text
    fit = fit_power_law(record.leading)
    assert f"d_ks = {fit.ks_distance:.3f}" in text
    (points,) = [
        c for c in record.plot(Figure().subplots()).collections if len(c.get_offsets()) == 12
    ]
    np.testing.assert_allclose(np.asarray(points.get_offsets())[:, 1], record.eigenvalues)


def test_what_has_not_converged_is_told(made: Any) -> None:
    record = dataclasses.replace(
        made("spectrum"), converged=np.arange(12) < 7, trace=None, trace_std_error=None
    )
    assert "12, 7 of them converged" in repr(record)
    assert re.search(r"trace\s+not measured", repr(record))


def test_the_band_of_a_fit_is_what_keeps_within_the_critical_distance(made: Any) -> None:
    """At the lower edge the share of larger values of the fitted law is d_c below the line's."""
    fit = made("fit")
    axes = fit.plot(Figure().subplots())
    (band,) = axes.collections
    edge = band.get_paths()[0].vertices
    rank, half = 30, fit.num_values // 2
    assert half == rank
    values = np.sort(edge[np.isclose(edge[:, 0], rank)][:, 1])
    shares = (values / fit.cutoff) ** (-1 / fit.slope)  # P(X > x) of the law
    expected = [rank / 60 + fit.critical_value, rank / 60 - fit.critical_value]
    np.testing.assert_allclose(shares[[0, -1]], expected)


def test_values_can_be_drawn_over_their_fit(made: Any) -> None:
    values = np.random.default_rng(1).pareto(1.0, 60) + 1
    axes = made("fit").plot(Figure().subplots(), values=values)
    np.testing.assert_allclose(
        np.asarray(axes.collections[-1].get_offsets())[:, 1], np.sort(values)[::-1]
    )


def test_nothing_to_draw_leaves_no_empty_figure(made: Any) -> None:
    record = dataclasses.replace(made("spectrum"), eigenvalues=-np.ones(12))
    pyplot.close("all")
    with pytest.raises(ValueError, match="no positive eigenvalue"):
        record.plot()
    assert pyplot.get_fignums() == []
    assert "<img" not in record._repr_html_()
    assert "none fitted" in repr(record)


def test_a_record_that_cannot_be_told_still_has_a_repr(made: Any) -> None:
    record = dataclasses.replace(made("spectrum"), eigenvalues=None)
    assert repr(record).startswith("<HessianSpectrum: TypeError")
    assert _Page(record._repr_html_()).words.startswith("<HessianSpectrum: TypeError")


def test_names_from_outside_are_escaped_and_drawn() -> None:
    table = _table("<script>{}</script> $\\frac $ \x1b[2J")
    page = _Page(table._repr_html_())
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>0</script>" in page.words
    assert "\x1b" not in page.words + repr(table) + table.summary()
    report = correlation_report(table)
    assert [tag for tag, _ in _Page(report._repr_html_()).tags].count("img") == 1


def test_a_run_table_draws_the_metric_that_is_asked_for() -> None:
    axes = _table().plot(Figure().subplots(), key="hessian/trace")
    assert axes.get_ylabel() == "hessian/trace"
    np.testing.assert_allclose(axes.lines[2].get_ydata(), _table().runs[2].series("hessian/trace"))
    with pytest.raises(ValueError, match="hessian/trace"):
        _table().plot(Figure().subplots(), key="hessian/trase")
    with pytest.raises(ValueError, match="nothing to draw"):
        RunTable(()).plot(Figure().subplots())
    assert repr(RunTable(())).startswith("Table of 0 runs")


def test_records_travel_as_before(made: Any) -> None:
    fit = made("fit")
    assert pickle.loads(pickle.dumps(fit)) == fit
    assert hash(fit) == hash(dataclasses.replace(fit))


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_holds_the_numbers(made: Any, kind: str) -> None:
    pandas = pytest.importorskip("pandas")
    record = made(kind)
    frame = record.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    if kind == "spectrum":
        np.testing.assert_array_equal(frame["eigenvalue"], record.eigenvalues)
        assert frame["converged"].all()
    elif kind == "fit":
        assert frame["slope"].item() == record.slope
        assert frame["lognormal_ratio"].item() == record.alternatives[0].log_likelihood_ratio
    elif kind == "blocks":
        names = list(record.names)
        square = frame.pivot(index="row", columns="column", values="frobenius")
        np.testing.assert_array_equal(square.loc[names, names], record.frobenius)
    elif kind == "gradients":
        np.testing.assert_array_equal(frame["covariance"].dropna(), record.covariance)
    elif kind == "runs":
        assert list(frame["val_loss"]) == [row["val_loss"] for row in record.rows()]
        assert set(frame["config.lr"]) == {0, 1, 2, 3, 4}
    else:
        assert len(frame) == len(record.across) + len(record.within)
        assert frame["r"][0] == record.across[0].r


def test_without_pandas_the_error_says_what_to_install(made: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"PowerLawFit.to_pandas\(\) needs pandas.*pip install"):
        made("fit").to_pandas()


def test_a_repr_imports_no_matplotlib() -> None:
    code = (
        "import sys; from lightning_hessian import fit_power_law; "
        "text = repr(fit_power_law([16.0, 8.0, 4.0, 2.0, 1.0])); "
        "print('matplotlib' in sys.modules, 'torch' in sys.modules, text.splitlines()[0])"
    )
    root = Path(lightning_hessian.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False False Power law fitted to the 5 largest values"
