"""What a module and its process hold, as something that can be compared."""

from __future__ import annotations

import collections
import random

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.spectrum import hessian_spectrum


def fingerprint(value):
    """Returns a copy of a value in which tensors compare by kind, dtype and digits."""
    if isinstance(value, Tensor):
        return (type(value).__name__, str(value.dtype), value.requires_grad, value.tolist())
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.tolist())
    if isinstance(value, nn.Module):
        return ("module", id(value))
    if isinstance(value, dict):
        return (type(value).__name__, [(key, fingerprint(part)) for key, part in value.items()])
    if isinstance(value, (list, tuple, collections.deque)):
        return (type(value).__name__, [fingerprint(part) for part in value])
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, sorted(map(repr, value)))
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return id(value)


def module_state(module: nn.Module) -> dict:
    """Returns all that a module holds: every entry of every submodule's ``__dict__``."""
    state = {}
    for name, submodule in module.named_modules():
        for key, value in vars(submodule).items():
            state[f"{name}:{key}"] = fingerprint(value)
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        state[f"grad:{name}"] = None if grad is None else (id(grad), grad.tolist())
        state[f"place:{name}"] = (id(parameter), parameter.data_ptr(), parameter._version)
    for name, buffer in module.named_buffers():
        state[f"place:{name}"] = (id(buffer), buffer.data_ptr())
    return state


def global_state() -> dict:
    """Returns the generators and the process-wide switches that a measurement might turn."""
    numpy_state = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
        "torch": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "default dtype": torch.get_default_dtype(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "sdpa": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "mha fastpath": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.benchmark_limit,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.allow_tf32,
        ),
        "compiler": torch._dynamo.eval_frame._stance.stance,
        "threads": torch.get_num_threads(),
    }


def assert_same(before: dict, after: dict) -> None:
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert not changed


def measure(module, batches, **options):
    """Returns the spectrum of a few products, by the module's own loss."""
    options = {"num_eigenvalues": 3, "budget": Budget(products=8), "trace_probes": 2} | options
    return hessian_spectrum(module, None, batches, **options)
