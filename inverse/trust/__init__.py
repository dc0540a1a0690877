"""Can this reconstruction be believed? Uncertainty, hallucination, lesions."""

from inverse.trust.detectability import (
    Detection,
    auc,
    contrast_recovery,
    d_prime,
    hotelling,
    laguerre_gauss,
)
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
    "Detection",
    "Moments",
    "PriorPart",
    "Split",
    "Whiteness",
    "auc",
    "by_first_axis",
    "by_frequency",
    "contrast_recovery",
    "crc",
    "d_prime",
    "hallucination_maps",
    "hotelling",
    "interval",
    "laguerre_gauss",
    "prior_part",
    "rcps",
    "residual_chi2",
    "risk",
    "split",
    "whiteness",
]
