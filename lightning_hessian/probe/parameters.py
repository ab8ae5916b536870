"""Which parameters a curvature is taken with respect to, and how they lie in one flat vector."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.linear.shards import Shard
from lightning_hessian.results.base import nearest

ParameterSelection: TypeAlias = (
    str | Sequence[str] | re.Pattern[str] | Callable[[str, nn.Parameter], bool] | None
)
"""A glob, a list of globs, a regex (compiled, or a string ``"re:..."``), a predicate or None."""

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ParameterSpace:
    """The selected parameters of a module as one flat vector of length ``size``.

    Parameters stand in the order of ``module.named_parameters()``, each flattened row by row. A
    tied parameter stands once, under its first name. Of parameters that are sharded over ranks
    (DTensor, or pieces of flat ones), this rank's vectors hold what lies here, n_local numbers.

    Attributes:
        names: Names in the module, n_p of them.
        shapes: Their whole shapes.
        held: Of each, the positions of the entries held here, in the shape held; None where the
            parameters are whole.
        dtypes: The precision each is measured in: its own, or float32 for half precision.
        dtype: Precision of vectors in this space, the widest of these.
        device: Where vectors live.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device
    held: tuple[Tensor, ...] | None = None

    @classmethod
    def select(cls, module: nn.Module, selection: ParameterSelection = None) -> ParameterSpace:
        """Return the space of the parameters that require grad and match ``selection``.

        A tied parameter matches by any of its names. The ``_orig_mod.`` that ``torch.compile``
        puts into names is ignored when matching.

        Args:
            module: Any module.
            selection: ``None`` for all; a glob (``"encoder.*.weight"``) or a list of globs; a
                compiled regular expression or ``"re:<expression>"``, searched in the name; or a
                predicate ``(name, parameter) -> bool``.

        Raises:
            ValueError: A pattern, or the whole selection, matches no trainable parameter.

        Example:
            >>> layer = torch.nn.Linear(3, 2)
            >>> space = ParameterSpace.select(layer, "weight")
            >>> space.names, space.size
            (('weight',), 6)
        """
        for part in module.modules():
            if hasattr(part, "reshard"):  # fully_shard keeps some parameters whole for a while
                part.reshard()  # type: ignore[operator]
        aliases: dict[nn.Parameter, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            aliases.setdefault(parameter, []).append(name)
        chosen = _chosen(aliases, selection)
        for parameter in chosen:
            _check_supported(aliases[parameter][0], parameter)
        dtypes = tuple(
            torch.float32 if is_half(parameter) else parameter.dtype for parameter in chosen
        )
        return cls(
            names=tuple(aliases[parameter][0] for parameter in chosen),
            shapes=tuple(_whole_shape(parameter) for parameter in chosen),
            dtypes=dtypes,
            dtype=functools.reduce(torch.promote_types, dtypes),
            device=chosen[0].device,
            held=_held(chosen),
        )

    def subspace(self, names: Sequence[str]) -> ParameterSpace:
        """Return the space of the parameters with these names, in the order that they have here."""
        which = self.places(names)
        dtypes = tuple(self.dtypes[i] for i in which)
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in which),
            shapes=tuple(self.shapes[i] for i in which),
            dtypes=dtypes,
            dtype=functools.reduce(torch.promote_types, dtypes),
            held=None if self.held is None else tuple(self.held[i] for i in which),
        )

    def places(self, names: Sequence[str]) -> list[int]:
        """Return where some parameters stand among all, in ascending order."""
        return sorted(self.names.index(name) for name in names)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter."""
        return [shape.numel() for shape in self.shapes]

    @cached_property
    def size(self) -> int:
        """Length n of a vector in this space."""
        return sum(self.sizes)

    @cached_property
    def held_shapes(self) -> tuple[torch.Size, ...]:
        """The shapes held here."""
        return self.shapes if self.held is None else tuple(part.shape for part in self.held)

    def shard(self, ranks: Ranks) -> Shard:
        """Return which entries of a vector [n] are held here."""
        if self.held is None:
            return Shard.whole(self.size)
        offsets = itertools.accumulate(self.sizes, initial=0)
        positions = [
            part.reshape(-1) + offset for part, offset in zip(self.held, offsets, strict=False)
        ]
        return Shard(self.size, torch.cat(positions), ranks)

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a vector [n_local] in the shapes of the parameters held here.

        The parts are views, but for parameters of lower precision than the vector.
        """
        sizes = self.sizes if self.held is None else [part.numel() for part in self.held]
        parts = zip(torch.split(vector, sizes), self.held_shapes, self.dtypes, strict=True)
        return tuple(part.view(shape).to(dtype) for part, shape, dtype in parts)

    def flatten(self, parts: Iterable[Tensor]) -> Tensor:
        """Return one vector [n_local] from a tensor for each parameter; the inverse of `split`."""
        return torch.cat([part.reshape(-1).to(self.device, self.dtype) for part in parts])

    def values(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Return the present values: detached, sharing memory unless the precision differs."""
        wanted = set(self.names)
        found = {
            name: local(parameter.detach())
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if name in wanted
        }
        return tuple(upcast(found[name]) for name in self.names)


def num_parameters(module: nn.Module) -> int:
    """Return how many parameters a module has, on all ranks together; shared ones count once."""
    return sum(_whole_shape(parameter).numel() for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that may be distributed."""
    return getattr(tensor, "to_local", lambda: tensor)()


def _held(parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...] | None:
    """Return the positions of the entries of each parameter that this rank holds."""
    sharded = ("device_mesh", "positions")
    if not any(hasattr(parameter, name) for parameter in parameters for name in sharded):
        return None
    return tuple(_positions(parameter) for parameter in parameters)


def _whole_shape(parameter: Any) -> torch.Size:
    result: torch.Size = getattr(parameter, "whole_shape", parameter.shape)
    return result


def _positions(parameter: Any) -> Tensor:
    if hasattr(parameter, "positions"):  # a piece
        found: Tensor = parameter.positions
        return found
    positions = torch.arange(parameter.numel()).view(parameter.shape)
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return positions
    (placement,) = parameter.placements  # `_check_supported`
    parts = torch.chunk(positions, mesh.size(), dim=placement.dim)
    rank = mesh.get_local_rank()
    empty = positions.narrow(placement.dim, 0, 0)
    return parts[rank] if rank < len(parts) else empty


def upcast(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32 and all others as they are."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def is_half(tensor: Tensor) -> bool:
    """Return whether a tensor is float16 or bfloat16."""
    return tensor.dtype in _HALF


def _chosen(
    aliases: dict[nn.Parameter, list[str]], selection: ParameterSelection
) -> list[nn.Parameter]:
    trainable = {p: names for p, names in aliases.items() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "The module has no parameter that requires grad; there is nothing to differentiate. "
            "Unfreeze some, or build the module before measuring."
        )
    if selection is None:
        return list(trainable)
    if callable(selection):
        chosen = [
            p for p, names in trainable.items() if any(selection(clean_name(n), p) for n in names)
        ]
        if not chosen:
            first = next(iter(trainable.values()))[0]
            raise ValueError(
                f"parameters={selection!r} accepts none of the {len(trainable)} trainable "
                f"parameters, of which the first is {clean_name(first)!r}."
            )
        return chosen
    patterns = [selection] if isinstance(selection, (str, re.Pattern)) else list(selection)
    if not patterns:
        raise ValueError("parameters=[] selects nothing; use None for all parameters.")
    matched: set[nn.Parameter] = set()
    for pattern in patterns:
        found = {p for p, names in trainable.items() if any(_matches(pattern, n) for n in names)}
        if not found:
            raise ValueError(_no_match(pattern, aliases))
        matched |= found
    return [p for p in trainable if p in matched]


def _matches(pattern: str | re.Pattern[str], name: str) -> bool:
    name = clean_name(name)
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _no_match(pattern: str | re.Pattern[str], aliases: dict[nn.Parameter, list[str]]) -> str:
    text = pattern if isinstance(pattern, str) else f"re:{pattern.pattern}"
    names = [clean_name(name) for group in aliases.values() for name in group]
    if any(_matches(pattern, name) for name in names):
        return (
            f"parameters={text!r} matches only frozen parameters (requires_grad=False). "
            "Unfreeze them or select others."
        )
    return (
        f"parameters={text!r} matches no parameter. Nearest of the {len(names)} names: "
        f"{', '.join(nearest(text, names))}. A glob must match the whole name, as in '*.weight'."
    )


def clean_name(name: str) -> str:
    """Return a name without what `torch.compile` puts into it."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")


def _check_supported(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"Parameter {name!r} is not initialised yet (a lazy module). Run one batch through "
            "the module before measuring."
        )
    placements: Any = getattr(parameter, "placements", None)
    if placements is not None and (len(placements) != 1 or not placements[0].is_shard()):
        raise ValueError(
            f"Parameter {name!r} is distributed as {placements}, which cannot be "
            "measured: only shards over one mesh dimension can (`fully_shard`, or tensor "
            "parallelism), not both together nor replicas of shards. Give data_parallel_size or "
            "tensor_parallel_size the number of devices and the other 1, or measure a checkpoint "
            "on one device."
        )
    if not parameter.dtype.is_floating_point:
        raise ValueError(
            f"Parameter {name!r} has dtype {parameter.dtype}; only real floating-point parameters "
            "have a Hessian here. Leave it out with `parameters=`."
        )
