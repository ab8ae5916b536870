"""Checkpoints that several ranks wrote in parts, made into one state without running code.

Lightning's FSDP and model-parallel strategies write a folder: a file of each rank (``*.distcp``),
torch's ``.metadata``, which says where each tensor lies, and last ``meta.pt``, Lightning's own.
torch reads ``.metadata`` by a plain pickle, which could run code. Here only the names that torch
itself writes are looked up, tensors are read with ``weights_only``, and no file outside the folder
is opened.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_hessian.results import UnreadableFileError
from lightning_hessian.results.npz import require_stored
from lightning_hessian.results.outside import inside, open_regular, read_bounded, unreadable

LIGHTNINGS_PART, INDEX, PARTS = "meta.pt", ".metadata", "*.distcp"
"""The files of such a folder."""

_INDEX_BYTES = 256 * 2**20
"""About 200 bytes stand in it for each part of a tensor."""

_WEIGHTS = ("state_dict.", "model.")
"""Before the names of the weights: in model-parallel checkpoints, and in those of FSDP."""

_NAMES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder that ranks wrote together, or are writing."""
    return path.is_dir() and any((path / name).exists() for name in (LIGHTNINGS_PART, INDEX))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a folder as one state, each tensor whole.

    Raises:
        UnreadableFileError: The folder is not whole, damaged, or holds what torch does not write.
        OSError: A file of it cannot be opened.
    """
    inside(folder / INDEX, folder)
    data = read_bounded(folder / INDEX, _INDEX_BYTES)
    with unreadable(folder, "Save it again."):
        index = _Index(io.BytesIO(data)).load()
        tensors, places = dict(index.state_dict_metadata), dict(index.storage_data)
        prefix = next((p for p in _WEIGHTS if any(n.startswith(p) for n in tensors)), None)
        if prefix is None:
            raise UnreadableFileError(f"{folder} holds no state_dict of a module.")
        wanted = {name: kind for name, kind in tensors.items() if name.startswith(prefix)}
        # Those that are no tensors (extra states) could only be read by running code.
        found = {name: kind for name, kind in wanted.items() if hasattr(kind, "size")}
        claimed = sum(math.prod(t.size) * t.properties.dtype.itemsize for t in found.values())
        if claimed > sum(file.stat().st_size for file in folder.glob(PARTS)):
            raise ValueError("its index claims more than its files hold")
        state = {
            name: torch.empty(tuple(kind.size), dtype=kind.properties.dtype)
            for name, kind in found.items()
        }
        chosen = [(part, where) for part, where in places.items() if part.fqn in state]
        _fill(state, chosen, folder)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


class _Index(pickle.Unpickler):
    """Reads ``.metadata``; a name that torch does not write there is refused, not looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name in the pickle stands for."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        raise UnreadableFileError(f"its index names {module}.{name}, which torch does not write")


def _fill(state: Mapping[str, Tensor], parts: Iterable[tuple[Any, Any]], folder: Path) -> None:
    """Copy the parts of tensors from their files to where they belong."""
    filled = dict.fromkeys(state, 0)
    by_file: dict[str, list[tuple[Any, Any]]] = {}
    for part, where in parts:
        by_file.setdefault(str(where.relative_path), []).append((part, where))
    for name, members in by_file.items():
        inside(folder / name, folder)
        with open_regular(folder / name) as file:
            for part, where in members:
                piece = _piece(file, where, folder / name)
                target = state[part.fqn]
                for axis, start in enumerate(part.offset or ()):
                    target = target.narrow(axis, start, piece.shape[axis])
                if target.shape != piece.shape:
                    raise ValueError(f"a part of {part.fqn} is {tuple(piece.shape)}")
                target.copy_(piece)
                filled[part.fqn] += piece.numel()
    for name, tensor in state.items():
        if filled[name] != tensor.numel():
            raise ValueError(f"{filled[name]} of {tensor.numel()} values of {name} are there")


def _piece(file: BinaryIO, where: Any, path: Path) -> Tensor:
    """Return the tensor at a place in a file; `torch.save` wrote it, and its archive is checked."""
    if getattr(where, "transform_descriptors", None):
        raise ValueError("its parts are compressed or encrypted, which cannot be read here")
    size = os.fstat(file.fileno()).st_size
    if not 0 <= where.offset <= where.offset + where.length <= size:
        raise ValueError(f"{path.name} is cut short")
    file.seek(where.offset)
    packed = io.BytesIO(file.read(where.length))
    with zipfile.ZipFile(packed) as archive:
        require_stored(archive, path)
    packed.seek(0)
    found = torch.load(packed, map_location="cpu", weights_only=True)
    if not isinstance(found, Tensor):
        raise TypeError(f"{path.name} holds a {type(found).__name__}, not a tensor")
    return found.detach()
