"""Random heads: a skull, a brain with folds, and lesions, in CT numbers or MR signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from inverse.errors import InputError
from phantoms.anatomy.builder import (
    AIR_HU,
    Anatomy,
    Builder,
    Float,
    Lesion,
    Organ,
    along,
    fits,
    generator,
    sphere,
    xyz,
)
from phantoms.shapes import rotation_matrix

__all__ = ["head"]


# Signal of each tissue: CT in HU; T1, T2 and proton density relative to the brightest.
_HEAD_TISSUES: dict[str, dict[str, float]] = {
    "ct": {
        "air": AIR_HU, "skin": 20, "fat": -90, "muscle": 50, "cortex": 1350, "diploe": 550,
        "csf": 8, "grey": 39, "white": 28, "eye": 12, "lens": 85, "dura": 65, "vessel": 50,
        "bleed": 72, "oedema": 16, "tumour": 48,
    },
    "t1": {
        "air": 0, "skin": 0.45, "fat": 1.0, "muscle": 0.42, "cortex": 0.04, "diploe": 0.55,
        "csf": 0.14, "grey": 0.5, "white": 0.74, "eye": 0.16, "lens": 0.4, "dura": 0.3,
        "vessel": 0.1, "bleed": 0.85, "oedema": 0.42, "tumour": 0.36,
    },
    "t2": {
        "air": 0, "skin": 0.3, "fat": 0.6, "muscle": 0.2, "cortex": 0.03, "diploe": 0.35,
        "csf": 1.0, "grey": 0.52, "white": 0.36, "eye": 0.97, "lens": 0.15, "dura": 0.15,
        "vessel": 0.05, "bleed": 0.12, "oedema": 0.75, "tumour": 0.7,
    },
    "pd": {
        "air": 0, "skin": 0.6, "fat": 0.9, "muscle": 0.7, "cortex": 0.06, "diploe": 0.5,
        "csf": 0.97, "grey": 0.86, "white": 0.72, "eye": 0.95, "lens": 0.6, "dura": 0.4,
        "vessel": 0.3, "bleed": 0.7, "oedema": 0.93, "tumour": 0.92,
    },
}  # fmt: skip


def head(
    seed: int,
    *,
    lesions: bool = True,
    contrast: Literal["ct", "t1", "t2", "pd"] | Mapping[str, float] = "ct",
) -> Anatomy:
    """Random head.

    Sections at |z| <= 45 mm cross the brain; orbits and sinuses lie about z = -45.

    Args:
        seed: the same seed gives the same head in every contrast; `lesions` leaves the rest of
            it unchanged.
        lesions: plant bleeds, oedemas and tumours in the white matter.
        contrast: "ct" in HU above air; "t1", "t2" or "pd" in relative signal, 0 in air; or the
            signal of each tissue, as :func:`phantoms.tissue.signals` computes it for a sequence.

    Returns:
        Ellipsoids and the lesions' list.

    Raises:
        InputError: another contrast, or a tissue without signal.
    """
    tissues = tuple(_HEAD_TISSUES["ct"])
    if isinstance(contrast, str) and contrast not in _HEAD_TISSUES:
        raise InputError(
            f"Head contrast is {contrast!r}, expected one of {', '.join(_HEAD_TISSUES)}."
        )
    given = _HEAD_TISSUES[contrast] if isinstance(contrast, str) else contrast
    if missing := [name for name in tissues if name not in given]:
        raise InputError(f"Head contrast lacks the signal of {', '.join(missing)}, expected all.")
    rng = generator(seed, 3)
    u = rng.uniform
    table = {name: given[name] for name in tissues}
    spread = {name: rng.normal(0, 1) for name in table}
    # Tissues vary by 4 % of their signal; in CT by 2 HU, bone by 10 %.
    tissue = {
        name: value
        + spread[name]
        * (
            0.1 * value
            if value > 500
            else 0
            if name == "air"
            else 2.0
            if contrast == "ct"
            else 0.04 * value
        )
        for name, value in table.items()
    }
    mottle = 1.0 if contrast == "ct" else 1 / 120  # MR signal of one HU of mottle
    b = Builder(tissue["air"])

    ax, ay, az = u(62, 70), u(76, 88), u(66, 76)
    bone_thick, scalp = u(5, 9), u(3, 8)
    bone_axes = np.array([ax, ay, az]) + bone_thick
    skin = b.organ(
        tissue["skin"],
        None,
        [0, 0, -35],
        [bone_axes[0] + scalp + 2, bone_axes[1] + scalp + 3, bone_axes[2] + scalp + 40],
    )
    fat = b.organ(tissue["fat"], skin, skin.centre, skin.axes - 2)
    flesh = b.organ(tissue["muscle"], fat, skin.centre, fat.axes - scalp * u(0.25, 0.5))
    outer = b.fitted(
        tissue["cortex"],
        flesh,
        [],
        [0, u(0, 2), 0],
        bone_axes,
        span=200,
        margin=0.3,
        shrink=(0.99, 0.99, 0.99),
    )
    assert outer is not None, "the skull fits into the soft tissue around it"
    table_mm = bone_thick * u(0.22, 0.34)
    diploe = b.organ(tissue["diploe"], outer, outer.centre, outer.axes - table_mm)
    inner = b.organ(
        tissue["cortex"], diploe, outer.centre, diploe.axes - (bone_thick - 2 * table_mm)
    )
    csf = b.organ(tissue["csf"], inner, outer.centre, inner.axes - table_mm)
    grey = b.organ(tissue["grey"], csf, csf.centre, csf.axes - u(1.5, 4))
    gx, gy, gz = grey.axes

    inside_grey: list[Organ] = []
    white: list[tuple[Organ, list[Organ]]] = []  # hemispheres, with what lies in each

    def brain(
        name: str,
        inside: Organ,
        siblings: list[Organ],
        centre: Sequence[float] | Float,
        axes: Sequence[float] | Float,
        rotation: Float | None = None,
        margin: float = 0.4,
    ) -> Organ | None:
        made = b.fitted(tissue[name], inside, siblings, centre, axes, rotation, 200, margin)
        if made is not None:
            siblings.append(made)
        return made

    brain("dura", grey, inside_grey, [0, 0, gz * 0.5], [0.7, gy * 0.8, gz * 0.42])
    brain("csf", grey, inside_grey, [0, -gy * 0.05, -2], [u(1.5, 4), u(10, 15), u(9, 13)])
    for side in (-1, 1):
        # Brain and ventricles mirror each other but for small differences.
        hemisphere = brain(
            "white",
            grey,
            inside_grey,
            [side * gx * u(0.43, 0.46), u(-3, 3), gz * u(0.12, 0.18)],
            [gx * u(0.33, 0.37), gy * u(0.72, 0.78), gz * u(0.58, 0.66)],
            rotation_matrix(side * u(0.0, 0.08)),
            0.3,
        )
        if hemisphere is None:
            continue
        deep: list[Organ] = []
        white.append((hemisphere, deep))
        at, size = hemisphere.centre, hemisphere.axes
        widen = u(0.8, 1.7)
        for part, place, half, angle in (
            ("csf", (-0.62, -0.42, 0.12), (3.6 * widen, 13, 7), -side * u(0.2, 0.45)),
            ("csf", (-0.5, 0.36, 0.1), (4.2 * widen, 15, 7), side * u(0.2, 0.45)),
            ("grey", (-0.25, -0.36, 0.02), (4.5, 10, 9), -side * 0.35),
            ("grey", (-0.55, 0.02, -0.12), (7, 12, 9), side * 0.4),
            ("grey", (0.22, -0.08, -0.08), (5.5, 16, 11), side * 0.15),
            ("csf", (0.66, -0.05, -0.1), (1.2, 15, 9), side * 0.1),
        ):
            spot = np.array([side * place[0] * size[0], place[1] * size[1], place[2] * size[2]])
            brain(
                part,
                hemisphere,
                deep,
                at + spot,
                np.array(half) * u(0.85, 1.15),
                rotation_matrix(angle),
            )
    for side in (-1, 1):
        brain(
            "white",
            grey,
            inside_grey,
            [side * u(17, 21), gy * 0.5, -gz * 0.58],
            [u(11, 15), u(13, 18), u(8, 11)],
        )
    brain("csf", grey, inside_grey, [0, gy * 0.36, -gz * 0.5], [u(4, 7), u(3, 5), u(6, 9)])
    brain("white", grey, inside_grey, [0, gy * 0.1, -gz * 0.62], [u(10, 12), u(9, 11), 16])

    # Folds: sulci of fluid and gyral cores of white matter, radial in the cortex.
    points = sphere(360)
    points = points[rng.permutation(points.shape[0])]
    for k, direction in enumerate(points + rng.normal(0, 0.03, points.shape)):
        sulcus = k % 2 == 0
        radial = direction / np.linalg.norm(direction)
        normal = radial / grey.axes
        depth = u(5, 11) if sulcus else u(3, 6)
        centre = grey.centre + radial * (grey.axes - depth - (0.8 if sulcus else 4.0))
        frame = along(normal[None])[0] @ rotation_matrix(0, 0, u(0, np.pi))
        fold = [depth, u(0.5, 1.4) if sulcus else u(1.2, 2.4), u(6, 12)]
        brain("csf" if sulcus else "white", grey, inside_grey, centre, fold, frame, 0.2)

    face: list[Organ] = [outer]
    for side in (-1, 1):
        eye = brain(
            "eye", flesh, face, [side * u(29, 32), -ay * u(0.84, 0.88), -58], [u(11.2, 12.2)] * 3
        )
        if eye is not None:
            b.organ(
                tissue["lens"],
                eye,
                eye.centre - [0, eye.axes[1] * 0.62, 0],
                eye.axes * [0.38, 0.18, 0.38],
            )
        for cell, bulk in (
            ((side * u(6, 9), -ay + 4, -48 + u(-4, 4)), (5, 8, u(8, 16))),
            ((side * u(26, 32), -ay + 14, -88), (u(11, 16), u(12, 17), 14)),
            ((side * 6, -ay + 20, -84), (3, 20, 12)),
        ):
            wall = brain("cortex", flesh, face, np.array(cell), np.array(bulk), margin=1.0)
            if wall is not None:
                b.organ(tissue["air"], wall, wall.centre, np.maximum(wall.axes - 1.1, 0.5))

    # Mottle, inside the brain.
    n = 500
    at = rng.normal(size=(n, 3))
    at *= (0.92 * rng.random(n) ** (1 / 3) / np.linalg.norm(at, axis=1))[:, None]
    axes = np.exp(u(np.log(1.2), np.log(9), (n, 1))) * u(0.6, 1.4, (n, 3))
    good = grey.reach(grey.centre + at * (grey.axes - 1), -axes.max()) < 1
    b.add(
        (rng.normal(0, 1.6, n) * mottle)[good],
        (grey.centre + at * (grey.axes - 1))[good],
        axes[good],
        rotation_matrix(u(0, np.pi, n), u(-1, 1, n))[good],
    )

    planted: list[Lesion] = []
    if lesions:
        own = generator(seed, 4)
        wanted = int(own.integers(2, 7))
        for _ in range(300):
            if len(planted) == wanted or not white:
                break
            name = ("bleed", "oedema", "tumour")[int(own.integers(3))]
            radius = float(own.uniform(2.5, 11))
            holder, deep = white[int(own.integers(len(white)))]
            way = own.normal(size=3)
            way *= own.uniform(0.0, 1.0) / np.linalg.norm(way)
            centre = holder.centre + holder.rotation @ (way * (holder.axes - radius))
            # values add up, so a ball replaces one tissue only: where it lies in white matter
            ball = Organ(tissue[name], centre, np.full(3, radius))
            if abs(centre[2]) > 45 or not fits(ball, holder, deep, 200, 0.5):
                continue
            deep.append(ball)
            step = (tissue[name] - tissue["white"]) * float(own.uniform(0.6, 1.0))
            b.add(step, centre, np.full(3, radius), np.eye(3))
            planted.append(Lesion(name, xyz(centre), radius, step))

    turn = rotation_matrix(rng.normal(0, 0.08), rng.normal(0, 0.03), rng.normal(0, 0.06))
    shift = np.array([rng.normal(0, 4), rng.normal(0, 4), 0.0])
    return b.build(planted, turn, shift, None)
