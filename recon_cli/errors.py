"""Exit codes, and how a failure is told: one line that says what, where and what to do.

| code | meaning |
|---|---|
| 0 | ok |
| 1 | internal error |
| 2 | usage |
| 3 | no input found |
| 4 | invalid input or geometry |
| 5 | unsupported |
| 6 | output exists or cannot be written |
| 7 | out of memory, disk or device |
| 8 | partial |
| 9 | numerical failure |
| 10 | checkpoint refused |
| 130, 143 | interrupted, terminated |
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from recon_cli.console import VERBOSITY

__all__ = ["Terminated", "guarded", "one_line", "usage"]

# typer carries its own copy of click in some versions; its base classes are reached from here
_CLICK = typer.BadParameter.__mro__[2]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


class Terminated(BaseException):
    """SIGTERM arrived; unwinds the stack so that temporary folders are removed."""


def usage(text: str) -> Exception:
    """An error of the command line itself: exit code 2."""
    return typer.BadParameter(text)


def one_line(error: BaseException) -> str:
    """The message without line breaks; a table below the first line is left to ``inspect``."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first.rstrip(':')} ('recon inspect' lists them)" if rest else first


def _tell(text: str) -> None:
    print(f"recon: error: {text}", file=sys.stderr, flush=True)


def _usage_text(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "recon"
    text = " ".join(error.format_message().split()).rstrip(".")
    return f"{text}; see '{command} --help'"


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether the system's refusal to write more lies behind an error, however it was wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if f"(os error {errno.ENOSPC})" in str(error):  # so the writer of priors, in Rust, says it
            return True
        error = error.__cause__ or error.__context__
    return False


def _classify(error: BaseException) -> tuple[int, str]:
    """Exit code and text of whatever ended the command."""
    if _disk_is_full(error):
        return 7, "no space left for the output; free some disk space"
    code = getattr(error, "exit_code", None)
    if isinstance(error, _CLICK):
        return int(code or 2), _usage_text(error)
    if isinstance(error, ValueError) and isinstance(code, int):
        return code, one_line(error)
    out_of_memory = "out of memory; use a smaller --batch, fewer --slices or a smaller --matrix"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 7, out_of_memory
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):
        return 7, out_of_memory
    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        return 7, "the GPU failed; look at it with nvidia-smi, and run the command again"
    if isinstance(error, OSError) and error.errno in _DENIED:
        return 6, f"no permission for '{error.filename}'; give a folder that can be written"
    if isinstance(error, OSError):
        where = f" of '{error.filename}'" if error.filename else ""
        return 6, f"reading or writing{where} failed ({error.strerror}); look at the disk"
    text = one_line(error)
    return 1, f"internal error, {type(error).__name__}: {text}; use --debug for the traceback"


@contextmanager
def _sigterm() -> Iterator[None]:
    """Turn SIGTERM into :class:`Terminated` for the time of a command."""

    def terminate(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def guarded(action: Callable[[], object]) -> int:
    """Run a command; whatever it raises becomes an exit code and one line on stderr."""
    try:
        with _sigterm():
            result = action()
        code = result if isinstance(result, int) else 0
        if code == 130:  # what typer makes of Ctrl-C
            _tell("interrupted")
        return code
    except typer.Exit as error:
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _tell("interrupted")
        return 130
    except Terminated:
        _tell("terminated")
        return 143
    except BrokenPipeError:
        # the reader of stdout has gone (recon ... | head): nothing left to say
        sys.stderr.close()
        return 141
    except Exception as error:
        if VERBOSITY.debug:
            traceback.print_exc()
        code, text = _classify(error)
        _tell(text)
        return code
