r"""What of an image the data have fixed, and what the prior has filled in.

.. math:: x = A^+A\,x + P_0\,x, \qquad P_0 = I - A^+A

The first part is the only one that the data can contradict: :math:`A P_0 x = 0`.  Structure in
the second comes from the prior alone, right or not.  Between the two lie directions that the
operator hardly sees, with singular values below the noise.  :func:`split` counts them as measured,
which is exact and, for CT, far from what noisy data say; :func:`noise_split` counts each direction
by how far its signal stands out of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from inverse.errors import GeometryError, InputError, NumericalError
from inverse.measurement import Measurement
from inverse.operators.linop import LinearOperator
from inverse.trust.uncertainty import Moments

__all__ = ["PriorPart", "Split", "hallucination_maps", "noise_split", "prior_part", "split"]

DELAY = 8  # least iterations that the estimate of the error looks back


@dataclass(frozen=True)
class Split:
    r"""An image as the sum of its two parts.

    Attributes:
        measured: :math:`A^+A x`, ``(*b, *in_shape)``, in the unit of the image.
        null: :math:`P_0 x = x - A^+A x`, likewise.
        error: estimate of the error of both, :math:`\|z - A^+Ax\| / \|x\|`, shape ``b``; of
            :func:`noise_split` an upper bound.
        leak: :math:`\|A P_0 x\| / \|A x\|`, which is zero for the exact part, shape ``b``, and
            small for that of :func:`noise_split`.
        iterations: iterations of conjugate gradients done.
        converged: whether error (and leak, of :func:`split`) met the tolerance, shape ``b``; if
            not, ``null`` still holds some of what the operator sees weakly.
    """

    measured: Tensor
    null: Tensor
    error: Tensor
    leak: Tensor
    iterations: int
    converged: Tensor

    @property
    def share(self) -> Tensor:
        """Share of each pixel's value in the second part; see :attr:`PriorPart.share`."""
        return _share(self.null, self.measured)

    @property
    def detail_share(self) -> Tensor:
        r"""Share of the image's detail in the second part, 0 to 1, shape ``b``, float64.

        .. math:: \frac{\|\nabla P_0x\|^2}{\|\nabla P_0x\|^2 + \|\nabla A^+Ax\|^2}

        Of edges and texture, as the energy of the image itself is that of its broad features,
        which any data fix.
        """
        null, measured = (_detail(u, self.error.ndim) for u in (self.null, self.measured))
        return null / (null + measured).clamp_min(torch.finfo(torch.float64).tiny)


def split(
    operator: LinearOperator, x: Tensor, *, tol: float = 1e-4, max_iter: int = 1000
) -> Split:
    r"""Measured and null-space part of images, by conjugate gradients on the least squares.

    :math:`z = A^+Ax` is the smallest solution of :math:`\min_z \|Az - Ax\|`; from zero, conjugate
    gradients never leave the range of :math:`A^H` and converge to it.  The errors :math:`e_k`
    obey, as :math:`A e_k = r_k` is the residual in the data,

    .. math:: \|e_k\|^2 - \|e_{k+d}\|^2
        = \sum_{j=k}^{k+d-1} \frac{\|p_j\|^2}{\|A p_j\|^2}\,(\|r_j\|^2 + \|r_{j+1}\|^2),

    so that the sum over the last d iterations, a third of all, estimates the error d iterations
    ago, which is larger than the present one.  Once the residual is at rounding, the iteration
    stops, as further directions would be noise, and the estimate is rounding over the smallest
    singular value that the iteration has met (a Ritz value).  Both are estimates, too small by a
    factor of a few where directions that matter have not been met yet.

    Args:
        operator: forward operator; real-linear ones, from real images to complex data, too.
        x: images ``(*b, *in_shape)``, any unit, of the operator's dtype.  float32 reaches an
            error of about its rounding over the smallest singular value, relative to the largest.
        tol: relative error at which an image stops; the leak is to be below a tenth of it, or
            at rounding.
        max_iter: most iterations, one application of A and of its adjoint each.

    Returns:
        The parts with their error; see ``converged``.

    Raises:
        GeometryError: images of another shape than the operator's, or an empty batch.
        InputError: images that are not finite or not of the operator's dtype, a tolerance that
            is not positive, or no iteration.
        NumericalError: if the iteration leaves the finite numbers.

    Source: Hestenes and Stiefel, J. Res. Nat. Bur. Stand. 49 (1952); estimate of the error:
    Strakos and Tichy, ETNA 13 (2002); parts: Barrett and Myers, *Foundations of Image Science*
    (2004), section 1.6.
    """
    n, m = len(operator.in_shape), len(operator.out_shape)
    _check(operator, x)
    if not tol > 0 or max_iter < 1:
        raise InputError(
            f"split needs a positive tol and at least one iteration, got {tol} and {max_iter}"
        )

    tiny = torch.finfo(torch.float64).tiny
    with torch.no_grad():
        z = torch.zeros_like(x)
        r = operator(x)
        s = operator.adjoint(r)
        p = s.clone()
        xx, yy, ss = _square(x, n), _square(r, m), _square(s, n)
        rr, eps2 = yy.clone(), torch.finfo(x.dtype).eps ** 2
        floor = 16 * eps2 * yy
        rounded = torch.zeros_like(ss, dtype=torch.bool)
        length = torch.zeros_like(ss, dtype=torch.long)
        done = ss == 0
        error = torch.where(done, 0.0, xx)  # squared
        terms: list[Tensor] = []
        steps: list[Tensor] = []
        ratios: list[Tensor] = []
        iterations = 0
        while iterations < max_iter and not bool(done.all()):
            q = operator(p)
            pp, qq = _square(p, n), _square(q, m)
            step = torch.where(done, 0.0, ss / qq.clamp_min(tiny))
            z = z + _spread(step, p, n) * p
            r = r - _spread(step, q, m) * q
            s = operator.adjoint(r)
            floor = torch.where(
                done, floor, torch.maximum(floor, eps2 * qq / pp.clamp_min(tiny) * xx)
            )
            old, rr = rr, torch.where(done, rr, _square(r, m))
            terms.append(pp / qq.clamp_min(tiny) * (old + rr))
            fresh = _square(s, n)
            ratio = torch.where(done, 0.0, fresh / ss.clamp_min(tiny))
            p = s + _spread(ratio, p, n) * p
            steps.append(step)
            ratios.append(ratio)
            length += ~done
            ss = torch.where(done, ss, fresh)
            iterations += 1
            delay = max(DELAY, iterations // 3)  # slow convergence needs a longer look
            window = torch.stack(terms[-delay:]).sum(dim=0)
            error = torch.where(done, error, window)
            rounded |= ~done & (rr <= floor)  # further directions would be noise
            # half the tolerance of the leak, which is measured anew below
            done = done | rounded | ((error <= tol**2 * xx) & (rr <= (tol / 20) ** 2 * yy))
        if bool(rounded.any()):
            weakest = _smallest_ritz(torch.stack(steps), torch.stack(ratios), length * rounded)
            bound = torch.minimum(error, floor / weakest.clamp_min(tiny))
            error = torch.where(rounded, bound, error)
        null = x - z
        leak = (_square(operator(null), m) / yy.clamp_min(tiny)).sqrt()
        error = (error / xx.clamp_min(tiny)).sqrt()
    if not bool(torch.isfinite(error).all() & torch.isfinite(leak).all()):
        raise NumericalError(
            f"the split by {operator!r} left the finite numbers; check the operator for NaN"
        )
    small = leak.square() * yy <= torch.maximum((tol / 10) ** 2 * yy, 4 * floor)
    return Split(z, null, error, leak, iterations, (error <= tol) & small)


def noise_split(
    measurement: Measurement,
    x: Tensor,
    contrast: float,
    *,
    tol: float = 0.01,
    max_iter: int = 100,
) -> Split:
    r"""Measured and prior's part of images at the noise level of the data.

    .. math:: z = \Big(A^H W A + \frac{1}{\tau^2}\Big)^{-1} A^H W A\, x, \qquad
        W = \mathrm{diag}\,\sigma_y^{-2}

    A direction of singular value s (of :math:`W^{1/2}A`) is measured to the share
    :math:`s^2\tau^2/(1 + s^2\tau^2)`: one half where structure of size :math:`\tau` is as large
    in the data as their noise.  It is the resolution of Tikhonov's estimate, and tends to
    :math:`A^+A` without noise.  Conjugate gradients solve for the other part, which is smooth in
    what the operator sees well and so the faster one,

    .. math:: M\,(x - z) = x, \qquad M = I + \tau^2 A^H W A .

    As no eigenvalue of M is below 1, the error e obeys
    :math:`\|e\|^2 \le e^H M e \le \gamma_k \|r_k\|^2` with the rule of Gauss and Radau

    .. math:: \gamma_0 = 1, \qquad
        \gamma_{k+1} = \frac{\gamma_k - \alpha_k}{\gamma_k - \alpha_k + \beta_k},

    where :math:`\alpha_k` is the step and :math:`\beta_k = \|r_{k+1}\|^2/\|r_k\|^2`.  To this
    bound comes, from the residual computed anew, what rounding adds.

    Args:
        measurement: operator and noise; its data do not count.
        x: images ``(*k, slices, *in_shape)``, physical units; with one noise for all slices any
            ``(*b, *in_shape)``.
        contrast: :math:`\tau`, size of structure in the image, physical units: the prior unit.
        tol: most error relative to the image, at which an image stops by itself.
        max_iter: most iterations, which bounds the cost: one application of A and of its adjoint
            each.

    Raises:
        GeometryError: images of another shape than the operator's, or an empty batch.
        InputError: images that are not finite or not of the operator's dtype, a contrast or
            tolerance that is not positive, or no iteration.
        NumericalError: if the iteration leaves the finite numbers.

    Source: the resolution matrix of Backus and Gilbert, Geophys. J. R. Astron. Soc. 16 (1968);
    filter factors: Hansen, *Discrete Inverse Problems* (2010), ch. 4; bound of the error: Golub
    and Meurant, BIT 37 (1997), in the form of Meurant and Tichy, Numer. Algorithms 62 (2013).
    """
    _check(measurement.operator, x)
    if not (math.isfinite(contrast) and contrast > 0 and tol > 0 and max_iter >= 1):
        raise InputError(
            f"noise_split needs a positive contrast and tol and an iteration, got {contrast}, "
            f"{tol} and {max_iter}"
        )
    operator = measurement.whitened().operator
    n, m = len(operator.in_shape), len(operator.out_shape)
    gain, eps = contrast**2, torch.finfo(x.dtype).eps
    tiny = torch.finfo(torch.float64).tiny
    with torch.no_grad():
        null, r, p = torch.zeros_like(x), x.clone(), x.clone()
        xx = _square(x, n)
        rr, gamma, done = xx.clone(), torch.ones_like(xx), xx == 0
        iterations = 0
        while iterations < max_iter and not bool(done.all()):
            seen = operator(p)
            curvature = _square(p, n) + gain * _square(seen, m)
            step = torch.where(done, 0.0, rr / curvature.clamp_min(tiny))
            null.addcmul_(_spread(step, p, n), p)
            # M p, less the step
            r.addcmul_(_spread(-step, p, n), p.add(operator.adjoint(seen), alpha=gain))
            fresh = torch.where(done, rr, _square(r, n))
            ratio = torch.where(done, 0.0, fresh / rr.clamp_min(tiny))
            p.mul_(_spread(ratio, p, n)).add_(r)
            # a difference lost to rounding must not make the bound too small
            gap = torch.maximum(gamma - step, 4 * eps * gamma)
            gamma = torch.where(done, gamma, gap / (gap + ratio))
            rr = fresh
            iterations += 1
            # half the tolerance, for what rounding adds
            done = done | (gamma * rr <= (0.5 * tol) ** 2 * xx)
        rest = operator(null)
        residual = x - null - gain * operator.adjoint(rest)
        drift = _square(residual - r, n).sqrt()
        error = torch.minimum(_square(residual, n).sqrt(), (gamma * rr).sqrt() + drift)
        error = error / xx.clamp_min(tiny).sqrt()
        leak = (_square(rest, m) / _square(operator(x), m).clamp_min(tiny)).sqrt()
    if not bool(torch.isfinite(error).all() & torch.isfinite(leak).all()):
        raise NumericalError(
            f"the split by {operator!r} left the finite numbers; check the operator for NaN"
        )
    return Split(x - null, null, error, leak, iterations, error <= tol)


def hallucination_maps(
    operator: LinearOperator,
    x: Tensor,
    truth: Tensor,
    *,
    tol: float = 1e-4,
    max_iter: int = 1000,
) -> Split:
    r"""Hallucination maps of a reconstruction against its truth.

    .. math:: \mathrm{measured} = A^+(A\hat x - A x^*), \qquad \mathrm{null} = P_0(\hat x - x^*)

    The first is what the reconstruction got wrong although the data say it (noise, model, too
    weak guidance); the second what the prior put in, or left out, where the data are silent.
    They add up to the whole error.

    Args:
        operator: forward operator.
        x: reconstructions ``(*b, *in_shape)``, physical units.
        truth: true images, same shape and unit.
        tol: as of :func:`split`, relative to the error of the reconstruction.
        max_iter: as of :func:`split`.

    Raises:
        GeometryError: shapes that differ from each other or from the operator's.
        InputError: as :func:`split`.
        NumericalError: as :func:`split`.

    Source: Bhadra, Kelkar, Brooks and Anastasio, IEEE Trans. Med. Imaging 40 (2021).
    """
    if x.shape != truth.shape:
        raise GeometryError(
            f"hallucination maps compare images of one shape, got {tuple(x.shape)} and "
            f"{tuple(truth.shape)}"
        )
    return split(operator, x - truth, tol=tol, max_iter=max_iter)


@dataclass(frozen=True)
class PriorPart:
    r"""What samples of a posterior owe to the prior, without truth.

    Attributes:
        mean: mean of the samples' null-space parts, ``shape``.
        std: their standard deviation, :math:`\mathrm{sd}(P_0\tilde x)`: what other images that
            agree with the data and the prior would show.
        measured: mean of their measured parts.
        measured_std: its standard deviation: noise, and what the operator sees weakly.
        error: largest relative error of a split, see :class:`Split`.
        leak: largest leak.
        converged: whether every split was.
    """

    mean: Tensor
    std: Tensor
    measured: Tensor
    measured_std: Tensor
    error: float
    leak: float
    converged: bool

    @property
    def share(self) -> Tensor:
        r"""Share of a pixel's value that comes from the prior, 0 to 1, ``shape``.

        .. math:: \frac{|P_0\hat x|}{|P_0\hat x| + |A^+A\hat x|}

        0 where the pixel is zero in both parts.
        """
        return _share(self.mean, self.measured)


def prior_part(parts: Callable[[Tensor], Split], samples: Iterable[Tensor]) -> PriorPart:
    r"""Moments of the null-space part over samples, streamed.

    For a Gaussian posterior of covariance C, :math:`\mathrm{sd}(P_0\tilde x) =
    \sqrt{\mathrm{diag}(P_0 C P_0)}`.

    Args:
        parts: how to split, such as ``partial(split, operator)`` or ``partial(noise_split,
            measurement, contrast=...)``.
        samples: batches of samples ``(k, *b, *in_shape)``, physical units, such as
            ``torch.split(samples, 8)``; at least two samples in all.

    Raises:
        GeometryError: shapes that differ from the operator's or from batch to batch.
        InputError: fewer than two samples; else as :func:`split`.
        NumericalError: as :func:`split`.

    Source: the null map of Bhadra et al., IEEE Trans. Med. Imaging 40 (2021), over samples.
    """
    null, measured = Moments(), Moments()
    error = leak = 0.0
    converged = True
    for batch in samples:
        part = parts(batch)
        if not part.error.ndim:
            raise GeometryError(
                f"prior_part needs batches (k, *b, *in_shape), got {tuple(batch.shape)}; give one "
                "sample as sample[None]"
            )
        null.add(part.null)
        measured.add(part.measured)
        error = max(error, float(part.error.max()))
        leak = max(leak, float(part.leak.max()))
        converged &= bool(part.converged.all())
    return PriorPart(null.mean, null.std, measured.mean, measured.std, error, leak, converged)


def _detail(u: Tensor, batch: int) -> Tensor:
    """Energy of the differences of neighbours along the axes after the first ``batch``."""
    return sum(
        (
            u.diff(dim=axis).abs().square().flatten(batch).sum(dim=-1, dtype=torch.float64)
            for axis in range(batch, u.ndim)
        ),
        torch.zeros(u.shape[:batch], dtype=torch.float64, device=u.device),
    )


def _share(null: Tensor, measured: Tensor) -> Tensor:
    """``|null| / (|null| + |measured|)``, 0 where both vanish."""
    a, b = null.abs(), measured.abs()
    return a / (a + b).clamp_min(torch.finfo(a.dtype).tiny)


def _square(u: Tensor, ndim: int) -> Tensor:
    """Squared norm over the last ``ndim`` axes, float64."""
    return u.abs().square().sum(dim=tuple(range(-ndim, 0)), dtype=torch.float64)


def _spread(s: Tensor, like: Tensor, ndim: int) -> Tensor:
    """A number an element, shaped and typed to multiply ``like``."""
    return s.to(like.dtype).reshape(*s.shape, *[1] * ndim)


def _check(operator: LinearOperator, x: Tensor) -> None:
    n = len(operator.in_shape)
    if x.ndim < n or tuple(x.shape[x.ndim - n :]) != operator.in_shape or not x.numel():
        raise GeometryError(
            f"the split by {operator!r} needs images (*b, *{operator.in_shape}), got "
            f"{tuple(x.shape)}"
        )
    if x.dtype != operator.dtype:
        raise InputError(
            f"the split by {operator!r} needs images of {operator.dtype}, got {x.dtype}; convert"
        )
    parts = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    if not bool(torch.isfinite(parts).all()):
        raise InputError("the images hold NaN or infinite values; leave those out")


def _smallest_ritz(steps: Tensor, ratios: Tensor, length: Tensor) -> Tensor:
    r"""Smallest Ritz value of :math:`A^HA` in each Krylov space, shape ``b``.

    Conjugate gradients are Lanczos' iteration: with step :math:`a_k` and ratio :math:`b_k` its
    tridiagonal matrix holds :math:`1/a_k + b_{k-1}/a_{k-1}` and :math:`\sqrt{b_k}/a_k`.

    Args:
        steps: ``(iterations, *b)``.
        ratios: likewise.
        length: iterations of each that count, shape ``b``; infinite where none does.
    """
    values = torch.full(length.shape, torch.inf, dtype=torch.float64).flatten()
    a, b = (u.reshape(len(u), -1).cpu() for u in (steps, ratios))
    for j, k in enumerate(length.flatten().tolist()):
        if k:
            diagonal, beside = 1 / a[:k, j], b[: k - 1, j].sqrt() / a[: k - 1, j]
            diagonal[1:] += b[: k - 1, j] / a[: k - 1, j]
            ritz = eigh_tridiagonal(diagonal, beside, True, select="i", select_range=(0, 0))
            values[j] = float(ritz[0])
    return values.reshape(length.shape).to(steps.device)
