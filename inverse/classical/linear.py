"""Linear reconstructions: filtered backprojection, SIRT, zero filling, ridge and CG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inverse.errors import InputError, NumericalError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators import ct
from inverse.operators.linop import Solve
from inverse.operators.mask import Mask
from inverse.operators.metal import (
    METAL_HU,
    UnspoiledRays,
    interpolate_trace,
    metal_trace,
    segment_metal,
)
from inverse.operators.resample import ThickSlices, between_slices
from inverse.operators.units import mu_to_hu

__all__ = [
    "cgls",
    "fbp",
    "interpolated",
    "leave_out_metal",
    "os_sart",
    "sirt",
    "tikhonov",
    "zero_filled",
]


def fbp(
    measurement: Measurement,
    filter: ct.Window = "ram-lak",
    cutoff: float = 1.0,
    *,
    extend: bool = False,
) -> Tensor:
    """Filtered backprojection of a CT measurement; see :func:`inverse.operators.fbp.fbp`.

    Rays that metal spoils are first interpolated linearly along the detector.

    Returns:
        Attenuation ``(slices, *in_shape)`` in 1/mm.

    Raises:
        UnsupportedError: if the operator is not a :class:`~inverse.operators.ct.RayTransform`.
    """
    operator, data = measurement.operator, measurement.data
    if isinstance(operator, UnspoiledRays):
        data = interpolate_trace(data, operator)
    if not isinstance(operator, ct.RayTransform):
        raise UnsupportedError(
            f"filtered backprojection needs a RayTransform, got {operator!r}; use "
            f"zero_filled, cgls or tv"
        )
    return ct.fbp(data, operator, filter, cutoff, extend=extend)


def leave_out_metal(
    measurement: Measurement, threshold: float = METAL_HU, margin: int = 1
) -> Measurement:
    """The same CT measurement without the rays through metal, which its own image shows.

    Metal is what filtered backprojection under a Hann window shows above a threshold; its trace
    is the metal's projection, in all slices together, widened on both sides.

    Args:
        measurement: data of a :class:`~inverse.operators.ct.RayTransform` in the plane.
        threshold: metal is above it, in HU.
        margin: pixels, and then bins, by which metal and trace are widened.

    Returns:
        A measurement by :class:`~inverse.operators.metal.UnspoiledRays`, for any solver;
        the given one where no pixel is above the threshold.

    Raises:
        GeometryError: a trace that leaves no ray.
        UnsupportedError: another operator, or a scan without filtered backprojection.
    """
    operator = measurement.operator
    if not isinstance(operator, ct.RayTransform) or len(operator.in_shape) != 2:
        raise UnsupportedError(
            f"metal is found in CT slices of parallel or fan beams, got {operator!r}; leave it in"
        )
    image = fbp(measurement, "hann", extend=True)
    metal = segment_metal(mu_to_hu(image, float(measurement.mu_water or 0.0)), threshold, margin)
    if not bool(metal.any()):
        return measurement
    kept = UnspoiledRays(operator, metal_trace(operator, metal, margin))
    provenance = {
        **measurement.provenance,
        "metal_threshold_hu": threshold,
        "spoiled_rays": float((~kept.good).double().mean()),
    }
    data = torch.where(kept.good, measurement.data, 0.0)
    return replace(measurement, operator=kept, data=data, provenance=provenance)


def interpolated(measurement: Measurement) -> Tensor:
    """A volume interpolated linearly along z from thick slices, or from those not missing.

    Thick slices count as samples at their middle; beyond the first and the last the nearest one
    is repeated.

    Returns:
        ``(volumes, Z, Y, X)`` in physical units.

    Raises:
        UnsupportedError: other data than thick or whole missing slices.
    """
    operator, data = measurement.operator, measurement.data
    if isinstance(operator, ThickSlices):
        return between_slices(data, operator.centres, operator.in_shape[0])
    if not (isinstance(operator, Mask) and operator.slicewise):
        raise UnsupportedError(
            f"interpolation along z needs thick slices or missing ones, got {operator!r}; use "
            f"zero_filled, cgls or tv"
        )
    known = operator.mask[:, 0, 0].nonzero()[:, 0]
    return between_slices(data[:, known], known, operator.in_shape[0])


def sirt(
    measurement: Measurement,
    iterations: int = 100,
    discrepancy: float = 1.0,
    *,
    nonnegative: bool = True,
) -> Tensor:
    r"""Simultaneous iterative reconstruction, regularised by stopping early.

    .. math:: x \leftarrow x + C A^T R\,(y - Ax), \qquad
        C = \mathrm{diag}(1/A^T\mathbf 1),\ R = \mathrm{diag}(1/A\mathbf 1)

    Each slice stops by itself once its reduced chi-square is at most ``discrepancy``, or after
    ``iterations``.  The weights are those of the geometry alone, not of the noise.

    Args:
        measurement: the data, of an operator without negative entries.
        iterations: most iterations.
        discrepancy: chi-square a datum at which a slice stops.
        nonnegative: clip negative values in every iteration.

    Returns:
        ``(slices, *in_shape)`` in physical units.

    Raises:
        UnsupportedError: complex data.

    Source: Gregor and Benson, IEEE Trans. Med. Imaging 27 (2008).
    """
    return _sart([measurement], measurement, iterations, discrepancy, nonnegative)


def os_sart(
    measurement: Measurement,
    iterations: int = 10,
    subsets: int | None = None,
    discrepancy: float = 1.0,
    *,
    nonnegative: bool = True,
) -> Tensor:
    r"""SIRT on ordered subsets of the views: each iteration is ``subsets`` updates.

    Subset j holds the views j, j + subsets, ...; the order of the subsets is bit-reversed, so
    that successive ones are far apart.

    Args:
        measurement: data of a :class:`~inverse.operators.ct.RayTransform`.
        iterations: most passes over all data.
        subsets: number of subsets; default 10, or as many as there are views.
        discrepancy: chi-square a datum at which a slice stops, judged after each pass.
        nonnegative: clip negative values in every update.

    Returns:
        ``(slices, *in_shape)`` in physical units.

    Raises:
        InputError: a number of subsets below one or above the views'.
        UnsupportedError: another operator.

    Source: Wang and Jiang, J. X-ray Sci. Technol. 12 (2004).
    """
    operator = measurement.operator
    if not isinstance(operator, ct.RayTransform):
        raise UnsupportedError(f"os_sart needs a RayTransform, got {operator!r}; use sirt")
    views = operator.geometry.views
    subsets = min(10, views) if subsets is None else subsets
    if not 1 <= subsets <= views:
        raise InputError(f"os_sart needs 1 to {views} subsets of {views} views, got {subsets}")
    axis = -len(operator.out_shape)
    parts = []
    for j in bit_reversed(subsets):
        of_views = torch.arange(j, views, subsets, device=measurement.data.device)
        noise = measurement.noise
        if noise.ndim >= -axis and noise.shape[axis] == views:
            noise = noise.index_select(axis, of_views)
        data = measurement.data.index_select(axis, of_views)
        part = operator.subset(slice(j, None, subsets))
        parts.append(replace(measurement, operator=part, data=data, noise=noise))
    return _sart(parts, measurement, iterations, discrepancy, nonnegative)


def bit_reversed(count: int) -> list[int]:
    """The numbers below ``count`` in an order in which successive ones are far apart."""
    bits = max(count - 1, 1).bit_length()
    return sorted(range(count), key=lambda j: int(f"{j:0{bits}b}"[::-1], 2))


def _sart(
    parts: Sequence[Measurement],
    whole: Measurement,
    iterations: int,
    discrepancy: float,
    nonnegative: bool,
) -> Tensor:
    """Passes of weighted updates over the parts of a measurement."""
    if whole.data.is_complex():
        raise UnsupportedError(f"sirt serves real data, got {whole.operator!r}; use cgls")
    shape, device = whole.operator.in_shape, whole.data.device

    def inverse(u: Tensor) -> Tensor:
        # what no ray meets, and rays that meet nothing, have no weight
        return torch.where(u > 1e-6 * u.amax(), 1.0 / u, 0.0)

    weights = [
        (
            inverse(part.operator.adjoint(torch.ones(part.operator.out_shape, device=device))),
            inverse(part.operator(torch.ones(shape, device=device))),
        )
        for part in parts
    ]
    x = torch.zeros(len(whole), *shape, device=device)
    active = torch.ones(len(whole), dtype=torch.bool, device=device)
    for _ in range(iterations):
        active = active & (whole.chi2(x) > discrepancy)
        if not bool(active.any()):
            break
        new = x
        for part, (c, r) in zip(parts, weights, strict=True):
            new = new + c * part.operator.adjoint(r * (part.data - part.operator(new)))
            if nonnegative:
                new = new.clamp_min(0.0)
        x = torch.where(active.reshape(-1, *[1] * len(shape)), new, x)
    if not bool(torch.isfinite(x).all()):
        raise NumericalError(
            "sirt left the finite numbers; check that the operator has no negative entries"
        )
    return x


def zero_filled(measurement: Measurement) -> Tensor:
    """The adjoint, ``A^H y``: the inverse FFT of zero-filled k-space, or an image with holes.

    Returns:
        ``(slices, *in_shape)`` in physical units for operators with orthonormal rows (Cartesian
        MRI and masks); a mere backprojection otherwise.
    """
    return measurement.operator.adjoint(measurement.data)


def tikhonov(
    measurement: Measurement, rho: float, *, tol: float = 1e-5, max_iter: int = 200
) -> Solve:
    r"""Ridge-regularised least squares, :math:`(A^H\Sigma^{-1}A + \rho I)\,x = A^H\Sigma^{-1}y`.

    The mean of the posterior under the prior :math:`x \sim N(0, \rho^{-1} I)`.

    Args:
        measurement: the data, with their noise std.
        rho: ridge weight in inverse squared physical units.
        tol: relative residual at which a slice stops.
        max_iter: most CG iterations, where the operator has no closed form.

    Returns:
        The images ``(slices, *in_shape)`` as ``.x``, with iterations and residuals.
    """
    white = measurement.whitened()
    rhs = white.operator.adjoint(white.data)
    return white.operator.normal_solve(rhs, rho, tol=tol, max_iter=max_iter)


def cgls(measurement: Measurement, iterations: int = 50, discrepancy: float = 1.0) -> Tensor:
    r"""Conjugate gradients on the least-squares problem, regularised by stopping early.

    Minimises :math:`\|\Sigma^{-1/2}(Ax - y)\|^2` from zero.  Each slice stops by itself once its
    reduced chi-square is at most ``discrepancy`` (Morozov's principle: fit the data as well as
    their noise warrants), or after ``iterations``.

    Args:
        measurement: the data, with their noise std.
        iterations: most iterations.
        discrepancy: chi-square a datum at which a slice stops.

    Returns:
        ``(slices, *in_shape)`` in physical units.

    Raises:
        NumericalError: if the residual is not finite.

    Source: Bjorck, Numerical Methods for Least Squares Problems (1996), algorithm 7.4.1.
    """
    white = measurement.whitened()
    a = white.operator
    r = white.data
    m = a.measured * (2 if r.is_complex() else 1)

    def square(u: Tensor) -> Tensor:
        v = torch.view_as_real(u) if u.is_complex() else u
        return v.flatten(1).square().sum(dim=1, dtype=torch.float64)

    def spread(scalar: Tensor, like: Tensor) -> Tensor:
        return scalar.to(torch.float32).reshape(-1, *[1] * (like.ndim - 1))

    s = a.adjoint(r)
    x, p = torch.zeros_like(s), s
    gamma = square(s)
    # below the rounding of float32 the recursion no longer follows the residual
    least = 1e-13 * gamma
    tiny = torch.finfo(torch.float64).tiny
    for _ in range(iterations):
        active = (square(r) > discrepancy * m) & (gamma > least)
        if not bool(active.any()):
            break
        q = a(p)
        step = torch.where(active, gamma / square(q).clamp_min(tiny), 0.0)
        x = x + spread(step, x) * p
        r = r - spread(step, r) * q
        s = a.adjoint(r)
        new = square(s)
        p = s + spread(new / gamma.clamp_min(tiny), p) * p
        gamma = new
    if not bool(torch.isfinite(gamma).all()):
        raise NumericalError(
            "cgls left the finite numbers; check the data for NaN or infinite values and the "
            "noise std for values near zero"
        )
    return x
