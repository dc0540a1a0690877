r"""Stacks of slices: group headers, check their geometry, say what speaks against reading them.

A *stack* is a set of slices of one series that share matrix, pixel spacing, orientation and image
type, so that they can be stacked along their common normal :math:`n = r \times c` (``r`` along a
row, ``c`` along a column).  Slices are ordered by :math:`p \cdot n` (``p`` the position of the
first pixel), never by instance number, slice location or file name.

Source: DICOM PS3.3 C.7.6.2 (Image Plane), C.7.6.16 (Multi-frame Functional Groups).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inverse.io.dicom_headers import Header, Note

__all__ = [
    "SAME_MM",
    "Inspection",
    "Stack",
    "decoder_plugin",
    "group_headers",
    "heights",
    "make_stack",
    "slice_normal",
]

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

# Tried in this order where slices of one geometry do not make one even stack.
_SPLIT_BY = ("acquisition", "echo_ms", "b_value", "temporal", "trigger_ms")


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
    headers: tuple[Header, ...] = field(repr=False)

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


# --- stacks ------------------------------------------------------------------------------------


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= tolerance


def slice_normal(orientation: Sequence[float]) -> NDArray[np.float64]:
    """Unit normal of a slice, row direction times column direction."""
    return np.cross(orientation[:3], orientation[3:])


def heights(headers: Sequence[Header], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Position of each slice along the normal, mm, ``(Z,)``."""
    return np.array([h.position for h in headers], dtype=np.float64) @ normal


SAME_MM = 0.01
"""Two slices nearer than this are at the same position."""


def _repeats(headers: Sequence[Header]) -> int:
    """Number of slices at a position that another slice already has."""
    orientation = headers[0].orientation
    if orientation is None or any(h.position is None for h in headers):
        return 0
    z = np.sort(heights(headers, slice_normal(orientation)))
    return int((np.diff(z) < SAME_MM).sum())


def _is_even(headers: Sequence[Header]) -> bool:
    """One slice a position, evenly spaced: a stack that needs no splitting."""
    orientation = headers[0].orientation
    if len(headers) < 2 or orientation is None or any(h.position is None for h in headers):
        return True
    z = np.sort(heights(headers, slice_normal(orientation)))
    return not _repeats(headers) and _spacing_note(z, float(np.median(np.diff(z)))) is None


def _split(headers: list[Header]) -> list[list[Header]]:
    """Split one geometry by acquisition, echo, b-value or time, where that explains it.

    Many scanners count acquisitions or trigger times by slice or by rotation, so an even stack is
    never split.  The key that makes even stacks of all slices is taken; failing that, the first
    one that separates slices at one position, and its parts are split further.
    """
    if _is_even(headers):
        return [headers]
    options: list[list[list[Header]]] = []
    for key in _SPLIT_BY:
        parts: dict[Any, list[Header]] = {}
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


def group_headers(headers: Sequence[Header]) -> list[list[Header]]:
    """Stacks of equal geometry, in an order that does not depend on file names."""
    exact: dict[Any, list[list[Header]]] = {}
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

    def order(stack: list[Header]) -> tuple[Any, ...]:
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
    if decoder_plugin(syntax):
        return None
    if syntax in _PLUGINS:
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


def decoder_plugin(syntax: str) -> str | None:
    """The trusted plug-in that decodes a compressed transfer syntax, where one is installed."""
    from pydicom.pixels.decoders.base import get_decoder

    if syntax not in _PLUGINS:
        return None
    available = get_decoder(syntax).available_plugins
    return next((name for name in _PLUGINS[syntax][0] if name in available), None)


def _image_problems(headers: Sequence[Header]) -> Iterator[Note]:
    """What the headers say against reading the pixels."""
    h = headers[0]
    if any(h.frames != 1 for h in headers):
        yield Note(
            "MULTIFRAME",
            "a multi-frame image that does not describe its frames one by one, so their positions "
            "are unknown; export it as a classic series (one file a slice)",
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


def make_stack(key: str, headers: list[Header]) -> Stack:
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
            normal = slice_normal(o)
            along = heights(headers, normal)
            order = np.lexsort((np.array([h.sop_uid for h in headers]), along.round(2)))
            headers = [headers[i] for i in order]
            along = along[order]
            fresh = np.concatenate([[True], np.diff(along) >= SAME_MM])
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


def _single_spacing(header: Header, notes: list[Note]) -> float:
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
    if tilt > 0.1 and shift > SAME_MM:
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
