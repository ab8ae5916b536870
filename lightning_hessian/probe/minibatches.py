"""The mini-batches whose gradients are compared: passes over the data apart from training's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate

from lightning_hessian.probe.isolation import preserved_generators, preserved_rng, seed_everything
from lightning_hessian.probe.samples import _order, draw_batches

Fetch = Callable[[list[int]], Any]
"""Indices of samples to one batch of them."""


class MiniBatches:
    """T mini-batches, each fetched when it is asked for and the same whenever that is.

    Args:
        fetch: Indices to a batch.
        order: Indices of each mini-batch, int64 [T, B].
        batch_size: B, or None where an index is not one sample but a whole batch, as it was given.
        seed: Of random transforms; mini-batch t is fetched with generators seeded ``seed + t``.
        dataset: What may hold generators of its own, which are seeded likewise and put back.
    """

    def __init__(
        self,
        fetch: Fetch,
        order: Tensor,
        *,
        batch_size: int | None,
        seed: int = 0,
        dataset: Any = None,
    ) -> None:
        self._fetch, self._order, self._seed = fetch, order, seed
        self._dataset = dataset
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Returns T."""
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        """Returns one mini-batch."""
        start = range(len(self))[index]
        return self.joined(start, start + 1)

    def joined(self, start: int, stop: int) -> Any:
        """Returns the samples of mini-batches ``start`` to ``stop - 1`` as one batch."""
        seed = self._seed + start
        with preserved_rng(), preserved_generators(self._dataset, seed):
            seed_everything(seed)
            return self._fetch(self._order[start:stop].flatten().tolist())


def draw_minibatches(
    data: Any, *, batch_size: int | None = None, num_minibatches: int | None = None, seed: int = 0
) -> MiniBatches:
    """Returns T mini-batches of B samples, drawn in shuffled passes over the data.

    Each pass is shuffled anew and its ragged end is left out, as with
    ``DataLoader(shuffle=True, drop_last=True)``. Neither training's order nor its generators are
    touched. Samples of a dataset are fetched and transformed at every use, with fixed seeds.

    Args:
        data: A DataLoader, a map-style Dataset, or batches. A loader's own sampler (a subset,
            weights) is copied and followed. Batches are joined, and their samples (first
            dimension of every tensor) drawn anew; but where they suffice as they are, with
            ``batch_size=None`` and T at most their number, each is one mini-batch. What is no
            tensor in a batch is taken from the first one.
        batch_size: B; by default the loader's, or the size of the first batch.
        num_minibatches: T; by default as many as make one pass.
        seed: Of the order and of random transforms.

    Raises:
        ValueError: No data, fewer samples than B, batches that cannot be taken apart, or a
            dataset without ``batch_size``.

    Example:
        >>> drawn = draw_minibatches([torch.arange(10)], batch_size=5, num_minibatches=4)
        >>> [len(batch) for batch in drawn], sorted(drawn[0].tolist() + drawn[1].tolist())
        ([5, 5, 5, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; a mini-batch needs at least one sample.")
    if num_minibatches is not None and num_minibatches < 1:
        raise ValueError(f"num_minibatches={num_minibatches}; at least one is needed.")
    if isinstance(data, DataLoader):
        return _of_loader(data, batch_size, num_minibatches, seed)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        if batch_size is None:
            raise ValueError("A Dataset has no batch size of its own; give batch_size=.")
        return _of_dataset(data, None, default_collate, batch_size, num_minibatches, seed)
    if isinstance(data, Iterator):
        raise ValueError(
            f"data={type(data).__name__} is an iterator, which can be walked only once. Give a "
            "DataLoader, a Dataset or a list of batches."
        )
    return _of_batches(list(data), batch_size, num_minibatches, seed)


def _of_loader(
    loader: DataLoader[Any], batch_size: int | None, num: int | None, seed: int
) -> MiniBatches:
    indexable = not isinstance(loader.dataset, IterableDataset)
    if indexable and type(loader.batch_sampler) is BatchSampler:
        size = batch_size or loader.batch_sampler.batch_size
        sampler = loader.batch_sampler.sampler
        return _of_dataset(loader.dataset, sampler, loader.collate_fn, size, num, seed)
    # A stream, or batches of the user's own making: they can only be read and held.
    if num is None:
        num = len(loader)
    return _of_batches(draw_batches(loader, num, seed=seed), batch_size, num, seed)


def _of_dataset(
    dataset: Any,
    sampler: Any,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
    num: int | None,
    seed: int,
) -> MiniBatches:
    many = getattr(dataset, "__getitems__", None)

    def fetch(indices: list[int]) -> Any:
        return collate(many(indices) if many else [dataset[i] for i in indices])

    with preserved_rng(), preserved_generators(sampler, seed):
        seed_everything(seed)
        generator = torch.Generator().manual_seed(seed)
        if sampler is None:
            passes = _shuffled(len(dataset), generator)
        else:
            passes = _passes_of(sampler, dataset, generator)
        order = _in_passes(passes, batch_size, num)
    return MiniBatches(fetch, order, batch_size=batch_size, seed=seed, dataset=dataset)


def _of_batches(
    batches: list[Any], batch_size: int | None, num: int | None, seed: int
) -> MiniBatches:
    if not batches:
        raise ValueError("There is no data: the loader or list of batches is empty.")
    sizes = [_size(batch) for batch in batches]
    if batch_size is None and (num is None or num <= len(batches)):
        order = torch.arange(num or len(batches)).unsqueeze(1)
        if all(size == 1 for size in sizes):
            with suppress(ValueError):  # samples of different shapes stay as they are
                return MiniBatches(_pool(batches), order, batch_size=1, seed=seed)
        return MiniBatches(lambda indices: batches[indices[0]], order, batch_size=None, seed=seed)
    if None in sizes:
        raise ValueError(
            f"Batch {sizes.index(None)} cannot be taken apart into samples: its tensors differ in "
            "their first dimension, or there are none. Give a DataLoader over a Dataset, or at "
            "least as many batches as gradients and no batch_size."
        )
    size = batch_size or sizes[0] or 1
    generator = torch.Generator().manual_seed(seed)
    passes = _shuffled(sum(size or 0 for size in sizes), generator)
    order = _in_passes(passes, size, num)
    return MiniBatches(_pool(batches), order, batch_size=size, seed=seed)


def _shuffled(size: int, generator: torch.Generator) -> Iterator[list[int]]:
    while True:
        yield torch.randperm(size, generator=generator).tolist()


def _passes_of(sampler: Any, dataset: Any, generator: torch.Generator) -> Iterator[list[int]]:
    """Yields the order of one pass after the other, as the sampler of a loader would."""
    while True:
        order = _order(sampler, dataset, generator, None)
        yield list(order)
        while not isinstance(order, list):  # a copy of the user's own goes on from pass to pass
            yield list(order)


def _in_passes(passes: Iterable[list[int]], batch_size: int, num: int | None) -> Tensor:
    """Returns the indices [T, B] of mini-batches that lie within one pass each."""
    chunks: list[Tensor] = []
    count = 0
    for indices in passes:
        whole = len(indices) // batch_size
        if whole == 0:
            raise ValueError(
                f"batch_size={batch_size}, but the data hold {len(indices)} samples. Lower "
                "batch_size or bring more data."
            )
        chunks.append(torch.tensor(indices[: whole * batch_size]).view(whole, batch_size))
        count += whole
        if count >= (num or 0):
            break
    return torch.cat(chunks)[:num]


def _pool(batches: list[Any]) -> Fetch:
    """Returns what fetches samples by their index in all batches joined."""
    columns: list[list[Tensor]] = []
    for batch in batches:
        tensors: list[Tensor] = []
        apply_to_collection(batch, Tensor, tensors.append)
        columns.append(tensors)
    if len({tuple((t.dtype, t.shape[1:]) for t in tensors) for tensors in columns}) > 1:
        raise ValueError(
            "The batches cannot be joined: their tensors differ in number, shape or dtype. Give a "
            "DataLoader over a Dataset, or batches of one shape."
        )
    joined = [
        parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*columns, strict=True)
    ]

    def fetch(indices: list[int]) -> Any:
        parts = iter(tensor[torch.tensor(indices, device=tensor.device)] for tensor in joined)
        return apply_to_collection(batches[0], Tensor, lambda _: next(parts))

    return fetch


def _size(batch: Any) -> int | None:
    """Returns the number of samples, None where the tensors of a batch do not agree on it."""
    sizes: set[float] = set()
    apply_to_collection(batch, Tensor, lambda t: sizes.add(t.shape[0] if t.ndim else math.nan))
    return int(sizes.pop()) if len(sizes) == 1 and math.nan not in sizes else None
