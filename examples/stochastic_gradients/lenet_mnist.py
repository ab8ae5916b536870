"""SG's tables 1 and 2 for LeNet on MNIST: the paper's numbers beside those measured here.

SG is "On the Overlooked Structure of Stochastic Gradients" (Xie et al., NeurIPS 2023).

    python examples/stochastic_gradients/lenet_mnist.py --data-dir DATA

DATA holds ``MNIST/raw/*-ubyte.gz``, the four files as LeCun published them.
"""

from __future__ import annotations

import argparse
import gzip
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hessian import (
    GradientStructure,
    PowerLawFit,
    eigengaps,
    fit_power_law,
    gradient_structure,
    hessian_spectrum,
)
from lightning_hessian.results import FloatArray, HessianSpectrum
from lightning_hessian.statistics.subspace import num_outliers, overlaps, proportionality
from lightning_hessian.tracking.gradient_figures import ratio_plot, spectra_plot

NUM_CLASSES = 10
HESSIAN_SAMPLES = 2000

# SG table 1: mean d_ks, power-law rate, mean p, Gaussian rate.
TABLE_1 = {
    ("random", "dimension"): (0.0355, 0.766, 4.11e-4, 0.0018),
    ("random", "iteration"): (0.191, 0.000788, 0.321, 0.651),
    ("pretrain", "dimension"): (0.0401, 0.606, 5.77e-4, 0.0024),
    ("pretrain", "iteration"): (0.179, 0.00052, 0.306, 0.620),
}
# SG tables 6 (second moment) and 7 (covariance): d_ks, s. Table 2 repeats table 6 at B = 1.
TABLES_6_7 = {
    ("random", 1, "second moment"): (0.0220, 1.428),
    ("random", 1, "covariance"): (0.0226, 1.425),
    ("random", 100, "second moment"): (0.0228, 1.313),
    ("random", 100, "covariance"): (0.0230, 1.311),
    ("pretrain", 1, "second moment"): (0.0206, 1.302),
    ("pretrain", 1, "covariance"): (0.0206, 1.299),
    ("pretrain", 100, "second moment"): (0.0171, 1.390),
    ("pretrain", 100, "covariance"): (0.0171, 1.386),
}
# SG table 3, the covariance's eigengaps: d_ks, s.
TABLE_3 = {"random": (0.0221, 2.232), "pretrain": (0.0205, 5.111)}


def lenet() -> nn.Module:
    """Return LeNet-5 with ReLU and max pooling, 61,706 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return the images [N, 1, 28, 28], normalised, and labels of ``"train"`` or ``"t10k"``."""

    def read(name: str, offset: int) -> np.ndarray:
        with gzip.open(folder / "MNIST" / "raw" / f"{part}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)

    images = torch.tensor(read("images-idx3", 16)).view(-1, 1, 28, 28) / 255
    return (images - 0.1307) / 0.3081, torch.tensor(read("labels-idx1", 8)).long()


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, data: tuple[Tensor, Tensor], num_epochs: int) -> None:
    """Train by SGD as in SG appendix A.3, with two drops of the learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=5e-4)
    drops = [int(0.4 * num_epochs), int(0.8 * num_epochs)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1)
    for _ in range(num_epochs):
        for chosen in torch.randperm(len(data[1])).split(128):
            optimizer.zero_grad()
            loss_fn(model, (data[0][chosen], data[1][chosen])).backward()
            optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of images classified rightly."""
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def print_tests(training: str, structure: GradientStructure) -> None:
    """Print two rows of SG's table 1."""
    for kind, tests in (
        ("dimension", structure.dimension_tests),
        ("iteration", structure.iteration_tests),
    ):
        if tests is None:
            continue
        found = (
            tests.mean_ks_distance,
            tests.power_law_rate,
            tests.mean_p_value,
            tests.gaussian_rate,
        )
        for source, row in (("here", found), ("SG", TABLE_1[training, kind])):
            print(
                f"{training:<9}{kind:<11}{source:<6}{row[0]:<10.4f}{tests.critical_value:<8.4f}"
                f"{row[1]:<12.3%}{row[2]:<11.2e}{row[3]:.2%}"
            )
        print(
            f"{'':20}(of {len(tests.p_values)} rows {tests.num_ks_tested} had {tests.num_values} "
            f"entries that are not zero, {tests.num_gaussian_tested} had points that vary)"
        )


def print_spectra(training: str, batch_size: int, structure: GradientStructure) -> None:
    """Print the rows of SG's tables 6 and 7, of which table 2 is a part, and of table 3."""
    for name, values in (
        ("second moment", structure.second_moment),
        ("covariance", structure.leading),
    ):
        _print_fit(f"{training:<9}B = {batch_size:<5}{name}", values,
                   TABLES_6_7.get((training, batch_size, name)))  # fmt: skip
    gaps = eigengaps(structure.leading)
    _print_row(f"{training:<9}B = {batch_size:<5}eigengaps of covariance", "here", gaps.fit)
    print(f"{'':44}slope of the gaps by original rank: {gaps.rank_slope:.3f}")
    if batch_size == 1:
        print(f"{'':44}{'SG':<6}{TABLE_3[training][0]:<9.4f}{'':17}{TABLE_3[training][1]:.3f}")
    print(
        f"{'':9}outliers: {num_outliers(structure.leading)} of the covariance, "
        f"{num_outliers(structure.second_moment)} of the second moment (c - 1 = "
        f"{NUM_CLASSES - 1}); Tr(C) = {structure.covariance_trace:.4g}, "
        f"{structure.seconds:.0f} s, engine {structure.engine}"
    )


def _print_fit(title: str, values: FloatArray, paper: tuple[float, float] | None) -> None:
    _print_row(title, "here", fit_power_law(values))
    if paper is not None:
        print(f"{'':44}{'SG':<6}{paper[0]:<9.4f}{0.043:<8.4f}{'yes':<9}{paper[1]:.3f}")


def _print_row(title: str, source: str, fit: PowerLawFit) -> None:
    verdict = {True: "yes", False: "no", None: "too few"}[fit.is_power_law]
    print(
        f"{title:<44}{source:<6}{fit.ks_distance:<9.4f}{fit.critical_value:<8.4f}{verdict:<9}"
        f"{fit.slope:.3f}"
    )


def print_against_hessian(structure: GradientStructure, hessian: HessianSpectrum) -> None:
    """Print how far C is a multiple of H (SG section 4), and how their top subspaces lie."""
    ratio = proportionality(structure.leading, hessian.leading)
    print(
        f"{'':9}C against H: ratio by rank {ratio.constant:.3g} (1/B = "
        f"{1 / structure.batch_size:.3g}), spread x {ratio.spread:.2f} over "
        f"{len(ratio.ratios)} ranks, from {ratio.ratios.min():.3g} to {ratio.ratios.max():.3g}"
    )
    shared = overlaps(structure.eigenvectors.numpy(), hessian.eigenvectors.numpy())
    k = NUM_CLASSES - 1
    print(
        f"{'':9}overlap of the top {k} eigenvectors of C and H: {shared[k - 1]:.3f} "
        f"(random: {k / structure.num_parameters:.1g})"
    )


def measure(
    training: str, model: nn.Module, data: tuple[Tensor, Tensor], options: argparse.Namespace
) -> None:
    """Measure one model and print its rows."""
    structure = gradient_structure(
        model, loss_fn, [data], num_gradients=options.num_gradients, batch_size=100,
        num_eigenvectors=NUM_CLASSES - 1,
    )  # fmt: skip
    print("\ntable 1                   d_ks      d_c     power-law   mean p     Gaussian")
    print_tests(training, structure)
    print("\ntables 2, 3, 6, 7" + " " * 33 + "d_ks     d_c     accepted s")
    print_spectra(training, 100, structure)
    if options.hessian:
        probe = (data[0][:HESSIAN_SAMPLES], data[1][:HESSIAN_SAMPLES])
        hessian = hessian_spectrum(
            model, loss_fn, [probe], num_eigenvalues=options.hessian, trace_probes=0,
            return_eigenvectors=True,
        )  # fmt: skip
        print_against_hessian(structure, hessian)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            spectra_plot(structure, hessian).savefig(options.out / f"spectra_{training}.png")
            ratio_plot(structure, hessian).savefig(options.out / f"ratio_{training}.png")
    del structure
    single = gradient_structure(
        model, loss_fn, [data], num_gradients=options.num_gradients, batch_size=1, tests=False
    )
    print_spectra(training, 1, single)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gib = kib / 2**20 if sys.platform != "darwin" else kib / 2**30
    print(f"{'':9}peak memory of the process so far: {gib:.2f} GiB")


def main() -> None:
    """Measure LeNet as it is initialised, and trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="holds MNIST/raw")
    parser.add_argument("--num-gradients", type=int, default=5000, help="T")
    parser.add_argument("--epochs", type=int, default=50, help="of the trained model")
    parser.add_argument("--hessian", type=int, default=0, help="eigenvalues of H beside those of C")
    parser.add_argument("--out", type=Path, help="folder for figures, with --hessian")
    options = parser.parse_args()
    data, test = mnist(options.data_dir, "train"), mnist(options.data_dir, "t10k")
    torch.manual_seed(0)
    model = lenet().eval()
    start = time.monotonic()
    print(f"random initialisation, test accuracy {accuracy(model, test):.4f}")
    measure("random", model, data, options)
    mark = time.monotonic()
    train(model, data, options.epochs)
    print(
        f"\ntrained {options.epochs} epochs in {time.monotonic() - mark:.0f} s, test accuracy "
        f"{accuracy(model, test):.4f}"
    )
    measure("pretrain", model, data, options)
    print(f"\n{time.monotonic() - start:.0f} s in all, {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    main()
