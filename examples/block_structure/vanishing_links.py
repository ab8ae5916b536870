"""The dynamic force: training makes H_wv vanish, the blocks between the two layers.

A network with one hidden layer of 8 neurons learns random labels of Gaussian inputs (the setting
of HBS, smaller), then real images. Prints the shares of the squared norm of H, and draws H.
Run: python examples/block_structure/vanishing_links.py --out docs/block_structure
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from images import load_images
from torch import Tensor, nn

from lightning_hessian import BlockStructure, block_structure
from lightning_hessian.tracking.block_figures import block_heatmap, entries_image

WIDTH, CLASSES, SAMPLES = 8, 100, 1000


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def train_and_measure(
    inputs: Tensor, labels: Tensor, steps: int, *, with_matrix: bool
) -> list[BlockStructure]:
    """Train by Adam on all samples at once; return the blocks at log-spaced steps."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(inputs.shape[1], WIDTH, bias=False),
        nn.ReLU(),
        nn.Linear(WIDTH, int(labels.max()) + 1, bias=False),
    )
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    measured = {int(step) for step in np.r_[0, np.geomspace(1, steps, 6).round()]}
    found = []
    print(f"{'step':>6} {'loss':>8} {'H_ww':>8} {'H_wv':>8} {'H_vv':>8} {'ratio':>8} {'HVPs':>6}")
    for step in range(steps + 1):
        if step in measured:
            blocks = block_structure(
                net, cross_entropy, [(inputs, labels)], blocks="neuron",
                return_matrix=with_matrix and step in (0, steps),
            )  # fmt: skip
            shares = " ".join(f"{share:8.3f}" for share in blocks.families.values())
            print(
                f"{step:>6} {blocks.loss:8.4f} {shares} {blocks.off_diagonal_ratio:8.4f} "
                f"{blocks.num_hvps:>6}"
            )
            found.append(blocks)
        optimizer.zero_grad()
        cross_entropy(net, (inputs, labels)).backward()
        optimizer.step()
    return found


def share_of_links(blocks: BlockStructure) -> float:
    """Return the share of the squared norm of H in H_wv."""
    return list(blocks.families.values())[1]


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST/raw; digits without it")
    parser.add_argument("--out", type=Path, default=Path("block_structure_output"))
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    print(f"Gaussian inputs, random labels, C = {CLASSES}: shares of the squared norm")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    found = train_and_measure(inputs, labels, args.steps, with_matrix=True)
    first, last = share_of_links(found[0]), share_of_links(found[-1])
    print(
        f"The share of H_wv fell from {first:.3f} to {last:.4f}: by a factor of {first / last:.0f}."
    )
    for blocks, when in ((found[0], "init"), (found[-1], "trained")):
        title = f"|H| {'at initialisation' if when == 'init' else f'after {args.steps} steps'}"
        entries_image(blocks, title=title).savefig(args.out / f"entries_{when}.png", dpi=55)
        block_heatmap(blocks).savefig(args.out / f"neurons_{when}.png", dpi=90)

    images, targets, name = load_images(args.data_dir, 1000)
    print(f"\n{name}, C = 10: shares of the squared norm")
    found = train_and_measure(images.flatten(1), targets, args.steps, with_matrix=False)
    norms = [np.sqrt(share_of_links(b)) * np.linalg.norm(b.frobenius) for b in found]
    print(
        f"The norm of H_wv was {norms[0]:.2f} at first, {max(norms):.2f} at most and "
        f"{norms[-1]:.2f} at last. Its share went from "
        f"{share_of_links(found[0]):.2f} to {share_of_links(found[-1]):.2f}."
    )
    print(f"\nFigures: {args.out}/entries_*.png, neurons_*.png")


if __name__ == "__main__":
    main()
