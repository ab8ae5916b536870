"""The promise that measuring leaves no trace: RNG, modes, attributes, loggers, global flags."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_TORCH_INTERNAL = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque)
_SPEECH = ("log", "log_dict", "print")


@contextmanager
def isolated(module: nn.Module, *, training: bool = False) -> Iterator[None]:
    """A block in which ``module`` can be differentiated twice and after which nothing has changed.

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
        yield


@contextmanager
def preserved_rng() -> Iterator[None]:
    """A block after which Python's, NumPy's and torch's generators are as they were before."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators; call it inside `preserved_rng`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """A block after which every plain attribute of ``module`` and its submodules is as before.

    A ``training_step`` may append to lists and update metrics. Inside the block it does so to
    copies: tensors are cloned, containers copied one level deep. Parameters, buffers and
    submodules are left to `torch.func.functional_call`.
    """
    saved = []
    for submodule in module.modules():
        attributes = vars(submodule)
        saved.append((attributes, dict(attributes)))
        for name, value in list(attributes.items()):
            if name in _TORCH_INTERNAL:
                continue
            if isinstance(value, Tensor):
                attributes[name] = value.detach().clone()
            elif isinstance(value, _CONTAINERS):
                attributes[name] = copy.copy(value)
    try:
        yield
    finally:
        for attributes, before in saved:
            attributes.clear()
            attributes.update(before)


@contextmanager
def muted(module: nn.Module) -> Iterator[None]:
    """A block in which neither ``module.log`` nor the loggers of its Trainer record anything."""
    loggers: list[Any] | None = None
    trainer: Any = getattr(module, "_trainer", None)
    speakers = [vars(m) for m in module.modules() if hasattr(m, "log_dict") and hasattr(m, "log")]
    before = [{name: s[name] for name in _SPEECH if name in s} for s in speakers]
    try:
        for speaker in speakers:
            speaker.update(dict.fromkeys(_SPEECH, _ignore))
        if trainer is not None:
            from lightning.pytorch.loggers.logger import DummyLogger

            loggers = trainer.loggers
            trainer.loggers = [DummyLogger() for _ in loggers]
        yield
    finally:
        for speaker, own in zip(speakers, before, strict=True):
            for name in _SPEECH:
                speaker.pop(name, None)
            speaker.update(own)
        if loggers is not None:
            trainer.loggers = loggers


def _ignore(*_: Any, **__: Any) -> None:
    """Takes a logging call's place."""


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Sets the flags one by one: ``train()`` may be overridden and do more."""
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        for submodule, was_training in flags:
            # A submodule that the user keeps in evaluation mode (a frozen backbone) stays there.
            submodule.training = training and (was_training or not module.training)
        yield
    finally:
        for submodule, was_training in flags:
            submodule.training = was_training


@contextmanager
def _twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Chooses kernels that have a second derivative, and puts the user's choice back."""
    submodules = list(module.modules())
    with ExitStack() as stack:
        # The fused attention kernels have no double backward.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(m, nn.RNNBase) for m in submodules) and torch.backends.cudnn.enabled:
            # cuDNN's recurrent kernels have none either.
            cudnn = torch.backends.cudnn
            stack.enter_context(
                cudnn.flags(
                    enabled=False,
                    benchmark=cudnn.benchmark,
                    deterministic=cudnn.deterministic,
                    allow_tf32=cudnn.allow_tf32,
                )
            )
        if any(_is_compiled(m) for m in submodules):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


def _is_compiled(module: nn.Module) -> bool:
    names = ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")
    return any(getattr(module, name, None) is not None for name in names)
