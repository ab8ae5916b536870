"""HBS's assumptions: Gaussian inputs, random labels, LeCun's weights; and training by Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def gaussian_batch(samples: int, inputs: int, classes: int, seed: int) -> Batch:
    """Return inputs N(0, 1), [samples, inputs], and labels drawn without regard to them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, inputs, generator=generator)
    return images, torch.randint(classes, (samples,), generator=generator)


def relu_network(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Return dense layers without biases, with ReLU between them and weights N(0, 1 / inputs).

    Args:
        widths: Inputs, hidden neurons of each layer, classes.
        seed: Of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs, bias=False)
        nn.init.normal_(layer.weight, std=inputs**-0.5, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cross_entropy(net: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def squared_error(net: nn.Module, batch: Batch) -> Tensor:
    """Return the mean of half the squared distance to the one-hot label.

    HBS prints its Hessians for this loss (cases 1 and 3), without the factor 1/2 in the loss.
    """
    outputs = net(batch[0])
    wanted = nn.functional.one_hot(batch[1], outputs.shape[1])
    return (outputs - wanted).square().sum(1).mean() / 2


def log_steps(last: int, count: int) -> list[int]:
    """Return 0 and so many whole numbers from 1 to the last, evenly spaced in their logarithm."""
    return sorted({int(step) for step in np.r_[0, np.geomspace(1, last, count).round()]})


def trained(
    net: nn.Module,
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    stops: list[int],
) -> Iterator[int]:
    """Train on all samples at once; yield the number of steps made at each of the stops."""
    for step in range(stops[-1] + 1):
        if step in stops:
            yield step
        optimizer.zero_grad()
        loss_fn(net, batch).backward()
        optimizer.step()
