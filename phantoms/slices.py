"""Random phantom slices as training images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from inverse.training.data import ImageSet
from phantoms.anatomy import AIR_HU, thorax

__all__ = ["chest_slices"]


def chest_slices(
    seeds: Iterable[int],
    *,
    each: int = 2,
    size: int = 256,
    pixel_mm: tuple[float, float] = (1.2, 1.9),
    weight: float = 1.0,
) -> ImageSet:
    """Slices of :func:`phantoms.thorax` in HU; every seed is a patient.

    Args:
        seeds: seeds of the chests; keep those of test phantoms out.
        each: slices a chest, at random heights within 60 mm of the middle.
        size: rows and columns.
        pixel_mm: range of pixel sizes.
        weight: how often the set is drawn; see :class:`inverse.training.data.ImageSet`.
    """
    images, pixels, patients = [], [], []
    for seed in seeds:
        rng = np.random.default_rng([seed, 1])
        body = thorax(seed)
        for _ in range(each):
            pixel = float(rng.uniform(*pixel_mm))
            section = body.slice(float(rng.uniform(-60, 60)))
            hu = section.image((size, size), pixel, 3) + AIR_HU
            images.append(np.maximum(hu, AIR_HU).astype(np.float32))
            pixels.append(pixel)
            patients.append(f"thorax-{seed}")
    return ImageSet(tuple(images), tuple(pixels), tuple(patients), AIR_HU, weight)
