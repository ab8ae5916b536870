"""Every engine against the dense Hessian of the mean loss over all samples."""

from __future__ import annotations

import copy

import pytest
import torch
from support.operators import (
    ENGINES,
    PartlyCurved,
    as_matrix,
    departure,
    hessian,
    in_precision,
    reference,
)
from support.references import (
    PROBLEMS,
    cross_entropy,
    dense_hessian,
    finite_difference_hessian,
    in_double,
    mlp,
    multihead_attention,
    ragged,
    tied_embedding,
)
from torch import nn
from torch.nn import functional as F

from lightning_hessian.results import MeasurementError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_oracle_agrees_with_finite_differences(name):
    given, expected = reference(name)
    found = finite_difference_hessian(given.reference_module(), given.loss_fn, given.whole)
    assert float((found - expected).norm() / expected.norm()) < 1e-7
    assert float((expected - expected.T).norm() / expected.norm()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", ["auto", "autograd", "recompute"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_engines_agree_with_the_dense_hessian(name, engine, dtype):
    given, expected = reference(name)
    module, batches = in_precision(given, dtype)
    with hessian(module, given.loss_fn, batches, engine, mode=given.mode) as operator:
        assert operator.size == len(expected)
        assert operator.dtype == dtype
        assert departure(operator, expected) < TOLERANCE[dtype]
        assert operator.num_products == 6
        assert operator.engine.removesuffix("_onednn") in ENGINES


LINEARIZED = [(name, torch.float64) for name in PROBLEMS if name != "lstm"] + [
    (name, torch.float32) for name in ("mlp", "multihead_attention")
]


@pytest.mark.parametrize(("name", "dtype"), LINEARIZED)
def test_linearisations_agree_with_the_dense_hessian(name, dtype):
    """One batch, and fewer cases than for the others: a linearisation takes a second to make."""
    given, expected = reference(name)
    module, batches = in_precision(given, dtype)
    if name != "mlp":
        batches = [given.whole if dtype == torch.float32 else in_double(given.whole)]
    with hessian(module, given.loss_fn, batches, "linearize", mode=given.mode) as operator:
        assert departure(operator, expected) < TOLERANCE[dtype]
        assert operator.engine == "linearize"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linearised_lstm_is_right_or_refused_with_the_remedy(dtype):
    """torch.func.linearize writes into its constants there: right once, wrong from then on."""
    given, _ = reference("lstm")
    module, (batch, _) = in_precision(given, dtype)
    expected = dense_hessian(given.module, given.loss_fn, batch)
    try:
        with hessian(module, given.loss_fn, [batch], "linearize") as operator:
            assert departure(operator, expected) < TOLERANCE[dtype]
    except MeasurementError as error:
        assert "hvp='autograd'" in str(error)  # noqa: PT017


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("parameters", [None, "2.*"])
def test_a_product_is_a_new_tensor_without_graph(engine, parameters):
    given, _ = reference("mlp")
    with hessian(
        given.module, given.loss_fn, given.batches, engine, parameters=parameters
    ) as operator:
        vector = torch.randn(operator.size)
        first = operator.matvec(vector)
        assert not first.requires_grad
        kept = first.clone()
        first.zero_()
        assert torch.equal(operator.matvec(vector), kept)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_entry_is_right_and_the_matrix_symmetric(engine):
    given, expected = reference("mlp")
    with hessian(in_double(given.module), given.loss_fn, in_double(given.batches), engine) as found:
        matrix = as_matrix(found)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14)


def test_batch_norm_in_training_mode_differs_from_evaluation():
    """Else the two problems would show nothing."""
    (_, evaluated), (_, trained) = reference("batch_norm"), reference("batch_norm_in_training")
    assert float((evaluated - trained).norm() / evaluated.norm()) > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_training_mode_reaches_a_module_that_stands_in_evaluation_mode(engine):
    given, expected = reference("batch_norm_in_training")
    module = copy.deepcopy(given.module).eval()
    with hessian(module, given.loss_fn, given.batches, engine, mode="train") as operator:
        assert departure(operator, expected) < 1e-5


# What is averaged -------------------------------------------------------------------------------


def masked_cross_entropy(module, batch):
    (tokens, targets), mask = batch["text"], batch["mask"]
    losses = F.cross_entropy(module(tokens).flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum()


@pytest.mark.parametrize("engine", ENGINES)
def test_masked_tokens_are_weighted_by_their_number_in_nested_batches(engine):
    module = tied_embedding().module
    tokens, targets = torch.randint(7, (2, 10, 5))
    mask = torch.zeros(10, 5)
    mask[:6, :1] = mask[6:] = 1.0
    batches = [
        {"text": (x, y), "mask": m} for x, y, m in ragged(tokens, targets, mask, sizes=(6, 4))
    ]
    whole = {"text": (tokens, targets), "mask": mask}
    expected = dense_hessian(module, masked_cross_entropy, whole)
    by_tokens = {"batch_weight": lambda batch: batch["mask"].sum()}
    with hessian(module, masked_cross_entropy, batches, engine, **by_tokens) as operator:
        assert departure(operator, expected) < 1e-5
    with hessian(module, masked_cross_entropy, batches, engine) as operator:
        assert departure(operator, expected) > 1e-2  # samples are the wrong weights here


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_weight_zero_counts_for_nothing(engine):
    given, expected = reference("mlp")
    batches = [given.whole, (torch.randn(3, 5), torch.zeros(3, dtype=torch.long))]
    weights = iter((1.0, 0.0))
    options = {"batch_weight": lambda batch: next(weights)}
    with hessian(given.module, given.loss_fn, batches, engine, **options) as operator:
        assert departure(operator, expected) < 1e-5


# Which parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_subset_gives_the_block_of_the_whole_hessian(engine):
    given, expected = reference("mlp")
    rows = torch.cat([torch.arange(30), torch.arange(36, 54)])  # 0.weight and 2.weight
    with hessian(
        given.module, given.loss_fn, given.batches, engine, parameters="*.weight"
    ) as operator:
        assert departure(operator, expected[rows][:, rows]) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_are_constants(engine):
    given = mlp()
    given.module[0].requires_grad_(False)
    expected = dense_hessian(given.module, given.loss_fn, given.whole)
    assert len(expected) == 21
    with hessian(given.module, given.loss_fn, given.batches, engine) as operator:
        assert departure(operator, expected) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("parameters", ["embedding.weight", "head.weight"])
def test_a_tied_parameter_is_differentiated_through_all_its_uses(engine, parameters):
    given, expected = reference("tied_embedding")
    with hessian(
        given.module, given.loss_fn, given.batches, engine, parameters=parameters
    ) as operator:
        assert operator.size == 28
        assert departure(operator, expected[:28, :28]) < 1e-5


@pytest.mark.parametrize(
    ("make", "engine"),
    [(mlp, engine) for engine in ENGINES] + [(multihead_attention, "autograd")],
)
def test_a_bfloat16_module_is_measured_in_single_precision(make, engine):
    given = make()
    module = copy.deepcopy(given.module).bfloat16()
    expected = dense_hessian(module, given.loss_fn, given.whole)
    with hessian(module, given.loss_fn, given.batches, engine) as operator:
        assert operator.dtype == torch.float32
        assert departure(operator, expected) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_on_a_frozen_bfloat16_backbone_are_measured_in_single_precision(engine):
    given = mlp()
    given.module[0].bfloat16().requires_grad_(False)
    expected = dense_hessian(given.module, given.loss_fn, given.whole)
    with hessian(given.module, given.loss_fn, given.batches, engine) as operator:
        assert departure(operator, expected) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_compiled_module_has_the_hessian_of_the_module(engine):
    given, expected = reference("mlp")
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(given.module), backend="aot_eager")
    compiled(given.whole[0]).sum().backward()  # compiled, with a backward that stops there
    with hessian(compiled, given.loss_fn, given.batches, engine) as operator:
        assert departure(operator, expected) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_unused_and_linear_parameters_have_rows_of_zeros(engine):
    module, given = PartlyCurved(), mlp()
    expected = torch.zeros(15 + 57, 15 + 57, dtype=torch.float64)
    expected[15:, 15:] = dense_hessian(module.curved, cross_entropy, given.whole)
    with hessian(module, None, given.batches, engine) as operator:
        assert departure(operator, expected) < 1e-5
        assert not as_matrix(operator)[:15].any()


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_hessian_of_zeros_is_one(engine):
    with hessian(
        nn.Linear(4, 2), lambda module, x: module(x).mean(), [torch.randn(3, 4)], engine
    ) as operator:
        assert operator.matvec(torch.randn(10)).tolist() == [0.0] * 10
        assert operator.self_check_error == 0.0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_that_uses_none_of_the_selected_parameters_adds_nothing(engine, frozen):
    """As with several tasks, each with a head and batches of its own."""

    def loss(module, batch):
        x, task = batch
        return torch.tanh(module[task](x)).square().mean()

    module, x = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)}), torch.randn(4, 3)
    module["b"].requires_grad_(not frozen)
    expected = dense_hessian(module["a"], lambda layer, x: torch.tanh(layer(x)).square().mean(), x)
    with hessian(module, loss, [(x, "a"), (x, "b")], engine, parameters="a.*") as operator:
        assert departure(operator, expected / 2) < 1e-5


# Random layers ----------------------------------------------------------------------------------


def noisy_problem():
    module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3))
    whole = (torch.randn(10, 5), torch.randint(3, (10,)))
    return module, ragged(*whole)


def test_the_self_check_catches_dropout_under_linearize():
    module, batches = noisy_problem()
    with (
        pytest.raises(MeasurementError, match=r"dropout.*hvp='autograd'"),
        hessian(module, cross_entropy, batches, "linearize", mode="train"),
    ):
        pass


@pytest.mark.parametrize("engine", ["auto", "autograd", "recompute"])
def test_dropout_gives_a_repeatable_symmetric_operator(engine):
    module, batches = noisy_problem()
    matrices = []
    for _ in range(2):
        with hessian(
            module, cross_entropy, batches, engine, mode="train", expected_products=10**9
        ) as operator:
            matrices.append(as_matrix(operator))
        torch.rand(3)
    first, second = matrices
    assert torch.equal(first, second)
    assert float((first - first.T).norm() / first.norm()) < 1e-6
    evaluated = dense_hessian(copy.deepcopy(module).eval(), cross_entropy, batches[0])
    assert float((first - evaluated).norm() / evaluated.norm()) > 0.1


# Choice of the engine ---------------------------------------------------------------------------


def test_auto_keeps_nothing_where_nothing_fits():
    given, expected = reference("mlp")
    with hessian(given.module, given.loss_fn, given.batches, memory_budget=0) as operator:
        assert operator.engine == "recompute"
        assert departure(operator, expected) < 1e-5


def test_auto_keeps_graphs_where_a_linearisation_does_not_pay():
    given, _ = reference("mlp")
    with hessian(given.module, given.loss_fn, given.batches, expected_products=1) as operator:
        assert operator.engine == "autograd"


def test_the_self_check_says_how_far_engines_are_apart():
    given, _ = reference("mlp")
    for engine in ENGINES:
        with hessian(given.module, given.loss_fn, given.batches, engine) as operator:
            assert operator.engine == engine
            assert 0 <= operator.self_check_error < 1e-6


def test_a_confident_network_can_be_measured():
    """Near zero loss the softmax's derivatives cancel, and engines differ by rounding alone."""
    given = mlp()
    with torch.no_grad():
        given.module[2].weight.mul_(60)
    targets = given.module(given.whole[0]).argmax(1)
    batches = [(given.whole[0], targets)]
    assert float(cross_entropy(given.module, batches[0])) < 0.01
    with hessian(given.module, given.loss_fn, batches, "auto", expected_products=10**9) as operator:
        assert bool(operator.matvec(torch.randn(operator.size)).isfinite().all())
