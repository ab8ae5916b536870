"""One rank of a session over several: compares its gradient and its loss with those of one process.

Run as ``python gradient_ranks.py KIND RANK WORLD STORE``, with KIND of `KINDS`.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hessian import Session
from support.launching import leave

KINDS = ("data", "fsdp2", "fsdp1", "tensor")


def network() -> nn.Module:
    """Return the same network on every rank."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return three batches, the last of which is ragged."""
    torch.manual_seed(2)
    inputs, targets = torch.randn(11, 4, dtype=torch.float64), torch.randint(3, (11,))
    return list(zip(inputs.split(4), targets.split(4), strict=True))


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean loss."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def distributed(module: nn.Module, kind: str, world: int) -> nn.Module:
    """Return the module as the ranks hold it."""
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for part in (module[0], module[2], module):
            fully_shard(part, mesh=mesh)
    if kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(module, device_id=torch.device("cpu"))
    if kind == "tensor":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return parallelize_module(module, init_device_mesh("cpu", (world,)), plan)
    return module


def main(kind: str, rank: int, world: int, store: str) -> None:
    """Compare."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    alone = network()
    with Session(alone, loss_fn, batches()) as session:
        gradient = session.gradient()
        step = 0.1 * torch.linspace(-1, 1, len(gradient), dtype=torch.float64)
        loss, curved = session.loss_at(step), session.operator().matvec(gradient)
    module = distributed(network(), kind, world)
    group = dist.group.WORLD if kind in ("data", "fsdp1") else None
    with Session(module, loss_fn, batches(), process_group=group) as session:
        shard = session.shard
        found = session.gradient()
        assert found.shape == (shard.length,)
        assert torch.allclose(shard.gather(found), gradient, rtol=1e-10, atol=1e-14)
        assert abs(session.loss_at(shard.take(step)) - loss) < 1e-12 * abs(loss)
        product = session.operator().matvec(found)
        assert torch.allclose(shard.gather(product), curved, rtol=1e-9, atol=1e-12)
        norm = float(shard.norm(found))
        assert abs(norm - float(gradient.norm())) < 1e-12
    print("alike")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
