"""Whether tensors and modules are of torch.distributed's sharded kinds, without importing them.

``torch.distributed.tensor`` and ``torch.distributed.fsdp`` take a second to import, as SymPy comes
with them. Nothing can be of their classes where nobody has imported them, so the question is first
put to ``sys.modules``. What makes such tensors imports the classes where it does so.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_distributed_tensor(thing: Any) -> TypeIs[DTensor]:
    """Return whether something is a DTensor."""
    return isinstance(thing, _class("torch.distributed.tensor", "DTensor"))


def is_fully_sharded(thing: Any) -> TypeIs[FSDPModule]:
    """Return whether something is a module that ``fully_shard`` was called on (FSDP2)."""
    return isinstance(thing, _class("torch.distributed.fsdp", "FSDPModule"))


def is_wrapper(thing: Any) -> TypeIs[FullyShardedDataParallel]:
    """Return whether something is a wrapper of FSDP1."""
    return isinstance(thing, _class("torch.distributed.fsdp", "FullyShardedDataParallel"))


def _class(module: str, name: str) -> Any:
    """Return a class where its module was imported, and else no class."""
    return getattr(sys.modules.get(module), name, ())
