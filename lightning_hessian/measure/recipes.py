"""Settings that reproduce a published procedure, under one name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from lightning_hessian.measure.options import PooledSLQ
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import checked, flag, instance_of, one_of

_RULES = {
    "model": instance_of(nn.Module, "Give the module that is measured."),
    "layer": one_of("head", "block"),
    "pooled": flag,
}

HPL_SEQUENCES = 256
"""Sequences of the fixed batch that HPL evaluates the Hessian of a language model on (C.2.2)."""


@checked(_RULES)
def hpl_language_model(
    model: nn.Module, *, layer: Literal["head", "block"] = "head", pooled: bool = True
) -> dict[str, Any]:
    """Return the arguments by which HPL measures language models, for ``**``.

    The last layer alone (E.2), 3 Lanczos runs of 1000 steps, and the 1000 largest of their Ritz
    values (C.2.2). What belongs to it besides is the user's to give: one fixed batch of
    `HPL_SEQUENCES` sequences, as one probe batch or as several smaller ones, which is the same.

    HPL does not say what the last layer is. Its figure 31 counts twelve layers in GPT2-small, which
    are blocks; what comes last in the network is the linear layer over the vocabulary, the head.
    A head that is tied to the embedding is measured as the one tensor that both are.

    Args:
        model: The module that is measured, or the one that it wraps.
        layer: ``"head"`` for the last linear layer, ``"block"`` for the last of the blocks (the
            last entry of the longest `nn.ModuleList`).
        pooled: Whether Ritz values are pooled as HPL does; else the same layer and number of
            eigenvalues, each of them converged.

    Returns:
        ``parameters``, ``protocol`` and ``num_eigenvalues`` of `hessian_spectrum` and of
        `HessianSpectrumCallback`.

    Raises:
        ArgumentError: The model has no such layer, or none of its parameters is trained.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> recipe = hpl_language_model(model)
        >>> recipe["protocol"]
        PooledSLQ(num_runs=3, num_steps=1000)
        >>> [name for name, p in model.named_parameters() if recipe["parameters"](name, p)]
        ['1.weight', '1.bias']
    """
    members = _head(model) if layer == "head" else _last_block(model)
    kept = {id(parameter) for parameter in members.parameters() if parameter.requires_grad}
    names = tuple(name for name, parameter in model.named_parameters() if id(parameter) in kept)
    if not names:
        said = f"Its {layer} has no parameter that requires grad. Choose another layer, or set it."
        raise ArgumentError("model", type(model).__name__, said)
    protocol = PooledSLQ(num_runs=3, num_steps=1000) if pooled else "converged"
    return {"parameters": _ending_in(names), "protocol": protocol, "num_eigenvalues": 1000}


def _head(model: nn.Module) -> nn.Module:
    """Return the last linear layer: what the model says it is, else what comes last in it."""
    for part in model.modules():
        get = getattr(part, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if isinstance(head, nn.Module):
            return head
    linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ArgumentError("model", type(model).__name__, "It has no linear layer.")
    return linear[-1]


def _last_block(model: nn.Module) -> nn.Module:
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        raise ArgumentError("model", type(model).__name__, "It has no nn.ModuleList of blocks.")
    last: nn.Module = max(lists, key=len)[-1]
    return last


def _ending_in(names: tuple[str, ...]) -> Callable[[str, nn.Parameter], bool]:
    """Return the selection of names, whatever module is around the one that they are of."""
    endings = tuple(f".{name}" for name in names)
    return lambda name, parameter: name in names or name.endswith(endings)
