"""The runs that a live page shows, whichever loggers write them: read anew at every look."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_hessian.histories.csv_runs import read_csv
from lightning_hessian.histories.local_runs import LocalRun, find_all, read_local_run
from lightning_hessian.histories.marks import LOGGED_STEP, MARK, read_mark
from lightning_hessian.histories.offline_run import OfflineRun, read_offline_run
from lightning_hessian.histories.run_table import (
    RunRecord,
    RunTable,
    columns_of,
    flat_config,
    with_unique_names,
)
from lightning_hessian.histories.same_run import each_run_once, identities_in
from lightning_hessian.histories.sidecars import is_at_work, is_of, is_sidecar, join_sidecars
from lightning_hessian.histories.spectra import read_spectra, spectra_of
from lightning_hessian.histories.tensorboard_events import EventPanels, read_panels
from lightning_hessian.histories.transaction_log import EmptyRunError
from lightning_hessian.reports.media import figures_beside, figures_of, shown_figures
from lightning_hessian.results import UnreadableFileError
from lightning_hessian.results.outside import printable, reason
from lightning_hessian.tracking.spectra import StoredSpectrum, decode_spectrum

QUIET = 600.0
"""Seconds without a change after which a run that leaves no mark of its end counts as ended."""

MOST_RUNS = 24
"""On one page; of more, those that were written to last."""

_WHAT = "spectra/hessian"

Spectra = list[tuple[int, StoredSpectrum]]
Pictures = list[dict[str, str]]


@dataclass(frozen=True, eq=False)
class LiveRun:
    """One run as it is now.

    Attributes:
        record: Its history.
        status: Whether it goes on, as far as that can be known.
        ended: Whether no more rows are expected.
        spectra: Step and spectrum of the Hessian at each measurement, in order.
        figures: The last figure of each kind: ``name``, and ``data`` as an address.
        project: At W&B, else empty.
        notes: What was left out, and why.
    """

    record: RunRecord
    status: str
    ended: bool
    spectra: Spectra
    figures: Pictures
    project: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """What there is at one moment.

    Attributes:
        runs: Each once, however many loggers wrote it; in the order of their folders.
        ended: Whether none of them goes on, nor a measurement beside them.
        notes: Of all runs.
    """

    runs: tuple[LiveRun, ...]
    ended: bool
    notes: tuple[str, ...]


def offline_run(run: OfflineRun, media: Path | None = None, source: str = "") -> LiveRun:
    """Return an offline W&B run; its figures are taken from the folder ``media``."""
    steps, columns = columns_of(run.rows)
    figures, left_out = figures_of(run.rows, media)
    notes = [*run.problems, *left_out]
    try:
        spectra = spectra_of(run, notes).get("hessian", [])
    except ValueError as error:
        spectra = []
        notes.append(f"the spectra cannot be shown: {error}")
    status = "running, or cut off" if run.exit_code is None else "finished"
    if run.exit_code:
        status = f"ended with exit code {run.exit_code}"
    return LiveRun(
        RunRecord(
            run.run_id, run.name or run.run_id, source or run.run_id, "offline",
            flat_config(run.config), steps, columns, identities=identities_in(run.rows),
        ),
        status, run.exit_code is not None, spectra, figures, run.project, tuple(notes),
    )  # fmt: skip


def look_at(paths: Sequence[Path], statistics: Sequence[str], monitors: Sequence[str]) -> Look:
    """Return the runs in folders and below, with what sidecars measured beside them.

    Args:
        paths: Run folders, folders with many of them, and folders of sidecars.
        statistics: Keys by which a run is known again that two loggers wrote.
        monitors: The same.

    Raises:
        EmptyRunError: There are runs, and not one has rows yet.
        FileNotFoundError: There is no run.
        UnreadableFileError: Not one of them can be read.
        ModuleNotFoundError: They are TensorBoard's, which is not installed.
    """
    beside = [path for path in paths if path.is_dir() and read_mark(path) is not None]
    begun = [path for path in paths if path not in beside or (path / "metrics.csv").exists()]
    found = sorted(find_all(begun), key=_changed)
    notes = []
    if len(found) > MOST_RUNS:
        notes.append(f"of {len(found)} runs the {MOST_RUNS} that were written to last are shown")
    lives, failures = [], []
    for local in sorted(found[-MOST_RUNS:], key=lambda local: str(local.folder)):
        try:
            lives.append(_read(local))
        except (UnreadableFileError, OSError, ModuleNotFoundError) as error:
            failures.append(error)
            if not isinstance(error, EmptyRunError):
                notes.append(f"{printable(local.folder.name)} left out: {reason(error)}")
    if not any(not is_sidecar(live.record) for live in lives) and failures:
        raise next((e for e in failures if isinstance(e, EmptyRunError)), failures[0])
    measuring = {*beside, *(local.folder for local in found if (local.folder / MARK).exists())}
    runs, copies = _each_once(_with_sidecars(lives), statistics, monitors)
    ended = all(run.ended for run in runs) and not any(map(is_at_work, measuring))
    return Look(runs, ended and len(lives) == len(found[-MOST_RUNS:]), (*notes, *copies))


def _changed(local: LocalRun) -> float:
    """Return when a run was written to last, in seconds."""
    try:
        return max(file.stat().st_mtime for file in local.files)
    except OSError:  # it went away
        return 0.0


def _read(local: LocalRun) -> LiveRun:
    if local.kind == "offline":
        return _read_offline(local)
    if not any(file.stat().st_size for file in local.files):
        raise EmptyRunError(f"{local.folder} is empty")
    record = read_local_run(local)
    notes = list(record.problems)
    try:
        if local.kind == "csv":
            spectra, (figures, left_out) = _beside_csv(local, notes)
        elif local.kind == "tensorboard":
            spectra, (figures, left_out) = _in_events(local, notes)
        else:
            spectra, figures, left_out = [], [], ["MLflow's spectra and figures are not shown"]
        notes += left_out
    except (UnreadableFileError, OSError) as error:
        spectra, figures = [], []
        notes.append(f"spectra and figures cannot be shown: {reason(error)}")
    changed = _changed(local)
    ended = time.time() - changed > QUIET
    status = time.strftime("no change since %Y-%m-%d %H:%M", time.localtime(changed))
    if not ended:
        status = time.strftime("written to at %H:%M:%S", time.localtime(changed))
    return LiveRun(record, status, ended, spectra, figures, notes=tuple(notes))


def _read_offline(local: LocalRun) -> LiveRun:
    """Return a W&B run, its parts put together where it was resumed."""
    parts, empty = [], None
    for file in local.files:
        try:
            parts.append(read_offline_run(file, summary=False))
        except EmptyRunError as error:
            empty = error
    if empty is not None and not parts:
        raise empty
    last = parts[-1]
    run = replace(
        last,
        rows=[row for part in parts for row in part.rows],
        problems=tuple(problem for part in parts for problem in part.problems),
        exit_code=last.exit_code if empty is None else None,
    )
    return offline_run(run, local.files[-1].parent / "files", str(local.folder))


def _beside_csv(local: LocalRun, notes: list[str]) -> tuple[Spectra, tuple[Pictures, list[str]]]:
    """Return what files hold beside a table; of a sidecar at the steps of the run's loggers."""
    spectra: Spectra = []
    if any(local.folder.glob("spectra_*.jsonl")):
        spectra = read_spectra(local.folder).get("hessian", [])
    if read_mark(local.folder) is not None:
        rows, _ = read_csv(local.files[0])
        steps = {int(row["step"]): int(row.get(LOGGED_STEP, row["step"])) for row in rows}
        spectra = [(steps.get(step, step), found) for step, found in spectra]
    return spectra, figures_beside(local.folder)


def _in_events(local: LocalRun, notes: list[str]) -> tuple[Spectra, tuple[Pictures, list[str]]]:
    """Return the texts and pictures in TensorBoard's files."""
    panels = EventPanels()
    for file in local.files:
        read_panels(file, panels)
    spectra = {}
    for step, text in panels.texts.get(_WHAT, []):
        try:
            spectra[step] = decode_spectrum(text)
        except ValueError as error:
            notes.append(f"the spectrum at step {step} is left out: {reason(error)}")
    pictures = {
        key.removeprefix("figures/"): content
        for key, content in panels.pictures.items()
        if key.startswith("figures/")
    }
    return sorted(spectra.items(), key=lambda found: found[0]), shown_figures(pictures)


def _with_sidecars(lives: Sequence[LiveRun]) -> list[LiveRun]:
    """Return the runs, each with the rows and spectra of what was measured beside it."""
    records, _ = join_sidecars([live.record for live in lives])
    by_source = {live.record.source: live for live in lives}
    sidecars = [live for live in lives if is_sidecar(live.record)]
    found = []
    for record in records:
        live = by_source[record.source]
        spectra = dict(live.spectra)
        for sidecar in sidecars:
            if sidecar is not live and is_of(sidecar.record, record):
                spectra = dict(sidecar.spectra) | spectra
        ordered = sorted(spectra.items(), key=lambda pair: pair[0])
        found.append(replace(live, record=record, spectra=ordered))
    return found


def _each_once(
    lives: Sequence[LiveRun], statistics: Sequence[str], monitors: Sequence[str]
) -> tuple[tuple[LiveRun, ...], tuple[str, ...]]:
    """Return each run once, with unique names, and a sentence for each copy that was found."""
    named = with_unique_names(live.record for live in lives)
    table = each_run_once(RunTable(named), statistics, monitors, warn=False)
    by_source = {live.record.source: live for live in lives}
    runs = tuple(replace(by_source[record.source], record=record) for record in table)
    return runs, table.copies
