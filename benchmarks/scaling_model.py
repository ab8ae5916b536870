"""The cost model of docs/scaling.md, as the tables that stand there: ``python scaling_model.py``.

All figures are computed, none is measured; docs/scaling.md says which were checked.
"""

from __future__ import annotations

from dataclasses import dataclass

DEVICE_BYTES = 80e9
DEVICE_FLOPS = 200e12  # of 989e12 in bfloat16; products run in float32 with TF32 at best
DEVICE_BANDWIDTH = 3e12
LINK_BANDWIDTH = 100e9  # between devices, bytes a second each way
HOST_BYTES = 200e9  # main memory for each device
HOST_BANDWIDTH = 25e9  # between it and the device
TOKENS = 65_536  # in all probe batches

SIZES = {"11M": 11e6, "124M": 124e6, "1.3B": 1.3e9, "7B": 7e9, "70B": 70e9}
RANKS = (1, 8, 64, 512)


@dataclass(frozen=True)
class Cost:
    """What a step of the Lanczos iteration costs a rank.

    Attributes:
        fixed: Bytes beside the basis: weights, vectors on the way, none of the activations.
        vector: Bytes of one basis vector.
        sent: Bytes sent for one step.
        flops: Of the product.
        seconds: Product, sending and orthogonalising a basis of ``num_vectors``, one after the
            other.
    """

    fixed: float
    vector: float
    sent: float
    flops: float
    seconds: float


def data_parallel(n: float, ranks: int, num_vectors: int) -> Cost:
    """Whole parameters on every rank, vectors in shards."""
    # The weights; the vector whole, its product, and what is sent and received of them.
    fixed = 4 * n * (1 + 4) + 8 * 4 * n / ranks
    sent = 2 * 4 * n * (ranks - 1) / ranks
    return _cost(n, ranks, num_vectors, fixed, sent)


def sharded(n: float, ranks: int, num_vectors: int, unit_share: float = 1 / 32) -> Cost:
    """Parameters under ``fully_shard``; one batch on each rank."""
    fixed = 4 * n / ranks * (1 + 8) + 3 * 4 * n * unit_share
    sent = 4 * 4 * n * (ranks - 1) / ranks
    return _cost(n, ranks, num_vectors, fixed, sent)


def _cost(n: float, ranks: int, num_vectors: int, fixed: float, sent: float) -> Cost:
    flops = 12 * n * TOKENS / ranks
    vector = 4 * n / ranks
    orthogonalising = 2 * num_vectors * vector / DEVICE_BANDWIDTH
    seconds = flops / DEVICE_FLOPS + sent / LINK_BANDWIDTH + orthogonalising
    return Cost(fixed, vector, sent, flops, seconds)


def fitting(cost: Cost, share: float = 0.5) -> int:
    """Return how many basis vectors fit a device, which keeps a share for activations."""
    return max(0, int((DEVICE_BYTES * share - cost.fixed) / cost.vector))


def wanted_eigenvalues(capacity: int) -> int:
    """Return the K of the default basis, 4 K + 40 vectors."""
    return max(0, (capacity - 40) // 4)


def main() -> None:
    """Print the table."""
    print("| model | devices | layout | fixed | a vector | sent a step | K on the device | "
          "seconds a step | K in main memory | seconds a step |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, n in SIZES.items():
        for ranks in RANKS:
            models = {"whole": data_parallel, "sharded": sharded}
            for layout, model in models.items():
                bare = model(n, ranks, 0)
                if bare.fixed > DEVICE_BYTES / 2 or (ranks == 1 and layout == "sharded"):
                    continue
                here = min(_MOST, fitting(bare))
                there = min(_MOST, int(HOST_BYTES / bare.vector))
                streamed = bare.seconds + there * bare.vector / HOST_BANDWIDTH
                print(
                    f"| {name} | {ranks} | {layout} | {_bytes(bare.fixed)} | "
                    f"{_bytes(bare.vector)} | {_bytes(bare.sent)} | {_eigenvalues(here)} | "
                    f"{model(n, ranks, here).seconds:.2g} | {_eigenvalues(there)} | "
                    f"{streamed:.2g} |"
                )


_MOST = 4040  # the basis of K = 1000


def _eigenvalues(capacity: int) -> str:
    found = wanted_eigenvalues(capacity)
    return str(found) if found >= 1 else "-"


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


if __name__ == "__main__":
    main()
