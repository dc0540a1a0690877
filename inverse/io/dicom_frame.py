r"""Where slices of raw data lie in the patient, and DICOM headers for those that have none.

Pixel (i, j) of slice k, i downwards and j along a row, has its centre at

.. math:: p_k + j\,\Delta_x\,\hat r + i\,\Delta_y\,\hat c

in patient space (LPS, mm), with the directions of a row :math:`\hat r` and of a column
:math:`\hat c`.

Source: DICOM PS3.3 C.7.6.2.1.1 (Image Position and Image Orientation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inverse.errors import InputError
from inverse.io.dicom_files import quiet_pydicom
from inverse.io.dicom_read import template_of
from inverse.io.dicom_write import SOP_CLASS, deterministic_uid, new_dataset

__all__ = ["PatientFrame", "blank_templates"]


@dataclass(frozen=True)
class PatientFrame:
    """Place of a stack of slices in the patient.

    Attributes:
        orientation: direction cosines of a row, then of a column.
        positions: centre of the first pixel of each slice, mm, in the order of the slices, which
            ascend along the normal.
    """

    orientation: tuple[float, ...]
    positions: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        o = np.array(self.orientation, np.float64)
        p = np.array(self.positions, np.float64)
        if (
            o.shape != (6,)
            or p.ndim != 2
            or p.shape[1] != 3
            or not np.isfinite([*o, *p.flat]).all()
        ):
            raise InputError(
                "a patient frame gives 6 direction cosines and a position of 3 numbers a slice, "
                f"all finite; got shapes {o.shape} and {p.shape}"
            )
        r, c = o[:3], o[3:]
        if max(abs(r @ r - 1), abs(c @ c - 1), abs(r @ c)) > 1e-3:
            raise InputError(
                f"the directions of a row and a column must be orthonormal, got {self.orientation}"
            )
        if not (np.diff(self.heights) > 0).all():
            raise InputError(
                "slices must ascend along their normal, the row direction times the column "
                "direction; sort the slices by position"
            )

    @classmethod
    def axial(
        cls, shape: tuple[int, int], pixel_mm: tuple[float, float], z_mm: Sequence[float]
    ) -> PatientFrame:
        """Axial slices at heights ``z_mm`` with their centre on the axis."""
        x, y = (-(n - 1) / 2 * d for n, d in zip(shape[::-1], pixel_mm[::-1], strict=True))
        return cls((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), tuple((x, y, float(z)) for z in z_mm))

    @classmethod
    def from_spec(cls, spec: Any) -> PatientFrame:
        """The frame that `spec` wrote.

        Raises:
            InputError: entries that are missing or no geometry.
        """
        try:
            orientation = tuple(float(v) for v in spec["orientation"])
            positions = tuple(tuple(float(v) for v in p) for p in spec["positions"])
        except (KeyError, TypeError, ValueError):
            raise InputError(
                "a patient frame has the entries 'orientation' (6 numbers) and 'positions' (3 "
                f"numbers a slice), got {spec!r:.80}"
            ) from None
        return cls(orientation, positions)

    def spec(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "orientation": list(self.orientation),
            "positions": [list(p) for p in self.positions],
        }

    @property
    def heights(self) -> NDArray[np.float64]:
        """Position of each slice along the normal, mm, ``(Z,)``."""
        o = np.array(self.orientation, np.float64)
        return np.array(self.positions, np.float64) @ np.cross(o[:3], o[3:])

    def take(self, chosen: Sequence[int]) -> PatientFrame:
        """The frame of some of the slices, by their numbers in ascending order."""
        return PatientFrame(self.orientation, tuple(self.positions[k] for k in chosen))


def blank_templates(
    modality: str,
    shape: tuple[int, int],
    pixel_mm: tuple[float, float],
    frame: PatientFrame,
    identity: str,
) -> tuple[bytes, ...]:
    """Headers of slices without a patient, for the writer of derived series.

    Args:
        modality: ``"CT"`` or ``"MR"``.
        shape: rows and columns.
        pixel_mm: row and column spacing.
        frame: where the slices lie.
        identity: hash of the raw data, on which all identifiers depend.

    Returns:
        A header a slice, as `Series.templates` holds them.
    """
    step = np.diff(frame.heights)
    common: Mapping[str, Any] = {
        "SOPClassUID": SOP_CLASS[modality],
        "Modality": modality,
        "StudyInstanceUID": deterministic_uid("raw study", identity),
        "SeriesInstanceUID": deterministic_uid("raw series", identity),
        "FrameOfReferenceUID": deterministic_uid("raw frame", identity),
        "PatientName": "UNKNOWN",
        "PatientID": f"RAW-{identity[:12]}",
        "StudyID": "1",
        "Rows": shape[0],
        "Columns": shape[1],
        "PixelSpacing": list(pixel_mm),
        "SliceThickness": float(np.median(step)) if len(step) else 1.0,
        "ImageOrientationPatient": list(frame.orientation),
    }
    with quiet_pydicom():
        return tuple(
            template_of(
                new_dataset(
                    {
                        **common,
                        "SOPInstanceUID": deterministic_uid("raw slice", identity, k),
                        "ImagePositionPatient": list(position),
                    }
                )
            )
            for k, position in enumerate(frame.positions)
        )
