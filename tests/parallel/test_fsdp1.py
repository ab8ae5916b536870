"""torch's own FSDP class under gloo: Lightning's FSDPStrategy refuses CPUs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parallel.job import Network, batches, loss_fn, measured
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.multiprocessing.spawn import spawn

from lightning_hessian import hessian_spectrum


def _rank(rank: int, folder: str, world: int) -> None:
    """Measures with flat and with original parameters; one step of training before and after."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    cpu = torch.device("cpu")
    for original in (True, False):
        module = Network()
        module.layers[0] = FullyShardedDataParallel(
            module.layers[0], use_orig_params=original, device_id=cpu
        )
        wrapped = FullyShardedDataParallel(module, use_orig_params=original, device_id=cpu)
        before = [parameter.detach().clone() for parameter in wrapped.parameters()]
        tree = [type(part) for part in wrapped.modules()]
        spectrum = hessian_spectrum(
            wrapped, loss_fn, batches(), num_eigenvalues=8, tol=1e-7,
            process_group=dist.group.WORLD,
        )  # fmt: skip
        found = {
            "eigenvalues": spectrum.eigenvalues.tolist(),
            "trace": spectrum.trace,
            "untouched": all(map(torch.equal, before, wrapped.parameters())),
            "tree": [type(part) for part in wrapped.modules()] == tree,
            "trains": bool(torch.isfinite(wrapped(batches(1)[0]))),
        }
        Path(folder, f"{original}{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_module_under_fsdp1_is_measured_exactly(tmp_path):
    alone = measured(Network(), 6)
    spawn(_rank, (str(tmp_path), 2), 2)
    for original in (True, False):
        for rank in range(2):
            found = json.loads((tmp_path / f"{original}{rank}.json").read_text())
            np.testing.assert_allclose(found["eigenvalues"], alone["eigenvalues"], rtol=1e-5)
            assert found["trace"] == pytest.approx(alone["trace"], rel=1e-5)
            assert found["untouched"]
            assert found["tree"]
            assert found["trains"]
