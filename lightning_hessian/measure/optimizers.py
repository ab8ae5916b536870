"""The preconditioners of torch's optimizers, and the thresholds at which their steps diverge.

On a quadratic with Hessian H, an optimizer with a frozen preconditioner P is a linear iteration
theta -> theta', one for each eigenvalue x of P^-1 (H + W). Its roots z leave the unit circle at
z = -1: on the circle the equation reads ``theta`` times a polynomial whose imaginary part is
sin(arg z) times something of one sign, so that a symmetric H has no other place to cross but
z = 1, where x = 0. Putting z = -1 into the iteration gives the thresholds below. The argument
holds entry by entry: rates, betas and decays that differ between parameters change nothing in it.

Decoupled weight decay w takes eta w theta in each step, so that 2 theta becomes
(2 - eta w) theta at z = -1, and the threshold is (1 - eta w / 2) of the one without.

Sources: Cohen, Kaur, Li, Kolter, Talwalkar, "Gradient descent on neural networks typically occurs
at the edge of stability" (ICLR 2021): 2 / eta, heavy ball (2 + 2 beta) / eta, Nesterov
(2 + 2 beta) / ((1 + 2 beta) eta), with proofs in its appendix B; Cohen et al., "Adaptive gradient
methods at the edge of stability" (arXiv 2207.14484): P of Adam with its bias corrections, and
(2 + 2 beta_1) / ((1 - beta_1) eta), which is 38 / eta at beta_1 = 0.9; its appendices have
RMSprop, Adagrad and others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.measure.preconditioner import Preconditioner, PreconditionerRule


def _sgd(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Preconditioner:
    """P = 1. Dampening takes (1 - dampening) of the learning rate, but with momentum only."""
    momentum = float(group["momentum"])
    rate = float(group["lr"])
    over = 2 + 2 * momentum
    if group["nesterov"]:
        over /= 1 + 2 * momentum
    elif momentum:
        rate *= 1 - float(group["dampening"])
    return _made(group, None, over, rate)


def _adam(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Preconditioner | None:
    """P = (1 - beta_1^t) (sqrt(v / (1 - beta_2^t)) + eps), t the steps so far."""
    if not _steps(state):
        return None
    first, second = _corrections(group, state)
    squares = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    root = (_precise(squares) / second).sqrt_().add_(float(group["eps"]))
    return _averaged(group, root.mul_(first))


def _nadam(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Preconditioner | None:
    """P = sqrt(v / (1 - beta_2^t)) + eps; the step is (a g + b m) / P.

    With a = (1 - mu_t) / (1 - mu_1 ... mu_t) and b = mu_{t+1} / (1 - mu_1 ... mu_{t+1}), frozen as
    of the last step, and m the running mean of g, the threshold is
    2 (1 + beta_1) / ((a (1 + beta_1) + b (1 - beta_1)) eta).
    """
    steps = _steps(state)
    if not steps:
        return None
    beta = float(group["betas"][0])
    decay = float(group["momentum_decay"])
    now, after = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (steps, steps + 1))
    product = float(state["mu_product"])
    own = (1 - now) / (1 - product)
    mean = after / (1 - product * after)
    over = 2 * (1 + beta) / (own * (1 + beta) + mean * (1 - beta))
    _, second = _corrections(group, state)
    root = (_precise(state["exp_avg_sq"]) / second).sqrt_().add_(float(group["eps"]))
    return _made(group, root, over, float(group["lr"]))


def _radam(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Preconditioner | None:
    """P = (1 - beta_1^t) (sqrt(v) + eps) / (r sqrt(1 - beta_2^t)), r the rectification.

    In the first steps, where the variance is not rectified, P = 1 - beta_1^t.
    """
    steps = _steps(state)
    if not steps:
        return None
    first, second = _corrections(group, state)
    beta = float(group["betas"][1])
    most = 2 / (1 - beta) - 1
    length = most - 2 * steps * beta**steps / second
    squares = _precise(state["exp_avg_sq"])
    if not length > 5.0:
        return _averaged(group, torch.full_like(squares, first))
    rectified = math.sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length))
    root = squares.sqrt().add_(float(group["eps"]))
    return _averaged(group, root.mul_(first / (rectified * math.sqrt(second))))


def _rmsprop(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Preconditioner | None:
    """P = sqrt(v) + eps, or sqrt(v - m^2) + eps where centered; momentum is that of heavy ball."""
    if not _steps(state):
        return None
    squares = _precise(state["square_avg"])
    if group["centered"]:
        mean = _precise(state["grad_avg"])
        squares = (squares - mean * mean).clamp_(min=0.0)
    root = squares.sqrt().add_(float(group["eps"]))
    return _made(group, root, 2 + 2 * float(group["momentum"]), float(group["lr"]))


def _adagrad(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Preconditioner | None:
    """P = sqrt(sum of g^2) + eps, at the learning rate that has decayed as of the last step."""
    steps = _steps(state)
    if not steps:
        return None
    root = _precise(state["sum"]).sqrt().add_(float(group["eps"]))
    rate = float(group["lr"]) / (1 + (steps - 1) * float(group["lr_decay"]))
    return _made(group, root, 2.0, rate)


def _averaged(group: Mapping[str, Any], diagonal: Tensor) -> Preconditioner:
    """Return what steps by the running mean of gradients, (1 - beta_1) of the newest in it."""
    beta = float(group["betas"][0])
    return _made(group, diagonal, (2 + 2 * beta) / (1 - beta), float(group["lr"]))


def _made(
    group: Mapping[str, Any], diagonal: Tensor | None, over: float, rate: float
) -> Preconditioner:
    """Return a preconditioner whose threshold is ``over / rate`` but for weight decay."""
    decay = float(group["weight_decay"])
    if group.get("decoupled_weight_decay"):
        over *= 1 - float(group["lr"]) * decay / 2
        decay = 0.0
    maximizes = bool(group.get("maximize"))
    threshold = over / rate if rate else math.inf
    return Preconditioner(threshold, diagonal, weight_decay=decay, maximizes=maximizes)


def _steps(state: Mapping[str, Any]) -> int:
    """Return how often the optimizer has stepped a parameter; a tensor where it is capturable."""
    return int(state.get("step", 0))


def _corrections(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, float]:
    """Return the bias corrections 1 - beta^t of both running means."""
    first, second = (1 - float(beta) ** _steps(state) for beta in group["betas"])
    return first, second


def _precise(tensor: Tensor) -> Tensor:
    """Return a state in float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _adamw(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Preconditioner | None:
    """That of Adam; older versions of torch do not say in the group that decay is decoupled."""
    return _adam(parameter, {**group, "decoupled_weight_decay": True}, state)


TORCH_RULES: dict[type[torch.optim.Optimizer], PreconditionerRule] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adamw,
    torch.optim.NAdam: _nadam,
    torch.optim.RAdam: _radam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}
