r"""Read Data Exchange HDF5: parallel-beam tomography of a synchrotron or micro-CT.

Detector counts I, flat fields W and dark fields D become line integrals,

.. math:: p = -\log\frac{I - \bar D}{\bar W - \bar D} .

The rotation axis is given, read from the file, or fitted: the centre of mass of a projection
obeys :math:`c(\theta) = c_0 + a\cos\theta + b\sin\theta` when the object stays in view.

Source: F. De Carlo et al., Scientific data exchange, J. Synchrotron Rad. 21 (2014) 1224;
S. G. Azevedo et al., IEEE Trans. Nucl. Sci. 37 (1990) 1525 (centre of rotation).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inverse.errors import InputError
from inverse.io.hdf5 import Hdf5, open_hdf5
from inverse.io.sinogram import Sinogram
from inverse.operators.ct import ParallelBeam

__all__ = ["read_dxchange"]

_RESOLUTION = "measurement/instrument/detection_system/objective/resolution"
_CENTRES = ("process/rotation_center", "exchange/rotation_center")
_MIN_FLATS = 4  # below that, their variance says little about the gain


def read_dxchange(
    path: str | os.PathLike[str],
    *,
    pixel_mm: float | None = None,
    centre: float | None = None,
    rows: Callable[[int], Sequence[int]] | None = None,
    max_bytes: int = 1 << 32,
) -> Sinogram:
    """Read ``/exchange/data`` with flat, dark and angles.

    Args:
        path: the file.
        pixel_mm: detector pixel size at the sample; default the file's objective resolution.
        centre: detector column of the rotation axis, counts from 0 at the first pixel's centre;
            default the file's, else a fit.
        rows: which detector rows to read, of their number; each becomes a slice; default all.
        max_bytes: most bytes of counts.

    Raises:
        NoInputError: no such file.
        InputError: damaged, links, parts missing or contradicting each other.
        ResourceError: more than ``max_bytes``.
    """
    source = Path(path)
    with open_hdf5(source, "Data Exchange", max_bytes) as file:
        item = file.need("exchange/data")
        if item.ndim != 3 or 0 in item.shape:
            raise InputError(
                f"{source}: exchange/data must be (views, rows, columns), got {item.shape}"
            )
        chosen = sorted(set(range(item.shape[1]) if rows is None else rows(item.shape[1])))
        counts = _frames(file, "exchange/data", chosen, item.shape[1:])
        flats = _frames(file, "exchange/data_white", chosen, item.shape[1:])
        if file.dataset("exchange/data_dark") is None:
            darks = np.zeros_like(flats[:1])
        else:
            darks = _frames(file, "exchange/data_dark", chosen, item.shape[1:])
        angles = _angles(file, len(counts))
        size = _pixel(file) if pixel_mm is None else pixel_mm
        stored = next((v for v in map(file.array, _CENTRES) if v is not None), None)
    dark = darks.mean(axis=0)
    white = flats.mean(axis=0) - dark
    if not (white > 0).all():
        raise InputError(f"{source}: the flat field does not exceed the dark field everywhere")
    gain = _gain(flats, white)
    signal = counts - dark
    starved = signal < gain / 2  # less than half a photon
    signal = np.maximum(signal, gain / 2)
    p = np.ascontiguousarray(-np.log(signal / white).transpose(1, 0, 2), dtype=np.float32)
    photons = np.asarray(signal.transpose(1, 0, 2) / gain, np.float32)
    bins = p.shape[2]
    origin = "given"
    if centre is None:
        origin = "file" if stored is not None else "fit to the centre of mass"
        centre = _fit_centre(p, angles) if stored is None else float(stored.reshape(-1)[0])
    if not 0 <= centre <= bins - 1:
        raise InputError(
            f"{source}: the rotation axis is at column {centre:.1f}, outside the {bins} columns; "
            "give --centre"
        )
    return Sinogram(
        data=p,
        geometry=ParallelBeam(
            tuple(angles), bins, size, offset_mm=((bins - 1) / 2 - centre) * size
        ),
        photons=photons,
        z_mm=tuple(float(k * size) for k in chosen),
        provenance={
            "source": "Data Exchange",
            "slices": chosen,
            "rotation_centre": centre,
            "rotation_centre_from": origin,
            "counts_per_photon": gain,
            "starved": int(np.count_nonzero(starved)),
        },
    )


def _frames(file: Hdf5, path: str, rows: list[int], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Frames of a detector, the chosen rows only."""
    item = file.need(path)
    if item.ndim != 3 or item.shape[1:] != shape or item.dtype.kind not in "fiu":
        raise InputError(
            f"{file.source}: {path} must be (frames, {shape[0]}, {shape[1]}) real numbers, got "
            f"{item.shape} of {item.dtype}"
        )
    file.count(8 * item.shape[0] * len(rows) * shape[1], path)
    frames = np.asarray(item[:, rows, :], np.float64)
    if not np.isfinite(frames).all() or not len(frames):
        raise InputError(f"{file.source}: {path} is empty or holds NaN or infinite values")
    return frames


def _angles(file: Hdf5, views: int) -> list[float]:
    """View angles in rad."""
    theta = file.array("exchange/theta")
    if theta is None or theta.size != views or not np.isfinite(theta).all():
        found = "none" if theta is None else f"{theta.size}"
        raise InputError(
            f"{file.source}: exchange/theta must give a finite angle in degrees for each of "
            f"{views} views, got {found}"
        )
    return [math.radians(float(t)) for t in theta.reshape(-1)]


def _pixel(file: Hdf5) -> float:
    """Pixel size in mm from the objective's resolution in micrometres."""
    value = file.array(_RESOLUTION)
    if value is None or value.size != 1 or not float(value.reshape(-1)[0]) > 0:
        raise InputError(f"{file.source} does not tell its pixel size; give it with --pixel-mm")
    return float(value.reshape(-1)[0]) / 1000


def _gain(flats: NDArray[np.float64], white: NDArray[Any]) -> float:
    """Counts a photon: variance over mean of the flat fields, where there are enough of them."""
    if len(flats) < _MIN_FLATS:
        return 1.0
    ratio = float(np.median(flats.var(axis=0, ddof=1) / white))
    return ratio if ratio > 0 else 1.0


def _fit_centre(p: NDArray[np.float32], angles: list[float]) -> float:
    """Column of the rotation axis by least squares on the centre of mass."""
    column = np.arange(p.shape[2])
    total = p.astype(np.float64).sum(axis=(0, 2))
    if not (total > 0).all():
        raise InputError("the centre of rotation cannot be fitted; give it with --centre")
    mass = (p.astype(np.float64).sum(axis=0) * column).sum(axis=1) / total
    basis = np.stack([np.ones(len(angles)), np.cos(angles), np.sin(angles)], axis=1)
    return float(np.linalg.lstsq(basis, mass, rcond=None)[0][0])
