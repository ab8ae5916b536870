"""Options that travel together: how the loss is evaluated, and which protocol finds a spectrum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from lightning_hessian.isolation.attention import AttentionForm
from lightning_hessian.operators.gauss_newton import ENGINES
from lightning_hessian.probe.loss import LossFunction
from lightning_hessian.probe.loss_split import marked_loss
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
        outputs_and_loss: ``outputs_and_loss(module, batch) -> (outputs, loss_of_outputs)``, which
            says where the network ends and its loss begins, for ``matrix="gauss_newton"`` where
            that cannot be seen: tensors (or tuples, lists or dicts of them) that hold all that the
            loss takes from the network, and a function of these that returns the mean loss. It
            stands in the place of ``loss_fn``, which is then None.

    Raises:
        ArgumentError: Another mode, or a function that cannot be called so.

    Example:
        A batch of sequences counts by its tokens that are not padding:

        >>> def tokens(batch):
        ...     return float((batch["labels"] != -100).sum())
        >>> options = LossOptions(mode="train", batch_weight=tokens)
        >>> options.mode, options.attention
        ('train', 'auto')
    """

    mode: Mode = "eval"
    batch_weight: Callable[[Any], float] | None = None
    attention: AttentionForm = "auto"
    outputs_and_loss: Callable[[Any, Any], tuple[Any, Callable[[Any], Tensor]]] | None = None

    def __post_init__(self) -> None:
        weight = optional(function_of("batch", returns="float"))
        split = optional(function_of("module", "batch", returns="(outputs, loss_of_outputs)"))
        rules = {
            "mode": one_of("eval", "train"),
            "batch_weight": weight,
            "attention": one_of("auto", "plain", "chunks"),
            "outputs_and_loss": split,
        }
        check_fields(self, rules)


Matrix: TypeAlias = Literal["hessian", "gauss_newton"]
"""Which matrix is measured: H, or J^T H_L J."""

MATRICES: tuple[str, str] = get_args(Matrix)


def check_matrix(matrix: str, hvp: str) -> None:
    """Raise ArgumentError where the engine makes no products with the matrix."""
    if matrix == "gauss_newton" and hvp not in ("auto", *ENGINES):
        choice = ", ".join(map(repr, ("auto", *ENGINES)))
        raise ArgumentError("hvp", hvp, f"With matrix='gauss_newton', choose from {choice}.")


def chosen_loss(loss_fn: LossFunction | None, options: LossOptions | None) -> LossFunction | None:
    """Return the loss function, also of a criterion; that of ``outputs_and_loss`` where given."""
    split = None if options is None else options.outputs_and_loss
    if split is None and loss_fn is not None:
        from lightning_hessian.probe.criterion import loss_or_criterion  # at the first measurement

        checked: LossFunction = loss_or_criterion("loss_fn", loss_fn)
        return checked
    if split is None:
        return None
    if loss_fn is not None:
        raise ArgumentError(
            "loss_fn",
            loss_fn,
            "LossOptions(outputs_and_loss=...) is the loss already. Give loss_fn=None beside it.",
        )
    return marked_loss(split)


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

    Example:
        >>> PooledSLQ(num_runs=2, num_steps=100)
        PooledSLQ(num_runs=2, num_steps=100)
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
