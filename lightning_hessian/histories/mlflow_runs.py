"""Runs in a folder of MLflow's, `mlruns`, read file by file without MLflow.

``mlruns/<experiment>/<run>`` holds ``meta.yaml``, a file for each metric (``metrics/<key>``, a line
for each point: milliseconds, value, step), one for each hyperparameter (``params/<key>``), and
``artifacts``. The slashes of a key are folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_hessian.histories.hparams import read_hparams
from lightning_hessian.results import UnreadableFileError, bounds
from lightning_hessian.results.outside import Problems, inside, printable, read_bounded, reason

META, METRICS, PARAMS = "meta.yaml", "metrics", "params"

_PARAM_BYTES = 64 * 2**10  # of one hyperparameter; MLflow's own limit is 6000 characters
_NUM_FILES = 20_000  # of metrics, or of hyperparameters; W&B's bound for keys is 10,000
_CONSTANTS = {"None": None, "True": True, "False": False}
_IDENTITY_BYTES = 64


def metric_files(folder: Path, names: list[str]) -> tuple[Path, ...]:
    """Return the files of the metrics of a run; none where the folder is not that of a run.

    Args:
        folder: The folder.
        names: What files are in it.
    """
    if META not in names or not (folder / METRICS).is_dir():
        return ()
    return tuple(sorted(_files(folder / METRICS)))


def read_metric(file: Path, folder: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return rows ``{"step": .., key: value}`` of one metric, and what was left out.

    Args:
        file: Of the metric.
        folder: Of the run.

    Raises:
        UnreadableFileError: It is beyond the bounds.
        OSError: It cannot be opened.
    """
    inside(file, folder)
    key = file.relative_to(folder / METRICS).as_posix()
    problems, rows = Problems(), []
    lines = read_bounded(file, bounds.RUN_FILE_BYTES).decode("utf-8", errors="replace").splitlines()
    if len(lines) > bounds.NUM_VALUES:
        raise UnreadableFileError(f"{file} has {len(lines)} lines, more than are read")
    for number, line in enumerate(lines, 1):
        try:
            _, value, step = line.split()
            rows.append({"step": float(int(step)), key: float(value)})
        except ValueError:
            problems.append(f"{key}, line {number}: {printable(line, 60)!r} is no point, left out")
    return rows, problems.told()


def read_meta(folder: Path, problems: list[str]) -> dict[str, Any]:
    """Return what MLflow says of a run: ``run_name``, ``run_id``, ``end_time``.

    Raises:
        UnreadableFileError: The run was deleted in MLflow.
    """
    meta = read_hparams(folder / META, problems)
    if meta.get("lifecycle_stage") == "deleted":
        raise UnreadableFileError(f"{folder} was deleted in MLflow")
    if not meta.get("end_time"):
        problems.append("the run has not ended (live, or killed)")
    return meta


def read_params(folder: Path, problems: list[str]) -> dict[str, Any]:
    """Return the hyperparameters of a run, slashes as dots; MLflow keeps each as a text."""
    found: dict[str, Any] = {}
    for file in sorted(_files(folder / PARAMS)):
        key = file.relative_to(folder / PARAMS).as_posix().replace("/", ".")
        try:
            inside(file, folder)
            text = read_bounded(file, _PARAM_BYTES).decode("utf-8", errors="replace")
        except (UnreadableFileError, OSError) as error:
            problems.append(f"{key} left out: {reason(error)}")
            continue
        found[key] = _value(text)
    return found


def identity_texts(folder: Path) -> list[dict[str, str]]:
    """Return what the callbacks logged as the identity of the fit, as rows of texts."""
    found = []
    for file in sorted((folder / "artifacts" / "identity").glob("*.txt")):
        if file.is_file() and not file.is_symlink() and file.stat().st_size <= _IDENTITY_BYTES:
            text = file.read_text(encoding="utf-8", errors="replace")
            found.append({f"identity/{file.stem}": text.strip()})
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder of metrics or hyperparameters; links are left alone."""
    left, number = [(folder, 0)], 0
    while left:
        here, depth = left.pop()
        if not here.is_dir():
            continue
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and depth < bounds.FOLDER_DEPTH:
                    left.append((here / entry.name, depth + 1))
                elif entry.is_file(follow_symlinks=False):
                    number += 1
                    if number > _NUM_FILES:
                        return
                    yield here / entry.name


def _value(text: str) -> Any:
    """Return the number, the truth value or the text that a text stands for.

    Example:
        >>> _value("3"), _value("0.1"), _value("None"), _value("Adam")
        (3, 0.1, None, 'Adam')
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    for kind in (int, float):
        if len(text) <= bounds.DIGITS:
            try:
                return kind(text)
            except ValueError:
                continue
    return text
