r"""Scan geometries: plain values in mm and radians that print, compare, hash and save.

Image coordinates in mm, origin at the grid centre: x along columns, y along rows (increasing row),
z along slices.  A view of angle :math:`\theta` has detector axis
:math:`e = (\cos\theta, \sin\theta)` and central ray direction
:math:`d = (-\sin\theta, \cos\theta)`.  Parallel beams measure

.. math:: p(\theta, s) = \int \mu(s\,e + t\,d)\,dt ;

divergent beams leave the source at :math:`-D\,d` and meet a detector about :math:`+d_0\,d`.
Every detector may be shifted along its axis by ``offset_mm``: a fraction of a bin (quarter-ray
offset), a centre of rotation that is not the detector's, or a half-fan scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from inverse.errors import GeometryError, UnsupportedError

__all__ = [
    "ConeBeam",
    "ConeVectors",
    "FanBeam",
    "Geometry",
    "ParallelBeam",
    "geometry_from_dict",
]

Float64 = NDArray[np.float64]
_Kind = TypeVar("_Kind", bound="_Scan")
_Turning = TypeVar("_Turning", bound="_Circular")


class _Scan:
    """What all geometries share; subclasses are frozen dataclasses of plain values."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; see :func:`geometry_from_dict`."""
        values = {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}
        return {"type": self.kind, **{k: _plain(v) for k, v in values.items()}}

    @classmethod
    def from_dict(cls: type[_Kind], spec: dict[str, Any]) -> _Kind:
        """The inverse of :meth:`to_dict`; values that have a default may be absent."""
        names = [f.name for f in fields(cast(Any, cls)) if f.name in spec]
        return cls(**{name: spec[name] for name in names})


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _check(scan: _Scan, counts: Sequence[str], lengths: Sequence[str]) -> None:
    """Counts are whole and at least one, lengths positive and finite; normalises their types."""
    name = type(scan).__name__
    for what in counts:
        value = getattr(scan, what)
        if int(value) != value or value < 1:
            raise GeometryError(f"{name}: needs at least one of {what}, got {value}")
        object.__setattr__(scan, what, int(value))
    for what in lengths:
        value = float(getattr(scan, what))
        if not (math.isfinite(value) and value > 0.0):
            raise GeometryError(f"{name}: {what} must be a positive length in mm, got {value}")
        object.__setattr__(scan, what, value)


@dataclass(frozen=True)
class _Circular(_Scan):
    """Views of a source that turns about the z axis.

    Attributes:
        angles: view angles in rad, in any order and spacing.
    """

    angles: tuple[float, ...]

    def _check_views(self, counts: Sequence[str], lengths: Sequence[str]) -> None:
        name = type(self).__name__
        object.__setattr__(self, "angles", tuple(float(a) for a in self.angles))
        if not self.angles or not all(math.isfinite(a) for a in self.angles):
            raise GeometryError(
                f"{name}: angles must be a non-empty sequence of finite radians, got "
                f"{len(self.angles)} values; give at least one view"
            )
        _check(self, counts, lengths)
        offset = float(cast(Any, self).offset_mm)
        if not math.isfinite(offset):
            raise GeometryError(f"{name}: offset_mm must be a finite length in mm, got {offset}")
        object.__setattr__(self, "offset_mm", offset)

    @property
    def views(self) -> int:
        """Number of views."""
        return len(self.angles)

    def take(self: _Turning, views: Sequence[int]) -> _Turning:
        """The scan of some of the views, by their numbers.

        Raises:
            GeometryError: a number that is not a view's, or none.
        """
        if not all(-self.views <= k < self.views for k in views):
            raise GeometryError(
                f"{self!r}: views are numbered 0 to {self.views - 1}, got {list(views)}"
            )
        return replace(self, angles=tuple(self.angles[k] for k in views))

    def axes(self) -> tuple[Float64, Float64]:
        """Detector axis e and central direction d of each view, both ``(views, 2)``."""
        theta = np.asarray(self.angles, dtype=np.float64)
        c, s = np.cos(theta), np.sin(theta)
        return np.stack([c, s], axis=-1), np.stack([-s, c], axis=-1)

    def _arc(self) -> str:
        """Views and the arc that they cover, one step included, in words."""
        span = max(self.angles) - min(self.angles)
        arc = math.degrees(span * self.views / max(self.views - 1, 1))
        return f"{self.views} views over {arc:.4g} deg"


def _positions(bins: int, bin_mm: float, offset_mm: float, oversample: int = 1) -> Float64:
    """Detector positions of ``oversample`` rays a bin in mm, ``(bins, oversample)``."""
    if oversample < 1:
        raise GeometryError(f"oversample must be at least one ray a bin, got {oversample}")
    sub = (np.arange(oversample) + 0.5) / oversample - 0.5
    position = (np.arange(bins)[:, None] - (bins - 1) / 2 + sub) * bin_mm + offset_mm
    return np.asarray(position, dtype=np.float64)


def _spread(views: int, arc: float) -> tuple[float, ...]:
    if views < 1 or not (math.isfinite(arc) and arc > 0.0):
        raise GeometryError(
            f"a scan needs at least one view and a positive arc, got {views} views over "
            f"{math.degrees(arc):g} degrees"
        )
    return tuple(i * arc / views for i in range(views))


def _shift(offset_mm: float) -> str:
    return f", offset {offset_mm:g} mm" if offset_mm else ""


@dataclass(frozen=True, repr=False)
class ParallelBeam(_Circular):
    """Parallel rays onto a line detector.

    Attributes:
        angles: view angles in rad.
        bins: number of detector bins.
        bin_mm: bin width in mm.
        offset_mm: detector position along its axis, of its centre relative to the rotation axis.

    Raises:
        GeometryError: no view, no bin, or a value that is not finite and positive.
    """

    bins: int
    bin_mm: float
    offset_mm: float = 0.0

    kind: ClassVar = "parallel"
    ndim: ClassVar = 2

    def __post_init__(self) -> None:
        self._check_views(("bins",), ("bin_mm",))

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
    def data_shape(self) -> tuple[int, int]:
        """Shape of the data, (views, bins)."""
        return self.views, self.bins

    @property
    def radius_mm(self) -> float:
        """Radius of the disc about the axis that every view sees, in mm."""
        return max(self.bins * self.bin_mm / 2 - abs(self.offset_mm), 0.0)

    @property
    def pitch_mm(self) -> float:
        """Distance between neighbouring rays at the rotation axis, in mm."""
        return self.bin_mm

    def positions(self) -> Float64:
        """Position of each bin's central ray on the detector axis in mm, ``(bins,)``."""
        return _positions(self.bins, self.bin_mm, self.offset_mm)[:, 0]

    def rays(self, oversample: int = 1) -> tuple[Float64, Float64]:
        """Rays through the bins.

        Args:
            oversample: rays a bin, evenly spaced over its width.

        Returns:
            Points on the rays in mm and unit directions, float64
            ``(views, bins, oversample, 2)`` in (x, y).
        """
        e, d = self.axes()
        s = _positions(self.bins, self.bin_mm, self.offset_mm, oversample)[None, :, :, None]
        origin = s * e[:, None, None]
        return origin, np.broadcast_to(d[:, None, None], origin.shape)

    def finer(self, factor: int) -> ParallelBeam:
        """The same detector with each bin cut into ``factor`` bins."""
        return replace(self, bins=self.bins * factor, bin_mm=self.bin_mm / factor)

    def __repr__(self) -> str:
        return (
            f"ParallelBeam({self._arc()}, {self.bins} bins of {self.bin_mm:g} mm"
            f"{_shift(self.offset_mm)})"
        )


@dataclass(frozen=True, repr=False)
class FanBeam(_Circular):
    r"""Rays from a point source onto a detector that faces it, flat or curved about the source.

    Attributes:
        angles: view angles in rad.
        bins: number of detector bins.
        bin_mm: bin width at the detector in mm, along the arc of a curved one.
        source_mm: distance D from source to rotation axis in mm.
        detector_mm: distance from rotation axis to detector in mm.
        offset_mm: detector position along its axis (or arc), of its centre relative to the
            central ray.
        curved: bins at equal angles on a circle about the source, as in clinical scanners.

    Raises:
        GeometryError: no view, no bin, a value that is not finite and positive, or a curved
            detector of more than a half turn.
    """

    bins: int
    bin_mm: float
    source_mm: float
    detector_mm: float
    offset_mm: float = 0.0
    curved: bool = False

    kind: ClassVar = "fan"
    ndim: ClassVar = 2

    def __post_init__(self) -> None:
        self._check_views(("bins",), ("bin_mm", "source_mm", "detector_mm"))
        object.__setattr__(self, "curved", bool(self.curved))
        if self.fan_angle >= math.pi / 2:
            raise GeometryError(
                f"FanBeam: the fan's half angle is {math.degrees(self.fan_angle):.4g} deg, but "
                f"must stay below 90; use fewer or narrower bins"
            )

    @classmethod
    def sparse(
        cls,
        views: int,
        shape: tuple[int, int],
        pixel_mm: float,
        arc: float | None = None,
        source_mm: float = 570.0,
        detector_mm: float = 470.0,
        *,
        curved: bool = False,
        short_scan: bool = False,
    ) -> FanBeam:
        """``views`` equal steps over ``arc`` rad; rays one pixel apart cover the diagonal.

        The default distances are those of a whole-body scanner.

        Args:
            views: number of views.
            shape: image grid (H, W).
            pixel_mm: pixel size in mm.
            arc: covered angle in rad, default a full turn.
            source_mm: distance from source to rotation axis.
            detector_mm: distance from rotation axis to detector.
            curved: whether the detector is curved about the source.
            short_scan: cover a half turn and the fan angle instead, the least that measures
                every line.

        Raises:
            GeometryError: if the source would be inside the grid's circle, or for a short scan
                with an arc of its own.
        """
        radius = math.hypot(*shape) * pixel_mm / 2
        if source_mm <= radius:
            raise GeometryError(
                f"FanBeam: the source at {source_mm:g} mm is inside the grid, whose half diagonal "
                f"is {radius:g} mm; give a larger source_mm"
            )
        if short_scan and arc is not None:
            raise GeometryError(
                f"FanBeam: a short scan has its own arc, got one of {math.degrees(arc):g} deg; "
                f"give one of the two"
            )
        magnification = (source_mm + detector_mm) / source_mm
        # the edge ray is tangent to the grid's circle
        edge = math.asin(radius / source_mm)
        bins = math.ceil(2 * source_mm * (edge if curved else math.tan(edge)) / pixel_mm)
        bins += (bins - shape[1]) % 2  # as for parallel beams
        scan = cls((0.0,), bins, pixel_mm * magnification, source_mm, detector_mm, curved=curved)
        if arc is None:
            arc = scan.short_arc if short_scan else 2 * math.pi
        return replace(scan, angles=_spread(views, arc))

    @property
    def data_shape(self) -> tuple[int, int]:
        """Shape of the data, (views, bins)."""
        return self.views, self.bins

    @property
    def pitch_mm(self) -> float:
        """Distance between neighbouring rays at the rotation axis, in mm."""
        return self.bin_mm * self.source_mm / (self.source_mm + self.detector_mm)

    def _angle(self, position_mm: float) -> float:
        """Angle to the central ray of the ray at a detector position, rad."""
        distance = self.source_mm + self.detector_mm
        return position_mm / distance if self.curved else math.atan2(position_mm, distance)

    @property
    def fan_angle(self) -> float:
        """Largest angle between a ray and the central ray, in rad."""
        return self._angle(self.bins * self.bin_mm / 2 + abs(self.offset_mm))

    @property
    def short_arc(self) -> float:
        """Arc of a short scan in rad: a half turn and twice the fan angle."""
        return math.pi + 2 * self.fan_angle

    @property
    def radius_mm(self) -> float:
        """Radius of the disc about the axis that every view sees, in mm."""
        half = max(self.bins * self.bin_mm / 2 - abs(self.offset_mm), 0.0)
        return self.source_mm * math.sin(self._angle(half))

    def positions(self) -> Float64:
        r"""Position of each bin's ray scaled to the rotation axis in mm, ``(bins,)``.

        That is :math:`D\tan\gamma` on a flat and :math:`D\gamma` on a curved detector.
        """
        u = _positions(self.bins, self.bin_mm, self.offset_mm)[:, 0]
        return u * (self.pitch_mm / self.bin_mm)

    def rays(self, oversample: int = 1) -> tuple[Float64, Float64]:
        """Rays from the source through the bins.

        Args:
            oversample: rays a bin, evenly spaced over its width.

        Returns:
            The source for each ray in mm and unit directions, float64
            ``(views, bins, oversample, 2)`` in (x, y).
        """
        e, d = (axis[:, None, None] for axis in self.axes())
        distance = self.source_mm + self.detector_mm
        u = _positions(self.bins, self.bin_mm, self.offset_mm, oversample)[None, :, :, None]
        gamma = u / distance if self.curved else np.arctan2(u, distance)
        ray = np.sin(gamma) * e + np.cos(gamma) * d
        return np.broadcast_to(-self.source_mm * d, ray.shape), ray

    def finer(self, factor: int) -> FanBeam:
        """The same detector with each bin cut into ``factor`` bins."""
        return replace(self, bins=self.bins * factor, bin_mm=self.bin_mm / factor)

    def __repr__(self) -> str:
        return (
            f"FanBeam({self._arc()}, {self.bins} {'curved ' if self.curved else ''}bins of "
            f"{self.bin_mm:g} mm, {self.source_mm:g} + {self.detector_mm:g} mm"
            f"{_shift(self.offset_mm)})"
        )


@dataclass(frozen=True, repr=False)
class ConeBeam(_Circular):
    """Rays from a point source on a circle in z = 0 onto a flat panel that faces it.

    The panel's columns run along the detector axis, its rows along +z.

    Attributes:
        angles: view angles in rad.
        rows: detector rows.
        columns: detector columns.
        row_mm: distance of rows at the detector in mm.
        column_mm: distance of columns at the detector in mm.
        source_mm: distance D from source to rotation axis in mm.
        detector_mm: distance from rotation axis to detector in mm.
        offset_mm: panel position along the detector axis, of its centre relative to the central
            ray.

    Raises:
        GeometryError: no view, no row or column, or a value that is not finite and positive.
    """

    rows: int
    columns: int
    row_mm: float
    column_mm: float
    source_mm: float
    detector_mm: float
    offset_mm: float = 0.0

    kind: ClassVar = "cone"
    ndim: ClassVar = 3

    def __post_init__(self) -> None:
        self._check_views(("rows", "columns"), ("row_mm", "column_mm", "source_mm", "detector_mm"))

    @classmethod
    def sparse(
        cls,
        views: int,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        arc: float = 2 * math.pi,
        source_mm: float = 570.0,
        detector_mm: float = 470.0,
    ) -> ConeBeam:
        """``views`` equal steps over ``arc`` rad; rays a voxel apart cover the whole volume.

        Columns are those of :meth:`FanBeam.sparse`.  Rows, a slice apart at the rotation axis,
        cover the shadow of the volume's top edge where it is nearest to the source.

        Args:
            views: number of views.
            shape: volume (Z, Y, X).
            spacing: voxel size (z, y, x) in mm; rows and columns are equal.
            arc: covered angle in rad, default a full turn.
            source_mm: distance from source to rotation axis.
            detector_mm: distance from rotation axis to detector.

        Raises:
            GeometryError: if the source would be inside the volume's cylinder.
        """
        slices, rows, columns = shape
        fan = FanBeam.sparse(views, (rows, columns), spacing[2], arc, source_mm, detector_mm)
        radius = math.hypot(rows, columns) * spacing[2] / 2
        count = math.ceil(slices * source_mm / (source_mm - radius))
        return cls(
            fan.angles,
            count + (count - slices) % 2,  # as for parallel beams
            fan.bins,
            spacing[0] * fan.bin_mm / fan.pitch_mm,
            fan.bin_mm,
            source_mm,
            detector_mm,
        )

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """Shape of the data, (views, rows, columns)."""
        return self.views, self.rows, self.columns

    @property
    def midplane(self) -> FanBeam:
        """The fan of the plane z = 0."""
        return FanBeam(
            self.angles,
            self.columns,
            self.column_mm,
            self.source_mm,
            self.detector_mm,
            self.offset_mm,
        )

    @property
    def pitch_mm(self) -> float:
        """Distance between neighbouring columns' rays at the rotation axis, in mm."""
        return self.column_mm * self.source_mm / (self.source_mm + self.detector_mm)

    def vectors(self) -> ConeVectors:
        """The same rays as vectors of source and panel."""
        e, d = (np.pad(axis, ((0, 0), (0, 1))) for axis in self.axes())
        up = np.broadcast_to([0.0, 0.0, self.row_mm], e.shape)
        parts = (
            -self.source_mm * d,
            self.detector_mm * d + self.offset_mm * e,
            self.column_mm * e,
            up,
        )
        return ConeVectors(tuple(map(tuple, np.hstack(parts))), self.rows, self.columns)

    def rays(self) -> tuple[Float64, Float64]:
        """The source for each ray in mm and unit directions, ``(views, rows, columns, 3)``."""
        return self.vectors().rays()

    def finer(self, factor: int) -> ConeBeam:
        """The same panel with each element cut into ``factor`` x ``factor``."""
        return replace(
            self,
            rows=self.rows * factor,
            columns=self.columns * factor,
            row_mm=self.row_mm / factor,
            column_mm=self.column_mm / factor,
        )

    def __repr__(self) -> str:
        return (
            f"ConeBeam({self._arc()}, {self.rows} x {self.columns} of {self.row_mm:g} x "
            f"{self.column_mm:g} mm, {self.source_mm:g} + {self.detector_mm:g} mm"
            f"{_shift(self.offset_mm)})"
        )


@dataclass(frozen=True, repr=False)
class ConeVectors(_Scan):
    """A point source and a flat panel, placed anywhere in each view.

    Attributes:
        vectors: twelve numbers a view, in mm and in (x, y, z): source, centre of the panel, step
            from column to column, step from row to row (ASTRA's ``cone_vec``).
        rows: detector rows.
        columns: detector columns.

    Raises:
        GeometryError: no view, row or column, or vectors that span no panel.
    """

    vectors: tuple[tuple[float, ...], ...]
    rows: int
    columns: int

    kind: ClassVar = "cone vectors"
    ndim: ClassVar = 3

    def __post_init__(self) -> None:
        v = tuple(tuple(float(a) for a in view) for view in self.vectors)
        object.__setattr__(self, "vectors", v)
        if not v or any(len(view) != 12 for view in v) or not np.isfinite(v).all():
            raise GeometryError(
                f"ConeVectors: needs twelve finite numbers a view, got {len(v)} views of "
                f"{sorted({len(view) for view in v})}"
            )
        _check(self, ("rows", "columns"), ())
        source, centre, u, w = np.asarray(v).reshape(-1, 4, 3).transpose(1, 0, 2)
        normal = np.cross(u, w)
        if not (np.abs(((centre - source) * normal).sum(-1)) > 0.0).all():
            raise GeometryError(
                "ConeVectors: a view's source lies in the plane of its panel; check the order "
                "source, centre, column step, row step"
            )

    @property
    def views(self) -> int:
        """Number of views."""
        return len(self.vectors)

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """Shape of the data, (views, rows, columns)."""
        return self.views, self.rows, self.columns

    def take(self, views: Sequence[int]) -> ConeVectors:
        """The scan of some of the views, by their numbers.

        Raises:
            GeometryError: a number that is not a view's, or none.
        """
        if not all(-self.views <= k < self.views for k in views):
            raise GeometryError(
                f"{self!r}: views are numbered 0 to {self.views - 1}, got {list(views)}"
            )
        return replace(self, vectors=tuple(self.vectors[k] for k in views))

    def rays(self) -> tuple[Float64, Float64]:
        """The source for each ray in mm and unit directions, ``(views, rows, columns, 3)``."""
        v = np.asarray(self.vectors).reshape(-1, 1, 1, 4, 3)
        column = (np.arange(self.columns) - (self.columns - 1) / 2)[:, None]
        row = (np.arange(self.rows) - (self.rows - 1) / 2)[:, None, None]
        ray = v[..., 1, :] - v[..., 0, :] + column * v[..., 2, :] + row * v[..., 3, :]
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
        return np.broadcast_to(v[..., 0, :], ray.shape), ray

    def __repr__(self) -> str:
        return f"ConeVectors({self.views} views, {self.rows} x {self.columns})"


Geometry = ParallelBeam | FanBeam | ConeBeam | ConeVectors


def geometry_from_dict(spec: dict[str, Any]) -> Geometry:
    """A geometry from the values of its ``to_dict``.

    Raises:
        UnsupportedError: if ``type`` names no geometry served here.
    """
    kinds: dict[str, type[ParallelBeam | FanBeam | ConeBeam | ConeVectors]] = {
        kind.kind: kind for kind in (ParallelBeam, FanBeam, ConeBeam, ConeVectors)
    }
    kind = kinds.get(str(spec.get("type")))
    if kind is None:
        raise UnsupportedError(
            f"scan geometry {spec.get('type')!r} is not served; expected one of {sorted(kinds)}"
        )
    return kind.from_dict(spec)
