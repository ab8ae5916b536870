"""The promise that measuring leaves no trace: RNG, modes, attributes, loggers, global flags."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hessian.linear.rng import GENERATORS, preserved_rng, restorer

_SPEECH = ("log", "log_dict", "print")
_MOST_VISITED = 10_000


@contextmanager
def isolated(module: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Open a block in which ``module`` can be differentiated twice; nothing has changed after it.

    Inside: gradients are enabled (also within inference mode), autocast is off, attention runs on
    kernels that have a double backward, compiled code runs uncompiled. Afterwards: random number
    generators, train/eval modes and global flags are as before, also when the block raises.

    Args:
        module: The module that is measured.
        training: Whether it stands in training mode inside (dropout on, BatchNorm by batch).
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(_mode(module, training))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        device = next(module.parameters()).device.type
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_twice_differentiable(module))
        stack.enter_context(_dense_gradients(module))
        yield


@contextmanager
def preserved_generators(root: Any, seed: int) -> Iterator[Callable[[int], None]]:
    """Open a block in which an object's generators start from a seed; they end as before.

    A dataset or a sampler may draw from a generator of its own: it is looked for in attributes and
    containers. What the block is given starts them from another seed.
    """
    found = _generators(root)
    undo = [restorer(generator) for generator in found]

    def restart(seed: int) -> None:
        for generator in found:
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, np.random.Generator):
                fresh = type(generator.bit_generator)(seed)
                generator.bit_generator.state = fresh.state
            else:
                generator.seed(seed % 2**32)

    try:
        restart(seed)
        yield restart
    finally:
        for restore in undo:
            restore()


def _generators(root: Any) -> list[Any]:
    """Return the generators within reach; of large containers the first entries are looked at."""
    found: list[Any] = []
    seen: set[int] = set()
    stack = [root]
    while stack and len(seen) < _MOST_VISITED:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (Tensor, np.ndarray, str, bytes, type)):
            continue
        seen.add(id(value))
        if isinstance(value, GENERATORS):
            found.append(value)
        elif isinstance(value, dict):
            stack += list(itertools.islice(value.values(), 100))
        elif isinstance(value, (list, tuple)):
            stack += value[:100]
        elif hasattr(value, "__dict__"):
            stack += vars(value).values()
    return found


@contextmanager
def muted(module: nn.Module) -> Iterator[None]:
    """Open a block in which ``module.log``, the loggers of its Trainer and W&B's runs are silent.

    Afterwards all of them are as before, what the user put in their place among it.
    """
    wandb: Any = sys.modules.get("wandb")
    trainer: Any = getattr(module, "_trainer", None)
    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "log_dict") and hasattr(part, "log"):
                stack.enter_context(_silent(part, _SPEECH))
        runs = [] if wandb is None else [getattr(wandb, "run", None)]
        if trainer is not None:
            runs += [getattr(logger, "_experiment", None) for logger in trainer.loggers]
        for run in {id(run): run for run in runs if run is not None}.values():
            if run is runs[0] or type(run).__module__.startswith("wandb"):
                stack.enter_context(_silent(run, _spoken(run)))
        if runs and runs[0] is not None:
            stack.enter_context(_silent(wandb, _spoken(wandb)))
        if trainer is not None:
            stack.enter_context(_without_loggers(trainer))
        yield


def _spoken(owner: Any) -> list[str]:
    """Return the names by which W&B, or a run of its, is spoken to."""
    names = {*dir(type(owner)), *getattr(owner, "__dict__", ())}
    return ["log", *(n for n in names if n.startswith("log_") or n == "alert")]


@contextmanager
def _silent(owner: Any, names: Iterable[str]) -> Iterator[None]:
    """Put attributes out of force, and back what stood there: nothing, or the user's own."""
    attributes = getattr(owner, "__dict__", None)
    if attributes is None:  # nothing can be put there, by us or by the user
        yield
        return
    names = list(names)
    before = {name: attributes[name] for name in names if name in attributes}
    try:
        attributes.update(dict.fromkeys(names, _ignore))
        yield
    finally:
        for name in names:
            attributes.pop(name, None)
        attributes.update(before)


@contextmanager
def _without_loggers(trainer: Any) -> Iterator[None]:
    from lightning.pytorch.loggers.logger import DummyLogger

    loggers = trainer.loggers
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]
        yield
    finally:
        trainer.loggers = loggers


def _ignore(*_: Any, **__: Any) -> None:
    """Take a logging call's place."""


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set the flags one by one: ``train()`` may be overridden and do more."""
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    trains = _training_modes(module)
    try:
        for submodule, _ in flags:
            submodule.training = training and trains[submodule]
        yield
    finally:
        for submodule, was_training in flags:
            submodule.training = was_training


def _training_modes(module: nn.Module) -> dict[nn.Module, bool]:
    """Return which parts stand in training mode while ``module`` trains.

    A part that the user keeps in evaluation mode (a frozen backbone) stays there. In a validation
    all parts are in evaluation mode; Lightning has noted how they were.
    """
    if module.training:
        return {part: part.training for part in module.modules()}
    trainer: Any = getattr(module, "_trainer", None)
    noted: dict[str, bool] = {}
    if trainer is not None and trainer.state.fn == "fit":
        noted = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
    return {part: noted.get(name, True) for name, part in module.named_modules()}


@contextmanager
def _twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Choose kernels that have a second derivative, and put the user's choice back."""
    submodules = list(module.modules())
    with ExitStack() as stack:
        # The fused attention kernels have no double backward.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(m, nn.RNNBase) for m in submodules):
            # The recurrent kernels of cuDNN and MKL-DNN have none either.
            stack.enter_context(_without_mkldnn())
            cudnn = torch.backends.cudnn
            if cudnn.enabled:
                stack.enter_context(
                    cudnn.flags(
                        enabled=False,
                        benchmark=cudnn.benchmark,
                        benchmark_limit=cudnn.benchmark_limit,
                        deterministic=cudnn.deterministic,
                        allow_tf32=cudnn.allow_tf32,
                    )
                )
        if any(_is_compiled(m) for m in submodules):
            from torch._dynamo import config

            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(config.patch(error_on_nested_fx_trace=False))
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def _dense_gradients(module: nn.Module) -> Iterator[None]:
    """Open a block in which embeddings have dense gradients, which have second derivatives."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    found = [m for m in module.modules() if isinstance(m, kinds) and m.sparse]
    try:
        for embedding in found:
            embedding.sparse = False
        yield
    finally:
        for embedding in found:
            embedding.sparse = True


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    flags = torch.backends.mkldnn.flags(enabled=False)
    with warnings.catch_warnings():  # it speaks of TF32 on Intel GPUs where there is none
        warnings.simplefilter("ignore")
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags.__exit__(None, None, None)


def _is_compiled(module: nn.Module) -> bool:
    names = ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")
    return any(getattr(module, name, None) is not None for name in names)
