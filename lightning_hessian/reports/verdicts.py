"""What the numbers say, in words, and not more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from lightning_hessian.reports.across import AcrossRuns
from lightning_hessian.reports.within import OverRuns, WithinRun, excludes_zero
from lightning_hessian.statistics.dependence import MIN_BLOCK_POINTS

Pair = TypeVar("Pair", WithinRun, AcrossRuns)
_HIGH = 0.5  # a coefficient that a reader would take for something
MINUS, NOTHING = "\u2212", "\u2013"


def number(value: float, digits: int = 2) -> str:
    """Returns a coefficient as text: a true minus sign, an en dash for NaN.

    Example:
        >>> number(-0.5), number(float("nan"))
        ('−0.50', '–')
    """
    return NOTHING if math.isnan(value) else f"{value:.{digits}f}".replace("-", MINUS)


def p_text(value: float) -> str:
    """Returns a p-value as text.

    Example:
        >>> p_text(0.04), p_text(0.00004)
        ('0.040', '< 0.001')
    """
    if math.isnan(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval_text(interval: tuple[float, float], digits: int = 2) -> str:
    """Returns an interval as text.

    Example:
        >>> interval_text((-0.25, 0.5))
        '−0.25 to 0.50'
    """
    return (
        NOTHING if math.isnan(interval[0]) else " to ".join(number(end, digits) for end in interval)
    )


def ranked(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns pairs with the strongest evidence first, then the largest abs(r); NaN last."""

    def key(pair: Pair) -> tuple[bool, int, float]:
        if isinstance(pair, AcrossRuns):
            clear = excludes_zero(pair.fisher), pair.holm < 0.05
        else:
            clear = excludes_zero((pair.differences.low, pair.differences.high)), pair.holm < 0.05
        return math.isnan(pair.r), -sum(clear), -abs(pair.r)

    return sorted(pairs, key=key)


def verdict_within(pair: WithinRun, num_tests: int) -> str:
    """Returns what one run says of a statistic and a monitored metric.

    Args:
        pair: The numbers.
        num_tests: How many pairs of the run were looked at.
    """
    if math.isnan(pair.r):
        return f"No coefficient: {_why(pair.reason)}."
    differences = (pair.differences.low, pair.differences.high)
    if math.isnan(pair.r_differences):
        why = pair.reason.partition("r_differences: ")[2]
        return f"Too little to tell. First differences have no coefficient: {why}."
    if math.isnan(differences[0]):
        return (
            f"Too little to tell: an interval of first differences takes {MIN_BLOCK_POINTS + 1} "
            f"measurements, and there are {pair.num_points}."
        )
    level = excludes_zero((pair.block.low, pair.block.high))
    if excludes_zero(differences):
        return _moves(pair, level, num_tests) + _lead(pair)
    if level:
        way = "the same way" if pair.r > 0 else "opposite ways"
        return (
            f"Both drift {way} over the run, as a trend that they share would make them; first "
            "differences show nothing." + _lead(pair)
        )
    if abs(pair.r) >= _HIGH:
        return (
            "Nothing shown: r is far from zero, but two series that drift give that without any "
            "link, and first differences show nothing." + _lead(pair)
        )
    return "Nothing shown, neither over the run nor by first differences." + _lead(pair)


def _why(reason: str) -> str:
    return reason.partition("; r_differences")[0].removeprefix("r, spearman: ")


def _moves(pair: WithinRun, level: bool, num_tests: int) -> str:
    way = "together" if pair.r_differences > 0 else "in opposite ways"
    text = f"From one measurement to the next they move {way}"
    if level and pair.r * pair.r_differences > 0:
        text += ", as they do over the whole run"
    elif level:
        text += ", though over the whole run it is the other way round"
    elif abs(pair.r) >= _HIGH:
        text += "; over the whole run drift alone could give this r"
    else:
        text += "; over the whole run nothing is shown"
    if num_tests > 1:
        holds = "holds" if pair.holm < 0.05 else "does not hold"
        text += f". After correction for {num_tests} pairs this {holds}"
    return text + "."


def _lead(pair: WithinRun) -> str:
    if pair.lead is None or not pair.lead.is_clear or pair.lead.lag == 0:
        return ""
    lag = pair.lead.lag
    which = "later" if lag > 0 else "earlier"
    return (
        f" Its changes agree best with those of {pair.monitor} {abs(lag)} measurement"
        f"{'s' if abs(lag) > 1 else ''} {which}."
    )


def verdict_across(pair: AcrossRuns, num_tests: int, group: str | None = None) -> str:
    """Returns what the runs say of a statistic and a monitored metric, one point a run.

    Args:
        pair: The numbers.
        num_tests: How many pairs were looked at.
        group: What the runs are grouped by.
    """
    if math.isnan(pair.r):
        return f"No coefficient: {_why(pair.reason)}."
    if not excludes_zero(pair.fisher):
        return "Not told from zero." + _groups(pair, group)
    text = _goes(pair, pair.r)
    if num_tests > 1:
        holds = ", also" if pair.holm < 0.05 else ", but not"
        text += f"{holds} after correction for {num_tests} pairs"
    elif pair.p_value >= 0.05:
        text += f", though permutations give p {_equals(pair.p_value)}"
    text += "."
    if pair.r * pair.spearman <= 0 or abs(pair.r) - abs(pair.spearman) > 0.3:
        text += " Ranks say less: a few runs carry it, or it is no straight line."
    return text + _groups(pair, group)


def _goes(pair: AcrossRuns, r: float) -> str:
    return f"Higher {pair.statistic} goes with {'higher' if r > 0 else 'lower'} {pair.monitor}"


def _groups(pair: AcrossRuns, group: str | None) -> str:
    if group is None or math.isnan(pair.r_within_groups):
        return ""
    clear, whole = excludes_zero(pair.within_interval), excludes_zero(pair.fisher)
    if not clear:
        return f" Within the groups of {group} it is not told from zero." if whole else ""
    if not whole:
        goes = _goes(pair, pair.r_within_groups).replace("Higher", "higher", 1)
        return f" Within the groups of {group} {goes} (not corrected)."
    if pair.r_within_groups * pair.r < 0:
        return f" Within the groups of {group} it is the other way round."
    return f" The same within the groups of {group}."


def verdict_over(pair: OverRuns, num_tests: int) -> str:
    """Returns what the runs say together of movements within them.

    Args:
        pair: The numbers.
        num_tests: How many pairs were looked at.
    """
    if not pair.holm < 0.05:
        return "First differences show no common sign."
    way = "together" if pair.num_positive * 2 > pair.num_runs else "in opposite ways"
    corrected = f", also after correction for {num_tests} pairs" if num_tests > 1 else ""
    return f"From one measurement to the next they tend to move {way}{corrected}."


def _equals(p_value: float) -> str:
    text = p_text(p_value)
    return text if text.startswith("<") else f"= {text}"
