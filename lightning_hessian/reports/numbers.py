"""The numbers of a report for other programs: correlations.csv and correlations.json."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lightning_hessian.reports.across import AcrossRuns
from lightning_hessian.reports.findings import CorrelationReport
from lightning_hessian.reports.verdicts import judged, verdict_across, verdict_over, which_goes_with
from lightning_hessian.reports.within import WithinRun
from lightning_hessian.results.escaping import csv_cell

FORMAT = 1
"""Raised when a field of correlations.json changes its meaning."""

COLUMNS = (
    "scope", "run", "statistic", "monitor", "num_points", "r", "fisher_low", "fisher_high",
    "block_low", "block_high", "block_length", "block_p", "shift_p", "permutation_p", "spearman",
    "kendall", "r_differences", "differences_low", "differences_high", "differences_p",
    "differences_shift_p", "partial_given_step", "lead", "lead_r",
    "lead_low", "lead_high", "r_within_groups", "within_groups_low",
    "within_groups_high", "holm", "bh", "verdict", "reason",
)  # fmt: skip
"""Of correlations.csv. ``holm`` and ``bh`` correct ``permutation_p`` across runs, and
``differences_p`` within a run; an empty cell is a number that does not exist."""


def write_csv(report: CorrelationReport, path: Path) -> None:
    """Write one line for each pair: across runs, then within each run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in correlation_rows(report):
            writer.writerow({key: csv_cell(value) for key, value in finite(row).items()})


def correlation_rows(report: CorrelationReport) -> Iterator[dict[str, Any]]:
    """Yield the lines of correlations.csv, with NaN where a number does not exist."""
    for pair in report.across:
        yield {
            **_named_alike(pair),
            "scope": "across",
            "run": "",
            **_ends("fisher", pair.fisher),
            "permutation_p": pair.p_value,
            **_ends("within_groups", pair.within_interval),
            "verdict": verdict_across(pair, len(report.across), report.settings.get("group")),
        }
    for within in report.within:
        yield {"scope": "within", **within_row(within)}


def within_row(pair: WithinRun) -> dict[str, Any]:
    """Return the line of correlations.csv for one pair of one run."""
    row = {
        **_named_alike(pair),
        **_ends("fisher", pair.fisher),
        **_ends("block", (pair.block.low, pair.block.high)),
        "block_length": pair.block.block_length or math.nan,
        "block_p": pair.block.p_value,
        **_ends("differences", (pair.differences.low, pair.differences.high)),
        "differences_p": pair.differences.p_value,
        "partial_given_step": pair.partial,
        "verdict": judged(pair).sentence,
    }
    del row["lead"]
    if pair.lead is not None:
        row |= {"lead": pair.lead.lag, "lead_r": pair.lead.r, **_ends("lead", pair.lead.interval)}
    return row


def _named_alike(pair: AcrossRuns | WithinRun) -> dict[str, Any]:
    """Return the fields of a pair that have a column of their name."""
    return {name: value for name, value in vars(pair).items() if name in COLUMNS}


def write_json(report: CorrelationReport, path: Path) -> None:
    """Write everything that the report knows; a number that does not exist is null."""
    group = report.settings.get("group")
    content = {
        "format": FORMAT,
        "settings": dict(report.settings),
        "statistics": report.statistics,
        "runs": [
            {
                "name": run.name,
                "id": run.run_id,
                "source": run.source,
                "kind": run.kind,
                "config": run.config,
                "num_rows": len(run),
                "problems": run.problems,
            }
            for run in report.table
        ],
        "skipped": report.table.skipped,
        "copies": report.table.copies,
        "points": None if report.points is None else vars(report.points),
        "across": [
            asdict(pair) | {"verdict": verdict_across(pair, len(report.across), group)}
            for pair in report.across
        ],
        "goes_with": [
            asdict(found)
            for pairs in (report.across, report.over, report.within)
            for found in which_goes_with(pairs)
        ],
        "scaling": [asdict(scaling) for scaling in report.scaling],
        "over_runs": [
            asdict(over) | {"verdict": verdict_over(over, len(report.over))} for over in report.over
        ],
        "within": [asdict(pair) | {"verdict": judged(pair).sentence} for pair in report.within],
    }
    text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="replace")  # lone surrogates


def finite(value: Any, text: Callable[[str], str] = str) -> Any:
    """Return what JSON can hold: None for what is not finite, lists for arrays.

    Args:
        value: Dicts, sequences and arrays of numbers and texts.
        text: What becomes of each text.
    """
    if isinstance(value, dict):
        return {str(key): finite(child, text) for key, child in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [finite(child, text) for child in value]
    if isinstance(value, str):
        return text(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ends(name: str, interval: tuple[float, float]) -> dict[str, float]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}
