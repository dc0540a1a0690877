"""Data consistency on the iterate: ``x_t -> x_t``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from inverse.errors import ReconError
from inverse.measurement import Measurement
from inverse.priors.denoiser import expand
from inverse.sampling import Noise
from inverse.sde import SDE

__all__ = ["song_projection"]


def song_projection(
    measurement: Measurement,
    sde: SDE,
    noise: Noise,
    *,
    lam: float,
    iterations: int = 10,
    tol: float = 1e-4,
) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The projection of Song, Shen, Xing, Ermon (ICLR 2022), in its proximal form.

    .. math::
       \hat y_t = \alpha_t y + \sigma_t A z, \qquad
       x \leftarrow \arg\min_u\ \lambda\|\hat y_t - Au\|^2/\|A\|^2 + (1-\lambda)\|u - x\|^2

    Where :math:`A = P(\Lambda)T` with orthonormal ``T`` this is the paper's equation 9,
    :math:`T^{-1}[\lambda\Lambda P^{-1}\hat y_t + (1-\lambda)\Lambda Tx + (I-\Lambda)Tx]`, and it
    also serves operators with no invertible ``T`` (fan beams, several coils).  The noise of the
    data is not modelled.

    Args:
        measurement: data of the batch, in prior units.
        sde: forward process.
        noise: fresh noise on the image grid.
        lam: mixing weight in (0, 1]; 1 is a hard projection.
        iterations: conjugate-gradient steps.
        tol: relative residual at which they stop.

    Returns:
        ``project(x, t)``.
    """
    if not 0.0 < lam <= 1.0:
        raise ReconError(f"Song's mixing weight lambda must lie in (0, 1], got {lam}")
    operator = measurement.operator
    rho = (1 - lam) / lam * operator.norm() ** 2
    backprojection = operator.adjoint(measurement.data)

    def project(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = sde.marginal(t)
        z = noise()
        b = expand(alpha, x) * backprojection
        b = b + expand(sigma, x) * operator.adjoint(operator(z)) + rho * x
        return operator.normal_solve(b, rho, x, tol=tol, max_iter=iterations).x

    return project
