r"""Penalised likelihood of photon counts before the logarithm, by paraboloidal surrogates.

.. math:: \min_{x \ge 0}\; \Phi(x) = \sum_i f_i([Ax]_i)
    + \beta \sum_{j \sim k} \psi\big((x_j - x_k)/u\big), \qquad
    f_i(l) = \lambda_i(l) - N'_i\log\lambda_i(l)

with the rate :math:`\lambda_i(l) = I_0 e^{-l} + \sigma_e^2` of
:class:`~inverse.operators.noise.TransmissionPoisson`, neighbours j, k along each axis, and the
edge-preserving :math:`\psi(t) = |t| - \delta\log(1 + |t|/\delta)`.  No datum needs a logarithm, so
starved rays neither bias the image nor have to be left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inverse.classical.linear import bit_reversed, fbp
from inverse.classical.variation import TV_WEIGHT, _divergence, _gradient
from inverse.errors import InputError, NumericalError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.ct import RayTransform
from inverse.operators.metal import UnspoiledRays
from inverse.operators.noise import TransmissionPoisson

__all__ = ["PenalisedLikelihood", "poisson"]

_EDGE = 0.01  # delta in units: steps above it, 10 HU, count as edges


@dataclass(frozen=True)
class PenalisedLikelihood:
    r"""Result of :func:`poisson`.

    Attributes:
        x: images ``(slices, *in_shape)`` in physical units.
        objective: :math:`\Phi` of each slice less that of a perfect fit, before the first and
            after each iteration, float64 ``(iterations + 1, slices)``.
    """

    x: Tensor
    objective: Tensor


def poisson(
    measurement: Measurement,
    weight: float = TV_WEIGHT,
    *,
    iterations: int = 20,
    subsets: int | None = None,
    unit: float | None = None,
    start: Tensor | None = None,
) -> PenalisedLikelihood:
    r"""The penalised-likelihood image of photon counts, non-negative.

    At the line integrals :math:`l^n = Ax^n` the parabola with the value and slope of :math:`f_i`
    and the curvature

    .. math:: c_i(l) = \Big[\frac{2}{l^2}\big(f_i(0) - f_i(l) + l\,\dot f_i(l)\big)\Big]_+ ,
        \qquad c_i(0) = [\ddot f_i(0)]_+

    lies above :math:`f_i` for all :math:`l \ge 0`, and is the flattest that does.  Split by
    convexity over the pixels, all parabolas have their least value at

    .. math:: x_j \leftarrow \Big[x_j - \frac{\sum_i a_{ij}\dot f_i + \beta\,\partial_j R}
        {\sum_i a_{ij}\gamma_i c_i + \beta\,d_j}\Big]_+, \qquad \gamma_i = \sum_j a_{ij},

    so :math:`\Phi` never grows.  That is the update with one subset.  More subsets of the views
    take M updates a pass with M times their own gradient, and the curvatures of the data,
    :math:`c_i = (N'_i - \sigma_e^2)_+^2/N'_i`, once for all: as many times faster, but not
    monotone, and they end in a small cycle about the minimum.

    Args:
        measurement: a CT measurement that has ``counts``; see
            :class:`~inverse.measurement.Measurement`.
        weight: :math:`\beta`; default that of total variation, of which the penalty is a smooth
            form.  Zero gives maximum likelihood.
        iterations: passes over all data.
        subsets: M, of the views; default 8, or as many as there are views.
        unit: u in 1/mm; default water.
        start: first image ``(slices, *in_shape)``; default filtered backprojection under a Hann
            window where the geometry has one, else zero.

    Raises:
        InputError: no counts, a weight or unit out of range, or a number of subsets below one or
            above the views'.
        UnsupportedError: an operator other than a :class:`~inverse.operators.ct.RayTransform`.
        NumericalError: if an iterate is not finite.

    Source: Erdogan and Fessler, IEEE Trans. Med. Imaging 18 (1999) for the surrogates, and Phys.
    Med. Biol. 44 (1999) for ordered subsets; Lange, IEEE Trans. Med. Imaging 9 (1990) for psi.
    """
    operator, counts = measurement.operator, measurement.counts
    if not isinstance(operator, RayTransform):
        raise UnsupportedError(f"poisson needs a RayTransform, got {operator!r}; use tv")
    if counts is None:
        raise InputError(
            "poisson needs photon counts, and this measurement has line integrals only; simulate "
            "with one energy, give Measurement.counts, or use tv"
        )
    u = measurement.mu_water if unit is None else unit
    if not (weight >= 0 and math.isfinite(weight) and u is not None and u > 0):
        raise InputError(f"poisson needs a weight >= 0 and a unit > 0, got {weight} and {u}")
    views = operator.geometry.views
    subsets = min(8, views) if subsets is None else subsets
    if not 1 <= subsets <= views:
        raise InputError(f"poisson needs 1 to {views} subsets of {views} views, got {subsets}")
    if start is None:
        try:
            start = fbp(measurement, "hann")
        except UnsupportedError:
            start = torch.zeros(len(measurement), *operator.in_shape, device=counts.counts.device)
    return _Surrogates(operator, counts, weight, u, subsets).run(start, iterations)


class _Surrogates:
    """The updates of one measurement."""

    def __init__(
        self,
        operator: RayTransform,
        counts: TransmissionPoisson,
        weight: float,
        unit: float,
        subsets: int,
    ) -> None:
        self.operator, self.counts = operator, counts
        self.weight, self.unit = weight, unit
        device = counts.counts.device
        good = torch.ones(operator.out_shape, dtype=torch.bool, device=device)
        self.good = operator.good if isinstance(operator, UnspoiledRays) else good
        self.gamma = operator(torch.ones(operator.in_shape, device=device))
        self.subsets = [(slice(j, None, subsets), operator) for j in bit_reversed(subsets)]
        if subsets > 1:
            self.subsets = [(part, operator.subset(part)) for part, _ in self.subsets]
        self.fixed = None if subsets == 1 else self._back(counts.curvature())

    def _back(self, curvature: Tensor) -> Tensor:
        r""":math:`\sum_i a_{ij}\gamma_i c_i`."""
        weight = torch.where(self.good, curvature, 0.0).float() * self.gamma
        return self.operator.adjoint(weight)

    def _of(self, part: slice) -> TransmissionPoisson:
        """The counts of some views."""
        return replace(self.counts, counts=self.counts.counts[:, part])

    def _penalty(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\beta\,\partial_j R` and :math:`\beta\,d_j`, twice the neighbours' weights."""
        t = _gradient(x) / self.unit
        omega = 1.0 / (_EDGE + t.abs())
        slope = _divergence(omega * t) * (self.weight / self.unit)
        # |D|^T omega; D's last difference along each axis is not there
        total = torch.zeros_like(x)
        for k in range(t.shape[1]):
            n = x.shape[k + 1] - 1
            part = omega[:, k].narrow(k + 1, 0, n)
            total.narrow(k + 1, 0, n).add_(part)
            total.narrow(k + 1, 1, n).add_(part)
        return slope, total * (2 * self.weight / self.unit**2)

    def objective(self, x: Tensor) -> Tensor:
        r""":math:`\Phi` of each slice, float64."""
        misfit = torch.where(self.good, self.counts.value(self.operator(x)), 0.0)
        t = (_gradient(x).double() / self.unit).abs()
        psi = t - _EDGE * torch.log1p(t / _EDGE)
        return misfit.flatten(1).sum(dim=1) + self.weight * psi.flatten(1).sum(dim=1)

    def update(self, x: Tensor, part: slice, operator: RayTransform) -> Tensor:
        """One step on the data of some views."""
        counts, line = self._of(part), operator(x)
        good = self.good[part]
        slope = torch.where(good, counts.gradient(line), 0.0).float()
        gradient = len(self.subsets) * operator.adjoint(slope)
        curvature = self._back(counts.curvature(line)) if self.fixed is None else self.fixed
        more, bend = self._penalty(x)
        down = curvature + bend
        step = torch.where(down > 0, (gradient + more) / down.clamp_min(1e-30), 0.0)
        return (x - step).clamp_min(0.0)

    def run(self, start: Tensor, iterations: int) -> PenalisedLikelihood:
        """All passes, from a start."""
        x = start.clamp_min(0.0)
        history = [self.objective(x)]
        for _ in range(iterations):
            for part, operator in self.subsets:
                x = self.update(x, part, operator)
            history.append(self.objective(x))
        if not bool(torch.isfinite(x).all()):
            raise NumericalError(
                "poisson left the finite numbers; check photons and electronic noise of the counts"
            )
        return PenalisedLikelihood(x, torch.stack(history))
