"""The quantities of the target table: each function measures one, and returns what it found."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import NETWORKS
from oracle import agreement
from peers import (
    PEERS,
    Curvlinops,
    HessianEigenthings,
    Ours,
    PyHessian,
    installed,
    twice_differentiable,
)
from problems import Problem, lenet_on_mnist, nanogpt, nanogpt_last_layer
from timing import PeakMemory, Times, in_turn, once
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hessian import fit_power_law, hessian_spectrum
from lightning_hessian.solvers.lanczos import default_basis, lanczos
from lightning_hessian.solvers.storage import BasisStorage

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_PEER_NAMES = {peer.name for peer in PEERS}
STEPS = 400
LARGEST = 1000


@dataclass(frozen=True)
class Row:
    """One line of the target table.

    Attributes:
        quantity: What was measured.
        value: What came out.
        target: What it should be, or None; met at most this, or at least where ``at_least``.
        unit: Written behind the value.
        note: What else to know.
    """

    quantity: str
    value: float
    target: float | None = None
    at_least: bool = False
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None where there is none."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass
class Finding:
    """What one piece of the benchmark found: lines, tables beside them, and numbers for JSON."""

    rows: list[Row] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def plain_gradient(problem: Problem) -> Callable[[], Any]:
    """Return the work that everything is compared with: loss and gradient, as in training.

    Attention may use its fused kernels, which products cannot.
    """

    def work() -> None:
        with sdpa_kernel(_KERNELS):
            for batch in problem.batches:
                torch.autograd.grad(problem.loss_fn(problem.model, batch), problem.parameters)

    return work


def products(problem: Problem, rounds: int, *, skip: tuple[type, ...] = ()) -> tuple[Times, str]:
    """Return the times of a gradient and of every library's product, and a line of a table."""
    torch.manual_seed(1)
    vector = torch.randn(problem.size)
    works: dict[str, Callable[[], Any]] = {"gradient": plain_gradient(problem)}
    peers = [peer(problem) for peer in installed() if peer not in skip]
    for peer in peers:
        with twice_differentiable():
            product = peer.start()
        work = _in_math(product, vector)
        try:
            work()
        except NotImplementedError as error:
            print(f"skipped: {peer.name} on {problem.name}, {error}", flush=True)
        else:
            works[peer.name] = work
    ours = Ours(problem)
    building, product = once(ours.start)
    works[ours.name] = lambda: product(vector)
    try:
        times = in_turn(works, rounds)
    finally:
        ours.stop()
        for peer in peers:
            peer.stop()
    names = ["lightning_hessian", "PyHessian", "hessian-eigenthings", "curvlinops + SciPy"]
    cells = [f"{times.ratio(n, 'gradient'):.2f}" if n in works else "-" for n in names]
    line = (
        f"| {problem.name} | {problem.size:,} | {1000 * times.median('gradient'):.0f} ms | "
        + " | ".join(cells)
        + f" | {building:.1f} s |"
    )
    return times, line


def _in_math(product: Callable[[Tensor], Any], vector: Tensor) -> Callable[[], Any]:
    def work() -> None:
        with twice_differentiable():
            product(vector)

    return work


PRODUCT_HEAD = (
    "| problem | n | gradient | lightning_hessian | PyHessian | hessian-eigenthings | curvlinops | "
    "building ours |\n|---|---|---|---|---|---|---|---|"
)


def hvp_lenet(folder: Path | None) -> Finding:
    """Products of LeNet, 1000 and 6000 samples in one batch."""
    found = Finding()
    for samples, rounds in ((1000, 20), (6000, 5)):
        times, line = products(lenet_on_mnist(folder, samples=samples), rounds)
        found.tables.append(line)
        found.numbers[f"{samples} samples"] = times.record("gradient")
        ratio = times.ratio(Ours.name, "gradient")
        target = 1.3 if samples == 1000 else None
        found.rows.append(Row(f"HVP over gradient, LeNet, {samples:,} samples", ratio, target))
    return found


def hvp_nanogpt(folder: Path | None) -> Finding:
    """Products of nanoGPT."""
    times, line = products(nanogpt(folder), 7)
    ratio = times.ratio(Ours.name, "gradient")
    row = Row("HVP over gradient, nanoGPT", ratio, 2.1, note="floor 2.0")
    return Finding([row], [line], times.record("gradient"))


def hvp_last_layer(folder: Path | None) -> Finding:
    """Products of the last layer of nanoGPT, in gradients of the last layer."""
    times, line = products(nanogpt_last_layer(folder), 7)
    ratio = times.ratio(Ours.name, "gradient")
    note = "its gradient runs the whole network forward; a product does not"
    return Finding(
        [Row("HVP over gradient, last layer of nanoGPT", ratio, note=note)],
        [line],
        times.record("gradient"),
    )


def six_batches(folder: Path | None) -> Finding:
    """Products of LeNet with the data in six batches, which others rebuild each time."""
    times, line = products(lenet_on_mnist(folder, samples=6000, batches=6), 4)
    found = Finding([], [line], times.record("gradient"))
    for name, target in ((PyHessian.name, 3.0), (Curvlinops.name, 1.4)):
        if name in times.seconds:
            row = Row(f"6 batches: {name}'s HVP time over ours", times.ratio(name, Ours.name),
                      target, at_least=True)  # fmt: skip
            found.rows.append(row)
    return found


def hvp_networks(folder: Path | None) -> Finding:
    """Products of five kinds of networks, the fastest peer's time over ours."""
    found = Finding()
    for name, target in (
        ("lenet", 2.0), ("mlp", 1.7), ("group norm", 1.15), ("batch norm", 1.3), ("gpt", 1.45)
    ):  # fmt: skip
        problem = NETWORKS[name](folder)
        times, line = products(problem, 7)
        found.tables.append(line)
        found.numbers[name] = times.record("gradient")
        rivals = {n: times.ratio(n, Ours.name) for n in times.seconds if n in _PEER_NAMES}
        if rivals:
            fastest = min(rivals, key=lambda n: rivals[n])
            row = Row(f"{problem.name}: fastest peer's HVP time over ours", rivals[fastest],
                      target, at_least=True, note=fastest)  # fmt: skip
            found.rows.append(row)
    return found


def top_ten(folder: Path | None) -> Finding:
    """Ten eigenvalues to 1e-3, from nothing to numbers."""
    problem = lenet_on_mnist(folder)
    precise = hessian_spectrum(
        problem.model, problem.loss_fn, problem.batches, num_eigenvalues=10, tol=1e-6,
        trace_probes=0,
    ).eigenvalues  # fmt: skip
    peers = [peer(problem) for peer in installed()]
    ours = Ours(problem)
    product = ours.start()
    settings: dict[str, dict[str, Any]] = {}
    for peer in peers:
        if isinstance(peer, HessianEigenthings):
            settings[peer.name] = {"steps": peer.steps_for(10, 1e-3, product)}
    ours.stop()
    load = os.getloadavg()[0]
    found = Finding()
    seconds: dict[str, float] = {}
    for library in (ours, *peers, ours):  # ours at both ends
        with twice_differentiable():
            taken, values = once(lambda p=library: p.top(10, 1e-3, **settings.get(p.name, {})))
        seconds[library.name] = min(taken, seconds.get(library.name, math.inf))
        error = float(np.abs(values / precise - 1).max())
        found.numbers[library.name] = {
            "seconds": taken,
            "largest_relative_error": error,
            "num_products": library.num_products,
            "settings": library.top_settings,
        }
        found.tables.append(
            f"| {library.name} | {library.top_settings} | {taken:.1f} s | "
            f"{library.num_products or 'not told'} | {error:.0e} |"
        )
    found.numbers["load"] = (load, os.getloadavg()[0])
    rivals = {n: s for n, s in seconds.items() if n != ours.name}
    if rivals:
        fastest = min(rivals, key=lambda n: rivals[n])
        ratio = rivals[fastest] / seconds[ours.name]
        name = "top-10 to 1e-3, LeNet: fastest peer's time over ours"
        found.rows.append(Row(name, ratio, 2.0, at_least=True, note=fastest))
    return found


TOP_HEAD = "| library | call | time | products | largest relative error |\n|---|---|---|---|---|"


def long_lanczos(folder: Path | None) -> Finding:
    """Check a Lanczos run of 400 steps: against its own products, and against the peers' runs."""
    problem = lenet_on_mnist(folder)
    ours = Ours(problem)
    building, product = once(ours.start)
    vector = torch.randn(problem.size)

    def bare() -> None:
        for _ in range(STEPS // 4):
            product(vector)

    load = os.getloadavg()[0]
    product(vector)
    bare_seconds = run_seconds = 0.0
    runs = []
    for _ in range(2):  # products before and after each run
        before = once(bare)[0]
        run = once(lambda: ours.lanczos(STEPS))[0]
        after = once(bare)[0]
        runs.append(run / (2 * (before + after)))
        bare_seconds, run_seconds = bare_seconds + before + after, run_seconds + run
    ours.stop()
    found = Finding([Row(f"Lanczos run, m = {STEPS}, over {STEPS} bare HVPs", min(runs), 1.15)])
    seconds = {ours.name: run_seconds / 2 + building}
    for peer in (peer(problem) for peer in installed()):
        with twice_differentiable():
            seconds[peer.name] = once(lambda p=peer: (p.start(), p.lanczos(STEPS)))[0]
        peer.stop()
        seconds[peer.name] *= STEPS / peer.num_products
    found.numbers = {
        "seconds": seconds,
        "building": building,
        "run_over_bare_products": runs,
        "load": (load, os.getloadavg()[0]),
    }
    found.tables = [f"| {name} | {value:.1f} s |" for name, value in seconds.items()]
    rivals = {n: s for n, s in seconds.items() if n != ours.name}
    if rivals:
        fastest = min(rivals, key=lambda n: rivals[n])
        row = Row(f"m = {STEPS} Lanczos, LeNet: fastest peer's time over ours",
                  rivals[fastest] / seconds[ours.name], 1.7, at_least=True,
                  note=f"{fastest}; building the operator included")  # fmt: skip
        found.rows.append(row)
    return found


LANCZOS_HEAD = f"| library | {STEPS} Lanczos steps |\n|---|---|"


def top_thousand(folder: Path | None) -> Finding:
    """Find the thousand largest eigenvalues of LeNet, all converged; time, products and memory.

    In float32 too, whose rounding hides what lies too far below the largest.
    """
    found = Finding()
    for name in ("float32", "float64"):
        problem = lenet_on_mnist(folder).to(getattr(torch, name))
        ours = Ours(problem)
        building, product = once(ours.start)
        vector = torch.randn(problem.size, dtype=getattr(torch, name))
        product(vector)
        budget = int(default_basis(LARGEST) * problem.size * vector.element_size() * 1.6)
        load = os.getloadavg()[0]
        memory = PeakMemory()
        seconds, pairs = once(
            lambda o=ours, b=budget: lanczos(
                o.operator, LARGEST, tol=1e-3, storage=BasisStorage(memory=b)
            )
        )
        grown = memory.grown()
        ours.stop()
        converged = int(pairs.converged.sum())
        exact = name == "float64"
        found.rows.append(
            Row(f"top {LARGEST:,}, LeNet, 1,000 samples, {name}: converged to 1e-3", converged,
                LARGEST if exact else None, at_least=True,
                note=f"{seconds:.0f} s, {pairs.num_products} HVPs, lambda_{LARGEST} / lambda_1 = "
                f"{pairs.values[-1] / pairs.values[0]:.0e}"),
        )  # fmt: skip
        if grown is not None:
            row = Row(f"its peak memory over its budget, {name}", grown / budget, 1.2,
                      note=f"{grown / 1e6:.0f} MB grown, budget {budget / 1e6:.0f} MB")  # fmt: skip
            found.rows.append(row)
        fit = fit_power_law(pairs.values)
        found.numbers[name] = {
            "seconds": seconds,
            "building": building,
            "num_products": pairs.num_products,
            "stopped": pairs.stopped,
            "largest_relative_residual": float((pairs.residuals / np.abs(pairs.values)).max()),
            "memory_grown": grown,
            "memory_budget": budget,
            "d_ks": fit.ks_distance,
            "beta": fit.exponent,
            "load": (load, os.getloadavg()[0]),
        }
        del pairs, ours, product
    return found


def oracle(folder: Path | None) -> Finding:
    """Products against curvlinops' and finite differences, in float64."""
    found = Finding()
    for name, ours, theirs, between in agreement():
        found.tables.append(f"| {name} | {between:.0e} | {ours:.0e} | {theirs:.0e} |")
        found.numbers[name] = {"between": between, "ours": ours, "curvlinops": theirs}
        found.rows.append(Row(f"{name}: ours against finite differences", ours, 1e-6))
    return found


ORACLE_HEAD = (
    "| network, float64 | ours and curvlinops differ by | ours and finite differences | curvlinops "
    "and finite differences |\n|---|---|---|---|"
)

PIECES: dict[str, tuple[Callable[[Path | None], Finding], str, str]] = {
    "hvp-lenet": (hvp_lenet, "Products, in gradients", PRODUCT_HEAD),
    "hvp-nanogpt": (hvp_nanogpt, "Products, in gradients", PRODUCT_HEAD),
    "hvp-last-layer": (hvp_last_layer, "Products, in gradients", PRODUCT_HEAD),
    "hvp-networks": (hvp_networks, "Products, in gradients", PRODUCT_HEAD),
    "six-batches": (six_batches, "Products, in gradients", PRODUCT_HEAD),
    "top-10": (top_ten, "Ten eigenvalues to 1e-3, LeNet, from nothing to numbers", TOP_HEAD),
    "lanczos-400": (long_lanczos, "Long Lanczos runs, LeNet", LANCZOS_HEAD),
    "top-1000": (top_thousand, "", ""),
    "oracle": (oracle, "A second opinion", ORACLE_HEAD),
}
"""Name to what measures it, the title of its table, and the head of that."""
