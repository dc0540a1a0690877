"""Classical reconstructions: the baseline beside every claim.

Each takes a :class:`~inverse.measurement.Measurement` and returns images in its physical units.
"""

from inverse.classical.linear import cgls, fbp, tikhonov, zero_filled
from inverse.classical.variation import TV_WEIGHT, TV_WEIGHT_MR, TotalVariation, tv

__all__ = [
    "TV_WEIGHT",
    "TV_WEIGHT_MR",
    "TotalVariation",
    "cgls",
    "fbp",
    "tikhonov",
    "tv",
    "zero_filled",
]
