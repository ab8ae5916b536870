"""What a row of a paper's table is: a network, its training, what is measured, what was found.

The tables themselves are `hpl.py` and `sg.py`. HPL is "Investigating the Overlooked Hessian
Structure" (Tang et al., ICML 2025), SG "On the Overlooked Structure of Stochastic Gradients" (Xie
et al., NeurIPS 2023).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

_CLASSES = {
    "mnist": 10, "fashion-mnist": 10, "cifar-10": 10, "cifar-100": 100, "avila": 12,
    "shakespeare": 65,
}  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """Which training samples.

    Attributes:
        name: ``"mnist"``, ``"fashion-mnist"``, ``"cifar-10"``, ``"cifar-100"``, ``"avila"`` or
            ``"shakespeare"``.
        count: Only the first so many; None for all that there are.
        labels: ``"clean"``; ``"noise-40"``, the share that is flipped to another class, chosen
            uniformly; ``"shuffled"`` among all samples.
        inputs: ``"real"``, or ``"gaussian"`` noise of the same shape.
    """

    name: str
    count: int | None = None
    labels: str = "clean"
    inputs: str = "real"

    @property
    def num_classes(self) -> int:
        """Classes of the set as published; of the text, its characters."""
        return _CLASSES[self.name]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        optimizer: A name of `recipes.OPTIMIZERS`.
        learning_rate: The first one.
        epochs: How many.
        drops: After which share of the epochs the learning rate is divided by 10.
        batch_size: Of training.
        weight_decay: Of the optimizer.
        steps: So many optimizer steps, whatever the epochs; None to go by these.
        augment: Whether images are flipped and cropped at random.
    """

    optimizer: str = "SGD"
    learning_rate: float = 0.1
    epochs: int = 50
    drops: tuple[float, ...] = (0.4, 0.8)
    batch_size: int = 128
    weight_decay: float = 5e-4
    steps: int | None = None
    augment: bool = False


@dataclass(frozen=True)
class Network:
    """A network and its training; as it is initialised where there is no recipe.

    Attributes:
        model: A name that `networks.build` reads, such as ``"lenet"`` or ``"fcn-2x100"``.
    """

    model: str
    data: Samples
    recipe: Recipe | None = None

    @property
    def key(self) -> str:
        """A name for files: the same for the same network, whatever is measured of it."""
        return _short_hash(self)


@dataclass(frozen=True)
class Hessian:
    """Measure the top of the Hessian's spectrum, by both protocols.

    Attributes:
        k: How many eigenvalues are fitted.
        probe: H is that of the mean loss over the first so many training samples; None for all.
        statistic: ``"eigenvalues"``, or ``"eigengaps"`` sorted by size.
        data: Samples that H is evaluated on; those of training by default.
        parameters: ``"all"``, or ``"head"`` for the last linear layer.
    """

    k: int = 1000
    probe: int | None = 1000
    statistic: Literal["eigenvalues", "eigengaps"] = "eigenvalues"
    data: Samples | None = None
    parameters: Literal["all", "head"] = "all"


@dataclass(frozen=True)
class Gradients:
    """Measure the gradients of T mini-batches at fixed parameters.

    Attributes:
        batch_size: B.
        statistic: The spectrum of ``"covariance"`` or ``"second moment"``, ``"eigengaps"`` of the
            covariance, or the tests of the entries over each ``"dimension"`` or ``"iteration"``.
        count: T.
        k: How many eigenvalues or entries are fitted.
        clip_norm: Of each mini-batch's gradient.
        preconditioner: None or ``"adam"``.
        weight_decay: Of a term weight_decay / 2 norm(theta)^2 of the loss.
        momentum: Of SGD, whose buffers stand in the place of the gradients.
        mode: ``"train"`` for batch normalisation by the mini-batch.
    """

    batch_size: int
    statistic: str
    count: int = 5000
    k: int = 1000
    clip_norm: float | None = None
    preconditioner: str | None = None
    weight_decay: float = 0.0
    mode: Literal["eval", "train"] = "eval"
    # Not in the repr, whose hash names the results that were made before there was momentum.
    momentum: float = field(default=0.0, repr=False)

    @property
    def run(self) -> Gradients:
        """What has to be computed; the statistics of one matrix of gradients share it."""
        return replace(self, statistic="", k=0)


@dataclass(frozen=True)
class Printed:
    """The digits of the paper as they are printed, texts; None where it prints none.

    Attributes:
        verdict: ``"Yes"``, or ``"No"`` power law.
        rate: Share of rows of G whose power law is not rejected (SG tables 1, 4, 5).
        p_value: Mean p of the Gaussian tests.
        gaussian_rate: Share of rows of G whose Gaussianity is not rejected.
    """

    d_ks: str | None
    d_c: str = "0.0430"
    verdict: str | None = None
    beta: str | None = None
    sigma: str | None = None
    s: str | None = None
    rate: str | None = None
    p_value: str | None = None
    gaussian_rate: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        id: Of one row, for ``--rows`` and the file of its result: paper, table, setting.
        table: Number of the paper's table, ``"figure 28"`` where there is no table.
        label: What the paper calls the row.
        network: What is trained.
        measure: What is measured of it.
        printed: What the paper found.
        epoch: Measured after so many epochs of the recipe; None at its end.
        gpu: Whether it takes a GPU; skipped on a CPU unless the row is named.
        note: What the paper leaves open here and was chosen, before the row was run.
    """

    id: str
    table: str
    label: str
    network: Network
    measure: Hessian | Gradients
    printed: Printed
    epoch: int | None = None
    gpu: bool = False
    note: str = field(default="", compare=False)

    @property
    def paper(self) -> str:
        """``"hpl"`` or ``"sg"``."""
        return self.id.split("-")[0]

    @property
    def definition(self) -> str:
        """What was trained and measured, in short: a result of another one is out of date."""
        momentum = getattr(self.measure, "momentum", 0.0)
        late = (momentum,) if momentum else ()
        return _short_hash((self.network, self.epoch, self.measure, *late))


def _short_hash(value: object) -> str:
    return hashlib.sha1(repr(value).encode()).hexdigest()[:12]
