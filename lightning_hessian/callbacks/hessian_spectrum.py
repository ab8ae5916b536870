"""`HessianSpectrumCallback`: the Hessian spectrum of a run, live beside its loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning_hessian.callbacks.arguments import CALLBACK_RULES
from lightning_hessian.callbacks.layers import layer_scalars
from lightning_hessian.callbacks.measurement import MeasurementCallback
from lightning_hessian.callbacks.schedule import Schedule
from lightning_hessian.measure.blocks import block_structure
from lightning_hessian.measure.layers import Layers, layer_groups
from lightning_hessian.measure.protocols import check_protocol
from lightning_hessian.measure.spectrum import check_selection, hessian_spectrum, split_bound
from lightning_hessian.probe.objective import LossFunction, Mode, resolve_loss
from lightning_hessian.probe.parameters import ParameterSelection
from lightning_hessian.probe.partition import Blocks, partition
from lightning_hessian.results import BlockStructure, HessianSpectrum
from lightning_hessian.results.arguments import checked, optional
from lightning_hessian.results.base import text_of
from lightning_hessian.solvers.block_norms import DENSE_ORDER, least_products
from lightning_hessian.solvers.storage import BasisStorage
from lightning_hessian.tracking.drawings import hessian_drawings
from lightning_hessian.tracking.panels import Drawings
from lightning_hessian.tracking.scalars import CORRELATED, block_scalars, spectrum_scalars
from lightning_hessian.tracking.spectra import encode_spectrum


class HessianSpectrumCallback(MeasurementCallback):
    """Measures the top of the Hessian spectrum and its block structure at validations, and logs.

    Logged in the row of the validation metrics, all under ``hessian/``: ``d_ks``, ``d_c``,
    ``power_law``, ``p_value``, ``beta_hat``, ``beta_sigma``, ``s_hat``, ``lambda_1``,
    ``lambda_min`` (if found), ``trace``, ``trace_std_error``, ``eigengap_d_ks``,
    ``eigengap_s_hat``, ``num_eigenvalues``, ``num_converged``, ``num_fitted``, ``num_hvps``,
    ``seconds``, ``loss`` (the mean loss on the probe), ``gap`` (with the correlations, since the
    validation loss is known only then), and of the blocks ``block_off_diagonal_ratio``,
    ``block_off_diagonal_ratio_std_error``, ``block_off_diagonal_share``,
    ``block_heterogeneity``, where two layers are cut ``block_share_ww``, ``block_share_wv``,
    ``block_share_vv``, and where neurons or classes are, the off-diagonal ratios
    ``block_ratio_ww`` of the hidden neurons and ``block_ratio_vv`` of the classes (HBS, theorems
    1 and 2). From four measurements on also, under ``correlation/``,
    ``pearson_<statistic>_<monitor>``, its interval ``pearson_low_...`` and ``pearson_high_...``,
    ``spearman_...``, ``differences_...`` (r of first differences), ``num_points_...`` and
    ``num_points``. A statistic that cannot be computed is absent, and a warning says why. Figures
    are ``figures/hessian_<name>``, spectra ``spectra/hessian``.

    Training is not touched: the weights of a run with and without the callback are the same bits.

    Args:
        num_eigenvalues: K, how many of the largest eigenvalues are found and fitted; by default
            50, or 1000 under ``"pooled_slq"``.
        monitor: The metric, or metrics, to correlate the statistics with. ``"gap"`` is the
            generalization gap, with ``data="train"``: the validation loss minus the loss on the
            probe. That loss is the first of the metrics here with "loss" in its name, else
            ``val_loss``. A metric that is logged as ``gap`` goes before it.
        every_n_validations: Measure at every n-th validation, or a schedule object.
        data: What H is evaluated on: ``"train"``, ``"val"`` (the first loader), a DataLoader, or
            a list of batches. Training samples are drawn apart from training's own order.
        num_batches: How many probe batches; drawn once and kept.
        loss_fn: ``loss_fn(module, batch) -> mean loss``; else the module's ``hessian_loss(batch)``;
            else its ``training_step`` with logging muted.
        parameters: Which parameters: ``None`` (all that require grad), a glob or a list of globs,
            a regex, or a predicate ``(name, parameter) -> bool``.
        layers: Named groups of parameters, each with a spectrum of its own, logged under
            ``hessian_<name>/``: a mapping from names to globs, regexes or predicates, or
            ``"layer"`` for every module; see `layer_spectra`.
        blocks: Partition for the block ratios: ``None``, ``"layer"``, ``"neuron"``, ``"head"``,
            ``"class"``, or as in `block_structure`. The ratio of B blocks takes about B + 24
            products, 2 B if that is more; the heterogeneity at least 10 B, and is left out where
            both together would take over one and a half times the products of the spectrum.
        tol: An eigenpair has converged at residual norm <= tol * abs(its Ritz value).
        max_hvps: Bound on Hessian-vector products of one measurement; the spectrum comes first.
        time_budget: Share of the training time (``0.05``), or seconds a measurement may take.
        hvp: ``"auto"``, ``"linearize"``, ``"autograd"``, ``"recompute"``, ``"compile"`` or
            ``"finite_difference"``; see `HessianOperator`.
        protocol: ``"converged"``, or ``"pooled_slq"``, the papers' procedure; see
            `hessian_spectrum` for what its numbers are worth.
        num_runs: Runs of ``"pooled_slq"``.
        num_steps: Steps of each.
        mode: ``"eval"`` (dropout off, BatchNorm by its running statistics) or ``"train"``.
        batch_weight: ``batch_weight(batch) -> float``, what the batch's loss is a mean over.
        trace_probes: Hutchinson probes for the trace; 0 for no trace.
        density: Whether to estimate the density of the whole spectrum too, by up to 320 products.
        basis_memory: Bytes that the Krylov basis may take; by default half of what is free.
        basis_storage: Where it may live: ``"auto"``, ``"device"``, ``"cpu"``, ``"disk"`` or
            ``"disk:FOLDER"``.
        basis_dtype: ``"bfloat16"`` halves it; see `BasisStorage` for what it costs.
        significance: Level of the Kolmogorov-Smirnov test.
        during_validate: Whether ``trainer.validate()`` measures too.
        figures: Figures are drawn at the first measurement, at every so many after it, and of the
            last when training ends, and the spectrum of each is logged; None for neither.
        progress: Whether a measurement longer than a second shows a bar beside Lightning's.
        on_error: ``"warn"`` and train on, or ``"raise"``, when a measurement fails.
        seed: Of everything random here.

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

    @checked({**CALLBACK_RULES, "num_eigenvalues": optional(CALLBACK_RULES["num_eigenvalues"])})
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
        max_hvps: int | None = None,
        time_budget: float | None = None,
        hvp: str = "auto",
        protocol: str = "converged",
        num_runs: int = 3,
        num_steps: int = 1000,
        mode: Mode = "eval",
        batch_weight: Callable[[Any], float] | None = None,
        trace_probes: int = 16,
        density: bool = False,
        basis_memory: float | None = None,
        basis_storage: str = "auto",
        basis_dtype: str | None = None,
        significance: float = 0.05,
        during_validate: bool = False,
        figures: int | None = 10,
        progress: bool = True,
        on_error: str = "warn",
        seed: int = 0,
    ) -> None:
        super().__init__(
            monitor=monitor,
            every_n_validations=every_n_validations,
            data=data,
            num_batches=num_batches,
            time_budget=time_budget,
            during_validate=during_validate,
            on_error=on_error,
            seed=seed,
            figures=figures,
            progress=progress,
        )
        num_eigenvalues = check_protocol(protocol, num_eigenvalues)
        BasisStorage(basis_memory, basis_storage, basis_dtype)
        least = 1 if protocol == "pooled_slq" else num_eigenvalues
        split_bound(least, max_hvps, trace_probes)
        self.num_eigenvalues = num_eigenvalues
        self.loss_fn = loss_fn
        self.parameters = parameters
        self.layers = layers
        self.blocks = blocks
        self.tol = tol
        self.max_hvps = max_hvps
        self.hvp = hvp
        self.mode = mode
        self.batch_weight = batch_weight
        self.trace_probes = trace_probes
        self.protocol = {"protocol": protocol, "num_runs": num_runs, "num_steps": num_steps}
        self.basis = {
            "basis_memory": basis_memory,
            "basis_storage": basis_storage,
            "basis_dtype": basis_dtype,
        }
        self.density = density
        self.significance = significance
        self.last_spectrum: HessianSpectrum | None = None
        self.last_blocks: BlockStructure | None = None
        self.last_layers: dict[str, HessianSpectrum] = {}

    def check(self, pl_module: Any) -> None:
        """Raises ValueError where the arguments do not fit the module; called before training."""
        pooled = self.protocol["protocol"] == "pooled_slq"
        check_selection(pl_module, self.parameters, 1 if pooled else self.num_eigenvalues)
        if self.layers is not None:
            layer_groups(pl_module, self.layers)
        if self.blocks is not None:
            partition(pl_module, self.blocks, self.parameters)
        resolve_loss(pl_module, self.loss_fn)

    def measure(
        self, pl_module: Any, batches: Sequence[Any], max_seconds: float | None
    ) -> tuple[dict[str, float], list[str]]:
        """Returns the statistics of spectrum and blocks, and reasons for what is absent."""
        started = time.monotonic()
        self.last_spectrum = hessian_spectrum(
            pl_module,
            self.loss_fn,
            batches,
            num_eigenvalues=self.num_eigenvalues,
            parameters=self.parameters,
            tol=self.tol,
            max_hvps=self.max_hvps,
            max_seconds=max_seconds,
            density=self.density,
            on_progress=self._progress,
            **self._options(),
        )
        scalars, absent = spectrum_scalars(self.last_spectrum, self.significance)
        spent = self.last_spectrum.num_hvps

        def left() -> float | None:
            if max_seconds is None:
                return None
            return max(0.0, self._ranks.least(max_seconds - (time.monotonic() - started)))

        self.last_layers = {}
        if self.layers is not None:
            self.last_layers, found, missing = layer_scalars(
                pl_module, self.loss_fn, batches, self.layers, self.significance,
                num_eigenvalues=self.num_eigenvalues, tol=self.tol,
                max_hvps=None if self.max_hvps is None else self.max_hvps - spent,
                max_seconds=left(), **self._options(),
            )  # fmt: skip
            scalars |= found
            absent += missing
            spent += sum(spectrum.num_hvps for spectrum in self.last_layers.values())
            scalars["num_hvps"] = spent
            scalars["seconds"] += sum(s.seconds for s in self.last_layers.values())
        self.last_blocks = None
        if self.blocks is not None:
            reason = self._measure_blocks(pl_module, batches, spent, left())
            absent += [reason] if reason else []
        if self.last_blocks is not None:
            scalars["num_hvps"] += self.last_blocks.num_hvps
            scalars["seconds"] += self.last_blocks.seconds
            scalars |= block_scalars(self.last_blocks, self.blocks)
        return scalars, absent

    def _options(self) -> dict[str, Any]:
        """Returns the arguments of `hessian_spectrum` that the whole and the layers share."""
        return {
            "hvp": self.hvp,
            "mode": self.mode,
            "batch_weight": self.batch_weight,
            "trace_probes": self.trace_probes,
            "process_group": self._ranks.group,
            "seed": self.seed,
            **self.protocol,
            **self.basis,
        }

    def expected_work(self) -> int:
        """Returns about how many products the first measurement takes."""
        spectrum = 3 * self.num_eigenvalues + self.trace_probes
        return spectrum if self.blocks is None else 2 * spectrum

    def spectrum_code(self) -> str | None:
        """Returns the last spectrum as a text for the history."""
        found = self.last_spectrum
        if found is None:
            return None
        return encode_spectrum(found.eigenvalues, found.residuals, found.converged)

    def drawings(self) -> Drawings:
        """Returns what draws the figures of the last measurement, by name."""
        if self.last_spectrum is None:
            return {}
        density = self.last_spectrum.density
        return hessian_drawings(
            self.last_spectrum,
            self.last_blocks,
            self._panels.spectra,
            densities=None if density is None else {"Hessian": density},
            significance=self.significance,
        )

    def _measure_blocks(
        self, pl_module: Any, batches: Sequence[Any], spent: int, max_seconds: float | None
    ) -> str | None:
        """Sets ``last_blocks``, or returns why there are none; what is so every time, once."""
        assert self.blocks is not None
        sizes = partition(pl_module, self.blocks, self.parameters).sizes
        least = least_products(sizes)
        # About as many as the spectrum took; all columns of a tiny network cost next to nothing.
        enough = max(3 * spent // 2, least, sum(sizes) if sum(sizes) <= DENSE_ORDER else 0)
        bound = enough if self.max_hvps is None else min(enough, self.max_hvps - spent)
        if len(sizes) < 2:
            self._warn_once(
                "one block",
                "There are no block statistics: blocks="
                f"{self.blocks!r} makes a single block, with nothing off the diagonal. Cut finer "
                "(blocks='neuron'), or give blocks=None.",
            )
            return None
        if bound < least:
            return (
                f"No block statistics: {len(sizes)} blocks take at least {least} products, and "
                f"the spectrum left {bound}. Raise max_hvps, or give blocks=None."
            )
        if max_seconds is not None and max_seconds <= 0:
            return "No block statistics: the spectrum took all the time. Allow more, or fewer K."
        started = time.monotonic()
        if self._progress is not None:
            self._progress.next_part("block structure")
        try:
            self.last_blocks = block_structure(
                pl_module,
                self.loss_fn,
                batches,
                blocks=self.blocks,
                parameters=self.parameters,
                densities=True,
                density_steps=20,
                density_probes=1,
                max_hvps=bound,
                max_seconds=max_seconds,
                hvp=self.hvp,
                mode=self.mode,
                batch_weight=self.batch_weight,
                process_group=self._ranks.group,
                on_progress=self._progress,
                seed=self.seed,
            )
        except RuntimeError as error:  # a MeasurementError, or out of memory: keep the spectrum
            late = max_seconds is not None and time.monotonic() - started >= max_seconds
            if self.on_error == "raise" and not late:
                raise
            return f"No block statistics: {text_of(error)}"
        if self.last_blocks.heterogeneity is None:
            self._warn_once(
                "heterogeneity",
                "block_heterogeneity is left out: the densities of "
                f"{len(sizes)} blocks take at least {10 * len(sizes)} products more than the bound "
                "allows. Raise max_hvps or num_eigenvalues, or cut fewer blocks.",
            )
        return None
