r"""The X-ray transform: line integrals of pixel and voxel images, with matched adjoints.

Attenuation is in 1/mm, so line integrals have no unit.  Conventions of axes and angles are those
of :mod:`inverse.operators.geometry`.
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
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from inverse.errors import GeometryError, UnsupportedError
from inverse.operators import rays
from inverse.operators.fbp import Window, fbp
from inverse.operators.geometry import (
    ConeBeam,
    ConeVectors,
    FanBeam,
    Geometry,
    ParallelBeam,
    geometry_from_dict,
)
from inverse.operators.linop import LinearOperator

__all__ = [
    "ConeBeam",
    "ConeVectors",
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

_log = logging.getLogger(__name__)

_CACHE_BYTES = 4 * 2**30  # most disk space of cached matrices


class RayTransform(LinearOperator):
    """Line integrals of an image in 1/mm: ``(*b, *shape)`` to ``(*b, *geometry.data_shape)``.

    Within ``max_bytes`` the system matrix is built once, kept on disk under a hash of everything
    that determines it, and applied to a whole batch as a sparse product; the adjoint uses the
    transposed matrix.  Beyond it the weights are computed anew in every application: by ASTRA on
    the CPU, slice by slice, where it serves the geometry, and by :mod:`inverse.operators.rays` on
    the image's device elsewhere.  Both project and backproject with the same weights, so that the
    adjoint is exact to rounding on every path.

    Args:
        geometry: the scan.
        shape: image grid, (H, W) for beams in the plane and (Z, Y, X) for cone beams.
        pixel_mm: voxel size in mm: a number, or one an axis in the order of ``shape``; rows and
            columns of beams in the plane must be square.
        kernel: how a ray meets the voxels: ``"linear"`` interpolates between their centres
            (Joseph), ``"line"`` measures the ray's length in each (Siddon), ``"strip"`` the
            overlap of a beam of bin width.  Default linear for parallel beams, line for others.
        max_bytes: most memory for the matrix and its transpose.
        cache: keep the matrix on disk for the next time.

    Attributes:
        geometry: the scan.
        spacing: voxel size in mm, one an axis.
        kernel: the kernel used.
        path: ``"matrix"``, ``"astra"`` or ``"rays"``.

    The disk cache is ``$RECON_CACHE_DIR`` (``off`` disables it), else the user's cache folder; the
    matrices unused for longest are dropped where all need more than 4 GiB.  Processes of one
    machine share the memory of a cached matrix.

    Raises:
        GeometryError: an empty grid, a voxel size that is not positive, a source in the grid.
        UnsupportedError: pixels that are not square, or a kernel that the geometry does not have.

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
        shape: tuple[int, ...],
        pixel_mm: float | tuple[float, ...],
        kernel: Kernel | None = None,
        *,
        max_bytes: int = 2 * 2**30,
        cache: bool = True,
    ) -> None:
        super().__init__(shape, geometry.data_shape)
        if len(self.in_shape) != geometry.ndim or min(self.in_shape) < 1:
            grid = "(H, W)" if geometry.ndim == 2 else "(Z, Y, X)"
            raise GeometryError(
                f"RayTransform: the image grid of {geometry!r} must be {grid}, got {tuple(shape)}"
            )
        self.geometry = geometry
        self.spacing = _spacing(pixel_mm, geometry.ndim)
        self.kernel: Kernel = _kernel(geometry, kernel)
        self.max_bytes = max_bytes
        _check_source(geometry, self.in_shape, self.spacing)
        if matrix_bytes(geometry, self.in_shape, pixel_mm, self.kernel) <= max_bytes:
            self.path: Literal["matrix", "astra", "rays"] = "matrix"
            scan = (geometry, self.in_shape, self.spacing, self.kernel)
            self._hold(_cached_matrix(*scan) if cache else _parts(_build_matrix(*scan)))
        else:
            self.path = "astra" if _by_astra(geometry, self.kernel) else "rays"

    def _hold(self, parts: dict[str, Tensor]) -> None:
        """Keep a matrix and its transpose as buffers."""
        for name, values in parts.items():
            self.register_buffer(f"_{name}", values, persistent=False)

    @property
    def pixel_mm(self) -> float:
        """Size of a pixel in the plane of rotation, in mm."""
        return self.spacing[-1]

    @property
    def held_bytes(self) -> int:
        """Memory of the matrix and its transpose; zero where there is none."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def subset(self, views: Sequence[int] | slice) -> RayTransform:
        """The transform of some views, by their numbers, as ordered subsets need it.

        Raises:
            GeometryError: a number that is not a view's, or no view.
        """
        count = self.geometry.views
        chosen = list(range(count))[views] if isinstance(views, slice) else list(views)
        geometry = self.geometry.take(chosen)
        part = RayTransform(geometry, self.in_shape, self.spacing, self.kernel, max_bytes=-1)
        part.max_bytes, part.path = self.max_bytes, self.path
        if self.path == "matrix":
            import scipy.sparse

            held = tuple(b.cpu().numpy() for b in (self._a_vals, self._a_cols, self._a_rows))
            size = (math.prod(self.out_shape), math.prod(self.in_shape))
            rows = np.arange(size[0]).reshape(count, -1)[chosen].ravel()
            part._hold(_parts(scipy.sparse.csr_matrix(held, shape=size)[rows]))
            part = part.to(self._a_vals.device)
        return part

    def _forward(self, x: Tensor) -> Tensor:
        if self.path == "matrix":
            shapes = (self.in_shape, self.out_shape)
            return self._product(self._a_rows, self._a_cols, self._a_vals, x, shapes)
        batch = x.shape[: x.ndim - len(self.in_shape)]
        flat = x.reshape(-1, *self.in_shape).to(torch.float32)
        apply = _astra_project if self.path == "astra" else _project
        y = apply(flat, self.geometry, self.spacing, self.kernel)
        return y.reshape(*batch, *self.out_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        if self.path == "matrix":
            shapes = (self.out_shape, self.in_shape)
            return self._product(self._t_rows, self._t_cols, self._t_vals, y, shapes)
        batch = y.shape[: y.ndim - len(self.out_shape)]
        flat = y.reshape(-1, *self.out_shape).to(torch.float32)
        apply = _astra_backproject if self.path == "astra" else _backproject
        x = apply(flat, self.in_shape, self.geometry, self.spacing, self.kernel)
        return x.reshape(*batch, *self.in_shape)

    def _product(
        self,
        rows: Tensor,
        cols: Tensor,
        vals: Tensor,
        x: Tensor,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> Tensor:
        """Sparse matrix times the batch ``x``, from images of one shape to those of another."""
        given, wanted = shapes
        n, m = math.prod(given), math.prod(wanted)
        batch = x.shape[: x.ndim - len(given)]
        with torch.autocast(x.device.type, enabled=False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            a = torch.sparse_csr_tensor(rows, cols, vals, size=(m, n), check_invariants=False)
            columns = x.reshape(-1, n).to(vals.dtype).T.contiguous()
            return (a @ columns).T.reshape(*batch, *wanted)

    def spec(self) -> dict[str, Any]:
        """Plain JSON values that rebuild this operator."""
        return {
            "type": "ct",
            "geometry": self.geometry.to_dict(),
            "shape": list(self.in_shape),
            "pixel_mm": self.pixel_mm if len(set(self.spacing)) == 1 else list(self.spacing),
            "kernel": self.kernel,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> RayTransform:
        """The inverse of :meth:`spec`."""
        geometry = geometry_from_dict(spec["geometry"])
        size = spec["pixel_mm"]
        pixel_mm = tuple(map(float, size)) if isinstance(size, list) else float(size)
        return cls(geometry, tuple(int(n) for n in spec["shape"]), pixel_mm, spec["kernel"])

    def extra_repr(self) -> str:
        """Geometry and grid, for ``repr``."""
        grid = " x ".join(map(str, self.in_shape))
        size = " x ".join(f"{h:g}" for h in dict.fromkeys(self.spacing))
        return f"{self.geometry!r}, {grid} of {size} mm, {self.kernel}"


def square_pixel(pixel_mm: float | tuple[float, ...]) -> float:
    """The side of a square pixel in mm.

    Raises:
        GeometryError: if a size is not positive and finite.
        UnsupportedError: if row and column spacing differ.
    """
    return _spacing(pixel_mm, 2)[0]


def _spacing(pixel_mm: float | tuple[float, ...], ndim: int) -> tuple[float, ...]:
    """Voxel size along each axis in array order; rows and columns are equal."""
    size = tuple(pixel_mm) if isinstance(pixel_mm, tuple) else (pixel_mm,) * ndim
    if len(size) != ndim or not all(math.isfinite(h) and h > 0.0 for h in size):
        raise GeometryError(
            f"pixel size must be positive and finite in mm, one number or one for each of the "
            f"{ndim} axes, got {pixel_mm}"
        )
    row, col = size[-2:]
    if abs(row - col) > 1e-4 * row:
        raise UnsupportedError(
            f"CT projection needs square pixels, got {row:g} x {col:g} mm; resample the image to "
            f"square pixels first"
        )
    return (*map(float, size[:-2]), float(row), float(row))


def _check_source(geometry: Geometry, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    if isinstance(geometry, ParallelBeam):
        return
    if isinstance(geometry, ConeVectors):
        # outside the box, since the source may well be above or below it
        half = np.array([n * h / 2 for n, h in zip(shape, spacing, strict=True)])[::-1]
        source = np.abs(np.asarray(geometry.vectors)[:, :3])
        if not (source >= half).any(axis=1).all():
            raise GeometryError(
                "RayTransform: a source is inside the grid; move it or use a smaller grid"
            )
        return
    radius = math.hypot(shape[-2] * spacing[-2], shape[-1] * spacing[-1]) / 2
    if geometry.source_mm <= radius:
        raise GeometryError(
            f"RayTransform: the source at {geometry.source_mm:g} mm is inside the grid, whose "
            f"half diagonal is {radius:g} mm; give a larger source_mm or a smaller grid"
        )


def _kernel(geometry: Geometry, kernel: Kernel | None) -> Kernel:
    parallel = isinstance(geometry, ParallelBeam)
    if kernel is None:
        return "linear" if parallel else "line"
    if kernel not in ("linear", "line", "strip"):
        raise UnsupportedError(
            f"projection kernel {kernel!r} is not served; expected linear, line or strip"
        )
    if kernel == "strip" and not (parallel or _flat_centred_fan(geometry)):
        raise UnsupportedError(
            f"the strip kernel serves parallel beams and flat centred fans, got {geometry!r}; use "
            f"line or linear"
        )
    return kernel


def _flat_centred_fan(geometry: Geometry) -> bool:
    return isinstance(geometry, FanBeam) and not geometry.curved and geometry.offset_mm == 0.0


def _by_astra(geometry: Geometry, kernel: Kernel) -> bool:
    """Whether ASTRA's CPU projectors serve the scan; by rays otherwise."""
    if isinstance(geometry, ParallelBeam):
        return True
    return isinstance(geometry, FanBeam) and not geometry.curved and kernel != "linear"


def matrix_bytes(
    geometry: Geometry,
    shape: tuple[int, ...],
    pixel_mm: float | tuple[float, ...],
    kernel: Kernel,
) -> int:
    """Estimated bytes of the matrix and its transpose in 32-bit values and indices.

    In the plane, a view's rays have total length (grid area) / pitch; a ray meets 4/pi pixels a
    pixel length on average over directions (line), touches two a step along its main axis
    (linear), and every pixel is also touched by the neighbour of the strips within its shadow.
    In space, each ray is taken to cross the whole grid, which is a bound.
    """
    spacing = _spacing(pixel_mm, geometry.ndim)
    rays_count = math.prod(geometry.data_shape)
    if isinstance(geometry, ParallelBeam | FanBeam):
        per_pixel = spacing[-1] / geometry.pitch_mm
        touched = {
            "line": 4 / math.pi * per_pixel,
            "linear": 4 * math.sqrt(2) / math.pi * per_pixel,
            "strip": 4 / math.pi * per_pixel + 1,
        }[kernel]
        # no ray touches more than all of the grid's rows and columns
        nnz = min(geometry.views * math.prod(shape) * touched, rays_count * 4 * sum(shape))
    else:
        nnz = rays_count * (sum(shape) if kernel == "line" else 4 * max(shape))
    return int(2 * 8 * nnz)


# --- weights by rays -----------------------------------------------------------------------------


def _rays(geometry: Geometry, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Central rays of all bins, ``(rays, ndim)`` each."""
    return cast(
        tuple[Tensor, Tensor],
        tuple(
            torch.tensor(part.reshape(-1, geometry.ndim), device=device)
            for part in geometry.rays()
        ),
    )


def _blocks(
    geometry: Geometry,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    kernel: Kernel,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return rays.blocks(*_rays(geometry, device), shape, spacing, cast(rays.RayKernel, kernel))


def _project(x: Tensor, geometry: Geometry, spacing: tuple[float, ...], kernel: Kernel) -> Tensor:
    """``(b, *shape)`` to ``(b, rays)``, weights computed on the way."""
    flat = x.flatten(1)
    y = torch.zeros(len(x), math.prod(geometry.data_shape), device=x.device)
    for ray, index, weight in _blocks(geometry, tuple(x.shape[1:]), spacing, kernel, x.device):
        w = weight.to(torch.float32)
        for image, out in zip(flat, y, strict=True):
            out[ray] = (image[index] * w).sum(dim=1)
    return y


def _backproject(
    y: Tensor,
    shape: tuple[int, ...],
    geometry: Geometry,
    spacing: tuple[float, ...],
    kernel: Kernel,
) -> Tensor:
    """``(b, *data_shape)`` to ``(b, voxels)``: the transpose of :func:`_project`."""
    flat = y.flatten(1)
    x = torch.zeros(len(y), math.prod(shape), device=y.device)
    for ray, index, weight in _blocks(geometry, shape, spacing, kernel, y.device):
        w = weight.to(torch.float32)
        for data, out in zip(flat, x, strict=True):
            out.index_add_(0, index.flatten(), (data[ray][:, None] * w).flatten())
    return x


def _build_matrix(
    geometry: Geometry, shape: tuple[int, ...], spacing: tuple[float, ...], kernel: Kernel
) -> Any:
    """The system matrix (rays, voxels) as scipy CSR float32."""
    import scipy.sparse

    if _by_astra(geometry, kernel):
        return _astra_matrix(cast(ParallelBeam | FanBeam, geometry), shape, spacing, kernel)
    parts = []
    for ray, index, weight in _blocks(geometry, shape, spacing, kernel, torch.device("cpu")):
        some = weight > 1e-6 * spacing[-1]
        row = ray[:, None].expand_as(index)[some]
        columns = (row.to(torch.int32), index[some].to(torch.int32))
        parts.append((*columns, weight[some].to(torch.float32)))
    rows, cols, values = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    size = (math.prod(geometry.data_shape), math.prod(shape))
    return scipy.sparse.coo_matrix((values, (rows, cols)), shape=size).tocsr()


# --- ASTRA's CPU projectors ----------------------------------------------------------------------


@contextlib.contextmanager
def _astra_projector(
    geometry: ParallelBeam | FanBeam,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    kernel: Kernel,
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """A projector with its scan and grid; its y axis points up, ours down."""
    import astra

    h, w = shape
    x, y = w * spacing[-1] / 2, h * spacing[-1] / 2
    grid = astra.create_vol_geom(h, w, -x, x, -y, y)
    if isinstance(geometry, FanBeam) and kernel == "strip":
        # serves angles only; turning the source to our side reverses the detector axis
        scan = astra.create_proj_geom(
            "fanflat",
            geometry.bin_mm,
            geometry.bins,
            math.pi - np.asarray(geometry.angles),
            geometry.source_mm,
            geometry.detector_mm,
        )
    else:
        e, d = (axis * (1.0, -1.0) for axis in geometry.axes())
        shift, step = geometry.offset_mm * e, geometry.bin_mm * e
        if isinstance(geometry, FanBeam):
            parts = (-geometry.source_mm * d, geometry.detector_mm * d + shift, step)
            scan = astra.create_proj_geom("fanflat_vec", geometry.bins, np.hstack(parts))
        else:
            vectors = np.hstack((d, shift, step))
            scan = astra.create_proj_geom("parallel_vec", geometry.bins, vectors)
    name = f"{kernel}_fanflat" if isinstance(geometry, FanBeam) else kernel
    projector = astra.create_projector(name, scan, grid)
    try:
        yield projector, scan, grid
    finally:
        astra.projector.delete(projector)


def _reversed(geometry: Geometry, kernel: Kernel) -> bool:
    """Whether ASTRA's bins run against ours; see :func:`_astra_projector`."""
    return isinstance(geometry, FanBeam) and kernel == "strip"


def _astra_matrix(
    geometry: ParallelBeam | FanBeam,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    kernel: Kernel,
) -> Any:
    import astra
    import scipy.sparse

    blocks = []
    # a few views at a time: ASTRA allocates for the longest possible ray, in double precision
    for start in range(0, geometry.views, 16):
        part = geometry.take(range(start, min(start + 16, geometry.views)))
        with _astra_projector(part, shape, spacing, kernel) as (projector, _, _):
            matrix = astra.projector.matrix(projector)
            try:
                block = astra.matrix.get(matrix).astype(np.float32)
            finally:
                astra.matrix.delete(matrix)
        if _reversed(geometry, kernel):
            rows = np.arange(block.shape[0]).reshape(part.data_shape)[:, ::-1]
            block = block[rows.ravel()]
        block.eliminate_zeros()
        blocks.append(block)
    return scipy.sparse.vstack(blocks, format="csr")


def _astra_run(
    algorithm: Literal["FP", "BP"],
    given: Tensor,
    geometry: ParallelBeam | FanBeam,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    kernel: Kernel,
) -> Tensor:
    """Run ASTRA's projection or backprojection on each item of ``given``."""
    import astra

    flip = _reversed(geometry, kernel)
    results = []
    with _astra_projector(geometry, shape, spacing, kernel) as (projector, scan, grid):
        for item in given.detach().cpu().numpy():
            forward = algorithm == "FP"
            image = astra.data2d.create("-vol", grid, item if forward else 0.0)
            data = np.ascontiguousarray(item[:, ::-1] if flip and not forward else item)
            sinogram = astra.data2d.create("-sino", scan, 0.0 if forward else data)
            settings = astra.astra_dict(algorithm)
            settings["ProjectorId"] = projector
            settings["ProjectionDataId"] = sinogram
            settings["VolumeDataId" if forward else "ReconstructionDataId"] = image
            run = astra.algorithm.create(settings)
            try:
                astra.algorithm.run(run)
                found = astra.data2d.get(sinogram if forward else image)
            finally:
                astra.algorithm.delete(run)
                astra.data2d.delete([image, sinogram])
            results.append(np.ascontiguousarray(found[:, ::-1] if flip and forward else found))
    return torch.from_numpy(np.stack(results)).to(given.device)


def _astra_project(
    x: Tensor, geometry: Geometry, spacing: tuple[float, ...], kernel: Kernel
) -> Tensor:
    beam = cast(ParallelBeam | FanBeam, geometry)
    return _astra_run("FP", x, beam, tuple(x.shape[1:]), spacing, kernel)


def _astra_backproject(
    y: Tensor,
    shape: tuple[int, ...],
    geometry: Geometry,
    spacing: tuple[float, ...],
    kernel: Kernel,
) -> Tensor:
    return _astra_run("BP", y, cast(ParallelBeam | FanBeam, geometry), shape, spacing, kernel)


# --- disk cache of matrices ----------------------------------------------------------------------


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
    geometry: Geometry, shape: tuple[int, ...], spacing: tuple[float, ...], kernel: Kernel
) -> dict[str, Tensor]:
    """The system matrix and its transpose from the disk cache, or built and, if possible, cached.

    What is cached is mapped into memory, so that processes of one machine share it.
    """
    import astra

    folder = _cache_dir()
    if folder is None:
        return _parts(_build_matrix(geometry, shape, spacing, kernel))
    key = json.dumps(
        ["matrix-3", astra.__version__, geometry.to_dict(), list(shape), list(spacing), kernel]
    )
    path = folder / f"ray-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    size = (math.prod(geometry.data_shape), math.prod(shape))
    cached = _read_matrix(path, size)
    if cached is not None:
        return cached
    built = _parts(_build_matrix(geometry, shape, spacing, kernel))
    _write_matrix(path, built)
    return built


def _parts(a: Any) -> dict[str, Tensor]:
    """A scipy CSR matrix and its transpose as tensors."""
    found = {}
    for name, csr in (("a", a), ("t", a.T.tocsr())):
        # 32-bit indices halve the traffic and are what the CPU library's product takes
        index = np.int32 if csr.nnz < 2**31 else np.int64
        for part, values in (
            ("rows", csr.indptr.astype(index, copy=False)),
            ("cols", csr.indices.astype(index, copy=False)),
            ("vals", csr.data.astype(np.float32, copy=False)),
        ):
            found[f"{name}_{part}"] = torch.from_numpy(values)
    return found


def _checksum(parts: dict[str, Tensor]) -> str:
    """CRC-32 of all values in order of name."""
    crc = 0
    for name in sorted(parts):
        crc = zlib.crc32(parts[name].numpy().data, crc)
    return f"{crc:08x}"


def _read_matrix(path: Path, size: tuple[int, int]) -> dict[str, Tensor] | None:
    """A cached matrix, or None where there is none that can be used."""
    import scipy.sparse
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = (file.metadata() or {}).get("crc32")
        if told != _checksum(parts):
            raise ValueError("its checksum differs")
        for name, shape in (("a", size), ("t", size[::-1])):
            csr = tuple(parts[f"{name}_{part}"].numpy() for part in ("vals", "cols", "rows"))
            scipy.sparse.csr_matrix(csr, shape=shape).check_format(full_check=True)
        with contextlib.suppress(OSError):  # the time of last use, for pruning
            path.touch()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        _log.warning("cached system matrix %s cannot be read (%s); rebuilding", path.name, error)
        return None
    return parts


def _prune(folder: Path) -> None:
    """Drop the matrices unused for longest until the cache is within its bound."""
    files = sorted(folder.glob("ray-*"), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > _CACHE_BYTES:
            file.unlink(missing_ok=True)


def _write_matrix(path: Path, parts: dict[str, Tensor]) -> None:
    """Cache a matrix by an atomic rename; a cache that cannot be written only costs time."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as folder:
            whole = Path(folder) / path.name
            save_file(parts, whole, metadata={"crc32": _checksum(parts)})
            whole.replace(path)
        _prune(path.parent)
    except (OSError, SafetensorError) as error:
        _log.info("system matrix not cached in %s (%s)", path.parent, error)
