"""The metric: the pure function's numbers, whatever torchmetrics and DDP do with its state."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from callbacks.tiny_modules import Regression, train_loader, val_loader
from scipy import stats
from torchmetrics import MetricCollection

from lightning_hessian.statistics.power_law import fit_power_law
from lightning_hessian.tracking.power_law_metric import STATISTICS, PowerLawMetric

VALUES = torch.tensor(stats.pareto(1.1).rvs(90, random_state=np.random.default_rng(1)))


def clauset(values: np.ndarray) -> float:
    """Slope by Clauset's estimator, as powerlaw has it."""
    import powerlaw

    return 1 / (powerlaw.Fit(values, xmin=values.min(), verbose=0).power_law.alpha - 1)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_it_is_the_pure_function(statistic: str) -> None:
    metric = PowerLawMetric(statistic, k=40, significance=0.1)
    metric.update(VALUES[:50].reshape(5, 10))
    metric.update(VALUES[50:].float())
    pooled = torch.cat([VALUES[:50], VALUES[50:].float().double()])
    fit = fit_power_law(pooled.numpy(), 40, significance=0.1)
    assert metric.compute().item() == pytest.approx(
        float(getattr(fit, STATISTICS[statistic])), rel=1e-6
    )


def test_the_slope_is_that_of_another_library() -> None:
    metric = PowerLawMetric("s_hat")
    metric.update(VALUES)
    assert metric.compute().item() == pytest.approx(clauset(VALUES.numpy()), rel=1e-6)


def test_reset_clone_pickle_forward_and_collection() -> None:
    metric = PowerLawMetric("beta_hat")
    metric.update(VALUES)
    expected = metric.compute()
    for other in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other.compute() == expected
        other.reset()
        other.update(VALUES[:30])
        assert other.compute() != expected
    assert metric.compute() == expected, "a clone shares no state"
    metric.reset()
    assert metric(VALUES[:30]) == PowerLawMetric("beta_hat")(VALUES[:30])
    metric(VALUES[30:])
    assert metric.compute() == pytest.approx(expected)
    found = MetricCollection([PowerLawMetric("d_ks")])(VALUES)
    assert found["PowerLawMetric"].item() == pytest.approx(
        fit_power_law(VALUES.numpy()).ks_distance
    )


def test_half_precision_values_and_gradients() -> None:
    metric = PowerLawMetric().half()
    metric.update(VALUES.bfloat16().requires_grad_())
    assert metric.compute().item() == pytest.approx(clauset(VALUES.numpy()), rel=0.02)
    assert not metric.compute().requires_grad


@pytest.mark.parametrize("values", [[], [-1.0, -2.0], [3.0], [2.0, 2.0], [1.0, float("nan")]])
def test_what_cannot_be_fitted_is_nan_with_a_reason(values: list[float]) -> None:
    metric = PowerLawMetric("s_hat")
    metric.update(torch.tensor(values))
    with pytest.warns(UserWarning, match="s_hat is NaN: "):
        assert metric.compute().isnan()


@pytest.mark.parametrize("wrong", [{"statistic": "alpha"}, {"k": 1}, {"significance": 0}])
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(["Choose from", "at least 2", "significance"])):
        PowerLawMetric(**wrong)


def _rank(rank: int, file: str, results: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=3
    )
    warnings.simplefilter("ignore")
    found = []
    parts = VALUES.split([20, 30, 40])
    for mine in (VALUES, parts[rank], parts[rank] if rank != 1 else None):
        metric = PowerLawMetric("d_ks")
        if mine is not None:
            half = len(mine) // 2
            metric.update(mine[:half])
            metric.update(mine[half:])
        found.append(metric.compute().item())
        metric.update(VALUES[:7])  # after a synchronised compute the rank's own state is back
        found.append(sum(len(part) for part in metric.values))
    results.put((rank, found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_on_three_ranks(tmp_path: Path) -> None:
    """The same spectrum on all ranks counts once, parts of one are pooled, a rank may have none."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.start_processes(_rank, (str(tmp_path / "store"), results), nprocs=3, start_method="spawn")
    by_rank = dict(results.get() for _ in range(3))
    whole = fit_power_law(VALUES.numpy()).ks_distance
    without = torch.cat([VALUES[:20], VALUES[50:]])
    for rank, size in enumerate([20, 30, 40]):
        same, size_same, parts, size_parts, some, size_some = by_rank[rank]
        assert same == pytest.approx(whole, rel=1e-6)
        assert parts == pytest.approx(whole, rel=1e-6)
        assert some == pytest.approx(fit_power_law(without.numpy()).ks_distance, rel=1e-6)
        assert (size_same, size_parts) == (97, size + 7)
        assert size_some == (7 if rank == 1 else size + 7)


def test_in_self_log(tmp_path: Path) -> None:
    class Logs(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.slope = PowerLawMetric("s_hat")
            self.seen: list[torch.Tensor] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            values = (self.net(batch[0]) - batch[1]).square()
            self.seen.append(values.flatten())
            self.slope.update(values)
            self.log("val_slope", self.slope)

    module = Logs()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, train_loader(), val_loader())
    expected = fit_power_law(torch.cat(module.seen).numpy()).slope
    assert trainer.callback_metrics["val_slope"].item() == pytest.approx(expected, rel=1e-5)
    assert not module.slope.values, "Lightning resets it after the epoch"


def test_it_draws_itself_as_other_metrics_do() -> None:
    metric = PowerLawMetric("s_hat")
    metric.update(torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0]))
    figure, axes = metric.plot()
    assert figure is not None
    np.testing.assert_allclose(axes.lines[0].get_ydata(), metric.compute(), rtol=1e-6)
    given = figure.subplots()
    _, drawn = metric.plot([torch.tensor(1.0), torch.tensor(3.0)], ax=given)
    assert drawn is given
    np.testing.assert_allclose(drawn.lines[0].get_ydata(), [1.0, 3.0])
