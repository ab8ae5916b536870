"""torch's own FSDP class under gloo: Lightning's FSDPStrategy refuses CPUs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.job import Network, batches, loss_fn
from support.launching import leave
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.multiprocessing.spawn import spawn

from lightning_hessian import HessianSpectrum, block_structure, hessian_spectrum
from lightning_hessian.probe.sharding import fsdp1
from lightning_hessian.probe.sharding.objective import ShardedObjective

LAYOUTS = {
    2: [(shards, original) for shards in (False, True) for original in (True, False)],
    4: [(True, True)],
}
"""Whether in shards, and whether with the original parameters, by the number of ranks."""


class Tied(nn.Module):
    """A weight used twice, a bias that is frozen, and a layer that stays with the root."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
        self.inner[2].weight = self.inner[0].weight
        self.outer = nn.Linear(6, 4).double()
        self.outer.bias.requires_grad_(False)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss."""
        return nn.functional.cross_entropy(self.outer(self.inner(batch[0])), batch[1])


def called(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss that the module's forward returns."""
    return module(batch)


def _wrapped(module: nn.Module, name: str, original: bool) -> FullyShardedDataParallel:
    cpu = torch.device("cpu")
    options = {"use_orig_params": original, "device_id": cpu}
    inner = FullyShardedDataParallel(getattr(module, name), **options)
    setattr(module, name, inner)
    return FullyShardedDataParallel(module, **options)


def _stepped(wrapped: FullyShardedDataParallel) -> None:
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    wrapped(batches(1)[0]).backward()
    optimizer.step()  # the gradients stay where they are


def _state(wrapped: FullyShardedDataParallel) -> list[Tensor]:
    """Copies of what this rank holds of the parameters, and of their gradients."""
    state = [parameter.detach().clone() for parameter in wrapped.parameters()]
    return state + [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]


def _spectrum(module: nn.Module, group: object = None) -> HessianSpectrum:
    return hessian_spectrum(
        module, loss_fn, batches(), num_eigenvalues=5, tol=1e-7, process_group=group
    )


def _measured(wrapped: FullyShardedDataParallel, shards: bool) -> dict[str, Any]:
    """Measures; where parameters are to stay in shards, one rank's memory is full."""
    full = shards and dist.get_rank() == 1
    before, tree = _state(wrapped), [type(part) for part in wrapped.modules()]
    gathered = [0]

    def noted(objective: ShardedObjective, tensor: Tensor, *args: Any) -> None:
        gathered.append(tensor.numel())
        note(objective, tensor, *args)

    note = ShardedObjective._note
    with (
        patch.object(fsdp1, "free_bytes", lambda device: 0.0 if full else 1e12),
        patch.object(ShardedObjective, "_note", noted),
    ):
        spectrum = _spectrum(wrapped, dist.group.WORLD)
    after = _state(wrapped)
    return {
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "trace": spectrum.trace,
        "largest": max(gathered),
        "untouched": len(before) == len(after) and all(map(torch.equal, before, after)),
        "tree": [type(part) for part in wrapped.modules()] == tree,
    }


def _rank(rank: int, folder: str, world: int) -> None:
    """Measures flat and original parameters, whole and in shards, before and after a step."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    for shards, original in LAYOUTS[world]:
        wrapped = _wrapped(Network().eval(), "layers", original)
        found = [_measured(wrapped, shards)]
        _stepped(wrapped)
        found.append(_measured(wrapped, shards))
        Path(folder, f"{shards}{original}{rank}.json").write_text(json.dumps(found))
    tied = _wrapped(Tied(), "inner", True)
    with patch.object(fsdp1, "free_bytes", lambda device: 0.0):
        half = _wrapped(Tied().bfloat16(), "inner", True)
        found = [_of_tied(tied), _of_tied(tied, "outer.*"), _of_tied(half, "outer.*")]
        cut = _blocks(wrapped, dist.group.WORLD)
    Path(folder, f"tied{rank}.json").write_text(json.dumps([*found, cut]))
    leave()


def _of_tied(module: nn.Module, parameters: str | None = None) -> list[float]:
    half = module.outer.weight.dtype == torch.bfloat16
    given = [(x.float() if half else x, y) for x, y in batches()]
    spectrum = hessian_spectrum(
        module, called, given, num_eigenvalues=3, parameters=parameters, trace_probes=0,
        tol=1e-4 if half else 1e-7,
    )  # fmt: skip
    return spectrum.eigenvalues.tolist()


def _blocks(module: nn.Module, group: object = None) -> list[list[float]]:
    cut = block_structure(
        module, loss_fn, batches(), blocks="layer", exact=False, process_group=group
    )
    return cut.frobenius.tolist()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_module_under_fsdp1_is_measured_exactly_whole_and_in_shards(tmp_path, world):
    alone = Network().eval()
    expected = [_spectrum(alone)]
    alone(batches(1)[0]).backward()
    torch.optim.SGD(alone.parameters(), lr=0.1).step()
    expected.append(_spectrum(alone))
    tied = [_of_tied(Tied()), _of_tied(Tied(), "outer.*"), _of_tied(Tied().bfloat16(), "outer.*")]
    spawn(_rank, (str(tmp_path), world), world)
    for shards, original in LAYOUTS[world]:
        for rank in range(world):
            found = json.loads((tmp_path / f"{shards}{original}{rank}.json").read_text())
            for seen, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(seen["eigenvalues"], wanted.eigenvalues, rtol=1e-5)
                assert seen["trace"] == pytest.approx(wanted.trace, rel=1e-5)
                assert seen["untouched"]
                assert seen["tree"]
                # Of 91 parameters, 83 and what fills up the shards belong to one unit.
                assert 83 <= seen["largest"] < 91 if shards else seen["largest"] == 0
    for rank in range(world):
        *found, cut = json.loads((tmp_path / f"tied{rank}.json").read_text())
        np.testing.assert_allclose(found, tied, rtol=1e-5)
        np.testing.assert_allclose(cut, _blocks(alone), rtol=1e-5)
