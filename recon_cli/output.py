"""Output folders that are complete or absent, whatever happens."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_file", "output_folder"]


def _refuse(text: str) -> Exception:
    from inverse.errors import OutputError

    return OutputError(text)


def _check_folder(out: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse what must not be replaced, before any work is done."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise _refuse(f"output '{out}' exists and is not a folder; give another -o")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise _refuse(f"output folder '{out}' is not empty; give another -o, or --overwrite")
    if not (out / "run.json").is_file():
        raise _refuse(
            f"output folder '{out}' was not made by recon (it has no run.json), so --overwrite "
            "does not touch it; give another -o"
        )
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise _refuse(
                f"the input '{path}' lies in the output folder '{out}', which --overwrite would "
                "remove; give another -o"
            )


def check_file(path: Path, overwrite: bool) -> None:
    """Refuse an output file that exists.

    Raises:
        OutputError: it exists and ``overwrite`` is false, or is not a file.
    """
    if path.is_dir():
        raise _refuse(f"output '{path}' is a folder; give a file name")
    if path.exists() and not overwrite:
        raise _refuse(f"output file '{path}' exists; give another -o, or --overwrite")


@contextmanager
def output_folder(out: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A hidden folder beside ``out`` that takes its name when the block ends without an error.

    Args:
        out: the folder that the user asked for.
        overwrite: replace an earlier output there, at the very end.
        inputs: paths that must not lie inside a folder that is replaced.

    Raises:
        OutputError: ``out`` is not empty and may not be replaced, or cannot be written.
    """
    _check_folder(out, overwrite, inputs)
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow links in the parents
    made = [p for p in (out.parent, *out.parent.parents) if not p.exists()]
    temporary: Path | None = None
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        except OSError as error:
            raise _refuse(
                f"output folder '{out}' cannot be written ({error.strerror}); give another -o"
            ) from None
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        _replace(temporary, out)
        made = []
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _replace(temporary: Path, out: Path) -> None:
    """Rename into place; an earlier output is kept until the new one stands."""
    if not out.exists():
        temporary.rename(out)
        return
    old = temporary.with_name(temporary.name + ".old")
    out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
