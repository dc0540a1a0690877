"""Training slices out of files: DICOM, NIfTI, npz and HDF5 stacks, and folders that mix them.

A named file that cannot be used is an error.  In a folder, what cannot be used is counted by
reason and left out, so that one damaged file does not stop a training run; nothing that tells a
patient reaches a reason.
"""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from inverse.errors import InputError, NoInputError, ReconError, ResourceError

__all__ = ["Slices", "read_slices"]

logger = logging.getLogger(__name__)

Modality = Literal["CT", "MR"]
_MAX_BYTES = 1 << 32


@dataclass
class Slices:
    """Slices in the units of their files, and what was left out.

    Attributes:
        images: 2-D arrays; HU for CT, the scanner's signal for MR.
        pixel_mm: pixel size of each, mm.
        patient: patient key of each.
        scan: key of the acquisition of each, within which signal is comparable.
        skipped: files and slices left out, by reason.
    """

    images: list[NDArray[np.float32]] = field(default_factory=list)
    pixel_mm: list[float] = field(default_factory=list)
    patient: list[str] = field(default_factory=list)
    scan: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, stack: NDArray[np.float32], pixel_mm: float, patient: str, scan: str) -> None:
        """Append the slices of one volume ``(slices, rows, columns)``."""
        self.images += list(stack)
        self.pixel_mm += [pixel_mm] * len(stack)
        self.patient += [patient] * len(stack)
        self.scan += [scan] * len(stack)


def read_slices(
    path: Path, modality: Modality, select: Mapping[str, Sequence[str]] | None = None
) -> Slices:
    """All slices of one modality in a file, a zip archive of DICOM, or a folder (all levels).

    Args:
        path: what to read.  A ``.npz`` or HDF5 stack holds exactly one 3-D array ``(slices, rows,
            columns)`` and has a ``.csv`` of the same name beside it, with one row a slice and
            columns ``patient`` (or ``subject``) and ``pixel_mm``; an HDF5 dataset may carry them
            as attributes instead.  A NIfTI file is a patient of its own, unless it lies in one of
            several folders, which then are patients, or its path names a BIDS subject (``sub-``).
        modality: what is wanted; NIfTI without a sidecar is taken to be it.
        select: keep rows of tables whose column has one of the values; a table without the
            column keeps all.

    Raises:
        NoInputError: nothing there.
        InputError, UnsupportedError, ResourceError: a named file that cannot be read.
    """
    found = Slices()
    if not path.exists():
        raise NoInputError(
            f"training data '{path.name}' do not exist; give a folder, or a DICOM, NIfTI, npz or "
            "HDF5 file"
        )
    if path.is_file():
        _read_file(path, modality, select or {}, found, path.stem)
        return found
    files = _listed(path, found.skipped)
    if not files:
        raise NoInputError(f"training data '{path.name}' is an empty folder; give one with images")
    names = _volume_names(path, [f for f in files if _kind(f) == "NIfTI"])
    for file in files:
        try:
            _read_file(file, modality, select or {}, found, names.get(file, file.stem))
        except ResourceError:
            raise
        except ReconError as error:
            logger.info("left out: %s", error)
            found.skipped[f"{_kind(file)} file that cannot be used"] += 1
    return found


def _listed(root: Path, skipped: Counter[str]) -> list[Path]:
    """Files of a folder in order, without links and the tables of stacks."""
    files = []
    for folder, _, names in os.walk(root, followlinks=False):
        for name in names:
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file():
                skipped["link or special file"] += 1
            elif not os.access(path, os.R_OK):
                skipped["file without permission to read"] += 1
            elif path.suffix not in (".csv", ".json"):  # beside stacks, and beside NIfTI
                files.append(path)
    return sorted(files)


def _kind(path: Path) -> Literal["npz", "HDF5", "NIfTI", "DICOM"]:
    """The reader of a file, told by its content but for npz (whose zip DICOM shares)."""
    if path.suffix == ".npz":
        return "npz"
    with path.open("rb") as stream:
        if stream.read(8) == b"\x89HDF\r\n\x1a\n":
            return "HDF5"
    if ".nii" in path.suffixes:
        return "NIfTI"
    return "DICOM"


def _read_file(
    path: Path,
    modality: Modality,
    select: Mapping[str, Sequence[str]],
    found: Slices,
    name: str,
) -> None:
    """Add the slices of one file; ``name`` is the patient of a format that tells none."""
    kind = _kind(path)
    if kind == "npz":
        _read_npz(path, select, found)
    elif kind == "HDF5":
        _read_hdf5(path, select, found, name)
    elif kind == "NIfTI":
        _read_nifti(path, modality, found, name)
    else:
        _read_dicom(path, modality, found)


def _read_npz(path: Path, select: Mapping[str, Sequence[str]], found: Slices) -> None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            stacks = [archive[key] for key in archive.files if archive[key].ndim == 3]
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise InputError(
            f"'{path.name}' is not a readable npz archive ({type(error).__name__}); write it again"
        ) from None
    if len(stacks) != 1:
        raise InputError(
            f"'{path.name}' must hold exactly one 3-D array, found {len(stacks)}; write a stack a "
            "file"
        )
    _add_table(path, stacks[0], select, found)


def _add_table(
    path: Path,
    stack: NDArray[np.generic],
    select: Mapping[str, Sequence[str]],
    found: Slices,
) -> None:
    """Add the rows of a stack that the table beside it describes and selects."""
    table = path.with_suffix(".csv")
    if not table.is_file():
        raise InputError(
            f"'{path.name}' must have a table '{table.name}' beside it with columns patient, "
            "pixel_mm and one row a slice"
        )
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = set(rows[0]) if rows else set()
    key = "patient" if "patient" in names else "subject"
    if len(rows) != len(stack) or not {key, "pixel_mm"} <= names:
        raise InputError(
            f"'{table.name}' must have one row a slice ({len(stack)}, found {len(rows)}) "
            "with columns patient (or subject), pixel_mm"
        )
    for image, row in zip(stack, rows, strict=True):
        if not all(row[k] in v for k, v in select.items() if k in names):
            continue
        try:
            pixel = float(row["pixel_mm"])
        except ValueError:
            pixel = 0.0
        if not 0 < pixel < 1e3:
            raise InputError(
                f"'{table.name}' has the pixel size '{row['pixel_mm']}', expected millimetres; "
                "correct the table"
            )
        found.add(image[None].astype(np.float32), pixel, row[key], f"{path}:{row[key]}")


def _read_hdf5(path: Path, select: Mapping[str, Sequence[str]], found: Slices, name: str) -> None:
    from inverse.io.hdf5 import open_hdf5

    with open_hdf5(path, "HDF5 stack", _MAX_BYTES) as file:
        stacks = [
            item
            for key in file.file
            if (item := file.dataset(key)) is not None
            and item.ndim == 3
            and item.dtype.kind in "fiu"
        ]
        if len(stacks) != 1:
            raise InputError(
                f"'{path.name}' must hold exactly one real 3-D dataset at its top level, found "
                f"{len(stacks)}; write a stack a file"
            )
        stack = file.array(stacks[0].name.lstrip("/"))
        assert stack is not None
        pixel, patient = stacks[0].attrs.get("pixel_mm"), stacks[0].attrs.get("patient", name)
    if pixel is None:
        _add_table(path, stack, select, found)
        return
    if not 0 < float(pixel) < 1e3:
        raise InputError(f"'{path.name}' has the pixel size {pixel}, expected millimetres")
    found.add(stack.astype(np.float32), float(pixel), str(patient), str(path))


def _volume_names(root: Path, files: Sequence[Path]) -> dict[Path, str]:
    """Patients of NIfTI files: BIDS subject, else folder where there are several, else file."""
    several = len({f.parent for f in files} - {root}) > 1
    names = {}
    for file in files:
        subject = _subject(file.relative_to(root).parts)
        folder = str(file.parent.relative_to(root)) if several and file.parent != root else ""
        names[file] = subject or folder or file.name.split(".nii")[0]
    return names


def _subject(parts: Sequence[str]) -> str:
    """``sub-<label>`` of a BIDS path, or nothing."""
    return next((p.split("_")[0].split(".")[0] for p in parts if p.startswith("sub-")), "")


def _read_nifti(path: Path, modality: Modality, found: Slices, name: str) -> None:
    from inverse.io.nifti import inspect_nifti, read_nifti

    patient = _subject((path.name,)) or name.split(".nii")[0]
    for stack in inspect_nifti(path).stacks:
        if stack.modality not in ("unknown", modality):
            found.skipped[f"slice of modality {stack.modality}"] += stack.slices
            continue
        series = read_nifti(path, modality, stack.key, max_bytes=_MAX_BYTES)
        if not np.isclose(series.spacing[1], series.spacing[2], rtol=0.01):
            found.skipped["slice with pixels that are not square"] += len(series.array)
            continue
        found.add(series.array, float(series.spacing[1]), patient, f"{path}:{stack.key}")


def _read_dicom(path: Path, modality: Modality, found: Slices) -> None:
    from inverse.io.dicom import inspect, read_series

    content = inspect(path)
    for reason, count in content.skipped.items():
        known = "file that is not DICOM, NIfTI, npz or HDF5"
        found.skipped[known if reason == "not DICOM" else reason] += count
    for stack in content.stacks:
        reason = ""
        if stack.modality != modality:
            reason = f"slice of modality {stack.modality}"
        elif stack.localizer:
            reason = "localizer"
        if reason:
            found.skipped[reason] += stack.slices
            continue
        series = read_series(path, stack=stack.key)
        if not np.isclose(series.spacing[1], series.spacing[2], rtol=0.01):
            found.skipped["slice with pixels that are not square"] += len(series.array)
            continue
        key = series.patient_key
        found.add(series.array, float(series.spacing[1]), key, f"{key}:{stack.series}")
