"""Random bodies made of ellipsoids, with lesions at known places.

Values are HU above air: the sum at a point, less 1000, is its HU.  The bodies are cartoons: they
have a body's scales, contrasts and clutter, not its shapes.

Coordinates are millimetres: x to the patient's left, y to the back, z to the head.
"""

from phantoms.anatomy.abdominal import abdomen
from phantoms.anatomy.builder import AIR_HU, Anatomy, Lesion
from phantoms.anatomy.cranial import head
from phantoms.anatomy.thoracic import thorax

__all__ = ["AIR_HU", "Anatomy", "Lesion", "abdomen", "head", "thorax"]
