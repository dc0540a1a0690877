"""Phantoms: objects whose image, ray sums and k-space are known in closed form."""

from phantoms.anatomy import Anatomy, Lesion, head, thorax
from phantoms.shapes import Ellipses, Ellipsoids, rotation_matrix, shepp_logan, shepp_logan_3d

__all__ = [
    "Anatomy",
    "Ellipses",
    "Ellipsoids",
    "Lesion",
    "head",
    "rotation_matrix",
    "shepp_logan",
    "shepp_logan_3d",
    "thorax",
]
