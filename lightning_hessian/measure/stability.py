"""Curvature as the optimizer meets it: sharpness against its threshold, and the last update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.linear.preconditioned import PreconditionedOperator
from lightning_hessian.measure.arguments import RULES
from lightning_hessian.measure.instrument import Absent, Scalars
from lightning_hessian.measure.leading import Leading, kept, turn_bound
from lightning_hessian.measure.session import Session
from lightning_hessian.measure.stepping import Stepping, stepping_of, vector_of
from lightning_hessian.probe.parameters import ParameterSelection, ParameterSpace
from lightning_hessian.results.arguments import check_fields
from lightning_hessian.solvers.krylov import RitzPairs
from lightning_hessian.solvers.leading import LEAST_PRODUCTS, leading_pair

_COLD = 3  # times as many products where there is nothing to start from
_LEAST_COLD = 12  # products; after 8 a GPT's second eigenvalue had converged before its first
_OF_GRADIENT = 0.03  # of the length of a start vector
_NORMS = (
    "There is no sharpness under the optimizer: BatchNorm is measured with its running statistics, "
    "and a bias before it, which training never feels, would seem unstable under a preconditioner "
    'of nearly zero. Give loss_options=LossOptions(mode="train").'
)


@dataclass
class _Memory:
    """What one measurement leaves for the next: where to start from, and what to compare with."""

    plain: Tensor | None = None  # leading vector of the Hessian, on the CPU
    stepped: Tensor | None = None  # that under the preconditioner
    leading: Leading | None = None  # the span last found

    def held(self, names: tuple[str, ...], length: int) -> tuple[int, ...] | None:
        """Return how many vectors of each kind there are, for ranks to compare.

        None where they are of other parameters, or of other shards.
        """
        spans = self.leading is None or self.leading.names == names
        vectors = [one for one in (self.plain, self.stepped) if one is not None]
        if not (spans and all(len(one) == length for one in vectors)):
            return None
        counts = (self.plain is not None, self.stepped is not None)
        return (*map(int, counts), 0 if self.leading is None else len(self.leading.vectors))


@dataclass(frozen=True)
class StabilityInstrument:
    """Whether a run is stable at its step size, by a few products with the Hessian.

    It needs ``Session(training=Training(optimizers, update))``, which the callback gives in
    ``fit``; without an optimizer there are no numbers. Logged under ``stability/``:

    - ``lambda_1``, ``lambda_1_residual``: the largest eigenvalue of the Hessian of the mean loss,
      and the bound of its residual norm.
    - ``sharpness``, ``sharpness_residual``: the largest eigenvalue of P^-1/2 (H + W) P^-1/2, P the
      optimizer's preconditioner by its own state and W its coupled weight decay; see
      `Preconditioner`, and `register_preconditioner` for optimizers that are not torch's.
    - ``threshold``: where the optimizer's steps on a quadratic of that curvature begin to diverge;
      2 / lr for SGD. With several learning rates that of most parameters, and the sharpness is
      scaled so that the ratio is right; see `Stepping`.
    - ``ratio``: sharpness over threshold. Above 1 a quadratic diverges.
    - ``update_curvature``: u^T H u / u^T u of the last update u.
    - ``predicted_change``: g^T u + u^T H u / 2, what the loss on the probe would change by, were
      the last update made once more from here, to second order; ``actual_change``: what it does
      change by. The parameters stay as they are.
    - ``gradient_share``, ``update_share``: shares of norm(g)^2 and norm(u)^2 in the span of the
      leading eigenvectors last found; ``num_leading``: how many these are, ten of a whole spectrum
      or as many as fit into 1 GiB.
    - ``drift``, ``drift_bound``: by how many degrees that span has turned since it was found the
      time before (largest principal angle), and by how many at most, by Davis and Kahan (HPL
      eq. 7; see `turn_bound`). Where a spectrum is measured, in its row only.
    - ``num_hvps``: products that this took; ``loss``: the mean loss on the probe.

    Where BatchNorm is measured by its running statistics, under an optimizer that scales each
    entry, there is no sharpness, threshold and ratio: training does not feel a bias before it, so
    that its preconditioner is nearly zero, but the measured loss does. What the optimizer meets is
    measured with ``LossOptions(mode="train")``.

    The leading vectors are those of a whole spectrum of the session where there is one; else
    Lanczos starts from those last found. It ends at a residual of ``tol`` times the value, or after
    so many products; a residual that is larger is logged as it is, and told. A value so found is
    a lower bound of the largest eigenvalue, within its residual of some eigenvalue.

    Attributes:
        parameters: Which parameters; None for all of the session.
        tol: At which residual, as a share of the value, an eigenvalue is good enough.
        max_products: How many products a measurement takes at most where it starts from vectors of
            the one before. Where it starts from none, or beside a whole spectrum, it may take
            three times as many, and the bound of the drift one for each vector.

    Example:
        The callback has one already; this takes more products for a tighter residual:

        >>> from lightning_hessian import HessianSpectrumCallback
        >>> tighter = StabilityInstrument(tol=0.01, max_products=30)
        >>> callback = HessianSpectrumCallback(instruments=[tighter])

    Sources: Cohen et al. 2021 (ICLR) and 2022 (arXiv 2207.14484); Gur-Ari, Roberts, Dyer, "Gradient
    descent happens in a tiny subspace" (arXiv 1812.04754) for the shares.
    """

    parameters: ParameterSelection = None
    tol: float = 0.05
    max_products: int = 10
    name: str = field(default="stability", init=False)
    prefix: str = field(default="stability", init=False)
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        public = [one.name for one in fields(self) if one.init]
        check_fields(self, {name: RULES[name] for name in public})

    def check(self, model: nn.Module) -> None:
        """Raise where the selection matches nothing; forget what another fit has left."""
        ParameterSpace.select(model, self.parameters)
        self._forget()

    def cost(self, session: Session) -> int:
        """Return how many products the next measurement takes at most, by what it starts from."""
        if not _trains(session):
            return 0
        most = self._most(beside=session.leading is not None)
        span = self._memory.leading
        # Beside a whole spectrum the bound of the drift takes a product for each vector before.
        return most + (len(span.vectors) if span is not None and len(span.vectors) > 1 else 0)

    def cost_between(self, session: Session) -> int:
        """Return how many products one takes at most that starts where another has ended."""
        return self.max_products if _trains(session) else 0

    def measure(self, session: Session, allowance: Allowance | None) -> Scalars | Absent:
        """Return the numbers of the session's Hessian, whatever its own matrix is."""
        if not _trains(session):
            return Absent(())
        return _Measurement(self, session, allowance or UNBOUNDED).made()

    def _most(self, *, beside: bool) -> int:
        """Return the bound on products but those of the drift, beside a whole spectrum or not."""
        cold = beside or self._memory.plain is None
        return self.max_products * (_COLD if cold else 1)

    def _forget(self) -> None:
        self._memory.plain = self._memory.stepped = self._memory.leading = None


def _trains(session: Session) -> bool:
    """Return whether anything steps the module of a session."""
    return session.training is not None and bool(session.training.optimizers)


def _norms_differ(session: Session) -> bool:
    """Return whether norms use other statistics in the session than in training.

    Those whose weights are not trained count as frozen in evaluation mode, in training too.
    """
    options = session.loss_options
    if options is not None and options.mode == "train":
        return False
    norms = (one for one in session.model.modules() if isinstance(one, _NormBase))
    return any(
        one.track_running_stats and all(part.requires_grad for part in one.parameters())
        for one in norms
    )


class _Measurement:
    """One measurement of a `StabilityInstrument`: its parts, and what they have found."""

    def __init__(self, of: StabilityInstrument, session: Session, allowance: Allowance) -> None:
        self.of, self.session, self.allowance = of, session, allowance
        self.memory = of._memory
        self.values: dict[str, float] = {}
        self.missing: list[str] = []
        self.names = ParameterSpace.select(session.model, of.parameters).names
        self.hessian: Any = session.operator(matrix="hessian")
        self.begun = self.hessian.num_products
        self.mask: Tensor | None = None
        if self.names != session.space.names:
            ones = {n: torch.ones(s) for n, s in self._held() if n in self.names}
            self.mask = vector_of(session, ones, self.names)

    def made(self) -> Scalars | Absent:
        """Return what can be found with the products that there are."""
        session = self.session
        assert session.training is not None
        last = self._agreed(session.training.update)
        found = session.leading
        if found is not None and found.names != self.names:
            found = None
        self.bound = self.of._most(beside=found is not None)
        if self.allowance.products_left is not None:
            self.bound = min(self.bound, self.allowance.products_left)
        gradient = session.gradient()
        if self.mask is not None:
            gradient *= self.mask
        update = self._update(last, gradient)
        stepping = stepping_of(session, session.training.optimizers, self.names)
        if not isinstance(stepping, str) and not stepping.is_plain and _norms_differ(session):
            stepping = _NORMS
        if isinstance(stepping, str):
            self.missing.append(stepping)
        self._sharpness(found, None if isinstance(stepping, str) else stepping, gradient)
        self._subspace(found, gradient, update)
        for name in [key for key, value in self.values.items() if not math.isfinite(value)]:
            del self.values[name]  # a step beyond what the precision holds
            self.missing.append(f"stability/{name} is not finite.")
        self.values["num_hvps"] = self._spent()
        if len(self.values) == 1:
            return Absent(tuple(self.missing))
        self.values["loss"] = session.loss  # there already, and drawn beneath the ratio
        return Scalars(self.values, tuple(self.missing))

    def _agreed(self, update: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """Return the update where all ranks have one; forget what not all of them remember.

        A failure on one rank alone (its memory ran out as the parameters were copied, or at the end
        of a measurement) would else leave ranks that take different numbers of products.
        """
        ranks = self.session.ranks
        ranks.stay_together()
        held = self.memory.held(self.names, self.session.shard.length)
        everywhere = ranks.all_gather_object((held, update is not None))
        if held is None or any(other != held for other, _ in everywhere):
            self.of._forget()
        return update if all(there for _, there in everywhere) else None

    # The update ----------------------------------------------------------------------------------

    def _update(self, given: Mapping[str, Tensor] | None, gradient: Tensor) -> Tensor | None:
        """Find what the last update meets, by one product; return it."""
        if given is None or self._left() < 1:
            return None
        session, shard = self.session, self.session.shard
        update = vector_of(session, given, self.names)
        squared = float(shard.norm(update)) ** 2
        if not squared > 0:
            self.missing.append("The last update has moved no parameter, so it has no curvature.")
            return None
        curved = float(shard.dot(update, self.hessian.matvec(update)))
        self.values["update_curvature"] = curved / squared
        self.values["predicted_change"] = float(shard.dot(gradient, update)) + curved / 2
        self.values["actual_change"] = session.loss_at(update) - session.loss
        return update

    # Eigenvalues ---------------------------------------------------------------------------------

    def _sharpness(
        self, found: Leading | None, stepping: Stepping | None, gradient: Tensor
    ) -> None:
        """Find the leading eigenvalues of the Hessian, plain and under the preconditioner."""
        if stepping is None or stepping.is_plain:
            plain = self._plain(found, gradient)
            if stepping is not None and plain is not None:
                assert isinstance(stepping.shift, float)
                value, residual = plain
                self._say_ratio(stepping, value + stepping.shift, residual)
            return
        reserved = 0 if found is not None else max(LEAST_PRODUCTS, self._left() // 3)
        operator = stepping.operator(self.hessian)
        near = self.memory.stepped
        if found is not None:  # the same whatever was found between whole spectra
            near = found.under(operator) if operator.sign > 0 else None
        pair = self._pair(operator, near, operator.through(gradient), "sharpness", reserved)
        if pair is not None:
            scale = stepping.threshold
            self.memory.stepped = kept(pair.vectors[:1], 1, operator)[0]
            value, residual = float(pair.values[0]), float(pair.residuals[0])
            self._say_ratio(stepping, value * scale, residual * scale)
        self._plain(found, gradient)

    def _plain(self, found: Leading | None, gradient: Tensor) -> tuple[float, float] | None:
        """Find lambda_1, where no spectrum has; return it with its residual bound."""
        if found is not None:
            value, residual = found.values[0], found.residuals[0]
            self.memory.plain = found.vectors[0]
        else:
            operator: SymmetricOperator = self.hessian
            if self.mask is not None:
                operator = PreconditionedOperator(operator, self.mask)
            pair = self._pair(operator, self.memory.plain, gradient, "lambda_1")
            if pair is None:
                return None
            self.memory.plain = kept(pair.vectors[:1], 1, operator)[0]
            value, residual = float(pair.values[0]), float(pair.residuals[0])
        self.values["lambda_1"], self.values["lambda_1_residual"] = value, residual
        return value, residual

    def _start(self, near: Tensor | None, gradient: Tensor) -> Tensor:
        """Return where to start from: a vector that is near, with a little of the gradient.

        An eigenvector that has become the leading one since may be orthogonal to the one that
        was; the gradient is not, for it lies mostly among the leading ones.
        """
        if near is None:
            return gradient
        shard, near = self.session.shard, near.to(gradient)
        length, along = float(shard.norm(gradient)), float(shard.dot(near, gradient))
        if not length > 0:
            return near
        part = math.copysign(_OF_GRADIENT * float(shard.norm(near)) / length, along)
        return near + part * gradient

    def _pair(
        self,
        operator: SymmetricOperator,
        near: Tensor | None,
        gradient: Tensor,
        name: str,
        reserved: int = 0,
    ) -> RitzPairs | None:
        """Return the leading pair, where there are products for it besides those reserved.

        Where nothing is near, the gradient alone would miss an eigenvector that it is orthogonal
        to, as it is to all that the probe does not ask for.
        """
        most = self._left() - reserved
        if most < LEAST_PRODUCTS:
            self.missing.append(
                f"The budget leaves too few products for stability/{name}. Allow more."
            )
            return None
        pair = leading_pair(
            operator, self._start(near, gradient), tol=self.of.tol, max_products=most,
            noise=1.0 if near is None else 0.0, seed=self.session.seed, allowance=self.allowance,
            least=_LEAST_COLD if near is None else LEAST_PRODUCTS,
        )  # fmt: skip
        if not pair.converged[0]:
            self.missing.append(
                f"The residual of stability/{name} is above {self.of.tol:.0%} of it; raise "
                "StabilityInstrument(max_products=...)."
            )
        return pair

    def _say_ratio(self, stepping: Stepping, sharpness: float, residual: float) -> None:
        self.values["sharpness"], self.values["sharpness_residual"] = sharpness, residual
        self.values["threshold"] = stepping.threshold
        self.values["ratio"] = sharpness / stepping.threshold

    # The span ------------------------------------------------------------------------------------

    def _subspace(self, found: Leading | None, gradient: Tensor, update: Tensor | None) -> None:
        """Find what lies in the span of the leading eigenvectors, and how far it has turned."""
        before, shard = self.memory.leading, self.session.shard
        vector = self.memory.plain
        alone = before is None or len(before.vectors) == 1  # no whole spectrum was before
        if found is None and alone and "lambda_1" in self.values and vector is not None:
            residual = self.values["lambda_1_residual"]
            found = Leading(self.names, (self.values["lambda_1"],), (residual,), vector[None])
        if found is not None:
            if before is not None:
                self.values["drift"] = found.angle_to(before, shard)
                left = self.allowance.products_left
                if left is None or left >= len(before.vectors):
                    bound = turn_bound(before, found, self.hessian)
                    self.values.update({} if bound is None else {"drift_bound": bound})
            self.memory.leading = found
        span = self.memory.leading
        if span is None:
            return
        shares = {"gradient_share": gradient, "update_share": update}
        for name, one in shares.items():
            share = None if one is None else span.share_of(one, shard)
            if share is not None:
                self.values[name] = share
        self.values["num_leading"] = len(span.vectors)

    # Inside --------------------------------------------------------------------------------------

    def _spent(self) -> int:
        spent: int = self.hessian.num_products - self.begun
        return spent

    def _left(self) -> int:
        return self.bound - self._spent()

    def _held(self) -> list[tuple[str, torch.Size]]:
        space = self.session.space
        return list(zip(space.names, space.held_shapes, strict=True))
