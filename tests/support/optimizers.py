"""Every optimizer that stability knows, and its preconditioner written out by hand.

The gradients of a few real steps are kept, and the state that they leave is computed from them
anew, in float64 and by the formulas of the papers; the optimizer's own state is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Gradients = Sequence[Tensor]


@dataclass(frozen=True)
class Variant:
    """An optimizer with its arguments.

    Attributes:
        kind: Its class.
        options: Its arguments.
        diagonal: P by hand, from the gradients as the optimizer has met them.
        threshold: That of the largest eigenvalue of P^-1 (H + W) by hand.
        coupled: W, a number.
        steps: How many are made.
        sign: -1 where the loss is maximized.
    """

    kind: Any
    options: dict[str, Any]
    diagonal: Callable[[Gradients], Tensor]
    threshold: float
    coupled: float = 0.0
    steps: int = 7
    sign: int = 1


def _ones(seen: Gradients) -> Tensor:
    return torch.ones_like(seen[0])


def _mean(values: Sequence[Tensor], beta: float) -> Tensor:
    """The running mean, from zero, not corrected."""
    count = len(values)
    return sum((1 - beta) * beta ** (count - 1 - i) * v for i, v in enumerate(values))


def _squares(seen: Gradients) -> list[Tensor]:
    return [g * g for g in seen]


def _adam(first: float, second: float, eps: float) -> Callable[[Gradients], Tensor]:
    def diagonal(seen: Gradients) -> Tensor:
        t = len(seen)
        v = _mean(_squares(seen), second) / (1 - second**t)
        return (1 - first**t) * (v.sqrt() + eps)

    return diagonal


def _amsgrad(seen: Gradients) -> Tensor:
    t = len(seen)
    means = [_mean(_squares(seen[:i]), 0.6) for i in range(1, t + 1)]
    v = torch.stack(means).amax(0) / (1 - 0.6**t)
    return (1 - 0.9**t) * (v.sqrt() + 1e-8)


def _nadam(seen: Gradients) -> Tensor:
    v = _mean(_squares(seen), 0.99) / (1 - 0.99 ** len(seen))
    return v.sqrt() + 1e-8


def _nadam_threshold(lr: float, beta: float, decay: float, t: int) -> float:
    """Two over what the step takes of an alternating gradient (+g, -g, ...)."""
    mu = [beta * (1 - 0.5 * 0.96 ** (i * decay)) for i in range(1, t + 2)]
    now, after = math.prod(mu[:t]), math.prod(mu)
    of_gradient, of_mean = (1 - mu[t - 1]) / (1 - now), mu[t] / (1 - after)
    alternating_mean = (1 - beta) / (1 + beta)
    return 2 / (lr * (of_gradient + of_mean * alternating_mean))


def _radam(seen: Gradients) -> Tensor:
    first, second, t = 0.9, 0.95, len(seen)
    longest = 2 / (1 - second) - 1
    length = longest - 2 * t * second**t / (1 - second**t)
    if length <= 5:
        return (1 - first**t) * _ones(seen)
    r = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    v = _mean(_squares(seen), second)
    return (1 - first**t) * (v.sqrt() + 1e-8) / (math.sqrt(1 - second**t) * r)


def _rmsprop(seen: Gradients) -> Tensor:
    return _mean(_squares(seen), 0.9).sqrt() + 1e-8


def _centered(seen: Gradients) -> Tensor:
    return (_mean(_squares(seen), 0.9) - _mean(seen, 0.9) ** 2).sqrt() + 1e-8


def _adagrad(seen: Gradients) -> Tensor:
    return (sum(_squares(seen)) + 0.02).sqrt() + 1e-10


_SGD, _ADAM, _ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
_NADAM, _RADAM, _RMSPROP = torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop
_PLAIN_ADAM = _adam(0.9, 0.999, 1e-8)

VARIANTS: dict[str, Variant] = {
    "sgd": Variant(_SGD, {"lr": 0.1}, _ones, 20.0),
    "sgd, rate in a tensor": Variant(_SGD, {"lr": torch.tensor(0.25)}, _ones, 8.0),
    "heavy ball": Variant(_SGD, {"lr": 0.1, "momentum": 0.9}, _ones, 38.0),
    "dampening": Variant(
        _SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.75}, _ones, 3.8 / 0.025
    ),
    "nesterov": Variant(
        _SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, _ones, 3.8 / (2.8 * 0.1)
    ),
    "sgd with decay": Variant(
        _SGD, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.3}, _ones, 30.0, coupled=0.3
    ),
    "maximizing sgd": Variant(
        _SGD, {"lr": 0.01, "maximize": True, "weight_decay": 0.1},
        _ones, 200.0, coupled=0.1, sign=-1,
    ),
    "adam": Variant(_ADAM, {"lr": 0.01}, _PLAIN_ADAM, 3800.0),
    "adam of other betas": Variant(
        _ADAM, {"lr": 0.01, "betas": (0.5, 0.8), "eps": 0.1}, _adam(0.5, 0.8, 0.1), 600.0
    ),
    "adam with decay": Variant(
        _ADAM, {"lr": 0.01, "weight_decay": 0.3}, _PLAIN_ADAM, 3800.0, coupled=0.3
    ),
    "foreach": Variant(_ADAM, {"lr": 0.01, "foreach": True}, _PLAIN_ADAM, 3800.0),
    "fused": Variant(_ADAM, {"lr": 0.01, "fused": True}, _PLAIN_ADAM, 3800.0),
    "amsgrad": Variant(_ADAM, {"lr": 0.01, "betas": (0.9, 0.6), "amsgrad": True}, _amsgrad, 3800.0),
    "adamw": Variant(
        _ADAMW, {"lr": 0.01, "weight_decay": 2.0}, _PLAIN_ADAM, 3800.0 * (1 - 0.01 * 2.0 / 2)
    ),
    "nadam": Variant(
        _NADAM, {"lr": 0.01, "betas": (0.9, 0.99)}, _nadam, _nadam_threshold(0.01, 0.9, 0.004, 7)
    ),
    "nadam with decay": Variant(
        _NADAM, {"lr": 0.02, "betas": (0.9, 0.99), "momentum_decay": 0.3, "weight_decay": 0.2},
        _nadam, _nadam_threshold(0.02, 0.9, 0.3, 7), coupled=0.2,
    ),
    "nadam with decoupled decay": Variant(
        _NADAM,
        {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.5, "decoupled_weight_decay": True},
        _nadam, _nadam_threshold(0.02, 0.9, 0.004, 7) * (1 - 0.02 * 0.5 / 2),
    ),
    "radam, its first steps": Variant(
        _RADAM, {"lr": 0.01, "betas": (0.9, 0.95)}, _radam, 3800.0, steps=4
    ),
    "radam": Variant(_RADAM, {"lr": 0.01, "betas": (0.9, 0.95)}, _radam, 3800.0, steps=20),
    "rmsprop": Variant(_RMSPROP, {"lr": 0.01, "alpha": 0.9}, _rmsprop, 200.0),
    "centered rmsprop": Variant(
        _RMSPROP, {"lr": 0.01, "alpha": 0.9, "centered": True}, _centered, 200.0
    ),
    "rmsprop with momentum": Variant(
        _RMSPROP, {"lr": 0.01, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.3},
        _rmsprop, 380.0, coupled=0.3,
    ),
    "adagrad": Variant(
        torch.optim.Adagrad, {"lr": 0.01, "lr_decay": 0.1, "initial_accumulator_value": 0.02},
        _adagrad, 200.0 * (1 + 6 * 0.1),
    ),
}  # fmt: skip


def stepped(
    module: nn.Module, loss: Callable[[], Tensor], variant: Variant
) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """Trains a module for some steps; returns its optimizer, and the gradients that it has met."""
    options = {name: torch.clone(v) if isinstance(v, Tensor) else v
               for name, v in variant.options.items()}  # fmt: skip
    optimizer = variant.kind(module.parameters(), **options)
    seen = []
    for _ in range(variant.steps):
        optimizer.zero_grad()
        loss().backward()
        met = [variant.sign * p.grad + variant.coupled * p.detach() for p in module.parameters()]
        seen.append(torch.cat([g.reshape(-1) for g in met]))
        optimizer.step()
    return optimizer, seen
