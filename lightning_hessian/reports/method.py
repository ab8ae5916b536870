"""How a report is to be read: what each number is, and what it does not say. Our own words only."""

from __future__ import annotations

from lightning_hessian.reports.document import Bullets, marked
from lightning_hessian.reports.findings import CorrelationReport
from lightning_hessian.reports.verdicts import GAP, LOSS

_ALWAYS = (
    "**Correlation is not prediction, and neither is cause.** These are the runs that were given; "
    "another task, model or range of hyperparameters may say otherwise.",
    "**r** is Pearson's coefficient, **Spearman** and **Kendall** (tau-b) use ranks alone. Fewer "
    "than 4 points or a constant series have no coefficient.",
)
_WITHIN = (
    "**Within a run** the measurements depend on one another. **95 % blocks** draws blocks of "
    "neighbours instead of points; Fisher's interval takes all points to be independent and is too "
    "narrow. **p shifts** slides one series along the other, around the end: its smallest value is "
    "1 / rows, and it means little for series that drift.",
    "**First differences** are the changes from one measurement to the next, in which a common "
    "trend cancels. Their p by blocks is what is corrected within a run. **r given step** takes a "
    "straight line in the step out of both, which leaves a bent trend in.",
    "**Lead and lag**: r of first differences with one series moved along the other; it is put "
    "into words where the interval of the best lag, corrected for their number, leaves zero out.",
)
_EXPONENTS = (
    "**Exponents** are slopes of least-squares lines in the log-log plot. That the law is a power "
    "law they do not test; three sizes cannot show it."
)
_GAP = (
    f"**The gap** (`{GAP}`) is the validation loss minus the mean loss on the probe, from the "
    "training data. A falling test loss is mostly training that goes on; what generalises is told "
    "by the gap. The gap holds both losses, so each of them goes with it to some degree by its "
    f"definition, `{LOSS}` too."
)
_PAPER = (
    "For comparison, Tang et al. (ICML 2025) report within single language-model runs r = 0.923 "
    "and 0.980 of d_ks with test loss, against \u22120.714 and 0.247 of sharpness (largest "
    "eigenvalue, trace); without intervals, from series that drift."
)


def how_to_read(report: CorrelationReport) -> Bullets:
    """Return what the numbers of this report mean."""
    items = [*_ALWAYS]
    if report.across:
        items += _across(report)
    items += _WITHIN
    if GAP in report.monitors:
        items.append(_GAP)
    if report.scaling:
        items.append(_EXPONENTS)
    if any(pair.statistic == "hessian/d_ks" for pair in report.within):
        items.append(_PAPER)
    return Bullets(tuple(map(marked, items)))


def _across(report: CorrelationReport) -> list[str]:
    at = report.settings["at"]
    row = {"last": "its last measurement", "best": "its best by the metric named first,"}.get(at)
    row = row or f"its last measurement up to step {at:g}"
    return [
        f"**Across runs**: one point a run, {row} with the monitored metric. The interval is "
        "Fisher's, p permutes runs. **Holm** keeps the chance of even one false finding among the "
        f"{len(report.across)} pairs below 5 %, **BH** the share of false ones among the findings. "
        "Runs that differ only in a seed are not independent evidence on hyperparameters.",
        "A statistic may go with the metric because both follow a third thing, such as the "
        "learning rate or the size; coefficients within groups hold one such thing fixed.",
    ]
