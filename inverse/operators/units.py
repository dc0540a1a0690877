r"""Hounsfield units and linear attenuation.

.. math:: \mu = \mu_w\,(1 + \mathrm{HU}/1000)

with :math:`\mu_w` the attenuation of water at the scan's effective energy.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

from inverse.errors import InputError

__all__ = ["AIR_HU", "MU_WATER", "hu_to_mu", "mu_to_hu"]

MU_WATER = 0.0206
"""Linear attenuation of water at 60 keV in 1/mm (NIST XCOM: 0.2059 cm^2/g at 1 g/cm^3)."""

AIR_HU = -1000.0
"""The HU value of zero attenuation."""

Array = TypeVar("Array", Tensor, np.ndarray)


def hu_to_mu(hu: Array, mu_water: float = MU_WATER) -> Array:
    """Attenuation in 1/mm from HU.

    Args:
        hu: values in HU.
        mu_water: attenuation of water in 1/mm.

    Raises:
        InputError: if ``mu_water`` is not positive.
    """
    _check(mu_water)
    return mu_water * (1.0 + hu / 1000.0)


def mu_to_hu(mu: Array, mu_water: float = MU_WATER) -> Array:
    """HU from attenuation in 1/mm; the inverse of :func:`hu_to_mu`.

    Args:
        mu: values in 1/mm.
        mu_water: attenuation of water in 1/mm.

    Raises:
        InputError: if ``mu_water`` is not positive.
    """
    _check(mu_water)
    return 1000.0 * (mu / mu_water - 1.0)


def _check(mu_water: float) -> None:
    if not mu_water > 0.0:
        raise InputError(
            f"mu_water must be a positive attenuation in 1/mm (0.0206 at 60 keV), got {mu_water}"
        )
