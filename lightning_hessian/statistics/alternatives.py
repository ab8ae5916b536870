"""What else the largest values could be: a lognormal, a truncated power law, an exponential.

A power law that is not rejected need not be the best description. Likelihood ratios hold it
against other heavy or light tails, fitted to the same values above the same cutoff. The fits and
the ratios are those of the powerlaw library.

Sources: A. Clauset, C. R. Shalizi, M. E. J. Newman, "Power-law distributions in empirical data",
SIAM Review 51 (2009), section 5; Q. H. Vuong, "Likelihood ratio tests for model selection and
non-nested hypotheses", Econometrica 57 (1989); J. Alstott, E. Bullmore, D. Plenz, "powerlaw: a
Python package for analysis of heavy-tailed distributions", PLoS ONE 9 (2014).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import numpy as np

from lightning_hessian.results import Alternative, FloatArray
from lightning_hessian.results.base import text_of

NAMES = ("lognormal", "truncated_power_law", "exponential")
"""The distributions that a power law is held against, as powerlaw calls them."""

# powerlaw ends the exponent at 3 by default, and would compare a power law that is not the fitted
# one. A truncated power law may have an exponent below 1.
_RANGES = {"alpha": (0.0, None)}

# The power law is the truncated one at Lambda = 0, and the limit of lognormals with
# mu = -(alpha - 1) sigma^2 as sigma grows. At the best fit neither can be less likely than it, by
# more than the optimizer leaves at the end of Lambda's range. Close to the limit Vuong's sigma is
# as small as his R, so that any positive R against a lognormal could seem significant.
_MOST_POSITIVE = {"lognormal": 0.0, "truncated_power_law": 0.1}


def likelihood_ratios(tail: FloatArray) -> tuple[Alternative, ...]:
    """Return the alternatives to a power law, each with its likelihood ratio.

    powerlaw is imported here, since it brings pyplot along (0.9 s, once). The rest takes 0.3 to
    0.6 s for 1000 values and 3 s for 6000, nearly all of it for the truncated power law.

    Args:
        tail: The values that the power law was fitted to, positive and descending, [K]; the last
            is the cutoff.
    """
    cutoff = float(tail[-1])
    with _silence() as said:
        import powerlaw

        # In units of the cutoff, so that powerlaw's absolute tolerances mean the same for
        # eigenvalues of every size.
        fit = powerlaw.Fit(tail / cutoff, xmin=1.0, parameter_ranges=_RANGES, verbose=0)
        return tuple(_alternative(fit, name, cutoff, said) for name in NAMES)


@contextmanager
def _silence() -> Iterator[list[warnings.WarningMessage]]:
    """Keep what powerlaw prints and warns of from the user, and return its warnings."""
    with (
        warnings.catch_warnings(record=True) as said,
        redirect_stdout(StringIO()),
        np.errstate(all="ignore"),
    ):
        warnings.simplefilter("always")
        yield said


def _alternative(
    fit: Any, name: str, cutoff: float, said: Sequence[warnings.WarningMessage]
) -> Alternative:
    """Return one comparison; where powerlaw fails, what became of it."""
    try:
        ratio, p_value = fit.distribution_compare("power_law", name, normalized_ratio=True)
        total, _ = fit.distribution_compare("power_law", name)  # the same, not over its deviation
        parameters = _in_units(getattr(fit, name).parameters, cutoff)
    except Exception as error:  # noqa: BLE001 - whatever SciPy or mpmath meet at such values
        reason = f"powerlaw could not compare the {_words(name)}: {text_of(error)}"
        return Alternative(name, None, None, {}, reason)
    # The flag on the fit does not tell: powerlaw raises it near a bound of a parameter as well,
    # and there the best truncated power law of a true power law lies. Its warning does.
    failed = {str(warning.message) for warning in said}
    for distribution in (name, "power_law"):
        if f"No valid fits found for distribution {distribution}." in failed:
            found = ", ".join(f"{key} = {value:.3g}" for key, value in parameters.items())
            reason = (
                f"powerlaw's optimizer did not converge on the {_words(distribution)}, so the "
                f"ratio is unknown (it stopped at {found})."
            )
            return Alternative(name, None, None, parameters, reason)
    if not (math.isfinite(ratio) and math.isfinite(p_value)):
        reason = f"The likelihood of the {_words(name)} left the range of floating point."
        return Alternative(name, None, None, parameters, reason)
    if total > _MOST_POSITIVE.get(name, math.inf):
        reason = (
            f"powerlaw's optimizer stopped short on the {_words(name)}: it was left less likely "
            "than the power law, which is a case of it, so the ratio is unknown."
        )
        return Alternative(name, None, None, parameters, reason)
    return Alternative(name, float(ratio), float(p_value), parameters)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _in_units(parameters: dict[str, Any], cutoff: float) -> dict[str, float]:
    """Return the parameters for values in their own units, not in those of the cutoff."""
    found = {key: float(value) for key, value in parameters.items()}
    if "mu" in found:
        found["mu"] += math.log(cutoff)
    if "Lambda" in found:
        found["Lambda"] /= cutoff
    return found
