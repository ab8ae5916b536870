"""Networks of the kinds that users bring, each as a problem with one probe batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from problems import GPT, Problem, lenet_on_mnist, mnist, photographs, shakespeare
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions with BatchNorm, added to what comes in: the block of a ResNet18."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(inward, outward, 3, stride, 1, bias=False), nn.BatchNorm2d(outward),
            nn.ReLU(),
            nn.Conv2d(outward, outward, 3, 1, 1, bias=False), nn.BatchNorm2d(outward),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inward, outward, 1, stride, bias=False), nn.BatchNorm2d(outward)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return images of the outward width, smaller by the stride."""
        return torch.relu(self.shortcut(x) + self.inner(x))


def resnet(width: int = 16, *, blocks: int = 2) -> nn.Module:
    """Return a narrow ResNet18: four stages of two blocks, 0.7 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    ]  # fmt: skip
    inward = width
    for stage in range(4):
        for block in range(blocks):
            outward, stride = width * 2**stage, 2 if stage and not block else 1
            layers.append(Residual(inward, outward, stride))
            inward = outward
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inward, 10)]
    return nn.Sequential(*layers)


def strided_cnn() -> nn.Module:
    """Return convolutions with strides and GroupNorm instead of pooling."""
    layers: list[nn.Module] = []
    widths = (3, 16, 32, 48, 64)
    for i, (inward, outward) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(inward, outward, 3, 2 if i else 1, 1), nn.GroupNorm(8, outward)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp_problem(folder: Path | None) -> Problem:
    """Return a dense network on 1,000 images of MNIST."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(),
        nn.Linear(256, 10),
    )  # fmt: skip
    return Problem("MLP, 1,000 samples", model.eval(), [mnist(folder, 1000)])


def on_photographs(
    name: str, network: Callable[[], nn.Module], count: int
) -> Callable[[Path | None], Problem]:
    """Return what makes a problem of a network on so many images of CIFAR-10."""

    def problem(folder: Path | None) -> Problem:
        torch.manual_seed(0)
        model = network()
        images, labels = photographs(folder)[0]
        batch = (images[:count], labels[:count])
        with torch.no_grad():
            model(batch[0])  # BatchNorm sees the data once
        return Problem(f"{name}, {count} samples", model.eval(), [batch])

    return problem


def gpt_problem(folder: Path | None) -> Problem:
    """Return a GPT of 0.8 million parameters on 1,024 characters."""
    text = shakespeare(folder)
    torch.manual_seed(0)
    model = GPT(context=64, depth=4, heads=4, width=128)
    batch = torch.stack([text[i : i + 65] for i in torch.randint(len(text) - 65, (16,)).tolist()])
    return Problem("GPT, 1,024 tokens", model.eval(), [(batch[:, :-1], batch[:, 1:].flatten())])


NETWORKS: dict[str, Callable[[Path | None], Problem]] = {
    "lenet": lambda folder: lenet_on_mnist(folder, samples=1000),
    "mlp": mlp_problem,
    "group norm": on_photographs("CNN with GroupNorm", strided_cnn, 300),
    "batch norm": on_photographs("ResNet18 of width 16", resnet, 100),
    "gpt": gpt_problem,
}
"""What products are measured on, from the least to the largest network."""
