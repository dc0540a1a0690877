"""Posterior sampling: a prior and a measurement combined, method by method."""

from inverse.posterior.guidance import (
    DPS,
    MMPS,
    HalfQuadratic,
    PiGDM,
    Proximal,
    ddnm_plus,
    multistep,
)
from inverse.posterior.methods import METHODS, PRESETS, Method
from inverse.posterior.problem import Problem
from inverse.posterior.projection import song_projection
from inverse.posterior.volume import Coupling

__all__ = [
    "DPS",
    "METHODS",
    "MMPS",
    "PRESETS",
    "Coupling",
    "HalfQuadratic",
    "Method",
    "PiGDM",
    "Problem",
    "Proximal",
    "ddnm_plus",
    "multistep",
    "song_projection",
]
