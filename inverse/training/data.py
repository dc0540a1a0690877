"""Training images: slices from npz stacks or DICOM, split by patient, augmented without leaking.

Batches are a function of ``(seed, step)`` alone, so that a resumed run sees exactly the images
that an uninterrupted one would have seen.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from inverse.errors import InputError, NoInputError

__all__ = ["Augmentation", "Batch", "ImageSet", "load_images", "split_by_patient"]

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
    """

    images: tuple[NDArray[np.float32], ...]
    pixel_mm: tuple[float, ...]
    patient: tuple[str, ...]
    fill: float
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def patients(self) -> tuple[str, ...]:
        """Distinct patients, sorted."""
        return tuple(sorted(set(self.patient)))

    def where(self, keep: Sequence[bool]) -> ImageSet:
        """The slices where ``keep`` is true."""
        index = [i for i, k in enumerate(keep) if k]
        return ImageSet(
            tuple(self.images[i] for i in index),
            tuple(self.pixel_mm[i] for i in index),
            tuple(self.patient[i] for i in index),
            self.fill,
            self.weight,
        )


def load_images(
    path: str | Path,
    modality: Literal["CT", "MR"],
    *,
    select: Mapping[str, Sequence[str]] | None = None,
    weight: float = 1.0,
) -> ImageSet:
    """Slices from an npz stack, or from a DICOM folder or zip (one or many series).

    Args:
        path: ``.npz`` with one 3-D array ``(slices, rows, columns)`` and beside it a ``.csv`` of
            the same name with one row a slice and columns ``patient`` (or ``subject``) and
            ``pixel_mm``; or DICOM.
        modality: ``"CT"`` (HU, clipped to [-1024, 3071]) or ``"MR"`` (divided by each patient's
            99.5th percentile).
        select: for npz, keep rows whose CSV column has one of the values.
        weight: see :class:`ImageSet`.

    Raises:
        NoInputError: nothing at ``path`` or nothing left after selection.
        InputError: an array or table that does not fit the description above.
    """
    path = Path(path)
    if not path.exists():
        raise NoInputError(f"training data '{path.name}' do not exist; give an .npz or a folder")
    if path.suffix == ".npz":
        images, pixels, patients = _read_npz(path, select or {})
    else:
        images, pixels, patients = _read_dicom(path, modality)
    usable = [bool(np.isfinite(i).all() and np.ptp(i) > 0) for i in images]
    if not all(usable):
        logger.warning("%d constant or non-finite slices skipped", usable.count(False))
    if not any(usable):
        raise NoInputError(
            f"training data '{path.name}' hold no usable slice after "
            f"selection {dict(select or {})}"
        )
    if modality == "CT":
        fill = -1000.0
        images = [np.clip(i, -1024, 3071) for i in images]
    else:
        fill = 0.0
        tops = {
            p: float(
                np.percentile(
                    np.concatenate(
                        [
                            i.ravel()[i.ravel() > 0]
                            for i, q in zip(images, patients, strict=True)
                            if q == p
                        ]
                    ),
                    99.5,
                )
            )
            for p in set(patients)
        }
        images = [i / tops[p] for i, p in zip(images, patients, strict=True)]
    return ImageSet(
        tuple(i.astype(np.float32) for i in images), tuple(pixels), tuple(patients), fill, weight
    ).where(usable)


def _read_npz(
    path: Path, select: Mapping[str, Sequence[str]]
) -> tuple[list[NDArray[np.float32]], list[float], list[str]]:
    with np.load(path, allow_pickle=False) as archive:
        stacks = [archive[key] for key in archive.files if archive[key].ndim == 3]
    table = path.with_suffix(".csv")
    if len(stacks) != 1 or not table.is_file():
        raise InputError(
            f"'{path.name}' must hold exactly one 3-D array (found {len(stacks)}) and have a "
            f"table '{table.name}' beside it with columns patient, pixel_mm"
        )
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = set(rows[0]) if rows else set()
    key = "patient" if "patient" in names else "subject"
    if len(rows) != len(stacks[0]) or not {key, "pixel_mm"} <= names:
        raise InputError(
            f"'{table.name}' must have one row a slice ({len(stacks[0])}, found {len(rows)}) "
            "with columns patient (or subject), pixel_mm"
        )
    keep = [i for i, row in enumerate(rows) if all(row.get(k) in v for k, v in select.items())]
    return (
        [stacks[0][i].astype(np.float32) for i in keep],
        [float(rows[i]["pixel_mm"]) for i in keep],
        [rows[i][key] for i in keep],
    )


def _read_dicom(
    path: Path, modality: str
) -> tuple[list[NDArray[np.float32]], list[float], list[str]]:
    from inverse.io.dicom import inspect, read_series

    images: list[NDArray[np.float32]] = []
    pixels: list[float] = []
    patients: list[str] = []
    for stack in inspect(path).stacks:
        if stack.modality != modality:
            logger.warning("stack of modality %s skipped", stack.modality)
            continue
        series = read_series(path, stack=stack.key)
        images += list(series.array)
        pixels += [float(series.spacing[1])] * len(series.array)
        patients += [series.patient_key] * len(series.array)
    return images, pixels, patients


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
    """

    size: int = 256
    pixel_mm: tuple[float, float] = (1.1, 2.0)
    rotation: float = math.radians(6)
    shift_mm: float = 15.0
    zoom: float = 0.1
    flip: bool = False

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
) -> Batch:
    """Random augmented images: set by weight, patient uniformly, slice uniformly.

    Args:
        sets: image sets.
        augmentation: the grid and the motions.
        count: images in the batch.
        crop: side of random windows of the grid; ``None`` for whole images.
        generator: randomness.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def integer(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    weights = torch.tensor([s.weight for s in sets])
    a = augmentation
    side = a.size if crop is None else crop
    images, pixels, positions = [], [], []
    for _ in range(count):
        chosen = sets[int(torch.multinomial(weights, 1, generator=generator))]
        patient = chosen.patients[integer(len(chosen.patients))]
        members = [i for i, p in enumerate(chosen.patient) if p == patient]
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
        positions.append(torch.stack(torch.meshgrid(rows, cols, indexing="ij")))
    return Batch(torch.stack(images), torch.tensor(pixels), torch.stack(positions))


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
