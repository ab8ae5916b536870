"""The networks of the papers, by name.

Neither paper publishes code. What their text leaves open was chosen before anything was run:

- LeNet is LeNet-5 with ReLU and max pooling. It has 61,706 parameters on MNIST and 62,006 on
  CIFAR-10, as SG says of its own (section 3).
- "k-layer FCN" is a network of k linear maps with ReLU between them, so of k - 1 hidden layers.
  Then the one-layer FCN is a linear classifier: HPL calls it underparameterized (figure 5).
- SG's FCN has batch normalisation before each ReLU (A.2), HPL's has none (C.1.1).
- A LNN is an FCN without both; the papers give it no width, so it has that of the paper's FCN.
- ResNet18 is the one for small images: a first 3 x 3 convolution of stride 1, no pooling after it.
- GPT2-nano is nanoGPT's "baby GPT": 6 layers, 6 heads, 384 features, a context of 256 characters.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

_DENSE = re.compile(r"(fcn|lnn)-(\d+)x(\d+)(-relu|-bn)*")


def build(name: str, inputs: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the network of a name, freshly initialised by torch's defaults.

    Args:
        name: ``"lenet"``, ``"resnet18"``, ``"gpt-nano"``; ``"fcn-2x100"`` for two linear maps of
            width 100 with ReLU, ``"fcn-2x70-bn"`` with batch normalisation too; ``"lnn-4x70"``
            without nonlinearity, ``"lnn-4x70-bn"``, ``"lnn-4x70-relu"``.
        inputs: Shape of one input, [channels, height, width] or [features].
        num_classes: Of the outputs.

    Raises:
        ValueError: There is no such network.

    Example:
        >>> sum(p.numel() for p in build("lenet", (1, 28, 28), 10).parameters())
        61706
        >>> sum(p.numel() for p in build("lenet", (3, 32, 32), 10).parameters())
        62006
        >>> [type(part).__name__ for part in build("lnn-2x70-bn", (1, 28, 28), 10)]
        ['Flatten', 'Linear', 'BatchNorm1d', 'Linear']
    """
    if name == "lenet":
        return _lenet(inputs, num_classes)
    if name == "resnet18":
        return _resnet18(inputs[0], num_classes)
    if name == "gpt-nano":
        return CharacterGPT(num_classes)
    found = _DENSE.fullmatch(name)
    if found is None:
        raise ValueError(f"there is no network {name!r}; see networks.build for the names.")
    kind, layers, width = found[1], int(found[2]), int(found[3])
    relu = kind == "fcn" or name.endswith("-relu")
    return _dense(inputs, num_classes, layers, width, relu=relu, norm="-bn" in name)


def _lenet(inputs: tuple[int, ...], num_classes: int) -> nn.Module:
    channels, height, _ = inputs
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2 if height == 28 else 0), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes),
    )  # fmt: skip


def _dense(
    inputs: tuple[int, ...], num_classes: int, layers: int, width: int, *, relu: bool, norm: bool
) -> nn.Module:
    sizes = [math.prod(inputs)] + [width] * (layers - 1) + [num_classes]
    parts: list[nn.Module] = [nn.Flatten()]
    for number, (before, after) in enumerate(pairwise(sizes), 1):
        parts.append(nn.Linear(before, after))
        if number < layers:
            parts += [nn.BatchNorm1d(after)] * norm + [nn.ReLU()] * relu
    return nn.Sequential(*parts)


class _Residual(nn.Module):
    """Two convolutions with batch normalisation, added to what came in."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.short = nn.Sequential()
        if stride > 1 or before != after:
            self.short = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both paths."""
        return functional.relu(self.path(x) + self.short(x))


def _resnet18(channels: int, num_classes: int) -> nn.Module:
    parts: list[nn.Module] = [
        nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
    ]  # fmt: skip
    before = 64
    for after in (64, 128, 256, 512):
        parts.append(_Residual(before, after, 1 if after == before else 2))
        parts.append(_Residual(after, after, 1))
        before = after
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


class CharacterGPT(nn.Module):
    """A decoder over characters, of nanoGPT's "baby" size by default; [B, L] to [B, C, L]."""

    def __init__(
        self, num_tokens: int, width: int = 384, layers: int = 6, heads: int = 6, length: int = 256
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of each next character."""
        length = ids.shape[1]
        x = self.tokens(ids) + self.places(torch.arange(length, device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(
            length, device=ids.device, dtype=x.dtype
        )
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x)).transpose(1, 2)
