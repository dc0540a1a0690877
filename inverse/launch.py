"""Meeting of the processes that a launcher such as ``torchrun`` has started."""

from __future__ import annotations

import os
from datetime import timedelta

__all__ = ["launched", "meet"]

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MEETING = timedelta(minutes=15)  # within which all processes must have started


def launched() -> int:
    """How many processes a launcher has started; 1 where there is none."""
    size = os.environ.get("WORLD_SIZE", "1")
    complete = size.isdigit() and all(name in os.environ for name in _ENVIRONMENT)
    return max(1, int(size)) if complete else 1


def meet(backend: str, patience: timedelta) -> None:
    """Join the process group of the launcher's rendezvous.

    Args:
        backend: ``"nccl"`` or ``"gloo"``.
        patience: longest that one process may keep the others waiting.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # a launcher that starts the processes anew keeps its store, with addresses of the dead
    store, rank, count = next(rendezvous("env://", timeout=_MEETING))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=count,
        timeout=patience,
    )
