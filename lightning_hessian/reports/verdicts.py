"""What the numbers say, in words, and not more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning_hessian.reports.across import AcrossRuns
from lightning_hessian.reports.within import OverRuns, WithinRun
from lightning_hessian.statistics.verdict import (
    LEVEL,
    Verdict,
    answer,
    excludes_zero,
    strength,
    verdict,
    which_of_two,
)

Pair = TypeVar("Pair", WithinRun, AcrossRuns)

LOSS = "hessian/loss"
"""The mean loss on the probe."""

GAP = "hessian/gap"
"""Where the generalization gap is logged: the validation loss minus the loss on the probe."""


@dataclass(frozen=True)
class GoesWith:
    """Whether a statistic goes with a monitored metric, with the generalization gap, or both.

    Attributes:
        scope: ``"within"`` a run, ``"across"`` runs (one point each) or ``"over"`` runs (the first
            differences of all).
        run: Name of the run, empty where it is about all of them.
        statistic: Key of the statistic.
        monitor: Key of the metric.
        with_monitor: The verdict on the metric in a few words.
        with_gap: That on the gap.
        sentence: Which of the two.
    """

    scope: str
    run: str
    statistic: str
    monitor: str
    with_monitor: str
    with_gap: str
    sentence: str


MINUS, NOTHING = "\u2212", "\u2013"


def number(value: float, digits: int = 2) -> str:
    """Return a coefficient as text: a true minus sign, an en dash for NaN.

    Example:
        >>> number(-0.5), number(float("nan"))
        ('−0.50', '–')
    """
    return NOTHING if math.isnan(value) else f"{value:.{digits}f}".replace("-", MINUS)


def p_text(value: float) -> str:
    """Return a p-value as text.

    Example:
        >>> p_text(0.04), p_text(0.00004)
        ('0.040', '< 0.001')
    """
    if math.isnan(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval_text(interval: tuple[float, float], digits: int = 2) -> str:
    """Return an interval as text.

    Example:
        >>> interval_text((-0.25, 0.5))
        '−0.25 to 0.50'
    """
    if math.isnan(interval[0]):
        return NOTHING
    return " to ".join(number(end, digits) for end in interval)


def ranked(pairs: Sequence[Pair]) -> list[Pair]:
    """Return pairs with the strongest evidence first, then the largest abs(r); NaN last."""

    def key(pair: Pair) -> tuple[bool, int, float]:
        if isinstance(pair, WithinRun):
            return strength(pair.movement)
        clear = excludes_zero(*pair.fisher), pair.holm < LEVEL
        return math.isnan(pair.r), -sum(clear), -abs(pair.r)

    return sorted(pairs, key=key)


def judged(pair: WithinRun) -> Verdict:
    """Return the verdict of one run on a statistic and a monitored metric."""
    return verdict(pair.movement, pair.monitor)


def answer_within(
    pairs: Sequence[WithinRun],
    *,
    name: Callable[[str], str] = str,
    stress: Callable[[str], str] = str,
) -> str:
    """Return what runs say of all their pairs in one sentence, as `statistics.verdict.answer`."""
    found = [(pair.statistic, pair.monitor, pair.movement) for pair in pairs]
    return answer(found, name=name, stress=stress)


def is_sure(pair: AcrossRuns) -> bool:
    """Whether a relation across runs is shown, after correction for the number of pairs."""
    return excludes_zero(*pair.fisher) and pair.holm < LEVEL


def which_goes_with(pairs: Sequence[WithinRun | AcrossRuns | OverRuns]) -> list[GoesWith]:
    """Return, for each statistic and each metric beside the gap, which of the two it goes with."""
    gaps = {(_run(pair), pair.statistic): pair for pair in pairs if pair.monitor == GAP}
    found = []
    for pair in pairs:
        gap = gaps.get((_run(pair), pair.statistic))
        if pair.monitor == GAP or gap is None:
            continue
        metric, other = _brief(pair), _brief(gap)
        sentence = which_of_two(metric[0], other[0])
        scope = {WithinRun: "within", AcrossRuns: "across"}.get(type(pair), "over")
        found.append(
            GoesWith(scope, _run(pair), pair.statistic, pair.monitor, metric[1], other[1], sentence)
        )
    return found


def _run(pair: Any) -> str:
    return pair.run if isinstance(pair, WithinRun) else ""


def _brief(pair: WithinRun | AcrossRuns | OverRuns) -> tuple[Verdict | bool | None, str]:
    """Return whether a relation is shown, and the same in a few words."""
    if isinstance(pair, WithinRun):
        found = judged(pair)
        return found, found.label
    if isinstance(pair, AcrossRuns):
        shown = None if math.isnan(pair.r) else is_sure(pair)
        words = "higher with higher" if pair.r > 0 else "higher with lower"
    else:
        shown = None if math.isnan(pair.holm) else pair.holm < LEVEL
        words = "move " + ("together" if pair.num_positive * 2 > pair.num_runs else "oppositely")
    return shown, words if shown else "no coefficient" if shown is None else "not shown"


def verdict_across(pair: AcrossRuns, num_tests: int, group: str | None = None) -> str:
    """Return what the runs, one point each, say of one of ``num_tests`` pairs."""
    if math.isnan(pair.r):
        return f"No coefficient: {pair.reason.removeprefix('r, spearman: ')}."
    if not excludes_zero(*pair.fisher):
        return "No relation shown." + _groups(pair, group)
    text = _goes(pair, pair.r)
    if num_tests > 1:
        holds = ", also" if pair.holm < LEVEL else ", but not"
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
    clear, whole = excludes_zero(*pair.within_interval), excludes_zero(*pair.fisher)
    if not clear:
        return f" Within the groups of {group} none is shown." if whole else ""
    if not whole:
        goes = _goes(pair, pair.r_within_groups).replace("Higher", "higher", 1)
        return f" Within the groups of {group} {goes} (not corrected)."
    if pair.r_within_groups * pair.r < 0:
        return f" Within the groups of {group} it is the other way round."
    return f" The same within the groups of {group}."


def verdict_over(pair: OverRuns, num_tests: int) -> str:
    """Return what the runs say together of movements within them, in one of ``num_tests`` pairs."""
    if not pair.holm < LEVEL:
        return "First differences show no common sign."
    way = "together" if pair.num_positive * 2 > pair.num_runs else "in opposite ways"
    corrected = f", also after correction for {num_tests} pairs" if num_tests > 1 else ""
    return f"From one measurement to the next they tend to move {way}{corrected}."


def _equals(p_value: float) -> str:
    text = p_text(p_value)
    return text if text.startswith("<") else f"= {text}"
