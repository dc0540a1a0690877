r"""Data consistency on the estimate: a denoiser in, a denoiser out.

A guided denoiser approximates :math:`E[x_0 \mid x_t, y]`; samplers never learn about measurements.
Bayes' rule and Tweedie's formula say what it should be: with :math:`D = E[x_0 \mid x_t]`,

.. math::
   E[x_0 \mid x_t, y] = D + \frac{\sigma_t^2}{\alpha_t}\,\nabla_{x_t} \log p(y \mid x_t),
   \qquad p(y \mid x_t) = \int p(y \mid x_0)\,p(x_0 \mid x_t)\,dx_0 ,

and the methods differ in how they replace the unknown :math:`p(x_0 \mid x_t)`:

=================== ============================================ ===============
class               :math:`p(x_0 \mid x_t)`                      needs
=================== ============================================ ===============
:class:`DPS`        a point at ``D``                             one VJP
:class:`PiGDM`      ``N(D, r_t^2 I)``                            one VJP
:class:`MMPS`       ``N(D, Cov[x_0 | x_t])``                     a few VJPs
:class:`Proximal`   ``N(D, r_t^2 I)``, and ``x_t`` is forgotten  no derivative
=================== ============================================ ===============

Measurements are whitened first, so that ``A`` and ``y`` below are in units of the noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inverse.errors import InputError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.linop import cg
from inverse.priors.denoiser import Denoiser, expand
from inverse.sampling import Step, ancestral
from inverse.sde import SDE, as_time

__all__ = ["DPS", "MMPS", "HalfQuadratic", "PiGDM", "Proximal", "ddnm_plus", "multistep"]


class _Guided(Denoiser):
    """A prior that has seen a measurement.

    Args:
        prior: the denoiser.
        measurement: data of the batch, in prior units.
    """

    def __init__(self, prior: Denoiser, measurement: Measurement) -> None:
        super().__init__(prior.sde)
        self.prior = prior
        white = measurement.whitened()
        self.operator, self.data = white.operator, white.data

    def error(self, noise_level: float | Tensor) -> Tensor:
        """The prior's, which bounds the guided one's."""
        return self.prior.error(noise_level)

    def _linearise(
        self, x_t: Tensor, t: float | Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """``D(x_t)`` and ``v -> Cov[x_0 | x_t] v``: one network call."""
        alpha, sigma = self.sde.marginal(t)
        scale = expand(sigma**2 / alpha, x_t)
        x0, pull_back = self.prior.linearise(x_t, t)
        return x0, lambda v: scale * pull_back(v)

    def _within_data(self, residual: Tensor, d: Tensor, kappa: float) -> Tensor:
        r""":math:`\min(1, \langle r, Ad\rangle/(\kappa\|Ad\|^2))` a batch element, not below 0.

        The largest factor on ``d`` up to 1 for which a move by :math:`\kappa d` does not pass the
        least residual along ``d``.
        """
        change = self.operator(d)
        best = _dot(residual, change) / (kappa * _dot(change, change)).clamp_min(1e-30)
        return best.clamp(0.0, 1.0)


class Proximal(_Guided):
    r"""DDS: the proximal step of the data term at the denoised estimate.

    .. math:: \hat x = \arg\min_x \tfrac12\|(Ax - y)/\sigma_y\|^2
              + \tfrac{1}{2 r_t^2}\|x - D(x_t, t)\|^2

    by conjugate gradients, started at ``D(x_t, t)``.  :math:`r_t` is the prior's own expected
    error at the noise level of ``t`` times ``weight``, so that the balance comes from the noise
    of the data and the quality of the prior; the paper's constant :math:`\gamma` is
    :math:`r_t^2/\sigma_y^2`.  Few iterations act as a second regularisation, as in the paper.

    Source: Chung, Lee, Ye, Decomposed Diffusion Sampler (ICLR 2024), equations 15 to 17.

    Args:
        prior: the denoiser.
        measurement: data of the batch, in prior units.
        weight: factor on ``r_t``; above 1 trusts the data more.
        iterations: conjugate-gradient steps a call.
        tol: relative residual at which they stop.

    Here: docs/theory.md, equation (27).
    """

    def __init__(
        self,
        prior: Denoiser,
        measurement: Measurement,
        *,
        weight: float = 1.0,
        iterations: int = 5,
        tol: float = 1e-4,
    ) -> None:
        super().__init__(prior, measurement)
        self.weight, self.iterations, self.tol = weight, iterations, tol
        self.backprojection = self.operator.adjoint(self.data)

    def radius(self, t: float | Tensor) -> Tensor:
        """``r_t``: how far the clean image may lie from the estimate, prior units."""
        return self.weight * self.prior.error(self.sde.noise_level(t))

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``argmin`` of the class's equation."""
        x0 = self.prior.denoise(x_t, t)
        r = self.radius(t)
        rho = float(r) ** -2 if r.ndim == 0 else (r**-2).to(torch.float32)
        b = self.backprojection + rho * x0
        return self.operator.normal_solve(b, rho, x0, tol=self.tol, max_iter=self.iterations).x


class HalfQuadratic(Proximal):
    r"""DiffPIR: the proximal step with :math:`r_t = w\,\sigma_t/\alpha_t`, the noise level itself.

    The paper's :math:`\rho_t = \lambda\sigma_y^2/\bar\sigma_t^2` is :math:`w = \lambda^{-1/2}`.
    With :math:`w = 1` it is also DDNM with a regularised pseudo-inverse,

    .. math:: \hat x = D + (A^H A + \bar\sigma_t^{-2} I)^{-1} A^H (y - A D),

    whose filter :math:`s_i^2/(s_i^2 + \bar\sigma_t^{-2})` of a singular value has the limits of
    DDNM+, 1 far above the noise of the data and 0 far below.

    Source: Zhu et al., DiffPIR (CVPRW 2023), equations 12 and 13; Wang et al., DDNM (ICLR 2023).
    Here: docs/theory.md, equation (27).
    """

    def radius(self, t: float | Tensor) -> Tensor:
        """``weight * sigma / alpha``."""
        return self.weight * self.sde.noise_level(t)


class DPS(_Guided):
    r"""Diffusion posterior sampling: the likelihood at the denoised estimate.

    .. math:: \hat x = D + c_t\,d, \qquad
              d = \frac{\sigma_t^2}{\alpha_t} J^T A^T (y - AD)/\sigma_y^2

    Without ``zeta`` the weight is the one of Bayes, :math:`c_t = 1`, lowered where the step
    :math:`x_s = \dots + \kappa\hat x` would pass the minimum of the residual along ``d``:
    :math:`c_t = \min(1, \langle r, Ad\rangle/(\kappa\|Ad\|^2))` with
    :math:`\kappa = \alpha_s G^2/\sigma_t^2` of the ancestral step.  Neither a ground truth nor a
    constant is needed, and the iteration cannot diverge however steep the likelihood.

    With ``zeta`` it is the authors' rule, which ignores the noise of the data:
    :math:`x_s` moves by :math:`-\zeta\nabla_{x_t}\|y - AD\|_2`, the norm not squared, here with
    ``A`` scaled to unit norm so that the authors' constants keep their meaning.

    Source: Chung et al., DPS (ICLR 2023), algorithm 1 and appendix D.

    Args:
        prior: the denoiser.
        measurement: data of the batch, in prior units.
        times: the sampler's times, with the ancestral step between them.
        zeta: the authors' step size: 0.3 super-resolution and deblurring, 0.5 inpainting.

    Here: docs/theory.md, equation (26).
    """

    def __init__(
        self,
        prior: Denoiser,
        measurement: Measurement,
        times: Tensor,
        *,
        zeta: float | None = None,
    ) -> None:
        super().__init__(prior, measurement)
        if zeta is not None:
            if not zeta > 0:
                raise InputError(f"DPS needs zeta > 0, got {zeta}; leave it out for Bayes' weight")
            self.operator, self.data = measurement.operator, measurement.data
            self.norm = self.operator.norm()
        self.times, self.zeta = times, zeta

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``D + c d`` of the class's equation; ``t`` is one of ``times``."""
        x0, covariance = self._linearise(x_t, t)
        residual = self.data - self.operator(x0)
        d = covariance(self.operator.adjoint(residual))
        kappa = _gain(self.sde, self.times, t)
        if self.zeta is None:
            c = self._within_data(residual, d, kappa)
        else:
            alpha, sigma = self.sde.marginal(t)
            jacobian = float(alpha / sigma**2)
            norm = _dot(residual, residual).sqrt().clamp_min(1e-30)
            c = self.zeta * jacobian / (kappa * self.norm * norm)
        return x0 + expand(c, x0) * d


class PiGDM(_Guided):
    r"""Pseudo-inverse guidance: a white Gaussian about the estimate.

    .. math:: \hat x = D + c_t\,d, \qquad d = \frac{\sigma_t^2}{\alpha_t} J^T A^T
              (r_t^2 A A^T + \sigma_y^2 I)^{-1}(y - AD)

    :math:`r_t` is the prior's expected error; the paper's :math:`\sigma^2/(1+\sigma^2)` is that
    of a white prior of unit variance.  The inverse is taken in the image,
    :math:`A^T(r^2AA^T + I)^{-1} = (A^TA + r^{-2}I)^{-1}A^T/r^2`, where masks and Cartesian
    Fourier sampling have a closed form and other operators conjugate gradients.

    :math:`c_t` is 1 as in the paper, and lowered as in :class:`DPS` where a step would pass the
    least residual along ``d``: few steps diverge without it where the variance in directions that
    the data see is well above :math:`r_t^2`.

    Source: Song, Vahdat, Mardani, Kautz, PiGDM (ICLR 2023), equations 7 to 9.

    Args:
        prior: the denoiser.
        measurement: data of the batch, in prior units.
        times: the sampler's times.
        iterations: conjugate-gradient steps a call.
        tol: relative residual at which they stop.

    Here: docs/theory.md, equation (26).
    """

    def __init__(
        self,
        prior: Denoiser,
        measurement: Measurement,
        times: Tensor,
        *,
        iterations: int = 20,
        tol: float = 1e-4,
    ) -> None:
        super().__init__(prior, measurement)
        self.times, self.iterations, self.tol = times, iterations, tol

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``D + c d`` of the class's equation; ``t`` is one of ``times``."""
        x0, covariance = self._linearise(x_t, t)
        r2 = self.prior.error(self.sde.noise_level(t)) ** 2
        rho = float(1 / r2) if r2.ndim == 0 else (1 / r2).to(torch.float32)
        residual = self.data - self.operator(x0)
        b = self.operator.adjoint(residual)
        v = self.operator.normal_solve(b, rho, tol=self.tol, max_iter=self.iterations).x
        d = covariance(expand(1 / r2, v) * v)
        c = self._within_data(residual, d, _gain(self.sde, self.times, t))
        return x0 + expand(c, x0) * d


class MMPS(_Guided):
    r"""Moment-matching posterior sampling: the Gaussian with the covariance of Tweedie's formula.

    .. math:: \hat x = D + V A^H v, \qquad (\Sigma_y + A V A^H)\,v = y - AD, \qquad
              V = \mathrm{Cov}[x_0 \mid x_t] = \frac{\sigma_t^2}{\alpha_t}
              \frac{\partial D}{\partial x_t}

    by conjugate gradients on the data, one vector-Jacobian product an iteration through the graph
    of a single network call.  Exact for a Gaussian prior; locally Gaussian otherwise.

    ``v`` is the residual of the guided estimate in units of the noise, :math:`\Sigma_y^{-1}
    (y - A\hat x)`, and changes little from one time to the next, so each solve starts from the
    last: make a new one for every run.

    Source: Rozet et al., Learning Diffusion Priors from Observations (NeurIPS 2024), section 4.2.

    Args:
        prior: the denoiser.
        measurement: data of the batch, in prior units.
        iterations: conjugate-gradient steps a call.
        tol: relative residual at which they stop.

    Here: docs/theory.md, equation (26).
    """

    def __init__(
        self,
        prior: Denoiser,
        measurement: Measurement,
        *,
        iterations: int = 5,
        tol: float = 1e-3,
    ) -> None:
        super().__init__(prior, measurement)
        self.iterations, self.tol = iterations, tol
        self.v: Tensor | None = None

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``D + V A^H v`` of the class's equation."""
        a = self.operator
        x0, covariance = self._linearise(x_t, t)

        def apply(v: Tensor) -> Tensor:
            return v + a(covariance(a.adjoint(v)))

        self.v = cg(
            apply,
            self.data - a(x0),
            self.v,
            ndim=len(a.out_shape),
            tol=self.tol,
            max_iter=self.iterations,
        ).x
        return x0 + covariance(a.adjoint(self.v))


def ddnm_plus(measurement: Measurement, eta: float) -> Step:
    r"""The step of DDNM+ for operators with singular values 0 and 1.

    On the measured components, with :math:`a = \alpha_s,\ \sigma = \sigma_s`,

    .. math::
       x_s = a\,[(1-\lambda) D + \lambda y] + \nu z, \qquad
       (\lambda, \nu) = \begin{cases}
         (1, \sqrt{\sigma^2 - a^2\sigma_y^2}) & \sigma \ge a\sigma_y\\
         (\sigma\sqrt{1-\eta^2}/(a\sigma_y),\ \eta\sigma) & \text{otherwise}
       \end{cases}

    so that noise of the data and fresh noise add up to the variance :math:`\sigma^2`; on the
    others :math:`x_s = aD + \sigma(\sqrt{1-\eta^2}\,\hat\varepsilon + \eta z)`.

    Source: Wang, Yu, Zhang, DDNM (ICLR 2023), section 3.3 and appendix I.

    Args:
        measurement: data of the batch, in prior units.
        eta: share of fresh noise.

    Raises:
        UnsupportedError: for an operator with other singular values, or noise that varies between
            data that its adjoint mixes.
    """
    if not has_closed_form(measurement):
        raise UnsupportedError(
            f"DDNM+ needs the singular values of the operator to be 0 or 1 and its noise to be "
            f"independent a singular value (masks, single-coil Cartesian MRI), got "
            f"{measurement.operator!r}; choose HalfQuadratic, 'dds' or 'mmps'"
        )
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta, the share of fresh noise, must lie in [0, 1], got {eta}")
    operator, y, noise = measurement.operator, measurement.data, measurement.noise
    kept = (1 - eta**2) ** 0.5

    def step(
        sde: SDE, x_t: Tensor, x0: Tensor, t: float | Tensor, s: float | Tensor, z: Tensor
    ) -> Tensor:
        alpha, sigma = (expand(c, x_t) for c in sde.marginal(t))
        a, sigma_s = (expand(c, x_t) for c in sde.marginal(s))
        limit = a * noise
        hard = sigma_s >= limit
        lam = torch.where(hard, 1.0, kept * sigma_s / limit)
        nu = torch.where(hard, (sigma_s**2 - limit**2).clamp_min(0).sqrt(), eta * sigma_s)
        free = sigma_s * (kept * (x_t - alpha * x0) / sigma + eta * z)
        seen = a * lam * (y - operator(x0)) + nu * operator(z) - operator(free)
        return a * x0 + free + operator.adjoint(seen)

    return step


def has_closed_form(measurement: Measurement) -> bool:
    """Whether ``A A^H`` is the identity on the range of ``A`` weighted by the noise."""
    a = measurement.operator
    z = torch.randn(1, *a.in_shape, generator=torch.Generator().manual_seed(0), dtype=a.dtype)
    u = measurement.noise * a(z.to(measurement.data.device))
    return bool((a(a.adjoint(u)) - u).abs().max() < 1e-4 * u.abs().max())


def multistep(step: Step = ancestral) -> Step:
    r"""A step of second order for the price of one call: it remembers the previous estimate.

    .. math:: \tilde x_0 = \hat x_0(t_i) + \frac{h_i}{2 h_{i-1}}\,
              [\hat x_0(t_i) - \hat x_0(t_{i-1})], \qquad
              h_i = \log\frac{\tilde\sigma(t_i)}{\tilde\sigma(t_{i+1})}

    is the estimate extrapolated to the middle of the step in log noise level, and takes the place
    of :math:`\hat x_0` in ``step``.  Make a new one for every run.

    Source: Lu et al., DPM-Solver++ (2022), the two-step solvers 2M.
    """
    before: tuple[Tensor, Tensor] | None = None

    def extrapolated(
        sde: SDE, x_t: Tensor, x0: Tensor, t: float | Tensor, s: float | Tensor, z: Tensor
    ) -> Tensor:
        nonlocal before
        level, following = (torch.log(sde.noise_level(u)) for u in (t, s))
        estimate = x0
        if before is not None:
            ratio = (level - following) / (before[0] - level)
            estimate = x0 + expand(ratio / 2, x0) * (x0 - before[1])
        before = level, x0
        return step(sde, x_t, estimate, t, s, z)

    return extrapolated


def _gain(sde: SDE, times: Tensor, t: float | Tensor) -> float:
    """``kappa``: how far the ancestral step from ``t`` follows the estimate; 1 at the last."""
    i = int(torch.argmin((times - as_time(t).to(times.device)).abs()))
    if i + 1 == len(times):
        return 1.0
    s = times[i + 1]
    r = sde.alpha(t) / sde.alpha(s)
    g2 = sde.sigma(t) ** 2 - r**2 * sde.sigma(s) ** 2
    return float(sde.alpha(s) * g2 / sde.sigma(t) ** 2)


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """``Re <u, v>`` a batch element, float64."""
    if u.is_complex():
        u, v = torch.view_as_real(u), torch.view_as_real(v)
    return (u.double() * v.double()).flatten(1).sum(dim=1)
