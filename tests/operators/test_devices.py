"""No path mixes devices, and a Lanczos step waits for the card once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.pretend_card import CARD, MixedDevicesError, PretendCard
from support.references import PROBLEMS, problem
from torch import nn

from lightning_hessian import (
    BasisStorage,
    PooledSLQ,
    block_structure,
    gradient_structure,
    hessian_spectrum,
    layer_spectra,
)
from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.losses import linear_cross_entropy
from lightning_hessian.operators.gauss_newton import GaussNewtonOperator
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.solvers.lanczos import lanczos

ENGINES = ("linearize", "autograd", "recompute", "finite_difference", "auto")


MEASURED = ("mlp", "batch_norm", "convolution", "multihead_attention")


@pytest.fixture(scope="module")
def top() -> dict[str, np.ndarray]:
    """The largest eigenvalues of dense Hessians, found before anything is pretended."""
    matrices = {name: problem(name).hessian() for name in MEASURED}
    return {n: torch.linalg.eigvalsh(m).flip(0)[:3].numpy() for n, m in matrices.items()}


@pytest.fixture
def card(top: dict[str, np.ndarray]) -> Iterator[PretendCard]:
    with PretendCard() as card:
        yield card


def on_card(name: str, card: PretendCard) -> tuple[nn.Module, Any, Any]:
    """Returns a network on the card, its loss, and batches on the host."""
    made = problem(name)
    module = made.module
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                card.tag(parameter, CARD)
        for buffer in owner._buffers.values():
            if buffer is not None:
                card.tag(buffer, CARD)
    for batch in made.batches:
        for tensor in batch:
            card.tag(tensor, torch.device("cpu"))
    return module, made.loss_fn, made.batches


# The pretence detects what it is for -------------------------------------------------------------


def test_it_detects_a_mix(card: PretendCard) -> None:
    here, there = torch.ones(3), torch.ones(3, device=CARD)
    assert (there + there).device == CARD
    assert (there * torch.tensor(2.0)).device == CARD  # a number of the host goes everywhere
    with pytest.raises(MixedDevicesError):
        there + here
    with pytest.raises(MixedDevicesError):
        torch.vmap(lambda row: row + here)(there.new_zeros(2, 3))
    with pytest.raises(MixedDevicesError):
        torch.func.grad(lambda x: (x @ here).sum())(there)
    with pytest.raises(MixedDevicesError):
        here[torch.tensor([0], device=CARD)]
    with pytest.raises(TypeError):
        there.numpy()
    with pytest.raises(MixedDevicesError):
        torch.randn(3, generator=torch.Generator(), device=CARD)
    assert (there + here.to(there.device)).tolist() == [2, 2, 2]


def test_it_counts_waits(card: PretendCard) -> None:
    there = torch.ones(3, device=CARD)
    for wait in (
        lambda: float(there.sum()),
        lambda: bool(there.any()),
        lambda: there.cpu(),
        lambda: there[there > 0],
        lambda: there.nonzero(),
        lambda: torch.empty(3).copy_(there),
    ):
        before = len(card.waits)
        wait()
        assert len(card.waits) > before
    before = len(card.waits)
    there.add_(there).norm()
    assert len(card.waits) == before


def test_it_detects_a_loss_that_mixes(card: PretendCard) -> None:
    """A constant on the host in the user's loss, as users write them."""
    module, loss_fn, batches = on_card("mlp", card)
    weights = torch.ones(3)

    def mixing(module: nn.Module, batch: Any) -> torch.Tensor:
        return loss_fn(module, batch) + (module(batch[0]) * weights).mean()

    with pytest.raises((MixedDevicesError, RuntimeError), match="same device"):
        hessian_spectrum(module, mixing, batches, num_eigenvalues=2)


# Nothing mixes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MEASURED)
def test_engines(name: str, engine: str, card: PretendCard, top: dict[str, np.ndarray]) -> None:
    if (name, engine) == ("convolution", "finite_difference"):
        pytest.skip("its max-pooling is too rough for differences in float32")
    module, loss_fn, batches = on_card(name, card)
    found = hessian_spectrum(module, loss_fn, batches, num_eigenvalues=3, hvp=engine, tol=1e-4)
    assert found.engine.startswith(engine if engine != "auto" else "")
    np.testing.assert_allclose(found.eigenvalues, top[name], rtol=5e-3)


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_several_vectors_at_once(name: str, card: PretendCard) -> None:
    module, loss_fn, batches = on_card(name, card)
    if problem(name).mode == "train":
        pytest.skip("the front door measures in evaluation mode")
    space = ParameterSpace.select(module)
    objective = Objective(module, loss_fn, batches, space)
    with objective.isolated():
        operator = HessianOperator(objective, "autograd")
        vectors = torch.randn(5, operator.size).to(CARD)
        found = operator.matmat(vectors)
        assert found.device == CARD
        one = torch.stack([operator.matvec(vector) for vector in vectors])
    torch.testing.assert_close(found.cpu(), one.cpu(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "basis",
    [
        BasisStorage(tier="cpu"),
        BasisStorage(tier="disk"),
        BasisStorage(dtype="bfloat16"),
        BasisStorage(memory=2500.0, tier="device"),
    ],
)
def test_bases(basis: BasisStorage, card: PretendCard, top: dict[str, np.ndarray]) -> None:
    module, loss_fn, batches = on_card("mlp", card)
    found = hessian_spectrum(module, loss_fn, batches, num_eigenvalues=3, basis=basis)
    np.testing.assert_allclose(found.eigenvalues, top["mlp"], rtol=1e-2)


@pytest.mark.parametrize("engine", ["autograd", "recompute"])
def test_gauss_newton(engine: str, card: PretendCard) -> None:
    module, loss_fn, batches = on_card("mlp", card)
    found = hessian_spectrum(
        module, loss_fn, batches, num_eigenvalues=3, matrix="gauss_newton", hvp=engine
    )
    assert found.num_converged == 3


@pytest.mark.parametrize("blocks", ["layer", "neuron", "class"])
def test_blocks(blocks: str, card: PretendCard) -> None:
    module, loss_fn, batches = on_card("mlp", card)
    found = block_structure(module, loss_fn, batches, blocks=blocks)
    assert found.frobenius.shape[0] > 1


def test_layers_and_views(card: PretendCard) -> None:
    module, loss_fn, batches = on_card("mlp", card)
    found = layer_spectra(
        module, loss_fn, batches, layers={"first": "0.*", "second": "2.*"}, num_eigenvalues=2
    )
    assert len(found) == 2


def test_gradients(card: PretendCard) -> None:
    module, loss_fn, batches = on_card("mlp", card)
    gradient_structure(module, loss_fn, batches, tests=False)


def test_papers_protocol(card: PretendCard) -> None:
    module, loss_fn, batches = on_card("mlp", card)
    protocol = PooledSLQ(num_runs=2, num_steps=10)
    hessian_spectrum(module, loss_fn, batches, num_eigenvalues=3, protocol=protocol)


def test_losses_of_language_models(card: PretendCard) -> None:
    module = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)).to(CARD)
    tokens = torch.randint(11, (4, 6))

    def loss_fn(module: nn.Sequential, batch: Any) -> torch.Tensor:
        return linear_cross_entropy(module[0](batch), module[1].weight, batch, chunk_size=7)

    found = hessian_spectrum(module, loss_fn, [tokens], num_eigenvalues=2)
    assert found.num_converged == 2


# One wait a step -------------------------------------------------------------------------------


def steps_and_waits(operator: Any, card: PretendCard, steps: int, **options: Any) -> int:
    """Returns how often the host waited in so many steps, the beginning and the end left out."""
    counts = []
    for count in (10, 10 + steps):
        before = len(card.waits)
        lanczos(
            operator, 5, tol=1e-15, max_products=count, max_basis=60, num_checks=0, **options
        )  # fmt: skip
        counts.append(len(card.waits) - before)
    return counts[1] - counts[0]


def test_lanczos_waits_once_a_step(card: PretendCard) -> None:
    matrix = torch.randn(80, 80).to(CARD)
    operator = MatrixOperator(matrix + matrix.T)
    assert steps_and_waits(operator, card, 20) <= 20, card.waits[-8:]


@pytest.mark.parametrize("engine", ["linearize", "autograd", "recompute", "finite_difference"])
def test_products_wait_never(engine: str, card: PretendCard) -> None:
    module, loss_fn, batches = on_card("mlp", card)
    space = ParameterSpace.select(module)
    objective = Objective(module, loss_fn, batches, space)
    with objective.isolated():
        operator = HessianOperator(objective, engine)
        vector = torch.randn(operator.size).to(CARD)
        operator.matvec(vector)
        before = len(card.waits)
        operator.matvec(vector)
        assert card.waits[before:] == []


@pytest.mark.parametrize("engine", ["autograd", "recompute"])
def test_products_with_the_gauss_newton_matrix_wait_never(engine: str, card: PretendCard) -> None:
    module, loss_fn, batches = on_card("mlp", card)
    objective = Objective(module, loss_fn, batches, ParameterSpace.select(module))
    with objective.isolated():
        operator = GaussNewtonOperator(objective, engine)
        vector = torch.randn(operator.size).to(CARD)
        operator.matvec(vector)
        before = len(card.waits)
        operator.matvec(vector)
        assert card.waits[before:] == []
