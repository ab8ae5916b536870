"""Mini-batches are shuffled passes over the data, the same at every use, apart from training's."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.probe.minibatches import MiniBatches, draw_minibatches

NUMBERS = torch.arange(20)
DATASET = TensorDataset(NUMBERS)


def _numbers(drawn: MiniBatches) -> list[list[int]]:
    def flat(batch: Any) -> list[int]:
        return (batch[0] if isinstance(batch, (list, tuple)) else batch).tolist()

    return [flat(batch) for batch in drawn]


def _flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


SOURCES = {
    "a list of batches": [NUMBERS[:8], NUMBERS[8:16], NUMBERS[16:]],
    "one batch": [NUMBERS],
    "a dataset": DATASET,
    "a loader": DataLoader(DATASET, batch_size=7),
    "a shuffling loader": DataLoader(DATASET, batch_size=3, shuffle=True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_each_pass_takes_every_sample_once_in_a_new_order(name: str) -> None:
    drawn = draw_minibatches(SOURCES[name], batch_size=5, num_minibatches=10)
    batches = _numbers(drawn)
    assert len(drawn) == 10
    assert drawn.batch_size == 5
    passes = [_flat(batches[i : i + 4]) for i in (0, 4)]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert passes[0] != passes[1]
    assert all(len(set(batch)) == 5 for batch in batches)


@pytest.mark.parametrize("name", SOURCES)
def test_the_ragged_end_of_a_pass_is_left_out(name: str) -> None:
    batches = _numbers(draw_minibatches(SOURCES[name], batch_size=6, num_minibatches=7))
    assert [len(batch) for batch in batches] == [6] * 7
    assert len(set(_flat(batches[:3]))) == len(set(_flat(batches[3:6]))) == 18


@pytest.mark.parametrize("name", SOURCES)
def test_one_pass_by_default_and_the_seed_decides(name: str) -> None:
    first, again, other = (
        _numbers(draw_minibatches(SOURCES[name], batch_size=5, seed=seed)) for seed in (3, 3, 4)
    )
    assert len(first) == 4
    assert first == again
    assert first != other


def test_defaults_of_a_loader() -> None:
    drawn = draw_minibatches(DataLoader(DATASET, batch_size=8))
    assert (len(drawn), drawn.batch_size) == (2, 8)


def test_batches_as_they_are_given() -> None:
    given = SOURCES["a list of batches"]
    drawn = draw_minibatches(given, num_minibatches=2)
    assert drawn.batch_size is None
    assert _numbers(drawn) == [list(range(8)), list(range(8, 16))]
    assert len(draw_minibatches(given)) == 3
    assert draw_minibatches([NUMBERS[:4], NUMBERS[4:8]])[-1].tolist() == [4, 5, 6, 7]
    objects = [object(), object()]  # batches of any kind, a graph say
    assert [batch is one for batch, one in zip(draw_minibatches(objects), objects, strict=True)]


def test_more_than_there_are_come_from_the_samples() -> None:
    drawn = draw_minibatches(SOURCES["a list of batches"], num_minibatches=9)
    assert drawn.batch_size == 8
    assert [len(batch) for batch in _numbers(drawn)] == [8] * 9


def test_single_samples_can_be_joined() -> None:
    for data in ([NUMBERS], [n.reshape(1) for n in NUMBERS]):
        drawn = draw_minibatches(data, batch_size=1)
        assert drawn.batch_size == 1
        joined = drawn.joined(3, 9).tolist()
        assert joined == [int(drawn[i]) for i in range(3, 9)]
    given = draw_minibatches([n.reshape(1) for n in NUMBERS])
    assert given.joined(2, 5).tolist() == [2, 3, 4]
    uneven = draw_minibatches([torch.zeros(1, 2), torch.zeros(1, 3)])
    assert uneven.batch_size is None


def test_structure_of_the_batch_is_kept() -> None:
    batch = {"inputs": (torch.arange(6.0).view(6, 1), torch.ones(6)), "name": "digits"}
    (drawn,) = draw_minibatches([batch], batch_size=6)
    assert drawn["name"] == "digits"
    assert drawn["inputs"][0].shape == (6, 1)
    assert sorted(drawn["inputs"][0].flatten().tolist()) == list(range(6))


class Noisy(Dataset):
    """Noise from all three global generators, fetched one by one or many at a time."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(()) + random.random() + np.random.rand()


class NoisyInBulk(Noisy):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("dataset", [Noisy(), NoisyInBulk()], ids=["one by one", "in bulk"])
def test_random_transforms_are_seeded_and_training_does_not_notice(dataset: Any) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    drawn = draw_minibatches(dataset, batch_size=4, num_minibatches=10)
    third = drawn[3]
    assert torch.equal(drawn[3], third)
    fresh = draw_minibatches(dataset, batch_size=4, num_minibatches=10)
    assert torch.equal(fresh[3], third)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before
    # The same sample in the next pass is transformed anew.
    values = torch.cat([drawn[i] for i in range(10)])
    assert len(values.unique()) == 40


def _subset() -> DataLoader[Any]:
    chosen = SubsetRandomSampler(range(5, 15), generator=torch.Generator().manual_seed(1))
    return DataLoader(DATASET, batch_size=2, sampler=chosen)


def test_a_sampler_of_the_users_own_is_followed_and_left_alone() -> None:
    loader = _subset()
    state = loader.sampler.generator.get_state()
    batches = _numbers(draw_minibatches(loader, num_minibatches=15))
    assert all(sorted(_flat(batches[i : i + 5])) == list(range(5, 15)) for i in (0, 5, 10))
    assert batches[:5] != batches[5:10], "each pass in an order of its own"
    assert batches != _numbers(draw_minibatches(loader, num_minibatches=15, seed=1))
    assert torch.equal(loader.sampler.generator.get_state(), state)
    weights = torch.tensor([1.0] * 3 + [0.0] * 17)
    weighted = DataLoader(DATASET, batch_size=4, sampler=WeightedRandomSampler(weights, 40))
    numbers = _flat(_numbers(draw_minibatches(weighted, num_minibatches=30)))
    assert set(numbers) == {0, 1, 2}


def test_a_generator_of_the_dataset_is_seeded_and_put_back() -> None:
    class ByItself(Noisy):
        def __init__(self) -> None:
            self.generator = np.random.default_rng(3)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(index + self.generator.random())

    dataset = ByItself()
    before = str(dataset.generator.bit_generator.state)
    drawn = draw_minibatches(dataset, batch_size=4, num_minibatches=10)
    third = drawn[3]
    assert torch.equal(drawn[3], third)
    assert str(dataset.generator.bit_generator.state) == before
    assert len((torch.cat([drawn[0], drawn[1]]) % 1).unique()) == 8


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(NUMBERS)


class Pairs(BatchSampler):
    """A batch sampler of the user's own."""


def test_streams_and_batch_samplers_are_read_and_held() -> None:
    stream = DataLoader(Stream(), batch_size=5)
    assert _numbers(draw_minibatches(stream, num_minibatches=2)) == [
        [0, 1, 2, 3, 4], [5, 6, 7, 8, 9],
    ]  # fmt: skip
    assert len(draw_minibatches(stream, num_minibatches=12)) == 12
    pairs = Pairs(RandomSampler(DATASET, generator=torch.Generator()), 2, False)
    loader = DataLoader(DATASET, batch_sampler=pairs)
    assert [len(batch) for batch in _numbers(draw_minibatches(loader))] == [2] * 10


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ([], {}, "There is no data"),
        (iter([NUMBERS]), {}, "is an iterator.*Give a DataLoader, a Dataset or a list"),
        (DATASET, {}, "no batch size of its own; give batch_size="),
        ([NUMBERS], {"batch_size": 21}, "batch_size=21, but the data hold 20 samples. Lower"),
        ([NUMBERS], {"batch_size": -1}, "batch_size=-1"),
        ([NUMBERS], {"num_minibatches": 0}, "num_minibatches=0"),
        ([object()], {"batch_size": 2}, "Batch 0 cannot be taken apart.*Give a DataLoader"),
        ([(NUMBERS, NUMBERS[:3])], {"batch_size": 2}, "Batch 0 cannot be taken apart"),
        ([torch.tensor(1.0)], {"batch_size": 1}, "Batch 0 cannot be taken apart"),
        ([torch.zeros(3, 2), torch.zeros(3, 4)], {"batch_size": 2}, "cannot be joined.*one shape"),
    ],
)
def test_misuse(data: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_minibatches(data, **arguments)


def test_joined_samples_are_what_each_is_by_itself() -> None:
    """Random transforms too: a sample does not depend on those that are fetched with it."""
    drawn = draw_minibatches(Noisy(), batch_size=1, num_minibatches=12)
    each = torch.cat([drawn[i] for i in range(12)])
    assert torch.equal(drawn.joined(0, 12), each)
    assert torch.equal(drawn.joined(5, 9), each[5:9])


def test_ranks_share_the_mini_batches_of_one() -> None:
    whole = draw_minibatches(Noisy(), batch_size=4, num_minibatches=10)
    for rank in range(3):
        ranks = Ranks()
        vars(ranks).update(rank=rank, world=3)  # what a process group would say
        share = draw_minibatches(Noisy(), batch_size=4, num_minibatches=10, ranks=ranks)
        assert (share.total, list(share.numbers)) == (10, list(range(rank, 10, 3)))
        assert share.checksum() == whole.checksum()
        for number, batch in zip(share.numbers, share, strict=True):
            assert torch.equal(batch, whole[number])
