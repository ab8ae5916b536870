"""`HessianSpectrumCallback`: the Hessian spectrum of a run, live beside its loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_hessian.callbacks.arguments import CALLBACK_RULES
from lightning_hessian.callbacks.measurement import MeasurementCallback
from lightning_hessian.callbacks.schedule import Schedule
from lightning_hessian.callbacks.surroundings import training_in
from lightning_hessian.measure.arguments import SPECTRUM_RULES
from lightning_hessian.measure.blocks import BlocksInstrument
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.instrument import Instrument
from lightning_hessian.measure.layers import Layers, LayersInstrument
from lightning_hessian.measure.options import (
    LossOptions,
    Matrix,
    SpectrumProtocol,
    check_matrix,
    chosen_loss,
)
from lightning_hessian.measure.session import Session
from lightning_hessian.measure.spectrum import SpectrumInstrument
from lightning_hessian.measure.stability import StabilityInstrument
from lightning_hessian.probe.loss import LossFunction, resolve_loss
from lightning_hessian.probe.parameters import ParameterSelection, ParameterSpace
from lightning_hessian.probe.partition import Blocks
from lightning_hessian.results import BlockStructure, HessianSpectrum
from lightning_hessian.results.arguments import checked
from lightning_hessian.solvers.storage import ANYWHERE, BasisStorage
from lightning_hessian.tracking.drawings import hessian_drawings
from lightning_hessian.tracking.panels import Drawings
from lightning_hessian.tracking.scalars import CORRELATED
from lightning_hessian.tracking.spectra import encode_spectrum
from lightning_hessian.tracking.stability_figures import StabilityCurve


class HessianSpectrumCallback(MeasurementCallback):
    """Measures the top of the Hessian spectrum and its block structure at validations, and logs.

    Logged in the row of the validation metrics, all under ``hessian/``: ``d_ks``, ``d_c``,
    ``power_law``, ``p_value``, ``beta_hat``, ``beta_sigma``, ``s_hat``, ``lambda_1``,
    ``lambda_min`` (if found), ``trace``, ``trace_std_error``, ``eigengap_d_ks``,
    ``eigengap_s_hat``, ``num_eigenvalues``, ``num_converged``, ``num_fitted``, ``num_hvps``,
    ``seconds``, ``gauss_newton`` (1, where that is the matrix),
    ``loss`` (the mean loss on the probe), ``gap`` (with the correlations, since the
    validation loss is known only then), and of the blocks ``block_off_diagonal_ratio``,
    ``block_off_diagonal_ratio_std_error``, ``block_off_diagonal_share``,
    ``block_heterogeneity``, where two layers are cut ``block_share_ww``, ``block_share_wv``,
    ``block_share_vv``, and where neurons or classes are, the off-diagonal ratios
    ``block_ratio_ww`` of the hidden neurons and ``block_ratio_vv`` of the classes (HBS, theorems
    1 and 2). Under ``stability/`` stands how close the optimizer is to its threshold, at the
    validations between whole measurements too; see `StabilityInstrument`. From four
    measurements on also, under ``correlation/``, ``pearson_<statistic>_<monitor>``, its
    interval ``pearson_low_...`` and ``pearson_high_...``, ``spearman_...``, ``differences_...`` (r
    of first differences) and ``num_points``, the number of measurements behind them; pairs with
    fewer have ``num_points_...`` of their own. A statistic that cannot be computed is absent, and
    a warning says why. Figures are ``figures/hessian_<name>``, spectra ``spectra/hessian``.

    Training is not touched: the weights of a run with and without the callback are the same bits.

    Args:
        num_eigenvalues: K, how many of the largest eigenvalues are found and fitted; by default
            50, or 1000 under `PooledSLQ`.
        monitor: The metric, or metrics, to correlate the statistics with. ``"gap"`` is the
            generalization gap, with ``data="train"``: the validation loss minus the loss on the
            probe. That loss is the first of the metrics here with "loss" in its name, else
            ``val_loss``. A metric that is logged as ``gap`` goes before it.
        every_n_validations: Measure at every n-th validation, or a schedule object; one with
            ``during_validate=True`` measures in ``trainer.validate()`` too.
        data: What H is evaluated on: ``"train"``, ``"val"`` (the first loader), a DataLoader, or
            a list of batches. Training samples are drawn apart from training's own order.
        num_batches: How many probe batches; drawn once and kept.
        loss_fn: ``loss_fn(module, batch) -> mean loss``; else the module's ``hessian_loss(batch)``;
            else its ``training_step`` with logging muted.
        parameters: Which parameters: ``None`` (all that require grad), a glob or a list of globs,
            a regex, or a predicate ``(name, parameter) -> bool``.
        layers: Named groups of parameters, each with a spectrum of its own, logged as
            ``layers/<statistic>_<name>``: a mapping from names to globs, regexes or predicates, or
            ``"layer"`` for every module; see `layer_spectra`.
        blocks: Partition for the block ratios: ``None``, ``"layer"``, ``"neuron"``, ``"head"``,
            ``"class"``, or as in `block_structure`. The ratio of B blocks takes a seventh of the
            products, or the least that it can do with, about B + 24; their heterogeneity, at least
            10 B more, comes with ``instruments=[BlocksInstrument(densities=True)]``.
        tol: An eigenpair has converged at residual norm <= tol * abs(its Ritz value).
        time_budget: Share of the training time that all measurements may take. One is whole or not
            begun: the last validation is always measured, the first where the run pays for both.
            Or a `Budget` that bounds each in products or seconds, the spectrum first; None
            measures whenever the schedule says so.
        hvp: ``"auto"``, ``"linearize"``, ``"linearize_onednn"``, ``"autograd"``, ``"recompute"``,
            ``"compile"`` or ``"finite_difference"``; see `HessianOperator`.
        matrix: ``"hessian"``, or ``"gauss_newton"`` for the curvature of the loss seen through the
            network; see `hessian_spectrum`. The logged names stay, and ``hessian/gauss_newton`` is
            1 in each row. Losses that are not torch's own need
            ``LossOptions(outputs_and_loss=...)``.
        protocol: ``"converged"``, or a `PooledSLQ`, the papers' procedure; see it for what its
            numbers are worth.
        basis: How much memory the Krylov basis may take, where, and in which precision.
        loss_options: How the loss is evaluated: train or evaluation mode, what a batch weighs,
            where the network ends.
        significance: Level of the Kolmogorov-Smirnov test.
        figures: Figures are drawn at the first measurement, at every so many after it, and of the
            last when training ends, and the spectrum of each is logged; None for neither, and in a
            run without logger for no files at all.
        progress: Whether a measurement longer than a second shows a bar beside Lightning's.
        on_error: ``"warn"`` and train on, or ``"raise"``, when a measurement fails.
        seed: Of everything random here.
        instruments: More to measure in the same session; one with the name of a built-in
            (``"spectrum"``, ``"layers"``, ``"blocks"``, ``"stability"``) takes its place, so that
            ``SpectrumInstrument(density=True, trace_probes=64)`` sets what has no argument here;
            ``num_eigenvalues`` and ``parameters`` are those above where it names none. Layers
            are measured like it, without a density.

    Raises:
        ValueError: Arguments that are wrong by themselves; in ``fit``, before training, those
            that do not fit the module.

    Attributes:
        last_spectrum: The `HessianSpectrum` of the last measurement, None before the first.
        last_blocks: The `BlockStructure` of the last measurement, None where there is none.
        last_layers: The spectra of the last measurement's layers, by name.

    Example:
        >>> callback = HessianSpectrumCallback(num_eigenvalues=20, monitor="val_loss")
        >>> callback.history
        []
    """

    prefix = "hessian"
    correlated = CORRELATED
    records_updates = True

    @checked(CALLBACK_RULES | {"num_eigenvalues": SPECTRUM_RULES["num_eigenvalues"]})
    def __init__(
        self,
        *,
        num_eigenvalues: int | None = None,
        monitor: str | Sequence[str] = ("val_loss", "gap"),
        every_n_validations: int | Schedule = 1,
        data: str | Iterable[Any] = "train",
        num_batches: int = 4,
        loss_fn: LossFunction | None = None,
        parameters: ParameterSelection = None,
        layers: Layers | None = None,
        blocks: Blocks | None = "layer",
        tol: float = 1e-3,
        time_budget: float | Budget | None = 0.2,
        hvp: str = "auto",
        matrix: Matrix = "hessian",
        protocol: SpectrumProtocol = "converged",
        basis: BasisStorage = ANYWHERE,
        loss_options: LossOptions | None = None,
        significance: float = 0.05,
        figures: int | None = 10,
        progress: bool = True,
        on_error: str = "warn",
        seed: int = 0,
        instruments: Sequence[Instrument] = (),
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_matrix(matrix, hvp)
        chosen_loss(loss_fn, loss_options)
        spectrum = SpectrumInstrument(
            num_eigenvalues=num_eigenvalues,
            parameters=parameters,
            protocol=protocol,
            tol=tol,
            basis=basis,
            significance=significance,
        )
        given = {one.name: _completed(one, num_eigenvalues, parameters) for one in instruments}
        if isinstance(given.get("spectrum"), SpectrumInstrument):
            spectrum = given["spectrum"]
        built_in: list[Instrument] = [spectrum]
        if layers is not None:
            each = replace(spectrum, density=False, checkpoint=None, return_eigenvectors=False)
            built_in.append(LayersInstrument(layers, each))
        if blocks is not None:
            built_in.append(BlocksInstrument(blocks, parameters))
        built_in.append(StabilityInstrument(parameters))
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
            instruments=list({**{one.name: one for one in built_in}, **given}.values()),
        )
        if isinstance(self.instruments[0], SpectrumInstrument):
            spectrum.check_budget(self.time_budget)
        self._arguments = arguments
        self._stability = StabilityCurve()
        self.num_eigenvalues = spectrum.count
        self.loss_fn = loss_fn
        self.parameters = parameters
        self.hvp = hvp
        self.matrix = matrix
        self.loss_options = loss_options
        self.significance = significance

    @property
    def last_spectrum(self) -> HessianSpectrum | None:
        """The spectrum of the last measurement, None before the first."""
        return getattr(self.records.get("spectrum"), "spectrum", None)

    @property
    def last_blocks(self) -> BlockStructure | None:
        """The block structure of the last measurement, None where there is none."""
        return getattr(self.records.get("blocks"), "structure", None)

    @property
    def last_layers(self) -> dict[str, HessianSpectrum]:
        """The spectra of the last measurement's layers, by name."""
        return getattr(self.records.get("layers"), "spectra", {})

    def check(self, pl_module: Any) -> None:
        """Raise ValueError where the arguments do not fit the module; called before training."""
        super().check(pl_module)
        resolve_loss(pl_module, chosen_loss(self.loss_fn, self.loss_options))

    def session(self, pl_module: Any, batches: Sequence[Any]) -> Session:
        """Return the session that all instruments of a measurement share."""
        return Session(
            pl_module,
            self.loss_fn,
            batches,
            parameters=self._selected(pl_module),
            hvp=self.hvp,
            matrix=self.matrix,
            loss_options=self.loss_options,
            process_group=self._ranks.group,
            expected_products=self.expected_work(),
            known=self._known,
            seed=self.seed,
            training=training_in(pl_module.trainer, self._update.parts),
        )

    def _selected(self, pl_module: Any) -> ParameterSelection:
        """Return what selects the parameters of all instruments; views share one operator."""
        if self.parameters is None:
            return None
        selections = [self.parameters]
        for one in self.instruments:
            if isinstance(one, LayersInstrument):
                selections.append(one.selected(pl_module))
            else:
                selections.append(getattr(one, "parameters", None) or self.parameters)
        names = {
            name for each in selections for name in ParameterSpace.select(pl_module, each).names
        }
        return lambda name, parameter: name in names

    def expected_work(self) -> int:
        """Return about how many products the first measurement takes."""
        work = sum(getattr(one, "expected_products", 0) for one in self.instruments[:1])
        blocks = next((one for one in self.instruments if isinstance(one, BlocksInstrument)), None)
        return work if blocks is None else round((1 + blocks.share) * work)

    def spectrum_code(self) -> str | None:
        """Return the last spectrum as a text for the history."""
        found = self.last_spectrum
        if found is None:
            return None
        return encode_spectrum(found.eigenvalues, found.residuals, found.converged)

    def drawings(self) -> Drawings:
        """Return what draws the figures of the last measurement, by name."""
        if self.last_spectrum is None:
            return {}
        density = self.last_spectrum.density
        return hessian_drawings(
            self.last_spectrum,
            self.last_blocks,
            self._panels.spectra,
            densities=None if density is None else {"Hessian": density},
            layers=self.last_layers,
            significance=self.significance,
            stability=self._stability.points,
        )

    def note(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take in what was measured at a step for the figure of stability."""
        self._stability.add(step, scalars)


def _completed(given: Any, num_eigenvalues: int | None, parameters: ParameterSelection) -> Any:
    """Return a user's instrument with K and the parameters of the callback where it names none."""
    if isinstance(given, SpectrumInstrument) and given.num_eigenvalues is None:
        given = replace(given, num_eigenvalues=num_eigenvalues)
    own = (SpectrumInstrument, BlocksInstrument, StabilityInstrument)
    if isinstance(given, own) and given.parameters is None:
        given = replace(given, parameters=parameters)
    return given
