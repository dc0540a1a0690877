r"""What an MR sequence makes of a tissue: relaxation times and signal equations.

Signal is relative to that of fully relaxed water, :math:`\rho` the proton density relative to
water's.  Times in ms.

=====================  ==========================================================================
spin echo              :math:`\rho\,(1 - 2e^{-(T_R - T_E/2)/T_1} + e^{-T_R/T_1})\,e^{-T_E/T_2}`
spoiled gradient echo  :math:`\rho\,\sin\alpha\,(1 - e^{-T_R/T_1})/(1 - \cos\alpha\,e^{-T_R/T_1})
                       \,e^{-T_E/T_2^*}`
inversion recovery     :math:`\rho\,|1 - 2e^{-T_I/T_1} + e^{-T_R/T_1}|\,e^{-T_E/T_2}`
=====================  ==========================================================================

References:
    Bernstein, King and Zhou, "Handbook of MRI Pulse Sequences" (2004), ch. 14: the equations.
    Stanisz et al., MRM 54 (2005) 507: white and grey matter, blood, muscle at 1.5 T and 3 T.
    Gold et al., AJR 183 (2004) 343: fat and marrow. Reichert et al., Magn. Reson. Imaging 23
    (2005) 611: cortical bone. Rooney et al., MRM 57 (2007) 308: T1 of cerebrospinal fluid, the
    same at both fields. Kwan, Evans and Pike, IEEE TMI 18 (1999) 1085: proton densities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from inverse.errors import InputError

__all__ = [
    "SEQUENCES",
    "TISSUES",
    "InversionRecovery",
    "Sequence",
    "SpinEcho",
    "SpoiledGradientEcho",
    "Tissue",
    "nulling_time",
    "signals",
]


@dataclass(frozen=True)
class Tissue:
    """Relaxation of a tissue at one field.

    Attributes:
        t1: longitudinal relaxation time, ms.
        t2: transverse relaxation time, ms.
        density: proton density relative to water.
    """

    t1: float
    t2: float
    density: float


def _both(t1: float, t2: float, density: float) -> dict[float, Tissue]:
    return {1.5: Tissue(t1, t2, density), 3.0: Tissue(t1, t2, density)}


TISSUES: dict[str, dict[float, Tissue]] = {
    "air": _both(1000, 100, 0.0),
    "white": {1.5: Tissue(884, 72, 0.77), 3.0: Tissue(1084, 69, 0.77)},
    "grey": {1.5: Tissue(1124, 95, 0.86), 3.0: Tissue(1820, 99, 0.86)},
    "csf": _both(4300, 2000, 1.0),
    "muscle": {1.5: Tissue(1008, 44, 0.9), 3.0: Tissue(1412, 50, 0.9)},
    "fat": {1.5: Tissue(288, 165, 0.9), 3.0: Tissue(371, 133, 0.9)},
    "diploe": {1.5: Tissue(288, 165, 0.5), 3.0: Tissue(365, 133, 0.5)},
    "cortex": _both(200, 0.4, 0.2),
    "vessel": {1.5: Tissue(1441, 290, 0.9), 3.0: Tissue(1932, 275, 0.9)},
    "skin": {1.5: Tissue(900, 40, 0.7), 3.0: Tissue(1100, 38, 0.7)},
    "eye": _both(4000, 1000, 0.98),
    "lens": {1.5: Tissue(1000, 30, 0.7), 3.0: Tissue(1200, 28, 0.7)},
    "dura": {1.5: Tissue(900, 40, 0.5), 3.0: Tissue(1100, 38, 0.5)},
    "bleed": {1.5: Tissue(450, 50, 0.8), 3.0: Tissue(550, 40, 0.8)},
    "oedema": {1.5: Tissue(1250, 140, 0.9), 3.0: Tissue(1700, 135, 0.9)},
    "tumour": {1.5: Tissue(1350, 120, 0.88), 3.0: Tissue(1750, 115, 0.88)},
}
"""Tissues of the random head by field in tesla. Skin, eye, lens, dura and the lesions are typical
values without one source; `diploe` is fatty marrow of half the density; blood does not flow."""


class Sequence(Protocol):
    """A pulse sequence: what signal a tissue gives."""

    def signal(self, tissue: Tissue) -> float:
        """Signal relative to fully relaxed water."""


def _check(**times: float) -> None:
    for name, value in times.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"a sequence's {name} must be a positive time in ms, got {value:g}")


@dataclass(frozen=True)
class SpinEcho:
    """Spin echo; see the module's table.

    Attributes:
        tr: repetition time, ms.
        te: echo time, ms.

    Raises:
        InputError: a time that is not positive, or an echo after the repetition.
    """

    tr: float
    te: float

    def __post_init__(self) -> None:
        _check(tr=self.tr, te=self.te)
        if self.te >= self.tr:
            raise InputError(f"the echo at {self.te:g} ms comes after TR {self.tr:g} ms")

    def signal(self, tissue: Tissue) -> float:
        """Signal relative to fully relaxed water."""
        recovery = (
            1 - 2 * math.exp(-(self.tr - self.te / 2) / tissue.t1) + math.exp(-self.tr / tissue.t1)
        )
        return tissue.density * recovery * math.exp(-self.te / tissue.t2)


@dataclass(frozen=True)
class SpoiledGradientEcho:
    r"""Spoiled gradient echo in the steady state; see the module's table.

    Attributes:
        tr: repetition time, ms.
        te: echo time, ms.
        flip: flip angle, rad.
        t2_prime: decay by inhomogeneity, :math:`1/T_2^* = 1/T_2 + 1/T_2'`, ms.

    Raises:
        InputError: a time that is not positive, an echo after the repetition, or a flip angle
            outside (0, pi/2].
    """

    tr: float
    te: float
    flip: float
    t2_prime: float = 100.0

    def __post_init__(self) -> None:
        _check(tr=self.tr, te=self.te, t2_prime=self.t2_prime)
        if self.te >= self.tr:
            raise InputError(f"the echo at {self.te:g} ms comes after TR {self.tr:g} ms")
        if not 0 < self.flip <= math.pi / 2:
            raise InputError(
                f"the flip angle must lie in 0 to 90 degrees, got {math.degrees(self.flip):g}"
            )

    def signal(self, tissue: Tissue) -> float:
        """Signal relative to fully relaxed water."""
        e1 = math.exp(-self.tr / tissue.t1)
        steady = math.sin(self.flip) * (1 - e1) / (1 - math.cos(self.flip) * e1)
        return tissue.density * steady * math.exp(-self.te * (1 / tissue.t2 + 1 / self.t2_prime))


@dataclass(frozen=True)
class InversionRecovery:
    """Inversion recovery with a spin-echo readout, magnitude; see the module's table.

    Attributes:
        tr: repetition time, ms.
        te: echo time, ms.
        ti: inversion time, ms; that of :func:`nulling_time` makes FLAIR or STIR.

    Raises:
        InputError: a time that is not positive, or an inversion time and echo beyond TR.
    """

    tr: float
    te: float
    ti: float

    def __post_init__(self) -> None:
        _check(tr=self.tr, te=self.te, ti=self.ti)
        if self.te + self.ti >= self.tr:
            raise InputError(
                f"inversion ({self.ti:g} ms) and echo ({self.te:g} ms) must end before TR "
                f"{self.tr:g} ms"
            )

    def signal(self, tissue: Tissue) -> float:
        """Signal relative to fully relaxed water."""
        recovery = 1 - 2 * math.exp(-self.ti / tissue.t1) + math.exp(-self.tr / tissue.t1)
        return tissue.density * abs(recovery) * math.exp(-self.te / tissue.t2)


def nulling_time(t1: float, tr: float) -> float:
    r"""Inversion time at which a tissue gives no signal, :math:`T_1\ln(2/(1 + e^{-T_R/T_1}))`."""
    return t1 * math.log(2 / (1 + math.exp(-tr / t1)))


SEQUENCES: dict[str, Sequence] = {
    "t1": SpinEcho(tr=500, te=14),
    "t2": SpinEcho(tr=4000, te=100),
    "pd": SpinEcho(tr=4000, te=14),
    "flair": InversionRecovery(tr=9000, te=120, ti=nulling_time(TISSUES["csf"][1.5].t1, 9000)),
    "spgr": SpoiledGradientEcho(tr=20, te=4, flip=math.radians(25)),
}
"""Usual settings by name: T1-, T2- and density-weighted spin echo, FLAIR, and spoiled gradient
echo."""


def signals(sequence: Sequence, field: float = 1.5) -> dict[str, float]:
    """Signal of every tissue of `TISSUES`, for :func:`phantoms.anatomy.head`.

    Args:
        sequence: the pulse sequence.
        field: 1.5 or 3 T.

    Raises:
        InputError: another field.
    """
    if field not in (1.5, 3.0):
        raise InputError(f"relaxation times are known at 1.5 and 3 T, got {field:g} T")
    return {name: sequence.signal(at[field]) for name, at in TISSUES.items()}
