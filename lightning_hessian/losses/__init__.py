"""Losses of language models that stay small where a vocabulary is large."""

from lightning_hessian.losses.causal_lm import causal_lm_loss
from lightning_hessian.losses.linear_cross_entropy import linear_cross_entropy

__all__ = ["causal_lm_loss", "linear_cross_entropy"]
