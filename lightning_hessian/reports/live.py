"""A page that shows an offline W&B run while it goes on: one HTML file, no server, no network.

The page holds its data, its charts are drawn by the browser. `follow` writes it anew every few
seconds, and it reloads itself until the run has ended.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning_hessian.histories.offline_run import OfflineRun, find_run_file, read_offline_run
from lightning_hessian.histories.run_table import RunRecord, columns_of, flat_config
from lightning_hessian.histories.sidecars import is_at_work, with_sidecar
from lightning_hessian.histories.spectra import spectra_of
from lightning_hessian.histories.transaction_log import EmptyRunError
from lightning_hessian.reports.defaults import named_monitors
from lightning_hessian.reports.media import figures_of
from lightning_hessian.reports.numbers import finite, within_row
from lightning_hessian.reports.pages import render
from lightning_hessian.reports.report import logged_statistics, resolved_monitors
from lightning_hessian.reports.verdicts import GAP, answer_within, judged, ranked, which_goes_with
from lightning_hessian.reports.within import WithinRun, within_run
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import (
    checked,
    flag,
    live_interval,
    monitor_names,
    optional,
)
from lightning_hessian.results.base import nearest
from lightning_hessian.results.escaping import visible
from lightning_hessian.results.output import atomic_write
from lightning_hessian.results.path_arguments import path_name
from lightning_hessian.tracking.dashboard import Lines, sections
from lightning_hessian.tracking.history import Row, key_part
from lightning_hessian.tracking.loggers import STEP
from lightning_hessian.tracking.style import evenly_chosen

_MOST_SPECTRA = 40
_MOST_POINTS = 400
"""A chart of a thousand pixels shows no more."""

_KIND = re.compile(r"^(pearson|differences|spearman|num_points)_")
_OURS = re.compile(r"(hessian|layers|gradient|stability|correlation)/")


@checked(
    {
        "folder": path_name,
        "out": path_name,
        "monitor": optional(monitor_names, "for those that the callbacks of the run have"),
        "interval": live_interval,
        "once": flag,
        "sidecar": optional(path_name, "where nothing measures beside the run"),
    }
)
def follow(
    folder: Path,
    out: Path,
    *,
    monitor: Sequence[str] | None = None,
    interval: float = 15.0,
    once: bool = False,
    sidecar: Path | None = None,
) -> Path:
    """Write the page of an offline run, again and again until the run has ended; return its path.

    wandb writes to the disk when 32 KiB have come together and every 15 seconds, so that a shorter
    interval shows nothing sooner. A file that is still empty is waited for.

    Args:
        folder: The run folder, or one with a single run below it.
        out: The file (``.html``), or a folder for ``live.html``; made if missing.
        monitor: The monitored metrics, as they are logged; by default those that the callbacks
            of the run have, else ``val_loss`` and ``gap``.
        interval: Seconds between two readings.
        once: Write the page once, of the run as it is now.
        sidecar: The folder of spectra that `lightning-hessian measure --follow` measures beside the
            run; they stand in the rows of the same steps, and the page goes on until the sidecar
            has ended, too.

    Raises:
        FileNotFoundError: There is no run at ``folder``.
        ValueError: There are several, or the file is none of W&B's; ``interval`` is not positive;
            ``sidecar`` is that of another run.
    """
    folder, out = Path(folder), Path(out)
    beside = None if sidecar is None else Path(sidecar)
    if beside is not None and not beside.is_dir():
        raise ArgumentError("sidecar", str(beside), "Give the folder that a sidecar writes to.")
    page = out if out.suffix == ".html" else out / "live.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            run = read_offline_run(folder)
        except EmptyRunError as error:  # it has just begun
            if once:
                raise
            warnings.warn(f"{error}. Waiting for its first rows.", stacklevel=2)
            time.sleep(interval)
            continue
        ended = run.exit_code is not None and (beside is None or not is_at_work(beside))
        if beside is not None:
            run = with_sidecar(run, beside)
        text = live_page(
            run,
            monitor or named_monitors(flat_config(run.config)),
            media=find_run_file(folder).parent / "files",
            refresh=None if ended or once else interval,
        )
        with atomic_write(page) as file:
            file.write(text.encode(errors="replace"))
        if ended or once:
            return page
        time.sleep(interval)


def live_page(
    run: OfflineRun,
    monitors: Sequence[str],
    *,
    media: Path | None = None,
    refresh: float | None = None,
) -> str:
    """Return the page of a run.

    Args:
        run: What was read.
        monitors: The monitored metrics, as they are logged.
        media: The run's ``files`` folder; the last figure of each kind is taken from it.
        refresh: Seconds after which the page reloads itself; None for never.
    """
    record = _record(run)
    rows, measured = _rows(record), measurements(run)
    watched = resolved_monitors(monitors, record.columns)
    pairs = within_run(record, logged_statistics(record.columns, watched), watched)
    figures, left_out = figures_of(run.rows, media)
    notes = [*run.problems, *_missing(rows, watched), *left_out]
    try:
        spectra = spectra_of(run, notes).get("hessian", [])
    except ValueError as error:
        spectra = []
        notes.append(f"the spectra cannot be shown: {error}")
    data = {
        "name": run.name or run.run_id,
        "project": run.project,
        "run": run.run_id,
        "status": _status(run),
        "read": time.strftime("%Y-%m-%d %H:%M:%S"),
        "refresh": refresh,
        "measurements": len(measured),
        "step": int(rows[-1]["step"]) if rows else None,
        "notes": notes,
        "cards": cards(measured, pairs, watched),
        "correlations": [
            within_row(pair) | {"statistic": pair.statistic.removeprefix("hessian/")}
            for pair in ranked(pairs)
            if not math.isnan(pair.r)
        ],
        "answer": answer_within(pairs),
        "which": [asdict(found) for found in which_goes_with(pairs)],
        "spectra": [
            {"step": step, "values": [float(f"{v:.4g}") for v in found.leading]}
            for step, found in evenly_chosen(spectra, _MOST_SPECTRA)
        ],
        "sections": _panels([_with_gap(row) for row in rows], monitors),
        "latest": measured[-1] if measured else {},
        "figures": figures,
    }
    return render("live.html", data=finite(data, visible))


def _record(run: OfflineRun) -> RunRecord:
    steps, columns = columns_of(run.rows)
    return RunRecord(run.run_id, run.name, run.run_id, "offline", {}, steps, columns)


def _rows(record: RunRecord) -> list[Row]:
    """Return the rows of a run, one for each step, with what it logged there."""
    rows = []
    for place, step in enumerate(record.steps.tolist()):
        values = {key: float(column[place]) for key, column in record.columns.items()}
        logged = {key: value for key, value in values.items() if not math.isnan(value)}
        rows.append({"step": step, **logged})
    return rows


def measurements(run: OfflineRun) -> list[Row]:
    """Return one row for each measurement of the Hessian, with statistics by their bare names.

    Beside them stand the step and what else was logged in the same row, by its full name. Of steps
    that repeat, as they do after a resume, the last is kept.
    """
    return [
        {key.removeprefix("hessian/"): value for key, value in row.items()}
        for row in _rows(_record(run))
        if any(key.startswith("hessian/") for key in row)
    ]


def _ends(rows: Sequence[Row], name: str) -> tuple[float, float] | None:
    """Return the first and the last value of a statistic."""
    values = [row[name] for row in rows if name in row]
    return (values[0], values[-1]) if values else None


def _change(first: float, last: float) -> str:
    return f"{first:.4g} → {last:.4g}"


def cards(
    rows: Sequence[Row], pairs: Sequence[WithinRun], monitors: Sequence[str]
) -> list[dict[str, str]]:
    """Return what the page says first: a question, the numbers, and what they say, each."""
    found = []
    distance, critical = _ends(rows, "d_ks"), _ends(rows, "d_c")
    if distance and critical:
        below = distance[1] < critical[1]
        words = "below d_c: a power law by the papers' test" if below else "not below d_c"
        trend = "straighter" if distance[1] < distance[0] else "less straight"
        says = f"d_c is {critical[1]:.4g}; {words}; {trend} than at the first measurement."
        found.append(_card("Is the spectrum straightening?", f"d_ks {_change(*distance)}", says))
    sharpness, trace = _ends(rows, "lambda_1"), _ends(rows, "trace")
    if sharpness:
        factor = sharpness[1] / sharpness[0] if sharpness[0] else math.nan
        says = f"{factor:.3g} times the first measurement" if math.isfinite(factor) else ""
        says += f"; trace {_change(*trace)}." if trace else "."
        found.append(_card("Is sharpness rising?", f"lambda_1 {_change(*sharpness)}", says))
    ratio = _ends(rows, "stability/ratio")
    if ratio:
        words = (
            "above 1: a quadratic of this curvature would diverge" if ratio[1] > 1 else "below 1"
        )
        says = f"sharpness over the optimizer's threshold; {words}."
        found.append(_card("Is the step size stable?", f"ratio {_change(*ratio)}", says))
    names = {monitor.removeprefix("hessian/") for monitor in monitors}
    logged = any(name in row for row in rows for name in names)
    return [*found, *(_strongest(monitor, pairs, logged) for monitor in monitors)]


def _strongest(monitor: str, pairs: Sequence[WithinRun], logged: bool) -> dict[str, str]:
    """Return the card of the statistic for which the evidence is strongest."""
    question = f"What goes with {monitor}?"
    mine = [pair for pair in pairs if pair.monitor == monitor and not math.isnan(pair.r)]
    if not mine:
        why = "r is computed from 4 measurements on." if logged else "No measurement has it yet."
        return _card(question, "not known yet", why)
    best = ranked(mine)[0]
    low, high = best.fisher
    name = best.statistic.removeprefix("hessian/")
    numbers = f"{name}: r = {best.r:.2f} [{low:.2f}, {high:.2f}], n = {best.num_points}"
    return _card(question, numbers, judged(best).sentence)


def _card(question: str, numbers: str, says: str) -> dict[str, str]:
    return {"question": question, "numbers": numbers, "says": says}


def _panels(rows: Sequence[Row], monitors: Sequence[str]) -> list[dict[str, Any]]:
    """Return the charts of the dashboard's sections that have points."""
    logged = list(dict.fromkeys(key for row in rows for key in row))
    plans = {
        name: [_expanded(p, logged) if isinstance(p, Lines) else p for p in panels]
        for name, panels in sections(monitors).items()
    }
    drawn = []
    for heading, panels in plans.items():
        charts = [_chart(rows, panel, monitors) for panel in panels if isinstance(panel, Lines)]
        charts = [chart for chart in charts if chart["series"]]
        if charts:
            drawn.append({"name": heading, "charts": charts})
    return drawn


def _expanded(panel: Lines, logged: Sequence[str]) -> Lines:
    """Return a panel with the keys that its pattern matches."""
    if not panel.pattern:
        return panel
    return replace(panel, keys=tuple(key for key in logged if re.fullmatch(panel.pattern, key)))


def _chart(rows: Sequence[Row], panel: Lines, monitors: Sequence[str]) -> dict[str, Any]:
    x = "step" if panel.x == STEP else panel.x
    series = []
    for key, label in zip(panel.keys, _labels(panel, monitors), strict=True):
        points = [(row[x], row[key]) for row in rows if x in row and key in row]
        points = [point for point in points if all(map(math.isfinite, point))]
        if points:
            series.append({"key": label, "points": evenly_chosen(points, _MOST_POINTS)})
    return {
        "title": panel.title,
        "x": "training step" if x == "step" else x,
        "lines": x == "step",
        "log": panel.log,
        "bounds": panel.bounds,
        "level": panel.level,
        "series": series,
    }


def _labels(panel: Lines, monitors: Sequence[str]) -> list[str]:
    """Return what the legend calls keys: without their section, if they share it.

    Of correlations with one metric only the statistic is left, and which end of an interval it is;
    of one statistic of the layers, the layer.
    """
    keys = panel.keys
    if panel.pattern:
        return [key.removeprefix(panel.pattern.removesuffix(".*")) for key in keys]
    if len({key.partition("/")[0] for key in keys}) > 1:
        return list(keys)
    names = [key.partition("/")[2] or key for key in keys]
    if not keys[0].startswith("correlation/"):
        return names
    for monitor in monitors:
        end = f"_{key_part(monitor)}"
        if all(name.endswith(end) for name in names):
            return [_KIND.sub("", name.removesuffix(end)) for name in names]
    return names


def _with_gap(row: Row) -> Row:
    """Return a row that has the gap under the name by which it is asked for, too."""
    return row if "gap" in row or GAP not in row else {**row, "gap": row[GAP]}


def _missing(rows: Sequence[Row], monitors: Sequence[str]) -> list[str]:
    """Return a sentence for each monitored metric that no row has."""
    known = sorted({key for row in rows for key in row if not _OURS.match(key)} - {"step", "epoch"})
    return [
        f"{name} is not logged; there are "
        f"{', '.join(nearest(name, known)) or 'no'} metrics. Choose one by --monitor."
        for name in monitors
        if rows and not any(name in row for row in rows)
    ]


def _status(run: OfflineRun) -> str:
    if run.exit_code is None:
        return "running, or cut off"
    return "finished" if run.exit_code == 0 else f"ended with exit code {run.exit_code}"
