r"""Write DICOM: a classic derived CT or MR series, complete or not at all.

A derived series keeps patient, study, frame of reference and slice geometry of its source and
nothing else; everything about pixels, series and equipment is new.  On a grid of another matrix
the field of view is preserved: with :math:`r = N_\text{old}/N_\text{new}` an axis,

.. math:: \Delta' = r\,\Delta, \qquad
   p' = p + \tfrac{r_x-1}{2}\,\Delta_x\,\hat r + \tfrac{r_y-1}{2}\,\Delta_y\,\hat c

so that the centre of the first new pixel lies where the mean of the old ones lies (``r`` along a
row, ``c`` along a column).

Source: DICOM PS3.3 A.3 (CT Image IOD), A.4 (MR Image IOD), C.7.6.1 (General Image), C.7.6.2.1.1,
C.12.1 (SOP Common); PS3.5 B.2 (UIDs from UUIDs).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from inverse.errors import GeometryError, InputError, NumericalError, OutputError
from inverse.io.dicom_enhanced import ENHANCED
from inverse.io.dicom_files import quiet_pydicom
from inverse.io.dicom_headers import TEMPLATE_TAGS, words

if TYPE_CHECKING:
    from pydicom import Dataset

    from inverse.volumes import Volume

__all__ = [
    "SOP_CLASS",
    "TOOLKIT",
    "UNPAIRED",
    "Derivation",
    "WrittenSeries",
    "deterministic_uid",
    "equipment_items",
    "file_of",
    "label_of",
    "new_dataset",
    "open_template",
    "plane_geometry",
    "time_in_zone",
    "toolkit_version",
    "uid_of",
    "write_folder",
    "write_instances",
    "write_series",
]

SOP_CLASS = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4"}
_SOURCE_CLASSES = {
    m: {classic, *(uid for uid, kind in ENHANCED.items() if kind == m)}
    for m, classic in SOP_CLASS.items()
}

# Readers guess the scanner's vendor from the first two letters (SI, GE, PH, TO, ...) of any
# manufacturer string, nested ones too; so ours must start with none of them.
TOOLKIT = "recon-sde"
_SCANNER_PREFIX = "Scanner: "

_NAMESPACE = uuid.UUID("5f2b1c1e-6a6e-5a0e-9d41-6b9c7d1f3a52")
_IMPLEMENTATION_UID = f"2.25.{uuid.uuid5(_NAMESPACE, 'implementation').int}"

# Not inherited: what describes the source's pixels, series or equipment.
_NOT_COPIED = words(
    """
    SOPClassUID SOPInstanceUID SeriesInstanceUID Rows Columns PixelSpacing Manufacturer
    ManufacturerModelName SoftwareVersions BurnedInAnnotation LossyImageCompression
    QualityControlImage SyntheticData ReferencedFrameNumber
    """
)
_CT_ONLY = ("KVP",)
_MR_ONLY = words(
    """
    ScanningSequence SequenceVariant ScanOptions MRAcquisitionType RepetitionTime EchoTime
    InversionTime TriggerTime EchoTrainLength MagneticFieldStrength
    """
)
# Type 2: present even when the source says nothing.
_TYPE_2 = words(
    """
    PatientName PatientID PatientBirthDate PatientSex StudyID StudyDate StudyTime
    AccessionNumber ReferringPhysicianName PositionReferenceIndicator PatientPosition
    SliceThickness AcquisitionNumber
    """
)
_CT_TYPE_2 = ("KVP",)
_MR_TYPE_2 = ("ScanOptions", "MRAcquisitionType", "EchoTime", "EchoTrainLength")
_MR_TYPE_1 = {"ScanningSequence": "RM", "SequenceVariant": "NONE"}
UNPAIRED = frozenset(
    words(
        """
        ABDOMEN ABDOMENPELVIS AORTA BLADDER BRAIN CHEST CHESTABDOMEN CHESTABDPELVIS COLON
        CORONARYARTERY CSPINE ESOPHAGUS HEAD HEADNECK HEART JAW LIVER LSPINE MEDIASTINUM NECK
        NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV PANCREAS PELVIS PROSTATE RECTUM SKULL SPINE
        SPLEEN SSPINE STERNUM STOMACH THYMUS THYROID TSPINE UTERUS WHOLEBODY
        """
    )
)


@dataclass(frozen=True)
class Derivation:
    """How a derived series came about; no patient data.

    Attributes:
        method: reconstruction method, such as ``"dds"`` or ``"fbp"``.
        text: the measurement and its setting in words.
        seed: random seed.
        settings: resolved settings, plain JSON values.
        prior: name of the prior.
        prior_sha256: hash of the prior's weights.
    """

    method: str
    text: str = ""
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    prior: str | None = None
    prior_sha256: str | None = None

    def describe(self) -> str:
        """All of it in at most 1024 characters (the limit of the DICOM attribute)."""
        parts = [f"{TOOLKIT} {toolkit_version()}", f"method {self.method}"]
        if self.prior:
            digest = f" sha256 {self.prior_sha256}" if self.prior_sha256 else ""
            parts.append(f"prior {self.prior}{digest}")
        if self.seed is not None:
            parts.append(f"seed {self.seed}")
        if self.text:
            parts.append(self.text)
        if self.settings:
            parts.append(json.dumps(dict(self.settings), sort_keys=True, default=str))
        text = _ascii("; ".join(parts))
        return text if len(text) <= 1024 else text[:1021] + "..."


@dataclass(frozen=True)
class WrittenSeries:
    """A series on disk.

    Attributes:
        paths: one file a slice, in the order of the volume.
        series_uid: its series instance UID.
        saturated: number of voxels beyond the storable range, which were clipped.
        slope: physical value of one stored step.
    """

    paths: tuple[Path, ...]
    series_uid: str
    saturated: int
    slope: float


def toolkit_version() -> str:
    """Version of the installed toolkit."""
    try:
        return version(TOOLKIT)
    except PackageNotFoundError:
        return "0+source"


def deterministic_uid(*parts: object) -> str:
    """A UID that depends on ``parts`` only: UUID version 5 below the arc 2.25 (PS3.5 B.2)."""
    name = json.dumps([str(part) for part in parts])
    return f"2.25.{uuid.uuid5(_NAMESPACE, name).int}"


def _ascii(text: str) -> str:
    """Printable ASCII, which is valid in every character set that the source may declare."""
    plain = "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in text)
    return plain.strip()


def label_of(text: str, limit: int = 64) -> str:
    """A value for an LO attribute; a backslash would split it in two."""
    return _ascii(text).replace("\\", "/")[:limit].strip()


def _ds(value: float) -> str:
    """A decimal string of at most 16 characters."""
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(value))


# --- files -------------------------------------------------------------------------------------


def new_dataset(attributes: Mapping[str, Any]) -> Dataset:
    """A data set from keywords; a sequence is a list of mappings or data sets, decimals floats."""
    from pydicom import Dataset
    from pydicom.datadict import dictionary_VR

    ds = Dataset()
    for name, value in attributes.items():
        vr = dictionary_VR(name)
        if vr == "SQ":
            value = [item if isinstance(item, Dataset) else new_dataset(item) for item in value]
        elif vr == "DS" and not isinstance(value, str):
            value = _ds(value) if isinstance(value, (int, float)) else [_ds(v) for v in value]
        setattr(ds, name, value)
    return ds


def _encode(ds: Dataset, pixels: NDArray[np.integer[Any]]) -> bytes:
    """The complete DICOM file of one slice."""
    signed = pixels.dtype.kind == "i"
    pixel_module = {
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": 16,
        "PixelRepresentation": int(signed),
    }
    for name, value in pixel_module.items():
        setattr(ds, name, value)
    if "BitsStored" not in ds:
        ds.BitsStored = 16
    ds.HighBit = ds.BitsStored - 1
    ds.add_new("PixelData", "OW", pixels.astype("<i2" if signed else "<u2").tobytes())
    return file_of(ds)


def file_of(ds: Dataset) -> bytes:
    """The bytes of a DICOM file of this toolkit, Explicit VR Little Endian."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = UID(_IMPLEMENTATION_UID)
    ds.file_meta.ImplementationVersionName = TOOLKIT.upper()[:16]
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _check_out(out_dir: Path) -> None:
    if out_dir.is_symlink() or (out_dir.exists() and not out_dir.is_dir()):
        raise OutputError(f"{out_dir} exists and is no folder; give another output folder")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise OutputError(f"{out_dir} is not empty; give another output folder or empty it")


def write_folder(out_dir: Path, files: Iterable[tuple[str, bytes]]) -> tuple[Path, ...]:
    """Write named files so that ``out_dir`` is complete or absent, whatever happens.

    Raises:
        OutputError: a folder that is not empty, or cannot be written.
    """
    _check_out(out_dir)
    temporary: Path | None = None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
        names = []
        for name, content in files:
            names.append(name)
            _write_file(temporary / name, content)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(out_dir)
    except OSError as error:
        raise OutputError(
            f"cannot write the series to {out_dir}: {error.strerror or type(error).__name__}; "
            "check free space and permissions"
        ) from None
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return tuple(out_dir / name for name in names)


def _numbered(files: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    return ((f"{i:04d}.dcm", content) for i, content in enumerate(files, start=1))


def write_instances(
    out_dir: str | os.PathLike[str],
    headers: Iterable[Mapping[str, Any]],
    pixels: NDArray[np.integer[Any]],
) -> list[Path]:
    """Write slices whose headers the caller composes, atomically and without checks of the IOD.

    Args:
        out_dir: new or empty folder.
        headers: DICOM keywords and values of each slice, without the pixel module; sequences are
            lists of mappings.  ``BitsStored`` may be given.
        pixels: ``(Z, rows, columns)`` int16 or uint16 stored values.

    Raises:
        OutputError: a folder that is not empty, or cannot be written.
    """
    with quiet_pydicom():
        files = (
            _encode(new_dataset(header), image)
            for header, image in zip(headers, pixels, strict=True)
        )
        return list(write_folder(Path(out_dir), _numbered(files)))


# --- derived series ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Steps:
    """How values are stored: in whole steps of ``slope``, clipped to ``low`` and ``high``.

    CT images take 1 HU a step, so the rounding error is at most 0.5 HU; a std map takes the finest
    of 0.01, 0.1 and 1 HU that holds its maximum.  MR is spread over 0 to 4095.
    """

    dtype: type[np.integer[Any]]
    low: int
    high: int
    slope: float

    @classmethod
    def of(cls, top: float, modality: str, kind: str) -> _Steps:
        """For values up to ``top``."""
        if modality == "CT":
            fine = (0.01, 0.1) if kind == "std" else ()
            slope = next((s for s in fine if top <= s * 32767), 1.0)
            return cls(np.int16, -32768, 32767, slope)
        return cls(np.uint16, 0, 4095, top / 4095 if top > 0 else 1.0)

    def stored(self, image: NDArray[np.floating]) -> tuple[NDArray[np.integer[Any]], int]:
        """Stored values of an image, and how many were clipped."""
        steps = np.rint(np.asarray(image, np.float32).astype(np.float64) / self.slope)
        clipped = int(((steps < self.low) | (steps > self.high)).sum())
        return np.clip(steps, self.low, self.high).astype(self.dtype), clipped


def _percentile(counts: NDArray[np.int64], low: int, q: float) -> float:
    """Percentile of stored values from how often each is there, from ``low`` on."""
    ends = np.cumsum(counts)
    at = (int(ends[-1]) - 1) * q / 100
    below, above = (
        low + int(np.searchsorted(ends, rank, side="right")) for rank in (int(at), math.ceil(at))
    )
    return below + (above - below) * (at - int(at))


def _window(counts: NDArray[np.int64], steps: _Steps, modality: str, kind: str) -> dict[str, Any]:
    """Display windows, in HU for CT and in stored values for MR (which has no Modality LUT)."""
    if modality == "CT" and kind == "image":
        return {
            "WindowCenter": [40, -600],
            "WindowWidth": [400, 1500],
            "WindowCenterWidthExplanation": ["SOFT TISSUE", "LUNG"],
        }
    unit = steps.slope if modality == "CT" else 1.0
    low = 0.0 if kind == "std" else _percentile(counts, steps.low, 0.5) * unit
    high = max(_percentile(counts, steps.low, 99.5) * unit, low + max(unit, 1e-3))
    return {"WindowCenter": (low + high) / 2, "WindowWidth": max(high - low, 1.0)}


def _code(value: str, scheme: str, meaning: str) -> dict[str, str]:
    return {"CodeValue": value, "CodingSchemeDesignator": scheme, "CodeMeaning": meaning}


def open_template(template: bytes) -> Dataset:
    """The data set of a template with what every derived object needs.

    Raises:
        InputError: a damaged one, or one without geometry.
    """
    import pydicom

    try:
        ds = pydicom.dcmread(io.BytesIO(template))
        needed = (
            "SOPClassUID",
            "SOPInstanceUID",
            "ImagePositionPatient",
            "ImageOrientationPatient",
        )
        if all(ds.get(name) for name in (*needed, "PixelSpacing", "Rows", "Columns")):
            return ds
    except Exception:
        ds = None
    raise InputError(
        "a DICOM template is damaged or has no geometry; simulate the measurement again from the "
        "DICOM series"
    )


def plane_geometry(source: Dataset, shape: tuple[int, int]) -> tuple[dict[str, Any], bool]:
    """Plane geometry on ``shape`` pixels over the source's field of view; whether it changed."""
    old = (int(source.Rows), int(source.Columns))
    if old == shape:
        return {"PixelSpacing": [float(v) for v in source.PixelSpacing]}, False
    dy, dx = (float(v) for v in source.PixelSpacing)
    ry, rx = old[0] / shape[0], old[1] / shape[1]
    o = np.array([float(v) for v in source.ImageOrientationPatient])
    p = np.array([float(v) for v in source.ImagePositionPatient])
    p = p + (rx - 1) / 2 * dx * o[:3] + (ry - 1) / 2 * dy * o[3:]
    return {"PixelSpacing": [dy * ry, dx * rx], "ImagePositionPatient": p.tolist()}, True


def equipment_items(
    source: Dataset, derivation: Derivation, synthetic: bool, now: datetime
) -> list[Any]:
    """Contributing equipment: the scanner, where known, and this toolkit."""
    items: list[dict[str, Any]] = []
    manufacturer = str(source.get("Manufacturer") or "").strip()
    if manufacturer:
        scanner: dict[str, Any] = {
            "Manufacturer": label_of(_SCANNER_PREFIX + manufacturer),
            "ContributionDescription": "acquired the source images",
            "PurposeOfReferenceCodeSequence": [_code("109101", "DCM", "Acquisition Equipment")],
        }
        for name in ("ManufacturerModelName", "SoftwareVersions"):
            value = source.get(name)
            if value:
                many = [value] if isinstance(value, str) else list(value)
                scanner[name] = [label_of(str(v)) for v in many]
        items.append(scanner)
    purpose = (
        _code("109100", "DCM", "Synthesizing Equipment")
        if synthetic
        else _code("109102", "DCM", "Processing Equipment")
    )
    items.append(
        {
            "Manufacturer": TOOLKIT,
            "ManufacturerModelName": TOOLKIT,
            "SoftwareVersions": toolkit_version(),
            "ContributionDateTime": now.strftime("%Y%m%d%H%M%S"),
            "ContributionDescription": _ascii(f"reconstructed with {derivation.method}"),
            "PurposeOfReferenceCodeSequence": [purpose],
        }
    )
    return items


def uid_of(source: Dataset, name: str, *fallback: object) -> str:
    """A UID of the source where it is valid, else one that depends on ``fallback`` only."""
    from pydicom.uid import UID

    uid = str(source.get(name) or "")
    return uid if UID(uid).is_valid else deterministic_uid(name, uid, *fallback)


def time_in_zone(created: datetime | None, source: Dataset) -> datetime:
    """Time in the zone that the source declares (it holds for all times of a data set)."""
    now, offset = created or datetime.now(), str(source.get("TimezoneOffsetFromUTC") or "")
    if not re.fullmatch(r"[+-]\d{4}", offset):
        return now
    minutes = int(offset[1:3]) * 60 + int(offset[3:])
    zone = timezone(timedelta(minutes=minutes if offset[0] == "+" else -minutes))
    return now.astimezone(zone)


def _frame_number(source: Dataset) -> dict[str, int]:
    """Which frame a template describes, where its source is multi-frame."""
    frame = source.get("ReferencedFrameNumber")
    return {} if frame is None else {"ReferencedFrameNumber": int(frame)}


def _values(source: Dataset, name: str) -> set[str]:
    value = source.get(name) or ""
    return {value} if isinstance(value, str) else {str(v) for v in value}


def _comments(kind: str, synthetic: bool) -> str:
    text = "Research only, not for diagnosis."
    if synthetic:
        text += (
            " Synthetic content: made from simulated data or with a generative prior, which may"
            " remove or invent anatomy."
        )
    if kind == "std":
        text += " Values are a standard deviation; a low one does not mean correct."
    return text


def write_series(
    out_dir: str | os.PathLike[str],
    volume: Volume,
    templates: Sequence[bytes],
    *,
    description: str,
    derivation: Derivation,
    kind: Literal["image", "std"] = "image",
    series_number: int = 9001,
    synthetic: bool = True,
    unit: Literal["HU", "signal"] = "HU",
    uid_seed: str = "",
    created: datetime | None = None,
) -> WrittenSeries:
    """Write a derived CT or MR series of the templates' study, complete or not at all.

    UIDs depend on the source, the settings and the pixels only: a repeated run gives the same
    ones, other content gives others.  A matrix that differs from the template's covers the same
    field of view.

    Args:
        out_dir: new or empty folder; files are named by slice number.
        volume: ``(Z, Y, X)``, HU or signal, in memory or on disk.
        templates: a header a slice, from `Series.templates`.
        description: series description; a research label is put before it.
        derivation: provenance.
        kind: ``"image"`` or ``"std"`` (a map of standard deviations).
        series_number: 9000 and above, so that it sorts behind the scanner's.
        synthetic: simulated data, inpainting or a generative prior; inherited from the source.
        unit: ``"HU"`` for CT, ``"signal"`` for MR.
        uid_seed: distinguishes series that are equal in all else.
        created: date and time of creation; now by default.

    Raises:
        GeometryError: a volume that is not ``(len(templates), Y, X)``.
        InputError: no templates, a damaged one, or one of another modality.
        NumericalError: NaN or infinite values; nothing is written.
        OutputError: a folder that is not empty, or cannot be written.
    """
    out = Path(out_dir)
    _check_out(out)
    if not len(templates):
        raise InputError("DICOM output needs a DICOM source; the measurement carries no template")
    if volume.ndim != 3 or len(volume) != len(templates) or 0 in volume.shape:
        raise GeometryError(
            f"the volume must have shape ({len(templates)}, rows, columns) for {len(templates)} "
            f"templates, got {volume.shape}"
        )
    bad = sum(int((~np.isfinite(image)).sum()) for image in volume)
    if bad:
        raise NumericalError(f"{bad} voxels are NaN or infinite, so no series is written")
    modality = "CT" if unit == "HU" else "MR"
    steps = _Steps.of(max(float(image.max()) for image in volume), modality, kind)
    saturated, digest = 0, hashlib.sha256()
    counts = np.zeros(steps.high - steps.low + 1, np.int64)
    for image in volume:
        pixels, clipped = steps.stored(image)
        saturated += clipped
        digest.update(pixels.data)
        counts += np.bincount(pixels.ravel().astype(np.int64) - steps.low, minlength=len(counts))
    with quiet_pydicom():
        uids, kinds = [], set()
        for template in templates:  # opened one at a time, as a long series has many
            source = open_template(template)
            uids.append(source.SOPInstanceUID)
            kinds.add(str(source.SOPClassUID))
            synthetic = synthetic or source.get("SyntheticData") == "YES"
        if not kinds <= _SOURCE_CLASSES[modality]:
            raise InputError(
                f"a volume in {unit} needs templates of {modality} images, got another kind; "
                "unit is HU for CT and signal for MR"
            )
        now = time_in_zone(created, open_template(templates[0]))
        series_uid = deterministic_uid(
            "series",
            *uids,
            json.dumps(asdict(derivation), sort_keys=True, default=str),
            description, kind, steps.slope, uid_seed,
            digest.hexdigest(),
        )  # fmt: skip
        common = _series_attributes(
            modality, kind, description, derivation, series_number, synthetic, now
        )
        common |= _window(counts, steps, modality, kind)
        common |= _value_mapping(modality, steps.slope, kind)
        common["SeriesInstanceUID"] = series_uid
        files = (
            _encode(
                _derived(
                    open_template(template), common, index, derivation, synthetic, modality, now,
                    image.shape,
                ),
                steps.stored(image)[0],
            )
            for index, (template, image) in enumerate(zip(templates, volume, strict=True), start=1)
        )  # fmt: skip
        paths = write_folder(out, _numbered(files))
    return WrittenSeries(paths, series_uid, saturated, steps.slope)


def _series_attributes(
    modality: str,
    kind: str,
    description: str,
    derivation: Derivation,
    series_number: int,
    synthetic: bool,
    now: datetime,
) -> dict[str, Any]:
    """What all slices of a derived series share, without pixel values and UIDs."""
    suffix = f" STD ({'HU' if modality == 'CT' else 'signal'})" if kind == "std" else ""
    prefix = "RESEARCH ONLY - "
    title = label_of(description, 64 - len(prefix) - len(suffix))
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    attributes: dict[str, Any] = {
        "SOPClassUID": SOP_CLASS[modality],
        "Modality": modality,
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL" if modality == "CT" else "OTHER"],
        "SeriesNumber": series_number,
        "SeriesDescription": f"{prefix}{title}{suffix}",
        "Manufacturer": TOOLKIT,
        "ManufacturerModelName": TOOLKIT,
        "SoftwareVersions": toolkit_version(),
        "ImageComments": _comments(kind, synthetic),
        "ContentQualification": "RESEARCH",
        "DerivationDescription": derivation.describe(),
    }
    for name in ("Series", "Content", "InstanceCreation"):
        attributes[f"{name}Date"], attributes[f"{name}Time"] = date, time
    if synthetic:
        attributes["SyntheticData"] = "YES"
    return attributes


def _value_mapping(modality: str, slope: float, kind: str) -> dict[str, Any]:
    """Stored to physical values: Modality LUT for CT, real-world mapping for MR.

    The classic MR image has no Modality LUT, and readers disagree on applying one.
    """
    if modality == "CT":
        return {
            "RescaleSlope": slope,
            "RescaleIntercept": 0,
            "RescaleType": "HU",
            "BitsStored": 16,
        }
    label = "STD" if kind == "std" else "SIGNAL"
    return {
        "BitsStored": 12,
        "RealWorldValueMappingSequence": [
            {
                "RealWorldValueFirstValueMapped": 0,
                "RealWorldValueLastValueMapped": 4095,
                "RealWorldValueSlope": slope,
                "RealWorldValueIntercept": 0.0,
                "LUTLabel": label,
                "LUTExplanation": f"{label} in the units of the source",
                "MeasurementUnitsCodeSequence": [_code("1", "UCUM", "no units")],
            }
        ],
    }


def _derived(
    source: Dataset,
    common: Mapping[str, Any],
    index: int,
    derivation: Derivation,
    synthetic: bool,
    modality: str,
    now: datetime,
    shape: tuple[int, ...],
) -> Dataset:
    """The header of one derived slice: the template's share, then everything new."""
    excluded = {*_NOT_COPIED, *(_MR_ONLY if modality == "CT" else _CT_ONLY)}
    # Allowed under a condition only (PS3.3 C.8.3.1): inversion recovery, heart gating.
    if "IR" not in _values(source, "ScanningSequence"):
        excluded.add("InversionTime")
    if not {"CG", "PPG"} & _values(source, "ScanOptions"):
        excluded.add("TriggerTime")
    geometry, regridded = plane_geometry(source, (shape[0], shape[1]))
    source_uid = str(source.SOPInstanceUID)
    study_uid = uid_of(source, "StudyInstanceUID", source.get("SeriesInstanceUID"), source_uid)
    new: dict[str, Any] = {
        **common,
        **geometry,
        "SOPInstanceUID": deterministic_uid("instance", common["SeriesInstanceUID"], index),
        "StudyInstanceUID": study_uid,
        "FrameOfReferenceUID": uid_of(
            source, "FrameOfReferenceUID", source.get("SeriesInstanceUID"), study_uid
        ),
        "InstanceNumber": index,
        "BurnedInAnnotation": source.get("BurnedInAnnotation") or "NO",
        "QualityControlImage": source.get("QualityControlImage") or "NO",
        "LossyImageCompression": "01" if source.get("LossyImageCompression") == "01" else "00",
        "SourceImageSequence": [
            {
                "ReferencedSOPClassUID": str(source.SOPClassUID),
                "ReferencedSOPInstanceUID": source_uid,
                **_frame_number(source),
                # Same pixel indices, not only the same place: annotations may be carried over.
                "SpatialLocationsPreserved": "NO" if regridded else "YES",
                "PurposeOfReferenceCodeSequence": [
                    _code("121322", "DCM", "Source image for image processing operation")
                ],
            }
        ],
        "ContributingEquipmentSequence": equipment_items(source, derivation, synthetic, now),
    }
    ds = new_dataset(new)
    for name in TEMPLATE_TAGS:
        if name not in excluded and name not in ds and source.get(name) not in (None, "", []):
            ds[name] = source[name]
    for name in _TYPE_2 + (_CT_TYPE_2 if modality == "CT" else _MR_TYPE_2):
        if name not in ds:
            setattr(ds, name, None)
    for name, value in _MR_TYPE_1.items() if modality == "MR" else ():
        if name not in ds:
            setattr(ds, name, value)
    if "Laterality" not in ds and source.get("BodyPartExamined") not in UNPAIRED:
        ds.Laterality = None  # unknown: required where the body part may be paired
    return ds
