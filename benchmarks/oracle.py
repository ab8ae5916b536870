"""curvlinops as a second opinion on our products, and finite differences as the judge."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from peers import Curvlinops, Ours, twice_differentiable
from problems import Batch, Problem
from torch import Tensor, nn


class AttentionNetwork(nn.Module):
    """Embedding, ``nn.MultiheadAttention``, LayerNorm and a head, mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, 5] for [B, T, 6]."""
        h = self.embedding(x)
        return self.head(self.norm(h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


def networks() -> Iterator[Problem]:
    """Yield small problems in float64, with data in one batch and in batches of unequal size."""
    torch.manual_seed(0)

    def batches(*sizes: int, shape: tuple[int, ...]) -> list[Batch]:
        return [
            (torch.randn(size, *shape, dtype=torch.float64), torch.randint(5, (size,)))
            for size in sizes
        ]

    perceptron = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.GELU(),
                               nn.Linear(12, 5))  # fmt: skip
    yield Problem("MLP", perceptron.double().eval(), batches(40, shape=(8,)))
    yield Problem("MLP, batches of 20, 13 and 7", perceptron, batches(20, 13, 7, shape=(8,)))
    convolutional = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Softplus(), nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    yield Problem(
        "CNN with BatchNorm", convolutional.double().eval(), batches(9, 5, shape=(2, 8, 8))
    )
    yield Problem("nn.MultiheadAttention", AttentionNetwork().double().eval(),
                  batches(12, shape=(7, 6)))  # fmt: skip


def agreement() -> Iterator[tuple[str, float, float, float]]:
    """Yield name, error of our product, of curvlinops', and the difference of the two (relative).

    The errors are against finite differences of gradients, extrapolated (Richardson).
    """
    if find_spec(Curvlinops.module) is None:
        print(f"skipped: {Curvlinops.name} is not installed (make bench installs it)")
        return
    for problem in networks():
        vector = torch.randn(problem.size, dtype=torch.float64)
        ours = Ours(problem)
        mine = ours.start()(vector)
        ours.stop()
        with twice_differentiable():
            theirs = Curvlinops(problem).start()(vector)
        judge = finite_difference(problem, vector)
        size = float(judge.norm())
        yield (
            problem.name,
            float((mine - judge).norm()) / size,
            float((theirs - judge).norm()) / size,
            float((mine - theirs).norm()) / size,
        )


def finite_difference(problem: Problem, vector: Tensor) -> Tensor:
    """Return H v from gradients at four points on the line through theta along v."""

    def central(step: float) -> Tensor:
        return (_gradient(problem, vector, step) - _gradient(problem, vector, -step)) / (2 * step)

    step = 1e-3 / float(vector.norm())
    return (4 * central(step / 2) - central(step)) / 3


def _gradient(problem: Problem, vector: Tensor, step: float) -> Tensor:
    kept = [p.detach().clone() for p in problem.parameters]
    parts = vector.split([p.numel() for p in problem.parameters])
    total = torch.zeros_like(vector)
    samples = sum(len(batch[0]) for batch in problem.batches)
    with torch.no_grad():
        for parameter, part in zip(problem.parameters, parts, strict=True):
            parameter.add_(part.view_as(parameter), alpha=step)
    with twice_differentiable():
        for batch in problem.batches:
            loss = problem.loss_fn(problem.model, batch)
            gradient = torch.autograd.grad(loss, problem.parameters)
            flat = torch.cat([g.reshape(-1) for g in gradient])
            total.add_(flat, alpha=len(batch[0]) / samples)
    with torch.no_grad():
        for parameter, value in zip(problem.parameters, kept, strict=True):
            parameter.copy_(value)
    return total
