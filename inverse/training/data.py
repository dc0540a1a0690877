"""Training images: checked slices of one modality, split by patient, augmented without leaking.

Batches are a function of ``(seed, step)`` alone, so that a resumed run sees exactly the images
that an uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from inverse.errors import InputError, NoInputError
from inverse.training.files import Plane, Slices, read_slices

__all__ = [
    "Augmentation",
    "Batch",
    "ImageSet",
    "draw_batch",
    "fine_enough",
    "load_images",
    "on_grid",
    "split_by_patient",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Slices of one modality.

    Attributes:
        images: 2-D arrays in physical units (HU, or relative signal), sizes may differ.
        pixel_mm: pixel size of each, mm.
        patient: patient key of each.
        fill: value outside an image (air).
        weight: how often the set is drawn relative to others.
        natural: images of patients; simulated ones are left out where training images are
            compared with held-out ones.
        skipped: what reading left out, counted by reason.
    """

    images: tuple[NDArray[np.float32], ...]
    pixel_mm: tuple[float, ...]
    patient: tuple[str, ...]
    fill: float
    weight: float = 1.0
    natural: bool = True
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def patients(self) -> tuple[str, ...]:
        """Distinct patients, sorted."""
        return tuple(sorted(self.members))

    @cached_property
    def members(self) -> Mapping[str, Sequence[int]]:
        """Indices of each patient's slices."""
        result: dict[str, list[int]] = {}
        for i, patient in enumerate(self.patient):
            result.setdefault(patient, []).append(i)
        return result

    def where(self, keep: Sequence[bool]) -> ImageSet:
        """The slices where ``keep`` is true."""
        index = [i for i, k in enumerate(keep) if k]
        return replace(
            self,
            images=tuple(self.images[i] for i in index),
            pixel_mm=tuple(self.pixel_mm[i] for i in index),
            patient=tuple(self.patient[i] for i in index),
        )


def load_images(
    path: str | Path,
    modality: Literal["CT", "MR"],
    *,
    select: Mapping[str, Sequence[str]] | None = None,
    weight: float = 1.0,
    plane: Plane | None = None,
) -> ImageSet:
    """Usable slices of one modality in a file, an archive or a folder, and what was left out.

    Slices that are constant, not finite, or copies of another are left out, as is a scan whose
    values cannot be of the modality: CT without a negative value, MR with large negative ones.

    Args:
        path: DICOM, NIfTI, ``.npz`` or HDF5; see :func:`inverse.training.files.read_slices`.
        modality: ``"CT"`` (HU, clipped to [-1024, 3071]) or ``"MR"`` (each scan divided by the
            99.5th percentile of its positive values).
        select: for stacks with a table, keep rows whose column has one of the values.
        weight: see :class:`ImageSet`.
        plane: leave slices of other planes out, or cut volumes anew; see
            :func:`inverse.training.files.read_slices`.

    Raises:
        NoInputError: nothing at ``path`` or nothing usable left after selection.
        InputError: a named file that does not fit the description of its format.
    """
    path = Path(path)
    found = read_slices(path, modality, select, plane)
    usable = _usable(found, modality)
    if not any(usable):
        counts = ", ".join(f"{n} x {reason}" for reason, n in sorted(found.skipped.items()))
        left = f" (left out: {counts})" if counts else ""
        raise NoInputError(
            f"training data '{path.name}' hold no usable slice of modality {modality} after "
            f"selection {dict(select or {})}{left}; give another path or modality"
        )
    if modality == "CT":
        fill = -1000.0
        images = [np.clip(i, -1024, 3071) for i in found.images]
    else:
        fill = 0.0
        tops = {scan: _top(found, usable, scan) for scan in set(found.scan)}
        images = [i / tops[scan] for i, scan in zip(found.images, found.scan, strict=True)]
    return ImageSet(
        tuple(i.astype(np.float32) for i in images),
        tuple(found.pixel_mm),
        tuple(found.patient),
        fill,
        weight,
        skipped=dict(sorted(found.skipped.items())),
    ).where(usable)


def _usable(found: Slices, modality: Literal["CT", "MR"]) -> list[bool]:
    """Which slices to keep; counts the others by reason."""
    lowest: dict[str, float] = {}
    highest: dict[str, float] = {}
    sound = [bool(np.isfinite(i).all() and np.ptp(i) > 0) for i in found.images]
    for image, scan, good in zip(found.images, found.scan, sound, strict=True):
        if good:
            lowest[scan] = min(lowest.get(scan, math.inf), float(image.min()))
            highest[scan] = max(highest.get(scan, -math.inf), float(image.max()))
    seen: set[bytes] = set()
    keep = []
    counts: Counter[str] = Counter()
    for image, scan, good in zip(found.images, found.scan, sound, strict=True):
        content = hashlib.sha256(image.tobytes()).digest()
        reason = ""
        if not good:
            reason = "constant or non-finite slice"
        elif modality == "CT" and lowest[scan] >= 0:
            reason = "slice without a negative value, so not HU"
        elif modality == "MR" and lowest[scan] < -0.1 * highest[scan]:
            reason = "slice with large negative values, so no magnitude image"
        elif content in seen:
            reason = "copy of another slice"
        seen.add(content)
        keep.append(not reason)
        if reason:
            counts[reason] += 1
    found.skipped.update(counts)
    return keep


def _top(found: Slices, usable: Sequence[bool], scan: str) -> float:
    """The 99.5th percentile of a scan's positive values; 1 where it has no usable slice."""
    positive = [
        image[image > 0]
        for image, own, good in zip(found.images, found.scan, usable, strict=True)
        if own == scan and good
    ]
    values = np.concatenate([p.ravel() for p in positive]) if positive else np.ones(1)
    return float(np.percentile(values, 99.5)) if len(values) else 1.0


def split_by_patient(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and held-out slices; no patient is in both.

    Raises:
        InputError: with fewer than two patients.
    """
    patients = images.patients
    if len(patients) < 2:
        raise InputError(
            f"a patient-wise split needs at least 2 patients, got {len(patients)}; add data or "
            "give validation data of their own"
        )
    order = np.random.default_rng(seed).permutation(len(patients))
    held = {patients[i] for i in order[: max(1, round(fraction * len(patients)))]}
    keep = [p not in held for p in images.patient]
    return images.where(keep), images.where([not k for k in keep])


@dataclass(frozen=True)
class Augmentation:
    """Small motions of an image on its way to the training grid.

    Attributes:
        size: rows and columns of the whole image grid.
        pixel_mm: range of pixel sizes of the grid; an image finer than the range is area-averaged
            down to a random size inside it, another is scaled by at most ``zoom``.
        rotation: largest rotation, radians.
        shift_mm: largest shift.
        zoom: largest relative change of scale where the pixel size cannot vary.
        flip: mirror left and right (changes laterality: off unless asked for).
        slabs: rows of a crop count as all that there are, as in a coronal or sagittal section,
            which has a row for each slice of a scan of any length.
    """

    size: int = 256
    pixel_mm: tuple[float, float] = (1.1, 2.0)
    rotation: float = math.radians(6)
    shift_mm: float = 15.0
    zoom: float = 0.1
    flip: bool = False
    slabs: bool = False

    def still(self) -> Augmentation:
        """The same grid without motion beyond the resampling to it."""
        return replace(self, rotation=0.0, shift_mm=0.0, zoom=0.0, flip=False)

    def finer(self) -> Augmentation:
        """The same field of view on twice the rows and columns of half the size."""
        low, high = self.pixel_mm
        return replace(self, size=2 * self.size, pixel_mm=(low / 2, high / 2))


@dataclass(frozen=True)
class Batch:
    """Clean images ``(b, h, w)`` in physical units, pixel sizes ``(b,)``, positions."""

    images: Tensor
    pixel_mm: Tensor
    position: Tensor


def draw_batch(
    sets: Sequence[ImageSet],
    augmentation: Augmentation,
    count: int,
    crop: int | None,
    generator: torch.Generator,
    share: slice = slice(None),
) -> Batch:
    """Random augmented images: set by weight, patient uniformly, slice uniformly.

    Args:
        sets: image sets.
        augmentation: the grid and the motions.
        count: images in the batch.
        crop: side of random windows of the grid; ``None`` for whole images.
        generator: randomness, the same whatever the share.
        share: which of the images to make.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def integer(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    weights = torch.tensor([s.weight for s in sets])
    a = augmentation
    side = a.size if crop is None else crop
    images, pixels, positions = [], [], []
    wanted = range(count)[share]
    for k in range(count):
        chosen = sets[int(torch.multinomial(weights, 1, generator=generator))]
        patient = chosen.patients[integer(len(chosen.patients))]
        members = chosen.members[patient]
        i = members[integer(len(members))]
        native = chosen.pixel_mm[i]
        low, high = max(a.pixel_mm[0], native), max(a.pixel_mm[1], native)
        if native < 0.75 * a.pixel_mm[1]:
            pixel = native * math.exp(uniform(math.log(low / native), math.log(high / native)))
            zoom = 1.0
        else:
            pixel, zoom = native, math.exp(uniform(-a.zoom, a.zoom))
        angle = uniform(-a.rotation, a.rotation)
        shift = uniform(-a.shift_mm, a.shift_mm), uniform(-a.shift_mm, a.shift_mm)
        mirror = -1.0 if a.flip and integer(2) else 1.0
        corner = (integer(a.size - side + 1), integer(a.size - side + 1))
        if k not in wanted:
            continue
        images.append(
            _resample(
                chosen.images[i],
                chosen.fill,
                native * zoom,
                pixel,
                a.size,
                corner,
                side,
                angle,
                shift,
                mirror,
            )
        )
        pixels.append(pixel)
        rows, cols = (
            (torch.arange(side, dtype=torch.float32) + c + 0.5) * 2 / a.size - 1 for c in corner
        )
        if a.slabs:
            rows = (torch.arange(side, dtype=torch.float32) + 0.5) * 2 / side - 1
        positions.append(torch.stack(torch.meshgrid(rows, cols, indexing="ij")))
    if not images:
        return Batch(torch.empty(0, side, side), torch.empty(0), torch.empty(0, 2, side, side))
    return Batch(torch.stack(images), torch.tensor(pixels), torch.stack(positions))


def fine_enough(sets: Sequence[ImageSet], augmentation: Augmentation) -> list[ImageSet]:
    """The images whose own pixels lie within the finer grid's range."""
    largest = augmentation.finer().pixel_mm[1]
    kept = [s.where([p <= largest for p in s.pixel_mm]) for s in sets]
    return [s for s in kept if len(s)]


def on_grid(images: ImageSet, augmentation: Augmentation) -> Tensor:
    """Every slice of a set, unmoved, at the middle pixel size of the grid, ``(n, size, size)``."""
    middle = math.sqrt(augmentation.pixel_mm[0] * augmentation.pixel_mm[1])
    still = replace(augmentation.still(), pixel_mm=(middle, middle))
    generator = torch.Generator().manual_seed(0)
    alone = (images.where([k == i for k in range(len(images))]) for i in range(len(images)))
    return torch.cat([draw_batch([one], still, 1, None, generator).images for one in alone])


def _resample(
    image: NDArray[np.float32],
    fill: float,
    native: float,
    pixel: float,
    size: int,
    corner: tuple[int, int],
    side: int,
    angle: float,
    shift: tuple[float, float],
    mirror: float,
) -> Tensor:
    """A window of the moved image on a ``size`` grid of ``pixel`` mm; area-averaged if coarser."""
    over = 1 if pixel / native < 1.3 else 2
    rows, cols = (
        ((torch.arange(side * over, dtype=torch.float32) + 0.5) / over + c - size / 2) * pixel
        for c in corner
    )
    y, x = torch.meshgrid(rows, cols, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    u = (cos * x + sin * y) * mirror + shift[1]
    v = -sin * x + cos * y + shift[0]
    h, w = image.shape
    grid = torch.stack([u * 2 / (w * native), v * 2 / (h * native)], dim=-1)[None]
    source = torch.from_numpy(image - np.float32(fill))[None, None]
    out = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if over > 1:
        out = F.avg_pool2d(out, over)
    return out[0, 0] + fill
