"""Calls written as other libraries take them, answered with the call to write here.

PyHessian takes ``hessian(model, criterion, data=(x, y))``, hessian-eigenthings
``compute_hessian_eigenthings(model, dataloader, loss, num_eigenthings)``, curvlinops
``HessianLinearOperator(model, loss, params, data)``. Whoever comes from there types these orders
and names first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_hessian.results import ArgumentError
from lightning_hessian.results.base import nearest

Kind = Literal["model", "loss", "batches", "parameters", "number", "unknown"]

_FOREIGN = {
    "criterion": "loss_fn",
    "loss": "loss_fn",
    "loss_func": "loss_fn",
    "loss_function": "loss_fn",
    "params": "parameters='<names>'",
    "param_filter": "parameters='<names>'",
    "num_eigenthings": "num_eigenvalues={}",
    "top_n": "num_eigenvalues={}",
    "k": "num_eigenvalues={}",
    "num_samples": "trace_probes={}",
    "max_iter": "budget=Budget(products={})",
    "maxIter": "budget=Budget(products={})",
    "max_steps": "budget=Budget(products={})",
    "mode": "loss_options=LossOptions(mode={})",
}
"""Arguments of peers, and what is written here for the same."""

_NEEDLESS = {"cuda", "use_gpu", "device", "fp16", "full_dataset", "check_deterministic"}
"""Arguments of peers that need not be said here."""

_BATCHES = {"data", "batches", "dataloader", "loader", "train_loader", "dataset"}


def check_order(
    call: str, signature: inspect.Signature, given: Sequence[Any], named: Mapping[str, Any]
) -> None:
    """Raise where a call is written in another library's way, with the one to write.

    Args:
        call: Name of the function.
        signature: Its parameters; those without default come first.
        given: The positional arguments.
        named: The keyword arguments.

    Raises:
        ArgumentError: A name or an order is another library's; the message holds the call.
        TypeError: A required argument is missing; likewise.
    """
    parameters = signature.parameters
    required = [name for name, one in parameters.items() if one.default is one.empty]
    write = f"Write {call}({', '.join(required)})"
    _foreign_names(call, named, list(parameters), required)
    kinds = [_kind(value) for value in given]
    _foreign_order(kinds, given, required, write)
    batches = given[2] if len(given) > 2 else named.get(required[-1])
    loss = given[1] if len(given) > 1 else named.get("loss_fn")
    if _is_pair(batches) and isinstance(loss, nn.Module):
        raise ArgumentError(
            required[-1],
            "(inputs, targets)",
            f"It is one batch, and batches are a list: [(inputs, targets)]. {write}.",
        )
    missing = [name for name in required[len(given) :] if name not in named]
    if missing:
        hint = ""
        if "loss_fn" in missing:
            hint = " loss_fn(model, batch) is the mean loss, or a criterion; None takes the "
            hint += "module's own training_step."
        raise TypeError(f"{call}() misses {' and '.join(missing)}. {write}.{hint}")


def _foreign_names(
    call: str, named: Mapping[str, Any], known: Sequence[str], required: Sequence[str]
) -> None:
    names = ", ".join(required)
    for name, value in named.items():
        if name in known:
            continue
        here = _FOREIGN.get(name, "")
        if name in _BATCHES or here in required:
            place = "second" if here else "third"
            pair = "They are a list of pairs, [(inputs, targets)]. " if _is_pair(value) else ""
            what = here or required[-1]
            remedy = f"Here it comes {place}, as {what}. {pair}Write {call}({names})."
        elif name in _NEEDLESS:
            remedy = "Leave it out: the model is measured where it is and as it is. "
            remedy += f"Write {call}({names})."
        elif here and here.partition("=")[0] in known:
            remedy = f"Write {call}({names}, {here.format(_plainly(value))})."
        else:
            near = ", ".join(nearest(name, known, 3))
            remedy = f"{call} has no such argument; nearest: {near}."
        raise ArgumentError(name, value, remedy)


def _plainly(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else "..."


def _foreign_order(
    kinds: Sequence[Kind], given: Sequence[Any], required: Sequence[str], write: str
) -> None:
    """Raise where positional arguments stand in an order that is surely another one."""
    if kinds[:2] == ["loss", "model"]:
        raise ArgumentError(
            "model", given[0], f"It is a criterion; the model comes first. {write}."
        )
    if len(given) > 1 and kinds[1] == "batches":
        swapped = "; the loss comes second, the batches third"
        if len(given) == 2:
            swapped = (
                "; the loss comes second: loss_fn(model, batch), a criterion, or None for the "
            )
            swapped += "module's own training_step"
        raise ArgumentError("loss_fn", given[1], f"It holds batches{swapped}. {write}.")
    if len(given) > 2 and kinds[2] == "parameters":
        raise ArgumentError(
            required[-1],
            "[...]",
            "It holds parameters, which are all measured by default; choose some by their names, "
            f"parameters='head.*'. {write}.",
        )
    if len(given) > 2 and kinds[2] in ("loss", "model"):
        raise ArgumentError(
            required[-1], given[2], f"It can be called; batches come third. {write}."
        )
    if len(given) > len(required):
        raise ArgumentError(
            f"argument {len(required) + 1}",
            given[len(required)],
            f"What comes after {required[-1]} is given by name, such as num_eigenvalues=10. "
            f"{write}.",
        )


def _kind(value: Any) -> Kind:
    """Return what a positional argument surely is."""
    if isinstance(value, nn.Module):
        # A criterion may have weights of classes, which are buffers, but hardly parameters.
        trains = any(True for _ in value.parameters())
        return "model" if trains else "loss" if _is_loss(value) else "unknown"
    if isinstance(value, DataLoader):
        return "batches"
    if isinstance(value, (list, tuple, Mapping)):
        listed = list(value.values()) if isinstance(value, Mapping) else list(value)
        if listed and all(isinstance(one, nn.Parameter) for one in listed):
            return "parameters"
        return "batches" if isinstance(value, (list, tuple)) else "unknown"
    if isinstance(value, (int, float)):
        return "number"
    if callable(value):
        return "loss"
    return "batches" if isinstance(value, Iterable) and not isinstance(value, str) else "unknown"


def _is_loss(value: nn.Module) -> bool:
    return isinstance(value, nn.modules.loss._Loss) or "loss" in type(value).__name__.lower()


def _is_pair(value: Any) -> bool:
    """Return whether something is one batch (x, y), not a list of batches."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(one, torch.Tensor) and one.ndim for one in value)
        and len(value[0]) == len(value[1])
    )
