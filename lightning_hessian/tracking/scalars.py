"""What is logged of each record: scalars by their keys, and why a missing one is missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_hessian.results import (
    BlockStructure,
    Eigengaps,
    FloatArray,
    GradientStructure,
    HessianSpectrum,
    PowerLawFit,
)
from lightning_hessian.statistics.eigengaps import eigengaps
from lightning_hessian.statistics.power_law import fit_power_law
from lightning_hessian.statistics.subspace import num_outliers

CORRELATED = (
    "d_ks",
    "s_hat",
    "lambda_1",
    "trace",
    "eigengap_d_ks",
    "eigengap_s_hat",
    "block_off_diagonal_ratio",
    "stability/ratio",
    "stability/update_curvature",
    "stability/gradient_share",
)
"""The statistics of the Hessian whose correlation with the monitored metrics is tracked.

Those that are logged under another prefix than ``hessian/`` carry it.
"""

GRADIENT_CORRELATED = (
    "d_ks",
    "s_hat",
    "lambda_1",
    "trace",
    "num_outliers",
    "noise_scale",
    "power_law_rate",
    "gaussian_rate",
)
"""Those of gradients."""


STATISTICS = {
    "d_ks": "ks_distance",
    "d_c": "critical_value",
    "power_law": "is_power_law",
    "p_value": "p_value",
    "beta_hat": "exponent",
    "beta_sigma": "exponent_std_error",
    "s_hat": "slope",
}
"""The statistics of a power law: as they are logged, and as they are called in the record."""


def spectrum_scalars(
    spectrum: HessianSpectrum, significance: float = 0.05
) -> tuple[dict[str, float], list[str]]:
    """Return the statistics of a spectrum, and a sentence for each that could not be computed.

    The power laws are fitted to the leading converged eigenvalues: those before the first that
    has not converged or is not positive.

    Args:
        spectrum: What was measured.
        significance: Level of the Kolmogorov-Smirnov test.

    Returns:
        Name (without prefix) to value, and the reasons for what is absent.
    """
    scalars: dict[str, float] = {
        "num_eigenvalues": len(spectrum.eigenvalues),
        "num_converged": spectrum.num_converged,
        "num_hvps": spectrum.num_hvps,
        "seconds": spectrum.seconds,
        "loss": spectrum.loss,
    }
    if spectrum.matrix_kind == "gauss_newton":
        scalars["gauss_newton"] = 1.0  # the row itself says what it is of
    absent: list[str] = []
    if spectrum.converged[0]:
        scalars["lambda_1"] = float(spectrum.eigenvalues[0])
    else:
        absent.append("lambda_1 is left out: the largest eigenvalue has not converged.")
    if spectrum.lambda_min is not None:
        scalars["lambda_min"] = spectrum.lambda_min
    if spectrum.trace is not None and spectrum.trace_std_error is not None:
        scalars["trace"] = spectrum.trace
        scalars["trace_std_error"] = spectrum.trace_std_error
    leading = spectrum.leading
    scalars["num_fitted"] = len(leading)
    if len(leading) == 0:
        why = (
            "the largest eigenvalue is not positive (a maximum, or the loss has the wrong sign)"
            if spectrum.converged[0]
            else "the largest eigenvalue has not converged (allow more products or time)"
        )
        absent.append(f"No power law was fitted to the eigenvalues or their gaps: {why}.")
        return scalars, absent
    fitted, missing = _fits(leading, spectrum.leading_residuals, significance, "the ")
    return scalars | fitted, absent + missing


def gradient_scalars(
    structure: GradientStructure, significance: float = 0.05
) -> tuple[dict[str, float], list[str]]:
    """Return the statistics of a gradient structure, and a sentence for each that is absent.

    ``lambda_1``, ``trace``, the power law and the outliers are those of the covariance;
    ``power_law_rate`` is that of the gradients over their dimensions and ``gaussian_rate`` that of
    the parameters over the iterations, as in what SG finds; the other two rates stand beside them
    as ``iteration_power_law_rate`` and ``dimension_gaussian_rate``.

    Args:
        structure: What was measured.
        significance: Level of the Kolmogorov-Smirnov test of the spectrum, and of the outliers.

    Returns:
        Name (without prefix) to value, and the reasons for what is absent.
    """
    leading = structure.leading
    scalars: dict[str, float] = {
        "num_gradients": structure.num_gradients,
        "num_eigenvalues": len(structure.covariance),
        "num_fitted": len(leading),
        "lambda_1": float(structure.covariance[0]),
        "trace": structure.covariance_trace,
        "mean_gradient_norm": structure.mean_gradient_norm,
        "seconds": structure.seconds,
        "loss": structure.loss,
    }
    rounding = np.full(len(leading), structure.rounding)
    fitted, absent = _fits(leading, rounding, significance, "the covariance's ")
    try:
        fitted["num_outliers"] = num_outliers(leading, significance=significance)
    except ValueError as error:
        absent.append(f"No outliers were counted: {error}")
    rates, missing = _rates(structure)
    noise, untold = _noise(structure)
    return scalars | fitted | rates | noise, absent + missing + untold


def _noise(structure: GradientStructure) -> tuple[dict[str, float], list[str]]:
    """Return the noise scale with its error and the batch size it suggests, or why it lacks."""
    noise = structure.noise_scale
    if noise.value is None or noise.std_error is None or noise.critical_batch_size is None:
        return {}, [f"noise_scale is left out: {noise.reason}"]
    return {
        "noise_scale": noise.value,
        "noise_scale_std_error": noise.std_error,
        "critical_batch_size": float(noise.critical_batch_size),
    }, []


def _fits(
    leading: FloatArray, errors: FloatArray, significance: float, whose: str
) -> tuple[dict[str, float], list[str]]:
    """Return the statistics of the power laws of eigenvalues and of their gaps, and what lacks."""
    scalars: dict[str, float] = {}
    absent: list[str] = []
    try:
        fit = fit_power_law(leading, significance=significance)
        scalars |= power_law_scalars(fit)
        if fit.reason is not None:
            absent.append(f"power_law is left out: {fit.reason}")
    except ValueError as error:
        absent.append(f"No power law was fitted to {whose}eigenvalues: {error}")
    try:
        scalars |= eigengap_scalars(eigengaps(leading, errors, significance=significance))
    except ValueError as error:
        absent.append(f"No power law was fitted to {whose}eigengaps: {error}")
    return scalars, absent


def _rates(structure: GradientStructure) -> tuple[dict[str, float], list[str]]:
    """Return the rates of the tests, and why one is absent."""
    dimensions, iterations = structure.dimension_tests, structure.iteration_tests
    if dimensions is None or iterations is None:
        return {}, []
    rates: dict[str, float] = {}
    absent: list[str] = []
    for tests, what, power_law, gaussian in (
        (dimensions, "gradient", "power_law_rate", "dimension_gaussian_rate"),
        (iterations, "parameter", "iteration_power_law_rate", "gaussian_rate"),
    ):
        if tests.num_ks_tested:
            rates[power_law] = tests.power_law_rate
        else:
            absent.append(
                f"{power_law} is left out: no {what} has {tests.num_values} entries that are "
                "neither zero nor all equal."
            )
        if tests.num_gaussian_tested:
            rates[gaussian] = tests.gaussian_rate
        else:
            absent.append(f"{gaussian} is left out: the entries of every {what} are all equal.")
    return rates, absent


def power_law_scalars(fit: PowerLawFit) -> dict[str, float]:
    """Return the statistics of a power law; without a verdict where values are too few for one.

    Two values have the same distance whatever they are, so that it is no statistic of theirs.
    """
    untold = ("d_ks", "d_c", "p_value") if fit.num_values == 2 else ()
    values = {key: getattr(fit, name) for key, name in STATISTICS.items() if key not in untold}
    return {key: float(value) for key, value in values.items() if value is not None}


def eigengap_scalars(gaps: Eigengaps) -> dict[str, float]:
    """Return the statistics of eigengaps, and how many gaps were left out as rounding, if any."""
    scalars = {"eigengap_d_ks": gaps.fit.ks_distance, "eigengap_s_hat": gaps.fit.slope}
    if gaps.num_below_bounds:
        scalars["eigengap_num_below_bounds"] = float(gaps.num_below_bounds)
    return scalars


def block_scalars(blocks: BlockStructure, partition: object = None) -> dict[str, float]:
    """Return the statistics of a block structure, name to value; those without value are absent.

    Where the blocks are cut from two layers, w before v, ``block_share_ww``, ``block_share_wv``
    and ``block_share_vv`` are the shares of the squared norm of H in the three families of blocks
    (HBS, dynamic force: training makes H_wv vanish). ``block_ratio_ww`` and ``block_ratio_vv``
    are the off-diagonal ratios within H_ww and within H_vv; see `group_ratios`.

    Args:
        blocks: What was measured.
        partition: What it was cut by.
    """
    scalars = {
        "block_off_diagonal_ratio": blocks.off_diagonal_ratio,
        "block_off_diagonal_ratio_std_error": blocks.off_diagonal_ratio_std_error,
        "block_off_diagonal_share": blocks.off_diagonal_share,
        "block_heterogeneity": blocks.mean_heterogeneity,
        **group_ratios(blocks, partition),
    }
    if len(set(blocks.groups)) == 2 and blocks.families:
        shares = blocks.families.values()
        names = ("block_share_ww", "block_share_wv", "block_share_vv")
        scalars |= dict(zip(names, shares, strict=True))
    return {name: value for name, value in scalars.items() if value is not None}


def group_ratios(blocks: BlockStructure, partition: object = None) -> dict[str, float | None]:
    """Return the off-diagonal ratios within the hidden neurons and within the classes.

    HBS eq. 6, 10, 14, 15 and theorems 1 and 2 are about these, not about the ratio over all
    blocks. Within H_vv are the blocks of the last layer that is cut, one for each output; within
    H_ww those of the layers before it. HBS has one hidden layer. Of several, only blocks of the
    same layer are compared: mean over i != j in one layer, over the mean of the diagonal blocks.

    Args:
        blocks: What was measured.
        partition: What it was cut by. ``"class"`` has H_vv alone; ``"neuron"`` and rules have
            both; heads, tokens and whole layers are neither.
    """
    layers = list(dict.fromkeys(blocks.groups))
    if partition in ("layer", "head", "embedding", "adam_mini"):
        return {}
    if partition == "class":
        return {"block_ratio_vv": blocks.group_ratio(layers[-1])} if layers else {}
    if len(layers) < 2:
        return {}
    return {
        "block_ratio_ww": _pooled_ratio(blocks, layers[:-1]),
        "block_ratio_vv": blocks.group_ratio(layers[-1]),
    }


def _pooled_ratio(blocks: BlockStructure, layers: Sequence[str]) -> float | None:
    """Return the ratio of means over the blocks within each of some layers, None for no pairs."""
    on = off = 0.0
    diagonal = pairs = 0
    for layer in layers:
        member = np.array([group == layer for group in blocks.groups])
        inside = blocks.frobenius[np.ix_(member, member)]
        if len(inside) > 1:  # a norm, an embedding as a whole: no neurons to compare
            on += float(np.trace(inside))
            off += float(inside.sum() - np.trace(inside))
            diagonal += len(inside)
            pairs += len(inside) * (len(inside) - 1)
    return (off / pairs) / (on / diagonal) if pairs and on > 0 else None
