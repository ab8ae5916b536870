"""The pieces of the benchmark: each returns a record, and keeps what it has should it be ended."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.measuring import forget, peak, seconds_of, wait
from gpu.networks import NAMES, Problem, loss_fn, network
from gpu.running import said
from lightning_hessian import BasisStorage, hessian_spectrum
from lightning_hessian.linear.memory import free_bytes
from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.operators.batched import BatchedProducts
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.solvers.basis import KrylovBasis
from lightning_hessian.solvers.lanczos import default_basis, lanczos

ENGINES = ("linearize", "autograd", "recompute", "compile")
CHUNKS = (4, 16)

Record = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where a piece runs, and where it keeps what it has.

    Attributes:
        device: The device under test.
        small: Whether everything is small, to see that it runs.
        keep: Told the record after every number.
    """

    device: torch.device
    small: bool
    keep: Callable[[Record], None]


def tried(record: Record, name: str, work: Callable[[], Any]) -> None:
    """Put what some work returns into a record, or why it could not be done."""
    try:
        record[name] = work()
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001 - one engine that fails does not end the piece
        record[name] = {"failed": said(error)}


def products(name: str, bench: Bench) -> Record:
    """Measure products of one network by every engine, over a gradient."""
    problem = network(name, bench.device, small=bench.small)
    record: Record = {"network": problem.title, "parameters": problem.size, "engines": {}}
    times: Record = {}
    record["gradient_seconds"] = times
    with sdpa_kernel(SDPBackend.MATH):
        for kind, gradient in gradients(problem).items():
            tried(times, kind, functools.partial(seconds_of, gradient, bench.device))
            bench.keep(record)
    for engine in ENGINES:
        forget(bench.device)
        work = functools.partial(of_engine, problem, engine, bench)
        tried(record["engines"], engine, work)
        bench.keep(record)
    if find_spec("curvlinops") is None:
        record["curvlinops"] = "not installed"
    else:
        tried(record, "curvlinops", lambda: by_curvlinops(problem, bench))
    return record


def gradients(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Return what computes the gradient, eagerly and compiled."""
    values = {n: p.detach().requires_grad_() for n, p in problem.model.named_parameters()}
    leaves = tuple(values.values())

    def loss(given: dict[str, Tensor]) -> Tensor:
        outputs = functional_call(problem.model, given, (problem.batch[0],))
        return torch.nn.functional.cross_entropy(outputs, problem.batch[1])

    compiled = torch.compile(loss)
    return {
        "eager": lambda: torch.autograd.grad(loss(values), leaves),
        "compiled": lambda: torch.autograd.grad(compiled(values), leaves),
    }


def of_engine(problem: Problem, engine: str, bench: Bench) -> Record:
    """Measure the products of one engine: building, one by one, and several at once."""
    device = bench.device
    space = ParameterSpace.select(problem.model)
    objective = Objective(problem.model, loss_fn, [problem.batch], space)
    with objective.isolated():
        start = time.perf_counter()
        operator = HessianOperator(objective, engine)
        wait(device)
        found: Record = {"build_seconds": time.perf_counter() - start}
        vectors = torch.randn(max(CHUNKS), operator.size, device=device, dtype=operator.dtype)
        found["seconds"] = seconds_of(lambda: operator.matvec(vectors[0]), device)
        found["peak_bytes"] = peak(device)
        if engine in ("linearize", "autograd"):
            for count in CHUNKS:
                made = BatchedProducts(space, lambda: 1, size=count)

                def several(made: Any = made, count: int = count) -> float:
                    product, rows = operator.products[0], vectors[:count]
                    seconds = seconds_of(lambda: made(product, rows), device)
                    if made.size != count:
                        raise RuntimeError("these products cannot be made at once")
                    return seconds / count

                tried(found, f"seconds_each_of_{count}", several)
    return found


def by_curvlinops(problem: Problem, bench: Bench) -> Record:
    """Measure curvlinops' products on the same network and batch."""
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        problem.model, torch.nn.CrossEntropyLoss(), list(problem.model.parameters()),
        [problem.batch], check_deterministic=False,
    )  # fmt: skip
    vector = torch.randn(problem.size, device=bench.device)
    with sdpa_kernel(SDPBackend.MATH):
        return {"seconds": seconds_of(lambda: operator @ vector, bench.device)}


def orthogonalisation(bench: Bench) -> Record:
    """Measure a Lanczos step without a product: seconds, bytes read and written, bandwidth."""
    device, size = bench.device, 10_000 if bench.small else 10_700_000
    record: Record = {"length": size, "rows": {}}
    for count in (10, 100) if bench.small else (10, 100, 400):
        forget(device)
        operator = Scaled(size, device)
        basis = KrylovBasis(count, operator)
        basis.rows.normal_().div_(size**0.5)  # nearly orthonormal, which costs nothing to make
        vector = torch.randn(size, device=device)
        seconds = seconds_of(
            functools.partial(orthogonalised, basis, vector, count),
            device,
        )
        # Two reads of the basis: coefficients, and their removal; twice where it is repeated.
        least = 2 * count * size * 4
        record["rows"][str(count)] = {
            "seconds": seconds, "bytes_at_least": least, "bytes_a_second": least / seconds,
        }  # fmt: skip
        bench.keep(record)
    return record


def orthogonalised(basis: KrylovBasis, vector: Tensor, count: int) -> float:
    """Return what is left of a copy of a vector beside the rows of a basis."""
    return basis.orthogonalize(vector.clone(), count)[1]


class Scaled:
    """A multiple of the identity and of nothing that costs time: an operator for the solver."""

    def __init__(self, size: int, device: torch.device) -> None:
        from lightning_hessian.linear.shards import Shard

        self.size, self.device, self.dtype = size, device, torch.float32
        self.shard = Shard.whole(size)
        self.scale = torch.linspace(1, 2, size, device=device)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product, of a diagonal matrix."""
        return self.scale * vector

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with rows."""
        return self.scale * vectors


def steps(bench: Bench) -> Record:
    """Measure whole Lanczos steps of nanoGPT, and those of an operator that costs nothing."""
    problem = network("nanogpt", bench.device, small=bench.small)
    count = 20 if bench.small else 100
    record: Record = {}
    space = ParameterSpace.select(problem.model)
    objective = Objective(problem.model, loss_fn, [problem.batch], space)
    with objective.isolated():
        operators: dict[str, SymmetricOperator] = {
            "nanoGPT, autograd": HessianOperator(objective, "autograd"),
            "a diagonal matrix": Scaled(space.size, bench.device),
        }
        for name, operator in operators.items():
            start = time.perf_counter()
            found = lanczos(
                operator, count // 4, tol=1e-12, max_products=count, max_basis=count, num_checks=0
            )
            wait(bench.device)
            seconds = time.perf_counter() - start
            record[name] = {"seconds_a_step": seconds / found.num_products}
            bench.keep(record)
    return record


def spectra(bench: Bench) -> Record:
    """Measure spectra of nanoGPT, from the start to the last eigenvalue."""
    problem = network("nanogpt", bench.device, small=bench.small)
    record: Record = {"parameters": problem.size, "by_count": {}}
    for count in (2, 5) if bench.small else (10, 100, 1000):
        forget(bench.device)

        def one(count: int = count) -> Record:
            start = time.perf_counter()
            found = hessian_spectrum(
                problem.model, loss_fn, [problem.batch], num_eigenvalues=count, trace_probes=0
            )
            wait(bench.device)
            return {
                "seconds": time.perf_counter() - start, "products": found.num_hvps,
                "converged": found.num_converged, "engine": found.engine,
                "peak_bytes": peak(bench.device),
            }  # fmt: skip

        tried(record["by_count"], str(count), one)
        bench.keep(record)
    return record


def largest(bench: Bench) -> Record:
    """Find how many eigenvalues of GPT-2 small the memory allows, and hold such a basis."""
    problem = network("gpt2", bench.device, small=bench.small)
    vector_bytes = 4 * problem.size
    room = free_bytes(bench.device) / 2
    fitting = min(int(room / vector_bytes) - 1, 20 if bench.small else 10**6)
    comfortable = max(0, (fitting - 40) // 4)
    record: Record = {
        "parameters": problem.size, "vectors": fitting, "most": fitting - 3,
        "without_tight_restarts": comfortable, "basis_of_that": default_basis(comfortable),
    }  # fmt: skip
    bench.keep(record)
    forget(bench.device)
    count = 2 if bench.small else 10

    def held() -> Record:
        memory = float(fitting * vector_bytes)
        start = time.perf_counter()
        found = hessian_spectrum(
            problem.model, loss_fn, [problem.batch], num_eigenvalues=count, trace_probes=0,
            basis=BasisStorage(memory=memory, tier="device"), hvp="recompute",
        )  # fmt: skip
        wait(bench.device)
        return {
            "count": count, "seconds": time.perf_counter() - start, "products": found.num_hvps,
            "peak_bytes": peak(bench.device),
        }  # fmt: skip

    tried(record, "a_spectrum", held)
    return record


def fit(bench: Bench) -> Record:
    """Measure what the callback adds to a fit, at the budget that it has by default."""
    import lightning as L
    from torch.utils.data import DataLoader, TensorDataset

    from gpu.fits import quiet
    from lightning_hessian import HessianSpectrumCallback

    problem = network("nanogpt", bench.device, small=bench.small)
    inputs, targets = problem.batch
    copies = 2 if bench.small else 16
    data = TensorDataset(
        inputs.cpu().repeat(copies, 1), targets.cpu().view_as(inputs).repeat(copies, 1)
    )

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network("nanogpt", bench.device, small=bench.small).model

        def training_step(self, batch: Any) -> Tensor:
            return loss_fn(self.model, (batch[0], batch[1].flatten()))

        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", self.training_step(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    record: Record = {}
    for name in ("without", "with"):
        callbacks = [HessianSpectrumCallback(progress=False)] if name == "with" else []

        def one(callbacks: list[Any] = callbacks) -> Record:
            forget(bench.device)
            with quiet():
                trainer = L.Trainer(
                    accelerator="gpu" if bench.device.type == "cuda" else "cpu", devices=1,
                    max_epochs=2 if bench.small else 20, logger=False, callbacks=callbacks,
                    enable_checkpointing=False, enable_progress_bar=False,
                    enable_model_summary=False,
                )  # fmt: skip
                loaders = (DataLoader(data, len(inputs)), DataLoader(data, len(inputs)))
                start = time.perf_counter()
                trainer.fit(Module(), *loaders)
            wait(bench.device)
            measured = len(callbacks[0].history) if callbacks else 0
            seconds = time.perf_counter() - start
            return {"seconds": seconds, "measured": measured, "peak_bytes": peak(bench.device)}

        tried(record, name, one)
        bench.keep(record)
    return record


def _products_of(name: str) -> Callable[[Bench], Record]:
    return lambda bench: products(name, bench)


PIECES: dict[str, Callable[[Bench], Record]] = {
    **{f"products-{name}": _products_of(name) for name in NAMES},
    "orthogonalisation": orthogonalisation,
    "steps": steps,
    "spectra": spectra,
    "largest": largest,
    "fit": fit,
}
"""What is measured, in this order."""
