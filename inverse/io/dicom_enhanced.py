r"""Enhanced multi-frame CT and MR: each frame as the header of a classic image.

An enhanced file keeps geometry, rescale and timing in functional groups: one sequence that all
frames share and one item a frame, which wins.  Here each frame becomes a data set with the
classic attributes, so that grouping, checks, units and templates have one way only.

Source: DICOM PS3.3 C.7.6.16 (Multi-frame Functional Groups), C.8.13 (Enhanced MR), C.8.15
(Enhanced CT).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from inverse.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "ENHANCED",
    "FUNCTIONAL_GROUPS",
    "PHILIPS_TAGS",
    "classic_frames",
    "is_enhanced",
    "philips_scale",
]

ENHANCED = {
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
}
"""Enhanced and legacy converted enhanced image storage, and their modality."""

_SHARED = "SharedFunctionalGroupsSequence"
_PER_FRAME = "PerFrameFunctionalGroupsSequence"
FUNCTIONAL_GROUPS = (_SHARED, _PER_FRAME)

# Philips' scale slope: top level in classic files, in a private group of enhanced ones.
_PHILIPS_CREATOR, _PHILIPS_SCALE, _PHILIPS_GROUP = 0x20050010, 0x2005100E, 0x2005140F
PHILIPS_TAGS = (_PHILIPS_CREATOR, _PHILIPS_SCALE)

# functional group -> (its attribute, the classic attribute)
_MACROS: dict[str, tuple[tuple[str, str], ...]] = {
    "PixelMeasuresSequence": (
        ("PixelSpacing", "PixelSpacing"),
        ("SliceThickness", "SliceThickness"),
        ("SpacingBetweenSlices", "SpacingBetweenSlices"),
    ),
    "PlanePositionSequence": (("ImagePositionPatient", "ImagePositionPatient"),),
    "PlaneOrientationSequence": (("ImageOrientationPatient", "ImageOrientationPatient"),),
    "PixelValueTransformationSequence": (
        ("RescaleSlope", "RescaleSlope"),
        ("RescaleIntercept", "RescaleIntercept"),
        ("RescaleType", "RescaleType"),
    ),
    "FrameContentSequence": (
        ("FrameAcquisitionNumber", "AcquisitionNumber"),
        ("TemporalPositionIndex", "TemporalPositionIdentifier"),
    ),
    "CTImageFrameTypeSequence": (("FrameType", "ImageType"),),
    "MRImageFrameTypeSequence": (("FrameType", "ImageType"),),
    "MREchoSequence": (("EffectiveEchoTime", "EchoTime"),),
    "MRDiffusionSequence": (("DiffusionBValue", "DiffusionBValue"),),
    "MRTimingAndRelatedParametersSequence": (
        ("RepetitionTime", "RepetitionTime"),
        ("EchoTrainLength", "EchoTrainLength"),
    ),
    "CardiacSynchronizationSequence": (
        ("NominalCardiacTriggerDelayTime", "TriggerTime"),
    ),
    "CTXRayDetailsSequence": (("KVP", "KVP"),),
}  # fmt: skip


def _item(groups: Dataset | None, name: Any) -> Dataset | None:
    """The one item of a functional group, or None where it is absent or empty."""
    sequence = None if groups is None else groups.get(name)
    sequence = getattr(sequence, "value", sequence)  # numeric tags give the element
    return sequence[0] if sequence else None


def _set(ds: Dataset, name: str, value: Any) -> None:
    """Set an attribute; frames share elements, so the old one is left alone."""
    if name in ds:
        del ds[name]
    setattr(ds, name, value)


def _fill(classic: Dataset, groups: Dataset | None) -> None:
    """Copy the functional groups of one item to the classic attributes."""
    for macro, attributes in _MACROS.items():
        item = _item(groups, macro)
        if item is None:
            continue
        for name, target in attributes:
            # a value that cannot be converted stays unknown, as in classic headers
            with suppress(Exception):
                _set(classic, target, item[name].value)
    private = _item(groups, _PHILIPS_GROUP)
    if private is not None:
        for tag in filter(private.__contains__, PHILIPS_TAGS):
            classic[tag] = private[tag]
    unit = _item(_item(groups, "RealWorldValueMappingSequence"), "MeasurementUnitsCodeSequence")
    if unit is not None and "CodeValue" in unit and unit.CodeValue != "[hnsf'U]":
        _set(classic, "RescaleType", unit.CodeValue)  # a map, such as perfusion, is not in HU


def is_enhanced(ds: Dataset) -> bool:
    """Whether the geometry of an image is by frame."""
    return str(ds.get("SOPClassUID")) in ENHANCED and bool(ds.get(_PER_FRAME))


def philips_scale(ds: Dataset) -> float | None:
    """Philips' scale slope of a header with classic attributes, where it is positive."""
    creator, value = (ds[tag].value if tag in ds else "" for tag in PHILIPS_TAGS)
    if str(creator).strip() != "Philips MR Imaging DD 001":
        return None
    try:  # a float32 without a value representation arrives as bytes
        scale = struct.unpack("<f", value)[0] if isinstance(value, bytes) else float(value)
    except (TypeError, ValueError, struct.error):
        return None
    return scale if math.isfinite(scale) and scale > 0 else None


def classic_frames(ds: Dataset) -> Iterator[Dataset]:
    """The header of each frame of an enhanced image with classic attributes.

    Args:
        ds: data set of the enhanced image; only its header is used.

    Yields:
        One data set a frame, in stored order, that shares the file's top-level attributes.

    Raises:
        InputError: the functional groups do not number the frames.
    """
    import pydicom

    frames = ds[_PER_FRAME].value
    count = int(ds.get("NumberOfFrames") or 1)
    if len(frames) != count:
        raise InputError(
            f"the header claims {count} frames and describes {len(frames)}; export the series "
            "again"
        )
    shared = _item(ds, _SHARED)
    common = pydicom.Dataset()
    left_out = {pydicom.tag.Tag(name) for name in FUNCTIONAL_GROUPS}
    common.update(
        {
            tag: ds.get_item(tag)  # raw: a damaged element is an error only where it is used
            for tag in ds.keys()  # noqa: SIM118 - a data set iterates over its elements
            if tag not in left_out and tag.group < 0x7FE0
        }
    )
    _fill(common, shared)
    for index, groups in enumerate(frames):
        classic = pydicom.Dataset()
        classic.update(common)
        _fill(classic, groups)
        _set(classic, "NumberOfFrames", 1)
        _set(classic, "ReferencedFrameNumber", index + 1)
        classic.file_meta = ds.file_meta
        yield classic
