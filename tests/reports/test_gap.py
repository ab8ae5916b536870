"""The gap between losses is monitored beside the loss where it was logged."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from support.report_runs import record

from lightning_hessian import correlation_report, write_report
from lightning_hessian.histories.run_table import RunRecord, RunTable


def with_gap(seed: int, count: int = 40) -> RunRecord:
    """A run whose block ratio goes with the gap, d_ks with the loss, and trace with neither."""
    rng = np.random.default_rng(seed)
    loss = np.linspace(3, 1, count) + 0.2 * rng.normal(size=count)
    gap = np.linspace(0.1, 0.6, count) + 0.2 * rng.normal(size=count)
    return record(
        f"run{seed}",
        val_loss=loss,
        hessian__gap=gap,
        hessian__loss=loss - gap,
        hessian__d_ks=loss + 0.02 * rng.normal(size=count),
        hessian__block_off_diagonal_ratio=gap + 0.02 * rng.normal(size=count),
        hessian__trace=np.linspace(3, 1, count) + 0.2 * rng.normal(size=count),
    )


EXPECTED = {
    "hessian/d_ks": "the metric alone: mostly training that goes on may make it",
    "hessian/block_off_diagonal_ratio": "the generalization gap alone",
    "hessian/trace": "neither",
    "hessian/loss": "both",
}


def test_the_gap_is_monitored_beside_the_loss_where_it_was_logged(tmp_path):
    table = RunTable((with_gap(0),))
    report = correlation_report(table)
    assert report.monitors == ("val_loss", "hessian/gap")
    assert set(report.statistics) == set(EXPECTED)
    assert correlation_report(table, monitor="gap").monitors == ("hessian/gap",)
    assert correlation_report(table, monitor="val_loss").monitors == ("val_loss",)
    for pair in report.within:
        run = table.runs[0]
        expected = stats.pearsonr(run.series(pair.statistic), run.series(pair.monitor))[0]
        assert pair.r == pytest.approx(expected)
        assert pair.num_tests == 8
    bare = RunTable((record("run", val_loss=[3, 1, 2, 5, 4], hessian__d_ks=[1, 2, 1, 3, 2]),))
    assert correlation_report(bare).monitors == ("val_loss",)
    with pytest.raises(ValueError, match="'hessian/gap'"):
        correlation_report(bare, monitor="gap")
    own = record("own", gap=[3, 1, 2, 5, 4], hessian__d_ks=[1, 2, 1, 3, 2])
    assert correlation_report(RunTable((own,)), monitor="gap").monitors == ("gap",)


def test_the_report_says_which_of_the_two_a_statistic_goes_with(tmp_path):
    write_report(correlation_report(RunTable((with_gap(0),))), tmp_path)
    found = json.loads((tmp_path / "correlations.json").read_text())["goes_with"]
    assert {one["statistic"]: one["sentence"] for one in found} == EXPECTED
    text = (tmp_path / "report.md").read_text()
    assert "## Test loss or generalization?" in text
    for statistic, sentence in EXPECTED.items():
        (line,) = [
            line for line in text.splitlines() if line.startswith(f"| `{statistic}` | val\\_loss: ")
        ]
        assert line.endswith(f"| {sentence[0].upper()}{sentence[1:]}. |")


def test_many_runs_say_it_across_and_within(tmp_path):
    report = correlation_report(RunTable(tuple(map(with_gap, range(12)))), workers=1)
    write_report(report, tmp_path)
    found = json.loads((tmp_path / "correlations.json").read_text())["goes_with"]
    said = {
        scope: {one["statistic"]: one["sentence"] for one in found if one["scope"] == scope}
        for scope in ("across", "over")
    }
    for statistic in ("hessian/d_ks", "hessian/block_off_diagonal_ratio", "hessian/trace"):
        assert said["over"][statistic] == EXPECTED[statistic]
    sure = {(p.statistic, p.monitor) for p in report.across if p.holm < 0.05}
    assert ("hessian/block_off_diagonal_ratio", "hessian/gap") in sure
    for statistic, sentence in said["across"].items():
        both = [(statistic, monitor) in sure for monitor in ("val_loss", "hessian/gap")]
        begins = {
            (True, True): "both",
            (True, False): "the metric alone",
            (False, True): "the generalization gap alone",
            (False, False): "neither",
        }
        assert sentence.startswith(begins[tuple(both)])
