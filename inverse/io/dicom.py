"""DICOM in and out: the one import point for series of CT and MR images.

>>> from inverse.io.dicom import inspect, read_series, write_series

Reading fails closed: a missing slice, a doubtful spacing or an unknown unit is an error that says
what to do, never a silently wrong volume.  Writing makes a classic derived CT or MR series that
every viewer reads, marked as research and, where it is, as synthetic.
"""

from inverse.io.dicom_frame import PatientFrame, blank_templates
from inverse.io.dicom_headers import Note
from inverse.io.dicom_objects import check_highdicom, write_parametric_map, write_pdf
from inverse.io.dicom_read import Series, identities, inspect, patient_of, read_series
from inverse.io.dicom_stacks import Inspection, Stack
from inverse.io.dicom_write import (
    TOOLKIT,
    Derivation,
    WrittenSeries,
    deterministic_uid,
    write_instances,
    write_series,
)

__all__ = [
    "TOOLKIT",
    "Derivation",
    "Inspection",
    "Note",
    "PatientFrame",
    "Series",
    "Stack",
    "WrittenSeries",
    "blank_templates",
    "check_highdicom",
    "deterministic_uid",
    "identities",
    "inspect",
    "patient_of",
    "read_series",
    "write_instances",
    "write_parametric_map",
    "write_pdf",
    "write_series",
]
