"""Partitions: which coordinate lies in which block, on torch's modules and mimics of others."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from lightning_hessian import BlockRule, partition_rules
from lightning_hessian.probe.partition import Partition, partition

WIDTH, HEADS, TOKENS = 6, 2, 5


class Conv1D(nn.Module):
    """As in transformers.pytorch_utils: y = x W + b, with W [inputs, outputs]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GPT2Attention(nn.Module):
    """Names and layout of Hugging Face's GPT-2: query, key, value one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.c_attn = Conv1D(3 * WIDTH, WIDTH)
        self.c_proj = Conv1D(WIDTH, WIDTH)


class GPT2Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = GPT2Attention()
        self.mlp = nn.Sequential(Conv1D(8, WIDTH), nn.GELU(), Conv1D(WIDTH, 8))


class GPT2(nn.Module):
    """Tied head, as GPT2LMHeadModel has."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(TOKENS, WIDTH), "h": nn.ModuleList([GPT2Block()])}
        )
        self.lm_head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight


class SeparateAttention(nn.Module):
    """As in Llama with grouped queries: fewer key and value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj = nn.Linear(8, 8)
        self.k_proj = nn.Linear(8, 4)
        self.v_proj = nn.Linear(8, 4)


def members(cut: Partition, block: str) -> dict[str, Tensor]:
    """Returns where a block lies, a mask for each parameter that it touches."""
    mask = (cut.labels == cut.names.index(block)).split(list(cut.space.sizes))
    shaped = zip(cut.space.names, cut.space.shapes, mask, strict=True)
    return {name: part.view(shape) for name, shape, part in shaped if part.any()}


def assert_whole(cut: Partition) -> None:
    assert sum(cut.sizes) == cut.space.size == len(cut.labels)
    assert len(cut.groups) == len(cut.names) == len(set(cut.names)) == len(cut.sizes)
    assert min(cut.sizes) > 0


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )


def test_layers_hold_weight_and_bias():
    cut = partition(convnet(), "layer")
    assert_whole(cut)
    assert cut.names == cut.groups == ("0", "1", "4")
    assert cut.sizes == (30, 6, 26)


def test_neurons_are_rows_and_channels_with_their_bias():
    cut = partition(convnet(), "neuron")
    assert_whole(cut)
    assert cut.names == ("0.0", "0.1", "0.2", "1", "4.0", "4.1")
    assert cut.groups == ("0", "0", "0", "1", "4", "4")
    found = members(cut, "0.1")
    assert found.keys() == {"0.weight", "0.bias"}
    assert found["0.weight"][1].all()
    assert found["0.weight"].sum() == 9
    assert found["0.bias"].tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("layer", "outputs", "size"),
    [
        (nn.Linear(4, 3), 3, 5),
        (Conv1D(3, 4), 3, 5),
        (nn.Conv1d(2, 3, 2), 3, 5),
        (nn.ConvTranspose2d(4, 3, 1), 3, 5),
        (nn.ConvTranspose2d(4, 4, 1, groups=2), 1, 12),  # channels by group: left whole
        (nn.Bilinear(2, 2, 3), 3, 5),
        (nn.LSTM(2, 3), 12, 7),  # the four gates of three units
        (nn.GRU(2, 3, bidirectional=True), 18, 7),
        (nn.LayerNorm(4), 1, 8),
        (nn.Embedding(4, 2), 1, 8),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_outputs_of_a_layer(layer, outputs, size):
    cut = partition(nn.Sequential(layer), "neuron")
    assert_whole(cut)
    assert cut.sizes == (size,) * outputs


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), Conv1D(3, 4), nn.ConvTranspose2d(4, 3, 1)],
                         ids=lambda layer: type(layer).__name__)  # fmt: skip
def test_a_neuron_is_what_its_output_depends_on(layer):
    """By autograd, not by our knowledge of layouts."""
    cut = partition(nn.Sequential(layer), "neuron")
    shape = (2, 4, 1, 1) if isinstance(layer, nn.ConvTranspose2d) else (2, 4)
    outputs = layer(torch.randn(shape)).flatten(1)
    for neuron in range(3):
        gradient = torch.autograd.grad(outputs[:, neuron].sum(), list(layer.parameters()),
                                       retain_graph=True)  # fmt: skip
        reached = torch.cat([part.flatten() for part in gradient]) != 0
        assert torch.equal(reached, cut.labels == neuron)


def test_classes_are_the_rows_of_the_last_layer_and_nothing_else():
    cut = partition(convnet(), "class")
    assert_whole(cut)
    assert cut.space.names == ("4.weight", "4.bias")
    assert cut.names == ("4.0", "4.1")
    assert cut.sizes == (13, 13)


@pytest.mark.parametrize("different", [False, True], ids=["fused", "key and value of other size"])
def test_heads_of_torch(different):
    sizes = {"kdim": 3, "vdim": 3} if different else {}
    cut = partition(nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, **sizes)}), "head")
    assert cut.names == tuple(f"attn.{p}.{h}" for p in ("query", "key", "value") for h in (0, 1))
    assert cut.groups[::2] == ("attn.query", "attn.key", "attn.value")
    head = WIDTH // HEADS
    inputs = (WIDTH, 3, 3) if different else (WIDTH,) * 3
    assert cut.sizes == tuple(head * (inputs[p] + 1) for p in range(3) for _ in range(HEADS))
    bias = members(cut, "attn.key.1")["attn.in_proj_bias"]
    assert bias.nonzero().flatten().tolist() == [9, 10, 11]


def test_heads_of_torch_are_what_the_attention_of_a_head_depends_on():
    """The weights of head 1 alone reach its attention pattern."""
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x = torch.randn(2, 4, WIDTH)
    _, pattern = attention(x, x, x, average_attn_weights=False)
    (gradient,) = torch.autograd.grad(pattern[:, 1].square().sum(), [attention.in_proj_weight])
    cut = partition(attention, "head", "in_proj_weight")
    reached = {cut.names[i] for i in cut.labels[gradient.flatten() != 0].tolist()}
    assert reached == {"MultiheadAttention.query.1", "MultiheadAttention.key.1"}


def test_heads_of_gpt2_are_columns_of_the_transposed_weight():
    cut = partition(GPT2(), "head")
    prefix = "transformer.h.0.attn.c_attn"
    assert cut.names == tuple(
        f"{prefix}.{p}.{h}" for p in ("query", "key", "value") for h in (0, 1)
    )
    found = members(cut, f"{prefix}.key.1")
    assert found[f"{prefix}.weight"][:, 9:12].all()
    assert found[f"{prefix}.weight"].sum() == WIDTH * 3
    assert found[f"{prefix}.bias"].nonzero().flatten().tolist() == [9, 10, 11]


def test_heads_of_separate_projections():
    cut = partition(nn.ModuleDict({"attn": SeparateAttention()}), "head")
    assert cut.sizes == (2 * 9,) * 4 + (2 * 9,) * 2 + (2 * 9,) * 2
    assert cut.names[:2] == ("attn.query.0", "attn.query.1")


def test_embedding_rows_and_groups_of_them():
    net = GPT2()
    rows = partition(net, "embedding")
    assert rows.sizes == (WIDTH,) * TOKENS
    (rule,) = partition_rules(net, "embedding")
    grouped = partition(net, [dataclasses.replace(rule, unit=2)])
    assert grouped.sizes == (2 * WIDTH, 2 * WIDTH, WIDTH)


def test_a_tied_head_has_classes():
    cut = partition(GPT2(), "class")
    assert cut.space.names == ("transformer.wte.weight",)
    assert cut.names == tuple(f"lm_head.{i}" for i in range(TOKENS))


def test_adam_mini():
    """Zhang et al., ICLR 2025, algorithm 3: by token, by head, by neuron, the rest whole."""
    cut = partition(GPT2(), "adam_mini")
    assert_whole(cut)
    block = "transformer.h.0"
    counts = {group: cut.groups.count(group) for group in cut.groups}
    assert counts == {
        "transformer.wte": TOKENS,
        f"{block}.ln_1": 1,
        f"{block}.attn.c_attn.query": HEADS,
        f"{block}.attn.c_attn.key": HEADS,
        f"{block}.attn.c_attn.value": WIDTH,
        f"{block}.attn.c_proj": WIDTH,
        f"{block}.mlp.0": 8,
        f"{block}.mlp.2": WIDTH,
    }


def test_a_compiled_module_has_the_same_blocks():
    net = convnet()
    for name in ("layer", "neuron", "class"):
        assert partition(torch.compile(net), name).names == partition(net, name).names


def test_frozen_parameters_are_in_no_block():
    net = convnet()
    net[0].weight.requires_grad_(False)
    cut = partition(net, "neuron")
    assert "0.weight" not in cut.space.names
    assert cut.sizes[:3] == (1, 1, 1)


def test_a_selection_narrows_every_partition():
    cut = partition(convnet(), "layer", parameters="*.weight")
    assert cut.sizes == (27, 3, 24)


# What the user says -----------------------------------------------------------------------------


def test_a_mapping_with_globs_and_slices():
    net = GPT2()
    cut = partition(
        net,
        {
            "query": "*.c_attn.weight[:, 0:6]",
            "last head": ["*.c_attn.weight[:, -3:]", "*.c_attn.bias[-3:]"],
            "mlp": ["*.mlp.*", "*.ln_1.bias"],
        },
    )
    assert cut.names == ("query", "last head", "mlp")
    assert cut.sizes == (36, 21, 48 + 8 + 48 + 6 + 6)
    weight = cut.labels.split(list(cut.space.sizes))[
        cut.space.names.index("transformer.h.0.attn.c_attn.weight")
    ].view(WIDTH, 18)
    assert weight[0].tolist() == [0] * 6 + [-1] * 9 + [1] * 3


def test_a_bracket_without_colon_is_a_glob():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert partition(net, {"ends": "[02].weight", "middle": "re:^1"}).sizes == (8, 6)


def test_one_index_beside_a_slice():
    net = nn.Linear(3, 4)
    found = members(partition(net, {"entry": "weight[-1, 1:2]", "bias": "bias"}), "entry")
    assert found["weight"].nonzero().tolist() == [[3, 1]]


def test_the_first_rule_that_matches_decides():
    net = convnet()
    rules = [
        BlockRule("1.*", None),
        BlockRule("4.weight", "columns", unit=4, dim=1),
        *partition_rules(net, "layer"),
    ]
    cut = partition(net, rules)
    assert cut.names == ("0", "columns.0", "columns.1", "columns.2", "4")
    assert "1.weight" not in cut.space.names
    assert members(cut, "columns.2")["4.weight"][:, 8:].all()


def test_rules_can_be_printed_and_given_back():
    net = GPT2()
    for name in ("layer", "neuron", "class", "head", "embedding", "adam_mini"):
        rules = [eval(repr(rule)) for rule in partition_rules(net, name)]
        cut, again = partition(net, name), partition(net, rules)
        assert again.names == cut.names
        assert torch.equal(again.labels, cut.labels)


# Misuse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("neurons", r"blocks='neurons'.*layer, neuron"),
        ("head", r"blocks='head' finds nothing to cut in Sequential.*mapping"),
        ("embedding", "finds nothing to cut"),
        (3, "blocks=3 .*mapping"),
        ([], r"blocks=\[\].*list of BlockRule"),
        ({}, "blocks={}.*mapping"),
        ({"a": "5.*"}, r"'5.\*' matches no parameter.*Nearest"),
        ({"a": "0.*", "b": "*.weight"}, r"Blocks 'a' and 'b' overlap in '0.weight'"),
        ({"a": "4.weight[0:1, :, :]"}, r"slice of '4.weight\[0:1, :, :\]' does not fit.*\(2, 12\)"),
        ({"a": "4.weight[5:9]"}, r"Block 'a': .* holds no selected parameter"),
        ([BlockRule("4.bias", "x", unit=1, dim=1)], r"dimension 1 of a parameter of shape \(2,\)"),
        ([BlockRule("4.weight", "x", parts=("a", "b", "c"))], "3 parts, which do not divide 2"),
    ],
)
def test_misuse_names_the_remedy(blocks, message):
    with pytest.raises(ValueError, match=message):
        partition(convnet(), blocks)


def test_too_many_blocks():
    with pytest.raises(ValueError, match=r"3000 blocks; at most 2000.*unit=100"):
        partition(nn.Embedding(3000, 2), "embedding")


def test_a_rule_without_sense():
    with pytest.raises(ValueError, match=r"unit=0.*at least 1"):
        BlockRule("*", "x", unit=0)
    with pytest.raises(ValueError, match="2 units for 3 parts"):
        BlockRule("*", "x", unit=(1, 2), parts=("a", "b", "c"))
