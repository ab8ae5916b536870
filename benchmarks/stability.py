"""What the stability instrument takes: products and residuals over 30 validations of three runs.

    OMP_NUM_THREADS=1 python benchmarks/stability.py [--data-dir DATA] [--only gpt] [--check]

Each run trains with AdamW and is measured every so many steps, as between whole spectra: from the
vectors of the measurement before. With ``--check`` every value is held against the eigenvalue that
Lanczos finds from a random vector, at a residual of 1e-3 and with its search for copies.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from problems import GPT, lenet, mnist, shakespeare
from torch import Tensor, nn

from lightning_hessian import Session, StabilityInstrument, Training
from lightning_hessian.measure.stepping import stepping_of
from lightning_hessian.solvers.lanczos import lanczos

VALIDATIONS = 30


@dataclass(frozen=True)
class Run:
    """A network, its data, and how often it is measured.

    Attributes:
        network: Makes it.
        inputs: All inputs.
        labels: And what is to be learnt, flat for each batch.
        batch_size: Of training.
        probe: How many inputs are measured on, in batches of that size.
        steps: Between two measurements.
        rate: Learning rate of AdamW.
    """

    network: Callable[[], nn.Module]
    inputs: Tensor
    labels: Tensor
    batch_size: int
    probe: int
    steps: int
    rate: float = 1e-3


def mlp() -> nn.Module:
    """Return a dense network of 270,000 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(),
        nn.Linear(256, 10),
    )  # fmt: skip


def runs(folder: Path | None) -> dict[str, Callable[[], Run]]:
    """Return what makes each run, by name; an epoch of LeNet and the MLP is 40 steps."""

    def digits(network: Callable[[], nn.Module]) -> Run:
        return Run(network, *mnist(folder, 5000), batch_size=125, probe=250, steps=40)

    def gpt() -> Run:
        text = shakespeare(folder)
        count = (len(text) - 1) // 64
        inputs = text[: 64 * count].view(count, 64)
        labels = text[1 : 64 * count + 1].view(count, 64)
        network = lambda: GPT(context=64, depth=4, heads=4, width=128)  # noqa: E731
        return Run(network, inputs, labels, batch_size=16, probe=32, steps=50)

    return {"lenet": lambda: digits(lenet), "mlp": lambda: digits(mlp), "gpt": gpt}


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean loss of a batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1].flatten())


def train(model: nn.Module, optimizer: Any, run: Run, steps: int, generator: Any) -> Training:
    """Make some steps, and return what training is doing then."""
    before: dict[str, Tensor] = {}
    for step in range(steps):
        chosen = torch.randint(len(run.inputs), (run.batch_size,), generator=generator)
        if step == steps - 1:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        loss_fn(model, (run.inputs[chosen], run.labels[chosen])).backward()
        optimizer.step()
    update = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return Training((optimizer,), update)


def measured(run: Run, check: bool) -> list[dict[str, float]]:
    """Return a row for each validation."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = run.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate)
    instrument, rows = StabilityInstrument(), []
    parts = (part[: run.probe].split(run.batch_size) for part in (run.inputs, run.labels))
    batches = list(zip(*parts, strict=True))
    for _ in range(VALIDATIONS):
        training = train(model, optimizer, run, run.steps, generator)
        with Session(model, loss_fn, batches, expected_products=10, training=training) as session:
            found = instrument.measure(session, None)
            row = dict(found.scalars())
            if check:
                hessian = session.operator(matrix="hessian")
                stepping = stepping_of(session, (optimizer,), session.space.names)
                assert not isinstance(stepping, str)
                ratio = lanczos(stepping.operator(hessian), 1, tol=1e-3)
                row["true_ratio"] = ratio.values[0]
                row["true_lambda_1"] = lanczos(hessian, 1, tol=1e-3).values[0]
        rows.append(row)
    return rows


def told(name: str, rows: list[dict[str, float]], check: bool) -> str:
    """Return a line on a run."""
    products = np.array([row["num_hvps"] for row in rows])
    first, later = products[0], products[1:]
    line = f"| {name} | {first:.0f} | {np.median(later):.0f} | {later.max():.0f} |"
    for value in ("sharpness", "lambda_1"):
        relative = np.array([row[f"{value}_residual"] / abs(row[value]) for row in rows[1:]])
        line += f" {np.median(relative):.1%} | {relative.max():.1%} |"
    line += f" {min(r['ratio'] for r in rows):.3g} to {max(r['ratio'] for r in rows):.3g} |"
    if check:
        for value in ("ratio", "lambda_1"):
            off = np.array([1 - row[value] / row[f"true_{value}"] for row in rows[1:]])
            line += f" {np.median(off):.1%} | {off.max():.1%} |"
    return line


def main() -> None:
    """Measure the runs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="holds MNIST and tinyshakespeare")
    parser.add_argument("--only", help="one run by name")
    parser.add_argument("--check", action="store_true", help="hold values against Lanczos")
    options = parser.parse_args()
    names = ["run", "first", "products", "most", "residual of sharpness", "most"]
    names += ["residual of lambda_1", "most", "ratio"]
    names += ["ratio too low by", "most", "lambda_1 too low by", "most"] if options.check else []
    print("|", " | ".join(names), "|")
    for name, make in runs(options.data_dir).items():
        if options.only in (None, name):
            print(told(name, measured(make(), options.check), options.check), flush=True)


if __name__ == "__main__":
    main()
