r"""Steps of the reverse SDE from time ``t`` to ``s < t``, given ``x0 = D(x_t, t)``.

Each step is a function ``step(sde, x_t, x0, t, s, z) -> x_s`` where ``z`` is standard normal.
It knows neither prior nor measurement.  Notation:
:math:`\hat\varepsilon = (x_t - \alpha_t \hat x_0)/\sigma_t`, score
:math:`= -\hat\varepsilon/\sigma_t`, and the forward transition
:math:`x_t = r\,x_s + G z` with :math:`r = \alpha_t/\alpha_s,\ G^2 = \sigma_t^2 - r^2\sigma_s^2`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from inverse.errors import InputError
from inverse.priors.denoiser import expand
from inverse.sde import SDE, as_time

__all__ = [
    "Corrector",
    "Step",
    "ancestral",
    "ddim",
    "euler_maruyama",
    "langevin",
    "renoise",
    "reverse_diffusion",
]

Time: TypeAlias = float | Tensor
Step: TypeAlias = Callable[[SDE, Tensor, Tensor, Time, Time, Tensor], Tensor]
Corrector: TypeAlias = Step


def _score(sde: SDE, x_t: Tensor, x0: Tensor, t: Time) -> Tensor:
    """``(alpha x0 - x_t) / sigma^2``."""
    alpha, sigma = sde.marginal(t)
    return (expand(alpha, x_t) * x0 - x_t) / expand(sigma, x_t) ** 2


def _transition(sde: SDE, t: Time, s: Time) -> tuple[Tensor, Tensor]:
    """``(r, G^2)`` of the forward transition from ``s`` to ``t``."""
    r = sde.alpha(t) / sde.alpha(s)
    return r, sde.sigma(t) ** 2 - r**2 * sde.sigma(s) ** 2


def euler_maruyama(sde: SDE, x_t: Tensor, x0: Tensor, t: Time, s: Time, z: Tensor) -> Tensor:
    r""":math:`x_s = x_t - [f x_t - g^2\,\mathrm{score}]\,dt + g\sqrt{dt}\,z`; weak order 1.

    Source: Song et al. (ICLR 2021), equation 6.
    Here: docs/theory.md, equation (17).
    """
    dt = as_time(t) - as_time(s)
    g2 = sde.diffusion(t) ** 2
    drift = sde.drift(x_t, t) - expand(g2, x_t) * _score(sde, x_t, x0, t)
    return x_t - expand(dt, x_t) * drift + expand(torch.sqrt(g2 * dt), x_t) * z


def reverse_diffusion(sde: SDE, x_t: Tensor, x0: Tensor, t: Time, s: Time, z: Tensor) -> Tensor:
    r""":math:`x_s = (2-r)\,x_t + G^2\,\mathrm{score} + G z`, the forward transition reversed.

    Source: Song et al. (ICLR 2021), equation 46 and appendix E.
    Here: docs/theory.md, equation (17).
    """
    r, g2 = _transition(sde, t, s)
    score = _score(sde, x_t, x0, t)
    return expand(2 - r, x_t) * x_t + expand(g2, x_t) * score + expand(torch.sqrt(g2), x_t) * z


def ancestral(sde: SDE, x_t: Tensor, x0: Tensor, t: Time, s: Time, z: Tensor) -> Tensor:
    r"""A draw of :math:`q(x_s \mid x_t, x_0)`, Gaussian with

    .. math:: \text{mean } \frac{r\sigma_s^2}{\sigma_t^2} x_t
              + \frac{\alpha_s G^2}{\sigma_t^2} x_0, \qquad
              \text{variance } \frac{\sigma_s^2 G^2}{\sigma_t^2}

    Source: Ho et al., DDPM (NeurIPS 2020), equation 7; Song et al. (ICLR 2021), equation 47.
    Here: docs/theory.md, equation (17).
    """  # noqa: D415
    r, g2 = _transition(sde, t, s)
    var_t, var_s = sde.sigma(t) ** 2, sde.sigma(s) ** 2
    mean = expand(r * var_s / var_t, x_t) * x_t + expand(sde.alpha(s) * g2 / var_t, x_t) * x0
    return mean + expand(torch.sqrt(var_s * g2 / var_t), x_t) * z


def ddim(eta: float = 0.0) -> Step:
    r"""DDIM: :math:`x_s = \alpha_s\hat x_0 + \sqrt{\sigma_s^2-\varsigma^2}\,\hat\varepsilon
    + \varsigma z` with :math:`\varsigma = \eta\,\sigma_s G/\sigma_t`.

    ``eta = 0`` is deterministic, ``eta = 1`` equals :func:`ancestral`.
    Source: Song, Meng, Ermon, DDIM (ICLR 2021), equations 12 and 16, for any SDE.
    """  # noqa: D205
    _check_eta(eta)

    def step(sde: SDE, x_t: Tensor, x0: Tensor, t: Time, s: Time, z: Tensor) -> Tensor:
        alpha, sigma = sde.marginal(t)
        _, g2 = _transition(sde, t, s)
        sigma_s = sde.sigma(s)
        fresh = eta * sigma_s * torch.sqrt(g2) / sigma
        kept = torch.sqrt((sigma_s**2 - fresh**2).clamp_min(0))
        noise = (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)
        return expand(sde.alpha(s), x_t) * x0 + expand(kept, x_t) * noise + expand(fresh, x_t) * z

    return step


def renoise(eta: float = 1.0) -> Step:
    r""":math:`x_s = \alpha_s\hat x_0 + \sigma_s(\sqrt{1-\eta^2}\,\hat\varepsilon + \eta z)`.

    The step of DDS and DDNM: a share ``eta`` of the noise at ``s`` is fresh whatever the length
    of the step; ``eta = 1`` forgets ``x_t``, ``eta = 0`` is deterministic DDIM.
    Source: Chung, Lee, Ye, DDS (ICLR 2024), algorithm 1; Wang et al., DDNM (ICLR 2023).
    """
    _check_eta(eta)

    def step(sde: SDE, x_t: Tensor, x0: Tensor, t: Time, s: Time, z: Tensor) -> Tensor:
        alpha, sigma = sde.marginal(t)
        noise = (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)
        mixed = (1 - eta**2) ** 0.5 * noise + eta * z
        return expand(sde.alpha(s), x_t) * x0 + expand(sde.sigma(s), x_t) * mixed

    return step


def _check_eta(eta: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta, the share of fresh noise, must lie in [0, 1], got {eta}")


def langevin(snr: float, norms: Literal["expected", "sample"] = "expected") -> Corrector:
    r"""Langevin corrector :math:`x \leftarrow x + \epsilon\,\mathrm{score} + \sqrt{2\epsilon}z`.

    .. math:: \epsilon = 2\alpha_i (\mathrm{snr}\,\|z\| / \|\mathrm{score}\|)^2
              \approx 2\alpha_i\,(\mathrm{snr}\cdot\sigma_t)^2,
              \qquad \alpha_i = r^2 = (\alpha_t/\alpha_s)^2

    :math:`\alpha_i` is of the predictor's step from t to s, not of the marginal: 1 for VE, and for
    VP what DDPM writes :math:`1 - \beta_i`.  A corrector has the arguments of a :data:`Step`.

    The original takes batch means of both norms, which lets one patient alter another.  Here a
    step never depends on batch mates:

    * ``"expected"``: the norms' expectations for noise-dominated images, :math:`\sqrt d` and
      :math:`\sqrt d/\sigma_t`.  The step does not depend on the state, so Langevin's stationary
      law is kept up to its step-size error.
    * ``"sample"``: the norms of each sample.  In many dimensions they lie near their
      expectations; in few the step grows without bound where the score vanishes, and the weights
      of modes come out wrong.

    Source: Song et al. (ICLR 2021), algorithms 4 and 5, appendix G.
    Here: docs/theory.md, equation (18).
    """
    if snr < 0:
        raise InputError(f"the corrector's snr must not be negative, got {snr}")
    if norms not in ("expected", "sample"):
        raise InputError(f"the corrector's norms are 'expected' or 'sample', got {norms!r}")

    def correct(sde: SDE, x_t: Tensor, x0: Tensor, t: Time, s: Time, z: Tensor) -> Tensor:
        score = _score(sde, x_t, x0, t)
        r, _ = _transition(sde, t, s)
        step = 2 * r**2 * snr**2
        if norms == "expected":
            step = step * sde.sigma(t) ** 2
        else:
            squares = [v.flatten(1).to(torch.float64).square().sum(dim=1) for v in (z, score)]
            step = step * (squares[0] / squares[1]).cpu()
        return x_t + expand(step, x_t) * score + expand(torch.sqrt(2 * step), x_t) * z

    return correct
