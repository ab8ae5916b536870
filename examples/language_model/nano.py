"""Does d_ks follow the test loss while a small GPT learns Shakespeare, letter by letter?

    python examples/language_model/nano.py --data-dir DATA --size 0.2M --seed 0
    python examples/language_model/nano.py --read examples/language_model/results/nano-0.2M-*.json

DATA holds ``tinyshakespeare/input.txt``. The first line trains and measures one run; the second
trains nothing, and prints what runs have found. The numbers of a run stand in one file, which grows
by a measurement at a time: a run that is stopped trains again to where it was, and measures only
what is missing. HPL is "Investigating the Overlooked Hessian Structure" (Tang et al., 2025), whose
figure 10 this is about; AdamW is as in its appendix C.2.2.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import add_row, print_findings, summary
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian import PooledSLQ, hessian_spectrum

STEPS = (0, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
"""When it is measured: often where much changes, and at equal distances after that."""

LEARNING_RATE, WEIGHT_DECAY = 6e-4, 0.1  # HPL, C.2.2: fixed, no warmup


@dataclass(frozen=True)
class Size:
    """A network and what it is trained and measured on.

    Attributes:
        depth: Blocks.
        heads: Of each attention.
        width: Of the residual stream.
        context: Characters of a sequence.
        batch: Sequences of a training step.
        probe: Sequences that the Hessian is of.
        top_all: K over all parameters.
        top_last: K over the last layer.
    """

    depth: int
    heads: int
    width: int
    context: int
    batch: int
    probe: int
    top_all: int
    top_last: int


SIZES = {
    "0.2M": Size(4, 4, 64, 64, 16, 16, 20, 200),
    "0.8M": Size(4, 4, 128, 64, 32, 32, 50, 500),
    "10.7M": Size(6, 6, 384, 256, 256, 256, 1000, 1000),  # HPL's GPT2-nano, for a GPU
}


class Block(nn.Module):
    """Causal attention and a two-layer network, each added to what comes in; no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width, bias=False)
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.before_network = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, width]."""
        parts = self.attend(self.before_attention(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_network(x))))


class GPT(nn.Module):
    """nanoGPT's network. Its last layer has weights of its own, where nanoGPT's has not.

    The last layer can so be measured as what comes last in the network. In nanoGPT it is the
    embedding too, whose second derivatives go through all blocks.
    """

    def __init__(self, size: Size, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, bias=False)
        self.head = nn.Linear(size.width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # nanoGPT: smaller where a branch joins the residual stream
                joins = name.endswith(("mix.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * size.depth) if joins else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, vocabulary]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy over all characters."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def characters(folder: Path) -> tuple[Tensor, Tensor]:
    """Return tiny Shakespeare as whole numbers: the first nine tenths, and the rest."""
    text = np.frombuffer((folder / "tinyshakespeare" / "input.txt").read_bytes(), np.uint8)
    ids = torch.from_numpy(np.unique(text, return_inverse=True)[1]).long()
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


def sequences(text: Tensor, count: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random sequences of a text, and the characters that follow."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context, (count, 1), generator=generator)
    rows = text[starts + torch.arange(context + 1)]
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Return the loss over many sequences, a part of them at a time."""
    parts = zip(batch[0].split(64), batch[1].split(64), strict=True)
    return sum(float(loss_fn(model, part)) * len(part[0]) for part in parts) / len(batch[0])


def measured(
    model: GPT, size: Size, probe: tuple[Tensor, Tensor], pooled: bool
) -> dict[str, dict[str, Any]]:
    """Return the spectra of the model as it is.

    The last layer is measured in float64: the last of its eigenvalues are a million times smaller
    than the first, and the rounding of float32 hides them.
    """
    found = {
        "all": summary(hessian_spectrum(model, loss_fn, [probe], num_eigenvalues=size.top_all))
    }
    with torch.no_grad():
        hidden: list[Tensor] = []
        hook = model.norm.register_forward_hook(lambda _module, _given, out: hidden.append(out))
        model(probe[0])
        hook.remove()
    # What comes before the last layer is fixed while the others are: compute it once.
    head = nn.Linear(size.width, model.head.out_features, bias=False).double()
    head.weight.data.copy_(model.head.weight)
    inward = [(hidden[0].double(), probe[1])]
    last = hessian_spectrum(
        head.to(probe[0].device), loss_fn, inward, num_eigenvalues=size.top_last
    )
    found["last"] = summary(last)
    if pooled:
        protocol = PooledSLQ(num_runs=3, num_steps=1000)
        found["pooled"] = summary(hessian_spectrum(head, loss_fn, inward, protocol=protocol))
    return found


def states(model: GPT, text: Tensor, size: Size, seed: int) -> Iterator[int]:
    """Train, and stop at each of `STEPS`."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95)
    )
    device = next(model.parameters()).device
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            yield step
        batch = sequences(text, size.batch, size.context, 1_000_000 * (seed + 1) + step)
        optimizer.zero_grad()
        loss_fn(model, (batch[0].to(device), batch[1].to(device))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def run(arguments: argparse.Namespace, path: Path) -> None:
    """Train and measure one run, and write what is found to a file after each measurement."""
    size, seed = SIZES[arguments.size], arguments.seed
    train, test = characters(arguments.data_dir)
    torch.manual_seed(seed)
    model = GPT(size, int(train.max()) + 1).to(arguments.device)
    held = json.loads(path.read_text()) if path.exists() else {"rows": []}
    known = {row["step"] for row in held["rows"]}
    on_device = [
        tuple(part.to(arguments.device) for part in sequences(text, count, size.context, chosen))
        for text, count, chosen in (
            (train, size.probe, 1), (train, 1024, 2), (test, 1024, 3)
        )  # the same for all seeds
    ]  # fmt: skip
    for step in states(model, train, size, seed):
        if step in known:
            continue
        begun = time.monotonic()
        row: dict[str, Any] = {"step": step}
        row["train_loss"], row["test_loss"] = (mean_loss(model, b) for b in on_device[1:])
        row |= measured(model, size, on_device[0], arguments.pooled)
        held |= {"size": arguments.size, "seed": seed}
        add_row(path, held, row)
        took = time.monotonic() - begun
        print(f"step {step}: test loss {row['test_loss']:.4f}, {took:.0f} s", flush=True)


def main() -> None:
    """Train and measure, or read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="holds tinyshakespeare/input.txt")
    parser.add_argument("--size", choices=SIZES, default="0.2M")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-pooled", dest="pooled", action="store_false")
    parser.add_argument("--out", type=Path, default=Path("language_model_output"))
    parser.add_argument("--read", type=Path, nargs="+", help="print what these runs have found")
    arguments = parser.parse_args()
    if arguments.read:
        return print_findings(arguments.read)
    if arguments.data_dir is None:
        parser.error("--data-dir is wanted: the folder that holds tinyshakespeare/input.txt")
    path = arguments.out / f"nano-{arguments.size}-{arguments.seed}.json"
    run(arguments, path)
    return print_findings([path])


if __name__ == "__main__":
    main()
