"""The front door without Lightning, fourth part: a spectrum for each of several layers."""

from __future__ import annotations

import inspect
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import nn

from lightning_hessian.distributed import Ranks
from lightning_hessian.measure import hessian_spectrum
from lightning_hessian.measure_arguments import SPECTRUM_RULES, together
from lightning_hessian.measure_protocols import check_protocol
from lightning_hessian.probe.objective import LossFunction
from lightning_hessian.probe.parameters import ParameterSelection, ParameterSpace
from lightning_hessian.probe.sharded import ranks_of
from lightning_hessian.results import ArgumentError, HessianSpectrum
from lightning_hessian.results.arguments import anything, checked

Layers: TypeAlias = str | Mapping[str, ParameterSelection]
"""``"layer"``, or names of groups of parameters with what selects each."""

_NAME = re.compile(r"[A-Za-z0-9_]+")


_OPTIONS = {*inspect.signature(hessian_spectrum).parameters} - {"parameters"}


_RULES = {name: SPECTRUM_RULES.get(name, anything) for name in ("layers", *_OPTIONS)}


@checked(_RULES, together)
def layer_spectra(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batches: Iterable[Any],
    *,
    layers: Layers = "layer",
    num_eigenvalues: int | None = None,
    protocol: str = "converged",
    max_hvps: int | None = None,
    max_seconds: float | None = None,
    **options: Any,
) -> dict[str, HessianSpectrum]:
    """Returns the spectrum of the diagonal block of the Hessian that belongs to each layer.

    Each layer has a graph of its own rather than a share in that of the whole model: its products
    go no further back than the layer, and cost what it costs. Measured on LeNet, 500 images, one
    thread: 224 ms for a product with the whole Hessian by ``autograd`` (112 by ``linearize``), 172
    (67) for the first convolution, 35 (22) for the second, 1.6 (1.3), 0.4 and 0.2 for the dense
    layers. Restricting products of the whole would save the building of the graphs, which takes
    one to four products, and make every product of a late layer a hundred times as dear.

    Args:
        model: Any module.
        loss_fn: As in `hessian_spectrum`.
        batches: Batches of any structure; read once.
        layers: A mapping from names (letters, digits, underscores) to globs, lists of globs,
            regexes or predicates, as `parameters` of `hessian_spectrum`; or ``"layer"`` for every
            module that has trainable parameters of its own, named as it is with underscores for
            dots.
        num_eigenvalues: K for each; as many as there are parameters, if they are fewer.
        protocol: As in `hessian_spectrum`.
        max_hvps: Bound on the products of all layers together.
        max_seconds: Bound on the time of all layers together.
        **options: The other arguments of `hessian_spectrum`.

    Returns:
        Name to spectrum, in the order of ``layers``. A layer for which products or time did not
        suffice is left out, and a warning says so.

    Raises:
        ValueError: A name that cannot be part of a key, two names that are alike, a selection
            that matches nothing; before anything is measured.
        MeasurementError: As `hessian_spectrum`.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> batches = [(torch.randn(32, 4), torch.randint(2, (32,)))]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> spectra = layer_spectra(model, loss_fn, batches, num_eigenvalues=5)
        >>> {name: len(spectrum.eigenvalues) for name, spectrum in spectra.items()}
        {'0': 5, '2': 5}
    """
    started = time.monotonic()
    groups = layer_groups(model, layers)
    batches = list(batches)
    device = next(model.parameters()).device
    ranks = ranks_of(model, device) or Ranks.of(options.get("process_group"), device)
    found: dict[str, HessianSpectrum] = {}
    spent = 0
    left_out = []
    for name, selection in groups.items():
        size = ParameterSpace.select(model, selection).size
        count = check_protocol(protocol, num_eigenvalues)
        count = count if protocol == "pooled_slq" else min(count, size)
        left = None if max_hvps is None else max_hvps - spent
        seconds = None if max_seconds is None else max_seconds - (time.monotonic() - started)
        probes = options.get("trace_probes", 16)
        short = left is not None and left < count + probes
        if short or ranks.any(seconds is not None and seconds <= 0):
            left_out.append(name)
            continue
        found[name] = hessian_spectrum(
            model, loss_fn, batches, parameters=selection, num_eigenvalues=count,
            protocol=protocol, max_hvps=left, max_seconds=seconds, **options,
        )  # fmt: skip
        spent += found[name].num_hvps
    if left_out:
        warnings.warn(
            f"Layers without a spectrum: {', '.join(left_out)}. The products or the time allowed "
            "were spent on those before. Raise max_hvps or the time, or name fewer layers.",
            stacklevel=3,  # past the decorator, to the caller
        )
    return found


def layer_groups(model: nn.Module, layers: Layers) -> dict[str, ParameterSelection]:
    """Returns the selection of each layer by name.

    Raises:
        ValueError: As `layer_spectra`.
    """
    if isinstance(layers, str):
        if layers != "layer":
            raise ArgumentError("layers", layers, "Give 'layer', or a mapping from names to globs.")
        groups = _by_module(model)
    else:
        groups = dict(layers)
    if not groups:
        raise ArgumentError("layers", layers, "It names no layer; give None for none.")
    for name, selection in groups.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"layers: the name {name!r} cannot be part of a key; use letters, digits and "
                "underscores only."
            )
        ParameterSpace.select(model, selection)
    alike = {name.lower() for name in groups}
    if len(alike) < len(groups):
        raise ValueError(
            f"layers: two of the names {sorted(groups)} differ by case only; loggers that write "
            "files cannot tell them apart. Rename one."
        )
    return groups


def _by_module(model: nn.Module) -> dict[str, ParameterSelection]:
    """Returns a group for each module with trainable parameters of its own."""
    members: dict[str, set[str]] = {}
    for name in ParameterSpace.select(model).names:
        members.setdefault(name.replace("_orig_mod.", "").rpartition(".")[0], set()).add(
            name.replace("_orig_mod.", "")
        )
    groups: dict[str, ParameterSelection] = {}
    for module, names in members.items():
        key = re.sub(r"[^A-Za-z0-9]+", "_", module) or "root"
        if key in groups:
            raise ValueError(
                f"layers='layer': two modules would both be called {key!r}. Name the layers "
                "yourself: layers={'name': 'glob.*'}."
            )
        groups[key] = _named(frozenset(names))
    return groups


def _named(names: frozenset[str]) -> Callable[[str, nn.Parameter], bool]:
    return lambda name, parameter: name in names
