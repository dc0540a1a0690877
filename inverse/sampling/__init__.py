"""Samplers of a prior: time grids, steps of the reverse SDE, the loop over them; the flow ODE."""

from inverse.sampling.named import (
    Count,
    Interval,
    Mixing,
    Named,
    NotNegative,
    Positive,
    Share,
)
from inverse.sampling.ode import (
    RK45,
    Heun,
    Likelihood,
    bits_per_dim,
    decode,
    dequantise,
    encode,
    log_likelihood,
    slerp,
)
from inverse.sampling.sample import Noise, sample, time_grid
from inverse.sampling.samplers import SAMPLERS, Sampler, annealed_langevin, langevin_dynamics
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
    "RK45",
    "SAMPLERS",
    "Corrector",
    "Count",
    "Heun",
    "Interval",
    "Likelihood",
    "Mixing",
    "Named",
    "Noise",
    "NotNegative",
    "Positive",
    "Sampler",
    "Share",
    "Step",
    "ancestral",
    "annealed_langevin",
    "bits_per_dim",
    "ddim",
    "decode",
    "dequantise",
    "encode",
    "euler_maruyama",
    "langevin",
    "langevin_dynamics",
    "log_likelihood",
    "renoise",
    "reverse_diffusion",
    "sample",
    "slerp",
    "time_grid",
]
