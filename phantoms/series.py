"""A phantom as the DICOM series that a scanner would have written.

The series is complete (every attribute that the CT or MR Image IOD asks for), reproducible to the
byte, and labelled: synthetic data, quality control image, a patient called PHANTOM.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from inverse.errors import GeometryError, InputError, NumericalError
from inverse.io.dicom import TOOLKIT, deterministic_uid, write_instances

__all__ = ["write_phantom_series"]

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
        body_part: body part examined.

    Returns:
        One path a slice, from the lowest slice up.

    Raises:
        GeometryError: a volume that is not three-dimensional, a spacing that is not positive.
        NumericalError: NaN or infinite values.
        InputError: values that the stored range cannot hold.
        OutputError: a folder that is not empty, or cannot be written.
    """
    volume = np.asarray(volume_hu, dtype=np.float32)
    if volume.ndim != 3 or 0 in volume.shape:
        raise GeometryError(f"a phantom series needs a (Z, Y, X) volume, got {volume.shape}")
    if len(spacing_mm) != 3 or not min(spacing_mm) > 0:
        raise GeometryError(f"spacing_mm must be three positive lengths, got {spacing_mm}")
    if not np.isfinite(volume).all():
        raise NumericalError("the phantom holds NaN or infinite values")
    offset, step = (-1024.0, 1.0) if modality == "CT" else (0.0, float(volume.max()) / 4095 or 1.0)
    steps = np.rint((volume.astype(np.float64) - offset) / step)
    if steps.min() < 0 or steps.max() > 65535:
        raise InputError(
            f"phantom values must be at least {offset:g} and at most {offset + 65535 * step:g}, "
            f"got {volume.min():g} to {volume.max():g}"
        )
    pixels = steps.astype(np.uint16)
    headers = _headers(pixels, spacing_mm, seed, modality, body_part)
    return write_instances(out_dir, headers, pixels)


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
            "BodyPartExamined": body_part,
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
