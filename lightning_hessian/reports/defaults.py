"""What a report takes where nothing is named: the runs say it in their hyperparameters.

The callbacks log their arguments, the number of parameters and the optimizer under
``hessian_callback`` and ``gradient_callback``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_hessian.histories.run_table import RunTable

AUTO = "auto"
"""The value of ``group`` and ``size`` by which they are found in the runs."""

DEFAULT_MONITORS = ("val_loss", "gap")
"""What is monitored where nothing is asked for; the gap as far as a run logged it."""

_CALLBACKS = ("hessian_callback", "gradient_callback")
_FEWEST_SIZES = 3  # two of them make a line whatever they are
_MOST_GROUPS = 8


def config_key(table: RunTable, name: str) -> str:
    """Return the config key that a name means: itself, or what a callback logged under it."""
    keys = table.config_keys()
    known = (key for key in (name, *(f"{one}.{name}" for one in _CALLBACKS)) if key in keys)
    return next(known, name)


def short_name(key: str) -> str:
    """Return a config key without the name of the callback that logged it.

    Example:
        >>> short_name("hessian_callback.num_parameters"), short_name("model.width")
        ('num_parameters', 'model.width')
    """
    whose, _, name = key.partition(".")
    return name if whose in _CALLBACKS else key


def found_size(table: RunTable, size: str | None) -> str | None:
    """Return the config key of the sizes: by itself ``num_parameters``, of three sizes or more."""
    if size != AUTO:
        return size and config_key(table, size)
    key = config_key(table, "num_parameters")
    values = {run.config.get(key) for run in table}
    sizes = {value for value in values if type(value) in (int, float) and _is_size(value)}
    return key if len(sizes) >= _FEWEST_SIZES else None


def found_group(table: RunTable, group: str | None) -> str | None:
    """Return the config key of the groups: by itself ``optimizer``, where it tells runs apart."""
    if group != AUTO:
        return group and config_key(table, group)
    key = config_key(table, "optimizer")
    groups = len({run.config.get(key) for run in table})
    return key if 1 < groups <= min(_MOST_GROUPS, len(table) - 1) else None


def named_monitors(*configs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the metrics that the callbacks of runs monitored, in whatever run; else the usual.

    Args:
        configs: Hyperparameters of each run, nested keys joined by dots.
    """
    told = (config.get(f"{one}.monitor") for config in configs for one in _CALLBACKS)
    names = [name for text in told if isinstance(text, str) for name in text.split(", ") if name]
    return tuple(dict.fromkeys(names)) or DEFAULT_MONITORS


def _is_size(value: Any) -> bool:
    return math.isfinite(value) and value > 0
