"""What goes with what: within each run, and across runs with one point each."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import stats

from lightning_hessian.reports.parallel import Progress, map_runs
from lightning_hessian.reports.run_table import RunRecord, RunTable
from lightning_hessian.results import FloatArray
from lightning_hessian.statistics.correlation import fisher_interval, pearson
from lightning_hessian.statistics.dependence import (
    UNDEFINED,
    BlockInterval,
    LeadLag,
    block_interval,
    lead_lag,
    partial_correlation,
    permutation_p_value,
    shift_p_value,
)
from lightning_hessian.statistics.multiple_testing import benjamini_hochberg, holm
from lightning_hessian.statistics.scaling import ScalingFit, fit_scaling

Interval = tuple[float, float]
NO_INTERVAL = (math.nan, math.nan)


def excludes_zero(interval: Interval) -> bool:
    """Whether an interval lies on one side of zero; False where it is NaN."""
    return interval[0] > 0 or interval[1] < 0


@dataclass(frozen=True)
class WithinRun:
    """How one statistic and one monitored metric move together over one run.

    Attributes:
        run: Name of the run.
        statistic: Key of the statistic.
        monitor: Key of the monitored metric.
        num_points: Rows in which both are finite.
        r: Pearson's coefficient.
        fisher: Its 95 % interval for independent points.
        block: Its 95 % interval and p-value for points that depend on their neighbours.
        shift_p: p-value of ``r`` by circular shifts.
        spearman: Spearman's coefficient.
        kendall: Kendall's tau-b.
        r_differences: Pearson's coefficient of first differences.
        differences: Interval and p-value of ``r_differences``, by blocks.
        differences_shift_p: p-value of ``r_differences`` by circular shifts.
        partial: Pearson's coefficient once a straight line in the step is taken out of both.
        partial_interval: Fisher's interval of ``partial``.
        lead: Lead and lag of first differences, None where the run is too short.
        reason: Why coefficients are NaN.
        holm: p-value of ``differences``, corrected by Holm for all pairs of this run.
        bh: The same by Benjamini and Hochberg.
    """

    run: str
    statistic: str
    monitor: str
    num_points: int
    r: float
    fisher: Interval
    block: BlockInterval
    shift_p: float
    spearman: float
    kendall: float
    r_differences: float
    differences: BlockInterval
    differences_shift_p: float
    partial: float
    partial_interval: Interval
    lead: LeadLag | None
    reason: str
    holm: float = math.nan
    bh: float = math.nan


@dataclass(frozen=True)
class OverRuns:
    """What the runs say together of one pair, each run by its own coefficient.

    Attributes:
        statistic: Key of the statistic.
        monitor: Key of the monitored metric.
        num_runs: Runs with a coefficient of first differences.
        median_r: Median over runs of Pearson's r.
        range_r: Smallest and largest r.
        median_differences: Median over runs of the r of first differences.
        range_differences: Smallest and largest of them.
        num_positive: Runs in which the r of first differences is positive.
        sign_p: Two-sided p-value of the sign test over runs.
        holm: The same, corrected by Holm for all pairs.
    """

    statistic: str
    monitor: str
    num_runs: int
    median_r: float
    range_r: Interval
    median_differences: float
    range_differences: Interval
    num_positive: int
    sign_p: float
    holm: float = math.nan


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
        r_logs: Pearson's coefficient of the logarithms; NaN where a value is not positive.
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
    r_logs: float
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


def within_runs(
    table: RunTable,
    statistics: Sequence[str],
    monitors: Sequence[str],
    *,
    progress: Progress,
    workers: int | None = None,
) -> list[WithinRun]:
    """Returns every pair of every run; pairs without two common rows are left out.

    Args:
        table: The runs.
        statistics: Keys of statistics.
        monitors: Keys of monitored metrics.
        progress: Where it is shown how far it is.
        workers: How many processes.
    """
    analyse = functools.partial(within_run, statistics=tuple(statistics), monitors=tuple(monitors))
    found = map_runs(analyse, table.runs, what="correlated", progress=progress, workers=workers)
    return [pair for pairs in found for pair in pairs]


def within_run(
    run: RunRecord, statistics: Sequence[str], monitors: Sequence[str]
) -> list[WithinRun]:
    """Returns every pair of one run that has two rows in common, corrected for their number."""
    pairs = [
        _pair(run, statistic, monitor)
        for monitor in monitors
        for statistic in statistics
        if np.sum(np.isfinite(run.series(statistic) + run.series(monitor))) >= 2
    ]
    p_values = [pair.differences.p_value for pair in pairs]
    corrected = zip(holm(p_values), benjamini_hochberg(p_values), strict=True)
    return [
        replace(pair, holm=float(h), bh=float(q))
        for pair, (h, q) in zip(pairs, corrected, strict=True)
    ]


def _pair(run: RunRecord, statistic: str, monitor: str) -> WithinRun:
    x, y = run.series(statistic), run.series(monitor)
    both = np.isfinite(x) & np.isfinite(y)
    x, y, steps = x[both], y[both], run.steps[both]
    found = pearson(x, y)
    defined, differenced = not math.isnan(found.r), not math.isnan(found.r_differences)
    dx, dy = np.diff(x), np.diff(y)
    partial = partial_correlation(x, y, steps) if defined else math.nan
    return WithinRun(
        run=run.name,
        statistic=statistic,
        monitor=monitor,
        num_points=found.num_points,
        r=found.r,
        fisher=found.interval,
        block=block_interval(x, y) if defined else UNDEFINED,
        shift_p=shift_p_value(x, y) if defined else math.nan,
        spearman=found.spearman,
        kendall=float(stats.kendalltau(x, y)[0]) if defined else math.nan,
        r_differences=found.r_differences,
        differences=block_interval(dx, dy) if differenced else UNDEFINED,
        differences_shift_p=shift_p_value(dx, dy) if differenced else math.nan,
        partial=partial,
        partial_interval=fisher_interval(partial, found.num_points, num_controlled=1),
        lead=lead_lag(dx, dy) if differenced else None,
        reason=found.reason,
    )


def over_runs(pairs: Sequence[WithinRun]) -> list[OverRuns]:
    """Returns a summary over runs of every pair that at least two runs have."""
    grouped: dict[tuple[str, str], list[WithinRun]] = {}
    for pair in pairs:
        grouped.setdefault((pair.statistic, pair.monitor), []).append(pair)
    found = []
    for (statistic, monitor), members in grouped.items():
        r = np.array([p.r for p in members if not math.isnan(p.r)])
        differences = np.array(
            [p.r_differences for p in members if not math.isnan(p.r_differences)]
        )
        if len(differences) < 2:
            continue
        positive = int(np.sum(differences > 0))
        found.append(
            OverRuns(
                statistic=statistic,
                monitor=monitor,
                num_runs=len(differences),
                median_r=float(np.median(r)),
                range_r=(float(r.min()), float(r.max())),
                median_differences=float(np.median(differences)),
                range_differences=(float(differences.min()), float(differences.max())),
                num_positive=positive,
                sign_p=float(stats.binomtest(positive, len(differences)).pvalue),
            )
        )
    adjusted = holm([pair.sign_p for pair in found])
    return [replace(pair, holm=float(p)) for pair, p in zip(found, adjusted, strict=True)]


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
    """Returns one point of each run.

    Args:
        table: The runs.
        statistics: Keys of statistics.
        monitors: Keys of monitored metrics; the first decides what is best.
        at: ``"last"`` row with a statistic and a monitor, ``"best"`` such row, or the last such row
            up to a step.
        mode: Whether the best is the ``"min"`` or the ``"max"`` of the monitor.
        group: Config key for colours.
        size: Config key for scaling fits.

    Raises:
        ValueError: ``at`` or ``mode`` is none of these, or no run has the config key.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r} is neither 'min' nor 'max'.")
    for key in filter(None, (group, size)):
        table.require(key, config=True)
    names, steps, rows, groups, sizes, left_out = [], [], [], [], [], []
    keys = [*statistics, *monitors]
    for run in table:
        index = _row(run, statistics, monitors, at, mode)
        if index is None:
            until = f" up to step {at:g}" if isinstance(at, (int, float)) else ""
            left_out.append(f"{run.name}: no row{until} has a statistic and {monitors[0]}")
            continue
        names.append(run.name)
        steps.append(run.steps[index])
        rows.append([run.series(key)[index] for key in keys])
        groups.append("" if group is None else _label(run.config.get(group)))
        sizes.append(math.nan if size is None else _size(run.config.get(size)))
    values = np.array(rows, dtype=np.float64).reshape(len(names), len(keys))
    return Points(
        names=tuple(names),
        steps=np.array(steps, dtype=np.float64),
        values=dict(zip(keys, values.T, strict=True)),
        groups=tuple(groups),
        sizes=np.array(sizes, dtype=np.float64),
        left_out=tuple(left_out),
    )


def _row(
    run: RunRecord, statistics: Sequence[str], monitors: Sequence[str], at: str | float, mode: str
) -> int | None:
    """Returns the index of the row that stands for a run."""
    measured = np.any([np.isfinite(run.series(key)) for key in statistics], axis=0)
    monitor = run.series(monitors[0])
    usable = np.flatnonzero(measured & np.isfinite(monitor))
    if isinstance(at, (int, float)):
        usable = usable[run.steps[usable] <= at]
    elif at not in ("last", "best"):
        raise ValueError(f"at={at!r} is neither 'last' nor 'best' nor a step.")
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
    """Returns every pair across runs, corrected for their number."""
    pairs = [_across(points, s, m) for m in monitors for s in statistics]
    p_values = [pair.p_value for pair in pairs]
    corrected = zip(holm(p_values), benjamini_hochberg(p_values), strict=True)
    return [
        replace(pair, holm=float(h), bh=float(q))
        for pair, (h, q) in zip(pairs, corrected, strict=True)
    ]


def _across(points: Points, statistic: str, monitor: str) -> AcrossRuns:
    x, y = points.values[statistic], points.values[monitor]
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    labels = np.array(points.groups, dtype=str)[both]
    found = pearson(x, y)
    defined = not math.isnan(found.r)
    names = sorted(set(labels.tolist()))
    within, freedom = math.nan, len(names) - 1
    if defined and 1 < len(names) < len(x) - 2:
        indicator = np.column_stack([labels == name for name in names[1:]]).astype(np.float64)
        within = partial_correlation(x, y, indicator)
    members = {name: labels == name for name in names} if len(names) > 1 else {}
    positive = defined and bool(np.all(x > 0) and np.all(y > 0))
    return AcrossRuns(
        statistic=statistic,
        monitor=monitor,
        num_points=found.num_points,
        r=found.r,
        fisher=found.interval,
        p_value=permutation_p_value(x, y) if defined else math.nan,
        spearman=found.spearman,
        kendall=float(stats.kendalltau(x, y)[0]) if defined else math.nan,
        r_logs=pearson(np.log(x), np.log(y)).r if positive else math.nan,
        r_within_groups=within,
        within_interval=fisher_interval(within, len(x), num_controlled=freedom),
        groups={
            name: (pearson(x[mask], y[mask]).r, int(mask.sum())) for name, mask in members.items()
        },
        # A point is a run here, and its neighbours mean nothing: no word of differences.
        reason=found.reason.partition("; r_differences")[0] if not defined else "",
    )


def scaling_fits(points: Points, keys: Sequence[str], size: str) -> list[Scaling]:
    """Returns how each key scales with the size of the run."""
    return [Scaling(key, size, fit_scaling(points.sizes, points.values[key])) for key in keys]


def ranked(pairs: Sequence[Any]) -> list[Any]:
    """Returns pairs with the strongest evidence first, then the largest abs(r); NaN last."""

    def key(pair: Any) -> tuple[bool, int, float]:
        if isinstance(pair, AcrossRuns):
            clear = excludes_zero(pair.fisher), pair.holm < 0.05
        else:
            clear = excludes_zero((pair.differences.low, pair.differences.high)), pair.holm < 0.05
        return math.isnan(pair.r), -sum(clear), -abs(pair.r)

    return sorted(pairs, key=key)
