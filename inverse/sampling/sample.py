"""The one loop of all samplers, its time grids and its randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from inverse.errors import InputError, NumericalError
from inverse.priors.denoiser import Denoiser, expand
from inverse.sampling.steps import Corrector, Step
from inverse.sde import SDE

__all__ = ["DIVERGED", "Noise", "sample", "time_grid"]

DIVERGED = 1e4
"""An iterate this many times larger than the noise and image that it started from diverges."""


class Noise:
    """Standard normal draws, one generator a sample.

    A sample's draws depend on its own seed only, not on the batch it is computed in nor on the
    number of workers; they are made on the CPU so that devices agree.

    Args:
        seeds: one tuple of integers a sample, e.g. ``(seed, slice, sample)``.
        shape: shape of one sample.
        device: where draws are returned.
    """

    def __init__(
        self,
        seeds: Sequence[tuple[int, ...]],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.device = tuple(shape), torch.device(device)
        self._generators = [torch.Generator().manual_seed(_mix(seed)) for seed in seeds]

    def __call__(self, shape: Sequence[int] | None = None) -> Tensor:
        """Standard normal draws ``(samples, *shape)``; by default of the shape of a sample."""
        size = self.shape if shape is None else tuple(shape)
        draws = [torch.randn(size, generator=g) for g in self._generators]
        return torch.stack(draws).to(self.device)


def _mix(seed: tuple[int, ...]) -> int:
    """Integers to one 63-bit seed (splitmix64 finaliser, folded over the tuple)."""
    state = 0
    for value in seed:
        state = (state + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def time_grid(
    sde: SDE,
    steps: int,
    *,
    start: float | None = None,
    end: float | None = None,
    spacing: Literal["geometric", "karras", "uniform"] = "geometric",
) -> Tensor:
    r"""Decreasing times ``(steps,)`` at which a sampler calls its denoiser.

    Args:
        sde: forward process.
        steps: how many.
        start: noise level :math:`\sigma/\alpha` of the first, default that of ``t = 1``.
        end: noise level of the last, default that of ``t_min``.
        spacing: of noise levels: ``geometric``; ``karras``, even in :math:`\sigma^{1/7}` (EDM,
            equation 5); or ``uniform`` in ``t``.

    Raises:
        InputError: fewer than one step, or levels out of order or range.
    """
    if steps < 1:
        raise InputError(f"a sampler needs at least 1 step, got {steps}")
    high = float(sde.noise_level(1.0)) if start is None else start
    low = float(sde.noise_level(sde.t_min)) if end is None else end
    if not 0 < low <= high:
        raise InputError(
            f"noise levels must fall from start to end, got start {high:g} and end {low:g}"
        )
    u = torch.linspace(0, 1, steps, dtype=torch.float64)
    if spacing == "uniform":
        first, last = sde.time(high), sde.time(low)
        return first + u * (last - first)
    if spacing == "karras":
        return sde.time((high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7)
    return sde.time(high * (low / high) ** u)


def sample(
    denoiser: Denoiser,
    times: Tensor,
    step: Step,
    noise: Noise,
    *,
    start: Tensor | None = None,
    corrector: Corrector | None = None,
    project: Callable[[Tensor, Tensor], Tensor] | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Reverse-SDE sampling with data consistency on the estimate or on the iterate.

    ::

        x = alpha x_start + sigma z                  (x_start = 0 without a start)
        for t, s in times:
            x = project(x, t); x = corrector(x, t)   if given
            x = project(x, t)                        if given
            x = step(x, D(x, t), t, s)
        return D(x, last t)                          the Tweedie step

    Calls of the denoiser: one a time, two with a corrector (one at the last time).

    Args:
        denoiser: prior, or a prior guided by data (a denoiser again).
        times: decreasing times, ``(n,)``.
        step: reverse step.
        noise: source of noise; fixes the number and shape of samples.
        start: clean image to start from, ``(samples, *shape)``, prior units.
        corrector: Langevin corrector.
        project: data consistency on the iterate, ``(x, t) -> x``.
        callback: called as ``callback(i, n)`` after every time.

    Returns:
        Samples ``(samples, *shape)`` in prior units.

    Raises:
        NumericalError: if an iterate is not finite or :data:`DIVERGED` times its start.
    """
    sde = denoiser.sde
    alpha, sigma = sde.marginal(times[0])
    z = noise()
    x = expand(sigma, z) * z
    if start is not None:
        x = x + expand(alpha, z) * start
    bound = DIVERGED * float(sigma + (0.0 if start is None else alpha * start.abs().max().cpu()))
    for i, t in enumerate(times):
        last = i + 1 == len(times)
        if corrector is not None and not last:
            if project is not None:
                x = project(x, t)
            x = corrector(sde, x, denoiser.denoise(x, t), t, times[i + 1], noise())
        if project is not None:
            x = project(x, t)
        x0 = denoiser.denoise(x, t)
        x = x0 if last else step(sde, x, x0, t, times[i + 1], noise())
        if not bool((x.abs() <= bound).all()):
            raise NumericalError(
                f"sampling diverged at step {i + 1} of {len(times)}; lower the corrector's snr or "
                "the data weight, or use more steps"
            )
        if callback is not None:
            callback(i + 1, len(times))
    return x
