"""Block maps over the number of classes, at random weights: a linear model, and a hidden layer.

HBS draws the blocks of "1-hidden-layer NN with 8 hidden neurons + #class C at random init. The
block-diag structure becomes clearer as C increases", and says that for two classes and a linear
model no structure is seen. Its d and N are not printed there: those below are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gaussian import cross_entropy, gaussian_batch, relu_network
from records import Outcome, as_table

from lightning_hessian import BlockStructure, block_structure
from lightning_hessian.statistics import theory
from lightning_hessian.tracking.block_figures import draw_blocks
from lightning_hessian.tracking.style import new_figure


@dataclass(frozen=True)
class Settings:
    """Of each pair of networks."""

    classes: tuple[int, ...] = (2, 10, 50, 200)
    inputs: int = 100
    samples: int = 1000
    neurons: int = 8
    seed: int = 0


def measure(settings: Settings, data_dir: Path | None = None) -> Outcome:
    """Measure and draw the blocks of both networks for each number of classes."""
    rows: list[dict[str, Any]] = []
    count = len(settings.classes)
    figure, axes = new_figure(3.1 * count, 5.6, nrows=2, ncols=count, squeeze=False)
    gamma = settings.inputs / settings.samples
    for place, classes in enumerate(settings.classes):
        batch = gaussian_batch(settings.samples, settings.inputs, classes, settings.seed)
        maps = []
        for hidden in ((), (settings.neurons,)):
            net = relu_network((settings.inputs, *hidden, classes), settings.seed)
            maps.append(block_structure(net, cross_entropy, [batch], blocks="neuron"))
        linear, hidden_layer = maps
        rows.append(
            {
                "C": classes,
                "linear": root_mean_square_ratio(linear, linear.groups[0]),
                "linear_theory": float(np.sqrt(theory.class_ratio(gamma, classes))),
                "one_over_C_minus_1": 1 / (classes - 1),
                "hidden_vv": root_mean_square_ratio(hidden_layer, hidden_layer.groups[-1]),
                "hidden_vv_of_means": hidden_layer.group_ratio(hidden_layer.groups[-1]),
                "hidden_ww": root_mean_square_ratio(hidden_layer, hidden_layer.groups[0]),
                "hidden_ww_theory_mse": float(np.sqrt(theory.hidden_ratio_mse(gamma, classes))),
                "products": linear.num_hvps + hidden_layer.num_hvps,
            }
        )
        for row, found in enumerate(maps):
            model = ("linear", f"{settings.neurons} neurons")[row]
            draw_blocks(axes[row, place], found, title=f"{model}, C = {classes}")
    return Outcome({"ratios": rows}, {"": figure}, as_table(rows))


def root_mean_square_ratio(blocks: BlockStructure, group: str) -> float:
    """Return the root of the mean squared norm off the diagonal over that on it, in one group.

    The theorems of HBS are about ratios of squared norms; this is the root of such a ratio.
    """
    member = np.array(blocks.groups) == group
    squared = np.square(blocks.frobenius[np.ix_(member, member)])
    off = ~np.eye(len(squared), dtype=bool)
    return float(np.sqrt(squared[off].mean() / np.diagonal(squared).mean()))
