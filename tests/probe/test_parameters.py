"""The flat vector of parameters: which are in it, under which names, and how it is cut."""

from __future__ import annotations

import re

import pytest
import torch
from support.references import TiedHead
from torch import nn

from lightning_hessian.probe.parameters import ParameterSpace


def _encoder_and_head() -> nn.Module:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)),
            "head": nn.Linear(4, 2),
        }
    )


ALL = tuple(name for name, _ in _encoder_and_head().named_parameters())
WEIGHTS = ("encoder.0.weight", "encoder.2.weight", "head.weight")


# Selections -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (None, ALL),
        ("*", ALL),
        ("*.weight", WEIGHTS),
        ("head.weight", ("head.weight",)),
        ("encoder.?.bias", ("encoder.0.bias", "encoder.2.bias")),
        (["head.*", "encoder.0.*"], (ALL[0], ALL[1], ALL[4], ALL[5])),  # in the module's order
        (["*.weight", "head.weight"], WEIGHTS),  # matched twice, taken once
        (("head.bias",), ("head.bias",)),
        (re.compile(r"\.weight$"), WEIGHTS),
        (re.compile(r"^encoder\.\d\.bias"), ("encoder.0.bias", "encoder.2.bias")),
        ("re:head", ("head.weight", "head.bias")),
        (["re:^head", re.compile("0.bias")], ("encoder.0.bias", "head.weight", "head.bias")),
        (lambda name, parameter: parameter.ndim == 2, WEIGHTS),
        (lambda name, parameter: name.endswith("head.bias"), ("head.bias",)),
    ],
)
def test_a_selection_takes_the_parameters_that_match(selection, names):
    space = ParameterSpace.select(_encoder_and_head(), selection)
    assert space.names == names
    parameters = dict(_encoder_and_head().named_parameters())
    assert space.shapes == tuple(parameters[name].shape for name in names)
    assert space.size == sum(parameters[name].numel() for name in names)


def test_frozen_parameters_are_left_out():
    module = _encoder_and_head()
    module["encoder"].requires_grad_(False)
    assert ParameterSpace.select(module).names == ("head.weight", "head.bias")
    assert ParameterSpace.select(module, "*.weight").names == ("head.weight",)
    module["head"].weight.requires_grad_(False)
    assert ParameterSpace.select(module, lambda name, parameter: True).names == ("head.bias",)


@pytest.mark.parametrize(
    "selection",
    [
        "head.weight",
        "embedding.weight",
        ["embedding.*", "head.*"],
        "re:head",
        lambda n, p: "hea" in n,
    ],
)
def test_a_tied_parameter_stands_once_and_matches_by_any_of_its_names(selection):
    space = ParameterSpace.select(TiedHead(), selection)
    assert (space.names, space.size) == (("embedding.weight",), 28)


def test_all_of_a_tied_module_counts_the_tied_parameter_once():
    space = ParameterSpace.select(TiedHead())
    assert space.names == ("embedding.weight", "body.weight", "body.bias")


def _compiled_part() -> nn.Module:
    module = _encoder_and_head()
    module["encoder"] = torch.compile(module["encoder"], backend="eager")
    return module


@pytest.mark.parametrize(
    "compiled",
    [_compiled_part, lambda: torch.compile(_encoder_and_head(), backend="eager")],
    ids=["part", "whole"],
)
@pytest.mark.parametrize(
    "selection",
    [
        "encoder.0.weight",
        "re:^encoder.0.weight$",
        re.compile(r"^encoder\.0\.weight$"),
        lambda name, parameter: name == "encoder.0.weight",
    ],
    ids=["glob", "regex string", "regex", "predicate"],
)
def test_the_prefix_of_torch_compile_is_ignored(compiled, selection):
    module = compiled()
    space = ParameterSpace.select(module, selection)
    assert [name.replace("_orig_mod.", "") for name in space.names] == ["encoder.0.weight"]
    (value,) = space.values(module)
    assert value.shape == (4, 3)


# Flat vectors -----------------------------------------------------------------------------------


def test_split_and_flatten_are_inverse_and_in_the_order_of_torch():
    module = _encoder_and_head()
    space = ParameterSpace.select(module)
    expected = torch.nn.utils.parameters_to_vector(module.parameters())
    assert torch.equal(space.flatten(space.values(module)), expected)
    vector = torch.randn(space.size)
    assert torch.equal(space.flatten(space.split(vector)), vector)
    assert [part.shape for part in space.split(vector)] == list(space.shapes)


def test_split_gives_views():
    space = ParameterSpace.select(_encoder_and_head())
    vector = torch.zeros(space.size)
    for value, part in enumerate(space.split(vector), start=1):
        part.fill_(value)
    assert vector.tolist() == [
        float(i + 1) for i, size in enumerate(space.sizes) for _ in range(size)
    ]


def test_flatten_reads_parts_in_any_layout_and_precision():
    space = ParameterSpace.select(nn.Linear(3, 2))
    weight = torch.arange(6.0, dtype=torch.float64).view(3, 2).t()
    flat = space.flatten([weight, torch.ones(2, dtype=torch.bfloat16)])
    assert flat.dtype == torch.float32
    assert flat.tolist() == [0.0, 2.0, 4.0, 1.0, 3.0, 5.0, 1.0, 1.0]


def test_a_scalar_parameter_takes_one_place():
    module = nn.Module()
    module.temperature = nn.Parameter(torch.tensor(2.0))
    module.bias = nn.Parameter(torch.zeros(2))
    space = ParameterSpace.select(module)
    assert space.size == 3
    assert [part.shape for part in space.split(torch.ones(3))] == [(), (2,)]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("float32", "float32"), torch.float32),
        (("bfloat16", "bfloat16"), torch.float32),
        (("float16", "bfloat16"), torch.float32),
        (("float64", "float64"), torch.float64),
        (("float32", "float64"), torch.float64),
    ],
)
def test_vectors_have_the_widest_precision_and_at_least_float32(dtypes, expected):
    module = nn.Sequential(*(nn.Linear(2, 2).to(getattr(torch, dtype)) for dtype in dtypes))
    assert ParameterSpace.select(module).dtype == expected


def test_values_are_detached_and_in_at_least_single_precision():
    module = nn.Linear(3, 2).bfloat16()
    values = ParameterSpace.select(module).values(module)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in values)
    assert torch.equal(values[0], module.weight.detach().float())


# Refusals ---------------------------------------------------------------------------------------


def test_a_pattern_without_match_names_the_nearest():
    with pytest.raises(ValueError, match=r"'encoder\.0\.weigth'.*encoder\.0\.weight"):
        ParameterSpace.select(_encoder_and_head(), "encoder.0.weigth")


def test_one_pattern_without_match_among_several_is_refused():
    with pytest.raises(ValueError, match="decoder"):
        ParameterSpace.select(_encoder_and_head(), ["head.*", "decoder.*"])


def test_a_part_of_a_name_is_not_a_glob_and_the_message_says_so():
    with pytest.raises(ValueError, match="must match the whole name"):
        ParameterSpace.select(_encoder_and_head(), "head")


@pytest.mark.parametrize("pattern", ["re:^decoder", re.compile("^decoder")])
def test_a_regex_without_match_is_shown(pattern):
    with pytest.raises(ValueError, match="re:\\^decoder"):
        ParameterSpace.select(_encoder_and_head(), pattern)


def test_a_pattern_that_matches_only_frozen_parameters_says_so():
    module = _encoder_and_head()
    module["head"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"only frozen.*requires_grad=False"):
        ParameterSpace.select(module, "head.*")


@pytest.mark.parametrize("module", [nn.Tanh(), nn.Linear(2, 2).requires_grad_(False)])
def test_a_module_without_trainable_parameters_is_refused(module):
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        ParameterSpace.select(module)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="None for all"):
        ParameterSpace.select(_encoder_and_head(), [])


def test_a_predicate_that_accepts_nothing_is_refused():
    with pytest.raises(ValueError, match=r"none of the 6 trainable.*encoder\.0\.weight"):
        ParameterSpace.select(_encoder_and_head(), lambda name, parameter: False)


def test_a_lazy_module_is_refused_with_the_remedy():
    module = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"'1\.weight'.*one batch"):
        ParameterSpace.select(module)
    assert ParameterSpace.select(module, "0.*").size == 6


def test_a_complex_parameter_is_refused_and_can_be_left_out():
    module = nn.Linear(2, 2)
    module.spectrum = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'spectrum'.*complex64.*parameters="):
        ParameterSpace.select(module)
    assert ParameterSpace.select(module, ["weight", "bias"]).size == 6
