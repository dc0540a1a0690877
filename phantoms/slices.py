"""Random phantom slices as training images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from inverse.training.data import ImageSet
from inverse.training.files import Plane
from phantoms.anatomy import AIR_HU, thorax
from phantoms.shapes import Ellipsoids

__all__ = ["chest_slices", "facing"]

_AXES: dict[Plane, list[int]] = {"axial": [0, 1, 2], "coronal": [0, 2, 1], "sagittal": [1, 2, 0]}
"""Coordinates (x, y, z) of a body along columns, rows and across the sections of a plane."""
_LUNGS_MM, _BODY_MM = 60.0, 150.0
"""Distances from the middle within which sections cross both lungs, and the body at all."""


def facing(body: Ellipsoids, plane: Plane) -> Ellipsoids:
    """The body with its axes renamed, so that its sections ``slice(z)`` are those of a plane.

    Rows and columns of these are (y, x) for axial, (z, x) for coronal and (z, y) for sagittal
    sections, as of a volume ``(z, y, x)`` whose slices ascend.
    """
    axes = _AXES[plane]
    return Ellipsoids(body.value, body.centre[:, axes], body.axes, body.rotation[:, axes])


def chest_slices(
    seeds: Iterable[int],
    *,
    each: int = 2,
    size: int = 256,
    pixel_mm: tuple[float, float] = (1.2, 1.9),
    weight: float = 1.0,
    plane: Plane = "axial",
    cubic: bool = False,
) -> ImageSet:
    """Slices of :func:`phantoms.anatomy.thorax` in HU; every seed is a patient.

    Args:
        seeds: seeds of the chests; keep those of test phantoms out.
        each: slices a chest, at random places.
        size: rows and columns.
        pixel_mm: range of pixel sizes.
        weight: how often the set is drawn; see :class:`inverse.training.data.ImageSet`.
        plane: their plane; see :func:`facing`.
        cubic: as thick as a pixel is wide and from anywhere within 150 mm of the middle, which is
            what a volume of cubic voxels is made of; else infinitely thin and within 60 mm.
    """
    reach = _BODY_MM if cubic else _LUNGS_MM
    images, pixels, patients = [], [], []
    for seed in seeds:
        rng = np.random.default_rng([seed, 1])
        body = facing(thorax(seed), plane)
        for _ in range(each):
            pixel = float(rng.uniform(*pixel_mm))
            place = float(rng.uniform(-reach, reach))
            section = body.slab(place, pixel, 2) if cubic else body.slice(place)
            hu = section.image((size, size), pixel, 3) + AIR_HU
            images.append(np.maximum(hu, AIR_HU).astype(np.float32))
            pixels.append(pixel)
            patients.append(f"thorax-{seed}")
    return ImageSet(tuple(images), tuple(pixels), tuple(patients), AIR_HU, weight)
