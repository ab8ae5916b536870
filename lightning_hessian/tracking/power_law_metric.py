"""A torchmetrics metric for those who compute spectra themselves and log them by ``self.log``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import (
    OTHERS,
    anything,
    checked,
    one_of,
    optional,
    significance_level,
    whole_number,
)
from lightning_hessian.statistics.power_law import fit_power_law
from lightning_hessian.tracking.scalars import STATISTICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PowerLawMetric(Metric):
    """A statistic of the power law fitted to values, as a metric.

    Values of several updates are pooled. Under DDP the values of all ranks are pooled too, except
    where every rank holds the very same ones (a spectrum that each computed for itself): these
    count once, since K equal copies would only seem to be more.

    Args:
        statistic: ``"d_ks"``, ``"d_c"``, ``"power_law"`` (0 or 1), ``"p_value"``, ``"beta_hat"``,
            ``"beta_sigma"`` or ``"s_hat"``.
        k: How many of the largest values to fit; by default all positive ones.
        significance: Level of the critical value.
        **arguments: Those of `torchmetrics.Metric`.

    Raises:
        ValueError: An unknown statistic, ``k`` below 2, or no level.

    Example:
        >>> metric = PowerLawMetric("s_hat")
        >>> metric.update(torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0, -0.5]))
        >>> round(metric.compute().item(), 4)  # twice the logarithm of 2
        1.3863
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    values: list[Tensor]

    @checked(
        {
            "statistic": one_of(*STATISTICS),
            "k": optional(
                whole_number(least=2, because="A power law needs at least 2 values."),
                "for all that are positive",
            ),
            "significance": significance_level,
            OTHERS: anything,
        }
    )
    def __init__(
        self,
        statistic: str = "s_hat",
        *,
        k: int | None = None,
        significance: float = 0.05,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.statistic = statistic
        self.k = k
        self.significance = significance
        self.set_dtype(torch.float64)  # of the empty state that a rank without values gathers
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add eigenvalues or other sizes, of any shape.

        Args:
            values: Real; those that are not positive are never fitted.
        """
        if not isinstance(values, Tensor) or values.is_complex() or values.dtype == torch.bool:
            raise ArgumentError("values", values, "Give a tensor of real numbers.")
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        self.values.append(values.detach().to(wide).flatten())

    def compute(self) -> Tensor:
        """Return the statistic, a scalar; NaN after a warning where no power law can be fitted."""
        try:
            fit = fit_power_law(
                self._pooled().cpu().numpy(), self.k, significance=self.significance
            )
        except ValueError as error:
            warnings.warn(f"{self.statistic} is NaN: {error}", stacklevel=2)
            return torch.full((), float("nan"), device=self.device)
        value = getattr(fit, STATISTICS[self.statistic])
        if value is None:
            warnings.warn(f"{self.statistic} is NaN: {fit.reason}", stacklevel=2)
            value = float("nan")
        return torch.tensor(float(value), device=self.device)

    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None
    ) -> tuple[Figure | None, Axes | Any]:
        """Draw the statistic, as every metric of torchmetrics does.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of it, drawn over its place;
                by default what ``compute`` returns now.
            ax: Where to draw; by default axes of a new pyplot figure.

        Returns:
            Figure and axes.

        Example:
            >>> metric = PowerLawMetric("s_hat")
            >>> metric.update(torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0]))
            >>> figure, axes = metric.plot()
        """
        return self._plot(val, ax)

    def _pooled(self) -> Tensor:
        """Return the values of all ranks, or of one where all have the same."""
        values = dim_zero_cat(self.values) if len(self.values) else torch.empty(0)
        if not self._is_synced:
            return values
        num_ranks = torch.distributed.get_world_size(self.process_group)
        if len(values) % num_ranks:
            return values
        ranks = values.view(num_ranks, -1)
        return ranks[0] if bool((ranks == ranks[0]).all()) else values
