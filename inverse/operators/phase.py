r"""The phase of MR images, so that a prior of real images can serve complex ones.

:math:`x = m\,e^{i\varphi}` with a magnitude :math:`m \ge 0` that may be anything and a phase that
is smooth, since it comes from fields and coils and hardly from anatomy.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from inverse.operators.linop import ComplexFromReal, Diagonal, LinearOperator, cg
from inverse.operators.mri import CartesianMRI, Sense, centred_fft, centred_ifft
from inverse.operators.patterns import calibration_centre

__all__ = ["estimated_phase", "low_resolution_phase"]

_SHARE = 1 / 8  # of k-space, at most, for the low-resolution phase
_COSINES = 16  # along an axis: half-waves, so that the map turns at most 7.5 times over the field
_TAU = 0.5  # radians
_DECAY = 3  # coefficient k of the map has the prior std tau / (1 + |k|^2)^(3/2)
_PASSES = 4  # magnitude and phase in turn; more change the error by less than a tenth
_MAGNITUDE_STEPS, _PHASE_STEPS = 12, 8  # of conjugate gradients
_RIDGE = 0.01  # relative to the operator's square
_HALVINGS = 5  # of a step that would raise the objective


def estimated_phase(operator: LinearOperator, data: Tensor) -> Diagonal:
    r"""``diag(exp(i phi))``, one map a slice: the phase that explains the data best.

    From the phase at low resolution, magnitude and phase are improved in turn:

    .. math::
        m \leftarrow \arg\min_m \|A(e^{i\varphi} m) - y\|^2 + \rho\|m\|^2,\qquad
        c \leftarrow \arg\min_c \frac{\|A(m\,e^{i\varphi(c)}) - y\|^2}{2 s^2}
        + \sum_k \frac{(1 + |k|^2)^3}{2\tau^2}\, c_k^2

    m real and then cut off below 0, by conjugate gradients; :math:`\varphi(c)` the map at the
    start plus few cosines, by one Gauss-Newton step a pass; :math:`s` the root-mean-square
    residual, so that what m can't explain is not taken for phase.  All samples take part, where
    the phase at low resolution knows the fully sampled centre only.

    Args:
        operator: acts on complex images or volumes.
        data: ``(slices, *operator.out_shape)``.  Each slice is estimated by itself, so that its
            map has the same bits whatever is beside it.

    Source: Fessler and Noll, Iterative image reconstruction in MRI with separate magnitude and
    phase regularization (ISBI 2004); the start Noll, Nishimura and Macovski (1991).
    """
    maps = [
        _joint(operator.take(torch.tensor([k], device=data.device)), data[k : k + 1])
        for k in range(len(data))
    ]
    return Diagonal(torch.cat(maps), operator.in_shape, torch.complex64)


def low_resolution_phase(image: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Unit phasors :math:`e^{i\varphi}` of an image's low spatial frequencies.

    A Hann window of the sides of the mask's fully sampled centre, at most an eighth of k-space,
    leaves what does not depend on the samples that are missing.

    Args:
        image: zero-filled or other first image, complex ``(slices, *shape)``.
        mask: boolean k-space mask of ``shape``; default all measured.

    Returns:
        complex64 of the image's shape; 1 where the smoothed image vanishes.

    Source: Noll, Nishimura and Macovski, IEEE Trans. Med. Imaging 10 (1991).
    """
    shape = tuple(image.shape[1:])
    known = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    sides = calibration_centre(known)
    window = torch.ones((), device=image.device)
    for axis, (n, side) in enumerate(zip(shape, sides, strict=True)):
        width = max(2.0, min(float(side), _SHARE * n))
        offset = (torch.arange(n, device=image.device) - n // 2).abs() / width
        hann = torch.where(offset < 0.5, torch.cos(math.pi * offset) ** 2, 0.0)
        window = window * hann.reshape([-1 if k == axis else 1 for k in range(len(shape))])
    smooth = centred_ifft(window * centred_fft(image, len(shape)), len(shape))
    phasor = torch.sgn(smooth)
    return torch.where(phasor == 0, 1.0 + 0.0j, phasor).to(torch.complex64)


def _joint(operator: LinearOperator, data: Tensor) -> Tensor:
    """Unit phasors of one slice, ``(1, *in_shape)``."""
    back = operator.adjoint(data)
    mask = operator.mask if isinstance(operator, CartesianMRI | Sense) else None
    start = low_resolution_phase(back, mask)
    unit = float(np.percentile(back.abs().cpu().numpy(), 99.0))
    if not (unit > 0 and math.isfinite(unit)):
        return start
    square = float((operator(back).norm() / back.norm()) ** 2)
    step = _PhaseStep(operator, data / unit, start, square)
    real = ComplexFromReal(operator.in_shape)
    c = torch.zeros(step.cosines.sides, device=data.device)
    for _ in range(_PASSES):
        phase = Diagonal(step.phasor(c), operator.in_shape, torch.complex64)
        a = operator @ (phase @ real)
        back = a.adjoint(step.data)
        found = a.normal_solve(back, _RIDGE * square, tol=1e-3, max_iter=_MAGNITUDE_STEPS)
        c = step(c, found.x.clamp_min(0.0))
    return step.phasor(c)


class _PhaseStep:
    """One Gauss-Newton step of the phase's coefficients, for a magnitude that is given.

    Args:
        operator: of one slice.
        data: its data.
        start: phasors that c = 0 stands for.
        square: the operator's square, for a preconditioner.
    """

    def __init__(
        self, operator: LinearOperator, data: Tensor, start: Tensor, square: float
    ) -> None:
        self.operator, self.data, self.start, self.square = operator, data, start, square
        self.cosines = _Cosines(operator.in_shape, data.device)

    def phasor(self, c: Tensor) -> Tensor:
        """``exp(i phi(c))``, ``(1, *in_shape)``."""
        angle = self.cosines(c)
        return self.start * torch.polar(torch.ones_like(angle), angle)

    def __call__(self, c: Tensor, image: Tensor) -> Tensor:
        """Better coefficients, or the same; ``image`` is the magnitude ``(1, *in_shape)``."""
        precision = self.cosines.precision

        def misfit(c: Tensor) -> tuple[float, Tensor]:
            r = self.operator(image * self.phasor(c)) - self.data
            return float(r.abs().square().sum()), r

        norm, r = misfit(c)
        variance = max(norm / (2 * self.operator.measured), 1e-12)
        slope = 1j * image * self.phasor(c)  # d x / d phi

        def gradient(r: Tensor) -> Tensor:
            return self.cosines.adjoint((slope.conj() * self.operator.adjoint(r)).real) / variance

        def objective(c: Tensor, norm: float) -> float:
            return norm / (2 * variance) + 0.5 * float((precision * c * c).sum())

        # scaled so that the diagonal is nearly 1: the data's part of it is the image's energy
        root = (precision + self.square * float(image.square().sum()) / variance).rsqrt()

        def curvature(u: Tensor) -> Tensor:
            d = root * u
            return root * (gradient(self.operator(slope * self.cosines(d))) + precision * d)

        downhill = -root * (gradient(r) + precision * c)
        found = cg(curvature, downhill, ndim=c.ndim, tol=1e-3, max_iter=_PHASE_STEPS)
        step, value = root * found.x, objective(c, norm)
        for _ in range(_HALVINGS):
            if objective(c + step, misfit(c + step)[0]) < value:
                return c + step
            step = step / 2
        return c


class _Cosines:
    r"""Maps of few cosines, :math:`\varphi(c)_j = \sum_k c_k \prod_a \psi_{k_a}(j_a)`.

    :math:`\psi_0 = 1` and :math:`\psi_k(j) = \sqrt 2\cos(\pi k (j + \tfrac12)/n)` have unit mean
    square.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.axes = []
        for n in shape:
            k, j = torch.arange(min(_COSINES, n)), torch.arange(n)
            waves = torch.cos(math.pi * k[:, None] * (j + 0.5) / n)
            waves[1:] *= math.sqrt(2.0)
            self.axes.append(waves.to(device))
        self.sides = tuple(len(waves) for waves in self.axes)
        grids = torch.meshgrid(*(torch.arange(n) for n in self.sides), indexing="ij")
        square = torch.stack([g.float() ** 2 for g in grids]).sum(dim=0)
        self.precision = ((1 + square) ** _DECAY / _TAU**2).to(device)

    def __call__(self, c: Tensor) -> Tensor:
        """``(*sides) -> (*shape)``."""
        for waves in self.axes:  # contracts the first axis and appends the new one
            c = torch.tensordot(c, waves, dims=([0], [0]))
        return c

    def adjoint(self, image: Tensor) -> Tensor:
        """``(1, *shape) -> (*sides)``."""
        image = image[0]
        for waves in self.axes:
            image = torch.tensordot(image, waves, dims=([0], [1]))
        return image
