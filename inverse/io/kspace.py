r"""Cartesian k-space as scanners export it, and the measurement that it makes.

Every reader of raw MRI ends here: data on the grid of the image, one sampling mask, the noise
of the receivers, and the geometry.  One coil gives :math:`y = M F x`, several give
:math:`y_c = M F S_c x` with sensitivities from the fully sampled centre.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.errors import GeometryError, InputError
from inverse.io.dicom_frame import PatientFrame
from inverse.io.measurement_file import MeasurementFile
from inverse.measurement import Measurement
from inverse.operators.coils import espirit, mix_coils, noise_level, whitening_matrix
from inverse.operators.linop import LinearOperator
from inverse.operators.mri import CartesianMRI, Sense

__all__ = ["KSpace", "crop_readout"]


@dataclass(frozen=True)
class KSpace:
    r"""Cartesian k-space of a stack of slices.

    Attributes:
        data: ``(slices, coils, H, W)`` complex64, centred and orthonormal (zero frequency at
            (H // 2, W // 2)), readout along H, phase encoding along W; 0 where not measured.
        mask: ``(H, W)`` bool, true where measured; the same for all slices and coils.
        pixel_mm: (row, column) size of the image's pixels in mm.
        z_mm: position of each slice in mm, or empty.
        covariance: noise covariance of the coils, :math:`\Psi = \tfrac12 E\,n n^H`,
            ``(coils, coils)`` complex128, or None where no noise was measured.
        calibration: k-space of separate calibration lines, shape of ``data``, or None.
        frame: where the slices lie in the patient, or None.
        provenance: plain JSON values, no patient data.
    """

    data: NDArray[np.complex64]
    mask: NDArray[np.bool_]
    pixel_mm: tuple[float, float]
    z_mm: tuple[float, ...] = ()
    covariance: NDArray[np.complex128] | None = None
    calibration: NDArray[np.complex64] | None = None
    frame: PatientFrame | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data.ndim != 4 or 0 in self.data.shape or self.data.shape[2:] != self.mask.shape:
            raise GeometryError(
                f"k-space must be (slices, coils, H, W) with a mask (H, W), got {self.data.shape} "
                f"and {self.mask.shape}"
            )
        if not self.mask.any():
            raise InputError("no k-space sample is measured; is the file complete?")
        if not np.isfinite(self.data).all():
            raise InputError("k-space holds NaN or infinite values; export it again")
        if not all(math.isfinite(v) and v > 0 for v in self.pixel_mm):
            raise InputError(f"pixel sizes must be positive lengths in mm, got {self.pixel_mm}")

    @property
    def coils(self) -> int:
        """Number of receiver coils."""
        return int(self.data.shape[1])

    def take(self, chosen: Sequence[int]) -> KSpace:
        """Some of the slices, by their numbers."""
        chosen = list(chosen)
        return replace(
            self,
            data=self.data[chosen],
            z_mm=tuple(self.z_mm[k] for k in chosen) if self.z_mm else (),
            calibration=None if self.calibration is None else self.calibration[chosen],
            frame=None if self.frame is None else self.frame.take(chosen),
            provenance={**self.provenance, "slices": chosen},
        )

    @property
    def label(self) -> str:
        """In words."""
        coils = "1 coil" if self.coils == 1 else f"{self.coils} coils"
        fold = self.mask.size / int(self.mask.sum())
        how = "fully sampled" if fold == 1 else f"{fold:.3g}-fold undersampled"
        return f"{how} MRI, {coils}"

    def whitened(self) -> KSpace:
        """The same scan with independent noise of std 1 in every coil; needs a noise scan.

        Raises:
            InputError: no noise scan, or dead channels.
        """
        if self.covariance is None:
            raise InputError("k-space without a noise scan cannot be prewhitened")
        matrix = whitening_matrix(torch.from_numpy(self.covariance))

        def mix(data: NDArray[np.complex64]) -> NDArray[np.complex64]:
            return mix_coils(matrix, torch.from_numpy(data)).contiguous().numpy()

        return replace(
            self,
            data=mix(self.data),
            calibration=None if self.calibration is None else mix(self.calibration),
            covariance=np.eye(self.coils, dtype=np.complex128),
            provenance={**self.provenance, "prewhitened": True},
        )

    def noise(self) -> tuple[Tensor, str]:
        """Standard deviation a real and imaginary part, ``(coils, 1, 1)``; where it comes from.

        Raises:
            InputError: all samples are zero.
        """
        if self.covariance is not None:
            sigma = torch.from_numpy(np.sqrt(np.diag(self.covariance).real)).float()
            origin = "noise scan"
        else:
            sigma = noise_level(torch.from_numpy(self.data))
            origin = "edge of k-space, an upper bound"
        floor = 1e-4 * float(np.abs(self.data).max())
        if not floor > 0:
            raise InputError("all k-space samples are zero; is the file complete?")
        return sigma.clamp_min(floor)[:, None, None], origin

    def measurement(self) -> MeasurementFile:
        """The measurement: by one coil, or by several with maps calibrated from the data.

        Several coils are prewhitened where a noise scan tells how.

        Raises:
            GeometryError: several coils and a fully sampled centre too small to calibrate.
            InputError: no signal, or dead channels.
        """
        if self.coils > 1 and self.covariance is not None and "prewhitened" not in self.provenance:
            return self.whitened().measurement()
        sigma, noise_from = self.noise()
        mask, data = torch.from_numpy(self.mask), torch.from_numpy(self.data)
        provenance: dict[str, Any] = {**self.provenance, "label": self.label, "noise": noise_from}
        if self.frame is not None:
            provenance["patient_frame"] = self.frame.spec()
        operator: LinearOperator
        if self.coils == 1:
            operator, data, sigma = CartesianMRI(mask), data[:, 0].contiguous(), sigma[0, 0, 0]
        else:
            calibration = data if self.calibration is None else torch.from_numpy(self.calibration)
            found = espirit(calibration)
            operator = Sense(found.maps, mask)
            provenance["coil_maps"] = {
                "method": "ESPIRiT",
                "from": "imaging data" if self.calibration is None else "calibration lines",
                "kernels": list(found.kernels),
            }
        measurement = Measurement(
            operator=operator,
            data=data,
            noise=sigma,
            modality="MR",
            pixel_mm=self.pixel_mm,
            provenance=provenance,
        )
        return MeasurementFile(measurement, z_mm=self.z_mm)


def crop_readout(lines: NDArray[Any], size: int, axis: int = -1) -> NDArray[np.complex64]:
    """Remove readout oversampling: keep the central ``size`` pixels of the field of view.

    The transforms are unitary, so the noise a sample stays what it was.

    Args:
        lines: fully sampled readouts, zero frequency at ``n // 2``.
        size: samples to keep, at most those there are.
        axis: readout axis.
    """
    n = lines.shape[axis]
    if size == n:
        return lines.astype(np.complex64)
    image = np.fft.ifft(np.fft.ifftshift(lines, axis), axis=axis, norm="ortho")
    image = np.fft.fftshift(image, axis)
    start = n // 2 - size // 2
    image = np.take(image, np.arange(start, start + size), axis=axis)
    k = np.fft.fft(np.fft.ifftshift(image, axis), axis=axis, norm="ortho")
    return np.asarray(np.fft.fftshift(k, axis), dtype=np.complex64)
