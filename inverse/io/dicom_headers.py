r"""DICOM headers of CT and MR images: one file, or one frame of an enhanced file, as plain values.

Only what grouping, geometry and units need is read; nothing here identifies a patient but the
UIDs, which stay inside.

Source: DICOM PS3.3 C.7.6.2 (Image Plane), C.7.6.3 (Image Pixel), C.11.1 (Modality LUT).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from inverse.errors import InputError
from inverse.io.dicom_enhanced import (
    ENHANCED,
    FUNCTIONAL_GROUPS,
    PHILIPS_TAGS,
    classic_frames,
    is_enhanced,
    philips_scale,
)
from inverse.io.dicom_files import Source

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "IDENTITY_TAGS",
    "PROJECTIONS",
    "TEMPLATE_TAGS",
    "Header",
    "Note",
    "identity_of",
    "integer_of",
    "number_of",
    "open_dicom",
    "read_headers",
    "text_of",
    "words",
]

_CT = "1.2.840.10008.5.1.4.1.1.2"
_MR = "1.2.840.10008.5.1.4.1.1.4"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_DIRECTORY = "1.2.840.10008.1.3.10"


_PROJECTION_COLUMNS, _PROJECTION_SCAN = 0x70291011, 0x70371009
_PRIVATE = (*PHILIPS_TAGS, _PROJECTION_COLUMNS, _PROJECTION_SCAN)
PROJECTIONS = "DICOM-CT-PD projections"
"""How files of raw CT data are counted, which ``recon convert`` reads."""


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
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
    QualityControlImage SyntheticData ReferencedFrameNumber
    """
)
"""All that a derived series may need of its source; nothing else of the source is kept."""


class Note(NamedTuple):
    """A finding about the input: a stable code and one sentence without patient data."""

    code: str
    text: str


@dataclass(frozen=True)
class Header:
    """What one image header says about grouping and geometry.

    ``frame`` is the index in an enhanced file, None for a classic image; ``rescale`` takes stored
    values to HU or to the scanner's signal.
    """

    source: int
    frame: int | None
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
    philips: bool
    lossy: bool
    syntax: str


# --- headers -----------------------------------------------------------------------------------


def numbers_of(ds: Dataset, name: str, count: int) -> tuple[float, ...] | None:
    """``count`` finite numbers of an attribute, or None where it has none."""
    try:
        value = ds.get(name)
        values = [value] if count == 1 else list(value)
        numbers = tuple(float(v) for v in values)
    except Exception:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def number_of(ds: Dataset, name: str) -> float | None:
    """A finite number, or None."""
    numbers = numbers_of(ds, name, 1)
    return None if numbers is None else numbers[0]


def integer_of(ds: Dataset, name: str, default: int) -> int:
    """A number cut to an integer, or the default."""
    number = number_of(ds, name)
    return default if number is None else int(number)


def text_of(ds: Dataset, name: str) -> str:
    """A value as stripped text, empty where there is none."""
    try:
        value = ds.get(name)
    except Exception:
        return ""
    return "" if value is None else str(value).strip()


IDENTITY_TAGS = words(
    """
    PatientName PatientID PatientBirthDate PatientSex StudyDate StudyDescription AccessionNumber
    StudyInstanceUID SeriesDescription SeriesInstanceUID
    """
)
"""What tells a patient, and is shown where the user asks for it only."""


def identity_of(ds: Dataset) -> dict[str, str]:
    """Who is imaged and when, by DICOM keyword: patient data."""
    found = {name: text_of(ds, name) for name in IDENTITY_TAGS}
    return {name: text for name, text in found.items() if text}


def open_dicom(source: Source, *, pixels: bool, more: Sequence[str] = ()) -> Dataset | str:
    """The data set of a file, or the reason why it is none that can be read.

    Args:
        source: the file.
        pixels: read all of it; else the attributes that `Header` needs, and ``more``.
        more: keywords of further attributes.
    """
    import pydicom
    from pydicom.filereader import read_dataset
    from pydicom.tag import Tag

    with source.open() as stream:
        if stream.read(132)[128:] != b"DICM":
            return "not DICOM"
        # The meta group comes first: a deflated data set would be inflated without a bound.
        meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        if text_of(meta, "TransferSyntaxUID") == _DEFLATED:
            return "deflated transfer syntax"
        if text_of(meta, "MediaStorageSOPClassUID") == _DIRECTORY:
            return "DICOMDIR"
        stream.seek(0)
        if pixels:
            return pydicom.dcmread(stream)
        tags = [*map(Tag, (*_HEADER_TAGS, *FUNCTIONAL_GROUPS, *more)), *map(Tag, _PRIVATE)]
        return pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=tags)


def read_headers(index: int, source: Source) -> list[Header] | str:
    """The headers of a CT or MR image, one a frame, or the reason to skip the file.

    Args:
        index: number of the source, kept in the header.
        source: the file.

    Raises:
        InputError: no SOP class, or functional groups that do not number the frames.
    """
    from pydicom import config
    from pydicom.uid import UID

    ds = open_dicom(source, pixels=False)
    if isinstance(ds, str):
        return ds
    sop_class = text_of(ds, "SOPClassUID")
    if not sop_class:
        raise InputError(f"{source.label}: the header names no SOP class; export it again")
    if sop_class not in (_CT, _MR, *ENHANCED):
        known = UID(sop_class, validation_mode=config.IGNORE).name
        kind = known if known != sop_class else "unknown SOP class"
        return f"not a CT or MR image: {kind}"
    if _PROJECTION_COLUMNS in ds:
        return f"{PROJECTIONS}, {_scan_kind(ds)}"
    if is_enhanced(ds):
        return [_header(index, source, frame, k) for k, frame in enumerate(classic_frames(ds))]
    return [_header(index, source, ds, None)]


def _scan_kind(ds: Dataset) -> str:
    """Axial or helical, as raw CT data say it."""
    value = getattr(ds.get(_PROJECTION_SCAN), "value", None)
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return "helical" if re.search("HELI|SPIRAL", text.upper()) else "axial"


def _rescale(ds: Dataset, modality: str) -> tuple[tuple[float, float] | None, bool]:
    r"""Slope and intercept of the modality's values, and whether they are Philips' own scale.

    .. math:: FP = \frac{m\,s + b}{m\,S} = \frac{s}{S} + \frac{b}{m\,S}

    with Philips' scale slope ``S``: comparable between scans, where ``m s + b`` is for display.
    """
    slope, intercept = number_of(ds, "RescaleSlope"), number_of(ds, "RescaleIntercept")
    if slope is None or intercept is None:
        return None, False
    scale = philips_scale(ds) if modality == "MR" else None
    if scale is None or slope == 0:
        return (slope, intercept), False
    return (1.0 / scale, intercept / (slope * scale)), True


def _header(index: int, source: Source, ds: Dataset, frame: int | None) -> Header:
    """One header with classic attributes as plain values."""
    sop_class = text_of(ds, "SOPClassUID")
    modality = "CT" if sop_class == _CT else ENHANCED.get(sop_class, "MR")
    rescale, philips = _rescale(ds, modality)
    try:
        image_type = tuple(str(v) for v in ds.get("ImageType") or ())
    except Exception:
        image_type = ()
    acquisition = number_of(ds, "AcquisitionNumber")
    temporal = number_of(ds, "TemporalPositionIdentifier")
    number = number_of(ds, "SeriesNumber")
    return Header(
        source=index,
        frame=frame,
        label=source.label if frame is None else f"{source.label}, frame {frame + 1}",
        sop_class=sop_class,
        sop_uid=text_of(ds, "SOPInstanceUID"),
        series_uid=text_of(ds, "SeriesInstanceUID"),
        series_number=None if number is None else int(number),
        frame_of_reference=text_of(ds, "FrameOfReferenceUID") or None,
        modality=modality,
        image_type=image_type,
        acquisition=None if acquisition is None else int(acquisition),
        echo_ms=number_of(ds, "EchoTime"),
        b_value=number_of(ds, "DiffusionBValue"),
        temporal=None if temporal is None else int(temporal),
        trigger_ms=number_of(ds, "TriggerTime"),
        position=numbers_of(ds, "ImagePositionPatient", 3),
        orientation=numbers_of(ds, "ImageOrientationPatient", 6),
        spacing=numbers_of(ds, "PixelSpacing", 2),
        thickness=number_of(ds, "SliceThickness"),
        gap=number_of(ds, "SpacingBetweenSlices"),
        frames=integer_of(ds, "NumberOfFrames", 1),
        samples=integer_of(ds, "SamplesPerPixel", 1),
        photometric=text_of(ds, "PhotometricInterpretation"),
        rows=integer_of(ds, "Rows", 0),
        columns=integer_of(ds, "Columns", 0),
        bits=integer_of(ds, "BitsAllocated", 0),
        rescale=rescale,
        rescale_type=text_of(ds, "RescaleType").upper(),
        philips=philips,
        lossy=text_of(ds, "LossyImageCompression") == "01",
        syntax=text_of(ds.file_meta, "TransferSyntaxUID"),
    )
