"""A page that shows runs while they go on: one HTML file, no server, no network.

The page holds its data, its charts are drawn by the browser. `follow` writes it anew every few
seconds, and it reloads itself until the runs have ended.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_hessian.histories.marks import MARK, read_mark
from lightning_hessian.histories.run_table import RunRecord
from lightning_hessian.histories.transaction_log import EmptyRunError
from lightning_hessian.reports.defaults import DEFAULT_MONITORS, named_monitors
from lightning_hessian.reports.live_charts import panels, rows_of
from lightning_hessian.reports.live_many import runs_page
from lightning_hessian.reports.live_runs import LiveRun, Look, look_at
from lightning_hessian.reports.numbers import finite, within_row
from lightning_hessian.reports.pages import render
from lightning_hessian.reports.report import (
    DEFAULT_STATISTICS,
    logged_statistics,
    resolved_monitors,
)
from lightning_hessian.reports.verdicts import answer_within, judged, ranked, which_goes_with
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
from lightning_hessian.results.path_arguments import path_name, paths
from lightning_hessian.tracking.history import Row
from lightning_hessian.tracking.style import evenly_chosen

_MOST_SPECTRA = 40

_OURS = re.compile(r"(hessian|layers|gradient|stability|correlation)/")


@checked(
    {
        "folder": paths("Give the folder of a run, or of many, or a list of these."),
        "out": path_name,
        "monitor": optional(monitor_names, "for those that the callbacks of the run have"),
        "interval": live_interval,
        "once": flag,
        "sidecar": optional(path_name, "where nothing measures beside the run"),
    }
)
def follow(
    folder: Path | Sequence[Path],
    out: Path,
    *,
    monitor: Sequence[str] | None = None,
    interval: float = 15.0,
    once: bool = False,
    sidecar: Path | None = None,
) -> Path:
    """Write the page of one run or many, again and again until all have ended; return its path.

    Read are offline W&B runs, the folders of Lightning's CSVLogger and TensorBoardLogger, MLflow's
    (numbers only) and what a run without logger leaves, in a folder and all below it. Where there
    are several, they stand side by side, up to 24. A run that two loggers wrote is there once.

    W&B writes to the disk every 15 seconds, `CSVLogger` every 100 rows unless its
    ``flush_logs_every_n_steps`` says otherwise, TensorBoard every two minutes: a shorter interval
    shows nothing sooner. A file that is still empty is waited for. W&B's files say when a run has
    ended; of the others, ten minutes without a change count as the end.

    Args:
        folder: A run folder, or one with runs below it, or several.
        out: The file (``.html``), or a folder for ``live.html``; made if missing.
        monitor: The monitored metrics, as they are logged; by default those that the callbacks
            of the run have, else ``val_loss`` and ``gap``.
        interval: Seconds between two readings.
        once: Write the page once, of the runs as they are now.
        sidecar: The folder of spectra that `lightning-hessian measure --follow` measures beside a
            run; they stand in the rows of the same steps, and the page goes on until the sidecar
            has ended, too. Such folders may stand among the others as well.

    Raises:
        FileNotFoundError: There is no run at ``folder``.
        ValueError: A file cannot be read; ``interval`` is not positive; ``sidecar`` is that of
            another run.
        ModuleNotFoundError: Event files are TensorBoard's, and it is not installed.
    """
    places = [folder] if isinstance(folder, (str, Path)) else list(folder)
    places = [Path(place) for place in places]
    if sidecar is not None:
        places.append(Path(sidecar))
        _check_sidecar(places[-1])
    out = Path(out)
    page = out if out.suffix == ".html" else out / "live.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            seen = look_at(places, DEFAULT_STATISTICS, monitor or DEFAULT_MONITORS)
        except EmptyRunError as error:  # it has just begun
            if once:
                raise
            warnings.warn(f"{error}. Waiting for its first rows.", stacklevel=2)
            time.sleep(interval)
            continue
        if sidecar is not None:
            _check_owner(places[-1], seen)
        ended = seen.ended or once
        refresh = None if ended else interval
        watched = monitor or named_monitors(*(run.record.config for run in seen.runs))
        if len(seen.runs) == 1:
            text = live_page(seen.runs[0], watched, refresh=refresh, notes=seen.notes)
        else:
            text = runs_page(seen, watched, places, refresh=refresh)
        with atomic_write(page) as file:
            file.write(text.encode(errors="replace"))
        if ended:
            return page
        time.sleep(interval)


def _check_sidecar(folder: Path) -> None:
    """Raise ValueError where a folder is none of a sidecar's."""
    if not folder.is_dir():
        raise ArgumentError("sidecar", str(folder), "Give the folder that a sidecar writes to.")
    if read_mark(folder) is None:
        raise ValueError(
            f"{folder} is no folder of a sidecar: it has no {MARK}. Give the --out of `measure "
            "--follow`."
        )


def _check_owner(folder: Path, seen: Look) -> None:
    """Raise ValueError where a sidecar measures beside none of the runs."""
    mark = read_mark(folder)
    if mark is None or not mark.run_id:
        return
    offline = [run.record.run_id for run in seen.runs if run.record.kind == "offline"]
    if offline and mark.run_id not in offline:
        raise ValueError(
            f"{folder} was measured beside {mark.run_id}, not beside {', '.join(offline)}."
        )


def live_page(
    run: LiveRun,
    monitors: Sequence[str],
    *,
    refresh: float | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Return the page of one run.

    Args:
        run: As it is now.
        monitors: The monitored metrics, as they are logged.
        refresh: Seconds after which the page reloads itself; None for never.
        notes: What is to be told beside the notes of the run.
    """
    record = run.record
    rows, measured = rows_of(record), measurements(record)
    watched = resolved_monitors(monitors, record.columns)
    pairs = within_run(record, logged_statistics(record.columns, watched), watched)
    data = {
        "name": record.name,
        "project": run.project,
        "run": record.run_id if record.kind == "offline" else record.source,
        "kind": record.kind,
        "status": run.status,
        "read": time.strftime("%Y-%m-%d %H:%M:%S"),
        "refresh": refresh,
        "measurements": len(measured),
        "step": int(rows[-1]["step"]) if rows else None,
        "notes": [*run.notes, *notes, *missing(rows, watched)],
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
            for step, found in evenly_chosen(run.spectra, _MOST_SPECTRA)
        ],
        "sections": panels(rows, monitors),
        "latest": measured[-1] if measured else {},
        "figures": run.figures,
    }
    return render("live.html", data=finite(data, visible))


def measurements(record: RunRecord) -> list[Row]:
    """Return one row for each measurement of the Hessian, with statistics by their bare names.

    Beside them stand the step and what else was logged in the same row, by its full name. Of steps
    that repeat, as they do after a resume, the last is kept.
    """
    return [
        {key.removeprefix("hessian/"): value for key, value in row.items()}
        for row in rows_of(record)
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


def missing(rows: Sequence[Row], monitors: Sequence[str]) -> list[str]:
    """Return a sentence for each monitored metric that no row has."""
    known = sorted({key for row in rows for key in row if not _OURS.match(key)} - {"step", "epoch"})
    return [
        f"{name} is not logged; there are "
        f"{', '.join(nearest(name, known)) or 'no'} metrics. Choose one by --monitor."
        for name in monitors
        if rows and not any(name in row for row in rows)
    ]
