r"""Classical MRI reconstructions: root-sum-of-squares, CG-SENSE and L1-wavelet.

.. math:: \min_x\; \tfrac12\|A x - y\|^2 + w\,\sigma\,\|D W x\|_1

with W the orthonormal wavelet transform of Daubechies with two vanishing moments, D all but its
coarsest coefficients, and the RMS noise std :math:`\sigma`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from inverse.classical.linear import cgls
from inverse.errors import InputError, NumericalError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.linop import ComplexFromReal
from inverse.operators.mri import CartesianMRI, Sense, centred_ifft
from inverse.operators.phase import estimated_phase

__all__ = ["L1_WEIGHT", "cg_sense", "l1_wavelet", "phased", "root_sum_of_squares"]

L1_WEIGHT = 0.2
"""Default weight in units of the noise std: within 15 % of the least error on brain T1 phantoms at
noise 0.3 to 3 % of the signal, 4- and 8-fold undersampled, one coil and eight."""

_LEVELS = 4
_SCALING = tuple(
    (a + b * math.sqrt(3.0)) / (4 * math.sqrt(2.0)) for a, b in ((1, 1), (3, 1), (3, -1), (1, -1))
)
_WAVELET = tuple((-1) ** k * h for k, h in enumerate(reversed(_SCALING)))


def root_sum_of_squares(measurement: Measurement) -> Tensor:
    r""":math:`\sqrt{\sum_c |F^H y_c|^2}`: what needs no maps, and has no phase.

    Returns:
        ``(slices, *shape)``, real, in physical units for maps of unit root-sum-of-squares.

    Raises:
        UnsupportedError: data that are not Cartesian k-space.

    Source: Roemer et al., MRM 16 (1990).
    """
    op = measurement.operator
    if not isinstance(op, CartesianMRI | Sense):
        raise UnsupportedError(
            f"root_sum_of_squares needs Cartesian k-space, got {op!r}; use cg_sense or l1_wavelet"
        )
    magnitude = centred_ifft(measurement.data, op.mask.ndim).abs()
    if isinstance(op, CartesianMRI):
        return magnitude
    return torch.linalg.vector_norm(magnitude, dim=1)


def cg_sense(measurement: Measurement, iterations: int = 30, discrepancy: float = 1.0) -> Tensor:
    """Least squares on the coils' data by conjugate gradients, stopped at the noise.

    See :func:`inverse.classical.cgls`, of which this is the usual name where the operator is
    :class:`~inverse.operators.mri.Sense`; any operator on complex images will do.

    Returns:
        Complex ``(slices, *shape)``.

    Source: Pruessmann et al., MRM 46 (2001).
    """
    return cgls(measurement, iterations, discrepancy)


def l1_wavelet(
    measurement: Measurement, weight: float = L1_WEIGHT, *, iterations: int = 60
) -> Tensor:
    r"""Wavelet-sparse least squares by FISTA; see the module's equation.

    Where :math:`\|A\| = 1`, as for Cartesian MRI, each step shrinks the wavelet coefficients by
    :math:`w\sigma`.  The grid is shifted at random before each shrinkage (from a fixed seed),
    which averages over the transform's blocks.  Prewhiten coils of unequal noise first.

    Args:
        measurement: the data, with their noise std; two-dimensional images.
        weight: w.
        iterations: steps; the objective is within 3 % of its limit after 60.

    Returns:
        ``(slices, H, W)``, complex where the operator's images are.

    Raises:
        InputError: a weight that is not positive.
        UnsupportedError: images that are not two-dimensional.
        NumericalError: if an iterate is not finite.

    Source: Lustig, Donoho and Pauly, MRM 58 (2007); Beck and Teboulle, SIAM J. Imaging Sci. 2
    (2009) for FISTA; Daubechies, Comm. Pure Appl. Math. 41 (1988) for W.
    """
    op = measurement.operator
    if len(op.in_shape) != 2:
        raise UnsupportedError(
            f"l1_wavelet serves two-dimensional images, got {op!r}; pass the slices one by one"
        )
    if not (weight > 0 and math.isfinite(weight)):
        raise InputError(f"l1_wavelet needs a positive weight, got {weight}")
    device = measurement.data.device
    each = [
        _fista(measurement.take(torch.tensor([k], device=device)), weight, iterations)
        for k in range(len(measurement))
    ]
    return torch.cat(each)


def phased(solve: Callable[[Measurement], Tensor]) -> Callable[[Measurement], Tensor]:
    r"""A solver that knows complex images up to their size: :math:`x = e^{i\varphi} m`, m real.

    The phase is estimated at low resolution, as for a prior of real images.  It halves the
    unknowns: of an image without phase each sample of k-space tells the one opposite, too.
    So a baseline beside such a prior should have it.  Real images are solved as they are.

    Args:
        solve: a solver for real images, such as :func:`l1_wavelet`.

    Source: Noll, Nishimura and Macovski, IEEE Trans. Med. Imaging 10 (1991).
    """

    def with_phase(measurement: Measurement) -> Tensor:
        op = measurement.operator
        if not op.dtype.is_complex:
            return solve(measurement)
        image = estimated_phase(op, measurement.data) @ ComplexFromReal(op.in_shape)
        return image(solve(replace(measurement, operator=op @ image)))

    return with_phase


def _fista(measurement: Measurement, weight: float, iterations: int) -> Tensor:
    """One slice, on a grid padded with zeros to whole blocks of the coarsest level."""
    a = measurement.operator
    normal, back = a.normal, a.adjoint(measurement.data)
    step = 1.0 / (1.05 * normal.norm())
    threshold = step * weight * float(measurement.noise.square().mean().sqrt())
    h, w = a.in_shape
    block = 2**_LEVELS
    pad = (0, -w % block, 0, -h % block)
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.pad(torch.zeros_like(back), pad)
    z, t = x, 1.0
    for _ in range(iterations):
        gradient = normal(z[:, :h, :w]) - back
        v = z - step * torch.nn.functional.pad(gradient, pad)
        shift = torch.randint(block, (2,), generator=generator).tolist()
        new = shrink(v.roll(shift, (-2, -1)), threshold).roll([-s for s in shift], (-2, -1))
        t_new = (1 + math.sqrt(1 + 4 * t**2)) / 2
        z = new + ((t - 1) / t_new) * (new - x)
        x, t = new, t_new
    if not bool(torch.isfinite(x.abs()).all()):
        raise NumericalError(
            "l1_wavelet left the finite numbers; check the data for NaN or infinite values"
        )
    return x[:, :h, :w]


def shrink(x: Tensor, threshold: float) -> Tensor:
    """The proximal map of ``threshold ||D W x||_1``; H and W multiples of a block."""
    c = wavelet(x, _LEVELS)
    h, w = (n >> _LEVELS for n in x.shape[-2:])
    coarse = c[..., :h, :w].clone()
    c = c * (1 - threshold / c.abs().clamp_min(threshold))
    c[..., :h, :w] = coarse
    return inverse_wavelet(c, _LEVELS)


def wavelet(x: Tensor, levels: int) -> Tensor:
    """Orthonormal periodic wavelet transform of the last two axes; coarse part first.

    Args:
        x: ``(..., H, W)``, H and W multiples of ``2**levels``.
        levels: how often the coarse part is split.
    """
    c = x.clone()
    h, w = x.shape[-2:]
    for level in range(levels):
        part = c[..., : h >> level, : w >> level]
        part.copy_(_split(_split(part).transpose(-2, -1)).transpose(-2, -1))
    return c


def inverse_wavelet(c: Tensor, levels: int) -> Tensor:
    """The inverse and adjoint of :func:`wavelet`."""
    x = c.clone()
    h, w = c.shape[-2:]
    for level in reversed(range(levels)):
        part = x[..., : h >> level, : w >> level]
        part.copy_(_merge(_merge(part.transpose(-2, -1)).transpose(-2, -1)))
    return x


def _split(x: Tensor) -> Tensor:
    r"""``[low, high]`` along the last axis: :math:`l_n = \sum_k h_k x_{2n + k}`, likewise high."""
    phase = (x[..., 0::2], x[..., 1::2])
    taps = [phase[k % 2].roll(-(k // 2), -1) for k in range(len(_SCALING))]
    low, high = (
        torch.stack([f * t for f, t in zip(filter_, taps, strict=True)]).sum(dim=0)
        for filter_ in (_SCALING, _WAVELET)
    )
    return torch.cat([low, high], dim=-1)


def _merge(c: Tensor) -> Tensor:
    r"""The adjoint of :func:`_split`."""
    low, high = c.chunk(2, dim=-1)
    taps = [
        (h * low + g * high).roll(k // 2, -1)
        for k, (h, g) in enumerate(zip(_SCALING, _WAVELET, strict=True))
    ]
    return torch.stack([taps[0] + taps[2], taps[1] + taps[3]], dim=-1).flatten(-2)
