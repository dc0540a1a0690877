r"""Training objectives of scores, denoisers and energies.

Pure functions take plain callables on tensors ``(n, *shape)``, an analytic score as well as a
network, and return one loss a sample, ``(n,)``; all randomness is an argument.  Notation: score
:math:`s`, denoiser :math:`D = x + \sigma^2 s`, energy :math:`E` with :math:`s = -\nabla E`,
``d`` unknowns.  All hold on clean and on perturbed samples alike, since :math:`x_0 + \sigma z` is
again a sample of a density.  Losses carry a graph for the backward pass unless called under
``no_grad``.

:data:`OBJECTIVES` names those that ``recon train --objective`` offers.  There they train a model
of the perturbed images :math:`x = x_0 + \sigma z` conditional on :math:`\sigma`, so that each
yields a prior for every sampler.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse.errors import InputError, NumericalError, ReconError, UnsupportedError
from inverse.priors.denoiser import expand
from inverse.priors.energy import energy_score
from inverse.sde import SDE, VE
from inverse.training.flow import RealNVP

__all__ = [
    "EXACT_LIMIT",
    "OBJECTIVES",
    "Model",
    "Objective",
    "ObjectiveEntry",
    "Perturbed",
    "Setting",
    "Weighting",
    "contrastive_divergence",
    "denoising_score_matching",
    "draw_levels",
    "exact_score_matching",
    "flow_contrastive_estimation",
    "geometric_levels",
    "langevin_chain",
    "lognormal_levels",
    "noise_contrastive_estimation",
    "persistent_contrastive_divergence",
    "projections",
    "sliced_score_matching",
    "sure",
    "weight",
]

Field: TypeAlias = Callable[[Tensor], Tensor]
"""A function of points alone: a score ``(n, *shape) -> (n, *shape)`` or an energy ``-> (n,)``."""
Weighting = Literal["edm", "sigma2", "likelihood"]

EXACT_LIMIT = 1024
"""Most unknowns for the exact trace, which costs one backward pass each."""
WHOLE_LIMIT = 4096
"""Most pixels for objectives with a dense noise density (NCE's Gaussian, FCE's flow)."""


# --- score matching ----------------------------------------------------------------------------


def exact_score_matching(score: Field, x: Tensor, *, limit: int = EXACT_LIMIT) -> Tensor:
    r"""Hyvarinen's score matching, without the data's score.

    .. math:: L = E\left[\mathrm{tr}\,\nabla s(x) + \tfrac12 \|s(x)\|^2\right]
              = \tfrac12 E\|s - \nabla\log p\|^2 - \tfrac12 E\|\nabla\log p\|^2

    The trace takes ``d`` vector-Jacobian products.

    Source: Hyvarinen, Estimation of non-normalized statistical models by score matching (JMLR
    2005), theorem 1, equation 4.

    Args:
        score: ``(n, *shape) -> (n, *shape)``.
        x: samples ``(n, *shape)``.
        limit: most unknowns a sample.

    Returns:
        Losses ``(n,)``.

    Raises:
        UnsupportedError: for more unknowns than ``limit``.
        InputError: for samples that are not finite.

    Here: docs/theory.md, equation (8).
    """
    _check_samples(x)
    d = x[0].numel()
    if d > limit:
        raise UnsupportedError(
            f"exact score matching takes one backward pass an unknown, at most {limit}, got {d}; "
            "use sliced score matching (ssm-vr) or smaller images"
        )
    u, s = _follow(score, x)
    trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for i in range(d):
        e = torch.zeros_like(x)
        e.flatten(1)[:, i] = 1
        trace = trace + _vjp(s, u, e).flatten(1)[:, i]
    return trace + 0.5 * _dot(s, s)


def sliced_score_matching(
    score: Field, x: Tensor, v: Tensor, *, variance_reduced: bool = True
) -> Tensor:
    r"""Sliced score matching: Hyvarinen's objective along random directions.

    .. math::
       L_{SSM} = E\left[v^T \nabla s\, v + \tfrac12 (v^T s)^2\right], \qquad
       L_{SSM\text{-}VR} = E\left[v^T \nabla s\, v + \tfrac12 \|s\|^2\right]

    Both average to :func:`exact_score_matching` for :math:`E[v v^T] = I`.

    Source: Song, Garg, Shi, Ermon, Sliced score matching (UAI 2019), section 3.1: the sliced
    objective and its variance-reduced form.

    Args:
        score: ``(n, *shape) -> (n, *shape)``.
        x: samples ``(n, *shape)``.
        v: directions ``(n, *shape)``, or ``(m, n, *shape)`` to average over ``m``; see
            :func:`projections`.
        variance_reduced: SSM-VR, else SSM.

    Returns:
        Losses ``(n,)``.

    Raises:
        InputError: for samples that are not finite or directions of another shape.

    Here: docs/theory.md, equation (9).
    """
    _check_samples(x)
    directions = v if v.ndim == x.ndim + 1 else v[None]
    if directions.shape[1:] != x.shape:
        raise InputError(
            f"projection vectors must have the samples' shape {tuple(x.shape)}, with or without "
            f"a leading number of projections, got {tuple(v.shape)}"
        )
    u, s = _follow(score, x)
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for w in directions:
        total = total + _dot(_vjp(s, u, w), w)
        total = total + 0.5 * (_dot(s, s) if variance_reduced else _dot(s, w) ** 2)
    return total / len(directions)


def projections(
    x: Tensor, generator: torch.Generator, kind: Literal["rademacher", "gaussian"] = "rademacher"
) -> Tensor:
    """Random directions with :math:`E[v v^T] = I`, of the shape, dtype and device of ``x``."""
    if kind == "gaussian":
        v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    elif kind == "rademacher":
        v = 2 * torch.randint(2, x.shape, generator=generator).to(x.dtype) - 1
    else:
        raise ReconError(f"projections are 'rademacher' or 'gaussian', got '{kind}'")
    return v.to(x.device)


# --- denoising ---------------------------------------------------------------------------------


def weight(
    sigma: Tensor, sigma_data: float, weighting: Weighting, diffusion: Tensor | None = None
) -> Tensor:
    r""":math:`w(\sigma)` on the denoising error, shape of ``sigma``.

    With :math:`\lambda` the weight on the score error, :math:`w = \lambda/\sigma^4`.

    ``sigma2``: :math:`\lambda = \sigma^2`, NCSN's choice (Song and Ermon 2019, section 4.2).
    ``edm``: :math:`w = (\sigma^2+\sigma_d^2)/(\sigma\sigma_d)^2`, unit loss at the start for all
    levels (Karras et al. 2022, table 1).
    ``likelihood``: :math:`\lambda = g(t)^2`, with times drawn uniformly; then half the excess over
    the floor, ``d`` times, is the drop of the KL divergence along the process (Song, Durkan,
    Murray, Ermon, Maximum likelihood training of score-based diffusion models, NeurIPS 2021,
    theorem 1).

    Args:
        sigma: noise levels.
        sigma_data: standard deviation of the images, for ``edm``.
        weighting: the name.
        diffusion: ``g(t)`` of the times of the levels, for ``likelihood``.
    """
    if weighting == "edm":
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    if weighting == "sigma2":
        return sigma**-2
    if weighting == "likelihood" and diffusion is not None:
        return diffusion.to(sigma) ** 2 / sigma**4
    raise ReconError(
        f"a weighting is 'edm', 'sigma2', or 'likelihood' with the diffusion g(t) of each level, "
        f"got '{weighting}'{'' if diffusion is None else ' with a diffusion'}"
    )


def denoising_score_matching(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    sigma: Tensor,
    z: Tensor,
    sigma_data: float,
    weighting: Weighting = "edm",
    diffusion: Tensor | None = None,
) -> Tensor:
    r"""Denoising score matching, mean over unknowns of the weighted error.

    .. math::
       L = E_{x_0, \sigma, z}\; w(\sigma)\, \| D(x_0 + \sigma z, \sigma) - x_0 \|^2 / d
         = E\; w(\sigma)\,\sigma^4 \| s(x, \sigma) + z/\sigma \|^2 / d

    Its floor is positive, :math:`w\sigma^4(1/\sigma^2 - J_\sigma/d)` with :math:`J_\sigma` the
    Fisher information of the perturbed density: a loss below it is overfitting or a bug.

    Source: Vincent, A connection between score matching and denoising autoencoders (2011),
    section 4.2; Song and Ermon, NCSN (NeurIPS 2019), equations 5 and 6 (many levels: ``sigma``
    drawn from :func:`geometric_levels`); Karras et al., EDM (NeurIPS 2022), equation 2.

    Args:
        denoise: ``(x, sigma) -> E[x_0 | x]``, samples ``(n, *shape)`` and levels ``(n,)``.
        x0: clean samples ``(n, *shape)``.
        sigma: noise levels ``(n,)``.
        z: standard normal noise of the shape of ``x0``.
        sigma_data: standard deviation of the samples.
        weighting: see :func:`weight`.
        diffusion: see :func:`weight`.

    Returns:
        Losses ``(n,)``.

    Raises:
        InputError: for samples that are not finite, levels that are not positive, or shapes that
            do not fit.

    Here: docs/theory.md, equation (10).
    """
    _check_samples(x0)
    _check_levels(sigma, x0)
    if z.shape != x0.shape:
        raise InputError(
            f"noise must have the shape {tuple(x0.shape)} of the samples, got {tuple(z.shape)}"
        )
    x = x0 + expand(sigma, x0) * z
    error = (denoise(x, sigma) - x0).square().flatten(1).mean(dim=1)
    return weight(sigma, sigma_data, weighting, diffusion) * error


def sure(
    denoise: Callable[[Tensor, Tensor], Tensor], y: Tensor, sigma: Tensor, v: Tensor
) -> Tensor:
    r"""Stein's unbiased risk estimate: the error of a denoiser, seen from noisy samples alone.

    .. math:: R = \frac{\|D(y) - y\|^2}{d} - \sigma^2 + \frac{2\sigma^2}{d}\, v^T \nabla D(y)\, v,
              \qquad E[R] = E\|D(y) - x_0\|^2/d

    for :math:`y = x_0 + \sigma z`, any fixed :math:`x_0` and :math:`E[v v^T] = I`.

    Source: Stein, Estimation of the mean of a multivariate normal distribution (Annals of
    Statistics 1981), theorem 1; random divergence: Ramani, Blu, Unser, Monte-Carlo SURE (IEEE
    TIP 2008), theorem 2, with the derivative exact here.

    Args:
        denoise: ``(y, sigma) -> E[x_0 | y]``.
        y: noisy samples ``(n, *shape)``.
        sigma: their noise levels ``(n,)``.
        v: directions of the shape of ``y``; see :func:`projections`.

    Returns:
        Estimates of the mean squared error a sample ``(n,)``; single ones can be negative.

    Raises:
        InputError: as :func:`denoising_score_matching`.

    Here: docs/theory.md, equation (12).
    """
    _check_samples(y)
    _check_levels(sigma, y)
    if v.shape != y.shape:
        raise InputError(
            f"projection vectors must have the shape {tuple(y.shape)} of the samples, got "
            f"{tuple(v.shape)}"
        )
    u, mean = _follow(lambda w: denoise(w, sigma), y)
    d = y[0].numel()
    s2 = sigma.to(y) ** 2
    divergence = _dot(_vjp(mean, u, v), v)
    return (mean - y).square().flatten(1).sum(dim=1) / d - s2 + 2 * s2 * divergence / d


# --- noise levels ------------------------------------------------------------------------------


def lognormal_levels(
    count: int,
    mean: float,
    std: float,
    bounds: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Noise levels with ``ln sigma ~ N(mean, std^2)`` clipped to ``bounds``, shape ``(count,)``.

    Drawn by stratified quantiles: one draw a stratum, so that a small batch sees all levels.
    Source: Karras et al., EDM (NeurIPS 2022), table 1.
    """
    u = _stratified(count, generator)
    ln = mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
    level = torch.exp(ln).clamp(*bounds)
    return level[torch.randperm(count, generator=generator)]


def geometric_levels(bounds: tuple[float, float], count: int) -> Tensor:
    """NCSN's ladder: ``count`` levels in geometric progression, largest first.

    Source: Song and Ermon, NCSN (NeurIPS 2019), section 4.2.
    """
    low, high = bounds
    if not 0 < low <= high or count < 1:
        raise ReconError(
            f"a ladder needs 0 < low <= high and at least one level, got {bounds} and {count}"
        )
    return torch.logspace(math.log10(high), math.log10(low), count)


def draw_levels(ladder: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` levels of a ladder, each as likely, stratified like :func:`lognormal_levels`."""
    index = (_stratified(count, generator) * len(ladder)).long().clamp(max=len(ladder) - 1)
    return ladder[index[torch.randperm(count, generator=generator)]]


def _uniform_levels(count: int, sde: SDE, generator: torch.Generator) -> Tensor:
    """Levels at times uniform on ``(0, 1)``, stratified."""
    level = sde.noise_level(_stratified(count, generator).double()).float()
    return level[torch.randperm(count, generator=generator)]


def _stratified(count: int, generator: torch.Generator) -> Tensor:
    """One uniform draw in each of ``count`` strata of (0, 1), in order."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


# --- energies ----------------------------------------------------------------------------------


def langevin_chain(
    score: Field, x: Tensor, epsilon: float | Tensor, noise: Tensor, *, bound: float = 1e3
) -> Tensor:
    r"""Unadjusted Langevin: :math:`x \leftarrow x + \epsilon\, s(x) + \sqrt{2\epsilon}\, z`.

    Its stationary law differs from the target by :math:`O(\epsilon)`: variance
    :math:`1/(1-\epsilon/2)` on N(0, 1).

    Source: Roberts and Tweedie, Exponential convergence of Langevin distributions and their
    discrete approximations (Bernoulli 1996), section 1.4.1.

    Args:
        score: ``(n, *shape) -> (n, *shape)``.
        x: starts ``(n, *shape)``.
        epsilon: step size, a number or ``(n,)``.
        noise: standard normal ``(k, n, *shape)``, one a step.
        bound: largest root mean square of a chain relative to one plus that of ``x``.

    Returns:
        The last states ``(n, *shape)``, detached.

    Raises:
        InputError: for a step size that is not positive or noise of another shape.
        NumericalError: if a chain diverges.

    Here: docs/theory.md, equation (3).
    """
    _check_samples(x)
    step = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device)
    if not bool((step > 0).all()) or noise.shape[1:] != x.shape:
        raise InputError(
            f"Langevin needs positive step sizes and noise (steps, *{tuple(x.shape)}), got "
            f"{float(step.min()):g} and {tuple(noise.shape)}"
        )
    step = expand(step, x)
    limit = bound * (1 + _rms(x))
    with torch.no_grad():
        for z in noise:
            x = x + step * score(x) + torch.sqrt(2 * step) * z
            size = _rms(x)
            if not bool((size <= limit).all()):  # false for NaN too
                raise NumericalError(
                    f"Langevin diverged: a chain's root mean square is {float(size.max()):.3g}, "
                    f"expected at most {float(limit.min()):.3g}; lower the step size "
                    f"(largest {float(step.max()):.3g})"
                )
    return x.detach()


def contrastive_divergence(
    energy: Field, x: Tensor, epsilon: float | Tensor, noise: Tensor
) -> Tensor:
    r"""CD-k: the energy of samples against that of ``k`` Langevin steps from them.

    .. math:: L = E_{p}[E_\theta(x)] - E_{p_k}[E_\theta(\mathrm{sg}(x_k))], \qquad x_0 = x \sim p

    Its gradient is :math:`E_p \nabla_\theta E - E_{p_k}\nabla_\theta E`; its zero is where ``k``
    steps leave the data's moments alone.  For :math:`E = \theta x^2/2`, one step and variance v
    that is :math:`\theta = (1 - \sqrt{1 - 2\epsilon/v})/\epsilon`, a bias of the step size.

    Source: Hinton, Training products of experts by minimizing contrastive divergence (Neural
    Computation 2002), equation 5 without its small third term; Langevin as in Du and Mordatch
    (NeurIPS 2019), equation 1.

    Args:
        energy: ``(n, *shape) -> (n,)``.
        x: samples ``(n, *shape)``.
        epsilon: step size, a number or ``(n,)``.
        noise: standard normal ``(k, n, *shape)``.

    Returns:
        Losses ``(n,)``; only their gradient means something.

    Raises:
        InputError, NumericalError: see :func:`langevin_chain`.

    Here: docs/theory.md, equation (4).
    """
    return persistent_contrastive_divergence(energy, x, x, epsilon, noise)[0]


def persistent_contrastive_divergence(
    energy: Field,
    x: Tensor,
    chains: Tensor,
    epsilon: float | Tensor,
    noise: Tensor,
    *,
    chain_energy: Field | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Persistent CD: negatives continue the chains of earlier steps.

    .. math:: L = E_{p}[E_\theta(x)] - E_\theta(\mathrm{sg}(x^-)), \qquad
              x^- = \text{k Langevin steps from } \texttt{chains}

    Chains that keep up with the parameters follow the stationary law of Langevin, so that the
    fixed point is that law's: for :math:`E = \theta x^2/2` its variance is
    :math:`1/(\theta(1 - \epsilon\theta/2))`.

    Source: Tieleman, Training restricted Boltzmann machines using approximations to the
    likelihood gradient (ICML 2008), section 3.

    Args:
        energy: ``(n, *shape) -> (n,)``.
        x: samples ``(n, *shape)``.
        chains: states of the chains, of the shape of ``x``.
        epsilon: step size, a number or ``(n,)``.
        noise: standard normal ``(k, n, *shape)``.
        chain_energy: the energy under the chains' own conditions, where they differ.

    Returns:
        Losses ``(n,)`` and the chains' new states.

    Raises:
        InputError: see :func:`langevin_chain`, or chains of another shape than ``x``.
        NumericalError: see :func:`langevin_chain`.
    """
    _check_samples(x)
    if chains.shape != x.shape:
        raise InputError(
            f"persistent chains must have the samples' shape {tuple(x.shape)}, got "
            f"{tuple(chains.shape)}"
        )
    own = energy if chain_energy is None else chain_energy
    negatives = langevin_chain(lambda u: energy_score(own, u), chains, epsilon, noise)
    return energy(x) - own(negatives), negatives


def noise_contrastive_estimation(
    log_model: Field, log_noise: Field, x: Tensor, y: Tensor
) -> Tensor:
    r"""Noise-contrastive estimation: tell samples from noise by a density with a free constant.

    .. math:: L = -\log h(x) - \log(1 - h(y)), \qquad
              h(u) = \frac{p_\theta(u)}{p_\theta(u) + q(u)}, \quad
              \log p_\theta = -E_\theta - c

    with as many noise samples :math:`y \sim q` as samples; :math:`c` is learned and converges to
    the log-normaliser.

    Source: Gutmann and Hyvarinen, Noise-contrastive estimation (AISTATS 2010), equations 3 to 5.

    Args:
        log_model: ``-E - c``, ``(n, *shape) -> (n,)``.
        log_noise: ``log q``, normalised.
        x: samples ``(n, *shape)``.
        y: noise samples of the shape of ``x``.

    Returns:
        Losses ``(n,)``; :math:`2\ln 2` where model and noise are the same.

    Raises:
        InputError: for samples that are not finite, or of another number than the noise.

    Here: docs/theory.md, equation (5).
    """
    _check_samples(x)
    _check_samples(y.detach())
    if y.shape != x.shape:
        raise InputError(
            f"NCE takes as many noise samples as samples, {tuple(x.shape)}, got {tuple(y.shape)}"
        )
    return F.softplus(log_noise(x) - log_model(x)) + F.softplus(log_model(y) - log_noise(y))


def flow_contrastive_estimation(log_model: Field, log_flow: Field, x: Tensor, y: Tensor) -> Tensor:
    r"""Flow-contrastive estimation: NCE whose noise is a flow that learns to be hard.

    .. math:: \min_\phi \max_\theta V, \qquad
              V = E_p \log\frac{p_\theta}{p_\theta + q_\phi}
                + E_{q_\phi} \log\frac{q_\phi}{p_\theta + q_\phi}

    The loss is :math:`-V`.  Gradients that reach the flow, by its samples and by its density, are
    reversed, so that one descent step raises V in :math:`\theta` and lowers it in :math:`\phi`.
    At the optimum all densities agree and :math:`V = -2\ln 2`.

    Source: Gao et al., Flow contrastive estimation of energy-based models (CVPR 2020), section
    3.3, its value function of both models.

    Args:
        log_model: ``-E - c``, ``(n, *shape) -> (n,)``, without parameters of the flow.
        log_flow: ``log q_phi``, for instance :meth:`inverse.training.flow.RealNVP.log_prob`.
        x: samples ``(n, *shape)``.
        y: samples of the flow, of the shape of ``x``, differentiable by its parameters.

    Returns:
        Losses ``(n,)``.

    Raises:
        InputError: see :func:`noise_contrastive_estimation`.

    Here: docs/theory.md, equation (6).
    """
    # y enters the model reversed and the flow's density plainly, whose value is then reversed
    sampled = _Reverse.apply(y)

    def log_noise(u: Tensor) -> Tensor:
        return _Reverse.apply(log_flow(y if u is sampled else u))

    return noise_contrastive_estimation(log_model, log_noise, x, sampled)


class _Reverse(torch.autograd.Function):
    """The identity, whose derivative is minus one (Ganin and Lempitsky, ICML 2015)."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        """``x``."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        """Minus the gradient."""
        return -gradients[0]


# --- checks and small algebra ------------------------------------------------------------------


def _check_samples(x: Tensor) -> None:
    if x.ndim < 2 or not x.is_floating_point() or not len(x):
        raise InputError(
            f"samples must be a real floating-point tensor (n, *shape) with n > 0, got {x.dtype} "
            f"of shape {tuple(x.shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise InputError("samples hold NaN or infinite values; remove or repair those images")


def _check_levels(sigma: Tensor, x: Tensor) -> None:
    if sigma.shape != x.shape[:1]:
        raise InputError(
            f"noise levels must be one a sample, shape {tuple(x.shape[:1])}, got "
            f"{tuple(sigma.shape)}"
        )
    if not bool(((sigma > 0) & torch.isfinite(sigma)).all()):
        raise InputError(
            f"noise levels must be positive and finite, got {float(sigma.min()):g} to "
            f"{float(sigma.max()):g}; for clean samples use score matching without noise"
        )


def _follow(function: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as autograd's input, and the function's value there."""
    with torch.enable_grad():
        u = x if x.requires_grad else x.detach().clone().requires_grad_(True)
        value = function(u)
    if value.shape != x.shape or not value.requires_grad:
        raise ReconError(
            f"a score or denoiser must be a differentiable function onto the samples' shape "
            f"{tuple(x.shape)}, got {tuple(value.shape)}; compute it without detach or no_grad"
        )
    return u, value


def _vjp(output: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``v^T d output / du``; differentiable where gradients are enabled."""
    again = torch.is_grad_enabled()
    return torch.autograd.grad(output, u, v, create_graph=again, retain_graph=True)[0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products a sample, ``(n,)``."""
    return (a * b).flatten(1).sum(dim=1)


def _rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(dim=1).sqrt()


# --- objectives of a training run --------------------------------------------------------------


@dataclass(frozen=True)
class Perturbed:
    """A batch of images in prior units and the noise on them.

    Attributes:
        x0: clean images ``(b, h, w)``.
        sigma: noise levels ``(b,)``.
        z: standard normal noise ``(b, h, w)``.
        pixel_mm: pixel sizes ``(b,)``.
    """

    x0: Tensor
    sigma: Tensor
    z: Tensor
    pixel_mm: Tensor

    @property
    def x(self) -> Tensor:
        """``x0 + sigma z``."""
        return self.x0 + expand(self.sigma, self.x0) * self.z


@dataclass(frozen=True)
class Model:
    """The network under training, at the positions of the batch.

    Attributes:
        denoise: ``(x, sigma, pixel_mm) -> D``, ``(b, h, w)``.
        energy: ``(x, sigma, pixel_mm) -> E``, ``(b,)``; of an energy network.
        sigma_data: standard deviation of the images.
    """

    denoise: Callable[[Tensor, Tensor, Tensor], Tensor]
    energy: Callable[[Tensor, Tensor, Tensor], Tensor]
    sigma_data: float

    def denoiser(self, batch: Perturbed) -> Callable[[Tensor, Tensor], Tensor]:
        """``(x, sigma) -> D`` at the pixel sizes of the batch."""
        return lambda x, sigma: self.denoise(x, sigma, batch.pixel_mm)

    def score(self, batch: Perturbed) -> Field:
        """``x -> (D - x) / sigma^2`` at the levels of the batch."""
        s2 = expand(batch.sigma**2, batch.x0)
        return lambda x: (self.denoise(x, batch.sigma, batch.pixel_mm) - x) / s2


@dataclass(frozen=True)
class Setting:
    """What the objectives of a run are told.

    Attributes:
        sigma_range: noise levels; equal ends for a single one.
        p_mean: mean of ln sigma.
        p_std: standard deviation of ln sigma.
        levels: length of NCSN's ladder.
        langevin_steps: steps of Langevin for negatives.
        langevin_step: their size relative to sigma^2.
        chains: number of persistent chains.
        sigma_data: standard deviation of the images.
    """

    sigma_range: tuple[float, float]
    p_mean: float
    p_std: float
    levels: int
    langevin_steps: int
    langevin_step: float
    chains: int
    sigma_data: float


class Objective(nn.Module, ABC):
    """One objective in a run; its buffers and parameters are part of the run's state.

    Args:
        setting: see :class:`Setting`.
        start: clean training images ``(m, h, w)`` in prior units.
        pixel_mm: their pixel sizes ``(m,)``.
        generator: randomness of the start.

    Attributes:
        together: whether the losses draw noise for, or keep state of, a whole batch, which one
            process must then hold.
        second_order: whether they take derivatives of the network's derivatives.
    """

    together: ClassVar[bool] = True
    second_order: ClassVar[bool] = True

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.setting = setting

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels of a batch ``(count,)``; lognormal unless overridden."""
        s = self.setting
        return lognormal_levels(count, s.p_mean, s.p_std, s.sigma_range, generator)

    @abstractmethod
    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        """Losses of a batch ``(b,)``; advances the state."""


class _Denoising(Objective):
    weighting: Weighting = "edm"
    together = False
    second_order = False

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        return denoising_score_matching(
            model.denoiser(batch),
            batch.x0,
            batch.sigma,
            batch.z,
            model.sigma_data,
            self.weighting,
            self.diffusion(batch.sigma),
        )

    def diffusion(self, sigma: Tensor) -> Tensor | None:
        """``g`` of the levels, where the weighting takes it."""
        return None


class _Sigma2(_Denoising):
    weighting = "sigma2"


class _Ladder(_Sigma2):
    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        ladder = geometric_levels(self.setting.sigma_range, self.setting.levels)
        return draw_levels(ladder, count, generator)


class _Likelihood(_Denoising):
    weighting = "likelihood"

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__(setting, start, pixel_mm, generator)
        low, high = setting.sigma_range
        if low == high:
            raise UnsupportedError(
                "likelihood weighting balances noise levels by their share of the process, got "
                f"the single level {low:g}; give a range of levels, or use 'dsm'"
            )
        self.sde = VE(low, high)

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        return _uniform_levels(count, self.sde, generator)

    def diffusion(self, sigma: Tensor) -> Tensor:
        bounded = sigma.cpu().double().clamp(self.sde.sigma_min, self.sde.sigma_max)
        return self.sde.diffusion(self.sde.time(bounded)).to(sigma)


class _Exact(Objective):
    """Times sigma^2 / d, so that levels weigh alike."""

    together = False

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        loss = exact_score_matching(model.score(batch), batch.x)
        return batch.sigma**2 * loss / batch.x0[0].numel()


class _Sliced(Objective):
    """Times sigma^2 / d, so that levels weigh alike."""

    variance_reduced = False

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        v = projections(batch.x0, generator)
        loss = sliced_score_matching(
            model.score(batch), batch.x, v, variance_reduced=self.variance_reduced
        )
        return batch.sigma**2 * loss / batch.x0[0].numel()


class _SlicedReduced(_Sliced):
    variance_reduced = True


class _Sure(Objective):
    """EDM's weight on the estimated error."""

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        v = projections(batch.x0, generator)
        risk = sure(model.denoiser(batch), batch.x, batch.sigma, v)
        return weight(batch.sigma, model.sigma_data, "edm") * risk


class _Contrastive(Objective):
    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Noise of all Langevin steps."""
        steps = self.setting.langevin_steps
        return torch.randn((steps, *x.shape), generator=generator).to(x)

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        return contrastive_divergence(
            lambda u: model.energy(u, batch.sigma, batch.pixel_mm),
            batch.x,
            self.setting.langevin_step * batch.sigma**2,
            self.noise(batch.x, generator),
        )


class _Persistent(_Contrastive):
    """Each chain keeps its noise level and its pixel size; batches take chains in turn."""

    state: Tensor
    level: Tensor
    pixel: Tensor
    turn: Tensor

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__(setting, start, pixel_mm, generator)
        chosen = torch.arange(setting.chains) % len(start)
        level = super().levels(setting.chains, generator)
        z = torch.randn(start[chosen].shape, generator=generator)
        self.register_buffer("state", start[chosen] + expand(level, z) * z)
        self.register_buffer("level", level)
        self.register_buffer("pixel", pixel_mm[chosen])
        self.register_buffer("turn", torch.zeros((), dtype=torch.long))

    def _index(self, count: int) -> Tensor:
        if count > len(self.state):
            raise InputError(
                f"persistent CD needs a chain for every image of a batch, {count}, got "
                f"{len(self.state)}; raise chains or lower batch"
            )
        return (int(self.turn) + torch.arange(count)) % len(self.state)

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        return self.level.cpu()[self._index(count)]

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        index = self._index(len(batch.x0)).to(self.state.device)
        level, pixel = self.level[index], self.pixel[index]
        loss, negatives = persistent_contrastive_divergence(
            lambda u: model.energy(u, batch.sigma, batch.pixel_mm),
            batch.x,
            self.state[index],
            self.setting.langevin_step * level**2,
            self.noise(batch.x, generator),
            chain_energy=lambda u: model.energy(u, level, pixel),
        )
        self.state[index] = negatives
        self.turn.copy_((self.turn + len(index)) % len(self.state))
        return loss


class _Noise(Objective):
    r"""What NCE and FCE share: whole images, and a log-normaliser by level.

    .. math:: c(\sigma) = \tfrac d2 \ln 2\pi(\sigma^2+\sigma_d^2)
              + c_0 + c_1\tau + c_2\tau^2, \qquad \tau = \tfrac14\ln\sigma,

    exact for the untrained network with :math:`c_i = 0`.
    """

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__(setting, start, pixel_mm, generator)
        self.d = start[0].numel()
        self.c = nn.Parameter(torch.zeros(3))

    def total(self, sigma: Tensor) -> Tensor:
        """Standard deviation of perturbed images, ``(b,)``."""
        return torch.sqrt(sigma**2 + self.setting.sigma_data**2)

    def log_model(self, model: Model, batch: Perturbed) -> Field:
        """``-E - c``."""
        tau = torch.log(batch.sigma) / 4
        powers = torch.stack([torch.ones_like(tau), tau, tau**2], dim=1)
        c = self.d * torch.log(math.sqrt(2 * math.pi) * self.total(batch.sigma)) + powers @ self.c
        return lambda u: -model.energy(u, batch.sigma, batch.pixel_mm) - c


class _NoiseContrastive(_Noise):
    """The noise is the Gaussian with mean and covariance of the perturbed training images."""

    mean: Tensor
    eigenvalues: Tensor
    basis: Tensor

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__(setting, start, pixel_mm, generator)
        flat = start.flatten(1).double()
        mean = flat.mean(dim=0)
        eigenvalues, basis = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
        self.register_buffer("mean", mean.float())
        self.register_buffer("eigenvalues", eigenvalues.clamp(min=0).float())
        self.register_buffer("basis", basis.float())

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        variance = self.eigenvalues + batch.sigma[:, None] ** 2
        z = torch.randn(len(batch.x0), self.d, generator=generator).to(batch.x0)
        y = self.mean + (variance.sqrt() * z) @ self.basis.T

        def log_noise(u: Tensor) -> Tensor:
            w = (u.flatten(1) - self.mean) @ self.basis
            return -0.5 * (w**2 / variance + torch.log(2 * math.pi * variance)).sum(dim=1)

        return noise_contrastive_estimation(
            self.log_model(model, batch), log_noise, batch.x, y.reshape(batch.x0.shape)
        )


class _FlowContrastive(_Noise):
    """The noise is a flow of images scaled to unit variance, conditional on the level."""

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__(setting, start, pixel_mm, generator)
        self.flow = RealNVP(self.d, layers=6, hidden=128, condition=1)

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        tau = torch.log(batch.sigma)[:, None] / 4
        total = self.total(batch.sigma)
        y = expand(total, batch.x0) * self.flow.sample(len(tau), generator, tau).reshape(
            batch.x0.shape
        )

        def log_flow(u: Tensor) -> Tensor:
            inner = self.flow.log_prob(u / expand(total, u), tau)
            return inner - self.d * torch.log(total)

        return flow_contrastive_estimation(self.log_model(model, batch), log_flow, batch.x, y)


@dataclass(frozen=True)
class ObjectiveEntry:
    """One row of :data:`OBJECTIVES`.

    Attributes:
        title: its name in the field.
        make: the objective of a run.
        network: ``"energy"`` if it needs an energy network, ``"score"`` if either will do.
        calls: calls of the network a step, in terms of ``d`` pixels and ``k`` Langevin steps.
        backward: backward passes a step with a score network; an energy network takes one more a
            call of the denoiser.
        whole: needs whole images of one size, not crops.
        limit: most pixels of an image, ``None`` for any.
        reference: source.
    """

    title: str
    make: type[Objective]
    network: Literal["score", "energy"]
    calls: str
    backward: str
    whole: bool
    limit: int | None
    reference: str


OBJECTIVES: Mapping[str, ObjectiveEntry] = {
    "dsm": ObjectiveEntry(
        "denoising score matching, EDM weights, lognormal levels",
        _Denoising, "score", "1", "1", False, None, "Karras et al., NeurIPS 2022",
    ),
    "dsm-sigma2": ObjectiveEntry(
        "denoising score matching, sigma^2 weights, lognormal levels",
        _Sigma2, "score", "1", "1", False, None, "Vincent, Neural Computation 2011",
    ),
    "ncsn": ObjectiveEntry(
        "denoising score matching, sigma^2 weights, geometric levels",
        _Ladder, "score", "1", "1", False, None, "Song and Ermon, NeurIPS 2019",
    ),
    "dsm-likelihood": ObjectiveEntry(
        "denoising score matching, likelihood weights g(t)^2, uniform times",
        _Likelihood, "score", "1", "1", False, None, "Song et al., NeurIPS 2021",
    ),
    "ism": ObjectiveEntry(
        "exact (implicit) score matching",
        _Exact, "score", "1", "d + 1", False, EXACT_LIMIT, "Hyvarinen, JMLR 2005",
    ),
    "ssm": ObjectiveEntry(
        "sliced score matching",
        _Sliced, "score", "1", "2", False, None, "Song et al., UAI 2019",
    ),
    "ssm-vr": ObjectiveEntry(
        "sliced score matching with variance reduction",
        _SlicedReduced, "score", "1", "2", False, None, "Song et al., UAI 2019",
    ),
    "sure": ObjectiveEntry(
        "Stein's unbiased risk estimate, from noisy images alone",
        _Sure, "score", "1", "2", False, None, "Ramani et al., IEEE TIP 2008",
    ),
    "cd": ObjectiveEntry(
        "contrastive divergence with Langevin",
        _Contrastive, "energy", "k + 2", "k + 1", False, None, "Hinton, Neural Computation 2002",
    ),
    "pcd": ObjectiveEntry(
        "persistent contrastive divergence with Langevin",
        _Persistent, "energy", "k + 2", "k + 1", True, None, "Tieleman, ICML 2008",
    ),
    "nce": ObjectiveEntry(
        "noise-contrastive estimation against a Gaussian",
        _NoiseContrastive, "energy", "2", "1", True, WHOLE_LIMIT,
        "Gutmann and Hyvarinen, AISTATS 2010",
    ),
    "fce": ObjectiveEntry(
        "flow-contrastive estimation against a real-NVP flow",
        _FlowContrastive, "energy", "2", "1", True, WHOLE_LIMIT, "Gao et al., CVPR 2020",
    ),
}  # fmt: skip
"""Objectives that ``recon train --objective`` offers."""
