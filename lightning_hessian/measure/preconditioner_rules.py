"""Which optimizer preconditions how: an open table, with torch's optimizers in it."""

from __future__ import annotations

import inspect

from torch.optim import Optimizer

from lightning_hessian.measure.optimizers import TORCH_RULES
from lightning_hessian.measure.preconditioner import PreconditionerRule
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import function_of

_RULES: dict[type[Optimizer], PreconditionerRule] = dict(TORCH_RULES)


def register_preconditioner(
    optimizer_class: type[Optimizer], function: PreconditionerRule | type[Optimizer]
) -> None:
    """Make known how a class of optimizers preconditions, for what `StabilityInstrument` measures.

    Known are SGD, Adam, AdamW, NAdam, RAdam, RMSprop and Adagrad of torch. What is registered for
    the most derived class holds. A subclass that has a ``step`` of its own is unknown until it is
    registered itself, for nobody can tell what that does.

    Args:
        optimizer_class: A class of optimizers.
        function: ``function(parameter, group, state)``: returns the `Preconditioner` of one
            parameter, or None where the optimizer has not stepped it yet. ``group`` is the
            parameter group as the optimizer holds it now, ``state`` its state of the parameter, in
            which sharded tensors are this rank's local parts (``parameter`` itself is what the
            module has, perhaps a DTensor). It raises MeasurementError, with a sentence, where it
            cannot say. Or a class that is known, for one that steps as that does.

    Raises:
        ArgumentError: No class of optimizers, or no function of three arguments.

    Example:
        >>> import torch
        >>> from lightning_hessian import Preconditioner
        >>> class SignSGD(torch.optim.Optimizer): ...
        >>> def rule(parameter, group, state):
        ...     return Preconditioner(2 / group["lr"], diagonal=parameter.grad.abs())
        >>> register_preconditioner(SignSGD, rule)
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        remedy = "Give a subclass of torch.optim.Optimizer."
        raise ArgumentError("optimizer_class", optimizer_class, remedy)
    if isinstance(function, type):
        known = _RULES.get(function)
        if known is None:
            names = ", ".join(one.__name__ for one in _RULES)
            remedy = f"Its own preconditioner is not known; known are {names}."
            raise ArgumentError("function", function, remedy)
        _RULES[optimizer_class] = known
        return
    rule = function_of("parameter", "group", "state", returns="Preconditioner")
    _RULES[optimizer_class] = rule("function", function)


def rule_of(optimizer: Optimizer) -> PreconditionerRule | None:
    """Return the rule that holds for an optimizer, None where there is none."""
    for base in type(optimizer).__mro__:
        if base in _RULES:
            return _RULES[base]
        if "step" in vars(base) and not _inherits_step(base):
            return None
    return None


def _inherits_step(kind: type) -> bool:
    """Return whether a class steps as the one that it comes from.

    An Optimizer wraps the step of its class for the profiler, in the class itself.
    """
    own = inspect.unwrap(vars(kind)["step"])
    return any(inspect.unwrap(getattr(base, "step", None)) is own for base in kind.__bases__)  # type: ignore[arg-type]
