"""One measurement by several instruments: one after another, in one session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_hessian.callbacks.guard import sentence
from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.measure.instrument import Absent, Instrument, Record
from lightning_hessian.measure.session import Session
from lightning_hessian.tracking.progress import Progress


@dataclass(frozen=True)
class Findings:
    """What the instruments of one measurement have found.

    A statistic under another prefix than that of the callback carries it in its name.
    """

    records: dict[str, Record] = field(default_factory=dict)  # by the name of the instrument
    scalars: dict[str, float] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)  # a sentence for each missing statistic


def measured(
    instruments: Sequence[Instrument],
    session: Session,
    allowance: Allowance,
    *,
    prefix: str,
    strict: bool,
    progress: Progress | None = None,
) -> Findings:
    """Return what the instruments find; all ranks call it together.

    An instrument may be a user's, so that any exception is taken in, those of its record too. One
    that fails after another has succeeded costs its own statistics only; under ``strict`` it is
    raised, unless time was up. Names are logged under ``prefix``, that of the callback.

    Raises:
        Exception: The first instrument failed, or any of them under ``strict``.
    """
    all_found = Findings()
    for instrument in instruments:
        if progress is not None:
            progress.next_part(f"{prefix} {instrument.name}", getattr(instrument, "count", None))
        record: Record
        try:
            with session.ranks.together():
                record = instrument.measure(session, allowance)
                scalars = {name: _number(value) for name, value in record.scalars().items()}
                absent = list(record.absent())
        except Exception as error:
            if not all_found.records or (strict and not allowance.is_over()):
                raise
            record = Absent((f"No statistics of {instrument.name}: {sentence(error)}",))
            scalars, absent = record.scalars(), list(record.absent())
        all_found.records[instrument.name] = record
        own = instrument.prefix == prefix
        for name, value in scalars.items():
            all_found.scalars[name if own else f"{instrument.prefix}/{name}"] = value
        all_found.absent.extend(absent)
    return all_found


def _number(value: Any) -> float:
    """Return a statistic as a Python number, also where it came as a tensor or of NumPy."""
    return value if isinstance(value, (int, float)) else float(value)
