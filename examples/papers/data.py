"""The papers' data sets, read from the files that their authors publish.

A folder (``--data-dir``) may hold, each under any of the names given:

- ``MNIST``, ``FashionMNIST`` (or ``mnist``, ``fashion-mnist``), or ``raw`` in it: four files of
  IDX, ``*-ubyte.gz`` or unpacked;
- ``cifar-10-batches-py``, the standard python archive, unpacked or as ``cifar-10-python.tar.gz``,
  or else ``cifar10-subset.npz``, of arrays ``train_images`` [N, 3, 32, 32], ``train_labels`` [N],
  ``test_images`` and ``test_labels``; ``cifar-100-python``, ``cifar-100-python.tar.gz`` and
  ``cifar100-subset.npz`` likewise; each as it is or in a folder ``cifar10`` or ``cifar100``;
- ``avila/avila-tr.txt`` and ``avila-ts.txt``; ``tinyshakespeare/input.txt``.

Images are standardised by the mean and the standard deviation of each channel over the training
set, which is how "per-pixel zero-mean unit-variance normalization" is commonly done. Avila is
published standardised and is taken as it is.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Samples
from torch import Tensor

TEXT_LENGTH = 256


class MissingDataError(FileNotFoundError):
    """The folder does not hold a data set."""


@dataclass(frozen=True)
class Data:
    """Training and test samples; ``full`` says whether the training set is as published."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    full: int

    def to(self, dtype: torch.dtype) -> Data:
        """Return the same with inputs of another precision; whole numbers stay what they are."""
        if not self.inputs.is_floating_point():
            return self
        inputs, test = self.inputs.to(dtype), self.test_inputs.to(dtype)
        return Data(inputs, self.labels, test, self.test_labels, self.full)


def load(folder: Path, samples: Samples, seed: int = 0) -> Data:
    """Return the samples of a row; noise in labels and inputs is drawn by the seed.

    Raises:
        MissingDataError: The folder does not hold the set.
        ValueError: It holds another one, of more classes.
    """
    found = _READERS[samples.name](folder)
    last = int(max(found.labels.max(), found.test_labels.max()))
    if last >= samples.num_classes:
        raise ValueError(
            f"{folder} holds a class {last} for {samples.name}, whose last is "
            f"{samples.num_classes - 1}; is it another set?"
        )
    inputs, labels = found.inputs[: samples.count], found.labels[: samples.count]
    generator = torch.Generator().manual_seed(seed)
    if samples.inputs == "gaussian":
        inputs = torch.randn(inputs.shape, generator=generator)
    if samples.labels == "shuffled":
        labels = labels[torch.randperm(len(labels), generator=generator)]
    elif samples.labels.startswith("noise-"):
        share = int(samples.labels.removeprefix("noise-")) / 100
        labels = flipped(labels, samples.num_classes, share, generator)
    return Data(inputs, labels, found.test_inputs, found.test_labels, found.full)


def flipped(labels: Tensor, num_classes: int, share: float, generator: torch.Generator) -> Tensor:
    """Return labels of which a share, chosen at random, is replaced by one of the other classes.

    Every class but the true one is as likely: symmetric noise, as in Han et al. 2018.
    """
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    steps = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + steps) % num_classes
    return noisy


def _existing(folder: Path, *names: str) -> Path:
    """Return the first of the names that is there."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise MissingDataError(f"{folder} holds none of {', '.join(names)}")


def _idx(folder: Path, name: str) -> np.ndarray:
    """Return the array of an IDX file, compressed or not, which says its own shape."""
    path = _existing(folder, f"{name}.gz", name)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _idx_folder(*names: str) -> Callable[[Path], Data]:
    def read(folder: Path) -> Data:
        raw = _existing(folder, *(at for name in names for at in (f"{name}/raw", name)))
        part = [
            _idx(raw, f"{part}-{kind}-ubyte")
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ]
        return _standardised(part[0][:, None], part[1], part[2][:, None], part[3], 60_000)

    return read


def _standardised(
    images: np.ndarray,
    labels: Any,
    test_images: np.ndarray,
    test_labels: Any,
    full: int,
) -> Data:
    """Return images [N, C, height, width] of bytes, standardised channel by channel."""
    inputs, test = torch.tensor(images) / 255, torch.tensor(test_images) / 255
    mean, deviation = inputs.mean((0, 2, 3), keepdim=True), inputs.std((0, 2, 3), keepdim=True)
    return Data(
        (inputs - mean) / deviation, torch.tensor(np.array(labels)).long(),
        (test - mean) / deviation, torch.tensor(np.array(test_labels)).long(), full,
    )  # fmt: skip


def _cifar(name: str, unpacked: str, archive: str) -> Callable[[Path], Data]:
    """Return what reads a CIFAR set: its archive, or a part of it that is kept as arrays."""
    train, test, labels = ["train"], "test", "fine_labels"
    if name == "cifar10":
        train, test, labels = [f"data_batch_{n}" for n in range(1, 6)], "test_batch", "labels"

    def read(folder: Path) -> Data:
        names = (unpacked, archive, f"{name}-subset.npz")
        found = _existing(folder, *(at for one in names for at in (one, f"{name}/{one}")))
        if found.suffix == ".npz":
            keys = ("train_images", "train_labels", "test_images", "test_labels")
            with np.load(found) as file:
                return _standardised(*(file[key] for key in keys), 50_000)
        *parts, last = (_pickled(found, unpacked, file) for file in (*train, test))
        return _standardised(
            np.concatenate([_rgb(part["data"]) for part in parts]),
            np.concatenate([part[labels] for part in parts]),
            _rgb(last["data"]), last[labels], 50_000,
        )  # fmt: skip

    return read


def _rgb(data: np.ndarray) -> np.ndarray:
    return np.asarray(data, np.uint8).reshape(-1, 3, 32, 32)


_BYTES = ("_codecs", "encode")  # how the protocols before 3 write the bytes of an array


class _ArraysOnly(pickle.Unpickler):
    """Reads the dictionaries of lists and arrays that the CIFAR archives hold, and no code."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = ("_reconstruct", "_frombuffer", "ndarray", "dtype")
        if (module.startswith("numpy") and name in arrays) or (module, name) == _BYTES:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no data need")


def _pickled(path: Path, folder: str, name: str) -> dict[str, Any]:
    """Return a file of a CIFAR archive: of its folder, or of the archive itself."""
    if path.is_dir():
        raw = _existing(path, name).read_bytes()
    else:
        with tarfile.open(path) as tar:
            try:
                member = tar.extractfile(f"{folder}/{name}")
            except KeyError:
                member = None
            if member is None:
                raise MissingDataError(f"{path} holds no {folder}/{name}")
            raw = member.read()
    found = _ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
    return {key.decode(): value for key, value in found.items()}


def _avila(folder: Path) -> Data:
    at = _existing(folder, "avila")
    parts = []
    for name in ("avila-tr.txt", "avila-ts.txt"):
        lines = [line.split(",") for line in (at / name).read_text("ascii").split()]
        parts.append(torch.tensor([[float(cell) for cell in line[:10]] for line in lines]))
        parts.append(torch.tensor(["ABCDEFGHIWXY".index(line[10]) for line in lines]))
    return Data(*parts, full=10_430)


def _shakespeare(folder: Path) -> Data:
    path = _existing(folder, "tinyshakespeare/input.txt", "input.txt")
    _, ids = np.unique(np.array(list(path.read_text("ascii"))), return_inverse=True)
    rows = torch.tensor(ids[: len(ids) // (TEXT_LENGTH + 1) * (TEXT_LENGTH + 1)]).long()
    rows = rows.view(-1, TEXT_LENGTH + 1)
    cut = round(0.9 * len(rows))
    train, test = rows[:cut], rows[cut:]
    return Data(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], len(train))


_READERS: dict[str, Callable[[Path], Data]] = {
    "mnist": _idx_folder("MNIST", "mnist"),
    "fashion-mnist": _idx_folder("FashionMNIST", "fashion-mnist"),
    "cifar-10": _cifar("cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar-100": _cifar("cifar100", "cifar-100-python", "cifar-100-python.tar.gz"),
    "avila": _avila,
    "shakespeare": _shakespeare,
}
