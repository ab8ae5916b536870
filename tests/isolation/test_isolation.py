"""Measuring leaves no trace: state, generators, flags, loggers, also when the loss raises."""

from __future__ import annotations

import collections
import copy
import random

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from support.references import mlp
from support.states import assert_same, global_state, measure, module_state
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian.isolation.context import isolated
from lightning_hessian.isolation.held import untouched
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.options import LossOptions
from lightning_hessian.measure.spectrum import hessian_spectrum

ENGINES = ("auto", "linearize", "autograd", "recompute")


class Total(torchmetrics.Metric):
    """A sum and a list, without the checks that look at values."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, value: Tensor) -> None:
        self.total += value
        self.values.append(value)

    def compute(self) -> Tensor:
        return self.total


class Talkative(L.LightningModule):
    """Does in ``training_step`` what modules do there: counts, collects, updates, speaks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)
        )
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.total_loss = Total()
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.mean_loss = torchmetrics.MeanMetric()
        self.collected = torchmetrics.CatMetric()
        self.outputs: list[Tensor] = []
        self.seen: set[int] = set()
        self.last: dict[str, Tensor] = {}
        self.recent = collections.deque(maxlen=3)
        self.best = torch.tensor(1.0)
        self.num_steps = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.num_steps += 1
        logits = self.body(self.frozen(x))
        loss = F.cross_entropy(logits, y) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        self.total_loss.update(loss.detach())
        self.outputs.append(loss)
        self.seen.add(batch_idx)
        self.last["loss"] = loss
        self.recent.append(float(batch_idx))
        self.best.mul_(0.5)
        self.epoch_started = True
        self.log("train_loss", loss)
        self.log_dict({"a": loss, "b": 1.0})
        self.print("loss", loss)
        return loss

    def validate_metrics(self, batch):
        x, y = batch
        logits = self.body(self.frozen(x))
        self.accuracy.update(logits.detach(), y)
        self.mean_loss.update(logits.detach())
        self.collected.update(logits.detach().sum(1))
        return F.cross_entropy(logits, y) + 0 * self.accuracy(logits, y)


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]


@pytest.fixture
def module(batches):
    """A module in the middle of training: gradients, statistics and lists are not empty."""
    torch.manual_seed(0)
    module = Talkative()
    module.outputs.append(torch.ones(2))
    module.last["loss"] = torch.tensor(7.0)
    module.recent.extend([5.0, 6.0, 7.0])
    module.seen.add(99)
    module.accuracy.update(torch.eye(3), torch.tensor([0, 1, 1]))
    module.mean_loss.update(torch.tensor(3.0))
    module.total_loss.update(torch.tensor(3.0))
    module.collected.update(torch.tensor([1.0, 2.0]))
    module.body[0].weight.grad = torch.full((5, 4), 2.0)
    module.body[3].eval()  # a part in another mode than the rest
    return module


# The module -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*eigenvalues converged")
@pytest.mark.parametrize("hvp", ENGINES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_measurement_changes_nothing(module, batches, mode, hvp):
    data = copy.deepcopy(batches)
    before, before_globally = module_state(module), global_state()
    measure(module, batches, loss_options=LossOptions(mode=mode), hvp=hvp, seed=5)
    assert_same(before, module_state(module))
    assert_same(before_globally, global_state())
    assert all(
        torch.equal(a, b)
        for x, y in zip(data, batches, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.filterwarnings("ignore:.*eigenvalues converged")
@pytest.mark.parametrize("hvp", ["auto", "autograd"])
def test_metrics_that_compute_in_the_step_are_as_before(module, batches, hvp):
    before, accuracy = module_state(module), module.accuracy.compute()
    module.accuracy._computed = None
    hessian_spectrum(
        module,
        Talkative.validate_metrics,
        batches,
        num_eigenvalues=2,
        trace_probes=0,
        hvp=hvp,
        budget=Budget(products=6),
    )
    assert_same(before, module_state(module))
    assert module.accuracy.compute() == accuracy
    module.accuracy.update(torch.eye(3), torch.tensor([0, 1, 2]))  # and still usable
    assert float(module.accuracy.compute()) == pytest.approx(5 / 6)


@pytest.mark.filterwarnings("ignore:.*eigenvalues converged")
@pytest.mark.parametrize("hvp", ENGINES)
@pytest.mark.parametrize("fail_at", [1, 2, 3, 4, 5])
def test_a_loss_that_raises_changes_nothing(module, batches, fail_at, hvp):
    calls = 0

    def fragile(module, batch):
        nonlocal calls
        calls += 1
        loss = module.training_step(batch, 0)
        if calls == fail_at:
            raise KeyError("no such sample")
        return loss

    before, before_globally = module_state(module), global_state()
    with pytest.raises(KeyError, match="no such sample"):
        hessian_spectrum(
            module,
            fragile,
            batches,
            num_eigenvalues=3,
            trace_probes=2,
            hvp=hvp,
            budget=Budget(products=8),
            loss_options=LossOptions(mode="train"),
        )
    assert_same(before, module_state(module))
    assert_same(before_globally, global_state())


class Collecting(nn.Module):
    """A module whose loss does one thing more to it."""

    def __init__(self, side_effect) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.teacher = nn.Linear(3, 2).requires_grad_(False)
        self.embedding = nn.Embedding(5, 3, max_norm=0.5)
        self.register_buffer("average", None)
        self.register_buffer("total", torch.zeros(2))
        self.by_stage = {"train": [1.0], "val": []}
        self.by_name = collections.defaultdict(list, loss=[2.0])
        self.counts = np.zeros(3)
        self.side_effect = side_effect

    def hessian_loss(self, x):
        output = self.layer(x)
        self.side_effect(self, output.detach())
        return output.square().mean()


@torch.no_grad()
def _update_teacher(module, output):
    for teacher, student in zip(
        module.teacher.parameters(), module.layer.parameters(), strict=True
    ):
        teacher.mul_(0.9).add_(student.detach(), alpha=0.1)


@torch.no_grad()
def _clamp_weights(module, output):
    module.layer.weight.clamp_(-0.01, 0.01)


def _set_average(module, output):
    module.average = output.mean(0)


def _add_to_total(module, output):
    module.total += output.mean(0)


def _replace_total(module, output):
    module.total = 0.9 * module.total + output.mean(0)


SIDE_EFFECTS = {
    "list in a dict": lambda module, output: module.by_stage["train"].append(output),
    "defaultdict of lists": lambda module, output: module.by_name["loss"].append(3.0),
    "new key": lambda module, output: module.by_name["other"],
    "array": lambda module, output: module.counts.__iadd__(1),
    "buffer in place": _add_to_total,
    "buffer replaced": _replace_total,
    "buffer that was None": _set_average,
    "momentum teacher": _update_teacher,
    "clamped weights": _clamp_weights,
    "embedding with max_norm": lambda module, output: module.embedding(torch.arange(5)),
    "new attribute": lambda module, output: setattr(module, "stamp", 1),
    "deleted attribute": lambda module, output: vars(module).pop("counts", None),
}


@pytest.mark.filterwarnings("ignore:.*eigenvalues converged")
@pytest.mark.parametrize("parameters", [None, "layer.*"], ids=["all", "some"])
@pytest.mark.parametrize("effect", SIDE_EFFECTS)
def test_a_loss_may_write_into_its_module(effect, parameters):
    torch.manual_seed(0)
    module = Collecting(SIDE_EFFECTS[effect])
    before = module_state(module)
    hessian_spectrum(
        module, None, [torch.randn(4, 3)], num_eigenvalues=1, trace_probes=0, hvp="autograd",
        parameters=parameters,
    )  # fmt: skip
    assert_same(before, module_state(module))


def test_untouched_puts_back_replaced_and_new_attributes_when_the_block_raises():
    module = nn.Sequential(nn.Linear(2, 2))
    module.history = [1]
    before = module_state(module)

    def write_and_fail():
        with untouched(module):
            module.history.append(2)
            module[0].note = "new"
            module.history = "replaced"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert_same(before, module_state(module))
    assert module.history == [1]


# Generators, modes and flags --------------------------------------------------------------------


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_isolated_restores_generators_modes_and_flags(training, raises):
    module = nn.Sequential(nn.LSTM(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    module[2].eval()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 3
    try:
        before, modes = global_state(), [m.training for m in module.modules()]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            inside = global_state()
            try:
                with isolated(module, training=training):
                    assert torch.is_grad_enabled()
                    assert not torch.is_autocast_enabled("cpu")
                    assert module.training == training
                    assert not module[2][0].training  # frozen by the user
                    random.random(), np.random.rand(), torch.rand(1)
                    if raises:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            assert_same(inside, global_state())
        assert_same(before, global_state())
        assert [m.training for m in module.modules()] == modes
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.mha.set_fastpath_enabled(True)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = False, 10


def test_a_module_in_evaluation_mode_stands_in_training_mode_inside():
    """Callbacks run in the middle of validation, where the whole module is in evaluation mode."""
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).eval()
    module.append(nn.Linear(2, 2))
    with isolated(module, training=True):
        assert all(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == [False, False, False, True]


def test_modes_are_set_without_calling_an_overridden_train():
    class Loud(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("train() was called")

    with isolated(Loud(2, 2), training=False):
        pass


@pytest.mark.filterwarnings("ignore:.*eigenvalues converged")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_is_as_before(module, batches, context):
    with context():
        before = global_state()
        measure(module, batches)
        assert_same(before, global_state())


def test_attention_has_a_second_derivative_inside():
    module = nn.TransformerEncoderLayer(4, 2, dim_feedforward=4, batch_first=True)
    x = torch.randn(2, 3, 4)
    with isolated(module):
        first = torch.autograd.grad(module(x).sum(), list(module.parameters()), create_graph=True)
        sum(part.square().sum() for part in first).backward(inputs=list(module.parameters()))
    module.zero_grad()


def test_a_compiled_module_runs_uncompiled_inside_and_compiled_again_afterwards():
    problem, graphs = mlp(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(problem.module, backend=backend)
    with isolated(compiled):
        compiled(problem.whole[0])
    assert not graphs
    compiled(problem.whole[0])
    assert graphs


def test_a_lightning_module_without_trainer_can_be_measured():
    class Alone(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch):
            loss = self.layer(batch).square().mean()
            self.log("loss", loss)
            self.print("loss", loss)
            return loss

    measure(Alone(), [torch.randn(5, 2)], num_eigenvalues=1)
