"""The verdict on a correlation within one run: one rule, which every surface asks.

Two curves that drift correlate whatever they are, so the levels alone show nothing: a relation is
shown where the first differences correlate too, by an interval that allows for the dependence of
neighbouring measurements, and still after the correction for all pairs that were looked at. The
report, the live page, the demo, the figures and the terminal all print what `verdict` returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lightning_hessian.statistics.correlation import finite_rows, pearson
from lightning_hessian.statistics.dependence import (
    MIN_BLOCK_POINTS,
    UNDEFINED,
    BlockInterval,
    LeadLag,
    block_interval,
    lead_lag,
)
from lightning_hessian.statistics.multiple_testing import holm

LEVEL = 0.05
_HIGH = 0.5  # a coefficient that a reader would take for something

Kind = Literal["shown", "uncorrected", "drift", "nothing", "short", "undefined"]
_LABELS: dict[Kind, str] = {
    "uncorrected": "not after correction",
    "drift": "shared drift only",
    "nothing": "nothing shown",
    "short": "too few points to tell",
    "undefined": "no coefficient",
}


@dataclass(frozen=True)
class Movement:
    """What is known of two series of one run; a number that does not exist is NaN.

    Attributes:
        num_points: Rows in which both are finite.
        r: Pearson's coefficient of the levels.
        block: Its interval, for points that depend on their neighbours.
        r_differences: Pearson's coefficient of the first differences.
        differences: Its interval and p-value, likewise.
        lead: Lead and lag of the first differences, None where the run is too short.
        reason: Why a coefficient is NaN, in the words of `Correlation.reason`.
        corrected_p: p-value of ``differences``, corrected by Holm for all pairs of the run.
        num_tests: How many pairs that corrects for.
    """

    num_points: int
    r: float
    block: BlockInterval
    r_differences: float
    differences: BlockInterval
    lead: LeadLag | None
    reason: str = ""
    corrected_p: float = math.nan
    num_tests: int = 0


@dataclass(frozen=True)
class Verdict:
    """What the numbers say, and not more.

    Attributes:
        kind: ``"shown"``: the series move together (or in opposite ways) from one measurement to
            the next, beyond what looking at so many pairs finds by chance. ``"uncorrected"``: only
            before that correction. ``"drift"``: over the run alone, as a shared trend would make
            them. ``"nothing"``. ``"short"``: too few points to tell. ``"undefined"``: there is no
            coefficient.
        sentence: The verdict in words.
        label: The same in a few words, for a figure.
    """

    kind: Kind
    sentence: str
    label: str

    @property
    def is_shown(self) -> bool:
        """Whether a relation is shown."""
        return self.kind == "shown"


Pair = tuple[str, str, Movement]
"""Statistic, monitored metric, and how they move."""


def movement(x: ArrayLike, y: ArrayLike) -> Movement:
    """Return how two series [n] of one run move, not yet corrected for other pairs.

    They are in the order of training; rows without both values are dropped.
    """
    first, second = finite_rows(x, y)
    found = pearson(first, second)
    dx, dy = np.diff(first), np.diff(second)
    differenced = not math.isnan(found.r_differences)
    return Movement(
        num_points=found.num_points,
        r=found.r,
        block=UNDEFINED if math.isnan(found.r) else block_interval(first, second),
        r_differences=found.r_differences,
        differences=block_interval(dx, dy) if differenced else UNDEFINED,
        lead=lead_lag(dx, dy) if differenced else None,
        reason=found.reason,
    )


def corrected(movements: Sequence[Movement]) -> list[Movement]:
    """Return the movements of all pairs of one run, corrected by Holm for their number."""
    p_values = [found.differences.p_value for found in movements]
    tests = int(np.sum(np.isfinite(p_values))) if p_values else 0
    return [
        replace(found, corrected_p=float(p), num_tests=tests)
        for found, p in zip(movements, holm(p_values), strict=True)
    ]


def verdict(found: Movement, monitor: str = "the other") -> Verdict:
    """Return what one run says of a statistic and a monitored metric.

    Args:
        found: The numbers, corrected for all pairs that were looked at.
        monitor: What the metric is called.

    Example:
        >>> falling = np.linspace(3.0, 1.0, 40)
        >>> noise = np.random.default_rng(0).normal(size=(2, 40))
        >>> pairs = corrected([movement(falling + 0.1 * noise[0], falling + 0.1 * noise[1])])
        >>> round(pairs[0].r, 1), verdict(pairs[0]).kind
        (1.0, 'drift')
    """
    kind = _kind(found)
    label = _LABELS.get(kind) or f"move {_way(found)}"
    if kind == "undefined":
        why = found.reason.partition("; r_differences")[0].removeprefix("r, spearman: ")
        return Verdict(kind, f"No coefficient: {why}.", label)
    if kind == "short":
        return Verdict(kind, _too_short(found), label)
    words = {"drift": _drift, "nothing": _nothing}.get(kind, _moves)(found)
    return Verdict(kind, words + _lead(found, monitor), label)


def answer(
    pairs: Sequence[Pair], *, name: Callable[[str], str] = str, stress: Callable[[str], str] = str
) -> str:
    """Return what a run says of all its pairs, in one sentence.

    That the loss on the probe moves with the one that is monitored is no answer about curvature:
    it is named only where nothing else is. ``name`` marks a key as such, and ``stress`` makes words
    stand out.
    """
    clear = [pair for pair in ranked(pairs) if verdict(pair[2]).is_shown]
    shown = [pair for pair in clear if pair[0].rpartition("/")[2] != "loss"]
    if shown:
        named = ", ".join(
            f"{stress(f'{name(statistic)} with {name(monitor)}')} "
            f"(r of first differences {_signed(found.r_differences)})"
            for statistic, monitor, found in shown
        )
        return f"From one measurement to the next, these moved together: {named}."
    nothing = stress("no statistic")
    text = f"From one measurement to the next, {nothing} was shown to move with what is monitored"
    if pairs and all(_kind(found) in ("short", "undefined") for _, _, found in pairs):
        text += f"; an interval takes {MIN_BLOCK_POINTS + 1} measurements that vary"
    if clear:
        text += ", save the loss on the probe"
    return text + "."


def ranked(pairs: Sequence[Pair]) -> list[Pair]:
    """Return pairs with the strongest evidence first, then the largest abs(r); NaN last."""
    return sorted(pairs, key=lambda pair: strength(pair[2]))


def strength(found: Movement) -> tuple[bool, int, float]:
    """Return a key that sorts movements, the strongest evidence first."""
    clear = excludes_zero(found.differences.low, found.differences.high)
    return math.isnan(found.r), -(clear + (found.corrected_p < LEVEL)), -abs(found.r)


def excludes_zero(low: float, high: float) -> bool:
    """Return whether an interval lies on one side of zero; False where it is NaN."""
    return low > 0 or high < 0


def which_of_two(loss: Verdict | bool | None, gap: Verdict | bool | None) -> str:
    """Return whether a statistic goes with the monitored metric, the generalization gap, or both.

    A test loss falls mostly because training goes on. What generalises is told by the gap, the test
    loss minus that on the probe.

    Args:
        loss: The verdict on the metric, or whether a relation is shown; None if it cannot be told.
        gap: That on the gap.

    Example:
        >>> which_of_two(True, False)
        'the metric alone: mostly training that goes on may make it'
    """
    with_loss, with_gap = _told(loss), _told(gap)
    if with_loss is None and with_gap is None:
        return "too little to tell"
    if with_loss and with_gap:
        return "both"
    if with_loss and with_gap is None:
        return "the metric alone: the gap cannot be told"
    if with_loss:
        return "the metric alone: mostly training that goes on may make it"
    if with_gap:
        tail = "; the metric cannot be told" if with_loss is None else ""
        return f"the generalization gap alone{tail}"
    return "neither"


def _signed(r: float) -> str:
    return f"{r:.2f}".replace("-", "\u2212")


def _told(found: Verdict | bool | None) -> bool | None:
    if isinstance(found, Verdict):
        return None if found.kind in ("short", "undefined") else found.is_shown
    return found


def _kind(found: Movement) -> Kind:
    if math.isnan(found.r):
        return "undefined"
    if math.isnan(found.differences.low):
        return "short"
    if excludes_zero(found.differences.low, found.differences.high):
        return "shown" if found.corrected_p < LEVEL else "uncorrected"
    return "drift" if excludes_zero(found.block.low, found.block.high) else "nothing"


def _too_short(found: Movement) -> str:
    if math.isnan(found.r_differences):
        why = found.reason.partition("r_differences: ")[2]
        return f"Too little to tell. First differences have no coefficient: {why}."
    return (
        f"Too little to tell: an interval of first differences takes {MIN_BLOCK_POINTS + 1} "
        f"measurements, and there are {found.num_points}."
    )


def _drift(found: Movement) -> str:
    way = "the same way" if found.r > 0 else "opposite ways"
    return (
        f"Both drift {way} over the run, as a trend that they share would make them; first "
        "differences show nothing."
    )


def _nothing(found: Movement) -> str:
    if abs(found.r) >= _HIGH:
        return (
            "Nothing shown: r is far from zero, but two series that drift give that without any "
            "link, and first differences show nothing."
        )
    return "Nothing shown, neither over the run nor by first differences."


def _way(found: Movement) -> str:
    return "together" if found.r_differences > 0 else "in opposite ways"


def _moves(found: Movement) -> str:
    level = excludes_zero(found.block.low, found.block.high)
    text = f"From one measurement to the next they move {_way(found)}"
    if level and found.r * found.r_differences > 0:
        text += ", as they do over the whole run"
    elif level:
        text += ", though over the whole run it is the other way round"
    elif abs(found.r) >= _HIGH:
        text += "; over the whole run drift alone could give this r"
    else:
        text += "; over the whole run nothing is shown"
    if found.num_tests > 1:
        holds = "holds" if found.corrected_p < LEVEL else "does not hold: not shown"
        text += f". After correction for {found.num_tests} pairs this {holds}"
    return text + "."


def _lead(found: Movement, monitor: str) -> str:
    if found.lead is None or not found.lead.is_clear or found.lead.lag == 0:
        return ""
    lag = found.lead.lag
    which = "later" if lag > 0 else "earlier"
    return (
        f" Its changes agree best with those of {monitor} {abs(lag)} measurement"
        f"{'s' if abs(lag) > 1 else ''} {which}."
    )
