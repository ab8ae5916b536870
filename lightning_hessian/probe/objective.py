"""The loss over fixed probe batches, as a pure function of the parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call

from lightning_hessian.isolation.attention import AttentionForm, AttentionMode
from lightning_hessian.isolation.context import isolated, muted
from lightning_hessian.isolation.held import ModuleState, kept, untouched
from lightning_hessian.isolation.recomputation import recomputing
from lightning_hessian.isolation.snapshot import Snapshot
from lightning_hessian.linear.memory import free_bytes
from lightning_hessian.linear.ranks import ALONE, Ranks
from lightning_hessian.linear.rng import seed_everything
from lightning_hessian.probe.batch_weight import batch_weights
from lightning_hessian.probe.loss import LossFunction, checked_loss, resolve_loss
from lightning_hessian.probe.parameters import ParameterSpace, is_half, upcast
from lightning_hessian.results import MeasurementError, TimeUpError

Mode: TypeAlias = Literal["eval", "train"]


class Objective:
    """The mean loss over all probe samples, as a function of the parameters of a space.

    A batch counts by what its loss is a mean over: its labels that are not -100, its number of
    samples (`batch_weight` has the rule), or what ``batch_weight`` says. So a ragged last batch
    changes nothing. The module is never modified: parameters and copies of
    the buffers are passed in, the batch is cloned, the generators are seeded alike for every
    evaluation of a batch (random layers see the same draws each time).

    Args:
        module: The module; a LightningModule need not be attached to a Trainer.
        loss_fn: ``loss_fn(module, batch) -> mean loss``; see `resolve_loss` for ``None``.
        batches: Probe batches of any structure; read once and held.
        space: The parameters to differentiate by.
        batch_weight: ``batch_weight(batch) -> float``, what the mean loss of that batch is a mean
            over, for example its number of unmasked tokens.
        mode: ``"eval"`` (dropout off, BatchNorm by its running statistics) or ``"train"``.
        attention: Whether attention is computed in chunks of queries; ``"auto"`` for where the
            graph of the plain one would not fit half of the memory that is free.
        seed: Of the draws of random layers.
        ranks: Who evaluates: all batches are given on every rank, and each holds every
            ``ranks.world``-th of them; the mean is over the samples of all.

    Attributes:
        batches: Those held here.
        weights: Their shares in the mean.
        num_samples: Sum of the weights of all batches.
        is_late: Whether the time is up, so that no batch is evaluated any more; never, as a rule.
        attention: Which form of attention is in use.

    Raises:
        ValueError: No batches, or weights that cannot be told from the batches.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction | None,
        batches: Iterable[Any],
        space: ParameterSpace,
        *,
        batch_weight: Callable[[Any], float] | None = None,
        mode: Mode = "eval",
        attention: AttentionForm = "auto",
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        if mode not in ("eval", "train"):
            raise ValueError(f"mode={mode!r} is neither 'eval' nor 'train'.")
        self.space, self.ranks = space, ranks
        self.is_late: Callable[[], bool] = lambda: False
        with ranks.together():
            held = _dealt(batches, ranks)
            self.batches = tuple(_cloned(batch, space.device) for batch in held)
            weights = batch_weights(module, self.batches, batch_weight, ranks)
        self.num_samples = ranks.all_reduce_number(math.fsum(weights))
        if self.num_samples <= 0:
            raise ValueError(f"batch_weight gave {weights}; weights must be >= 0, with a sum > 0.")
        self.weights = tuple(weight / self.num_samples for weight in weights)
        self._module = module
        self._call = _LossModule(module, resolve_loss(module, loss_fn))
        self._training = mode == "train"
        self._seed = seed
        budget = free_bytes(space.device) / 2 if attention == "auto" else math.inf
        self.attention = AttentionMode(attention, budget, len(self.batches))
        self._upcast = any(is_half(t) for t in (*module.parameters(), *module.buffers()))
        self._broadcast_buffers: dict[str, Tensor] = {}
        if ranks.world > 1:  # running statistics may differ: all evaluate with the first rank's
            for name, buffer in module.named_buffers():
                self._broadcast_buffers[name] = ranks.broadcast(buffer.detach().clone())
        self._snapshot: Snapshot | None = None
        self._writes = False  # whether some evaluation has written to parameters

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Open the block in which all evaluations take place; see `isolation.isolated`.

        Afterwards all that the module holds is as before, whoever wrote to it.
        """
        with isolated(self._module, training=self._training), self.attention:
            before, self._snapshot = self._snapshot, Snapshot(self._module)
            try:
                yield
            finally:
                self._snapshot.restore()
                self._snapshot = before

    def point(self) -> tuple[Tensor, ...]:
        """Return the present parameter values, detached, in the precision of the space.

        They share the memory of the parameters, but not the counter of its versions; where
        something writes to parameters, they are copies.
        """
        if self._writes and self._snapshot is not None:
            self.is_written()
            return tuple(value.clone() for value in self.space.values(self._module))
        return tuple(value.data for value in self.space.values(self._module))

    def is_written(self) -> bool:
        """Return whether a pass has written to parameters, for the first time.

        They are put back then, and all passes from now on are given copies: what has been computed
        should be computed again. To be asked after backward passes, as hooks may write too.
        """
        if self._snapshot is None or not self._snapshot.is_written():
            return False
        self._snapshot.put_back()
        first, self._writes = not self._writes, True
        return first

    def batch_loss(self, parameters: Sequence[Tensor], index: int) -> Tensor:
        """Return the mean loss of one batch, a scalar, at the given parameter values.

        Raises:
            MeasurementError: The loss is not a scalar tensor.
            TimeUpError: The time is up.
        """
        # Where parameters lie in shards, ranks evaluate together, and none may leave alone.
        if self.space.held is None and self.is_late():
            raise TimeUpError(
                "the time was up while products were made ready, batch by batch. Allow more "
                "seconds, or give fewer or smaller batches."
            )
        number = index * self.ranks.world + self.ranks.rank  # among the batches of all ranks
        return self.loss(parameters, self.batches[index], number)

    def loss(self, parameters: Sequence[Tensor], batch: Any, index: int) -> Tensor:
        """Return the same for any batch, which need not be held; ``index`` seeds random layers."""
        loss = self._evaluated(parameters, batch, index)
        # Some losses clamp weights, renormalise rows or move a teacher along, perhaps for this
        # batch only. Comparing costs less than copies, which every retained graph would keep. From
        # the first that writes, all write to copies, and this one is evaluated again.
        if self.is_written():
            loss = self._evaluated(parameters, batch, index)
        return checked_loss(loss, index)

    def _evaluated(self, parameters: Sequence[Tensor], batch: Any, index: int) -> Any:
        call = self._prepared(batch, index)
        if self._writes:
            self.is_written()
        state = self._state(parameters)
        if self._writes or self._snapshot is None:
            state = {name: tensor.clone() for name, tensor in state.items()}
        wanted = [tensor for tensor in parameters if tensor.requires_grad]
        self.attention.begin(index)
        loss = self._called(state, parameters, call)
        self.attention.end()
        for tensor in wanted:  # a module may have frozen it for a while, as GANs do
            if not tensor.requires_grad:
                tensor.requires_grad_()
        return loss

    def _called(
        self, state: Mapping[str, Tensor], parameters: Sequence[Tensor], call: tuple[Any, int]
    ) -> Any:
        """Return the loss, with named tensors in the places of the module's own."""
        own = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        given = {id(own[name]): tensor for name, tensor in state.items() if name in own}
        block = self._surroundings(given, parameters)
        named = {f"module.{name}": tensor for name, tensor in state.items()}
        return functional_call(self._call, named, (*call, block))

    @contextmanager
    def _surroundings(
        self, given: dict[int, Tensor], parameters: Sequence[Tensor]
    ) -> Iterator[None]:
        """Open the block in which the loss is called; what it does to the module is undone."""
        hidden = [] if self._snapshot is None else self._snapshot.hidden
        parts = [*self._module.modules(), *hidden]
        writes = self._writes or self._snapshot is None
        constant = {id(t): t for t in parameters}
        last: ModuleState | None = None

        def note() -> Callable[[], AbstractContextManager[None]]:
            nonlocal last
            last = state = ModuleState(parts, given=constant, parameters=writes, earlier=last)
            return lambda: self._again(state, parts, parameters)

        own = untouched(self._module, hidden=hidden, given=given, parameters=writes)
        with own, muted(self._module), recomputing(note):
            yield

    @contextmanager
    def _again(
        self, state: ModuleState, parts: Sequence[nn.Module], parameters: Sequence[Tensor]
    ) -> Iterator[None]:
        """Open the block in which a segment under activation checkpointing is computed again."""
        with kept(parts), self._whole_units(parameters), state.in_place(), muted(self._module):
            yield

    def _whole_units(self, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Open a block in which units find their parameters whole; here all parameters are."""
        return nullcontext()

    def norm(self, parts: Sequence[Tensor]) -> float:
        """Return the norm of a whole vector, from tensors in the shapes of the parameters."""
        return math.sqrt(sum(torch.stack([part.square().sum() for part in parts]).tolist()))

    def length(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the same as a scalar on the device, for which the host does not wait."""
        precise = torch.float64 if self.space.device.type != "mps" else torch.float32
        squares = torch.stack([part.square().sum() for part in parts])
        return squares.to(dtype=precise).sum().sqrt_()

    def anywhere(self, flag: bool) -> bool:
        """Return whether a flag is set where this gradient is computed: here alone."""
        return flag

    def _prepared(self, batch: Any, index: int) -> tuple[Any, int]:
        """Seed random layers, and return the arguments of the loss: a copy of the batch."""
        seed_everything(self._seed + index)
        batch = apply_to_collection(batch, Tensor, lambda t: t.to(self.space.device, copy=True))
        if self._upcast:
            batch = apply_to_collection(batch, Tensor, upcast)
        return batch, index

    def value(self, parameters: Sequence[Tensor] | None = None) -> float:
        """Return the mean loss over all probe samples.

        Args:
            parameters: Values to evaluate it at; None for the present ones.

        Raises:
            MeasurementError: The loss of a batch is NaN or infinite.
        """
        total = 0.0
        with self.ranks.together():
            point = self.point() if parameters is None else parameters
            for index, weight in enumerate(self.weights):
                loss = float(self.batch_loss(point, index).detach())
                if not math.isfinite(loss):
                    raise MeasurementError(
                        f"The loss of probe batch {index * self.ranks.world + self.ranks.rank} is "
                        f"{loss}, so the Hessian is undefined. The run may have diverged (lower "
                        "the learning rate), or the batch holds NaN."
                    )
                total += weight * loss
        return self.ranks.all_reduce_number(total)

    def _buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers, for the loss to write to."""
        own = dict(self._module.named_buffers())
        return {name: buffer.clone() for name, buffer in (self._broadcast_buffers or own).items()}

    def _state(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return what to evaluate the module with: parameters given, all others constant."""
        state = {n: upcast(b) for n, b in self._buffers().items()}
        for name, parameter in self._module.named_parameters():
            constant = parameter.data
            state[name] = upcast(constant) if self._upcast else constant
        state.update(zip(self.space.names, parameters, strict=True))
        return state


class _LossModule(nn.Module):
    """Makes ``loss_fn(module, batch)`` a module, which `functional_call` can evaluate."""

    def __init__(self, module: nn.Module, loss_fn: Callable[[Any, Any, int], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._loss_fn = loss_fn

    def forward(self, batch: Any, index: int, block: AbstractContextManager[None]) -> Tensor:
        with block:
            return self._loss_fn(self.module, batch, index)


def _cloned(batch: Any, device: torch.device) -> Any:
    """Copy outside inference mode, so that autograd may save the tensors."""
    with torch.inference_mode(False):
        return apply_to_collection(batch, Tensor, lambda t: t.to(device, copy=True))


def _dealt(batches: Iterable[Any], ranks: Ranks) -> list[Any]:
    """Return the batches of this rank, which may be none, but not on all ranks."""
    if isinstance(batches, Sequence):
        held = list(batches[ranks.rank :: ranks.world])
    else:
        held = list(itertools.islice(batches, ranks.rank, None, ranks.world))
    if not held and ranks.rank == 0:
        raise ValueError(
            "There is no probe batch: the loader or list of batches is empty. Give one at least."
        )
    return held
