"""Priors: a prior is a denoiser, exact (closed form) or learned (a network in a checkpoint)."""

from inverse.priors.checkpoint import (
    NetworkEnergyPrior,
    NetworkPrior,
    PriorCard,
    list_priors,
    load_prior,
    save_prior,
    update_card,
)
from inverse.priors.denoiser import Denoiser
from inverse.priors.energy import EnergyPrior, FunctionEnergy, energy_score
from inverse.priors.exact import GaussianPrior, MixturePrior
from inverse.priors.network import NetworkConfig, UNet

__all__ = [
    "Denoiser",
    "EnergyPrior",
    "FunctionEnergy",
    "GaussianPrior",
    "MixturePrior",
    "NetworkConfig",
    "NetworkEnergyPrior",
    "NetworkPrior",
    "PriorCard",
    "UNet",
    "energy_score",
    "list_priors",
    "load_prior",
    "save_prior",
    "update_card",
]
