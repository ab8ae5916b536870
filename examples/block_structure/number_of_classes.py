"""The static force: off-diagonal blocks against the number of classes, beside the theory.

Linear model (HBS theorem 1) and one hidden layer (theorem 2), Gaussian inputs, random weights.
Run: python examples/block_structure/number_of_classes.py --out docs/block_structure
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian import block_structure
from lightning_hessian.results import FloatArray
from lightning_hessian.statistics import theory

CLASSES = (10, 100, 1000)
ROWS = 24
"""Up to so many rows of each layer are blocks: enough pairs for a mean, whatever C is."""


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(net(batch[0]), batch[1])


def squared_error(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return half the squared error to zero; the targets enter H_wv alone."""
    return net(batch[0]).square().sum(1).mean() / 2


def lecun(net: nn.Module) -> nn.Module:
    """Draw weights of variance 1 over the number of inputs (HBS assumption 2)."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return net


def mean_squares(
    net: nn.Module, loss_fn: Callable[..., Tensor], num_classes: int, width: int, samples: int
) -> dict[str, FloatArray]:
    """Return for each layer the mean squared norms off and on the diagonal, [2]."""
    batch = (torch.randn(samples, width), torch.randint(num_classes, (samples,)))
    rows = {
        f"{name} {i}": f"{name}[{i}:{i + 1}]"
        for name, parameter in net.named_parameters()
        for i in range(min(ROWS, len(parameter)))
    }
    found = block_structure(net, loss_fn, [batch], blocks=rows, exact=False, hvp="autograd")
    layers = np.array([name.split()[0] for name in found.names])
    means = {}
    for layer in dict.fromkeys(layers):
        squared = np.square(found.frobenius[np.ix_(layers == layer, layers == layer)])
        off = ~np.eye(len(squared), dtype=bool)
        means[str(layer)] = np.array([squared[off].mean(), np.diagonal(squared).mean()])
    return means


def linear_ratio(num_classes: int, gamma: float, width: int) -> float:
    """Return the ratio of squared norms of a linear model with cross-entropy."""
    net = lecun(nn.Linear(width, num_classes, bias=False))
    means = mean_squares(net, cross_entropy, num_classes, width, int(width / gamma))["weight"]
    return float(means[0] / means[1])


def hidden_ratios(num_classes: int, loss_fn: Callable[..., Tensor], seeds: int) -> FloatArray:
    """Return the ratios of expected squared norms of H_ww and H_vv, [2]."""
    sums: dict[str, FloatArray] = {}
    for _ in range(seeds):
        net = lecun(
            nn.Sequential(
                nn.Linear(100, 8, bias=False), nn.ReLU(), nn.Linear(8, num_classes, bias=False)
            )
        )
        for layer, means in mean_squares(net, loss_fn, num_classes, 100, 100).items():
            sums[layer] = sums.get(layer, 0) + means
    return np.array([off / on for off, on in sums.values()])


def slope(values: FloatArray, first: int = 0) -> float:
    """Return the fitted power of C, from the given place in `CLASSES` on."""
    return float(np.polyfit(np.log(CLASSES[first:]), np.log(values[first:]), 1)[0])


def draw(curves: dict[str, FloatArray], gamma: float, path: Path) -> None:
    """Draw the measured ratios and, dashed, the theory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(curves.items()):
        axes.loglog(CLASSES, values, "os^D"[i], label=f"{name}: slope {slope(values):.2f}")
    axes.set_prop_cycle(None)
    grid = np.geomspace(10, 1000, 13).astype(int)
    axes.loglog(grid, [theory.class_ratio(gamma, int(c)) for c in grid], "k--", linewidth=1,
                label="theorem 1 at finite C")  # fmt: skip
    axes.loglog(grid, [theory.hidden_ratio_mse(1.0, int(c)) for c in grid], "k:", linewidth=1,
                label="theory of $H_{ww}$, squared error")  # fmt: skip
    axes.set(
        xlabel="number of classes $C$",
        ylabel=r"mean $\Vert H_{ij}\Vert_F^2$ / mean $\Vert H_{ii}\Vert_F^2$",
    )
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    print(f"\nFigure: {path}")


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("block_structure_output"))
    parser.add_argument("--width", type=int, default=1000, help="d, inputs of the linear model")
    parser.add_argument("--seeds", type=int, default=6, help="networks with a hidden layer")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    print(f"Linear model, cross-entropy, d = {args.width}: C^2 times the ratio of squared norms")
    print("gamma   " + "".join(f"C = {c:<18}" for c in CLASSES) + "limit   slope")
    for gamma in (0.5, 1.0, 2.0):
        linear = np.array([linear_ratio(c, gamma, args.width) for c in CLASSES])
        cells = [
            f"{c * c * ratio:.3f} (theory {c * c * theory.class_ratio(gamma, c):.3f})"
            for c, ratio in zip(CLASSES, linear, strict=True)
        ]
        limit = theory.class_ratio_limit(gamma)
        print(f"{gamma:<8}" + "".join(f"{cell:<22}" for cell in cells)
              + f"{limit:.3f}   {slope(linear):.3f}")  # fmt: skip

    print("\nOne hidden layer, m = 8, d = N = 100: ratio of expected squared norms")
    ce = np.array([hidden_ratios(c, cross_entropy, args.seeds) for c in CLASSES])
    mse = np.array([hidden_ratios(c, squared_error, args.seeds) for c in CLASSES])[:, 0]
    curves = {
        "linear, cross-entropy": linear,
        "$H_{ww}$, cross-entropy": ce[:, 0],
        "$H_{ww}$, squared error": mse,
        "$H_{vv}$, cross-entropy": ce[:, 1],
    }
    rates = dict(zip(list(curves)[1:], (-1, -1, -2), strict=True))
    print(f"{'':<26}" + "".join(f"C = {c:<9}" for c in CLASSES) + "slope   from 100 on   rate")
    for name, rate in rates.items():
        values = curves[name]
        print(f"{name:<26}" + "".join(f"{v:<13.3g}" for v in values)
              + f"{slope(values):<8.2f}{slope(values, 1):<14.2f}{rate}")  # fmt: skip
    draw(curves, 2.0, args.out / "number_of_classes.png")


if __name__ == "__main__":
    main()
