"""Where a loss is split from its network: torch's losses, sums of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.gauss_newton_oracle import (
    apart,
    dense_gauss_newton,
    second_derivative,
)
from support.operators import as_matrix
from support.references import dense_hessian
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian.operators.gauss_newton import GaussNewtonOperator
from lightning_hessian.probe.loss_split import marked_loss
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError

SAMPLES, CLASSES = 8, 3
_generator = torch.Generator().manual_seed(5)
LABELS = torch.randint(CLASSES, (SAMPLES,), generator=_generator)
MASKED = LABELS.index_fill(0, torch.tensor([1, 4]), -100)
SOFT = torch.rand(SAMPLES, CLASSES, generator=_generator, dtype=torch.float64).softmax(-1)
WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
INPUTS = torch.randn(SAMPLES, 4, generator=_generator, dtype=torch.float64)
SIGNS = torch.where(SOFT > 1 / 3, 1.0, -1.0).double()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


@contextmanager
def operator_of(module: nn.Module, loss: Callable[[Any, Any], Tensor], *, marked: bool = False):
    objective = Objective(module, loss, [INPUTS], ParameterSpace.select(module))
    with objective.isolated():
        yield GaussNewtonOperator(objective, "autograd", marked=marked)


def found_by(loss: Callable[[Tensor], Tensor], module: nn.Module | None = None) -> Tensor:
    """Returns the matrix of a loss of the network's outputs, with the split found."""
    with operator_of(module or network(), lambda m, b: loss(m(b))) as operator:
        return as_matrix(operator)


def expected_of(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns J^T H_L J for a loss that is written out by hand."""
    curvature = second_derivative(lambda z: loss(z.view(SAMPLES, CLASSES)))
    torch.manual_seed(0)
    return dense_gauss_newton(network(), INPUTS, curvature)


def picked(logits: Tensor, labels: Tensor = LABELS) -> Tensor:
    """Cross-entropies [N] by the formula; 0 where the label is masked."""
    rows = torch.arange(len(labels))
    found = logits.logsumexp(-1) - logits[rows, labels.clamp(min=0)]
    return torch.where(labels >= 0, found, 0.0)


def soft(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * (logits - logits.logsumexp(-1, keepdim=True))).sum(-1)


def bce(logits: Tensor, targets: Tensor = SOFT, positive: float = 1.0) -> Tensor:
    return (
        positive * targets * (1 + (-logits).exp()).log() + (1 - targets) * (1 + logits.exp()).log()
    )


def pseudo_huber(difference: Tensor, beta: float) -> Tensor:
    size = difference.abs()
    return torch.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


SMOOTH = 0.9 * F.one_hot(LABELS, CLASSES).double() + 0.1 / CLASSES
UNIFORM = torch.full((SAMPLES, CLASSES), 1.0 / CLASSES, dtype=torch.float64)

LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "cross_entropy": (lambda z: F.cross_entropy(z, LABELS), lambda z: picked(z).mean()),
    "cross_entropy, summed": (
        lambda z: F.cross_entropy(z, LABELS, reduction="sum"), lambda z: picked(z).sum(),
    ),
    "cross_entropy, classes weighted": (
        lambda z: F.cross_entropy(z, LABELS, weight=WEIGHTS),
        lambda z: WEIGHTS[LABELS] @ picked(z) / WEIGHTS[LABELS].sum(),
    ),
    "cross_entropy, masked": (
        lambda z: F.cross_entropy(z, MASKED),
        lambda z: picked(z, MASKED).sum() / (MASKED >= 0).sum(),
    ),
    "cross_entropy, smoothed": (
        lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1), lambda z: soft(z, SMOOTH).mean(),
    ),
    "cross_entropy, soft targets": (
        lambda z: F.cross_entropy(z, SOFT), lambda z: soft(z, SOFT).mean(),
    ),
    "cross_entropy, channels first": (
        lambda z: F.cross_entropy(z.T[None], LABELS[None]), lambda z: picked(z).mean(),
    ),
    "CrossEntropyLoss": (
        lambda z: nn.CrossEntropyLoss(reduction="none")(z, LABELS).mean(),
        lambda z: picked(z).mean(),
    ),
    "nll_loss": (
        lambda z: F.nll_loss(F.log_softmax(z, -1), LABELS), lambda z: picked(z).mean(),
    ),
    "nll_loss, weighted and masked, of a reshaped log_softmax": (
        lambda z: F.nll_loss(
            F.log_softmax(z.view(2, -1, CLASSES), 2).view(-1, CLASSES), MASKED, weight=WEIGHTS
        ),
        lambda z: (
            (WEIGHTS[LABELS] * picked(z, MASKED)).sum() / WEIGHTS[LABELS][MASKED >= 0].sum()
        ),
    ),
    "kl_div": (
        lambda z: F.kl_div(z.log_softmax(-1), SOFT, reduction="batchmean"),
        lambda z: soft(z, SOFT).mean(),
    ),
    "kl_div, channels first, of logarithms": (
        lambda z: F.kl_div(
            z.T[None].log_softmax(1), SOFT.log().T[None], log_target=True, reduction="sum"
        ),
        lambda z: soft(z, SOFT).sum(),
    ),
    "mse_loss": (lambda z: F.mse_loss(z, SOFT), lambda z: ((z - SOFT) ** 2).mean()),
    "binary_cross_entropy_with_logits": (
        lambda z: F.binary_cross_entropy_with_logits(z, SOFT), lambda z: bce(z).mean(),
    ),
    "binary_cross_entropy_with_logits, weighted": (
        lambda z: F.binary_cross_entropy_with_logits(
            z, SOFT, weight=WEIGHTS, pos_weight=torch.full((CLASSES,), 3.0, dtype=z.dtype)
        ),
        lambda z: (WEIGHTS * bce(z, positive=3.0)).mean(),
    ),
    "huber_loss": (
        lambda z: F.huber_loss(z, SOFT, delta=0.4),
        lambda z: 0.4 * pseudo_huber(z - SOFT, 0.4).mean(),
    ),
    "smooth_l1_loss": (
        lambda z: F.smooth_l1_loss(z, SOFT, beta=0.4), lambda z: pseudo_huber(z - SOFT, 0.4).mean(),
    ),
    "poisson_nll_loss": (
        lambda z: F.poisson_nll_loss(z, SOFT), lambda z: (z.exp() - SOFT * z).mean(),
    ),
    "soft_margin_loss": (
        lambda z: F.soft_margin_loss(z, SIGNS), lambda z: (1 + (-SIGNS * z).exp()).log().mean(),
    ),
    "several in one sum": (
        lambda z: F.cross_entropy(z, LABELS) + 0.3 * F.mse_loss(z.tanh(), SOFT),
        lambda z: picked(z).mean(),  # and what is added below
    ),
    "a function of a loss": (
        lambda z: (F.cross_entropy(z, LABELS, reduction="none").exp() ** 0.5).mean(),
        lambda z: (picked(z).exp() ** 0.5).mean(),
    ),
    "a loss of a loss": (
        lambda z: F.mse_loss(F.cross_entropy(z, LABELS, reduction="none"), torch.ones(SAMPLES)),
        lambda z: ((picked(z) - 1) ** 2).mean(),
    ),
    "a product of two": (
        lambda z: F.cross_entropy(z, LABELS) * F.mse_loss(z, SOFT),
        lambda z: picked(z).mean() * ((z - SOFT) ** 2).mean(),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", LOSSES)
def test_the_curvature_of_every_loss_is_that_of_its_formula(name):
    loss, formula = LOSSES[name]
    expected = expected_of(formula)
    if name == "several in one sum":  # each term has outputs of its own
        outputs = nn.Sequential(*network(), nn.Tanh())
        torch.manual_seed(0)
        outputs = nn.Sequential(*network(), nn.Tanh())
        mean_square = second_derivative(
            lambda z: 0.3 * ((z.view(SAMPLES, CLASSES) - SOFT) ** 2).mean()
        )
        expected = expected + dense_gauss_newton(outputs, INPUTS, mean_square)
    torch.manual_seed(0)
    assert apart(found_by(loss), expected) < 1e-10


def test_the_split_of_binary_cross_entropy_is_at_the_probabilities():
    torch.manual_seed(0)
    module = nn.Sequential(*network(), nn.Sigmoid())
    formula = second_derivative(
        lambda p: -(SOFT * p.view_as(SOFT).log() + (1 - SOFT) * (1 - p.view_as(SOFT)).log()).mean()
    )
    expected = dense_gauss_newton(module, INPUTS, formula)
    found = found_by(lambda p: F.binary_cross_entropy(p, SOFT), module)
    assert apart(found, expected) < 1e-10
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-14


def test_targets_that_come_from_the_network_are_outputs_too():
    """Both arms of a Siamese loss move: their difference is what is squared."""
    module = network()
    with operator_of(module, lambda m, b: F.mse_loss(m(b), m(-b))) as operator:
        found = as_matrix(operator)

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.arm = module

        def forward(self, x: Tensor) -> Tensor:
            return self.arm(x) - self.arm(-x)

    expected = dense_gauss_newton(
        Difference(), INPUTS, lambda z: 2 * torch.eye(len(z), dtype=z.dtype) / len(z)
    )
    assert apart(found, expected) < 1e-10


def test_a_loss_that_is_only_computed_to_be_logged_changes_nothing():
    logged: list[float] = []

    def loss(z: Tensor) -> Tensor:
        logged.append(float(F.mse_loss(z, SOFT).detach()))
        return F.cross_entropy(z, LABELS)

    torch.manual_seed(0)
    expected = expected_of(lambda z: picked(z).mean())
    torch.manual_seed(0)
    assert apart(found_by(loss), expected) < 1e-10
    assert logged


def test_a_linear_loss_has_no_curvature():
    assert not found_by(lambda z: F.l1_loss(z, SOFT)).any()


# Given by the user ------------------------------------------------------------------------------


def written_out(module: Any, batch: Any) -> tuple[Any, Callable[[Any], Tensor]]:
    """Squares written out by hand, with a penalty on a weight."""
    outputs = {"fit": module(batch), "weight": module[0].weight}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return (given["fit"] - SOFT).square().mean() + 0.1 * given["weight"].square().sum()

    return outputs, loss


def test_a_split_that_is_given_is_used():
    module = network()
    torch.manual_seed(0)
    expected = expected_of(lambda z: ((z - SOFT) ** 2).mean())
    expected[range(20), range(20)] += 0.2  # of the first weight [5, 4]
    torch.manual_seed(0)
    module = network()
    with operator_of(module, marked_loss(written_out), marked=True) as operator:
        assert apart(as_matrix(operator), expected) < 1e-10


def test_a_split_that_is_given_is_a_loss_like_any_other():
    module = network()

    def plain(module: Any, batch: Any) -> Tensor:
        outputs, loss = written_out(module, batch)
        return loss(outputs)

    marked = dense_hessian(module, marked_loss(written_out), INPUTS)
    assert torch.equal(marked, dense_hessian(module, plain, INPUTS))


def test_torch_losses_within_a_network_are_left_alone_where_the_split_is_given():
    """A squared error is a feature here; only what is marked is cut."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + F.mse_loss(self.body(-x), SOFT, reduction="none")

    module = Odd()

    def split(module: Any, batch: Any) -> Any:
        return module(batch), lambda z: F.cross_entropy(z, LABELS)

    curvature = second_derivative(lambda z: picked(z.view(SAMPLES, CLASSES)).mean())
    expected = dense_gauss_newton(module, INPUTS, curvature)
    with operator_of(module, marked_loss(split), marked=True) as operator:
        assert apart(as_matrix(operator), expected) < 1e-10


# Refused ----------------------------------------------------------------------------------------


def penalised(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch), LABELS) + module[0].weight.square().sum()


REFUSED: dict[str, tuple[Callable[[Any, Any], Tensor], str]] = {
    "by hand": (
        lambda m, b: (m(b) - SOFT).square().mean(),
        r"not made of torch's loss functions.*mse_loss.*outputs_and_loss",
    ),
    "a penalty": (penalised, r"a penalty on the weights.*outputs_and_loss"),
    "not normalised": (
        lambda m, b: F.nll_loss(m(b), LABELS), r"nll_loss.*log_softmax.*cross_entropy",
    ),
    "a loss as a feature": (
        lambda m, b: F.mse_loss(m(b) * F.mse_loss(m(-b), SOFT), SOFT),
        r"depends on parameters other than.*outputs_and_loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_with_the_remedy(case):
    loss, words = REFUSED[case]
    with pytest.raises(MeasurementError, match=words), operator_of(network(), loss):
        pass


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (lambda m, b: (m(b), lambda z: z.mean() + m[0].weight.sum()), "outputs_and_loss returns"),
        (lambda m, b: m(b).mean(), r"Return \(outputs, loss_of_outputs\)"),
        (lambda m, b: (m(b), 3.0), r"Return \(outputs, loss_of_outputs\)"),
    ],
)
def test_a_wrong_split_is_refused(split, words):
    with (
        pytest.raises(MeasurementError, match=words),
        operator_of(network(), marked_loss(split), marked=True),
    ):
        pass
