"""DICOM in and out: the one import point for series of CT and MR images.

>>> from inverse.io.dicom import inspect, read_series, write_series

Reading fails closed: a missing slice, a doubtful spacing or an unknown unit is an error that says
what to do, never a silently wrong volume.  Writing makes a classic derived CT or MR series that
every viewer reads, marked as research and, where it is, as synthetic.
"""

from inverse.io.dicom_headers import Note
from inverse.io.dicom_read import Series, inspect, read_series
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
    "Series",
    "Stack",
    "WrittenSeries",
    "deterministic_uid",
    "inspect",
    "read_series",
    "write_instances",
    "write_series",
]
