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

from lightning_hessian.isolation.copies import copied
from lightning_hessian.linear.rng import preserved_rng, seed_everything

_UNIFORM = (SequentialSampler, RandomSampler, DistributedSampler)


def draw_batches(
    loader: Iterable[Any],
    num_batches: int,
    *,
    seed: int = 0,
    first_samples: int | None = None,
) -> list[Any]:
    """Return ``num_batches`` batches of a loader's data without advancing the loader.

    A DataLoader over a map-style dataset is not iterated: its samples are drawn uniformly without
    replacement (a custom sampler is copied and followed instead), fetched in this process and
    collated as the loader does. So neither its order, its generators nor its workers notice, and
    the same seed gives the same samples whenever it is called. An iterable dataset, or a loader of
    another kind, is read anew from where it stands.

    What is read is a copy, so that a dataset that counts, caches or moves a cursor is as before.

    Args:
        loader: A DataLoader, a list of batches, or anything that can be walked again.
        num_batches: How many batches at most; fewer come from a loader that has fewer.
        seed: Of the draw and of random transforms.
        first_samples: Draw from the first so many samples only (``overfit_batches``).

    Raises:
        ValueError: The loader is empty, or an iterator that training would miss data from.
        StatefulDataError: Reading the data would change what training reads.
    """
    if isinstance(loader, Iterator):
        raise ValueError(
            f"data={type(loader).__name__} is an iterator, which can be walked only once. Give a "
            "DataLoader or a list of batches."
        )
    if isinstance(loader, (list, tuple)):
        batches = list(itertools.islice(loader, num_batches))
    else:
        batches = _read(loader, num_batches, seed, first_samples)
    if not batches:
        raise ValueError(
            "The probe data is empty: its loader yields no batch. Check its dataset and sampler, "
            "or give other data."
        )
    return batches


def _read(
    loader: Iterable[Any], num_batches: int, seed: int, first_samples: int | None
) -> list[Any]:
    """Return batches read from a copy of a loader's dataset, sampler and collate function."""
    parts: tuple[Any, ...] = (loader,)
    if isinstance(loader, DataLoader):
        parts = (loader.dataset, loader.sampler, loader.batch_sampler, loader.collate_fn)
    with preserved_rng(), copied(loader, parts, seed) as (copies, apart):
        seed_everything(seed)
        source = copies[0]
        if isinstance(loader, DataLoader):
            source = _over(loader, copies, num_batches, seed, first_samples)
        return [apart(batch) for batch in itertools.islice(iter(source), num_batches)]


def _over(
    loader: DataLoader[Any],
    copies: tuple[Any, ...],
    num_batches: int,
    seed: int,
    first_samples: int | None,
) -> DataLoader[Any]:
    """Return a loader over copies of what ``loader`` reads with."""
    dataset, sampler, batch_sampler, collate = copies
    generator = torch.Generator().manual_seed(seed)
    if isinstance(dataset, IterableDataset):
        return DataLoader(
            dataset, batch_size=loader.batch_size, collate_fn=collate, generator=generator
        )
    if batch_sampler is None:  # the dataset makes its own batches
        order = _order(sampler, dataset, generator, first_samples)
        return DataLoader(
            dataset, batch_size=None, sampler=order, collate_fn=collate, generator=generator
        )
    if type(batch_sampler) is BatchSampler:
        size = batch_sampler.batch_size
        order = _order(batch_sampler.sampler, dataset, generator, first_samples)
        indices = list(itertools.islice(order, num_batches * size))
        chunks = [indices[i : i + size] for i in range(0, len(indices), size)]
    else:
        chunks = list(itertools.islice(batch_sampler, num_batches))
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
    # It has generators of its own, and the dataset is not copied.
    found: Iterable[int] = copy.deepcopy(sampler, memo={id(dataset): dataset})
    return found
