"""One measurement by several instruments: one after another, in one session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.measure.instrument import Absent, Instrument, Record
from lightning_hessian.measure.session import Session
from lightning_hessian.results.base import text_of
from lightning_hessian.tracking.progress import Progress


def records_of(
    instruments: Sequence[Instrument],
    session: Session,
    allowance: Allowance,
    progress: Progress | None,
    strict: bool,
) -> dict[str, Record]:
    """Return what each instrument finds, by its name; all ranks call it together.

    One that fails after another has succeeded costs its own statistics only.

    Args:
        instruments: In the order in which they measure.
        session: What they share.
        allowance: Of all of them together.
        progress: Told when the next one begins.
        strict: Whether every failure is raised, but for one for lack of time.

    Raises:
        RuntimeError: The first instrument failed, or any of them under ``strict``.
    """
    records: dict[str, Record] = {}
    for instrument in instruments:
        if progress is not None:
            progress.next_part(instrument.name)
        try:
            records[instrument.name] = instrument.measure(session, allowance)
        except RuntimeError as error:  # a MeasurementError, or out of memory
            if not records or (strict and not allowance.is_over()):
                raise
            sentence = f"No statistics of {instrument.name}: {text_of(error)}"
            records[instrument.name] = Absent((sentence,))
    return records


def statistics_of(
    instruments: Sequence[Instrument], records: Mapping[str, Record], prefix: str
) -> tuple[dict[str, float], list[str]]:
    """Return the statistics by logged name, and a sentence for each that is absent.

    Args:
        instruments: Those that have measured.
        records: What they found, by their names.
        prefix: Of the callback; names under another prefix carry that.
    """
    scalars: dict[str, float] = {}
    absent: list[str] = []
    for instrument in instruments:
        record = records[instrument.name]
        own = instrument.prefix == prefix
        for name, value in record.scalars().items():
            scalars[name if own else f"{instrument.prefix}/{name}"] = value
        absent += record.absent()
    return scalars, absent
