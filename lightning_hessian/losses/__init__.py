"""Losses of language models that stay small where a vocabulary is large."""

from lightning_hessian.losses.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
