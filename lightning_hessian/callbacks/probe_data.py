"""Which data a callback measures on: the Trainer's loaders, or what the user gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, TypeAlias

from torch.utils.data import DataLoader, IterableDataset

from lightning_hessian.isolation.copies import StatefulDataError
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.linear.rng import preserved_rng, seed_everything
from lightning_hessian.probe.samples import draw_batches

ProbeData: TypeAlias = str | Iterable[Any]
"""``"train"``, ``"val"``, a DataLoader, or a list of batches."""


class ProbeBatches(Sequence[Any]):
    """Batches that go through the module's transfer hooks to the device when they are first used.

    So a rank that uses some of them holds these only. What the hooks draw at random depends on
    the seed and the number of the batch, not on which others were used.
    """

    def __init__(self, trainer: Any, drawn: Sequence[Any], seed: int) -> None:
        self._trainer, self._drawn, self._seed = trainer, drawn, seed
        self._ready: dict[int, Any] = {}

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._drawn)

    def __getitem__(self, index: Any) -> Any:
        """Return a batch on the device; a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        if index not in self._ready:
            with preserved_rng():  # the hooks may augment
                seed_everything(self._seed + index)
                self._ready[index] = _transferred(self._trainer, self._drawn[index])
        return self._ready[index]


def probe_batches(trainer: Any, data: ProbeData, num_batches: int, seed: int) -> ProbeBatches:
    """Return the probe batches, to come to the Trainer's device through the transfer hooks.

    A list of batches is taken whole.

    Raises:
        ValueError: The data is empty or the Trainer has no such loader.
    """
    if isinstance(data, (list, tuple)):
        batches = list(data)
    else:
        first_samples = None
        loaders: Any = data
        if data == "train":
            loaders = _train_loaders(trainer)
            first_samples = _overfit_samples(trainer, loaders)
        elif data == "val":
            loaders = _val_loader(trainer)
        batches = _draw(loaders, num_batches, seed, first_samples)
    return ProbeBatches(trainer, batches, seed)


def num_samples(trainer: Any, data: ProbeData, num_batches: int) -> int | None:
    """Return the most samples that the probe batches can hold, None where it cannot be told.

    Nothing is read: it goes by the length of a map-style dataset and the loader's batch size. The
    training data must have been set up.
    """
    loader = data
    if isinstance(data, str):
        loader = trainer.train_dataloader if data == "train" else trainer.val_dataloaders
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if loader.batch_size is None or not isinstance(loader.dataset, Sized):
        return None
    return min(num_batches * loader.batch_size, len(loader.dataset))


def early_batches(
    trainer: Any, data: ProbeData, num_batches: int, seed: int, ranks: Ranks
) -> ProbeBatches | None:
    """Return the probe batches, drawn before training; all ranks call it.

    None where that fails on some rank: it is tried again, and told, at the first measurement.

    Raises:
        StatefulDataError: Reading the data would change what training reads.
        RankError: The same, of several ranks.
    """
    failure: Exception | None = None
    try:
        batches = probe_batches(trainer, data, num_batches, seed)
    except Exception as error:  # noqa: BLE001 - told when a measurement needs the data
        failure = error
    refused = isinstance(failure, StatefulDataError)
    if ranks.any(refused):
        if ranks.world > 1:
            ranks.fail(failure if refused else None)
        assert failure is not None
        raise failure
    return None if ranks.any(failure is not None) else batches


def _transferred(trainer: Any, batch: Any) -> Any:
    """Do to a batch what the training loop does before ``training_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _train_loaders(trainer: Any) -> Any:
    loaders = trainer.train_dataloader
    if loaders is not None:
        return loaders
    # trainer.validate() sets up no training data: ask the one who makes it.
    for source in (trainer.datamodule, trainer.lightning_module):
        if source is None:
            continue
        try:
            loaders = source.train_dataloader()
        except Exception as error:
            raise ValueError(
                f"data='train' needs {type(source).__name__}.train_dataloader(), which failed "
                f"outside fit ({type(error).__name__}: {error}). Set up the training data in "
                "setup(stage='validate') too, or give data='val' or a DataLoader."
            ) from error
        if loaders is not None:
            return loaders
    raise ValueError(
        "data='train', but the Trainer has no training data here. Give data='val', a DataLoader or "
        "a list of batches."
    )


def _val_loader(trainer: Any) -> Any:
    loaders = trainer.val_dataloaders
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):  # several: the first, as the docs say
        loaders = loaders[0] if loaders else None
    if loaders is None:
        raise ValueError("data='val', but the Trainer has no validation data.")
    return loaders


def _overfit_samples(trainer: Any, loaders: Any) -> int | None:
    """Return how many samples ``overfit_batches`` leaves to training, None for all."""
    if not trainer.overfit_batches or getattr(loaders, "batch_size", None) is None:
        return None
    return int(trainer.num_training_batches) * int(loaders.batch_size)


def _draw(loaders: Any, num_batches: int, seed: int, first_samples: int | None) -> Any:
    """Draw from one loader, or from each of several, as training combines them."""
    if isinstance(loaders, Mapping):
        drawn = [_draw(v, num_batches, seed, None) for v in loaders.values()]
        return [dict(zip(loaders, parts, strict=True)) for parts in zip(*drawn, strict=False)]
    if isinstance(loaders, (list, tuple)):
        drawn = [_draw(v, num_batches, seed, None) for v in loaders]
        return [list(parts) for parts in zip(*drawn, strict=False)]
    if type(loaders).__name__ == "CombinedLoader":  # an iterator, over loaders that are none
        return _draw(loaders.iterables, num_batches, seed, first_samples)
    return draw_batches(loaders, num_batches, seed=seed, first_samples=first_samples)
