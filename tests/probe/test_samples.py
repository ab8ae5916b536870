"""The probe batches: drawn without training's order, generators or workers noticing."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_hessian.probe.samples import draw_batches


class Indices(Dataset):
    """Sample i is the number i."""

    def __init__(self, size: int = 50) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        return torch.tensor(index)


def drawn(loader, num_batches=3, **options) -> list[list[int]]:
    return [batch.tolist() for batch in draw_batches(loader, num_batches, **options)]


def flat(batches) -> list[int]:
    return [index for batch in batches for index in batch]


def rest_of(iterator) -> list[list[int]]:
    return [batch.tolist() for batch in iterator]


# What is drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True}])
def test_samples_are_drawn_without_replacement_in_the_loaders_batch_size(options):
    batches = drawn(DataLoader(Indices(), batch_size=8, **options))
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert len(set(flat(batches))) == 24
    assert set(flat(batches)) <= set(range(50))
    # From all over the data, not its beginning: a sorted data set would give one class only.
    assert max(flat(batches)) > 30


def test_the_same_seed_gives_the_same_samples_whenever_it_is_called():
    loader = DataLoader(Indices(), batch_size=8, shuffle=True)
    first = drawn(loader, seed=4)
    torch.rand(3), random.random(), np.random.rand()
    list(loader)
    assert drawn(loader, seed=4) == first
    assert drawn(DataLoader(Indices(), batch_size=8), seed=4) == first
    assert drawn(loader, seed=5) != first


def test_every_sample_is_as_likely():
    loader = DataLoader(Indices(20), batch_size=5)
    counts = Counter(i for seed in range(400) for i in flat(drawn(loader, 1, seed=seed)))
    # Each count is Binomial(400, 1/4): standard deviation 8.7.
    assert all(abs(counts[i] - 100) < 4.5 * 8.7 for i in range(20))


def test_fewer_samples_than_asked_for_give_what_there_is():
    batches = drawn(DataLoader(Indices(10), batch_size=4, shuffle=True), 7)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(flat(batches)) == list(range(10))


def test_first_samples_bounds_the_draw():
    batches = drawn(DataLoader(Indices(), batch_size=4, shuffle=True), 5, first_samples=12)
    assert sorted(flat(batches)) == list(range(12))


def test_batches_are_collated_as_the_loader_does():
    data = TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6))
    loader = DataLoader(data, batch_size=3, collate_fn=lambda samples: {"n": len(samples)})
    assert draw_batches(loader, 2) == [{"n": 3}, {"n": 3}]
    x, y = draw_batches(DataLoader(data, batch_size=3), 1)[0]
    assert torch.equal(x[:, 0], 2.0 * y)


def test_a_dataset_that_makes_its_own_batches_is_read_by_index():
    class Batched(Indices):
        def __getitem__(self, index):
            return torch.arange(4) + 10 * index

    batches = drawn(DataLoader(Batched(5), batch_size=None, shuffle=True), 3)
    starts = [batch[0] // 10 for batch in batches]
    assert all(
        batch == [10 * s, 10 * s + 1, 10 * s + 2, 10 * s + 3]
        for s, batch in zip(starts, batches, strict=True)
    )
    assert len(set(starts)) == 3


# Samplers ---------------------------------------------------------------------------------------


def test_a_subset_sampler_is_followed():
    chosen = [3, 7, 11, 12, 30, 41]
    sampler = SubsetRandomSampler(chosen)
    loader = DataLoader(Indices(), batch_size=4, sampler=sampler)
    assert sorted(flat(drawn(loader, 5))) == chosen


def test_a_weighted_sampler_is_followed():
    weights = [0.0] * 40 + [1.0] * 10
    loader = DataLoader(
        Indices(), batch_size=10, sampler=WeightedRandomSampler(weights, num_samples=30)
    )
    assert len(flat(drawn(loader))) == 30
    assert min(flat(drawn(loader))) >= 40


def test_a_sampler_over_part_of_the_data_is_followed():
    loader = DataLoader(Indices(), batch_size=4, sampler=RandomSampler(range(12)))
    assert sorted(flat(drawn(loader, 5))) == list(range(12))


class EvenOnly(RandomSampler):
    """A sampler that says itself what training sees."""

    def __iter__(self):
        return iter([i for i in super().__iter__() if i % 2 == 0])


class EvenOnlyOnRank(DistributedSampler):
    def __iter__(self):
        return iter([i for i in super().__iter__() if i % 2 == 0])


@pytest.mark.parametrize(
    "sampler", [EvenOnly(Indices()), EvenOnlyOnRank(Indices(), num_replicas=1, rank=0)]
)
def test_a_sampler_derived_from_torchs_is_followed(sampler):
    indices = flat(drawn(DataLoader(Indices(), batch_size=4, sampler=sampler), 5))
    assert indices
    assert all(index % 2 == 0 for index in indices)


def test_a_subset_sampler_that_lightning_distributes_is_followed():
    """Under DDP, Lightning wraps a sampler of the user's own in a DistributedSampler."""
    chosen = [3, 7, 11, 12, 30, 41]
    sampler = DistributedSamplerWrapper(SubsetRandomSampler(chosen), num_replicas=2, rank=0)
    loader = DataLoader(Indices(), batch_size=2, sampler=sampler)
    assert set(flat(drawn(loader, 5))) <= set(chosen)


def test_every_rank_of_a_distributed_sampler_draws_the_same():
    loaders = [
        DataLoader(Indices(), batch_size=4, sampler=DistributedSampler(Indices(), 2, rank))
        for rank in (0, 1)
    ]
    assert drawn(loaders[0]) == drawn(loaders[1])


class LongFirst:
    """A batch sampler with batches of unequal sizes."""

    def __iter__(self):
        yield from ([0, 1, 2, 3], [10], [20, 21])

    def __len__(self) -> int:
        return 3


def test_a_batch_sampler_of_the_users_own_is_followed():
    loader = DataLoader(Indices(), batch_sampler=LongFirst())
    assert drawn(loader, 2) == [[0, 1, 2, 3], [10]]
    assert drawn(loader, 9) == [[0, 1, 2, 3], [10], [20, 21]]


# Nothing notices --------------------------------------------------------------------------------


class WithNumpy(Sampler):
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __iter__(self):
        return iter(self.rng.permutation(50).tolist())

    def __len__(self) -> int:
        return 50


class WithPython(WithNumpy):
    def __init__(self) -> None:
        self.rng = random.Random(0)

    def __iter__(self):
        order = list(range(50))
        self.rng.shuffle(order)
        return iter(order)


class WithEpoch(WithNumpy):
    """Counts its epochs, and shuffles by them."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        return iter(np.random.default_rng(self.epoch).permutation(50).tolist())


class OwnBatches(BatchSampler):
    """Batches of a random sampler, which has a generator."""


LOADERS = {
    "sequential": lambda: DataLoader(Indices(), batch_size=4, sampler=SequentialSampler(range(50))),
    "shuffled": lambda: DataLoader(Indices(), batch_size=4, shuffle=True),
    "generator": lambda: DataLoader(
        Indices(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "generator of a subset sampler": lambda: DataLoader(
        Indices(),
        batch_size=4,
        sampler=SubsetRandomSampler(range(40), generator=torch.Generator().manual_seed(1)),
    ),
    "generator of a weighted sampler": lambda: DataLoader(
        Indices(),
        batch_size=4,
        sampler=WeightedRandomSampler([1.0] * 50, 50, generator=torch.Generator().manual_seed(1)),
    ),
    "generator below a batch sampler": lambda: DataLoader(
        Indices(),
        batch_sampler=OwnBatches(
            RandomSampler(Indices(), generator=torch.Generator().manual_seed(1)), 4, False
        ),
    ),
    "numpy": lambda: DataLoader(Indices(), batch_size=4, sampler=WithNumpy()),
    "python": lambda: DataLoader(Indices(), batch_size=4, sampler=WithPython()),
    "epochs": lambda: DataLoader(Indices(), batch_size=4, sampler=WithEpoch()),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_training_sees_the_order_that_it_would_have_seen(make):
    def two_epochs(loader, measure):
        torch.manual_seed(0)
        iterator, seen = iter(loader), []
        for _ in range(3):
            seen.append(next(iterator).tolist())
        if measure:
            drawn(loader, seed=9)
        seen += rest_of(iterator)
        if measure:
            drawn(loader, seed=9)
        return seen + rest_of(loader)

    assert two_epochs(make(), measure=True) == two_epochs(make(), measure=False)


def test_the_global_generators_are_as_before():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    drawn(DataLoader(Augmented(), batch_size=4, shuffle=True))
    drawn(DataLoader(Indices(), batch_size=4, sampler=SubsetRandomSampler(range(9))))
    assert states == (
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    )  # fmt: skip


def test_persistent_workers_do_not_notice():
    loader = DataLoader(
        Indices(12), batch_size=3, num_workers=1, persistent_workers=True, prefetch_factor=1
    )
    iterator = iter(loader)
    first = next(iterator).tolist()
    workers = [worker.pid for worker in loader._iterator._workers]
    assert len(drawn(loader, 2)) == 2
    assert loader._iterator is iterator
    assert [first, *rest_of(iterator)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert [worker.pid for worker in loader._iterator._workers] == workers
    assert all(worker.is_alive() for worker in loader._iterator._workers)
    loader._iterator._shutdown_workers()


# Random transforms ------------------------------------------------------------------------------


class Augmented(Indices):
    """Draws from all three global generators for each sample."""

    def __getitem__(self, index):
        return index + torch.rand(3).mean() + random.random() + float(np.random.rand())


def test_random_transforms_are_seeded():
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
    first = drawn(loader, seed=2)
    torch.rand(5), random.random(), np.random.rand()
    assert drawn(loader, seed=2) == first
    assert drawn(loader, seed=3) != first


# Other kinds of data ----------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


class StreamOfBatches(IterableDataset):
    def __iter__(self):
        return iter([torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4])])


def test_an_iterable_dataset_is_read_anew_from_its_start():
    loader = DataLoader(Stream(), batch_size=4)
    iterator = iter(loader)
    next(iterator)
    assert drawn(loader, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert drawn(loader, 5) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert rest_of(iterator) == [[4, 5, 6, 7], [8, 9]]


def test_an_iterable_dataset_may_make_its_own_batches():
    assert drawn(DataLoader(StreamOfBatches(), batch_size=None), 2) == [[0, 1], [2, 3]]


def test_an_iterable_dataset_keeps_its_collate_function():
    loader = DataLoader(Stream(), batch_size=4, collate_fn=lambda samples: -torch.tensor(samples))
    assert drawn(loader, 1) == [[0, -1, -2, -3]]


def test_a_list_of_batches_is_taken_from_its_start():
    batches = [torch.tensor([i]) for i in range(5)]
    assert drawn(batches, 3) == [[0], [1], [2]]
    assert drawn(tuple(batches), 9) == [[0], [1], [2], [3], [4]]


class Walkable:
    def __iter__(self):
        return iter([torch.tensor([1]), torch.tensor([2])])


def test_anything_that_can_be_walked_again_is_taken():
    loader = Walkable()
    assert drawn(loader, 1) == drawn(loader, 1) == [[1]]


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "iterator", [iter([1, 2]), (i for i in range(3)), iter(DataLoader(Indices(), batch_size=4))]
)
def test_an_iterator_is_refused_and_not_advanced(iterator):
    with pytest.raises(ValueError, match="walked only once"):
        draw_batches(iterator, 1)
    assert next(iterator) is not None


@pytest.mark.parametrize(
    "loader",
    [
        [],
        DataLoader(Indices(0), batch_size=4),
        DataLoader(Indices(), batch_size=4, sampler=SubsetRandomSampler([])),
    ],
)
def test_empty_data_is_refused(loader):
    with pytest.raises(ValueError, match="empty"):
        draw_batches(loader, 2)
