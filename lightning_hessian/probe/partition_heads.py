"""How many heads an attention module has, and how its projections are cut by them.

With grouped queries (GQA, MQA) there are H heads of queries but only G of keys and values, and a
fused projection has (H + 2 G) head_dim outputs, queries first. H, G and head_dim are read from
the module or, as in Hugging Face's Llama, from its ``config``; what is not said follows from the
sizes, because queries and keys have the same head_dim. What does not follow is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

FUSED = ("c_attn", "qkv", "qkv_proj", "Wqkv", "in_proj")
"""Children of an attention module that hold query, key and value one after the other."""

SEPARATE = {
    "query": ("q_proj", "query", "to_q", "q", "wq", "q_lin"),
    "key": ("k_proj", "key", "to_k", "k", "wk", "k_lin"),
    "value": ("v_proj", "value", "to_v", "v", "wv", "v_lin"),
}
"""Children of an attention module that hold one of the three."""

_NUM_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "nhead", "heads")
_NUM_GROUPS = (
    "num_key_value_heads", "num_kv_heads", "num_heads_kv", "n_kv_heads", "n_kv_head", "kv_n_heads",
    "n_head_kv", "kv_heads", "num_query_groups",
)  # fmt: skip
_HEAD_DIM = (
    "head_dim", "head_size", "attention_head_size", "dim_head", "d_head", "d_kv", "kv_channels",
)  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """What an attention module says of its heads; None for what it does not say.

    Attributes:
        queries: H, heads of queries.
        groups: G, heads of keys and of values.
        head_dim: Outputs of a head of queries, and of one of keys.
    """

    queries: int | None
    groups: int | None
    head_dim: int | None


def heads_of(attention: nn.Module) -> Heads:
    """Return what a module says of its heads, itself or by its configuration."""
    places = [attention, getattr(attention, "config", None)]
    queries = _number(places, _NUM_HEADS)
    groups = _number(places, _NUM_GROUPS)
    repeated = _number(places, ("num_key_value_groups", "n_rep"))  # H / G
    if groups is None and any(_entry(place, "multi_query") is True for place in places):
        groups = 1
    if groups is None and queries and repeated and queries % repeated == 0:
        groups = queries // repeated
    return Heads(queries, groups, _number(places, _HEAD_DIM))


def separate_units(heads: Heads, outputs: Mapping[str, int], where: str) -> dict[str, int]:
    """Return how many outputs make a head in each of separate projections.

    Args:
        heads: What the module says.
        outputs: Outputs of the projections there are, of ``"query"``, ``"key"``, ``"value"``.
        where: Name of the module, for the message.

    Raises:
        ValueError: It cannot be told.
    """
    queries, groups, dim = heads.queries, heads.groups, heads.head_dim
    if queries is None:
        raise _refusal(where, "it does not say how many heads it has", outputs)
    units: dict[str, int] = {}
    if "query" in outputs:
        units["query"] = _divided(outputs["query"], queries, where, "query", outputs)
        if dim is not None and units["query"] != dim and groups is None:
            raise _refusal(
                where, f"{queries} heads of {dim} are not its {outputs['query']} outputs", outputs
            )
        dim = units["query"]
    if groups is None and "key" in outputs and dim is not None:
        groups = _divided(outputs["key"], dim, where, "key", outputs)
    if groups is None and ("key" in outputs or "value" in outputs):
        raise _refusal(where, "it does not say how many heads keys and values have", outputs)
    if groups is not None and queries % groups:
        raise _refusal(where, f"{queries} heads do not share {groups} of keys evenly", outputs)
    for part in ("key", "value"):
        if part in outputs and groups is not None:
            units[part] = _divided(outputs[part], groups, where, part, outputs)
    if {"query", "key"} <= set(units) and units["query"] != units["key"]:
        raise _refusal(where, "its queries and keys are not of one size", outputs)
    return units


def fused_sizes(heads: Heads, outputs: int, inputs: int, where: str) -> tuple[int, int, int, int]:
    """Return the outputs of a head, and those of query, key and value in a fused projection.

    Args:
        heads: What the module says.
        outputs: Of the projection.
        inputs: Of the projection; the heads together are as wide as these where neither G nor
            head_dim is known.
        where: Name of the module, for the message.

    Raises:
        ValueError: It cannot be told.
    """
    queries, groups, dim = heads.queries, heads.groups, heads.head_dim
    named = {"query, key and value": outputs}
    if queries is None:
        raise _refusal(where, "it does not say how many heads it has", named)
    if groups is None and dim is None:
        if outputs != 3 * inputs or inputs % queries:
            raise _refusal(where, "it does not say how many heads keys and values have", named)
        groups, dim = queries, inputs // queries
    elif groups is None and dim is not None:
        groups, rest = divmod(outputs - queries * dim, 2 * dim)
        if rest or groups < 1:
            raise _refusal(where, f"{queries} heads of {dim} do not fill it", named)
    elif dim is None and groups is not None:
        dim = _divided(outputs, queries + 2 * groups, where, "query, key and value", named)
    assert groups is not None
    assert dim is not None
    if queries % groups or (queries + 2 * groups) * dim != outputs:
        raise _refusal(where, f"{queries} + 2 x {groups} heads of {dim} do not fill it", named)
    return dim, queries * dim, groups * dim, groups * dim


def _divided(
    outputs: int, count: int, where: str, part: str, all_outputs: Mapping[str, int]
) -> int:
    size, rest = divmod(outputs, count)
    if rest or not size:
        raise _refusal(
            where, f"{count} does not divide the {outputs} outputs of {part}", all_outputs
        )
    return size


def _refusal(where: str, why: str, outputs: Mapping[str, int]) -> ValueError:
    sizes = ", ".join(f"{part} {size}" for part, size in outputs.items())
    return ValueError(
        f"blocks: the heads of {where!r} (outputs: {sizes}) cannot be told: {why}. Give a mapping "
        "from names to slices, one for each head, such as "
        f"{{'query 0': '{where}.NAME.weight[0:8]', 'key 0': '{where}.NAME.weight[64:72]'}}, or "
        "set num_heads, num_key_value_heads and "
        "head_dim on the module."
    )


def _number(places: list[Any], names: tuple[str, ...]) -> int | None:
    """Return the first positive whole number by one of the names, from the first place with one."""
    for place in places:
        for name in names:
            found = _entry(place, name)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
    return None


def _entry(place: Any, name: str) -> Any:
    return place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
