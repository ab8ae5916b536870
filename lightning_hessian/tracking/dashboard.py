"""The W&B dashboard: which panels, in which sections, and the workspace made of them.

`SECTIONS` names keys only. A workspace is built of them without a server (by wandb-workspaces, the
extra ``workspaces``); only saving it needs one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import checked, monitor_names, nonempty_text
from lightning_hessian.tracking.history import key_part
from lightning_hessian.tracking.loggers import STEP
from lightning_hessian.tracking.scalars import CORRELATED, GRADIENT_CORRELATED

NAME = "Hessian spectra"

GAP_KEY = "hessian/gap"
"""Where the generalization gap is logged, whose name as a monitored metric is ``gap``."""

_AGAINST = ("d_ks", "s_hat", "lambda_1", "block_off_diagonal_ratio")
"""The statistics that a monitored metric is drawn over."""

_OF_LAYERS = {
    "lambda_1": "Largest eigenvalue of each layer",
    "s_hat": "Slope of each layer",
    "d_ks": "KS distance of each layer",
}
"""The statistics of layers that have a panel: those of the figure over the depth."""


@dataclass(frozen=True)
class Lines:
    """Metrics over the steps, or over another metric: rows that hold both are its points.

    Attributes:
        title: Of the panel.
        keys: What is drawn; none where a pattern says it.
        x: Over what.
        log: Whether the vertical axis is logarithmic.
        bounds: Of the vertical axis.
        level: Where the live page draws a dashed line across; W&B has none.
        pattern: What the whole keys have to match, where only a run knows them: a regex.
    """

    title: str
    keys: tuple[str, ...] = ()
    x: str = STEP
    log: bool = False
    bounds: tuple[float | None, float | None] = (None, None)
    level: float | None = None
    pattern: str = ""


@dataclass(frozen=True)
class Runs:
    """A point for each run, by the last values of two metrics, with a regression line."""

    title: str
    x: str
    y: str


@dataclass(frozen=True)
class Figures:
    """Figures by step."""

    title: str
    keys: tuple[str, ...]


Panel = Lines | Runs | Figures


def sections(monitors: Sequence[str] = ("val_loss", "gap")) -> dict[str, tuple[Panel, ...]]:
    """Return the panels of each section, in order, for metrics by their logged names."""
    return {
        "Generalization": tuple(p for name in monitors for p in _generalization(name)),
        "Sharpness": (
            Lines("Largest eigenvalue", ("hessian/lambda_1",), log=True),
            Lines("Loss on the probe", ("hessian/loss", "gradient/loss")),
            Lines("Trace", ("hessian/trace",)),
            Lines("Smallest eigenvalue", ("hessian/lambda_min",)),
            Lines("Standard error of the trace", ("hessian/trace_std_error",), log=True),
        ),
        "Stability": (
            Lines("Sharpness over threshold: unstable above 1", ("stability/ratio",), level=1.0),
            Lines("Loss on the probe", ("stability/loss",), log=True),
            Lines(
                "Sharpness and the optimizer's threshold",
                ("stability/sharpness", "stability/threshold"), log=True,
            ),
            Lines("Curvature along the last update", ("stability/update_curvature",)),
            Lines(
                "Change of the loss by one more such update",
                ("stability/predicted_change", "stability/actual_change"), level=0.0,
            ),
            Lines(
                "Share in the leading span",
                ("stability/gradient_share", "stability/update_share"), bounds=(0, 1),
            ),
            Lines(
                "Turn of the leading span, degrees",
                ("stability/drift", "stability/drift_bound"), bounds=(0, 90),
            ),
            Figures("Ratio and loss", ("figures/hessian_stability",)),
        ),
        "Spectrum": (
            Lines("KS distance below d_c: power law", ("hessian/d_ks", "hessian/d_c")),
            Lines("p-value, exponent fitted", ("hessian/p_value",), bounds=(0, 1)),
            Lines("Slope of eigenvalue against rank", ("hessian/s_hat",)),
            Lines("Exponent of the density", ("hessian/beta_hat",)),
            Lines("KS distance of the gaps", ("hessian/eigengap_d_ks",)),
            Lines("Slope of the gaps", ("hessian/eigengap_s_hat",)),
            Figures("Emergence of the power law", ("figures/hessian_emergence",)),
            Figures("Eigenvalue against rank", ("figures/hessian_rank",)),
            Figures("Does the verdict depend on K?", ("figures/hessian_cutoff",)),
            Figures("Eigengaps", ("figures/hessian_eigengaps",)),
            Figures("Spectral density", ("figures/hessian_density",)),
        ),
        "Layers": (
            *(
                Lines(title, log=name == "lambda_1", pattern=f"layers/{name}_.*")
                for name, title in _OF_LAYERS.items()
            ),
            Figures("Layers over the depth", ("figures/hessian_layers",)),
        ),
        "Blocks": (
            Lines("Off-diagonal ratio", ("hessian/block_off_diagonal_ratio",)),
            Lines(
                "Within hidden neurons, within classes",
                ("hessian/block_ratio_ww", "hessian/block_ratio_vv"),
            ),
            Lines("Share outside the diagonal", ("hessian/block_off_diagonal_share",)),
            Lines("Heterogeneity of the blocks", ("hessian/block_heterogeneity",), bounds=(0, 1)),
            Figures("Norms of the blocks", ("figures/hessian_blocks",)),
            Figures("Distances of their spectra", ("figures/hessian_heterogeneity",)),
        ),
        "Gradients": (
            Lines("KS distance of the covariance", ("gradient/d_ks", "gradient/d_c")),
            Lines("Slope of the covariance", ("gradient/s_hat",)),
            Lines("Trace of the covariance", ("gradient/trace",), log=True),
            Lines("Outliers", ("gradient/num_outliers",)),
            Lines(
                "Noise scale, and the batch size it suggests",
                ("gradient/noise_scale", "gradient/critical_batch_size"), log=True,
            ),
            Lines(
                "Rates of the tests", ("gradient/power_law_rate", "gradient/gaussian_rate"),
                bounds=(0, 1),
            ),
            Figures("Spectra of the gradients", ("figures/gradient_spectra",)),
        ),
        "Cost": (
            Lines("Seconds of a measurement", ("hessian/seconds", "gradient/seconds")),
            Lines("Hessian-vector products", ("hessian/num_hvps", "stability/num_hvps")),
            Lines("Asked for and converged", ("hessian/num_eigenvalues", "hessian/num_converged")),
        ),
    }  # fmt: skip


def _generalization(monitor: str) -> tuple[Panel, ...]:
    """Return the panels of one monitored metric."""
    part = key_part(monitor)
    metric = GAP_KEY if monitor == "gap" else monitor
    pairs = [f"{key_part(name)}_{part}" for name in CORRELATED]
    pairs += [f"gradient_{name}_{part}" for name in GRADIENT_CORRELATED]

    def correlation(kind: str) -> tuple[str, ...]:
        return tuple(f"correlation/{kind}_{pair}" for pair in pairs)

    best = CORRELATED[0]
    interval = tuple(f"correlation/{k}_{best}_{part}" for k in ("pearson_low", "pearson_high"))
    return (
        Lines(monitor, (metric,)),
        Lines(f"Pearson's r with {monitor}", correlation("pearson"), bounds=(-1, 1)),
        Lines(f"r of first differences with {monitor}", correlation("differences"), bounds=(-1, 1)),
        Lines(f"Spearman's r with {monitor}", correlation("spearman"), bounds=(-1, 1)),
        Lines(
            f"r of d_ks with {monitor} and its 95 % interval",
            (f"correlation/pearson_{best}_{part}", *interval),
            bounds=(-1, 1),
        ),
        Lines("Number of points", ("correlation/num_points",)),
        *(
            Lines(f"{monitor} over {name}, in a run", (metric,), x=f"hessian/{name}")
            for name in _AGAINST
            if metric != GAP_KEY  # which stands in another row than the statistics
        ),
        *(
            Runs(f"{monitor} over {name}, across runs", f"hessian/{name}", metric)
            for name in _AGAINST
        ),
        Figures(f"Statistics against {monitor}", (f"figures/hessian_scatter_{part}",)),
    )


def _part_of_path(name: str, value: Any) -> str:
    """Check an entity or a project: a text without a slash."""
    found = nonempty_text(name, value)
    if "/" in found:
        raise ArgumentError(name, value, "Give a name of W&B, without a slash.")
    return found


@checked(
    {
        "entity": _part_of_path,
        "project": _part_of_path,
        "monitor": monitor_names,
        "name": nonempty_text,
    }
)
def build_workspace(
    entity: str,
    project: str,
    *,
    monitor: str | Sequence[str] = ("val_loss", "gap"),
    name: str = NAME,
) -> Any:
    """Return the dashboard as a `wandb_workspaces.workspaces.Workspace`, not yet saved.

    ``build_workspace("me", "digits").save()`` needs a W&B account; building does not.

    Args:
        entity: User or team.
        project: Its project.
        monitor: The monitored metric, or metrics, as they are logged.
        name: Of the view.

    Raises:
        ModuleNotFoundError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The dashboard is built by wandb-workspaces: "
            "pip install 'lightning-hessian[workspaces]'."
        ) from error

    def panel(plan: Panel) -> Any:
        if isinstance(plan, Lines):
            return wr.LinePlot(
                title=plan.title, x=plan.x, y=list(plan.keys), log_y=plan.log or None,
                range_y=plan.bounds, metric_regex=plan.pattern or None,
            )  # fmt: skip
        if isinstance(plan, Runs):
            return wr.ScatterPlot(title=plan.title, x=plan.x, y=plan.y, regression=True)
        return wr.MediaBrowser(title=plan.title, media_keys=list(plan.keys), num_columns=1)

    monitors = (monitor,) if isinstance(monitor, str) else tuple(monitor)
    plans = sections(monitors)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=heading, panels=[panel(plan) for plan in plan_of], is_open=True)
            for heading, plan_of in plans.items()
        ],
    )


def workspace_json(workspace: Any) -> dict[str, Any]:
    """Return a workspace of `build_workspace` as the JSON that would be sent to W&B."""
    spec = workspace._to_model().spec
    found: dict[str, Any] = json.loads(spec.model_dump_json(by_alias=True, exclude_none=True))
    return found
