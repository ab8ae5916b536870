"""Runs on the disk: of W&B offline, of Lightning's CSVLogger, of TensorBoard, of MLflow."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hessian.histories.csv_runs import read_csv
from lightning_hessian.histories.hparams import read_hparams
from lightning_hessian.histories.marks import MARK, by_logged_step, read_mark
from lightning_hessian.histories.mlflow_runs import (
    META,
    PARAMS,
    identity_texts,
    metric_files,
    read_meta,
    read_metric,
    read_params,
)
from lightning_hessian.histories.offline_run import read_offline_run
from lightning_hessian.histories.run_table import RunRecord, cleaned, columns_of, flat_config
from lightning_hessian.histories.same_run import identities_beside, identities_in
from lightning_hessian.histories.tensorboard_events import read_events
from lightning_hessian.results import UnreadableFileError, bounds
from lightning_hessian.results.outside import inside, printable, reason, unreadable

RUN_FOLDER = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(?P<id>.+)")
"""The name of the folder of a W&B run on the disk."""

_METRICS, _HPARAMS, _EVENTS = "metrics.csv", "hparams.yaml", "events.out.tfevents."


@dataclass(frozen=True)
class LocalRun:
    """Where one run lies.

    Attributes:
        kind: ``"offline"``, ``"csv"``, ``"tensorboard"`` or ``"mlflow"``.
        folder: Its folder; that of its last part where a W&B run was resumed.
        files: What is read, oldest first.
    """

    kind: str
    folder: Path
    files: tuple[Path, ...]

    def state(self) -> tuple[Any, ...]:
        """Return what changes whenever a file of the run does."""
        beside = (_HPARAMS, MARK, *((META, PARAMS) if self.kind == "mlflow" else ()))
        files = (*self.files, *(self.folder / name for name in beside))
        return tuple(
            (os.path.realpath(file), file.stat().st_size, file.stat().st_mtime_ns)
            for file in files
            if file.exists()
        )


def find_local_runs(path: Path) -> list[LocalRun]:
    """Return the runs in a folder and all folders below it, or the one of a file.

    The parts of a W&B run that was resumed (same id, same parent folder) are one run. Where CSV and
    event files lie in one folder, they are the same run and the CSV is read.

    Raises:
        FileNotFoundError: There is no such path, or no run there.
    """
    if path.exists() and not path.is_dir():
        file = Path(os.path.realpath(path)) if path.is_symlink() else path
        return [LocalRun(_kind(file), file.parent, (file,))]
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder, and a W&B path is ENTITY/PROJECT[/RUN]."
        )
    found: list[LocalRun] = []
    parts: dict[tuple[Path, str], list[Path]] = {}
    for here, names in _folders(path):
        for name in names:
            if name.endswith(".wandb"):
                run_id = RUN_FOLDER.fullmatch(here.name)
                label = run_id["id"] if run_id else str(here)
                parts.setdefault((here.parent, label), []).append(here / name)
        events = tuple(here / name for name in names if name.startswith(_EVENTS))
        if _METRICS in names:
            found.append(LocalRun("csv", here, (here / _METRICS,)))
        elif events:
            found.append(LocalRun("tensorboard", here, events))
        elif metrics := metric_files(here, names):
            found.append(LocalRun("mlflow", here, metrics))
    for files in parts.values():
        files.sort(key=lambda file: file.parent.name.partition("run-")[2])
        found.append(LocalRun("offline", files[-1].parent, tuple(files)))
    if not found:
        raise FileNotFoundError(
            f"{path} holds no run: no .wandb file, no {_METRICS}, no {_EVENTS}*, no run of "
            "MLflow in it or below."
        )
    return sorted(found, key=lambda run: str(run.folder))


def _folders(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folders below a path, each with the names of what is no folder in it.

    `os.walk` of Python 3.11 calls itself for each level, and ends at a thousand of them.
    """
    left = [(path, 0)]
    while left:
        here, depth = left.pop()
        subfolders, names = [], []
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        subfolders.append(entry.name)
                    elif not os.path.isdir(entry.path):  # a link that leads in circles is none
                        names.append(entry.name)
        except OSError as error:
            warnings.warn(f"{printable(str(here))} left out: {reason(error)}", stacklevel=3)
            continue
        yield here, sorted(names)
        if depth < bounds.FOLDER_DEPTH:
            left += [(here / name, depth + 1) for name in sorted(subfolders, reverse=True)]
        elif subfolders:
            warnings.warn(
                f"folders more than {bounds.FOLDER_DEPTH} below {printable(str(path))} left out",
                stacklevel=3,
            )


def read_local_run(run: LocalRun) -> RunRecord:
    """Return the history of a run, as far as its files are whole.

    Raises:
        UnreadableFileError: Not one file of it can be read; a ValueError.
        OSError: A file cannot be opened.
        ModuleNotFoundError: It takes a package that is not installed.
    """
    with unreadable(run.folder):
        return cleaned(_read(run))


def _read(run: LocalRun) -> RunRecord:
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    problems: list[str] = []
    broken: list[str] = []
    run_id = name = ""
    for file in run.files:
        trouble: tuple[str, ...]
        try:
            inside(file, file.parent)
            if run.kind == "offline":
                part = read_offline_run(file, summary=False)
                more, trouble, place = part.rows, part.problems, file.parent.name
                config |= part.config
                run_id, name = part.run_id, part.name or name
                if part.exit_code is None and part.complete:
                    trouble = (*trouble, "the run has not ended (live, or killed)")
            elif run.kind == "mlflow":
                (more, trouble), place = read_metric(file, run.folder), "metrics"
            else:
                more, trouble = (read_csv if run.kind == "csv" else read_events)(file)
                place = file.name
        except (ValueError, OSError) as error:
            broken.append(str(error))
            continue
        rows += more
        if len(rows) > bounds.NUM_VALUES:
            raise UnreadableFileError(f"{run.folder} holds more than {bounds.NUM_VALUES} values")
        problems += [f"{place}: {problem}" for problem in trouble]
    if len(broken) == len(run.files):
        raise UnreadableFileError("; ".join(broken))
    if run.kind == "offline":
        identities = identities_in(rows)
    elif run.kind == "mlflow":
        meta = read_meta(run.folder, problems)
        config |= read_params(run.folder, problems)
        run_id, name = run.folder.name, str(meta.get("run_name") or "")
        identities = identities_in(identity_texts(run.folder))
    else:
        config |= read_hparams(run.folder / _HPARAMS, problems)
        # Not resolved: what the user typed is what he will recognise.
        run_id, name = str(run.folder), "/".join(run.folder.absolute().parts[-2:])
        identities = identities_beside(run.folder)
        mark = read_mark(run.folder) if run.kind == "csv" else None
        if mark is not None:
            config |= mark.config()
            rows = by_logged_step(rows)
    steps, columns = columns_of(rows)
    return RunRecord(
        run_id=run_id,
        name=name or run_id,
        source=str(run.folder),
        kind=run.kind,
        config=flat_config(config),
        steps=steps,
        columns=columns,
        problems=(*broken, *problems),
        identities=identities,
    )


def _kind(file: Path) -> str:
    if file.suffix == ".csv":
        return "csv"
    return "tensorboard" if file.name.startswith(_EVENTS) else "offline"


def find_all(paths: Iterable[Path]) -> list[LocalRun]:
    """Return the runs below several paths, each once."""
    found = {
        os.path.realpath(run.files[-1]): run for path in paths for run in find_local_runs(path)
    }
    return list(found.values())
