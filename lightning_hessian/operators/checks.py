"""Whether a product is one with the Hessian: what each kind of batch must pass before it is used.

A second derivative can be wrong without an error: torch's own double backward of an operation, a
custom function whose backward autograd does not see into, a linearisation that keeps a draw. So on
every batch whose structure differs, products are held against one another: by symmetry
(u.Hv = v.Hu), against a second computation, and against differences of gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_hessian.linear.operator import check_finite
from lightning_hessian.linear.shards import Shard
from lightning_hessian.operators.costs import Cost, counted
from lightning_hessian.operators.engines import (
    TRACED,
    Product,
    Restricted,
    autograd,
    finite_difference,
    gradient_of,
    live_entries,
    recompute,
)
from lightning_hessian.operators.kinks import MOST_APART, recompute_alike
from lightning_hessian.operators.loss_graph import LossGraph
from lightning_hessian.probe.objective import Objective
from lightning_hessian.results import MeasurementError, NoSecondDerivativeError

_DIFFERENCE_TOLERANCE = 0.01
"""Relative error at which finite differences are refused."""

_ASYMMETRY_OF_DIFFERENCES = 0.05
"""Asymmetry at which they are: kinks cost up to a few times the error that is tolerated."""

_HIDDEN = {torch.float64: 1e-3}
_HIDDEN_TOLERANCE = 0.05
"""Relative difference from finite differences at which a derivative is found out to be wrong, in
float64 and in coarser precision: well above what differences are in error by themselves."""

_AGREEMENT, _AGREEMENT_AT_KINKS = 0.2, 0.04
"""To what share of that two steps must agree, and a difference be symmetric, to be believed."""

_ROUNDING = 10.0
"""How many times the effect of rounding the parameters an asymmetry must have to be none of it."""

_KNOWN = {"WeightNormInterfaceBackward0": "weight_norm"}
"""Operations of torch whose double backward is wrong: that of weight_norm on the CPU (2.13)."""

_LEAVING = {
    Tensor.detach, Tensor.detach_, torch.detach, vars(torch._C.TensorBase)["data"].__get__,
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__float__, Tensor.__int__, Tensor.__bool__,
}  # fmt: skip
"""Functions whose result depends on a tensor, and does not say so to autograd."""

_CHUNK = 2**22
_INSTEAD = (
    "Replace it for measuring, through loss_fn(module, batch) or `hessian_loss`, or use "
    "hvp='finite_difference'."
)


class Checks:
    """The checks of an objective's products.

    They take, on the first batch of each structure, two products of the engine, one of a graph
    built anew, and one difference of gradients (a second one where the loss has kinks): about ten
    gradients of one batch, where a measurement takes hundreds of all. More is computed only where
    these arouse suspicion.

    Args:
        objective: The loss.
        shard: Which entries of a vector this rank holds.
        graphs: Of the loss of each batch.

    Attributes:
        vectors: Two random vectors [n_local]; products with both are compared.
        to_check: The batches to check: the first of each structure, and all that run through a
            custom function, which may take another path on any batch.
    """

    def __init__(self, objective: Objective, shard: Shard, graphs: list[LossGraph]) -> None:
        self._objective, self._shard, self._graphs = objective, shard, graphs
        self._known: dict[Product, Tensor] = {}  # what was counted: products with the second vector
        space = objective.space
        drawn = torch.randn(2, space.size, generator=torch.Generator().manual_seed(0))
        first, second = shard.take(drawn).to(space.device, space.dtype)
        self.vectors: tuple[Tensor, Tensor] = (first, second)
        seen: set[str] = set()
        self.to_check: list[int] = []
        for index, graph in enumerate(graphs):
            new = graph.structure not in seen or bool(graph.custom_functions)
            if objective.anywhere(new):  # where all ranks make a product together, all check it
                self.to_check.append(index)
            seen.add(graph.structure)

    def precision(self, index: int) -> torch.dtype:
        """Return the coarsest precision in which a part of the loss of a batch is computed."""
        own = self._graphs[index].coarsest
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if self._objective.anywhere(own == dtype):
                return dtype
        return own

    def structure(self, index: int) -> str:
        """Return the digest of what the loss of a batch does."""
        return self._graphs[index].structure

    def skips_rows(self, index: int) -> bool:
        """Return whether some row of a parameter moves the loss of a batch and gets no gradient."""
        return self._objective.anywhere(self._graphs[index].skips_rows)

    def cost(self, product: Product) -> Cost:
        """Return what a product with the second vector costs; the product is kept for the check."""
        tangents = self._objective.space.split(self.vectors[1])
        found, cost = counted(lambda: product(tangents))
        self._known[product] = self._objective.space.flatten(found)
        return cost

    def check(
        self,
        products: Sequence[Product],
        engines: Sequence[str],
        graphs: Mapping[int, Product] | None = None,
    ) -> float:
        """Return the largest relative difference of the products from a second way to them.

        Args:
            products: By batch.
            engines: Those that have made them.
            graphs: Products of some batches by a retained graph, as far as there are any: the
                second way of these.

        Raises:
            NoSecondDerivativeError: The second derivative itself is wrong, whatever the engine.
            MeasurementError: The engine is wrong, or cannot serve here.
        """
        if "finite_difference" in engines:
            return self._check_differences(products)
        others = {i: recompute(self._objective, i) for i in self.to_check} | dict(graphs or {})
        errors = [self._check(i, engines[i], products[i], others[i]) for i in self.to_check]
        self._known.clear()
        return max(errors, default=0.0)

    def _check(self, index: int, engine: str, product: Product, other: Product) -> float:
        """Check one batch by an engine with second derivatives."""
        with_first = self._apply(product, self.vectors[0])
        with_second = self._with_second(product)
        check_finite(with_second, self._norm(with_second), "A product with the Hessian")
        asymmetry = self._asymmetry(with_first, with_second)
        error = 0.0
        if engine != "recompute":
            again = self._with_second(other)
            error = self._apart(with_second, again)
            allowed = torch.finfo(self.precision(index)).eps ** 0.5
            if not error <= allowed and self._may_be_kinks(index, engine, error):
                alike = recompute_alike(self._objective, index)
                error = self._apart(with_second, self._with_second(alike))
            if not error <= allowed:
                raise MeasurementError(
                    f"hvp={engine!r} differs from a second computation of the same product by "
                    f"{error:.1e} (relative). {self._why_apart(index)}"
                )
        self._check_symmetry(index, with_second, asymmetry)
        self._check_against_differences(index, with_second)
        return error

    def _may_be_kinks(self, index: int, engine: str, error: float) -> bool:
        """Return whether activations beside a kink can be what sets two products apart."""
        return engine in TRACED and error <= MOST_APART and self._graphs[index].has_kinks

    # Differences ----------------------------------------------------------------------------------

    def _check_differences(self, products: Sequence[Product]) -> float:
        """Check that differences are linear and symmetric: their mean, one batch may be rough."""
        # Products are linear in v, but the step is not. At half the step and twice the vector the
        # two errors would cancel, so the vector is split into two others.
        first, second = self.vectors
        half = second.clone()
        half[len(half) // 2 :] = 0
        with_first, with_second, with_half, with_rest = (
            self._mean(products, vector) for vector in (first, second, half, second - half)
        )
        check_finite(with_second, self._norm(with_second), "A product with the Hessian")
        error = self._apart(with_second, with_half + with_rest)
        asymmetry = self._asymmetry(with_first, with_second)
        if not error <= _DIFFERENCE_TOLERANCE:
            raise MeasurementError(
                "hvp='finite_difference' differs from a second computation of the same product by "
                f"{error:.1e} (relative). The loss is too rough for finite differences."
            )
        if not asymmetry <= _ASYMMETRY_OF_DIFFERENCES:
            raise MeasurementError(
                f"Differences of gradients are no symmetric matrix (by {asymmetry:.1e}, relative): "
                "what backward gives is not the gradient of the loss. A part of the loss may be "
                "detached from the parameters, or a custom backward may change gradients. Use "
                "hvp='autograd', which holds constant what is detached, or give the loss through "
                "loss_fn(module, batch)."
            )
        return error

    def _check_against_differences(self, index: int, found: Tensor) -> None:
        """Compare with finite differences, where these can be believed.

        Kinks (of rectifiers, of pooling) add curvature that a difference sees and no derivative,
        and of a batch of a million activations it comes out alike at both steps but for noise. So
        where the loss has kinks, the two must agree as they do without them.
        """
        graph, vector = self._graphs[index], self.vectors[1]
        tolerance = _HIDDEN.get(self.precision(index), _HIDDEN_TOLERANCE)
        coarse = self._apply(self._difference(index), vector)
        if self._apart(found, coarse) <= tolerance:
            return
        kinks = self._objective.anywhere(graph.has_kinks and not graph.custom_functions)
        agreement = (_AGREEMENT_AT_KINKS if kinks else _AGREEMENT) * tolerance
        fine = self._apply(self._difference(index, 4.0), vector)
        if not self._apart(coarse, fine) <= agreement:
            return
        # The witness must be symmetric itself, and not move what gets no gradient: nor what the
        # loss holds constant (a detached target), which autograd does not move.
        live = live_entries(self._objective, index)
        difference = self._difference(index, 4.0, live)
        with_first, with_second = (self._apply(difference, v) for v in self.vectors)
        symmetric = self._asymmetry(with_first, with_second) <= _AGREEMENT * tolerance
        apart = self._apart(found, with_second)
        constant = not graph.custom_functions and self._holds_constant(index)
        if symmetric and not apart <= tolerance and not self._objective.anywhere(constant):
            raise NoSecondDerivativeError(self._hidden(graph, found - with_second, apart))

    def _difference(
        self, index: int, shrink: float = 1.0, live: list[Tensor] | None = None
    ) -> Product:
        eps = torch.finfo(self.precision(index)).eps
        product = finite_difference(self._objective, index, shrink=shrink, eps=eps)
        return product if live is None else Restricted(product, live)

    def _holds_constant(self, index: int) -> bool:
        """Return whether the loss of a batch takes values out of the reach of autograd."""
        leaves = tuple(value.requires_grad_() for value in self._objective.point())
        with _Detached() as detached:
            self._objective.batch_loss(leaves, index)
        result: bool = detached.found
        return result

    def _hidden(self, graph: LossGraph, error: Tensor, apart: float) -> str:
        custom = ", ".join(graph.custom_functions)
        known = _known(graph)
        if known:
            what = f"{known}'s double backward is wrong"
        elif custom:
            what = (
                f"{custom} has no double backward: a part of the second derivative is hidden from "
                "autograd"
            )
        else:
            what = "The double backward of an operation of the loss is wrong"
        parts = self._objective.space.split(error)
        sizes = [self._objective.norm([part]) for part in parts]
        where = self._objective.space.names[sizes.index(max(sizes))]
        return (
            f"{what} (products differ from finite differences of gradients by {apart:.1e}, "
            f"relative, most in {where!r}). {_INSTEAD}"
        )

    # Symmetry -------------------------------------------------------------------------------------

    def _check_symmetry(self, index: int, found: Tensor, asymmetry: float) -> None:
        """Check that u.Hv = v.Hu, to what rounding explains."""
        eps = torch.finfo(self.precision(index)).eps
        if asymmetry <= eps**0.5:
            return
        # Near zero loss derivatives cancel, and rounding is all that is left of some. How much a
        # product owes to it shows when the parameters are rounded in another way.
        signs = self._objective.space.split(self.vectors[0].sign())
        point = self._objective.point()
        moved = tuple(v + eps * v * sign for v, sign in zip(point, signs, strict=True))
        again = self._apply(autograd(self._objective, index, at=moved), self.vectors[1])
        if asymmetry <= _ROUNDING * self._apart(again, found):
            return
        graph = self._graphs[index]
        suspects = _known(graph) or ", ".join(graph.custom_functions)
        what = f"{suspects}'s double" if suspects else "Some operation's double"
        raise NoSecondDerivativeError(
            f"{what} backward is wrong (products with the Hessian are not symmetric, by "
            f"{asymmetry:.1e}, relative). {_INSTEAD}"
        )

    def _asymmetry(self, with_first: Tensor, with_second: Tensor) -> float:
        """Return abs(u.Hv - v.Hu) over the larger of the norms of Hu and Hv."""
        first, second = self.vectors
        scale = max(self._norm(with_first), self._norm(with_second))
        difference = self._dot(first, with_second) - self._dot(second, with_first)
        return abs(difference) / scale if scale != 0 else 0.0

    # What an engine does otherwise ----------------------------------------------------------------

    def _why_apart(self, index: int) -> str:
        """Return why a product differs from a graph built anew, and what to do."""
        with _Draws() as draws, torch.no_grad():
            self._objective.batch_loss(self._objective.point(), index)
        if draws.names:
            return (
                f"The loss draws random numbers ({', '.join(sorted(draws.names))}; dropout in "
                "mode='train'?), and each product draws others; use hvp='autograd'."
            )
        space = self._objective.space
        once, again = (
            space.flatten([part.detach() for part in gradient_of(self._objective, index)])
            for _ in range(2)
        )
        if not torch.equal(once, again):
            return (
                f"Two evaluations of the gradient differ by {self._apart(once, again):.1e}: the "
                "loss draws from a generator of its own, counts its calls, or its operations are "
                "not deterministic. Make it a function of the batch, or use hvp='autograd'."
            )
        return (
            "Nothing random is drawn (two gradients are equal to the bit): an operation of the "
            "loss is differentiated otherwise in forward mode. Use hvp='autograd'."
        )

    def _mean(self, products: Sequence[Product], vector: Tensor) -> Tensor:
        """Return the weighted sum of the products of the batches to check."""
        total = torch.zeros_like(vector)
        for index in self.to_check:
            found = self._apply(products[index], vector)
            total.add_(found, alpha=self._objective.weights[index])
        return total

    def _apply(self, product: Product, vector: Tensor) -> Tensor:
        space = self._objective.space
        return space.flatten(product(space.split(vector)))

    def _with_second(self, product: Product) -> Tensor:
        """Return the product with the second vector, which may have been made to count it."""
        known = self._known.get(product)
        return self._apply(product, self.vectors[1]) if known is None else known

    def _apart(self, found: Tensor, reference: Tensor) -> float:
        """Return the norm of the difference, relative to the reference where that is not zero."""
        scale = self._norm(reference)
        return self._norm(found - reference) / scale if scale > 0 else self._norm(found)

    def _norm(self, vector: Tensor) -> float:
        self._shard.ranks.stay_together()
        return float(self._shard.norm(vector))

    def _dot(self, first: Tensor, second: Tensor) -> float:
        """Return the scalar product, summed in float64: its rounding would pass for asymmetry."""
        self._shard.ranks.stay_together()
        precise = torch.float32 if first.device.type == "mps" else torch.float64
        total = first.new_zeros((), dtype=precise)
        for a, b in zip(first.split(_CHUNK), second.split(_CHUNK), strict=True):
            total += a.to(precise) @ b.to(precise)
        return float(self._shard.ranks.all_reduce(total))


def _known(graph: LossGraph) -> str:
    return ", ".join(name for node, name in _KNOWN.items() if node in graph.operations)


class _Detached(TorchFunctionMode):
    """A block that notes whether a value that depends on a parameter is used as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run a function, and note if it leaves the graph."""
        if not self.found and (func in _LEAVING or not torch.is_grad_enabled()):
            given = (t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor))
            # The module's own parameters are not what the loss is evaluated at.
            self.found = any(t.requires_grad and not isinstance(t, nn.Parameter) for t in given)
        return func(*args, **(kwargs or {}))


class _Draws(TorchDispatchMode):
    """A block that notes which operations draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run an operation, and note it if it draws."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))
