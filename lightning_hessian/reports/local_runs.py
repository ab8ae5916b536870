"""Runs on the disk: offline W&B runs, folders of Lightning's CSVLogger, TensorBoard event files."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hessian.reports.offline_run import read_offline_run
from lightning_hessian.reports.run_table import RunRecord, columns_of, flat_config
from lightning_hessian.reports.same_run import identities_beside, identities_in
from lightning_hessian.reports.tensorboard_events import read_events

_RUN_FOLDER = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(?P<id>.+)")
_METRICS, _HPARAMS, _EVENTS = "metrics.csv", "hparams.yaml", "events.out.tfevents."


@dataclass(frozen=True)
class LocalRun:
    """Where one run lies.

    Attributes:
        kind: ``"offline"``, ``"csv"`` or ``"tensorboard"``.
        folder: Its folder; that of its last part where a W&B run was resumed.
        files: What is read, oldest first.
    """

    kind: str
    folder: Path
    files: tuple[Path, ...]

    def state(self) -> tuple[Any, ...]:
        """Returns what changes whenever a file of the run does."""
        files = (*self.files, self.folder / _HPARAMS)
        return tuple(
            (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
            for file in files
            if file.exists()
        )


def find_local_runs(path: Path) -> list[LocalRun]:
    """Returns the runs in a folder and all folders below it, or the one of a file.

    The parts of a W&B run that was resumed (same id, same parent folder) are one run. Where CSV and
    event files lie in one folder, they are the same run and the CSV is read.

    Raises:
        FileNotFoundError: There is no such path, or no run there.
    """
    if path.is_file():
        return [LocalRun(_kind(path), path.parent, (path,))]
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder, and a W&B path is ENTITY/PROJECT[/RUN]."
        )
    found: list[LocalRun] = []
    parts: dict[tuple[Path, str], list[Path]] = {}
    for folder, subfolders, names in os.walk(path):
        subfolders.sort()
        here = Path(folder)
        for name in sorted(names):
            if name.endswith(".wandb"):
                run_id = _RUN_FOLDER.fullmatch(here.name)
                label = run_id["id"] if run_id else str(here)
                parts.setdefault((here.parent, label), []).append(here / name)
        events = tuple(here / name for name in sorted(names) if name.startswith(_EVENTS))
        if _METRICS in names:
            found.append(LocalRun("csv", here, (here / _METRICS,)))
        elif events:
            found.append(LocalRun("tensorboard", here, events))
    for files in parts.values():
        files.sort(key=lambda file: file.parent.name.partition("run-")[2])
        found.append(LocalRun("offline", files[-1].parent, tuple(files)))
    if not found:
        raise FileNotFoundError(
            f"{path} holds no run: no .wandb file, no {_METRICS}, no {_EVENTS}* in it or below."
        )
    return sorted(found, key=lambda run: str(run.folder))


def read_local_run(run: LocalRun) -> RunRecord:
    """Returns the history of a run, as far as its files are whole.

    Raises:
        ValueError: Not one file of it can be read.
        ModuleNotFoundError: It takes a package that is not installed.
    """
    if run.kind == "offline":
        return _read_offline(run)
    read = _read_csv if run.kind == "csv" else read_events
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for file in run.files:
        more, trouble = read(file)
        rows += more
        problems += [f"{file.name}: {problem}" for problem in trouble]
    config = _read_hparams(run.folder / _HPARAMS, problems)
    steps, columns = columns_of(rows)
    # Not resolved: what the user typed is what he will recognise.
    name = "/".join(run.folder.absolute().parts[-2:])
    return RunRecord(
        str(run.folder), name, str(run.folder), run.kind, config, steps, columns, tuple(problems),
        identities_beside(run.folder),
    )  # fmt: skip


def _kind(file: Path) -> str:
    if file.suffix == ".csv":
        return "csv"
    return "tensorboard" if file.name.startswith(_EVENTS) else "offline"


def _read_offline(run: LocalRun) -> RunRecord:
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    problems: list[str] = []
    run_id = name = ""
    unreadable: list[str] = []
    for file in run.files:
        try:
            part = read_offline_run(file, summary=False)
        except (ValueError, OSError) as error:
            unreadable.append(str(error))
            continue
        rows += part.rows
        config |= part.config
        run_id, name = part.run_id, part.name or name
        problems += [f"{file.parent.name}: {problem}" for problem in part.problems]
        if part.exit_code is None and part.complete:
            problems.append(f"{file.parent.name}: the run has not ended (live, or killed)")
    if len(unreadable) == len(run.files):
        raise ValueError("; ".join(unreadable))
    steps, columns = columns_of(rows)
    return RunRecord(
        run_id,
        name or run_id,
        str(run.folder),
        run.kind,
        flat_config(config),
        steps,
        columns,
        (*unreadable, *problems),
        identities_in(rows),
    )


def _read_csv(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the rows of a `metrics.csv`, and what was left out.

    A CSV file has no checksums: a digit that turned into another digit cannot be found.
    """
    text = file.read_bytes().decode("utf-8", errors="replace")
    if not text.strip():
        raise ValueError(f"{file} is empty: the run wrote nothing, or the copy of it failed")
    lines = text.splitlines(keepends=True)
    problems: list[str] = []
    if not lines[-1].endswith(("\n", "\r")):
        problems.append(f"line {len(lines)} is not whole (a live or interrupted run), left out")
        lines.pop()
    if not lines:
        raise ValueError(f"{file} is cut off within its first line")
    reader = csv.reader(line.replace("\0", "\ufffd") for line in lines)
    header = next(reader)
    numeric: set[str] = set()
    doubtful: list[tuple[str, str]] = []
    rows = []
    for fields in reader:
        if len(fields) != len(header):
            problems.append(
                f"line {reader.line_num} has {len(fields)} fields, not {len(header)}, left out"
            )
            continue
        row = {}
        for key, value in zip(header, fields, strict=True):
            if value == "":
                continue
            try:
                row[key] = float(value)
                numeric.add(key)
            except ValueError:
                doubtful.append((key, f"line {reader.line_num}: {key} = {value!r} is no number"))
        rows.append(row)
    # A column without any number is text, which is no problem.
    problems += [f"{text}, left out" for key, text in doubtful if key in numeric]
    if "step" in header:
        lost = [row for row in rows if "step" not in row]
        if lost:
            problems.append(f"{len(lost)} line(s) without a step, left out")
        rows = [row for row in rows if "step" in row]
    return rows, problems


def _read_hparams(file: Path, problems: list[str]) -> dict[str, Any]:
    """Returns the hyperparameters that Lightning wrote beside the metrics."""
    if not file.exists():
        return {}
    import yaml  # type: ignore[import-untyped,unused-ignore]

    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError as error:
        problems.append(f"{_HPARAMS} left out: {_first_line(error)}")
        return {}
    return flat_config(loaded) if isinstance(loaded, dict) else {}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def find_all(paths: Iterable[Path]) -> list[LocalRun]:
    """Returns the runs below several paths, each once."""
    found = {run.files[-1].resolve(): run for path in paths for run in find_local_runs(path)}
    return list(found.values())
