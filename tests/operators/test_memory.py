"""Too little memory is recognised on every device, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch

from lightning_hessian.operators.memory import is_out_of_memory


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
