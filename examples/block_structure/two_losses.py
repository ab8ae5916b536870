"""Softmax with cross-entropy against the squared error, on the same inputs and labels.

HBS, cases 1 and 3 against 2 and 4: with the squared error H_vv is block-diagonal whatever the
number of classes, with blocks all alike; with cross-entropy it becomes so with many classes.
Three data sets: random labels (HBS's, smaller), images, and the imbalanced labels of
`rare_classes.py`. The settings are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rare_classes
import torch
from gaussian import (
    Batch,
    cross_entropy,
    gaussian_batch,
    log_steps,
    relu_network,
    squared_error,
    trained,
)
from images import load_images
from rates import OPTIMIZERS
from records import Outcome, as_table

from lightning_hessian import block_structure
from lightning_hessian.tracking.style import COLOURS, new_figure, quiet_grid

LOSSES = {"cross-entropy": cross_entropy, "squared error": squared_error}


@dataclass(frozen=True)
class Settings:
    """Of the network with a hidden layer; the linear one is as in `rare_classes.py`."""

    inputs: int = 100
    classes: int = 100
    samples: int = 1000  # Gaussian, and of the images
    neurons: int = 8
    steps: int = 2000  # of Adam, all samples at once
    learning_rate: float = 0.01
    measured: int = 6
    imbalanced: rare_classes.Settings = field(default_factory=rare_classes.Settings)
    seed: int = 0


def measure(settings: Settings, data_dir: Path | None = None) -> Outcome:
    """Train with both losses on each data set, and measure the blocks."""
    images, labels, name = load_images(data_dir, settings.samples)
    sets = {
        "Gaussian, random labels": gaussian_batch(
            settings.samples, settings.inputs, settings.classes, settings.seed
        ),
        name: (images.flatten(1), labels),
    }
    rows = [
        {"data": data, "loss": loss, **row}
        for data, batch in sets.items()
        for loss in LOSSES
        for row in along_training(settings, batch, loss)
    ]
    linear = [
        {"labels": kind, "loss": loss, **row}
        for kind in ("balanced", "1 / k")
        for loss in LOSSES
        for row in linear_models(settings.imbalanced, loss, balanced=kind == "balanced")
    ]
    lines = [*as_table(rows), "", *as_table([in_a_line(row) for row in linear])]
    return Outcome({"hidden_layer": rows, "linear": linear}, {"": draw(rows)}, lines)


def along_training(settings: Settings, batch: Batch, loss: str) -> list[dict[str, Any]]:
    """Return shares, ratios and heterogeneity of a network with a hidden layer, step by step."""
    classes = int(batch[1].max()) + 1
    net = relu_network((batch[0].shape[1], settings.neurons, classes), settings.seed)
    optimizer = torch.optim.Adam(net.parameters(), settings.learning_rate)
    rows = []
    for step in trained(net, LOSSES[loss], batch, optimizer,
                        log_steps(settings.steps, settings.measured)):  # fmt: skip
        found = block_structure(net, LOSSES[loss], [batch], blocks="neuron", hvp="autograd")
        by_class = rare_classes.blocks_of_classes(net, LOSSES[loss], batch)
        # No shares where H is zero: with the squared error, once no neuron is active.
        shares = list(found.families.values()) or [None] * 3
        rows.append(
            {
                "step": step,
                "value": found.loss,
                **dict(zip(("share_ww", "share_wv", "share_vv"), shares, strict=True)),
                "ratio_ww": found.group_ratio(found.groups[0]),
                "ratio_vv": found.group_ratio(found.groups[-1]),
                "class_heterogeneity": by_class.mean_heterogeneity,
            }
        )
    return rows


def linear_models(
    settings: rare_classes.Settings, loss: str, *, balanced: bool
) -> list[dict[str, Any]]:
    """Return both optimizers at their best, and how the blocks of classes differ, for each budget.

    The blocks are those that Adam has reached with its best rate.
    """
    counts = rare_classes.class_counts(settings, balanced=balanced)
    batch = rare_classes.class_batch(settings, counts)
    rows = rare_classes.gap(settings, batch, LOSSES[loss])
    for row in rows:
        net = rare_classes.linear(settings)
        optimizer = OPTIMIZERS["Adam"](net.parameters(), row["Adam"]["rate"])
        next(trained(net, LOSSES[loss], batch, optimizer, [row["steps"]]))
        blocks = rare_classes.blocks_of_classes(net, LOSSES[loss], batch)
        trace, _ = rare_classes.trace_and_largest(blocks)
        row |= {
            "heterogeneity": blocks.mean_heterogeneity,
            "off_diagonal_ratio": blocks.off_diagonal_ratio,
            "slope_of_trace": rare_classes.slope(counts, trace),
        }
    return rows


def in_a_line(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of a linear model."""
    shown = rare_classes.in_a_line(row)
    named = {key: row[key] for key in ("labels", "loss", "heterogeneity", "off_diagonal_ratio")}
    return named | {key: value for key, value in shown.items() if key != "labels"}


def draw(rows: list[dict[str, Any]]) -> Any:
    """Draw the share of H_wv and the ratio within H_ww over the steps, for each loss and set."""
    figure, panels = new_figure(9.6, 3.8, ncols=2)
    for i, data in enumerate(dict.fromkeys(row["data"] for row in rows)):
        for loss, line in zip(LOSSES, ("-", "--"), strict=True):
            chosen = [row for row in rows if (row["data"], row["loss"]) == (data, loss)]
            steps = [row["step"] for row in chosen]
            for axes, key in zip(panels, ("share_wv", "ratio_ww"), strict=True):
                axes.plot(steps, [row[key] for row in chosen], line, marker="o", markersize=3,
                          color=COLOURS[i], label=f"{data}, {loss}")  # fmt: skip
    for axes, label in zip(panels, ("share of $H_{wv}$", "ratio within $H_{ww}$"), strict=True):
        axes.set_xscale("symlog", linthresh=1)
        axes.set(xlabel="step", ylabel=label, ylim=(0, None))
        quiet_grid(axes)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False,
                  fontsize="small")  # fmt: skip
    return figure
