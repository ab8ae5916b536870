"""The noise scale of gradients whose inner products are known, pass by pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hessian.results import NoiseScale
from lightning_hessian.statistics.noise_scale import LEAST, noise_scale


def noise_of_passes(gram: Tensor, per_pass: int, sizes: Sequence[int]) -> NoiseScale:
    """Return the noise scale, from pairs of mini-batches that have no sample in common.

    Only those of one pass are sure to have none. Of several passes the whole ones are taken.

    Args:
        gram: ``g_s . g_t``, float64 [T, T].
        per_pass: How many of the T mini-batches make a pass over the data.
        sizes: How many samples each mini-batch has.
    """
    count = min(per_pass, len(gram))
    if count < LEAST:
        return NoiseScale.absent(
            f"a pass over the data has {count} mini-batches, and {LEAST} are needed. Lower "
            "batch_size, or raise num_batches."
        )
    starts = range(0, len(gram) - count + 1, count)
    blocks = [gram[start : start + count, start : start + count] for start in starts]
    squares = torch.stack([block.diagonal() for block in blocks]).cpu().numpy()
    sums = torch.stack([block.sum(dim=1) for block in blocks]).cpu().numpy()
    return noise_scale(squares, sums, len(sizes) / sum(1 / size for size in sizes))
