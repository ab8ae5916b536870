"""One process of a check of ranks: ``job.py KIND DEVICE_TYPE FILE``, started by torchrun."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from support.references import dense_hessian
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_hessian import HessianSpectrumCallback, hessian_spectrum

COUNT = 4


class Network(L.LightningModule):
    """A tanh network that training leaves as it is, so that what is measured is known."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))

    def configure_model(self) -> None:
        """Shard under the model-parallel strategy."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and not hasattr(self.layers[0], "reshard"):
            mesh = strategy.device_mesh["data_parallel"]
            for part in (self.layers[0], self.layers[2]):
                fully_shard(part, mesh=mesh)

    def forward(self, batch: Any) -> Tensor:
        """Return the loss."""
        return self.loss(batch)

    def loss(self, batch: Any) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def training_step(self, batch: Any) -> Tensor:
        """Return the loss."""
        return self.loss(batch)

    def validation_step(self, batch: Any) -> None:
        """Log the loss."""
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return steps of length zero."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return five batches, the last of them ragged."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(36, 6, generator=generator)
    targets = (inputs[:, :2] > 0).long() @ torch.tensor([1, 2])
    return list(zip(inputs.split(8), targets.split(8), strict=True))


def loss_fn(module: Any, batch: Any) -> Tensor:
    """Return the loss, as the front door wants it."""
    found: Tensor = module.loss(batch)
    return found


def expected() -> list[float]:
    """Return the largest eigenvalues, from the dense Hessian on the CPU in float64."""
    whole = tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))
    matrix = dense_hessian(Network(), loss_fn, whole)
    values: list[float] = torch.linalg.eigvalsh(matrix).flip(0)[:COUNT].tolist()
    return values


def by_front_door(kind: str, device: torch.device) -> list[float]:
    """Return the eigenvalues that all processes find together."""
    module = copy.deepcopy(Network()).to(device)
    group = dist.group.WORLD
    if kind == "fully_shard":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for part in (module.layers[0], module.layers[2]):
            fully_shard(part, mesh=mesh)
        group = None
    found = hessian_spectrum(
        module, loss_fn, batches(), num_eigenvalues=COUNT, tol=1e-5, process_group=group
    )
    values: list[float] = found.eigenvalues.tolist()
    return values


def in_a_fit(kind: str, device: torch.device) -> list[float]:
    """Return the eigenvalues that the callback finds in a fit."""
    world = int(os.environ["WORLD_SIZE"])
    strategies: dict[str, Any] = {
        "lightning ddp": DDPStrategy,
        "lightning fsdp2": lambda: ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1
        ),
        "lightning fsdp": lambda: FSDPStrategy(auto_wrap_policy={nn.Linear}),
    }
    probe = batches()
    callback = HessianSpectrumCallback(
        num_eigenvalues=COUNT, tol=1e-5, data=probe, num_batches=len(probe), time_budget=None,
        blocks=None, figures=None, progress=False, on_error="raise",
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=world, max_epochs=1,
        strategy=strategies[kind](), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    loader: DataLoader[Any] = DataLoader(
        [(x, y) for inputs, targets in probe for x, y in zip(inputs, targets, strict=True)],  # type: ignore[arg-type]
        batch_size=6,
    )
    trainer.fit(Network(), loader, loader)
    assert callback.last_spectrum is not None
    values: list[float] = callback.last_spectrum.eigenvalues.tolist()
    return values


def main(kind: str, device_type: str, file: Path) -> None:
    """Measure, and write what rank zero has found."""
    device = torch.device(device_type)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if kind.startswith("lightning"):
        found = in_a_fit(kind, device)
    else:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        found = by_front_door(kind, device)
    if dist.get_rank() == 0:
        record = {"eigenvalues": found, "expected": expected(), "backend": dist.get_backend()}
        file.write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
