"""The papers' data sets, in the forms that they are published in."""

from __future__ import annotations

import gzip
import importlib
import io
import pickle
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "papers"))  # last: the modules there have plain names

data, recipes, rows = map(importlib.import_module, ("data", "recipes", "rows"))


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("mnist", "MNIST/raw"),
        ("mnist", "mnist/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("fashion-mnist", "FashionMNIST"),
        ("fashion-mnist", "fashion-mnist"),
    ],
)
@pytest.mark.parametrize("ending", [".gz", ""])
def test_idx_files(tmp_path, name, at, ending):
    raw = tmp_path / at
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = head + array.tobytes()
            content = gzip.compress(content) if ending else content
            (raw / f"{part}-{kind}-ubyte{ending}").write_bytes(content)
    found = data.load(tmp_path, rows.Samples(name, 5))
    expected = (images - images.mean()) / images.std(ddof=1)
    assert found.inputs.shape == (5, 1, 28, 28)
    np.testing.assert_allclose(found.inputs[:, 0], expected[:5], atol=1e-5)
    assert found.labels.tolist() == [0, 1, 2, 3, 4]
    (raw / f"t10k-labels-idx1-ubyte{ending}").unlink()
    with pytest.raises(data.MissingDataError, match=r"t10k-labels-idx1-ubyte\.gz"):
        data.load(tmp_path, rows.Samples(name))


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("mnist", "MNIST/raw, MNIST, mnist/raw, mnist"),
        ("fashion-mnist", "FashionMNIST/raw, FashionMNIST, fashion-mnist/raw, fashion-mnist"),
        ("cifar-10", "cifar-10-batches-py, cifar10/cifar-10-batches-py, cifar-10-python.tar.gz"),
        ("cifar-100", "cifar-100-python, cifar100/cifar-100-python, cifar-100-python.tar.gz"),
        ("avila", "avila"),
        ("shakespeare", "tinyshakespeare/input.txt"),
    ],
)
def test_data_that_are_missing_are_named(tmp_path, name, looked_for):
    with pytest.raises(data.MissingDataError, match=re.escape(f"holds none of {looked_for}")):
        data.load(tmp_path, rows.Samples(name))


@pytest.mark.parametrize(
    ("name", "file", "classes"), [("cifar-10", "cifar10", 10), ("cifar-100", "cifar100", 100)]
)
def test_a_part_of_cifar_as_arrays(tmp_path, name, file, classes):
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)
    labels = np.array([3, 0, classes - 2, 5, 1, 2], np.uint8)
    (tmp_path / file).mkdir()
    np.savez(tmp_path / file / f"{file}-subset.npz", train_images=images, train_labels=labels,
             test_images=images[:2], test_labels=np.array([classes - 1, 0]))  # fmt: skip
    found = data.load(tmp_path, rows.Samples(name))
    assert found.full == 50_000
    assert rows.Samples(name).num_classes == classes  # a class may be in none of the samples
    assert found.labels.tolist() == labels.tolist()
    scale = images.std(axis=(0, 2, 3), ddof=1, keepdims=True)
    expected = (images - images.mean(axis=(0, 2, 3), keepdims=True)) / scale
    np.testing.assert_allclose(found.inputs, expected, atol=1e-5)


ARCHIVES = {
    "cifar-10": ("cifar-10-batches-py", "cifar-10-python.tar.gz", b"labels", 10,
                 [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]),
    "cifar-100": ("cifar-100-python", "cifar-100-python.tar.gz", b"fine_labels", 100,
                  ["train", "test"]),
}  # fmt: skip


def _archive(at: Path, name: str, files: dict[str, bytes], *, unpacked: bool) -> None:
    folder, file, *_ = ARCHIVES[name]
    at.mkdir(exist_ok=True)
    if unpacked:
        (at / folder).mkdir()
        for one, content in files.items():
            (at / folder / one).write_bytes(content)
        return
    with tarfile.open(at / file, "w:gz") as tar:
        for one, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{one}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize(("within", "unpacked"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_cifar_archive(tmp_path, name, within, unpacked, protocol):
    _, _, key, classes, files = ARCHIVES[name]
    pixels = np.random.default_rng(0).integers(0, 256, (len(files), 3, 3072), np.uint8)
    labels = np.arange(pixels[..., 0].size).reshape(-1, 3) % classes
    written = {
        file: pickle.dumps({b"data": part, key: of.tolist()}, protocol)
        for file, part, of in zip(files, pixels, labels, strict=True)
    }
    at = tmp_path / name.replace("-", "") if within else tmp_path
    _archive(at, name, written, unpacked=unpacked)
    found = data.load(tmp_path, rows.Samples(name))
    assert found.labels.tolist() == labels[:-1].ravel().tolist()
    assert found.test_labels.tolist() == labels[-1].tolist()
    train = pixels[:-1].reshape(-1, 3, 32, 32)
    mean, scale = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), ddof=1, keepdims=True)
    np.testing.assert_allclose(found.inputs, (train - mean) / scale, atol=1e-5)
    tests = pixels[-1].reshape(-1, 3, 32, 32)
    np.testing.assert_allclose(found.test_inputs, (tests - mean) / scale, atol=1e-5)


@pytest.mark.parametrize("where", ["train", "test"])
def test_a_set_of_more_classes_is_refused(tmp_path, where):
    labels = {"train": [0, 9], "test": [1, 2], where: [10, 3]}
    images = np.zeros((2, 3, 32, 32), np.uint8)
    np.savez(tmp_path / "cifar10-subset.npz", train_images=images, test_images=images,
             train_labels=labels["train"], test_labels=labels["test"])  # fmt: skip
    with pytest.raises(ValueError, match="a class 10 for cifar-10, whose last is 9"):
        data.load(tmp_path, rows.Samples("cifar-10"))


@pytest.mark.parametrize("unpacked", [True, False])
def test_a_cifar_archive_that_lacks_a_file_is_named(tmp_path, unpacked):
    content = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [0]})
    _archive(tmp_path, "cifar-100", {"train": content}, unpacked=unpacked)
    with pytest.raises(data.MissingDataError, match="test"):
        data.load(tmp_path, rows.Samples("cifar-100"))


def test_a_cifar_archive_runs_no_code(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("ran",)

    content = pickle.dumps({b"data": Code(), b"fine_labels": []})
    _archive(tmp_path, "cifar-100", {"train": content, "test": content}, unpacked=False)
    with pytest.raises(pickle.UnpicklingError, match="print"):
        data.load(tmp_path, rows.Samples("cifar-100"))


def test_label_noise_hits_the_share_and_every_other_class():
    labels = torch.arange(10_000) % 10
    noisy = data.flipped(labels, 10, 0.4, torch.Generator().manual_seed(0))
    changed = noisy != labels
    assert int(changed.sum()) == 4000
    counts = ((noisy - labels)[changed] % 10).bincount(minlength=10)
    assert counts[0] == 0
    assert (counts[1:] - 4000 / 9).abs().max() < 4 * (4000 / 9) ** 0.5


def test_images_are_shifted_whole():
    torch.manual_seed(0)
    images = torch.arange(1.0, 1 + 2 * 3 * 36).view(2, 3, 6, 6).repeat(20, 1, 1, 1)
    moved = recipes.flipped_and_cropped(images, padding=2)
    assert moved.shape == images.shape
    seen = set()
    for one, original in zip(moved, images, strict=True):
        padded = torch.nn.functional.pad(original, [2] * 4)
        places = [
            (flip, top, left)
            for flip in (False, True)
            for top in range(5)
            for left in range(5)
            if torch.equal(
                one,
                torch.nn.functional.pad(original.flip(-1), [2] * 4)[
                    :, top : top + 6, left : left + 6
                ]
                if flip
                else padded[:, top : top + 6, left : left + 6],
            )
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 15
