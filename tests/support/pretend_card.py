"""A machine without a card that behaves as if it had one: who mixes devices, and who waits?

Tensors are real, on the CPU, so that control flow that reads numbers works. Each memory carries a
tag, "card" or "host", that tensors are asked for as their device. Operations whose operands carry
different tags raise, as CUDA's do, and everything that makes the host wait for the card is counted.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

forward_ad._maybe_load_decompositions()  # it compiles what is replaced here; once is enough
aten = torch.ops.aten

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
_DEVICE = torch._C.TensorBase.device
_COPIES = {aten.copy_.default, aten._to_copy.default, torch.ops.prim.device.default}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
_INDEXED |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
_SIZE_IS_DATA = {aten.nonzero.default, aten.masked_select.default, aten.equal.default}
_SIZE_IS_DATA |= {aten.bincount.default, aten.unique_dim.default, aten._unique2.default}


class MixedDevicesError(RuntimeError):
    """An operation was given tensors of both devices."""


class PretendCard(TorchDispatchMode):
    """The block in which tensors have the device that they were asked for.

    Attributes:
        waits: For each time that the host waited for the card, where in the package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._tags: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._patches = ExitStack()

    def __enter__(self) -> PretendCard:
        for one in self._replaced():
            self._patches.enter_context(one)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    # Tags ---------------------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> torch.device | None:
        """Returns the device that a tensor pretends to be on; None for what torch made itself."""
        storage = _storage(tensor)
        found = self._tags.get(-1 if storage is None else storage._cdata)
        return None if found is None else found[1]

    def tag(self, tensor: Any, device: torch.device) -> Any:
        """Lets a tensor be on a device, and returns it."""
        storage = _storage(tensor)
        if storage is not None:
            # The reference keeps the address from being given to another memory.
            self._tags[storage._cdata] = (StorageWeakRef(storage), device)
            if len(self._tags) % 4096 == 0:
                self._tags = {k: v for k, v in self._tags.items() if not v[0].expired()}
        return tensor

    def _wait(self, why: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/lightning_hessian/" in f.filename]
        inside = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} " if frames else ""
        self.waits.append(inside + why)

    # Operations ---------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        checked = [args[0], *args[2:]] if func in _INDEXED else given
        checked = [t for t in checked if isinstance(t, Tensor)]
        tags = {self.of(t) for t in given} - {None}
        here = {tag for t in checked if (tag := self.of(t)) == CARD or (tag and t.dim())}
        if func in _INDEXED and HOST in here:
            here |= tags  # a tensor of the host takes no indices from the card
        if func not in _COPIES and len(here) > 1:
            seen = [(tuple(t.shape), str(self.of(t))) for t in given]
            raise MixedDevicesError(f"Expected all tensors to be on the same device: {func} {seen}")
        if CARD in tags and (func is aten._local_scalar_dense.default or func in _SIZE_IS_DATA):
            self._wait(str(func))
        if func in _INDEXED:
            self._wait_for_mask(args)
        if func is aten.copy_.default and len(tags) == 2 and not (len(args) > 2 and args[2]):
            self._wait("copy_")
        found = func(*args, **(kwargs or {}))
        if func in _COPIES or not tags:
            if func is aten._to_copy.default and tags:
                self.tag(found, next(iter(tags)))
            return found
        device = CARD if CARD in here else next(iter(here or tags))
        for tensor in tree_iter(found):
            # What the package's own operations do inside is not seen: their results are where
            # their operands are.
            own = func.namespace != "aten"
            if isinstance(tensor, Tensor) and (own or self.of(tensor) is None):
                self.tag(tensor, device)
        return found

    def _wait_for_mask(self, args: tuple[Any, ...]) -> None:
        for index in args[1]:
            if index is not None and self.of(args[0]) == CARD and index.dtype == torch.bool:
                self._wait("a mask")
            elif index is not None and {self.of(args[0]), self.of(index)} == {CARD, HOST}:
                self._wait("indices from the host")

    # What Python asks of torch ------------------------------------------------------------------

    def _replaced(self) -> Iterator[Any]:
        """Yields the replacements of what names a device, or reads numbers on the host."""
        yield patch.object(Tensor, "device", property(self._device_of), create=True)
        yield patch.object(Tensor, "is_cuda", property(lambda t: t.device == CARD), create=True)
        yield patch.object(Tensor, "to", self._to(Tensor.to))
        yield patch.object(Tensor, "cpu", lambda t: t.to(HOST))
        yield patch.object(Tensor, "cuda", lambda t: t.to(CARD), create=True)
        for name in ("numpy", "__array__"):
            yield patch.object(Tensor, name, self._read(getattr(Tensor, name)))
        for name in ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"):
            made = self._made_like(getattr(Tensor, name))
            yield patch.object(Tensor, name, made, create=True)
        names = {f.__name__ for f in _device_constructors() if hasattr(f, "__name__")}
        for name in sorted((names | {"from_numpy", "from_file"}) & set(dir(torch))):
            yield patch.object(torch, name, self._made(getattr(torch, name)))
        yield patch.object(torch.cuda, "mem_get_info", lambda *_: (4 * 10**9, 8 * 10**9))
        yield patch.object(torch.cuda, "memory_reserved", lambda *_: 0)
        yield patch.object(torch.cuda, "memory_allocated", lambda *_: 0)
        yield patch.object(torch.cuda, "Stream", lambda *_: _Stream())
        yield patch.object(torch.cuda, "current_stream", lambda *_: _Stream())
        yield patch.object(torch.cuda, "stream", lambda *_: nullcontext())
        yield patch.object(torch.cuda, "synchronize", lambda *_: None)
        yield patch.object(Tensor, "record_stream", lambda *_: None)

    def _device_of(self, tensor: Tensor) -> torch.device:
        return self.of(tensor) or _DEVICE.__get__(tensor)

    def _read(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.of(tensor) == CARD:
                raise TypeError("can't convert a tensor on the card to numpy")
            return original(tensor, *args, **kwargs)

        return read

    def _to(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            wanted = kwargs.pop("device", None)
            given = list(args)
            for place, value in enumerate(given):
                if isinstance(value, (torch.device, str)):
                    wanted = value
                    given[place] = HOST
                elif isinstance(value, Tensor):
                    wanted = value.device
            device = None if wanted is None else _indexed(wanted)
            before = self.of(tensor)
            # Modes of functions would look the method up by its name, and come back here.
            with torch._C.DisableTorchFunction():
                found = original(tensor, *given, **kwargs)
            if device is None or device == before:
                return found if before is None or found is tensor else self.tag(found, before)
            if before is not None and not kwargs.get("non_blocking", False):
                self._wait(f"to {device}")
            return self.tag(found.clone() if found is tensor else found, device)

        return to

    def _made_like(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def made(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            device = _indexed(kwargs.pop("device", None) or tensor.device)
            return self.tag(original(tensor, *args, **kwargs), device)

        return made

    def _made(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            asked = kwargs.pop("device", None)
            kwargs.pop("pin_memory", None)
            if asked is not None and torch.device(asked).type == "meta":
                return original(*args, device=asked, **kwargs)
            first = args[0] if args and isinstance(args[0], Tensor) else None
            generator = kwargs.get("generator")
            device = _indexed(asked or (HOST if first is None else first.device))
            if generator is not None and generator.device.type != device.type:
                raise MixedDevicesError(f"a generator of the {generator.device} on {device}")
            return self.tag(original(*args, **kwargs), device)

        return made


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """Nothing is in flight here."""


def _indexed(device: Any) -> torch.device:
    device = torch.device(device)
    return CARD if device.type == "cuda" else HOST


def _storage(tensor: Any) -> Any:
    """Returns the memory of a tensor, through torch.func's wrappers; None where it has none."""
    while isinstance(tensor, Tensor) and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor._is_zerotensor():
        return None
    if _DEVICE.__get__(tensor).type != "cpu":  # torch asks for shapes on the meta device
        return None
    return tensor.untyped_storage()


@contextmanager
def pretend_card() -> Iterator[PretendCard]:
    """Opens the block."""
    with PretendCard() as card:
        yield card
