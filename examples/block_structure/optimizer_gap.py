"""The gap between SGD and Adam beside the heterogeneity that is said to explain it.

HBS, implication I: the spectra of a Transformer's blocks differ, those of a CNN's do not, and
"SGD ≈ Adam" on the second, "SGD « Adam" on the first. Here the small CNN and Transformer of
`cnn_against_transformer.py`, and the CNN made heterogeneous: its layers have their weights divided
by s and 1 / s in turn, and their outputs multiplied by the same. At initialisation the network
computes what it did, and its blocks are multiplied by s^2 and 1 / s^2: nothing but the
heterogeneity has changed. All settings are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cnn_against_transformer import VisionTransformer, convolutional, cross_entropy
from images import load_images
from rates import OPTIMIZERS, best, half_decades
from records import Outcome, as_table
from torch import Tensor, nn

from lightning_hessian import block_structure
from lightning_hessian.tracking.style import COLOURS, MARKERS, new_figure, quiet_grid


@dataclass(frozen=True)
class Settings:
    """The same images, epochs and batches for every network and both optimizers."""

    images: int = 1500
    probes: int = 128  # images that the Hessian is measured on
    epochs: int = 10
    batch_size: int = 64
    spreads: tuple[float, ...] = (1, 2, 4, 8)  # s of the CNNs
    sgd_rates: tuple[float, ...] = half_decades(-3.5, 0.5)
    adam_rates: tuple[float, ...] = half_decades(-4, -1)
    seeds: int = 3
    seed: int = 0  # the first of them


class Rescaled(nn.Module):
    """A layer that is linear in its parameters, which are divided by a scale; its outputs stay."""

    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter /= scale

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer returned before."""
        return self.scale * self.layer(x)


def rescaled_cnn(spread: float) -> nn.Module:
    """Return the CNN with its layers rescaled by the spread and its inverse in turn."""
    layers: list[nn.Module] = []
    count = 0
    for layer in convolutional():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layers.append(Rescaled(layer, spread if count % 2 == 0 else 1 / spread))
            count += 1
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def networks(settings: Settings) -> dict[str, Callable[[], nn.Module]]:
    """Return what makes each network, by name."""
    made: dict[str, Callable[[], nn.Module]] = {}
    for spread in settings.spreads:
        made["CNN" if spread == 1 else f"CNN, s = {spread:g}"] = (
            lambda spread=spread: rescaled_cnn(spread)  # type: ignore[misc]
        )
    return made | {"Transformer": VisionTransformer}


def measure(settings: Settings, data_dir: Path | None = None) -> Outcome:
    """Measure the heterogeneity at initialisation, and train with every learning rate."""
    images, labels, name = load_images(data_dir, settings.images)
    probe = [(images[: settings.probes], labels[: settings.probes])]
    rates = {"SGD": settings.sgd_rates, "Adam": settings.adam_rates}
    seeds = range(settings.seed, settings.seed + settings.seeds)
    rows, curves = [], {}
    for title, make in networks(settings).items():
        distances = []
        for seed in seeds:
            torch.manual_seed(seed)
            found = block_structure(make(), cross_entropy, probe, blocks="layer", densities=True)
            distances.append(found.mean_heterogeneity)
        losses = {
            optimizer: {
                rate: [final_loss(make, optimizer, rate, seed, images, labels, settings)
                       for seed in seeds]
                for rate in rates[optimizer]
            }
            for optimizer in rates
        }  # fmt: skip
        curves[title] = losses
        means = {o: {r: float(np.mean(v)) for r, v in by.items()} for o, by in losses.items()}
        chosen = {optimizer: best(values) for optimizer, values in means.items()}
        gaps = [
            losses["SGD"][chosen["SGD"].rate][i] - losses["Adam"][chosen["Adam"].rate][i]
            for i in range(len(seeds))
        ]
        rows.append(
            {
                "network": title,
                "heterogeneity": float(np.mean(distances)),
                "of_seeds": distances,
                **{o: asdict(one) for o, one in chosen.items()},
                "gap": float(np.mean(gaps)),
                "gap_of_seeds": gaps,
            }
        )
    numbers = {"data": name, "networks": rows, "losses": curves}
    return Outcome(numbers, {"": draw(rows, curves)}, as_table([in_a_line(row) for row in rows]))


def final_loss(
    make: Callable[[], nn.Module],
    optimizer: str,
    rate: float,
    seed: int,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
) -> float:
    """Train from the initialisation of a seed; return the mean loss on all images at the end."""
    torch.manual_seed(seed)
    net = make()
    stepping = OPTIMIZERS[optimizer](net.parameters(), rate)
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(images)).split(settings.batch_size):
            stepping.zero_grad()
            loss = cross_entropy(net, (images[batch], labels[batch]))
            if not bool(loss.isfinite()):
                return float("inf")
            loss.backward()
            stepping.step()
    with torch.no_grad():
        return float(cross_entropy(net, (images, labels)))


def in_a_line(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of a network."""
    shown = {"network": row["network"], "heterogeneity": row["heterogeneity"]}
    for optimizer in OPTIMIZERS:
        one = row[optimizer]
        shown |= {optimizer: one["loss"], "at rate": f"{one['rate']:g}{'!' * one['at_the_edge']}"}
        shown[f"{optimizer} rate"] = shown.pop("at rate")
    return shown | {"gap": row["gap"]}


def draw(rows: list[dict[str, Any]], curves: dict[str, dict[str, dict[float, Any]]]) -> Any:
    """Draw the gap over the heterogeneity, and each loss over the learning rate."""
    figure, (left, right) = new_figure(9.6, 4.0, ncols=2)
    for i, row in enumerate(rows):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        low, high = np.min(row["gap_of_seeds"]), np.max(row["gap_of_seeds"])
        left.plot([row["heterogeneity"]] * 2, [low, high], color=colour, linewidth=1)
        left.plot(row["heterogeneity"], row["gap"], marker, color=colour, label=row["network"])
        for optimizer, line in (("SGD", "-"), ("Adam", "--")):
            by_rate = curves[row["network"]][optimizer]
            right.loglog(list(by_rate), [np.mean(v) for v in by_rate.values()], line,
                         marker=marker, markersize=3, color=colour)  # fmt: skip
    left.axhline(0, color="black", linewidth=0.6)
    left.set(xlabel="mean Jensen-Shannon distance of the layers' spectra",
             ylabel="loss of SGD - loss of Adam")  # fmt: skip
    left.legend(frameon=False, fontsize="small")
    right.set(xlabel="learning rate (SGD solid, Adam dashed)", ylabel="loss after training",
              ylim=(None, 3))  # fmt: skip
    quiet_grid(left)
    quiet_grid(right)
    return figure
