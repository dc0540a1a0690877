r"""An X-ray tube's spectrum and what hardens it: water, bone and titanium.

A polychromatic beam measures

.. math:: p = -\log\sum_E w_E\, \exp\Big(-\sum_m \frac{\mu_m(E)}{\mu_m(60)}\,l_m\Big)

for line integrals :math:`l_m` of each material's attenuation at 60 keV.  Low energies are absorbed
first, so p grows more slowly than :math:`\sum_m l_m`.  Scanners undo this for water; what remains
are the dark bands between bones and beside metal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from inverse.errors import InputError
from inverse.operators.units import hu_to_mu, mu_to_hu
from inverse.volumes import Slices

__all__ = ["ALUMINIUM", "BONE", "TITANIUM", "WATER", "Material", "Tube", "implants", "split"]

REFERENCE_KEV = 60.0
_TABLE_KEV = (20.0, 30.0, 40.0, 50.0, 60.0, 80.0, 100.0, 150.0)


@dataclass(frozen=True)
class Material:
    """Attenuation of a material between 20 and 150 keV.

    Attributes:
        name: what it is.
        density: in g/cm^3.
        mass_attenuation: in cm^2/g at 20, 30, 40, 50, 60, 80, 100 and 150 keV.

    Source: Hubbell and Seltzer, NISTIR 5632, tables 3 and 4.
    """

    name: str
    density: float
    mass_attenuation: tuple[float, ...]

    def attenuation(self, kev: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Linear attenuation in 1/mm, interpolated in logarithms of both."""
        table = np.log(self.mass_attenuation)
        mass = np.exp(np.interp(np.log(kev), np.log(_TABLE_KEV), table))
        return np.asarray(mass * self.density / 10.0)


WATER = Material("water", 1.0, (0.8096, 0.3756, 0.2683, 0.2269, 0.2059, 0.1837, 0.1707, 0.1505))
BONE = Material(
    "cortical bone", 1.92, (4.001, 1.331, 0.6655, 0.4242, 0.3148, 0.2229, 0.1855, 0.1480)
)
ALUMINIUM = Material(
    "aluminium", 2.699, (3.441, 1.128, 0.5685, 0.3681, 0.2778, 0.2018, 0.1704, 0.1378)
)
TITANIUM = Material("titanium", 4.54, (15.85, 4.972, 2.214, 1.213, 0.7661, 0.4052, 0.2721, 0.1649))


@dataclass(frozen=True)
class Tube:
    r"""A tube's spectrum as an energy-integrating detector weighs it.

    Bremsstrahlung by Kramers' law, whose energy per interval is :math:`E_0 - E`, behind aluminium;
    characteristic lines and the detector's own response are left out.

    Attributes:
        kvp: tube voltage :math:`E_0` in kV.
        filter_mm: aluminium before the patient.

    Raises:
        InputError: a voltage outside 40 to 150 kV, or a negative filter.
    """

    kvp: float
    filter_mm: float = 7.0

    def __post_init__(self) -> None:
        if not 40.0 <= self.kvp <= 150.0 or not self.filter_mm >= 0.0:
            raise InputError(
                f"a tube needs 40 to 150 kV and a filter that is not negative, got {self.kvp:g} "
                f"kV and {self.filter_mm:g} mm"
            )

    def spectrum(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Energies in keV and their shares :math:`w_E` of the signal in air."""
        kev = np.arange(20.5, self.kvp, 1.0)
        share = (self.kvp - kev) * np.exp(-ALUMINIUM.attenuation(kev) * self.filter_mm)
        return kev, share / share.sum()

    def measured(self, lines: Mapping[Material, Tensor]) -> Tensor:
        """The polychromatic p for line integrals of each material at 60 keV; float64."""
        kev, share = self.spectrum()
        ratios = {m: m.attenuation(kev) / m.attenuation(REFERENCE_KEV) for m in lines}
        total: Tensor | None = None
        for k, w in enumerate(share):
            path = torch.stack([float(ratios[m][k]) * line for m, line in lines.items()])
            part = float(np.log(w)) - path.double().sum(dim=0)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return -total

    def water_corrected(self, data: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Data as if water had been seen at 60 keV, and their std; what a scanner applies.

        Args:
            data: measured p.
            std: its standard deviation.
        """
        line = torch.linspace(-2.0, 30.0, 3201, dtype=torch.float64)
        measured = self.measured({WATER: line})
        x, y = measured.numpy(), line.numpy()
        flat = data.double().cpu().numpy()
        slope = np.interp(flat, (x[1:] + x[:-1]) / 2, np.diff(y) / np.diff(x))
        corrected = torch.from_numpy(np.interp(flat, x, y))
        return corrected.to(data), std * torch.from_numpy(slope).to(std)


def split(
    hu: NDArray[np.float32], metal: NDArray[np.bool_] | None, mu_water: float
) -> dict[Material, NDArray[np.float32]]:
    """Attenuation at 60 keV of each material in a slice, 1/mm; their sum is the slice.

    Up to water a pixel is water of less density, from there to cortical bone a mixture, above it
    denser bone; metal is titanium wherever the mask says so.

    Args:
        hu: slices in HU.
        metal: mask of their shape, or None.
        mu_water: attenuation of water in 1/mm.
    """
    bone_mu = mu_water * float(BONE.attenuation(60.0) / WATER.attenuation(60.0))
    bone_hu = float(mu_to_hu(np.asarray(bone_mu), mu_water))
    mu = np.asarray(hu_to_mu(hu, mu_water), dtype=np.float32)
    share = np.clip(hu / bone_hu, 0.0, 1.0)
    bone = np.where(hu > bone_hu, mu, share * np.float32(bone_mu))
    if metal is not None:
        bone = np.where(metal, 0.0, bone)
        mu = np.where(metal, 0.0, mu)
    parts = {WATER: (mu - bone).astype(np.float32), BONE: bone.astype(np.float32)}
    if metal is not None:
        titanium = mu_water * float(TITANIUM.attenuation(60.0) / WATER.attenuation(60.0))
        parts[TITANIUM] = metal * np.float32(titanium)
    return parts


def implants(
    hu: Slices,
    pixel_mm: float,
    count: int = 2,
    radius_mm: float = 5.0,
    seed: int = 0,
) -> NDArray[np.bool_]:
    """Round metal rods along z, at places drawn where all slices show tissue or bone.

    Args:
        hu: slices ``(Z, Y, X)`` in HU.
        pixel_mm: pixel size.
        count: number of rods.
        radius_mm: their radius.
        seed: seed of the places.

    Returns:
        Mask of the shape of ``hu``, the same in every slice.

    Raises:
        InputError: no place for that many rods of this size.
    """
    solid = reduce(np.logical_and, (image > -300.0 for image in hu))
    room = ndimage.distance_transform_edt(solid) * pixel_mm > radius_mm
    rng = np.random.default_rng([seed, count])
    y, x = np.mgrid[: hu.shape[1], : hu.shape[2]]
    metal = np.zeros(hu.shape[1:], dtype=np.bool_)
    for _ in range(count):
        places = np.flatnonzero(room)
        if places.size == 0:
            raise InputError(
                f"the slices have no room in tissue for {count} metal rods of {radius_mm:g} mm "
                f"radius; ask for fewer, or for slices of one region"
            )
        v, u = np.divmod(rng.choice(places), hu.shape[2])
        distance = np.hypot(y - v, x - u) * pixel_mm
        metal |= distance <= radius_mm
        room &= distance > 4 * radius_mm
    return np.broadcast_to(metal, hu.shape)
