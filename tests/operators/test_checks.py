"""Wrong second derivatives are found on every batch, and right ones are never accused."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.operators import as_matrix, dense_by_autograd, distance, hessian
from support.references import dense_hessian, finite_difference_hessian, in_double
from support.wrong_forward import squared
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from lightning_hessian.results import MeasurementError, NoSecondDerivativeError


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def labelled(*shape: int, count: int = 20):
    return torch.randn(count, *shape), torch.randint(3, (count,))


# Second derivatives that are wrong --------------------------------------------------------------


class Hidden(torch.autograd.Function):
    """x^3, with a backward that autograd does not see into: its share is symmetric, and missing."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3 * ctx.x * ctx.x


class Skewed(torch.autograd.Function):
    """x^3, whose backward is differentiated to something else: a matrix that is not symmetric."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        right = 3 * x * x
        return gradient * (right.detach() + 2 * (right.roll(1, -1) - right.roll(1, -1).detach()))


class Cubed(nn.Module):
    def __init__(self, function, activation=nn.Identity):
        super().__init__()
        self.function = function
        self.first, self.act, self.last = nn.Linear(4, 5), activation(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        long = x.shape[1] > 6
        cubed = self.function(h) if long else h**3
        return self.last(self.act(cubed)).mean(1)


def normed(activation, layer, dim=0):
    if layer == "linear":
        first, shape, width = nn.Linear(5, 6), (5,), 6
    else:
        first, shape, width = nn.Conv1d(2, 3, 2), (2, 4), 9
    return (
        nn.Sequential(weight_norm(first, dim=dim), activation, nn.Flatten(), nn.Linear(width, 3)),
        [labelled(*shape)],
    )


def cubed(function, order, activation=nn.Identity):
    batches = [labelled(length, 4) for length in order]
    return Cubed(function, activation), batches


WRONG = {
    "weight_norm of a linear layer": (lambda: normed(nn.Tanh(), "linear"), "weight_norm"),
    "weight_norm of a convolution": (lambda: normed(nn.GELU(), "convolution"), "weight_norm"),
    "weight_norm along another axis": (lambda: normed(nn.Tanh(), "linear", dim=1), "weight_norm"),
    "weight_norm before a kink": (lambda: normed(nn.ReLU(), "linear"), "weight_norm"),
    "hidden, in the first batch": (lambda: cubed(Hidden.apply, (10, 4)), "Hidden"),
    "hidden, in the second batch": (lambda: cubed(Hidden.apply, (4, 10)), "Hidden"),
    "hidden, in the last of four": (lambda: cubed(Hidden.apply, (4, 4, 5, 10)), "Hidden"),
    "skewed, in the second batch": (lambda: cubed(Skewed.apply, (4, 10)), "Skewed"),
    "hidden, before a smooth function": (
        lambda: cubed(Hidden.apply, (4, 10), nn.Tanh), "Hidden"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_second_derivative_on_any_batch_is_replaced_by_differences(name):
    make, culprit = WRONG[name]
    module, batches = in_double(make())
    weight = 1 / len(batches)
    expected = sum(weight * finite_difference_hessian(module, cross_entropy, b) for b in batches)
    measured = hessian(module, cross_entropy, batches)
    with pytest.warns(UserWarning, match=rf"(?s)Finite differences.*{culprit}"):
        operator = measured.__enter__()
    assert operator.engine == "finite_difference"
    assert distance(as_matrix(operator), expected) < 1e-6
    measured.__exit__(None, None, None)


@pytest.mark.parametrize("engine", ["autograd", "recompute"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_an_engine_asked_for_by_name_says_what_is_wrong_and_what_to_do(name, engine, double):
    make, culprit = WRONG[name]
    module, batches = in_double(make()) if double else make()
    with (
        pytest.raises(NoSecondDerivativeError, match=rf"{culprit}.*hvp='finite_difference'"),
        hessian(module, cross_entropy, batches, engine),
    ):
        pass


# Second derivatives that are right --------------------------------------------------------------


class Fair(torch.autograd.Function):
    """x^3 with a backward that can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradient


def straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(4 * x) / 4 - x).detach()


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def pooled():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


def with_(function):
    return nn.Sequential(nn.Linear(4, 8), Applied(function), nn.Linear(8, 3))


def own_target(module, batch):
    """As in self-distillation: the target is the module itself, held constant."""
    output = module(batch[0])
    return (output - 0.5 * output.detach().tanh()).square().mean()


def target_without_graph(module, batch):
    with torch.no_grad():
        target = 0.5 * module(batch[0]).tanh()
    return (module(batch[0]) - target).square().mean()


RIGHT = {
    "rectifiers and pooling": (pooled, (1, 8, 8), cross_entropy),
    "leaky": (lambda: with_(nn.LeakyReLU()), (4,), cross_entropy),
    "absolute": (lambda: with_(torch.abs), (4,), cross_entropy),
    "clamped": (lambda: with_(lambda x: x.clamp(-0.3, 0.5)), (4,), cross_entropy),
    "sorted": (lambda: with_(lambda x: x.sort(-1).values), (4,), cross_entropy),
    "largest": (lambda: with_(lambda x: x.topk(8, -1).values.exp()), (4,), cross_entropy),
    "straight through": (lambda: with_(straight_through), (4,), cross_entropy),
    "a custom function that is right": (lambda: with_(Fair.apply), (4,), cross_entropy),
    "custom, behind rectifiers": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), with_(Fair.apply)[1:]),
        (4,), cross_entropy),
    "absolute errors": (
        lambda: with_(torch.tanh), (4,), lambda m, b: F.l1_loss(m(b[0]), b[0][:, :3])),
    "its own target": (lambda: with_(torch.tanh), (4,), own_target),
    "a target without graph": (lambda: with_(torch.tanh), (4,), target_without_graph),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("count", [3, 40, 1500])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", RIGHT)
def test_an_exact_engine_is_never_accused_by_a_rough_loss(name, double, count, engine):
    make, shape, loss_fn = RIGHT[name]
    module, batches = make(), [labelled(*shape, count=count)]
    if double:
        module, batches = in_double((module, batches))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with hessian(module, loss_fn, batches, engine) as operator:
            assert operator.engine in ("linearize", "linearize_onednn", "autograd")
            if count == 40:
                expected = dense_by_autograd(module, loss_fn, batches[0])
                tolerance = 1e-10 if double else 1e-4
                assert distance(as_matrix(operator), expected) < tolerance


# What is said of a linearisation that differs ---------------------------------------------------


def recurrent(cell):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell(4, 3, batch_first=True, num_layers=2, bidirectional=True)
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x)[0].mean(1))

    return Net()


class Coarse(nn.Module):
    """A module in float64 with a part in float32 or coarser, as where a norm is computed so."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.out, self.dtype = nn.Linear(4, 8), nn.Linear(8, 3), dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).to(self.dtype)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.out(h.to(x.dtype))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_networks_are_linearised_right(cell, double):
    """Their cells write into parts of what they computed; each product must find it unchanged."""
    module, batches = recurrent(cell), [labelled(5, 4)]
    if double:
        module, batches = in_double((module, batches))
    expected = dense_hessian(module, cross_entropy, batches[0])
    with hessian(module, cross_entropy, batches, "linearize") as operator:
        for _ in range(2):
            assert distance(as_matrix(operator), expected) < (1e-10 if double else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["linearize", "autograd", "finite_difference"])
def test_the_coarsest_precision_inside_sets_the_tolerance(engine, dtype):
    module, batches = in_double((Coarse(dtype), [labelled(4)]))
    exact = Coarse(torch.float64).double()
    exact.load_state_dict(module.state_dict())
    expected = dense_by_autograd(exact, cross_entropy, batches[0])
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    try:
        with hessian(module, cross_entropy, batches, engine) as operator:
            assert distance(as_matrix(operator), expected) < tolerance
    except MeasurementError as error:
        assert (engine, dtype) == ("finite_difference", torch.bfloat16)
        assert "too rough" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.4), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3), nn.RReLU()]
)
def test_random_draws_are_named_where_there_are_some(layer):
    module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), layer, nn.Linear(6, 3))
    with (
        pytest.raises(MeasurementError, match=r"draws random numbers.*hvp='autograd'"),
        hessian(module, cross_entropy, [labelled(5)], "linearize", mode="train"),
    ):
        pass


def test_a_loss_that_counts_its_calls_is_named():
    calls = iter(range(10**6))

    def loss(module, batch):
        return cross_entropy(module, batch) * (1 + next(calls) % 3)

    with (
        pytest.raises(MeasurementError, match="Two evaluations of the gradient differ"),
        hessian(nn.Linear(4, 3), loss, [labelled(4)], "linearize"),
    ):
        pass


def test_nothing_random_is_blamed_where_nothing_is_drawn():
    module = nn.Sequential(nn.Linear(4, 5), Applied(squared(3)), nn.Linear(5, 3))
    with (
        pytest.raises(MeasurementError, match=r"Nothing random is drawn.*hvp='autograd'"),
        hessian(module, cross_entropy, [labelled(4)], "linearize"),
    ):
        pass
    with hessian(module, cross_entropy, [labelled(4)], expected_products=10**9) as operator:
        assert operator.engine == "autograd"


def test_a_gradient_that_is_none_has_no_differences_either():
    """A layer that reverses gradients: no matrix of their derivatives is symmetric."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    module = nn.Sequential(nn.Linear(4, 5), Applied(Reversed.apply), nn.Tanh(), nn.Linear(5, 3))
    module, batches = in_double((module, [labelled(4)]))
    with (
        pytest.raises(MeasurementError, match="not the gradient of the loss"),
        hessian(module, cross_entropy, batches, "finite_difference"),
    ):
        pass
