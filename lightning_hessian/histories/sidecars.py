"""Spectra that were measured beside a run, of its checkpoints: they join the run by step.

The folder of such a measurement has a mark, which names the run. A record of the folder, or of the
W&B run that was logged from it, is no run of its own: where the run is read too, both are one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lightning_hessian.histories.csv_runs import read_csv
from lightning_hessian.histories.marks import CONFIG, LOGGED_STEP, MARK, read_mark
from lightning_hessian.histories.offline_run import OfflineRun
from lightning_hessian.histories.run_table import RunRecord
from lightning_hessian.histories.spectra import read_spectra
from lightning_hessian.results import UnreadableFileError
from lightning_hessian.results.base import FloatArray
from lightning_hessian.tracking.loggers import STEP
from lightning_hessian.tracking.spectra import encode_spectrum

_SILENT = 300.0
"""Seconds without a sign of life after which a sidecar is taken to have been stopped. It gives one
every ten seconds, but not while it builds or loads."""

_LOSS, _GAP, _VALIDATION = "hessian/loss", "hessian/gap", "val_loss"


def join_sidecars(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], tuple[str, ...]]:
    """Return the runs, each with what was measured beside it, and a sentence for each joining.

    A value that the run logged itself stays. Steps that the run logged nothing at are added. Where
    the probe is of the training data, the gap is the validation loss minus the loss on the probe.
    """
    sidecars = [run for run in runs if _is_sidecar(run)]
    found = [run for run in runs if not _is_sidecar(run)]
    told = []
    for sidecar in sidecars:
        owners = [place for place, run in enumerate(found) if _is_of(sidecar, run)]
        for place in owners:
            found[place] = _joined(found[place], sidecar)
            told.append(
                f"{sidecar.name} ({sidecar.kind}, {sidecar.source}) was measured beside "
                f"{found[place].name}: one run"
            )
        if not owners:
            found.append(sidecar)
    return found, tuple(told)


def _is_sidecar(run: RunRecord) -> bool:
    return any(run.config.get(f"{CONFIG}.{name}") for name in ("run", "folder"))


def _is_of(sidecar: RunRecord, run: RunRecord) -> bool:
    if run.kind in ("offline", "wandb") and run.run_id == sidecar.config.get(f"{CONFIG}.run"):
        return True
    folder = sidecar.config.get(f"{CONFIG}.folder")
    return bool(folder) and run.kind != "wandb" and os.path.realpath(run.source) == folder


def _joined(run: RunRecord, sidecar: RunRecord) -> RunRecord:
    steps = np.union1d(run.steps, sidecar.steps)
    columns: dict[str, FloatArray] = {}
    for key in dict.fromkeys([*run.columns, *sidecar.columns]):
        own, other = _at(steps, run, key), _at(steps, sidecar, key)
        columns[key] = np.where(np.isnan(own), other, own)
    if sidecar.config.get(f"{CONFIG}.split") == "train" and _VALIDATION in columns:
        loss = columns.get(_LOSS, np.full(len(steps), np.nan))
        gap = columns.get(_GAP, np.full(len(steps), np.nan))
        columns[_GAP] = np.where(np.isnan(gap), columns[_VALIDATION] - loss, gap)
    return replace(
        run,
        steps=steps,
        columns=columns,
        problems=(*run.problems, *sidecar.problems),
        identities=tuple(dict.fromkeys((*run.identities, *sidecar.identities))),
    )


def _at(steps: FloatArray, run: RunRecord, key: str) -> FloatArray:
    """Return a column of a run at steps that hold its own, NaN elsewhere."""
    values = np.full(len(steps), np.nan)
    values[np.searchsorted(steps, run.steps)] = run.series(key)
    return values


def is_at_work(folder: Path) -> bool:
    """Whether a sidecar still measures: its mark does not say that it has ended, and is fresh."""
    mark = read_mark(folder)
    try:
        age = time.time() - (folder / MARK).stat().st_mtime
    except OSError:
        return False
    return mark is not None and not mark.ended and age < _SILENT


def with_sidecar(run: OfflineRun, folder: Path) -> OfflineRun:
    """Return an offline W&B run with rows for what was measured beside it so far.

    Raises:
        ValueError: The folder is that of another run, or none of a sidecar's.
    """
    mark = read_mark(folder)
    if mark is None:
        raise ValueError(
            f"{folder} is no folder of a sidecar: it has no {MARK}. Give the --out of `measure "
            "--follow`."
        )
    if mark.run_id and mark.run_id != run.run_id:
        raise ValueError(f"{folder} was measured beside {mark.run_id}, not beside {run.run_id}.")
    try:
        measured, problems = read_csv(folder / "metrics.csv")
        spectra = dict(read_spectra(folder).get("hessian", []))
    except (UnreadableFileError, OSError):  # nothing has been measured yet
        return run
    own: dict[float, set[str]] = {}
    losses: dict[float, float] = {}
    for row in run.rows:
        if isinstance(step := row.get(STEP), (int, float)):
            own.setdefault(step, set()).update(row)
            if isinstance(loss := row.get(_VALIDATION), float):
                losses[step] = loss
    added = []
    for row in measured:
        step = row.get(LOGGED_STEP, row["step"])
        values = {key: value for key, value in row.items() if key.startswith("hessian/")}
        if mark.split == "train" and step in losses and _LOSS in values:
            values[_GAP] = losses[step] - values[_LOSS]
        if (spectrum := spectra.get(int(row["step"]))) is not None:
            text = encode_spectrum(spectrum.eigenvalues, spectrum.residuals, spectrum.converged)
            values["spectra/hessian"] = text
        known = own.get(step, set())
        added.append({STEP: step, **{k: v for k, v in values.items() if k not in known}})
    return replace(run, rows=[*run.rows, *added], problems=(*run.problems, *problems))
