r"""Measurement files: a measurement with what is needed to reconstruct it, in HDF5.

Layout, version 1 (a dataset each, all checksummed):

==============  ====================  ==========================================================
``header``      uint8                 JSON: format, version, operator, modality, pixel, provenance
``data``        float32 or complex64  measured values, (slices, \*out_shape)
``noise``       float32               standard deviation, broadcasts against data
``mask``        uint8                 sampling mask, for operators that have one
``maps``        complex64             coil sensitivities, for operators that have them
``trajectory``  float32               sample positions of non-Cartesian MRI, cycles per pixel
``density``     float32               their density compensation
``counts``      float32               optional: readings before the logarithm (CT), as ``data``
``truth``       float32 or complex64  optional: the image that was simulated from
``template``    uint8                 optional: DICOM or NIfTI headers of the slices, joined
``ends``        int64                 optional: where each header ends in ``template``
``z_mm``        float64               optional: position of each slice in mm
==============  ====================  ==========================================================

An operator that acts on volumes measures volumes, not slices, and these are what ``data`` and
``truth`` count; ``template`` and ``z_mm`` count their slices.

A file from elsewhere is not trusted: links, external and virtual datasets, other types and
filters, and sizes over a cap are refused before anything of that kind is opened or read.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.errors import (
    InputError,
    NoInputError,
    OutputError,
    ReconError,
    ResourceError,
    UnsupportedError,
)
from inverse.io.hdf5 import vetted
from inverse.measurement import Measurement
from inverse.operators.ct import RayTransform
from inverse.operators.linop import LinearOperator
from inverse.operators.mask import Mask
from inverse.operators.metal import UnspoiledRays
from inverse.operators.mri import CartesianMRI, Sense
from inverse.operators.noise import TransmissionPoisson
from inverse.operators.nufft import NonCartesian
from inverse.operators.resample import ThickSlices

__all__ = ["MeasurementFile", "read_measurement", "write_measurement"]

_FORMAT, _VERSION = "recon-measurement", 1
_HEADER_BYTES = 64 * 2**20
_DTYPES: dict[str, tuple[str, ...]] = {
    "header": ("uint8",),
    "data": ("float32", "complex64"),
    "noise": ("float32",),
    "mask": ("uint8",),
    "maps": ("complex64",),
    "trajectory": ("float32",),
    "density": ("float32",),
    "counts": ("float32",),
    "truth": ("float32", "complex64"),
    "template": ("uint8",),
    "ends": ("int64",),
    "z_mm": ("float64",),
}
_REQUIRED = ("header", "data", "noise")
_STORED = (RayTransform, CartesianMRI, Sense, NonCartesian, Mask, ThickSlices)
_FILTERS = (1, 2, 3)  # gzip, shuffle, fletcher32: built into every HDF5


@dataclass(frozen=True)
class MeasurementFile:
    """What a measurement file holds.

    Attributes:
        measurement: operator, data and noise.
        truth: the image that the data were simulated from, or None.
        template: DICOM headers, one a slice (of a volume too), or empty.
        z_mm: position of each slice in mm, or empty.
    """

    measurement: Measurement
    truth: Tensor | None = None
    template: tuple[bytes, ...] = ()
    z_mm: tuple[float, ...] = ()


def write_measurement(
    path: str | os.PathLike[str],
    measurement: Measurement,
    truth: Tensor | None = None,
    template: Sequence[bytes] = (),
    z_mm: Sequence[float] = (),
    *,
    overwrite: bool = False,
) -> None:
    """Write a measurement file; it appears complete or not at all.

    Args:
        path: file to write, usually ``*.h5``.
        measurement: what to store; its operator must be one that files know.
        truth: image that the data were simulated from, ``(slices, *in_shape)``.
        template: DICOM headers without pixels, one a slice.
        z_mm: position of each slice in mm.
        overwrite: replace an existing file.

    Raises:
        InputError: parts that do not number the slices of the measurement.
        OutputError: the file exists, or cannot be written.
        UnsupportedError: an operator that has no stored form.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already; choose another name or allow overwriting it")
    n = measurement.slices
    shape = (len(measurement), *measurement.operator.in_shape)
    if truth is not None and tuple(truth.shape) != shape:
        raise InputError(f"the truth must have shape {shape}, got {tuple(truth.shape)}")
    for what, part in (("DICOM templates", template), ("slice positions", z_mm)):
        if len(part) not in (0, n):
            raise InputError(f"{what} must number the {n} slices or be absent, got {len(part)}")
    operator = measurement.operator
    if not isinstance(operator, _STORED):
        raise UnsupportedError(
            f"measurement files store {', '.join(kind.__name__ for kind in _STORED)} operators, "
            f"got {operator!r}"
        )
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "operator": operator.spec(),
        "modality": measurement.modality,
        "pixel_mm": list(measurement.pixel_mm),
        "mu_water": measurement.mu_water,
        "provenance": dict(measurement.provenance),
    }
    if measurement.counts is not None:
        header["photons"] = measurement.counts.photons
        header["electronic"] = measurement.counts.electronic
    arrays: dict[str, NDArray[Any]] = {
        "header": np.frombuffer(json.dumps(header, allow_nan=False).encode(), np.uint8),
        "data": _numpy(measurement.data),
        "noise": _numpy(measurement.noise).astype(np.float32),
    }
    if isinstance(operator, CartesianMRI | Sense | Mask):
        arrays["mask"] = _numpy(operator.mask).astype(np.uint8)
    if isinstance(operator, UnspoiledRays):
        arrays["mask"] = _numpy(operator.good).astype(np.uint8)
    if isinstance(operator, Sense | NonCartesian):
        arrays["maps"] = _numpy(operator.maps)
    if isinstance(operator, NonCartesian):
        arrays["trajectory"] = _numpy(operator.trajectory)
        arrays["density"] = _numpy(operator.density)
    if measurement.counts is not None:
        arrays["counts"] = _numpy(measurement.counts.counts).astype(np.float32)
    if truth is not None:
        arrays["truth"] = _numpy(truth)
    if template:
        arrays["template"] = np.frombuffer(b"".join(template), np.uint8)
        arrays["ends"] = np.cumsum([len(t) for t in template], dtype=np.int64)
    if z_mm:
        arrays["z_mm"] = np.asarray(z_mm, np.float64)
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES[name]:
            raise UnsupportedError(
                f"measurement files store {name} as {' or '.join(_DTYPES[name])}, got "
                f"{array.dtype.name}; convert it first"
            )
    _write_atomically(target, arrays)


def read_measurement(
    path: str | os.PathLike[str], *, max_bytes: int = 4 * 2**30
) -> MeasurementFile:
    """Read a measurement file.

    Args:
        path: the file.
        max_bytes: most bytes of all its arrays together.

    Raises:
        NoInputError: there is no such file.
        InputError: not a measurement file, damaged, inconsistent, or holding links.
        ResourceError: larger than ``max_bytes``, or an operator too large for memory.
        UnsupportedError: a version or operator that this release does not know.
    """
    source = Path(path)
    if not source.is_file():
        raise NoInputError(f"no measurement file at {source}; 'recon simulate' writes one")
    try:
        arrays = _read_arrays(source, max_bytes)
        header = json.loads(arrays["header"].tobytes())
        return _assemble(source, header, arrays)
    except ReconError:
        raise
    # h5py raises these for damaged files, and odd headers do
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        RuntimeError,  # includes RecursionError
    ) as error:
        raise InputError(
            f"{source} is not a readable measurement file ({type(error).__name__}: {error}); it "
            f"may be damaged or cut short: write it again"
        ) from error


def _numpy(x: Tensor) -> NDArray[Any]:
    return np.asarray(x.detach().cpu().numpy())


def _write_atomically(target: Path, arrays: dict[str, NDArray[Any]]) -> None:
    import h5py

    # HDF5 ends the process where a disk runs full under it, so it writes to memory
    image = io.BytesIO()
    # the format of HDF5 1.10 has checksums in its own structures too
    with h5py.File(image, "w", libver="v110", track_order=False) as out:
        for name, array in arrays.items():
            # chunks of one slice; scalars have no chunks and need no checksum
            slicewise = name in ("data", "counts", "truth")
            chunks = (1, *array.shape[1:]) if slicewise else True
            options = {"chunks": chunks, "fletcher32": True} if array.size > 1 else {}
            out.create_dataset(name, data=array, **options)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(".tmp", f".{target.name}.", target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(image.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            # temporary files are private; the result follows the user's umask as any other file
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write {target} ({error}); check the folder's permissions and free space"
        ) from error


def _read_arrays(source: Path, max_bytes: int) -> dict[str, NDArray[Any]]:
    """All known datasets, each vetted before it is opened and again before it is read."""
    import h5py

    arrays: dict[str, NDArray[Any]] = {}
    with h5py.File(source, "r") as file:
        found = {}
        for name in _DTYPES:
            item = vetted(file, name, source, _FILTERS)
            if item is not None:
                found[name] = item
        missing = [name for name in _REQUIRED if name not in found]
        if missing:
            raise InputError(
                f"{source} is not a measurement file: it lacks {', '.join(missing)}; 'recon "
                f"simulate' and 'recon convert' write such files"
            )
        total = 0
        for name, item in found.items():
            _check_type(source, name, item)
            size = math.prod(item.shape) * item.dtype.itemsize
            total += size
            if total > max_bytes or (name == "header" and size > _HEADER_BYTES):
                raise ResourceError(
                    f"{source} declares {total / 2**30:.3g} GiB of data up to '{name}', more than "
                    f"the cap of {max_bytes / 2**30:.3g} GiB; raise the cap (--limits) if the "
                    "file is trusted"
                )
        for name, item in found.items():
            arrays[name] = np.asarray(item[()])
    return arrays


def _check_type(source: Path, name: str, item: Any) -> None:
    if item.dtype.name not in _DTYPES[name] and not (
        # numpy has no name for h5py's pair of reals other than complex64
        item.dtype == np.complex64 and "complex64" in _DTYPES[name]
    ):
        raise InputError(
            f"{source}: '{name}' must be {' or '.join(_DTYPES[name])}, got {item.dtype}"
        )


def _assemble(source: Path, header: Any, arrays: dict[str, NDArray[Any]]) -> MeasurementFile:
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise InputError(f"{source} is an HDF5 file, but not a measurement file of this toolkit")
    if header["version"] != _VERSION:
        raise UnsupportedError(
            f"{source} has format version {header['version']}, this release reads {_VERSION}; "
            f"use the release that wrote it"
        )
    tensors = {
        k: torch.from_numpy(a) for k, a in arrays.items() if k not in ("header", "template")
    }
    operator = _operator(header["operator"], tensors)
    if header["modality"] not in ("CT", "MR"):
        raise InputError(f"{source}: modality must be CT or MR, got {header['modality']!r}")
    data = tensors["data"]
    if data.dtype != operator.out_dtype:
        raise InputError(
            f"{source}: data of {operator!r} must be {operator.out_dtype}, got {data.dtype}"
        )
    row, col = header["pixel_mm"]
    if not (0.0 < float(row) < math.inf and 0.0 < float(col) < math.inf):
        raise InputError(f"{source}: pixel_mm must be positive, got {header['pixel_mm']}")
    mu_water = header["mu_water"]
    measurement = Measurement(
        operator,
        data,
        tensors["noise"],
        header["modality"],
        (float(row), float(col)),
        None if mu_water is None else float(mu_water),
        dict(header["provenance"]),
        _counts(header, tensors.get("counts")),
    )
    n = measurement.slices
    truth, shape = tensors.get("truth"), (len(measurement), *operator.in_shape)
    if truth is not None and tuple(truth.shape) != shape:
        raise InputError(f"{source}: truth must have shape {shape}, got {tuple(truth.shape)}")
    template = _split(source, arrays.get("template"), arrays.get("ends"), n)
    z_mm = tuple(float(z) for z in arrays.get("z_mm", np.empty(0)))
    if len(z_mm) not in (0, n) or not all(math.isfinite(z) for z in z_mm):
        raise InputError(f"{source}: z_mm must give a finite position for each of {n} slices")
    return MeasurementFile(measurement, truth, template, z_mm)


def _counts(header: dict[str, Any], counts: Tensor | None) -> TransmissionPoisson | None:
    """The photon counts of a CT measurement, where the file has them."""
    if counts is None:
        return None
    return TransmissionPoisson(counts, float(header["photons"]), float(header["electronic"]))


def _split(
    source: Path, joined: NDArray[Any] | None, ends: NDArray[Any] | None, n: int
) -> tuple[bytes, ...]:
    """The headers out of their concatenation."""
    if joined is None or ends is None:
        return ()
    starts = [0, *ends[:-1].tolist()]
    stops = ends.tolist()
    if (
        len(stops) != n
        or stops[-1] != joined.size
        or any(a > b for a, b in zip(starts, stops, strict=True))
    ):
        raise InputError(
            f"{source}: the DICOM templates do not fit the {n} slices; write it again"
        )
    return tuple(joined[a:b].tobytes() for a, b in zip(starts, stops, strict=True))


def _operator(spec: dict[str, Any], tensors: dict[str, Tensor]) -> LinearOperator:
    """The operator that a spec and the arrays beside it describe."""
    kind = spec["type"]
    mask = tensors.get("mask")
    if kind == "ct":
        return RayTransform.from_spec(spec)
    if kind == "ct without metal":
        scan = RayTransform.from_spec(spec)
        if mask is None:
            raise InputError(f"the file's {kind} operator needs a mask of its good rays")
        return UnspoiledRays(scan, ~mask.bool())
    if kind == "thick slices":
        return ThickSlices.from_spec(spec)
    if kind == "noncartesian":
        height, width = spec["shape"]
        return NonCartesian(
            tensors["trajectory"], (height, width), tensors["maps"], tensors["density"]
        )
    if kind not in ("mri", "sense", "mask"):
        raise UnsupportedError(
            f"operator {kind!r} of the measurement file is not served; expected ct, ct "
            f"without metal, mri, sense, noncartesian, mask or thick slices"
        )
    if mask is None or list(mask.shape) != spec["shape"]:
        raise InputError(f"the file's {kind} operator needs a mask of shape {spec['shape']}")
    if kind == "mri":
        return CartesianMRI(mask.bool())
    if kind == "sense":
        return Sense(tensors["maps"], mask.bool())
    return Mask(mask.bool(), torch.complex64 if spec["complex"] else torch.float32)
