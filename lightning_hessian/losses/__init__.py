"""Losses of language models that stay small where a vocabulary is large."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hessian.losses.causal_lm import causal_lm_loss
    from lightning_hessian.losses.linear_head import linear_cross_entropy

__all__ = ["causal_lm_loss", "linear_cross_entropy"]

_HOMES = {"causal_lm_loss": "causal_lm", "linear_cross_entropy": "linear_head"}


def __getattr__(name: str) -> Any:
    """Return a loss from its module: those who look at a kernel need not bring in all of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
