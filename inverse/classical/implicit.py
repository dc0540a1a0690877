r"""An implicit neural representation: an image as a small network of its coordinates.

.. math:: \min_\theta\; \|\Sigma^{-1/2}(A\,x_\theta - y)\|^2, \qquad
    x_\theta(r) = s\,\mathrm{MLP}_\theta(\sin 2\pi B r, \cos 2\pi B r), \qquad
    B_{ij} \sim N(0, b^2)

The network is fitted to one measurement and knows nothing else: its preference for smooth images,
and stopping at the noise, are the only regularisation.  It is the untrained baseline beside
learned priors.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from inverse.errors import InputError, NumericalError
from inverse.measurement import Measurement

__all__ = ["inr"]


def inr(
    measurement: Measurement,
    *,
    features: int = 128,
    width: int = 64,
    depth: int = 3,
    bandwidth: float = 0.2,
    steps: int = 300,
    rate: float = 1e-2,
    discrepancy: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Fit one network a slice to the data; see the module's equation.

    Each step costs one application of the operator and of its adjoint, and the network on every
    pixel, forward and back: about 0.3 s at 256 x 256 pixels on one core, so that a slice takes
    one to two minutes.  A slice stops by itself once its reduced chi-square is at most
    ``discrepancy``.

    Args:
        measurement: the data, with their noise std; images of any dimension, real or complex.
        features: rows of B.
        width: of the network's layers.
        depth: hidden layers.
        bandwidth: b as a share of the grid's Nyquist frequency along its longest side: larger
            gives finer detail and more artefacts.
        steps: most steps.
        rate: of Adam, which falls to 0 along a cosine.
        discrepancy: chi-square a datum at which a slice stops.
        seed: of B and of the network; slice k depends on (seed, k) alone.

    Returns:
        ``(slices, *in_shape)`` in physical units.

    Raises:
        InputError: a size, rate or bandwidth that is not positive.
        NumericalError: if a fit leaves the finite numbers, or the data are zero.

    Source: Tancik et al., "Fourier features let networks learn high frequency functions in low
    dimensional domains", NeurIPS 2020; Shen, Pauly and Xing, "NeRP", IEEE TNNLS 35 (2024).
    """
    counts = {"features": features, "width": width, "depth": depth, "steps": steps}
    amounts = {"bandwidth": bandwidth, "rate": rate}
    wrong = [f"{k} {v}" for k, v in counts.items() if v < 1]
    wrong += [f"{k} {v}" for k, v in amounts.items() if not (math.isfinite(v) and v > 0)]
    if wrong:
        raise InputError(f"inr needs positive settings, got {', '.join(wrong)}")
    shape, device = measurement.operator.in_shape, measurement.data.device
    longest = max(shape)
    axes = [(torch.arange(n, device=device) - (n - 1) / 2) * (2 / longest) for n in shape]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(shape))
    images = []
    for k in range(len(measurement)):
        state = int(np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)[0]) >> 1
        generator = torch.Generator().manual_seed(state)
        # Nyquist is longest / 4 cycles per unit, since the longest side is two units
        b = torch.randn(features, len(shape), generator=generator) * (bandwidth * longest / 4)
        phase = 2 * math.pi * (points @ b.T.to(device))
        encoded = torch.cat([phase.sin(), phase.cos()], dim=1)
        one = measurement.take(torch.tensor([k], device=device))
        with torch.inference_mode(False), torch.enable_grad():
            # tensors of inference mode take no part in a gradient, their clones do
            one = replace(one, data=one.data.clone(), noise=one.noise.clone())
            images.append(
                _fit(one, encoded.clone(), width, depth, steps, rate, discrepancy, generator)
            )
    return torch.cat(images)


def _fit(
    one: Measurement,
    encoded: Tensor,
    width: int,
    depth: int,
    steps: int,
    rate: float,
    discrepancy: float,
    generator: torch.Generator,
) -> Tensor:
    """One slice, ``(1, *in_shape)``."""
    operator = one.operator
    complex_ = operator.dtype.is_complex
    sizes = [encoded.shape[1], *[width] * depth, 2 if complex_ else 1]
    scale = _scale(one)
    parameters: list[Tensor] = []
    for j, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        gain = 0.0 if j == depth else math.sqrt(2.0 / n)  # from the empty image
        weight = torch.randn(m, n, generator=generator) * gain
        parameters += [weight.to(encoded.device), torch.zeros(m, device=encoded.device)]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def image() -> Tensor:
        h = encoded
        for j in range(depth + 1):
            h = functional.linear(h, parameters[2 * j], parameters[2 * j + 1])
            h = functional.relu(h) if j < depth else h
        x = torch.view_as_complex(h) if complex_ else h[:, 0]
        return scale * x.reshape(1, *operator.in_shape)

    for _ in range(steps):
        x = image()
        loss = one.chi2(x).sum()
        chi2 = float(loss.detach())
        if chi2 <= discrepancy or not math.isfinite(chi2):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x = image().detach()
    if not bool(torch.isfinite(torch.view_as_real(x) if complex_ else x).all()):
        raise NumericalError(
            "inr left the finite numbers; lower the rate, and check the noise std for values near "
            "zero"
        )
    return x


def _scale(one: Measurement) -> float:
    """Size of the image: the largest value after one step of steepest descent from zero."""
    white = one.whitened()
    gradient = white.operator.adjoint(white.data)
    length = float(gradient.abs().square().sum(dtype=torch.float64))
    curvature = float(white.operator(gradient).abs().square().sum(dtype=torch.float64))
    if not curvature > 0:
        raise NumericalError("inr has nothing to fit: the data are zero, or the operator is")
    return length / curvature * float(gradient.abs().max())
