"""Where the loss of a module comes from, and the loss in what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_hessian.results import MeasurementError

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss_fn(module, batch) -> mean loss`` of the batch, a scalar tensor.

A criterion of outputs and targets becomes one where arguments are checked (`probe.criterion`).
"""


def resolve_loss(
    module: nn.Module, loss_fn: LossFunction | None = None
) -> Callable[[Any, Any, int], Tensor]:
    """Return ``loss(module, batch, index)``: ``loss_fn``, else ``hessian_loss``, else training.

    Args:
        module: For ``loss_fn=None``, a module with ``hessian_loss(batch)``, or a LightningModule
            whose ``training_step`` returns the mean loss of the batch (a tensor, or a mapping with
            the key ``"loss"``), or a model of Hugging Face, whose ``forward`` takes ``labels`` and
            whose output holds the loss.
        loss_fn: ``loss_fn(module, batch) -> mean loss``.

    Raises:
        ValueError: There is no loss, or ``training_step`` cannot serve as one.
    """
    if loss_fn is not None:
        if not callable(loss_fn):
            raise ValueError(f"loss_fn={loss_fn!r} is not callable; give loss_fn(module, batch).")
        return lambda module, batch, index: loss_fn(module, batch)
    if callable(getattr(module, "hessian_loss", None)):
        return lambda module, batch, index: module.hessian_loss(batch)
    if not callable(getattr(module, "training_step", None)):
        if "labels" in inspect.signature(module.forward).parameters:
            return lambda module, batch, index: _own_loss(module, batch)
        raise ValueError(
            f"{type(module).__name__} has neither `hessian_loss` nor `training_step`; "
            "give loss_fn(module, batch) -> mean loss."
        )
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f"{type(module).__name__} optimises manually, so its `training_step` is not a loss. "
            "Give loss_fn(module, batch), or define `hessian_loss(self, batch)`."
        )
    training_step: Any = module.training_step
    names = list(inspect.signature(training_step).parameters)
    if "dataloader_iter" in names:
        raise ValueError(
            "`training_step(dataloader_iter)` draws its own data. Give loss_fn(module, batch), or "
            "define `hessian_loss(self, batch)`."
        )
    num_extra = 2 if "dataloader_idx" in names else len(names[1:2])
    return lambda module, batch, index: _training_loss(module, batch, (index, 0)[:num_extra])


def _own_loss(module: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a model of Hugging Face computes where it is given labels."""
    if not isinstance(batch, Mapping):
        raise MeasurementError(
            f"A probe batch is {type(batch).__name__}; {type(module).__name__} takes its arguments "
            "by name. Give batches that are mappings, or loss_fn(module, batch)."
        )
    loss = loss_of(module(**batch))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise MeasurementError(
            f"{type(module).__name__} returned no loss for a batch with {sorted(batch)}. Give it "
            "'labels' (-100 for tokens that do not count), or give loss_fn(module, batch)."
        )
    return loss


def _training_loss(module: Any, batch: Any, extra: tuple[int, ...]) -> Tensor:
    output = loss_of(module.training_step(batch, *extra))
    if not isinstance(output, Tensor):
        raise MeasurementError(
            f"`training_step` returned no loss for a probe batch (got {type(output).__name__}). "
            "Give loss_fn(module, batch), or define `hessian_loss(self, batch)`."
        )
    return output


def checked_loss(loss: Any, index: int) -> Tensor:
    """Return a loss as a scalar, or raise a MeasurementError where it is none."""
    loss = loss_of(loss)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise MeasurementError(
            f"The loss of probe batch {index} is {shape}, not a scalar tensor. "
            "Return the mean loss of the batch."
        )
    return loss.reshape(())


def loss_of(output: Any) -> Any:
    """Return the loss in what a model or a step returned: a mapping, a `ModelOutput`, or itself."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("loss", output)
    return getattr(output, "loss", output)
