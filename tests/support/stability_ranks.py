"""One rank of two: compares the stability of a run with that of one process.

Run as ``python stability_ranks.py KIND RANK WORLD STORE``, with KIND ``"data"`` or ``"fsdp2"``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hessian import Session, StabilityInstrument, Training
from support.gradient_ranks import batches, distributed, loss_fn, network
from support.launching import leave

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}


def local(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter."""
    held = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return held.detach().clone()


def trained(module: nn.Module, name: str) -> Training:
    """Return the state of training after eight steps on all batches, the same on all ranks."""
    kind, options = OPTIMIZERS[name]
    optimizer = kind(module.parameters(), **options)
    before: dict[str, Tensor] = {}
    for _ in range(8):
        before = {key: local(value) for key, value in module.named_parameters()}
        optimizer.zero_grad()
        sum(loss_fn(module, batch) for batch in batches()).backward()
        optimizer.step()
    update = {key: local(value) - before[key] for key, value in module.named_parameters()}
    return Training((optimizer,), update)


def stability(module: nn.Module, training: Training, group: Any) -> dict[str, float]:
    """Return the numbers of the instrument, its eigenvalues exact."""
    instrument = StabilityInstrument(tol=1e-9, max_products=60)
    with Session(
        module, loss_fn, batches(), training=training, process_group=group
    ) as session:  # fmt: skip
        return dict(instrument.measure(session, None).scalars())


def one_sided(kind: str, rank: int, world: int) -> None:
    """See ranks take the same products where one lacks what the other has."""
    module = distributed(network(), kind, world)
    training = trained(module, "adamw")
    group = dist.group.WORLD if kind == "data" else None
    instrument = StabilityInstrument(tol=1e-9, max_products=60)

    def measured(given: Training) -> dict[str, float]:
        with Session(
            module, loss_fn, batches(), training=given, process_group=group
        ) as session:  # fmt: skip
            return dict(instrument.measure(session, None).scalars())

    first = measured(training)
    if rank == 1:  # as after a failure of this rank alone
        instrument._forget()
    lacking = Training(training.optimizers, training.update if rank == 0 else None)
    again = measured(lacking)
    assert "update_curvature" in first
    assert "update_curvature" not in again
    assert "drift" not in again  # rank 0 has forgotten, too
    assert abs(again["ratio"] - first["ratio"]) <= 1e-6 * first["ratio"]


def main(kind: str, rank: int, world: int, store: str) -> None:
    """Compare."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    for name in OPTIMIZERS:
        alone, module = network(), distributed(network(), kind, world)
        expected = stability(alone, trained(alone, name), None)
        group = dist.group.WORLD if kind == "data" else None
        found = stability(module, trained(module, name), group)
        assert set(found) == set(expected) >= {"ratio", "update_curvature", "gradient_share"}
        for key, value in expected.items():
            if key.endswith("residual") or key == "num_hvps":
                continue
            assert abs(found[key] - value) <= 1e-5 * abs(value) + 1e-12, (name, key, found, value)
    one_sided(kind, rank, world)
    print("alike")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
