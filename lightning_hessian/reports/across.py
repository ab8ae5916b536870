"""What goes with what across runs, with one point each, and how it scales with their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import stats

from lightning_hessian.histories.run_table import RunRecord, RunTable
from lightning_hessian.reports.within import Interval
from lightning_hessian.results import FloatArray
from lightning_hessian.statistics.correlation import fisher_interval, pearson
from lightning_hessian.statistics.dependence import partial_correlation, permutation_p_value
from lightning_hessian.statistics.multiple_testing import benjamini_hochberg, holm
from lightning_hessian.statistics.scaling import ScalingFit


@dataclass(frozen=True)
class AcrossRuns:
    """How one statistic and one monitored metric go together across runs, one point a run.

    Attributes:
        statistic: Key of the statistic.
        monitor: Key of the monitored metric.
        num_points: Runs in which both are finite.
        r: Pearson's coefficient.
        fisher: Its 95 % interval.
        p_value: By permuting runs.
        spearman: Spearman's coefficient.
        kendall: Kendall's tau-b.
        r_within_groups: Pearson's coefficient once the means of the groups are taken out.
        within_interval: Fisher's interval of it.
        groups: Pearson's coefficient and number of runs of each group.
        reason: Why ``r`` is NaN.
        holm: ``p_value`` corrected by Holm for all pairs.
        bh: The same by Benjamini and Hochberg.
    """

    statistic: str
    monitor: str
    num_points: int
    r: float
    fisher: Interval
    p_value: float
    spearman: float
    kendall: float
    r_within_groups: float
    within_interval: Interval
    groups: dict[str, tuple[float, int]]
    reason: str
    holm: float = math.nan
    bh: float = math.nan


@dataclass(frozen=True)
class Scaling:
    """How one quantity scales with a size in the config.

    Attributes:
        quantity: Key of the statistic or monitored metric.
        size: Key of the config.
        fit: The line in the log-log plot.
    """

    quantity: str
    size: str
    fit: ScalingFit


@dataclass(frozen=True, eq=False)
class Points:
    """One point a run.

    Attributes:
        names: Names of the runs.
        steps: Step that was chosen of each run [n].
        values: Value by key [n], NaN where absent.
        groups: What each run is coloured by; empty strings without groups.
        sizes: Size of each run [n], NaN without.
        left_out: Runs without a point, and why.
    """

    names: tuple[str, ...]
    steps: FloatArray
    values: dict[str, FloatArray]
    groups: tuple[str, ...]
    sizes: FloatArray
    left_out: tuple[str, ...] = field(default=())


def choose_points(
    table: RunTable,
    statistics: Sequence[str],
    monitors: Sequence[str],
    *,
    at: str | float = "last",
    mode: str = "min",
    group: str | None = None,
    size: str | None = None,
) -> Points:
    """Return one point of each run, by the arguments of `correlation_report`.

    The row that is chosen has a statistic and the first monitor, which decides what is best.

    Raises:
        ValueError: No run has the config key.
    """
    for argument, key in (("group", group), ("size", size)):
        if key is not None:
            table.require(key, config=True, argument=argument)
    chosen: list[tuple[RunRecord, int]] = []
    left_out = []
    for run in table:
        index = _row(run, statistics, monitors, at, mode)
        if index is None:
            until = f" up to step {at:g}" if isinstance(at, (int, float)) else ""
            left_out.append(f"{run.name}: no row{until} has a statistic and {monitors[0]}")
        else:
            chosen.append((run, index))
    keys = [*statistics, *monitors]
    configs = [run.config for run, _ in chosen]
    return Points(
        names=tuple(run.name for run, _ in chosen),
        steps=np.array([run.steps[index] for run, index in chosen], dtype=np.float64),
        values={key: np.array([run.series(key)[index] for run, index in chosen]) for key in keys},
        groups=tuple("" if group is None else _label(config.get(group)) for config in configs),
        sizes=np.array([math.nan if size is None else _size(c.get(size)) for c in configs]),
        left_out=tuple(left_out),
    )


def _row(
    run: RunRecord, statistics: Sequence[str], monitors: Sequence[str], at: str | float, mode: str
) -> int | None:
    """Return the index of the row that stands for a run."""
    measured = np.any([np.isfinite(run.series(key)) for key in statistics], axis=0)
    monitor = run.series(monitors[0])
    usable = np.flatnonzero(measured & np.isfinite(monitor))
    if isinstance(at, (int, float)):
        usable = usable[run.steps[usable] <= at]
    if len(usable) == 0:
        return None
    if at == "best":
        pick = np.argmin if mode == "min" else np.argmax
        return int(usable[pick(monitor[usable])])
    return int(usable[-1])


def _label(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if type(value) is float else str(value)


def _size(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)
    except ValueError:
        return math.nan


def across_runs(
    points: Points, statistics: Sequence[str], monitors: Sequence[str]
) -> list[AcrossRuns]:
    """Return every pair across runs, corrected for their number."""
    pairs = [_across(points, s, m) for m in monitors for s in statistics]
    p_values = [pair.p_value for pair in pairs]
    corrected = zip(pairs, holm(p_values), benjamini_hochberg(p_values), strict=True)
    return [replace(pair, holm=float(h), bh=float(q)) for pair, h, q in corrected]


def _across(points: Points, statistic: str, monitor: str) -> AcrossRuns:
    x, y = points.values[statistic], points.values[monitor]
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    labels = np.array(points.groups, dtype=str)[both]
    found = pearson(x, y)
    defined = not math.isnan(found.r)
    members = {name: labels == name for name in sorted(set(labels.tolist()))}
    within, freedom = math.nan, len(members) - 1
    if defined and 1 < len(members) < len(x) - 2:
        indicator = np.column_stack(list(members.values())[1:]).astype(np.float64)
        within = partial_correlation(x, y, indicator)
    return AcrossRuns(
        statistic=statistic,
        monitor=monitor,
        num_points=found.num_points,
        r=found.r,
        fisher=found.interval,
        p_value=permutation_p_value(x, y) if defined else math.nan,
        spearman=found.spearman,
        kendall=float(stats.kendalltau(x, y)[0]) if defined else math.nan,
        r_within_groups=within,
        within_interval=fisher_interval(within, len(x), num_controlled=freedom),
        groups={
            name: (pearson(x[mask], y[mask]).r, int(mask.sum()))
            for name, mask in members.items()
            if len(members) > 1
        },
        # A point is a run here, and its neighbours mean nothing: no word of differences.
        reason=found.reason.partition("; r_differences")[0] if not defined else "",
    )
