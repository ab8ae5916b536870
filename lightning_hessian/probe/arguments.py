"""The rules of what a measurement is made on: a module, its parameters, batches, processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import function_of, glob, is_collection


def a_module(name: str, value: Any) -> nn.Module:
    """The rule of ``model``: an instance of ``nn.Module`` with something to differentiate by."""
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise ArgumentError(name, value, f"It is a class; give an instance, {value.__name__}(...).")
    if not isinstance(value, nn.Module):
        raise ArgumentError(name, value, "Give a torch.nn.Module.")
    if not any(parameter.requires_grad for parameter in value.parameters()):
        raise ArgumentError(
            name,
            type(value).__name__,
            "It has no parameter that requires grad; there is nothing to differentiate. Unfreeze "
            "some, or build the module before measuring.",
        )
    return value


def selection(name: str, value: Any) -> Any:
    """The rule of ``parameters``: what a `ParameterSelection` may be, but for None."""
    if isinstance(value, (nn.Module, torch.Tensor, type)):
        raise ArgumentError(name, value, "Give a glob over parameter names, or a list of globs.")
    if callable(value):
        return function_of("name", "parameter", returns="bool")(name, value)
    if not is_collection(value):
        return glob(name, value)
    if not len(value):
        raise ArgumentError(name, value, "It selects nothing; use None for all parameters.")
    return [glob(name, one) for one in value]


_BATCHES = "Give a list of batches such as [(inputs, targets)], or a DataLoader."


def batches(name: str, value: Any) -> Any:
    """The rule of ``batches``: something that yields batches, none of them None or a number.

    One tensor would be walked row by row, a text letter by letter, and a mapping key by key, none
    of which anybody means.
    """
    if isinstance(value, type):
        raise ArgumentError(name, value, f"It is a class; {_BATCHES[0].lower()}{_BATCHES[1:]}")
    if isinstance(value, (str, bytes, Mapping, torch.Tensor, np.ndarray, nn.Module)):
        raise ArgumentError(name, value, _BATCHES)
    if not (hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")):
        raise ArgumentError(name, value, _BATCHES)
    if isinstance(value, (list, tuple)):
        check_listed(name, value)
    return value


def check_listed(name: str, value: list[Any] | tuple[Any, ...]) -> None:
    """Check that a list holds batches, as far as can be seen without a model.

    Raises:
        ArgumentError: It is empty, or one of them is empty, None, a number or a text.
    """
    if not value:
        raise ArgumentError(name, value, f"It holds no batch. {_BATCHES}")
    for index, batch in enumerate(value):
        hollow = isinstance(batch, (list, tuple, Mapping, set)) and not len(batch)
        if hollow or batch is None or isinstance(batch, (str, bytes, bool, int, float, type)):
            raise ArgumentError(name, value, f"Batch {index} is {batch!r:.40}. {_BATCHES}")


def gradient_data(name: str, value: Any) -> Any:
    """The rule of ``data`` of `gradient_structure`: batches, or a map-style Dataset."""
    if isinstance(value, Dataset) and not isinstance(value, IterableDataset):
        return value
    return batches(name, value)


def probe_data(name: str, value: Any) -> Any:
    """The rule of ``data`` of a callback."""
    if isinstance(value, str):
        if value in ("train", "val"):
            return value
        raise ArgumentError(name, value, "Give 'train', 'val', a DataLoader or a list of batches.")
    if isinstance(value, Mapping):
        if value and all(isinstance(loader, DataLoader) for loader in value.values()):
            return value
        raise ArgumentError(name, value, "Give 'train', 'val', a DataLoader or a list of batches.")
    if isinstance(value, Iterator) and type(value).__name__ != "CombinedLoader":  # over loaders
        raise ArgumentError(
            name,
            type(value).__name__,
            "It is an iterator, which can be walked only once. Give a DataLoader or a list of "
            "batches.",
        )
    return batches(name, value)


def group(name: str, value: Any) -> Any:
    """The rule of ``process_group``."""
    known = torch.distributed.is_available()
    if known and isinstance(value, torch.distributed.ProcessGroup):
        return value
    raise ArgumentError(
        name, value, "Give a group of torch.distributed, such as torch.distributed.group.WORLD."
    )
