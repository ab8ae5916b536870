"""Ranks that measure together: their collectives, and failures that all of them raise."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hessian.results import MeasurementError
from lightning_hessian.results.base import text_of

# The names since torch 2.13, and those before.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)


class RankError(MeasurementError):
    """A measurement failed on one rank or more; all ranks raise it, with the same message.

    Attributes:
        everywhere: Whether it failed on all of them.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that make one measurement together; a single one by default.

    All of them call the same methods in the same order.

    Attributes:
        group: Their process group, None for a process by itself.
        device: Where tensors must live to be sent, the CPU under gloo.

    Example:
        >>> Ranks().world, Ranks().all_reduce(torch.ones(2))
        (1, tensor([1., 1.]))
    """

    group: dist.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - it cannot change

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, device: torch.device) -> Ranks:
        """Return the ranks of a process group, None for one alone, with tensors on ``device``."""
        if group is None or dist.get_world_size(group) == 1:
            return cls()
        sent = torch.device("cpu") if dist.get_backend(group) == "gloo" else device
        return cls(group, sent)

    @cached_property
    def neighbours(self) -> int:
        """How many of the ranks share this one's memory: the same machine, the same device."""
        if self.world == 1:
            return 1
        index = torch.cuda.current_device() if self.device.type == "cuda" else None
        places = self.all_gather_object((socket.gethostname(), index))
        return places.count(places[self.rank])

    @cached_property
    def world(self) -> int:
        """How many there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @cached_property
    def rank(self) -> int:
        """Which of them this is, from 0 on."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def share_of(self, number: int) -> int:
        """Return how many of so many things a rank has at most, where they are dealt out evenly."""
        return -(-number // self.world)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_reduce_number(self, number: float) -> float:
        """Return the sum of the ranks' numbers, in float64."""
        if self.world == 1:
            return number
        precise = torch.float64 if self.device.type != "mps" else torch.float32
        return float(self.all_reduce(torch.tensor(number, dtype=precise, device=self.device)))

    def all_gather(self, part: Tensor) -> Tensor:
        """Return the equally long parts [m] of all ranks one after the other, [world * m]."""
        whole = part.new_empty(self.world * len(part))
        getattr(dist, _GATHER)(whole, part.contiguous(), group=self.group)
        return whole

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Return this rank's part [m] of the sum of the ranks' tensors [world * m]."""
        part = tensor.new_empty(len(tensor) // self.world)
        getattr(dist, _SCATTER)(part, tensor, group=self.group)
        return part

    def all_to_all(
        self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Return what each rank sends to this one, in the order of the ranks.

        Args:
            parts: What this one sends to each, of one dtype; any of them may be empty.
            shapes: Those of what each sends here.

        Raises:
            RankError: Some rank has too little memory for it.
        """
        given = [part.numel() for part in parts]
        taken = [math.prod(shape) for shape in shapes]
        with self.together():
            sent = parts[0].new_empty(sum(given), device=self.device)
            for target, part in zip(sent.split(given), parts, strict=True):
                target.view(part.shape).copy_(part)
            received = sent.new_empty(sum(taken))
        dist.all_to_all_single(received, sent, taken, given, group=self.group)
        blocks = zip(received.split(taken), shapes, strict=True)
        return [block.view(shape) for block, shape in blocks]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the first rank's tensor on all ranks, in place.

        What decides a branch is agreed on where ranks might compute it differently: on unlike
        machines the same LAPACK call may end in other signs.
        """
        if self.world > 1:
            sent = tensor.to(self.device)
            dist.broadcast(sent, group_src=0, group=self.group)
            tensor.copy_(sent)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on some rank."""
        if self.world == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device)) > 0)

    def all_reduce_min(self, number: float) -> float:
        """Return the smallest of the ranks' numbers."""
        found: float = min(self.all_gather_object(number))
        return found

    def all_gather_object(self, thing: Any) -> list[Any]:
        """Return what every rank gives, in the order of the ranks; small things only."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing, group=self.group)
        return things

    @contextmanager
    def together(self) -> Iterator[None]:
        """Open a block that fails on all ranks if it fails on one.

        The only collectives in it are those that `stay_together` stands before.

        Raises:
            RankError: The block failed on some rank. A process by itself sees its own exception.
        """
        failure: Exception | None = None
        try:
            yield
        except RankError:
            raise  # all know already
        except Exception as error:
            if self.world == 1:
                raise
            failure = error
        if self.any(failure is not None):
            self.fail(failure)

    def stay_together(self) -> None:
        """Stands before a collective in a block of `together`: nobody waits for who has left it.

        Raises:
            RankError: The block has failed on some rank.
        """
        if self.any(False):
            self.fail(None)

    def fail(self, failure: Exception | None) -> NoReturn:
        """Raise the same error on all ranks, once all know that one has failed.

        Raises:
            RankError: Always; it names the first rank that failed, and why.
        """
        text = None if failure is None else text_of(failure)
        if text is not None and not isinstance(failure, MeasurementError):
            text = f"{type(failure).__name__}: {text}"
        texts = self.all_gather_object(text)
        first = next((i for i, said in enumerate(texts) if said is not None), 0)
        failed = sum(said is not None for said in texts)
        others = f" (and {failed - 1} more)" if failed > 1 else ""
        message = f"Rank {first}{others} failed: {texts[first]}"
        raise RankError(message, everywhere=failed == self.world) from failure


ALONE = Ranks()
