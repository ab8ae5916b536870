"""What theory says Hessians should be: their block structure (HBS), their power laws (HPL)."""

from lightning_hessian.statistics.theory.block_structure import (
    class_ratio,
    class_ratio_limit,
    hidden_cross_entropy_hessian,
    hidden_mse_hessian,
    hidden_ratio_mse,
    linear_cross_entropy_hessian,
    linear_mse_hessian,
    marchenko_pastur,
    marchenko_pastur_edges,
    semicircle,
)
from lightning_hessian.statistics.theory.power_laws import (
    approximate_eigengaps,
    eigengaps_of_values,
    eigenvector_bound,
    max_entropy_density,
    zipf_eigengaps,
    zipf_eigenvalues,
)

__all__ = [
    "approximate_eigengaps",
    "class_ratio",
    "class_ratio_limit",
    "eigengaps_of_values",
    "eigenvector_bound",
    "hidden_cross_entropy_hessian",
    "hidden_mse_hessian",
    "hidden_ratio_mse",
    "linear_cross_entropy_hessian",
    "linear_mse_hessian",
    "marchenko_pastur",
    "marchenko_pastur_edges",
    "max_entropy_density",
    "semicircle",
    "zipf_eigengaps",
    "zipf_eigenvalues",
]
