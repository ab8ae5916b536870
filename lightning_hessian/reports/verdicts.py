"""What the numbers say, in words, and not more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from lightning_hessian.reports.across import AcrossRuns
from lightning_hessian.reports.within import OverRuns, WithinRun, excludes_zero
from lightning_hessian.statistics.dependence import MIN_BLOCK_POINTS

Pair = TypeVar("Pair", WithinRun, AcrossRuns)
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
        return f"No coefficient. {pair.reason.capitalize()}."
    what = f"r = {number(pair.r)}"
    if pair.num_points < MIN_BLOCK_POINTS or math.isnan(pair.r_differences):
        why = pair.reason or f"an interval takes {MIN_BLOCK_POINTS} points"
        return f"Too little to tell: {what} over {pair.num_points} measurements ({why})."
    differences = (pair.differences.low, pair.differences.high)
    if math.isnan(differences[0]):
        return (
            f"Too little to tell: {what} over {pair.num_points} measurements, and first "
            f"differences are too few for an interval (r = {number(pair.r_differences)})."
        )
    level = excludes_zero((pair.block.low, pair.block.high))
    steps = excludes_zero(differences)
    of_steps = f"r = {number(pair.r_differences)}, 95 % {interval_text(differences)}"
    if steps:
        return _moves(pair, level, of_steps, num_tests) + _lead(pair)
    nothing = f"first differences show nothing ({of_steps})"
    if level:
        way = "the same way" if pair.r > 0 else "opposite ways"
        return (
            f"Both drift {way} over the run ({what}), but {nothing}: a trend that they share "
            "would look like this." + _lead(pair)
        )
    allowed = interval_text((pair.block.low, pair.block.high))
    if abs(pair.r) >= 0.5:
        what += " is high, but two series that drift give that without any link"
    despite = f"{what}; allowing for dependence it may be {allowed}"
    return f"Nothing shown: {despite}, and {nothing}." + _lead(pair)


def _moves(pair: WithinRun, level: bool, of_steps: str, num_tests: int) -> str:
    way = "together" if pair.r_differences > 0 else "in opposite ways"
    text = f"From one measurement to the next they move {way} ({of_steps})"
    if level and pair.r * pair.r_differences > 0:
        text += f", as they do over the whole run (r = {number(pair.r)})"
    elif level:
        text += f", though over the whole run it is the other way round (r = {number(pair.r)})"
    else:
        drift = "which drift alone can give" if abs(pair.r) >= 0.5 else "not told from zero"
        text += f"; over the whole run r = {number(pair.r)}, {drift}"
    if num_tests > 1:
        holds = "holds" if pair.holm < 0.05 else "does not hold"
        text += f". After correction for {num_tests} pairs this {holds} (p {_equals(pair.holm)})"
    return text + "."


def _lead(pair: WithinRun) -> str:
    if pair.lead is None or not pair.lead.is_clear or pair.lead.lag == 0:
        return ""
    lag = pair.lead.lag
    which = "later" if lag > 0 else "earlier"
    return (
        f" Its changes agree best with those of {pair.monitor} {abs(lag)} measurement"
        f"{'s' if abs(lag) > 1 else ''} {which} (r = {number(pair.lead.r)})."
    )


def verdict_across(pair: AcrossRuns, num_tests: int, group: str | None = None) -> str:
    """Returns what the runs say of a statistic and a monitored metric, one point a run.

    Args:
        pair: The numbers.
        num_tests: How many pairs were looked at.
        group: What the runs are grouped by.
    """
    if math.isnan(pair.r):
        return f"No coefficient. {pair.reason.capitalize()}."
    what = f"r = {number(pair.r)}, 95 % {interval_text(pair.fisher)}, {pair.num_points} runs"
    if not excludes_zero(pair.fisher):
        return f"Not told from zero ({what})." + _groups(pair, group)
    way = "higher" if pair.r > 0 else "lower"
    text = f"Higher {pair.statistic} goes with {way} {pair.monitor} ({what})"
    if num_tests > 1:
        holds = ", also" if pair.holm < 0.05 else ", but not"
        text += f"{holds} after correction for {num_tests} pairs (p {_equals(pair.holm)})"
    elif pair.p_value >= 0.05:
        text += f", though permutations give p {_equals(pair.p_value)}"
    text += "."
    if pair.r * pair.spearman <= 0 or abs(pair.r) - abs(pair.spearman) > 0.3:
        text += (
            f" Ranks say less (Spearman {number(pair.spearman)}): a few runs carry it, or it is "
            "no straight line."
        )
    return text + _groups(pair, group)


def _groups(pair: AcrossRuns, group: str | None) -> str:
    if group is None or math.isnan(pair.r_within_groups):
        return ""
    inside = f"r = {number(pair.r_within_groups)}, 95 % {interval_text(pair.within_interval)}"
    clear, whole = excludes_zero(pair.within_interval), excludes_zero(pair.fisher)
    if clear and pair.r_within_groups * pair.r < 0 and whole:
        return f" Within the groups of {group} it is the other way round ({inside})."
    if clear:
        return f" Within the groups of {group}: {inside}."
    if whole:
        return f" Within the groups of {group} it is not told from zero ({inside})."
    return ""


def verdict_over(pair: OverRuns, num_tests: int) -> str:
    """Returns what the runs say together of movements within them.

    Args:
        pair: The numbers.
        num_tests: How many pairs were looked at.
    """
    count = f"{pair.num_positive} of {pair.num_runs}"
    if pair.holm < 0.05:
        way = "together" if pair.num_positive * 2 > pair.num_runs else "in opposite ways"
        corrected = f", corrected for {num_tests} pairs" if num_tests > 1 else ""
        return (
            f"From one measurement to the next they tend to move {way}: the sign is positive in "
            f"{count} runs (sign test p {_equals(pair.holm)}{corrected})."
        )
    return (
        f"First differences show no common sign (positive in {count} runs, "
        f"sign test p {_equals(pair.holm)})."
    )


def _equals(p_value: float) -> str:
    text = p_text(p_value)
    return text if text.startswith("<") else f"= {text}"
