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
from lightning_hessian.linear.operator import DifferenceOperator, SymmetricOperator, check_finite
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.linear.shards import Shard
from lightning_hessian.measure.leading import Leading
from lightning_hessian.measure.options import MATRICES, LossOptions, check_matrix, chosen_loss
from lightning_hessian.measure.training import Training
from lightning_hessian.operators.engines import gradient_of
from lightning_hessian.operators.gauss_newton import ENGINES as GAUSS_NEWTON_ENGINES
from lightning_hessian.operators.gauss_newton import gauss_newton_operator
from lightning_hessian.operators.sharded import hessian_operator
from lightning_hessian.probe.loss import LossFunction
from lightning_hessian.probe.objective import Objective
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

    The objective (the mean loss over the probe batches) and each operator are built once, at first
    use, and shared. Products must be taken inside the block, and the parameters must not
    change in it. Afterwards the module is as before: parameters, buffers, ``.grad``, random number
    generators, modes and global flags.

    Args:
        model: Any module; one under FSDP1 is made plain for the time of the block.
        loss_fn: ``loss_fn(model, batch) -> mean loss``; None as in `hessian_spectrum`.
        batches: Probe batches of any structure; read once and held.
        parameters: Which parameters the operator differentiates by.
        hvp: The engine of the products; see `HessianOperator`.
        matrix: What `operator` returns by default: ``"hessian"`` or ``"gauss_newton"``.
        loss_options: How the loss is evaluated.
        process_group: Processes that measure together; None for this one alone.
        expected_products: About how many products will be taken; the choice of the engine weighs
            it against the cost of building.
        known: What earlier sessions have learnt; filled in by this one.
        seed: Of everything random here.
        training: The optimizers that train the module and their last update, for what is measured
            of training itself; None where nothing trains.

    Attributes:
        model: The module, plain.
        space: The parameters.
        ranks: Who measures together.
        leading: The leading eigenvectors of the Hessian over all parameters, once an instrument
            has found them.

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
    matrix: str = "hessian"
    loss_options: LossOptions | None = None
    process_group: ProcessGroup | None = None
    expected_products: int = 200
    known: Knowledge = field(default_factory=Knowledge)
    seed: int = 0
    training: Training | None = None
    space: ParameterSpace = field(init=False)
    ranks: Ranks = field(init=False)
    leading: Leading | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._stack = ExitStack()
        check_matrix(self.matrix, self.hvp)
        self._loss_fn = chosen_loss(self.loss_fn, self.loss_options)
        self._operators: dict[str, Any] = {}
        self._gradient: Tensor | None = None
        self._views: dict[tuple[str, tuple[str, ...]], SymmetricOperator] = {}
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
            self._loss_fn,
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
        made = sum(operator.num_products for operator in self._operators.values())
        if made:
            self.known.seconds_a_product = (time.monotonic() - self._built) / made
        self._gradient = self.leading = None
        self._operators.clear()
        self._views.clear()
        return self._stack.__exit__(*failure)  # type: ignore[arg-type]

    def operator(
        self, parameters: Sequence[str] | None = None, *, matrix: str | None = None
    ) -> Any:
        """Return an operator of the session, or its view on some parameter tensors.

        It is built at the first call; a view differentiates by its own parameters only, and shares
        the graphs that the operator keeps.

        Args:
            parameters: Names of parameter tensors; None for all of the session.
            matrix: ``"hessian"``, ``"gauss_newton"``, or ``"residual"``, the first minus the
                second: the part of the Hessian that comes from the curvature of the network and
                vanishes where the residuals do (a product costs one with each). None for that of
                the session.

        Raises:
            ValueError: There is no such matrix.
            MeasurementError: The loss cannot be differentiated twice, or split; says why.
        """
        kind = matrix or self.matrix
        names = self.space.names if parameters is None else tuple(parameters)
        if kind == "residual":
            first, second = (self.operator(names, matrix=one) for one in MATRICES)
            return DifferenceOperator(first, second, kind)
        if kind not in MATRICES:
            raise ValueError(f"matrix={kind!r} is none of 'hessian', 'gauss_newton', 'residual'.")
        if kind not in self._operators:
            self._operators[kind] = self._build(kind)
        if names == self.space.names:
            return self._operators[kind]
        if (kind, names) not in self._views:
            self._views[kind, names] = self._operators[kind].restricted(names)
        return self._views[kind, names]

    def _build(self, kind: str) -> Any:
        """Return the operator of a matrix, made while the allowance has time; note what it took."""
        begun = time.monotonic()
        allowance, usual = self._allowance, self.objective.is_late
        self.objective.is_late = lambda: allowance.is_late  # only while it is made ready
        try:
            operator = self._made(kind)
        finally:
            self.objective.is_late = usual
        operator.on_product = lambda products: self._allowance.spend(products)
        if not self._operators:
            self.known.engine = operator.engine
            self._built = time.monotonic()
            taken = self._built - begun
            self.known.seconds_to_build = (self.known.seconds_to_build or 0.0) + taken
        return operator

    def _made(self, kind: str) -> Any:
        """Return the operator of a matrix over all parameters of the session."""
        _ = self.loss  # a loss that is NaN is told as that, before anything is differentiated
        if kind == "hessian":
            return hessian_operator(
                self.objective,
                self.hvp,
                expected_products=self.expected_products,
                untraceable=self.known.untraceable,
            )
        given = self.loss_options is not None and self.loss_options.outputs_and_loss is not None
        engine = self.hvp if self.hvp in GAUSS_NEWTON_ENGINES else "auto"
        return gauss_newton_operator(self.objective, engine, marked=given)

    def spend_from(self, allowance: Allowance) -> None:
        """Let products of this session's operator count against an allowance."""
        allowance.seconds_a_product = self.known.seconds_a_product
        self._allowance = allowance
