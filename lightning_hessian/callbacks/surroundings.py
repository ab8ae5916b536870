"""What a callback finds around it: the strategy, its ranks, the other callbacks, the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.linear.ranks import ALONE, Ranks
from lightning_hessian.measure.training import Training
from lightning_hessian.results.base import nearest

AVERAGED = (
    "Averaged weights are swapped in for validation: put this callback before the averaging one to "
    "measure them, after it to measure the trained weights."
)
"""What to tell where `averages_weights`."""


def refuse_surroundings(callback: Any, trainer: Any) -> None:
    """Check that a callback can work in a Trainer, before anything is trained.

    Raises:
        ValueError: Parameters are partitioned by DeepSpeed, or a second callback would log under
            the same prefix.
    """
    strategy = type(trainer.strategy).__name__
    if "DeepSpeed" in strategy:
        raise ValueError(
            f"{type(callback).__name__} does not support {strategy}, which partitions parameters "
            "in its own way. Use strategy='ddp', or `fully_shard` (ModelParallelStrategy)."
        )
    others = [other for other in trainer.callbacks if other is not callback]
    if any(getattr(other, "prefix", None) == callback.prefix for other in others):
        raise ValueError(
            f"Two callbacks would log under {callback.prefix}/, and Lightning would average them. "
            "Keep one in the Trainer."
        )


def averages_weights(trainer: Any) -> bool:
    """Return whether a callback of the Trainer swaps averaged weights in for validation."""
    names = {type(other).__name__ for other in trainer.callbacks}
    return not names.isdisjoint({"WeightAveraging", "EMAWeightAveraging"})


def trainer_ranks(trainer: Any, pl_module: Any) -> Ranks:
    """Return the processes of the Trainer, as they measure together."""
    if trainer.world_size == 1:
        return ALONE
    return Ranks.of(torch.distributed.group.WORLD, pl_module.device)


def training_in(trainer: Any, update: Mapping[str, Tensor] | None = None) -> Training | None:
    """Return what trains the module; None where nothing does, as in ``trainer.validate()``.

    Args:
        trainer: That of the module.
        update: Its last update, where it was recorded.
    """
    optimizers = tuple(trainer.optimizers) if trainer.state.fn == "fit" else ()
    return Training(optimizers, update) if optimizers else None


def validation_step(trainer: Any) -> int:
    """Return the step of the row in which Lightning logs the metrics of this validation."""
    found: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return found


def logged_in_validation(trainer: Any) -> set[str]:
    """Return which of ``trainer.callback_metrics`` the validation that runs now has logged."""
    return set(trainer._logger_connector.metrics["callback"]) if trainer.validating else set()


def trained_step(trainer: Any) -> int:
    """Return the step of the row of the last batch that stepped, between batches or at the end.

    Lightning counts rows from 0, so after n steps this is n - 1, as it is in a validation right
    after the n-th step. By the time of these hooks its count is one further.
    """
    return max(0, validation_step(trainer) - 1)


def without_validation(name: str) -> str:
    """Return what to tell where a fit has no validation; ``name`` is that of the callback."""
    return (
        f"{name} measures nothing in this fit: it has no validation, at which measurements are "
        "due. Give every_n_validations=EveryNTrainSteps(100) to measure at every so many steps, "
        "or validation data and a validation_step."
    )


def unknown_metric(name: str, known: list[str]) -> str:
    """Return what to tell of a monitored metric that was not logged."""
    near = ", ".join(nearest(name, known)) or "none"
    return (
        f"monitor={name!r} is not among the logged metrics ({near}), so nothing is correlated "
        "with it. Log it in validation_step or give another monitor=."
    )
