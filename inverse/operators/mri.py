r"""Cartesian MRI: the centred orthonormal Fourier transform, one coil or several, sampled.

.. math:: y_c = M F S_c\,x, \qquad
    (Fx)_k = \prod_{\mathrm{axes}}\frac{1}{\sqrt n}\sum_j x_j\, e^{-2\pi i\,(j - c)(k - c)/n},
    \quad c = \lfloor n/2\rfloor

Images and k-space are ``complex64`` with the zero frequency at index ``c``, in the plane
``(H, W)`` or in space ``(D, H, W)``.  Line masks keep whole columns: phase encoding runs along
them.  In space any two axes may be phase encoded; the mask repeats along the third, the readout.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from inverse.errors import GeometryError
from inverse.operators.linop import LinearOperator, Solve, _per_sample
from inverse.operators.mask import exact_solve, masked_divide
from inverse.operators.patterns import MaskKind, calibration_centre, cartesian_mask

__all__ = [
    "CartesianMRI",
    "Fourier",
    "MaskKind",
    "Sense",
    "calibration_centre",
    "cartesian_mask",
    "centred_fft",
    "centred_ifft",
]


def centred_fft(x: Tensor, ndim: int = 2) -> Tensor:
    """Centred orthonormal FFT over the last ``ndim`` dimensions."""
    dims = tuple(range(-ndim, 0))
    k = torch.fft.fftn(torch.fft.ifftshift(x, dim=dims), dim=dims, norm="ortho")
    return cast(Tensor, torch.fft.fftshift(k, dim=dims))


def centred_ifft(k: Tensor, ndim: int = 2) -> Tensor:
    """The inverse and adjoint of :func:`centred_fft`."""
    dims = tuple(range(-ndim, 0))
    x = torch.fft.ifftn(torch.fft.ifftshift(k, dim=dims), dim=dims, norm="ortho")
    return cast(Tensor, torch.fft.fftshift(x, dim=dims))


class Fourier(LinearOperator):
    """The centred orthonormal Fourier transform of an image (H, W); unitary."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape, shape, torch.complex64)

    def _forward(self, x: Tensor) -> Tensor:
        return centred_fft(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return centred_ifft(y)

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        r"""Closed form, since :math:`F^H F = I`: :math:`x = b / (1 + \rho)`."""
        return exact_solve(b / (1 + _per_sample(rho, b, 2)), b, 2)


class _Sampled(LinearOperator):
    """What Cartesian operators share: the mask and what it says."""

    mask: Tensor

    def _set_mask(self, mask: Tensor) -> None:
        self.register_buffer("mask", mask.to(torch.bool))

    @property
    def acceleration(self) -> float:
        """Samples of the full grid over measured samples."""
        return self.mask.numel() / int(self.mask.sum())


def _check_mask(name: str, mask: Tensor) -> None:
    if mask.ndim not in (2, 3) or not bool(mask.any()):
        raise GeometryError(
            f"{name}: the k-space mask must be (H, W) or (D, H, W) and keep at least one sample, "
            f"got shape {tuple(mask.shape)} with {int(mask.sum())} samples"
        )


class CartesianMRI(_Sampled):
    """Measured part of k-space by one coil, ``y = M F x``; zeros where nothing was measured.

    Args:
        mask: boolean k-space mask (H, W) or (D, H, W), zero frequency at ``n // 2``.

    Raises:
        GeometryError: a mask of another dimension, or one that keeps nothing.
    """

    def __init__(self, mask: Tensor) -> None:
        _check_mask("CartesianMRI", mask)
        super().__init__(mask.shape, mask.shape, torch.complex64)
        self._set_mask(mask)

    def _forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, centred_fft(x, self.mask.ndim), 0)

    def _adjoint(self, y: Tensor) -> Tensor:
        return centred_ifft(torch.where(self.mask, y, 0), self.mask.ndim)

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        r"""Closed form: :math:`x = F^H (Fb)_k / (m_k + \rho)`; the start's where that is 0/0."""
        n = self.mask.ndim
        weight = self.mask + _per_sample(rho, b, n)
        start = None if x0 is None else centred_fft(x0, n)
        return exact_solve(centred_ifft(masked_divide(centred_fft(b, n), weight, start), n), b, n)

    @property
    def measured(self) -> int:
        """k-space samples that are acquired."""
        return int(self.mask.sum())

    def spec(self) -> dict[str, Any]:
        """Plain JSON values; the mask itself is stored beside them as an array."""
        return {"type": "mri", "shape": list(self.in_shape)}

    def extra_repr(self) -> str:
        """Shape and acceleration, for ``repr``."""
        return f"{' x '.join(map(str, self.in_shape))}, {self.acceleration:.3g}x"


class Sense(_Sampled):
    r"""Measured k-space of several coils, :math:`y_c = M F S_c\,x`.

    The shifts and the scale of the transform are folded into the maps and the mask, once: with
    :math:`u_j = e^{2\pi i c j/n}` along each axis,
    :math:`F = e^{-2\pi i c^2/n}\,\mathrm{diag}(u)\,\mathrm{FFT}\,\mathrm{diag}(u)`, so that an
    application costs its FFTs and one product on either side.

    Args:
        maps: coil sensitivities, complex ``(coils, *shape)``, or one set a slice
            ``(slices, coils, *shape)``, which serves batches of as many slices; see
            :meth:`~inverse.operators.linop.LinearOperator.take`.
        mask: boolean k-space mask (H, W) or (D, H, W), zero frequency at ``n // 2``.

    Raises:
        GeometryError: a mask that keeps nothing, or maps that do not fit it or are not finite.

    Source: Pruessmann et al., MRM 42 (1999).
    """

    maps: Tensor
    _turned: Tensor
    _turned_conj: Tensor
    _sampling: Tensor

    def __init__(self, maps: Tensor, mask: Tensor) -> None:
        _check_mask("Sense", mask)
        shape, n = tuple(mask.shape), mask.ndim
        if maps.ndim not in (n + 1, n + 2) or tuple(maps.shape[-n:]) != shape:
            raise GeometryError(
                f"Sense: coil maps must be (coils, *shape) or (slices, coils, *shape) for a mask "
                f"of shape {shape}, got {tuple(maps.shape)}"
            )
        if not bool(torch.isfinite(maps.abs()).all()) or not bool(maps.abs().any()):
            raise GeometryError(
                "Sense: coil maps must be finite and not all zero; calibrate them again, or set "
                "pixels without signal to zero"
            )
        super().__init__(shape, (maps.shape[-1 - n], *shape), torch.complex64)
        self._set_mask(mask)
        self.register_buffer("maps", maps.to(torch.complex64))
        shift = _shift_phase(shape).to(maps.device)
        turned = (maps * shift).to(torch.complex64)
        constant = math.prod(complex(_turn(k // 2 * (k // 2), k).conj()) for k in shape)
        sampling = mask.to(maps.device) * shift * (constant / math.sqrt(math.prod(shape)))
        if not bool(sampling.imag.abs().max() > 1e-9):
            sampling = sampling.real.float()
        # `maps` and `mask` are the operator; these follow from them, one a batch element or 1
        turned = turned.reshape(-1, *self.out_shape)
        self.register_buffer("_turned", turned, persistent=False)
        self.register_buffer("_turned_conj", turned.conj().resolve_conj(), persistent=False)
        self.register_buffer("_sampling", sampling.to(_single(sampling)), persistent=False)
        self._axes = tuple(range(-n, 0))

    @property
    def support(self) -> Tensor:
        """Pixels that a coil sees, boolean ``(*shape)`` or ``(slices, *shape)``."""
        return self.maps.abs().sum(dim=-1 - self.mask.ndim) > 0

    def _forward(self, x: Tensor) -> Tensor:
        n = self.mask.ndim
        batch = torch.broadcast_shapes(x.shape[:-n], self.maps.shape[: -n - 1])
        images = x.expand(*batch, *self.in_shape).reshape(-1, *self.in_shape)
        out = images.new_empty(len(images), *self.out_shape)
        for part in _parts(images):
            # the result holds the coils' images first: one buffer less to fetch
            here = out[part]
            torch.mul(_of(self._turned, part), images[part].unsqueeze(-1 - n), out=here)
            torch.mul(torch.fft.fftn(here, dim=self._axes), self._sampling, out=here)
        return out.reshape(*batch, *self.out_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        n = self.mask.ndim
        batch = torch.broadcast_shapes(y.shape[: -n - 1], self.maps.shape[: -n - 1])
        data = y.expand(*batch, *self.out_shape).reshape(-1, *self.out_shape)
        out = data.new_empty(len(data), *self.in_shape)
        for part in _parts(data):
            weighted = data[part] * self._sampling.conj()
            seen = torch.fft.ifftn(weighted, dim=self._axes, norm="forward")
            torch.sum(seen.mul_(_of(self._turned_conj, part)), dim=-1 - n, out=out[part])
        return out.reshape(*batch, *self.in_shape)

    def take(self, index: Tensor) -> LinearOperator:
        """With the maps of the slices ``index``, where there is one set a slice."""
        if self.maps.ndim < self.mask.ndim + 2 or self.maps.shape[0] == 1:
            return self
        return Sense(self.maps[index], self.mask)

    @property
    def coils(self) -> int:
        """Number of coils."""
        return self.out_shape[0]

    @property
    def measured(self) -> int:
        """k-space samples that are acquired, of all coils."""
        return self.coils * int(self.mask.sum())

    def spec(self) -> dict[str, Any]:
        """Plain JSON values; mask and maps are stored beside them as arrays."""
        return {"type": "sense", "shape": list(self.in_shape), "coils": self.coils}

    def extra_repr(self) -> str:
        """Coils, shape and acceleration, for ``repr``."""
        size = " x ".join(map(str, self.in_shape))
        return f"{self.coils} coils, {size}, {self.acceleration:.3g}x"


def _parts(batch: Tensor) -> list[slice]:
    """Parts of a batch to work on: on the CPU one element, whose coils stay in the cache."""
    step = 1 if batch.device.type == "cpu" else max(1, len(batch))
    return [slice(k, k + step) for k in range(0, len(batch), step)]


def _of(maps: Tensor, part: slice) -> Tensor:
    """The maps of a part of a batch; sets of maps repeat where there are fewer."""
    if len(maps) == 1:
        return maps
    first, count = part.start % len(maps), part.stop - part.start
    if first + count > len(maps):
        return maps.repeat(count // len(maps), *[1] * (maps.ndim - 1))
    return maps[first : first + count]


def _turn(j: Tensor | int, n: int) -> Tensor:
    r""":math:`e^{2\pi i j/n}` in complex128; exact on multiples of a quarter turn."""
    j = torch.as_tensor(j) % n
    angle = 2 * math.pi * j.double() / n
    turn = torch.polar(torch.ones_like(angle), angle)
    return torch.where(4 * j % n == 0, torch.complex(turn.real.round(), turn.imag.round()), turn)


def _shift_phase(shape: tuple[int, ...]) -> Tensor:
    r""":math:`\prod u_j`, :math:`u_j = e^{2\pi i c j/n}` an axis; plus and minus 1 for even n."""
    out = torch.ones((), dtype=torch.complex128)
    for axis, n in enumerate(shape):
        u = _turn(n // 2 * torch.arange(n), n)
        out = out * u.reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return out


def _single(x: Tensor) -> torch.dtype:
    return torch.complex64 if x.is_complex() else torch.float32
