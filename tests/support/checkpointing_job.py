"""Products with the Hessian of a network under `fully_shard` with checkpointed segments, two ranks.

Run as ``torchrun --nproc-per-node 2 checkpointing_job.py FILE``; the first rank writes JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_hessian.operators.sharded import hessian_operator
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.probe.sharding.objective import objective_over

ENGINES = ("auto", "autograd", "recompute", "finite_difference")
NUM_PRODUCTS = 4


class Net(nn.Module):
    """Three blocks with BatchNorm, which counts and averages in training mode."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2))
            for _ in range(3)
        )
        self.head = nn.Linear(4, 3)
        self.checkpointed = checkpointed
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two batches of ten."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(10, 4, generator=generator).double(), torch.arange(10) % 3) for _ in range(2)
    ]


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def products(module: nn.Module, engine: str) -> list[list[float]]:
    """Products with four vectors, whole."""
    space = ParameterSpace.select(module)
    objective = objective_over(None, module, loss_fn, batches(), space, mode="train", seed=3)
    vectors = torch.randn(NUM_PRODUCTS, space.size, generator=torch.Generator().manual_seed(2))
    found = []
    with objective.isolated():
        operator = hessian_operator(objective, engine)
        for vector in vectors.double():
            product = operator.matvec(operator.shard.take(vector))
            found.append(operator.shard.gather(product[None])[0].tolist())
    return found


def main() -> None:
    """Measure on all ranks; the first one writes."""
    dist.init_process_group("gloo")
    module = Net(checkpointed=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*module.blocks, module.head, module):
        fully_shard(part, mesh=mesh)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    found = {engine: products(module, engine) for engine in ENGINES}
    same = all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps({"found": found, "same": same}))
    dist.barrier()  # gloo's threads, left running, can abort a process as it ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
