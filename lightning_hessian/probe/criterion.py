"""A criterion in the place of a loss function: ``criterion(outputs, targets)``, as peers take it.

``loss_fn(model, batch)`` and a criterion both take two arguments. A module is a criterion, a
function is what the names (or annotations) of its first two parameters say, and a function that
says nothing is a ``loss_fn``.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import function_of

_OUTPUTS = {
    "input", "inputs", "output", "outputs", "out", "pred", "preds", "prediction", "predictions",
    "logits", "scores", "y_hat", "yhat", "y_pred", "x", "estimate", "log_probs",
}  # fmt: skip
_TARGETS = {
    "target", "targets", "label", "labels", "y", "y_true", "truth", "gt", "ground_truth", "t",
}  # fmt: skip
_MODELS = {"model", "module", "net", "network", "pl_module"}
_BATCHES = {"batch", "data", "sample", "samples"}

_loss_function = function_of("module", "batch", returns="mean loss")
_criterion = function_of("outputs", "targets", returns="mean loss")


class CriterionLoss:
    """The loss function of a criterion: ``criterion(model(inputs), targets)`` of pairs.

    Args:
        criterion: ``criterion(outputs, targets) -> mean loss``.

    Example:
        >>> import torch
        >>> loss_fn = CriterionLoss(nn.MSELoss())
        >>> loss_fn(nn.Identity(), (torch.ones(3), torch.zeros(3)))
        tensor(1.)
    """

    def __init__(self, criterion: Any) -> None:
        self.criterion = criterion

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch, which is a pair.

        Raises:
            ArgumentError: It is no pair, so that only the user knows what the targets are.
        """
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            held = f"{len(batch)} things" if isinstance(batch, (list, tuple)) else "no pair"
            raise ArgumentError(
                "loss_fn",
                self.criterion,
                f"A criterion takes batches that are (inputs, targets); this {_kind(batch)} holds "
                f"{held}. Give loss_fn(model, batch), which calls it.",
            )
        inputs, targets = batch
        loss: Tensor = self.criterion(model(inputs), targets)
        return loss

    def __repr__(self) -> str:
        return f"CriterionLoss({self.criterion!r})"


def _kind(batch: Any) -> str:
    return type(batch).__name__


def is_criterion(value: Any) -> bool:
    """Return whether something is a criterion, and no ``loss_fn(model, batch)``.

    Example:
        >>> is_criterion(nn.MSELoss()), is_criterion(nn.functional.mse_loss)
        (True, True)
        >>> is_criterion(lambda model, batch: 0.0), is_criterion(lambda a, b: 0.0)
        (False, False)
    """
    call = value.forward if isinstance(value, nn.Module) else value
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return isinstance(value, nn.Module)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first_two = [one for one in parameters if one.kind in positional][:2]
    names = [one.name.lower() for one in first_two]
    if len(names) == 2 and (names[0] in _MODELS or names[1] in _BATCHES):
        return False
    if isinstance(value, nn.Module):
        return True
    tensors = [one.annotation in (Tensor, "Tensor", "torch.Tensor") for one in first_two]
    if len(names) == 2 and all(tensors):
        return True
    return len(names) == 2 and names[0] in _OUTPUTS and names[1] in _TARGETS


def loss_or_criterion(name: str, value: Any) -> Any:
    """Apply the rule of ``loss_fn``: the function itself, a criterion made into one.

    Raises:
        ArgumentError: It cannot be called so, or the criterion is no mean.
    """
    if isinstance(value, type):
        raise ArgumentError(name, value, f"It is a class; give an instance, {value.__name__}().")
    if not callable(value) or isinstance(value, CriterionLoss) or not is_criterion(value):
        return _loss_function(name, value)
    call = value.forward if isinstance(value, nn.Module) else value
    try:
        _criterion(name, call)
    except ArgumentError as error:
        raise ArgumentError(name, value, error.remedy) from None
    reduction = getattr(value, "reduction", "mean")
    if reduction in ("sum", "none"):
        raise ArgumentError(
            name,
            value,
            f"Its reduction is {reduction!r}, but the Hessian is that of a mean loss. Build it "
            "with reduction='mean'.",
        )
    return CriterionLoss(value)
