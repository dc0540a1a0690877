r"""Read DICOM-CT-PD projection data: axial fan-beam scans, one file a view.

The focal spot at angle :math:`\varphi` lies at :math:`\rho(-\sin\varphi, \cos\varphi)` with the
second axis upwards; image rows run downwards, so that the view angle here is
:math:`\theta = -\varphi`.  Whether channels are counted along or against the detector axis, the
data tell: of a full turn every line is measured twice,

.. math:: p(\theta, \gamma) = p(\theta + \pi - 2\gamma, -\gamma) .

Source: B. Chen et al., Development and validation of an open data format for CT projection data,
Med. Phys. 42 (2015) 6964.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from inverse.errors import InputError, NoInputError, ResourceError, UnsupportedError
from inverse.io.dicom_files import Source, guarded, open_sources, quiet_pydicom
from inverse.io.dicom_headers import integer_of, number_of, open_dicom, text_of
from inverse.io.sinogram import Sinogram
from inverse.operators.ct import FanBeam

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["read_ctpd"]

# (group, element) -> numbers it holds, and how one is stored where the reader sees bytes
_ROWS, _COLUMNS = (0x70291010, 1, "H"), (0x70291011, 1, "H")
_DU, _DV = (0x70291002, 1, "f"), (0x70291006, 1, "f")
_PHI, _Z, _RHO = (0x70311001, 1, "f"), (0x70311002, 1, "f"), (0x70311003, 1, "f")
_DSD, _CENTRE = (0x70311031, 1, "f"), (0x70311033, 2, "f")
_SHIFTS = ((0x7033100B, 1, "f"), (0x7033100C, 1, "f"), (0x7033100D, 1, "f"))
_SHAPE, _DATA, _BEAM = 0x7029100B, 0x70371009, 0x7037100A
_PHOTONS, _WATER = 0x70331065, 0x70411001

_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
_SAME_Z_MM, _SAME_RAD = 0.01, 1e-3


def _numbers(ds: Dataset, spec: tuple[int, int, str]) -> tuple[float, ...] | None:
    """Numbers of a private element, which may have arrived as raw bytes."""
    tag, count, kind = spec
    value: Any = getattr(ds.get(tag), "value", None)
    try:
        if isinstance(value, bytes):
            value = struct.unpack_from(f"<{count}{kind}", value)
        many = value if count > 1 or isinstance(value, tuple) else [value]
        found = tuple(float(v) for v in many)
    except (TypeError, ValueError, struct.error):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def _number(ds: Dataset, spec: tuple[int, int, str], label: str) -> float:
    found = _numbers(ds, spec)
    if found is None:
        raise InputError(
            f"{label}: no number in ({spec[0] >> 16:04x},{spec[0] & 0xFFFF:04x}), which "
            "projection data need; export the scan again"
        )
    return found[0]


def _word(ds: Dataset, tag: int) -> str:
    value = getattr(ds.get(tag), "value", None)
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return text.strip("\0 ").upper()


@dataclass(frozen=True)
class _View:
    """One view: where the source was, and the readings ``(rows, channels)``."""

    phi: float
    z: float
    rho: float
    distance: float
    centre: tuple[float, float]
    du: float
    dv: float
    curved: bool
    photons: NDArray[np.float32] | None
    mu_water: float | None
    readings: NDArray[np.float32]


def read_ctpd(path: str | os.PathLike[str], *, max_bytes: int = 1 << 32) -> Sinogram:
    """Read an axial fan-beam scan.

    Args:
        path: folder or zip archive with a file a view.
        max_bytes: most bytes of readings, at 4 a reading, and of an archive.

    Raises:
        NoInputError: nothing there, or no projection data.
        InputError: damaged files, missing geometry, views that contradict each other.
        UnsupportedError: helical or cone-beam scans, a flying focal spot, slices with different
            view angles.
        ResourceError: more than ``max_bytes``.
    """
    root = Path(path)
    skipped: Counter[str] = Counter()
    views: list[_View] = []
    held = 0
    with open_sources(root, skipped, max_bytes) as sources:
        for source in sources:
            with quiet_pydicom():
                view = guarded(partial(_read_view, source), source.label, "read the view")
            if isinstance(view, str):
                skipped[view] += 1
                continue
            views.append(view)
            held += view.readings.nbytes
            if held > max_bytes:
                raise ResourceError(
                    f"{root} holds more than {max_bytes >> 20} MiB of readings; convert fewer "
                    "files at a time or raise the limit (--limits)"
                )
    if not views:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in skipped.items())
        raise NoInputError(f"{root} holds no DICOM-CT-PD views ({reasons or 'no files'})")
    return _assemble(root, views)


def _read_view(source: Source) -> _View | str:
    ds = open_dicom(source, pixels=True)
    if isinstance(ds, str):
        return ds
    if _numbers(ds, _COLUMNS) is None:
        return "no projection data"
    label = source.label
    kind, beam = _word(ds, _DATA), _word(ds, _BEAM)
    if "HELI" in kind or "SPIRAL" in kind:
        raise UnsupportedError(
            f"{label}: a helical scan; every view sees other slices, so it must be rebinned to "
            "axial fan-beam data first"
        )
    rows, columns = int(_number(ds, _ROWS, label)), int(_number(ds, _COLUMNS, label))
    if "CONE" in beam and rows > 1:
        raise UnsupportedError(
            f"{label}: a cone beam of {rows} detector rows; rebin it to fan-beam data first"
        )
    if any(abs((_numbers(ds, spec) or (0.0,))[0]) > 1e-6 for spec in _SHIFTS):
        raise UnsupportedError(
            f"{label}: a flying focal spot; rebin the views to one focal spot first"
        )
    shape = _word(ds, _SHAPE)
    if shape not in ("CYLINDRICAL", "FLAT"):
        raise UnsupportedError(
            f"{label}: detector shape '{shape}' is not served; expected CYLINDRICAL or FLAT"
        )
    return _View(
        phi=_number(ds, _PHI, label),
        z=_number(ds, _Z, label),
        rho=_number(ds, _RHO, label),
        distance=_number(ds, _DSD, label),
        centre=_pair(ds, label),
        du=_number(ds, _DU, label),
        dv=_number(ds, _DV, label),
        curved=shape == "CYLINDRICAL",
        photons=_photons(ds, columns),
        mu_water=_water(ds),
        readings=_readings(ds, label, rows, columns),
    )


def _pair(ds: Dataset, label: str) -> tuple[float, float]:
    """Channel and row of the central ray, which count from 1."""
    found = _numbers(ds, _CENTRE)
    if found is None:
        raise InputError(f"{label}: no central detector element (7031,1033); export it again")
    return found[0], found[1]


def _photons(ds: Dataset, columns: int) -> NDArray[np.float32] | None:
    """Photons that leave the source towards each channel, or one number for all."""
    value = getattr(ds.get(_PHOTONS), "value", None)
    if isinstance(value, bytes):
        value = np.frombuffer(value[: len(value) // 4 * 4], "<f4")
    try:
        numbers = np.atleast_1d(np.asarray(value, np.float32))
    except (TypeError, ValueError):
        return None
    fits = numbers.size in (1, columns) and np.isfinite(numbers).all() and (numbers > 0).all()
    return numbers if fits else None


def _water(ds: Dataset) -> float | None:
    """Attenuation of water in 1/mm; files give it a millimetre or a centimetre."""
    value = getattr(ds.get(_WATER), "value", None)
    try:
        text = value.decode("ascii") if isinstance(value, bytes) else value
        mu = float(text) if text is not None else math.nan
    except (TypeError, ValueError):
        return None
    if 0.01 < mu < 0.05:
        return mu
    return mu / 10 if 0.1 < mu < 0.5 else None


def _readings(ds: Dataset, label: str, rows: int, columns: int) -> NDArray[np.float32]:
    """Line integrals ``(rows, columns)``; many files store them transposed."""
    shape = integer_of(ds, "Rows", 0), integer_of(ds, "Columns", 0)
    if shape not in ((rows, columns), (columns, rows)):
        raise InputError(
            f"{label}: an image of {shape[0]} x {shape[1]} for a detector of {rows} x {columns}; "
            "export it again"
        )
    if text_of(ds.file_meta, "TransferSyntaxUID") not in _UNCOMPRESSED:
        raise UnsupportedError(f"{label}: compressed projection data; decompress them first")
    raw: Any = ds.get("PixelData") or b""
    if integer_of(ds, "BitsAllocated", 0) != 16 or len(raw) < 2 * rows * columns:
        raise InputError(
            f"{label}: {2 * rows * columns} bytes of 16-bit readings expected, got {len(raw)}; "
            "copy the file again"
        )
    stored = np.frombuffer(raw[: 2 * rows * columns], "<u2").reshape(shape)
    slope, intercept = number_of(ds, "RescaleSlope"), number_of(ds, "RescaleIntercept")
    if slope is None or intercept is None or slope == 0:
        raise InputError(f"{label}: no rescale slope and intercept; export it again")
    values = (stored * slope + intercept).astype(np.float32)
    return values if shape == (rows, columns) else np.ascontiguousarray(values.T)


def _assemble(root: Path, views: list[_View]) -> Sinogram:
    """Stack the views: one group of views a table position, one slice a detector row of each."""
    first = views[0]
    for name in ("rho", "distance", "centre", "du", "dv", "curved"):
        if any(not np.allclose(getattr(v, name), getattr(first, name), atol=1e-3) for v in views):
            raise UnsupportedError(f"{root}: '{name}' changes from view to view")
    groups: list[list[_View]] = []
    for view in sorted(views, key=lambda v: v.z):
        if groups and view.z - groups[-1][0].z < _SAME_Z_MM:
            groups[-1].append(view)
        else:
            groups.append([view])
    if len(groups) > 1 and max(map(len, groups)) == 1:
        raise UnsupportedError(
            f"{root}: the table moves between views, as in a helical scan; rebin it first"
        )
    turns = [sorted(group, key=lambda v: v.phi % (2 * math.pi)) for group in groups]
    angles = np.array([v.phi % (2 * math.pi) for v in turns[0]])
    for turn in turns:
        other = np.array([v.phi % (2 * math.pi) for v in turn])
        if other.shape != angles.shape or np.abs(other - angles).max() > _SAME_RAD:
            raise UnsupportedError(
                f"{root}: table positions have different view angles ({len(other)} and "
                f"{len(angles)} views); convert them one by one"
            )
    scale = first.rho / first.distance
    data, heights = [], []
    for turn in turns:
        stack = np.stack([v.readings for v in turn])  # views, rows, channels
        for row in range(stack.shape[1]):
            data.append(stack[:, row])
            heights.append(turn[0].z + (row + 1 - first.centre[1]) * first.dv * scale)
    order = np.argsort(heights)
    p = np.stack([data[k] for k in order])
    channels = p.shape[2]
    offset = ((channels - 1) / 2 - (first.centre[0] - 1)) * first.du
    forward = FanBeam(
        angles=tuple(-angles),
        bins=channels,
        bin_mm=first.du,
        source_mm=first.rho,
        detector_mm=first.distance - first.rho,
        offset_mm=offset,
        curved=first.curved,
    )
    backward = replace(forward, offset_mm=-offset)
    mismatch = [_mismatch(p, forward), _mismatch(p[..., ::-1], backward)]
    turned = mismatch[1] < mismatch[0]
    photons = None
    if all(v.photons is not None for turn in turns for v in turn):
        flux = np.stack([np.broadcast_to(np.asarray(v.photons), (channels,)) for v in turns[0]])
        flux = flux[:, ::-1] if turned else flux
        photons = flux[None] * np.exp(-(p[..., ::-1] if turned else p))
    return Sinogram(
        data=np.ascontiguousarray(p[..., ::-1] if turned else p),
        geometry=backward if turned else forward,
        photons=None if photons is None else photons.astype(np.float32),
        mu_water=first.mu_water,
        z_mm=tuple(float(heights[k]) for k in order),
        provenance={
            "source": "DICOM-CT-PD",
            "views": len(angles),
            "channels_reversed": turned,
            "channel_order_from": "opposite rays" if min(mismatch) < math.inf else "assumed",
        },
    )


def _mismatch(p: NDArray[np.float32], geometry: FanBeam) -> float:
    """Mean difference between opposite rays of a full turn; infinite for less than a turn."""
    theta = np.asarray(geometry.angles) % (2 * math.pi)
    order = np.argsort(theta)
    theta = theta[order]
    gaps = np.diff(np.append(theta, theta[0] + 2 * math.pi))
    if len(theta) < 16 or gaps.max() > 4 * math.pi / len(theta):
        return math.inf
    middle = p[len(p) // 2][order]
    u = geometry.positions() / geometry.source_mm
    gamma = u if geometry.curved else np.arctan(u)
    total, count = 0.0, 0
    for k in np.flatnonzero((-gamma >= gamma[0]) & (-gamma <= gamma[-1])):
        there = np.array([np.interp(-gamma[k], gamma, row) for row in middle])
        opposite = np.interp(theta + math.pi - 2 * gamma[k], theta, there, period=2 * math.pi)
        total += float(np.abs(middle[:, k] - opposite).mean())
        count += 1
    return total / count if count else math.inf
