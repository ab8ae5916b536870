"""One module at its present parameters and one set of probe batches: built once, used by all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.operator import SymmetricOperator, check_finite
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.linear.shards import Shard
from lightning_hessian.measure.options import LossOptions
from lightning_hessian.operators.engines import gradient_of
from lightning_hessian.operators.sharded import hessian_operator
from lightning_hessian.probe.objective import LossFunction, Objective
from lightning_hessian.probe.parameters import ParameterSelection, ParameterSpace
from lightning_hessian.probe.sharding.fsdp1 import whole
from lightning_hessian.probe.sharding.objective import objective_over, ranks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Knowledge:
    """What measurements have learnt about a module, for those that follow.

    It informs estimates of cost and spares trials; no number of a record depends on it.
    """

    seconds_a_product: float | None = None  # on average over the last session
    seconds_to_build: float | None = None  # objective and operator
    engine: str | None = None  # that the operator came to
    untraceable: set[str] = field(default_factory=set)  # losses that cannot be linearised


@dataclass(eq=False, repr=False)
class Session:
    """A block in which a module is isolated and can be measured by several instruments.

    The objective (the mean loss over the probe batches) and the Hessian operator are built once,
    at first use, and shared. Products must be taken inside the block, and the parameters must not
    change in it. Afterwards the module is as before: parameters, buffers, ``.grad``, random number
    generators, modes and global flags.

    Args:
        model: Any module; one under FSDP1 is made plain for the time of the block.
        loss_fn: ``loss_fn(model, batch) -> mean loss``; None as in `hessian_spectrum`.
        batches: Probe batches of any structure; read once and held.
        parameters: Which parameters the operator differentiates by.
        hvp: The engine of the products; see `HessianOperator`.
        loss_options: How the loss is evaluated.
        process_group: Processes that measure together; None for this one alone.
        expected_products: About how many products will be taken; the choice of the engine weighs
            it against the cost of building.
        known: What earlier sessions have learnt; filled in by this one.
        seed: Of everything random here.

    Attributes:
        model: The module, plain.
        space: The parameters.
        ranks: Who measures together.

    Example:
        >>> import torch
        >>> model, batches = nn.Linear(2, 1), [(torch.randn(8, 2), torch.randn(8, 1))]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> with Session(model, loss_fn, batches) as session:
        ...     session.operator().matvec(session.gradient()).shape
        torch.Size([3])
    """

    model: nn.Module
    loss_fn: LossFunction | None
    batches: Iterable[Any]
    _: KW_ONLY
    parameters: ParameterSelection = None
    hvp: str = "auto"
    loss_options: LossOptions | None = None
    process_group: ProcessGroup | None = None
    expected_products: int = 200
    known: Knowledge = field(default_factory=Knowledge)
    seed: int = 0
    space: ParameterSpace = field(init=False)
    ranks: Ranks = field(init=False)

    def __post_init__(self) -> None:
        self._stack = ExitStack()
        self._operator: Any = None
        self._gradient: Tensor | None = None
        self._views: dict[tuple[str, ...], SymmetricOperator] = {}
        self._allowance: Allowance = UNBOUNDED
        self._built = 0.0

    def __enter__(self) -> Session:
        """Make the module plain, and learn who measures; what costs time is made when asked for."""
        with ExitStack() as stack:
            self.model = stack.enter_context(whole(self.model))
            self.space = ParameterSpace.select(self.model, self.parameters)
            device = self.space.device
            self.ranks = ranks_of(self.model, device) or Ranks.of(self.process_group, device)
            self._stack = stack.pop_all()
        return self

    @cached_property
    def objective(self) -> Objective:
        """The loss over the probe batches; from its making on the module is isolated."""
        begun = time.monotonic()
        options = self.loss_options or LossOptions()
        objective = objective_over(
            self.process_group,
            self.model,
            self.loss_fn,
            self.batches,
            self.space,
            batch_weight=options.batch_weight,
            mode=options.mode,
            attention=options.attention,
            seed=self.seed,
        )
        self._stack.enter_context(objective.isolated())
        self.known.seconds_to_build = time.monotonic() - begun
        return objective

    @cached_property
    def loss(self) -> float:
        """The mean loss over all probe samples."""
        return self.objective.value()

    @cached_property
    def shard(self) -> Shard:
        """Which entries of vectors [n] this rank holds: of gradients, and of what H multiplies."""
        if self.space.held is not None:
            return self.space.shard(self.ranks)
        return Shard.even(self.space.size, self.ranks)

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss at the present parameters, [n_local].

        It is computed at the first call. All ranks call it together.

        Raises:
            MeasurementError: The loss or the gradient is NaN or infinite.
        """
        if self._gradient is None:
            _ = self.loss  # a loss that is NaN is told as that
            space, objective = self.space, self.objective
            total = torch.zeros(
                space.shard(self.ranks).length, dtype=space.dtype, device=space.device
            )
            with self.ranks.together():
                for index, weight in enumerate(objective.weights):
                    total.add_(space.flatten(gradient_of(objective, index)), alpha=weight)
            if space.held is None and self.ranks.world > 1:
                # Each rank has the gradient of its own batches. Where parameters are in shards,
                # differentiating through their all-gather has summed over ranks already.
                total = self.shard.take(self.ranks.all_reduce(total)).clone()
            with self.ranks.together():
                check_finite(total, what="The gradient")
            self._gradient = total
        return self._gradient.clone()

    def loss_at(self, step: Tensor) -> float:
        """Return the mean loss where the parameters are moved by a step; they stay as they are.

        All ranks call it together.

        Args:
            step: What is added to the parameters, [n_local], in the layout of `gradient`.

        Raises:
            MeasurementError: The loss there is NaN or infinite.
        """
        whole = step if self.space.held is not None else self.shard.gather(step)
        parts = self.space.split(whole.to(self.space.device, self.space.dtype))
        point = self.objective.point()
        moved = [value + part for value, part in zip(point, parts, strict=True)]
        return self.objective.value(moved)

    def __exit__(self, *failure: object) -> bool | None:
        """Put everything back as it was, and remember what a product took."""
        if self._operator is not None and self._operator.num_products:
            spent = time.monotonic() - self._built
            self.known.seconds_a_product = spent / self._operator.num_products
        self._operator = self._gradient = None
        self._views.clear()
        return self._stack.__exit__(*failure)  # type: ignore[arg-type]

    def operator(self, parameters: Sequence[str] | None = None) -> Any:
        """Return the Hessian operator, or its view on some parameter tensors.

        It is built at the first call; a view differentiates by its own parameters only, and shares
        the graphs that the operator keeps.

        Args:
            parameters: Names of parameter tensors; None for all of the session.

        Raises:
            MeasurementError: The loss cannot be differentiated twice; says why.
        """
        if self._operator is None:
            begun = time.monotonic()
            self._operator = self._build()
            self._operator.on_product = lambda products: self._allowance.spend(products)
            self.known.engine = self._operator.engine
            self._built = time.monotonic()
            self.known.seconds_to_build = (self.known.seconds_to_build or 0.0) + self._built - begun
        if parameters is None or tuple(parameters) == self.space.names:
            return self._operator
        names = tuple(parameters)
        if names not in self._views:
            self._views[names] = self._operator.restricted(names)
        return self._views[names]

    def _build(self) -> Any:
        """Return the operator, made while the allowance has time; its products have all of it."""
        allowance, usual = self._allowance, self.objective.is_late
        self.objective.is_late = lambda: allowance.is_late
        try:
            _ = self.loss  # a loss that is NaN is told as that, before anything is differentiated
            return hessian_operator(
                self.objective,
                self.hvp,
                expected_products=self.expected_products,
                untraceable=self.known.untraceable,
            )
        finally:
            self.objective.is_late = usual

    def spend_from(self, allowance: Allowance) -> None:
        """Let products of this session's operator count against an allowance."""
        allowance.seconds_a_product = self.known.seconds_a_product
        self._allowance = allowance
