"""The papers' data sets, read from the files that their authors publish.

A folder (``--data-dir``) may hold, each under any of the names given:

- ``MNIST/raw``, ``FashionMNIST/raw`` (or ``mnist``, ``fashion-mnist``): four files of IDX,
  ``*-ubyte.gz`` or unpacked;
- ``cifar-10-batches-py``, the standard python archive, unpacked or as ``cifar-10-python.tar.gz``,
  or else ``cifar10/cifar10-subset.npz``, of arrays ``train_images`` [N, 3, 32, 32],
  ``train_labels`` [N], ``test_images`` and ``test_labels``; ``cifar-100-python``,
  ``cifar-100-python.tar.gz`` and ``cifar100/cifar100-subset.npz`` likewise;
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
from collections.abc import Callable, Sequence
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
    num_classes: int
    full: int

    def to(self, dtype: torch.dtype) -> Data:
        """Return the same with inputs of another precision; whole numbers stay what they are."""
        if not self.inputs.is_floating_point():
            return self
        inputs, test = self.inputs.to(dtype), self.test_inputs.to(dtype)
        return Data(inputs, self.labels, test, self.test_labels, self.num_classes, self.full)


def load(folder: Path, samples: Samples, seed: int = 0) -> Data:
    """Return the samples of a row; noise in labels and inputs is drawn by the seed.

    Raises:
        MissingDataError: The folder does not hold the set.
    """
    found = _READERS[samples.name](folder)
    inputs, labels = found.inputs[: samples.count], found.labels[: samples.count]
    generator = torch.Generator().manual_seed(seed)
    if samples.inputs == "gaussian":
        inputs = torch.randn(inputs.shape, generator=generator)
    if samples.labels == "shuffled":
        labels = labels[torch.randperm(len(labels), generator=generator)]
    elif samples.labels.startswith("noise-"):
        share = int(samples.labels.removeprefix("noise-")) / 100
        labels = flipped(labels, found.num_classes, share, generator)
    return Data(inputs, labels, found.test_inputs, found.test_labels, found.num_classes, found.full)


def flipped(labels: Tensor, num_classes: int, share: float, generator: torch.Generator) -> Tensor:
    """Return labels of which a share, chosen at random, is replaced by one of the other classes.

    Every class but the true one is as likely: symmetric noise, as in Han et al. 2018.
    """
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    steps = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + steps) % num_classes
    return noisy


def _existing(folder: Path, *names: str, besides: Sequence[str] = ()) -> Path:
    """Return the first of the names that is there; ``besides`` are those that were looked for."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise MissingDataError(f"{folder} holds none of {', '.join([*besides, *names])}")


def _idx(folder: Path, name: str) -> np.ndarray:
    """Return the array of an IDX file, compressed or not, which says its own shape."""
    path = _existing(folder, f"{name}.gz", name)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _idx_folder(*names: str) -> Callable[[Path], Data]:
    def read(folder: Path) -> Data:
        raw = _existing(folder, *names)
        part = [
            _idx(raw, f"{part}-{kind}-ubyte")
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ]
        return _standardised(part[0][:, None], part[1], part[2][:, None], part[3], 60_000)

    return read


def _standardised(
    images: np.ndarray, labels: Any, test_images: np.ndarray, test_labels: Any, full: int
) -> Data:
    """Return images [N, C, height, width] of bytes, standardised channel by channel."""
    inputs, test = torch.tensor(images) / 255, torch.tensor(test_images) / 255
    mean, deviation = inputs.mean((0, 2, 3), keepdim=True), inputs.std((0, 2, 3), keepdim=True)
    labels, test_labels = torch.tensor(np.array(labels)).long(), torch.tensor(np.array(test_labels))
    return Data(
        (inputs - mean) / deviation, labels, (test - mean) / deviation, test_labels.long(),
        int(max(labels.max(), test_labels.max())) + 1, full,
    )  # fmt: skip


def _cifar_10(folder: Path) -> Data:
    try:
        train = [
            _pickled(folder, "cifar-10-batches-py", "cifar-10-python.tar.gz", f"data_batch_{n}")
            for n in range(1, 6)
        ]
        test = _pickled(folder, "cifar-10-batches-py", "cifar-10-python.tar.gz", "test_batch")
    except MissingDataError:
        return _subset(folder, "cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz")
    labels = np.concatenate([part["labels"] for part in train])
    images = np.concatenate([_rgb(part["data"]) for part in train])
    return _standardised(images, labels, _rgb(test["data"]), test["labels"], 50_000)


def _cifar_100(folder: Path) -> Data:
    try:
        train, test = (
            _pickled(folder, "cifar-100-python", "cifar-100-python.tar.gz", name)
            for name in ("train", "test")
        )
    except MissingDataError:
        return _subset(folder, "cifar100", "cifar-100-python", "cifar-100-python.tar.gz")
    images, tests = _rgb(train["data"]), _rgb(test["data"])
    return _standardised(images, train["fine_labels"], tests, test["fine_labels"], 50_000)


def _subset(folder: Path, name: str, *archives: str) -> Data:
    """Return a part of a CIFAR set, kept as arrays where there are no archives."""
    names = (f"{name}/{name}-subset.npz", f"{name}-subset.npz")
    with np.load(_existing(folder, *names, besides=archives)) as file:
        parts = ("train_images", "train_labels", "test_images", "test_labels")
        return _standardised(*(file[part] for part in parts), full=50_000)


def _rgb(data: np.ndarray) -> np.ndarray:
    return np.asarray(data, np.uint8).reshape(-1, 3, 32, 32)


class _ArraysOnly(pickle.Unpickler):
    """Reads the dictionaries of lists and arrays that the CIFAR archives hold, and no code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no data need")


def _pickled(folder: Path, unpacked: str, archive: str, name: str) -> dict[str, Any]:
    """Return a file of a CIFAR archive, from its folder or out of the archive itself."""
    if (folder / unpacked / name).exists():
        raw = (folder / unpacked / name).read_bytes()
    else:
        with tarfile.open(_existing(folder, archive)) as tar:
            member = tar.extractfile(f"{unpacked}/{name}")
            if member is None:
                raise MissingDataError(f"{folder / archive} holds no {unpacked}/{name}")
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
    return Data(*parts, num_classes=12, full=10_430)


def _shakespeare(folder: Path) -> Data:
    path = _existing(folder, "tinyshakespeare/input.txt", "input.txt")
    letters, ids = np.unique(np.array(list(path.read_text("ascii"))), return_inverse=True)
    rows = torch.tensor(ids[: len(ids) // (TEXT_LENGTH + 1) * (TEXT_LENGTH + 1)]).long()
    rows = rows.view(-1, TEXT_LENGTH + 1)
    cut = round(0.9 * len(rows))
    train, test = rows[:cut], rows[cut:]
    return Data(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], len(letters), len(train))


_READERS: dict[str, Callable[[Path], Data]] = {
    "mnist": _idx_folder("MNIST/raw", "mnist"),
    "fashion-mnist": _idx_folder("FashionMNIST/raw", "fashion-mnist"),
    "cifar-10": _cifar_10,
    "cifar-100": _cifar_100,
    "avila": _avila,
    "shakespeare": _shakespeare,
}
