"""Stability against dense matrices: the sharpness under every optimizer, the update, the span."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.optimizers import VARIANTS, stepped
from support.references import Problem, dense_hessian, flat_loss
from support.stability import EXACT, in_float64, largest, loss_of, measured
from torch import nn

from lightning_hessian import (
    ArgumentError,
    Session,
    SpectrumInstrument,
    StabilityInstrument,
    Training,
)
from lightning_hessian.linear.allowance import Allowance


@pytest.fixture(scope="module")
def trained() -> Problem:
    """A dense network in float64, after some steps."""
    return in_float64()


# Under every optimizer ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_the_sharpness_is_that_of_the_dense_matrices(trained: Problem, name: str) -> None:
    variant, module = VARIANTS[name], copy.deepcopy(trained.module)
    optimizer, seen = stepped(module, loss_of(trained, module), variant)
    found = measured(trained, module, optimizer)
    hessian = dense_hessian(module, trained.loss_fn, trained.whole)
    root = variant.diagonal(seen).rsqrt()
    whole = variant.sign * hessian + variant.coupled * torch.eye(len(root))
    sharpness = largest(root[:, None] * whole * root)
    assert found.absent() == ()
    values = found.scalars()
    assert values["sharpness"] == pytest.approx(sharpness, rel=1e-6)
    assert values["threshold"] == pytest.approx(variant.threshold, rel=1e-6)
    assert values["ratio"] == pytest.approx(sharpness / variant.threshold, rel=1e-6)
    assert values["lambda_1"] == pytest.approx(largest(hessian), rel=1e-6)
    assert values["sharpness_residual"] <= 1e-6 * sharpness


def test_groups_of_their_own_rates_betas_and_decays(trained: Problem) -> None:
    """Each entry has its own threshold; the ratio is that of all, by the dense matrices."""
    module = copy.deepcopy(trained.module)
    first, second = [*module[0].parameters()], [*module[2].parameters()]
    optimizer = torch.optim.Adam(
        [
            {"params": first, "lr": 0.01, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.3},
            {"params": second, "lr": 0.03, "betas": (0.5, 0.99), "eps": 0.2},
        ]
    )
    split = sum(p.numel() for p in first)
    beta = torch.where(torch.arange(57) < split, 0.9, 0.99).double()
    squares = torch.zeros(57, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(trained, module)().backward()
        grads = [p.grad.clone() for p in module.parameters()]
        for grad, p in zip(grads[:2], first, strict=True):
            grad += 0.3 * p.detach()
        flat = torch.cat([g.reshape(-1) for g in grads])
        squares = beta * squares + (1 - beta) * flat**2
        optimizer.step()
    of_first = torch.arange(57) < split
    mean = torch.where(of_first, 0.8, 0.5).double()
    root = (squares / (1 - beta**5)).sqrt() + torch.where(of_first, 0.1, 0.2)
    over = (2 + 2 * mean) / ((1 - mean) * torch.where(of_first, 0.01, 0.03))
    scale = (over * (1 - mean**5) * root).rsqrt()
    hessian = dense_hessian(module, trained.loss_fn, trained.whole)
    hessian += torch.diag(torch.where(of_first, 0.3, 0.0).double())
    values = measured(trained, module, optimizer).scalars()
    ratio = largest(scale[:, None] * hessian * scale)
    assert values["ratio"] == pytest.approx(ratio, rel=1e-6)
    assert values["threshold"] == pytest.approx(3.6 / (0.2 * 0.01))  # of 36 numbers among 57
    assert values["sharpness"] == pytest.approx(ratio * values["threshold"], rel=1e-6)


def test_several_optimizers_and_parameters_of_none(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    one = torch.optim.SGD([module[0].weight], lr=0.1)
    other = torch.optim.SGD([module[2].weight, module[2].bias], lr=0.4, momentum=0.9)
    hessian = dense_hessian(module, trained.loss_fn, trained.whole)
    scale = torch.cat([torch.full((30,), 0.1 / 2), torch.zeros(6), torch.full((21,), 0.4 / 3.8)])
    root = scale.double().sqrt()
    values = measured(trained, module, one, other).scalars()
    assert values["ratio"] == pytest.approx(largest(root[:, None] * hessian * root), rel=1e-6)
    assert values["lambda_1"] == pytest.approx(largest(hessian), rel=1e-6)


def test_only_the_selected_parameters(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    values = measured(trained, module, optimizer, parameters="2.*").scalars()
    block = dense_hessian(module, trained.loss_fn, trained.whole)[36:, 36:]
    assert values["lambda_1"] == pytest.approx(largest(block), rel=1e-6)
    assert values["ratio"] == pytest.approx(largest(block) / 20, rel=1e-6)


def test_a_scheduler_is_followed(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    first = measured(trained, module, optimizer).scalars()
    optimizer.step()
    scheduler.step()
    second = measured(trained, module, optimizer).scalars()
    assert (first["threshold"], second["threshold"]) == (20.0, 40.0)
    assert second["ratio"] == pytest.approx(first["ratio"] / 2)


def test_the_hessian_is_measured_where_the_session_is_one_of_gauss_newton(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    training = Training((torch.optim.SGD(module.parameters(), lr=0.1),))
    with Session(
        module, trained.loss_fn, trained.batches, training=training, matrix="gauss_newton"
    ) as session:
        SpectrumInstrument(num_eigenvalues=3, trace_probes=0).measure(session, Allowance())
        values = StabilityInstrument(**EXACT).measure(session, None).scalars()
    hessian = dense_hessian(module, trained.loss_fn, trained.whole)
    assert values["lambda_1"] == pytest.approx(largest(hessian), rel=1e-6)


def test_plain_sgd_takes_one_solve_for_both(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.2)
    mixed = torch.optim.SGD(
        [{"params": module[0].parameters(), "lr": 0.1}, {"params": module[2].parameters()}], lr=0.2
    )
    one, two = (measured(trained, module, each).scalars() for each in (sgd, mixed))
    assert one["sharpness"] == pytest.approx(one["lambda_1"] + 0.2)
    assert one["num_hvps"] < 0.7 * two["num_hvps"]


# Nothing to say -----------------------------------------------------------------------------------


def test_without_an_optimizer_nothing_is_said(trained: Problem) -> None:
    for training in (None, Training()):
        with Session(
            trained.module, trained.loss_fn, trained.batches, training=training
        ) as session:
            found = StabilityInstrument().measure(session, None)
            assert (dict(found.scalars()), tuple(found.absent())) == ({}, ())
            assert StabilityInstrument().cost(session) == 0


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad"])
def test_before_the_first_step_there_is_no_preconditioner(trained: Problem, kind: str) -> None:
    module = copy.deepcopy(trained.module)
    found = measured(trained, module, getattr(torch.optim, kind)(module.parameters()))
    assert found.absent() == (
        f"{kind} has not made a step yet, so there is no sharpness under its preconditioner.",
    )
    assert "lambda_1" in found.scalars()
    assert not {"sharpness", "ratio", "threshold"} & found.scalars().keys()


# The update ---------------------------------------------------------------------------------------


def test_the_update_by_dense_matrices_and_by_the_loss_itself(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    loss_of(trained, module)().backward()
    optimizer.step()
    update = {name: p.detach() - before[name] for name, p in module.named_parameters()}
    values = measured(trained, module, optimizer, update=update).scalars()
    u = torch.cat([part.reshape(-1) for part in update.values()])
    loss, point = flat_loss(module, trained.loss_fn, trained.whole)
    hessian = dense_hessian(module, trained.loss_fn, trained.whole)
    gradient = torch.func.grad(loss)(point)
    curved = float(u @ hessian @ u)
    assert values["update_curvature"] == pytest.approx(curved / float(u @ u), rel=1e-9)
    predicted = float(gradient @ u) + curved / 2
    assert values["predicted_change"] == pytest.approx(predicted, rel=1e-9)
    actual = float(loss(point + u) - loss(point))
    assert values["actual_change"] == pytest.approx(actual, rel=1e-9)
    # What is between them is of third order: an eighth where the update is half.
    halved = {name: part / 2 for name, part in update.items()}
    half = measured(trained, module, optimizer, update=halved).scalars()
    errors = [abs(v["actual_change"] - v["predicted_change"]) for v in (values, half)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.05)
    assert torch.equal(point, torch.cat([p.detach().reshape(-1) for p in module.parameters()]))


def test_an_update_of_zero_has_no_curvature(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    update = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    found = measured(trained, module, torch.optim.SGD(module.parameters(), lr=0.1), update=update)
    assert found.absent() == ("The last update has moved no parameter, so it has no curvature.",)
    assert "update_curvature" not in found.scalars()


# The span -----------------------------------------------------------------------------------------


def with_spectrum(
    given: Problem, module: nn.Module, instrument: Any, update: Any
) -> dict[str, Any]:
    training = Training((torch.optim.SGD(module.parameters(), lr=0.1),), update)
    with Session(module, given.loss_fn, given.batches, training=training) as session:
        spectrum = SpectrumInstrument(num_eigenvalues=13, tol=1e-9, trace_probes=0)
        spectrum.measure(session, Allowance())
        return dict(instrument.measure(session, Allowance()).scalars())


def test_the_span_of_a_whole_spectrum(trained: Problem) -> None:
    """Shares, angle and its bound are those of dense eigenvectors; the bound does bound."""
    module = copy.deepcopy(trained.module)
    instrument, spans, hessians = StabilityInstrument(**EXACT), [], []
    torch.manual_seed(3)
    update = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    u = torch.cat([part.reshape(-1) for part in update.values()])
    for size in (0.0, 1e-4, 3e-2):
        with torch.no_grad():
            for name, p in module.named_parameters():
                p += size * update[name]
        values = with_spectrum(trained, module, instrument, update)
        loss, point = flat_loss(module, trained.loss_fn, trained.whole)
        hessians.append(dense_hessian(module, trained.loss_fn, trained.whole))
        eigenvalues, vectors = torch.linalg.eigh(hessians[-1])
        spans.append(vectors[:, -10:])
        gradient = torch.func.grad(loss)(point)
        assert values["num_leading"] == 10
        for name, vector in (("gradient_share", gradient), ("update_share", u)):
            share = float((spans[-1].T @ vector).square().sum() / vector.square().sum())
            assert values[name] == pytest.approx(share, rel=1e-6)
        if len(spans) == 1:
            assert "drift" not in values
            continue
        cosine = float(torch.linalg.svdvals(spans[-1].T @ spans[-2])[-1])
        assert values["drift"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-4)
        old = spans[-2]
        middle = old.T @ hessians[-1] @ old
        rest = torch.linalg.matrix_norm(hessians[-1] @ old - old @ middle, 2)
        gap = torch.linalg.eigvalsh(middle)[0] - eigenvalues[-11]
        bound = math.degrees(math.asin(float(rest / gap))) if rest < gap else 90.0
        assert values["drift_bound"] == pytest.approx(bound, rel=1e-4)
        assert values["drift"] <= values["drift_bound"]
    assert values["drift"] > 1


def test_between_whole_spectra_the_span_is_the_last_one(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    instrument = StabilityInstrument(**EXACT)
    with_spectrum(trained, module, instrument, None)
    span = torch.linalg.eigh(dense_hessian(module, trained.loss_fn, trained.whole))[1][:, -10:]
    with torch.no_grad():
        for p in module.parameters():
            p *= 1.1
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    values = measured(trained, module, optimizer, instrument=instrument).scalars()
    loss, point = flat_loss(module, trained.loss_fn, trained.whole)
    gradient = torch.func.grad(loss)(point)
    share = float((span.T @ gradient).square().sum() / gradient.square().sum())
    assert values["gradient_share"] == pytest.approx(share, rel=1e-6)
    assert "drift" not in values


def test_without_a_spectrum_it_is_the_leading_vector_alone(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    instrument = StabilityInstrument(**EXACT)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    vectors = []
    for _ in range(2):
        values = measured(trained, module, optimizer, instrument=instrument).scalars()
        hessian = dense_hessian(module, trained.loss_fn, trained.whole)
        vectors.append(torch.linalg.eigh(hessian)[1][:, -1])
        with torch.no_grad():
            for p in module.parameters():
                p *= 1.05
    angle = math.degrees(math.acos(abs(float(vectors[0] @ vectors[1]))))
    assert values["num_leading"] == 1
    assert values["drift"] == pytest.approx(angle, rel=1e-4)


# Products -----------------------------------------------------------------------------------------


def sessions_of_adamw(given: Problem, lr: float, count: int) -> Iterator[tuple[Session, Allowance]]:
    """A session after each step of AdamW, with an update, and the account of its products."""
    module = copy.deepcopy(given.module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    for _ in range(count):
        module.zero_grad()
        loss_of(given, module)().backward()
        optimizer.step()
        update = {name: torch.ones_like(p) for name, p in module.named_parameters()}
        training, allowance = Training((optimizer,), update), Allowance()
        with Session(module, given.loss_fn, given.batches, training=training) as session:
            session.spend_from(allowance)
            yield session, allowance


def test_the_account_is_kept(trained: Problem) -> None:
    """Starting where it ended before, it takes few products, never more than it may."""
    instrument, counts = StabilityInstrument(max_products=10), []
    for session, allowance in sessions_of_adamw(trained, 1e-3, 6):
        values = instrument.measure(session, allowance).scalars()
        assert instrument.cost(session) == 10
        assert values["num_hvps"] == allowance.spent
        counts.append(allowance.spent)
    assert counts[0] <= 30
    assert max(counts[1:]) <= 10
    assert np.median(counts[1:]) <= 8


def test_what_it_will_take_is_told_before(trained: Problem) -> None:
    """From nothing, beside a whole spectrum, and with the bound of the drift since the last one."""
    instrument, told, taken = StabilityInstrument(max_products=10), [], []
    for session, allowance in sessions_of_adamw(trained, 1e-4, 3):
        if told:
            SpectrumInstrument(num_eigenvalues=13, trace_probes=0).measure(session, allowance)
        told.append(instrument.cost(session))
        assert instrument.cost_between(session) == 10
        taken.append(instrument.measure(session, allowance).scalars()["num_hvps"])
    assert told == [30, 30, 40]
    assert all(spent <= most for spent, most in zip(taken, told, strict=True))
    assert taken[1] <= 10  # it starts from the vectors of the spectrum


def test_what_the_bound_cuts_off_is_told_with_its_residual(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    instrument = StabilityInstrument(tol=1e-12, max_products=3)
    found = measured(trained, module, sgd, instrument=instrument)
    found = measured(trained, module, sgd, instrument=instrument)
    (said,) = found.absent()
    assert "The residual of stability/lambda_1 is above" in said
    values = found.scalars()
    true = torch.linalg.eigvalsh(dense_hessian(module, trained.loss_fn, trained.whole))
    assert values["num_hvps"] == 3
    assert float((true - values["lambda_1"]).abs().min()) <= values["lambda_1_residual"]


def test_a_budget_of_products_is_kept(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    training = Training((torch.optim.SGD(module.parameters(), lr=0.1),))
    with Session(module, trained.loss_fn, trained.batches, training=training) as session:
        allowance = Allowance(products=2)
        session.spend_from(allowance)
        found = StabilityInstrument().measure(session, allowance)
    assert allowance.spent == 0
    assert any("too few products for stability/lambda_1" in said for said in found.absent())


def test_the_same_again_to_the_last_digit(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    instrument = StabilityInstrument()
    first = dict(measured(trained, module, sgd, instrument=instrument).scalars())
    measured(trained, module, sgd, instrument=instrument)
    instrument.check(module)  # as at the begin of a fit
    assert measured(trained, module, sgd, instrument=instrument).scalars() == first


@pytest.mark.parametrize("wrong", [{"tol": 0.0}, {"max_products": 2}, {"parameters": 3}])
def test_misuse(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        StabilityInstrument(**wrong)
