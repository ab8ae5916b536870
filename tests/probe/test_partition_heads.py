"""A head is what its attention depends on: by autograd, for every layout of the projections."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_partition import Conv1D, members
from torch import Tensor, nn

from lightning_hessian import block_structure, partition_rules
from lightning_hessian.probe.partition import partition
from lightning_hessian.probe.partition_rules import BlockRule

WIDTH = 12


class Attention(nn.Module):
    """Grouped queries, fused or not; it says of itself what ``told`` names, in ``place``."""

    def __init__(self, h, g, d, fused="", told=("h", "g", "d"), place="module", conv1d=False):
        super().__init__()
        self.h, self.g, self.d, self.fused = h, g, d, fused
        make = (lambda i, o: Conv1D(o, i)) if conv1d else nn.Linear
        sizes = {"q": h * d, "k": g * d, "v": g * d}
        if fused:
            setattr(self, fused, make(WIDTH, sum(sizes.values())))
        else:
            for name, size in sizes.items():
                setattr(self, f"{name}_proj", make(WIDTH, size))
        self.o_proj = make(h * d, WIDTH)
        names = {"h": "num_attention_heads", "g": "num_key_value_heads", "d": "head_dim"}
        values = {"h": h, "g": g, "d": d}
        said = {names[what]: values[what] for what in told}
        if place == "config":
            self.config = SimpleNamespace(**said)
        else:
            vars(self).update(said)

    def projected(self, x):
        """Returns query [.., H, d], key and value [.., G, d]."""
        if self.fused:
            whole = getattr(self, self.fused)(x)
            parts = whole.split([self.h * self.d, self.g * self.d, self.g * self.d], -1)
        else:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        counts = (self.h, self.g, self.g)
        return [part.unflatten(-1, (n, self.d)) for part, n in zip(parts, counts, strict=True)]

    def forward(self, x):
        q, k, v = (part.transpose(1, 2) for part in self.projected(x))
        found = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(found.transpose(1, 2).flatten(2))


LAYOUTS = [
    {"fused": fused, "told": told, "place": place, "conv1d": conv1d}
    for fused in ("", "qkv_proj", "c_attn", "Wqkv")
    for told, place in (
        (("h", "g", "d"), "module"), (("h", "g", "d"), "config"), (("h", "g"), "config"),
        (("h", "d"), "module"),
    )
    for conv1d in (False, True)
]  # fmt: skip


def depends_on(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Returns where the gradient of an output is not zero, for each parameter it touches."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(
        output.square().sum(), parameters, allow_unused=True, retain_graph=True
    )
    touched = {n: g != 0 for n, g in zip(names, found, strict=True) if g is not None}
    return {name: mask for name, mask in touched.items() if mask.any()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("h", "g", "d"), [(4, 4, 3), (4, 2, 2), (4, 1, 6), (6, 3, 5), (2, 1, 3)])
def test_a_head_is_what_its_projection_depends_on(h, g, d, layout):
    torch.manual_seed(0)
    module = Attention(h, g, d, **layout)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    cut = partition(module, "head")
    block = f"{layout['fused']}." if layout["fused"] else ""
    assert len(cut.names) == h + 2 * g
    projected = zip(
        ("query", "key", "value"), module.projected(torch.randn(2, 5, WIDTH)), strict=True
    )
    for part, heads in projected:
        for i in range(heads.shape[-2]):
            expected = depends_on(module, heads[..., i, :])
            found = members(cut, f"{block}{part}.{i}")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found)


def test_sizes_alone_tell_separate_heads():
    """Queries and keys have the same head_dim: H of the one gives G of the other."""
    for h, g, d in ((8, 2, 4), (8, 8, 4), (6, 1, 2)):
        rules = {r.parameter: r for r in partition_rules(Attention(h, g, d, told=("h",)), "head")}
        assert {rules[f"{name}_proj.weight"].unit for name in "qkv"} == {d}


def test_a_fused_projection_three_times_its_inputs_has_as_many_keys_as_queries():
    module = Attention(4, 4, WIDTH // 4, fused="qkv", told=("h",))
    (rule,) = [r for r in partition_rules(module, "head") if r.parameter == "qkv.weight"]
    assert (rule.unit, rule.sizes) == (WIDTH // 4, ())


@pytest.mark.parametrize("blocks", ["head", "adam_mini"])
@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Attention(4, 1, 5, fused="qkv", told=("h",)), "how many heads keys and values have"),
        (Attention(4, 2, 2, fused="qkv", told=()), "how many heads it has"),
        (Attention(4, 2, 2, told=()), "how many heads it has"),
        (Attention(4, 3, 2, told=("h",)), "4 heads do not share 3"),
        (Attention(4, 2, 3, fused="qkv_proj", told=("h", "g")), None),
    ],
)
def test_heads_that_cannot_be_told_are_refused_with_the_mapping_to_give(module, why, blocks):
    if why is None:
        assert partition(module, blocks)
        return
    with pytest.raises(ValueError, match=rf"(?s){why}.*mapping.*'query 0'"):
        partition(module, blocks)


def test_what_is_said_wrong_is_refused():
    module = Attention(4, 2, 3, fused="qkv")
    module.head_dim = 5
    with pytest.raises(ValueError, match="do not fill it"):
        partition(module, "head")
    module = Attention(4, 2, 3)
    module.num_key_value_heads = 4
    with pytest.raises(ValueError, match="cannot be told"):
        partition(module, "head")


def test_adam_mini_cuts_query_and_key_by_head_and_value_by_neuron():
    for fused in ("", "qkv_proj"):
        module = Attention(4, 2, 3, fused=fused, place="config")
        net = nn.ModuleDict({"attn": module, "out": nn.Linear(WIDTH, 2)})
        cut = partition(net, "adam_mini")
        block = "attn.qkv_proj." if fused else "attn."
        value = f"{block}value" if fused else "attn.v_proj"
        counts = {name: cut.groups.count(name) for name in set(cut.groups)}
        assert counts[f"{block}query"] == 4
        assert counts[f"{block}key"] == 2
        assert counts[value] == 6


def test_rules_with_uneven_parts_are_printed_and_given_back():
    module = Attention(4, 2, 3, fused="qkv")
    rules = partition_rules(module, "head")
    again = partition(module, [eval(repr(rule)) for rule in rules])
    assert torch.equal(again.labels, partition(module, "head").labels)
    with pytest.raises(ValueError, match="a size from 1 on"):
        BlockRule("*", "x", parts=("a", "b"), sizes=(3,))
    with pytest.raises(ValueError, match="parts of 5 in all"):
        partition(module, [BlockRule("qkv.weight", "x", parts=("a", "b"), sizes=(3, 2))])


# Against dense Hessians -------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn, self.out = attention, nn.Linear(WIDTH, 3)

    def forward(self, x):
        found = (
            self.attn(x, x, x)[0] if isinstance(self.attn, nn.MultiheadAttention) else self.attn(x)
        )
        return self.out(found.mean(1))


def dense_norms(net, loss, cut) -> np.ndarray:
    """Returns the Frobenius norms of the blocks of a Hessian by double backward."""
    parameters = [net.get_parameter(name) for name in cut.space.names]
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([part.reshape(-1) for part in gradient])
    rows = [
        torch.cat(
            [p.reshape(-1) for p in torch.autograd.grad(entry, parameters, retain_graph=True)]
        )
        for entry in flat
    ]
    squared, labels = torch.stack(rows).square(), cut.labels
    count = len(cut.names)
    return np.array(
        [
            [float(squared[labels == i][:, labels == j].sum() ** 0.5) for j in range(count)]
            for i in range(count)
        ]
    )


@pytest.mark.parametrize(
    "attention",
    [
        Attention(4, 2, 2, place="config"),
        Attention(4, 1, 3, fused="qkv_proj"),
        Attention(2, 2, 6, fused="c_attn", told=("h",), conv1d=True),
        Attention(4, 2, 3, fused="c_attn", conv1d=True),
        nn.MultiheadAttention(WIDTH, 3, batch_first=True),
    ],
    ids=["llama", "fused", "gpt2", "fused Conv1D", "torch"],
)
def test_block_norms_by_head_are_those_of_the_dense_hessian(attention):
    torch.manual_seed(0)
    net = Net(attention).double()
    batch = (torch.randn(6, 4, WIDTH).double(), torch.randint(3, (6,)))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    found = block_structure(net, loss, [batch], blocks="head", exact=True)
    cut = partition(net, "head")
    assert found.names == cut.names
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = dense_norms(net, loss(net, batch), cut)
    np.testing.assert_allclose(found.frobenius, exact, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("conv1d", [False, True])
def test_an_output_projection_has_its_heads_in_columns(conv1d):
    """Head i of the output projection is what meets the outputs of head i."""
    module = Attention(4, 2, 3, conv1d=conv1d)
    dim = 0 if conv1d else 1
    cut = partition(
        module, [BlockRule("o_proj.weight", "o", unit=3, dim=dim), BlockRule("*", None)]
    )
    inputs = torch.randn(5, 4, 3)
    for i in range(4):
        one = torch.zeros_like(inputs)
        one[:, i] = inputs[:, i]
        output = module.o_proj(one.flatten(1)) - module.o_proj(torch.zeros(5, 12))
        expected = depends_on(module, output)["o_proj.weight"]
        assert torch.equal(members(cut, f"o.{i}")["o_proj.weight"], expected)
