"""Reports: every number against SciPy on the same rows, the words, and the files parsed back."""

from __future__ import annotations

import csv
import json
import math
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats
from support.report_runs import logged, record

from lightning_hessian import correlation_report, write_report
from lightning_hessian.histories.parallel import Progress
from lightning_hessian.histories.run_table import RunRecord, RunTable
from lightning_hessian.reports.within import within_runs

STATISTICS = ("hessian/d_ks", "hessian/lambda_1")


@pytest.fixture(scope="module")
def table() -> RunTable:
    """Twelve runs; across them the loss follows lambda_1 and not d_ks."""
    runs = []
    for seed in range(12):
        rows = logged(seed, 30)
        series = {key: np.array([row[key] for row in rows]) for key in ("val_loss", *STATISTICS)}
        series["val_loss"] = series["val_loss"] + series["hessian/lambda_1"][-1] / 4
        series["hessian/d_ks"][3] = np.nan
        series["hessian/constant"] = np.full(30, 0.5)
        config = {"optimizer": ("sgd", "adam", "lion")[seed % 3], "size": 10 ** (1 + seed // 3)}
        steps = np.array([row["trainer/global_step"] for row in rows], dtype=float)
        runs.append(RunRecord(f"r{seed}", f"run {seed}", "here", "csv", config, steps, series))
    return RunTable(tuple(runs))


@pytest.fixture(scope="module")
def report(table):
    statistics = [*STATISTICS, "hessian/constant"]
    return correlation_report(table, statistics=statistics, group="optimizer", size="size")


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(report, folder)
    return folder


def test_every_coefficient_within_runs_is_scipys(table, report):
    checked = 0
    for pair in report.within:
        if pair.statistic == "hessian/constant":
            continue
        run = next(run for run in table if run.name == pair.run)
        x, y = run.series(pair.statistic), run.series(pair.monitor)
        rows = np.isfinite(x) & np.isfinite(y)
        x, y, step = x[rows], y[rows], run.steps[rows]
        assert pair.num_points == len(x) == (29 if pair.statistic == "hessian/d_ks" else 30)
        assert pair.r == pytest.approx(stats.pearsonr(x, y)[0])
        ends = stats.pearsonr(x, y).confidence_interval()
        assert pair.fisher == pytest.approx((ends.low, ends.high))
        assert pair.spearman == pytest.approx(stats.spearmanr(x, y)[0])
        assert pair.kendall == pytest.approx(stats.kendalltau(x, y)[0])
        assert pair.r_differences == pytest.approx(stats.pearsonr(np.diff(x), np.diff(y))[0])
        left = [s - stats.linregress(step, s).slope * step for s in (x, y)]
        assert pair.partial == pytest.approx(stats.pearsonr(*left)[0])
        dx, dy = np.diff(x), np.diff(y)
        at_lag = dict(zip(pair.lead.lags, pair.lead.coefficients, strict=True))
        assert at_lag[1] == pytest.approx(stats.pearsonr(dx[:-1], dy[1:])[0])
        assert at_lag[-2] == pytest.approx(stats.pearsonr(dx[2:], dy[:-2])[0])
        if pair.run in ("run 0", "run 5"):
            assert pair.shift_p == pytest.approx(rolled_p(x, y))
            assert pair.differences_shift_p == pytest.approx(rolled_p(dx, dy))
        checked += 1
    assert checked == 24


def rolled_p(x, y) -> float:
    r = [abs(stats.pearsonr(x, np.roll(y, shift))[0]) for shift in range(len(x))]
    return float(np.mean(np.array(r) >= r[0] - 1e-12))


def test_every_coefficient_across_runs_is_scipys(table, report):
    y = np.array([run.series("val_loss")[-1] for run in table])
    labels = np.array([run.config["optimizer"] for run in table])
    assert report.points.steps.tolist() == [300.0] * 12
    for pair in report.across:
        x = np.array([run.series(pair.statistic)[-1] for run in table])
        if pair.statistic == "hessian/constant":
            assert math.isnan(pair.r)
            assert "the first series is constant" in pair.reason
            assert "difference" not in pair.reason
            continue
        found = stats.pearsonr(x, y)
        assert pair.r == pytest.approx(found[0])
        assert pair.fisher == pytest.approx(tuple(found.confidence_interval()))
        assert pair.spearman == pytest.approx(stats.spearmanr(x, y)[0])
        assert pair.kendall == pytest.approx(stats.kendalltau(x, y)[0])
        method = stats.PermutationMethod(n_resamples=9999, rng=np.random.default_rng(1))
        assert pair.p_value == pytest.approx(stats.pearsonr(x, y, method=method).pvalue, abs=0.05)
        for name, (r, count) in pair.groups.items():
            mask = labels == name
            assert (r, count) == (pytest.approx(stats.pearsonr(x[mask], y[mask])[0]), 4)
        centred = [s - np.array([s[labels == label].mean() for label in labels]) for s in (x, y)]
        assert pair.r_within_groups == pytest.approx(stats.pearsonr(*centred)[0])
    assert report.across[1].r > 0.8


def test_corrections_cover_what_was_tested(report):
    p = [pair.p_value for pair in report.across if not math.isnan(pair.p_value)]
    assert len(p) == 2
    expected = stats.false_discovery_control(p)
    assert [pair.bh for pair in report.across[:2]] == pytest.approx(expected)
    for run in ("run 0", "run 7"):
        pairs = [pair for pair in report.within if pair.run == run]
        p = [pair.differences.p_value for pair in pairs[:2]]
        assert [pair.bh for pair in pairs[:2]] == pytest.approx(stats.false_discovery_control(p))
        assert math.isnan(pairs[2].holm)


def test_the_sign_test_over_runs_is_scipys(report):
    for over in report.over:
        pairs = [p for p in report.within if p.statistic == over.statistic]
        signs = [pair.r_differences > 0 for pair in pairs]
        assert over.num_positive == sum(signs)
        assert over.sign_p == pytest.approx(stats.binomtest(sum(signs), 12).pvalue)
        assert over.median_r == pytest.approx(np.median([pair.r for pair in pairs]))


def test_scaling_is_scipys_line(table, report):
    sizes = [run.config["size"] for run in table]
    for scaling in report.scaling[:2]:
        y = [run.series(scaling.quantity)[-1] for run in table]
        line = stats.linregress(np.log10(sizes), np.log10(y))
        assert scaling.fit.exponent == pytest.approx(line.slope)
        assert scaling.fit.num_sizes == 4


def test_two_independent_series_that_drift(tmp_path):
    """r is high, and the report says that first differences show nothing."""
    told = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        drift = np.linspace(3, 1, 60)
        run = record(
            f"run{seed}",
            val_loss=drift + 0.05 * rng.normal(size=60),
            hessian__d_ks=0.1 * drift + 0.005 * rng.normal(size=60),
        )
        report = correlation_report(RunTable((run,)))
        (pair,) = report.within
        assert pair.r > 0.9
        write_report(report, tmp_path)
        told += "first differences show nothing" in (tmp_path / "report.md").read_text()
        assert ("**no statistic** was shown to move" in (tmp_path / "report.md").read_text()) == (
            "first differences show nothing" in (tmp_path / "report.md").read_text()
        )
    assert told >= 8  # an interval of 95 % is allowed to err


def test_two_series_that_do_move_together():
    rng = np.random.default_rng(0)
    loss = np.linspace(3, 1, 60) + 0.2 * rng.normal(size=60)
    run = record("run", val_loss=loss, hessian__d_ks=loss + 0.05 * rng.normal(size=60))
    (pair,) = correlation_report(RunTable((run,))).within
    from lightning_hessian.reports.verdicts import judged

    words = judged(pair).sentence
    assert words.startswith("From one measurement to the next they move together, as they do over")


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (2, "No coefficient: 2 of the 4 points needed"),
        (4, "Too little to tell. First differences have no coefficient: 3 of the 4"),
        (6, "Too little to tell: an interval of first differences takes 9 measurements"),
    ],
)
def test_short_runs_say_so(count, words, tmp_path):
    rng = np.random.default_rng(count)
    run = record("run", val_loss=rng.normal(size=count), hessian__d_ks=rng.normal(size=count))
    report = correlation_report(RunTable((run,)))
    write_report(report, tmp_path)
    assert words in (tmp_path / "report.md").read_text()
    (pair,) = report.within
    assert math.isnan(pair.holm)
    assert abs(pair.r) != 1


def test_a_constant_statistic_says_so(written):
    text = (written / "report.md").read_text()
    assert "No coefficient: the first series is constant." in text


def test_the_point_of_a_run(table):
    best = correlation_report(table, statistics=STATISTICS, at="best").points
    for run, step in zip(table, best.steps, strict=True):
        usable = np.isfinite(run.series("val_loss"))
        assert step == run.steps[usable][np.argmin(run.series("val_loss")[usable])]
    worst = correlation_report(table, statistics=STATISTICS, at="best", mode="max").points
    assert worst.values["val_loss"].min() > best.values["val_loss"].min()
    early = correlation_report(table, statistics=STATISTICS, at=45).points
    assert set(early.steps) == {40.0}
    assert np.isnan(early.values["hessian/d_ks"]).all()
    none = correlation_report(table, statistics=STATISTICS, at=5).points
    assert none.names == ()
    assert len(none.left_out) == 12
    assert "no row up to step 5" in none.left_out[0]


def test_keys_that_no_run_has(table):
    for arguments, words in [
        ({"monitor": "valloss"}, "'valloss'.*nearest: val_loss"),
        ({"statistics": ["hessian/dks"]}, "'hessian/dks'.*nearest: hessian/d_ks"),
        ({"statistics": ["val_loss"]}, "is a monitor already"),
        ({"group": "optimiser"}, "'optimiser'.*in its config; nearest: optimizer"),
        ({"at": "first"}, "at='first'.*'last', 'best', or a step"),
        ({"mode": "maximum", "at": "best"}, "mode='maximum'.*'min', 'max'"),
        ({"monitor": []}, r"monitor=\[\].*logged metric"),
    ]:
        with pytest.raises(ValueError, match=words):
            correlation_report(table, **arguments)
    bare = RunTable((record("run", val_loss=[1, 2], train_loss=[3, 4]),))
    with pytest.raises(ValueError, match=r"Train with HessianSpectrumCallback.*logged: train_loss"):
        correlation_report(bare)


@pytest.mark.slow  # each of them imports torch
def test_processes_find_what_one_process_finds(table):
    one, two = (
        within_runs(table, STATISTICS, ["val_loss"], progress=Progress(False), workers=count)
        for count in (1, 2)
    )
    assert one == two


class Page(HTMLParser):
    """Collects what a page holds, and what it would load."""

    void = frozenset({"meta", "br", "hr", "img", "link", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.loaded, self.cells = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        self.loaded += [v for k, v in attrs if k in ("src", "href", "data") and v[:1] != "#"]
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for key, value in attrs if key == "src"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


def test_the_page_is_one_file_and_well_formed(written, report):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.loaded == []
    assert "url(http" not in text
    assert "@import" not in text
    assert {"script", "link", "img"}.isdisjoint(page.tags)
    assert page.tags.count("svg") == 4
    assert "currentColor" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    for pair in report.across[:2]:
        assert pair.statistic in page.cells
        assert f"{pair.r:.2f}".replace("-", "\u2212") in page.cells


def test_a_name_cannot_become_markup(tmp_path):
    rng = np.random.default_rng(0)
    name = "<script>alert(1)</script> $x$ _a_ |b| `c`"
    runs = [
        record(
            f"{name} {k}",
            {"g": f"<b>{k % 2}"},
            val_loss=rng.normal(size=5),
            hessian__d_ks=rng.normal(size=5),
        )
        for k in range(5)
    ]
    write_report(correlation_report(RunTable(tuple(runs)), group="g"), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "<b>" not in text
    assert Page(text).open == []
    rendered = rendered_markdown(tmp_path / "report.md")
    assert "<script" not in rendered
    assert "<b>" not in rendered
    assert f"{name} 4" in Page(rendered).cells


def rendered_markdown(path) -> str:
    """Returns HTML as another library makes it of the file."""
    markdown = pytest.importorskip("markdown")  # comes with TensorBoard
    return markdown.markdown(path.read_text(), extensions=["tables"])


def test_markdown_renders_as_tables_and_figures(written):
    page = Page(rendered_markdown(written / "report.md"))
    assert page.tags.count("table") == 6
    assert page.cells.count("hessian/d_ks") == 5
    for source in page.loaded:
        root = ElementTree.parse(written / source).getroot()
        assert root.tag.endswith("svg")
    assert len(page.loaded) == 4


def test_csv_and_json_hold_the_same_numbers(written, report):
    with (written / "correlations.csv").open() as file:
        lines = list(csv.DictReader(file))
    content = json.loads((written / "correlations.json").read_text())
    assert len(lines) == 3 + 36
    pairs = [*report.across, *report.within]
    told = [*content["across"], *content["within"]]
    for line, found, pair in zip(lines, told, pairs, strict=True):
        for row in (line, found):
            assert (row["statistic"], row["monitor"]) == (pair.statistic, pair.monitor)
        for key in ("r", "spearman", "kendall", "holm"):
            value = getattr(pair, key)
            if math.isnan(value):
                assert (line[key], found[key]) == ("", None)
            else:
                assert float(line[key]) == found[key] == value
        assert line["verdict"] == found["verdict"] != ""
        assert (line["reason"] != "") == math.isnan(pair.r)
    assert content["points"]["values"]["val_loss"] == list(report.points.values["val_loss"])
    assert content["runs"][3]["config"] == {"optimizer": "sgd", "size": 100}
