r"""A measurement: operator, data and noise; the one thing that physics hands to every solver.

.. math:: y = A x + n, \qquad n \sim N(0, \mathrm{diag}(\sigma_y^2))

``x`` is in physical units: linear attenuation in 1/mm for CT, signal for MRI.  Complex data have
noise of standard deviation ``noise`` in the real and in the imaginary part each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from inverse.errors import GeometryError, InputError
from inverse.operators.linop import LinearOperator
from inverse.operators.noise import TransmissionPoisson
from inverse.volumes import SLAB

__all__ = ["CHI2_HIGH", "Measurement"]

CHI2_HIGH = 2.0
"""Reduced chi-square of a residual above which the data are not fitted to their noise."""

Modality: TypeAlias = Literal["CT", "MR"]


@dataclass(frozen=True)
class Measurement:
    """Data of a stack of slices, or of volumes, measured by one operator.

    Attributes:
        operator: forward operator on one slice, or on one volume, in physical units.
        data: measured values, ``(slices, *operator.out_shape)``; volumes count as one each.
            An array is taken, too, and put into the precision of the operator.
        noise: standard deviation, a number, or a map that broadcasts against ``data``.
        modality: ``"CT"`` (attenuation, 1/mm) or ``"MR"`` (signal, arbitrary units).
        pixel_mm: (row, column) spacing of the image grid in mm.
        mu_water: attenuation of water in 1/mm at the scan's energy; fixes HU for CT.
        provenance: how the data came about; plain JSON values, no patient data.
        counts: readings before the logarithm and their likelihood, of the shape of ``data``,
            for CT where they are known; what line integrals cannot say of starved rays.

    Raises:
        GeometryError: data whose shape is not ``(slices, *out_shape)``, counts that do not fit
            them, or impossible pixels.
        InputError: data that are not finite, or complex where the operator is real or the
            reverse; a noise that is not positive or does not fit the data; an unknown modality;
            CT without mu_water.

    Here: docs/theory.md, equation (23).
    """

    operator: LinearOperator
    data: Tensor
    noise: Tensor
    modality: Modality
    pixel_mm: tuple[float, float]
    mu_water: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    counts: TransmissionPoisson | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.operator, LinearOperator):
            raise InputError(
                f"a measurement needs a LinearOperator, got a {type(self.operator).__name__}"
            )
        data = self._fitting(torch.as_tensor(self.data))
        noise = self._positive(torch.as_tensor(self.noise, device=data.device), data)
        if self.counts is not None and self.counts.counts.shape != data.shape:
            raise GeometryError(
                f"photon counts must have the shape of the data, {tuple(data.shape)}, got "
                f"{tuple(self.counts.counts.shape)}"
            )
        if self.modality not in get_args(Modality):
            raise InputError(f"modality must be 'CT' or 'MR', got {self.modality!r}")
        if self.modality == "CT" and not _is_length(self.mu_water):
            raise InputError(
                f"a CT measurement needs mu_water in 1/mm (0.0206 at 60 keV), got {self.mu_water}"
            )
        pixel = self.pixel_mm
        if not (isinstance(pixel, Sequence) and len(pixel) == 2 and all(map(_is_length, pixel))):
            raise GeometryError(
                f"pixel_mm must be two positive numbers, the (row, column) spacing, got {pixel!r}"
            )
        for name, value in (("data", data), ("noise", noise), ("pixel_mm", tuple(pixel))):
            object.__setattr__(self, name, value)

    def _fitting(self, data: Tensor) -> Tensor:
        """Data in the operator's precision, their shape, kind and values checked."""
        shape, dtype = self.operator.out_shape, self.operator.out_dtype
        if data.ndim != len(shape) + 1 or tuple(data.shape[1:]) != shape:
            raise GeometryError(
                f"measurement data must have shape (slices, {', '.join(map(str, shape))}) for "
                f"{self.operator!r}, got {tuple(data.shape)}"
            )
        if data.is_complex() != dtype.is_complex or not (
            data.is_complex() or data.is_floating_point()
        ):
            raise InputError(
                f"measurement data must be {'complex' if dtype.is_complex else 'real'} floating-"
                f"point numbers, as {self.operator!r} gives them, got {data.dtype}"
            )
        real = torch.view_as_real(data) if data.is_complex() else data
        if not all(bool(torch.isfinite(few).all()) for few in real.split(SLAB)):
            raise InputError(
                "measurement data hold NaN or infinite values; remove or mask those samples"
            )
        return data.to(dtype)

    @staticmethod
    def _positive(noise: Tensor, data: Tensor) -> Tensor:
        """The noise in the data's precision, its values and shape checked."""
        if noise.is_complex() or not bool((torch.isfinite(noise) & (noise > 0)).all()):
            raise InputError(
                "the noise standard deviation must be positive and finite; for noise-free data "
                "give a small one, such as 1e-4 of the data's range"
            )
        padded = (1,) * (data.ndim - noise.ndim) + tuple(noise.shape)
        if noise.ndim > data.ndim or any(
            n not in (1, m) for n, m in zip(padded, data.shape, strict=True)
        ):
            each = (len(data), *(1,) * (data.ndim - 1))
            raise InputError(
                f"the noise must be a number or broadcast against data {tuple(data.shape)}, got "
                f"shape {tuple(noise.shape)}; one value a slice has shape {each}"
            )
        return noise.to(data.real.dtype)

    def __repr__(self) -> str:
        noise = f"{float(self.noise):.3g}" if self.noise.ndim == 0 else tuple(self.noise.shape)
        return (
            f"Measurement({self.modality}, data {tuple(self.data.shape)} {self.data.dtype}, "
            f"noise {noise}, pixel_mm {self.pixel_mm}, {self.operator!r})"
        )

    def __len__(self) -> int:
        return int(self.data.shape[0])

    @property
    def slices(self) -> int:
        """How many slices the images have: its length, or those of all its volumes."""
        shape = self.operator.in_shape
        return len(self) * (shape[0] if len(shape) == 3 else 1)

    def take(self, index: Tensor) -> Measurement:
        """The measurement of the slices ``index`` (repeats allowed), as for a batch of samples."""
        noise = self.noise
        if noise.ndim == self.data.ndim and noise.shape[0] == len(self) and len(self) > 1:
            noise = noise[index]
        counts = self.counts
        if counts is not None:
            counts = replace(counts, counts=counts.counts[index])
        return replace(
            self,
            operator=self.operator.take(index),
            data=self.data[index],
            noise=noise,
            counts=counts,
        )

    def parts(self) -> Iterator[Measurement]:
        """The measurements of a few slices at a time, for work whose memory they would set."""
        return map(self.take, torch.arange(len(self), device=self.data.device).split(SLAB))

    def to(self, device: torch.device | str) -> Measurement:
        """The same measurement on another device; this one, its operator included, stays."""
        if self.data.device == torch.device(device):
            return self
        counts = self.counts
        if counts is not None:
            counts = replace(counts, counts=counts.counts.to(device))
        return replace(
            self,
            operator=copy.deepcopy(self.operator).to(device),
            data=self.data.to(device),
            noise=self.noise.to(device),
            counts=counts,
        )

    def rescaled(self, offset: float, scale: float) -> Measurement:
        r"""The measurement of ``u`` where ``x = offset + scale u``; data *and* noise change.

        .. math:: A u + n/s = (y - A\,o\mathbf 1)/s

        This is the one place where physical units become prior units.
        """
        constant = torch.full(
            self.operator.in_shape, offset, dtype=self.operator.dtype, device=self.data.device
        )
        data = self.data - self.operator(constant)
        data /= scale
        return replace(self, data=data, noise=self.noise / abs(scale), counts=None)

    def whitened(self) -> Measurement:
        r"""The equivalent measurement with unit noise: :math:`A \to A/\sigma_y`, likewise y.

        A noise map a slice becomes part of the operator: :meth:`take` slices first.
        """
        weight = 1.0 / self.noise
        return replace(
            self,
            operator=self.operator.weighted(weight),
            data=self.data * weight,
            noise=torch.ones((), device=self.data.device),
            counts=None,
        )

    def chi2(self, x: Tensor) -> Tensor:
        r"""Reduced residual :math:`\|(y - Ax)/\sigma_y\|^2 / m` a slice, shape ``(slices,)``.

        About 1 for a posterior sample; far below 1 means fitted noise, far above 1 means data
        that were not used (METHODS of data consistency: chi-square of ``m`` real samples).

        Here: docs/theory.md, equation (33).
        """
        residual = (self.data - self.operator(x)) / self.noise
        m = self.operator.measured * (2 if residual.is_complex() else 1)
        return residual.abs().square().flatten(1).sum(dim=1) / m


def _is_length(value: object) -> bool:
    """Whether a value is a positive finite number."""
    return isinstance(value, Real) and 0 < float(value) < math.inf
