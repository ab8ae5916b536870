"""`GradientStructureCallback`: the structure of a run's stochastic gradients, live."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_hessian.callbacks.arguments import CALLBACK_RULES
from lightning_hessian.callbacks.measurement import MeasurementCallback
from lightning_hessian.callbacks.probe_data import num_samples
from lightning_hessian.callbacks.schedule import Schedule
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.gradients import GradientsInstrument
from lightning_hessian.measure.session import Session
from lightning_hessian.operators.engines import gradient_of
from lightning_hessian.probe.loss import LossFunction, resolve_loss
from lightning_hessian.probe.objective import Mode
from lightning_hessian.probe.parameters import ParameterSelection
from lightning_hessian.results import ArgumentError, GradientStructure
from lightning_hessian.results.arguments import checked
from lightning_hessian.tracking.drawings import gradient_drawings
from lightning_hessian.tracking.panels import Drawings
from lightning_hessian.tracking.scalars import GRADIENT_CORRELATED
from lightning_hessian.tracking.spectra import encode_spectrum


class GradientStructureCallback(MeasurementCallback):
    """Measures spectra and tests of the stochastic gradients at validations, and logs them.

    Logged in the row of the validation metrics, all under ``gradient/``. Of the covariance's top
    eigenvalues: ``d_ks``, ``d_c``, ``power_law``, ``p_value``, ``beta_hat``, ``beta_sigma``,
    ``s_hat``, ``lambda_1``, ``trace``, ``num_outliers``, ``eigengap_d_ks``, ``eigengap_s_hat``,
    ``num_eigenvalues``, ``num_fitted``. Of the gradients' entries: ``power_law_rate`` and
    ``dimension_gaussian_rate`` over dimensions, ``gaussian_rate`` and
    ``iteration_power_law_rate`` over iterations. Besides: ``mean_gradient_norm``, ``loss`` (the
    mean loss on the probe), ``num_gradients``, ``seconds``; ``noise_scale`` at batch size 1 with
    ``noise_scale_std_error``, and the ``critical_batch_size`` that it suggests. From four
    measurements on also ``correlation/pearson_gradient_<statistic>_<monitor>`` with its interval,
    Spearman's r, the r of first differences and the number of points, and
    ``correlation/gradient_num_points``. Figures are ``figures/gradient_<name>``, spectra
    ``spectra/gradient``.
    A statistic that cannot be computed is absent, and a warning says why.

    Training is not touched: the weights of a run with and without the callback are the same bits.
    Under DDP the ranks share the mini-batches and the memory, and what is found does not depend on
    their number.

    Args:
        num_gradients: T, how many mini-batch gradients are taken at a measurement.
        batch_size: B, samples of each; by default the loader's batches are taken as they come
            where there are T of them, and else T of the same size drawn from their samples.
        num_eigenvalues: K, how many of the largest eigenvalues are fitted; well below T, since
            the end of a sampled spectrum falls off.
        monitor: As in `HessianSpectrumCallback`.
        every_n_validations: As in `HessianSpectrumCallback`.
        data: Where gradients are taken, as in `HessianSpectrumCallback`.
        num_batches: How many batches of the loader are drawn and kept on the device; where they
            are fewer than T, mini-batches are drawn from their samples in shuffled passes.
        loss_fn: As in `HessianSpectrumCallback`.
        parameters: As in `HessianSpectrumCallback`.
        tests: Whether to test the entries of the gradients too, which takes 4 T n bytes.
        max_tested: Test at most so many gradients and so many parameters, drawn at random; None
            for all.
        clip_norm: Scale gradients of a larger norm down to it.
        preconditioner: ``"adam"``, or None; see `gradient_structure`.
        momentum: Of SGD, 0 for none; see `gradient_structure`.
        time_budget: Share of the training time (``0.05``), a `Budget` of seconds, or None; as in
            `HessianSpectrumCallback`.
        mode: ``"eval"`` (dropout off, BatchNorm by its running statistics) or ``"train"``.
        memory_budget: Bytes that gradients may take on each rank, by default half of what is
            free; above it they lie in a file.
        directory: Where that file lies.
        significance: Level of all tests.
        figures: As in `HessianSpectrumCallback`.
        progress: Whether a measurement longer than a second shows a bar beside Lightning's.
        on_error: ``"warn"`` and train on, or ``"raise"``, when a measurement fails.
        seed: Of everything random here.

    Raises:
        ValueError: Arguments that are wrong by themselves; in ``fit``, before training, those
            that do not fit the module.

    Attributes:
        last_structure: The `GradientStructure` of the last measurement, None before the first.

    Example:
        >>> callback = GradientStructureCallback(num_gradients=100, monitor="val_loss")
        >>> callback.history
        []
    """

    prefix = "gradient"
    correlated = GRADIENT_CORRELATED
    correlation_prefix = "gradient_"
    work = ("gradients", "num_gradients")

    @checked(CALLBACK_RULES)
    def __init__(
        self,
        *,
        num_gradients: int = 200,
        batch_size: int | None = None,
        num_eigenvalues: int = 50,
        monitor: str | Sequence[str] = ("val_loss", "gap"),
        every_n_validations: int | Schedule = 1,
        data: str | Iterable[Any] = "train",
        num_batches: int = 200,
        loss_fn: LossFunction | None = None,
        parameters: ParameterSelection = None,
        tests: bool = True,
        max_tested: int | None = 10_000,
        clip_norm: float | None = None,
        preconditioner: str | None = None,
        momentum: float = 0.0,
        time_budget: float | Budget | None = None,
        mode: Mode = "eval",
        memory_budget: float | None = None,
        directory: str | Path | None = None,
        significance: float = 0.05,
        figures: int | None = 10,
        progress: bool = True,
        on_error: str = "warn",
        seed: int = 0,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(
            monitor=monitor,
            every_n_validations=every_n_validations,
            data=data,
            num_batches=num_batches,
            time_budget=time_budget,
            on_error=on_error,
            seed=seed,
            figures=figures,
            progress=progress,
            instruments=[
                GradientsInstrument(
                    num_gradients=num_gradients,
                    batch_size=batch_size,
                    num_eigenvalues=num_eigenvalues,
                    parameters=parameters,
                    tests=tests,
                    max_tested=max_tested,
                    clip_norm=clip_norm,
                    preconditioner=preconditioner,
                    momentum=momentum,
                    mode=mode,
                    significance=significance,
                    memory_budget=memory_budget,
                    directory=directory,
                )
            ],
        )
        self._arguments = arguments
        self.num_gradients = num_gradients
        self.batch_size = batch_size
        self.num_eigenvalues = num_eigenvalues
        self.loss_fn = loss_fn
        self.parameters = parameters
        self.significance = significance

    @property
    def last_structure(self) -> GradientStructure | None:
        """The gradient structure of the last measurement, None before the first."""
        return getattr(self.records.get("gradients"), "structure", None)

    def check(self, pl_module: Any) -> None:
        """Raise ValueError where the arguments do not fit the module; called before training."""
        super().check(pl_module)
        resolve_loss(pl_module, self.loss_fn)

    def check_data(self, trainer: Any) -> None:
        """Raise ArgumentError where all probe batches together are smaller than a mini-batch."""
        known = num_samples(trainer, self.data, self.num_batches)
        if self.batch_size is not None and known is not None and self.batch_size > known:
            raise ArgumentError(
                "batch_size",
                self.batch_size,
                f"The probe data hold {known} samples (num_batches={self.num_batches}). Lower "
                "batch_size, raise num_batches or bring more data.",
            )

    def session(self, pl_module: Any, batches: Sequence[Any]) -> Session:
        """Return the session of the measurement."""
        return Session(
            pl_module,
            self.loss_fn,
            batches,
            parameters=self.parameters,
            process_group=self._ranks.group,
            known=self._known,
            seed=self.seed,
        )

    def expected_seconds(self, session: Session, work: float) -> float:
        """Return what so many gradients will take, by the shorter of two of a probe batch."""
        taken = []
        for _ in range(2):
            begun = time.monotonic()
            gradient_of(session.objective, 0)
            taken.append(time.monotonic() - begun)
        return work * min(taken)

    def expected_work(self) -> int:
        """Return how many gradients a measurement takes."""
        return self.num_gradients

    def spectrum_code(self) -> str | None:
        """Return the covariance's eigenvalues as a text for the history."""
        found = self.last_structure
        return None if found is None else encode_spectrum(found.leading)

    def drawings(self) -> Drawings:
        """Return what draws the figures of the last measurement, by name."""
        if self.last_structure is None:
            return {}
        return gradient_drawings(self.last_structure, significance=self.significance)
