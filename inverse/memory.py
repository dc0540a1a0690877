"""Memory that a computation needs, measured rather than guessed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["is_exhausted", "peak_bytes", "resident_peak", "trim"]


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Most memory held while ``action`` runs: of the process, or of PyTorch on a GPU.

    Where the system cannot forget earlier peaks of the process, as outside Linux, these count too.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    action()
    return resident_peak()


def resident_peak() -> int:
    """Most memory that this process has held, bytes.

    Linux tells it of the running program alone; ``getrusage`` counts what its parent held as well.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def trim() -> None:
    """Give freed memory back to the system; glibc keeps it between what is still held."""
    with suppress(OSError, AttributeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)
