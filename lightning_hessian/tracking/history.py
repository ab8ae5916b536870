"""The history of a run's measurements in float64, and the correlation with what is monitored."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_hessian.statistics.correlation import Correlation, pearson

Row = dict[str, float]


class History:
    """One row for each measurement: its step, its statistics and the monitored metrics.

    A row of a step that is there already (a resumed run repeats some) replaces the old one.
    """

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self.rows: list[Row] = [dict(row) for row in rows]
        self._columns: dict[str, array[float]] = {}
        self._columns_of: list[Row] = self.rows

    @classmethod
    def checked(cls, rows: Any) -> History:
        """Return a history of rows that come from a file.

        Raises:
            ValueError: They are no rows of numbers with ascending steps.
        """
        whole = isinstance(rows, list) and all(
            isinstance(row, dict)
            and "step" in row
            and all(isinstance(k, str) and isinstance(v, (int, float)) for k, v in row.items())
            for row in rows
        )
        if not whole:
            raise ValueError("the history is no list of rows of numbers.")
        steps = [row["step"] for row in rows]
        if any(not math.isfinite(a) for a in steps) or steps != sorted(set(steps)):
            raise ValueError("the steps of the history do not ascend.")
        return cls(rows)

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row, which must have the key ``"step"``."""
        while self.rows and not self.rows[-1]["step"] < row["step"]:
            self.rows.pop()
            self._columns = {}
        self.rows.append(dict(row))

    def series(self, key: str) -> NDArray[np.float64]:
        """Return the values of a key, NaN where a row has none, float64 [rows].

        A column is kept and continued: what a measurement costs does not grow with the number of
        dicts that were added before it.
        """
        if self._columns_of is not self.rows:
            self._columns, self._columns_of = {}, self.rows
        column = self._columns.setdefault(key, array("d"))
        if len(column) > len(self.rows):
            del column[:]
        column.extend(row.get(key, math.nan) for row in self.rows[len(column) :])
        return np.array(column)

    def correlations(
        self, statistics: Sequence[str], monitors: Sequence[str]
    ) -> dict[tuple[str, str], Correlation]:
        """Return the correlation of each statistic with each monitored metric, where defined."""
        found = {}
        for statistic in statistics:
            for monitor in monitors:
                correlation = pearson(self.series(statistic), self.series(monitor))
                if not math.isnan(correlation.r):
                    found[statistic, monitor] = correlation
        return found


def correlation_scalars(
    correlations: Mapping[tuple[str, str], Correlation], prefix: str = ""
) -> dict[str, float]:
    """Return the logged keys of correlations; empty where there are none.

    For each pair ``pearson_<pair>`` with its 95 % interval ``pearson_low_<pair>`` and
    ``pearson_high_<pair>``, ``spearman_<pair>`` and ``differences_<pair>`` (Pearson's r of first
    differences), and once ``num_points``, the number of points behind each of them, all under
    ``correlation/``. Pairs that have fewer points than others have ``num_points_<pair>`` of their
    own. A pair is ``<statistic>_<monitor>``; a ``prefix`` stands before the name of each
    statistic, and before ``num_points``. What is undefined (the differences of four points) is
    absent.
    """
    if not correlations:
        return {}
    most = max(correlation.num_points for correlation in correlations.values())
    scalars: dict[str, float] = {f"correlation/{prefix}num_points": float(most)}
    for (statistic, monitor), correlation in correlations.items():
        pair = f"{prefix}{key_part(statistic)}_{key_part(monitor)}"
        low, high = correlation.interval
        found = {
            "pearson": correlation.r,
            "pearson_low": low,
            "pearson_high": high,
            "spearman": correlation.spearman,
            "differences": correlation.r_differences,
        }
        if correlation.num_points < most:
            found["num_points"] = correlation.num_points
        scalars |= {
            f"correlation/{name}_{pair}": float(value)
            for name, value in found.items()
            if math.isfinite(value)
        }
    return scalars


def key_part(name: str) -> str:
    """Return a name with letters, digits and underscores only.

    Example:
        >>> key_part("val/loss")
        'val_loss'
    """
    return re.sub(r"\W", "_", name, flags=re.ASCII)
