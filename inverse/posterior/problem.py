"""What a posterior method is given: one batch of slices, in prior units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from inverse.measurement import Measurement
from inverse.priors.denoiser import Denoiser
from inverse.sampling import Noise

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """One batch to reconstruct, in prior units.

    Attributes:
        prior: denoiser.
        measurement: data of the batch.
        noise: randomness of the batch's samples.
        callback: progress, ``(i, n)``.
        offset: physical value of prior value 0.
        scale: physical units per prior unit.
    """

    prior: Denoiser
    measurement: Measurement
    noise: Noise
    callback: Callable[[int, int], None] | None = None
    offset: float = 0.0
    scale: float = 1.0
