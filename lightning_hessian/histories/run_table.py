"""Histories of runs in one tidy table: run, config, step, statistics, monitored metrics."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lightning_hessian.histories.offline_run import finite_or_float
from lightning_hessian.results import ArgumentError, FloatArray, UnreadableFileError, bounds
from lightning_hessian.results.base import nearest
from lightning_hessian.results.escaping import csv_cell
from lightning_hessian.results.outside import check_integer, encodable, printable
from lightning_hessian.results.shown import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP_KEYS = ("trainer/global_step", "step", "_step")
"""What counts the steps of a row: Lightning's count where it was logged, else W&B's of rows."""

ConfigValue = str | int | float | bool | None


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The history of one run.

    Attributes:
        run_id: Id of the run, or the name of its folder.
        name: What it is called in tables; unique within a `RunTable`.
        source: The folder, or the W&B path, it came from.
        kind: ``"wandb"``, ``"offline"``, ``"csv"``, ``"tensorboard"`` or ``"mlflow"``.
        config: Hyperparameters, nested keys joined by dots, lists as JSON.
        steps: Steps of the rows [n], ascending, each once.
        columns: Values by key, each [n], NaN where a row has none.
        problems: What was left out of a damaged or live run, and why.
        identities: Which fits wrote it, as the callbacks log it; records of one run share them.
    """

    run_id: str
    name: str
    source: str
    kind: str
    config: dict[str, ConfigValue]
    steps: FloatArray
    columns: dict[str, FloatArray]
    problems: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def series(self, key: str) -> FloatArray:
        """Return the values of a key [n], all NaN where the run never logged it."""
        found = self.columns.get(key)
        return np.full(len(self.steps), np.nan) if found is None else found


@dataclass(frozen=True, eq=False, repr=False)
class RunTable(Shown):
    """The histories of several runs.

    Attributes:
        runs: One record a run; names are unique.
        skipped: What was found but could not be read at all, and why.
        copies: Which records were taken for one run, in sentences.
    """

    runs: tuple[RunRecord, ...]
    skipped: tuple[str, ...] = field(default=())
    copies: tuple[str, ...] = field(default=())

    _views: ClassVar[str] = "lightning_hessian.histories.views"

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[RunRecord]:
        return iter(self.runs)

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that was left out, run by run."""
        of_runs = (f"{run.name}: {problem}" for run in self.runs for problem in run.problems)
        return (*self.skipped, *of_runs)

    def keys(self) -> list[str]:
        """Return the names of all logged metrics, sorted."""
        return sorted({key for run in self.runs for key in run.columns})

    def config_keys(self) -> list[str]:
        """Return the config keys, those that differ between runs first."""
        keys = sorted({key for run in self.runs for key in run.config})
        return sorted(keys, key=lambda key: not self.varies(key))

    def varies(self, config_key: str) -> bool:
        """Whether a config key has more than one value among the runs."""
        return len({run.config.get(config_key) for run in self.runs}) > 1

    def require(self, key: str, *, config: bool = False, argument: str = "key") -> None:
        """Raise ValueError, with the nearest names there are, where no run has a key."""
        known = self.config_keys() if config else self.keys()
        if key in known:
            return
        near = ", ".join(nearest(key, known))
        there = f"nearest: {near}." if near else "they have no keys at all."
        what = "has it in its config" if config else "logged it"
        raise ArgumentError(argument, key, f"None of the {len(self)} run(s) {what}; {there}")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield tidy rows: run, name, step, ``config.<key>`` and the metrics that the row has."""
        for run in self.runs:
            config = {f"config.{key}": value for key, value in run.config.items()}
            for index, step in enumerate(run.steps):
                values = ((key, float(column[index])) for key, column in run.columns.items())
                yield {
                    "run": run.run_id,
                    "name": run.name,
                    **config,
                    "step": float(step),
                    **{key: value for key, value in values if not math.isnan(value)},
                }

    def plot(self, ax: Axes | None = None, *, key: str | None = None) -> Axes:
        """Draw a logged metric of every run over its steps.

        Args:
            ax: Where to draw; by default axes of a new pyplot figure.
            key: The metric; by default the validation loss, or else another loss.

        Returns:
            The matplotlib axes.

        Raises:
            ValueError: No run logged it; the nearest names are told.
        """
        if key is not None:
            self.require(key)
        return self._on(ax, key=key)

    def write_csv(self, path: str | PathLike[str]) -> None:
        """Write the tidy rows to a CSV file; absent values are empty."""
        columns = ["run", "name", *(f"config.{key}" for key in self.config_keys()), "step"]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            named = [*columns, *self.keys()]
            writer.writerow(map(csv_cell, named))
            writer.writerows([csv_cell(row.get(key, "")) for key in named] for row in self.rows())


def columns_of(rows: Iterable[Mapping[str, Any]]) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Return the steps and the numeric columns of logged rows.

    Rows of one step become one row. Where a step comes again, as after a resume from a checkpoint,
    the value logged last wins. A row that does not say its step has that of the row before.

    Args:
        rows: In the order in which they were logged.

    Raises:
        UnreadableFileError: Rows times columns are beyond the bound.

    Example:
        >>> steps, columns = columns_of([{"step": 0, "a": 1}, {"step": 5, "a": 2}, {"step": 5, "a": 3}])
        >>> steps.tolist(), columns["a"].tolist()
        ([0.0, 5.0], [1.0, 3.0])
    """  # noqa: E501
    listed = list(rows)
    step_key = next((key for key in STEP_KEYS if any(key in row for row in listed)), None)
    steps: list[float] = []
    found: dict[str, tuple[list[int], list[float]]] = {}
    for index, row in enumerate(listed):
        step = _number(row.get(step_key)) if step_key else float(index)
        steps.append(step if step is not None and math.isfinite(step) else (steps or [0.0])[-1])
        for key, value in row.items():
            if key in STEP_KEYS or key.startswith("_"):
                continue
            number = value if type(value) is float else _number(value)
            if number is not None:
                places, values = found.setdefault(key, ([], []))
                places.append(index)
                values.append(number)
    unique, place = np.unique(np.asarray(steps, dtype=np.float64), return_inverse=True)
    if len(unique) * len(found) > bounds.TABLE_VALUES:
        raise UnreadableFileError(
            f"{len(found)} keys in {len(unique)} rows make a table of more than "
            f"{bounds.TABLE_VALUES} values"
        )
    columns = {}
    for key, (places, values) in found.items():
        where = place[places]
        column = np.full(len(unique), np.nan)
        if len(unique) < len(steps):
            last = dict(zip(where.tolist(), values, strict=True))  # of equal keys the last
            column[list(last)] = list(last.values())
        else:
            column[where] = values
        columns[encodable(key)] = column
    return unique, columns


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, ConfigValue]:
    """Return a nested configuration with its keys joined by dots.

    Example:
        >>> flat_config({"lr": 0.1, "model": {"width": 64, "sizes": [1, 2]}})
        {'lr': 0.1, 'model.width': 64, 'model.sizes': '[1, 2]'}
    """
    flat: dict[str, ConfigValue] = {}
    if len(prefix) > bounds.KEY_LENGTH or prefix.count(".") > bounds.DEPTH * 2:
        raise UnreadableFileError("the configuration has keys beyond the bounds")
    for key, value in config.items():
        name = encodable(f"{prefix}{key}")
        if isinstance(value, Mapping):
            flat |= flat_config(value, f"{name}.")
        elif isinstance(value, str):
            flat[name] = encodable(value)
        elif value is None or isinstance(value, (int, float, bool)):
            flat[name] = _bounded(value)
        else:
            flat[name] = json.dumps(value, default=str, skipkeys=True)
    return flat


def _bounded(value: float | None) -> ConfigValue:
    try:
        return check_integer(value) if isinstance(value, int) else value
    except ValueError as error:
        return str(error)


def cleaned(run: RunRecord) -> RunRecord:
    """Return a run whose texts every file and terminal takes: no controls, bounded names."""
    return replace(
        run,
        run_id=printable(run.run_id),
        name=printable(run.name, bounds.NAME_LENGTH),
        source=printable(run.source),
        problems=tuple(printable(problem) for problem in run.problems),
    )


def with_unique_names(runs: Iterable[RunRecord]) -> tuple[RunRecord, ...]:
    """Return the runs, in which those that share a name have their id (or source) added."""
    listed = list(runs)
    for part in ("run_id", "source"):
        names = [run.name for run in listed]
        listed = [
            replace(run, name=f"{run.name} ({getattr(run, part)})")
            if names.count(run.name) > 1
            else run
            for run in listed
        ]
    return tuple(listed)


def _number(value: Any) -> float | None:
    try:
        value = finite_or_float(value)
    except ValueError:
        return None
    return float(value) if isinstance(value, (int, float)) else None
