"""What the measurements of a run may cost: earned in training, estimated, spent, told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_hessian.measure.budget import Budget


@dataclass
class Account:
    """Decides whether a whole measurement may begin.

    Training earns a share of its time. A measurement begins once what has been saved up pays for
    all of it, by what one is expected to take. The first is made on credit where the run, as long
    as it is expected to be, pays for it and for the last; the last is made whatever is left, so
    that its overdraft is the only one.

    Attributes:
        budget: What the user gave.
        trained: Seconds of training so far: all that was not measuring.
        spent: Seconds of measuring so far, figures and trials included.
        estimate: Seconds of a whole measurement; None while no product has been timed.
        made: How many measurements were made.
        skipped: How many validations were due, and not measured for want of budget.
        estimate_of_few: Seconds of the instruments that take a few products; None for none.
        spent_on_few: Seconds that these have taken, a part of ``spent``.
    """

    budget: Budget
    trained: float = 0.0
    spent: float = 0.0
    estimate: float | None = None
    made: int = 0
    skipped: int = 0
    estimate_of_few: float | None = None
    spent_on_few: float = 0.0

    @property
    def bounded(self) -> bool:
        """Whether a measurement has to be paid for."""
        return self.budget.share is not None or self.budget.seconds is not None

    @property
    def saved(self) -> float:
        """Seconds that are left of what training has earned; infinite without a share."""
        if self.budget.share is None:
            return math.inf
        return self.budget.share * self.trained - self.spent

    @property
    def share(self) -> float:
        """What measuring has taken, as a share of the training time."""
        return self.spent / self.trained if self.trained > 0 else math.inf

    def allows(self, *, done: float | None, last: bool) -> bool:
        """Return whether a whole measurement may begin now.

        Args:
            done: Share of the run that is done; None where no end is set.
            last: Whether this is the last validation of the run.
        """
        if self.estimate is None or not self.bounded:
            return True
        if self.budget.seconds is not None and self.estimate > self.budget.seconds:
            return False
        if last or self.estimate <= self.saved:
            return True
        if self.made or not done:
            return False
        return self.affordable(done) >= 2

    def allows_few(self, by_steps: bool = False) -> bool:
        """Return whether to measure now what takes a few products, between whole measurements.

        These may take half of what training has earned, so that whole measurements are saved up
        for beside them. Without a share of the training time the schedule says when all is
        measured, and between that only what it wants by steps.

        Args:
            by_steps: Whether a schedule wants them now.
        """
        if self.budget.share is None:
            most = math.inf if self.budget.seconds is None else self.budget.seconds
            return by_steps and (self.estimate_of_few or 0.0) <= most
        if self.estimate_of_few is None:
            return False
        half = self.budget.share * self.trained / 2
        return self.estimate_of_few <= min(self.saved, half - self.spent_on_few)

    def affordable(self, done: float) -> float:
        """Return how many whole measurements the run pays for.

        Args:
            done: Share of the run that is done.
        """
        if self.budget.share is None or not self.estimate:
            return math.inf
        whole = self.trained / done
        return (self.budget.share * whole - self.spent) / self.estimate

    def earn(self, seconds: float) -> None:
        """Add training time; a clock that was set back earns nothing."""
        self.trained += max(0.0, seconds)

    def pay(self, seconds: float) -> None:
        """Add time that was no training."""
        self.spent += max(0.0, seconds)

    def pay_few(self, seconds: float, following: float = 1.0) -> None:
        """Add what instruments of a few products have taken.

        Args:
            seconds: That they took.
            following: What the next ones take, over that: less than 1 after a start from nothing.
        """
        self.pay(seconds)
        self.spent_on_few += max(0.0, seconds)
        self.estimate_of_few = max(0.0, seconds) * following

    def measured(self, seconds: float) -> None:
        """Remember what a whole measurement took."""
        self.estimate = max(0.0, seconds)
        self.made += 1

    def failed(self, seconds: float) -> None:
        """Remember what a measurement took that failed: the next one is paid for before."""
        self.estimate = max(seconds, self.estimate or 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on with."""
        return {"trained": self.trained, "spent": self.spent, "made": self.made}

    @classmethod
    def checked(cls, budget: Budget, state: Mapping[str, Any]) -> Account:
        """Return the account of a checkpoint.

        Raises:
            ValueError: Something else than numbers from 0 on.
        """
        found = {name: state[name] for name in ("trained", "spent", "made")}
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"{name}={value!r} is no number from 0 on.")
        return cls(budget, float(found["trained"]), float(found["spent"]), made=int(found["made"]))

    def forecast(self, products: float, unit: str, done: float | None, advice: str) -> str:
        """Return the one line on what is to come, before the first measurement.

        Args:
            products: Of a whole measurement.
            unit: What they are: ``"HVPs"``.
            done: Share of the run that is done; None where no end is set.
            advice: Which arguments change the cost most, with their values.
        """
        estimate = self.estimate or 0.0
        line = f"A whole measurement takes about {estimate:.3g} s ({products:.0f} {unit})"
        if done:
            whole = self.trained / done
            line += f", {100 * estimate / whole:.2g} % of the {whole:.3g} s that training takes"
        if self.budget.share is not None:
            line += f". time_budget={self.budget.share:g} pays for "
            count = max(1, math.floor(self.affordable(done))) if done else None
            line += "the last at least" if count is None else f"{count}, the last one included"
        return f"{line}. For more, lower {advice}, or raise time_budget."

    def summary(self) -> str | None:
        """Return what was skipped, in one line; None where nothing was."""
        if not self.skipped:
            return None
        given = (
            f"time_budget={self.budget.share:g}"
            if self.budget.share is not None
            else f"time_budget={self.budget}"
        )
        return (
            f"{self.made} of {self.made + self.skipped} due validations were measured, in "
            f"{self.spent:.3g} s, {100 * self.share:.2g} % of the training time; the others were "
            f"skipped to keep to {given}."
        )
