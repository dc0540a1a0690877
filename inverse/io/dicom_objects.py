"""Further objects of a study: the report as Encapsulated PDF, a map as Parametric Map.

Both are optional companions of a derived series and carry its patient and study.  The Parametric
Map holds float32 values as they are, which the classic series of `dicom_write` rounds; fewer
viewers show it.  It needs highdicom (extra ``maps``).

Source: DICOM PS3.3 A.45.1 (Encapsulated PDF IOD), A.75 (Parametric Map IOD).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from inverse.errors import GeometryError, InputError, NumericalError, UnsupportedError
from inverse.io.dicom_files import quiet_pydicom
from inverse.io.dicom_headers import TEMPLATE_TAGS, words
from inverse.io.dicom_write import (
    TOOLKIT,
    UNPAIRED,
    Derivation,
    WrittenSeries,
    deterministic_uid,
    equipment_items,
    file_of,
    label_of,
    new_dataset,
    open_template,
    plane_geometry,
    time_in_zone,
    toolkit_version,
    uid_of,
    write_folder,
)

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["check_highdicom", "write_parametric_map", "write_pdf"]

_PDF = "1.2.840.10008.5.1.4.1.1.104.1"
_STUDY = tuple(
    name
    for name in TEMPLATE_TAGS
    if name.startswith(("Patient", "Study", "Deidentification", "Responsible", "Breed"))
    and name != "PatientPosition"
) + words(
    "SpecificCharacterSet TimezoneOffsetFromUTC IssuerOfPatientID AccessionNumber "
    "ReferringPhysicianName"
)
_STUDY_TYPE_2 = words(
    """
    PatientName PatientID PatientBirthDate PatientSex StudyID StudyDate StudyTime AccessionNumber
    ReferringPhysicianName
    """
)
_LABEL = "RESEARCH ONLY - "


def check_highdicom() -> None:
    """Refuse a Parametric Map before any work is done.

    Raises:
        UnsupportedError: highdicom is not installed.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "a Parametric Map needs highdicom; install it with `pip install highdicom`"
        ) from None


def _study_of(source: Dataset) -> dict[str, Any]:
    """Patient and study of a template; nothing about its images."""
    found: dict[str, Any] = dict.fromkeys(_STUDY_TYPE_2)
    found |= {name: source[name].value for name in _STUDY if source.get(name)}
    source_uid = str(source.SOPInstanceUID)
    found["StudyInstanceUID"] = uid_of(
        source, "StudyInstanceUID", source.get("SeriesInstanceUID"), source_uid
    )
    return found


def _body_part(source: Dataset) -> dict[str, Any]:
    """Body part, and its side unless it has none."""
    part = source.get("BodyPartExamined")
    found = {} if not part else {"BodyPartExamined": part}
    if part not in UNPAIRED:
        found["Laterality"] = source.get("Laterality")  # empty where unknown
    return found


def _references(sources: Sequence[Dataset]) -> list[dict[str, str]]:
    """The instances that an object was derived from, each once."""
    pairs = dict.fromkeys((str(s.SOPClassUID), str(s.SOPInstanceUID)) for s in sources)
    return [
        {"ReferencedSOPClassUID": kind, "ReferencedSOPInstanceUID": uid} for kind, uid in pairs
    ]


def write_pdf(
    out_dir: str | os.PathLike[str],
    pdf: bytes,
    templates: Sequence[bytes],
    *,
    title: str,
    derivation: Derivation,
    series_number: int = 9090,
    synthetic: bool = True,
    names_patient: bool = False,
    created: datetime | None = None,
) -> WrittenSeries:
    """Write a PDF as an object of the templates' study, complete or not at all.

    Args:
        out_dir: new or empty folder, for one file.
        pdf: the document.
        templates: a header a slice of the images it reports on, from `Series.templates`.
        title: of the document; a research label is put before it.
        derivation: provenance.
        series_number: 9000 and above, so that it sorts behind the scanner's.
        synthetic: it shows simulated data or what a generative prior made; inherited.
        names_patient: whether a page names the patient.
        created: date and time of creation; now by default.

    Raises:
        InputError: no PDF, no templates, or a damaged one.
        OutputError: a folder that is not empty, or cannot be written.
    """
    if not pdf.startswith(b"%PDF-"):
        raise InputError("the document is no PDF; make the report again")
    pdf += b"\n" * (len(pdf) % 2)  # values have even lengths
    if not templates:
        raise InputError("a DICOM document needs a DICOM source; the measurement has no template")
    with quiet_pydicom():
        sources = [open_template(template) for template in templates]
        now = time_in_zone(created, sources[0])
        synthetic = synthetic or any(s.get("SyntheticData") == "YES" for s in sources)
        digest = hashlib.sha256(pdf).hexdigest()
        uids = [str(s.SOPInstanceUID) for s in sources]
        series_uid = deterministic_uid("pdf series", *uids, digest)
        date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
        attributes = {
            **_study_of(sources[0]),
            "SOPClassUID": _PDF,
            "SOPInstanceUID": deterministic_uid("pdf", series_uid),
            "SeriesInstanceUID": series_uid,
            "SeriesNumber": series_number,
            "SeriesDescription": f"{_LABEL}report",
            "Modality": "DOC",
            "ConversionType": "WSD",
            "Manufacturer": TOOLKIT,
            "ManufacturerModelName": TOOLKIT,
            "SoftwareVersions": toolkit_version(),
            "InstanceNumber": 1,
            "ContentDate": date,
            "ContentTime": time,
            "AcquisitionDateTime": None,
            "InstanceCreationDate": date,
            "InstanceCreationTime": time,
            "BurnedInAnnotation": "YES" if names_patient else "NO",
            "DocumentTitle": label_of(_LABEL + title, 1024),
            "ConceptNameCodeSequence": [],
            "SourceInstanceSequence": _references(sources),
            "ContributingEquipmentSequence": equipment_items(
                sources[0], derivation, synthetic, now
            ),
            "MIMETypeOfEncapsulatedDocument": "application/pdf",
            "EncapsulatedDocument": pdf,
        }
        if synthetic:
            attributes["SyntheticData"] = "YES"
        paths = write_folder(Path(out_dir), [("0001.dcm", file_of(new_dataset(attributes)))])
    return WrittenSeries(paths, series_uid, 0, 1.0)


def write_parametric_map(
    out_dir: str | os.PathLike[str],
    volume: NDArray[np.float32],
    templates: Sequence[bytes],
    *,
    description: str,
    derivation: Derivation,
    series_number: int = 9091,
    synthetic: bool = True,
    unit: Literal["HU", "signal"] = "HU",
    created: datetime | None = None,
) -> WrittenSeries:
    """Write a map of standard deviations as one multi-frame file of float32 values.

    Args:
        out_dir: new or empty folder, for one file.
        volume: ``(Z, Y, X)`` standard deviations, HU or signal, over the templates' field of view.
        templates: a header a slice, from `Series.templates`.
        description: series description; a research label is put before it.
        derivation: provenance.
        series_number: 9000 and above, so that it sorts behind the scanner's.
        synthetic: simulated data or a generative prior; inherited from the source.
        unit: of the values.
        created: date and time of creation; now by default.

    Raises:
        GeometryError: a volume that is not ``(len(templates), Y, X)``.
        InputError: no templates, or a damaged one.
        NumericalError: NaN or infinite values; nothing is written.
        OutputError: a folder that is not empty, or cannot be written.
        UnsupportedError: highdicom is not installed.
    """
    check_highdicom()
    volume = np.ascontiguousarray(volume, dtype=np.float32)
    if volume.ndim != 3 or len(volume) != len(templates) or 0 in volume.shape:
        raise GeometryError(
            f"the map must have shape ({len(templates)}, rows, columns) for {len(templates)} "
            f"templates, got {volume.shape}"
        )
    if not np.isfinite(volume).all():
        bad = int((~np.isfinite(volume)).sum())
        raise NumericalError(f"{bad} voxels are NaN or infinite, so no map is written")
    with quiet_pydicom():
        sources = [open_template(template) for template in templates]
        now = time_in_zone(created, sources[0])
        synthetic = synthetic or any(s.get("SyntheticData") == "YES" for s in sources)
        series_uid = deterministic_uid(
            "map series",
            *[s.SOPInstanceUID for s in sources],
            json.dumps(asdict(derivation), sort_keys=True, default=str),
            hashlib.sha256(volume.tobytes()).hexdigest(),
        )
        planes = [plane_geometry(s, (volume.shape[1], volume.shape[2]))[0] for s in sources]
        made = _parametric_map(volume, sources, planes, series_uid, series_number, unit)
        suffix = f" STD ({unit})"
        date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
        attributes = {
            **_study_of(sources[0]),
            "FrameOfReferenceUID": uid_of(sources[0], "FrameOfReferenceUID", series_uid),
            **_body_part(sources[0]),
            "SeriesDescription": _LABEL
            + label_of(description, 64 - len(_LABEL) - len(suffix))
            + suffix,
            "ContentDate": date,
            "ContentTime": time,
            "InstanceCreationDate": date,
            "InstanceCreationTime": time,
            "ContributingEquipmentSequence": equipment_items(
                sources[0], derivation, synthetic, now
            ),
        }
        if synthetic:
            attributes["SyntheticData"] = "YES"
        for element in new_dataset(attributes):
            made[element.tag] = element
        # of random identifiers one made from the content: a repeated run gives the same file
        organisation = deterministic_uid("map dimensions", series_uid)
        made.DimensionOrganizationSequence[0].DimensionOrganizationUID = organisation
        for item in made.DimensionIndexSequence:
            item.DimensionOrganizationUID = organisation
        paths = write_folder(Path(out_dir), [("0001.dcm", file_of(made))])
    return WrittenSeries(paths, series_uid, 0, 1.0)


def _parametric_map(
    volume: NDArray[np.float32],
    sources: Sequence[Dataset],
    planes: Sequence[dict[str, Any]],
    series_uid: str,
    series_number: int,
    unit: str,
) -> Dataset:
    """The multi-frame object as highdicom makes it."""
    import highdicom

    for source in sources:  # it asks for what templates leave out when empty
        for name in (*_STUDY_TYPE_2, "FrameOfReferenceUID"):
            if name not in source:
                setattr(source, name, deterministic_uid(name, series_uid) if "UID" in name else "")
        source.StudyInstanceUID = _study_of(source)["StudyInstanceUID"]
    positions = [
        p.get("ImagePositionPatient", [float(v) for v in s.ImagePositionPatient])
        for p, s in zip(planes, sources, strict=True)
    ]
    top = max(float(np.percentile(volume, 99.5)), 1e-3)
    code = ("[hnsf'U]", "UCUM", "Hounsfield unit") if unit == "HU" else ("1", "UCUM", "no units")
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label="STD",
        lut_explanation=f"standard deviation in {unit}",
        unit=highdicom.sr.CodedConcept(*code),
        value_range=(0.0, float(volume.max())),
        slope=1.0,
        intercept=0.0,
        quantity_definition=highdicom.sr.CodedConcept("386136009", "SCT", "Standard deviation"),
    )
    return highdicom.pm.ParametricMap(
        source_images=list(sources),
        pixel_array=volume,
        series_instance_uid=series_uid,
        series_number=series_number,
        sop_instance_uid=deterministic_uid("map", series_uid),
        instance_number=1,
        manufacturer=TOOLKIT,
        manufacturer_model_name=TOOLKIT,
        software_versions=toolkit_version(),
        device_serial_number="0",
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[
            highdicom.VOILUTTransformation(window_center=top / 2, window_width=top)
        ],
        pixel_measures=highdicom.PixelMeasuresSequence(
            pixel_spacing=planes[0]["PixelSpacing"],
            slice_thickness=float(sources[0].get("SliceThickness") or 1.0),
        ),
        plane_orientation=highdicom.PlaneOrientationSequence(
            "PATIENT", [float(v) for v in sources[0].ImageOrientationPatient]
        ),
        plane_positions=[highdicom.PlanePositionSequence("PATIENT", p) for p in positions],
        content_label="STD",
        content_description="A low standard deviation does not mean correct.",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
    )
