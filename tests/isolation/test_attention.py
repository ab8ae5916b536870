"""Attention in chunks of queries against torch's MATH kernel in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.references import AttentionClassifier, EncoderClassifier, cross_entropy, dense_hessian
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lightning_hessian import LossOptions, hessian_spectrum
from lightning_hessian.isolation.attention import AttentionMode, attention_in_chunks
from lightning_hessian.operators.costs import counted
from lightning_hessian.operators.engines import linearize, retained_bytes
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import ArgumentError

BATCH, HEADS, QUERIES, KEYS, WIDTH, VALUES = 2, 2, 5, 6, 3, 2
SIZES = [
    BATCH * HEADS * QUERIES * WIDTH,
    BATCH * HEADS * KEYS * WIDTH,
    BATCH * HEADS * KEYS * VALUES,
]
TWO_ROWS = 2 * BATCH * HEADS * KEYS
EXACT = ("linearize", "autograd", "recompute")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mask_of(kind: str) -> dict[str, object]:
    if kind == "boolean":
        seen = torch.rand(BATCH, 1, QUERIES, KEYS) > 0.4
        seen[0, 0, 2] = False  # a query that sees nothing
        return {"attn_mask": seen}
    if kind == "numbers":
        return {"attn_mask": torch.randn(QUERIES, KEYS, dtype=torch.float64)}
    return {"is_causal": kind == "causal"}


def losses(kind: str, scale: float | None = None):
    """Returns a loss by the MATH kernel and one in chunks, of one vector of Q, K and V."""
    given = mask_of(kind)
    shapes = [(QUERIES, WIDTH), (KEYS, WIDTH), (KEYS, VALUES)]
    weights = torch.randn(BATCH, HEADS, QUERIES, VALUES, dtype=torch.float64)

    def parts(x: Tensor):
        pairs = zip(x.split(SIZES), shapes, strict=True)
        return [part.view(BATCH, HEADS, *shape) for part, shape in pairs]

    def plain(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            value = F.scaled_dot_product_attention(*parts(x), **given, scale=scale)
        return (weights * torch.tanh(value)).sum()

    def chunked(x: Tensor) -> Tensor:
        value = attention_in_chunks(
            *parts(x),
            given.get("attn_mask"),
            causal=given.get("is_causal", False),
            scale=scale or 1 / math.sqrt(WIDTH),
            entries=TWO_ROWS,
        )
        return (weights * torch.tanh(value)).sum()

    return plain, chunked, torch.randn(sum(SIZES), dtype=torch.float64)


# As a function ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "causal", "boolean", "numbers"])
def test_value_gradient_and_hessian_are_those_of_the_math_kernel(kind):
    plain, chunked, x = losses(kind, scale=0.7 if kind == "whole" else None)
    torch.testing.assert_close(chunked(x), plain(x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad(chunked)(x), grad(plain)(x), rtol=1e-11, atol=1e-13)
    expected = jacfwd(grad(plain))(x)
    ways = {
        "forward over reverse": jacfwd(grad(chunked))(x),
        "reverse over reverse": jacrev(grad(chunked))(x),
        "reverse over forward": jacrev(jacfwd(chunked))(x),
        "autograd": torch.autograd.functional.hessian(chunked, x),
        "autograd, batched": torch.autograd.functional.hessian(chunked, x, vectorize=True),
    }
    for way, found in ways.items():
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=way)
    points = torch.randn(3, len(x), dtype=torch.float64)
    torch.testing.assert_close(vmap(grad(chunked))(points), vmap(grad(plain))(points))
    torch.testing.assert_close(
        vmap(jacfwd(grad(chunked)))(points), vmap(jacfwd(grad(plain)))(points)
    )


def test_a_mask_of_each_sample_may_be_batched():
    query, key, value = torch.randn(3, 4, QUERIES, WIDTH, dtype=torch.float64)
    masks = torch.rand(4, QUERIES, QUERIES) > 0.3
    found = vmap(lambda *a: attention_in_chunks(*a, scale=1.0, entries=8))(query, key, value, masks)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=masks, scale=1.0)
    torch.testing.assert_close(found, expected)


def test_forward_over_forward_is_refused():
    _, chunked, x = losses("causal")
    with pytest.raises(NotImplementedError, match="forward derivative of a forward"):
        jacfwd(jacfwd(chunked))(x)


# As what torch calls ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True}])
def test_calls_of_a_block_are_computed_in_chunks(options):
    query, key, value = torch.randn(3, 2, 4, 6, WIDTH, dtype=torch.float64)
    if "enable_gqa" in options:
        key, value = key[:, :2], value[:, :2]
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(query, key, value, **options)
    mode = AttentionMode("chunks")
    with mode:
        found = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected)
    assert mode.calls == 1
    assert mode.serves


def test_calls_that_cannot_be_cut_are_left_to_torch():
    """Dropout draws, and a mask that is trained has a gradient of its own."""
    query, key, value = torch.randn(3, 2, 4, 6, WIDTH)
    bias = torch.randn(6, 6, requires_grad=True)
    mode = AttentionMode("chunks")
    with mode, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        assert torch.autograd.grad(found.sum(), bias)[0].shape == bias.shape
        slope = grad(lambda b: F.scaled_dot_product_attention(query, key, value, b).sin().sum())
        assert slope(bias.detach()).any()
    assert mode.calls == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type(dtype):
    query, key, value = torch.randn(3, 2, 4, 6, WIDTH).to(dtype)
    with AttentionMode("chunks"):
        found = F.scaled_dot_product_attention(query, key, value)
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.01)


# As a part of a measurement ---------------------------------------------------------------------


class Checkpointed(AttentionClassifier):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        attend = lambda y: self.attention(y, y, y, need_weights=False)[0]  # noqa: E731
        return self.head(self.norm(x + checkpoint(attend, x, use_reentrant=False)).mean(1))


NETWORKS = {
    "multihead": lambda: (AttentionClassifier(), torch.randint(6, (7, 5))),
    "encoder": lambda: (EncoderClassifier(), torch.randn(7, 4, 4)),
    "checkpointed": lambda: (Checkpointed(), torch.randint(6, (7, 5))),
}


@pytest.mark.parametrize(
    ("name", "engine"),
    # The backward pass of a checkpoint has no forward derivative in torch.
    [(n, e) for n in NETWORKS for e in EXACT if (n, e) != ("checkpointed", "linearize")]
    + [pytest.param("multihead", "compile", marks=pytest.mark.slow)],
)
def test_every_engine_finds_the_dense_hessian(name, engine):
    module, inputs = NETWORKS[name]()
    module = module.double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    batch = (inputs, torch.randint(3, (7,)))
    expected = dense_hessian(
        module if name != "checkpointed" else _unchecked(module), cross_entropy, batch
    )
    space = ParameterSpace.select(module, None)
    objective = Objective(module, cross_entropy, [batch], space, attention="chunks")
    with objective.isolated():
        operator = HessianOperator(objective, engine)
        found = operator.matmat(torch.eye(len(expected), dtype=torch.float64))
    assert float((found - expected).norm() / expected.norm()) < 1e-10
    assert operator.engine == f"{engine}+chunked_attention"
    assert objective.attention.calls > 0


def _unchecked(module: Checkpointed) -> AttentionClassifier:
    plain = AttentionClassifier().double().eval()
    plain.load_state_dict(module.state_dict())
    return plain


class Attention(nn.Module):
    """One layer of causal attention over long sequences."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.head = nn.Linear(width, 3 * width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x.transpose(1, 2).flatten(2))


def squared(module, batch):
    return F.mse_loss(module(batch[0]), batch[1])


def objective_of_length(length, attention="auto"):
    module, batch = Attention(), (torch.randn(1, length, 16), torch.randn(1, length, 1))
    space = ParameterSpace.select(module, None)
    return Objective(module, squared, [batch], space, attention=attention)


def test_a_graph_grows_with_the_length_and_not_with_its_square():
    kept = {}
    for length in (128, 256):
        for form in ("plain", "chunks"):
            objective = objective_of_length(length, form)
            with objective.isolated():
                kept[form, length] = retained_bytes(objective)
    assert kept["chunks", 256] <= 2.1 * kept["chunks", 128]
    assert kept["plain", 256] >= 3.5 * kept["plain", 128]


@pytest.mark.parametrize(("free", "in_chunks"), [(8 * 2**20, False), (2**20, True)])
def test_memory_decides_and_says_so(free, in_chunks, monkeypatch):
    """Two heads of 256 x 256 in float32 are half a MiB; four of them stand for a graph."""
    monkeypatch.setattr("lightning_hessian.probe.objective.free_bytes", lambda device: free)
    objective = objective_of_length(256)
    with objective.isolated():
        operator = HessianOperator(objective, "autograd")
    assert objective.attention.serves == in_chunks
    assert operator.engine.endswith("+chunked_attention") == in_chunks


def test_the_longest_batch_decides():
    module = Attention()
    batches = [(torch.randn(1, n, 16), torch.randn(1, n, 1)) for n in (16, 256, 8)]
    space = ParameterSpace.select(module, None)
    objective = Objective(module, squared, batches, space, batch_weight=lambda b: b[0].shape[1])
    objective.attention = AttentionMode("auto", budget=2**20, num_batches=3)
    with objective.isolated():
        objective.value()
    assert objective.attention.serves


def test_a_block_of_a_linearisation_needs_no_curvature_of_its_attention():
    """The last layer alone: nothing of the attention depends on it."""
    objective = objective_of_length(32, "chunks")
    with objective.isolated():
        whole, point = linearize(objective, 0), objective.point()
        last = objective.space.places(["head.weight"])
        product = whole.restricted(last, point)
        tangents = tuple(torch.randn_like(point[i]) for i in last)
        cost = counted(lambda: product(tangents))[1]
    assert cost.flops <= 2 * 2 * 32 * 16


def test_spectra_come_out_alike_and_the_option_is_checked():
    objective = objective_of_length(24)
    module, batches = Attention(), objective.batches
    found = [
        hessian_spectrum(
            module,
            squared,
            batches,
            num_eigenvalues=4,
            trace_probes=0,
            loss_options=LossOptions(attention=form),
        )
        for form in ("plain", "chunks")
    ]
    assert found[1].eigenvalues == pytest.approx(found[0].eigenvalues, rel=1e-3)
    assert "chunked" not in found[0].engine
    assert "chunked_attention" in found[1].engine
    with pytest.raises(ArgumentError, match="attention='flash'"):
        LossOptions(attention="flash")
