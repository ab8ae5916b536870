"""The first screen of a report: one sentence, one figure, one ranked table, wide and narrow."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from lightning_hessian import correlation_report
from lightning_hessian.histories.run_table import RunRecord, RunTable
from lightning_hessian.reports import figures, glance
from lightning_hessian.reports.compose import compose
from lightning_hessian.reports.document import Heading, Table, Text, to_html
from lightning_hessian.reports.figures import Drawing

RNG = np.random.default_rng(3)


def run(name: str, **columns: Any) -> RunRecord:
    series = {key.replace("__", "/"): np.asarray(v, dtype=float) for key, v in columns.items()}
    steps = np.arange(len(next(iter(series.values()))), dtype=float)
    return RunRecord(name, name, name, "csv", {}, steps, series)


def many(related: bool = True) -> RunTable:
    """Return twelve runs, whose loss follows the trace or nothing."""
    runs = []
    for i in range(12):
        end = i if related else RNG.permutation(12)[0]
        runs.append(
            run(
                f"run {i}",
                val_loss=1 + 0.1 * end + 0.01 * RNG.normal(size=6),
                hessian__trace=10.0 ** (i / 4) * (1 + 0.01 * RNG.normal(size=6)),
                hessian__d_ks=RNG.random(6),
            )
        )
    return RunTable(tuple(runs))


def one(kind: str, length: int = 40) -> RunTable:
    """Return a run in which two series move together, drift together, or are short."""
    falling = np.linspace(3, 1, length)
    noise = 0.05 * RNG.normal(size=(2, length))
    loss = falling + noise[0]
    trace = falling + noise[0 if kind == "together" else 1]
    return RunTable((run("run", val_loss=loss, hessian__trace=trace),))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (many(), r"Over 12 runs, those with a higher hessian/trace ended with a higher val_loss\."),
        (many(related=False), r"Over 12 runs, nothing measured here is shown to go with val_loss"),
        (one("together"), r"In this run, when hessian/trace rose .* val_loss mostly rose too\."),
        (one("drift"), r"nothing measured here .*: curves that all change as training goes on"),
        (one("together", 5), r"nothing measured .*: there are too few measurements to tell\."),
        (one("together", 3), r"There are too few measurements to say what goes with val_loss\."),
    ],
    ids=["runs", "chance", "together", "drift", "short", "shorter"],
)
def test_the_sentence_says_what_the_numbers_show(table: RunTable, words: str) -> None:
    report = correlation_report(table, monitor="val_loss")
    said = glance.sentence(report)
    assert re.search(words, said), said
    assert said.count(".") == 1
    assert len(said) < 200
    assert not re.search(r"Pearson|correlat|\br\b|p-value|coefficient", said)


def test_the_sentence_is_not_about_a_loss_where_something_else_is_shown() -> None:
    runs = [
        dataclasses.replace(one, columns={**one.columns, "hessian/loss": one.series("val_loss")})
        for one in many()
    ]
    report = correlation_report(RunTable(tuple(runs)), monitor="val_loss")
    assert glance.glances(report)[0].statistic == "hessian/loss"  # the table keeps its order
    words = "those with a higher hessian/trace ended with a higher val_loss, and 1 more pair"
    assert words in glance.sentence(report)


def test_the_first_screen_is_a_sentence_a_figure_and_a_ranked_table() -> None:
    report = correlation_report(many(), monitor="val_loss")
    blocks = compose(report).blocks
    assert [type(block) for block in blocks[:4]] == [Text, Drawing, Table, Heading]
    table = blocks[2]
    assert isinstance(table, Table)
    assert len(table.rows) <= glance.MOST_ROWS
    assert "hessian/trace" in table.rows[0][0]
    assert table.rows[0][-1] == "higher with higher"
    x = [found.series("hessian/trace")[-1] for found in report.table]
    y = [found.series("val_loss")[-1] for found in report.table]
    column = table.header.index("Spearman")
    assert table.rows[0][column] == f"{stats.spearmanr(x, y)[0]:.2f}"
    assert table.rows[0][table.header.index("r")] == f"{stats.pearsonr(x, y)[0]:.2f}"


def test_the_figure_draws_the_numbers_of_the_table() -> None:
    report = correlation_report(many(), monitor="val_loss")
    pairs = glance.glances(report)
    axes = report.plot(Figure().subplots())
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    bars = [line for line in axes.lines if line.get_marker() == "|"]
    np.testing.assert_allclose([line.get_xdata()[0] for line in dots], [p.r for p in pairs])
    np.testing.assert_allclose([line.get_xdata()[0] for line in bars], [p.spearman for p in pairs])
    assert [text.get_text() for text in axes.get_yticklabels()] == [p.statistic for p in pairs]
    assert [p.shown for p in pairs] == [True, False]


def test_an_axis_is_logarithmic_where_values_span_decades(monkeypatch: Any) -> None:
    report = correlation_report(many(), monitor="val_loss")
    drawn: list[Any] = []
    kept = figures._drawing
    monkeypatch.setattr(
        figures, "_drawing", lambda figure, *a: drawn.append(figure) or kept(figure, *a)
    )
    assert report.points is not None
    figures.across_figure(report.points, ["hessian/trace", "hessian/d_ks"], "val_loss", None)
    trace, d_ks = [axes for axes in drawn[0].axes if axes.get_visible()][:2]
    assert trace.get_xscale() == "log"
    assert trace.get_yscale() == "linear"
    assert d_ks.get_yscale() == "linear"


def test_a_run_too_short_for_lead_and_lag_has_no_empty_boxes() -> None:
    for length, panels in ((6, 1), (40, 2)):
        report = correlation_report(one("together", length), monitor="val_loss")
        (pair,) = report.within
        assert (pair.lead is not None) == (panels == 2)
        svg = figures.run_figure(report.table.runs[0], [pair], "val_loss")
        assert ("which it leads" in svg.svg) == (panels == 2)
        assert ("moved along the other" in svg.caption) == (panels == 2)
        assert "too few" not in svg.svg


def test_narrow_screens_keep_the_verdict_in_sight() -> None:
    """The last column stays at the right edge while the numbers are moved under it."""
    page = to_html(compose(correlation_report(many(), monitor="val_loss")))
    narrow = page[page.index("@media (max-width: 40rem)") : page.index("@media print")]
    assert re.search(r"\.words:last-child \{ position: sticky; right: 0;", narrow)
    cells = re.findall(r'<td class="(\w+)">(?:(?!</td>).)*</td></tr>', page.replace("\n", ""))
    assert cells[0] == "words"
