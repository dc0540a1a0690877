"""Medical inverse problems with unconditional score-SDE priors.

A prior is a denoiser.  A measurement is an operator, its data and its noise.  A reconstruction
alternates reverse-SDE steps with data consistency.  Research use only; not a medical device.
"""

from inverse.errors import ReconError
from inverse.measurement import Measurement
from inverse.priors import list_priors, load_prior
from inverse.reconstruct import Reconstruction, reconstruct
from inverse.sde import SDE, VE, VP, SubVP

__all__ = [
    "SDE",
    "VE",
    "VP",
    "Measurement",
    "ReconError",
    "Reconstruction",
    "SubVP",
    "list_priors",
    "load_prior",
    "reconstruct",
]
__version__ = "0.1.0"
