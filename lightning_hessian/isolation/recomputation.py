"""Activation checkpointing: what is computed again sees what the first computation saw.

`torch.utils.checkpoint` runs a segment of the forward pass a second time, inside the backward pass.
By then the loss is done: the module holds its own tensors again, where the loss was evaluated at
others. So while a loss is evaluated, each segment notes what the module holds and how the random
generators stand as it begins, and its recomputation finds the same, whenever it comes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing

from lightning_hessian.linear.rng import global_restorer, preserved_rng
from lightning_hessian.results import MeasurementError

Note = Callable[[], Callable[[], AbstractContextManager[None]]]
"""Called as a segment begins; returns what makes the block in which it is computed again."""

_GENERATOR = "_checkpoint_without_reentrant_generator"
"""What `torch.utils.checkpoint.checkpoint` calls with the segment (torch 2.6 to 2.13)."""

REENTRANT = (
    "The module uses reentrant activation checkpointing, whose backward pass computes no gradients "
    "by chosen tensors and no second derivatives. Use `checkpoint(..., use_reentrant=False)`; for "
    "a Hugging Face model "
    "`gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})`."
)


def is_reentrant(error: Exception) -> bool:
    """Return whether an error is that of a reentrant checkpoint, torch's or another library's.

    Their words: torch "checkpoint is incompatible with .grad()", fairscale and DeepSpeed
    "Checkpointing is not compatible with .grad()".
    """
    text = str(error)
    return "heckpoint" in text and "compatible with .grad()" in text


@contextmanager
def recomputing(note: Note) -> Iterator[None]:
    """Open a block in which segments under checkpointing note what they are computed with.

    Raises:
        MeasurementError: Inside, where a segment is reentrant.
    """
    with ExitStack() as stack:
        for place in _places():
            original = getattr(place, _GENERATOR)
            stack.enter_context(_replaced(place, _GENERATOR, _noting(original, note)))
        stack.enter_context(_replaced(checkpointing, "CheckpointFunction", _Refused))
        yield


def _places() -> list[ModuleType]:
    """Return the modules of torch that make segments: the function, and the composable wrapper."""
    names = ("torch.utils.checkpoint", "torch.distributed._composable.checkpoint_activation")
    return [sys.modules[n] for n in names if hasattr(sys.modules.get(n), _GENERATOR)]


@contextmanager
def _replaced(place: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


class _Refused:
    """Stands for the autograd function of reentrant segments."""

    @staticmethod
    def apply(*_: Any) -> Any:
        """Say what to use instead."""
        raise MeasurementError(REENTRANT)


def _noting(original: Callable[..., Any], note: Note) -> Callable[..., Any]:
    """Return a maker of segments whose recomputation finds what their forward pass found."""

    def generator(
        function: Callable[..., Any],
        preserve_rng_state: bool = True,
        context_fn: Any = checkpointing.noop_context_fn,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:  # a transform of torch.func
            return _nothing()
        block, as_drawn = note(), global_restorer()

        def again(*inputs: Any, **options: Any) -> None:
            # torch knows of its own generators only, and without `preserve_rng_state` not of these.
            with block(), preserved_rng(), recomputing(note):
                as_drawn()
                function(*inputs, **options)

        contexts = _contexts_of(context_fn)
        return original(again, preserve_rng_state, contexts, *args, **kwargs)

    return generator


def _nothing() -> Iterator[None]:
    """Run a segment that is an ordinary part of the forward pass."""
    yield


def _contexts_of(context_fn: Any) -> Any:
    """Return a segment's contexts such that it can be computed again any number of times.

    A retained graph is differentiated once for each product. Selective checkpointing gives out
    what it has stored only once, so that here all of the segment is computed again.
    """
    if context_fn is checkpointing.noop_context_fn:
        return context_fn
    forward, again = context_fn()
    if isinstance(forward, getattr(checkpointing, "_CachingTorchDispatchMode", ())):
        return checkpointing.noop_context_fn
    fresh = iter([again])
    return lambda: (forward, _Anew(lambda: next(fresh, None) or context_fn()[1]))


class _Anew:
    """A context that is made anew each time it is entered."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._entered: list[Any] = []

    def __enter__(self) -> Any:
        self._entered.append(self._make())
        return self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._entered.pop().__exit__(*error)
