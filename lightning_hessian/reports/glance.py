"""A report at a glance: one sentence for anybody, one figure, one short ranked table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_hessian.reports.findings import CorrelationReport
from lightning_hessian.reports.verdicts import is_sure, judged, ranked
from lightning_hessian.results.escaping import visible
from lightning_hessian.tracking.style import COLOURS, quiet_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 8
_LONGEST = 32
_NOT_SHOWN = "0.55"  # grey, on paper and on a dark page


@dataclass(frozen=True)
class Glance:
    """One pair, as the first screen tells it.

    Attributes:
        run: Name of the run, empty across runs.
        statistic: Key of the statistic.
        monitor: Key of the monitored metric.
        r: The coefficient that the verdict rests on: across runs that of the runs, one point each;
            within a run that of the changes from one measurement to the next.
        interval: Its 95 % interval.
        spearman: Spearman's coefficient of the levels.
        num_points: Runs, or rows.
        shown: Whether a relation is shown.
        label: The verdict in a few words.
    """

    run: str
    statistic: str
    monitor: str
    r: float
    interval: tuple[float, float]
    spearman: float
    num_points: int
    shown: bool
    label: str


def is_across(report: CorrelationReport) -> bool:
    """Return whether the report has coefficients across runs, which then come first."""
    return any(not math.isnan(pair.r) for pair in report.across)


def glances(report: CorrelationReport) -> list[Glance]:
    """Return all pairs that have a coefficient, the strongest evidence first."""
    if is_across(report):
        return [
            Glance(
                "", pair.statistic, pair.monitor, pair.r, pair.fisher, pair.spearman,
                pair.num_points, is_sure(pair), _way(pair.r) if is_sure(pair) else "not shown",
            )
            for pair in ranked(report.across)
            if not math.isnan(pair.r)
        ]  # fmt: skip
    return [
        Glance(
            pair.run, pair.statistic, pair.monitor, pair.r_differences,
            (pair.differences.low, pair.differences.high), pair.spearman,
            pair.num_points, judged(pair).is_shown, judged(pair).label,
        )
        for pair in ranked(report.within)
        if not math.isnan(pair.r)
    ]  # fmt: skip


def _way(r: float) -> str:
    return f"higher with {'higher' if r > 0 else 'lower'}"


def sentence(report: CorrelationReport, name: Callable[[str], str] = str) -> str:
    """Return the answer in one sentence that needs no statistics to be understood.

    Args:
        report: What was found.
        name: What becomes of the name of a metric, for markup.
    """
    monitors = " or ".join(map(name, report.monitors))
    pairs = glances(report)
    shown = [pair for pair in pairs if pair.shown]
    if is_across(report):
        runs = f"Over {max(pair.num_points for pair in pairs)} runs"
        if not shown:
            return (
                f"{runs}, nothing measured here is shown to go with {monitors}: it may be chance."
            )
        best = _telling(shown)
        text = f"{runs}, those with a higher {name(best.statistic)} ended with a "
        text += f"{'higher' if best.r > 0 else 'lower'} {name(best.monitor)}"
    elif not pairs:
        return f"There are too few measurements to say what goes with {monitors}."
    elif not shown:
        run = "In this run" if len(report.table) == 1 else "In these runs"
        text = f"{run}, nothing measured here is shown to go with {monitors}"
        if any(pair.label == "shared drift only" for pair in pairs):
            return f"{text}: curves that all change as training goes on agree without meaning it."
        if all("too few" in pair.label for pair in pairs):
            return f"{text}: there are too few measurements to tell."
        return f"{text}."
    else:
        best = _telling(shown)
        run = "In this run" if len(report.table) == 1 else f"In {name(best.run)}"
        text = f"{run}, when {name(best.statistic)} rose from one measurement to the next, "
        text += f"{name(best.monitor)} mostly {'rose too' if best.r > 0 else 'fell'}"
    others = len({(pair.statistic, pair.monitor) for pair in shown}) - 1
    if others:
        text += f", and {others} more pair{'s' if others > 1 else ''} went together"
    return f"{text}."


def _telling(shown: Sequence[Glance]) -> Glance:
    """Return the strongest pair whose statistic is no loss itself, if there is one.

    That the loss on the training probe goes with the validation loss surprises nobody.
    """
    return next((pair for pair in shown if not pair.statistic.endswith("/loss")), shown[0])


def draw(report: CorrelationReport, axes: Axes) -> None:
    """Draw the strongest pairs: coefficient, its interval, and Spearman's beside it.

    Raises:
        ValueError: No pair has a coefficient.
    """
    pairs = [pair for pair in glances(report) if not math.isnan(pair.r)][:MOST_ROWS]
    if not pairs:
        raise ValueError("No pair has a coefficient, so there is nothing to draw.")
    for place, pair in enumerate(pairs):
        colour = COLOURS[0] if pair.shown else _NOT_SHOWN
        low, high = pair.interval
        if not math.isnan(low):
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2)
        axes.plot(pair.r, place, "o", color=colour, markersize=6)
        if not math.isnan(pair.spearman):
            axes.plot(pair.spearman, place, "|", color=COLOURS[1], markersize=11, markeredgewidth=2)
    axes.axvline(0, color=_NOT_SHOWN, linewidth=0.8)
    axes.set_yticks(range(len(pairs)), _labels(pairs))
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    what = "across runs" if is_across(report) else "of changes within a run"
    axes.set(xlim=(-1.05, 1.05), xlabel=f"r {what}, 95 % (blue: shown); bar: Spearman's")
    quiet_grid(axes)


def _labels(pairs: Sequence[Glance]) -> list[str]:
    """Return how the axis names each pair, no more of it than tells them apart."""
    monitors, runs = {pair.monitor for pair in pairs}, {pair.run for pair in pairs}
    found = []
    for pair in pairs:
        text = _short(pair.statistic)
        text += f"\nwith {_short(pair.monitor)}" if len(monitors) > 1 else ""
        text += f"\nin {_short(pair.run)}" if len(runs) > 1 else ""
        found.append(visible(text).replace("$", r"\$"))
    return found


def _short(name: str) -> str:
    """Return a name that leaves room for the figure beside it; the table has it whole."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."
