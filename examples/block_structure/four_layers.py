"""A network of four layers, in HBS's setting: what are the blocks, and which of them are linked?

"Hessian of a 4-layer relu NN, input dim = # classes = width = 50, CE loss + Adam, Gaussian data +
random label, sample size = 500." HBS prints a figure and the advice to "just check the links in the
computational graph", no number. Learning rate and steps are ours, as in `hbs_size.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gaussian import cross_entropy, gaussian_batch, log_steps, relu_network, trained
from records import Outcome, as_table

from lightning_hessian import BlockStructure, block_structure
from lightning_hessian.results import FloatArray
from lightning_hessian.tracking.block_figures import entries_image


@dataclass(frozen=True)
class Settings:
    """What HBS prints; and of training what it does not print."""

    layers: int = 4
    width: int = 50  # inputs, neurons of each layer, and classes
    samples: int = 500
    steps: int = 2000  # of Adam, all samples at once: ours
    learning_rate: float = 0.01  # ours
    measured: int = 6
    seed: int = 0


def measure(settings: Settings, data_dir: Path | None = None) -> Outcome:
    """Measure all blocks along training, and H itself at its two ends."""
    width = settings.width
    batch = gaussian_batch(settings.samples, width, width, settings.seed)
    net = relu_network((width,) * (settings.layers + 1), settings.seed)
    optimizer = torch.optim.Adam(net.parameters(), settings.learning_rate)
    stops = log_steps(settings.steps, settings.measured)
    rows: list[dict[str, Any]] = []
    shares, linked, figures = {}, {}, {}
    for step in trained(net, cross_entropy, batch, optimizer, stops):
        at_end = step in (stops[0], stops[-1])
        found = block_structure(
            net, cross_entropy, [batch], blocks="neuron", return_matrix=at_end, exact=at_end or None
        )
        groups = list(dict.fromkeys(found.groups))
        rows.append(
            {
                "step": step,
                "loss": found.loss,
                "norm": float(np.linalg.norm(found.frobenius)),
                "share_off": found.off_diagonal_share,
                "share_between_layers": share_between(found),
                **{f"ratio_{i}": found.group_ratio(group) for i, group in enumerate(groups, 1)},
            }
        )
        if at_end:
            when = "init" if step == 0 else "trained"
            shares[when] = dict(zip(pair_names(len(groups)), found.families.values(), strict=True))
            linked[when] = shares_in_links(found, len(groups), width)
            title = f"|H|, {'at initialisation' if step == 0 else f'after {step} steps'}"
            figures[f"_{when}"] = entries_image(found, title=title)
    numbers = {"along_training": rows, "families": shares, "links": linked}
    lines = [*as_table(rows)]
    for title, table in (("shares", shares), ("in links", linked)):
        lines += ["", *as_table([{title: when, **values} for when, values in table.items()])]
    return Outcome(numbers, figures, lines)


def pair_names(layers: int) -> list[str]:
    """Return the names of the families, in the order of `BlockStructure.families`."""
    return [f"{a}{b}" for a in range(1, layers + 1) for b in range(a, layers + 1)]


def share_between(found: BlockStructure) -> float:
    """Return the share of the squared norm of H in blocks of two layers."""
    return sum(share for (a, b), share in found.families.items() if a != b)


def shares_in_links(found: BlockStructure, layers: int, width: int) -> dict[str, float]:
    """Return, for each two layers one above the other, the share of their H in linked entries.

    The row i of a layer is linked with the column i of the next: they are multiplied with each
    other. Without preference a share of 1 / width would lie there.
    """
    assert found.matrix is not None
    size = width * width
    parts: FloatArray = np.square(found.matrix).reshape(layers, size, layers, size)
    shares = {}
    for a, b in pairwise(range(layers)):
        between = parts[a, :, b].reshape(width, width, width, width)  # row, column, row, column
        shares[f"{a + 1}{b + 1}"] = float(np.einsum("iaji->", between) / between.sum())
    return shares
