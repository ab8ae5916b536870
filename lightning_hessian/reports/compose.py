"""The order of a report: question and answer at a glance, then tables, method and caveats."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from lightning_hessian.reports import figures, glance
from lightning_hessian.reports.across import AcrossRuns
from lightning_hessian.reports.defaults import short_name
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
from lightning_hessian.reports.figures import Drawing
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

Columns = dict[str, Callable[[Any], str]]
"""What a table says of each pair, by the title of the column."""

_SHOWN_RUNS = 60  # rows of the table of runs, and of problems
_SINGLY = 3  # up to so many runs are told one by one
_PANELS = 9
_MOST_GROUPS = 8  # columns of the table of groups


def compose(report: CorrelationReport) -> Document:
    """Return the report in words, tables and figures."""
    monitors = " and ".join(report.monitors)
    blocks: list[Block] = [*_first_screen(report), Heading("In more words"), Text(_lead(report))]
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


def _table(pairs: Sequence[Any], columns: Mapping[str, Callable[[Any], str]]) -> Table:
    """Return a table with a row for each pair; a column "what it says" holds sentences."""
    rows = tuple(tuple(cell(pair) for cell in columns.values()) for pair in pairs)
    return Table(tuple(columns), rows, words=int("what it says" in columns))


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


def _first_screen(report: CorrelationReport) -> Iterator[Block]:
    """Yield one sentence that anybody understands, one figure, and one ranked table."""
    yield Text(bold(glance.sentence(report)))
    pairs = glance.glances(report)[: glance.MOST_ROWS]
    drawn = [pair for pair in pairs if not math.isnan(pair.r)]
    if not pairs:
        return
    across = glance.is_across(report)
    if drawn:
        caption = "The strongest pairs. Blue is shown, grey may be chance or a common trend."
        yield figures.glance_figure(functools.partial(glance.draw, report), len(drawn), caption)
    columns: Columns = {"statistic": lambda p: code(p.statistic)}
    if len(report.table) > 1 and not across:
        columns["run"] = lambda p: p.run
    if len(report.monitors) > 1:
        columns["with"] = lambda p: code(p.monitor)
    columns |= {
        "r" if across else "r of changes": lambda p: number(p.r),
        "95 %": lambda p: interval_text(p.interval),
        "Spearman": lambda p: number(p.spearman),
        "runs" if across else "rows": lambda p: str(p.num_points),
        "what it says": lambda p: p.label,
    }
    yield _table(pairs, columns)


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
        sure = [f"{bold(code(p.statistic))} (r = {number(p.r)})" for p in pairs if is_sure(p)]
        named = ", ".join(sure) or bold("no statistic")
        sentence = f"Across runs, {named} went with {code(monitor)}"
        best = next((p for p in pairs if not math.isnan(p.r)), None)
        if best is not None and not sure:
            sentence += f"; nearest: {code(best.statistic)}, r = {number(best.r)}"
        sentences.append(sentence)
    tests = len(report.across)
    corrected = f" (corrected for {tests} pairs)" if tests > 1 else ""
    return ". ".join(sentences) + f"{corrected}."


def _across(report: CorrelationReport) -> Iterator[Block]:
    assert report.points is not None
    group = report.settings.get("group")
    group = group and short_name(group)
    for monitor in report.monitors:
        pairs = [pair for pair in ranked(report.across) if pair.monitor == monitor]
        yield Heading(f"Across runs: {monitor}")
        columns: Columns = {
            "statistic": lambda p: code(p.statistic),
            "r": lambda p: number(p.r),
            "95 %": lambda p: interval_text(p.fisher),
            "Spearman": lambda p: number(p.spearman),
            "p": lambda p: p_text(p.p_value),
            "Holm": lambda p: p_text(p.holm),
        }
        if group:
            columns[f"within {group}"] = lambda p: number(p.r_within_groups)
        columns["runs"] = lambda p: str(p.num_points)
        columns["what it says"] = lambda p: verdict_across(p, len(report.across), group)
        yield _table(pairs, columns)
        defined = [p.statistic for p in pairs if not math.isnan(p.r)][:_PANELS]
        if defined:
            yield figures.across_figure(report.points, defined, monitor, group)
        yield _more_across(pairs, group)


def _more_across(pairs: Sequence[AcrossRuns], group: str | None) -> Table:
    """Return the further coefficients, and r in each group with its number of runs."""
    columns: Columns = {
        "further numbers": lambda p: code(p.statistic),
        "Kendall": lambda p: number(p.kendall),
        "BH": lambda p: p_text(p.bh),
    }
    names = sorted({name for pair in pairs for name in pair.groups})
    for name in names if len(names) <= _MOST_GROUPS else ():
        columns[f"r for {group} {name} (runs)"] = functools.partial(_in_group, name=name)
    return _table(pairs, columns)


def _in_group(pair: AcrossRuns, name: str) -> str:
    r, num_runs = pair.groups.get(name, (math.nan, 0))
    return f"{number(r)} ({num_runs})" if num_runs else ""


def _scaling(report: CorrelationReport) -> Iterator[Block]:
    assert report.points is not None
    size = short_name(report.scaling[0].size)
    yield Heading(f"Scaling with {size}")
    yield _table(
        report.scaling,
        {
            "quantity": lambda s: code(s.quantity),
            "exponent": lambda s: number(s.fit.exponent, 3),
            "95 %": lambda s: interval_text(s.fit.interval, 3) if figures.has_band(s) else NOTHING,
            "r of logs": lambda s: number(s.fit.r),
            "runs": lambda s: str(s.fit.num_points),
            "sizes": lambda s: str(s.fit.num_sizes),
            "what it says": lambda s: _scaling_words(s.fit.interval, s.fit.reason, size),
        },
    )
    drawn = [scaling for scaling in report.scaling if figures.has_band(scaling)][:_PANELS]
    if drawn:
        yield figures.scaling_figure(report.points, drawn)


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
        columns: Columns = {
            f"with {monitor}": lambda o: code(o.statistic),
            "median r": lambda o: number(o.median_r),
            "smallest to largest": lambda o: interval_text(o.range_r),
            "median r of differences": lambda o: number(o.median_differences),
            "smallest to largest of differences": lambda o: interval_text(o.range_differences),
            "positive": lambda o: f"{o.num_positive} of {o.num_runs}",
            "sign test p": lambda o: p_text(o.sign_p),
            "Holm": lambda o: p_text(o.holm),
            "what it says": lambda o: verdict_over(o, len(report.over)),
        }
        yield _table(overs, columns)
        if overs:
            yield figures.over_runs_figure(report.within, [o.statistic for o in overs], monitor)
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
                yield figures.run_figure(run, drawn, monitor)
            yield _more_within(pairs)


def _run_table(pairs: Sequence[WithinRun]) -> Table:
    return _table(
        pairs,
        {
            "statistic": lambda p: code(p.statistic),
            "r": lambda p: number(p.r),
            "95 % blocks": lambda p: interval_text((p.block.low, p.block.high)),
            "r of differences": lambda p: number(p.r_differences),
            "95 % blocks of differences": lambda p: interval_text(
                (p.differences.low, p.differences.high)
            ),
            "p": lambda p: p_text(p.differences.p_value),
            "Holm": lambda p: p_text(p.holm),
            "rows": lambda p: str(p.num_points),
            "what it says": lambda p: judged(p).sentence,
        },
    )


def _more_within(pairs: Sequence[WithinRun]) -> Table:
    """Return the further coefficients of one run."""
    return _table(
        pairs,
        {
            "further numbers": lambda p: code(p.statistic),
            "95 % Fisher": lambda p: interval_text(p.fisher),
            "p shifts": lambda p: p_text(p.shift_p),
            "Spearman": lambda p: number(p.spearman),
            "Kendall": lambda p: number(p.kendall),
            "r given step": lambda p: number(p.partial),
            "p shifts, differences": lambda p: p_text(p.differences_shift_p),
            "BH": lambda p: p_text(p.bh),
            "lead": lambda p: _lag(p.lead.lag) if p.lead else NOTHING,
            "r there": lambda p: number(p.lead.r) if p.lead else NOTHING,
            "its interval": lambda p: interval_text(p.lead.interval) if p.lead else NOTHING,
        },
    )


def _lag(lag: int) -> str:
    return f"{lag:+d}".replace("-", MINUS) if lag else "0"


def _runs(report: CorrelationReport) -> Iterator[Block]:
    yield Heading("Runs")
    chosen = {}
    if report.points is not None:
        chosen = dict(zip(report.points.names, report.points.steps.tolist(), strict=True))
    varying = [key for key in report.table.config_keys() if report.table.varies(key)]
    varying = sorted(varying, key=lambda key: short_name(key) != key)[:5]  # the user's come first
    header = (
        "run",
        "rows",
        *(("step used",) if chosen else ()),
        *map(short_name, varying),
        "source",
    )
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
