"""A live page of several runs side by side: a colour for each run, the same charts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_hessian.reports.live_charts import panels_of_many, rows_of
from lightning_hessian.reports.live_runs import LiveRun, Look
from lightning_hessian.reports.numbers import finite
from lightning_hessian.reports.pages import render
from lightning_hessian.reports.report import resolved_monitors
from lightning_hessian.reports.verdicts import GAP
from lightning_hessian.results.escaping import visible
from lightning_hessian.tracking.history import Row

_COLUMNS = ("d_ks", "d_c", "s_hat", "lambda_1", "trace", "block_off_diagonal_ratio")
"""Statistics of the table, those of the last measurement."""

_MOST_VALUES = 300
"""Of a spectrum on this page, evenly chosen on the logarithm of the rank."""


def runs_page(
    seen: Look, monitors: Sequence[str], places: Sequence[Path], *, refresh: float | None = None
) -> str:
    """Return the page of several runs.

    Args:
        seen: The runs as they are now.
        monitors: The monitored metrics, as they are logged.
        places: Where they were looked for.
        refresh: Seconds after which the page reloads itself; None for never.
    """
    runs = seen.runs
    rows = [rows_of(run.record) for run in runs]
    keys = {key for run in runs for key in run.record.columns}
    watched = resolved_monitors(monitors, keys)
    columns = [*watched, *(f"hessian/{name}" for name in _COLUMNS), "stability/ratio"]
    columns = [key for key in dict.fromkeys(columns) if key in keys]
    data = {
        "name": ", ".join(place.name or str(place) for place in places[:3]),
        "read": time.strftime("%Y-%m-%d %H:%M:%S"),
        "refresh": refresh,
        "columns": [key.removeprefix("hessian/") for key in columns],
        "runs": [_line(run, of_run, columns) for run, of_run in zip(runs, rows, strict=True)],
        "spectra": [
            {"run": place, "step": run.spectra[-1][0], "points": _points(run)}
            for place, run in enumerate(runs)
            if run.spectra and len(run.spectra[-1][1].leading)
        ],
        "sections": panels_of_many(rows, monitors),
        "notes": [*seen.notes, *(f"{r.record.name}: {note}" for r in runs for note in r.notes)],
        "not_logged": [key for key in watched if key not in keys and key != GAP],
    }
    return render("live_many.html", data=finite(data, visible))


def _line(run: LiveRun, rows: Sequence[Row], columns: Sequence[str]) -> dict[str, Any]:
    """Return what the table says of a run: the last values of each metric."""
    last = {key: value for row in rows for key, value in row.items()}
    return {
        "name": run.record.name,
        "id": run.record.source,
        "status": run.status,
        "ended": run.ended,
        "step": int(rows[-1]["step"]) if rows else None,
        "measurements": sum(any(key.startswith("hessian/") for key in row) for row in rows),
        "values": [last.get(key, math.nan) for key in columns],
    }


def _points(run: LiveRun) -> list[tuple[int, float]]:
    """Return rank and eigenvalue of the last spectrum."""
    values = run.spectra[-1][1].leading
    count = len(values)
    if count > _MOST_VALUES:
        share = (count - 1) ** (1 / (_MOST_VALUES - 1))
        places = sorted({round(share**k) for k in range(_MOST_VALUES)} | {0})
    else:
        places = list(range(count))
    return [(place + 1, float(f"{values[place]:.4g}")) for place in places]
