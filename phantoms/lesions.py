"""Lesions of known size and contrast, put into slices before they are measured, or taken out.

A reconstruction is judged by what it does with the difference of two objects.  One slice carries
several edits, far enough apart that each is seen alone, in both directions: insertion of a ball
into tissue that has none, and removal of a compact structure that the slice has (of a chest a
vessel's section or a nodule, of a brain what white matter encloses: a sulcus' end, a ventricle's
section, a nucleus).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from inverse.errors import GeometryError, InputError
from inverse.metrics import body_mask
from phantoms.shapes import Ellipses

__all__ = ["APART_MM", "BRAIN", "CHEST", "Edit", "Kind", "Planted", "Tissue", "plant"]

Float32 = NDArray[np.float32]
Mask = NDArray[np.bool_]
Tissue = Literal["lung", "soft", "dark", "bright"]
"""What is around a lesion of a chest; of a brain, how one in white matter looks."""

APART_MM = 28.0
"""Least distance of the centres of two edits: more than twice the largest diameter."""
REMOVED_MM = (3.0, 14.0)
"""Diameters of structures that are taken out."""


@dataclass(frozen=True)
class Kind:
    """Lesions of one part of the body.

    Attributes:
        contrasts: of planted balls, over the tissue around them.
        diameters: of planted balls, mm.
        most: insertions a slice and region: lung and soft tissue, or white matter.
        margin_mm: of tissue around a planted ball.
    """

    contrasts: Mapping[Tissue, tuple[float, ...]]
    diameters: tuple[float, ...]
    most: int
    margin_mm: float


CHEST = Kind(
    contrasts={
        "lung": (100.0, 300.0, 800.0),  # ground glass, part-solid, solid nodule
        "soft": (30.0, 80.0, 200.0),  # liver lesion, one with contrast agent, calcification
    },
    diameters=(6.0, 12.0),
    most=6,
    margin_mm=2.0,
)
"""In HU."""
BRAIN = Kind(
    contrasts={
        "dark": (-0.1, -0.2, -0.4),  # oedema or an old plaque, up to a black hole
        "bright": (0.1, 0.2, 0.4),  # faint to strong enhancement
    },
    diameters=(3.0, 6.0, 12.0),
    most=9,
    margin_mm=1.0,
)
"""T1-weighted, in parts of the 99.5th percentile of the signal (white matter has 0.7 to 0.9)."""


@dataclass(frozen=True)
class Edit:
    """One difference between two slices.

    Attributes:
        direction: ``"insertion"``: the second slice has it; ``"removal"``: the first has it.
        tissue: what is around it, or of a brain how it looks.
        diameter: mm; of removed structures that of the disc of equal area.
        contrast: over the tissue around, HU or signal; of removed structures the mean.
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
        first: HU or signal, ``(n, n)``: the slice as it was.
        second: with the insertions, without the removals.
        edits: the differences.
    """

    first: Float32
    second: Float32
    edits: tuple[Edit, ...]


def plant(
    image: Float32,
    pixel_mm: float,
    rng: np.random.Generator,
    kind: Kind = CHEST,
    *,
    number: int = 0,
    removals: int = 3,
) -> Planted:
    """Edit a slice wherever there is room.

    Insertions run through all pairs of diameter and contrast of their region in turn, so that
    each comes equally often over slices.

    Args:
        image: square slice: of a chest in HU, of a brain without its skull relative to the 99.5th
            percentile of its signal.
        pixel_mm: pixel size in mm.
        rng: chooses the places.
        kind: :data:`CHEST` or :data:`BRAIN`, which says what the slice is of.
        number: of the slice, which pair of diameter and contrast comes first.
        removals: most structures to take out.

    Returns:
        The pair; without edits where the slice has none of the regions.

    Raises:
        GeometryError: an image that is not square.
        InputError: values that are not finite, or a pixel size that is not positive.
    """
    if image.ndim != 2 or image.shape[0] != image.shape[1]:
        raise GeometryError(f"lesions are planted in a square slice, got {image.shape}")
    if not np.isfinite(image).all() or not pixel_mm > 0:
        raise InputError(
            f"lesions need finite values and a positive pixel size, got {pixel_mm} mm"
        )
    first = image.astype(np.float32)
    regions = _chest(first, pixel_mm) if "lung" in kind.contrasts else _brain(first, pixel_mm)
    second = first.copy()
    edits: list[Edit] = []
    for edit, patch in _structures(first, regions[0], pixel_mm, rng, removals):
        second -= patch
        edits.append(edit)
    for region in regions:
        depth = ndimage.distance_transform_edt(region.mask) * pixel_mm
        cases = [
            (t, d, c)
            for step in range(max(map(len, kind.contrasts.values())))
            for t in region.tissues
            for c in kind.contrasts[t][step : step + 1]
            for d in kind.diameters
        ]
        for k in range(kind.most):
            tissue, diameter, contrast = cases[(number + k) % len(cases)]
            free = depth > diameter / 2 + kind.margin_mm
            place = _place(free, edits, pixel_mm, rng)
            if place is None:
                continue
            row, column = place
            edits.append(Edit("insertion", tissue, diameter, contrast, row, column))
            second += _ball(first.shape, pixel_mm, edits[-1])
    return Planted(first, second, tuple(edits))


@dataclass(frozen=True)
class _Region:
    """Where lesions are planted.

    Attributes:
        tissues: whose contrasts they have.
        mask: the pixels.
        foreign: what of the slice is not of the region's tissue: those enclosed by it can be
            taken out.
        sign: of a foreign structure's contrast.
    """

    tissues: tuple[Tissue, ...]
    mask: Mask
    foreign: Mask
    sign: int


def _chest(hu: Float32, pixel_mm: float) -> list[_Region]:
    """Lung, with the vessels in it, and soft tissue."""
    body = body_mask(hu[None], -500.0)[0]
    lung = _large(body & (hu < -600.0), 400.0 / pixel_mm**2)
    soft = ndimage.binary_opening(body & (hu > 0.0) & (hu < 150.0), iterations=2)
    return [
        _Region(("lung",), lung, hu > -550.0, 1),
        _Region(("soft",), soft, np.zeros_like(soft), 1),
    ]


def _brain(signal: Float32, pixel_mm: float) -> list[_Region]:
    """White matter: the brightest of three classes of the smoothed brain."""
    body = body_mask(signal[None], 0.1 * float(signal.max()))[0]
    if not body.any():
        return [_Region(("dark", "bright"), body, body, -1)]
    smooth = ndimage.gaussian_filter(signal, 0.6 / pixel_mm)
    values = smooth[body]
    centres = np.quantile(values, (0.05, 0.4, 0.8))
    for _ in range(50):  # Lloyd's algorithm; it settles within some ten rounds
        edges = (centres[1:] + centres[:-1]) / 2
        label = np.searchsorted(edges, values)
        new = np.array([
            values[label == k].mean() if (label == k).any() else centres[k] for k in range(3)
        ])  # fmt: skip
        if np.allclose(new, centres, rtol=0.0, atol=1e-4):
            break
        centres = new
    white = _large(body & (smooth > (centres[1] + centres[2]) / 2), 100.0 / pixel_mm**2)
    return [_Region(("dark", "bright"), white, body & ~white, -1)]


def _large(mask: Mask, least: float) -> Mask:
    """Components of at least so many pixels."""
    label, count = ndimage.label(mask)
    sizes = np.bincount(label.ravel(), minlength=count + 1)
    sizes[0] = 0
    return np.asarray(sizes[label] >= least)


def _structures(
    image: Float32, region: _Region, pixel_mm: float, rng: np.random.Generator, most: int
) -> list[tuple[Edit, Float32]]:
    """Compact structures wholly inside a region, and what they add to it."""
    margin = max(1, round(CHEST.margin_mm / pixel_mm))
    whole = np.asarray(ndimage.binary_fill_holes(region.mask))
    inside = ndimage.binary_erosion(whole, iterations=2 * margin)
    label = ndimage.label(whole & region.foreign)[0]
    found = []
    for k, box in enumerate(ndimage.find_objects(label), start=1):
        core = label == k
        diameter = 2 * math.sqrt(float(core.sum()) / math.pi) * pixel_mm
        extent = max(s.stop - s.start for s in box) * pixel_mm
        if not REMOVED_MM[0] <= diameter <= REMOVED_MM[1] or extent > 1.6 * diameter:
            continue
        if not inside[core].all():
            continue
        near = ndimage.binary_dilation(core, iterations=margin)
        ring = ndimage.binary_dilation(core, iterations=3 * margin) & ~near & region.mask
        if not ring.any():
            continue
        background = float(np.median(image[ring]))
        rise = region.sign * np.maximum(region.sign * (image - background), 0.0)
        patch = np.where(near, rise, 0.0).astype(np.float32)
        row, column = (float(v) for v in ndimage.center_of_mass(core))
        contrast = float(image[core].mean()) - background
        found.append((Edit("removal", region.tissues[0], diameter, contrast, row, column), patch))
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
