"""One session: built once for all instruments, isolated, and nothing left behind."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from support.references import cross_entropy, dense_hessian, mlp, problem
from torch import Tensor, nn

from lightning_hessian.measure import session as room
from lightning_hessian.measure.blocks import BlocksInstrument
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.instrument import Instrument, Scalars
from lightning_hessian.measure.layers import LayersInstrument
from lightning_hessian.measure.options import LossOptions
from lightning_hessian.measure.session import Knowledge, Session
from lightning_hessian.measure.spectrum import SpectrumInstrument
from lightning_hessian.results import ArgumentError, MeasurementError


@pytest.fixture
def given():
    return mlp_of(0)


def mlp_of(seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp()


# Isolated, and as before ------------------------------------------------------------------------


class Busy(nn.Module):
    """Counts its calls, averages its inputs, draws and switches: as losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(5, 3)
        self.calls = 0
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.last(self.dropout(torch.tanh(self.norm(self.first(x)))))


def state_of(module: nn.Module) -> dict:
    """Returns what a session might leave behind, by value and by place."""
    held = [*module.named_parameters(), *module.named_buffers()]
    return {
        "values": {name: value.tolist() for name, value in held},
        "places": {name: (id(value), value.data_ptr()) for name, value in held},
        "gradients": {name: id(p.grad) for name, p in module.named_parameters()},
        "wanted": {name: p.requires_grad for name, p in module.named_parameters()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "calls": module.calls,
        "drawing": torch.get_rng_state().tolist(),
        "gradient mode": torch.is_grad_enabled(),
    }


def busy() -> tuple[Busy, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    module = Busy()
    module.norm.eval()  # a part in another mode than the rest
    module.first.weight.grad = torch.ones(5, 4)
    module.last.bias.requires_grad_(False)
    return module, [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("hvp", ["autograd", "recompute"])
def test_the_module_is_isolated_and_afterwards_as_before(hvp, mode):
    module, batches = busy()
    before = state_of(module)
    with Session(
        module, cross_entropy, batches, hvp=hvp, loss_options=LossOptions(mode)
    ) as session:
        operator = session.operator()
        assert module.training == (mode == "train")
        operator.matvec(torch.ones(operator.size))
        session.operator(["first.weight"]).matvec(torch.ones(20))
        assert session.space.names[-1] == "last.weight"  # the frozen one is no variable
    assert state_of(module) == before


@pytest.mark.parametrize("when", ["nothing was asked for", "the loss", "the operator", "a product"])
def test_it_is_as_before_where_the_block_raises(when):
    module, batches = busy()
    before = state_of(module)

    def fail() -> None:
        with Session(module, cross_entropy, batches) as session:
            if when == "the loss":
                _ = session.loss
            if when in ("the operator", "a product"):
                operator = session.operator()
            if when == "a product":
                operator.matvec(torch.ones(operator.size))
            raise KeyError("halfway")

    with pytest.raises(KeyError, match="halfway"):
        fail()
    assert state_of(module) == before


def test_nothing_is_evaluated_before_somebody_asks(given):
    module, batches = busy()
    with Session(module, cross_entropy, batches) as session:
        assert session.space.size == 5 * 4 + 5 + 10 + 15
        assert module.calls == 0
        assert module.training  # nor isolated, which copies


# Built once -------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """How often a session has made an objective, and an operator."""
    count = SimpleNamespace(objectives=0, operators=0)
    objective_over, hessian_operator = room.objective_over, room.hessian_operator

    def an_objective(*args, **options):
        count.objectives += 1
        return objective_over(*args, **options)

    def an_operator(*args, **options):
        count.operators += 1
        return hessian_operator(*args, **options)

    monkeypatch.setattr(room, "objective_over", an_objective)
    monkeypatch.setattr(room, "hessian_operator", an_operator)
    return count


class LossInstrument:
    """One of a user's own: the loss, the sharpness along the first coordinate, and a block's."""

    name = prefix = "mine"

    def check(self, model: nn.Module) -> None:
        pass

    def cost(self, session: Session) -> int:
        return 2

    def measure(self, session: Session, allowance) -> Scalars:
        first = torch.zeros(session.space.size)
        first[0] = 1
        last = session.operator(["2.bias"])
        along = torch.zeros(last.size)
        along[0] = 1
        return Scalars(
            {
                "loss": session.loss,
                "corner": float(session.operator().matvec(first)[0]),
                "bias": float(last.matvec(along)[0]),
            }
        )


def test_objective_and_operator_are_built_once_whatever_is_measured(given, built):
    instruments = (
        SpectrumInstrument(num_eigenvalues=3, density=True),
        LayersInstrument(spectrum=SpectrumInstrument(num_eigenvalues=2)),
        BlocksInstrument(exact=False, densities=True),
        LossInstrument(),
    )
    with Session(given.module, given.loss_fn, given.batches) as session:
        allowance = Budget().open(session)
        found = [instrument.measure(session, allowance) for instrument in instruments]
        assert session.operator(["0.weight"]) is session.operator(["0.weight"])
        assert session.operator(session.space.names) is session.operator()
    assert (built.objectives, built.operators) == (1, 1)
    assert all(isinstance(instrument, Instrument) for instrument in instruments)
    # And what they found is that of the dense Hessian.
    hessian = dense_hessian(given.module, given.loss_fn, given.whole)
    exact = scipy.linalg.eigvalsh(hessian.numpy())[::-1]
    spectrum, layers, _, mine = (record.scalars() for record in found)
    assert spectrum["lambda_1"] == pytest.approx(exact[0], rel=1e-4)
    last = scipy.linalg.eigvalsh(hessian[36:, 36:].numpy())[-1]
    assert layers["lambda_1_2"] == pytest.approx(last, rel=1e-4)
    assert mine["corner"] == pytest.approx(float(hessian[0, 0]), rel=1e-4)
    assert mine["bias"] == pytest.approx(float(hessian[54, 54]), rel=1e-4)
    loss = given.loss_fn(given.module, given.whole).item()
    assert mine["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_loss_asked_for_alone_builds_no_operator(given, built):
    with Session(given.module, given.loss_fn, given.batches) as session:
        assert session.loss == session.loss
    assert (built.objectives, built.operators) == (1, 0)


@pytest.mark.parametrize(
    ("broken", "message"), [(math.nan, "is nan.*learning rate"), (math.inf, "is inf|is -inf")]
)
def test_a_loss_that_is_no_number_is_told_as_that_and_nothing_is_differentiated(
    given, built, broken, message
):
    def loss_fn(module, batch):
        return given.loss_fn(module, batch) * broken

    with (
        pytest.raises(MeasurementError, match=message),
        Session(given.module, loss_fn, given.batches) as session,
    ):
        session.operator()
    assert built.operators == 0


# Knowledge --------------------------------------------------------------------------------------


class Ticking:
    """A clock that moves with every evaluation of the loss, by a second, and by nothing else."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: self.now))

    def loss_fn(self, module, batch):
        self.now += 1
        return cross_entropy(module, batch)


def test_a_session_learns_what_a_product_and_its_making_take(given, monkeypatch):
    clock, known = Ticking(monkeypatch), Knowledge()
    batches = [given.whole]
    with Session(given.module, clock.loss_fn, batches, hvp="recompute", known=known) as session:
        operator = session.operator()
        made = clock.now
        assert known.seconds_to_build == made > 1
        assert known.seconds_a_product is None
        for _ in range(5):
            operator.matvec(torch.ones(operator.size))
    assert known.seconds_a_product == 1.0  # each evaluates the loss of the one batch once
    assert known.engine == "recompute"
    # The next one reckons with it.
    with Session(given.module, clock.loss_fn, batches, known=known) as session:
        allowance = Budget(seconds=10).open(session)
        assert allowance.seconds_a_product == 1.0
        assert allowance.affords(9)
        assert not allowance.affords(11)


def test_a_session_without_a_product_leaves_what_was_known(given):
    known = Knowledge(seconds_a_product=0.25, engine="autograd")
    with Session(given.module, given.loss_fn, given.batches, known=known) as session:
        assert session.loss > 0
    assert (known.seconds_a_product, known.engine) == (0.25, "autograd")


def test_what_is_known_changes_no_number(given):
    def spectrum(known):
        with Session(given.module, given.loss_fn, given.batches, known=known) as session:
            record = SpectrumInstrument(num_eigenvalues=3).measure(session, Budget().open(session))
        return record.spectrum.eigenvalues

    known = Knowledge()
    first, again = spectrum(known), spectrum(known)
    known.seconds_a_product = 10**6
    assert np.array_equal(first, again)
    assert np.array_equal(first, spectrum(known))


# Budget -----------------------------------------------------------------------------------------


def test_all_instruments_of_a_session_spend_from_one_budget(given):
    told: list[tuple[int, int | None]] = []
    with Session(given.module, given.loss_fn, given.batches) as session:
        allowance = Budget(products=60).open(session, lambda *what: told.append(what))
        SpectrumInstrument(num_eigenvalues=2, trace_probes=4).measure(session, allowance)
        first = allowance.spent
        layers = LayersInstrument(spectrum=SpectrumInstrument(num_eigenvalues=1, trace_probes=2))
        layers.measure(session, allowance)
        assert 6 <= first < allowance.spent <= 60
        assert session.operator().num_products == allowance.spent
    counts = [products for products, _ in told]
    assert counts == sorted(counts)
    assert counts[-1] == allowance.spent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"products": 0}, "products=0"),
        ({"products": 2.5}, "products=2.5"),
        ({"products": True}, "products=True"),
        ({"seconds": -1}, "seconds=-1"),
        ({"seconds": math.nan}, "seconds=nan"),
        ({"seconds": "5"}, "seconds='5'"),
        ({"share": 1.0}, "share=1.0.*below 1"),
        ({"share": 0.0}, "share=0.0"),
        ({"share": 20}, "share=20.*below 1"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused_where_it_is_made(options, message):
    with pytest.raises(ArgumentError, match=message):
        Budget(**options)


def test_a_budget_is_frozen_and_compares_by_what_it_allows():
    assert Budget(products=5) == Budget(products=5, seconds=None)
    assert Budget() != Budget(seconds=5)
    with pytest.raises(AttributeError):
        Budget().products = 3  # type: ignore[misc]


def test_a_selection_is_the_space_of_the_session():
    given = problem("convolution")
    hessian = dense_hessian(given.module, given.loss_fn, given.whole, ["4.weight", "4.bias"])
    module = copy.deepcopy(given.module)
    with Session(module, given.loss_fn, given.batches, parameters="4.*") as session:
        operator = session.operator()
        found = torch.stack([operator.matvec(e) for e in torch.eye(operator.size)])
    assert session.space.names == ("4.weight", "4.bias")
    torch.testing.assert_close(found.double(), hessian, rtol=0, atol=1e-5 * float(hessian.norm()))


def test_a_loss_that_cannot_be_linearised_is_tried_once(monkeypatch):
    """The gradient of `grid_sample` has no forward derivative; the retained graph serves."""
    torch.manual_seed(0)
    module = torch.nn.Conv2d(2, 3, 1)
    batches = [(torch.randn(4, 2, 6, 6), torch.randint(3, (4,)))]
    clock, known = Ticking(monkeypatch), Knowledge()

    def loss_fn(module, batch):
        clock.now += 1
        shown = module(batch[0])
        moved = torch.nn.functional.grid_sample(
            shown, torch.tanh(shown[:, :2]).permute(0, 2, 3, 1), align_corners=False
        )
        return torch.nn.functional.cross_entropy(moved.mean((2, 3)), batch[1])

    taken, products = [], []
    for _ in range(2):
        begun = clock.now
        with Session(module, loss_fn, batches, known=known, expected_products=10**6) as session:
            operator = session.operator()
            assert operator.engine == "autograd"
            taken.append(clock.now - begun)
            products.append(operator.matvec(torch.ones(operator.size)))
    assert taken[1] == taken[0] - 1  # one evaluation of the loss less, which was traced in vain
    assert torch.equal(*products)
    assert len(known.untraceable) == 1
