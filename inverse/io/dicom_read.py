r"""Read DICOM: find stacks, check their geometry, decode slices into physical units.

A *stack* is a set of slices of one series that share matrix, pixel spacing, orientation and image
type, so that they can be stacked along their common normal :math:`n = r \times c` (``r`` along a
row, ``c`` along a column).  Slices are ordered by :math:`p \cdot n` (``p`` the position of the
first pixel), never by instance number, slice location or file name.

Source: DICOM PS3.3 C.7.6.2 (Image Plane), C.7.6.3 (Image Pixel), C.11.1 (Modality LUT),
C.7.5.1.1.2 (Pixel Padding).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from inverse.errors import (
    InputError,
    NoInputError,
    ResourceError,
    UnsupportedError,
)
from inverse.io.dicom_files import Source, guarded, open_sources, quiet_pydicom

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["Inspection", "Note", "Series", "Stack", "inspect", "read_series"]

AIR_HU = -1000.0
"""What replaces padding in CT: the forward model must see air, not -3024 HU."""

_CT = "1.2.840.10008.5.1.4.1.1.2"
_MR = "1.2.840.10008.5.1.4.1.1.4"
_ENHANCED = {
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_DIRECTORY = "1.2.840.10008.1.3.10"

# Which pydicom plug-ins may decode a compressed syntax, best first, and what to install.  GDCM is
# left out on purpose: it aborts the process on malformed files.
_PLUGINS: dict[str, tuple[tuple[str, ...], str]] = {
    "1.2.840.10008.1.2.5": (("pydicom",), "pydicom"),
    "1.2.840.10008.1.2.4.50": (("pylibjpeg", "pillow"), "pillow"),
    "1.2.840.10008.1.2.4.51": (("pylibjpeg", "pillow"), "pylibjpeg pylibjpeg-libjpeg"),
    "1.2.840.10008.1.2.4.57": (("pylibjpeg",), "pylibjpeg pylibjpeg-libjpeg"),
    "1.2.840.10008.1.2.4.70": (("pylibjpeg",), "pylibjpeg pylibjpeg-libjpeg"),
    "1.2.840.10008.1.2.4.80": (("pyjpegls", "pylibjpeg"), "pyjpegls"),
    "1.2.840.10008.1.2.4.81": (("pyjpegls", "pylibjpeg"), "pyjpegls"),
    "1.2.840.10008.1.2.4.90": (("pylibjpeg", "pillow"), "pylibjpeg pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.4.91": (("pylibjpeg", "pillow"), "pylibjpeg pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.4.201": (("pylibjpeg",), "pylibjpeg pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.4.202": (("pylibjpeg",), "pylibjpeg pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.4.203": (("pylibjpeg",), "pylibjpeg pylibjpeg-openjpeg"),
}


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_HEADER_TAGS = words(
    """
    SOPClassUID SOPInstanceUID SeriesInstanceUID SeriesNumber FrameOfReferenceUID
    Modality ImageType AcquisitionNumber EchoTime TemporalPositionIdentifier TriggerTime
    DiffusionBValue ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness
    SpacingBetweenSlices NumberOfFrames SamplesPerPixel PhotometricInterpretation Rows Columns
    BitsAllocated PixelRepresentation RescaleSlope RescaleIntercept RescaleType
    LossyImageCompression SyntheticData
    """
)

# Tried in this order where slices of one geometry do not make one even stack.
_SPLIT_BY = ("acquisition", "echo_ms", "b_value", "temporal", "trigger_ms")

TEMPLATE_TAGS = words(
    """
    SpecificCharacterSet TimezoneOffsetFromUTC SOPClassUID SOPInstanceUID Modality
    PatientName PatientID IssuerOfPatientID PatientBirthDate PatientBirthTime PatientSex PatientAge
    PatientSize PatientWeight PatientSpeciesDescription PatientSpeciesCodeSequence
    PatientSexNeutered PatientBreedDescription PatientBreedCodeSequence BreedRegistrationSequence
    ResponsiblePerson
    PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence
    StudyInstanceUID StudyID StudyDate StudyTime StudyDescription AccessionNumber
    ReferringPhysicianName SeriesInstanceUID FrameOfReferenceUID PositionReferenceIndicator
    PatientPosition BodyPartExamined Laterality ImageOrientationPatient ImagePositionPatient
    PixelSpacing SliceThickness Rows Columns KVP ContrastBolusAgent
    AcquisitionDate AcquisitionTime AcquisitionNumber ScanningSequence SequenceVariant ScanOptions
    MRAcquisitionType RepetitionTime EchoTime InversionTime TriggerTime EchoTrainLength
    MagneticFieldStrength Manufacturer ManufacturerModelName SoftwareVersions BurnedInAnnotation
    LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod
    QualityControlImage SyntheticData
    """
)
"""All that a derived series may need of its source; nothing else of the source is kept."""


class Note(NamedTuple):
    """A finding about the input: a stable code and one sentence without patient data."""

    code: str
    text: str


_DAMAGED = "UNREADABLE_FILES"
_UNSUPPORTED_CODES = frozenset(
    {"MULTIFRAME", "MOSAIC", "MONOCHROME1", "COLOUR", "NO_DECODER", "NOT_HU"}
)


@dataclass(frozen=True)
class _Header:
    """What one image header says about grouping and geometry."""

    source: int
    label: str
    sop_class: str
    sop_uid: str
    series_uid: str
    series_number: int | None
    frame_of_reference: str | None
    modality: str
    image_type: tuple[str, ...]
    acquisition: int | None
    echo_ms: float | None
    b_value: float | None
    temporal: int | None
    trigger_ms: float | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness: float | None
    gap: float | None
    frames: int
    samples: int
    photometric: str
    rows: int
    columns: int
    bits: int
    rescale: tuple[float, float] | None
    rescale_type: str
    lossy: bool
    syntax: str


@dataclass(frozen=True)
class Stack:
    """One stack of slices, as far as its headers tell; nothing here identifies a patient.

    Attributes:
        key: number of the stack in this input, for ``--stack``; counts from 1.
        series: first 8 hexadecimal digits of the SHA-256 of the series UID, for ``--series``.
        series_number: number of the series on the scanner.
        modality: ``"CT"`` or ``"MR"``.
        slices: number of distinct slice positions.
        shape: (rows, columns).
        spacing: (slice, row, column) in mm; the slice spacing is along the normal.
        orientation: direction cosines of a row, then of a column (patient space, LPS).
        z_range: first and last position along the normal in mm.
        tilt_deg: angle between the stacking direction and the normal.
        localizer: a scout image.
        lossy: the pixels went through lossy compression.
        warnings: what a reader should know.
        problems: what keeps the stack from being read.
    """

    key: str
    series: str
    series_number: int | None
    modality: str
    slices: int
    shape: tuple[int, int]
    spacing: tuple[float, float, float] | None
    orientation: tuple[float, ...] | None
    z_range: tuple[float, float] | None
    tilt_deg: float
    localizer: bool
    lossy: bool
    warnings: tuple[Note, ...]
    problems: tuple[Note, ...]
    headers: tuple[_Header, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without patient data and without UIDs."""
        return {
            "stack": self.key,
            "series": self.series,
            "series_number": self.series_number,
            "modality": self.modality,
            "slices": self.slices,
            "rows": self.shape[0],
            "columns": self.shape[1],
            "spacing_mm": self.spacing and list(self.spacing),
            "orientation": self.orientation and list(self.orientation),
            "z_range_mm": self.z_range and list(self.z_range),
            "tilt_deg": round(self.tilt_deg, 4),
            "localizer": self.localizer,
            "lossy": self.lossy,
            "warnings": [note._asdict() for note in self.warnings],
            "problems": [note._asdict() for note in self.problems],
        }


@dataclass(frozen=True)
class Inspection:
    """What a folder, file or archive holds.

    Attributes:
        stacks: CT and MR stacks, sorted by series number.
        skipped: number of files that are no such image, by reason.
        warnings: findings about the input as a whole.
    """

    stacks: tuple[Stack, ...]
    skipped: dict[str, int]
    warnings: tuple[Note, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without patient data and without UIDs."""
        return {
            "stacks": [stack.to_dict() for stack in self.stacks],
            "skipped": dict(self.skipped),
            "warnings": [note._asdict() for note in self.warnings],
        }

    def table(self, limit: int = 20) -> str:
        """The stacks as lines of text, at most ``limit`` of them."""
        lines = [
            f"{'stack':>5} {'series':>8} {'no.':>5} mod. {'slices':>6} {'matrix':>10} spacing"
        ]
        for s in self.stacks[:limit]:
            number = "" if s.series_number is None else s.series_number
            matrix = f"{s.shape[0]}x{s.shape[1]}"
            spacing = " x ".join(f"{v:.3g}" for v in s.spacing) + " mm" if s.spacing else "unknown"
            remark = "  localizer" * s.localizer + "".join(f"  {n.code}" for n in s.problems[:1])
            lines.append(
                f"{s.key:>5} {s.series:>8} {number:>5} {s.modality:<4} {s.slices:>6} {matrix:>10} "
                f"{spacing}{remark}"
            )
        if len(self.stacks) > limit:
            lines.append(f"... and {len(self.stacks) - limit} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class Series:
    """One stack in physical units.

    Attributes:
        array: ``(Z, Y, X)`` float32; HU for CT, the scanner's signal for MR.
        modality: ``"CT"`` or ``"MR"``.
        unit: ``"HU"`` or ``"signal"``.
        spacing: (slice, row, column) in mm.
        positions: ``(Z, 3)`` centre of the first pixel of each slice, patient space (LPS), mm.
        orientation: direction cosines of a row, then of a column.
        templates: a DICOM header a slice, without pixels; carries patient data for the writer.
        mask: ``(Z, Y, X)`` bool, true where the scanner padded and ``array`` holds air or 0.
        rescale: ``(Z, 2)`` slope and intercept that took stored values to ``array``.
        tilt_deg: gantry tilt; slices of a tilted stack may be used one by one only.
        synthetic: the source says that its content is synthetic.
        warnings: (code, text) without patient data.
    """

    array: NDArray[np.float32]
    modality: str
    unit: str
    spacing: tuple[float, float, float]
    positions: NDArray[np.float64]
    orientation: tuple[float, ...]
    templates: tuple[bytes, ...] = field(repr=False)
    mask: NDArray[np.bool_] = field(repr=False)
    rescale: NDArray[np.float64] = field(repr=False)
    tilt_deg: float
    synthetic: bool
    warnings: list[Note]

    @property
    def patient_key(self) -> str:
        """A hash that tells patients apart without naming them; a study's where there is no ID."""
        from pydicom import dcmread

        header = dcmread(io.BytesIO(self.templates[0]), force=True)
        identity = str(header.get("PatientID") or header.get("StudyInstanceUID") or "")
        return hashlib.sha256(identity.encode()).hexdigest()[:12]


# --- headers -----------------------------------------------------------------------------------


def _numbers(ds: Dataset, name: str, count: int) -> tuple[float, ...] | None:
    """``count`` finite numbers of an attribute, or None where it has none."""
    try:
        value = ds.get(name)
        values = [value] if count == 1 else list(value)
        numbers = tuple(float(v) for v in values)
    except Exception:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _number(ds: Dataset, name: str) -> float | None:
    numbers = _numbers(ds, name, 1)
    return None if numbers is None else numbers[0]


def _integer(ds: Dataset, name: str, default: int) -> int:
    number = _number(ds, name)
    return default if number is None else int(number)


def _text(ds: Dataset, name: str) -> str:
    try:
        value = ds.get(name)
    except Exception:
        return ""
    return "" if value is None else str(value).strip()


def _open_dicom(source: Source, *, pixels: bool) -> Dataset | str:
    """The data set of a file, or the reason why it is none that can be read."""
    import pydicom
    from pydicom.filereader import read_dataset

    with source.open() as stream:
        if stream.read(132)[128:] != b"DICM":
            return "not DICOM"
        # The meta group comes first: a deflated data set would be inflated without a bound.
        meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        if _text(meta, "TransferSyntaxUID") == _DEFLATED:
            return "deflated transfer syntax"
        if _text(meta, "MediaStorageSOPClassUID") == _DIRECTORY:
            return "DICOMDIR"
        stream.seek(0)
        if pixels:
            return pydicom.dcmread(stream)
        return pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS))


def _header(index: int, source: Source) -> _Header | str:
    """The header of a CT or MR image, or the reason to skip the file."""
    from pydicom import config
    from pydicom.uid import UID

    ds = _open_dicom(source, pixels=False)
    if isinstance(ds, str):
        return ds
    sop_class = _text(ds, "SOPClassUID")
    if not sop_class:
        raise InputError(f"{source.label}: the header names no SOP class; export it again")
    if sop_class not in (_CT, _MR, *_ENHANCED):
        known = UID(sop_class, validation_mode=config.IGNORE).name
        kind = known if known != sop_class else "unknown SOP class"
        return f"not a CT or MR image: {kind}"
    slope, intercept = _number(ds, "RescaleSlope"), _number(ds, "RescaleIntercept")
    try:
        image_type = tuple(str(v) for v in ds.get("ImageType") or ())
    except Exception:
        image_type = ()
    acquisition = _number(ds, "AcquisitionNumber")
    temporal = _number(ds, "TemporalPositionIdentifier")
    number = _number(ds, "SeriesNumber")
    return _Header(
        source=index,
        label=source.label,
        sop_class=sop_class,
        sop_uid=_text(ds, "SOPInstanceUID"),
        series_uid=_text(ds, "SeriesInstanceUID"),
        series_number=None if number is None else int(number),
        frame_of_reference=_text(ds, "FrameOfReferenceUID") or None,
        modality="CT" if sop_class == _CT else _ENHANCED.get(sop_class, "MR"),
        image_type=image_type,
        acquisition=None if acquisition is None else int(acquisition),
        echo_ms=_number(ds, "EchoTime"),
        b_value=_number(ds, "DiffusionBValue"),
        temporal=None if temporal is None else int(temporal),
        trigger_ms=_number(ds, "TriggerTime"),
        position=_numbers(ds, "ImagePositionPatient", 3),
        orientation=_numbers(ds, "ImageOrientationPatient", 6),
        spacing=_numbers(ds, "PixelSpacing", 2),
        thickness=_number(ds, "SliceThickness"),
        gap=_number(ds, "SpacingBetweenSlices"),
        frames=_integer(ds, "NumberOfFrames", 1) if sop_class not in _ENHANCED else 2,
        samples=_integer(ds, "SamplesPerPixel", 1),
        photometric=_text(ds, "PhotometricInterpretation"),
        rows=_integer(ds, "Rows", 0),
        columns=_integer(ds, "Columns", 0),
        bits=_integer(ds, "BitsAllocated", 0),
        rescale=None if slope is None or intercept is None else (slope, intercept),
        rescale_type=_text(ds, "RescaleType").upper(),
        lossy=_text(ds, "LossyImageCompression") == "01",
        syntax=_text(ds.file_meta, "TransferSyntaxUID"),
    )


# --- stacks ------------------------------------------------------------------------------------


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= tolerance


def _normal(orientation: Sequence[float]) -> NDArray[np.float64]:
    return np.cross(orientation[:3], orientation[3:])


def _along(headers: Sequence[_Header], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Position of each slice along the normal, mm, ``(Z,)``."""
    return np.array([h.position for h in headers], dtype=np.float64) @ normal


_SAME_MM = 0.01
"""Two slices nearer than this are at the same position."""


def _repeats(headers: Sequence[_Header]) -> int:
    """Number of slices at a position that another slice already has."""
    orientation = headers[0].orientation
    if orientation is None or any(h.position is None for h in headers):
        return 0
    z = np.sort(_along(headers, _normal(orientation)))
    return int((np.diff(z) < _SAME_MM).sum())


def _is_even(headers: Sequence[_Header]) -> bool:
    """One slice a position, evenly spaced: a stack that needs no splitting."""
    orientation = headers[0].orientation
    if len(headers) < 2 or orientation is None or any(h.position is None for h in headers):
        return True
    z = np.sort(_along(headers, _normal(orientation)))
    return not _repeats(headers) and _spacing_note(z, float(np.median(np.diff(z)))) is None


def _split(headers: list[_Header]) -> list[list[_Header]]:
    """Split one geometry by acquisition, echo, b-value or time, where that explains it.

    Many scanners count acquisitions or trigger times by slice or by rotation, so an even stack is
    never split.  The key that makes even stacks of all slices is taken; failing that, the first
    one that separates slices at one position, and its parts are split further.
    """
    if _is_even(headers):
        return [headers]
    options: list[list[list[_Header]]] = []
    for key in _SPLIT_BY:
        parts: dict[Any, list[_Header]] = {}
        for header in headers:
            parts.setdefault(getattr(header, key), []).append(header)
        if len(parts) > 1:
            options.append(list(parts.values()))
    one_position = _repeats(headers) == len(headers) - 1
    for option in options:
        if all(map(_is_even, option)) and (one_position or min(map(len, option)) > 1):
            return option
    for option in options:
        if sum(map(_repeats, option)) < _repeats(headers):
            return [stack for part in option for stack in _split(part)]
    return [headers]


def _group(headers: Sequence[_Header]) -> list[list[_Header]]:
    """Stacks of equal geometry, in an order that does not depend on file names."""
    exact: dict[Any, list[list[_Header]]] = {}
    for h in headers:
        key = (
            h.series_uid,
            h.sop_class,
            h.frame_of_reference,
            h.rows,
            h.columns,
            h.image_type[2:],
        )
        similar = exact.setdefault(key, [])
        for group in similar:
            first = group[0]
            if _close(first.orientation, h.orientation, 1e-3) and _close(
                first.spacing, h.spacing, 1e-4 * max(first.spacing or (1.0,))
            ):
                group.append(h)
                break
        else:
            similar.append([h])
    stacks = [part for groups in exact.values() for group in groups for part in _split(group)]

    def order(stack: list[_Header]) -> tuple[Any, ...]:
        h = min(stack, key=lambda h: h.sop_uid)
        number = math.inf if h.series_number is None else h.series_number
        return (number, h.series_uid, str(h.image_type), h.acquisition or 0, h.echo_ms or 0.0,
                h.b_value or 0.0, h.temporal or 0, h.trigger_ms or 0.0, h.sop_uid)  # fmt: skip

    return sorted(stacks, key=order)


def _decoder_note(syntax: str) -> Note | None:
    """A note where no trusted plug-in decodes the transfer syntax."""
    from pydicom import config
    from pydicom.uid import UID

    uid = UID(syntax, validation_mode=config.IGNORE)
    if uid.is_transfer_syntax and not uid.is_compressed:
        return None
    name = uid.name if uid.is_transfer_syntax and uid.name != syntax else "unknown"
    if syntax in _PLUGINS:
        if _plugin(syntax):
            return None
        return Note(
            "NO_DECODER",
            f"pixels are compressed ({name}); install a decoder with "
            f"`pip install {_PLUGINS[syntax][1]}`, or decompress the files",
        )
    return Note(
        "NO_DECODER",
        f"pixels are in a transfer syntax that is not read ({name}); convert them to Explicit "
        "VR Little Endian",
    )


def _plugin(syntax: str) -> str | None:
    from pydicom.pixels.decoders.base import get_decoder

    available = get_decoder(syntax).available_plugins
    return next((name for name in _PLUGINS[syntax][0] if name in available), None)


def _image_problems(headers: Sequence[_Header]) -> Iterator[Note]:
    """What the headers say against reading the pixels."""
    h = headers[0]
    if any(h.frames != 1 for h in headers):
        yield Note(
            "MULTIFRAME",
            "an enhanced or multi-frame image: its geometry is by frame, which is not read yet; "
            "export it as a classic series (one file a slice)",
        )
        return
    if any("MOSAIC" in h.image_type for h in headers):
        yield Note("MOSAIC", "a mosaic of slices in one image; unpack it with dcm2niix")
    if any(h.samples != 1 for h in headers):
        yield Note("COLOUR", "colour pixels; only grey-scale CT and MR images are read")
    elif any(h.photometric == "MONOCHROME1" for h in headers):
        yield Note(
            "MONOCHROME1",
            "MONOCHROME1 (white is low) is not defined for quantitative CT and MR values; "
            "convert it to MONOCHROME2",
        )
    elif any(h.photometric != "MONOCHROME2" for h in headers):
        yield Note("COLOUR", "not MONOCHROME2; only grey-scale CT and MR images are read")
    if any(not (0 < h.rows <= 65535 and 0 < h.columns <= 65535) for h in headers):
        yield Note("NO_MATRIX", "no Rows and Columns; export the series again")
    if any(h.bits not in (8, 16, 32) for h in headers):
        yield Note("BAD_BITS", "BitsAllocated must be 8, 16 or 32; export the series again")
    if h.modality == "CT":
        if any(h.rescale is None or h.rescale[0] == 0 for h in headers):
            yield Note(
                "NO_RESCALE",
                "no RescaleSlope and RescaleIntercept, so stored values are not known in HU; "
                "export the original series",
            )
        if any(h.rescale_type not in ("", "HU", "US", "HU_MOD") for h in headers):
            yield Note("NOT_HU", "RescaleType is not HU; only CT images in HU are read")
    for syntax in sorted({h.syntax for h in headers}):
        note = _decoder_note(syntax)
        if note:
            yield note


def _millimetres(values: Sequence[float], limit: int = 5) -> str:
    shown = ", ".join(f"{v:.2f}" for v in values[:limit])
    return shown + (f" and {len(values) - limit} more" if len(values) > limit else "")


def _spacing_note(z: NDArray[np.float64], dz: float) -> Note | None:
    """Missing slices, or uneven spacing, of sorted distinct positions ``z``."""
    delta = np.diff(z)
    tolerance = max(0.01 * dz, 0.01)
    bad = np.abs(delta - dz) > tolerance
    if not bad.any():
        return None
    steps = np.rint(delta / dz)
    if (
        bool((np.abs(delta - steps * dz) <= tolerance * np.maximum(steps, 1)).all())
        and (steps[bad] >= 2).all()
    ):
        missing = [
            float(z[i] + k * dz) for i in np.flatnonzero(bad) for k in range(1, int(steps[i]))
        ]
        return Note(
            "MISSING_SLICES",
            f"{len(missing)} missing slices at {_millimetres(missing)} mm along the normal "
            f"(spacing {dz:.4g} mm); send the whole series again",
        )
    return Note(
        "UNEVEN_SPACING",
        f"slices are unevenly spaced: {delta.min():.4g} to {delta.max():.4g} mm, median "
        f"{dz:.4g} mm; split the series or resample it first",
    )


def _stack(key: str, headers: list[_Header]) -> Stack:
    """Check one group of headers; its slices come out sorted along the normal."""
    first = headers[0]
    problems = list(_image_problems(headers))
    notes: list[Note] = []
    spacing: tuple[float, float, float] | None = None
    z_range: tuple[float, float] | None = None
    tilt = 0.0
    slices = len(headers)
    if all(h.frames == 1 for h in headers):
        o, pixel = first.orientation, first.spacing
        if o is None or any(h.position is None for h in headers) or pixel is None:
            problems.append(
                Note("NO_GEOMETRY", "no position, orientation or pixel spacing; export it again")
            )
        elif min(pixel) <= 0:
            problems.append(Note("BAD_SPACING", "PixelSpacing must be positive"))
        elif (
            max(abs(math.hypot(*o[:3]) - 1), abs(math.hypot(*o[3:]) - 1)) > 1e-3
            or abs(np.dot(o[:3], o[3:])) > 1e-3
        ):
            problems.append(
                Note("BAD_ORIENTATION", "the row and column directions are not orthonormal")
            )
        else:
            normal = _normal(o)
            along = _along(headers, normal)
            order = np.lexsort((np.array([h.sop_uid for h in headers]), along.round(2)))
            headers = [headers[i] for i in order]
            along = along[order]
            fresh = np.concatenate([[True], np.diff(along) >= _SAME_MM])
            z = along[fresh]
            slices = len(z)
            if slices < len(headers):
                notes.append(
                    Note(
                        "DUPLICATE_POSITION",
                        f"{len(headers) - slices} of {len(headers)} slices repeat a position; "
                        "identical ones are dropped, others are an error",
                    )
                )
            dz = float(np.median(np.diff(z))) if slices > 1 else _single_spacing(first, notes)
            if slices > 1:
                note = _spacing_note(z, dz)
                if note:
                    problems.append(note)
            p = np.array([h.position for h in headers])[fresh]
            tilt = _tilt(p, z, normal, notes)
            spacing = (dz, pixel[0], pixel[1])
            z_range = (float(z[0]), float(z[-1]))
    lossy = any(h.lossy for h in headers)
    if lossy:
        notes.append(Note("LOSSY", "pixels went through lossy compression"))
    digest = hashlib.sha256(first.series_uid.encode()).hexdigest()[:8]
    return Stack(
        key=key,
        series=digest,
        series_number=first.series_number,
        modality=first.modality,
        slices=slices,
        shape=(first.rows, first.columns),
        spacing=spacing,
        orientation=first.orientation,
        z_range=z_range,
        tilt_deg=tilt,
        localizer="LOCALIZER" in first.image_type,
        lossy=lossy,
        warnings=tuple(notes),
        problems=tuple(problems),
        headers=tuple(headers),
    )


def _single_spacing(header: _Header, notes: list[Note]) -> float:
    """Slice spacing of a single slice: the stated spacing, else the thickness."""
    for value in (header.gap, header.thickness):
        if value is not None and value > 0:
            return value
    notes.append(Note("NO_THICKNESS", "one slice of unknown thickness; 1 mm is assumed"))
    return 1.0


def _tilt(
    p: NDArray[np.float64], z: NDArray[np.float64], normal: NDArray[np.float64], notes: list[Note]
) -> float:
    """Angle in degrees between the stacking direction and the normal; notes what it finds.

    The angle itself is tested: a tolerance of 1e-3 on the dot product hides 2.5 degrees.
    """
    if len(p) < 2:
        return 0.0
    step = p[-1] - p[0]
    inplane = step - normal * (step @ normal)
    shift = float(np.linalg.norm(inplane))
    tilt = math.degrees(math.atan2(shift, abs(float(step @ normal))))
    if tilt > 0.1 and shift > _SAME_MM:
        notes.append(
            Note(
                "TILT",
                f"the stack is sheared by {tilt:.2f} degrees (gantry tilt); slices are right one "
                "by one, the volume is not rectangular",
            )
        )
    else:
        tilt = 0.0
    line = p[0] + np.outer((z - z[0]) / (z[-1] - z[0]), step)
    stray = float(np.abs(p - line).max())
    if stray > max(0.05, 0.01 * abs(float(z[-1] - z[0])) / (len(p) - 1)):
        notes.append(
            Note("SHIFTED_SLICES", f"slices are shifted in plane by up to {stray:.2f} mm")
        )
    return tilt


def _scan(sources: Sequence[Source], skipped: Counter[str]) -> Inspection:
    """Headers of all sources, grouped and checked."""
    headers: list[_Header] = []
    damaged: list[str] = []
    odd = 0
    for index, source in enumerate(sources):
        with quiet_pydicom() as caught:
            try:
                header = guarded(partial(_header, index, source), source.label, "read the header")
            except InputError as error:
                damaged.append(str(error))
                header = "unreadable header"
        if isinstance(header, str):
            skipped[header] += 1
        else:
            headers.append(header)
            odd += bool(caught)
    stacks = tuple(_stack(str(i + 1), group) for i, group in enumerate(_group(headers)))
    notes = []
    if odd:
        notes.append(Note("NONSTANDARD_HEADER", f"{odd} files have non-standard header values"))
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        notes.append(Note(_DAMAGED, damaged[0] + more))
    return Inspection(stacks, dict(sorted((+skipped).items())), tuple(notes))


def inspect(path: str | os.PathLike[str], *, max_bytes: int = 1 << 32) -> Inspection:
    """What a folder (all levels), a file or a zip archive holds; reads headers only.

    Files are recognised by the DICOM magic, not by name.  Links that leave the folder are not
    followed, archives are never unpacked to disk.

    Args:
        path: folder, DICOM file or zip archive.
        max_bytes: refuse archives that claim more than this.

    Raises:
        NoInputError: the path does not exist or holds no file at all.
        InputError: an unreadable path, an archive beyond the limits.
    """
    root = Path(path)
    skipped: Counter[str] = Counter()
    with open_sources(root, skipped, max_bytes) as sources:
        if not sources:
            raise NoInputError(f"{root} holds no files; give a DICOM folder, file or zip archive")
        return _scan(sources, skipped)


# --- pixels ------------------------------------------------------------------------------------


def _choose(found: Inspection, series: str | None, stack: str | int | None) -> tuple[Stack, bool]:
    """The one stack that was asked for, and whether localizers were left out."""
    for note in found.warnings:
        # It may be a slice of the very stack that was asked for.
        if note.code == _DAMAGED:
            raise InputError(note.text)
    if not found.stacks:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in found.skipped.items())
        foreign = any(r.startswith(("not a CT or MR", "deflated")) for r in found.skipped)
        error = UnsupportedError if foreign else NoInputError
        raise error(f"no CT or MR images found ({reasons}); give a CT or MR series")
    chosen = list(found.stacks)
    if series is not None:
        wanted = str(series)
        chosen = [
            s
            for s in chosen
            if wanted in (s.series, str(s.series_number), s.headers[0].series_uid)
        ]
    if stack is not None:
        chosen = [s for s in chosen if s.key == str(stack)]
    if not chosen:
        asked = " ".join(
            f"--{n} {v}" for n, v in (("series", series), ("stack", stack)) if v is not None
        )
        raise InputError(f"no stack matches {asked}; there are:\n{found.table()}")
    images = [s for s in chosen if not s.localizer]
    dropped = bool(images) and len(images) < len(chosen)
    chosen = images or chosen
    if len(chosen) > 1:
        raise InputError(
            f"{len(chosen)} stacks found, one is needed; choose with --series or --stack:\n"
            f"{found.table()}"
        )
    return chosen[0], dropped


def _template(ds: Dataset) -> bytes:
    """The header that a derived slice needs, as the bytes of a DICOM file without pixels."""
    import pydicom
    from pydicom.charset import python_encoding
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    template = pydicom.Dataset()
    for name in TEMPLATE_TAGS:
        if name in ds:
            with suppress(Exception):  # what cannot be converted is left out
                template[name] = ds[name]
    charsets = template.get("SpecificCharacterSet") or ""
    if any(
        c not in python_encoding for c in ([charsets] if isinstance(charsets, str) else charsets)
    ):
        del template.SpecificCharacterSet  # decoded with the default; do not pass it on
    if not _text(ds, "SOPInstanceUID"):
        raise InputError("a slice has no SOPInstanceUID; export the series again")
    template.file_meta = FileMetaDataset()
    template.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, template, enforce_file_format=True)
    return buffer.getvalue()


def _stored(ds: Dataset, header: _Header, notes: Counter[str]) -> NDArray[Any]:
    """Stored values ``(rows, columns)``, checked against the header before decoding."""
    if "ModalityLUTSequence" in ds:
        raise UnsupportedError(
            f"{header.label}: a modality look-up table instead of a slope; convert it to HU first"
        )
    if "PixelData" not in ds:
        raise InputError(f"{header.label}: no pixel data; export the series again")
    plugin = _plugin(header.syntax) if header.syntax in _PLUGINS else None
    if plugin is None:
        expected = header.rows * header.columns * header.bits // 8
        got = len(ds.PixelData)
        if got < expected:
            raise InputError(
                f"{header.label}: pixel data are truncated, {expected} bytes expected, got {got}; "
                "copy the file again"
            )
        if got > expected + 1:
            notes["EXCESS_PIXELS"] += 1
            ds.PixelData = ds.PixelData[: expected + expected % 2]
    else:
        ds.pixel_array_options(decoding_plugin=plugin)
    pixels: NDArray[Any] = ds.pixel_array
    if pixels.shape != (header.rows, header.columns):
        raise InputError(
            f"{header.label}: decoded to {pixels.shape}, the header says "
            f"({header.rows}, {header.columns}); export it again"
        )
    return pixels


def _padding(ds: Dataset, stored: NDArray[Any], bits: int) -> NDArray[np.bool_]:
    """True where stored values are the scanner's padding (PS3.3 C.7.5.1.1.2)."""
    low = _number(ds, "PixelPaddingValue")
    if low is None:
        return np.zeros(stored.shape, dtype=bool)
    high = _number(ds, "PixelPaddingRangeLimit")
    signed = _integer(ds, "PixelRepresentation", 0) == 1

    def as_stored(value: float) -> int:
        # Some writers give the bit pattern with the wrong signedness.
        value = int(value) % (1 << bits)
        return value - (1 << bits) if signed and value >= 1 << (bits - 1) else value

    a = as_stored(low)
    b = a if high is None else as_stored(high)
    return (stored >= min(a, b)) & (stored <= max(a, b))


@dataclass(frozen=True)
class _Slice:
    values: NDArray[np.float32]
    mask: NDArray[np.bool_]
    rescale: tuple[float, float]
    template: bytes
    synthetic: bool


def _read_slice(source: Source, header: _Header, notes: Counter[str]) -> _Slice:
    """One slice in physical units; padding becomes air (CT) or 0 (MR) and is masked."""
    ds = _open_dicom(source, pixels=True)
    if isinstance(ds, str):
        raise InputError(f"{header.label}: {ds}")
    template = _template(ds)
    stored = _stored(ds, header, notes)
    mask = _padding(ds, stored, header.bits)
    slope, intercept = header.rescale or (1.0, 0.0)
    values = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{header.label}: the rescale slope or intercept overflows")
    if header.modality == "CT":
        # in derived images such values are meant: filtered backprojection undershoots air
        derived = "DERIVED" in _text(ds, "ImageType").upper()
        untagged = (values < -1024.0) & ~mask & (not derived)
        if untagged.any():
            notes["UNTAGGED_PADDING"] += 1
            mask |= untagged
        if header.rescale_type == "HU_MOD":
            notes["HU_MOD"] += 1
    elif header.rescale not in (None, (1.0, 0.0)):
        notes["MR_RESCALED"] += 1
    values[mask] = AIR_HU if header.modality == "CT" else 0.0
    synthetic = _text(ds, "SyntheticData") == "YES"
    return _Slice(values, mask, (slope, intercept), template, synthetic)


_COUNTED = {
    "EXCESS_PIXELS": "{n} slices have bytes after the pixels, which were ignored",
    "UNTAGGED_PADDING": "{n} slices have values below -1024 HU that no header marks as padding; "
    "they count as air",
    "HU_MOD": "{n} slices are in modified HU; values may not be linear in attenuation",
    "MR_RESCALED": "{n} MR slices have a rescale slope or intercept, which was applied",
    "DUPLICATES_DROPPED": "{n} slices were copies of another and were dropped",
}


def read_series(
    path: str | os.PathLike[str],
    series: str | None = None,
    stack: str | int | None = None,
    *,
    max_bytes: int = 1 << 32,
) -> Series:
    r"""Read exactly one stack of a folder, file or zip archive in physical units.

    .. math:: x = m\,s + b \quad\text{(each slice with its own slope m and intercept b)}

    Args:
        path: folder, DICOM file or zip archive.
        series: series UID, its hash as `inspect` shows it, or series number, where there are
            several.
        stack: number of the stack as `inspect` shows it.
        max_bytes: limit on the decoded volume (4 bytes a voxel) and on archives.

    Raises:
        NoInputError: nothing there, or no images.
        InputError: several stacks and no choice; missing, duplicate or uneven slices; truncated or
            damaged files.
        UnsupportedError: multi-frame, mosaic, colour, MONOCHROME1, no decoder.
        ResourceError: a volume beyond ``max_bytes``.
    """
    root = Path(path)
    skipped: Counter[str] = Counter()
    with open_sources(root, skipped, max_bytes) as sources:
        if not sources:
            raise NoInputError(f"{root} holds no files; give a DICOM folder, file or zip archive")
        found = _scan(sources, skipped)
        chosen, localizers = _choose(found, series, stack)
        for note in chosen.problems:
            error = UnsupportedError if note.code in _UNSUPPORTED_CODES else InputError
            raise error(f"stack {chosen.key}: {note.text} [{note.code}]")
        assert chosen.spacing is not None
        assert chosen.orientation is not None
        rows, columns = chosen.shape
        needed = 4 * len(chosen.headers) * rows * columns
        if needed > max_bytes:
            raise ResourceError(
                f"stack {chosen.key} claims {len(chosen.headers)} x {rows} x {columns} voxels, "
                f"{needed >> 20} MiB, the limit is {max_bytes >> 20} MiB; read fewer slices or "
                "raise max_bytes"
            )
        pixels = _read_slices(sources, chosen)
    notes = [*found.warnings]
    notes += [n for n in chosen.warnings if n.code != "DUPLICATE_POSITION"]
    if localizers:
        notes.append(Note("LOCALIZER_DROPPED", "scout images were left out"))
    notes += [Note(code, _COUNTED[code].format(n=n)) for code, n in sorted(pixels.counts.items())]
    return Series(
        array=pixels.array,
        modality=chosen.modality,
        unit="HU" if chosen.modality == "CT" else "signal",
        spacing=chosen.spacing,
        positions=np.array([h.position for h in pixels.headers], dtype=np.float64),
        orientation=chosen.orientation,
        templates=tuple(pixels.templates),
        mask=pixels.mask,
        rescale=np.array(pixels.rescale, dtype=np.float64),
        tilt_deg=chosen.tilt_deg,
        synthetic=pixels.synthetic,
        warnings=notes,
    )


@dataclass
class _Pixels:
    """The slices of a stack as they are decoded, in order."""

    array: NDArray[np.float32]
    mask: NDArray[np.bool_]
    headers: list[_Header] = field(default_factory=list)
    templates: list[bytes] = field(default_factory=list)
    rescale: list[tuple[float, float]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    synthetic: bool = False


def _read_slices(sources: Sequence[Source], chosen: Stack) -> _Pixels:
    """Decode the slices of a stack; copies at one position are dropped, others are an error."""
    shape = (chosen.slices, *chosen.shape)
    pixels = _Pixels(np.empty(shape, np.float32), np.empty(shape, bool))
    along = _along(chosen.headers, _normal(chosen.orientation or ()))
    for i, header in enumerate(chosen.headers):
        with quiet_pydicom():
            current = guarded(
                partial(_read_slice, sources[header.source], header, pixels.counts),
                header.label,
                "decode the pixels",
            )
        k = len(pixels.headers)
        if i and along[i] - along[i - 1] < _SAME_MM:
            if not np.array_equal(current.values, pixels.array[k - 1]):
                raise InputError(
                    f"stack {chosen.key}: two different slices at {along[i]:.2f} mm along the "
                    f"normal ({pixels.headers[-1].label}; {header.label}); remove one"
                )
            pixels.counts["DUPLICATES_DROPPED"] += 1
            continue
        pixels.array[k], pixels.mask[k] = current.values, current.mask
        pixels.headers.append(header)
        pixels.templates.append(current.template)
        pixels.rescale.append(current.rescale)
        pixels.synthetic |= current.synthetic
    return pixels
