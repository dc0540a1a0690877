"""How random bodies are built: organs inside containers, clear of each other.

Because values add, each organ lies wholly inside its container and apart from its siblings, and
stores the difference to its container; candidates that would cross a neighbour shrink until they
do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phantoms.shapes import Ellipsoids

__all__ = [
    "AIR_HU",
    "Anatomy",
    "Builder",
    "Float",
    "Lesion",
    "Organ",
    "along",
    "fits",
    "generator",
    "sphere",
    "xyz",
]

Float = NDArray[np.float64]

AIR_HU = -1000.0


@dataclass(frozen=True)
class Lesion:
    """A planted ball.

    Args:
        site: the tissue that holds it.
        centre: (x, y, z) mm.
        radius: mm.
        contrast: value added to the tissue around it: HU, or signal in an MR contrast.
    """

    site: str
    centre: tuple[float, float, float]
    radius: float
    contrast: float


@dataclass(frozen=True, eq=False)
class Anatomy(Ellipsoids):
    """Ellipsoids in HU above air, and the lesions among them."""

    lesions: tuple[Lesion, ...] = ()


def sphere(count: int) -> Float:
    """`count` nearly uniform points of the unit sphere (Fibonacci lattice)."""
    k = np.arange(count) + 0.5
    z = 1 - 2 * k / count
    phi = k * np.pi * (3 - np.sqrt(5))
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(phi), r * np.sin(phi), z], axis=1)


_SPHERE = sphere(400)


@dataclass
class Organ:
    """One ellipsoid of constant HU, before its container's HU is subtracted."""

    hu: float
    centre: Float
    axes: Float
    rotation: Float = field(default_factory=lambda: np.eye(3))

    def reach(self, points: Float, margin: float = 0.0) -> Float:
        """Norm in the ellipsoid's axes, each `margin` mm longer: at most 1 inside."""
        u = (points - self.centre) @ (self.rotation / (self.axes + margin))
        return np.asarray(np.sqrt(np.einsum("pi,pi->p", u, u)))

    @cached_property
    def surface(self) -> Float:
        """(400, 3) points of the boundary."""
        return self.centre + (_SPHERE * self.axes) @ self.rotation.T

    def section(self, z: float) -> tuple[float, float, float, float]:
        """Bounding box of the section at z: centre (x, y) and half widths.

        Heights beyond the organ give its last section.
        """
        reach = 0.95 * float(np.hypot.reduce(self.rotation[2] * self.axes))
        z = float(np.clip(z, self.centre[2] - reach, self.centre[2] + reach))
        one = Ellipsoids(np.ones(1), self.centre[None], self.axes[None], self.rotation[None])
        cut = one.slice(z)
        a, b, t = cut.a[0], cut.b[0], cut.angle[0]
        return (
            float(cut.x[0]),
            float(cut.y[0]),
            float(np.hypot(a * np.cos(t), b * np.sin(t))),
            float(np.hypot(a * np.sin(t), b * np.cos(t))),
        )


class Builder:
    """Collects ellipsoids; knows how to keep one inside a container and clear of others."""

    def __init__(self, air: float = AIR_HU) -> None:
        self._air = air
        self._value: list[Float] = []
        self._centre: list[Float] = []
        self._axes: list[Float] = []
        self._rotation: list[Float] = []

    def add(self, value: ArrayLike, centre: Float, axes: Float, rotation: Float) -> None:
        """Add ellipsoids of a value: (n,), (n, 3), (n, 3) and (n, 3, 3)."""
        centre = np.atleast_2d(centre)
        n = centre.shape[0]
        self._value.append(np.broadcast_to(np.asarray(value, np.float64), (n,)))
        self._centre.append(centre)
        self._axes.append(np.broadcast_to(np.asarray(axes, np.float64), (n, 3)))
        self._rotation.append(np.broadcast_to(rotation, (n, 3, 3)))

    def organ(
        self,
        hu: float,
        inside: Organ | None,
        centre: Sequence[float] | Float,
        axes: Sequence[float] | Float,
        rotation: Float | None = None,
    ) -> Organ:
        """Add an organ where the caller knows that it fits."""
        made = Organ(
            hu,
            np.asarray(centre, dtype=np.float64),
            np.asarray(axes, dtype=np.float64),
            np.eye(3) if rotation is None else rotation,
        )
        self.add(
            hu - (self._air if inside is None else inside.hu),
            made.centre,
            made.axes,
            made.rotation,
        )
        return made

    def fitted(
        self,
        hu: float,
        inside: Organ,
        clear: Sequence[Organ],
        centre: Sequence[float] | Float,
        axes: Sequence[float] | Float,
        rotation: Float | None = None,
        span: float = 130.0,
        margin: float = 0.5,
        shrink: tuple[float, float, float] = (0.94, 0.94, 0.97),
    ) -> Organ | None:
        """Add an organ, shrunk until it lies inside and clear for |z| < span; None: no room."""
        trial = Organ(
            hu,
            np.asarray(centre, dtype=np.float64),
            np.asarray(axes, dtype=np.float64),
            np.eye(3) if rotation is None else rotation,
        )
        for _ in range(16):
            if fits(trial, inside, clear, span, margin):
                return self.organ(hu, inside, trial.centre, trial.axes, trial.rotation)
            trial = replace(trial, axes=trial.axes * shrink)
        return None

    def build(
        self, lesions: Sequence[Lesion], turn: Float, shift: Float, apart: Ellipsoids | None
    ) -> Anatomy:
        """Turn and shift the body as a whole; `apart` (a table) keeps its place."""
        centre = np.concatenate(self._centre) @ turn.T + shift
        value = np.concatenate(self._value)
        axes = np.concatenate(self._axes)
        rotation = turn @ np.concatenate(self._rotation)
        if apart is not None:
            value = np.concatenate([value, apart.value])
            centre = np.concatenate([centre, apart.centre])
            axes = np.concatenate([axes, apart.axes])
            rotation = np.concatenate([rotation, apart.rotation])
        moved = tuple(
            replace(lesion, centre=xyz(turn @ np.asarray(lesion.centre) + shift))
            for lesion in lesions
        )
        return Anatomy(value, centre, axes, rotation, moved)


def fits(trial: Organ, inside: Organ, clear: Sequence[Organ], span: float, margin: float) -> bool:
    """Whether an organ lies `margin` mm inside one and clear of others, for |z| < span."""
    surface = trial.surface
    surface = surface[np.abs(surface[:, 2]) < span]
    if surface.size == 0 or inside.reach(surface, -margin).max() > 1:
        return False
    size = trial.axes.max() + margin
    for other in clear:
        if np.linalg.norm(trial.centre - other.centre) > size + other.axes.max():
            continue
        if other.reach(surface, margin).min() < 1:
            return False
        # The other may lie wholly within the trial.
        theirs = other.surface
        theirs = theirs[np.abs(theirs[:, 2]) < span]
        if theirs.size and trial.reach(theirs, margin).min() < 1:
            return False
    return True


def xyz(point: Float) -> tuple[float, float, float]:
    """A point as three numbers."""
    return float(point[0]), float(point[1]), float(point[2])


def generator(seed: int, stream: int) -> np.random.Generator:
    """Random numbers of one part of a body: streams of a seed do not touch each other."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))


def along(direction: Float) -> Float:
    """(n, 3, 3) rotations whose first column is the unit direction (n, 3).

    The third column is as near to z as can be, so that flat bodies stand upright.
    """
    d = direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    level = np.hypot(d[:, 0], d[:, 1])
    safe = np.where(level > 1e-9, level, 1.0)
    second = np.stack(
        [
            np.where(level > 1e-9, -d[:, 1] / safe, 0.0),
            np.where(level > 1e-9, d[:, 0] / safe, 1.0),
            np.zeros_like(level),
        ],
        axis=-1,
    )
    return np.stack([d, second, np.cross(d, second)], axis=-1)
