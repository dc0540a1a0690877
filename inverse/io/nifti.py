r"""NIfTI in and out: volumes with their affine, as the same `Series` that DICOM gives.

NIfTI maps voxel (i, j, k) to millimetres towards right, anterior, superior (RAS); DICOM counts
towards left, posterior, superior (LPS):

.. math:: p_\mathrm{LPS} = \mathrm{diag}(-1, -1, 1)\,(A\,(i, j, k, 1)^\top)_\mathrm{RAS} .

Slices are the third axis as stored.  In a slice, axes are swapped and flipped to the usual view
(axial: left and posterior; coronal: left and feet; sagittal: posterior and feet), and slices
ascend along their normal: permutations only, nothing is resampled.  A file does not tell its
modality: a JSON sidecar beside it does (``"Modality"``, as converters write), or the caller.

Source: R. W. Cox et al., A (sort of) new image data format standard: NIfTI-1 (2004).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from inverse.errors import (
    GeometryError,
    InputError,
    NoInputError,
    NumericalError,
    ResourceError,
    UnsupportedError,
)
from inverse.io.dicom_headers import Note
from inverse.io.dicom_read import AIR_HU, Series
from inverse.io.dicom_stacks import Inspection, Stack
from inverse.io.dicom_write import (
    TOOLKIT,
    Derivation,
    WrittenSeries,
    toolkit_version,
    write_folder,
)

__all__ = ["inspect_nifti", "is_nifti", "is_nifti_template", "nifti_files", "read_nifti",
           "write_nifti"]  # fmt: skip

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}  # unknown, metre, millimetre, micrometre
_HEADER_BYTES = 540
_MAX_OFFSET = 1 << 26
_TILT_DEG = 0.1

# plane -> (direction of a row, direction of a column) that the usual view has, LPS
_VIEWS = {
    2: ((1, 0, 0), (0, 1, 0)),
    1: ((1, 0, 0), (0, 0, -1)),
    0: ((0, 1, 0), (0, 0, -1)),
}


_Axes = tuple[tuple[int, bool], tuple[int, bool], tuple[int, bool]]
"""Stored axis and flip of (slice, row index, column index)."""


def _magic(start: bytes) -> bool:
    return start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0"


def _open(path: Path) -> Any:
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")


def is_nifti(path: Path) -> bool:
    """Whether a file is a single-file NIfTI image, plain or gzipped."""
    try:
        with _open(path) as stream:
            return _magic(stream.read(_HEADER_BYTES))
    except (OSError, EOFError, zlib.error):
        return False


def is_nifti_template(template: bytes) -> bool:
    """Whether a slice's template is a NIfTI header rather than a DICOM one."""
    return _magic(template)


def nifti_files(path: Path) -> list[Path]:
    """The NIfTI images that a path names: the file, or those of a folder (all levels)."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*.nii*") if p.is_file() and not p.is_symlink())
        return [p for p in found if is_nifti(p)]
    return [path] if path.is_file() and is_nifti(path) else []


@dataclass(frozen=True)
class _Volume:
    """One three-dimensional volume of a file, as its header describes it.

    ``axes`` gives the stored axis and the flip of (slice, row index, column index).
    """

    path: Path
    label: str
    index: int
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    scale: tuple[float, float]
    affine: NDArray[np.float64]
    axes: _Axes
    form_code: int
    tilt_deg: float
    problems: tuple[Note, ...]
    modality: str
    synthetic: bool

    @property
    def size(self) -> tuple[int, int, int]:
        """(slices, rows, columns)."""
        z, y, x = (self.shape[axis] for axis, _ in self.axes)
        return z, y, x

    def lps(self) -> NDArray[np.float64]:
        """Affine from (column, row, slice) in the order of the array to LPS mm."""
        m = np.eye(4)
        m[:3, 3] = self.affine[:3, 3]
        for target, (axis, flip) in zip((2, 1, 0), self.axes, strict=True):
            step = self.affine[:3, axis]
            m[:3, target] = -step if flip else step
            if flip:
                m[:3, 3] += step * (self.shape[axis] - 1)
        return m


def _sidecar(path: Path) -> dict[str, Any]:
    """The JSON beside a file, or nothing."""
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    try:
        with (path.parent / f"{stem}.json").open("rb") as stream:
            content = json.loads(stream.read(1 << 22))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _header(path: Path, label: str) -> Any:
    try:
        import nibabel
    except ImportError:
        raise UnsupportedError(
            "NIfTI images need nibabel; install it with `pip install nibabel`"
        ) from None
    try:
        with _open(path) as stream:
            start = stream.read(_HEADER_BYTES)
        kind = nibabel.Nifti2Header if start[4:8] == b"n+2\0" else nibabel.Nifti1Header
        return kind.from_fileobj(io.BytesIO(start), check=False)
    except Exception as error:
        raise InputError(
            f"{label}: a damaged NIfTI header ({type(error).__name__}); convert it again"
        ) from None


def _volumes(path: Path, label: str) -> Iterator[_Volume]:
    header = _header(path, label)
    try:
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        slope, inter = header.get_slope_inter()
        codes = int(header["sform_code"]), int(header["qform_code"])
        affine = np.asarray(header.get_best_affine(), np.float64)
        unit = _UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)
        offset = int(header.get_data_offset())
    except Exception as error:
        raise InputError(
            f"{label}: a damaged NIfTI header ({type(error).__name__}); convert it again"
        ) from None
    if len(shape) < 3 or min(shape) < 1 or any(n != 1 for n in shape[4:]):
        raise UnsupportedError(
            f"{label}: a NIfTI image of shape {shape}; volumes (i, j, k) and series of volumes "
            "(i, j, k, t) are read"
        )
    if dtype.kind not in "iuf" or not 0 <= offset <= _MAX_OFFSET:
        raise UnsupportedError(
            f"{label}: NIfTI values of type {dtype}; only real grey-scale images are read"
        )
    scale = (1.0 if slope is None else float(slope), 0.0 if inter is None else float(inter))
    affine = _RAS_TO_LPS @ affine
    affine[:3] *= unit
    problems = [*_affine_problems(affine, codes)]
    axes: _Axes = ((2, False), (1, False), (0, False))
    tilt = 0.0
    if not problems:
        axes, tilt = _view(affine), _tilt(affine)
    about = _sidecar(path)
    modality = about.get("Modality")
    for index in range(shape[3] if len(shape) > 3 else 1):
        yield _Volume(
            path=path,
            label=label,
            index=index,
            shape=(shape[0], shape[1], shape[2]),
            dtype=dtype,
            offset=offset,
            scale=scale,
            affine=affine,
            axes=axes,
            form_code=next((code for code in codes if 1 <= code <= 5), 1),
            tilt_deg=tilt,
            problems=tuple(problems),
            modality=modality if modality in ("CT", "MR") else "unknown",
            synthetic=about.get("SyntheticData") is True,
        )


def _affine_problems(affine: NDArray[np.float64], codes: tuple[int, int]) -> Iterator[Note]:
    if not any(code > 0 for code in codes):
        yield Note("NO_GEOMETRY", "neither qform nor sform; orientation and position are unknown")
        return
    length = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (length > 1e-6).all():
        yield Note("BAD_SPACING", "the affine has a zero or infinite voxel size")
        return
    i, j, k = (affine[:3, :3] / length).T
    if abs(i @ j) > 1e-3 or abs(k @ np.cross(i, j)) < 0.1:
        yield Note("BAD_ORIENTATION", "the affine shears rows against columns; resample it first")


def _view(affine: NDArray[np.float64]) -> _Axes:
    """Stored axis and flip of (slice, row index, column index) for the usual view."""
    steps = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    plane = int(np.abs(np.cross(steps[:, 0], steps[:, 1])).argmax())
    row, column = (np.array(v, np.float64) for v in _VIEWS[plane])
    x = int(np.abs(row @ steps[:, :2]).argmax())  # stored axis that runs along a row
    y = 1 - x
    flip_x, flip_y = bool(row @ steps[:, x] < 0), bool(column @ steps[:, y] < 0)
    along = steps[:, x] * (-1 if flip_x else 1)
    down = steps[:, y] * (-1 if flip_y else 1)
    flip_z = bool(np.cross(along, down) @ steps[:, 2] < 0)
    return (2, flip_z), (y, flip_y), (x, flip_x)


def _tilt(affine: NDArray[np.float64]) -> float:
    """Angle in degrees between the stacking direction and the slices' normal."""
    i, j, k = affine[:3, :3].T
    normal = np.cross(i, j)
    cosine = abs(float(k @ normal)) / float(np.linalg.norm(k) * np.linalg.norm(normal))
    tilt = math.degrees(math.acos(min(1.0, cosine)))
    return tilt if tilt > _TILT_DEG else 0.0


def _frame(volume: _Volume) -> tuple[tuple[float, float, float], tuple[float, ...], Any]:
    """(slice, row, column) spacing along the axes, orientation, and slice positions in LPS."""
    m = volume.lps()
    columns, rows, step = m[:3, 0], m[:3, 1], m[:3, 2]
    dx, dy = float(np.linalg.norm(columns)), float(np.linalg.norm(rows))
    orientation = (*(columns / dx), *(rows / dy))
    normal = np.cross(orientation[:3], orientation[3:])
    positions = m[:3, 3] + np.arange(volume.size[0])[:, None] * step
    spacing = (abs(float(step @ normal)), dy, dx)
    return spacing, tuple(float(v) for v in orientation), positions


def _tilt_notes(volume: _Volume) -> list[Note]:
    if not volume.tilt_deg:
        return []
    return [
        Note(
            "TILT",
            f"the stack is sheared by {volume.tilt_deg:.2f} degrees; slices are right one by one, "
            "the volume is not rectangular",
        )
    ]


def _listed(path: Path) -> list[_Volume]:
    files = nifti_files(path)
    if not files:
        raise NoInputError(f"{path} holds no NIfTI image; give a .nii or .nii.gz file")
    return [
        volume
        for k, file in enumerate(files)
        for volume in _volumes(
            file, "the file" if len(files) == 1 else f"NIfTI file {k + 1} of {len(files)} by path"
        )
    ]


def inspect_nifti(path: str | os.PathLike[str]) -> Inspection:
    """What a NIfTI file, or a folder of them, holds; reads headers only.

    Args:
        path: file or folder.

    Raises:
        NoInputError: no NIfTI image there.
        InputError: a damaged header.
        UnsupportedError: colour or complex values, vectors.
    """
    stacks = []
    for key, volume in enumerate(_listed(Path(path)), start=1):
        z, rows, columns = volume.size
        notes = _tilt_notes(volume)
        if volume.modality == "unknown":
            notes.append(
                Note(
                    "NO_MODALITY", "NIfTI does not tell CT from MR; the command or a sidecar does"
                )
            )
        spacing, orientation, span = None, None, None
        if not volume.problems:
            spacing, orientation, positions = _frame(volume)
            normal = np.cross(orientation[:3], orientation[3:])
            span = (float(positions[0] @ normal), float(positions[-1] @ normal))
        identity = f"{volume.label} {volume.shape} {volume.index} {volume.affine.tolist()}"
        stacks.append(
            Stack(
                key=str(key),
                series=hashlib.sha256(identity.encode()).hexdigest()[:8],
                series_number=volume.index + 1,
                modality=volume.modality,
                slices=z,
                shape=(rows, columns),
                spacing=spacing,
                orientation=orientation,
                z_range=span,
                tilt_deg=volume.tilt_deg,
                localizer=False,
                lossy=False,
                warnings=tuple(notes),
                problems=volume.problems,
                headers=(),
            )
        )
    return Inspection(tuple(stacks), {})


def _values(volume: _Volume, max_bytes: int) -> NDArray[np.float64]:
    """Voxels ``(i, j, k)`` in physical units; reads exactly what the header claims."""
    count = math.prod(volume.shape)
    size = count * volume.dtype.itemsize
    if 4 * count > max_bytes or size * (volume.index + 1) > 64 * max_bytes:
        raise ResourceError(
            f"{volume.label} claims {volume.shape} voxels, {4 * count >> 20} MiB, the limit is "
            f"{max_bytes >> 20} MiB; raise the limit (--limits) if the file is trusted"
        )
    try:
        with _open(volume.path) as stream:
            stream.seek(volume.offset + volume.index * size)
            raw = stream.read(size)
    except (OSError, EOFError, zlib.error):
        raw = b""
    if len(raw) != size:
        raise InputError(
            f"{volume.label}: {size} bytes of voxels expected, got {len(raw)}; the file is "
            "damaged or cut short"
        )
    stored = np.frombuffer(raw, volume.dtype).reshape(volume.shape, order="F")
    slope, inter = volume.scale
    return np.asarray(stored.astype(np.float64) * slope + inter)


def read_nifti(
    path: str | os.PathLike[str],
    modality: Literal["CT", "MR"] | None = None,
    stack: str | int | None = None,
    *,
    max_bytes: int = 1 << 32,
) -> Series:
    """Read one volume as a stack of slices in HU (CT) or signal (MR).

    Args:
        path: NIfTI file, or folder that holds such files.
        modality: what the values are, where no sidecar tells.
        stack: number of the volume as `inspect_nifti` shows it, where there are several.
        max_bytes: limit on the decoded volume (4 bytes a voxel).

    Raises:
        NoInputError: no NIfTI image there.
        InputError: damaged, without geometry, of unknown modality, several and no choice, or
            values that are no HU.
        UnsupportedError: colour or complex values, vectors.
        ResourceError: a volume beyond ``max_bytes``.
    """
    volumes = _listed(Path(path))
    if stack is None and len(volumes) > 1:
        raise InputError(f"{len(volumes)} volumes found, one is needed; choose with --stack")
    number = 1 if stack is None else int(stack) if str(stack).isdigit() else 0
    if not 1 <= number <= len(volumes):
        raise InputError(f"no volume matches --stack {stack}; there are {len(volumes)}")
    volume = volumes[number - 1]
    for note in volume.problems:
        raise InputError(f"{volume.label}: {note.text} [{note.code}]")
    kind = volume.modality if volume.modality != "unknown" else modality
    if kind is None:
        raise InputError(
            f"{volume.label} does not tell whether it is CT or MR; put a JSON file beside it with "
            '{"Modality": "MR"}'
        )
    array, mask, counts = _arranged(volume, kind, max_bytes)
    spacing, orientation, positions = _frame(volume)
    return Series(
        array=array,
        modality=kind,
        unit="HU" if kind == "CT" else "signal",
        spacing=spacing,
        positions=positions,
        orientation=orientation,
        templates=_templates(volume),
        mask=mask,
        rescale=np.tile(np.array(volume.scale), (len(array), 1)),
        tilt_deg=volume.tilt_deg,
        synthetic=volume.synthetic,
        warnings=_tilt_notes(volume) + [Note(c, _COUNTED[c].format(n=n)) for c, n in counts],
    )


_COUNTED = {
    "NAN_PADDING": "{n} voxels are NaN and count as air (CT) or no signal (MR)",
    "UNTAGGED_PADDING": "{n} voxels are below -1024 HU and count as air",
}


def _arranged(
    volume: _Volume, modality: str, max_bytes: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_], list[tuple[str, int]]]:
    """Values ``(Z, Y, X)``, what of them is padding, and counts of findings."""
    values = _values(volume, max_bytes).transpose([axis for axis, _ in volume.axes])
    values = np.flip(values, tuple(k for k, (_, flip) in enumerate(volume.axes) if flip))
    counts: Counter[str] = Counter()
    mask = np.isnan(values)
    counts["NAN_PADDING"] = int(mask.sum())
    if np.isinf(values).any() or np.abs(values[~mask]).max(initial=0) > np.finfo(np.float32).max:
        raise InputError(f"{volume.label}: infinite voxel values; convert it again")
    if modality == "CT":
        if mask.all() or values[~mask].min() >= 0:
            raise InputError(
                f"{volume.label}: no value is negative, so they are no HU, in which air is -1000; "
                "subtract the offset first [NOT_HU]"
            )
        low = (values < -1024.0) & (not volume.synthetic)
        counts["UNTAGGED_PADDING"] = int(low.sum())
        mask |= low
    array = np.ascontiguousarray(values, np.float32)
    array[mask] = AIR_HU if modality == "CT" else 0.0
    return array, np.ascontiguousarray(mask), sorted((+counts).items())


def _templates(volume: _Volume) -> tuple[bytes, ...]:
    """A NIfTI-1 header a slice, with the slice's affine and nothing that names a patient."""
    import nibabel

    m = _RAS_TO_LPS @ volume.lps()  # back to RAS
    slices, rows, columns = volume.size
    if max(rows, columns) > 32767:
        raise UnsupportedError(f"{volume.label}: NIfTI-1 headers hold at most 32767 pixels a side")
    made = []
    for k in range(slices):
        header = nibabel.Nifti1Header()
        header.set_data_shape((columns, rows, 1))
        affine = m.copy()
        affine[:3, 3] += k * m[:3, 2]
        header.set_sform(affine, code=volume.form_code)
        header.set_zooms(np.linalg.norm(m[:3, :3], axis=0))
        header.set_xyzt_units("mm")
        header["magic"] = b"n+1"
        made.append(header.binaryblock)
    return tuple(made)


# --- out ---------------------------------------------------------------------------------------


def write_nifti(
    out_dir: str | os.PathLike[str],
    volume: NDArray[np.float32],
    templates: Sequence[bytes],
    *,
    description: str,
    derivation: Derivation,
    kind: Literal["image", "std"] = "image",
    synthetic: bool = True,
    unit: Literal["HU", "signal"] = "HU",
    created: datetime | None = None,
) -> WrittenSeries:
    """Write a derived volume as ``NAME.nii.gz`` with a JSON sidecar, complete or not at all.

    The grid is that of the templates' slices; a matrix that differs covers the same field of
    view, as in a derived DICOM series.

    Args:
        out_dir: new or empty folder; its name is the files'.
        volume: ``(Z, Y, X)``, HU or signal; stored as float32.
        templates: a header a slice, from `Series.templates` of a NIfTI input.
        description: what the volume is.
        derivation: provenance.
        kind: ``"image"`` or ``"std"`` (a map of standard deviations).
        synthetic: simulated data, inpainting or a generative prior.
        unit: ``"HU"`` or ``"signal"``.
        created: date and time of creation; now by default.

    Raises:
        GeometryError: a volume that is not ``(len(templates), Y, X)``.
        InputError: templates whose slices are not evenly spaced.
        NumericalError: NaN or infinite values; nothing is written.
        OutputError: a folder that is not empty, or cannot be written.
    """
    import nibabel

    out = Path(out_dir)
    volume = np.asarray(volume, np.float32)
    if volume.ndim != 3 or len(volume) != len(templates) or 0 in volume.shape:
        raise GeometryError(
            f"the volume must have shape ({len(templates)}, rows, columns) for {len(templates)} "
            f"templates, got {volume.shape}"
        )
    if not np.isfinite(volume).all():
        bad = int((~np.isfinite(volume)).sum())
        raise NumericalError(f"{bad} voxels are NaN or infinite, so no volume is written")
    affine, code = _stacked_affine(templates, volume.shape[1:])
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), affine)
    image.set_sform(affine, code=code)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"RESEARCH ONLY - {TOOLKIT} {derivation.method}"[:79].encode()
    packed = gzip.compress(image.to_bytes(), mtime=0)
    digest = hashlib.sha256(packed).hexdigest()
    about = {
        "Modality": "CT" if unit == "HU" else "MR",
        "Units": unit,
        "Description": f"RESEARCH ONLY - {description}",
        "Content": "standard deviation" if kind == "std" else "image",
        "SyntheticData": bool(synthetic),
        "NotForDiagnosis": True,
        "Created": (created or datetime.now()).isoformat(timespec="seconds"),
        "GeneratedBy": [{"Name": TOOLKIT, "Version": toolkit_version(), **asdict(derivation)}],
        "SHA256": digest,
    }
    sidecar = json.dumps(about, indent=2, sort_keys=True, default=str).encode()
    paths = write_folder(out, ((f"{out.name}.json", sidecar), (f"{out.name}.nii.gz", packed)))
    return WrittenSeries(paths[1:], digest, 0, 1.0)


def _stacked_affine(
    templates: Sequence[bytes], shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], int]:
    """The affine of a stack of slices on ``shape`` pixels, RAS, and its form code."""
    import nibabel

    try:
        headers = [
            nibabel.Nifti1Header.from_fileobj(io.BytesIO(t), check=False) for t in templates
        ]
        affines = [np.asarray(h.get_sform(), np.float64) for h in headers]
        columns, rows, _ = headers[0].get_data_shape()
        code = int(headers[0]["sform_code"])
    except Exception as error:
        raise InputError(
            f"a NIfTI template is damaged ({type(error).__name__}); simulate the measurement again"
        ) from None
    affine = affines[0].copy()
    origins = np.array([a[:3, 3] for a in affines])
    if len(affines) > 1:
        affine[:3, 2] = (origins[-1] - origins[0]) / (len(affines) - 1)
        line = origins[0] + np.arange(len(affines))[:, None] * affine[:3, 2]
        if np.abs(origins - line).max() > 0.01:
            raise InputError("NIfTI slices must be evenly spaced; choose them with one step")
    for axis, ratio in ((0, columns / shape[1]), (1, rows / shape[0])):
        affine[:3, 3] += (ratio - 1) / 2 * affine[:3, axis]
        affine[:3, axis] *= ratio
    return affine, code
