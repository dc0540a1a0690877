"""Can this reconstruction be believed? Uncertainty, and what came from the prior."""

from inverse.trust.hallucination import (
    PriorPart,
    Split,
    hallucination_maps,
    prior_part,
    split,
)
from inverse.trust.uncertainty import (
    ChiSquare,
    Conformal,
    Moments,
    Whiteness,
    by_first_axis,
    by_frequency,
    crc,
    interval,
    rcps,
    residual_chi2,
    risk,
    whiteness,
)

__all__ = [
    "ChiSquare",
    "Conformal",
    "Moments",
    "PriorPart",
    "Split",
    "Whiteness",
    "by_first_axis",
    "by_frequency",
    "crc",
    "hallucination_maps",
    "interval",
    "prior_part",
    "rcps",
    "residual_chi2",
    "risk",
    "split",
    "whiteness",
]
