"""When a measurement is due, and how long it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lightning_hessian.measure.budget import UNLIMITED, Budget
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import (
    check_fields,
    flag,
    is_collection,
    optional,
    real_number,
    renamed,
    whole_number,
)

_share = real_number(
    "Give a share of the training time between 0 and 1, such as 0.05, a Budget(products=..., "
    "seconds=...), or None for no limit.",
    above=0.0,
    below=1.0,
)


def time_limit(name: str, value: Any) -> Budget:
    """Apply the rule of ``time_budget``: a share of the training time, a `Budget`, or None."""
    if value is None:
        return UNLIMITED
    if isinstance(value, Budget):
        return value
    return Budget(share=_share(name, value))


@runtime_checkable
class Schedule(Protocol):
    """Decides whether to measure at a validation."""

    def is_due(self, validation: int, step: int, last_step: int | None) -> bool:
        """Return whether to measure now.

        Args:
            validation: Number of this validation in the run, from 1, sanity checks not counted.
            step: Optimizer steps done (``trainer.global_step``).
            last_step: ``step`` at the last measurement, None before the first.
        """


@dataclass(frozen=True)
class EveryNValidations:
    """Due at every n-th validation: n, 2 n, and so on.

    Args:
        n: At every how many validations.
        during_validate: Whether ``trainer.validate()`` measures too.

    Raises:
        ValueError: n is below 1.

    Example:
        >>> schedule = EveryNValidations(2)
        >>> [schedule.is_due(validation, 0, None) for validation in (1, 2, 3, 4)]
        [False, True, False, True]
    """

    n: int = 1
    during_validate: bool = False

    def __post_init__(self) -> None:
        number = renamed("every_n_validations", whole_number(least=1))
        check_fields(self, {"n": number, "during_validate": flag})

    def is_due(self, validation: int, step: int, last_step: int | None) -> bool:
        """Return whether ``validation`` is one of every n."""
        return validation % self.n == 0


@dataclass(frozen=True)
class AtSteps:
    """Due at the first validation at or after each of the given optimizer steps.

    Args:
        steps: The steps.
        during_validate: Whether ``trainer.validate()`` measures too.

    Raises:
        ValueError: No steps.

    Example:
        >>> schedule = AtSteps([100, 1000])
        >>> schedule.is_due(1, 120, None), schedule.is_due(2, 240, 120)
        (True, False)
    """

    steps: Sequence[int]
    during_validate: bool = False

    def __post_init__(self) -> None:
        check_fields(self, {"during_validate": flag})
        steps = self.steps.tolist() if isinstance(self.steps, np.ndarray) else self.steps
        if not is_collection(steps) or not steps:
            raise ArgumentError("steps", self.steps, "Give a list of at least one step.")
        rule = whole_number(because="Steps count optimizer steps.")
        object.__setattr__(self, "steps", tuple(rule("steps", step) for step in steps))

    def is_due(self, validation: int, step: int, last_step: int | None) -> bool:
        """Return whether a chosen step lies after the last measurement and not after now."""
        done = -1 if last_step is None else last_step
        return any(done < chosen <= step for chosen in self.steps)


@dataclass(frozen=True)
class EveryNTrainSteps:
    """Due at every n-th optimizer step, for instruments of a few products; whole at validations.

    Between validations the instruments of at most ten products (`StabilityInstrument`, one's own)
    are measured right after the n-th, 2 n-th, ... optimizer step, before the next batch, within the
    budget. Their numbers go to the loggers, in the row of the batch that made the step (n - 1:
    Lightning counts rows from 0); they are no metrics of the Trainer's, and ``callback.history``
    has whole measurements only. With several optimizers ``trainer.global_step`` counts the steps
    of each.

    Whole measurements are made at validations. A fit without any has them by steps too, within the
    budget, and the last one when training has ended.

    Args:
        n: At every how many steps.
        whole: In a fit without validation, at every how many steps a whole measurement is due; n
            by default.
        every_n_validations: In a fit with validation, at every how many of them.
        during_validate: Whether ``trainer.validate()`` measures too.

    Raises:
        ValueError: One of the numbers is below 1.

    Example:
        >>> schedule = EveryNTrainSteps(100, whole=1000)
        >>> schedule.is_step_due(99, 100), schedule.is_step_due(100, 101)
        (True, False)
    """

    n: int
    whole: int | None = None
    every_n_validations: int = 1
    during_validate: bool = False

    def __post_init__(self) -> None:
        number = whole_number(least=1, most=10**9)
        rules = {
            "n": renamed("every_n_train_steps", number),
            "whole": optional(number, "for as often as the rest"),
            "every_n_validations": number,
            "during_validate": flag,
        }
        check_fields(self, rules)

    def is_due(self, validation: int, step: int, last_step: int | None) -> bool:
        """Return whether ``validation`` is one that is measured whole."""
        return validation % self.every_n_validations == 0

    def is_step_due(self, before: int, step: int) -> bool:
        """Return whether one of every n steps lies after ``before`` and not after ``step``."""
        return step // self.n > before // self.n

    def is_whole_due(self, before: int, step: int) -> bool:
        """Return whether one of the steps of whole measurements does."""
        each = self.whole or self.n
        return step // each > before // each
