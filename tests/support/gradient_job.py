"""Gradient structure measured by several ranks that Lightning launches; each writes what it saw.

Run as ``python gradient_job.py FOLDER '{"devices": 2, "cases": ["stored"], ...}'``.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from lightning_hessian import (
    GradientStructure,
    GradientStructureCallback,
    MeasurementError,
    gradient_structure,
)
from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.measure.budget import Budget
from lightning_hessian.operators.gradients import history as gradient_history
from lightning_hessian.operators.gradients.history import GradientCovariance, GradientHistory
from lightning_hessian.solvers.lanczos import lanczos
from support.job import Network, dataset, loss_fn

HOURS = 1e5  # seconds: more than any test takes

WORD = "this rank's memory has run out"


class Noisy(Dataset[Any]):
    """Samples with noise of their own at every use."""

    def __len__(self) -> int:
        return 44

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fetched = getattr(self, "fetched", 0) + 1
        inputs, target = dataset()[index]
        return inputs + 0.1 * torch.randn(inputs.shape), target


CASES: dict[str, dict[str, Any]] = {
    "stored": {},
    "float32": {},
    "chosen": {"max_tested": 23, "num_gradients": 130},  # 100 points of each are drawn
    "mapped": {"left": 9000.0, "max_tested": 40, "preconditioner": "adam"},
    "streamed": {"tests": False, "num_eigenvectors": 4},
    "recomputed": {"tests": False, "left": 40e3, "preconditioner": "adam", "num_eigenvectors": 4},
    "variants": {"clip_norm": 0.15, "preconditioner": "adam", "num_eigenvectors": 4},
    "momentum": {"momentum": 0.9, "num_eigenvectors": 4},
    "momentum, streamed": {"momentum": 0.9, "tests": False, "num_eigenvectors": 4},
    "per sample": {"batch_size": 1, "num_gradients": 41},
    "per sample, noisy": {"batch_size": 1, "num_gradients": 41, "data": Noisy()},
    "per sample, dropout": {"batch_size": 1, "num_gradients": 30, "mode": "train"},
    "dropout": {"mode": "train"},
    "few": {"batch_size": None, "num_gradients": 3, "tests": False, "num_eigenvectors": 2},
    "as given": {"batch_size": None, "num_gradients": 6, "tests": False},
    "layer": {"parameters": "head.*", "tests": False},  # eight parameters
    "few parameters": {"parameters": "layers.3.bias", "tests": False},  # two
}
"""Arguments of `gradient_structure`; ``left`` is the memory that gradients may take."""


def measured(case: str, module: Network, group: Any = None) -> dict[str, Any]:
    """One case by the front door, as JSON."""
    options = {"batch_size": 3, "num_gradients": 50, "num_eigenvalues": 100, **CASES[case]}
    data = options.pop("data", None)
    if data is None:
        data = list(DataLoader(dataset(), batch_size=8))
    loss = loss_fn
    if case == "float32":
        module = Network().float()
        data = [(inputs.float(), targets) for inputs, targets in data]
    with pytest.MonkeyPatch.context() as patch:
        if "left" in options:
            left = options.pop("left")
            patch.setattr("lightning_hessian.measure.gradients._left_by_gram", lambda *_: left)
        return as_json(gradient_structure(module, loss, data, process_group=group, **options))


def as_json(found: GradientStructure) -> dict[str, Any]:
    """A record without its wall time."""
    told: dict[str, Any] = {
        name: value
        for name, value in vars(found).items()
        if isinstance(value, (int, float, str)) and name != "seconds"
    }
    told["covariance"] = found.covariance.tolist()
    told["second_moment"] = found.second_moment.tolist()
    for name in ("dimension_tests", "iteration_tests"):
        tests = getattr(found, name)
        if tests is not None:
            told[name] = [tests.ks_distances.tolist(), tests.p_values.tolist()]
            told[name] += [tests.num_values, tests.num_points, tests.critical_value]
            told[f"{name}_typical"] = tests.typical.values.tolist()
    if found.eigenvectors is not None:
        told["eigenvectors"] = found.eigenvectors.tolist()
    return told


def failing(rank: int, after: int) -> Any:
    """A loss that raises on one rank once it has been evaluated so many times."""
    seen = Counter[str]()

    def loss(module: Network, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen["calls"] += 1
        if dist.get_rank() == rank and seen["calls"] > after:
            raise RuntimeError(WORD)
        return module.loss(batch)

    return loss


class Probe(L.Callback):
    """Measures before training, as often as there are cases."""

    def __init__(self, cases: list[str]) -> None:
        self.cases = cases
        self.found: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measures with all ranks."""
        for case in self.cases:
            with _noted_history() as made:
                self.found[case] = measured(case, pl_module, dist.group.WORLD)
            self.found[case] |= made
            if isinstance(CASES[case].get("data"), Noisy):
                self.found[case]["fetched"] = CASES[case]["data"].fetched
        self.found["failures"] = failures(pl_module)
        self.found["cut"] = cut_short(pl_module)
        self.found["operator"] = by_lanczos(pl_module)


class _noted_history:  # noqa: N801 - a context manager
    """A block in which what is stored of G is noted."""

    def __enter__(self) -> dict[str, Any]:
        self.made: dict[str, Any] = {}
        self.original = GradientHistory.__init__

        def noted(history: Any, values: Any, *args: Any) -> None:
            self.made |= {"bytes": values.nbytes, "mapped": isinstance(values, np.memmap)}
            self.original(history, values, *args)

        GradientHistory.__init__ = noted  # type: ignore[method-assign]
        return self.made

    def __exit__(self, *_: object) -> None:
        GradientHistory.__init__ = self.original  # type: ignore[method-assign]


def failures(module: Network) -> dict[str, list[Any]]:
    """What each rank is told when one of them fails, and after how many seconds."""
    data = list(DataLoader(dataset(), batch_size=8))
    spoiled = [(inputs.clone(), targets) for inputs, targets in data]
    spoiled[5][0][0] = float("nan")
    rank, world = dist.get_rank(), dist.get_world_size()
    told = {}
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "exception": (failing(world - 1, 9), data, {}),
        "streamed": (failing(world - 1, 9), data, {"tests": False}),
        "nan": (loss_fn, spoiled, {"batch_size": None, "num_gradients": 6, "tests": False}),
        "disk": (loss_fn, data, {"directory": "/no/such/folder" if rank == 1 else None}),
        "other data": (loss_fn, data, {"seed": rank}),
        "no data": (loss_fn, data if rank == 0 else [], {}),
        "budget": (loss_fn, data, {"memory_budget": 30e3 if rank == 1 else 1e6}),
    }
    for name, (loss, batches, options) in cases.items():
        start = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            if name == "disk":
                patch.setattr("lightning_hessian.measure.gradients._left_by_gram", lambda *_: 0.0)
            try:
                arguments = {"batch_size": 3, "num_gradients": 50, **options}
                gradient_structure(
                    module, loss, batches, process_group=dist.group.WORLD, **arguments
                )
            except MeasurementError as error:
                seconds = time.monotonic() - start
                told[name] = [type(error).__name__, str(error), seconds]
    return told


def cut_short(module: Network) -> list[dict[str, Any]]:
    """Measurements whose time is up on one rank only, stored and streamed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for tests in (True, False):
        asked = Counter[str]()

        def passed(_: Allowance, asked: Counter[str] = asked) -> float:
            asked["times"] += 1
            return HOURS if rank == 1 and asked["times"] >= 24 // world else 0.0

        def pieces(gradients: Any, piece_bytes: float = 0) -> Any:
            total, step = gradients.num_gradients, world
            return ((i, min(i + step, total)) for i in range(0, total, step))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Allowance, "seconds_passed", property(passed))
            patch.setattr(gradient_history, "pieces", pieces)
            patch.setattr(
                "lightning_hessian.operators.gradients.gram._plan", lambda *_: (50, world)
            )
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = gradient_structure(
                    module, loss_fn, list(DataLoader(dataset(), batch_size=8)), batch_size=3,
                    num_gradients=50, tests=tests, process_group=dist.group.WORLD,
                    budget=Budget(seconds=HOURS),
                )  # fmt: skip
        found.append(as_json(result) | {"warnings": [str(w.message) for w in caught]})
    return found


def by_lanczos(module: Network) -> list[float]:
    """The covariance's first eigenvalues, by products with G in slices."""
    from lightning_hessian.operators.gradients.ranks import DealtGradients
    from lightning_hessian.operators.gradients.rows import MiniBatchGradients
    from lightning_hessian.probe.minibatches import draw_minibatches
    from lightning_hessian.probe.parameters import ParameterSpace

    ranks, space = Ranks.of(dist.group.WORLD, module.device), ParameterSpace.select(module)
    data = list(DataLoader(dataset(), batch_size=8))
    drawn = draw_minibatches(data, batch_size=3, num_minibatches=50, ranks=ranks)
    module.eval()
    source = MiniBatchGradients(module, loss_fn, drawn, space)
    history = GradientHistory.collect(DealtGradients(source, 50, space, ranks))
    module.train()
    return lanczos(GradientCovariance(history), 4, tol=1e-8).values.tolist()


def fit(folder: Path, devices: int, rate: float, callbacks: list[L.Callback]) -> dict[str, Any]:
    """Trains for two epochs; returns warnings, weights and the next random number."""
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
        max_epochs=2, logger=False, callbacks=callbacks, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        num_sanity_val_steps=0,
    )  # fmt: skip
    module = Network(rate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    return {
        "rank": trainer.global_rank,
        "warnings": [str(w.message) for w in caught],
        "draw": torch.rand(1).item(),
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]).tolist(),
    }


def watching(**options: Any) -> GradientStructureCallback:
    """The callback, with few gradients."""
    return GradientStructureCallback(num_gradients=40, num_eigenvalues=10, **options)


def main(folder: Path, job: dict[str, Any]) -> None:
    """Measures, trains, and writes ``rank<r>.json``."""
    devices, probe = job["devices"], Probe(job["cases"])
    watch = watching(loss_fn=failing(1, int(40 / devices * 1.5)))  # in the second measurement
    # At rate zero, so that the weights are those of a single process.
    seen = fit(folder, devices, 0.0, [probe, watch])
    seen |= {"probe": probe.found, "history": watch.history}
    if job.get("train"):
        seen["plain"] = fit(folder, devices, 0.1, [])
        seen["watched"] = fit(folder, devices, 0.1, [watching()])
    (folder / f"rank{seen['rank']}.json").write_text(json.dumps(seen))
    if dist.is_initialized():  # gloo's threads, left running, can abort a process as it ends
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
