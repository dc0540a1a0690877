r"""Receive coils: noise prewhitening, compression and ESPIRiT sensitivities.

k-space of several coils is ``(..., coils, H, W)``, complex, zero frequency at ``n // 2``, with
zeros where nothing was measured.  Noise of covariance :math:`\Psi` is
:math:`\Psi = \tfrac12\mathrm E\,n n^H`: the covariance of the real (and of the imaginary) parts,
as everywhere in this toolkit, so that whitened data have noise std 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inverse.errors import GeometryError, InputError
from inverse.operators.mri import centred_ifft
from inverse.operators.patterns import calibration_centre, central_box

__all__ = [
    "Sensitivities",
    "combine_coils",
    "compression_matrix",
    "espirit",
    "espirit_volume",
    "mix_coils",
    "noise_covariance",
    "noise_level",
    "whitening_matrix",
]

_SMALLEST = 1e-6  # a noise variance below this share of the largest is a dead channel
_EMPTY = 1e-4  # sections of a volume below this share of the largest energy show no object


# --- channels: noise and compression -----------------------------------------------------------


def noise_covariance(noise: Tensor) -> Tensor:
    r""":math:`\Psi_{cd} = \frac{1}{2N}\sum_i n_{ci}\bar n_{di}` of a noise scan.

    Args:
        noise: samples without signal, complex ``(coils, *samples)``.

    Returns:
        Complex128 ``(coils, coils)``.

    Raises:
        InputError: fewer samples than would fix the covariance, or values that are not finite.
    """
    n = noise.flatten(1).to(torch.complex128)
    coils, samples = n.shape
    if samples < 2 * coils:
        raise InputError(
            f"a noise scan of {coils} coils needs at least {2 * coils} samples, got {samples}; "
            f"acquire more, or use noise_level on the edge of the data"
        )
    if not bool(torch.isfinite(torch.view_as_real(n)).all()):
        raise InputError("the noise scan holds NaN or infinite values; remove those samples")
    return n @ n.mH / (2 * samples)


def whitening_matrix(covariance: Tensor) -> Tensor:
    r""":math:`L^{-1}` of the Cholesky factor :math:`\Psi = L L^H`; whitens data of covariance Psi.

    Apply it with :func:`mix_coils` to all data, calibration included; the noise std is then 1.

    Args:
        covariance: :math:`\Psi`, ``(coils, coils)``, from :func:`noise_covariance`.

    Raises:
        InputError: a covariance that is not positive definite, as a dead channel makes it.

    Source: Pruessmann et al., MRM 46 (2001), appendix A.
    """
    psi = covariance.to(torch.complex128)
    values = torch.linalg.eigvalsh(psi)
    if not float(values[0]) > _SMALLEST * float(values[-1]):
        raise InputError(
            f"the noise covariance is not positive definite (eigenvalues {float(values[0]):.3g} "
            f"to {float(values[-1]):.3g}); drop dead or duplicate channels, or compress the coils"
        )
    eye = torch.eye(len(psi), dtype=psi.dtype, device=psi.device)
    factor = torch.linalg.cholesky(psi)
    return torch.linalg.solve_triangular(factor, eye, upper=False)


def compression_matrix(kspace: Tensor, coils: int) -> Tensor:
    r"""Orthonormal rows that keep most energy: the first left singular vectors of the data.

    Prewhiten first: orthonormal rows leave white noise white.

    Args:
        kspace: complex ``(coils, *samples)``, e.g. the calibration centre.
        coils: virtual coils to keep.

    Returns:
        Complex128 ``(virtual, coils)``, for :func:`mix_coils`; rows in order of energy.

    Raises:
        GeometryError: a number below 1 or above that of the data.

    Source: Buehrer et al., MRM 57 (2007); Huang et al., Magn. Reson. Imaging 26 (2008).
    """
    data = kspace.flatten(1).to(torch.complex128)
    if not 1 <= coils <= len(data):
        raise GeometryError(f"virtual coils must number 1 to {len(data)}, got {coils}")
    _, vectors = torch.linalg.eigh(data @ data.mH)
    rows = vectors.flip(1)[:, :coils].mH
    # a singular vector's phase is free: its largest entry is made real and positive
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return (rows * torch.sgn(largest).conj()).contiguous()


def mix_coils(matrix: Tensor, data: Tensor, axis: int = -3) -> Tensor:
    """Apply a coil matrix ``(virtual, coils)`` along the coil axis of data or maps."""
    moved = torch.tensordot(matrix.to(data.dtype), data.movedim(axis, 0), dims=1)
    return moved.movedim(0, axis)


def noise_level(kspace: Tensor, share: float = 0.1) -> Tensor:
    r"""Noise std of each coil (of each part of a sample) from the edge of k-space.

    The magnitude of complex noise is Rayleigh distributed, with median
    :math:`\sigma\sqrt{2\ln 2}`; the median of the samples that are farthest from the zero
    frequency ignores the few that hold signal.  What signal is everywhere at the edge counts as
    noise, so this is an upper bound; a noise scan is better.

    Args:
        kspace: complex ``(..., coils, H, W)``; zeros are taken as not measured.
        share: share of the measured samples that count as the edge.

    Returns:
        ``(coils,)`` float32.

    Raises:
        InputError: fewer than 16 measured samples a coil at the edge.
    """
    h, w = kspace.shape[-2:]
    radius = torch.hypot(
        (torch.arange(h) - h // 2)[:, None] / (h / 2), (torch.arange(w) - w // 2) / (w / 2)
    ).to(kspace.device)
    measured = (kspace != 0).reshape(-1, h, w).any(dim=0)
    known = radius[measured]
    count = math.ceil(share * len(known))
    if count * (kspace.numel() // (kspace.shape[-3] * h * w)) < 16:
        raise InputError(
            f"the edge of k-space has {count} measured samples a coil, too few to estimate a "
            f"noise level; raise share, or measure the noise"
        )
    edge = measured & (radius >= known.sort().values[-count])
    samples = kspace.abs().movedim(-3, 0)[..., edge].flatten(1)
    return (samples.median(dim=1).values / math.sqrt(2 * math.log(2))).float()


# --- sensitivities -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivities:
    """Result of :func:`espirit`.

    Attributes:
        maps: ``(slices, coils, H, W)`` or ``(coils, H, W)`` as the data were, complex64; of unit
            root-sum-of-squares inside the object, zero outside.
        eigenvalue: how well the data agree with one set of maps at each pixel, 1 at best; shape
            of the maps without the coils.
        kernels: rank of the calibration matrix that was kept, of each slice.
    """

    maps: Tensor
    eigenvalue: Tensor
    kernels: tuple[int, ...]


def espirit(
    kspace: Tensor,
    *,
    calibration: int = 24,
    kernel: int = 6,
    threshold: float = 0.03,
    crop: float = 0.7,
) -> Sensitivities:
    r"""Coil sensitivities from the fully sampled centre of k-space, as an eigenvalue problem.

    Windows :math:`R_r` of the centre, all coils together, span a space
    :math:`V_\parallel` of low rank.  Ideal data obey, at each pixel q,

    .. math:: \Big(\frac{1}{|k|}\sum_n g_n(q)\,g_n(q)^H\Big)\,s(q) = s(q), \qquad
        g_n(q) = \sum_p v_n(p)\, e^{2\pi i\,p q/N}

    so the sensitivities are the eigenvectors of eigenvalue 1.  The sum is band-limited: it is
    the Fourier transform of the kernels' correlations, whose support is twice the kernel's.

    Each pixel's vector has an arbitrary phase.  It is fixed by making the first principal
    component of the calibration data real and positive there; the image's phase is relative to
    that virtual coil's.

    Args:
        kspace: complex ``(coils, H, W)`` or ``(slices, coils, H, W)``, zeros where not measured.
        calibration: most rows and columns of the centre that are used.
        kernel: side of the windows.
        threshold: singular values below this share of the largest belong to the null space.
        crop: pixels of a smaller eigenvalue lie outside the object and get maps of zero.  From a
            centre of ten lines a crop of 0.8 cuts off the edge of a head.

    Raises:
        GeometryError: a fully sampled centre too small for the kernel.
        InputError: values that are not finite, or no signal.

    Source: Uecker et al., MRM 71 (2014).
    """
    if kspace.ndim == 4:
        each = [
            espirit(k, calibration=calibration, kernel=kernel, threshold=threshold, crop=crop)
            for k in kspace
        ]
        return Sensitivities(
            torch.stack([s.maps for s in each]),
            torch.stack([s.eigenvalue for s in each]),
            tuple(n for s in each for n in s.kernels),
        )
    if kspace.ndim != 3:
        raise GeometryError(
            f"espirit needs k-space (coils, H, W) or (slices, coils, H, W), got shape "
            f"{tuple(kspace.shape)}"
        )
    shape = (kspace.shape[1], kspace.shape[2])
    centre = _calibration_data(kspace, calibration, kernel)
    span, coils = _signal_space(centre, kernel, threshold)
    correlation = _correlation(span.reshape(-1, coils, kernel, kernel))
    maps, eigenvalue = _principal(correlation, shape)
    reference = compression_matrix(centre, 1)[0].to(maps.dtype)
    phase = torch.sgn(torch.einsum("c,chw->hw", reference, maps))
    maps = torch.where(eigenvalue >= crop, maps * phase.conj(), 0)
    return Sensitivities(maps.to(torch.complex64), eigenvalue.float(), (len(span),))


def espirit_volume(kspace: Tensor, **settings: Any) -> Sensitivities:
    """Coil sensitivities of a volume, section by section along the readout.

    The readout, the last axis, is fully sampled, so its inverse transform leaves k-space of the
    other two axes at each position, to which :func:`espirit` applies.  One virtual coil, of all
    sections together, fixes the phase, so that maps are continuous along the readout.

    Args:
        kspace: complex ``(coils, D, H, W)``, zeros where not measured.
        settings: those of :func:`espirit`.

    Returns:
        Maps ``(coils, D, H, W)`` and eigenvalues ``(D, H, W)``.

    Raises:
        GeometryError: another shape, or a fully sampled centre too small for the kernel.
        InputError: values that are not finite, or no signal.
    """
    if kspace.ndim != 4:
        raise GeometryError(
            f"espirit_volume needs k-space (coils, D, H, W), got shape {tuple(kspace.shape)}"
        )
    if not bool(torch.isfinite(torch.view_as_real(kspace)).all()):
        raise InputError("k-space holds NaN or infinite values; remove or mask those samples")
    sections = centred_ifft(kspace, 1).movedim(-1, 0)
    reference = compression_matrix(sections.movedim(0, 1), 1)[0].to(torch.complex64)
    # sections without signal (noise only) would be calibrated on noise
    energy = sections.abs().square().sum(dim=(1, 2, 3))
    seen = energy > _EMPTY * energy.max()
    found = {int(k): espirit(sections[k], **settings) for k in seen.nonzero()[:, 0]}
    maps = torch.zeros_like(sections)
    eigenvalue = torch.zeros(sections.shape[0], *sections.shape[2:], device=kspace.device)
    for k, one in found.items():
        maps[k], eigenvalue[k] = one.maps, one.eigenvalue
    phase = torch.sgn(torch.einsum("c,xchw->xhw", reference, maps))
    maps = maps * phase.conj()[:, None]
    kernels = tuple(n for one in found.values() for n in one.kernels)
    return Sensitivities(maps.movedim(0, -1), eigenvalue.movedim(0, -1), kernels)


def _calibration_data(kspace: Tensor, calibration: int, kernel: int) -> Tensor:
    """The fully sampled centre, at most ``calibration`` wide; ``(coils, h, w)`` complex128."""
    if not bool(torch.isfinite(torch.view_as_real(kspace)).all()):
        raise InputError("k-space holds NaN or infinite values; remove or mask those samples")
    if not bool((kspace != 0).any()):
        raise InputError("k-space holds no signal to calibrate coils from")
    measured = (kspace != 0).any(dim=0)
    sides = tuple(min(calibration, side) for side in calibration_centre(measured))
    if min(sides) <= kernel:
        raise GeometryError(
            f"the fully sampled centre is {sides[0]} x {sides[1]}, too small to calibrate kernels "
            f"of {kernel} x {kernel}; acquire a larger centre or give a smaller kernel"
        )
    rows, cols = central_box(tuple(measured.shape), sides)
    return kspace[:, rows, cols].to(torch.complex128)


def _signal_space(centre: Tensor, kernel: int, threshold: float) -> tuple[Tensor, int]:
    """Orthonormal rows ``v_n`` ``(n, coils * kernel**2)`` that span the windows; the coils."""
    windows = centre.unfold(1, kernel, 1).unfold(2, kernel, 1)
    a = windows.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)  # one window a row
    energy, vectors = torch.linalg.eigh(a.mT @ a.conj())
    keep = energy.clamp_min(0).sqrt() > threshold * energy[-1].clamp_min(0).sqrt()
    return vectors[:, keep].mT.contiguous(), len(centre)


def _correlation(kernels: Tensor) -> Tensor:
    r""":math:`\frac{1}{|k|}\sum_n v_n \star \bar v_n`, ``(coils, coils, 2k, 2k)``, centred."""
    k = kernels.shape[-1]
    g = torch.fft.ifft2(kernels, s=(2 * k, 2 * k), norm="forward")
    product = torch.einsum("nchw,ndhw->cdhw", g, g.conj()) / k**2
    return torch.fft.fftshift(torch.fft.fft2(product, norm="forward"), dim=(-2, -1))


def _principal(correlation: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Eigenvector of the largest eigenvalue at each pixel, and that eigenvalue."""
    side = correlation.shape[-1]
    padded = correlation.new_zeros(*correlation.shape[:2], *shape)
    low = [min(side, n) for n in shape]
    rows, cols = central_box(shape, low)
    inner = central_box((side, side), low)
    padded[:, :, rows, cols] = correlation[:, :, inner[0], inner[1]]
    scale = math.sqrt(math.prod(shape))
    matrices = (scale * centred_ifft(padded)).permute(2, 3, 0, 1).to(torch.complex64)
    values, vectors = torch.linalg.eigh(matrices)
    return vectors[..., -1].permute(2, 0, 1), values[..., -1]


def combine_coils(images: Tensor, maps: Tensor) -> Tensor:
    r""":math:`\sum_c \bar S_c x_c`: coil images ``(..., coils, H, W)`` to one image."""
    return (images * maps.conj()).sum(dim=-3)
