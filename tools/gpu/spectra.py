"""Checks of measurements: on the device in float32 or float64, against the CPU in float64."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from support.references import Problem, dense_hessian, in_double, problem
from torch import Tensor, nn
from torch.func import functional_call

from gpu.running import Check, Settings, SkippedError
from lightning_hessian import (
    BasisStorage,
    MeasurementError,
    block_structure,
    gradient_structure,
    hessian_spectrum,
    layer_spectra,
)
from lightning_hessian.losses import linear_cross_entropy
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace

NETWORKS = (
    "mlp",
    "convolution",
    "batch_norm",
    "multihead_attention",
    "transformer_encoder",
    "lstm",
)
ENGINES = ("linearize", "autograd", "recompute", "finite_difference")
EXACT, SINGLE, DIFFERENCE = 1e-7, 1e-4, 1e-2
"""Relative errors allowed: in float64, in float32, of finite differences."""


def placed(name: str, settings: Settings, dtype: torch.dtype = torch.float32) -> Problem:
    """Return a problem whose module is on the device; its batches stay where users have them."""
    made = problem(name)
    module = copy.deepcopy(made.module).to(settings.device, dtype)
    batches = made.batches if dtype == torch.float32 else in_double(made.batches)
    return Problem(module, made.loss_fn, batches, made.whole, made.mode)


def top_of(matrix: Tensor, count: int) -> np.ndarray:
    """Return the largest eigenvalues of a matrix, descending."""
    values: np.ndarray = torch.linalg.eigvalsh(matrix).flip(0)[:count].numpy()
    return values


def compare(found: Any, expected: Any, tolerance: float, what: str = "eigenvalues") -> str:
    """Raise where two arrays differ by more than a share of the largest; return by how much."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    scale = float(np.abs(expected).max()) or 1.0
    error = float(np.abs(found - expected).max()) / scale
    if not error <= tolerance:
        raise AssertionError(f"{what} are {error:.1e} off, {tolerance:.0e} is allowed")
    return f"{what} within {error:.0e}"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Open a block in which matrix products and convolutions may use TF32, or may not."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = allowed
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.allow_tf32 = was


def product(name: str, engine: str, settings: Settings) -> str:
    """Compare all columns of the operator with the dense Hessian, in float64."""
    made = placed(name, settings, torch.float64)
    space = ParameterSpace.select(made.module)
    objective = Objective(made.module, made.loss_fn, made.batches, space)
    with objective.isolated():
        operator = HessianOperator(objective, engine)
        columns = torch.eye(operator.size, dtype=torch.float64, device=settings.device)
        one = torch.stack([operator.matvec(column) for column in columns[:8]]).cpu()
        found = operator.matmat(columns).cpu()
    expected = problem(name).hessian()
    tolerance = 1e-4 if engine == "finite_difference" else EXACT
    compare(one, expected[:8], tolerance, "single products")
    return compare(found, expected, tolerance, "products")


def spectrum(name: str, engine: str, settings: Settings) -> str:
    """Compare the top of a spectrum in float32, TF32 off, with the dense Hessian's."""
    if (name, engine) == ("transformer_encoder", "finite_difference"):
        raise SkippedError("refused everywhere: too rough for differences in float32")
    made = placed(name, settings)
    with tf32(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = hessian_spectrum(
            made.module, made.loss_fn, made.batches, num_eigenvalues=4, hvp=engine, tol=1e-5
        )
    if engine != "auto" and not found.engine.startswith(engine):
        raise AssertionError(f"{found.engine} ran instead of {engine}")
    tolerance = DIFFERENCE if engine == "finite_difference" else SINGLE
    return f"{found.engine}: " + compare(
        found.eigenvalues, top_of(problem(name).hessian(), 4), tolerance
    )


def tf32_allowed(settings: Settings) -> str:
    """Compare with TF32 on, where ten bits of a factor are left."""
    if not settings.is_card:
        raise SkippedError("a CPU has no TF32")
    made = placed("transformer_encoder", settings)
    with tf32(True):
        found = hessian_spectrum(made.module, made.loss_fn, made.batches, num_eigenvalues=4)
    expected = top_of(problem("transformer_encoder").hessian(), 4)
    return compare(found.eigenvalues, expected, 2e-2)


def autocast(settings: Settings) -> str:
    """Compare under bfloat16 autocast, where eight bits are left."""
    made = placed("mlp", settings)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(settings.device.type, dtype=torch.bfloat16):
            return made.loss_fn(module, batch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = hessian_spectrum(made.module, loss, made.batches, num_eigenvalues=4)
    return compare(found.eigenvalues, top_of(problem("mlp").hessian(), 4), 5e-2)


def half(settings: Settings) -> str:
    """Compare for a module in bfloat16, whose copies are measured in float32."""
    made = placed("mlp", settings)
    module = made.module.to(torch.bfloat16)
    found = hessian_spectrum(module, made.loss_fn, made.batches, num_eigenvalues=4)
    rounded = copy.deepcopy(module).cpu().float()
    expected = top_of(dense_hessian(rounded, made.loss_fn, problem("mlp").whole), 4)
    return compare(found.eigenvalues, expected, 1e-2)


def basis(storage: Callable[[Settings], BasisStorage], tolerance: float, settings: Settings) -> str:
    """Compare with the basis in one of the places where it may live."""
    made = placed("mlp", settings)
    with warnings.catch_warnings():  # few of the bounds pass where the basis is in bfloat16
        warnings.simplefilter("ignore")
        found = hessian_spectrum(
            made.module, made.loss_fn, made.batches, num_eigenvalues=3, basis=storage(settings)
        )
    return compare(found.eigenvalues, top_of(problem("mlp").hessian(), 3), tolerance)


def few_vectors(settings: Settings) -> BasisStorage:
    """Return room for about eight vectors; on the CPU the projected problem is counted too."""
    return BasisStorage(memory=1900.0 if settings.is_card else 4100.0, tier="device")


def basis_too_large(settings: Settings) -> str:
    """See that a basis that does not fit is refused, with what would fit."""
    made = placed("mlp", settings)
    tiny = BasisStorage(memory=600.0, tier="device")
    try:
        hessian_spectrum(made.module, made.loss_fn, made.batches, num_eigenvalues=40, basis=tiny)
    except MeasurementError as error:
        if "num_eigenvalues" not in str(error):
            raise AssertionError(f"the refusal names no remedy: {error}") from None
        return "refused, with a remedy"
    raise AssertionError("it was not refused")


def gauss_newton(settings: Settings) -> str:
    """Compare the Gauss-Newton matrix with J^T H_L J, from dense Jacobians in float64."""
    made, reference = placed("mlp", settings), problem("mlp")
    module, (inputs, targets) = in_double(reference.module), in_double(reference.whole)
    names = [name for name, _ in module.named_parameters()]
    sizes = [parameter.numel() for parameter in module.parameters()]
    shapes = [parameter.shape for parameter in module.parameters()]

    def outputs(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), shapes, strict=True)
        logits: Tensor = functional_call(module, {n: v.view(s) for n, v, s in parts}, (inputs,))
        return logits

    flat = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    jacobian = torch.func.jacrev(outputs)(flat)
    chance = outputs(flat).softmax(-1)
    inner = torch.diag_embed(chance) - chance[:, :, None] * chance[:, None, :]
    expected = torch.einsum("bin,bij,bjm->nm", jacobian, inner, jacobian) / len(targets)
    found = hessian_spectrum(
        made.module, made.loss_fn, made.batches, num_eigenvalues=4, matrix="gauss_newton"
    )
    return compare(found.eigenvalues, top_of(expected.detach(), 4), SINGLE)


def blocks(kind: str, settings: Settings) -> str:
    """Compare block norms with those on the CPU, in float64."""
    made, reference = placed("mlp", settings, torch.float64), problem("mlp")
    expected = block_structure(
        in_double(reference.module), reference.loss_fn, in_double(reference.batches), blocks=kind
    )
    found = block_structure(made.module, made.loss_fn, made.batches, blocks=kind)
    return compare(found.frobenius, expected.frobenius, EXACT, "norms")


def block_norms_dense(settings: Settings) -> str:
    """Compare the norms of layers with those cut out of the dense Hessian."""
    made, reference = placed("mlp", settings, torch.float64), problem("mlp").hessian()
    found = block_structure(made.module, made.loss_fn, made.batches, blocks="layer")
    first = sum(p.numel() for p in made.module.get_submodule("0").parameters())
    corner = float(torch.linalg.matrix_norm(reference[:first, first:]))
    return compare(found.frobenius[0, -1], corner, EXACT, "norms")


def layers(settings: Settings) -> str:
    """Compare the spectra of layers with those on the CPU."""
    made, reference = placed("mlp", settings, torch.float64), problem("mlp")
    expected = layer_spectra(
        in_double(reference.module), reference.loss_fn, in_double(reference.batches),
        num_eigenvalues=3,
    )  # fmt: skip
    found = layer_spectra(made.module, made.loss_fn, made.batches, num_eigenvalues=3)
    said = [compare(found[n].eigenvalues, expected[n].eigenvalues, 1e-5) for n in expected]
    return said[-1]


def gradients(settings: Settings) -> str:
    """Compare the spectrum of gradient covariances with that on the CPU."""
    made, reference = placed("mlp", settings, torch.float64), problem("mlp")
    expected = gradient_structure(
        in_double(reference.module), reference.loss_fn, in_double(reference.batches), tests=False
    )
    found = gradient_structure(made.module, made.loss_fn, made.batches, tests=False)
    return compare(found.covariance, expected.covariance, 1e-6)


def language_model(settings: Settings) -> str:
    """Compare the chunked loss of a language model with torch's own, by their dense Hessians."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(11, 4), nn.Tanh(), nn.Linear(4, 11, bias=False))
    tokens = torch.randint(11, (4, 6))
    targets = torch.randint(11, (4, 6))

    def plain(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())

    def chunked(module: Any, batch: Any) -> Tensor:
        hidden = module[1](module[0](batch[0]))
        return linear_cross_entropy(hidden, module[2].weight, batch[1], chunk_size=7)

    expected = top_of(dense_hessian(module, plain, (tokens, targets)), 4)
    there = copy.deepcopy(module).to(settings.device)
    for engine in ("linearize", "autograd", "recompute"):
        found = hessian_spectrum(there, chunked, [(tokens, targets)], num_eigenvalues=4, hvp=engine)
        text = compare(found.eigenvalues, expected, SINGLE)
    return text


def stability(settings: Settings) -> str:
    """See the largest eigenvalue of the stability instrument agree with the spectrum's."""
    from lightning_hessian import Session, StabilityInstrument, Training
    from lightning_hessian.linear.allowance import UNBOUNDED

    made = placed("mlp", settings)
    training = Training((torch.optim.SGD(made.module.parameters(), lr=0.1),))
    with Session(made.module, made.loss_fn, made.batches, training=training) as session:
        scalars = StabilityInstrument().measure(session, UNBOUNDED).scalars()
    expected = top_of(problem("mlp").hessian(), 1)
    compare(scalars["threshold"], 20.0, 1e-6, "threshold")
    return compare(scalars["lambda_1"], expected[0], 2e-2)


def checks() -> list[Check]:
    """Return the checks of this module."""
    found = []
    for i, name in enumerate(NETWORKS):
        for engine in ENGINES:
            work = functools.partial(product, name, engine)
            found.append(Check(f"products {engine}, {name}", work, only_full=i > 1))
    found += [
        Check(f"spectrum float32 {engine}, {name}", functools.partial(spectrum, name, engine),
              only_full=name != "mlp")
        for name in ("mlp", "transformer_encoder")
        for engine in (*ENGINES, "auto")
    ]  # fmt: skip
    compiled = functools.partial(product, "mlp", "compile")
    folder = tempfile.gettempdir()
    storages: dict[str, tuple[Callable[[Settings], BasisStorage], float]] = {
        "on the device": (lambda _: BasisStorage(tier="device"), SINGLE),
        "in pinned memory": (lambda _: BasisStorage(tier="cpu"), SINGLE),
        "in a file": (lambda _: BasisStorage(tier=f"disk:{folder}"), SINGLE),
        "in bfloat16": (lambda _: BasisStorage(dtype="bfloat16"), 1e-2),
        "of few vectors, restarting": (few_vectors, SINGLE),
    }
    return [
        *found,
        Check("products compile, mlp", compiled, seconds=90, only_full=True),
        Check("spectrum TF32 on", tf32_allowed),
        Check("spectrum bfloat16 autocast", autocast),
        Check("spectrum module in bfloat16", half),
        *(
            Check(f"basis {place}", functools.partial(basis, storage, tolerance))
            for place, (storage, tolerance) in storages.items()
        ),
        Check("basis that does not fit", basis_too_large),
        Check("Gauss-Newton matrix", gauss_newton),
        Check("blocks layer", functools.partial(blocks, "layer")),
        Check("blocks neuron", functools.partial(blocks, "neuron")),
        Check("blocks against the dense Hessian", block_norms_dense),
        Check("layers", layers),
        Check("gradients", gradients),
        Check("language model's loss in chunks", language_model),
        Check("stability", stability),
    ]
