"""The rules of the callbacks' arguments: those of the measurements, and when to make them."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_hessian.callbacks.schedule import EveryNValidations, Schedule, time_limit
from lightning_hessian.measure.arguments import RULES
from lightning_hessian.measure.instrument import Instrument
from lightning_hessian.probe.arguments import probe_data
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import (
    Rule,
    flag,
    function_of,
    monitor_names,
    one_of,
    optional,
    whole_number,
)
from lightning_hessian.results.path_arguments import existing_folder


def schedule(name: str, value: Any) -> Schedule:
    """Apply the rule of ``every_n_validations``: a number from 1 on, or a schedule object."""
    if isinstance(value, numbers.Integral):
        return EveryNValidations(value)  # type: ignore[arg-type]
    if isinstance(value, type) or not isinstance(value, Schedule):
        raise ArgumentError(
            name,
            value,
            "Give a whole number of at least 1, or a schedule: an object with is_due(validation, "
            "step, last_step).",
        )
    function_of("validation", "step", "last_step", returns="bool")("is_due", value.is_due)
    return value


def instruments(name: str, value: Any) -> tuple[Instrument, ...]:
    """Apply the rule of ``instruments``: a sequence of objects that follow the protocol."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ArgumentError(name, value, "Give a list of instruments; see docs/instruments.md.")
    found = tuple(value)
    for one in found:
        if isinstance(one, type) or not isinstance(one, Instrument):
            raise ArgumentError(
                name,
                value,
                f"{type(one).__name__} is no instrument: it needs name, prefix, check(model), "
                "cost(session) and measure(session, allowance).",
            )
        if not re.fullmatch(r"\w+", str(one.prefix), re.ASCII):
            raise ArgumentError(
                name,
                value,
                f"The prefix {one.prefix!r} of {type(one).__name__} cannot be part of a key; use "
                "letters, digits and underscores only.",
            )
    if len({one.name for one in found}) < len(found):
        raise ArgumentError(name, value, "Two instruments have one name; give each its own.")
    return found


CALLBACK_RULES: dict[str, Rule] = {
    **RULES,
    "monitor": monitor_names,
    "every_n_validations": schedule,
    "data": probe_data,
    "num_batches": whole_number(least=1, most=10**9),
    "layers": optional(RULES["layers"], "for no layers"),
    "blocks": optional(RULES["blocks"], "for no block statistics"),
    "time_budget": time_limit,
    "instruments": instruments,
    "on_error": one_of("warn", "raise"),
    "directory": optional(existing_folder, "the system's folder for temporary files"),
    "figures": optional(whole_number(least=1), "for no figures"),
    "progress": flag,
}
"""By the name of the argument, for every callback."""
