"""The loss over the probe batches: its weights, its purity, where it comes from, its refusals."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import lightning as L
import numpy as np
import pytest
import torch
from support.references import cross_entropy, in_double, mlp, ragged
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian.probe.loss import resolve_loss
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make_objective(module, loss_fn, batches, *, parameters=None, **options) -> Objective:
    space = ParameterSpace.select(module, parameters)
    return Objective(module, loss_fn, batches, space, **options)


def value_of(objective: Objective) -> float:
    with objective.isolated():
        return objective.value()


# The mean over all samples ----------------------------------------------------------------------


def test_a_ragged_last_batch_counts_by_its_samples():
    problem = mlp()
    objective = make_objective(problem.module, problem.loss_fn, problem.batches)
    expected = problem.loss_fn(in_double(problem.module), in_double(problem.whole)).item()
    assert value_of(objective) == pytest.approx(expected, rel=1e-6)
    assert objective.weights == pytest.approx((0.6, 0.4))
    assert objective.num_samples == 10


def test_batch_weight_says_what_a_loss_is_a_mean_over():
    def masked_mean(module, batch):
        x, mask = batch
        return (module(x).square().mean(-1) * mask).sum() / mask.sum()

    module, x, mask = nn.Linear(3, 2), torch.randn(9, 3), (torch.rand(9) < 0.4).float()
    mask[0] = mask[4] = mask[8] = 1.0
    batches = ragged(x, mask, sizes=(4, 4, 1))
    objective = make_objective(
        module, masked_mean, batches, batch_weight=lambda batch: batch[1].sum()
    )
    assert objective.num_samples == float(mask.sum())
    assert value_of(objective) == pytest.approx(masked_mean(module, (x, mask)).item(), rel=1e-6)


@dataclass
class Graph:
    nodes: Tensor
    name: str


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        ([torch.zeros(5, 2), torch.zeros(5)], 5),
        ({"x": (torch.zeros(5, 2), torch.zeros(5)), "weight": torch.tensor(3.0)}, 5),
        (Graph(torch.zeros(5, 2), "a"), 5),
    ],
)
def test_the_number_of_samples_is_read_from_nested_batches(batch, size):
    module = nn.Linear(2, 2)
    objective = make_objective(module, lambda module, batch: module.bias.sum(), [batch, batch])
    assert objective.num_samples == 2 * size


def test_batches_whose_size_cannot_be_told_ask_for_batch_weight():
    batch = {"context": torch.zeros(5, 2), "target": torch.zeros(3)}
    with pytest.raises(ValueError, match="batch_weight"):
        make_objective(nn.Linear(2, 2), cross_entropy, [batch, batch])
    # One batch alone needs no weight.
    assert make_objective(nn.Linear(2, 2), cross_entropy, [batch]).weights == (1.0,)


@pytest.mark.parametrize("weights", [(-1.0, 2.0), (0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_weights_that_make_no_mean_are_refused(weights):
    given = iter(weights)
    with pytest.raises(ValueError, match="weights must be >= 0"):
        make_objective(
            nn.Linear(2, 2), cross_entropy, [0, 1], batch_weight=lambda batch: next(given)
        )


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no probe batch"):
        make_objective(nn.Linear(2, 2), cross_entropy, [])


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'evaluate'"):
        make_objective(nn.Linear(2, 2), cross_entropy, [0], mode="evaluate")


# Purity -----------------------------------------------------------------------------------------


def test_the_loss_is_a_function_of_the_parameters_that_are_passed_in():
    problem = mlp()
    objective = make_objective(problem.module, problem.loss_fn, [problem.whole])
    other = copy.deepcopy(problem.module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    with objective.isolated():
        found = objective.batch_loss(tuple(other.parameters()), 0)
    assert found.item() == pytest.approx(problem.loss_fn(other, problem.whole).item(), rel=1e-6)


def test_a_batch_is_copied_when_it_is_given():
    module, x = nn.Linear(3, 1), torch.randn(4, 3)
    objective = make_objective(module, lambda module, x: module(x).mean(), [x])
    before = value_of(objective)
    x.fill_(100.0)
    assert value_of(objective) == before


def test_a_loss_that_writes_into_its_batch_finds_it_as_it_was_the_next_time():
    def greedy(module, batch):
        batch["x"].mul_(2)
        return module(batch["x"]).mean()

    batch = {"x": torch.randn(4, 3)}
    original = batch["x"].clone()
    objective = make_objective(nn.Linear(3, 1), greedy, [batch])
    assert value_of(objective) == value_of(objective)
    assert torch.equal(batch["x"], original)


def test_random_layers_see_the_same_draws_at_every_evaluation():
    module = nn.Sequential(nn.Linear(5, 20), nn.Dropout(0.5), nn.Linear(20, 3))
    batches = ragged(torch.randn(8, 5), torch.randint(3, (8,)), sizes=(4, 4))

    def noisy(module, batch):
        return cross_entropy(module, batch) * (1 + torch.rand(()) + np.random.rand())

    first, second, reseeded = (
        make_objective(module, noisy, batches, mode="train", seed=seed) for seed in (3, 3, 4)
    )
    torch.rand(7)
    values = [value_of(first), value_of(first), value_of(second)]
    assert values[0] == values[1] == values[2]
    assert value_of(reseeded) != values[0]


def test_dropout_is_off_in_evaluation_mode_and_on_in_training_mode():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    whole = (torch.randn(8, 5), torch.randint(3, (8,)))
    expected = cross_entropy(copy.deepcopy(module).eval(), whole).item()
    evaluated, trained = (
        value_of(make_objective(module, cross_entropy, [whole], mode=mode))
        for mode in ("eval", "train")
    )
    assert evaluated == pytest.approx(expected, rel=1e-6)
    assert trained != pytest.approx(expected, rel=1e-3)


def test_a_half_precision_module_is_measured_in_single_precision():
    problem = mlp()
    module = copy.deepcopy(problem.module).bfloat16()
    objective = make_objective(module, problem.loss_fn, [problem.whole])
    whole = (problem.whole[0].bfloat16(), problem.whole[1])
    in_half = make_objective(module, problem.loss_fn, [whole])
    expected = problem.loss_fn(copy.deepcopy(module).float(), problem.whole).item()
    rounded = (whole[0].float(), whole[1])
    assert value_of(objective) == pytest.approx(expected, rel=1e-6)
    assert value_of(in_half) == pytest.approx(
        problem.loss_fn(copy.deepcopy(module).float(), rounded).item(), rel=1e-6
    )


def test_a_frozen_half_precision_backbone_is_measured_in_single_precision_too():
    module = nn.Sequential(nn.Linear(5, 6).bfloat16().requires_grad_(False), nn.Linear(6, 3))
    whole = (torch.randn(8, 5), torch.randint(3, (8,)))
    objective = make_objective(module, cross_entropy, [whole])
    expected = cross_entropy(copy.deepcopy(module).float(), whole).item()
    assert value_of(objective) == pytest.approx(expected, rel=1e-6)


class TwoPrecisions(nn.Module):
    """Single precision below, double above, as some scientific models are built."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(3, 4), nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.above(torch.tanh(self.below(x)).double())


def test_a_module_in_two_precisions_is_measured_as_it_computes():
    module, x = TwoPrecisions(), torch.randn(6, 3)
    objective = make_objective(module, lambda module, x: module(x).square().mean(), [x])
    expected = module(x).square().mean().item()
    assert value_of(objective) == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_differentiates_inside_has_a_value():
    """Physics-informed losses and gradient penalties call ``torch.autograd.grad`` themselves."""

    def residual(module, x):
        x = x.clone().requires_grad_()
        slope = torch.autograd.grad(module(x).sum(), x, create_graph=True)[0]
        return (slope - x).square().mean()

    module = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(6, 1)
    objective = make_objective(module, residual, [x])
    assert value_of(objective) == pytest.approx(residual(module, x).item(), rel=1e-6)


# Where the loss comes from ----------------------------------------------------------------------


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def error(self, batch):
        return F.mse_loss(self.layer(batch[0]), batch[1])


class ReturnsLoss(Regression):
    def training_step(self, batch):
        return self.error(batch)


class ReturnsMapping(Regression):
    def training_step(self, batch, batch_idx):
        assert isinstance(batch_idx, int)
        return {"loss": self.error(batch), "output": "ignored"}


class WithLoaderIndex(Regression):
    def training_step(self, batch, batch_idx, dataloader_idx=0):
        return self.error(batch) + batch_idx + 10 * dataloader_idx


class OwnHessianLoss(ReturnsLoss):
    def hessian_loss(self, batch):
        return 3 * self.error(batch)


def _regression_batches():
    return ragged(torch.randn(8, 3), torch.randn(8, 1), sizes=(4, 4))


@pytest.mark.parametrize(
    ("kind", "factor", "offset"),
    [
        (ReturnsLoss, 1.0, 0.0),
        (ReturnsMapping, 1.0, 0.0),
        (WithLoaderIndex, 1.0, 0.5),  # the mean of the batch indices 0 and 1
        (OwnHessianLoss, 3.0, 0.0),
    ],
)
def test_the_modules_own_loss_is_found(kind, factor, offset):
    module, batches = kind(), _regression_batches()
    mean = sum(module.error(batch).item() for batch in batches) / 2
    found = value_of(make_objective(module, None, batches))
    assert found == pytest.approx(factor * mean + offset, rel=1e-5)


def test_a_given_loss_comes_before_the_modules_own():
    module, batches = OwnHessianLoss(), _regression_batches()
    objective = make_objective(module, lambda module, batch: 2 * module.error(batch), batches)
    mean = sum(module.error(batch).item() for batch in batches) / 2
    assert value_of(objective) == pytest.approx(2 * mean, rel=1e-5)


class OptimisesManually(ReturnsLoss):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class DrawsItsOwnData(Regression):
    def training_step(self, dataloader_iter):
        return self.error(next(dataloader_iter)[0])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(3, 1), "neither `hessian_loss` nor `training_step`"),
        (OptimisesManually(), "manually"),
        (DrawsItsOwnData(), "dataloader_iter"),
    ],
)
def test_a_module_without_usable_loss_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        resolve_loss(module)


def test_a_loss_that_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match="not callable"):
        resolve_loss(nn.Linear(3, 1), "mse")


class ReturnsNothing(Regression):
    def training_step(self, batch):
        return None


class ReturnsMappingWithoutLoss(Regression):
    def training_step(self, batch):
        return {"nll": self.error(batch)}


@pytest.mark.parametrize("kind", [ReturnsNothing, ReturnsMappingWithoutLoss])
def test_a_training_step_that_skips_the_batch_is_reported(kind):
    with pytest.raises(MeasurementError, match="returned no loss"):
        value_of(make_objective(kind(), None, _regression_batches()))


# Losses that are none ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_fn", "what"),
    [
        (lambda module, x: module(x).squeeze(1), r"\(4,\)"),
        (lambda module, x: module(x).mean().item(), "float"),
        (lambda module, x: None, "NoneType"),
    ],
)
def test_a_loss_that_is_no_scalar_tensor_is_reported(loss_fn, what):
    with pytest.raises(MeasurementError, match=what):
        value_of(make_objective(nn.Linear(3, 1), loss_fn, [torch.randn(4, 3)]))


def test_a_loss_of_one_element_in_any_shape_serves():
    module, x = nn.Linear(3, 1), torch.randn(4, 3)
    objective = make_objective(module, lambda module, x: module(x).mean().reshape(1, 1), [x])
    with objective.isolated():
        assert objective.batch_loss(objective.point(), 0).shape == ()
        assert objective.value() == pytest.approx(module(x).mean().item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_batch(bad):
    module = nn.Linear(3, 1)
    batches = [torch.randn(4, 3), torch.full((4, 3), bad)]
    objective = make_objective(module, lambda module, x: module(x).square().mean(), batches)
    with pytest.raises(MeasurementError, match=r"batch 1 is (nan|inf)"):
        value_of(objective)
