"""Pooled Lanczos runs beside converged eigenvalues, on one LeNet: what is it that is fitted?

    python examples/protocols/lenet_mnist.py --data-dir DATA [--out protocols_output]
    python examples/protocols/lenet_mnist.py --data-dir DATA --recipe hpl --samples 60000 --out HPL

DATA holds ``MNIST/raw/*-ubyte.gz``, the four files as LeCun published them. A run that is stopped
goes on where it was, and one folder holds one network. Trained in float32, measured in float64: the
rounding of float32 hides what is a thousand times smaller than the largest eigenvalue, so that
``--precision float32``, a third of the time, finds the same values and proves fewer. HPL is
"Investigating the Overlooked Hessian Structure" (Tang et al., 2025).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hessian import PooledSLQ, PowerLawFit, fit_power_law, hessian_spectrum
from lightning_hessian.results import FloatArray, HessianSpectrum, load_spectrum, save_spectrum
from lightning_hessian.statistics.power_law import ks_distance_by_cutoff, optimal_cutoff
from lightning_hessian.statistics.significance import critical_value
from lightning_hessian.tracking.style import COLOURS, new_figure, quiet_grid

CUTOFFS = (50, 100, 200, 333, 500, 600, 700, 800, 900, 1000)


@dataclass(frozen=True)
class Recipe:
    """How the network is trained: momentum SGD (0.9), batches of 128, a first step size of 0.1."""

    weight_decay: float = 0.0
    milestones: tuple[float, ...] = ()
    """The shares of the epochs at which the step size is divided by 10."""


RECIPES = {"plain": Recipe(), "hpl": Recipe(weight_decay=5e-4, milestones=(0.4, 0.8))}
"""``hpl`` is HPL's appendix C.1.2, for MNIST with SGD; its 50 epochs are the default of both."""


def lenet() -> nn.Module:
    """Return LeNet-5 with ReLU and max pooling, 61,706 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def mnist(folder: Path, count: int, part: str = "train") -> tuple[Tensor, Tensor]:
    """Return the first images [count, 1, 28, 28] of a part, normalised, and their labels."""

    def read(name: str, offset: int, numbers: int) -> np.ndarray:
        with gzip.open(folder / "MNIST" / "raw" / f"{part}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, numbers, offset).copy()

    images = torch.tensor(read("images-idx3", 16, 784 * count)).view(-1, 1, 28, 28) / 255
    return (images - 0.1307) / 0.3081, torch.tensor(read("labels-idx1", 8, count)).long()


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the mean loss over the whole of the data, and the share that is classified right."""
    loss, correct = 0.0, 0
    for images, labels in zip(data[0].split(2000), data[1].split(2000), strict=True):
        outputs = model(images)
        loss += float(nn.functional.cross_entropy(outputs, labels, reduction="sum"))
        correct += int((outputs.argmax(1) == labels).sum())
    return loss / len(data[1]), correct / len(data[1])


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], num_epochs: int, recipe: Recipe, state: Path
) -> None:
    """Train by momentum SGD; every epoch is kept in ``state``, and a stopped run goes on there."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=recipe.weight_decay
    )
    milestones = [round(share * num_epochs) for share in recipe.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        torch.set_rng_state(kept["rng"])
        first = kept["epoch"]
    for epoch in range(first, num_epochs):
        for chosen in torch.randperm(len(data[1])).split(128):
            optimizer.zero_grad()
            loss_fn(model, (data[0][chosen], data[1][chosen])).backward()
            optimizer.step()
        schedule.step()
        kept = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(), "rng": torch.get_rng_state(), "epoch": epoch + 1,
        }  # fmt: skip
        torch.save(kept, state.with_suffix(".part"))
        os.replace(state.with_suffix(".part"), state)


def measure(
    name: str, model: nn.Module, data: tuple[Tensor, Tensor], folder: Path
) -> HessianSpectrum:
    """Return the top 1000 by a protocol: from the folder, where it has been measured before."""
    label = f"{name}_{len(data[1])}_{str(data[0].dtype).removeprefix('torch.')}"
    file = folder / f"{label}.npz"
    if not file.exists():
        checkpoint = folder / f"{label}.lanczos" if name == "converged" else None
        spectrum = hessian_spectrum(
            model, loss_fn, [data], num_eigenvalues=1000, trace_probes=0, checkpoint=checkpoint,
            protocol="converged" if name == "converged" else PooledSLQ(),
        )  # fmt: skip
        save_spectrum(spectrum, file)
    return load_spectrum(file)


def without_copies(pooled: HessianSpectrum) -> FloatArray:
    """Return the pooled values, of those that several runs have found one each.

    Converged values are the same where they differ by no more than their residual bounds.
    """
    kept: list[int] = []
    for i, value in enumerate(pooled.eigenvalues):
        last = kept[-1] if kept else None
        same = (
            last is not None
            and bool(pooled.converged[i] and pooled.converged[last])
            and pooled.eigenvalues[last] - value <= pooled.residuals[i] + pooled.residuals[last]
        )
        if not same:
            kept.append(i)
    return pooled.eigenvalues[kept]


def row(title: str, values: FloatArray, count: int) -> str:
    """Return a line of the table: the power law of the largest ``count`` values, or of all."""
    count = min(count, int((values > 0).sum()))
    fit: PowerLawFit = fit_power_law(values, k=count)
    verdict = {True: "yes", False: "no", None: "too few"}[fit.is_power_law]
    return (
        f"| {title} | {count} | {fit.ks_distance:.4f} | {fit.critical_value:.4f} | {verdict} | "
        f"{fit.p_value:.3f} | {fit.exponent:.3f} +- {fit.exponent_std_error:.3f} | "
        f"{fit.slope:.3f} |"
    )


def draw(spectra: dict[str, FloatArray], path: Path) -> None:
    """Draw the values by rank, and d_ks as a function of K beside its critical value."""
    figure, (left, right) = new_figure(width=9.6, height=4.2, ncols=2)
    for (name, values), colour in zip(spectra.items(), COLOURS, strict=False):
        positive = values[values > 0][:1000]
        left.loglog(np.arange(1, len(positive) + 1), positive, label=name, color=colour)
        counts, distances = ks_distance_by_cutoff(positive)
        shown = counts >= 10
        right.plot(counts[shown], distances[shown], label=name, color=colour)
    grid = np.arange(40, 1001)
    right.plot(grid, [critical_value(k) for k in grid], "k--", label="$d_c$ at 0.05")
    left.set(xlabel="rank $k$", ylabel=r"value (loss / parameter$^2$)")
    right.set(xlabel="$K$", ylabel="$d_{ks}$", ylim=(0, 0.2))
    left.legend(frameon=False)
    right.legend(frameon=False)
    for axes in (left, right):
        quiet_grid(axes)
    figure.savefig(path, dpi=110)


def trained(options: argparse.Namespace) -> nn.Module:
    """Return the trained network: from the folder, where it has been trained before."""
    settings = {name: getattr(options, name) for name in ("samples", "epochs", "recipe")}
    file = options.out / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(f"{options.out} holds another network ({file.read_text()}); give --out")
    file.write_text(json.dumps(settings))
    data, start = mnist(options.data_dir, options.samples), time.monotonic()
    torch.manual_seed(0)
    model = lenet()
    train(model, data, options.epochs, RECIPES[options.recipe], options.out / "lenet.pt")
    loss, accuracy = loss_and_accuracy(model, data)
    test_loss, test_accuracy = loss_and_accuracy(model, mnist(options.data_dir, 10_000, "t10k"))
    print(
        f"training (this time {time.monotonic() - start:.0f} s): loss {loss:.3e}, "
        f"{accuracy:.2%} right; test: loss {test_loss:.3e}, {test_accuracy:.2%} right\n",
        flush=True,
    )
    return model


def main() -> None:
    """Train, measure by both protocols, print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="holds MNIST/raw")
    parser.add_argument("--out", type=Path, default=Path("protocols_output"), help="(%(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="trained on (%(default)s)")
    parser.add_argument("--epochs", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--recipe", choices=RECIPES, default="plain", help="(%(default)s)")
    parser.add_argument(
        "--probe-size", type=int, default=1000, help="images of the Hessian (%(default)s)"
    )
    parser.add_argument(
        "--precision", choices=("float64", "float32"), default="float64", help="(%(default)s)"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = trained(options)
    images, labels = mnist(options.data_dir, min(options.probe_size, options.samples))
    dtype = getattr(torch, options.precision)
    model, data = model.to(dtype), (images.to(dtype), labels)
    converged = measure("converged", model, data, options.out)
    pooled = measure("pooled_slq", model, data, options.out)
    print("| protocol | products | time | converged | copies | lambda_1 | lambda_1000 |")
    print("|---|---|---|---|---|---|---|")
    for name, spectrum in (("converged", converged), ("pooled_slq", pooled)):
        print(
            f"| `{name}` | {spectrum.num_hvps} | {spectrum.seconds:.0f} s | "
            f"{spectrum.num_converged} of {len(spectrum.eigenvalues)} | {spectrum.num_copies} | "
            f"{spectrum.eigenvalues[0]:.4g} | {spectrum.eigenvalues[-1]:.4g} |"
        )
    single = without_copies(pooled)
    # In float32 rounding leaves some without proof; the values are there all the same.
    top = converged.eigenvalues[converged.eigenvalues > 0]
    title = "converged" if converged.num_converged == len(top) else "converged, unproven too"
    print("\n| values | K | d_ks | d_c | power law | p | beta | s |")
    print("|---|---|---|---|---|---|---|---|")
    print(row(title, top, 1000))
    if len(converged.leading) < len(top):
        print(row("converged, before the first unproven", converged.leading, 1000))
    print(row("pooled_slq", pooled.leading, 1000))
    print(row("pooled_slq, one of each", single, int((single > 0).sum())))
    print(row(title, top, int((single > 0).sum())))
    print(row(f"{title}, K of least d_ks", top, optimal_cutoff(top).num_values))
    print("\n| K | " + " | ".join(map(str, CUTOFFS)) + " |\n|---" + "|---" * len(CUTOFFS) + "|")
    for name, values in ((title, top), ("pooled_slq", pooled.leading)):
        counts = [k for k in CUTOFFS if k <= len(values)]
        distances = ks_distance_by_cutoff(values, counts)[1]
        cells = [f"{d:.4f}" for d in distances] + ["-"] * (len(CUTOFFS) - len(counts))
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("| d_c | " + " | ".join(f"{critical_value(k):.4f}" for k in CUTOFFS) + " |")
    spectra = {
        title: top,
        "pooled_slq": pooled.leading,
        "pooled_slq, one of each": single,
    }
    draw(spectra, options.out / "protocols.png")


if __name__ == "__main__":
    main()
