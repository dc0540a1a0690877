"""Random abdomens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phantoms.anatomy.builder import Anatomy, Builder, Float, Lesion, Organ, fits, generator, xyz
from phantoms.anatomy.thoracic import soft_texture, spine, table
from phantoms.shapes import rotation_matrix

__all__ = ["abdomen"]


def abdomen(seed: int, *, lesions: bool = True) -> Anatomy:
    """Random abdominal CT, in HU above air.

    Sections at |z| <= 60 mm cross liver, spleen and kidneys; the body reaches over |z| <= 150 mm.

    Args:
        seed: the same seed gives the same abdomen; `lesions` leaves the rest of it unchanged.
        lesions: plant metastases in the liver and cysts in the kidneys.

    Returns:
        Ellipsoids and the lesions' list.
    """
    rng = generator(seed, 5)
    u = rng.uniform
    b = Builder()
    contrast_agent = rng.random() < 0.6
    bone = u(0.75, 1.25)

    ax = u(105, 132)
    ay = ax * u(0.62, 0.76)
    fat = np.exp(u(np.log(6), np.log(35)))
    wall_side, front, back = u(14, 22), u(12, 18), u(40, 52)
    skin = u(1.5, 2.6)
    muscle_y = (back - front) / 2
    muscle_axes = np.array([ax + wall_side, ay + (front + back) / 2, 900.0])
    fat_axes = muscle_axes + np.array([fat, 0.75 * fat, 100])
    body = b.organ(u(0, 50), None, [0, muscle_y, 0], fat_axes + np.array([skin, skin, 50]))
    fat_layer = b.organ(u(-118, -92), body, [0, muscle_y, 0], fat_axes)
    muscle = b.organ(u(40, 62), fat_layer, [0, muscle_y, 0], muscle_axes)
    cavity = b.organ(u(-112, -92), muscle, [0, 0, 0], [ax, ay, 700])

    placed = spine(b, rng, bone, muscle, cavity)
    column = placed[0]

    def put(
        hu: float,
        centre: Sequence[float],
        axes: Sequence[float],
        turn: Float | None = None,
        margin: float = 0.8,
        shrink: tuple[float, float, float] = (0.94, 0.94, 0.97),
    ) -> Organ | None:
        made = b.fitted(hu, cavity, placed, centre, axes, turn, 130, margin, shrink)
        if made is not None:
            placed.append(made)
        return made

    front_of_spine = column.centre[1] - column.axes[1]
    artery = u(140, 280) if contrast_agent else u(34, 50)
    vein = artery * u(0.7, 0.95) if contrast_agent else u(34, 48)
    put(artery, [u(6, 14), front_of_spine - 12, 0], [r := u(8.5, 11), r, 300])
    put(vein, [-u(12, 18), front_of_spine - 11, 0], [u(9, 12), u(7, 11), 300])
    for side in (-1, 1):
        put(
            u(50, 64),
            [side * u(32, 38), column.centre[1] - 4, -70],
            [u(13, 18), u(15, 20), 130],
            rotation_matrix(0, side * u(0.0, 0.1)),
        )

    # Liver on the patient's right; it comes first, what follows makes room.
    liver = put(
        u(95, 125) if contrast_agent else u(48, 66),
        [-ax * u(0.42, 0.46), -ay * u(0.14, 0.2), u(40, 60)],
        [ax * u(0.5, 0.54), ay * u(0.6, 0.66), u(95, 120)],
        rotation_matrix(u(0.15, 0.4), u(0.0, 0.15)),
        shrink=(0.98, 0.975, 0.98),
    )
    vessels: list[Organ] = []
    if liver is not None:
        blood = liver.hu + (u(20, 50) if contrast_agent else u(-14, -4))
        for _ in range(60):
            way = rng.normal(size=3)
            way *= u(0.1, 0.85) / np.linalg.norm(way)
            branch = b.fitted(
                blood,
                liver,
                vessels,
                liver.centre + liver.rotation @ (way * liver.axes),
                [u(6, 22), r := u(1.2, 4.2), r],
                rotation_matrix(u(0, np.pi), u(-0.8, 0.8)),
                150,
            )
            if branch is not None:
                vessels.append(branch)
        if rng.random() < 0.8:
            gall = liver.centre + liver.rotation @ (np.array([0.45, -0.4, -0.55]) * liver.axes)
            b.fitted(u(0, 18), liver, vessels, gall, [u(9, 14), u(8, 12), u(14, 24)], span=150)
    # Kidneys: cortex, and a pelvis of water or fat inside.
    parenchyma = u(120, 190) if contrast_agent else u(28, 36)
    kidneys: list[tuple[Organ, list[Organ]]] = []
    for side in (-1, 1):
        kidney = put(
            parenchyma,
            [side * u(54, 62), ay * u(0.44, 0.52), u(-40, -10)],
            [u(23, 28), u(25, 30), u(50, 58)],
            rotation_matrix(side * u(-0.5, -0.2), side * u(0.05, 0.2)),
        )
        if kidney is not None:
            pelvis = b.organ(
                u(-40, 15),
                kidney,
                kidney.centre - [side * kidney.axes[0] * 0.35, 0, 0],
                kidney.axes * [0.4, 0.32, 0.55],
                kidney.rotation,
            )
            kidneys.append((kidney, [pelvis]))

    # Spleen and stomach on the left, the pancreas before the spine.
    put(
        u(105, 140) if contrast_agent else u(42, 56),
        [ax * u(0.66, 0.72), ay * u(0.2, 0.34), u(35, 60)],
        [u(20, 28), u(32, 42), u(42, 55)],
        rotation_matrix(u(-0.5, -0.2)),
    )
    stomach = put(
        u(35, 60),
        [ax * u(0.36, 0.46), -ay * u(0.42, 0.5), u(25, 55)],
        [u(38, 50), u(24, 34), u(45, 60)],
        rotation_matrix(u(-0.4, 0.2)),
    )
    if stomach is not None:
        filling = b.organ(
            u(0, 40), stomach, stomach.centre, stomach.axes - u(3, 6), stomach.rotation
        )
        b.fitted(
            u(-990, -900),
            filling,
            [],
            filling.centre - [0, 0.45 * filling.axes[1], 0],
            filling.axes * [0.6, 0.4, 0.6],
            filling.rotation,
            150,
        )
    put(
        u(85, 115) if contrast_agent else u(34, 48),
        [u(-5, 20), front_of_spine - u(32, 40), u(5, 25)],
        [u(40, 55), u(8, 11), u(10, 15)],
        rotation_matrix(u(-0.35, -0.1), u(-0.3, 0.0)),
    )

    # Bowel: loops of a wall around content, fluid, stool or gas.
    for _ in range(70):
        radius = u(8, 19)
        loop = put(
            u(25, 90) if contrast_agent else u(25, 45),
            [u(-0.85, 0.85) * ax, u(-0.85, 0.5) * ay, u(-130, 60)],
            [radius * u(1.2, 3.0), radius, radius * u(0.9, 1.4)],
            rotation_matrix(u(0, np.pi), u(-0.4, 0.4)),
            0.5,
        )
        if loop is not None and loop.axes.min() > 4:
            content = u(-950, -700) if rng.random() < 0.35 else u(0, 45)
            b.organ(content, loop, loop.centre, loop.axes - u(1.5, 2.5), loop.rotation)
    # Vessels and nodes in the mesentery.
    for _ in range(60):
        put(
            vein * u(0.8, 1.0),
            [u(-0.8, 0.8) * ax, u(-0.8, 0.4) * ay, u(-100, 60)],
            [u(3, 14), r := u(1.0, 2.6), r],
            rotation_matrix(u(0, np.pi), u(-0.8, 0.8)),
            0.3,
        )
    soft_texture(b, rng, body, fat_layer, muscle, cavity)

    planted: list[Lesion] = []
    if lesions:
        planted = _lesions(b, generator(seed, 6), liver, vessels, kidneys)
    turn = rotation_matrix(rng.normal(0, 0.05), rng.normal(0, 0.03), rng.normal(0, 0.03))
    shift = np.array([rng.normal(0, 6), rng.normal(0, 6) - muscle_y, 0.0])
    bottom = fat_axes[1] + skin + abs(shift[1] + muscle_y) + 14
    apart = table(rng, bottom) if rng.random() < 0.85 else None
    return b.build(planted, turn, shift, apart)


def _lesions(
    b: Builder,
    rng: np.random.Generator,
    liver: Organ | None,
    vessels: Sequence[Organ],
    kidneys: Sequence[tuple[Organ, list[Organ]]],
) -> list[Lesion]:
    """Balls clear of vessels and of each other: dark or bright in the liver, water in kidneys."""
    u = rng.uniform
    found: list[Lesion] = []

    def plant(site: str, organ: Organ, clear: list[Organ], radius: float, hu: float) -> None:
        way = rng.normal(size=3)
        way *= u(0.1, 0.9) / np.linalg.norm(way)
        ball = Organ(hu, organ.centre + organ.rotation @ (way * organ.axes), np.full(3, radius))
        if abs(ball.centre[2]) < 75 and fits(ball, organ, clear, 150, 1.0):
            b.add(hu - organ.hu, ball.centre, ball.axes, ball.rotation)
            clear.append(ball)
            found.append(Lesion(site, xyz(ball.centre), radius, float(hu - organ.hu)))

    if liver is not None:
        clear, wanted = list(vessels), int(rng.integers(3, 9))
        for _ in range(300):
            if len(found) < wanted:
                radius = float(np.exp(u(np.log(2.5), np.log(14.0))))
                contrast = -u(15, 60) if rng.random() < 0.8 else u(15, 40)
                plant("liver", liver, clear, radius, liver.hu + contrast)
    for kidney, inner in kidneys:
        clear = list(inner)
        for _ in range(int(rng.integers(0, 12))):
            plant("kidney", kidney, clear, float(u(2.5, 8.0)), float(u(0, 12)))
    return found
