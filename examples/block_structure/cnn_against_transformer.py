"""Heterogeneity (HBS implication I): a small CNN against a small Transformer on real images.

Both learn the same images; at initialisation and after training the blocks of their layers are
measured, with the spectral density of each.
Run: python examples/block_structure/cnn_against_transformer.py --out docs/block_structure
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from images import load_images
from torch import Tensor, nn

from lightning_hessian import block_structure
from lightning_hessian.tracking.block_figures import (
    block_heatmap,
    density_plot,
    heterogeneity_heatmap,
)

PROBES = 128
"""Images that the Hessian is measured on."""


class TransformerBlock(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [batch, tokens, width] from tokens."""
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches of 2 x 2 as tokens, two blocks, the mean token classified."""

    def __init__(self, width: int = 16, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [batch, 10] of images [batch, 1, 8, 8]."""
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def convolutional(width: int = 8) -> nn.Module:
    """Return four convolutions with two poolings, and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, 10))


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train by Adam in batches of 64."""
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            cross_entropy(net, (images[batch], labels[batch])).backward()
            optimizer.step()


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST/raw; digits without it")
    parser.add_argument("--out", type=Path, default=Path("block_structure_output"))
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels, name = load_images(args.data_dir, 1500)
    probe = [(images[:PROBES], labels[:PROBES])]
    print(f"{name}; H on {PROBES} images, a block for each layer\n")
    print(f"{'network':<12}{'epochs':>7}{'loss':>8}{'blocks':>8}{'n':>7}{'ratio':>16}"
          f"{'share off':>11}{'heterogeneity':>15}{'HVPs':>7}{'seconds':>9}")  # fmt: skip
    for title, make in (("CNN", convolutional), ("Transformer", VisionTransformer)):
        torch.manual_seed(0)
        net = make()
        for epochs in (0, args.epochs):
            train(net, images, labels, epochs)
            found = block_structure(net, cross_entropy, probe, blocks="layer", densities=True)
            print(f"{title:<12}{epochs:>7}{found.loss:>8.3f}{len(found.names):>8}"
                  f"{sum(found.sizes):>7}{found.off_diagonal_ratio:>9.3f} ± "
                  f"{found.off_diagonal_ratio_std_error:.3f}{found.off_diagonal_share:>10.3f}"
                  f"{found.mean_heterogeneity:>15.3f}{found.num_hvps:>7}{found.seconds:>9.1f}",
                  flush=True)  # fmt: skip
        stem = title.lower()
        block_heatmap(found).savefig(args.out / f"layers_{stem}.png", dpi=90)
        heterogeneity_heatmap(found).savefig(args.out / f"heterogeneity_{stem}.png", dpi=90)
        density_plot(found).savefig(args.out / f"densities_{stem}.png", dpi=90)
    print(f"\nFigures: {args.out}/layers_*.png, heterogeneity_*.png, densities_*.png")


if __name__ == "__main__":
    main()
