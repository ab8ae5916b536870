"""The numbers of a report for other programs: correlations.csv and correlations.json."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_hessian.reports.findings import CorrelationReport
from lightning_hessian.reports.verdicts import judged, verdict_across, verdict_over, which_goes_with
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
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in correlation_rows(report):
            writer.writerow(
                {key: "" if _is_nan(value) else csv_cell(value) for key, value in row.items()}
            )


def correlation_rows(report: CorrelationReport) -> Iterator[dict[str, Any]]:
    """Yield the lines of correlations.csv, with NaN where a number does not exist."""
    for pair in report.across:
        yield {
            "scope": "across",
            "run": "",
            "statistic": pair.statistic,
            "monitor": pair.monitor,
            "num_points": pair.num_points,
            "r": pair.r,
            **_ends("fisher", pair.fisher),
            "permutation_p": pair.p_value,
            "spearman": pair.spearman,
            "kendall": pair.kendall,
            "r_within_groups": pair.r_within_groups,
            **_ends("within_groups", pair.within_interval),
            "holm": pair.holm,
            "bh": pair.bh,
            "verdict": verdict_across(pair, len(report.across), report.settings.get("group")),
            "reason": pair.reason,
        }
    for within in report.within:
        lead = within.lead
        yield {
            "scope": "within",
            "run": within.run,
            "statistic": within.statistic,
            "monitor": within.monitor,
            "num_points": within.num_points,
            "r": within.r,
            **_ends("fisher", within.fisher),
            **_ends("block", (within.block.low, within.block.high)),
            "block_length": within.block.block_length or math.nan,
            "block_p": within.block.p_value,
            "shift_p": within.shift_p,
            "spearman": within.spearman,
            "kendall": within.kendall,
            "r_differences": within.r_differences,
            **_ends("differences", (within.differences.low, within.differences.high)),
            "differences_p": within.differences.p_value,
            "differences_shift_p": within.differences_shift_p,
            "partial_given_step": within.partial,
            **({} if lead is None else {"lead": lead.lag, "lead_r": lead.r}),
            **({} if lead is None else _ends("lead", lead.interval)),
            "holm": within.holm,
            "bh": within.bh,
            "verdict": judged(within).sentence,
            "reason": within.reason,
        }


def write_json(report: CorrelationReport, path: Path) -> None:
    """Write everything that the report knows; a number that does not exist is null."""
    points = report.points
    content = {
        "format": FORMAT,
        "settings": dict(report.settings),
        "statistics": list(report.statistics),
        "runs": [
            {
                "name": run.name,
                "id": run.run_id,
                "source": run.source,
                "kind": run.kind,
                "config": run.config,
                "num_rows": len(run),
                "problems": list(run.problems),
            }
            for run in report.table
        ],
        "skipped": list(report.table.skipped),
        "copies": list(report.table.copies),
        "points": None
        if points is None
        else {
            "names": list(points.names),
            "steps": points.steps.tolist(),
            "groups": list(points.groups),
            "sizes": points.sizes.tolist(),
            "values": {key: values.tolist() for key, values in points.values.items()},
            "left_out": list(points.left_out),
        },
        "across": [
            asdict(pair)
            | {"verdict": verdict_across(pair, len(report.across), report.settings.get("group"))}
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
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="replace")  # lone surrogates


def _ends(name: str, interval: tuple[float, float]) -> dict[str, float]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _plain(value: Any) -> Any:
    """Return what JSON can hold: None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
