"""How far a fit is, and whether a validation follows."""

from __future__ import annotations

import math
import time
from typing import Any

_NEAR = 0.9  # of the interval between validations by the clock


def share_done(trainer: Any) -> float | None:
    """Return the share of the fit that is done, above 0 and up to 1; None where no end is set.

    Args:
        trainer: In ``fit``, at the end of a validation.
    """
    batches = _batches_done(trainer)
    left = batches_left(trainer)
    shares = [batches / (batches + left)] if math.isfinite(left) and batches else []
    timer = _timer(trainer)
    if timer is not None and timer.time_remaining() is not None:
        passed, remaining = timer.time_elapsed(), max(0.0, timer.time_remaining())
        if passed > 0:
            shares.append(passed / (passed + remaining))
    return max(shares, default=None)


def is_last_validation(trainer: Any) -> bool:
    """Return whether the fit ends before another validation.

    Ends that nobody can foresee, such as that of ``EarlyStopping``, which decides after the
    validation, are not seen here.

    Args:
        trainer: In ``fit``, at the end of a validation.
    """
    if trainer.should_stop and trainer.fit_loop._can_stop_early:  # not before min_epochs
        return True
    return _batches_to_validation(trainer) > batches_left(trainer)


def validation_may_follow(trainer: Any, within: int) -> bool:
    """Return whether a validation may begin after one of the next batches.

    It is foreseen as Lightning decides it after each batch. One by the clock may come in the last
    tenth of its interval.

    Args:
        trainer: Within a batch, the first of those.
        within: How many batches.
    """
    loop = trainer.fit_loop.epoch_loop
    if not trainer.enable_validation or not loop._should_check_val_epoch():
        return False
    if trainer.should_stop and trainer.fit_loop._can_stop_early:
        return True
    interval = getattr(trainer, "_val_check_time_interval", None)
    if interval is not None:
        return bool(time.monotonic() - trainer._last_val_time >= _NEAR * interval)
    if loop.batch_progress.is_last_batch and trainer.val_check_batch == float("inf"):
        return True
    every: Any = trainer.val_check_batch
    if every == float("inf"):
        if not isinstance(trainer.limit_train_batches, int):
            return False
        every = trainer.limit_train_batches
    by_total = trainer.check_val_every_n_epoch is None
    position = loop.total_batch_idx if by_total else loop.batch_idx
    return any((position + 1 + ahead) % every == 0 for ahead in range(within))


def _batches_done(trainer: Any) -> int:
    """Return how many batches have been trained on since training began, those of before too."""
    done: int = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return done


def batches_left(trainer: Any) -> float:
    """Return how many batches there are until ``max_epochs`` or ``max_steps``, or infinity."""
    left = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epochs = trainer.max_epochs - trainer.current_epoch
        left = epochs * _epoch(trainer) - _in_epoch(trainer)
    if trainer.max_steps >= 0 and trainer.global_step:
        # Optimizers that step more or less than once a batch go on as they have so far.
        batches_a_step = _batches_done(trainer) / trainer.global_step
        left = min(left, (trainer.max_steps - trainer.global_step) * batches_a_step)
    return max(0.0, left)


def _batches_to_validation(trainer: Any) -> float:
    """Return after how many batches the next validation comes; infinity is for never."""
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return 1  # by the clock: one may follow at once
    epoch, done = _epoch(trainer), _in_epoch(trainer)
    every = trainer.val_check_batch if math.isfinite(trainer.val_check_batch) else epoch
    each = trainer.check_val_every_n_epoch
    if each is None:  # batches are counted on from epoch to epoch
        return float(every - _batches_done(trainer) % every)
    if (trainer.current_epoch + 1) % each == 0 and done // every * every + every <= epoch:
        return float(every - done % every)
    ahead = each - (trainer.current_epoch + 1) % each  # epochs from this one to the next with one
    return float(ahead * epoch - done + every)


def _epoch(trainer: Any) -> float:
    """Return the batches of an epoch; infinity where nobody knows."""
    found: float = trainer.num_training_batches
    if math.isinf(found) and math.isinf(trainer.val_check_batch or 0):
        return _in_epoch(trainer)  # of data without a length: this validation ends the epoch
    return found


def _in_epoch(trainer: Any) -> int:
    """Return how many batches of the present epoch have been trained on."""
    found: int = trainer.fit_loop.epoch_loop.batch_idx + 1
    return found


def _timer(trainer: Any) -> Any:
    """Return Lightning's ``Timer``, which ``max_time`` is kept by; None without one."""
    timers = (one for one in trainer.callbacks if hasattr(one, "time_remaining"))
    return next(timers, None)
