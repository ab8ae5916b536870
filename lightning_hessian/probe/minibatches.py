"""The mini-batches whose gradients are compared: passes over the data apart from training's."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate

from lightning_hessian.isolation.context import preserved_generators
from lightning_hessian.linear.ranks import ALONE, Ranks
from lightning_hessian.linear.rng import preserved_rng, seed_everything
from lightning_hessian.probe.samples import _order, draw_batches

Fetch = Callable[[list[int]], Any]
"""Indices of samples to one batch of them."""


class MiniBatches:
    """Mini-batches, each fetched when it is asked for and the same whenever that is.

    Args:
        fetch: Indices to a batch.
        order: Indices of each mini-batch, int64 [T, B].
        batch_size: B, or None where an index is not one sample but a whole batch, as it was given.
        seed: Of random transforms; mini-batch t is fetched with generators seeded ``seed + t``.
        dataset: Where samples come from, if fetching them may draw random numbers; generators of
            its own are seeded likewise and put back.
        ranks: Who fetch: each has every ``ranks.world``-th mini-batch.
        per_pass: How many make a pass over the data; all T where None.

    Attributes:
        total: T, those of all ranks.
        numbers: Which of the T are held here, in order.
        per_pass: How many make a pass: those of one pass have no sample in common.
    """

    def __init__(
        self,
        fetch: Fetch,
        order: Tensor,
        *,
        batch_size: int | None,
        seed: int = 0,
        dataset: Any = None,
        ranks: Ranks = ALONE,
        per_pass: int | None = None,
    ) -> None:
        self._fetch, self._order, self._seed = fetch, order, seed
        self._dataset = dataset
        self.batch_size = batch_size
        self.total = len(order)
        self.per_pass = min(per_pass or self.total, self.total)
        self.numbers = range(ranks.rank, self.total, ranks.world)

    def __len__(self) -> int:
        """Return how many are held here, T of a process by itself."""
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        """Return one of those held here."""
        return self._fetched([self.numbers[index]])[0]

    def joined(self, start: int, stop: int) -> Any:
        """Return the samples of mini-batches ``start`` to ``stop - 1`` of those here as one batch.

        Each is what it is by itself, whichever others it is joined with.

        Raises:
            ValueError: They cannot be joined.
        """
        numbers = list(self.numbers[start:stop])
        if self._dataset is None:
            return self._fetch(self._order[numbers].flatten().tolist())
        parts = self._fetched(numbers)
        return parts[0] if len(parts) == 1 else _joined(parts)

    def sizes(self) -> list[int | None]:
        """Return the number of samples of each held here, None where a batch does not tell it."""
        if self.batch_size is not None:
            return [self.batch_size] * len(self)
        return [_size(self[index]) for index in range(len(self))]

    def checksum(self) -> int:
        """Return a number that tells one draw from another."""
        return zlib.crc32(self._order.numpy().tobytes())

    def _fetched(self, numbers: Sequence[int]) -> list[Any]:
        parts = []
        with preserved_rng(), preserved_generators(self._dataset, self._seed) as restart:
            for number in numbers:
                restart(self._seed + number)
                seed_everything(self._seed + number)
                parts.append(self._fetch(self._order[number].tolist()))
        return parts


def draw_minibatches(
    data: Any,
    *,
    batch_size: int | None = None,
    num_minibatches: int | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> MiniBatches:
    """Return T mini-batches of B samples, drawn in shuffled passes over the data.

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
        ranks: Who share the mini-batches: all draw the same T, and each gets every
            ``ranks.world``-th of them.

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
        return _of_loader(data, batch_size, num_minibatches, seed, ranks)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        if batch_size is None:
            raise ValueError("A Dataset has no batch size of its own; give batch_size=.")
        return _of_dataset(data, None, default_collate, batch_size, num_minibatches, seed, ranks)
    if isinstance(data, Iterator):
        raise ValueError(
            f"data={type(data).__name__} is an iterator, which can be walked only once. Give a "
            "DataLoader, a Dataset or a list of batches."
        )
    batches = data if isinstance(data, Sequence) else list(data)
    return _of_batches(batches, batch_size, num_minibatches, seed, ranks)


def _of_loader(
    loader: DataLoader[Any], batch_size: int | None, num: int | None, seed: int, ranks: Ranks
) -> MiniBatches:
    indexable = not isinstance(loader.dataset, IterableDataset)
    if indexable and type(loader.batch_sampler) is BatchSampler:
        size = batch_size or loader.batch_sampler.batch_size
        sampler = loader.batch_sampler.sampler
        return _of_dataset(loader.dataset, sampler, loader.collate_fn, size, num, seed, ranks)
    # A stream, or batches of the user's own making: they can only be read and held.
    if num is None:
        num = len(loader)
    return _of_batches(draw_batches(loader, num, seed=seed), batch_size, num, seed, ranks)


def _of_dataset(
    dataset: Any,
    sampler: Any,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
    num: int | None,
    seed: int,
    ranks: Ranks,
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
        order, per_pass = _in_passes(passes, batch_size, num)
    return MiniBatches(
        fetch, order, batch_size=batch_size, seed=seed, dataset=dataset, ranks=ranks,
        per_pass=per_pass,
    )  # fmt: skip


def _of_batches(
    batches: Sequence[Any], batch_size: int | None, num: int | None, seed: int, ranks: Ranks
) -> MiniBatches:
    if not batches:
        raise ValueError("There is no data: the loader or list of batches is empty.")
    if batch_size is None and (num is None or num <= len(batches)):
        order = torch.arange(num or len(batches)).unsqueeze(1)
        if all(_size(batch) == 1 for batch in batches):
            with suppress(ValueError):  # samples of different shapes stay as they are
                return MiniBatches(_pool(batches), order, batch_size=1, seed=seed, ranks=ranks)
        # A batch may come to the device as it is first asked for: here, and those of this rank.
        held = {i: batches[i] for i in range(ranks.rank, len(order), ranks.world)}
        return MiniBatches(
            lambda indices: held[indices[0]], order, batch_size=None, seed=seed, ranks=ranks
        )
    sizes = [_size(batch) for batch in batches]
    if None in sizes:
        raise ValueError(
            f"Batch {sizes.index(None)} cannot be taken apart into samples: its tensors differ in "
            "their first dimension, or there are none. Give a DataLoader over a Dataset, or at "
            "least as many batches as gradients and no batch_size."
        )
    size = batch_size or sizes[0] or 1
    generator = torch.Generator().manual_seed(seed)
    passes = _shuffled(sum(size or 0 for size in sizes), generator)
    order, per_pass = _in_passes(passes, size, num)
    return MiniBatches(
        _pool(batches), order, batch_size=size, seed=seed, ranks=ranks, per_pass=per_pass
    )


def _shuffled(size: int, generator: torch.Generator) -> Iterator[list[int]]:
    while True:
        yield torch.randperm(size, generator=generator).tolist()


def _passes_of(sampler: Any, dataset: Any, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield the order of one pass after the other, as the sampler of a loader would."""
    while True:
        order = _order(sampler, dataset, generator, None)
        yield list(order)
        while not isinstance(order, list):  # a copy of the user's own goes on from pass to pass
            yield list(order)


def _in_passes(passes: Iterable[list[int]], batch_size: int, num: int | None) -> tuple[Tensor, int]:
    """Return the indices [T, B] of mini-batches that lie within one pass each, and how many do."""
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
    return torch.cat(chunks)[:num], len(chunks[0])


def _pool(batches: Sequence[Any]) -> Fetch:
    """Return what fetches samples by their index in all batches joined."""
    whole = _joined(batches)

    def fetch(indices: list[int]) -> Any:
        return apply_to_collection(
            whole, Tensor, lambda tensor: tensor[torch.tensor(indices, device=tensor.device)]
        )

    return fetch


def _joined(batches: Sequence[Any]) -> Any:
    """Return the samples of all batches as one; what is no tensor is the first one's."""
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
    joined = iter(
        parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*columns, strict=True)
    )
    return apply_to_collection(batches[0], Tensor, lambda _: next(joined))


def _size(batch: Any) -> int | None:
    """Return the number of samples, None where the tensors of a batch do not agree on it."""
    sizes: set[float] = set()
    apply_to_collection(batch, Tensor, lambda t: sizes.add(t.shape[0] if t.ndim else math.nan))
    return int(sizes.pop()) if len(sizes) == 1 and math.nan not in sizes else None
