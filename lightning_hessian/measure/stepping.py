"""The preconditioner of a whole session: that of every parameter, in one symmetric root."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.linear.preconditioned import PreconditionedOperator
from lightning_hessian.measure.preconditioner import Preconditioner
from lightning_hessian.measure.preconditioner_rules import rule_of
from lightning_hessian.measure.session import Session
from lightning_hessian.probe.parameters import local
from lightning_hessian.results.base import text_of


class _UnknownError(Exception):
    """There is no preconditioner; the message says why, in a sentence."""


@dataclass(frozen=True, eq=False)
class Stepping:
    """How the optimizers of a session step, as one preconditioner.

    Learning rates, betas and decays differ between parameter groups, and with them the thresholds
    tau of their parameters. They are folded into the preconditioner: ``ratio`` is the largest
    eigenvalue of Q^-1 (H + W) with Q = tau P entry by entry, and the iteration diverges where it
    passes 1. For a single threshold that is the sharpness over the threshold. Where there are
    several, ``threshold`` is that of the most numbers, and the sharpness is ratio * threshold:
    the sharpness at which that group alone would be as close to its threshold.

    Attributes:
        root: Q^-1/2 over the session's vectors: its diagonal [n_local], or what applies it.
        shift: The diagonal of W, [n_local] or a number.
        sign: -1 where the loss is maximized.
        threshold: tau.
        is_plain: Whether Q and W are multiples of the identity, so that the eigenvectors are those
            of H.
    """

    root: Tensor | Callable[[Tensor], Tensor]
    shift: Tensor | float
    sign: int
    threshold: float
    is_plain: bool

    def operator(self, hessian: SymmetricOperator) -> PreconditionedOperator:
        """Return Q^-1/2 (H + W) Q^-1/2."""
        return PreconditionedOperator(hessian, self.root, self.shift, self.sign)


def stepping_of(
    session: Session, optimizers: Sequence[Optimizer], names: Sequence[str]
) -> Stepping | str:
    """Return how optimizers step the named parameters of a session, or why nobody knows.

    Parameters that no optimizer holds, or has stepped, do not move and are left out, like those
    that are not named: Q^-1/2 is 0 there. All ranks call it together.
    """
    found: dict[str, Preconditioner] = {}
    reason: str | None = None
    try:
        found = _preconditioners(session, optimizers, names)
        if not any(math.isfinite(one.threshold) for one in found.values()):
            raise _UnknownError("The learning rate is 0, so there is no threshold to compare with.")
        if len({one.maximizes for one in found.values()}) > 1:
            raise _UnknownError(
                "Some parameters minimize the loss and others maximize it (`maximize=True`), so "
                "the sharpness under the optimizer is not defined."
            )
    except _UnknownError as error:
        reason = str(error)
    session.ranks.stay_together()
    reasons = [one for one in session.ranks.all_gather_object(reason) if one is not None]
    return reasons[0] if reasons else _folded(session, found, names)


def _preconditioners(
    session: Session, optimizers: Sequence[Optimizer], names: Sequence[str]
) -> dict[str, Preconditioner]:
    """Return the preconditioner of each parameter that moves."""
    wanted = set(names)
    parameters = {
        name: parameter
        for name, parameter in session.model.named_parameters(remove_duplicate=False)
        if name in wanted
    }
    held: dict[str, tuple[Optimizer, Mapping[str, Any]]] = {}
    by_identity = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = by_identity.get(id(parameter))
                if name in held:
                    raise _UnknownError(
                        f"Parameter {name!r} is stepped by two optimizers, so the sharpness under "
                        "one of them says nothing of its steps."
                    )
                if name is not None:
                    held[name] = optimizer, group
    if not held:
        raise _UnknownError(
            "No optimizer holds any of the measured parameters as they stand in the module (under "
            "FSDP1 it holds flat ones), so there is no sharpness under the optimizer."
        )
    found = {name: _of_one(parameters[name], *held[name]) for name in held}
    moving = {name: one for name, one in found.items() if one is not None}
    if not moving:
        kinds = ", ".join(dict.fromkeys(type(one).__name__ for one, _ in held.values()))
        raise _UnknownError(
            f"{kinds} has not made a step yet, so there is no sharpness under its preconditioner."
        )
    return moving


def _of_one(
    parameter: Tensor, optimizer: Optimizer, group: Mapping[str, Any]
) -> Preconditioner | None:
    """Return the preconditioner of one parameter, by the rule of its optimizer."""
    rule, kind = rule_of(optimizer), type(optimizer).__name__
    if rule is None:
        raise _UnknownError(
            f"The preconditioner of {kind} is not known, so there is no sharpness under it; "
            f"`lightning_hessian.register_preconditioner({kind}, function)` makes it known."
        )
    state = {
        name: local(value) if isinstance(value, Tensor) else value
        for name, value in optimizer.state.get(parameter, {}).items()
    }
    try:
        with torch.no_grad():
            return rule(parameter, group, state)
    except Exception as error:  # a user's, perhaps on one rank only
        raise _UnknownError(
            f"There is no sharpness under {kind}: its rule says {text_of(error)}"
        ) from error


def _folded(
    session: Session, found: Mapping[str, Preconditioner], names: Sequence[str]
) -> Stepping:
    """Return the preconditioners of all parameters as one."""
    space = session.space
    threshold, numbers = math.inf, Counter[float]()
    for name, size in zip(space.names, space.sizes, strict=True):
        if name in found and math.isfinite(found[name].threshold):
            numbers[found[name].threshold] += size
    threshold = numbers.most_common(1)[0][0]
    decays = {one.weight_decay for one in found.values()}
    sign = -1 if any(one.maximizes for one in found.values()) else 1
    is_plain = (
        found.keys() == set(space.names) == set(names)
        and all(one.diagonal is None and one.inverse_root is None for one in found.values())
        and len({one.threshold for one in found.values()}) == len(decays) == 1
        and sign == 1
    )
    ones = [
        torch.ones(shape, dtype=space.dtype, device=space.device) for shape in space.held_shapes
    ]
    scales = {name: one.threshold**-0.5 for name, one in found.items()}  # 0 where infinite
    parts, shifts = [], []
    for name, part in zip(space.names, ones, strict=True):
        one = found.get(name)
        diagonal = None if one is None else one.diagonal
        root = part if diagonal is None else diagonal.to(part.device, part.dtype).rsqrt()
        parts.append(root.reshape(part.shape) * scales.get(name, 0.0))
        shifts.append(part * (0.0 if one is None else one.weight_decay))
    root = _taken(session, parts)
    matrices = {n: one.inverse_root for n, one in found.items() if one.inverse_root is not None}
    return Stepping(
        root=root if not matrices else _Root(session, root, matrices),
        shift=decays.pop() if len(decays) == 1 else _taken(session, shifts),
        sign=sign,
        threshold=threshold,
        is_plain=is_plain,
    )


@dataclass(frozen=True, eq=False)
class _Root:
    """Q^-1/2 where some parameters have a matrix for a preconditioner."""

    session: Session
    diagonal: Tensor
    matrices: Mapping[str, Callable[[Tensor], Tensor]]

    def __call__(self, vector: Tensor) -> Tensor:
        """Return Q^-1/2 v; vectors that ranks share evenly are gathered for it."""
        space, shard = self.session.space, self.session.shard
        scaled = self.diagonal * vector
        parts = list(space.split(scaled if space.held is not None else shard.gather(scaled)))
        for index, name in enumerate(space.names):
            if name in self.matrices:
                parts[index] = self.matrices[name](parts[index])
        return _taken(self.session, parts)


def _taken(session: Session, parts: Sequence[Tensor]) -> Tensor:
    """Return a session's vector [n_local] from a tensor for each parameter as it is held."""
    flat = session.space.flatten(parts)
    return flat if session.space.held is not None else session.shard.take(flat).clone()


def vector_of(session: Session, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return a session's vector [n_local] from tensors by name; what has none, or no name, is 0."""
    space, wanted = session.space, set(names)
    parts = []
    for name, shape in zip(space.names, space.held_shapes, strict=True):
        given = local(tensors[name]) if name in tensors and name in wanted else None
        zero = torch.zeros(shape, dtype=space.dtype, device=space.device)
        parts.append(zero if given is None else given.detach().reshape(shape))
    return _taken(session, parts)
