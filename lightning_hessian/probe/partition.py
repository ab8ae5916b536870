"""How the parameters fall into blocks: one number for each coordinate of a parameter space."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_hessian.probe.parameters import ParameterSelection, ParameterSpace
from lightning_hessian.probe.partition_rules import NAMED, BlockRule, partition_rules
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import glob, is_collection, nonempty_text

Blocks: TypeAlias = str | Mapping[str, str | Sequence[str]] | Sequence[BlockRule]
"""A named partition, a mapping from block names to globs and slices, or rules."""

_MOST_BLOCKS = 2000
"""Above so many, the matrices [B, B] and the at least 2 B products are out of reach."""

_SLICE = re.compile(r"^(?P<pattern>.*)\[(?P<index>[-\d:, ]*:[-\d:, ]*)\]$")
"""A pattern that ends in a slice; with no colon in it, the bracket is part of the glob."""

_Key: TypeAlias = tuple[str, str]
"""Name of a block, and of the group that it is cut from."""

_Cuts: TypeAlias = dict[str, tuple[list[_Key], Tensor]]
"""For each parameter its blocks and, flat, which of them each element is in (-1: none)."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Blocks of the parameters of a module.

    Attributes:
        space: The selected parameters that have at least one coordinate in a block.
        names: Names of the blocks [B].
        groups: The layer, or the part of a fused layer, that each block is cut from [B].
        labels: int64 [n] on the CPU: the number of each coordinate's block, -1 for none.
    """

    space: ParameterSpace
    names: tuple[str, ...]
    groups: tuple[str, ...]
    labels: Tensor

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each block [B]."""
        counts = torch.bincount(self.labels[self.labels >= 0], minlength=len(self.names))
        return tuple(counts.tolist())


def partition(
    module: nn.Module, blocks: Blocks, parameters: ParameterSelection = None
) -> Partition:
    """Return the blocks that ``blocks`` makes of the selected parameters.

    Args:
        module: Any module.
        blocks: A name that `partition_rules` knows; or a mapping from the name of each block to a
            glob or a list of globs, each of which may end in a slice with a colon
            (``"attn.c_attn.weight[:, 0:64]"``); or a sequence of `BlockRule`, of which the first
            that matches a parameter decides.
        parameters: Which parameters there are to cut, as in `ParameterSpace.select`.

    Raises:
        ValueError: An unknown name, a pattern or slice that matches nothing, blocks that overlap,
            a partition that the module does not have, or one of more than 2000 blocks.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> partition(net, "neuron").names
        ('0.0', '0.1', '2.0', '2.1')
        >>> partition(net, {"in": "0.*", "out": ["2.bias", "2.weight[0:1]"]}).sizes
        (8, 4)
    """
    blocks = partition_choice("blocks", blocks)
    space = ParameterSpace.select(module, parameters)
    if isinstance(blocks, str):
        cuts = _by_rules(module, space, partition_rules(module, blocks))
    elif isinstance(blocks, Mapping):
        cuts = _by_mapping(module, space, blocks)
    else:
        cuts = _by_rules(module, space, blocks)
    if not cuts:
        raise ValueError(
            f"blocks={blocks!r} cuts none of the {len(space.names)} selected parameter tensors, of "
            f"which the first is {space.names[0]!r}. Change `blocks` or `parameters`."
        )
    found = _numbered(module, cuts)
    if len(found.names) > _MOST_BLOCKS:
        raise ValueError(
            f"blocks={blocks if isinstance(blocks, str) else '...'!r} makes {len(found.names)} "
            f"blocks; at most {_MOST_BLOCKS} can be measured. Join neighbours, as in "
            f"BlockRule({found.space.names[0]!r}, 'name', unit=100), or narrow `parameters`."
        )
    return found


def partition_choice(name: str, value: Any) -> Any:
    """Apply the rule of ``blocks``: a named partition, names with globs, or rules."""
    if isinstance(value, str) and value in NAMED:
        return value
    if isinstance(value, Mapping) and value:
        for key, patterns in value.items():
            nonempty_text(f"{name}: a name of a block", key)
            for pattern in patterns if is_collection(patterns) and patterns else [patterns]:
                glob(f"{name}[{key!r}]", pattern)
        return dict(value)
    if is_collection(value) and value and all(isinstance(rule, BlockRule) for rule in value):
        return list(value)
    raise ArgumentError(
        name,
        value,
        f"Give one of {', '.join(NAMED)}, a mapping from names to globs, or a list of BlockRule.",
    )


def _numbered(module: nn.Module, cuts: _Cuts) -> Partition:
    """Number the blocks in the order of their first mention."""
    kept = {parameter for name, parameter in module.named_parameters() if name in cuts}
    space = ParameterSpace.select(module, lambda _, parameter: parameter in kept)
    number: dict[str, int] = {}
    groups: list[str] = []
    labels = []
    for name in space.names:
        keys, owner = cuts[name]
        for block, group in keys:
            if block not in number:
                number[block] = len(number)
                groups.append(group)
        table = torch.tensor([*(number[block] for block, _ in keys), -1])
        labels.append(table[owner])
    return Partition(space, tuple(number), tuple(groups), torch.cat(labels))


def _by_rules(module: nn.Module, space: ParameterSpace, rules: Sequence[BlockRule]) -> _Cuts:
    shapes = dict(zip(space.names, space.shapes, strict=True))
    cuts: _Cuts = {}
    seen: set[str] = set()
    for rule in rules:
        for name in _matching(module, rule.parameter):
            if name in shapes and name not in seen and rule.block is not None:
                cuts[name] = _cut(rule, rule.block, shapes[name])
            seen.add(name)
    return cuts


def _cut(rule: BlockRule, block: str, shape: torch.Size) -> tuple[list[_Key], Tensor]:
    if rule.unit is None and not rule.parts:
        return [(block, block)], torch.zeros(shape.numel(), dtype=torch.int64)
    if not -len(shape) <= rule.dim < len(shape):
        raise ValueError(
            f"{rule} cuts along dimension {rule.dim} of a parameter of shape {tuple(shape)}. "
            "Change `dim`, or leave `unit` and `parts` out."
        )
    piece, rest = divmod(shape[rule.dim], len(rule.units))
    if rest and not rule.sizes:
        raise ValueError(
            f"{rule} has {len(rule.parts)} parts, which do not divide {shape[rule.dim]}, the size "
            f"of dimension {rule.dim}. Give slices by a mapping instead."
        )
    if rule.sizes and sum(rule.sizes) != shape[rule.dim]:
        raise ValueError(
            f"{rule} has parts of {sum(rule.sizes)} in all, but dimension {rule.dim} has "
            f"{shape[rule.dim]}. Change `sizes`, or give slices by a mapping instead."
        )
    pieces = rule.sizes or (piece,) * len(rule.units)
    keys: list[_Key] = []
    along = []
    for part, unit, piece in zip(rule.parts or ("",), rule.units, pieces, strict=True):
        group = f"{block}.{part}" if part else block
        along.append(torch.arange(piece) // (unit or piece) + len(keys))
        if unit is None:
            keys.append((group, group))
        else:
            keys += [(f"{group}.{i}", group) for i in range(math.ceil(piece / unit))]
    view = [1] * len(shape)
    view[rule.dim] = -1
    return keys, torch.cat(along).view(view).expand(shape).reshape(-1)


def _by_mapping(
    module: nn.Module, space: ParameterSpace, blocks: Mapping[str, str | Sequence[str]]
) -> _Cuts:
    shapes = dict(zip(space.names, space.shapes, strict=True))
    owners = {name: torch.full(shape, -1) for name, shape in shapes.items()}
    names = list(blocks)
    for number, (block, patterns) in enumerate(blocks.items()):
        mine = 0
        for text in [patterns] if isinstance(patterns, str) else patterns:
            found = _SLICE.match(text)
            pattern, index = (found["pattern"], found["index"]) if found else (text, "")
            for name in _matching(module, pattern):
                if name not in shapes:
                    continue
                view = _indexed(owners[name], index, text)
                others = view[(view >= 0) & (view != number)]
                if others.numel():
                    raise ValueError(
                        f"Blocks {names[int(others[0])]!r} and {block!r} overlap in {name!r}. Each "
                        "number belongs to one block; narrow one of the patterns."
                    )
                view.fill_(number)
                mine += view.numel()
        if not mine:
            raise ValueError(
                f"Block {block!r}: {patterns!r} holds no selected parameter. Correct the pattern "
                "or the slice, or select its parameters (`parameters=`)."
            )
    keys = [(block, block) for block in blocks]
    return {n: (keys, o.reshape(-1)) for n, o in owners.items() if bool((o >= 0).any())}


def _indexed(tensor: Tensor, index: str, text: str) -> Tensor:
    """Return a view by an index such as ``"0:4, :"``; the whole by an empty one."""
    try:
        return tensor[tuple(_as_slice(part) for part in index.split(",") if part.strip())]
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"The slice of {text!r} does not fit a parameter of shape {tuple(tensor.shape)} "
            f"({error}). Write it as in 'weight[0:4, :]'."
        ) from error


def _as_slice(text: str) -> slice:
    numbers = [int(number) if number.strip() else None for number in text.split(":")]
    if len(numbers) == 1:  # one index: a slice too, so that the result is a view
        return slice(numbers[0], (numbers[0] or 0) + 1 or None)
    return slice(*numbers)


def _matching(module: nn.Module, pattern: str) -> tuple[str, ...]:
    try:
        return ParameterSpace.select(module, pattern).names
    except ValueError as error:
        raise ValueError(str(error).replace("parameters=", "blocks: ", 1)) from error
