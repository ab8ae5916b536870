"""When a measurement is due, and how long it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import (
    check_fields,
    is_collection,
    optional,
    real_number,
    renamed,
    whole_number,
)

time_limit = optional(
    real_number(
        "Give a share of the training time (0.05), or a finite number of seconds from 1 on.",
        above=0.0,
    ),
    "for no limit",
)
"""The rule of ``time_budget``."""


@runtime_checkable
class Schedule(Protocol):
    """Decides whether to measure at a validation."""

    def is_due(self, validation: int, step: int, last_step: int | None) -> bool:
        """Returns whether to measure now.

        Args:
            validation: Number of this validation in the run, from 1, sanity checks not counted.
            step: Optimizer steps done (``trainer.global_step``).
            last_step: ``step`` at the last measurement, None before the first.
        """


@dataclass(frozen=True)
class EveryNValidations:
    """Due at every n-th validation: n, 2 n, and so on.

    Raises:
        ValueError: n is below 1.

    Example:
        >>> schedule = EveryNValidations(2)
        >>> [schedule.is_due(validation, 0, None) for validation in (1, 2, 3, 4)]
        [False, True, False, True]
    """

    n: int = 1

    def __post_init__(self) -> None:
        check_fields(self, {"n": renamed("every_n_validations", whole_number(least=1))})

    def is_due(self, validation: int, step: int, last_step: int | None) -> bool:
        """Returns whether ``validation`` is one of every n."""
        return validation % self.n == 0


@dataclass(frozen=True)
class AtSteps:
    """Due at the first validation at or after each of the given optimizer steps.

    Raises:
        ValueError: No steps.

    Example:
        >>> schedule = AtSteps([100, 1000])
        >>> schedule.is_due(1, 120, None), schedule.is_due(2, 240, 120)
        (True, False)
    """

    steps: Sequence[int]

    def __post_init__(self) -> None:
        steps = self.steps.tolist() if isinstance(self.steps, np.ndarray) else self.steps
        if not is_collection(steps) or not steps:
            raise ArgumentError("steps", self.steps, "Give a list of at least one step.")
        rule = whole_number(because="Steps count optimizer steps.")
        object.__setattr__(self, "steps", tuple(rule("steps", step) for step in steps))

    def is_due(self, validation: int, step: int, last_step: int | None) -> bool:
        """Returns whether a chosen step lies after the last measurement and not after now."""
        done = -1 if last_step is None else last_step
        return any(done < chosen <= step for chosen in self.steps)


@dataclass
class TimeBudget:
    """Keeps the time of the measurements within a share of the training time, or in seconds.

    A share (below 1) is a bound on all measurements together: one is skipped while what has been
    earned would not pay for it, judged by the last one (by twice that, if it was cut short). A
    number of seconds (1 or more) bounds each measurement by itself.

    Args:
        limit: The share or the seconds; None for no bound.

    Raises:
        ValueError: ``limit`` is not positive.
    """

    limit: float | None = None
    training: float = field(default=0.0, init=False)
    since_last: float = field(default=0.0, init=False)
    spent: float = field(default=0.0, init=False)
    expected: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        check_fields(self, {"limit": renamed("time_budget", time_limit)})

    @property
    def _is_share(self) -> bool:
        return self.limit is not None and self.limit < 1

    def trained(self, seconds: float) -> None:
        """Adds training time (all that was not measuring)."""
        self.training += seconds
        self.since_last += seconds

    def allows(self) -> bool:
        """Returns whether a measurement may be made now."""
        return not self._is_share or self.max_seconds() >= self.expected

    def max_seconds(self) -> float:
        """Returns how long a measurement may take now; infinite without a bound."""
        if self.limit is None:
            return float("inf")
        return self.limit * self.training - self.spent if self._is_share else self.limit

    def measured(self, seconds: float) -> None:
        """Adds the time of a measurement."""
        cut = seconds >= self.max_seconds()
        self.spent += seconds
        self.since_last = 0.0
        self.expected = 2 * seconds if cut else seconds
