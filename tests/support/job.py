"""A training run that Lightning's own launcher starts on several ranks; each writes what it saw.

Run as ``python job.py FOLDER '{"strategy": "ddp", "devices": 2, ...}'``.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import HessianSpectrumCallback, Scalars, block_structure, hessian_spectrum
from lightning_hessian.linear.ranks import _GATHER, _SCATTER
from lightning_hessian.measure.spectrum import SpectrumInstrument
from lightning_hessian.probe.sharding.objective import ShardedObjective
from lightning_hessian.solvers import basis

FEATURES, CLASSES, NUM_SAMPLES, BATCH = 6, 4, 44, 8  # six batches, the last of four
LARGEST_LAYER = 63  # of the network's 91 parameters


def dataset() -> TensorDataset:
    """Inputs [44, 6] in four classes."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(NUM_SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    targets = (inputs[:, :2] > 0).long() @ torch.tensor([1, 2])
    return TensorDataset(inputs, targets)


def batches(count: int = 6) -> list[tuple[Tensor, ...]]:
    """The first batches of the data, in order; the sixth is ragged."""
    parts = zip(*(tensor.split(BATCH) for tensor in dataset().tensors), strict=True)
    return list(parts)[:count]


class Network(L.LightningModule):
    """A tanh network of 91 parameters in float64, with a dropout layer that only training sees."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        torch.manual_seed(7)
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 2)
        ).double()
        self.register_buffer("shift", torch.zeros(FEATURES, dtype=torch.float64))
        self.head = nn.Linear(2, CLASSES, bias=False).double()

    def configure_model(self) -> None:
        """Shards every layer by itself under the model-parallel strategy."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy) or hasattr(self.head, "reshard"):
            return
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            plan = {
                "layers.3": ColwiseParallel(output_layouts=Replicate()),
                "head": ColwiseParallel(output_layouts=Replicate()),
            }
            parallelize_module(self, strategy.device_mesh["tensor_parallel"], plan)
            if strategy.device_mesh["data_parallel"].size() == 1:
                return
        mesh = strategy.device_mesh["data_parallel"]
        for part in (self.layers[0], self.layers[3], self.head):
            fully_shard(part, mesh=mesh)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss."""
        return self.loss(batch)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of a batch."""
        return nn.functional.cross_entropy(self.head(self.layers(batch[0] + self.shift)), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss."""
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Logs the loss."""
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled."""
        return DataLoader(dataset(), batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return DataLoader(dataset(), batch_size=BATCH)


def loss_fn(module: Network, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss, as the front door wants it."""
    return module.loss(batch)


def measured(
    module: Network, count: int, group: Any = None, blocks: str = "neuron"
) -> dict[str, Any]:
    """Spectrum, trace and block norms by the front door, as JSON; densities of neurons too."""
    spectrum = hessian_spectrum(
        module, loss_fn, batches(count), num_eigenvalues=8, tol=1e-7, process_group=group
    )
    cut = block_structure(
        module, loss_fn, batches(count), blocks=blocks, exact=False,
        densities=blocks == "neuron", process_group=group,
    )  # fmt: skip
    return {
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "num_converged": spectrum.num_converged,
        "trace": spectrum.trace,
        "trace_std_error": spectrum.trace_std_error,
        "loss": spectrum.loss,
        "num_samples": spectrum.num_samples,
        "num_hvps": spectrum.num_hvps,
        "frobenius": cut.frobenius.tolist(),
        "ratio": cut.off_diagonal_ratio,
        "heterogeneity": cut.mean_heterogeneity,
    }


class Probe(L.Callback):
    """Measures once before training, and counts collectives and bytes while doing so."""

    def __init__(self, num_batches: int, blocks: str) -> None:
        self.num_batches, self.blocks = num_batches, blocks
        self.found: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measures with all ranks, of which only the first has its buffers as they should be."""
        pl_module.shift.fill_(0.1 * trainer.global_rank)
        calls: Counter[str] = Counter()
        originals = {}
        for name in ("all_reduce", "broadcast", _GATHER, _SCATTER):
            originals[name] = getattr(dist, name)
            setattr(dist, name, _counted(calls, name, originals[name]))
        whole: list[int] = []
        note = ShardedObjective._note

        def watched(self: Any, *args: Any) -> None:
            note(self, *args)
            whole.append(_fewest_whole(self))

        ShardedObjective._note = watched  # type: ignore[method-assign]
        sizes: list[int] = []
        make = basis.KrylovBasis.__init__

        def noted(self: Any, *args: Any, **kwargs: Any) -> None:
            make(self, *args, **kwargs)
            sizes.append(self.rows.untyped_storage().nbytes() // len(self.rows))

        basis.KrylovBasis.__init__ = noted  # type: ignore[method-assign]
        try:
            self.found = measured(pl_module, self.num_batches, dist.group.WORLD, self.blocks)
        finally:
            basis.KrylovBasis.__init__ = make  # type: ignore[method-assign]
            ShardedObjective._note = note  # type: ignore[method-assign]
            for name, original in originals.items():
                setattr(dist, name, original)
        self.found["shift"] = float(pl_module.shift[0])
        pl_module.shift.zero_()
        self.found |= {"calls": dict(calls), "bytes_of_a_vector": sizes[0]}
        self.found["largest_whole"] = max(whole, default=0)


def _fewest_whole(objective: ShardedObjective, seconds: float = 1.0) -> int:
    """Numbers in whole parameters, once gloo's thread has let go of what it has delivered."""
    end = time.monotonic() + seconds
    fewest = sys.maxsize
    while True:
        held = [view.bundle for ref, view in objective._whole.values() if not ref.expired()]
        fewest = min(fewest, sum(objective._bundles[i].numel for i in held))
        if fewest <= LARGEST_LAYER or time.monotonic() > end:
            return fewest
        time.sleep(0.01)


def _counted(calls: Counter[str], name: str, original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return original(*args, **kwargs)

    return call


class _Exhausted(torch.autograd.Function):
    """A value whose backward pass fails."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Returns the value."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Fails."""
        raise RuntimeError("this rank's memory has run out")


def failing_loss(rank: int, after: int, where: str = "forward") -> Any:
    """A loss that fails on one rank once it has been evaluated so many times.

    It raises (``"forward"``), between two layers (``"within"``), in the backward pass
    (``"backward"``), or it becomes NaN (``"nan"``).
    """
    seen = 0

    def loss(module: Network, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal seen
        seen += 1
        if dist.get_rank() != rank or seen <= after:
            return module.loss(batch)
        if where == "nan":
            return module.loss(batch) * math.nan
        if where == "backward":
            hidden = _Exhausted.apply(module.layers(batch[0]))
            return nn.functional.cross_entropy(module.head(hidden), batch[1])
        if where == "within":
            module.layers(batch[0])
        raise RuntimeError("this rank's memory has run out")

    return loss


def strategy_of(name: str, devices: int) -> Any:
    """The strategy by its name; three of them are kinds of model parallelism."""
    if name == "both":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=devices // 2)
    if name == "tensor":
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=devices)
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    return name


class GradientLength:
    """An instrument of about one product, in the place of the built-in one of a few."""

    name, prefix = "stability", "length"

    def __init__(self) -> None:
        self.found: list[float] = []

    def check(self, model: Any) -> None:
        """Fits every model."""

    def cost(self, session: Any) -> int:
        """A gradient is about one product."""
        return 1

    def measure(self, session: Any, allowance: Any) -> Scalars:
        """Return the length of the gradient."""
        self.found.append(float(session.shard.norm(session.gradient())))
        return Scalars({"gradient": self.found[-1]})


class TakesTime(L.Callback):
    """Makes each step of training take time, so that a busy machine can pay for a trial."""

    def on_train_batch_start(self, *given: Any) -> None:
        """Wait."""
        time.sleep(0.3)


def main(folder: Path, job: dict[str, Any]) -> None:
    """Trains, and writes ``rank<r>.json`` and, from rank zero, the weights."""
    devices = job.get("devices", 1)
    callbacks: list[L.Callback] = []
    if "probe" in job:
        callbacks.append(Probe(job["probe"], job.get("blocks", "neuron")))
    if "callback" in job:
        options = {
            "num_eigenvalues": 5, "num_batches": 6, "time_budget": None, **job["callback"],
        }  # fmt: skip
        spectrum = SpectrumInstrument(num_eigenvalues=options["num_eigenvalues"], trace_probes=2)
        lengths = GradientLength()
        options["instruments"] = [spectrum, *([lengths] if job.get("slow") else [])]
        callbacks += [TakesTime()] if job.get("slow") else []
        if "fail" in job:
            options["loss_fn"] = failing_loss(*job["fail"])
        callbacks.append(HessianSpectrumCallback(**options))
    loggers: list[Any] = []
    if job.get("log"):
        loggers = [
            CSVLogger(folder, name="csv", version=0),
            WandbLogger(save_dir=folder, project="test", offline=True),
        ]
    trainer = L.Trainer(
        accelerator="cpu", devices=devices,
        strategy=strategy_of(job.get("strategy", "auto"), devices),
        max_epochs=job.get("epochs", 1), logger=loggers, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    module = Network(job.get("learning_rate", 0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.monotonic()
        trainer.fit(module)
        seconds = time.monotonic() - start
    seen: dict[str, Any] = {
        "seconds": seconds,
        "warnings": [str(w.message) for w in caught],
        "draw": torch.rand(1).item(),
    }
    for callback in callbacks:
        if isinstance(callback, Probe):
            seen["probe"] = callback.found
        if isinstance(callback, HessianSpectrumCallback):
            seen["history"] = callback.history
            seen["lengths"] = lengths.found
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))
    weights = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in module.state_dict().items()
    }
    if trainer.is_global_zero:
        torch.save(weights, folder / "weights.pt")
    if dist.is_initialized():  # gloo's threads, left running, can abort a process as it ends
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
