"""The one deep entry: a measurement and a prior in, a reconstruction with its uncertainty out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from inverse.errors import CheckpointError, ReconError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.coils import estimated_phase
from inverse.operators.linop import (
    ComplexFromChannels,
    ComplexFromReal,
    LinearOperator,
    Solve,
)
from inverse.operators.resample import Upsample
from inverse.posterior.methods import METHODS
from inverse.posterior.problem import Problem
from inverse.priors.checkpoint import NetworkPrior
from inverse.priors.denoiser import CountedDenoiser, Denoiser
from inverse.sampling import Noise

__all__ = ["Batch", "Reconstruction", "reconstruct"]


@dataclass(frozen=True)
class Reconstruction:
    """Result of :func:`reconstruct`, in the measurement's physical units.

    Attributes:
        mean: mean of the samples, ``(slices, h, w)``.
        std: their standard deviation; zero with one sample (which says nothing of certainty).
        samples: ``(slices, samples, h, w)``.
        residual_chi2: reduced chi-square of the mean's residual, ``(slices,)``; see
            :meth:`inverse.measurement.Measurement.chi2`.
        status: ``"ok"``, or a sentence that says what to look at.
        nfe: network calls a sample.
        operator_calls: applications of the operator or its adjoint, a sample.
        seed: the seed.
        seconds: wall-clock time of the batches.
        settings: resolved method, options, prior, scale; plain JSON values.
    """

    mean: Tensor
    std: Tensor
    samples: Tensor
    residual_chi2: Tensor
    status: str
    nfe: int
    operator_calls: int
    seed: int
    seconds: float
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Finished samples of one batch, ``(batch, h, w)`` in physical units, and what they cost.

    ``images`` is how many the network was given, ``operator_calls`` is of the batch.
    """

    samples: Tensor
    images: int
    operator_calls: int
    seconds: float


def reconstruct(
    measurement: Measurement,
    prior: Denoiser,
    *,
    method: str = "pnp_admm",
    steps: int | None = None,
    samples: int = 1,
    seed: int = 0,
    batch: int | None = None,
    device: str | torch.device | None = None,
    callback: Callable[[int, int], None] | None = None,
    phase: Literal["estimated", "zero"] = "estimated",
    options: Mapping[str, Any] | None = None,
    positions: Sequence[int] | None = None,
    saved: MutableMapping[int, Batch] | None = None,
) -> Reconstruction:
    r"""Sample images that agree with the measurement and the prior.

    Args:
        measurement: operator, data and noise, physical units.
        prior: a denoiser of the same modality.
        method: a name of :data:`inverse.posterior.METHODS`.
        steps: sampler steps; default the method's.
        samples: samples a slice; 8 or more for a standard deviation worth showing.
        seed: each sample is seeded by (seed, position of the slice, sample): the result depends
            neither on ``batch`` nor on which other slices are there.
        batch: images a network call; default 8.
        device: default the measurement's.
        callback: progress, called as ``callback(done, total)`` in network steps.
        phase: how a prior of real images serves complex ones: as :math:`x = m\,e^{i\varphi}` with
            real m, the phase estimated from the data at low resolution (see
            :func:`inverse.operators.coils.estimated_phase`) or known to be zero.  A prior of
            complex images needs neither.
        options: further options of the method.
        positions: index of each slice in its series; default its index in the measurement.
        saved: finished batches by number.  Those that it holds are not computed again, and new
            ones are put into it, so that a run with equal arguments continues to the same bits.

    Raises:
        CheckpointError: a prior of another modality.
        UnsupportedError: a prior whose channels do not fit the operator.
        ReconError: an unknown method or option, or fewer than one sample.
        NumericalError: if sampling diverges.
    """
    if method not in METHODS:
        raise ReconError(f"no method '{method}'; there are {', '.join(METHODS)}")
    if samples < 1 or (batch is not None and batch < 1):
        raise ReconError(f"samples and batch must be at least 1, got {samples} and {batch}")
    if phase not in ("estimated", "zero"):
        raise ReconError(f"phase must be 'estimated' or 'zero', got {phase!r}")
    places = range(len(measurement)) if positions is None else positions
    if len(places) != len(measurement):
        raise ReconError(f"positions must number the {len(measurement)} slices, got {len(places)}")
    chosen = METHODS[method]
    given = dict(options or {})
    if steps is not None:
        given["steps"] = steps
    resolved = chosen.resolve(given, measurement.modality)
    device = measurement.data.device if device is None else torch.device(device)
    target = measurement.to(device)
    if device != measurement.data.device:
        prior = copy.deepcopy(prior).to(device)  # the caller's prior stays where it is
    prior, embedding, notes = _adapt(prior, target, phase)
    if samples > 1 and chosen.spread != "posterior":
        notes.append(
            f"the standard deviation of {method}'s samples is "
            + ("no uncertainty" if chosen.spread == "none" else "smaller than the posterior's")
            + ": for one to believe choose mmps or pnpdm"
        )
    offset, scale = _affine(prior, target)
    operator = target.operator
    counter = _CountedOperator(operator if embedding is None else operator @ embedding)
    inner = replace(target, operator=counter).rescaled(offset, scale)
    counter.tally[0] = 0
    counted = CountedDenoiser(prior)

    n = len(measurement)
    batch = 8 if batch is None else batch
    pairs = [(z, k) for z in range(n) for k in range(samples)]
    shape = counter.in_shape
    total = len(pairs) * int(resolved["steps"])
    finished: MutableMapping[int, Batch] = {} if saved is None else saved
    results: list[Batch] = []
    with torch.inference_mode():
        for number, first in enumerate(range(0, len(pairs), batch)):
            chunk = pairs[first : first + batch]

            def progress(i: int, _: int, first: int = first, size: int = len(chunk)) -> None:
                if callback is not None:
                    callback(first * int(resolved["steps"]) + i * size, total)

            if number in finished:
                progress(int(resolved["steps"]), 0)
            else:
                begun, images, tally = time.monotonic(), counted.images, counter.tally[0]
                index = torch.tensor([z for z, _ in chunk], device=device)
                noise = Noise([(seed, places[z], k) for z, k in chunk], shape, device)
                problem = Problem(counted, inner.take(index), noise, progress, offset, scale)
                x = offset + scale * chosen.run(problem, **resolved)
                finished[number] = Batch(
                    (x if embedding is None else embedding.take(index)(x)).cpu(),
                    counted.images - images,
                    counter.tally[0] - tally,
                    time.monotonic() - begun,
                )
            results.append(finished[number])
        draws = torch.cat([part.samples for part in results]).unflatten(0, (n, samples))
        mean = draws.mean(dim=1)
        spread = draws - mean[:, None]
        std = spread.abs().square().sum(dim=1).div(max(samples - 1, 1)).sqrt()
        chi2 = target.chi2(mean.to(device)).cpu()
    return Reconstruction(
        mean=mean,
        std=std,
        samples=draws,
        residual_chi2=chi2,
        status=_status(chi2, notes),
        nfe=sum(part.images for part in results) // len(pairs),
        operator_calls=sum(part.operator_calls for part in results) // len(results),
        seed=seed,
        seconds=sum(part.seconds for part in results),
        settings={
            "method": method,
            **resolved,
            "samples": samples,
            "batch": batch,
            "device": str(device),
            "prior": prior.card.name if isinstance(prior, NetworkPrior) else type(prior).__name__,
            "prior_sha256": prior.card.sha256 if isinstance(prior, NetworkPrior) else None,
            "offset": offset,
            "scale": scale,
            "phase": phase if _needs_phase(prior, operator) else None,
            "notes": list(notes),
        },
    )


def _adapt(
    prior: Denoiser, measurement: Measurement, phase: str
) -> tuple[Denoiser, LinearOperator | None, list[str]]:
    """Fit prior and measurement to each other: modality, pixel size and channels.

    Returns:
        The prior at the pixel size it will see; the operator from its images to those of the
        measurement, ``None`` where they are the same; notes for the user.
    """
    notes: list[str] = []
    embedding: LinearOperator | None = None
    operator = measurement.operator
    sides = operator.in_shape
    channels = 1
    if isinstance(prior, NetworkPrior):
        card = prior.card
        if card.modality != measurement.modality:
            raise CheckpointError(
                f"prior '{card.name}' is for {card.modality}, the measurement is "
                f"{measurement.modality}; choose a prior of that modality ('recon priors list')"
            )
        channels = prior.net.config.channels
        pixel = float(np.mean(measurement.pixel_mm))
        low, high = card.pixel_mm_range
        factor = next((k for k in (2, 3, 4) if low <= 1.05 * k * pixel), 1)
        if pixel < 0.95 * low and all(side % factor == 0 for side in sides):
            sides = tuple(side // factor for side in sides)
            embedding = Upsample(sides, factor, operator.dtype)
            notes.append(
                f"pixels of {pixel:.3g} mm are finer than the prior's {low:.3g} to {high:.3g} mm: "
                f"reconstructed on pixels of {pixel * factor:.3g} mm and interpolated"
            )
            pixel *= factor
        elif not 0.95 * low <= pixel <= 1.05 * high:
            notes.append(
                f"pixels of {pixel:.3g} mm lie outside the prior's {low:.3g} to {high:.3g} mm: "
                "expect a worse image"
            )
        prior = prior.at(pixel_mm=pixel)
    if operator.dtype.is_complex:
        split = ComplexFromChannels(sides) if channels == 2 else ComplexFromReal(sides)
        embedding = split if embedding is None else embedding @ split
        if _needs_phase(prior, operator) and phase == "estimated":
            embedding = estimated_phase(operator, measurement.data) @ embedding
    elif channels == 2:
        raise UnsupportedError(
            "a prior of complex images cannot serve a real operator; choose a prior of one channel"
        )
    return prior, embedding, notes


def _needs_phase(prior: Denoiser, operator: LinearOperator) -> bool:
    """Whether a prior of real images is to serve complex ones."""
    real = not isinstance(prior, NetworkPrior) or prior.net.config.channels == 1
    return operator.dtype.is_complex and real


def _affine(prior: Denoiser, measurement: Measurement) -> tuple[float, float]:
    """``physical = offset + scale * prior`` in the measurement's units."""
    if prior.unit == "HU":
        mu = float(measurement.mu_water or 0.0)
        offset = mu * (1 + prior.offset / 1000.0)
        return offset, mu * prior.scale / 1000.0
    if prior.unit == "relative":
        magnitude = measurement.operator.adjoint(measurement.data).abs()
        top = float(np.percentile(magnitude.cpu().numpy(), 99.5))
        return prior.offset * top, prior.scale * top
    return prior.offset, prior.scale


def _status(chi2: Tensor, notes: list[str]) -> str:
    """``ok`` or sentences on what to look at."""
    worst = float(chi2.max())
    messages = list(notes)
    if worst > 3.0:
        messages.append(
            f"the residual's reduced chi-square is {worst:.3g} in the worst slice: the data are "
            "not fitted to their noise; check geometry, field of view, units and noise level, or "
            "raise the data weight"
        )
    return "; ".join(messages) or "ok"


class _CountedOperator(LinearOperator):
    """The same operator, counting applications."""

    def __init__(self, op: LinearOperator, tally: list[int] | None = None) -> None:
        super().__init__(op.in_shape, op.out_shape, op.dtype, op.out_dtype)
        self.op = op
        self.tally = [0] if tally is None else tally

    def take(self, index: Tensor) -> LinearOperator:
        """Of the operator's slices; counts go to the same tally."""
        return _CountedOperator(self.op.take(index), self.tally)

    def _forward(self, x: Tensor) -> Tensor:
        self.tally[0] += 1
        return self.op._forward(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        self.tally[0] += 1
        return self.op._adjoint(y)

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        result = self.op.normal_solve(b, rho, x0, tol=tol, max_iter=max_iter)
        self.tally[0] += 2 * (result.iterations + (x0 is not None))
        return result
