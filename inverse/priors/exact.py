r"""Priors in closed form: the truth that every sampler is tested against.

For :math:`x_t = \alpha x_0 + \sigma z` and a Gaussian :math:`x_0 \sim N(\mu, \Sigma)`

.. math::
   E[x_0 \mid x_t] = \mu + \alpha\Sigma(\alpha^2\Sigma + \sigma^2 I)^{-1}(x_t - \alpha\mu),

and for a mixture the components' means weighted by their responsibilities at :math:`t`.  With a
linear measurement :math:`y = Ax + n` the posterior is Gaussian (or a mixture) again:

.. math::
   C = (\Sigma^{-1} + A^T A/\sigma_y^2)^{-1}, \qquad m = \mu + C A^T(y - A\mu)/\sigma_y^2

Dense linear algebra in float64; meant for problems of at most a few thousand unknowns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from inverse.errors import GeometryError, InputError
from inverse.priors.denoiser import Denoiser
from inverse.sde import SDE, VE, as_time

__all__ = ["GaussianPosterior", "GaussianPrior", "MixturePrior"]


@dataclass(frozen=True)
class GaussianPosterior:
    """``N(mean, covariance)`` over flattened images, float64."""

    mean: Tensor
    covariance: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """``(count, d)`` draws."""
        z = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        return self.mean + z @ torch.linalg.cholesky(self.covariance).T

    def kl(self, mean: Tensor, covariance: Tensor) -> float:
        r"""``KL(N(mean, covariance) || self)`` in nats."""
        d = len(self.mean)
        factor = torch.linalg.cholesky(self.covariance)
        trace = torch.cholesky_solve(covariance, factor).trace()
        delta = self.mean - mean
        quadratic = delta @ torch.cholesky_solve(delta[:, None], factor)[:, 0]
        logdet = 2 * factor.diagonal().log().sum() - torch.linalg.slogdet(covariance)[1]
        return float(0.5 * (trace + quadratic - d + logdet))


class GaussianPrior(Denoiser):
    """``N(mean, covariance)`` over images of ``shape``, in prior units.

    Args:
        mean: ``shape`` or a number; an array is taken, too.
        covariance: ``(d, d)``, symmetric positive definite, ``d = prod(shape)``; or an array.
        shape: image shape.
        sde: forward process.

    Raises:
        GeometryError: a covariance of another shape.
        InputError: values that are not finite, or a covariance that is not symmetric and positive
            definite.
    """

    mean: Tensor
    covariance_matrix: Tensor
    eigenvalues: Tensor
    basis: Tensor

    def __init__(
        self,
        mean: Tensor | NDArray[np.floating] | float,
        covariance: Tensor | NDArray[np.floating],
        shape: Sequence[int],
        sde: SDE | None = None,
    ) -> None:
        super().__init__(VE() if sde is None else sde)
        self.shape = tuple(shape)
        d = math.prod(self.shape)
        mean, covariance = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, covariance))
        if tuple(covariance.shape) != (d, d):
            raise GeometryError(
                f"GaussianPrior on {self.shape} needs a ({d}, {d}) covariance, "
                f"got {tuple(covariance.shape)}"
            )
        if not all(bool(torch.isfinite(v).all()) for v in (mean, covariance)):
            raise InputError(
                "GaussianPrior's mean and covariance must be finite, got NaN or infinite values"
            )
        eigenvalues, basis = torch.linalg.eigh(covariance)
        skew = float((covariance - covariance.T).abs().max())
        if skew > 1e-5 * float(covariance.abs().max()) or not float(eigenvalues[0]) > 0:
            raise InputError(
                f"GaussianPrior's covariance must be symmetric and positive definite, got an "
                f"asymmetry of {skew:.2g} and a smallest eigenvalue of {float(eigenvalues[0]):.2g}"
            )
        self.register_buffer("mean", mean.expand(self.shape).reshape(d).clone())
        self.register_buffer("covariance_matrix", covariance)
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("basis", basis)

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The linear (Wiener) estimate of the module's text.

        Raises:
            GeometryError: images of another size.
        """
        alpha, sigma = (
            c.to(x_t.device).expand(x_t.shape[0])[:, None] for c in self.sde.marginal(t)
        )
        z = self.coordinates(x_t, alpha)
        gain = alpha * self.eigenvalues / (alpha**2 * self.eigenvalues + sigma**2)
        return (self.mean + (gain * z) @ self.basis.T).to(x_t.dtype).reshape(x_t.shape)

    def coordinates(self, x_t: Tensor, alpha: Tensor) -> Tensor:
        """``x_t - alpha mean`` in the basis of eigenvectors, ``(b, d)``, float64.

        Raises:
            GeometryError: images of another size.
        """
        if x_t[0].numel() != len(self.mean):
            raise GeometryError(
                f"{type(self).__name__} is a prior of images {self.shape}, got "
                f"{tuple(x_t.shape[1:])}; make one of that size"
            )
        return (x_t.flatten(1).to(torch.float64) - alpha * self.mean) @ self.basis

    def error(self, noise_level: float | Tensor) -> Tensor:
        """Root of the mean posterior variance, ``tr(Sigma s^2 (Sigma + s^2)^-1) / d``."""
        s2, lam = as_time(noise_level)[..., None] ** 2, self.eigenvalues.cpu()
        return torch.sqrt((lam * s2 / (lam + s2)).mean(dim=-1))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """``(count, *shape)`` draws, float32."""
        z = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        # by Cholesky: unlike eigenvectors, unique, so that draws agree between machines
        x = self.mean.cpu() + z @ torch.linalg.cholesky(self.covariance_matrix.cpu()).T
        return x.to(torch.float32).reshape(count, *self.shape)

    def posterior(self, matrix: Tensor, y: Tensor, sigma_y: float | Tensor) -> GaussianPosterior:
        """The exact posterior for ``y = matrix x + N(0, sigma_y^2)``.

        Args:
            matrix: ``(m, d)`` dense operator on flattened images, real.
            y: ``(m,)`` data.
            sigma_y: noise standard deviation, a number or ``(m,)``.
        """
        a, s = matrix.to(torch.float64), torch.as_tensor(sigma_y, dtype=torch.float64)
        a_cov = a @ self.covariance_matrix
        gram = a_cov @ a.T + torch.diag((s**2).expand(len(a)))
        gain = torch.linalg.solve(gram, a_cov).T
        mean = self.mean + gain @ (y.to(torch.float64) - a @ self.mean)
        covariance = self.covariance_matrix - gain @ a_cov
        return GaussianPosterior(mean, (covariance + covariance.T) / 2)


class MixturePrior(Denoiser):
    r"""Gaussian mixture :math:`\sum_k w_k N(\mu_k, \Sigma_k)` over images of ``shape``.

    Args:
        weights: ``(k,)``, positive, summing to one.
        means: ``(k, d)``.
        covariances: ``(k, d, d)``.
        shape: image shape with ``prod(shape) == d``.
        sde: forward process.

    Raises:
        GeometryError: as :class:`GaussianPrior`.
        InputError: weights that are not positive or do not sum to one; as :class:`GaussianPrior`.
    """

    weights: Tensor

    def __init__(
        self,
        weights: Tensor | NDArray[np.floating],
        means: Tensor | NDArray[np.floating],
        covariances: Tensor | NDArray[np.floating],
        shape: Sequence[int],
        sde: SDE | None = None,
    ) -> None:
        super().__init__(VE() if sde is None else sde)
        self.shape = tuple(shape)
        weights, means = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means))
        if not (bool((weights > 0).all()) and math.isclose(float(weights.sum()), 1, rel_tol=1e-6)):
            raise InputError(
                f"MixturePrior's weights must be positive and sum to one, got {weights.tolist()}"
            )
        self.register_buffer("weights", weights)
        self._components = nn.ModuleList(
            GaussianPrior(m.reshape(self.shape), c, self.shape, self.sde)
            for m, c in zip(means, covariances, strict=True)
        )

    @property
    def components(self) -> list[GaussianPrior]:
        """The Gaussians that are mixed."""
        return [cast(GaussianPrior, c) for c in self._components]

    def _log_parts(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``log w_k N(x_t; alpha mu_k, alpha^2 Sigma_k + sigma^2 I)``, shape ``(b, k)``."""
        alpha, sigma = (
            c.to(x_t.device).expand(x_t.shape[0])[:, None] for c in self.sde.marginal(t)
        )
        parts = []
        for w, c in zip(self.weights, self.components, strict=True):
            variance = alpha**2 * c.eigenvalues + sigma**2
            z = c.coordinates(x_t, alpha)
            parts.append(
                w.log() - 0.5 * (z**2 / variance + torch.log(2 * math.pi * variance)).sum(dim=1)
            )
        return torch.stack(parts, dim=1)

    def log_density(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``log p_t(x_t)`` in nats, shape ``(b,)``."""
        return torch.logsumexp(self._log_parts(x_t, t), dim=1)

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """Responsibility-weighted means of the components."""
        share = torch.softmax(self._log_parts(x_t, t), dim=1).to(x_t.dtype)
        means = torch.stack([c.denoise(x_t, t).flatten(1) for c in self.components], dim=1)
        return (share[:, :, None] * means).sum(dim=1).reshape(x_t.shape)

    def posterior(
        self, matrix: Tensor, y: Tensor, sigma_y: float
    ) -> tuple[Tensor, list[GaussianPosterior]]:
        """Exact posterior weights ``(k,)`` and components for ``y = matrix x + noise``."""
        a = matrix.to(torch.float64)
        logs = []
        for w, c in zip(self.weights, self.components, strict=True):
            gram = a @ c.covariance_matrix @ a.T
            gram = gram + sigma_y**2 * torch.eye(len(a), dtype=torch.float64)
            evidence = torch.distributions.MultivariateNormal(a @ c.mean, gram)
            logs.append(w.log() + evidence.log_prob(y.to(torch.float64)))
        return (
            torch.softmax(torch.stack(logs), dim=0),
            [c.posterior(matrix, y, sigma_y) for c in self.components],
        )
