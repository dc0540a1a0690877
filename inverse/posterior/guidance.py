"""Data consistency on the estimate: a denoiser in, a denoiser out.

A guided denoiser approximates ``E[x_0 | x_t, y]``; samplers never learn about measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.measurement import Measurement
from inverse.priors.denoiser import Denoiser

__all__ = ["Proximal"]


class Proximal(Denoiser):
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
        super().__init__(prior.sde)
        self.prior = prior
        self.weight, self.iterations, self.tol = weight, iterations, tol
        white = measurement.whitened()
        self.operator = white.operator
        self.backprojection = white.operator.adjoint(white.data)

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``argmin`` of the class's equation."""
        x0 = self.prior.denoise(x_t, t)
        r = self.weight * self.prior.error(self.sde.noise_level(t))
        rho = float(r) ** -2 if r.ndim == 0 else (r**-2).to(torch.float32)
        b = self.backprojection + rho * x0
        return self.operator.normal_solve(b, rho, x0, tol=self.tol, max_iter=self.iterations).x
