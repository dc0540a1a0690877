"""One reconstruction by several processes, which ``torchrun`` starts on one machine or many.

Every process reads the input and knows all parts of the work.  A process claims the next part that
is neither finished nor claimed, computes it, and puts it on disk where the first process finds it;
so processes of unequal speed share evenly, and one that dies leaves its part to the next run.  The
first process owns the output folder, computes the baselines, merges and writes.  All processes see
one file system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import typer

from recon_cli.console import VERBOSITY
from recon_cli.output import Work, working_folder

__all__ = [
    "ALONE",
    "Processes",
    "SharedWork",
    "joined",
    "local_rank",
    "shared_folder",
    "unlaunched",
]

T = TypeVar("T")
_PATIENCE = timedelta(days=2)  # the longest that one process may be busy while others wait


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: number of this one; 0 owns the output.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process owns the output."""
        return self.rank == 0

    def from_first(self, action: Callable[[], T]) -> T:
        """What ``action`` gives the first process, which alone does it, for all of them.

        Raises:
            typer.Exit: in the others, where it fails; the first process tells why.
        """
        if self.size == 1:
            return action()
        held: list[Any] = [None, 0]
        if self.first:
            try:
                held[0] = action()
            except BaseException as error:
                held[1] = int(getattr(error, "exit_code", 1))
                self._broadcast(held)
                raise
        self._broadcast(held)
        if held[1]:
            raise typer.Exit(held[1])
        value: T = held[0]
        return value

    def to_first(self, value: T) -> list[T]:
        """The values of all processes in their order, in the first; none in the others.

        Raises:
            ResourceError: one of them is gone.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        held: list[Any] = [None] * self.size
        self._guarded(lambda: dist.gather_object(value, held if self.first else None))
        return held if self.first else []

    def wait(self) -> None:
        """Until all processes are here.

        Raises:
            ResourceError: one of them is gone.
        """
        if self.size > 1:
            import torch.distributed as dist

            self._guarded(dist.barrier)

    def _broadcast(self, held: list[Any]) -> None:
        import torch.distributed as dist

        self._guarded(lambda: dist.broadcast_object_list(held, src=0))

    def _guarded(self, talk: Callable[[], object]) -> None:
        from inverse.errors import ResourceError

        try:
            talk()
        except RuntimeError:
            raise ResourceError(
                f"process {self.rank} of {self.size} lost another one; repeat the command, where "
                "it has that with --resume, to compute what is missing"
            ) from None


ALONE = Processes()


def local_rank() -> int | None:
    """Number of this process on its machine, under a launcher."""
    value = os.environ.get("LOCAL_RANK", "")
    return int(value) if value.isdigit() else None


def unlaunched() -> dict[str, str]:
    """The environment for a process of this one's that is no part of the launcher's run.

    On a machine with GPUs it sees the one of this process alone.
    """
    own = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    foreign = ("GROUP_", "ROLE_", "TORCHELASTIC_")
    found = {k: v for k, v in os.environ.items() if k not in own and not k.startswith(foreign)}
    place = local_rank()
    if place is None:
        return found
    import torch

    if torch.cuda.is_available():
        visible = found.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if any(visible) else [str(k) for k in range(torch.cuda.device_count())]
        found["CUDA_VISIBLE_DEVICES"] = names[place % len(names)]
    return found


@contextmanager
def joined() -> Iterator[Processes]:
    """Meet the processes of the launcher at its rendezvous; alone where there is none."""
    from inverse.launch import launched, meet

    if launched() < 2:
        yield ALONE
        return
    import torch.distributed as dist

    # what they tell each other is small and lies in main memory: gloo, also beside GPUs
    meet("gloo", _PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class SharedWork(Work):
    """Where a command puts its output, and who else works on it."""

    processes: Processes = ALONE


@contextmanager
def shared_folder(
    out: Path,
    *,
    overwrite: bool,
    inputs: Sequence[Path] = (),
    resume: bool = False,
    dry: bool = False,
) -> Iterator[SharedWork]:
    """As `working_folder`, for a command that several processes may run together.

    The first process holds the folder; the others see its finished pieces, and end when it has
    failed to get it.
    """
    with joined() as processes, ExitStack() as stack:
        VERBOSITY.quiet |= not processes.first
        work = processes.from_first(
            lambda: stack.enter_context(
                working_folder(out, overwrite=overwrite, inputs=inputs, resume=resume, dry=dry)
            )
        )
        yield SharedWork(work.folder, work.saved, processes)
