"""What goes with what within each run, and what the runs say of it together."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from lightning_hessian.histories.parallel import Progress, map_runs
from lightning_hessian.histories.run_table import RunRecord, RunTable
from lightning_hessian.statistics.correlation import pearson
from lightning_hessian.statistics.dependence import (
    BlockInterval,
    LeadLag,
    partial_correlation,
    shift_p_value,
)
from lightning_hessian.statistics.multiple_testing import benjamini_hochberg, holm
from lightning_hessian.statistics.verdict import Movement, corrected, movement

Interval = tuple[float, float]


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
        lead: Lead and lag of first differences, None where the run is too short.
        reason: Why coefficients are NaN.
        holm: p-value of ``differences``, corrected by Holm for all pairs of this run.
        bh: The same by Benjamini and Hochberg.
        num_tests: How many pairs of this run ``holm`` and ``bh`` correct for.
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
    lead: LeadLag | None
    reason: str
    holm: float = math.nan
    bh: float = math.nan
    num_tests: int = 0

    @property
    def movement(self) -> Movement:
        """What the verdict is given on."""
        return Movement(
            num_points=self.num_points,
            r=self.r,
            block=self.block,
            r_differences=self.r_differences,
            differences=self.differences,
            lead=self.lead,
            reason=self.reason,
            corrected_p=self.holm,
            num_tests=self.num_tests,
        )


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


def within_runs(
    table: RunTable,
    statistics: Sequence[str],
    monitors: Sequence[str],
    *,
    progress: Progress,
    workers: int | None = None,
) -> list[WithinRun]:
    """Return every pair of every run; pairs without two common rows are left out."""
    analyse = functools.partial(within_run, statistics=tuple(statistics), monitors=tuple(monitors))
    found = map_runs(analyse, table.runs, what="correlated", progress=progress, workers=workers)
    return [pair for pairs in found for pair in pairs]


def within_run(
    run: RunRecord, statistics: Sequence[str], monitors: Sequence[str]
) -> list[WithinRun]:
    """Return every pair of one run that has two rows in common, corrected for their number."""
    pairs = [
        _pair(run, statistic, monitor)
        for monitor in monitors
        for statistic in statistics
        if np.sum(np.isfinite(run.series(statistic) + run.series(monitor))) >= 2
    ]
    found = corrected([pair.movement for pair in pairs])
    shares = benjamini_hochberg([pair.differences.p_value for pair in pairs])
    return [
        replace(pair, holm=one.corrected_p, bh=float(q), num_tests=one.num_tests)
        for pair, one, q in zip(pairs, found, shares, strict=True)
    ]


def _pair(run: RunRecord, statistic: str, monitor: str) -> WithinRun:
    x, y = run.series(statistic), run.series(monitor)
    both = np.isfinite(x) & np.isfinite(y)
    x, y, steps = x[both], y[both], run.steps[both]
    found, moved = pearson(x, y), movement(x, y)
    defined, differenced = not math.isnan(found.r), not math.isnan(found.r_differences)
    return WithinRun(
        run=run.name,
        statistic=statistic,
        monitor=monitor,
        num_points=found.num_points,
        r=found.r,
        fisher=found.interval,
        block=moved.block,
        shift_p=shift_p_value(x, y) if defined else math.nan,
        spearman=found.spearman,
        kendall=float(stats.kendalltau(x, y)[0]) if defined else math.nan,
        r_differences=found.r_differences,
        differences=moved.differences,
        differences_shift_p=shift_p_value(np.diff(x), np.diff(y)) if differenced else math.nan,
        partial=partial_correlation(x, y, steps) if defined else math.nan,
        lead=moved.lead,
        reason=found.reason,
    )


def over_runs(pairs: Sequence[WithinRun]) -> list[OverRuns]:
    """Return a summary over runs of every pair that at least two runs have."""
    grouped: dict[tuple[str, str], list[WithinRun]] = {}
    for pair in pairs:
        grouped.setdefault((pair.statistic, pair.monitor), []).append(pair)
    found = []
    for (statistic, monitor), members in grouped.items():
        r = np.array([p.r for p in members if not math.isnan(p.r)])
        differences = np.array([p.r_differences for p in members])
        differences = differences[np.isfinite(differences)]
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
