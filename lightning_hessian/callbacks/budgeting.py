"""Whether a fit pays for a whole measurement now: asked at validations, alike on all ranks."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_hessian.callbacks.account import Account
from lightning_hessian.callbacks.compat import tell
from lightning_hessian.callbacks.guard import Guard
from lightning_hessian.callbacks.run_length import is_last_validation, share_done
from lightning_hessian.measure.budget import Budget


class Budgeting:
    """Keeps the account of a fit, and asks its Trainer how far it is.

    Args:
        budget: What the user gave.
        guard: Takes in what fails while the Trainer is asked.
        name: Of the callback, for the lines that are told.

    Attributes:
        account: What was earned and spent.
        epoch: That of the last validation; when training has ended, the Trainer's is one more.
        unmeasured: Whether the last validation so far was due, where it was not measured; None
            where it was.
    """

    def __init__(self, budget: Budget, guard: Guard, name: str) -> None:
        self.account = Account(budget)
        self.unmeasured: bool | None = None
        self._guard = guard
        self._name = name
        self.epoch = 0
        self._step = 0  # at the last validation
        self._has_ended = False

    def may_measure(self, trainer: Any, due: bool) -> bool:
        """Return whether to measure at this validation of a fit.

        Args:
            trainer: At the end of a validation, or between two batches where there is none.
            due: Whether the schedule wants it; under a share of the training time the last
                validation is wanted anyway.
        """
        if not self.account.bounded:
            return due
        self.unmeasured = due
        self._step, self.epoch = trainer.global_step, trainer.current_epoch
        wanted = due or (self.account.budget.share is not None and self._is_last(trainer))
        if wanted and self.affords(trainer):
            self.unmeasured = None
            return True
        self.account.skipped += due
        return False

    def affords(self, trainer: Any) -> bool:
        """Return whether the budget pays for a whole measurement now."""
        if trainer.state.fn != "fit" or not self.account.bounded:
            return True
        last, done = self._is_last(trainer), self._done(trainer)
        found: bool = trainer.strategy.broadcast(self.account.allows(done=done, last=last))
        return found

    def affords_few(self, trainer: Any, by_steps: bool = False) -> bool:
        """Return whether to measure now what takes a few products, alike on all ranks.

        Args:
            trainer: At a validation, or between two batches.
            by_steps: Whether a schedule wants them now.
        """
        if trainer.state.fn != "fit":
            return False
        found: bool = trainer.strategy.broadcast(self.account.allows_few(by_steps))
        return found

    def not_begun(self) -> None:
        """Count a validation that was due, and was not measured after all."""
        self.unmeasured = True
        self.account.skipped += 1

    def estimate(self, trainer: Any, seconds: float, work: tuple[float, str], advice: str) -> None:
        """Take in what a whole measurement will take, and say so in one line.

        Args:
            trainer: At the first validation that is due.
            seconds: Of a whole measurement.
            work: How many products that is, and what they are called.
            advice: Which arguments change it most.
        """
        account = self.account
        account.estimate = trainer.strategy.broadcast(seconds)
        limit = account.budget.seconds
        if limit is not None and account.estimate > limit and trainer.is_global_zero:
            warnings.warn(
                f"{self._name} measures nothing: a whole measurement takes about "
                f"{account.estimate:.3g} s, more than {account.budget} allows. Raise it, or lower "
                f"{advice}.",
                stacklevel=2,
            )
        if account.budget.share is not None:
            line = account.forecast(*work, self._done(trainer), advice)
            tell(f"{self._name}: {line}")

    def catches_up(self, trainer: Any) -> bool:
        """Return whether the last validation is to be measured now that training has ended.

        It is where nobody foresaw that it was the last, and the parameters are still those of it.

        Args:
            trainer: At the end of training.
        """
        if self.unmeasured is None or self.account.budget.share is None:
            return False
        if self._step != trainer.global_step:
            tell(
                f"{self._name}: the last validation was not measured: the run went on for "
                f"{trainer.global_step - self._step} more steps and ended before another."
            )
            return False
        self._has_ended = True
        return self.affords(trainer)

    def ends_by_steps(self, trainer: Any) -> bool:
        """Return whether to measure at the end of a fit that has no validation.

        Args:
            trainer: At the end of training.
        """
        if self._step != trainer.global_step:
            self.unmeasured = None  # what was skipped before is not what is measured now
        self._has_ended = True
        return self.affords(trainer)

    def caught_up(self, measured: bool) -> None:
        """Note that the last validation was measured after all, or could not be."""
        if measured and self.unmeasured:
            self.account.skipped -= 1
        self.unmeasured = None

    def summarize(self) -> None:
        """Say what was skipped, once, at the end."""
        said = self.account.summary()
        if said is not None:
            tell(f"{self._name}: {said}")

    def begin(self) -> None:
        """Begin a fit, with an account of its own; that of a checkpoint is loaded after this."""
        self.account = Account(self.account.budget)
        self.unmeasured, self._has_ended = None, False

    def _is_last(self, trainer: Any) -> bool:
        """Return whether this is the last validation of the fit, as far as can be foreseen."""
        if self._has_ended:
            return True
        if not trainer.enable_validation:
            return False  # by steps: the last one comes when training has ended
        last = self._guard.attempt("asking for the end of the run", is_last_validation, trainer)
        found: bool = trainer.strategy.broadcast(bool(last))
        return found

    def _done(self, trainer: Any) -> float | None:
        """Return the share of the fit that is done; None where no end is set."""
        done: float | None = self._guard.attempt("asking how long the run is", share_done, trainer)
        return done
