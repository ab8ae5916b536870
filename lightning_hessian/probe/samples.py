"""The fixed probe batches: drawn once, apart from training's own order."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_hessian.probe.isolation import preserved_generators, preserved_rng, seed_everything

_UNIFORM = (SequentialSampler, RandomSampler, DistributedSampler)


def draw_batches(
    loader: Iterable[Any],
    num_batches: int,
    *,
    seed: int = 0,
    first_samples: int | None = None,
) -> list[Any]:
    """Returns ``num_batches`` batches of a loader's data without advancing the loader.

    A DataLoader over a map-style dataset is not iterated: its samples are drawn uniformly without
    replacement (a custom sampler is copied and followed instead), fetched in this process and
    collated as the loader does. So neither its order, its generators nor its workers notice, and
    the same seed gives the same samples whenever it is called. An iterable dataset, or a loader of
    another kind, is read anew from its start.

    Args:
        loader: A DataLoader, a list of batches, or anything that can be walked again.
        num_batches: How many batches at most; fewer come from a loader that has fewer.
        seed: Of the draw and of random transforms.
        first_samples: Draw from the first so many samples only (``overfit_batches``).

    Raises:
        ValueError: The loader is empty, or an iterator that training would miss data from.
    """
    if isinstance(loader, Iterator):
        raise ValueError(
            f"data={type(loader).__name__} is an iterator, which can be walked only once. Give a "
            "DataLoader or a list of batches."
        )
    with preserved_rng(), preserved_generators(loader, seed):
        seed_everything(seed)
        if isinstance(loader, DataLoader):
            loader = _apart(loader, num_batches, seed, first_samples)
        batches = list(itertools.islice(iter(loader), num_batches))
    if not batches:
        raise ValueError(
            "The probe data is empty: its loader yields no batch. Check its dataset and sampler, "
            "or give other data."
        )
    return batches


def _apart(
    loader: DataLoader[Any], num_batches: int, seed: int, first_samples: int | None
) -> DataLoader[Any]:
    """Returns a loader over the same dataset that shares no state with ``loader``."""
    generator = torch.Generator().manual_seed(seed)
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, IterableDataset):
        return DataLoader(
            dataset, batch_size=loader.batch_size, collate_fn=collate, generator=generator
        )
    if loader.batch_sampler is None:  # the dataset makes its own batches
        order = _order(loader.sampler, dataset, generator, first_samples)
        return DataLoader(
            dataset, batch_size=None, sampler=order, collate_fn=collate, generator=generator
        )
    if type(loader.batch_sampler) is BatchSampler:
        size = loader.batch_sampler.batch_size
        order = _order(loader.batch_sampler.sampler, dataset, generator, first_samples)
        chunks = _chunks(itertools.islice(order, num_batches * size), size)
    else:
        chunks = list(itertools.islice(_copied(loader.batch_sampler, dataset), num_batches))
    return DataLoader(dataset, batch_sampler=chunks, collate_fn=collate, generator=generator)


def _order(
    sampler: Any, dataset: Any, generator: torch.Generator, first_samples: int | None
) -> Iterable[int]:
    own = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    if own is not None:  # a sampler of the user's own that Lightning distributes over ranks
        sampler = own
    if type(sampler) in _UNIFORM:
        source: Any = (
            sampler.dataset if type(sampler) is DistributedSampler else sampler.data_source
        )
        size = len(source) if first_samples is None else min(first_samples, len(source))
        return torch.randperm(size, generator=generator).tolist()
    # A sampler of the user's own (a subset, weights) says what training sees: follow a copy of it.
    return _copied(sampler, dataset)


def _copied(sampler: Any, dataset: Any) -> Any:
    """Returns a copy with generators of its own, without copying the dataset."""
    return copy.deepcopy(sampler, memo={id(dataset): dataset})


def _chunks(order: Iterable[int], size: int) -> list[list[int]]:
    indices = list(order)
    return [indices[i : i + size] for i in range(0, len(indices), size)]
