r"""X-ray transform in two dimensions: scan geometries, projection, filtered backprojection.

Image coordinates in mm, origin at the grid centre: x along columns, y along rows (increasing row).
A view of angle :math:`\theta` has detector axis :math:`(\cos\theta, \sin\theta)` and central ray
direction :math:`(-\sin\theta, \cos\theta)`; the line integral of parallel beams is

.. math:: p(\theta, s) = \int \mu(s\cos\theta - t\sin\theta,\; s\sin\theta + t\cos\theta)\,dt .

Attenuation is in 1/mm, so line integrals have no unit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from inverse.errors import GeometryError, ResourceError, UnsupportedError
from inverse.operators.linop import LinearOperator

__all__ = [
    "FanBeam",
    "Geometry",
    "Kernel",
    "ParallelBeam",
    "RayTransform",
    "Window",
    "fbp",
    "geometry_from_dict",
    "matrix_bytes",
    "square_pixel",
]

Kernel = Literal["linear", "line", "strip"]
Window = Literal["ram-lak", "hann"]

_log = logging.getLogger(__name__)

_CACHE_BYTES = 2 * 2**30  # most disk space of cached matrices


def _check_beam(
    name: str, angles: tuple[float, ...], bins: int, lengths: dict[str, float]
) -> None:
    if not angles or not all(math.isfinite(a) for a in angles):
        raise GeometryError(
            f"{name}: angles must be a non-empty sequence of finite radians, "
            f"got {len(angles)} values; give at least one view"
        )
    if bins < 1:
        raise GeometryError(f"{name}: needs at least one detector bin, got {bins}")
    for what, value in lengths.items():
        if not (math.isfinite(value) and value > 0.0):
            raise GeometryError(f"{name}: {what} must be a positive length in mm, got {value}")


def _axes(angles: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Detector axis and ray direction of each view, both ``(views, 1, 1, 2)``, float64."""
    theta = np.asarray(angles, dtype=np.float64)[:, None, None]
    c, s = np.cos(theta), np.sin(theta)
    return np.stack([c, s], axis=-1), np.stack([-s, c], axis=-1)


def _bin_positions(bins: int, bin_mm: float, oversample: int) -> np.ndarray:
    """Signed detector positions in mm, ``(1, bins, oversample, 1)``, centred."""
    if oversample < 1:
        raise GeometryError(f"oversample must be at least one ray a bin, got {oversample}")
    sub = (np.arange(oversample) + 0.5) / oversample - 0.5
    s = (np.arange(bins)[:, None] - (bins - 1) / 2 + sub) * bin_mm
    return cast(np.ndarray, s[None, :, :, None])


def _spread(views: int, arc: float) -> tuple[float, ...]:
    if views < 1 or not (math.isfinite(arc) and arc > 0.0):
        raise GeometryError(
            f"a scan needs at least one view and a positive arc, got {views} views over "
            f"{math.degrees(arc):g} degrees"
        )
    return tuple(i * arc / views for i in range(views))


@dataclass(frozen=True)
class ParallelBeam:
    """Parallel rays onto a line detector centred on the rotation axis.

    Attributes:
        angles: view angles in rad.
        bins: number of detector bins.
        bin_mm: bin width in mm.

    Raises:
        GeometryError: no view, no bin, or a value that is not finite and positive.
    """

    angles: tuple[float, ...]
    bins: int
    bin_mm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "angles", tuple(float(a) for a in self.angles))
        _check_beam("ParallelBeam", self.angles, self.bins, {"bin_mm": self.bin_mm})

    @classmethod
    def sparse(
        cls, views: int, shape: tuple[int, int], pixel_mm: float, arc: float = math.pi
    ) -> ParallelBeam:
        """``views`` equal steps over ``arc`` rad, bins of one pixel that cover the diagonal.

        Bins and columns are both even or both odd: then no ray along an axis runs on a border
        between pixels, where an edge of the image would be half seen by each.
        """
        bins = math.ceil(math.hypot(*shape))
        return cls(_spread(views, arc), bins + (bins - shape[1]) % 2, pixel_mm)

    @property
    def radius_mm(self) -> float:
        """Radius of the disc about the axis that every view sees, in mm."""
        return self.bins * self.bin_mm / 2

    @property
    def pitch_mm(self) -> float:
        """Distance between neighbouring rays at the rotation axis, in mm."""
        return self.bin_mm

    def rays(self, oversample: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Rays through the bins.

        Args:
            oversample: rays a bin, evenly spaced over its width.

        Returns:
            Points on the rays in mm and unit directions, float64
            ``(views, bins, oversample, 2)`` in (x, y).
        """
        axis, direction = _axes(self.angles)
        s = _bin_positions(self.bins, self.bin_mm, oversample)
        origin = s * axis
        return origin, np.broadcast_to(direction, origin.shape)

    def finer(self, factor: int) -> ParallelBeam:
        """The same detector with each bin cut into ``factor`` bins."""
        return ParallelBeam(self.angles, self.bins * factor, self.bin_mm / factor)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; see :func:`geometry_from_dict`."""
        return {
            "type": "parallel",
            "angles": list(self.angles),
            "bins": self.bins,
            "bin_mm": self.bin_mm,
        }

    @classmethod
    def from_dict(cls, spec: dict[str, Any]) -> ParallelBeam:
        """The inverse of :meth:`to_dict`."""
        return cls(tuple(spec["angles"]), int(spec["bins"]), float(spec["bin_mm"]))

    def __repr__(self) -> str:
        return (
            f"ParallelBeam({len(self.angles)} views over {_arc_deg(self.angles):.4g} deg, "
            f"{self.bins} bins of {self.bin_mm:g} mm)"
        )


@dataclass(frozen=True)
class FanBeam:
    r"""Rays from a point source onto a flat detector that faces it.

    The source is at :math:`-D\,(-\sin\theta, \cos\theta)` for ``source_mm`` = D, the detector's
    centre at :math:`+d\,(-\sin\theta, \cos\theta)` for ``detector_mm`` = d.

    Attributes:
        angles: view angles in rad.
        bins: number of detector bins.
        bin_mm: bin width at the detector in mm.
        source_mm: distance from source to rotation axis in mm.
        detector_mm: distance from rotation axis to detector in mm.

    Raises:
        GeometryError: no view, no bin, or a value that is not finite and positive.
    """

    angles: tuple[float, ...]
    bins: int
    bin_mm: float
    source_mm: float
    detector_mm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "angles", tuple(float(a) for a in self.angles))
        _check_beam(
            "FanBeam",
            self.angles,
            self.bins,
            {
                "bin_mm": self.bin_mm,
                "source_mm": self.source_mm,
                "detector_mm": self.detector_mm,
            },
        )

    @classmethod
    def sparse(
        cls,
        views: int,
        shape: tuple[int, int],
        pixel_mm: float,
        arc: float = 2 * math.pi,
        source_mm: float = 570.0,
        detector_mm: float = 470.0,
    ) -> FanBeam:
        """``views`` equal steps over ``arc`` rad; rays one pixel apart cover the diagonal.

        The default distances are those of a whole-body scanner.

        Raises:
            GeometryError: if the source would be inside the grid's circle.
        """
        radius = math.hypot(*shape) * pixel_mm / 2
        if source_mm <= radius:
            raise GeometryError(
                f"FanBeam: the source at {source_mm:g} mm is inside the grid, whose half diagonal "
                f"is {radius:g} mm; give a larger source_mm"
            )
        magnification = (source_mm + detector_mm) / source_mm
        # the edge ray is tangent to the grid's circle
        half_mm = radius * source_mm / math.sqrt(source_mm**2 - radius**2)
        bins = math.ceil(2 * half_mm / pixel_mm)
        bins += (bins - shape[1]) % 2  # as for parallel beams
        angles = _spread(views, arc)
        return cls(angles, bins, pixel_mm * magnification, source_mm, detector_mm)

    @property
    def pitch_mm(self) -> float:
        """Distance between neighbouring rays at the rotation axis, in mm."""
        return self.bin_mm * self.source_mm / (self.source_mm + self.detector_mm)

    @property
    def radius_mm(self) -> float:
        """Radius of the disc about the axis that every view sees, in mm."""
        half = self.bins * self.pitch_mm / 2
        return half * self.source_mm / math.hypot(half, self.source_mm)

    def rays(self, oversample: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Rays from the source through the bins.

        Args:
            oversample: rays a bin, evenly spaced over its width.

        Returns:
            The source for each ray in mm and unit directions, float64
            ``(views, bins, oversample, 2)`` in (x, y).
        """
        axis, direction = _axes(self.angles)
        u = _bin_positions(self.bins, self.bin_mm, oversample)
        ray = u * axis + (self.source_mm + self.detector_mm) * direction
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
        return np.broadcast_to(-self.source_mm * direction, ray.shape), ray

    def finer(self, factor: int) -> FanBeam:
        """The same detector with each bin cut into ``factor`` bins."""
        bins, bin_mm = self.bins * factor, self.bin_mm / factor
        return FanBeam(self.angles, bins, bin_mm, self.source_mm, self.detector_mm)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; see :func:`geometry_from_dict`."""
        return {
            "type": "fan",
            "angles": list(self.angles),
            "bins": self.bins,
            "bin_mm": self.bin_mm,
            "source_mm": self.source_mm,
            "detector_mm": self.detector_mm,
        }

    @classmethod
    def from_dict(cls, spec: dict[str, Any]) -> FanBeam:
        """The inverse of :meth:`to_dict`."""
        return cls(
            tuple(spec["angles"]),
            int(spec["bins"]),
            float(spec["bin_mm"]),
            float(spec["source_mm"]),
            float(spec["detector_mm"]),
        )

    def __repr__(self) -> str:
        return (
            f"FanBeam({len(self.angles)} views over {_arc_deg(self.angles):.4g} deg, "
            f"{self.bins} bins of {self.bin_mm:g} mm, "
            f"{self.source_mm:g} + {self.detector_mm:g} mm)"
        )


Geometry = ParallelBeam | FanBeam


def geometry_from_dict(spec: dict[str, Any]) -> Geometry:
    """A geometry from the values of its ``to_dict``.

    Raises:
        UnsupportedError: if ``type`` names no geometry served here.
    """
    kinds: dict[str, type[ParallelBeam] | type[FanBeam]] = {
        "parallel": ParallelBeam,
        "fan": FanBeam,
    }
    kind = kinds.get(str(spec.get("type")))
    if kind is None:
        raise UnsupportedError(
            f"scan geometry {spec.get('type')!r} is not served; expected one of {sorted(kinds)}"
        )
    return kind.from_dict(spec)


def _arc_deg(angles: Sequence[float]) -> float:
    """Covered arc in degrees, one step included."""
    span = max(angles) - min(angles)
    return math.degrees(span * len(angles) / max(len(angles) - 1, 1))


class RayTransform(LinearOperator):
    """Line integrals of a pixel image: ``(*b, H, W)`` in 1/mm to ``(*b, views, bins)``.

    The system matrix is built once by ASTRA, kept on disk under a hash of everything that
    determines it, and applied to a whole batch of slices as a sparse product; the adjoint uses
    the transposed matrix and is exact.  Holding the matrix bounds what fits: a scan of many
    hundred views at 512 x 512 needs a projector that computes the rays on the fly, which this
    class does not have.

    Args:
        geometry: the scan.
        shape: image grid (H, W).
        pixel_mm: pixel size in mm, a number or (row, column); pixels must be square.
        kernel: how a ray meets the pixels: ``"linear"`` interpolates between pixel centres
            (Joseph), ``"line"`` measures the ray's length in each pixel (Siddon), ``"strip"`` the
            overlap of a beam of bin width.  Default linear for parallel and line for fan beams.
        max_bytes: most memory for the matrix and its transpose.
        cache: keep the matrix on disk for the next time.

    The disk cache is ``$RECON_CACHE_DIR`` (``off`` disables it), else the user's cache folder; the
    matrices unused for longest are dropped where all need more than 2 GiB.

    Raises:
        GeometryError: an empty grid, a pixel size that is not positive, a source in the grid.
        ResourceError: if the matrix would need more than ``max_bytes``.
        UnsupportedError: pixels that are not square, or the linear kernel with fan beams.

    Source: W. van Aarle et al., Optics Express 24 (2016), the ASTRA toolbox.
    """

    _a_rows: Tensor
    _a_cols: Tensor
    _a_vals: Tensor
    _t_rows: Tensor
    _t_cols: Tensor
    _t_vals: Tensor

    def __init__(
        self,
        geometry: Geometry,
        shape: tuple[int, int],
        pixel_mm: float | tuple[float, float],
        kernel: Kernel | None = None,
        *,
        max_bytes: int = 2 * 2**30,
        cache: bool = True,
    ) -> None:
        super().__init__(shape, (len(geometry.angles), geometry.bins))
        if len(self.in_shape) != 2 or min(self.in_shape) < 1:
            raise GeometryError(f"RayTransform: the image grid must be (H, W), got {shape}")
        self.geometry = geometry
        self.pixel_mm = square_pixel(pixel_mm)
        self.kernel: Kernel = _kernel(geometry, kernel)
        radius = math.hypot(*self.in_shape) * self.pixel_mm / 2
        if isinstance(geometry, FanBeam) and geometry.source_mm <= radius:
            raise GeometryError(
                f"RayTransform: the source at {geometry.source_mm:g} mm is inside the grid, whose "
                f"half diagonal is {radius:g} mm; give a larger source_mm or a smaller grid"
            )
        need = matrix_bytes(geometry, self.in_shape, self.pixel_mm, self.kernel)
        if need > max_bytes:
            raise ResourceError(
                f"the system matrix of {geometry!r} on {shape[0]} x {shape[1]} pixels needs about "
                f"{need / 2**30:.1f} GiB, more than the bound of {max_bytes / 2**30:.1f} GiB; use "
                f"fewer views or bins or a smaller matrix, or raise max_bytes if memory allows"
            )
        make = _cached_matrix if cache else _build_matrix
        a = make(geometry, self.in_shape, self.pixel_mm, self.kernel)
        for name, csr in (("_a", a), ("_t", a.T.tocsr())):
            # 32-bit indices halve the traffic and are what the CPU library's product takes
            index = np.int32 if csr.nnz < 2**31 else np.int64
            for part, values in (
                ("rows", csr.indptr.astype(index, copy=False)),
                ("cols", csr.indices.astype(index, copy=False)),
                ("vals", csr.data.astype(np.float32, copy=False)),
            ):
                self.register_buffer(f"{name}_{part}", torch.from_numpy(values), persistent=False)

    def _product(
        self, rows: Tensor, cols: Tensor, vals: Tensor, x: Tensor, out_shape: tuple[int, ...]
    ) -> Tensor:
        """Sparse matrix times the batch ``x`` (``(*b, *shape)``)."""
        batch = x.shape[:-2]
        n, m = math.prod(x.shape[-2:]), math.prod(out_shape)
        with torch.autocast(x.device.type, enabled=False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            a = torch.sparse_csr_tensor(rows, cols, vals, size=(m, n), check_invariants=False)
            columns = x.reshape(-1, n).to(vals.dtype).T.contiguous()
            return (a @ columns).T.reshape(*batch, *out_shape)

    def _forward(self, x: Tensor) -> Tensor:
        return self._product(self._a_rows, self._a_cols, self._a_vals, x, self.out_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._product(self._t_rows, self._t_cols, self._t_vals, y, self.in_shape)

    def spec(self) -> dict[str, Any]:
        """Plain JSON values that rebuild this operator."""
        return {
            "type": "ct",
            "geometry": self.geometry.to_dict(),
            "shape": list(self.in_shape),
            "pixel_mm": self.pixel_mm,
            "kernel": self.kernel,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> RayTransform:
        """The inverse of :meth:`spec`."""
        h, w = spec["shape"]
        geometry = geometry_from_dict(spec["geometry"])
        return cls(geometry, (int(h), int(w)), float(spec["pixel_mm"]), spec["kernel"])

    def extra_repr(self) -> str:
        """Geometry and grid, for ``repr``."""
        h, w = self.in_shape
        return f"{self.geometry!r}, {h} x {w} of {self.pixel_mm:g} mm, {self.kernel}"


def square_pixel(pixel_mm: float | tuple[float, float]) -> float:
    """The side of a square pixel in mm.

    Raises:
        GeometryError: if a size is not positive and finite.
        UnsupportedError: if row and column spacing differ.
    """
    row, col = pixel_mm if isinstance(pixel_mm, tuple) else (pixel_mm, pixel_mm)
    if not (math.isfinite(row) and math.isfinite(col) and row > 0.0 and col > 0.0):
        raise GeometryError(f"pixel size must be positive and finite in mm, got {pixel_mm}")
    if abs(row - col) > 1e-4 * row:
        raise UnsupportedError(
            f"CT projection needs square pixels, got {row:g} x {col:g} mm; resample the image to "
            f"square pixels first"
        )
    return float(row)


def _kernel(geometry: Geometry, kernel: Kernel | None) -> Kernel:
    fan = isinstance(geometry, FanBeam)
    if kernel is None:
        return "line" if fan else "linear"
    if kernel not in ("linear", "line", "strip"):
        raise UnsupportedError(
            f"projection kernel {kernel!r} is not served; expected linear, line or strip"
        )
    if fan and kernel == "linear":
        raise UnsupportedError(
            "the linear projection kernel serves parallel beams only; use line or strip for fans"
        )
    return kernel


def matrix_bytes(
    geometry: Geometry, shape: tuple[int, ...], pixel_mm: float, kernel: Kernel
) -> int:
    """Estimated bytes of the matrix and its transpose in 32-bit values and indices.

    A view's rays have total length (grid area) / pitch; a ray meets 4/pi pixels a pixel length on
    average over directions (line), touches two a step along its main axis (linear), and every
    pixel is also touched by the neighbour of the strips within its shadow.
    """
    per_pixel = pixel_mm / geometry.pitch_mm
    touched = {
        "line": 4 / math.pi * per_pixel,
        "linear": 4 * math.sqrt(2) / math.pi * per_pixel,
        "strip": 4 / math.pi * per_pixel + 1,
    }[kernel]
    nnz = len(geometry.angles) * math.prod(shape) * touched
    return int(2 * 8 * nnz)


def _build_matrix(
    geometry: Geometry, shape: tuple[int, ...], pixel_mm: float, kernel: Kernel
) -> Any:
    """The system matrix (views * bins, H * W) as scipy CSR float32, by ASTRA."""
    import astra
    import scipy.sparse

    h, w = shape
    x, y = w * pixel_mm / 2, h * pixel_mm / 2
    volume = astra.create_vol_geom(h, w, -x, x, -y, y)
    blocks = []
    # a few views at a time: ASTRA allocates for the longest possible ray, in double precision
    for start in range(0, len(geometry.angles), 16):
        theta = np.asarray(geometry.angles[start : start + 16])
        # ASTRA's y axis points up, ours down, which turns angles round; for fans the source then
        # comes to our side by another half turn, which leaves the detector axis reversed.
        if isinstance(geometry, FanBeam):
            scan = astra.create_proj_geom(
                "fanflat",
                geometry.bin_mm,
                geometry.bins,
                math.pi - theta,
                geometry.source_mm,
                geometry.detector_mm,
            )
            name = f"{kernel}_fanflat"
        else:
            scan = astra.create_proj_geom("parallel", geometry.bin_mm, geometry.bins, -theta)
            name = kernel
        projector = matrix = None
        try:
            projector = astra.create_projector(name, scan, volume)
            matrix = astra.projector.matrix(projector)
            block = astra.matrix.get(matrix).astype(np.float32)
        finally:
            if matrix is not None:
                astra.matrix.delete(matrix)
            if projector is not None:
                astra.projector.delete(projector)
        if isinstance(geometry, FanBeam):
            rows = np.arange(block.shape[0]).reshape(len(theta), geometry.bins)[:, ::-1]
            block = block[rows.ravel()]
        block.eliminate_zeros()
        blocks.append(block)
    return scipy.sparse.vstack(blocks, format="csr")


def _cache_dir() -> Path | None:
    """Folder of cached system matrices, or None where caching is off."""
    chosen = os.environ.get("RECON_CACHE_DIR")
    if chosen is not None:
        return None if chosen.lower() in ("", "off") else Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local"))
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    try:
        return base.expanduser() / "recon-sde"
    except RuntimeError:  # no home folder
        return None


def _cached_matrix(
    geometry: Geometry, shape: tuple[int, ...], pixel_mm: float, kernel: Kernel
) -> Any:
    """The system matrix from the disk cache, or built and, where possible, cached."""
    import astra

    folder = _cache_dir()
    if folder is None:
        return _build_matrix(geometry, shape, pixel_mm, kernel)
    key = json.dumps(
        ["matrix-1", astra.__version__, geometry.to_dict(), list(shape), pixel_mm, kernel]
    )
    path = folder / f"ray-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    size = (len(geometry.angles) * geometry.bins, math.prod(shape))
    cached = _read_matrix(path, size)
    if cached is not None:
        return cached
    built = _build_matrix(geometry, shape, pixel_mm, kernel)
    _write_matrix(path, built)
    return built


def _read_matrix(path: Path, size: tuple[int, int]) -> Any:
    """A cached matrix, or None where there is none that can be used."""
    import zipfile

    import scipy.sparse

    try:
        # numpy's archive carries a checksum of each array, which reading verifies
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            parts = (file["data"], file["indices"], file["indptr"])
        matrix = scipy.sparse.csr_matrix(parts, shape=size)
        matrix.check_format(full_check=True)
        with contextlib.suppress(OSError):  # the time of last use, for pruning
            path.touch()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("cached system matrix %s cannot be read (%s); rebuilding", path.name, error)
        return None
    return matrix


def _prune(folder: Path) -> None:
    """Drop the matrices unused for longest until the cache is within its bound."""
    files = sorted(folder.glob("ray-*.npz"), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > _CACHE_BYTES:
            file.unlink(missing_ok=True)


def _write_matrix(path: Path, matrix: Any) -> None:
    """Cache a matrix by an atomic rename; a cache that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, data=matrix.data, indices=matrix.indices, indptr=matrix.indptr)
                file.close()
                Path(file.name).replace(path)
            except BaseException:
                file.close()
                Path(file.name).unlink(missing_ok=True)
                raise
        _prune(path.parent)
    except OSError as error:
        _log.info("system matrix not cached in %s (%s)", path.parent, error)


def fbp(data: Tensor, operator: RayTransform, filter: Window = "ram-lak") -> Tensor:
    r"""Filtered backprojection in 1/mm.

    Parallel beams, with :math:`h` the band-limited ramp:

    .. math:: f(x) = \sum_k w_k\, (p_{\theta_k} * h)(x\cdot e_{\theta_k})

    with angular weights :math:`w_k` of half the gaps to the neighbouring views (modulo pi), so
    angles need not be equidistant; a gap that no view covers is not filled.  Fan beams over a full
    turn, on the detector scaled to the rotation axis (source distance D, depth t along the central
    ray):

    .. math:: f(x) = \tfrac12\sum_k w_k\, \frac{D^2}{(D + t)^2}
        \Big(p_{\theta_k}\frac{D}{\sqrt{D^2+s^2}} * h\Big)\Big(\frac{D\,s_x}{D + t}\Big)

    Args:
        data: line integrals ``(*b, views, bins)``.
        operator: the operator that the data belong to.
        filter: ``"ram-lak"`` (the ramp itself) or ``"hann"`` (the ramp under a Hann window).

    Returns:
        Attenuation ``(*b, H, W)`` in 1/mm.

    Raises:
        GeometryError: if the data do not have the operator's shape.
        UnsupportedError: for fan beams over less than a full turn, whose rays are not all
            measured twice and need redundancy weights (Parker) that are not here.

    Source: Kak and Slaney, Principles of Computerized Tomographic Imaging (1988), ch. 3.
    """
    operator._check(data, operator.out_shape, "data")
    if filter not in ("ram-lak", "hann"):
        raise UnsupportedError(f"filter {filter!r} is not served; expected ram-lak or hann")
    geometry = operator.geometry
    batch, device = data.shape[:-2], data.device
    p = data.reshape(-1, *operator.out_shape)
    weight = _angular_weights(geometry)
    if isinstance(geometry, FanBeam):
        source = geometry.source_mm
        s = torch.from_numpy(_bin_positions(geometry.bins, geometry.pitch_mm, 1).ravel())
        cosine = source / torch.sqrt(source**2 + s**2)
        p = p * cosine.to(device, p.dtype)
        weight = weight / 2
    q = _ramp_filter(p, geometry.pitch_mm, filter) * weight.to(device, p.dtype)[:, None]

    # (views, bins + 2, b): a zero bin at each end takes the rays that miss the detector
    q = torch.nn.functional.pad(q.permute(1, 2, 0), (0, 0, 1, 1)).contiguous()
    h, w = operator.in_shape
    px = operator.pixel_mm
    y = ((torch.arange(h, device=device, dtype=torch.float64) - (h - 1) / 2) * px)[:, None]
    x = (torch.arange(w, device=device, dtype=torch.float64) - (w - 1) / 2) * px
    image = torch.zeros(h * w, q.shape[-1], dtype=q.dtype, device=device)
    for k, theta in enumerate(geometry.angles):
        c, sn = math.cos(theta), math.sin(theta)
        position, depth = x * c + y * sn, y * c - x * sn
        scale = torch.ones_like(position)
        if isinstance(geometry, FanBeam):
            scale = geometry.source_mm / (geometry.source_mm + depth)
            position = position * scale
        index = (position / geometry.pitch_mm + (geometry.bins - 1) / 2 + 1).ravel()
        index = index.clamp_(0.0, geometry.bins + 1.0)
        low = index.floor().clamp_(max=float(geometry.bins))
        part = (index - low).to(q.dtype)[:, None]
        low = low.to(torch.int64)
        value = torch.lerp(q[k, low], q[k, low + 1], part)
        image += value * scale.square().ravel().to(q.dtype)[:, None]
    return image.T.reshape(*batch, h, w)


def _angular_weights(geometry: Geometry) -> Tensor:
    """Quadrature weights of the views in rad, float64 ``(views,)``."""
    period = 2 * math.pi if isinstance(geometry, FanBeam) else math.pi
    theta = np.mod(np.asarray(geometry.angles), period)
    order = np.argsort(theta, kind="stable")
    gaps = np.diff(theta[order], append=theta[order[0]] + period)
    # rounding must not tear a repeated view (0 and pi of parallel beams) into a gap
    gaps[gaps < 1e-9] = 0.0
    usual = float(np.median(gaps[gaps > 0.0]))
    if isinstance(geometry, FanBeam) and gaps.max() > 3 * usual:
        raise UnsupportedError(
            f"filtered backprojection of {geometry!r}: fan beams must cover a full turn, found a "
            f"gap of {math.degrees(gaps.max()):.4g} deg; use cgls, tv or a prior for short scans"
        )
    gaps[gaps > 3 * usual] = usual
    weight = np.empty_like(gaps)
    weight[order] = (gaps + np.roll(gaps, 1)) / 2
    return torch.from_numpy(weight)


def _ramp_filter(p: Tensor, pitch: float, window: Window) -> Tensor:
    """Convolve ``p`` along its last axis with the band-limited ramp (Kak and Slaney eq. 3.61)."""
    bins = p.shape[-1]
    size = 1 << (2 * bins - 1).bit_length()
    n = torch.fft.fftfreq(size, 1.0 / size, dtype=torch.float64, device=p.device).round()
    kernel = torch.where(n.remainder(2) == 1, -1.0 / (math.pi * n * pitch) ** 2, 0.0)
    kernel[0] = 1.0 / (4.0 * pitch**2)
    response = pitch * torch.fft.rfft(kernel).real
    if window == "hann":
        f = torch.arange(size // 2 + 1, dtype=torch.float64, device=p.device) / size
        response = response * (0.5 + 0.5 * torch.cos(2 * math.pi * f))
    spectrum = torch.fft.rfft(p, n=size) * response.to(p.dtype)
    return cast(Tensor, torch.fft.irfft(spectrum, n=size)[..., :bins])
