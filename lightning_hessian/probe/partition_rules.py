"""The rules by which named partitions cut a module: layers, neurons, classes, heads, tokens.

A partition is a list of `BlockRule`, one line for each parameter, which can be printed, edited
and given back. HBS finds that the Hessian is near block-diagonal with one block for each neuron
and class (part II), and for query and key of a Transformer one for each head (Adam-mini, HBS
implication II).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_hessian.probe.arguments import a_module
from lightning_hessian.probe.parameters import clean_name
from lightning_hessian.probe.partition_heads import (
    FUSED,
    SEPARATE,
    Heads,
    fused_sizes,
    heads_of,
    separate_units,
)
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import (
    check_fields,
    checked,
    glob,
    is_collection,
    nonempty_text,
    one_of,
    optional,
    texts,
    whole_number,
)

_QKV = ("query", "key", "value")
_ROWS = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def _unit(name: str, value: Any) -> Any:
    """Apply the rule of ``unit``: a size from 1 on, None, or a tuple of these."""
    size = optional(
        whole_number(least=1, because="A block needs at least one index."), "for a single block"
    )
    if is_collection(value):
        return tuple(size(name, one) for one in value)
    return size(name, value)


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    """Check ``sizes``: a tuple of sizes from 1 on."""
    if not is_collection(value):
        raise ArgumentError(name, value, "Give a tuple of sizes, one for each part.")
    size = whole_number(least=1, because="A part has at least one index.")
    return tuple(size(name, one) for one in value)


@dataclass(frozen=True)
class BlockRule:
    """Cuts the parameters that match into blocks.

    Attributes:
        parameter: Glob over parameter names, or ``"re:<expression>"``.
        block: Name of the block, or the beginning of the names where there are several; None
            leaves the parameters out of every block.
        unit: So many neighbouring indices along ``dim`` make a block (1: each row its own; the
            head dimension: each head); None for all of them. The last block may be smaller. A
            tuple gives one for each part.
        dim: The dimension along which the units lie: 0 for the outputs of ``nn.Linear`` and
            ``nn.Conv2d``, 1 for those of Hugging Face's ``Conv1D``, whose weight is transposed.
        parts: Names of parts fused along ``dim``, such as ``("query", "key", "value")``; units
            are counted anew in each.
        sizes: Their sizes along ``dim``; by default they are equal. With grouped queries, the
            parts of a fused projection are not.

    Raises:
        ValueError: A unit or size below 1, or not as many units or sizes as parts.

    Example:
        >>> BlockRule("wte.weight", "wte", unit=500)  # tokens in groups of 500
        BlockRule(parameter='wte.weight', block='wte', unit=500, dim=0, parts=())
    """

    parameter: str
    block: str | None
    unit: int | tuple[int | None, ...] | None = None
    dim: int = 0
    parts: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = texts("Give a tuple of names.", empty=True)
        check_fields(
            self,
            {
                "parameter": glob,
                "block": optional(nonempty_text, "to leave the parameters out of every block"),
                "unit": _unit,
                "dim": whole_number(least=-64, most=63),
                "parts": names,
                "sizes": _sizes,
            },
        )
        if len(self.units) != max(1, len(self.parts)):
            raise ArgumentError(
                "unit",
                self.unit,
                f"It has {len(self.units)} units for {len(self.parts)} parts; give one for each.",
            )
        if self.sizes and len(self.sizes) != len(self.parts):
            raise ArgumentError(
                "sizes", self.sizes, f"Give each of the {len(self.parts)} parts a size from 1 on."
            )

    def __repr__(self) -> str:
        shown = [f.name for f in dataclasses.fields(self) if f.name != "sizes" or self.sizes]
        return f"BlockRule({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def units(self) -> tuple[int | None, ...]:
        """The unit of each part; of the whole where there are no parts."""
        if isinstance(self.unit, tuple):
            return self.unit
        return (self.unit,) * max(1, len(self.parts))


@checked({"module": a_module, "name": lambda name, value: one_of(*NAMED)(name, value)})
def partition_rules(module: nn.Module, name: str) -> list[BlockRule]:
    """Return the rules that a named partition stands for in ``module``.

    - ``"layer"``: a block for each module that holds parameters (weight with bias).
    - ``"neuron"``: a block for each output of a linear, recurrent or fused attention layer and
      each output channel of a convolution, with its bias; every other layer is one block.
    - ``"class"``: a block for each output of the last linear or convolutional layer in the order
      of definition. Nothing else is in a block.
    - ``"head"``: query, key and value of each attention layer by head, with grouped queries too
      (`partition_heads`). Nothing else.
    - ``"embedding"``: a block for each row (token) of each embedding. Nothing else.
    - ``"adam_mini"``: query and key by head; embeddings and the last linear layer by token; every
      other weight by output neuron; norms by layer (Zhang et al., ICLR 2025, algorithm 3).

    A tied parameter goes by the layer that the partition names first: as a row of the output in
    ``"class"``, of the embedding in the others.

    Raises:
        ValueError: An unknown name, a partition that the module does not have, or an attention
            layer whose heads cannot be told (``"head"``, ``"adam_mini"``).

    Example:
        >>> for rule in partition_rules(nn.MultiheadAttention(8, 2), "head"):
        ...     print(rule.parameter, rule.unit, rule.parts)
        in_proj_weight 4 ('query', 'key', 'value')
        in_proj_bias 4 ('query', 'key', 'value')
    """
    rules: dict[str, BlockRule] = {}
    for rule in NAMED[name](module):
        rules.setdefault(rule.parameter, rule)
    if not rules:
        raise ValueError(
            f"blocks={name!r} finds nothing to cut in {type(module).__name__}. Give a mapping from "
            "names to globs with slices, such as {'head 0': 'attention.weight[0:8]'}."
        )
    return list(rules.values())


def _by_layer(module: nn.Module) -> Iterator[BlockRule]:
    for prefix, layer, own in _layers(module):
        for local, parameter in own.items():
            yield BlockRule(parameter, _layer_name(prefix, layer, local))


def _by_neuron(module: nn.Module) -> Iterator[BlockRule]:
    for prefix, layer, own in _layers(module):
        dims = _output_dims(layer)
        for local, parameter in own.items():
            block = _layer_name(prefix, layer, local)
            if local not in dims:
                yield BlockRule(parameter, block)
            elif isinstance(layer, nn.MultiheadAttention):
                yield _of_attention(layer, block, local, parameter, unit=1)
            elif isinstance(layer, nn.RNNBase):
                # The rows of input and hidden weights and of both biases make the same gates.
                part = local.split("_", 2)[2] if "_hr_" not in local else local
                yield BlockRule(parameter, f"{block}.{part}", 1)
            else:
                yield BlockRule(parameter, block, 1, dims[local])


def _by_class(module: nn.Module) -> Iterator[BlockRule]:
    outputs = [entry for entry in _layers(module) if "weight" in _output_dims(entry[1])]
    if outputs:
        prefix, layer, own = outputs[-1]
        dims = _output_dims(layer)
        for local, parameter in own.items():
            yield BlockRule(parameter, _layer_name(prefix, layer, local), 1, dims[local])


def _by_embedding(module: nn.Module) -> Iterator[BlockRule]:
    for prefix, layer, own in _layers(module):
        if isinstance(layer, _EMBEDDINGS):
            for local, parameter in own.items():
                yield BlockRule(parameter, _layer_name(prefix, layer, local), unit=1)


def _by_head(module: nn.Module) -> Iterator[BlockRule]:
    layers = {prefix: (layer, own) for prefix, layer, own in _layers(module)}
    for prefix, attention, own in _layers(module):
        if isinstance(attention, nn.MultiheadAttention):
            for local, parameter in own.items():
                if local in _output_dims(attention):
                    block = prefix or type(attention).__name__
                    yield _of_attention(attention, block, local, parameter, attention.head_dim)
            continue
        inside = f"{prefix}." if prefix else ""
        where = prefix or type(attention).__name__
        heads = heads_of(attention)
        for child in FUSED:
            if inside + child in layers and (heads.queries or child != "in_proj"):
                yield from _fused(*layers[inside + child], inside + child, heads, where)
        found = {
            part: inside + child
            for part, names in SEPARATE.items()
            for child in names
            if inside + child in layers and "weight" in _output_dims(layers[inside + child][0])
        }
        if found and (heads.queries or len(found) == len(_QKV)):
            sizes = {part: _num_outputs(layers[name][0]) for part, name in found.items()}
            for part, unit in separate_units(heads, sizes, where).items():
                layer, own = layers[found[part]]
                for local, parameter in own.items():
                    dim = _output_dims(layer)[local]
                    yield BlockRule(parameter, f"{inside}{part}", unit, dim)


def _by_adam_mini(module: nn.Module) -> Iterator[BlockRule]:
    yield from _by_embedding(module)
    yield from _by_class(module)
    for rule in _by_head(module):
        if rule.parts:
            yield dataclasses.replace(rule, unit=(*rule.units[:2], 1))
        elif rule.block is not None and not rule.block.endswith("value"):
            yield rule
    yield from _by_neuron(module)


NAMED: dict[str, Callable[[nn.Module], Iterator[BlockRule]]] = {
    "layer": _by_layer,
    "neuron": _by_neuron,
    "class": _by_class,
    "head": _by_head,
    "embedding": _by_embedding,
    "adam_mini": _by_adam_mini,
}
"""The named partitions."""


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """Yield each submodule with its name and its own trainable parameters: local to full name."""
    first = {parameter: clean_name(name) for name, parameter in module.named_parameters()}
    for prefix, layer in module.named_modules():
        own = layer.named_parameters(recurse=False)
        yield clean_name(prefix), layer, {local: first[p] for local, p in own if p.requires_grad}


def _layer_name(prefix: str, layer: nn.Module, local: str) -> str:
    """Return the name of a layer; parameters of an unknown module itself stand for themselves."""
    return prefix or (type(layer).__name__ if _output_dims(layer) else local)


def _output_dims(layer: nn.Module) -> dict[str, int]:
    """Return along which dimension of each parameter the outputs of a layer lie."""
    if isinstance(layer, _ROWS):
        return {"weight": 0, "bias": 0}
    if isinstance(layer, _TRANSPOSED) and layer.groups == 1:
        return {"weight": 1, "bias": 0}
    if type(layer).__name__ == "Conv1D":  # Hugging Face's, a linear layer with transposed weight
        return {"weight": 1, "bias": 0}
    if isinstance(layer, nn.MultiheadAttention):
        return dict.fromkeys(
            ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"), 0
        )
    if isinstance(layer, nn.RNNBase):
        return {local: 0 for local, _ in layer.named_parameters(recurse=False)}
    return {}


def _of_attention(
    attention: nn.MultiheadAttention, block: str, local: str, parameter: str, unit: int
) -> BlockRule:
    """Cut a parameter of torch's own attention: fused, or one weight for each of three sizes."""
    if local.startswith("in_proj"):
        return BlockRule(parameter, block, unit, parts=_QKV)
    part = next(name for name in _QKV if name[0] == local[0])
    return BlockRule(parameter, f"{block}.{part}", unit)


def _num_outputs(layer: nn.Module) -> int:
    return layer.get_parameter("weight").shape[_output_dims(layer)["weight"]]


def _fused(
    layer: nn.Module, own: Mapping[str, str], block: str, heads: Heads, where: str
) -> Iterator[BlockRule]:
    """Cut a fused projection by head; with grouped queries its parts are of different sizes."""
    dims = _output_dims(layer)
    if "weight" not in dims:
        return
    inputs = layer.get_parameter("weight").shape[1 - dims["weight"]]
    unit, *sizes = fused_sizes(heads, _num_outputs(layer), inputs, where)
    for local, parameter in own.items():
        uneven = tuple(sizes) if len(set(sizes)) > 1 else ()
        yield BlockRule(parameter, block, unit, dims[local], _QKV, uneven)
