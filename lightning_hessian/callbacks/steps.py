"""Measurements by training steps: when one is due, and whether the present batch leads to one."""

from __future__ import annotations

from typing import Any

from lightning_hessian.callbacks.run_length import batches_left, validation_may_follow
from lightning_hessian.callbacks.schedule import EveryNTrainSteps, Schedule


class StepCount:
    """Counts the optimizer steps of a fit from batch to batch.

    Args:
        schedule: Of the callback; any but `EveryNTrainSteps` makes nothing due by steps.

    Attributes:
        by_steps: Whether instruments are measured by steps at all.
        epoch: That of the last batch begun; when training has ended, the Trainer's is one more.
        measured: The step of the last measurement, of whatever kind; None before the first.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule if isinstance(schedule, EveryNTrainSteps) else None
        self.by_steps = self._schedule is not None
        self.begin(0)

    def begin(self, step: int) -> None:
        """Begin a fit that has made so many steps already."""
        self._seen = step
        self._of_a_batch = 1  # most steps of one batch so far
        self._gap, self._idle = 1, 0  # most batches to a step so far, and those since the last
        self.epoch = 0
        self.measured: int | None = None

    def whole_by_steps(self, trainer: Any) -> bool:
        """Return whether whole measurements come by steps, since there is no validation."""
        return self.by_steps and not trainer.enable_validation

    def due(self, trainer: Any) -> tuple[bool, bool]:
        """Return what the steps make due since this was asked, at the beginning of each batch.

        Returns:
            Whether instruments of a few products are due, and whether a whole measurement is.
        """
        self.epoch = trainer.current_epoch
        before, self._seen = self._seen, trainer.global_step
        if self._seen == before:
            self._idle += 1
            return False, False
        self._gap, self._idle = max(self._gap, self._idle + 1), 0
        self._of_a_batch = max(self._of_a_batch, self._seen - before)
        if self._schedule is None or self.measured == self._seen:
            return False, False
        whole = self.whole_by_steps(trainer) and self._schedule.is_whole_due(before, self._seen)
        return self._schedule.is_step_due(before, self._seen), whole

    def batches_to_step(self, trainer: Any, pl_module: Any) -> int:
        """Return how many batches one update is the last of, at most; 1 without accumulation."""
        if pl_module.automatic_optimization:
            return int(trainer.accumulate_grad_batches)
        return self._gap

    def may_measure_after(self, trainer: Any, pl_module: Any) -> bool:
        """Return whether a measurement may follow before the steps of another batch.

        Args:
            trainer: Right before an optimizer steps.
            pl_module: Its module.
        """
        within = self.batches_to_step(trainer, pl_module)
        if validation_may_follow(trainer, within):
            return True
        if self._schedule is None:
            return False
        if self.whole_by_steps(trainer) and batches_left(trainer) < within + 1:
            return True  # the last one is measured when training has ended
        after = self._seen + self._of_a_batch
        whole = self.whole_by_steps(trainer) and self._schedule.is_whole_due(self._seen, after)
        return whole or self._schedule.is_step_due(self._seen, after)
