"""Classical reconstructions: the baseline beside every claim.

Each takes a :class:`~inverse.measurement.Measurement` and returns images in its physical units.
"""

from inverse.classical.implicit import inr
from inverse.classical.linear import (
    cgls,
    fbp,
    interpolated,
    leave_out_metal,
    os_sart,
    sirt,
    tikhonov,
    zero_filled,
)
from inverse.classical.mri import L1_WEIGHT, cg_sense, l1_wavelet, phased, root_sum_of_squares
from inverse.classical.transmission import PenalisedLikelihood, poisson
from inverse.classical.variation import TV_WEIGHT, TV_WEIGHT_MR, TotalVariation, tv

__all__ = [
    "L1_WEIGHT",
    "TV_WEIGHT",
    "TV_WEIGHT_MR",
    "PenalisedLikelihood",
    "TotalVariation",
    "cg_sense",
    "cgls",
    "fbp",
    "inr",
    "interpolated",
    "l1_wavelet",
    "leave_out_metal",
    "os_sart",
    "phased",
    "poisson",
    "root_sum_of_squares",
    "sirt",
    "tikhonov",
    "tv",
    "zero_filled",
]
