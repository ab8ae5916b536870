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

from lightning_hessian.histories.marks import CONFIG, MARK, read_mark
from lightning_hessian.histories.run_table import RunRecord
from lightning_hessian.results.base import FloatArray

_SILENT = 300.0
"""Seconds without a sign of life after which a sidecar is taken to have been stopped. It gives one
every ten seconds, but not while it builds or loads."""

_LOSS, _GAP, _VALIDATION = "hessian/loss", "hessian/gap", "val_loss"


def join_sidecars(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], tuple[str, ...]]:
    """Return the runs, each with what was measured beside it, and a sentence for each joining.

    A value that the run logged itself stays. Steps that the run logged nothing at are added. Where
    the probe is of the training data, the gap is the validation loss minus the loss on the probe.
    """
    sidecars = [run for run in runs if is_sidecar(run)]
    found = [run for run in runs if not is_sidecar(run)]
    told = []
    for sidecar in sidecars:
        owners = [place for place, run in enumerate(found) if is_of(sidecar, run)]
        for place in owners:
            found[place] = _joined(found[place], sidecar)
            told.append(
                f"{sidecar.name} ({sidecar.kind}, {sidecar.source}) was measured beside "
                f"{found[place].name}: one run"
            )
        if not owners:
            found.append(sidecar)
    return found, tuple(told)


def is_sidecar(run: RunRecord) -> bool:
    """Whether a record was measured beside a run."""
    return any(run.config.get(f"{CONFIG}.{name}") for name in ("run", "folder"))


def is_of(sidecar: RunRecord, run: RunRecord) -> bool:
    """Whether a sidecar was measured beside this run."""
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
