"""Options that travel together: how the loss is evaluated, and which protocol finds a spectrum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning_hessian.isolation.attention import AttentionForm
from lightning_hessian.probe.objective import Mode
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import (
    check_fields,
    function_of,
    instance_of,
    one_of,
    optional,
    whole_number,
)


@dataclass(frozen=True)
class LossOptions:
    """How the loss is evaluated on a probe batch.

    Attributes:
        mode: ``"eval"`` (dropout off, BatchNorm by its running statistics) or ``"train"`` (both
            on, with the same random draws at every evaluation of a batch).
        batch_weight: ``batch_weight(batch) -> float``, what the mean loss of that batch is a mean
            over, for example its number of unmasked tokens; None to tell it from the batch.
        attention: How `torch.nn.functional.scaled_dot_product_attention` is computed:
            ``"plain"`` by torch's MATH kernel, which holds [length, length] numbers for each head
            and derivative; ``"chunks"`` of queries, exact too, in memory that grows with the length
            and a little more time; ``"auto"`` in chunks where the graph of the plain one would not
            fit half of the memory that is free.

    Raises:
        ArgumentError: Another mode, or a weight that cannot be called.
    """

    mode: Mode = "eval"
    batch_weight: Callable[[Any], float] | None = None
    attention: AttentionForm = "auto"

    def __post_init__(self) -> None:
        weight = optional(function_of("batch", returns="float"))
        forms = one_of("auto", "plain", "chunks")
        modes = one_of("eval", "train")
        check_fields(self, {"mode": modes, "batch_weight": weight, "attention": forms})


@dataclass(frozen=True)
class PooledSLQ:
    """The papers' protocol: Ritz values of several Lanczos runs in one list.

    The K largest of the list are kept whether they have converged or not. Many are copies of one
    another, and power laws are fitted to all that are positive, so this is for comparison with the
    papers only. HPL uses it for ViT (C.1.5: 1000 new samples a run) and for language models (C.2.2:
    3 runs of 1000 steps), there on the last layer (E.2).

    Attributes:
        num_runs: Lanczos runs, each from a random start vector.
        num_steps: Steps of each; no more are made than there are parameters.

    Raises:
        ArgumentError: Fewer than one run or step.
    """

    num_runs: int = 3
    num_steps: int = 1000

    def __post_init__(self) -> None:
        steps = whole_number(least=1)
        check_fields(self, {"num_runs": whole_number(least=1, most=1000), "num_steps": steps})


SpectrumProtocol: TypeAlias = Literal["converged"] | PooledSLQ
"""``"converged"``: eigenvalues with residual bounds; or the papers' protocol."""


def spectrum_protocol(name: str, value: Any) -> SpectrumProtocol:
    """Apply the rule of ``protocol``."""
    if isinstance(value, PooledSLQ) or (isinstance(value, str) and value == "converged"):
        return value  # type: ignore[return-value]
    raise ArgumentError(name, value, "Give 'converged', or PooledSLQ(num_runs, num_steps).")


loss_options = instance_of(
    LossOptions,
    "Give LossOptions(mode=..., batch_weight=..., attention=...), or None.",
    LossOptions(),
)
"""The rule of ``loss_options``."""
