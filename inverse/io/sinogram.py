r"""Line integrals as scanners export them, and the measurement that they make.

Every reader of raw CT ends here: log-projections of a stack of slices with the geometry that
measured them.  Where the file tells the number of photons N of a reading, its noise is
:math:`\sigma^2 = 1/N` (Poisson counts through the logarithm); elsewhere it is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inverse.errors import GeometryError, InputError
from inverse.io.measurement_file import MeasurementFile
from inverse.measurement import Measurement
from inverse.operators.ct import FanBeam, ParallelBeam, RayTransform

__all__ = ["MU_WATER", "Sinogram", "view_noise"]

MU_WATER = 0.0206
"""Attenuation of water at 60 keV in 1/mm, where a file names none."""


@dataclass(frozen=True)
class Sinogram:
    """Line integrals of a stack of slices.

    Attributes:
        data: ``(slices, views, bins)`` float32, no unit.
        geometry: views and detector.
        photons: photons behind each reading, broadcasts against ``data``, or None.
        mu_water: attenuation of water in 1/mm at the scan's energy, or None.
        z_mm: position of each slice in mm, or empty.
        provenance: plain JSON values, no patient data.
    """

    data: NDArray[np.float32]
    geometry: ParallelBeam | FanBeam
    photons: NDArray[np.float32] | None = None
    mu_water: float | None = None
    z_mm: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.geometry.data_shape
        if self.data.ndim != 3 or self.data.shape[1:] != shape or not len(self.data):
            raise GeometryError(
                f"line integrals of {self.geometry!r} must be (slices, {shape[0]}, {shape[1]}), "
                f"got {self.data.shape}"
            )
        if not np.isfinite(self.data).all():
            raise InputError("line integrals hold NaN or infinite values; mask those readings")

    def take(self, chosen: Sequence[int]) -> Sinogram:
        """Some of the slices, by their numbers."""
        chosen = list(chosen)
        photons = self.photons
        if photons is not None and photons.ndim == 3 and len(photons) == len(self.data):
            photons = photons[chosen]
        return replace(
            self,
            data=self.data[chosen],
            photons=photons,
            z_mm=tuple(self.z_mm[k] for k in chosen) if self.z_mm else (),
            provenance={**self.provenance, "slices": chosen},
        )

    @property
    def label(self) -> str:
        """In words."""
        beam = "fan" if isinstance(self.geometry, FanBeam) else "parallel"
        return f"{self.geometry.views}-view {beam}-beam CT"

    def noise(self) -> tuple[NDArray[np.float32], str]:
        """Standard deviation that broadcasts against the data, and where it comes from."""
        if self.photons is not None and bool((self.photons > 0).all()):
            return np.asarray(1 / np.sqrt(self.photons), np.float32), "photon statistics"
        return np.array(view_noise(self.data), np.float32), "differences of neighbouring views"

    def measurement(
        self, matrix: int = 256, pixel_mm: float | None = None, mu_water: float | None = None
    ) -> MeasurementFile:
        """The measurement on a square image grid about the rotation axis.

        Args:
            matrix: rows and columns of the grid.
            pixel_mm: pixel size; default: the grid spans the disc that every view sees.
            mu_water: attenuation of water in 1/mm; default the file's, else that at 60 keV.

        Raises:
            GeometryError: a grid that the source would be inside of.
        """
        pixel = 2 * self.geometry.radius_mm / matrix if pixel_mm is None else pixel_mm
        sigma, origin = self.noise()
        water = mu_water or self.mu_water or MU_WATER
        measurement = Measurement(
            operator=RayTransform(self.geometry, (matrix, matrix), pixel),
            data=torch.from_numpy(self.data),
            noise=torch.as_tensor(sigma),
            modality="CT",
            pixel_mm=(pixel, pixel),
            mu_water=water,
            provenance={
                **self.provenance,
                "label": self.label,
                "noise": origin,
                "mu_water_known": bool(mu_water or self.mu_water),
            },
        )
        return MeasurementFile(measurement, z_mm=self.z_mm)


def view_noise(data: NDArray[np.float32]) -> float:
    r"""Noise of line integrals from second differences over neighbouring views.

    .. math:: \hat\sigma = \mathrm{median}\,|p_{v-1} - 2p_v + p_{v+1}| / (0.6745\sqrt 6)

    Args:
        data: ``(slices, views, bins)``, views in the order of their angles.

    Returns:
        Standard deviation; 1e-4 of the largest value at least.
    """
    top = float(np.abs(data).max())
    if not top > 0:
        raise InputError("all line integrals are zero; is the file complete?")
    if data.shape[1] < 3:
        return 1e-2 * top
    second = data[:, :-2] - 2 * data[:, 1:-1] + data[:, 2:]
    return max(float(np.median(np.abs(second))) / (0.6745 * math.sqrt(6)), 1e-4 * top)
