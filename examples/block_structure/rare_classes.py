"""Rare classes: spectra of the diagonal blocks of the last layer by how frequent their class is.

HBS, implication I, after Kunstner et al. (NeurIPS 2024): with balanced labels the "blockwise
spectrum of lm_head is observed to be similar" and "SGD ≈ Adam", with imbalanced ones
"heterogeneous" and "SGD « Adam". Here a linear model with cross-entropy (HBS case 2) learns
Gaussian classes, balanced or with frequencies 1 / k. HBS gives no setting; this one is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gaussian import Batch, cross_entropy, relu_network, trained
from numpy.typing import NDArray
from rates import OPTIMIZERS, best, half_decades
from records import Outcome, as_table
from torch import Tensor, nn

from lightning_hessian import BlockStructure, block_structure
from lightning_hessian.results import FloatArray
from lightning_hessian.tracking.style import COLOURS, MARKERS, new_figure, quiet_grid

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Settings:
    """Of the data, and of training on all of them at once."""

    classes: int = 64
    inputs: int = 32
    samples: int = 4096
    spread: float = 0.5  # standard deviation of the classes' means in each input; noise has 1
    budgets: tuple[int, ...] = (10, 30, 100, 500)  # steps that both optimizers may take
    early: int = 10  # steps after which blocks are measured too
    sgd_rates: tuple[float, ...] = half_decades(-2, 2)
    adam_rates: tuple[float, ...] = half_decades(-3.5, -0.5)
    groups: int = 8  # of classes of neighbouring frequency, whose losses are told apart
    seed: int = 0


def measure(settings: Settings, data_dir: Path | None = None) -> Outcome:
    """Train on balanced and on imbalanced labels; measure blocks at the start, early, at last."""
    gaps: list[dict[str, Any]] = []
    rows, traces = [], {}
    for labels in ("balanced", "1 / k"):
        counts = class_counts(settings, balanced=labels == "balanced")
        batch = class_batch(settings, counts)
        chosen = gap(settings, batch, cross_entropy)
        gaps += [{"labels": labels, **one} for one in chosen]
        rates = {name: chosen[-1][name]["rate"] for name in OPTIMIZERS}
        for when, found in blocks_along(settings, batch, rates).items():
            trace, largest = trace_and_largest(found)
            rows.append(
                {
                    "labels": labels,
                    "when": when,
                    "loss": found.loss,
                    "heterogeneity": found.mean_heterogeneity,
                    "trace_max_over_min": float(trace.max() / trace.min()),
                    "slope_of_trace": slope(counts, trace),
                    "slope_of_largest": slope(counts, largest),
                }
            )
            traces[f"{labels}, {when}"] = {"counts": counts, "trace": trace, "largest": largest}
    lines = [*as_table(rows), "", *as_table([in_a_line(one) for one in gaps])]
    numbers = {"gaps": gaps, "blocks": rows, "by_class": traces}
    return Outcome(numbers, {"": draw(gaps, traces)}, lines)


def class_counts(settings: Settings, *, balanced: bool) -> NDArray[np.int64]:
    """Return how many samples each class has, the most frequent first, [C]."""
    ranks = np.arange(1, settings.classes + 1)
    shares = np.ones(settings.classes) if balanced else 1.0 / ranks
    ends = np.round(settings.samples * np.cumsum(shares) / shares.sum()).astype(np.int64)
    return np.diff(ends, prepend=0)


def class_batch(settings: Settings, counts: NDArray[np.int64]) -> Batch:
    """Return Gaussian inputs around a random mean for each class, and the classes."""
    generator = torch.Generator().manual_seed(settings.seed)
    means = torch.randn(settings.classes, settings.inputs, generator=generator)
    labels = torch.arange(settings.classes).repeat_interleave(torch.tensor(counts))
    noise = torch.randn(len(labels), settings.inputs, generator=generator)
    return settings.spread * means[labels] + noise, labels


def gap(settings: Settings, batch: Batch, loss_fn: Loss) -> list[dict[str, Any]]:
    """Return SGD and Adam at the best rate of each, for each number of steps allowed to both.

    One number of steps would tell too little: in the end both may have found the same minimum.
    """
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for name, rates in (("SGD", settings.sgd_rates), ("Adam", settings.adam_rates)):
        found[name] = {rate: [] for rate in rates}
        for rate, along in found[name].items():
            net = linear(settings)
            optimizer = OPTIMIZERS[name](net.parameters(), rate)
            for _ in trained(net, loss_fn, batch, optimizer, list(settings.budgets)):
                along.append(by_group(settings, net, batch, loss_fn))
    rows = []
    for i, steps in enumerate(settings.budgets):
        row: dict[str, Any] = {"steps": steps}
        for name, by_rate in found.items():
            one = best({rate: along[i]["loss"] for rate, along in by_rate.items()})
            row[name] = {**asdict(one), **by_rate[one.rate][i]}
            row[f"{name}_by_rate"] = {rate: along[i]["loss"] for rate, along in by_rate.items()}
        rows.append(row)
    return rows


def linear(settings: Settings) -> nn.Sequential:
    """Return the linear model with its first weights."""
    return relu_network((settings.inputs, settings.classes), settings.seed)


def by_group(settings: Settings, net: nn.Module, batch: Batch, loss_fn: Loss) -> dict[str, Any]:
    """Return loss and accuracy, and the loss of groups of classes, from frequent to rare."""
    inputs, labels = batch
    group = labels * settings.groups // settings.classes
    losses, accuracies = [], []
    with torch.no_grad():
        loss = float(loss_fn(net, batch))
        right = net(inputs).argmax(1) == labels
        for number in range(settings.groups):
            inside = group == number
            losses.append(float(loss_fn(net, (inputs[inside], labels[inside]))))
        for number in range(settings.classes):
            accuracies.append(float(right[labels == number].float().mean()))
    return {
        "loss": loss,
        "loss_of_groups": losses,
        "accuracy": float(right.float().mean()),
        "accuracy_of_classes": float(np.mean(accuracies)),
    }


def blocks_along(
    settings: Settings, batch: Batch, rates: dict[str, float]
) -> dict[str, BlockStructure]:
    """Return the blocks of the classes at the start, and early and at last with each optimizer."""
    found = {}
    for name, rate in rates.items():
        net = linear(settings)
        optimizer = OPTIMIZERS[name](net.parameters(), rate)
        for step in trained(
            net, cross_entropy, batch, optimizer, [0, settings.early, settings.budgets[-1]]
        ):
            when = f"{name}, step {step}" if step else "at initialisation"
            if when not in found:
                found[when] = blocks_of_classes(net, cross_entropy, batch)
    return found


def blocks_of_classes(net: nn.Module, loss_fn: Loss, batch: Batch) -> BlockStructure:
    """Return all blocks of the last layer, exactly, with all eigenvalues of the diagonal ones."""
    return block_structure(
        net, loss_fn, [batch], blocks="class", densities=True, exact=True, hvp="autograd"
    )


def trace_and_largest(blocks: BlockStructure) -> tuple[FloatArray, FloatArray]:
    """Return the trace and the largest eigenvalue of each diagonal block, [C] each."""
    assert blocks.densities is not None
    trace = np.array([density.size * density.moment(1) for density in blocks.densities])
    return trace, np.array([density.nodes.max() for density in blocks.densities])


def slope(counts: NDArray[np.int64], values: FloatArray) -> float | None:
    """Return the power of the frequency that fits the values; None where all are alike."""
    if counts.min() == counts.max():
        return None
    return float(np.polyfit(np.log(counts), np.log(values), 1)[0])


def in_a_line(one: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of a pair of optimizers."""
    shown: dict[str, Any] = {"labels": one["labels"], "steps": one["steps"]}
    for name in OPTIMIZERS:
        found = one[name]
        shown |= {
            name: found["loss"],
            f"{name} rate": f"{found['rate']:g}{'!' * found['at_the_edge']}",
            f"{name} frequent": found["loss_of_groups"][0],
            f"{name} rare": found["loss_of_groups"][-1],
            f"{name} acc. of classes": found["accuracy_of_classes"],
        }
    return shown


def draw(gaps: list[dict[str, Any]], traces: dict[str, dict[str, Any]]) -> Any:
    """Draw the trace of each block over the frequency, and the losses over the steps."""
    figure, (left, right) = new_figure(9.6, 4.0, ncols=2)
    imbalanced = {name: one for name, one in traces.items() if name.startswith("1 / k")}
    for i, (name, one) in enumerate(imbalanced.items()):
        label = name.removeprefix("1 / k, ")
        left.loglog(one["counts"], one["trace"], MARKERS[i], color=COLOURS[i], markersize=3,
                    label=label)  # fmt: skip
    left.set(xlabel="samples of the class", ylabel="trace of its diagonal block")
    left.legend(frameon=False, fontsize="small")
    for i, labels in enumerate(("balanced", "1 / k")):
        chosen = [one for one in gaps if one["labels"] == labels]
        for name, line in (("SGD", "-"), ("Adam", "--")):
            steps, losses = zip(*((one["steps"], one[name]["loss"]) for one in chosen), strict=True)
            right.plot(steps, losses, line, color=COLOURS[i], marker=MARKERS[i],
                       label=f"{labels}: {name}")  # fmt: skip
    right.set(xscale="log", xlabel="steps", ylabel="loss at the best learning rate")
    right.legend(frameon=False, fontsize="small")
    quiet_grid(left)
    quiet_grid(right)
    return figure
