"""Views of the Hessian on some parameters, by two ranks that share batches, or parameters too.

Run as ``torchrun --nproc-per-node 2 view_job.py FILE``; the first rank writes JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_hessian.operators.gauss_newton import gauss_newton_operator
from lightning_hessian.operators.sharded import hessian_operator
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.probe.sharding.objective import objective_over

ENGINES = {
    "shared batches": ("linearize", "autograd", "recompute", "finite_difference"),
    "sharded parameters": ("autograd", "recompute", "finite_difference"),
}
GAUSS_NEWTON_ENGINES = ("auto", "recompute")
VIEWS = {
    "late": ["head.weight", "head.bias"],
    "spread": ["first.weight", "head.bias"],
    "uneven": ["second.bias"],  # three numbers for two ranks
}
SIZES = (7, 5, 2)  # three batches for two ranks


class Net(nn.Module):
    """Three layers, all of them small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def samples() -> tuple[Tensor, Tensor]:
    """Inputs [14, 4] in three classes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(SIZES), 4, generator=generator).double()
    return inputs, torch.arange(len(inputs)) % 3


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def matrix_of(operator: Any) -> list[list[float]]:
    """The whole matrix of an operator, by its products with all unit vectors."""
    columns = []
    for vector in torch.eye(operator.size, dtype=operator.dtype):
        product = operator.matvec(operator.shard.take(vector))
        columns.append(operator.shard.gather(product[None])[0].tolist())
    return columns


def views(
    module: nn.Module, engine: str, group: Any, make: Callable[..., Any] = hessian_operator
) -> dict[str, Any]:
    """What each view finds, and a view of a view where there is one; what was counted."""
    batches = list(zip(*(part.split(SIZES) for part in samples()), strict=True))
    space = ParameterSpace.select(module)
    objective = objective_over(group, module, loss_fn, batches, space)
    found: dict[str, Any] = {}
    with objective.isolated():
        whole = make(objective, engine)
        for name, names in VIEWS.items():
            view = whole.restricted(names)
            found[name] = matrix_of(view)
        if group is not None:
            found["nested"] = matrix_of(
                whole.restricted(_but_first(space.names)).restricted(VIEWS["late"])
            )
        found["num_products"] = whole.num_products
        found["again"] = matrix_of(whole.restricted(VIEWS["late"]))
    return found


def _but_first(names: Sequence[str]) -> list[str]:
    return list(names[1:])


def main() -> None:
    """Measure on all ranks; the first one writes."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"shared batches": {}, "sharded parameters": {}}
    found["gauss_newton"] = {"shared batches": {}, "sharded parameters": {}}
    for engine in ENGINES["shared batches"]:
        found["shared batches"][engine] = views(Net(), engine, dist.group.WORLD)
    for engine in GAUSS_NEWTON_ENGINES:
        seen_here = views(Net(), engine, dist.group.WORLD, gauss_newton_operator)
        found["gauss_newton"]["shared batches"][engine] = seen_here
    module = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (module.first, module.second, module.head, module):
        fully_shard(part, mesh=mesh)
    for engine in ENGINES["sharded parameters"]:
        found["sharded parameters"][engine] = views(module, engine, None)
    for engine in GAUSS_NEWTON_ENGINES:
        seen_here = views(module, engine, None, gauss_newton_operator)
        found["gauss_newton"]["sharded parameters"][engine] = seen_here
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, found)
    if dist.get_rank() == 0:
        same = all(other == seen[0] for other in seen)
        Path(sys.argv[1]).write_text(json.dumps({"found": found, "same": same}))
    dist.barrier()  # gloo's threads, left running, can abort a process as it ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
