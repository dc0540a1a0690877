"""What the user sees: results on stdout, log and progress on stderr."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["VERBOSITY", "log", "plain_json", "print_json", "print_table", "progress"]


@dataclass
class Verbosity:
    """How much goes to stderr; set once a command by the options that all commands share."""

    quiet: bool = False
    verbose: bool = False
    debug: bool = False

    def apply(self, *, quiet: bool, verbose: bool, debug: bool) -> None:
        """Set the levels and route the library's log records to stderr."""
        self.quiet, self.verbose, self.debug = quiet, verbose, debug
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("recon: %(message)s"))
        level = logging.ERROR if quiet else logging.INFO if verbose or debug else logging.WARNING
        for name in ("inverse", "phantoms"):
            logger = logging.getLogger(name)
            logger.handlers[:] = [handler]
            logger.setLevel(level)


VERBOSITY = Verbosity()


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # rich takes 80 columns where there is no terminal, which would cut tables in files and pipes
    width = None if stream.isatty() else 200
    return Console(file=stream, width=width, highlight=False)


def log(text: str) -> None:
    """One line on stderr, unless ``--quiet``."""
    if not VERBOSITY.quiet:
        print(f"recon: {text}", file=sys.stderr, flush=True)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
) -> None:
    """A table on stdout.

    Args:
        title: line above the table.
        columns: headings.
        rows: cells.
        left: number of columns, from the first, that are text and so aligned to the left.
    """
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, heading in enumerate(columns):
        table.add_column(heading, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    _console(stderr=False).print(table)


def plain_json(value: Any) -> Any:
    """``value`` in plain JSON types: tuples become lists, non-finite numbers null."""
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    return str(value)


def print_json(value: Any) -> None:
    """JSON on stdout."""
    print(json.dumps(plain_json(value), indent=2))


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with time left on a terminal, a line at the start elsewhere.

    Yields:
        ``advance(done, total)``.
    """
    if VERBOSITY.quiet or not sys.stderr.isatty():
        log(title)
        yield lambda done, total: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("recon: {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
