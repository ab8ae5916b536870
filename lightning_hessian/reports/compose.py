"""The order of a report: the question, its answer in a ranked table, then method and caveats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

from lightning_hessian.reports.across import AcrossRuns
from lightning_hessian.reports.document import (
    Block,
    Bullets,
    Document,
    Heading,
    Table,
    Text,
    bold,
    code,
)
from lightning_hessian.reports.figures import (
    Drawing,
    across_figure,
    has_band,
    over_runs_figure,
    run_figure,
    scaling_figure,
)
from lightning_hessian.reports.findings import CorrelationReport
from lightning_hessian.reports.method import how_to_read
from lightning_hessian.reports.verdicts import (
    MINUS,
    NOTHING,
    answer_within,
    interval_text,
    is_sure,
    judged,
    number,
    p_text,
    ranked,
    verdict_across,
    verdict_over,
    which_goes_with,
)
from lightning_hessian.reports.within import WithinRun
from lightning_hessian.statistics.verdict import excludes_zero

_SHOWN_RUNS = 60  # rows of the table of runs, and of problems
_SINGLY = 3  # up to so many runs are told one by one
_PANELS = 9
_MOST_GROUPS = 8  # columns of the table of groups


def compose(report: CorrelationReport) -> Document:
    """Return the report in words, tables and figures."""
    monitors = " and ".join(report.monitors)
    blocks: list[Block] = [Text(_lead(report))]
    if report.across:
        blocks += _across(report)
    if report.scaling:
        blocks += _scaling(report)
    if len(report.table) <= _SINGLY:
        blocks += _each_run(report)
    else:
        blocks += _over_runs(report)
    blocks += _which_of_two(report)
    blocks += [Heading("How to read this"), how_to_read(report)]
    blocks += _runs(report)
    return Document(f"Which statistic goes with {monitors}?", tuple(_told_apart(blocks)))


def _told_apart(blocks: Sequence[Block]) -> Iterator[Block]:
    """Yield the blocks, with no two drawings of one name: they are files in one folder."""
    seen: set[str] = set()
    for block in blocks:
        if isinstance(block, Drawing):
            names = (f"{block.name}_{number}" if number > 1 else block.name for number in count(1))
            name = next(name for name in names if name.casefold() not in seen)
            seen.add(name.casefold())
            block = replace(block, name=name)
        yield block


def _lead(report: CorrelationReport) -> str:
    rows = sum(pair.num_points for pair in report.within if pair.statistic == report.statistics[0])
    rows //= max(1, len(report.monitors))
    text = f"{_count(len(report.table), 'run')}, {_count(rows, 'measurement')}. "
    if report.table.copies:
        text += "Some were logged twice or copied; they are named at the end. "
    return text + (
        _answer_across(report)
        if report.across
        else answer_within(report.within, name=code, stress=bold)
    )


def _answer_across(report: CorrelationReport) -> str:
    sentences = []
    for monitor in report.monitors:
        pairs = [pair for pair in ranked(report.across) if pair.monitor == monitor]
        sure = [p for p in pairs if is_sure(p)]
        if sure:
            named = ", ".join(f"{bold(code(p.statistic))} (r = {number(p.r)})" for p in sure)
            sentences.append(f"Across runs, {named} went with {code(monitor)}")
        else:
            best = next((p for p in pairs if not math.isnan(p.r)), None)
            what = (
                "" if best is None else f"; nearest: {code(best.statistic)}, r = {number(best.r)}"
            )
            nothing = bold("no statistic")
            sentences.append(f"Across runs, {nothing} went with {code(monitor)}{what}")
    tests = len(report.across)
    corrected = f" (corrected for {tests} pairs)" if tests > 1 else ""
    return ". ".join(sentences) + f"{corrected}."


def _across(report: CorrelationReport) -> Iterator[Block]:
    assert report.points is not None
    group = report.settings.get("group")
    for monitor in report.monitors:
        pairs = [pair for pair in ranked(report.across) if pair.monitor == monitor]
        yield Heading(f"Across runs: {monitor}")
        inside = (f"within {group}",) if group else ()
        rows = tuple(
            (
                code(p.statistic),
                number(p.r),
                interval_text(p.fisher),
                number(p.spearman),
                p_text(p.p_value),
                p_text(p.holm),
                *((number(p.r_within_groups),) if group else ()),
                str(p.num_points),
                verdict_across(p, len(report.across), group),
            )
            for p in pairs
        )
        header = ("statistic", "r", "95 %", "Spearman", "p", "Holm", *inside)
        yield Table((*header, "runs", "what it says"), rows, words=1)
        defined = [p.statistic for p in pairs if not math.isnan(p.r)][:_PANELS]
        if defined:
            yield across_figure(report.points, defined, monitor, group)
        yield _more_across(pairs, group)


def _more_across(pairs: Sequence[AcrossRuns], group: str | None) -> Table:
    """Return the further coefficients, and r in each group with its number of runs."""
    names = sorted({name for pair in pairs for name in pair.groups})
    names = names if len(names) <= _MOST_GROUPS else []
    rows = tuple(
        (
            code(p.statistic),
            number(p.kendall),
            p_text(p.bh),
            *(_in_group(p.groups.get(name)) for name in names),
        )
        for p in pairs
    )
    groups = (f"r for {group} {name} (runs)" for name in names)
    return Table(("further numbers", "Kendall", "BH", *groups), rows)


def _in_group(found: tuple[float, int] | None) -> str:
    return "" if found is None else f"{number(found[0])} ({found[1]})"


def _scaling(report: CorrelationReport) -> Iterator[Block]:
    assert report.points is not None
    size = report.scaling[0].size
    yield Heading(f"Scaling with {size}")
    rows = tuple(
        (
            code(s.quantity),
            number(s.fit.exponent, 3),
            " to ".join(number(end, 3) for end in s.fit.interval)
            if has_band(s)
            else number(math.nan),
            number(s.fit.r),
            str(s.fit.num_points),
            str(s.fit.num_sizes),
            _scaling_words(s.fit.interval, s.fit.reason, size),
        )
        for s in report.scaling
    )
    header = ("quantity", "exponent", "95 %", "r of logs", "runs", "sizes", "what it says")
    yield Table(header, rows, words=1)
    drawn = [scaling for scaling in report.scaling if has_band(scaling)][:_PANELS]
    if drawn:
        yield scaling_figure(report.points, drawn)


def _scaling_words(interval: tuple[float, float], reason: str, size: str) -> str:
    if reason:
        return f"No fit: {reason}."
    if not excludes_zero(*interval):
        return f"No trend with {size} shown."
    return f"{'Grows' if interval[0] > 0 else 'Falls'} with {size} over these runs."


def _which_of_two(report: CorrelationReport) -> Iterator[Block]:
    """Yield which of the metric and the generalization gap each statistic goes with."""
    few = len(report.table) <= _SINGLY
    within = which_goes_with(report.within) if few else []
    found = [*which_goes_with(report.across), *which_goes_with(report.over), *within]
    if not found:
        return
    yield Heading("Test loss or generalization?")
    yield Text(
        "A falling test loss is mostly training that goes on; the gap is the test loss minus that "
        "on the training data. A statistic goes with one of them where the verdict above says so."
    )
    scopes = {"across": "across runs", "over": "within runs, all together"}
    rows = tuple(
        (
            code(one.statistic),
            *((scopes.get(one.scope) or one.run,) if len(report.table) > 1 else ()),
            f"{one.monitor}: {one.with_monitor}",
            f"gap: {one.with_gap}",
            f"{one.sentence[0].upper()}{one.sentence[1:]}.",
        )
        for one in found
    )
    where = ("where",) if len(report.table) > 1 else ()
    header = ("statistic", *where, "with the metric", "with the gap", "goes with")
    yield Table(header, rows, words=len(header) - 1)


def _over_runs(report: CorrelationReport) -> Iterator[Block]:
    yield Heading("Within runs")
    if not report.over:
        yield Text("No two runs are long enough for first differences (5 measurements each).")
        return
    yield Text(
        "Each run by itself, then all runs together. Every run counts as one, so the measurements "
        "of a run need not be independent, only the runs. Level correlations share the drift of "
        "training; first differences do not."
    )
    for monitor in report.monitors:
        overs = [over for over in report.over if over.monitor == monitor]
        overs.sort(key=lambda over: (over.holm, -abs(over.median_differences)))
        rows = tuple(
            (
                code(o.statistic),
                number(o.median_r),
                interval_text(o.range_r),
                number(o.median_differences),
                interval_text(o.range_differences),
                f"{o.num_positive} of {o.num_runs}",
                p_text(o.sign_p),
                p_text(o.holm),
                verdict_over(o, len(report.over)),
            )
            for o in overs
        )
        header = (
            f"with {monitor}",
            "median r",
            "smallest to largest",
            "median r of differences",
            "smallest to largest",
            "positive",
            "sign test p",
            "Holm",
            "what it says",
        )
        yield Table(header, rows, words=1)
        if overs:
            yield over_runs_figure(report.within, [o.statistic for o in overs], monitor)
    yield Text("Every run by itself, with intervals, is in correlations.csv.", muted=True)


def _each_run(report: CorrelationReport) -> Iterator[Block]:
    for run in report.table:
        for monitor in report.monitors:
            pairs = [p for p in report.within if (p.run, p.monitor) == (run.name, monitor)]
            title = f"{monitor} over the run"
            yield Heading(title if len(report.table) == 1 else f"{run.name}: {title}")
            if not pairs:
                yield Text(f"No two rows have a statistic and {code(monitor)}.")
                continue
            pairs = ranked(pairs)
            yield _run_table(pairs)
            drawn = [pair for pair in pairs if not math.isnan(pair.r)][:_PANELS]
            if drawn:
                yield run_figure(run, drawn, monitor)
            yield _more_within(pairs)


def _run_table(pairs: Sequence[WithinRun]) -> Table:
    rows = tuple(
        (
            code(p.statistic),
            number(p.r),
            interval_text((p.block.low, p.block.high)),
            number(p.r_differences),
            interval_text((p.differences.low, p.differences.high)),
            p_text(p.differences.p_value),
            p_text(p.holm),
            str(p.num_points),
            judged(p).sentence,
        )
        for p in pairs
    )
    header = ("statistic", "r", "95 % blocks", "r of differences", "95 % blocks", "p", "Holm")
    return Table((*header, "rows", "what it says"), rows, words=1)


def _more_within(pairs: Sequence[WithinRun]) -> Table:
    """Return the further coefficients of one run."""
    rows = tuple(
        (
            code(p.statistic),
            interval_text(p.fisher),
            p_text(p.shift_p),
            number(p.spearman),
            number(p.kendall),
            number(p.partial),
            p_text(p.differences_shift_p),
            p_text(p.bh),
            NOTHING
            if p.lead is None
            else f"{p.lead.lag:+d}".replace("-", MINUS).replace("+0", "0"),
            NOTHING if p.lead is None else number(p.lead.r),
            NOTHING if p.lead is None else interval_text(p.lead.interval),
        )
        for p in pairs
    )
    header = (
        "further numbers", "95 % Fisher", "p shifts", "Spearman", "Kendall", "r given step",
        "p shifts, differences", "BH", "lead", "r there", "its interval",
    )  # fmt: skip
    return Table(header, rows)


def _runs(report: CorrelationReport) -> Iterator[Block]:
    yield Heading("Runs")
    chosen = {}
    if report.points is not None:
        chosen = dict(zip(report.points.names, report.points.steps.tolist(), strict=True))
    varying = [key for key in report.table.config_keys() if report.table.varies(key)][:5]
    header = ("run", "rows", *(("step used",) if chosen else ()), *varying, "source")
    rows = tuple(
        (
            run.name,
            str(len(run)),
            *((f"{chosen[run.name]:g}" if run.name in chosen else "none",) if chosen else ()),
            *(str(run.config.get(key, "")) for key in varying),
            code(run.source),
        )
        for run in report.table.runs[:_SHOWN_RUNS]
    )
    yield Table(header, rows, words=1)
    if len(report.table) > _SHOWN_RUNS:
        yield Text(f"{len(report.table) - _SHOWN_RUNS} more are in correlations.json.", muted=True)
    if report.table.copies:
        yield Text(bold("The same run, or not independent:"))
        yield Bullets(_first(report.table.copies))
    left_out = [*report.table.problems, *(report.points.left_out if report.points else ())]
    if left_out:
        yield Text(bold("Left out:"))
        yield Bullets(_first(left_out))


def _first(items: Sequence[str]) -> tuple[str, ...]:
    more = len(items) - _SHOWN_RUNS
    tail = (f"and {more} more, in correlations.json",) if more > 0 else ()
    return (*items[:_SHOWN_RUNS], *tail)


def _count(number_of: int, what: str) -> str:
    return f"{number_of:,} {what}{'' if number_of == 1 else 's'}"
