"""A phantom as the DICOM series that a scanner would have written, or as NIfTI.

The series is complete (every attribute that the CT or MR Image IOD asks for), reproducible to the
byte, and labelled: synthetic data, quality control image, a patient called PHANTOM.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from inverse.errors import GeometryError, InputError, NumericalError, UnsupportedError
from inverse.io.dicom import TOOLKIT, deterministic_uid, write_instances
from phantoms.tissue import InversionRecovery, Sequence, SpinEcho, SpoiledGradientEcho

__all__ = ["mr_attributes", "phantom_nifti", "write_phantom_series"]

_CT = {
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
    "Modality": "CT",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "KVP": 120,
    "RescaleIntercept": -1024,
    "RescaleSlope": 1,
    "RescaleType": "HU",
    "WindowCenter": 40,
    "WindowWidth": 400,
}
_MR = {
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4",
    "Modality": "MR",
    "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
    "ScanningSequence": "SE",
    "SequenceVariant": "NONE",
    "ScanOptions": None,
    "MRAcquisitionType": "2D",
    "RepetitionTime": 500,
    "EchoTime": 10,
    "EchoTrainLength": 1,
    "MagneticFieldStrength": 1.5,
    "WindowCenter": 2048,
    "WindowWidth": 4096,
}


def write_phantom_series(
    out_dir: str | os.PathLike[str],
    volume_hu: NDArray[np.float32],
    spacing_mm: tuple[float, float, float],
    *,
    seed: int,
    modality: Literal["CT", "MR"] = "CT",
    body_part: str = "CHEST",
    attributes: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a volume as an axial CT or MR series, centred on the patient's origin.

    Equal arguments give equal files.  CT values are stored with an intercept of -1024 HU in steps
    of 1 HU; MR values are scaled so that the largest becomes 4095.

    Args:
        out_dir: new or empty folder.
        volume_hu: ``(Z, Y, X)``; HU for CT, non-negative signal for MR.
        spacing_mm: (slice, row, column) spacing.
        seed: the phantom's seed; names the patient and the UIDs.
        modality: ``"CT"`` or ``"MR"``.
        body_part: body part examined; empty where it is none.
        attributes: further DICOM attributes by keyword, as of :func:`mr_attributes`.

    Returns:
        One path a slice, from the lowest slice up.

    Raises:
        GeometryError: a volume that is not three-dimensional, a spacing that is not positive.
        NumericalError: NaN or infinite values.
        InputError: values that the stored range cannot hold.
        OutputError: a folder that is not empty, or cannot be written.
    """
    volume = _checked(volume_hu, spacing_mm)
    offset, step = (-1024.0, 1.0) if modality == "CT" else (0.0, float(volume.max()) / 4095 or 1.0)
    steps = np.rint((volume.astype(np.float64) - offset) / step)
    if steps.min() < 0 or steps.max() > 65535:
        raise InputError(
            f"phantom values must be at least {offset:g} and at most {offset + 65535 * step:g}, "
            f"got {volume.min():g} to {volume.max():g}"
        )
    pixels = steps.astype(np.uint16)
    headers = _headers(pixels, spacing_mm, seed, modality, body_part)
    return write_instances(out_dir, ({**h, **(attributes or {})} for h in headers), pixels)


def mr_attributes(sequence: Sequence, field: float) -> dict[str, Any]:
    """How an MR image was acquired, by DICOM keyword.

    Args:
        sequence: spin echo, spoiled gradient echo or inversion recovery.
        field: tesla.
    """
    about: dict[str, Any] = {"MagneticFieldStrength": field}
    if isinstance(sequence, SpoiledGradientEcho):
        about |= {"ScanningSequence": "GR", "SequenceVariant": "SP"}
        about["FlipAngle"] = round(math.degrees(sequence.flip), 6)
    elif isinstance(sequence, InversionRecovery):
        about |= {"ScanningSequence": ["SE", "IR"], "InversionTime": round(sequence.ti, 3)}
    if isinstance(sequence, SpinEcho | SpoiledGradientEcho | InversionRecovery):
        about |= {"RepetitionTime": sequence.tr, "EchoTime": sequence.te}
    return about


def phantom_nifti(
    volume: NDArray[np.float32],
    spacing_mm: tuple[float, float, float],
    *,
    modality: Literal["CT", "MR"] = "CT",
    unit: str | None = None,
    compress: bool = True,
) -> tuple[bytes, bytes]:
    """A volume as a NIfTI-1 file and its JSON sidecar, centred on the origin.

    Equal arguments give equal bytes.

    Args:
        volume: ``(Z, Y, X)``; HU for CT, signal for MR; x to the left, y to the back.
        spacing_mm: (slice, row, column) spacing.
        modality: ``"CT"`` or ``"MR"``.
        unit: of the values, default HU for CT and signal for MR.
        compress: as ``.nii.gz``.

    Raises:
        GeometryError: a volume that is not three-dimensional, a spacing that is not positive.
        NumericalError: NaN or infinite values.
        UnsupportedError: nibabel is not installed.
    """
    try:
        import nibabel
    except ImportError:
        raise UnsupportedError(
            "writing NIfTI needs nibabel; install the extra 'formats', or write DICOM"
        ) from None
    array = _checked(volume, spacing_mm)
    z, y, x = array.shape
    dz, dy, dx = spacing_mm
    # NIfTI's axes point to the right, the front and the head: x and y turn round.
    affine = np.diag([-dx, -dy, dz, 1.0])
    affine[:3, 3] = [dx * (x - 1) / 2, dy * (y - 1) / 2, -dz * (z - 1) / 2]
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"Synthetic phantom, no patient"
    about = {
        "Modality": modality,
        "Units": unit or ("HU" if modality == "CT" else "signal"),
        "SyntheticData": True,
        "GeneratedBy": [{"Name": TOOLKIT}],
    }
    content = image.to_bytes()
    packed = gzip.compress(content, mtime=0) if compress else content
    return packed, json.dumps(about, indent=2).encode()


def _checked(volume: NDArray[np.float32], spacing_mm: tuple[float, ...]) -> NDArray[np.float32]:
    array = np.asarray(volume, dtype=np.float32)
    if array.ndim != 3 or 0 in array.shape:
        raise GeometryError(f"a phantom series needs a (Z, Y, X) volume, got {array.shape}")
    if len(spacing_mm) != 3 or not min(spacing_mm) > 0:
        raise GeometryError(f"spacing_mm must be three positive lengths, got {spacing_mm}")
    if not np.isfinite(array).all():
        raise NumericalError("the phantom holds NaN or infinite values")
    return array


def _headers(
    pixels: NDArray[np.uint16],
    spacing_mm: tuple[float, float, float],
    seed: int,
    modality: str,
    body_part: str,
) -> Iterator[dict[str, Any]]:
    """One header a slice; nothing in it depends on the clock."""
    content = hashlib.sha256(pixels.tobytes()).hexdigest()
    key = (seed, modality, spacing_mm, pixels.shape, content)
    dz, dy, dx = spacing_mm
    z, y, x = pixels.shape
    study = deterministic_uid("phantom study", *key)
    date, time = "20000101", "120000"
    for k in range(z):
        yield {
            **(_CT if modality == "CT" else _MR),
            "BitsStored": 16 if pixels.max() > 4095 else 12,
            "SOPInstanceUID": deterministic_uid("phantom slice", k, *key),
            "StudyInstanceUID": study,
            "SeriesInstanceUID": deterministic_uid("phantom series", *key),
            "FrameOfReferenceUID": deterministic_uid("phantom frame", *key),
            "PatientName": f"PHANTOM^SEED {seed}",
            "PatientID": f"PHANTOM-{seed}",
            "PatientBirthDate": None,
            "PatientSex": "O",
            "StudyDate": date,
            "StudyTime": time,
            "StudyID": "1",
            "StudyDescription": "Synthetic phantom",
            "AccessionNumber": None,
            "ReferringPhysicianName": None,
            "SeriesDate": date,
            "SeriesTime": time,
            "SeriesNumber": 1,
            "SeriesDescription": f"Synthetic {modality} phantom",
            "AcquisitionDate": date,
            "AcquisitionTime": time,
            "AcquisitionNumber": 1,
            "ContentDate": date,
            "ContentTime": time,
            "InstanceNumber": k + 1,
            **({"BodyPartExamined": body_part} if body_part else {"Laterality": None}),
            "PatientPosition": "HFS",
            "PositionReferenceIndicator": None,
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [
                -(x - 1) / 2 * dx,
                -(y - 1) / 2 * dy,
                (k - (z - 1) / 2) * dz,
            ],
            "PixelSpacing": [dy, dx],
            "SliceThickness": dz,
            "Manufacturer": TOOLKIT,
            "ManufacturerModelName": "phantom",
            "BurnedInAnnotation": "NO",
            "LossyImageCompression": "00",
            "QualityControlImage": "YES",
            "SyntheticData": "YES",
            "ContentQualification": "RESEARCH",
            "ImageComments": "Synthetic phantom, no patient.",
        }
