"""Too little memory is recognised on every device, and nothing else is taken for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from lightning_hessian.linear.memory import is_out_of_memory


def test_what_the_cpu_allocator_raises_is_too_little_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    wrapped = ValueError("the engine failed")
    wrapped.__cause__ = caught.value
    assert is_out_of_memory(wrapped)


def test_what_other_allocators_raise_is_too_little_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())


def test_other_errors_are_not():
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(caught.value)
    assert not is_out_of_memory(None)
    assert not is_out_of_memory(KeyError("out of memory"))


# A measurement in little memory -------------------------------------------------------------------


WIDTH = 300_000
JOB = """
import json, resource, sys, warnings
import torch
from torch import nn
from lightning_hessian import gradient_structure, hessian_spectrum
from lightning_hessian.measure.budget import Budget
from lightning_hessian.results import MeasurementError

function, engine = sys.argv[1:3]
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(4, {width}), nn.Tanh(), nn.Linear({width}, 1))
batches = [(torch.randn(4, 4), torch.randn(4, 1))]

def loss_fn(module, batch):
    return nn.functional.mse_loss(module(batch[0]), batch[1])

def measure(module=module, batches=batches):
    if function == "gradients":
        found = gradient_structure(
            module, loss_fn, batches, num_gradients=4, batch_size=1, tests=False
        )
        return "gradients", float(found.covariance[0])
    found = hessian_spectrum(
        module, loss_fn, batches, num_eigenvalues=1, trace_probes=0, hvp=engine,
        budget=Budget(products=4),
    )
    return found.engine, float(found.eigenvalues[0])

small = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
measure(small, [(torch.randn(4, 4), torch.randn(4, 1))])  # loads what is loaded late
reference = measure()
used = int(open("/proc/self/statm").read().split()[0]) * 4096
seen = []
for megabytes in (10, 20, 40, 60, 90, 120, 160, 240, 480):
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, -1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            outcome = measure()
        except MeasurementError as error:
            outcome = ("error", str(error))
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    seen.append([*outcome, [str(each.message) for each in told]])
print(json.dumps({{"reference": reference, "seen": seen}}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds the address space")
@pytest.mark.parametrize(
    ("function", "engine"),
    [("spectrum", "auto"), ("spectrum", "autograd"), ("gradients", "auto")],
)
def test_too_little_memory_is_called_that_and_makes_no_result_inexact(function, engine):
    """In a process whose address space is bounded, from too little for anything to plenty."""
    done = subprocess.run(
        [sys.executable, "-c", JOB.format(width=WIDTH), function, engine],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    outcomes = [made for made, *_ in found["seen"]]
    assert "error" in outcomes
    assert outcomes[-1] != "error"
    for made, value, told in found["seen"]:
        if made == "error":
            assert "out of memory" in value
            assert "smaller batches" in value
        else:
            assert made != "finite_difference"
            assert value == pytest.approx(found["reference"][1], rel=1e-4)
        assert not any("inite difference" in message for message in told)
