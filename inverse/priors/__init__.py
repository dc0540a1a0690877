"""Priors: a prior is a denoiser, exact (closed form) or learned (a network in a checkpoint)."""

from inverse.priors.checkpoint import NetworkPrior, PriorCard, list_priors, load_prior, save_prior
from inverse.priors.denoiser import Denoiser
from inverse.priors.exact import GaussianPrior, MixturePrior
from inverse.priors.network import NetworkConfig, UNet

__all__ = [
    "Denoiser",
    "GaussianPrior",
    "MixturePrior",
    "NetworkConfig",
    "NetworkPrior",
    "PriorCard",
    "UNet",
    "list_priors",
    "load_prior",
    "save_prior",
]
