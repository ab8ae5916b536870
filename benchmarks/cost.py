"""What a measurement costs, in gradients over the same probe batches.

    OMP_NUM_THREADS=1 python benchmarks/cost.py [--clock cpu]

Everything is a ratio taken in one run; times of the gradient are printed for orientation only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import CLOCKS, in_turn, once, use_clock
from torch import nn

from lightning_hessian import hessian_spectrum
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace

NUM_EIGENVALUES = 50
ENGINES = ("linearize", "autograd", "recompute")


class Transformer(nn.Module):
    """A small causal transformer over 65 characters."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(65, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 65)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, T, 65]."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.layers(self.embedding(tokens), mask=mask, is_causal=True))


def digits_network() -> nn.Module:
    """Return the demo's network."""
    from lightning_hessian.cli.digits import DigitsClassifier

    return DigitsClassifier().network


def lenet() -> nn.Module:
    """Return LeNet with 61,706 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def problems() -> Iterator[tuple[str, nn.Module, Callable[..., Any], list[Any]]]:
    """Yield name, module, loss and probe batches, the same in every run."""
    torch.manual_seed(0)

    def classify(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

    generator = torch.Generator().manual_seed(0)

    def images(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, 1, size, size, generator=generator)
        return x, torch.randint(10, (count,), generator=generator)

    yield "digits network, 1,400 samples", digits_network(), classify, [images(350, 8)] * 4
    yield "LeNet, 1,000 samples", lenet(), classify, [images(250, 28)] * 4
    tokens = torch.randint(65, (4, 16, 65), generator=generator)
    batches = [(part[:, :-1], part[:, 1:]) for part in tokens]
    yield "transformer, 4,096 tokens", Transformer(), classify, batches


def main() -> None:
    """Print one row for each problem, as the README shows it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu, with one thread, where other programs run too (%(default)s)",
    )
    options = parser.parse_args()
    if options.clock == "cpu" and torch.get_num_threads() != 1:
        parser.error("--clock cpu adds up the threads: set OMP_NUM_THREADS=1")
    use_clock(options.clock)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, K = {NUM_EIGENVALUES}, "
        f"{options.clock} clock\n"
    )
    print("| problem | parameters | gradient | product: linearize | autograd | recompute | "
          "products for K | whole measurement |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for name, model, loss_fn, batches in problems():
        space = ParameterSpace.select(model)
        objective = Objective(model, loss_fn, batches, space)
        with objective.isolated():
            objective.value()

            def gradient(objective: Objective = objective) -> None:
                leaves = tuple(value.requires_grad_() for value in objective.point())
                for index in range(len(objective.batches)):
                    torch.autograd.grad(objective.batch_loss(leaves, index), leaves)

            works: dict[str, Callable[[], Any]] = {"gradient": gradient}
            vector = torch.randn(space.size)
            for engine in ENGINES:
                operator = HessianOperator(objective, engine)
                works[engine] = lambda o=operator, v=vector: o.matvec(v)
            times = in_turn(works, rounds=7)
        del works, operator
        base = times.median("gradient")
        cells = [f"{times.ratio(engine, 'gradient'):.1f}" for engine in ENGINES]
        taken, spectrum = once(
            lambda m=model, f=loss_fn, b=batches: hessian_spectrum(
                m, f, b, num_eigenvalues=NUM_EIGENVALUES
            )
        )
        cells += [str(spectrum.num_hvps), f"{taken / base:.0f} ({spectrum.engine})"]
        print(f"| {name} | {space.size:,} | {1000 * base:.0f} ms | " + " | ".join(cells) + " |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
