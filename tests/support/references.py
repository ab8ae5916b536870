"""Oracles by other hands, and the small networks that several tests measure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LossFunction = Callable[[Any, Any], Tensor]


# Oracles ----------------------------------------------------------------------------------------


class _Loss(nn.Module):
    def __init__(self, module: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.module, self.loss_fn = module, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.module, batch)


def in_double(value: Any) -> Any:
    """Returns a float64 copy of a module, or of the floating-point tensors of a batch."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_double(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(in_double(part) for part in value)
    return value


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def flat_loss(
    module: nn.Module, loss_fn: LossFunction, batch: Any, names: Sequence[str] | None = None
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Returns the loss as a function of one flat vector, and the present vector."""
    chosen = {n: p for n, p in trainable(module).items() if names is None or n in names}
    wrapped = _Loss(module, loss_fn)

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in chosen.values()])
        state = {f"module.{n}": v.view_as(p) for (n, p), v in zip(chosen.items(), parts, strict=1)}
        return functional_call(wrapped, state, (batch,))

    return loss, torch.cat([p.detach().reshape(-1) for p in chosen.values()])


def dense_hessian(
    module: nn.Module, loss_fn: LossFunction, batch: Any, names: Sequence[str] | None = None
) -> Tensor:
    """Returns the Hessian of ``loss_fn(module, batch)`` in float64, [n, n].

    By ``jacfwd(grad(f))``: ``torch.func.hessian`` is ``jacfwd(jacrev(f))``, which is wrong on
    `nn.MultiheadAttention`.
    """
    loss, point = flat_loss(in_double(module), loss_fn, in_double(batch), names)
    with sdpa_kernel(SDPBackend.MATH):
        return jacfwd(grad(loss))(point)


def finite_difference_hessian(
    module: nn.Module, loss_fn: LossFunction, batch: Any, step: float = 1e-5
) -> Tensor:
    """Returns the same by central differences of ordinary backward passes in float64."""
    loss, point = flat_loss(in_double(module), loss_fn, in_double(batch))

    def gradient(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(loss(at), at)[0]

    directions = torch.eye(len(point), dtype=point.dtype)
    columns = [
        (gradient(point + step * e) - gradient(point - step * e)) / (2 * step) for e in directions
    ]
    return torch.stack(columns, dim=1)


# Networks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A network in float32, its loss, ragged batches, and all their samples as one batch."""

    module: nn.Module
    loss_fn: LossFunction
    batches: list[Any]
    whole: Any
    mode: str = "eval"

    def hessian(self) -> Tensor:
        """Returns the dense float64 Hessian over all samples."""
        return dense_hessian(self.reference_module(), self.loss_fn, self.whole)

    def reference_module(self) -> nn.Module:
        """Returns a copy in the mode of the problem, whose forward pass writes no buffers."""
        module = copy.deepcopy(self.module).train(self.mode == "train")
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d) and part.training:
                part.running_mean = part.running_var = part.num_batches_tracked = None
        return module


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    """Returns the mean cross-entropy over all predictions of a batch ``(inputs, targets)``."""
    inputs, targets = batch
    return F.cross_entropy(module(inputs).flatten(0, -2), targets.flatten())


def ragged(*tensors: Tensor, sizes: Sequence[int] = (6, 4)) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(tensor, list(sizes)) for tensor in tensors), strict=True))


def _classification(module: nn.Module, inputs: Tensor, num_classes: int = 3) -> Problem:
    targets = torch.randint(num_classes, (len(inputs),))
    whole = (inputs, targets)
    return Problem(module.eval(), cross_entropy, ragged(*whole), whole)


def mlp() -> Problem:
    module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return _classification(module, torch.randn(10, 5))


def convolution() -> Problem:
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    return _classification(module, torch.randn(10, 1, 6, 6))


def batch_norm() -> Problem:
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():  # statistics that evaluation and training mode disagree on
        module[1].running_mean.normal_()
        module[1].running_var.uniform_(0.5, 2)
        module[1].weight.normal_()
    return _classification(module, torch.randn(10, 5))


def batch_norm_in_training() -> Problem:
    """One batch, since its statistics are part of the loss."""
    problem = batch_norm()
    module = problem.module.train()
    return Problem(module, problem.loss_fn, [problem.whole], problem.whole, "train")


class TiedHead(nn.Module):
    """Predicts tokens with the transposed embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


def tied_embedding() -> Problem:
    whole = (torch.randint(7, (10, 5)), torch.randint(7, (10, 5)))
    return Problem(TiedHead().eval(), cross_entropy, ragged(*whole), whole)


class AttentionClassifier(nn.Module):
    """Embedding, `nn.MultiheadAttention`, LayerNorm, head: where ``jacrev`` of ``jacrev`` fails."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1))


def multihead_attention() -> Problem:
    return _classification(AttentionClassifier(), torch.randint(6, (10, 5)))


class DotProductAttention(nn.Module):
    """Causal `F.scaled_dot_product_attention` between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        x = self.attend(query, key, value)
        return self.head(x.transpose(1, 2).flatten(2).mean(1))


class FusedAttention(DotProductAttention):
    """Forces the fused kernel, whose backward cannot be differentiated."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().attend(query, key, value)


def dot_product_attention() -> Problem:
    return _classification(DotProductAttention(), torch.randn(10, 5, 4))


def fused_attention() -> Problem:
    return _classification(FusedAttention(), torch.randn(10, 5, 4))


class EncoderClassifier(nn.Module):
    """A standard encoder layer (dropout 0.1, off in evaluation mode) and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def transformer_encoder() -> Problem:
    return _classification(EncoderClassifier(), torch.randn(10, 4, 4))


class Recurrent(nn.Module):
    """An LSTM read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm() -> Problem:
    return _classification(Recurrent(), torch.randn(10, 4, 3))


def layer_norm() -> Problem:
    module = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 3))
    return _classification(module, torch.randn(10, 5))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    make.__name__: make
    for make in (
        mlp,
        convolution,
        batch_norm,
        batch_norm_in_training,
        tied_embedding,
        multihead_attention,
        dot_product_attention,
        transformer_encoder,
        lstm,
        layer_norm,
    )
}


def problem(name: str, seed: int = 0) -> Problem:
    """Returns one of `PROBLEMS`, with weights and data from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PROBLEMS[name]()
