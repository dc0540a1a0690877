"""The phantoms by name, as `recon phantom` makes them.

Each entry says its modality, and with it the unit of its values: CT phantoms are in HU above air
(the sum at a point, less 1000, is its HU), MR phantoms in signal relative to fully relaxed water,
or to the filling of the phantom.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from inverse.errors import GeometryError, InputError
from inverse.operators.units import AIR_HU
from phantoms.anatomy import Lesion, abdomen, head, thorax
from phantoms.fields import GaussianField, power_law
from phantoms.published import Module, Part, acr_ct, acr_mr, forbild_head, forbild_thorax
from phantoms.scene import Scene, Section
from phantoms.shapes import shepp_logan, shepp_logan_3d, shepp_logan_schabel
from phantoms.tissue import SEQUENCES, signals

__all__ = ["PHANTOMS", "Choice", "Entry", "Made", "render", "texture"]

_FIELD_MM = 240.0  # of the Shepp-Logan heads
_THIN = 8  # sections that a thick slice averages


@dataclass(frozen=True)
class Choice:
    """What may be chosen of a phantom; entries name the options that they have.

    Attributes:
        seed: of random anatomies.
        lesions: whether those have lesions.
        sequence: MR contrast of the brain, one of `phantoms.tissue.SEQUENCES`.
        field: field strength of the brain in tesla.
        part: slice of the ACR MR phantom.
    """

    seed: int = 0
    lesions: bool = True
    sequence: str = "t1"
    field: float = 1.5
    part: str = "resolution"


@dataclass(frozen=True)
class Made:
    """A phantom that was made.

    Attributes:
        at: its section at a height z in mm.
        lesions: planted lesions.
    """

    at: Callable[[float], Section]
    lesions: tuple[Lesion, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A phantom of the catalogue.

    Attributes:
        summary: what it is, one line.
        modality: "CT" or "MR"; fixes the unit.
        make: choice to phantom.
        options: names of the fields of `Choice` that it obeys.
        field_mm: side of the square that holds it.
        slices: usual number of slices.
        spacing_mm: usual distance of slices.
        reach_mm: sections are defined for |z| up to this.
        body_part: DICOM body part examined, empty for test objects.
    """

    summary: str
    modality: Literal["CT", "MR"]
    make: Callable[[Choice], Made]
    options: tuple[str, ...] = ()
    field_mm: float = 360.0
    slices: int = 1
    spacing_mm: float = 4.0
    reach_mm: float = float("inf")
    body_part: str = ""

    @property
    def unit(self) -> str:
        """Of the images: HU or signal."""
        return "HU" if self.modality == "CT" else "signal"


def _flat(section: Section) -> Made:
    """The same section at every height."""
    return Made(lambda z: section)


def _modules(choice: Choice) -> Made:
    """The four modules on top of each other, 40 mm each, about z = 0."""
    return Made(lambda z: acr_ct(cast(Module, int(np.clip(np.floor(z / 40) + 3, 1, 4)))))


def _shepp_logan(choice: Choice) -> Made:
    return _flat(shepp_logan(_FIELD_MM, "original").scaled(1000))


def _chest(choice: Choice) -> Made:
    body = thorax(choice.seed, lesions=choice.lesions)
    return Made(body.slice, body.lesions)


def _abdomen(choice: Choice) -> Made:
    body = abdomen(choice.seed, lesions=choice.lesions)
    return Made(body.slice, body.lesions)


def _head(choice: Choice) -> Made:
    body = head(choice.seed, lesions=choice.lesions)
    return Made(body.slice, body.lesions)


def _brain(choice: Choice) -> Made:
    if choice.sequence not in SEQUENCES:
        raise InputError(
            f"the brain has the contrasts {', '.join(SEQUENCES)}, got {choice.sequence!r}"
        )
    tissues = signals(SEQUENCES[choice.sequence], choice.field)
    body = head(choice.seed, lesions=choice.lesions, contrast=tissues)
    return Made(body.slice, body.lesions)


def _schabel(choice: Choice) -> Made:
    return Made(shepp_logan_schabel(_FIELD_MM).slice)


def _kak_slaney(choice: Choice) -> Made:
    return Made(shepp_logan_3d(_FIELD_MM, "original").scaled(1000).slice)


def _forbild_thorax(choice: Choice) -> Made:
    return Made(forbild_thorax().slice)


_LESIONS = ("seed", "lesions")
PHANTOMS: Mapping[str, Entry] = {
    "shepp-logan": Entry(
        "Shepp-Logan head, contrasts of 1974 (1 % in the brain)", "CT", _shepp_logan,
        field_mm=_FIELD_MM, body_part="HEAD",
    ),
    "shepp-logan-modified": Entry(
        "Shepp-Logan head, contrasts of Toft", "MR",
        lambda c: _flat(shepp_logan(_FIELD_MM)), field_mm=_FIELD_MM, body_part="HEAD",
    ),
    "shepp-logan-3d": Entry(
        "Shepp-Logan head in space (Kak and Slaney)", "CT", _kak_slaney,
        field_mm=_FIELD_MM, slices=24, reach_mm=110, body_part="HEAD",
    ),
    "shepp-logan-schabel": Entry(
        "Shepp-Logan head in space (Schabel)", "MR", _schabel,
        field_mm=_FIELD_MM, slices=24, reach_mm=110, body_part="HEAD",
    ),
    "forbild-head": Entry(
        "FORBILD head with its right ear, section through the petrous bone", "CT",
        lambda c: _flat(forbild_head()), field_mm=260, body_part="HEAD",
    ),
    "forbild-thorax": Entry(
        "thorax after FORBILD's, simplified", "CT", _forbild_thorax,
        field_mm=640, slices=16, spacing_mm=10, reach_mm=250, body_part="CHEST",
    ),
    "acr-ct": Entry(
        "ACR CT accreditation phantom: HU inserts, low contrast, uniformity, bars", "CT",
        _modules, field_mm=220, slices=4, spacing_mm=40, reach_mm=80,
    ),
    "acr-mr": Entry(
        "ACR MR phantom: resolution, grid, uniformity or contrast (--part)", "MR",
        lambda c: _flat(acr_mr(cast(Part, c.part))), ("part",), field_mm=210,
    ),
    "chest": Entry(
        "random chest with nodules and soft-tissue lesions", "CT", _chest, _LESIONS,
        slices=8, reach_mm=150, body_part="CHEST",
    ),
    "abdomen": Entry(
        "random abdomen with liver and kidney lesions", "CT", _abdomen, _LESIONS,
        field_mm=400, slices=8, reach_mm=150, body_part="ABDOMEN",
    ),
    "head": Entry(
        "random head with bleeds, oedemas and tumours", "CT", _head, _LESIONS,
        field_mm=240, slices=8, reach_mm=110, body_part="HEAD",
    ),
    "brain": Entry(
        "random head by an MR sequence (--contrast, --field)", "MR", _brain,
        (*_LESIONS, "sequence", "field"), field_mm=240, slices=8, reach_mm=110, body_part="BRAIN",
    ),
}  # fmt: skip
"""Every phantom that is a sum of shapes."""


def render(
    made: Made,
    heights: list[float],
    shape: tuple[int, int],
    pixel_mm: float,
    thickness_mm: float = 0.0,
) -> NDArray[np.float32]:
    """Area averages of a phantom's sections on a grid.

    Args:
        made: the phantom.
        heights: of the slices, mm.
        shape: rows and columns.
        pixel_mm: size of the square pixels.
        thickness_mm: of a slice, whose eight sections are averaged; 0 is a thin one.

    Returns:
        (slices, rows, columns), the phantom's values.
    """
    return np.stack([section(made, z, thickness_mm).image(shape, pixel_mm) for z in heights])


def section(made: Made, z: float, thickness_mm: float = 0.0) -> Section:
    """A slice of a phantom: its section, or the mean of eight over its thickness.

    Raises:
        GeometryError: a negative thickness.
    """
    if not thickness_mm >= 0:
        raise GeometryError(f"A slice is {thickness_mm} mm thick, expected 0 or more.")
    if thickness_mm == 0:
        return made.at(z)
    offsets = thickness_mm * ((np.arange(_THIN) + 0.5) / _THIN - 0.5)
    return Scene(tuple(made.at(z + float(d)).scaled(1 / _THIN) for d in offsets))


def texture(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], seed: int
) -> NDArray[np.float32]:
    """A Gaussian field with the power law of anatomical noise, in HU: mean 0, std 20.

    Spectral density :math:`(k^2 + k_0^2)^{-3/2}` with :math:`1/k_0` = 100 mm.

    Args:
        shape: slices, rows, columns.
        spacing_mm: (slice, row, column) spacing.
        seed: of the draw.

    Returns:
        (Z, Y, X) float32, not below air.
    """
    field = GaussianField.periodic(shape, spacing_mm, power_law(3.0, 100.0), variance=400.0)
    return np.maximum(field.sample(seed)[0], AIR_HU).astype(np.float32)
