"""What is measured: LeNet on MNIST and a small GPT on tiny Shakespeare, or synthetic stand-ins."""

from __future__ import annotations

import copy
import gzip
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

Batch: TypeAlias = tuple[Tensor, Tensor]


class MissingDataError(Exception):
    """A data set is not in the data folder; the message says which file was looked for."""


@dataclass(frozen=True)
class Problem:
    """A network, its probe batches and the parameters that the Hessian is taken by.

    Attributes:
        name: As printed.
        model: In evaluation mode.
        batches: Inputs and labels.
        criterion: ``criterion(model(inputs), labels)`` is the mean loss of a batch.
        selected: Names of the parameters; all, where it is empty. The peers are given a model in
            which the others do not require grad.
    """

    name: str
    model: nn.Module
    batches: Sequence[Batch]
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    selected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not self.selected or name in self.selected)

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same with parameters and inputs in another precision."""
        batches = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in self.batches]
        return replace(self, model=copy.deepcopy(self.model).to(dtype), batches=batches)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The selected parameters, in the model's order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def size(self) -> int:
        """n, how many numbers they hold."""
        return sum(p.numel() for p in self.parameters)

    @property
    def loss_fn(self) -> Callable[[nn.Module, Batch], Tensor]:
        """``loss_fn(model, batch)``, as lightning_hessian and hessian-eigenthings take it."""
        return lambda model, batch: self.criterion(model(batch[0]), batch[1])


def lenet() -> nn.Module:
    """Return LeNet-5 with ReLU and max pooling, 61,706 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


class Attention(nn.Module):
    """Causal self-attention of several heads, projections without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inward = nn.Linear(width, 3 * width, bias=False)
        self.outward = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, width]."""
        shape = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        query, key, value = (
            part.view(shape).transpose(1, 2) for part in self.inward(x).chunk(3, 2)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.outward(mixed.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A character-level GPT of nanoGPT's smallest training configuration, 10.8 million parameters.

    Six layers, six heads, width 384, context 256; learned positions, LayerNorm before each part
    and at the end, GELU, no biases, and the input embedding as the output layer where ``tied``.
    Its output is flat over the tokens, [B T, vocabulary], so that every library's cross-entropy
    takes it.
    """

    def __init__(
        self, vocabulary: int = 65, *, context: int = 256, depth: int = 6, heads: int = 6,
        width: int = 384, tied: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("outward.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if deep else 0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B T, vocabulary] for tokens [B, T]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).flatten(0, 1)


class Block(nn.Module):
    """Attention and a two-layer network, each added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.before_network = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, width]."""
        x = x + self.attention(self.before_attention(x))
        return x + self.down(nn.functional.gelu(self.up(self.before_network(x))))


def mnist(folder: Path | None, count: int) -> Batch:
    """Return the first training images [count, 1, 28, 28] and their labels.

    Args:
        folder: Holds ``MNIST/raw``; None for a synthetic stand-in: ten noisy prototypes.
        count: How many.

    Raises:
        MissingDataError: The files are not there.
    """
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(10, (count,), generator=generator)
        prototypes = torch.randn(10, 1, 7, 7, generator=generator)
        images = nn.functional.interpolate(prototypes, scale_factor=4, mode="bilinear")[labels]
        return images + 0.3 * torch.randn(images.shape, generator=generator), labels
    raw = folder / "MNIST" / "raw"
    images = torch.tensor(_idx(raw / "train-images-idx3-ubyte.gz", 16, count * 784))
    labels = torch.tensor(_idx(raw / "train-labels-idx1-ubyte.gz", 8, count)).long()
    return (images.view(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081, labels


def _idx(path: Path, offset: int, count: int) -> np.ndarray:
    if not path.exists():
        raise MissingDataError(f"{path} is missing")
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, count, offset).copy()


def photographs(folder: Path | None) -> tuple[Batch, Batch]:
    """Return the subset of CIFAR-10: 10,000 images to train on, and 1,000 others.

    Raises:
        MissingDataError: The file is not there.
    """
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(10, (11_000,), generator=generator)
        prototypes = torch.randn(10, 3, 8, 8, generator=generator)
        images = nn.functional.interpolate(prototypes, scale_factor=4, mode="bilinear")[labels]
        images += torch.randn(images.shape, generator=generator)
        return (images[:10_000], labels[:10_000]), (images[10_000:], labels[10_000:])
    path = folder / "cifar10" / "cifar10-subset.npz"
    if not path.exists():
        raise MissingDataError(f"{path} is missing")
    with np.load(path) as file:
        parts = [torch.from_numpy(file[name]) for name in
                 ("train_images", "train_labels", "test_images", "test_labels")]  # fmt: skip
    train, test = (images.float() / 255 - 0.48 for images in (parts[0], parts[2][:1000]))
    return (train * 4, parts[1]), (test * 4, parts[3][:1000])


def shakespeare(folder: Path | None) -> Tensor:
    """Return tiny Shakespeare as characters 0..64, or a synthetic stand-in: a random Markov chain.

    Raises:
        MissingDataError: The file is not there.
    """
    if folder is None:
        generator = np.random.default_rng(0)
        successors = generator.integers(65, size=(65, 4))
        text = np.zeros(100_000, np.int64)
        for i, choice in enumerate(generator.integers(4, size=len(text) - 1)):
            text[i + 1] = successors[text[i], choice]
        return torch.from_numpy(text)
    path = folder / "tinyshakespeare" / "input.txt"
    if not path.exists():
        raise MissingDataError(f"{path} is missing")
    characters = np.frombuffer(path.read_bytes(), np.uint8)
    return torch.from_numpy(np.unique(characters, return_inverse=True)[1])


def lenet_on_mnist(
    folder: Path | None, *, samples: int = 1000, batches: int = 1, epochs: int = 50
) -> Problem:
    """Return LeNet trained on 1000 images by momentum SGD, with the first ``samples`` as probe."""
    inputs, labels = mnist(folder, max(samples, 1000))
    torch.manual_seed(0)
    model = lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for chosen in torch.randperm(1000).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
    size = math.ceil(samples / batches)
    parts = zip(inputs[:samples].split(size), labels[:samples].split(size), strict=True)
    name = f"LeNet, {samples:,} samples" + (f" in {batches} batches" if batches > 1 else "")
    return Problem(name, model.eval(), list(parts))


def nanogpt(folder: Path | None, *, batch_size: int = 4, steps: int = 0) -> Problem:
    """Return the GPT on one batch of tiny Shakespeare, at its initialisation or a little after."""
    text = shakespeare(folder)
    torch.manual_seed(0)
    model = GPT()
    starts = torch.randint(len(text) - 257, (batch_size,))
    batch = torch.stack([text[i : i + 257] for i in starts])
    problem = Problem("nanoGPT", model.eval(), [(batch[:, :-1], batch[:, 1:].flatten())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss_fn(model, problem.batches[0]).backward()
        optimizer.step()
    return problem


def nanogpt_last_layer(folder: Path | None) -> Problem:
    """Return the same with an output layer of its own, the only one that H is taken by."""
    whole = nanogpt(folder)
    torch.manual_seed(0)
    model = GPT(tied=False)
    return Problem("last layer of nanoGPT", model.eval(), whole.batches, selected=("head.weight",))
