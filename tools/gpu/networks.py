"""The networks of the benchmark, with one batch of random data each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import resnet
from problems import GPT
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Problem:
    """A network on the device, and a batch for it.

    Attributes:
        title: What it is.
        model: In evaluation mode.
        batch: Inputs and targets.
    """

    title: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def loss_fn(module: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(module(batch[0]), batch[1])


class Bottleneck(nn.Module):
    """Three convolutions with BatchNorm, added to what comes in: the block of a ResNet50."""

    def __init__(self, inward: int, width: int, stride: int) -> None:
        super().__init__()
        outward = 4 * width
        self.inner = nn.Sequential(
            nn.Conv2d(inward, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outward, 1, bias=False), nn.BatchNorm2d(outward),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inward != outward:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inward, outward, 1, stride, bias=False), nn.BatchNorm2d(outward)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return images of the outward width."""
        return torch.relu(self.shortcut(x) + self.inner(x))


def resnet50(width: int, classes: int) -> nn.Module:
    """Return torchvision's ResNet50, or the same of our own where that is missing or narrower."""
    if width == 64:
        try:
            from torchvision.models import resnet50 as theirs
        except (ImportError, RuntimeError):  # another build of torch than it was made for
            pass
        else:
            model: nn.Module = theirs(num_classes=classes)
            return model
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inward = width
    for stage, blocks in enumerate((3, 4, 6, 3) if width == 64 else (1, 1, 1, 1)):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(inward, width * 2**stage, stride))
            inward = 4 * width * 2**stage
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inward, classes)]
    return nn.Sequential(*layers)


class ViT(nn.Module):
    """A vision transformer: patches of 16 by 16, a class token, layers with LayerNorm first."""

    def __init__(self, side: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // 16) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images [B, 3, side, side]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.layers(x))[:, 0])
        return logits


def _images(count: int, side: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, side, side), torch.randint(classes, (count,))


def _tokens(count: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocabulary, (count, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()


def _resnet18(small: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return resnet(4, blocks=1) if small else resnet(64), _images(4 if small else 128, 32, 10)


def _resnet50(small: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    count, side, classes = (2, 32, 10) if small else (32, 224, 1000)
    return resnet50(4 if small else 64, classes), _images(count, side, classes)


def _nanogpt(small: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = GPT(context=16, depth=1, heads=2, width=16) if small else GPT()
    return model, _tokens(2 if small else 4, 16 if small else 256, 65)


def _gpt2(small: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    if small:
        return GPT(97, context=16, depth=2, heads=2, width=16), _tokens(2, 16, 97)
    return GPT(50257, context=1024, depth=12, heads=12, width=768), _tokens(2, 512, 50257)


def _vit(small: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    side, classes = (32, 10) if small else (224, 1000)
    model = ViT(side, 16, 1, 2, classes) if small else ViT(side, 768, 12, 12, classes)
    return model, _images(2 if small else 16, side, classes)


_MAKERS: dict[str, tuple[str, Callable[[bool], tuple[nn.Module, tuple[Tensor, Tensor]]]]] = {
    "resnet18": ("ResNet18", _resnet18),
    "resnet50": ("ResNet50", _resnet50),
    "nanogpt": ("nanoGPT", _nanogpt),
    "gpt2": ("GPT-2 small", _gpt2),
    "vit": ("ViT-base", _vit),
}
NAMES = tuple(_MAKERS)


def network(name: str, device: torch.device, *, small: bool) -> Problem:
    """Return a network by its name; ``small`` for one that only shows that all runs."""
    title, make = _MAKERS[name]
    torch.manual_seed(0)
    model, batch = make(small)
    inputs, targets = (tensor.to(device) for tensor in batch)
    return Problem(title, model.to(device).eval(), (inputs, targets))
