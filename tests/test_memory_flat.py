"""Memory is flat over measurements: no tensor stays behind, also where gc cannot look."""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_hessian import block_structure, gradient_structure, hessian_spectrum, layer_spectra
from lightning_hessian.measure.budget import Budget

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*eigenvalues converged"),
    pytest.mark.filterwarnings("ignore:Layers without a spectrum"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm"),
]

WIDTH, SAMPLES = 1024, 512
ACTIVATION_BYTES = 4 * WIDTH * SAMPLES


class Elementwise(nn.Module):
    """A wide hidden layer whose activation saves its own output for the backward pass."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


class Checkpointed(Elementwise):
    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda y: self.activation(self.first(y)), x, use_reentrant=False)
        return self.last(h)


class Recurrent(nn.Module):
    """Eight steps of an LSTM that hold as much as the wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTM(2, WIDTH // 64, batch_first=True), nn.Linear(WIDTH // 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x.unsqueeze(1).expand(-1, 8, -1))[0][:, -1])


class Attending(nn.Module):
    """Attention of 32 positions, or of one where there is one sample, with all its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).view(-1, min(len(x), 32), 8)
        return self.last(self.attention(h, h, h)[0]).view(len(x), 1)


MODULES = {
    "tanh": lambda: Elementwise(nn.Tanh()),
    "sigmoid": lambda: Elementwise(nn.Sigmoid()),
    "softmax": lambda: Elementwise(nn.Softmax(-1)),
    "gelu": lambda: Elementwise(nn.GELU()),
    "lstm": Recurrent,
    "attention": Attending,
    "checkpointed": lambda: Checkpointed(nn.Tanh()),
}
ENGINES = ("auto", "linearize", "autograd", "recompute", "finite_difference")
SMALL = {"num_eigenvalues": 1, "budget": Budget(products=3), "trace_probes": 0}
FUNCTIONS = {
    "spectrum": lambda m, f, b, hvp: hessian_spectrum(m, f, b, hvp=hvp, **SMALL),
    "layers": lambda m, f, b, hvp: layer_spectra(
        m, f, b, layers={"last": "last.*"}, hvp=hvp, **SMALL
    ),
    "blocks": lambda m, f, b, hvp: block_structure(
        m, f, b, blocks={"last": "last.bias", "rest": "last.weight[:, 0:2]"}, hvp=hvp
    ),
    "gradients": lambda m, f, b, hvp: gradient_structure(
        m, f, b, batch_size=256, num_gradients=2, tests=False
    ),
    "gradients of samples": lambda m, f, b, hvp: gradient_structure(
        m, f, b, batch_size=1, num_gradients=4, tests=False
    ),
}


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


def live_tensors() -> int:
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


def resident_bytes() -> int:
    """What the process holds, after the C library has given back what is free."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth(kind: str, function: str, engine: str, repeats: int) -> tuple[int, int]:
    """Returns how many tensors and bytes more there are after so many measurements."""
    torch.manual_seed(0)
    module = MODULES[kind]()
    # Both batches may be the largest: what is kept of it is kept once a measurement.
    batches = [(torch.randn(SAMPLES, 2), torch.randn(SAMPLES, 1)) for _ in range(2)]
    for _ in range(2):
        FUNCTIONS[function](module, loss_fn, batches, engine)
    gc.collect()
    tensors, held = live_tensors(), resident_bytes()
    for _ in range(repeats):
        FUNCTIONS[function](module, loss_fn, batches, engine)
    gc.collect()
    return live_tensors() - tensors, resident_bytes() - held


QUICK = (
    [(kind, "spectrum", "auto") for kind in MODULES]
    + [("tanh", "spectrum", engine) for engine in ("recompute", "finite_difference")]
    + [("softmax", function, "auto") for function in ("blocks", "gradients of samples")]
)


@pytest.fixture(autouse=True)
def _only_what_is_new():
    """Spares gc the walk through all that the tests before have loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("kind", "function", "engine"), QUICK)
def test_nothing_stays_behind(kind, function, engine):
    tensors, held = growth(kind, function, engine, repeats=5)
    assert tensors <= 0
    assert held < 2.5 * ACTIVATION_BYTES  # half of what five measurements would leave at least


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "function", "engine"), list(itertools.product(MODULES, FUNCTIONS, ENGINES))
)
def test_memory_is_flat_over_two_hundred_measurements(kind, function, engine):
    if function.startswith("gradients") and engine != "auto":
        pytest.skip("gradients have no engine")
    if kind == "lstm" and engine == "linearize":
        pytest.skip("torch's forward derivative of an LSTM is not taken by the self-check")
    tensors, held = growth(kind, function, engine, repeats=200)
    assert tensors <= 0
    assert held < 16 * ACTIVATION_BYTES
