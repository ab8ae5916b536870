"""oneDNN's products of matrices: the same numbers, where they are asked for or the processor is."""

from __future__ import annotations

import pytest
import torch
from support.references import cross_entropy, flat_loss, in_double
from torch import nn
from torch.func import grad, jvp

from lightning_hessian import hessian_spectrum
from lightning_hessian.operators.costs import counted
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.operators.linearize import onednn
from lightning_hessian.operators.linearize.onednn import matrix_product, sum_with_product
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError

aten = torch.ops.aten
needed = pytest.mark.skipif(not onednn.is_available(), reason="this build of torch has it not")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def network(dtype=torch.float32):
    """Layers whose products are large enough, and a last one whose are not."""
    module = nn.Sequential(nn.Linear(120, 140), nn.Tanh(), nn.Linear(140, 130), nn.Tanh(),
                           nn.Linear(130, 3)).to(dtype)  # fmt: skip
    return module, (torch.randn(400, 120, dtype=dtype), torch.randint(3, (400,)))


def operator_of(module, batch, engine="linearize_onednn", **options):
    objective = Objective(module, cross_entropy, [batch], ParameterSpace.select(module))
    return objective, lambda: HessianOperator(objective, engine, **options)


def targets(operator) -> list:
    return [node.target for node in operator.products[0]._folded.graph.nodes]


@needed
def test_products_are_those_of_double_precision():
    module, batch = network()
    objective, made = operator_of(module, batch)
    loss, point = flat_loss(in_double(module), cross_entropy, in_double(batch))
    with objective.isolated():
        operator = made()
        assert operator.engine == "linearize_onednn"
        for vector in torch.randn(3, operator.size):
            expected = jvp(grad(loss), (point,), (vector.double(),))[1]
            found = operator.matvec(vector)
            assert float((found - expected).norm() / expected.norm()) < 3e-6
            both = operator.matmat(torch.stack([vector, -vector]))
            assert torch.equal(both[0], found)
        made_by = targets(operator)
    assert made_by.count(matrix_product) >= 4
    assert made_by.count(sum_with_product) >= 3
    assert aten.mm.default in made_by  # the small ones


@needed
def test_a_view_has_the_same_products():
    module, batch = network()
    objective, made = operator_of(module, batch)
    with objective.isolated():
        operator = made()
        names = ["2.weight", "2.bias"]
        view = operator.restricted(names)
        whole = torch.zeros(operator.size)
        start = module[0].weight.numel() + module[0].bias.numel()
        vector = torch.randn(view.size)
        whole[start : start + view.size] = vector
        expected = operator.matvec(whole)[start : start + view.size]
        torch.testing.assert_close(view.matvec(vector), expected, rtol=1e-4, atol=1e-6)
        folded = [node.target for node in view._products[0]._folded.graph.nodes]
    assert matrix_product in folded


@needed
def test_what_it_takes_is_counted_like_other_products():
    first, second, summand = torch.randn(20, 30), torch.randn(30, 40), torch.randn(20, 40)
    _, cost = counted(lambda: matrix_product(first, second))
    _, added = counted(lambda: sum_with_product(summand, first, second))
    assert cost.flops == added.flops == counted(lambda: first @ second)[1].flops == 48_000


@needed
def test_double_precision_is_left_to_torch():
    module, batch = network(torch.float64)
    objective, made = operator_of(module, batch)
    with objective.isolated():
        found = targets(made())
    assert matrix_product not in found
    assert sum_with_product not in found


ZEN_5 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
flags\t\t: fpu avx2 avx512f avx512_bf16

processor\t: 1
"""


@pytest.mark.parametrize(
    ("told", "faster"),
    [
        (ZEN_5, True),
        (ZEN_5.replace(": 26", ": 25"), False),  # Zen 3 and 4
        (ZEN_5.replace("avx512f", ""), False),  # switched off
        (ZEN_5.replace("AuthenticAMD", "GenuineIntel"), False),
        (ZEN_5.replace(": 26", ": unknown"), False),
        ("Features\t: fp asimd\nCPU implementer\t: 0x41\n", False),
        ("", False),
    ],
)
def test_processors(told, faster):
    assert onednn.is_faster_on(told) is faster


@needed
@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_asks_the_processor(faster, dtype, monkeypatch):
    """The answer is put in its place: no machine is of both kinds."""
    monkeypatch.setattr(onednn, "is_faster_here", lambda: faster)
    module, batch = network(dtype)
    objective, made = operator_of(module, batch, "auto", expected_products=10**6)
    expected = "linearize_onednn" if faster and dtype == torch.float32 else "linearize"
    with objective.isolated():
        assert made().engine == expected


@needed
def test_a_spectrum_says_so_and_a_seed_repeats_it():
    module, batch = network()
    found = [
        hessian_spectrum(module, cross_entropy, [batch], num_eigenvalues=3, trace_probes=2, hvp=hvp)
        for hvp in ("linearize_onednn", "linearize_onednn", "linearize")
    ]
    assert [spectrum.engine for spectrum in found] == ["linearize_onednn"] * 2 + ["linearize"]
    assert found[0].eigenvalues.tolist() == found[1].eigenvalues.tolist()
    torch.testing.assert_close(
        torch.from_numpy(found[0].eigenvalues), torch.from_numpy(found[2].eigenvalues), rtol=1e-4,
        atol=0,
    )  # fmt: skip


@pytest.mark.skipif(onednn.is_available(), reason="this build of torch has it")
def test_without_it_the_remedy_is_told():
    module, batch = network()
    objective, made = operator_of(module, batch)
    with objective.isolated(), pytest.raises(MeasurementError, match="hvp='linearize'"):
        made()
