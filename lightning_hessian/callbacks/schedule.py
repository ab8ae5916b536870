"""When a measurement is due, and how long it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


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
        if self.n < 1:
            raise ValueError(f"every_n_validations={self.n}; it must be at least 1.")

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
        if not self.steps:
            raise ValueError("AtSteps needs at least one step.")

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
        if self.limit is not None and not self.limit > 0:
            raise ValueError(
                f"time_budget={self.limit}; give a share of the training time (0.05) or seconds."
            )

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
