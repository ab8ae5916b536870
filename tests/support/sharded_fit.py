"""A fit whose parameters lie in shards on two ranks, with a checkpoint after each epoch.

Run as ``python -m support.sharded_fit FOLDER``; Lightning starts the second rank.
"""

from __future__ import annotations

import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from support import trained


class Sharded(trained.Net):
    """The network of the tests, each layer in shards."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for part in (self.body, self.head):
            fully_shard(part, mesh=mesh)


def main() -> None:
    torch.manual_seed(0)
    keep = ModelCheckpoint(sys.argv[1], save_top_k=-1, filename="{epoch}", save_last=True)
    L.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, logger=False, callbacks=[keep],
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(Sharded(width=4), datamodule=trained.Data())  # fmt: skip


if __name__ == "__main__":
    main()
