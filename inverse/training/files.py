"""Training slices out of files: DICOM, NIfTI, npz and HDF5 stacks, and folders that mix them.

A named file that cannot be used is an error.  In a folder or a zip archive, what cannot be used
is counted by reason and left out, so that one damaged file does not stop a training run; nothing
that tells a patient reaches a reason.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from inverse.errors import InputError, NoInputError, ReconError, ResourceError

if TYPE_CHECKING:
    from inverse.io.dicom import Series
    from inverse.io.dicom_files import Source

__all__ = ["Plane", "Slices", "read_slices"]

logger = logging.getLogger(__name__)

Modality = Literal["CT", "MR"]
Plane = Literal["axial", "coronal", "sagittal"]
_MAX_BYTES = 1 << 32
_ZYX = (2, 1, 0)  # patient coordinates in the order of a volume's axes
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # begins with a member, or is empty


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
    path: Path,
    modality: Modality,
    select: Mapping[str, Sequence[str]] | None = None,
    plane: Plane | None = None,
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
        plane: wanted plane, of formats that tell it.  Slices of others are left out, but a NIfTI
            volume whose voxels are cubes to 5 % is cut into slices of that plane, with the
            patient's right, front and feet first.

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
        _read_file(path, modality, select or {}, plane, found, path.stem)
        return found
    files = _listed(path, found.skipped)
    if not files:
        raise NoInputError(f"training data '{path.name}' is an empty folder; give one with images")
    names = _volume_names(path, [f for f in files if _kind(f) == "NIfTI"])
    for file in files:
        try:
            _read_file(file, modality, select or {}, plane, found, names.get(file, file.stem))
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


def _kind(path: Path) -> Literal["npz", "HDF5", "zip", "NIfTI", "DICOM"]:
    """The reader of a file, told by its content but for npz (which is a zip, too)."""
    if path.suffix == ".npz":
        return "npz"
    with path.open("rb") as stream:
        start = stream.read(8)
    if start == b"\x89HDF\r\n\x1a\n":
        return "HDF5"
    if start[:4] in _ZIP or path.suffix == ".zip":
        return "zip"
    if ".nii" in path.suffixes:
        return "NIfTI"
    return "DICOM"


def _read_file(
    path: Path,
    modality: Modality,
    select: Mapping[str, Sequence[str]],
    plane: Plane | None,
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
        _read_nifti(path, modality, plane, found, name)
    elif kind == "zip":
        _read_zip(path, modality, plane, found)
    else:
        _read_dicom(path, modality, plane, found)


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


def _read_nifti(
    path: Path, modality: Modality, plane: Plane | None, found: Slices, name: str
) -> None:
    from inverse.io.nifti import inspect_nifti, read_nifti

    patient = _subject((path.name,)) or name.split(".nii")[0]
    for stack in inspect_nifti(path).stacks:
        if stack.modality not in ("unknown", modality):
            found.skipped[f"slice of modality {stack.modality}"] += stack.slices
            continue
        series = read_nifti(path, modality, stack.key, max_bytes=_MAX_BYTES)
        if plane is not None and (native := _plane(series.orientation)) != plane:
            if not np.allclose(series.spacing, series.spacing[0], rtol=0.05):
                found.skipped[f"{native} slice of voxels that are no cubes"] += len(series.array)
                continue
            pixel = float(np.mean(series.spacing))
            found.add(_cut(series, plane), pixel, patient, f"{path}:{stack.key}")
            continue
        if not np.isclose(series.spacing[1], series.spacing[2], rtol=0.01):
            found.skipped["slice with pixels that are not square"] += len(series.array)
            continue
        found.add(series.array, float(series.spacing[1]), patient, f"{path}:{stack.key}")


def _plane(orientation: Sequence[float]) -> Plane:
    """The plane nearest to a stack's, by the cosines of its rows and columns in LPS."""
    normal = np.cross(orientation[:3], orientation[3:])
    planes: tuple[Plane, ...] = ("sagittal", "coronal", "axial")
    return planes[int(np.abs(normal).argmax())]


def _cut(series: Series, plane: Plane) -> NDArray[np.float32]:
    """A volume as slices of another plane, each with feet or front, and right, first."""
    along_row, along_column = np.reshape(series.orientation, (2, 3))
    axes = np.stack([series.positions[-1] - series.positions[0], along_column, along_row])
    axes /= np.maximum(np.linalg.norm(axes, axis=1, keepdims=True), 1e-9)

    def along(order: tuple[int, ...]) -> float:
        return float(sum(abs(axes[i, k]) for i, k in zip(order, _ZYX, strict=True)))

    z, y, x = order = max(itertools.permutations(range(3)), key=along)
    flipped = tuple(i for i, k in zip(order, _ZYX, strict=True) if axes[i, k] < 0)
    wanted = {"axial": (z, y, x), "coronal": (y, z, x), "sagittal": (x, z, y)}
    return np.ascontiguousarray(np.flip(series.array, flipped).transpose(wanted[plane]))


def _read_dicom(path: Path, modality: Modality, plane: Plane | None, found: Slices) -> None:
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
        if plane is not None and (native := _plane(series.orientation)) != plane:
            found.skipped[f"{native} slice"] += len(series.array)
            continue
        if not np.isclose(series.spacing[1], series.spacing[2], rtol=0.01):
            found.skipped["slice with pixels that are not square"] += len(series.array)
            continue
        key = series.patient_key
        found.add(series.array, float(series.spacing[1]), key, f"{key}:{stack.series}")


def _read_zip(path: Path, modality: Modality, plane: Plane | None, found: Slices) -> None:
    """Add what can be read of an archive, member by member as of a folder.

    A member lies on disk, for its owner alone, while it is read.

    Raises:
        InputError: the archive's directory is damaged, or it claims to unpack to too much.
    """
    from inverse.io.dicom_files import guarded, open_sources

    if not zipfile.is_zipfile(path):
        raise InputError(
            f"'{path.name}' is a damaged zip archive: its directory is missing or broken; make it "
            "again"
        )
    with (
        open_sources(path, found.skipped, _MAX_BYTES) as sources,
        tempfile.TemporaryDirectory() as folder,
    ):
        member = Path(folder, "member")
        for source in sources:
            try:
                content = guarded(partial(_bytes, source), source.label, "unpack it")
                member.write_bytes(content)
                _read_dicom(member, modality, plane, found)
            except ResourceError:
                raise
            except ReconError as error:
                logger.info("left out of '%s': %s", path.name, error)
                found.skipped["zip member that cannot be used"] += 1


def _bytes(source: Source) -> bytes:
    with source.open() as stream:
        return stream.read()
