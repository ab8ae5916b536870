"""What a callback adds to the hyperparameters of a run: its arguments, and what it measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_hessian.measure.instrument import Instrument
from lightning_hessian.probe.parameters import num_parameters

Hyperparameter = str | int | float | bool | None


def hyperparameters(
    arguments: Mapping[str, Any], trainer: Any, pl_module: Any
) -> dict[str, Hyperparameter]:
    """Return plain values by name: the arguments, ``num_parameters``, and ``optimizer``.

    Args:
        arguments: Of the callback.
        trainer: Whose optimizers are set up.
        pl_module: The module, with all of its parameters.
    """
    found = {name: plain(value) for name, value in arguments.items()}
    found["num_parameters"] = num_parameters(pl_module)
    if trainer.optimizers:
        found["optimizer"] = ", ".join(type(one).__name__ for one in trainer.optimizers)
    return found


def plain(value: Any) -> Hyperparameter:
    """Return what every logger takes for a value: numbers and texts as they are, the rest named.

    Example:
        >>> from lightning_hessian import Budget
        >>> plain(("val_loss", "gap")), plain(Budget(share=0.2)), plain(len)
        ('val_loss, gap', 'Budget(share=0.2)', 'len')
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _of_dataclass(value)
    if isinstance(value, Instrument):
        return str(value.name)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {plain(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)) and all(_is_short(one) for one in value):
        return ", ".join(str(plain(one)) for one in value)
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else type(value).__name__


def _of_dataclass(value: Any) -> str:
    """Return the name of the class with the fields that say something."""
    fields = ((one.name, getattr(value, one.name)) for one in dataclasses.fields(value) if one.init)
    told = (f"{name}={plain(one)}" for name, one in fields if one is not None and one is not False)
    return f"{type(value).__name__}({', '.join(told)})"


def _is_short(value: Any) -> bool:
    plain_one = value is None or isinstance(value, (str, int, float, bool))
    return plain_one or isinstance(value, Instrument)
