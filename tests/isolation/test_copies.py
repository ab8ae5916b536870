"""What is read in place of a data set: a copy, or what is too large to be one, watched."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_hessian.isolation import copies
from lightning_hessian.isolation.copies import StatefulDataError
from lightning_hessian.isolation.reachable import reachable
from lightning_hessian.probe.samples import draw_batches


@pytest.fixture
def _scarce_memory(monkeypatch):
    monkeypatch.setattr(copies, "_COPIED_BYTES", 2**20)


class Large(Dataset):
    """Two mebibytes, of which a subclass may change some."""

    def __init__(self) -> None:
        self.array = np.ones((512, 512))
        self.tensor = torch.ones(512, 512, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index):
        self.change(index)
        return torch.from_numpy(self.array[index]) + self.tensor[index]

    def change(self, index) -> None:
        pass


class ChangesItsArray(Large):
    def change(self, index) -> None:
        self.array[index] *= 2


class ChangesItsArrayThroughTorch(Large):
    def change(self, index) -> None:
        torch.from_numpy(self.array[index]).mul_(2)


class ChangesItsTensor(Large):
    def change(self, index) -> None:
        self.tensor[index].mul_(2)


class ChangesItsTensorThroughNumpy(Large):
    def change(self, index) -> None:
        self.tensor.numpy()[index] *= 2


class SwapsRows(Large):
    def __init__(self) -> None:
        super().__init__()
        self.tensor = torch.arange(512 * 512.0).double().view(512, 512)

    def change(self, index) -> None:
        self.tensor.numpy()[[0, 1]] = self.tensor.numpy()[[1, 0]]


WRITERS = [
    ChangesItsArray, ChangesItsArrayThroughTorch, ChangesItsTensor, ChangesItsTensorThroughNumpy,
    SwapsRows,
]  # fmt: skip


@pytest.mark.usefixtures("_scarce_memory")
@pytest.mark.parametrize("kind", WRITERS)
def test_large_arrays_that_are_written_to_are_refused(kind):
    with pytest.raises(StatefulDataError, match=r"Give data=\[\.\.\.\]"):
        draw_batches(DataLoader(kind(), batch_size=3), 1)


@pytest.mark.parametrize("kind", WRITERS)
def test_small_arrays_that_are_written_to_are_copied(kind):
    data = kind()
    before = data.array.copy(), data.tensor.clone()
    first = draw_batches(DataLoader(data, batch_size=4), 1)
    assert np.array_equal(data.array, before[0])
    assert torch.equal(data.tensor, before[1])
    assert torch.equal(first[0], draw_batches(DataLoader(data, batch_size=4), 1)[0])


@pytest.mark.usefixtures("_scarce_memory")
def test_large_arrays_are_not_copied():
    data = Large()
    data.array = np.ones((512, 32768))  # 128 MiB
    data.tensor = torch.ones(512, 1)
    tracemalloc.start()
    draw_batches(DataLoader(data, batch_size=4), 1)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


@pytest.mark.usefixtures("_scarce_memory")
def test_batches_have_memory_of_their_own():
    tensor = torch.ones(64, 8, 1024)
    (batch, *_) = draw_batches(DataLoader(TensorDataset(tensor), batch_size=None), 2)
    batch[0].zero_()
    assert bool((tensor == 1).all())


def test_locks_and_modules_need_no_copy():
    data = Large()
    data.lock, data.again, data.numpy = threading.Lock(), threading.RLock(), np
    assert len(draw_batches(DataLoader(data, batch_size=4), 2)) == 2


@pytest.mark.parametrize("size", [10, 3 * 2**20 + 5])
def test_a_print_sees_one_number(size, monkeypatch):
    monkeypatch.setattr("lightning_hessian.isolation.reachable._EXACT_BYTES", 2**20)
    for values in (torch.zeros(size, dtype=torch.uint8), np.zeros(size, dtype=np.uint8)):
        for place in (0, size // 2, size - 1):
            before = reachable([values])
            if isinstance(values, np.ndarray):
                values[place] += 1
            else:
                values.numpy()[place] += 1
            assert before.change(reachable([values])) is not None
            assert reachable([values]).change(reachable([values])) is None


def test_the_message_names_what_changed():
    class Counts(Large):
        seen = 0

        def change(self, index) -> None:
            type(self).seen += 1

    with pytest.raises(StatefulDataError, match=r"Counts.*has changed .*Counts.*seen"):
        draw_batches(DataLoader(Counts(), batch_size=4), 1)
