"""The rules of what a measurement is asked with, one table for all functions and callbacks.

A name means the same everywhere.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.measure.budget import a_budget
from lightning_hessian.measure.options import MATRICES, loss_options, spectrum_protocol
from lightning_hessian.operators.engines import ENGINES
from lightning_hessian.probe.arguments import a_module, batches, gradient_data, group, selection
from lightning_hessian.probe.partition import partition_choice
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import (
    Rule,
    flag,
    instance_of,
    memory,
    one_of,
    optional,
    progress_function,
    real_number,
    seed_number,
    significance_level,
    tolerance,
    whole_number,
)
from lightning_hessian.results.path_arguments import path_name
from lightning_hessian.solvers.storage import BasisStorage

MOST_PROBES = 10_000
"""Random probes of a trace or a density: by then their error is a hundredth of that of one."""

_Made = TypeVar("_Made")

_LAYER_NAME = re.compile(r"[A-Za-z0-9_]+")


def layer_choice(name: str, value: Any) -> Any:
    """Apply the rule of ``layers``: ``"layer"``, or names with what selects each."""
    if isinstance(value, str) and value == "layer":
        return value
    remedy = "Give 'layer', or a mapping from names to globs such as {'head': 'head.*'}."
    if not isinstance(value, Mapping) or not value:
        raise ArgumentError(name, value, remedy)
    for key, chosen in value.items():
        if not isinstance(key, str) or not _LAYER_NAME.fullmatch(key):
            raise ArgumentError(
                name,
                value,
                f"The name {key!r} cannot be part of a key; use letters, digits and underscores "
                "only.",
            )
        selection(f"{name}[{key!r}]", chosen)
    return dict(value)


def loss_choice(name: str, value: Any) -> Any:
    """Apply the rule of ``loss_fn``: ``loss_fn(module, batch)``, or a criterion."""
    from lightning_hessian.probe.criterion import loss_or_criterion  # at the first measurement

    return loss_or_criterion(name, value)


_positive = whole_number(least=1)

RULES: dict[str, Rule] = {
    "model": a_module,
    "loss_fn": optional(loss_choice),
    "batches": batches,
    "data": gradient_data,
    "num_eigenvalues": _positive,
    "parameters": optional(selection, "all that require grad"),
    "layers": layer_choice,
    "blocks": partition_choice,
    "protocol": spectrum_protocol,
    "tol": tolerance,
    "budget": a_budget,
    "hvp": one_of("auto", *ENGINES),
    "matrix": one_of(*MATRICES),
    "mode": one_of("eval", "train"),
    "loss_options": loss_options,
    "trace_probes": whole_number(
        most=MOST_PROBES, because="0 is for no trace, and a single one gives no error."
    ),
    "density": flag,
    "return_eigenvectors": flag,
    "basis": instance_of(BasisStorage, "Give BasisStorage(memory=..., tier=..., dtype=...)."),
    "checkpoint": optional(path_name, "for none"),  # ranks agree on whether it can be written
    "process_group": optional(group, "this process alone"),
    "on_progress": optional(progress_function),
    "seed": seed_number,
    "max_products": whole_number(least=3, because="A leading eigenpair takes a few."),
    # Blocks.
    "rel_error": real_number("Give a relative error above 0, up to 1.", above=0.0, most=1.0),
    "exact": optional(flag, "to choose"),
    "densities": flag,
    "density_steps": _positive,
    "density_probes": whole_number(least=1, most=MOST_PROBES),
    "return_matrix": flag,
    # Gradients.
    "num_gradients": whole_number(least=2),
    "batch_size": optional(_positive, "that of the data"),
    "tests": flag,
    "max_tested": optional(_positive, "for all"),
    "clip_norm": optional(real_number("Give a positive norm.", above=0.0), "for no clipping"),
    "preconditioner": one_of(None, "adam"),
    "momentum": real_number("Give 0 for none, or a number below 1.", least=0.0, below=1.0),
    "num_eigenvectors": whole_number(),
    "significance": significance_level,
    "memory_budget": optional(memory, "half of what is free"),
    "directory": optional(path_name, "the system's folder for temporary files"),
}
"""By the name of the argument, for every measuring function."""

SPECTRUM_RULES: dict[str, Rule] = {
    **RULES,
    "num_eigenvalues": optional(_positive, "for the protocol's default"),
}
"""Of spectra, where K has a default that depends on the protocol."""

GRADIENT_RULES: dict[str, Rule] = {
    **RULES,
    "num_gradients": optional(RULES["num_gradients"], "for one pass over the data"),
}
"""Of `gradient_structure`, where T has a default that depends on the data."""


def together(arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Return the block in which the ranks of a call check its arguments."""
    group, model = arguments.get("process_group"), arguments.get("model")
    if not isinstance(group, torch.distributed.ProcessGroup):
        return nullcontext()
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    device = parameters[0].device if parameters else torch.device("cpu")
    return Ranks.of(group, device).together()


def bridge(
    call: str, signature: inspect.Signature, given: Sequence[Any], named: Mapping[str, Any]
) -> None:
    """Raise where a call is written in another library's way, with the one to write."""
    from lightning_hessian.measure.bridges import check_order  # at the first measurement

    check_order(call, signature, given, named)


def made_from(make: Callable[..., _Made], arguments: Mapping[str, Any], **others: Any) -> _Made:
    """Return what is made of those arguments of a call that it has parameters for.

    ``arguments`` are the `locals` of the call at its beginning; ``others`` take precedence.
    """
    names = inspect.signature(make).parameters
    given = {**arguments, **others}
    return make(**{name: given[name] for name in names if name in given})
