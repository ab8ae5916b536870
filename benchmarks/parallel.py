"""Several processes against one: speed-up of a measurement, and bytes sent for a product.

``python benchmarks/parallel.py [--data-dir DIR] [--out FILE]`` prints two tables:

- LeNet under data parallelism: 1 process and 2 processes with one thread each make the same
  measurement, turn by turn; the speed-up is the ratio of their best wall times.
- A transformer, whole on every rank (DDP) and in shards (`fully_shard`): bytes that a rank sends
  for one product, counted, beside what docs/scaling.md predicts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from problems import GPT, lenet_on_mnist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hessian import hessian_spectrum
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.measure.budget import Budget
from lightning_hessian.operators.sharded import hessian_operator
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.probe.sharding.objective import objective_over

TURNS = 3
SAMPLES, NUM_BATCHES, PRODUCTS = 2000, 4, 100


class Sent(TorchDispatchMode):
    """Counts the bytes that a rank sends in collectives over ``world`` ranks (as a ring does)."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.share, self.bytes, self.calls = (world - 1) / world, 0.0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count it where it is a collective."""
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if name.startswith("_c10d_functional.all_gather"):
            self.add(result, 1)
        elif name.startswith("_c10d_functional.reduce_scatter"):
            self.add(args[0], 1)
        elif name.startswith("_c10d_functional.all_reduce"):
            self.add(args[0], 2)
        return result

    def add(self, whole: Tensor, times: int) -> None:
        """Count a collective on a tensor that all ranks know in the end."""
        self.bytes += times * self.share * whole.numel() * whole.element_size()
        self.calls += 1


def counted(sent: Sent) -> None:
    """Let the collectives of `Ranks` be counted too."""
    joined, scattered, summed = Ranks.all_gather, Ranks.reduce_scatter, Ranks.all_reduce

    def count_joined(self: Ranks, part: Tensor) -> Tensor:
        whole = joined(self, part)
        sent.add(whole, 1)
        return whole

    def count_scattered(self: Ranks, tensor: Tensor) -> Tensor:
        sent.add(tensor, 1)
        return scattered(self, tensor)

    def count_summed(self: Ranks, tensor: Tensor) -> Tensor:
        sent.add(tensor, 2)
        return summed(self, tensor)

    Ranks.all_gather, Ranks.reduce_scatter, Ranks.all_reduce = (  # type: ignore[method-assign]
        count_joined, count_scattered, count_summed,
    )  # fmt: skip


def joined_up(rank: int, world: int, folder: str) -> None:
    """Make this process a rank, with one thread."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)


def time_lenet(rank: int, world: int, folder: str, data_dir: str | None) -> None:
    """Time a measurement of LeNet; rank zero writes the seconds."""
    joined_up(rank, world, folder)
    problem = lenet_on_mnist(
        Path(data_dir) if data_dir else None, samples=SAMPLES, batches=NUM_BATCHES, epochs=0
    )
    seconds = []
    for _ in range(2):
        dist.barrier()
        start = time.perf_counter()
        spectrum = hessian_spectrum(
            problem.model,
            problem.loss_fn,
            problem.batches,
            num_eigenvalues=40,
            trace_probes=2,
            hvp="autograd",
            process_group=dist.group.WORLD,
            budget=Budget(products=PRODUCTS),
        )
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        found = {"seconds": min(seconds), "num_hvps": spectrum.num_hvps}
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def count_bytes(rank: int, world: int, folder: str, sharded: bool) -> None:
    """Count what a product of a small GPT sends; rank zero writes it."""
    joined_up(rank, world, folder)
    torch.manual_seed(0)
    model = GPT(context=32, depth=4, heads=4, width=64, tied=False).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(65, (world, 2, 33))
    batches = [(part[:, :-1], part[:, 1:].flatten()) for part in tokens]
    if sharded:
        mesh = init_device_mesh("cpu", (world,))
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=mesh)

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    space = ParameterSpace.select(model)
    objective = objective_over(dist.group.WORLD, model, loss_fn, batches, space)
    with objective.isolated():
        operator = hessian_operator(objective, "autograd")
        vector = torch.randn(operator.shard.length)
        sent = Sent(world)
        counted(sent)
        with sent:
            operator.matvec(vector)
    if rank == 0:
        Path(folder, "found.json").write_text(
            json.dumps({"bytes": sent.bytes, "calls": sent.calls, "parameters": size})
        )
    dist.destroy_process_group()


def on_ranks(work: Any, world: int, *arguments: Any) -> dict[str, Any]:
    """Run a function on several ranks; return what rank zero wrote."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (world, folder, *arguments), world)
        return json.loads(Path(folder, "found.json").read_text())


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="folder of the data sets; synthetic images without")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(TURNS):
        for world, seconds in times.items():
            seconds.append(on_ranks(time_lenet, world, options.data_dir)["seconds"])
    speed_up = min(times[1]) / min(times[2])
    print(
        f"LeNet, {SAMPLES} samples in {NUM_BATCHES} batches, {PRODUCTS} products, one thread each"
    )
    print(f"| 1 process | 2 processes | speed-up |\n|---|---|---|\n"
          f"| {min(times[1]):.2f} s | {min(times[2]):.2f} s | {speed_up:.2f} |\n")  # fmt: skip
    print("| layout | ranks | collectives | bytes sent a product | in 4 n bytes (W - 1) / W |")
    print("|---|---|---|---|---|")
    rows = []
    for name, sharded in (("DDP", False), ("fully_shard", True)):
        for world in (2, 4):
            found = on_ranks(count_bytes, world, sharded)
            unit = 4 * found["parameters"] * (world - 1) / world
            found |= {"layout": name, "ranks": world, "in_units": found["bytes"] / unit}
            rows.append(found)
            print(f"| {name} | {world} | {found['calls']} | {found['bytes']:,.0f} | "
                  f"{found['in_units']:.2f} |")  # fmt: skip
    if options.out:
        found = {"lenet_seconds": times, "speed_up": speed_up, "bytes": rows}
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
