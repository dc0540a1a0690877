r"""The probability-flow ODE: latents, their images, likelihoods.

The deterministic flow with the marginals of the SDE is :math:`dx = [f x - \tfrac12 g^2 s]\,dt`.
In :math:`y = x/\alpha` and the noise level :math:`\tilde\sigma = \sigma/\alpha` it is the same for
every SDE,

.. math:: \frac{dy}{d\tilde\sigma} = \frac{y - D(\alpha y, t)}{\tilde\sigma},

which is what is solved here.  Along it the density changes by the divergence,

.. math::
   \log p_{t_{min}}(x_0) = \log p_1(x_T) + d\,\log\frac{\alpha_1}{\alpha_{t_{min}}}
   + \int \frac{d - \mathrm{tr}\,\partial D/\partial y}{\tilde\sigma}\,d\tilde\sigma .

:math:`p_1` is not known and is replaced by :math:`N(0, \sigma_{max}^2 I)` (VE) or
:math:`N(0, I)` (VP, sub-VP): this mismatch, the solver and the estimate of the trace are the three
errors of a likelihood.  Data are taken as a draw of :math:`p_{t_{min}}`.

Source: Song et al. (ICLR 2021), section 4.3 and appendix D; Karras et al. (NeurIPS 2022),
equation 4; Chen et al., Neural Ordinary Differential Equations (NeurIPS 2018), theorem 1;
Grathwohl et al., FFJORD (ICLR 2019).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from inverse.errors import GeometryError, InputError, NumericalError, UnsupportedError
from inverse.priors.checkpoint import NetworkPrior
from inverse.priors.denoiser import Denoiser, expand
from inverse.sampling.sample import Noise, time_grid
from inverse.sde import SDE, VE

__all__ = [
    "RK45",
    "Heun",
    "Likelihood",
    "bits_per_dim",
    "decode",
    "dequantise",
    "encode",
    "log_likelihood",
    "slerp",
]

EXACT_LIMIT = 4096
"""Most pixels of an image whose trace is summed exactly, by one product a pixel."""


@dataclass(frozen=True)
class Heun:
    """Heun's method, order 2, on a fixed grid of noise levels.

    Attributes:
        steps: intervals; two network calls each.
        spacing: of noise levels; see :func:`inverse.sampling.time_grid`.
    """

    steps: int = 50
    spacing: Literal["geometric", "karras", "uniform"] = "geometric"


@dataclass(frozen=True)
class RK45:
    """Dormand and Prince's adaptive Runge-Kutta pair 5(4).

    Every sample of a batch has its own step size and error control.  A network prior computes in
    float32, because rounding to bfloat16 would be taken for an error of the step.

    Attributes:
        atol: absolute tolerance of one step, prior units.
        rtol: relative tolerance of one step.
        max_steps: accepted and rejected steps of a sample before it is given up.
    """

    atol: float = 1e-5
    rtol: float = 1e-5
    max_steps: int = 2000

    def __post_init__(self) -> None:
        if not (self.atol > 0 and self.rtol > 0):
            raise NumericalError(
                f"RK45 needs tolerances above 0, got atol {self.atol:g} and rtol {self.rtol:g}; "
                "1e-5 is customary"
            )


@dataclass(frozen=True)
class Likelihood:
    """Result of :func:`log_likelihood`; all float64.

    Attributes:
        nats: ``log p`` of each image as a density in prior units, ``(b,)``.
        log_prior: its part ``log p_1(x_T)``.
        volume: its part from the change of volume along the flow.
        standard_error: of the estimate of the trace, ``(b,)``: zero where it is exact, ``None``
            where one probe cannot tell.
        evaluations: network calls of each image, ``(b,)``.
        latent: ``x_T``, shape of the images.
    """

    nats: Tensor
    log_prior: Tensor
    volume: Tensor
    standard_error: Tensor | None
    evaluations: Tensor
    latent: Tensor


def encode(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    solver: RK45 | Heun = RK45(),
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The latent ``x_T`` of each image: the flow from ``t_min`` to 1.

    Args:
        denoiser: prior.
        x0: images ``(b, *shape)``, prior units.
        solver: how the ODE is solved.
        callback: progress, ``(done, total)``.

    Returns:
        ``x_T``, distributed nearly as ``N(0, sigma(1)^2)`` for images of the prior.

    Raises:
        GeometryError: images without a batch axis.
        NumericalError: images or a flow that are not finite, or a step that becomes too small.

    Here: docs/theory.md, equation (19).
    """
    flow = _Flow(denoiser, x0, solver)
    with torch.inference_mode(False), torch.no_grad():
        y, _, _ = flow.solve(flow.low, flow.high, callback)
        return expand(denoiser.sde.alpha(1.0), y) * y


def decode(
    denoiser: Denoiser,
    z: Tensor,
    *,
    solver: RK45 | Heun = RK45(),
    levels: tuple[float, float] | None = None,
    tweedie: bool = False,
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The image of each latent: the flow from 1 to ``t_min``, the inverse of :func:`encode`.

    Args:
        denoiser: prior.
        z: latents ``x_T``, ``(b, *shape)``.
        solver: how the ODE is solved.
        levels: noise levels ``sigma/alpha`` between which it is solved; default from that of
            ``t = 1`` to that of ``t_min``.  ``z`` is the state at the first.
        tweedie: end with ``D(x, t_min)``, which takes out the noise left at ``t_min``.
        callback: progress, ``(done, total)``.

    Returns:
        Images ``(b, *shape)`` in prior units.

    Raises:
        GeometryError: latents without a batch axis.
        NumericalError: as :func:`encode`.
    """
    sde = denoiser.sde
    flow = _Flow(denoiser, z, solver, levels)
    with torch.inference_mode(False), torch.no_grad():
        y, _, _ = flow.solve(flow.high, flow.low, callback)
        t = sde.time(flow.low)
        x = expand(sde.alpha(t), y) * y
        return flow.denoiser.denoise(x, t) if tweedie else x


def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    noise: Noise | None = None,
    *,
    divergence: Literal["exact", "rademacher", "gaussian"] = "rademacher",
    probes: int = 1,
    solver: RK45 | Heun = RK45(),
    log_prior: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> Likelihood:
    r"""``log p(x_0)`` in nats by the instantaneous change of variables.

    The trace is exact, at the price of one vector-Jacobian product a pixel, or Skilling's and
    Hutchinson's unbiased estimate :math:`v^T (\partial D/\partial y)\,v` with
    :math:`E[vv^T] = I` and ``v`` fixed along the trajectory.  Rademacher probes have the smaller
    variance: none from the diagonal of the Jacobian.  A network prior computes in float32.

    Args:
        denoiser: prior.
        x0: images ``(b, *shape)``, prior units.
        noise: source of the probes, one generator an image; not used by ``"exact"``.
        divergence: how the trace is found.
        probes: probes an image; two or more tell the standard error.
        solver: how the ODE is solved; :class:`Heun` takes the trapezoid rule in
            :math:`\log\tilde\sigma` for the trace.
        log_prior: density of ``x_T`` in nats, ``(b, *shape) -> (b,)``, where it is known; default
            the normal density of the module's text.
        callback: progress, ``(done, total)``.

    Raises:
        GeometryError: images without a batch axis, or probes of another shape.
        InputError: no ``noise`` or fewer than one probe where an estimate is wanted.
        UnsupportedError: an exact trace of large images.
        NumericalError: as :func:`encode`.

    Here: docs/theory.md, equation (20).
    """
    sde = denoiser.sde
    v = _probes(x0, noise, divergence, probes)
    with torch.inference_mode(False), torch.no_grad():
        flow = _Flow(denoiser, x0, solver, v=v, exact=divergence == "exact")
        y, integral, evaluations = flow.solve(flow.low, flow.high, callback)
        x_t = expand(sde.alpha(1.0), y) * y
        d = y[0].numel()
        stretch = torch.log(sde.alpha(1.0) / sde.alpha(sde.t_min))
        volume = d * (integral.to(torch.float64) + stretch.to(integral.device))
        if log_prior is None:
            std = float(sde.sigma(1.0)) if isinstance(sde, VE) else 1.0
            z = x_t.flatten(1).to(torch.float64) / std
            end = -0.5 * z.square().sum(dim=1) - d * math.log(std * math.sqrt(2 * math.pi))
        else:
            end = log_prior(x_t).to(torch.float64)
        error = torch.zeros_like(end) if divergence == "exact" else None
        if divergence != "exact" and probes > 1:
            error = volume.std(dim=1) / math.sqrt(probes)
        mean = volume.mean(dim=1)
        return Likelihood(end + mean, end, mean, error, evaluations, x_t)


def bits_per_dim(
    nats: Tensor, size: int, *, bin_width: float = 1 / 256, scale: float = 1.0
) -> Tensor:
    r"""Code length of quantised images in bits a dimension.

    .. math:: -\frac{\log p(x) + d\,\log(w/\mathrm{scale})}{d\,\ln 2}

    where ``p`` is the density of the dequantised image in prior units and
    ``physical = offset + scale * prior``.  For a density on [0, 1] with 256 levels this is the
    customary :math:`-\log p/(d \ln 2) + 8`.  With uniform dequantisation it bounds the code
    length of the quantised image from above, by Jensen's inequality.

    Args:
        nats: :attr:`Likelihood.nats`.
        size: dimensions ``d`` of an image.
        bin_width: distance ``w`` of two levels, physical units.
        scale: physical units per prior unit.

    Source: Theis, van den Oord, Bethge, A note on the evaluation of generative models
    (ICLR 2016), section 3.1.
    """
    if not (bin_width > 0 and scale > 0 and size > 0):
        raise InputError(
            f"bits a dimension need a bin width, a scale and a size above 0, got {bin_width:g}, "
            f"{scale:g} and {size}"
        )
    return -(nats / size + math.log(bin_width / scale)) / math.log(2)


def dequantise(x: Tensor, bin_width: float, noise: Noise) -> Tensor:
    """``x`` plus noise that is uniform over its bin ``[x - w/2, x + w/2)``.

    Args:
        x: quantised images ``(b, *shape)``, the centres of their bins.
        bin_width: width ``w`` of a bin, unit of ``x``.
        noise: source of randomness, one generator an image.
    """
    # the normal distribution function of a normal draw is uniform
    uniform = torch.special.ndtr(noise().to(torch.float64)) - 0.5
    return x + (bin_width * uniform).to(device=x.device, dtype=x.dtype)


def slerp(z0: Tensor, z1: Tensor, weight: float | Tensor) -> Tensor:
    r"""Spherical interpolation :math:`[\sin((1-w)\theta) z_0 + \sin(w\theta) z_1]/\sin\theta`.

    It keeps the norm of latents, which a straight line would shorten by up to the square root of
    two.  :math:`\theta` is the angle of each pair.

    Args:
        z0: latents ``(b, *shape)``.
        z1: latents ``(b, *shape)``.
        weight: ``w``, 0 at ``z0`` and 1 at ``z1``; a number or one a latent.

    Raises:
        GeometryError: shapes that differ.
        NumericalError: opposite or zero latents, between which no great circle is defined.

    Source: Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985).
    """
    if z0.shape != z1.shape or z0.ndim < 2:
        raise GeometryError(
            f"slerp needs two batches of latents of one shape (b, ...), got {tuple(z0.shape)} and "
            f"{tuple(z1.shape)}"
        )
    a, b = (z.flatten(1).to(torch.float64) for z in (z0, z1))
    lengths = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1)
    unit = a / lengths[0][:, None], b / lengths[1][:, None]
    # atan2 is exact for small angles, where the arc cosine loses half the digits
    chord, sum_ = (torch.linalg.vector_norm(u, dim=1) for u in (unit[0] - unit[1], sum(unit)))
    theta = 2 * torch.atan2(chord, sum_)
    if not bool((theta < math.pi - 1e-6).all()):
        raise NumericalError(
            "slerp between opposite or zero latents has no unique path; choose another pair"
        )
    w = torch.as_tensor(weight, dtype=torch.float64, device=z0.device)
    near = theta < 1e-9
    safe = torch.where(near, 1.0, theta)
    c0 = torch.where(near, 1 - w, torch.sin((1 - w) * safe) / torch.sin(safe))
    c1 = torch.where(near, w, torch.sin(w * safe) / torch.sin(safe))
    return expand(c0, z0) * z0 + expand(c1, z1) * z1


# --- the flow ----------------------------------------------------------------------------------


def _probes(
    x0: Tensor, noise: Noise | None, kind: Literal["exact", "rademacher", "gaussian"], count: int
) -> Tensor:
    """Probes ``(b or 1, count, *shape)``; for an exact trace the basis vectors."""
    if x0.ndim < 2:
        raise GeometryError(f"images must have a batch axis, (b, ...), got {tuple(x0.shape)}")
    if kind == "exact":
        d = x0[0].numel()
        if d > EXACT_LIMIT:
            raise UnsupportedError(
                f"an exact trace of images of {d} pixels needs as many products a network call "
                f"(at most {EXACT_LIMIT} are served); take divergence 'rademacher'"
            )
        return torch.eye(d, dtype=x0.dtype, device=x0.device).reshape(1, d, *x0.shape[1:])
    if kind not in ("rademacher", "gaussian"):
        raise InputError(f"divergence is 'exact', 'rademacher' or 'gaussian', got {kind!r}")
    if noise is None or count < 1:
        raise InputError(
            f"an estimated trace needs a source of noise and at least 1 probe, got {count} probes"
            f"{' and no noise' if noise is None else ''}"
        )
    v = torch.stack([noise() for _ in range(count)], dim=1).to(x0)
    if v.shape != (x0.shape[0], count, *x0.shape[1:]):
        raise GeometryError(
            f"probes of shape {tuple(v.shape[2:])} for {v.shape[0]} images do not fit images "
            f"{tuple(x0.shape)}; give a Noise of that batch and shape"
        )
    return torch.where(v < 0, -1.0, 1.0).to(v) if kind == "rademacher" else v


class _Flow:
    """The ODE of one batch in ``y = x / alpha``, with the integral of the trace where wanted.

    Args:
        denoiser: prior.
        x: its state at the level where :meth:`solve` starts, ``(b, *shape)``.
        solver: how it is solved.
        levels: largest and smallest noise level.
        v: probes of the trace, or basis vectors; see :func:`_probes`.
        exact: they are basis vectors.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        solver: RK45 | Heun,
        levels: tuple[float, float] | None = None,
        v: Tensor | None = None,
        exact: bool = False,
    ) -> None:
        if x.ndim < 2:
            raise GeometryError(f"images must have a batch axis, (b, ...), got {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise NumericalError(
                "the flow starts from values that are not finite; replace NaN and infinity first"
            )
        self.solver, self.sde = solver, denoiser.sde
        self.high, self.low = _levels(denoiser.sde) if levels is None else levels
        if not 0 < self.low < self.high:
            raise NumericalError(
                f"noise levels of a flow must be above 0 and fall, got {self.high:g} to "
                f"{self.low:g}"
            )
        adaptive = isinstance(solver, RK45)
        self.denoiser = _in_float32(denoiser) if adaptive or v is not None else denoiser
        # autograd cannot keep tensors that the caller made in inference mode
        with torch.inference_mode(False):
            weights = [*denoiser.parameters(), *denoiser.buffers()]
            if v is not None and any(w.is_inference() for w in weights):
                self.denoiser = copy.deepcopy(self.denoiser)
            self.x = x.detach().clone()
            self.v = None if v is None else v.detach().clone()
        self.shape, self.exact = x.shape[1:], exact

    def solve(
        self, begin: float, end: float, callback: Callable[[int, int], None] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From level ``begin`` to ``end``.

        Returns:
            ``y`` at the end; the integral of the trace over levels a dimension, ``(b, k)`` with
            ``k`` probes (1 if exact, 0 without); network calls a sample ``(b,)``.
        """
        y = self.x / expand(self.sde.alpha(self.sde.time(begin)), self.x)
        if isinstance(self.solver, Heun):
            return self._heun(y, self.solver, begin, end, callback)
        return self._rk45(y, self.solver, begin, end, callback)

    def slope(
        self, y: Tensor, t: Tensor, index: Tensor | None = None, *, trace: bool = True
    ) -> tuple[Tensor, Tensor]:
        """``dy/dlevel``, and ``1 - tr(dD/dy)/d`` for each probe, ``(b, k)``.

        Args:
            y: ``(m, *shape)``.
            t: time, 0-d or ``(m,)``, float64.
            index: which samples of the batch they are; default all.
            trace: whether the second is wanted.
        """
        level = self.sde.noise_level(t)
        alpha = expand(self.sde.alpha(t), y)
        if self.v is None or not trace:
            mean = self.denoiser.denoise(alpha * y, t)
            return (y - mean) / expand(level, y), y.new_zeros(len(y), 0)
        v = self.v.expand(len(self.x), *self.v.shape[1:])
        v = v if index is None else v[index]
        with torch.enable_grad():
            leaf = y.detach().clone().requires_grad_(True)
            mean = self.denoiser.denoise(alpha * leaf, t)
            products = []
            for k in range(v.shape[1]):
                keep = k + 1 < v.shape[1]
                (jv,) = torch.autograd.grad(mean, leaf, v[:, k], retain_graph=keep)
                products.append((jv * v[:, k]).flatten(1).sum(dim=1) / self.shape.numel())
        share = torch.stack(products, dim=1)
        # basis vectors make up one trace, probes are estimates of it each
        share = share.sum(dim=1, keepdim=True) if self.exact else share
        return (y - mean.detach()) / expand(level, y), 1 - share

    def _heun(
        self,
        y: Tensor,
        solver: Heun,
        begin: float,
        end: float,
        callback: Callable[[int, int], None] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if solver.steps < 1:
            raise InputError(f"Heun's method needs at least 1 step, got {solver.steps}")
        high, low = max(begin, end), min(begin, end)
        times = time_grid(self.sde, solver.steps + 1, start=high, end=low, spacing=solver.spacing)
        times = times if begin > end else times.flip(0)
        levels = self.sde.noise_level(times)
        k1, trace = self.slope(y, times[0])
        integral = torch.zeros_like(trace)
        calls = 1
        for i, (a, b) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
            last, h = i + 2 == len(levels), expand(b - a, y)
            k2, _ = self.slope(y + h * k1, times[i + 1], trace=False)
            y = y + h / 2 * (k1 + k2)
            before = trace
            calls += 1
            if not last or self.v is not None:
                k1, trace = self.slope(y, times[i + 1])
                calls += 1
            integral = integral + (before + trace) / 2 * expand(torch.log(b / a), y)
            if not bool(torch.isfinite(y).all() & torch.isfinite(integral).all()):
                raise NumericalError(
                    f"Heun's method left the finite numbers at step {i + 1} of {solver.steps}; "
                    "take more steps"
                )
            if callback is not None:
                callback(i + 1, solver.steps)
        return y, integral, torch.full((len(y),), calls)

    def _rk45(
        self,
        y: Tensor,
        solver: RK45,
        begin: float,
        end: float,
        callback: Callable[[int, int], None] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        d = self.shape.numel()

        def f(level: Tensor, u: Tensor, index: Tensor) -> Tensor:
            t = self.sde.time(level)
            slope, trace = self.slope(u[:, :d].reshape(-1, *self.shape), t, index)
            rate = trace / expand(level, trace)
            return torch.cat([slope.flatten(1), rate], dim=1)

        k = 0 if self.v is None else 1 if self.exact else self.v.shape[1]
        u = torch.cat([y.flatten(1), y.new_zeros(len(y), k)], dim=1)
        u, calls = _dormand_prince(f, u, d, begin, end, solver, callback)
        return u[:, :d].reshape(y.shape), u[:, d:], calls


def _levels(sde: SDE) -> tuple[float, float]:
    return float(sde.noise_level(1.0)), float(sde.noise_level(sde.t_min))


def _in_float32(denoiser: Denoiser) -> Denoiser:
    """A network prior that computes in float32; any other denoiser as it is."""
    if not isinstance(denoiser, NetworkPrior):
        return denoiser
    other = copy.copy(denoiser)  # weights stay shared
    other.dtype = torch.float32
    return other


# --- Dormand and Prince ------------------------------------------------------------------------

_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Butcher's tableau; the last row is the solution of order 5, whose slope starts the next step."""
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Solution of order 5 minus that of order 4."""


def _dormand_prince(
    f: Callable[[Tensor, Tensor, Tensor], Tensor],
    u: Tensor,
    width: int,
    begin: float,
    end: float,
    solver: RK45,
    callback: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor]:
    """Solve ``du/ds = f(s, u, index)`` from ``begin`` to ``end``, each row at its own step.

    Args:
        f: slope of the rows ``index`` at their own ``s``.
        u: ``(b, width + k)``; the error of the first ``width`` columns is judged by their root
            mean square, that of each of the others by itself.
        width: see there.
        begin: first value of ``s``.
        end: last value of ``s``.
        solver: tolerances.
        callback: progress.

    Returns:
        ``u`` at the end, and the calls of ``f`` of each row.

    Source: Dormand and Prince, J. Comput. Appl. Math. 6 (1980) 19; step control as in Hairer,
    Norsett, Wanner, Solving Ordinary Differential Equations I, section II.4.
    """

    def size(e: Tensor, *states: Tensor) -> Tensor:
        """Error or slope in units of the tolerance, ``(m,)``, float64."""
        largest = torch.stack([state.abs() for state in states]).amax(dim=0)
        e = (e / (solver.atol + solver.rtol * largest)).to(torch.float64)
        rms = e[:, :width].square().mean(dim=1, keepdim=True).sqrt()
        return torch.cat([rms, e[:, width:].abs()], dim=1).amax(dim=1).cpu()

    b, sign = len(u), math.copysign(1.0, end - begin)
    s = torch.full((b,), begin, dtype=torch.float64)
    calls = torch.full((b,), 2)
    u = u.clone()
    everyone = torch.arange(b)
    slope = f(s, u, everyone)
    h = _first_step(f, s, u, slope, abs(end - begin), sign, size)
    rejected = torch.zeros(b, dtype=torch.bool)
    active, total, tried = everyone, 1000, 0
    while len(active):
        tried += 1
        left = (end - s[active]).abs()
        step = sign * torch.minimum(h[active], left)
        if tried > solver.max_steps or bool((step.abs() < 1e-13 * s[active].abs()).any()):
            raise NumericalError(
                f"RK45 does not reach atol {solver.atol:g} and rtol {solver.rtol:g} "
                f"({tried} steps of {solver.max_steps}, smallest {float(step.abs().min()):.1e}); "
                "raise the tolerances, or compute in float64"
            )
        here, k = u[active], [slope[active]]
        for node, row in zip(_NODES[1:], _STAGES[1:], strict=True):
            move = sum(a * ki for a, ki in zip(row, k, strict=True) if a)
            there = here + expand(step, here) * move
            k.append(f(s[active] + node * step, there, active))
        calls[active] += 6
        error = expand(step, here) * sum(a * ki for a, ki in zip(_ERROR, k, strict=True) if a)
        measure = size(error, here, there)
        if not bool(torch.isfinite(measure).all()):
            raise NumericalError(
                "the flow left the finite numbers; check the scale of the images and the prior"
            )
        good = measure <= 1
        factor = (0.9 * measure.clamp_min(1e-12) ** -0.2).clamp(0.2, 10.0)
        # no growth right after a rejection, which would be rejected again
        factor = torch.where(rejected[active] | ~good, factor.clamp_max(1.0), factor)
        moved = active[good]
        u[moved], slope[moved] = there[good], k[-1][good]
        arrived = step.abs() >= left
        s[moved] = torch.where(arrived, end, s[active] + step)[good]
        h[active], rejected[active] = step.abs() * factor, ~good
        active = active[~(good & arrived)]
        if callback is not None:
            callback(_done(s, begin, end, total), total)
    return u, calls


def _first_step(
    f: Callable[[Tensor, Tensor, Tensor], Tensor],
    s: Tensor,
    u: Tensor,
    slope: Tensor,
    longest: float,
    sign: float,
    size: Callable[..., Tensor],
) -> Tensor:
    """Length of each row's first step, from the size of its slope and of the slope's change."""
    d0, d1 = size(u, u), size(slope, u).clamp_min(1e-12)
    h0 = (0.01 * d0 / d1).clamp(1e-6 * longest, longest)
    ahead = f(s + sign * h0, u + expand(sign * h0, u) * slope, torch.arange(len(u)))
    d2 = size(ahead - slope, u) / h0
    h1 = (0.01 / torch.maximum(d1, d2)) ** 0.2
    return torch.minimum(100 * h0, h1).clamp_max(longest)


def _done(s: Tensor, begin: float, end: float, total: int) -> int:
    """Share of the way that the slowest row has gone, in the logarithm of the level."""
    return int(total * float((torch.log(s / begin) / math.log(end / begin)).min()))
