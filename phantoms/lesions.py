"""Lesions of known size and contrast, put into slices before they are measured, or taken out.

A reconstruction is judged by what it does with the difference of two objects.  One slice carries
several edits, far enough apart that each is seen alone, in both directions: insertion of a ball
into tissue that has none, and removal of a compact structure (a vessel's section, a nodule) that
the slice has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from inverse.errors import GeometryError, InputError
from inverse.metrics import body_mask
from phantoms.shapes import Ellipses

__all__ = ["CONTRASTS", "DIAMETERS", "Edit", "Planted", "plant"]

Float32 = NDArray[np.float32]
Mask = NDArray[np.bool_]
Tissue = Literal["lung", "soft"]

DIAMETERS = (6.0, 12.0)
"""Of planted balls, mm."""
CONTRASTS: dict[Tissue, tuple[float, ...]] = {
    "lung": (100.0, 300.0, 800.0),  # ground glass, part-solid, solid nodule
    "soft": (30.0, 80.0, 200.0),  # a lesion of the liver, one with contrast agent, calcification
}
"""HU above the tissue around."""
SHARE = {"lung": 6, "soft": 6}
"""Most insertions a slice."""
APART_MM = 28.0
"""Least distance of the centres of two edits: more than twice the largest diameter."""
MARGIN_MM = 2.0
"""Of tissue around a planted ball."""
REMOVED_MM = (3.0, 14.0)
"""Diameters of structures that are taken out."""


@dataclass(frozen=True)
class Edit:
    """One difference between two slices.

    Attributes:
        direction: ``"insertion"``: the second slice has it; ``"removal"``: the first has it.
        tissue: what is around it.
        diameter: mm; of removed structures that of the disc of equal area.
        contrast: HU over the tissue around; of removed structures the mean.
        row: of its centre, pixels.
        column: likewise.
    """

    direction: Literal["insertion", "removal"]
    tissue: Tissue
    diameter: float
    contrast: float
    row: float
    column: float


@dataclass(frozen=True)
class Planted:
    """Two slices and what they differ in.

    Attributes:
        first: HU, ``(n, n)``: the slice as it was.
        second: with the insertions, without the removals.
        edits: the differences.
    """

    first: Float32
    second: Float32
    edits: tuple[Edit, ...]


def plant(
    hu: Float32,
    pixel_mm: float,
    rng: np.random.Generator,
    *,
    number: int = 0,
    removals: int = 3,
    diameters: Sequence[float] = DIAMETERS,
) -> Planted:
    """Edit a chest slice wherever there is room.

    Insertions run through all pairs of diameter and contrast of their tissue in turn, so that
    each comes equally often over slices.

    Args:
        hu: square slice in HU.
        pixel_mm: pixel size in mm.
        rng: chooses the places.
        number: of the slice, which pair of diameter and contrast comes first.
        removals: most structures to take out.
        diameters: of the insertions, mm.

    Returns:
        The pair; without edits where the slice has neither lung nor soft tissue.

    Raises:
        GeometryError: an image that is not square.
        InputError: values that are not finite, or a pixel size that is not positive.
    """
    if hu.ndim != 2 or hu.shape[0] != hu.shape[1]:
        raise GeometryError(f"lesions are planted in a square slice, got {hu.shape}")
    if not np.isfinite(hu).all() or not pixel_mm > 0:
        raise InputError(f"lesions need finite HU and a positive pixel size, got {pixel_mm} mm")
    first = hu.astype(np.float32)
    body = body_mask(first[None], -500.0)[0]
    lung = _large(body & (first < -600.0), 400.0 / pixel_mm**2)
    soft = ndimage.binary_opening(body & (first > 0.0) & (first < 150.0), iterations=2)
    second = first.copy()
    edits: list[Edit] = []
    for edit, patch in _structures(first, lung, pixel_mm, rng, removals):
        second -= patch
        edits.append(edit)
    rooms: tuple[tuple[Tissue, Mask], ...] = (("lung", lung), ("soft", soft))
    for tissue, mask in rooms:
        depth = ndimage.distance_transform_edt(mask) * pixel_mm
        pairs = [(d, c) for c in CONTRASTS[tissue] for d in diameters]
        for k in range(SHARE[tissue]):
            diameter, contrast = pairs[(number + k) % len(pairs)]
            free = depth > diameter / 2 + MARGIN_MM
            place = _place(free, edits, pixel_mm, rng)
            if place is None:
                continue
            row, column = place
            edits.append(Edit("insertion", tissue, diameter, contrast, row, column))
            second += _ball(first.shape, pixel_mm, edits[-1])
    return Planted(first, second, tuple(edits))


def _large(mask: Mask, least: float) -> Mask:
    """Components of at least so many pixels."""
    label, count = ndimage.label(mask)
    sizes = np.bincount(label.ravel(), minlength=count + 1)
    sizes[0] = 0
    return np.asarray(sizes[label] >= least)


def _structures(
    hu: Float32, lung: Mask, pixel_mm: float, rng: np.random.Generator, most: int
) -> list[tuple[Edit, Float32]]:
    """Compact bright structures wholly inside a lung, and what they add to it."""
    reach = max(1, round(MARGIN_MM / pixel_mm))
    whole = np.asarray(ndimage.binary_fill_holes(lung))
    inside = ndimage.binary_erosion(whole, iterations=2 * reach)
    label = ndimage.label(whole & (hu > -550.0))[0]
    found = []
    for k, box in enumerate(ndimage.find_objects(label), start=1):
        core = label == k
        diameter = 2 * math.sqrt(float(core.sum()) / math.pi) * pixel_mm
        extent = max(s.stop - s.start for s in box) * pixel_mm
        if not REMOVED_MM[0] <= diameter <= REMOVED_MM[1] or extent > 1.6 * diameter:
            continue
        if not inside[core].all():
            continue
        near = ndimage.binary_dilation(core, iterations=reach)
        ring = ndimage.binary_dilation(core, iterations=3 * reach) & ~near & lung
        if not ring.any():
            continue
        background = float(np.median(hu[ring]))
        patch = np.where(near, np.maximum(hu - background, 0.0), 0.0).astype(np.float32)
        row, column = (float(v) for v in ndimage.center_of_mass(core))
        edit = Edit("removal", "lung", diameter, float(hu[core].mean()) - background, row, column)
        found.append((edit, patch))
    kept: list[tuple[Edit, Float32]] = []
    for i in rng.permutation(len(found)):
        edit, patch = found[i]
        if len(kept) < most and _apart(edit.row, edit.column, [e for e, _ in kept], pixel_mm):
            kept.append((edit, patch))
    return kept


def _apart(row: float, column: float, edits: Sequence[Edit], pixel_mm: float) -> bool:
    return all(math.hypot(row - e.row, column - e.column) * pixel_mm >= APART_MM for e in edits)


def _place(
    free: Mask, edits: Sequence[Edit], pixel_mm: float, rng: np.random.Generator
) -> tuple[int, int] | None:
    """A random free pixel far from all edits."""
    rows, columns = np.nonzero(free)
    far = np.ones(len(rows), dtype=bool)
    for e in edits:
        far &= np.hypot(rows - e.row, columns - e.column) * pixel_mm >= APART_MM
    choices = np.nonzero(far)[0]
    if not len(choices):
        return None
    i = int(rng.choice(choices))
    return int(rows[i]), int(columns[i])


def _ball(shape: tuple[int, int], pixel_mm: float, edit: Edit) -> Float32:
    """Area average of a disc, the section of the ball through its centre."""
    x = (edit.column - (shape[1] - 1) / 2) * pixel_mm
    y = (edit.row - (shape[0] - 1) / 2) * pixel_mm
    r = edit.diameter / 2
    return Ellipses.of([(edit.contrast, x, y, r, r, 0.0)]).image(shape, pixel_mm)
