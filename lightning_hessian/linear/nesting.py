"""How derivatives are nested where custom functions meet torch's transforms."""

from __future__ import annotations

import torch
from torch._C._functorch import TransformType


def refuse_forward_over_forward(name: str) -> None:
    """Raise where forward mode is nested in forward mode, around a custom function of that name.

    While torch (2.13) computes the forward derivative of a custom function it turns forward mode
    off, on all levels: the outer level would take it for a constant, without a word.

    Raises:
        NotImplementedError: It is.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if sum(level.key() == TransformType.Jvp for level in stack) > 1:
        raise NotImplementedError(
            f"{name} has no forward derivative of a forward derivative. Take jacfwd(grad(f)), or "
            "reverse mode twice."
        )
