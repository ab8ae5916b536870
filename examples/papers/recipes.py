"""How the papers train: HPL's appendix C.1.2 to C.2.3, SG's appendix A.

What they leave open, and what was chosen before anything was run:

- CIFAR: the epochs are not given. 200, since the rate last drops at 160 (150 for CIFAR-100).
- Avila: no recipe is given. That of MNIST.
- "The optimal learning rate" is not searched for: the rates that the text states are taken.
- SGD is SGD with momentum 0.9, "Vanilla SGD" without.
- Table 5's number of iterations is not given. That of B = 128 in 50 epochs, 23,450.
- SGD, Adam, AMSGrad, RAdam and AdamW are torch's; the other six those of the package
  `pytorch_optimizer`, at its defaults but for the learning rate and for weight decay, which is
  added to the gradient as torch's Adam does it. Without it their rows are skipped by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import lightning as L
import torch
from rows import Recipe, Samples
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

Parameters = Iterable[nn.Parameter]


class MissingPackageError(ImportError):
    """An optimizer is in a package that is not installed."""


def _of(name: str, **options: Any) -> Callable[..., torch.optim.Optimizer]:
    """Return what builds an optimizer of pytorch_optimizer."""

    def build(parameters: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        try:
            package = import_module("pytorch_optimizer")
        except ImportError as error:
            raise MissingPackageError(f"{name} needs `pip install pytorch_optimizer`") from error
        return getattr(package, name)(parameters, lr=lr, weight_decay=weight_decay, **options)

    return build


def _lookahead(parameters: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    inner = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay)
    try:
        return import_module("pytorch_optimizer").Lookahead(inner)
    except ImportError as error:
        raise MissingPackageError("Lookahead needs `pip install pytorch_optimizer`") from error


def _torch(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[..., Any]:
    return lambda parameters, lr, weight_decay: kind(
        parameters, lr=lr, weight_decay=weight_decay, **options
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": _torch(torch.optim.SGD, momentum=0.9),
    "Vanilla SGD": _torch(torch.optim.SGD),
    "Adam": _torch(torch.optim.Adam),
    "AMSGrad": _torch(torch.optim.Adam, amsgrad=True),
    "RAdam": _torch(torch.optim.RAdam),
    "AdamW": _torch(torch.optim.AdamW),
    "AdaBound": _of("AdaBound", weight_decouple=False),
    "Yogi": _of("Yogi", weight_decouple=False),
    "Adai": _of("Adai"),
    "PNM": _of("PNM", weight_decouple=False),
    "Lookahead": _lookahead,
    "DiffGrad": _of("DiffGrad", weight_decouple=False),
}

_ADAPTIVE = ("Adam", "AMSGrad", "AdaBound", "Yogi", "RAdam", "DiffGrad")


def mnist(optimizer: str = "SGD", **changes: Any) -> Recipe:
    """Return the recipe for MNIST and Fashion-MNIST (HPL C.1.2; SG A.3)."""
    rate = 0.001 if optimizer in _ADAPTIVE else 0.1
    return Recipe(optimizer, rate, **changes)


def cifar(name: str, optimizer: str = "SGD", **changes: Any) -> Recipe:
    """Return the recipe for CIFAR-10 or CIFAR-100 (HPL C.1.3; SG A.4)."""
    rate = 0.001 if optimizer in _ADAPTIVE else 0.1
    if optimizer in ("Vanilla SGD", "Adai", "PNM"):
        rate = 1.0
    drops = (0.4, 0.8) if name == "cifar-10" else (0.5, 0.75)
    return Recipe(optimizer, rate, epochs=200, drops=drops, augment=True, **changes)


def of(samples: Samples, optimizer: str = "SGD", **changes: Any) -> Recipe:
    """Return the recipe for a data set."""
    if samples.name.startswith("cifar"):
        return cifar(samples.name, optimizer, **changes)
    if samples.name == "fashion-mnist":
        changes.setdefault("epochs", 200)
    return mnist(optimizer, **changes)


class Classifier(L.LightningModule):
    """A network with cross-entropy, trained by a recipe."""

    def __init__(self, network: nn.Module, recipe: Recipe | None, num_epochs: int) -> None:
        super().__init__()
        self.network, self.recipe, self.num_epochs = network, recipe, num_epochs

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the network."""
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the mean loss of a batch, with new flips and crops where the recipe has them."""
        inputs, labels = batch
        if self.recipe is not None and self.recipe.augment:
            inputs = flipped_and_cropped(inputs)
        return functional.cross_entropy(self.network(inputs), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Log loss and accuracy."""
        outputs = self.network(batch[0])
        self.log("val_loss", functional.cross_entropy(outputs, batch[1]))
        self.log("val_accuracy", (outputs.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the schedule of its learning rate."""
        recipe = self.recipe
        assert recipe is not None
        optimizer = OPTIMIZERS[recipe.optimizer](
            self.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        drops = [round(share * self.num_epochs) for share in recipe.drops]
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1)]


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return functional.cross_entropy(module(batch[0]), batch[1])


def epochs_of(recipe: Recipe, num_samples: int) -> int:
    """Return how many epochs the recipe makes of so many samples."""
    if recipe.steps is None:
        return recipe.epochs
    return math.ceil(recipe.steps / math.ceil(num_samples / recipe.batch_size))


def loader(inputs: Tensor, labels: Tensor, batch_size: int, *, shuffle: bool) -> DataLoader:
    """Return a loader that takes whole batches out of the tensors at once."""
    data = TensorDataset(inputs, labels)
    order = RandomSampler(data) if shuffle else range(len(data))
    return DataLoader(data, sampler=BatchSampler(order, batch_size, False), batch_size=None)


def flipped_and_cropped(images: Tensor, padding: int = 4) -> Tensor:
    """Return images [N, C, size, size], each flipped at random and shifted by up to the padding."""
    count, _, size, _ = images.shape
    flip = torch.rand(count, device=images.device) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = functional.pad(images, [padding] * 4)
    shifts = torch.randint(0, 2 * padding + 1, (2, count, 1), device=images.device)
    rows, columns = shifts + torch.arange(size, device=images.device)
    samples = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
