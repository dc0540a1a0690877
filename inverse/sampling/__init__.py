"""Samplers of a prior: time grids, steps of the reverse SDE, and the one loop over them."""

from inverse.sampling.sample import Noise, sample, time_grid
from inverse.sampling.steps import (
    Corrector,
    Step,
    ancestral,
    ddim,
    euler_maruyama,
    langevin,
    renoise,
    reverse_diffusion,
)

__all__ = [
    "Corrector",
    "Noise",
    "Step",
    "ancestral",
    "ddim",
    "euler_maruyama",
    "langevin",
    "renoise",
    "reverse_diffusion",
    "sample",
    "time_grid",
]
