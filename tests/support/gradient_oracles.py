"""Gradients by a plain loop of backward passes, and explicit matrices made of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_hessian.operators.gradients.rows import MiniBatchGradients
from lightning_hessian.probe.minibatches import draw_minibatches
from lightning_hessian.probe.parameters import ParameterSpace
from support.references import LossFunction, cross_entropy, in_double

Array = NDArray[np.float64]


def loop_gradients(module: nn.Module, loss_fn: LossFunction, batches: Sequence[Any]) -> Array:
    """Returns one gradient for each batch, float64 [T, n], by ``backward`` of a copy."""
    module = in_double(copy.deepcopy(module))
    rows = []
    for batch in batches:
        module.zero_grad()
        loss_fn(module, in_double(batch)).backward()
        parameters = [p for p in module.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]).numpy())
    return np.stack(rows)


def explicit(gradients: Array, *, centred: bool) -> Array:
    """Returns all eigenvalues, descending, of the n x n covariance or second moment."""
    matrix = np.cov(gradients.T) if centred else gradients.T @ gradients / len(gradients)
    return np.linalg.eigvalsh(matrix)[::-1]


def classifier(num_samples: int = 120, seed: int = 0) -> tuple[nn.Module, list[Any]]:
    """Returns a small network of 57 parameters and all its data as one batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), nn.LogSoftmax(-1))
        inputs = torch.randn(num_samples, 5)
        return module, [(inputs, torch.randint(3, (num_samples,)))]


def in_batches(batch: Sequence[torch.Tensor], size: int) -> list[Any]:
    """Returns a batch cut into mini-batches of one size."""
    return list(zip(*(part.split(size) for part in batch), strict=True))


def gradient_source(
    module: nn.Module, loss_fn: Any, data: Any, **arguments: Any
) -> MiniBatchGradients:
    """Returns the gradients of mini-batches that are drawn from the data."""
    options = {k: arguments.pop(k) for k in ("mode", "clip_norm") if k in arguments}
    minibatches = draw_minibatches(data, **arguments)
    return MiniBatchGradients(
        module, loss_fn, minibatches, ParameterSpace.select(module), **options
    )


__all__ = [
    "classifier",
    "cross_entropy",
    "explicit",
    "gradient_source",
    "in_batches",
    "loop_gradients",
]
