"""Phantoms: objects whose image, ray sums and k-space are known in closed form."""

from phantoms.anatomy import Anatomy, Lesion, abdomen, head, thorax
from phantoms.gaussians import Gaussians
from phantoms.polygons import Polygons
from phantoms.published import acr_ct, acr_mr, forbild_head, forbild_thorax
from phantoms.scene import Body, Scene
from phantoms.shapes import (
    Ellipses,
    Ellipsoids,
    rotation_matrix,
    shepp_logan,
    shepp_logan_3d,
    shepp_logan_schabel,
)
from phantoms.solids import Boxes, Cylinders

__all__ = [
    "Anatomy",
    "Body",
    "Boxes",
    "Cylinders",
    "Ellipses",
    "Ellipsoids",
    "Gaussians",
    "Lesion",
    "Polygons",
    "Scene",
    "abdomen",
    "acr_ct",
    "acr_mr",
    "forbild_head",
    "forbild_thorax",
    "head",
    "rotation_matrix",
    "shepp_logan",
    "shepp_logan_3d",
    "shepp_logan_schabel",
    "thorax",
]
