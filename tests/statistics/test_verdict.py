"""The verdict on a correlation: right on series whose truth is known, and everywhere the same."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_hessian.cli.digits import _print_correlations
from lightning_hessian.histories.offline_run import OfflineRun
from lightning_hessian.histories.run_table import RunRecord, RunTable, columns_of
from lightning_hessian.reports.compose import compose
from lightning_hessian.reports.document import to_html, to_markdown
from lightning_hessian.reports.live import live_page
from lightning_hessian.reports.live_runs import offline_run
from lightning_hessian.reports.numbers import write_csv
from lightning_hessian.reports.report import correlation_report
from lightning_hessian.statistics.verdict import answer, corrected, movement, verdict, which_of_two
from lightning_hessian.tracking.correlation_figures import scatter_plot

NAMES = ("d_ks", "lambda_1", "trace", "block_off_diagonal_ratio")


def series(kind: str, seed: int, count: int = 40) -> dict[str, np.ndarray]:
    """Four statistics, a validation loss and a gap of one kind."""
    rng = np.random.default_rng(seed)
    drift = np.linspace(3, 1, count)
    noise = rng.normal(size=(7, count))
    loss = drift + 0.1 * noise[0]
    found = {
        f"hessian/{name}": drift * (k - 1.5) + 0.1 * noise[k] for k, name in enumerate(NAMES, 1)
    }
    if kind == "real relation":
        found = {key: loss * (-1) ** k + 0.03 * noise[k] for k, key in enumerate(found, 1)}
    if kind == "independent":
        found = dict(zip(found, noise[1:5], strict=True))
        loss = noise[0]
    if kind == "a random walk":
        found = {key: value.cumsum() for key, value in zip(found, noise[1:5], strict=True)}
        loss = noise[0].cumsum()
    if kind == "follows":
        found = {key: np.roll(loss, 2) + 0.01 * noise[k] for k, key in enumerate(found, 1)}
    if kind == "constant":
        found["hessian/d_ks"] = np.full(count, 0.25)
    if kind == "holes":
        found["hessian/d_ks"][::3] = np.nan
        loss[1::5] = np.inf
        found["hessian/trace"][:] = np.nan
    found |= {"val_loss": loss, "hessian/gap": 0.1 * noise[6] + 0.3 * found["hessian/trace"]}
    return found


CASES = [
    (kind, seed, count)
    for kind in ("trend only", "real relation", "independent", "a random walk", "follows",
                 "constant", "holes")
    for seed in (0,)
    for count in (3, 5, 9, 40)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "seed", "count"), CASES)
def test_every_surface_says_the_same_of_a_run(kind, seed, count, tmp_path):
    columns = {k: v.astype(np.float32).astype(float) for k, v in series(kind, seed, count).items()}
    rows = [
        {"trainer/global_step": step, **{key: float(v[step]) for key, v in columns.items()}}
        for step in range(count)
    ]
    record = RunRecord("id", "run", "here", "offline", {}, *columns_of(rows))
    report = correlation_report(RunTable((record,)), workers=1)
    expected = expected_sentences(columns)
    assert set(expected) == {(pair.statistic, pair.monitor) for pair in report.within}

    with io.StringIO() as out, redirect_stdout(out):
        _print_correlations(report)
        demo = " ".join(out.getvalue().split())
    run = OfflineRun("id", "project", "run", {}, rows, {}, complete=True, exit_code=0)
    page = live_page(offline_run(run), ["val_loss", "gap"])
    data = json.loads(re.search(r"^const data = (.*);$", page, flags=re.MULTILINE)[1])
    document = compose(report)
    written = plain(to_markdown(document))
    write_csv(report, tmp_path / "c.csv")
    table = (tmp_path / "c.csv").read_text()
    table_of_page = {
        (row["statistic"], row["monitor"]): row["verdict"] for row in data["correlations"]
    }
    for (statistic, monitor), (sentence, label) in expected.items():
        assert sentence in written
        assert sentence.replace('"', '""') in table
        if label != "no coefficient":
            assert sentence in demo
            assert table_of_page[statistic.removeprefix("hessian/"), monitor] == sentence
    movements = [(pair.statistic, pair.monitor, pair.movement) for pair in report.within]
    whole = answer(movements)
    assert data["answer"] == whole
    assert whole in demo
    assert whole in written
    strongest = [card for card in data["cards"] if card["question"].startswith("What goes")]
    told = [card["says"] for card in strongest if card["numbers"] != "not known yet"]
    assert set(told) <= {sentence for sentence, _ in expected.values()}
    assert ("these moved together" in whole) == any(
        label.startswith("move ") for _, label in expected.values()
    )
    _figures_say_the_same(columns, expected)
    assert "<strong>" in to_html(document)


def test_that_losses_move_together_is_no_answer_about_curvature():
    rng = np.random.default_rng(0)
    steps, other = rng.normal(size=(2, 60))
    pairs = [("hessian/loss", steps + 0.1 * other), ("hessian/trace", other)]
    moved = corrected([movement(values.cumsum(), steps.cumsum()) for _, values in pairs])
    found = [(name, "val_loss", one) for (name, _), one in zip(pairs, moved, strict=True)]
    assert verdict(found[0][2]).is_shown
    assert not verdict(found[1][2]).is_shown
    said = "no statistic was shown to move with what is monitored"
    assert answer(found) == (
        f"From one measurement to the next, {said}, save the loss on the probe."
    )
    assert answer(found[1:]) == f"From one measurement to the next, {said}."
    with_trace = [found[0], ("hessian/trace", "val_loss", found[0][2])]
    assert "moved together: hessian/trace with val_loss" in answer(with_trace)
    assert "hessian/loss" not in answer(with_trace)


def expected_sentences(columns) -> dict[tuple[str, str], tuple[str, str]]:
    """Sentence and label of every pair, from the one function."""
    pairs = [
        (f"hessian/{name}", monitor)
        for monitor in ("val_loss", "hessian/gap")
        for name in NAMES
        if np.isfinite(columns[f"hessian/{name}"] + columns[monitor]).sum() >= 2
    ]
    moved = corrected([movement(columns[s], columns[m]) for s, m in pairs])
    found = {}
    for pair, one in zip(pairs, moved, strict=True):
        told = verdict(one, pair[1])
        found[pair] = (told.sentence, told.label)
    return found


def plain(markdown: str) -> str:
    """Returns Markdown as a reader sees it."""
    found = re.sub(r"\\([\\_*\[\]#])", r"\1", markdown).replace("**", "").replace("`", "")
    return found.replace("&lt;", "<")


def _figures_say_the_same(columns, expected) -> None:
    rows = [
        {"step": step}
        | {
            k.removeprefix("hessian/"): float(v[step])
            for k, v in columns.items()
            if np.isfinite(v[step])
        }
        for step in range(len(columns["val_loss"]))
    ]
    for monitor in ("val_loss", "gap"):
        drawn = [name for name in NAMES if any(name in row and monitor in row for row in rows)]
        if not drawn:
            continue
        figure = scatter_plot(rows, NAMES, monitor, monitors=["val_loss", "gap"])
        key = "hessian/gap" if monitor == "gap" else monitor
        for axes, name in zip(figure.axes, drawn, strict=True):
            if (f"hessian/{name}", key) in expected:
                assert axes.texts[0].get_text() == expected[f"hessian/{name}", key][1]


def test_drift_alone_is_shown_no_more_often_than_the_level_allows():
    """Independent series with a common trend: r is high, and a verdict of 'shown' an error."""
    kinds = []
    for seed in range(60):
        found = series("trend only", seed)
        loss = found.pop("val_loss")
        del found["hessian/gap"]
        moved = corrected([movement(x, loss) for x in found.values()])
        kinds.append({verdict(one).kind for one in moved})
        assert max(abs(one.r) for one in moved) > 0.9
    errors = sum("shown" in found for found in kinds)
    assert errors <= stats.binom.ppf(0.999, 60, 0.05)
    assert sum("drift" in found for found in kinds) >= 50


def test_a_real_relation_is_shown_and_its_sign_told():
    for seed in range(10):
        found = series("real relation", seed)
        up, down = found["hessian/lambda_1"], found["hessian/d_ks"]
        first, second = corrected(
            [movement(up, found["val_loss"]), movement(down, found["val_loss"])]
        )
        assert verdict(first).is_shown
        assert verdict(second).is_shown
        assert " move together" in verdict(first).sentence
        assert " move in opposite ways" in verdict(second).sentence
        assert "After correction for 2 pairs this holds" in verdict(first).sentence


def test_the_correction_decides_what_is_shown():
    """A pair that is shown alone is shown no more among many that were looked at."""
    rng = np.random.default_rng(3)
    loss = rng.normal(size=30)
    one = movement(0.5 * loss + rng.normal(size=30), loss)
    others = [movement(rng.normal(size=30), loss) for _ in range(60)]
    (alone,) = corrected([one])
    among = corrected([one, *others])[0]
    assert one.differences.p_value < 0.05 < among.corrected_p
    assert verdict(alone).is_shown
    assert verdict(among).kind == "uncorrected"
    assert "does not hold" in verdict(among).sentence
    assert not verdict(movement(loss, loss)).is_shown  # nobody said what it was corrected for


@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        ([1.0, 2.0], "undefined", "2 of the 4 points needed"),
        ([1.0] * 20, "undefined", "the first series is constant"),
        ([float("nan")] * 20, "undefined", "0 of the 4 points needed"),
        ([1.0, 3.0, 2.0, 5.0], "short", "3 of the 4 differences needed"),
        (list(range(20)), "short", "the first series of differences is constant"),
        (
            [1.0, 3.0, 2.0, 5.0, 4.0, 8.0, 6.0, 7.0],
            "short",
            "takes 9 measurements, and there are 8",
        ),
    ],
)
def test_what_cannot_be_told_is_not_told(x, kind, words):
    y = np.random.default_rng(0).normal(size=len(x))
    (found,) = corrected([movement(x, y)])
    assert verdict(found).kind == kind
    assert words in verdict(found).sentence
    assert not verdict(found).is_shown


@pytest.mark.parametrize(
    ("loss", "gap", "words"),
    [
        (True, True, "both"),
        (True, False, "the metric alone: mostly training that goes on"),
        (True, None, "the metric alone: the gap cannot be told"),
        (False, True, "the generalization gap alone"),
        (None, True, "the generalization gap alone; the metric cannot be told"),
        (False, False, "neither"),
        (False, None, "neither"),
        (None, None, "too little to tell"),
    ],
)
def test_which_of_the_two_a_statistic_goes_with(loss, gap, words):
    assert which_of_two(loss, gap).startswith(words)


def test_the_module_is_on_the_ground():
    source = Path("lightning_hessian/statistics/verdict.py")
    path = Path(__file__).parents[2] / source
    assert not re.search(r"import (torch|lightning\b|wandb)", path.read_text())
