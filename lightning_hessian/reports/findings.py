"""What a correlation report found, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lightning_hessian.histories.run_table import RunTable
from lightning_hessian.reports.across import AcrossRuns, Points, Scaling
from lightning_hessian.reports.within import OverRuns, WithinRun
from lightning_hessian.results.shown import Shown


@dataclass(frozen=True, eq=False, repr=False)
class CorrelationReport(Shown):
    """What goes with what, in numbers; `write_report` puts it into words, tables, figures.

    Its `plot` and its repr show the first lines of that report, its `to_pandas` correlations.csv.

    Attributes:
        table: The runs.
        statistics: Keys of statistics.
        monitors: Keys of monitored metrics.
        points: One point a run, empty where there are fewer than 4 runs.
        across: Pairs across runs.
        scaling: How quantities scale with size.
        within: Pairs within runs.
        over: Summaries over runs of ``within``.
        settings: What was asked for.
    """

    table: RunTable
    statistics: tuple[str, ...]
    monitors: tuple[str, ...]
    points: Points | None
    across: tuple[AcrossRuns, ...]
    scaling: tuple[Scaling, ...]
    within: tuple[WithinRun, ...]
    over: tuple[OverRuns, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    _views: ClassVar[str] = "lightning_hessian.reports.views"
