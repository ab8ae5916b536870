"""The gradient of a session and the loss beside the present point, against autograd's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_hessian import LossOptions, MeasurementError, Session

Batch = tuple[Tensor, Tensor]


def _network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def _batches(dtype: torch.dtype = torch.float64) -> list[Batch]:
    torch.manual_seed(2)
    inputs, targets = torch.randn(11, 4, dtype=dtype), torch.randint(3, (11,))
    return list(zip(inputs.split(4), targets.split(4), strict=True))  # the last has three samples


def _loss(module: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def _whole_loss(module: nn.Module, batches: list[Batch]) -> Tensor:
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return _loss(module, (inputs, targets))


def test_the_gradient_is_that_of_the_mean_over_all_samples() -> None:
    module, batches = _network(), _batches()
    expected = torch.autograd.grad(_whole_loss(module, batches), list(module.parameters()))
    with Session(module, _loss, batches) as session:
        found = session.gradient()
    assert torch.allclose(found, torch.cat([part.flatten() for part in expected]), rtol=1e-12)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_gradient_by_some_parameters() -> None:
    module, batches = _network(), _batches()
    expected = torch.autograd.grad(_whole_loss(module, batches), [module[2].weight])[0]
    with Session(module, _loss, batches, parameters="2.weight") as session:
        assert torch.allclose(session.gradient(), expected.flatten(), rtol=1e-12)
        assert session.shard.length == session.operator().shard.length == expected.numel()


def test_a_gradient_in_half_precision_is_computed_in_float32() -> None:
    module, batches = _network(torch.bfloat16), _batches(torch.bfloat16)
    precise = copy.deepcopy(module).float()
    whole = _whole_loss(precise, [(inputs.float(), targets) for inputs, targets in batches])
    expected = torch.autograd.grad(whole, list(precise.parameters()))
    with Session(module, _loss, batches) as session:
        found = session.gradient()
    assert found.dtype is torch.float32
    assert torch.allclose(found, torch.cat([part.flatten() for part in expected]), atol=1e-6)


def test_the_gradient_is_computed_once_and_handed_out_as_a_copy() -> None:
    calls = 0

    def counted(module: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return _loss(module, batch)

    with Session(_network(), counted, _batches()) as session:
        first = session.gradient()
        before = calls
        kept = first.clone()
        first.zero_()
        assert torch.equal(session.gradient(), kept)
        assert calls == before


def test_the_loss_after_a_step_is_that_of_a_module_that_made_it() -> None:
    module, batches = _network(), _batches()
    moved = copy.deepcopy(module).requires_grad_(False)
    flat = nn.utils.parameters_to_vector(moved.parameters())
    step = torch.linspace(-1, 1, len(flat), dtype=flat.dtype)
    nn.utils.vector_to_parameters(flat + step, moved.parameters())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with Session(module, _loss, batches) as session:
        assert session.loss_at(step) == pytest.approx(float(_whole_loss(moved, batches)), rel=1e-12)
        assert session.loss_at(0 * step) == session.loss
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_differences_of_the_loss_are_the_gradient() -> None:
    with Session(_network(), _loss, _batches()) as session:
        direction = torch.randn(session.shard.length, dtype=torch.float64)
        rise = session.loss_at(1e-5 * direction) - session.loss_at(-1e-5 * direction)
        assert rise / 2e-5 == pytest.approx(float(session.gradient() @ direction), rel=1e-6)


def test_a_loss_that_writes_to_its_parameters_is_differentiated_where_they_were() -> None:
    module, batches = _network(), _batches()
    clean = torch.autograd.grad(_whole_loss(module, batches), list(module.parameters()))
    before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()

    def writing(module: nn.Module, batch: Batch) -> Tensor:
        loss = _loss(module, batch)
        with torch.no_grad():
            module[0].weight.mul_(0.5)
        return loss

    with Session(module, writing, batches) as session:
        found = session.gradient()
        loss = session.loss_at(torch.zeros_like(found))
    assert torch.allclose(found, torch.cat([part.flatten() for part in clean]), rtol=1e-12)
    assert loss == pytest.approx(float(_whole_loss(module, batches).detach()), rel=1e-12)
    assert torch.equal(nn.utils.parameters_to_vector(module.parameters()), before)


def test_dropout_draws_the_same_at_every_point() -> None:
    module = nn.Sequential(_network(), nn.Dropout(0.5))
    options = LossOptions(mode="train")
    with Session(module, _loss, _batches(), loss_options=options) as session:
        zero = torch.zeros(session.shard.length, dtype=torch.float64)
        assert session.loss_at(zero) == session.loss_at(zero) == session.loss


def test_what_is_not_finite_is_told() -> None:
    def infinite(module: nn.Module, batch: Batch) -> Tensor:
        return module(batch[0]).abs().sqrt().sum()

    linear = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(linear.weight)  # the root has no derivative there
    batches = [torch.ones(1, 2), torch.ones(1, 2)]
    with (
        Session(linear, lambda m, b: infinite(m, (b, b)), batches) as session,
        pytest.raises(MeasurementError, match="The gradient is NaN or infinite"),
    ):
        session.gradient()
    with (
        Session(linear, lambda m, b: m(b).sum() / 0, batches) as session,
        pytest.raises(MeasurementError, match="loss of probe batch 0 is"),
    ):
        session.gradient()
