"""What is known of memories of tensors, for as long as these last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Memories:
    """A set of memories of tensors, each with a value; another one at the same address is none.

    Args:
        least: From so many memories on, those that are gone are looked for and left out: each time
            that the number has doubled, which takes a constant time for each.
    """

    def __init__(self, least: int = 1024) -> None:
        self._kept: dict[int, tuple[StorageWeakRef, Any]] = {}
        self._least = self._next = least

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._kept

    def __getitem__(self, tensor: Tensor) -> Any:
        return self._kept[tensor.untyped_storage()._cdata][1]

    def __setitem__(self, tensor: Tensor, value: Any) -> None:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            self._kept[storage._cdata] = (StorageWeakRef(storage), value)
            if len(self._kept) >= self._next:
                self._kept = {k: v for k, v in self._kept.items() if not v[0].expired()}
                self._next = max(self._least, 2 * len(self._kept))

    def __bool__(self) -> bool:
        return bool(self._kept)

    def pop(self, tensor: Tensor) -> Any:
        """Take a memory out, and return its value, None where it is not in."""
        if tensor not in self:
            return None
        return self._kept.pop(tensor.untyped_storage()._cdata)[1]


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Return which part of its memory a tensor shows."""
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
