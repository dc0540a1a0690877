"""One training run on several processes: each takes its share of every batch.

Each process draws the random numbers of the whole batch and makes its own part of it; gradients
of the sum of losses over the batch's size are added up.  So ``N`` processes follow one process
with the same batch to rounding, also where a batch does not divide by ``N`` or has fewer images
than processes.  ``torchrun`` (or any launcher that sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``
and ``MASTER_PORT``) starts them; the backend is NCCL on CUDA and gloo elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inverse.launch import launched, meet

__all__ = ["Team", "rank", "team"]

T = TypeVar("T")
_PATIENCE = timedelta(minutes=30)  # the first process validates and writes while others wait


@dataclass(frozen=True)
class Team:
    """The processes of a run.

    Attributes:
        rank: number of this one; 0 writes files.
        size: how many there are.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    def share(self, count: int) -> slice:
        """This process's part of ``count`` images; empty where there are fewer than processes."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Sum gradients over processes in place; returns the sum of ``loss`` (a number)."""
        if self.size == 1:
            return loss
        trained = list(parameters)
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in trained if p.grad is not None]
        flat = torch.cat([loss.reshape(1).to(gradients[0]), *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        pieces = flat[1:].split([g.numel() for g in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))
        return flat[0]

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value > 0)

    def from_first(self, value: T) -> T:
        """The value that process 0 has."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, device=self.device)
        return held[0]


def rank() -> int:
    """Number of this process among those that a launcher started; 0 where there is one."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


@contextmanager
def team(device: torch.device) -> Iterator[Team]:
    """Join the processes of the launcher, or those of a process group that exists.

    Args:
        device: where to compute; under a launcher ``cuda`` is the device of ``LOCAL_RANK``.

    Yields:
        The team; of one, where there is neither.
    """
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield Team(dist.get_rank(), dist.get_world_size(), device)
        return
    if launched() < 2:
        yield Team(0, 1, device)
        return
    meet("nccl" if device.type == "cuda" else "gloo", _PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
