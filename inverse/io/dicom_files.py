"""The files behind a DICOM input: folders, archives, and what third-party code says about them.

Hostile input is bounded here: links out of the folder are not followed, archives are read in
memory within limits and never unpacked to disk, and no third-party text (it holds patient data)
reaches a warning, a log or an error.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from inverse.errors import InputError, NoInputError, ReconError, ResourceError

__all__ = ["Source", "guarded", "is_plain_name", "open_sources", "quiet_pydicom"]

T = TypeVar("T")

# --- third-party noise ---


@contextmanager
def quiet_pydicom() -> Iterator[list[warnings.WarningMessage]]:
    """Hold back pydicom's warnings and log records, which print values such as birth dates.

    Yields:
        The warnings, to be counted and never shown.
    """
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        logger.setLevel(level)


def guarded(action: Callable[[], T], label: str, doing: str) -> T:
    """Run third-party code; whatever it raises becomes one error without its text (PHI)."""
    try:
        return action()
    except ReconError:
        raise
    except MemoryError:
        raise ResourceError(
            f"{label}: not enough memory to {doing}; read fewer slices or free memory"
        ) from None
    except BaseException as error:
        # A decoder written in Rust panics with a BaseException of its own.
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise InputError(
            f"{label}: cannot {doing} ({type(error).__name__}); the file is damaged or not "
            "standard, export it again or leave it out"
        ) from None


# --- files -------------------------------------------------------------------------------------

# Names that scanners and archives number; any other name may hold a patient's.
_PLAIN_NAME = re.compile(
    r"(IM|IMG|IMAGE|I|CT|MR|SLICE|FILE)?[-_]?\d{1,5}([-_]\d{1,5})?(\.\w{1,4})?", re.IGNORECASE
)


@dataclass(frozen=True)
class Source:
    """One file of the input; ``open`` gives its bytes as a seekable stream."""

    label: str
    open: Callable[[], BinaryIO]


def is_plain_name(name: str) -> bool:
    """Whether a file name is but a number, so that it names no patient."""
    return _PLAIN_NAME.fullmatch(name) is not None


def _label(name: str, index: int, total: int) -> str:
    if total == 1:
        return "the file"
    shown = f" ({name})" if is_plain_name(name) else ""
    return f"file {index + 1} of {total} by path{shown}"


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _count_unreadable(skipped: Counter[str], error: OSError) -> None:
    skipped["unreadable folder"] += 1


def _folder_sources(root: Path, skipped: Counter[str]) -> list[Source]:
    root = root.resolve()
    found: list[Path] = []
    unreadable = partial(_count_unreadable, skipped)
    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=False):
        for name in [*folders, *names]:
            path = Path(folder, name)
            if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(root)):
                skipped["link, not followed"] += 1
            elif name in names:
                try:
                    regular = stat.S_ISREG(path.stat().st_mode)
                except OSError:
                    regular = False
                if regular:
                    found.append(path)
                else:
                    skipped["not a regular file"] += 1
    found.sort()
    return [
        Source(_label(path.name, i, len(found)), partial(_open, path))
        for i, path in enumerate(found)
    ]


def _zip_sources(
    archive: zipfile.ZipFile, size: int, skipped: Counter[str], max_bytes: int
) -> list[Source]:
    members = []
    for info in archive.infolist():
        if stat.S_ISLNK(info.external_attr >> 16):
            skipped["link, not followed"] += 1
        elif not info.is_dir():
            members.append(info)
    total = sum(info.file_size for info in members)
    if len(members) > 100_000:
        raise InputError(
            f"the archive has {len(members)} members, at most 100000 are read; unpack it first"
        )
    if total > max_bytes or total > max(200 * size, 1 << 26):
        raise InputError(
            f"the archive claims {total >> 20} MiB in {max(size >> 20, 1)} MiB, more than a ratio "
            f"of 200 or the limit of {max_bytes >> 20} MiB; unpack it yourself if you trust it"
        )
    members.sort(key=lambda info: info.filename)

    def read(info: zipfile.ZipInfo) -> BinaryIO:
        # Bounded by the declared size, whatever the compressed stream holds.
        with archive.open(info) as stream:
            return io.BytesIO(stream.read(info.file_size))

    return [
        Source(
            _label(info.filename.rsplit("/", 1)[-1], i, len(members)),
            partial(read, info),
        )
        for i, info in enumerate(members)
    ]


@contextmanager
def open_sources(path: Path, skipped: Counter[str], max_bytes: int) -> Iterator[list[Source]]:
    """The files of a folder (all levels), a zip archive, or the one file itself.

    Args:
        path: folder, file or zip archive.
        skipped: counts what is left out, by reason.
        max_bytes: refuse archives that claim more than this.

    Raises:
        NoInputError: the path does not exist.
        InputError: an unreadable path, a damaged archive or one beyond the limits.
    """
    try:
        if not path.exists():
            raise NoInputError(f"{path} does not exist; give a DICOM folder, file or zip archive")
        folder = path.is_dir()
        if not folder and not path.is_file():
            raise InputError(f"{path} is not a regular file or folder")
        is_dicom = not folder and _is_dicom(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if folder:
        yield _folder_sources(path, skipped)
        return
    if is_dicom or not zipfile.is_zipfile(path):
        yield [Source(_label(path.name, 0, 1), partial(_open, path))]
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise InputError(f"{path} is a damaged zip archive; make it again") from None
    with archive:
        yield _zip_sources(archive, path.stat().st_size, skipped, max_bytes)
