"""HBS's own setting: d = C = 500, N = 5000, 8 neurons, Adam, Gaussian inputs, random labels.

HBS says of it: (i) block-circulant-block-diagonal at initialization, (ii) the block-circulant part
vanishes along training, (iii) the near-block-diagonal pattern maintains; "Total # blocks = # neuron
+ # class = 8 + 500 = 508". It says neither the learning rate nor the number of steps: those below
are ours, chosen before the run (they are those of `vanishing_links.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gaussian import Batch, cross_entropy, gaussian_batch, log_steps, relu_network, trained
from records import Outcome, as_table
from torch import nn

from lightning_hessian import BlockStructure, block_structure
from lightning_hessian.results import FloatArray
from lightning_hessian.statistics import theory
from lightning_hessian.tracking.block_figures import entries_image


@dataclass(frozen=True)
class Settings:
    """What HBS prints; and of training what it does not print."""

    samples: int = 5000
    inputs: int = 500
    classes: int = 500
    neurons: int = 8
    steps: int = 2000  # of Adam, all samples at once: ours
    learning_rate: float = 0.01  # ours
    measured: int = 6  # times in training, beside the beginning
    seed: int = 0


def measure(settings: Settings, data_dir: Path | None = None) -> Outcome:
    """Measure families and links along training, and every block at its two ends."""
    batch = gaussian_batch(settings.samples, settings.inputs, settings.classes, settings.seed)
    widths = (settings.inputs, settings.neurons, settings.classes)
    net = relu_network(widths, settings.seed)
    optimizer = torch.optim.Adam(net.parameters(), settings.learning_rate)
    stops = log_steps(settings.steps, settings.measured)
    rows, ends, figures = [], {}, {}
    for step in trained(net, cross_entropy, batch, optimizer, stops):
        found = block_structure(
            net, cross_entropy, [batch], blocks=links(settings.neurons), hvp="autograd"
        )
        row = {"step": step, **families(found, settings.neurons)}
        rows.append({**row, "norm_of_errors": norm_of_errors(net, batch)})
        if step in (stops[0], stops[-1]):
            when = "at initialisation" if step == 0 else f"after {step} steps"
            ends[when], figure = every_block(net, batch, f"|H| {when}")
            figures["_init" if step == 0 else "_trained"] = figure
    numbers = {"along_training": rows, "every_block": ends}
    lines = [*as_table(rows), "", *as_table([{"": when, **end} for when, end in ends.items()])]
    return Outcome(numbers, figures, lines)


def links(neurons: int) -> dict[str, str]:
    """Return blocks of what a neuron is made of: its row of W, and its column of V.

    HBS: of H between w_i and v_j "only the i-th column is non-zero (if ignoring the O(1/C) noise)".
    """
    rows = {f"row {i} of W": f"0.weight[{i}:{i + 1}]" for i in range(neurons)}
    return rows | {f"column {i} of V": f"2.weight[:, {i}:{i + 1}]" for i in range(neurons)}


def families(found: BlockStructure, neurons: int) -> dict[str, float]:
    """Return norms and shares of H_ww, H_wv and H_vv, and the share of H_wv in linked columns."""
    squared = np.square(found.frobenius)
    between = squared[:neurons, neurons:]
    parts = {
        "ww": squared[:neurons, :neurons].sum(),
        "wv": 2 * between.sum(),
        "vv": squared[neurons:, neurons:].sum(),
    }
    return {
        "loss": found.loss,
        **{f"norm_{name}": float(np.sqrt(part)) for name, part in parts.items()},
        **{f"share_{name}": float(part / sum(parts.values())) for name, part in parts.items()},
        "wv_in_links": float(np.trace(between) / between.sum()),
    }


def norm_of_errors(net: nn.Sequential, batch: Batch) -> float:
    """Return the norm of the first of the two terms of H_wv in HBS's formula.

    a_i = -mean of (delta_yc - p_c) 1(w_i x > 0) x, which stands in the i-th column alone, and of
    which HBS says that it is O(optimality gap). Both triangles are counted, as in `families`.
    """
    inputs, labels = batch
    with torch.no_grad():
        errors = net(inputs).softmax(1) - nn.functional.one_hot(labels, net[2].out_features)
        active = (net[0](inputs) > 0).float()
        squares = [
            ((inputs * gate[:, None]).T @ errors / len(inputs)).square().sum() for gate in active.T
        ]
    return float((2 * torch.stack(squares).sum()).sqrt())


def every_block(net: nn.Sequential, batch: Batch, title: str) -> tuple[dict[str, Any], Any]:
    """Measure all blocks by probes, and compute them by HBS's formulas; return both, and |H|."""
    found = block_structure(net, cross_entropy, [batch], blocks="neuron", hvp="autograd")
    weights = [layer.weight.detach().double().numpy() for layer in (net[0], net[2])]
    exact = theory.hidden_cross_entropy_hessian(batch[0].double().numpy(), batch[1], *weights)
    expected = replace(found, frobenius=block_norms(exact, found.sizes), matrix=exact)
    numbers = {
        "blocks": len(found.names),
        "products": found.num_hvps,
        **{
            name: structure.group_ratio(group)
            for name, structure, group in (
                ("ratio_ww", found, found.groups[0]),
                ("ratio_ww_formula", expected, found.groups[0]),
                ("ratio_vv", found, found.groups[-1]),
                ("ratio_vv_formula", expected, found.groups[-1]),
            )
        },
        "one_over_C_minus_1": 1 / (len(weights[1]) - 1),
        **{
            f"share_{name}_formula": share
            for name, share in zip(("ww", "wv", "vv"), expected.families.values(), strict=True)
        },
        "norm_formula": float(np.linalg.norm(expected.frobenius)),
        "diagonal_error": relative_error(
            np.diagonal(found.frobenius), np.diagonal(expected.frobenius)
        ),
    }
    return numbers, entries_image(expected, title=title)


def block_norms(matrix: FloatArray, sizes: tuple[int, ...]) -> FloatArray:
    """Return the Frobenius norms of the blocks of a matrix."""
    starts = np.cumsum([0, *sizes[:-1]])
    rows = np.add.reduceat(np.square(matrix), starts, axis=0)
    return np.sqrt(np.add.reduceat(rows, starts, axis=1))


def relative_error(found: FloatArray, expected: FloatArray) -> float:
    """Return the relative distance of two vectors."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
