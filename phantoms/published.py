r"""Published test objects, rebuilt in closed form from their definitions.

CT phantoms are in HU above air (the sum at a point, less 1000, is its HU), MR phantoms in signal
relative to the filling solution; lengths in mm.

References:
    Yu, Noo, Dennerlein, Wunderlich, Lauritsch and Hornegger, "Simulation tools for
    two-dimensional experiments in x-ray computed tomography using the FORBILD head phantom",
    Phys. Med. Biol. 57 (2012) N237: table and cuts of the head's section.
    Sourbelle, "Thorax phantom", FORBILD phantom group, Univ. Erlangen (1999).
    McCollough, Bruesewitz, McNitt-Gray et al., "The phantom portion of the American College of
    Radiology (ACR) computed tomography (CT) accreditation program", Med. Phys. 31 (2004) 2423.
    American College of Radiology, "Phantom test guidance for use of the large MRI phantom for the
    MRI accreditation program" (2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from inverse.errors import GeometryError
from inverse.operators.units import MU_WATER
from phantoms.anatomy.builder import along
from phantoms.beam import ALUMINIUM
from phantoms.polygons import Polygons, cut
from phantoms.scene import Body, Scene
from phantoms.shapes import Ellipses, Ellipsoids, Float, rotation_matrix
from phantoms.solids import Boxes, Cylinders

__all__ = [
    "ACR_INSERTS",
    "ACR_LINE_PAIRS",
    "Insert",
    "acr_ct",
    "acr_mr",
    "forbild_head",
    "forbild_thorax",
]

# FORBILD head, columns: x, y (upwards), semi-axes a and b in cm, angle in degrees, density
# relative to water that is added, and the lines (direction of the normal in degrees, distance in
# cm) that cut the ellipse.
_Y16, _B16 = -14.294530834372887, 3.892760834372886
_Lines = tuple[tuple[float, float], ...]
_FORBILD_HEAD: tuple[tuple[float, float, float, float, float, float, _Lines], ...] = (
    (-4.7, 4.3, 1.79989, 1.79989, 0, 0.010, ()),
    (4.7, 4.3, 1.79989, 1.79989, 0, 0.010, ()),
    (-1.08, -9, 0.4, 0.4, 0, 0.0025, ()),
    (1.08, -9, 0.4, 0.4, 0, -0.0025, ()),
    (0, 0, 9.6, 12, 0, 1.800, ()),
    (0, 8.4, 1.8, 3.0, 0, -1.050, ()),
    (1.9, 5.4, 0.41633, 1.17425, -31.07698, 0.750, ()),
    (-1.9, 5.4, 0.41633, 1.17425, 31.07698, 0.750, ()),
    (-4.3, 6.8, 1.8, 0.24, -30, 0.750, ()),
    (4.3, 6.8, 1.8, 0.24, 30, 0.750, ()),
    (0, -3.6, 1.8, 3.6, 0, -0.005, ()),
    (6.39395, -6.39395, 1.2, 0.42, 58.1, 0.005, ()),
    (0, 3.6, 2, 2, 0, 0.750, ((0, 1.2), (180, 1.2), (90, 0.27884), (270, 0.27884))),
    (0, 9.6, 1.8, 3.0, 0, 1.800, ((90, 0.60687), (270, 0.60687), (0, 0.2), (180, 0.2))),
    (0, 0, 9.0, 11.4, 0, 0.750, ((15, -2.605), (165, -2.605), (90, -10.71177))),
    (0, _Y16, 0.443194085308632, _B16, 0, 0.750, ((270, _Y16 + 10.71177),)),
)  # fmt: skip
_FORBILD_BRAIN = (0.0, 0.0, 9.0, 11.4, 0.0, -0.750)
_FORBILD_EAR = (9.1, 0.0, 4.2, 1.8, 0.0, 0.750)


def forbild_head(*, ear: bool = True, resolution: bool = False) -> Scene:
    """The FORBILD head's section through the petrous bone, in HU above air; 192 mm wide.

    Density relative to water becomes HU: water 0, brain 50 with details of 2.5 to 10 HU, skull
    800. Ellipses that lines cut are polygons of up to 720 corners, 1.3e-5 short of their area.

    Args:
        ear: the right ear, a bone block with 53 air cells of 3 mm.
        resolution: the left ear, 80 holes of 0.25 to 0.36 mm in diameter.

    Source: Yu et al. (2012), table 1 and appendix.
    """
    discs: list[list[float]] = []
    cuts: list[tuple[float, Float]] = []

    def add(
        x: float, y: float, a: float, b: float, degrees: float, density: float, lines: _Lines,
    ) -> None:  # fmt: skip
        # Lengths to mm; y to downwards, which turns every angle round.
        place = (10 * x, -10 * y, 10 * a, 10 * b, -np.deg2rad(degrees))
        if not lines:
            discs.append([1000 * density, *place])
            return
        corners = cut(*place, [(-np.deg2rad(t), 10 * d) for t, d in lines])
        cuts.append((1000 * density, corners))

    for row in _FORBILD_HEAD:
        add(*row)
    add(*_FORBILD_BRAIN, ((0.0, 8.88740),) if ear else ())
    if ear:
        add(*_FORBILD_EAR, ((0.0, -0.21260),))
        row0 = 8.8 - 0.4 * np.arange(9)
        pitch = 0.2 * np.sqrt(3)
        cells = [(x, 0.0) for x in row0]
        for j in (1, 2, 3):
            for x in row0[: 8 - 2 * (j // 3)] - 0.2 * (j % 2):
                cells += [(x, j * pitch), (x, -j * pitch)]
        for x, y in cells:
            add(float(x), float(y), 0.15, 0.15, 0, -1.8, ())
    if resolution:
        for group, d in enumerate((0.0357, 0.0312, 0.0278, 0.0250)):
            for column in range(4):
                for k in range(5):
                    y = -1.0 + 2 * k * d + 12 * 0.04 * group
                    add(-7.0 + 2 * column * 0.04, y, d / 2, d / 2, 0, 0.75, ())
    return Scene((Ellipses.of(discs), Polygons.of(cuts)))


def forbild_thorax() -> Body:
    """A thorax after FORBILD's, in HU above air; 400 x 200 x 500 mm, sections at |z| < 250 mm.

    Trunk, lungs, arms and sternum have the published sizes. Simplified, because values here add
    while the original lets one object replace another: the heart is an ellipsoid that fits
    between the lungs (not a sphere that dents them), the shoulders' spheres, collar bones and
    shoulder blades are left out, and sizes and places of aorta, ribs and spine are ours: three
    cylinders, five pairs of nine cylinders on tilted ellipses, and a column of discs and arches.
    """
    water, lung, blood, cortex, marrow = 1000.0, 260.0, 1060.0, 1600.0, 1150.0
    upright = np.eye(3)
    lying = rotation_matrix(0, 0, np.pi / 2)  # axis along y
    rods: list[tuple[float, list[float], list[float], float, Float]] = [
        (water, [0, 0, 0], [200, 100], 250, upright),
        (blood - water, [8, -32, 40], [11, 11], 29, upright),
        (blood - water, [18, 42, -40], [9, 9], 109, upright),
        (blood - water, [13, 6, 60], [9, 9], 26, rotation_matrix(0.0) @ lying),
        (cortex - water, [0, 62, 0], [14, 12], 240, upright),
        (marrow - cortex, [0, 62, 0], [12, 10], 239, upright),
        (cortex - water, [0, 84, 0], [9, 8], 240, upright),
        (water - cortex, [0, 84, 0], [6, 5], 239, upright),
    ]
    for side in (-1, 1):
        rods += [
            (water, [side * 250, 0, 175], [50, 50], 75, upright),
            (cortex - water, [side * 250, 0, 175], [13, 13], 75, upright),
            (marrow - cortex, [side * 250, 0, 175], [8, 8], 75, upright),
        ]
    rods += [(120 - 240 * (k % 2), [0, 62, 27 * (k - 8)], [11, 9], 3, upright) for k in range(17)]
    for side in (-1, 1):
        for level in range(5):
            q = np.pi / 2 + np.arange(0.5, 10) * np.pi / 10
            ends = np.stack(
                [side * -190 * np.cos(q), 85 * np.sin(q), 50.0 * level - 100 + 40 * np.sin(q)], 1
            )
            step = np.diff(ends, axis=0)
            turn = along(step)[:, :, [1, 2, 0]]  # the third column is the axis
            for middle, half, rotation in zip(
                (ends[1:] + ends[:-1]) / 2, np.linalg.norm(step, axis=1) / 2, turn, strict=True
            ):
                at = middle.tolist()
                rods.append((cortex - water, at, [4, 6], 0.92 * half, rotation))
                rods.append((marrow - cortex, at, [2.5, 4.5], 0.92 * half - 1, rotation))
    value, centre, axes, half_length, rotation = (list(part) for part in zip(*rods, strict=True))
    oval = [
        (lung - water, [-105, 0, 0], [75, 55, 150]),
        (lung - water, [105, 0, 0], [75, 55, 150]),
        (blood - water, [0, -25, -40], [26, 45, 45]),
    ]
    return Body(
        (
            Cylinders(
                np.array(value),
                np.array(centre),
                np.array(axes),
                np.array(half_length),
                np.array(rotation),
            ),
            Ellipsoids(
                np.array([v for v, _, _ in oval]),
                np.array([c for _, c, _ in oval]),
                np.array([a for _, _, a in oval]),
                np.tile(np.eye(3), (3, 1, 1)),
            ),
            Boxes(
                np.array([cortex - water, marrow - cortex]),
                np.array([[0, -91, 25.0]] * 2),
                np.array([[12.5, 4, 125], [11, 2.5, 123.5]]),
                np.tile(np.eye(3), (2, 1, 1)),
            ),
        )
    )


@dataclass(frozen=True)
class Insert:
    """A cylinder of the ACR CT phantom's first module.

    Attributes:
        x: centre along columns, mm.
        y: centre along rows, mm.
        radius: mm.
        hu: nominal HU.
        low: least HU that passes the accreditation.
        high: largest HU that passes.
    """

    x: float
    y: float
    radius: float
    hu: float
    low: float
    high: float


def _insert(degrees: float, hu: float, low: float, high: float, radius: float = 12.5) -> Insert:
    t = np.deg2rad(degrees)
    return Insert(float(63 * np.cos(t)), float(63 * np.sin(t)), radius, hu, low, high)


ACR_INSERTS = {
    "bone": _insert(-45, 955, 850, 970),
    "polyethylene": _insert(-135, -95, -107, -84),
    "acrylic": _insert(135, 120, 110, 135),
    "air": _insert(45, -1000, -1005, -970),
    "water": _insert(180, 0, -7, 7, radius=25.0),
}
"""The inserts of module 1 with the HU limits of the accreditation (at 120 kV)."""

ACR_LINE_PAIRS = (4, 5, 6, 7, 8, 9, 10, 12)
"""Line pairs per cm of the bar patterns of module 4, from 45 degrees above the left, clockwise."""

Module = Literal[1, 2, 3, 4]


def acr_ct(module: Module) -> Scene:
    """One module of the ACR CT accreditation phantom (Gammex 464), in HU above air.

    A cylinder of 200 mm diameter; each module is 40 mm deep and constant along z.

    1: 25 mm rods of bone equivalent, polyethylene, acrylic and air, and a 50 mm water-equivalent
    one, in water equivalent of 0 HU (`ACR_INSERTS`). 2: rods of 6 HU above their background of
    90 HU: one of 25 mm, and four each of 6, 5, 4, 3 and 2 mm, their centres two diameters apart.
    3: uniform. 4: eight 15 x 15 mm patterns of aluminium bars (`ACR_LINE_PAIRS`).

    Left out: wire ramps, the alignment beads, the two 0.28 mm beads of module 3. The rods of
    module 2 stand in rows along the rim, an arrangement of ours; the bars run along the radius.

    Args:
        module: 1 to 4.

    Raises:
        GeometryError: another number.

    Source: McCollough et al. (2004); rods at 63 mm and bars at 70 mm from the centre.
    """
    if module == 1:
        rods: list[list[float]] = [[1000, 0, 0, 100, 100, 0]]
        rods += [[i.hu, i.x, i.y, i.radius, i.radius, 0] for i in ACR_INSERTS.values() if i.hu]
        return Scene((Ellipses.of(rods),))
    if module == 2:
        rows: list[list[float]] = [[1090, 0, 0, 100, 100, 0], [6, 0, -60, 12.5, 12.5, 0]]
        for k, diameter in enumerate((6, 5, 4, 3, 2)):
            t = np.deg2rad(-90 + 60 * (k + 1))
            for j in range(4):
                shift = (j - 1.5) * 2 * diameter
                x = 60 * np.cos(t) - shift * np.sin(t)
                y = 60 * np.sin(t) + shift * np.cos(t)
                rows.append([6, x, y, diameter / 2, diameter / 2, 0])
        return Scene((Ellipses.of(rows),))
    if module == 3:
        return Scene((Ellipses.of([1000, 0, 0, 100, 100, 0]),))
    if module != 4:
        raise GeometryError(f"The ACR CT phantom has modules 1 to 4, expected one, got {module}.")
    aluminium = 1000 * float(ALUMINIUM.attenuation(60.0)) / MU_WATER - 1000
    bars = []
    for k, pairs in enumerate(ACR_LINE_PAIRS):
        t = np.deg2rad(-135 + 45 * k)
        width = 5 / pairs
        for j in range(round(1.5 * pairs)):
            shift = -7.5 + width * (2 * j + 0.5)
            x = 70 * np.cos(t) - shift * np.sin(t)
            y = 70 * np.sin(t) + shift * np.cos(t)
            bars.append([aluminium, x, y, 7.5, width / 2, t])
    return Scene((Ellipses.of([1000, 0, 0, 100, 100, 0]), Polygons.boxes(bars)))


Part = Literal["resolution", "grid", "uniformity", "contrast"]


def acr_mr(part: Part = "resolution", *, contrast: float = 0.051) -> Scene:
    """One slice of the large ACR MR accreditation phantom, signal 1 in its solution, 0 elsewhere.

    A cylinder of 190 mm inner diameter.

    "resolution": a plastic bar with three pairs of arrays of 4 x 4 holes of 1.1, 1.0 and 0.9 mm,
    centres two diameters apart; rows of the upper left array of a pair are staggered by a tenth
    of the distance, columns of the lower right one. "grid": 10 x 10 squares within 144 mm.
    "uniformity": the solution alone. "contrast": ten spokes of three discs each, of 7.0 down to
    1.5 mm diameter.

    Sizes of the bar and of the walls, and the radii of the discs (13, 26 and 39 mm), are ours;
    wedges, ramps and the crossed bars are left out.

    Args:
        part: the slice.
        contrast: signal that the discs lack; the four slices have 0.014, 0.025, 0.036 and 0.051.

    Raises:
        GeometryError: another slice, or a contrast outside (0, 1].

    Source: ACR phantom test guidance (2018), sections 0.2, 2 and 7.
    """
    tank = Ellipses.of([1.0, 0, 0, 95, 95, 0])
    if part == "uniformity":
        return Scene((tank,))
    if part == "resolution":
        holes = []
        for k, diameter in enumerate((1.1, 1.0, 0.9)):
            pitch = 2 * diameter
            x0, y0 = 26.0 * (k - 1) - 7.0, 62.0
            for i in range(4):
                for j in range(4):
                    upper = (x0 + pitch * (j + 0.1 * i), y0 - 8 + pitch * i)
                    lower = (x0 + 9 + pitch * j, y0 + 1 + pitch * (i + 0.1 * j))
                    holes += [[1.0, *at, diameter / 2, diameter / 2, 0] for at in (upper, lower)]
        bar = Polygons.boxes([-1.0, 0, 62, 42, 13, 0])
        return Scene((tank, bar, Ellipses.of(holes)))
    if part == "grid":
        pitch, side = 14.4, 12.9
        sides = [(k * np.pi / 2, 5 * pitch) for k in range(4)]
        plate = cut(0, 0, 95, 95, 0, sides)  # the tank cuts its corners
        at = (np.arange(10) - 4.5) * pitch
        squares = [
            [1.0, x, y, side / 2, side / 2, 0]
            for y in at
            for x in at
            if np.hypot(abs(x) + side / 2, abs(y) + side / 2) < 95
        ]
        return Scene((tank, Polygons.of([(-1.0, plate)]), Polygons.boxes(squares)))
    if part != "contrast":
        raise GeometryError(
            f"The ACR MR phantom has slices {', '.join(get_args(Part))}, expected one, got "
            f"{part!r}."
        )
    if not 0 < contrast <= 1:
        raise GeometryError(f"Contrast is {contrast}, expected a share above 0 and at most 1.")
    discs = []
    for k, diameter in enumerate(np.linspace(7.0, 1.5, 10)):
        t = np.deg2rad(-90 + 36 * k)
        for radius in (13.0, 26.0, 39.0):
            x, y = radius * np.cos(t), radius * np.sin(t)
            discs.append([-contrast, x, y, diameter / 2, diameter / 2, 0])
    return Scene((tank, Ellipses.of(discs)))
