"""Memory and time of Hessian-vector products where a language model is largest.

    OMP_NUM_THREADS=1 python benchmarks/language.py [vocabulary] [attention]

Each case runs in a process of its own, whose peak of resident memory is read; what it held before
the engine was built (libraries, model, batch) is left out. Times are those of the processor.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian.losses import linear_cross_entropy
from lightning_hessian.operators.engines import ENGINES
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace

MIB = 2**20
TOKENS, VOCABULARY = 1024, 50_000


class Predictor(nn.Module):
    """A hidden layer and a last layer over a vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden states."""
        return torch.tanh(self.body(x))


def plain_loss(module: Predictor, batch: Any) -> Tensor:
    """Return the loss by the logits of all tokens."""
    return F.cross_entropy(module.head(module(batch[0])), batch[1])


def chunked_loss(module: Predictor, batch: Any) -> Tensor:
    """Return the loss in chunks of tokens."""
    return linear_cross_entropy(module(batch[0]), module.head.weight, batch[1])


def vocabulary(form: str, width: int) -> tuple[nn.Module, Any, Any]:
    """Return a model, its loss and a batch."""
    batch = torch.randn(TOKENS, width), torch.randint(VOCABULARY, (TOKENS,))
    return Predictor(width), chunked_loss if form == "chunked" else plain_loss, batch


class Attending(nn.Module):
    """Layers of causal attention, eight heads of width 16, without anything between."""

    def __init__(self, depth: int = 2, heads: int = 8, width: int = 128) -> None:
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number a token."""
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            value = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + value.transpose(1, 2).flatten(2)
        return self.head(x)


def attention(form: str, length: int) -> tuple[nn.Module, Any, Any]:
    """Return a model, its loss and a batch of one sequence."""
    batch = torch.randn(1, length, 128), torch.randn(1, length, 1)
    return Attending(), lambda module, b: F.mse_loss(module(b[0]), b[1]), batch


CASES = {"vocabulary": vocabulary, "attention": attention}
SIZES = {"vocabulary": (64, 256, 768), "attention": (512, 1024, 2048)}


def resident() -> float:
    """Return the resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measured(case: str, form: str, engine: str, size: int, products: int) -> dict[str, float]:
    """Return what building an engine and some products take, in this process."""
    torch.manual_seed(0)
    module, loss_fn, batch = CASES[case](form, size)
    space = ParameterSpace.select(module, None)
    attention = "chunks" if form == "chunked" and case == "attention" else "plain"
    objective = Objective(module, loss_fn, [batch], space, attention=attention)
    vector = torch.randn(space.size)
    with objective.isolated():
        before = resident()
        product = ENGINES[engine](objective, 0)
        tangents = space.split(vector)
        product(tangents)
        seconds = []
        for _ in range(products):
            begun = time.process_time()
            product(tangents)
            seconds.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return {"mib": (peak - before) / MIB, "seconds": min(seconds)}


def in_a_process(*arguments: object) -> dict[str, float]:
    """Return what `measured` finds in a fresh process."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def main() -> None:
    """Print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="all, by default")
    parser.add_argument("--one", nargs=5, metavar=("CASE", "FORM", "ENGINE", "SIZE", "PRODUCTS"))
    given = parser.parse_args()
    if given.one:
        case, form, engine, size, products = given.one
        print(json.dumps(measured(case, form, engine, int(size), int(products))))
        return
    for case in given.cases or CASES:
        print(f"\n{case}\n| size | engine | plain MiB | chunked MiB | memory | time |")
        print("|---|---|---|---|---|---|")
        for size in SIZES[case]:
            for engine in ("linearize", "autograd", "recompute"):
                plain, chunked = (
                    in_a_process(case, form, engine, size, 3) for form in ("plain", "chunked")
                )
                memory, seconds = (chunked[name] / plain[name] for name in ("mib", "seconds"))
                row = f"{plain['mib']:.0f} | {chunked['mib']:.0f} | {memory:.2f} | {seconds:.2f}"
                print(f"| {size} | {engine} | {row} |", flush=True)


if __name__ == "__main__":
    main()
