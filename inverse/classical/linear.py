"""Linear reconstructions: filtered backprojection, zero filling, ridge and CG least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.errors import NumericalError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators import ct
from inverse.operators.linop import Solve

__all__ = ["cgls", "fbp", "tikhonov", "zero_filled"]


def fbp(measurement: Measurement, filter: ct.Window = "ram-lak") -> Tensor:
    """Filtered backprojection of a CT measurement; see :func:`inverse.operators.ct.fbp`.

    Returns:
        Attenuation ``(slices, H, W)`` in 1/mm.

    Raises:
        UnsupportedError: if the operator is not a :class:`~inverse.operators.ct.RayTransform`.
    """
    if not isinstance(measurement.operator, ct.RayTransform):
        raise UnsupportedError(
            f"filtered backprojection needs a RayTransform, got {measurement.operator!r}; use "
            f"zero_filled, cgls or tv"
        )
    return ct.fbp(measurement.data, measurement.operator, filter)


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
    tiny = torch.finfo(torch.float64).tiny
    for _ in range(iterations):
        active = (square(r) > discrepancy * m) & (gamma > 0)
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
