"""Random chests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from phantoms.anatomy.builder import (
    Anatomy,
    Builder,
    Float,
    Lesion,
    Organ,
    along,
    fits,
    generator,
    xyz,
)
from phantoms.shapes import Ellipsoids, rotation_matrix

__all__ = ["soft_texture", "spine", "table", "thorax"]


def thorax(seed: int, *, lesions: bool = True) -> Anatomy:
    """Random chest CT, in HU above air.

    Sections at |z| <= 60 mm always cross both lungs; the body reaches over |z| <= 150 mm.

    Args:
        seed: the same seed gives the same chest; `lesions` leaves the rest of it unchanged.
        lesions: plant pulmonary nodules and soft-tissue lesions of low contrast.

    Returns:
        Ellipsoids and the lesions' list.
    """
    rng = generator(seed, 1)
    u = rng.uniform
    b = Builder()
    contrast_agent = rng.random() < 0.45
    bone = u(0.75, 1.25)  # mineral density relative to the average

    # Trunk: skin, fat, muscle, thoracic cavity; nearly cylinders.
    ax = u(108, 136)
    ay = ax * u(0.64, 0.78)
    lateral, front, back = u(18, 28), u(17, 26), u(40, 50)
    fat = np.exp(u(np.log(4), np.log(30)))
    fat_front, fat_back = fat * u(0.5, 1.3), fat * u(0.4, 0.9)
    skin = u(1.5, 2.6)
    muscle_axes = np.array([ax + lateral, ay + (front + back) / 2, 900.0])
    muscle_y = (back - front) / 2
    fat_axes = muscle_axes + np.array([fat, (fat_front + fat_back) / 2, 100])
    fat_y = muscle_y + (fat_back - fat_front) / 2
    body = b.organ(u(0, 50), None, [0, fat_y, 0], fat_axes + np.array([skin, skin, 50]))
    fat_layer = b.organ(u(-118, -88), body, [0, fat_y, 0], fat_axes)
    muscle = b.organ(u(38, 66), fat_layer, [0, muscle_y, 0], muscle_axes)
    cavity = b.organ(u(-895, -790), muscle, [0, 0, u(-10, 30)], [ax, ay, u(500, 700)])

    in_cavity = spine(b, rng, bone, muscle, cavity)
    column = in_cavity[0]
    _ribs(b, rng, bone, muscle, cavity)
    _shoulder(b, rng, bone, muscle, cavity)

    # Mediastinum: one leaning ellipsoid of fat between sternum and spine.
    depth = ay + column.centre[1] - column.axes[1]
    tilt = rotation_matrix(0.0, u(-0.16, -0.02), -u(0.02, 0.08))
    mediastinum = b.fitted(
        u(-110, -20),
        cavity,
        [column],
        [u(6, 20), -ay + depth / 2, u(-70, -45)],
        [ax * u(0.42, 0.56), depth / 2, u(185, 240)],
        tilt,
        margin=0.5,
        shrink=(0.995, 0.97, 0.99),
    )
    assert mediastinum is not None, "a mediastinum shrunk sixteenfold always fits"
    in_cavity.append(mediastinum)
    _mediastinal_organs(b, rng, contrast_agent, mediastinum)
    in_cavity += _neighbours(b, rng, contrast_agent, cavity, in_cavity)

    vessel_points = _vessels(b, rng, contrast_agent, cavity, mediastinum, in_cavity)
    _lung_texture(b, rng, cavity, in_cavity)
    soft_texture(b, rng, body, fat_layer, muscle, cavity)

    planted: list[Lesion] = []
    if lesions:
        planted = _chest_lesions(b, generator(seed, 2), cavity, in_cavity, muscle, vessel_points)

    turn = rotation_matrix(rng.normal(0, 0.05), rng.normal(0, 0.03), rng.normal(0, 0.03))
    shift = np.array([rng.normal(0, 6), rng.normal(0, 6) - fat_y, 0.0])
    bottom = fat_axes[1] + skin + abs(shift[1] + fat_y) + 14
    apart = table(rng, bottom) if rng.random() < 0.85 else None
    arms = _arms(rng, fat_axes[0] + skin, fat) if rng.random() < 0.2 else None
    if arms is not None:
        apart = arms if apart is None else apart + arms
    return b.build(planted, turn, shift, apart)


def spine(
    b: Builder, rng: np.random.Generator, bone: float, muscle: Organ, cavity: Organ
) -> list[Organ]:
    """Vertebral bodies inside the cavity's back wall, arches behind it; the prevertebral block."""
    u = rng.uniform
    ay = cavity.axes[1]
    wide, deep = u(16, 20), u(13, 16)
    block = b.organ(
        u(10, 50),
        cavity,
        [0, ay - deep - 3.2, 0],
        [wide + u(4, 9), deep + 2.0, 900],
    )
    shell = b.organ(u(330, 560) * bone, block, [0, block.centre[1], 0], [wide, deep, 890])
    rim = u(1.2, 2.2)
    marrow = b.organ(u(110, 230) * bone, shell, shell.centre, [wide - rim, deep - rim, 880])
    pitch = u(24, 29)
    levels = np.arange(-7, 8) * pitch + u(-12, 12)
    n = levels.size
    at = np.tile(shell.centre, (n, 1))
    at[:, 2] = levels
    eye = np.eye(3)
    # End plates and discs alternate along the column.
    b.add(u(60, 200) * bone, at, np.array([wide - rim - 0.5, deep - rim - 0.5, u(2, 3.5)]), eye)
    at = at + np.array([0, 0, pitch / 2])
    b.add(80 - marrow.hu, at, np.array([wide - rim - 0.4, deep - rim - 0.4, u(2.5, 4)]), eye)
    spots = 90
    unit = rng.normal(size=(spots, 3))
    unit *= (rng.random(spots) ** (1 / 3) / np.linalg.norm(unit, axis=1))[:, None]
    b.add(
        rng.normal(0, 60, spots) * bone,
        shell.centre + unit * [(wide - 6), (deep - 6), 170],
        u(0.8, 3.5, (spots, 3)),
        eye,
    )

    # Arch: ring of bone with the canal and the cord.
    ring_x, ring_y = u(13.5, 16.5), u(10.5, 12.5)
    y = ay + 1.0 + ring_y
    arch = b.organ(u(380, 600) * bone, muscle, [0, y, 0], [ring_x, ring_y, 880])
    canal = b.organ(
        u(0, 30), arch, [0, y - 0.6, 0], [ring_x - u(3.5, 5), ring_y - u(2.6, 3.4), 870]
    )
    b.organ(canal.hu + u(5, 25), canal, canal.centre, [u(4.5, 6), u(3.6, 4.6), 860])
    at = np.zeros((n, 3))
    at[:, 1] = y + ring_y + u(8, 11)
    at[:, 2] = levels
    length = u(7, 9.5)
    b.add(u(320, 480) * bone, at, np.array([u(2.2, 3.6), length, u(7, 10)]), eye)
    b.add(-120 * bone, at, np.array([1.2, length - 2.5, 5.5]), eye)
    for side in (-1, 1):
        angle = side * u(0.3, 0.6)
        at = np.zeros((n, 3))
        at[:, 0] = side * (ring_x + u(11, 13) * np.cos(angle) - 2)
        at[:, 1] = y + abs(u(11, 13) * np.sin(angle)) + 1.5
        at[:, 2] = levels
        turn = rotation_matrix(angle)
        b.add(u(320, 500) * bone, at, np.array([u(9, 12), u(3.2, 4.5), u(5, 7)]), turn)
        b.add(-150 * bone, at, np.array([7.0, 2.0, 3.6]), turn)
    return [block]


def _ribs(b: Builder, rng: np.random.Generator, bone: float, muscle: Organ, cavity: Organ) -> None:
    """Chains of needles around the cavity that sink towards the front, ending in cartilage."""
    u = rng.uniform
    gap = u(7.0, 9.0)
    rx, ry = cavity.axes[0] + gap, cavity.axes[1] + gap
    fall = u(100, 150)
    pitch = u(24, 30)
    thick, tall = u(3.4, 4.6), u(5.5, 7.5)
    cortex, marrow = u(420, 700) * bone, u(120, 260) * bone
    cartilage = u(90, 150)
    segments = 15
    offset = u(-10, 10)
    for side in (-1, 1):
        for level in range(-5, 13):
            start = u(0.20, 0.26)
            t = np.linspace(start, np.pi - u(0.30, 0.42), segments + 1)  # from the back
            points = np.stack(
                [
                    side * rx * np.sin(t),
                    ry * np.cos(t),
                    offset + level * pitch + u(-3, 3) - fall * (t / np.pi) ** 1.2,
                ],
                axis=1,
            )
            middle = (points[1:] + points[:-1]) / 2
            step = np.diff(points, axis=0)
            half = np.linalg.norm(step, axis=1) / 2
            bony = np.arange(segments) < segments - rng.integers(2, 4)
            rotation = along(step)
            axes = np.stack(
                [half * 1.08, np.full(segments, thick), np.full(segments, tall)], axis=1
            )
            b.add(np.where(bony, cortex, cartilage) - muscle.hu, middle, axes, rotation)
            rim = np.array([0.12 * half.mean(), u(1.1, 1.6), u(1.3, 2.0)])
            b.add(
                (marrow - cortex),
                middle[bony],
                np.maximum(axes[bony] - rim, 0.6),
                rotation[bony],
            )


def _shoulder(
    b: Builder, rng: np.random.Generator, bone: float, muscle: Organ, cavity: Organ
) -> None:
    """Scapulae in the wall behind the ribs, and the sternum."""
    u = rng.uniform
    ax, ay = cavity.axes[0], cavity.axes[1]
    phi, outward = u(0.62, 0.9), u(19, 23)
    for side in (-1, 1):
        p = phi + u(-0.06, 0.06)
        centre = np.array(
            [side * (ax + outward) * np.cos(p), (ay + outward) * np.sin(p), u(35, 60)]
        )
        tangent = np.array([[-side * (ax + outward) * np.sin(p), (ay + outward) * np.cos(p), 0]])
        rotation = along(tangent)[0] @ rotation_matrix(u(-0.1, 0.1), 0, u(-0.1, 0.1))
        axes = np.array([u(26, 36), u(2.4, 3.4), u(60, 80)])
        blade = b.fitted(u(350, 560) * bone, muscle, [cavity], centre, axes, rotation, margin=11.0)
        if blade is not None:
            b.organ(
                u(100, 220) * bone,
                blade,
                blade.centre,
                np.maximum(blade.axes - [2.5, 1.1, 3], 0.6),
                blade.rotation,
            )
            outer = blade.centre + rotation[:, 1] * np.sign(rotation[:2, 1] @ blade.centre[:2]) * (
                blade.axes[1] + 8.5
            )
            b.fitted(
                u(300, 480) * bone,
                muscle,
                [blade],
                outer + np.array([0, 0, 25]),
                [u(10, 14), u(2.5, 4), u(18, 30)],
                rotation @ rotation_matrix(u(0.7, 1.3)),
                margin=0.6,
            )
    thick = u(4.4, 6)
    sternum = b.fitted(
        u(240, 420) * bone,
        muscle,
        [cavity],
        [u(-2, 2), -ay - thick - 2.5, u(10, 40)],
        [u(14, 20), thick, u(80, 110)],
        rotation_matrix(0, 0, u(-0.02, 0.03)),
    )
    if sternum is not None:
        b.organ(
            u(60, 160) * bone,
            sternum,
            sternum.centre,
            sternum.axes - [1.8, 1.4, 4],
            sternum.rotation,
        )


def _mediastinal_organs(
    b: Builder, rng: np.random.Generator, contrast_agent: bool, mediastinum: Organ
) -> None:
    """Heart with chambers below, great vessels, airways and oesophagus above."""
    u = rng.uniform
    lean = mediastinum.rotation
    blood_left = u(150, 330) if contrast_agent else u(32, 52)
    blood_right = blood_left + (u(-60, 90) if contrast_agent else 0.0)
    wall = u(40, 110) if contrast_agent else u(40, 60)
    organs: list[Organ] = []

    def spot(z: float, fx: float, fy: float) -> Float:
        x, y, hx, hy = mediastinum.section(z)
        return np.array([x + fx * hx, y + fy * hy, z])

    def put(
        hu: float, z: float, fx: float, fy: float, axes: Sequence[float], turn: Float = lean
    ) -> Organ | None:
        made = b.fitted(hu, mediastinum, organs, spot(z, fx, fy), axes, turn, 150, 0.8)
        if made is not None:
            organs.append(made)
        return made

    # Heart.
    z = u(-65, -45)
    _, _, hx, hy = mediastinum.section(z)
    heart = put(
        wall,
        z,
        u(-0.05, 0.1),
        u(-0.2, -0.1),
        [hx * u(0.82, 0.9), hy * u(0.72, 0.8), u(52, 64)],
        lean @ rotation_matrix(u(-0.5, 0.1)),
    )
    if heart is not None:
        rooms: list[Organ] = []
        a = heart.axes
        for blood, at, size, angle in (
            (blood_left, (0.44, 0.1, -0.05), (0.40, 0.56, 0.75), u(-0.7, -0.2)),
            (blood_right, (-0.06, -0.58, -0.1), (0.5, 0.34, 0.72), u(-0.4, 0.0)),
            (blood_right, (-0.58, 0.06, 0.0), (0.34, 0.46, 0.7), u(-0.2, 0.3)),
            (blood_left, (-0.1, 0.64, 0.25), (0.5, 0.3, 0.65), u(-0.2, 0.2)),
        ):
            room = b.fitted(
                blood + u(-6, 6),
                heart,
                rooms,
                heart.centre + heart.rotation @ (np.array(at) * a),
                np.array(size) * a * u(0.85, 1.1),
                heart.rotation @ rotation_matrix(angle),
                150,
                1.0,
            )
            if room is not None:
                rooms.append(room)

    # Airways: the trachea above, two bronchi at its fork.
    carina = u(5, 25)
    radius = u(7.5, 10.5)
    airway: list[Organ | None] = [
        put(u(20, 50), carina + 62, 0.0, u(0.42, 0.52), [radius + 2, radius + 1.5, 64])
    ]
    for side in (-1, 1):
        _, _, hx, _ = mediastinum.section(carina - 8)
        tube = radius * u(0.62, 0.78)
        airway.append(
            put(
                u(10, 45),
                carina - 8,
                side * 0.48,
                u(0.45, 0.58),
                [hx * 0.42, tube + 1.6, tube + 1.6],
                rotation_matrix(0.0, side * u(0.35, 0.6)),
            )
        )
    for tube_wall in airway:
        if tube_wall is not None:
            b.organ(
                u(-1000, -980),
                tube_wall,
                tube_wall.centre,
                np.maximum(tube_wall.axes - 1.6, 0.8),
                tube_wall.rotation,
            )

    put(
        blood_left,
        u(74, 84),
        u(0.1, 0.25),
        0.0,
        [u(11, 14), u(26, 36), u(10, 13)],
        rotation_matrix(u(-0.5, -0.1)),
    )
    put(blood_left, u(36, 44), u(-0.26, -0.16), u(-0.32, -0.2), [r := u(13, 18), r, u(30, 38)])
    put(
        blood_right,
        u(26, 34),
        u(0.34, 0.44),
        u(-0.34, -0.2),
        [r := u(11, 14.5), r * 1.15, u(18, 24)],
    )
    put(blood_right, 50, u(-0.66, -0.58), u(-0.12, 0.05), [u(7.5, 10), u(8.5, 11), u(45, 60)])
    for side in (-1, 1):
        put(
            blood_right,
            u(0, 16),
            side * u(0.4, 0.5),
            u(0.12, 0.24),
            [u(12, 20), u(6, 9), u(6, 9)],
            rotation_matrix(side * u(0.2, 0.5)),
        )

    gullet = put(u(25, 50), u(-10, 10), u(0.0, 0.15), u(0.74, 0.8), [u(6, 9), u(4.5, 6.5), 130])
    if gullet is not None and rng.random() < 0.6:
        b.organ(u(-950, -300), gullet, gullet.centre, gullet.axes * [0.35, 0.35, 0.9], lean)
    # Nodes, thymus and small vessels in the fat.
    for _ in range(60):
        put(
            u(10, 70),
            u(-90, 120),
            u(-0.8, 0.8),
            u(-0.9, 0.9),
            u(1.5, 6, 3).tolist(),
            rotation_matrix(u(0, np.pi), u(-0.5, 0.5)),
        )


def _neighbours(
    b: Builder,
    rng: np.random.Generator,
    contrast_agent: bool,
    cavity: Organ,
    placed: Sequence[Organ],
) -> list[Organ]:
    """What else bulges into the lungs: descending aorta, anterior junction, diaphragm domes."""
    u = rng.uniform
    spine, mediastinum = placed[0], placed[1]
    made: list[Organ] = []
    radius = u(10, 14.5)
    blood = u(150, 320) if contrast_agent else u(34, 50)
    for lean in np.linspace(0.15, 1.4, 14):
        at = spine.centre + np.array(
            [
                (spine.axes[0] + radius + 0.8) * np.cos(lean),
                -(spine.axes[1] + radius + 0.8) * np.sin(lean),
                -55,
            ]
        )
        trial = Organ(blood, at, np.array([radius, radius, 150.0]))
        if fits(trial, cavity, [*placed], 120, 0.3):
            aorta = b.organ(blood, cavity, at, trial.axes)
            made.append(aorta)
            if rng.random() < 0.5:  # calcified wall
                for angle in u(0, 2 * np.pi, rng.integers(1, 8)):
                    spot = [
                        0.82 * radius * np.cos(angle),
                        0.82 * radius * np.sin(angle),
                        u(-70, 90),
                    ]
                    b.organ(
                        u(250, 700),
                        aorta,
                        at + spot,
                        [u(1, 2.5), 1.0, u(1, 5)],
                        rotation_matrix(angle + np.pi / 2),
                    )
            break
    _, y, _, hy = mediastinum.section(70)
    front = y - hy
    half = (front + cavity.axes[1]) / 2
    if half > 3:
        junction = b.fitted(
            u(-80, 20),
            cavity,
            [*placed, *made],
            [u(-6, 8), front - half, 75],
            [u(4, 11), half * 0.96, u(55, 80)],
            margin=0.2,
        )
        if junction is not None:
            made.append(junction)

    top = u(-85, -45)
    agent = u(40, 90) if contrast_agent else 0.0
    for side, hu, height in (
        (-1, u(48, 66) + agent, top),
        (1, u(-110, 60), top - u(5, 25)),
    ):
        semi_z = u(90, 130)
        dome = b.fitted(
            hu,
            cavity,
            [*placed, *made],
            [side * cavity.axes[0] * u(0.56, 0.62), u(-12, 10), height - semi_z],
            [cavity.axes[0] * u(0.36, 0.42), cavity.axes[1] * u(0.66, 0.8), semi_z],
            rotation_matrix(side * u(-0.3, 0.3)),
        )
        if dome is not None:
            made.append(dome)
            inner: list[Organ] = []
            for _ in range(30):
                unit = rng.normal(size=3)
                unit *= 0.8 / np.linalg.norm(unit)
                vein = b.fitted(
                    dome.hu + (u(-40, 60) if contrast_agent else u(-14, 8)),
                    dome,
                    inner,
                    dome.centre + unit * dome.axes,
                    [u(6, 18), u(1.5, 4), u(1.5, 4)],
                    rotation_matrix(u(0, np.pi), u(-1, 1)),
                )
                if vein is not None:
                    inner.append(vein)
    return made


def _in_lung(
    points: Float, cavity: Organ, placed: Sequence[Organ], margin: ArrayLike
) -> NDArray[np.bool_]:
    """Whether points lie in the cavity and outside all that fills it, `margin` mm from each."""
    m = np.broadcast_to(np.asarray(margin, np.float64), points.shape[:1])
    # Margins differ between points; the shortest semi-axis turns mm into relative reach.
    good = cavity.reach(points) < 1 - m / cavity.axes[:2].min()
    for other in placed:
        good &= other.reach(points) > 1 + m / other.axes.min()
    return np.asarray(good & (np.abs(points[:, 2]) < 155))


def _vessels(
    b: Builder,
    rng: np.random.Generator,
    contrast_agent: bool,
    cavity: Organ,
    mediastinum: Organ,
    placed: Sequence[Organ],
) -> tuple[Float, Float]:
    """Pulmonary trees from both hila; returns points on them and the radius at each."""
    u = rng.uniform
    blood = u(100, 260) if contrast_agent else u(20, 60)
    roots, courses = [], []
    for side in (-1, 1):
        for _ in range(rng.integers(16, 24)):
            z = u(-85, 85)
            x, y, hx, hy = mediastinum.section(z)
            t = u(-0.15, 0.55)
            point = np.array([x + side * hx * np.sqrt(1 - t * t) + side * 7.5, y + t * hy, z])
            roots.append(point)
            courses.append([side, rng.normal(0.1, 0.6), rng.normal(np.sign(z) * 0.3, 0.5)])
    start = np.array(roots)
    course = np.array(courses)
    course /= np.linalg.norm(course, axis=1, keepdims=True)
    radius = u(2.2, 4.8, len(roots))
    grid = np.linspace(-1, 1, 9)
    known = np.zeros((0, 3))
    known_radius = np.zeros(0)
    total = 0
    for depth in range(11):
        if start.shape[0] == 0 or total > 5000:
            break
        children = 1 if depth == 0 else 3
        n = start.shape[0] * children
        parent_radius = np.repeat(radius, children)
        share = u(0.6, 0.9, n) if depth else np.ones(n)
        r = np.maximum(parent_radius * share, 0.5)
        spread = u(0.25, 0.75, n)
        axis = rng.normal(size=(n, 3))
        old = np.repeat(course, children, axis=0)
        axis -= np.sum(axis * old, axis=1, keepdims=True) * old
        axis /= np.linalg.norm(axis, axis=1, keepdims=True)
        # Siblings part: equal angles about the parent's course.
        turned = 2 * np.pi / children * np.tile(np.arange(children), n // children)[:, None]
        axis = np.repeat(axis[::children], children, axis=0)
        axis = np.cos(turned) * axis + np.sin(turned) * np.cross(old, axis)
        new = np.cos(spread)[:, None] * old + np.sin(spread)[:, None] * axis if depth else old
        length = (4.0 + 3.4 * r) * u(0.8, 1.5, n)
        base = np.repeat(start, children, axis=0)
        middle = base + new * (length / 2)[:, None]
        samples = middle[:, None] + new[:, None] * (grid * length[:, None] / 2)[:, :, None]
        profile = r[:, None] * np.sqrt(1 - 0.98 * grid**2)
        good = (
            _in_lung(samples.reshape(-1, 3), cavity, placed, (profile + 0.8).reshape(-1))
            .reshape(n, -1)
            .all(axis=1)
        )
        if known.shape[0]:
            # The first third may touch the parent that it grows from.
            distance, index = cKDTree(known).query(samples[:, 3:].reshape(-1, 3))
            room = distance - known_radius[index] - profile[:, 3:].reshape(-1)
            good &= (room.reshape(n, -1) > 0).all(axis=1)
        keep = np.flatnonzero(good)
        # Siblings and cousins of one generation: the earlier one stays.
        if keep.size:
            flat = samples[keep, 3:].reshape(-1, 3)
            flat_r = profile[keep, 3:].reshape(-1)
            owner = np.repeat(np.arange(keep.size), samples.shape[1] - 3)
            pairs = cKDTree(flat).query_pairs(2 * r.max() + 0.5, output_type="ndarray")
            close = (
                np.linalg.norm(flat[pairs[:, 0]] - flat[pairs[:, 1]], axis=1)
                < flat_r[pairs[:, 0]] + flat_r[pairs[:, 1]]
            ) & (owner[pairs[:, 0]] != owner[pairs[:, 1]])
            lost = np.unique(np.max(owner[pairs[close]], axis=1, initial=-1))
            keep = np.delete(keep, lost[lost >= 0])
        axes = np.stack([length / 2, r, r], axis=1)[keep]
        b.add(blood - cavity.hu, middle[keep], axes, along(new[keep]))
        total += keep.size
        known = np.concatenate([known, samples[keep].reshape(-1, 3)])
        known_radius = np.concatenate([known_radius, profile[keep].reshape(-1)])
        start = base[keep] + new[keep] * length[keep, None] * 0.97
        course, radius = new[keep], r[keep]
    return known, known_radius


def _lung_texture(
    b: Builder, rng: np.random.Generator, cavity: Organ, placed: Sequence[Organ]
) -> None:
    """Faint density changes of the lung, its fissures, and in some chests disease."""
    u = rng.uniform
    n = 700
    at = u(-1, 1, (n, 3)) * [cavity.axes[0], cavity.axes[1], 140]
    axes = np.exp(u(np.log(1.2), np.log(14), (n, 1))) * u(0.6, 1.5, (n, 3))
    good = _in_lung(at, cavity, placed, axes.max(axis=1) + 1)
    value = rng.normal(0, u(12, 40), n)
    turn = rotation_matrix(u(0, np.pi, n), u(-1, 1, n))
    b.add(value[good], at[good], axes[good], turn[good])
    # Blood sinks: the back of the lungs is denser.
    for side in (-1, 1):
        for _ in range(3):
            b.fitted(
                cavity.hu + u(6, 20),
                cavity,
                placed,
                [side * cavity.axes[0] * u(0.55, 0.65), u(0.3, 0.5) * cavity.axes[1], 0],
                cavity.axes * [u(0.25, 0.36), u(0.3, 0.5), 0.4],
                rotation_matrix(side * u(-0.6, -0.1)),
            )
    if rng.random() < 0.35:
        for _ in range(rng.integers(1, 40)):
            centre = u(-1, 1, 3) * [cavity.axes[0], cavity.axes[1], 120]
            size = np.exp(u(np.log(3), np.log(16))) * u(0.6, 1.4, 3)
            b.fitted(
                cavity.hu + (u(80, 380) if rng.random() < 0.6 else -u(20, 80)),
                cavity,
                placed,
                centre,
                size,
                rotation_matrix(u(0, np.pi)),
            )
    for side in (-1, 1):
        for lean in (u(0.7, 1.0), u(-0.3, 0.2))[: 2 if side < 0 else 1]:
            b.fitted(
                cavity.hu + u(120, 300),
                cavity,
                placed,
                [side * cavity.axes[0] * 0.62, u(-10, 20), u(-25, 35)],
                [cavity.axes[0] * 0.32, 80, u(0.35, 0.6)],
                rotation_matrix(side * u(-0.2, 0.2), side * u(-0.15, 0.15), -lean),
            )


def soft_texture(
    b: Builder,
    rng: np.random.Generator,
    body: Organ,
    fat_layer: Organ,
    muscle: Organ,
    cavity: Organ,
) -> None:
    """Fat planes in muscle, septa in fat, and faint mottle throughout."""
    u = rng.uniform
    # Fat between muscles follows the wall.
    n = 260
    t = u(0, 2 * np.pi, n)
    depth = u(0.1, 0.95, n)
    inner = np.stack([(cavity.axes[0] + 13) * np.cos(t), (cavity.axes[1] + 13) * np.sin(t)], 1)
    outer = np.stack(
        [
            muscle.axes[0] * np.cos(t),
            muscle.centre[1] + muscle.axes[1] * np.sin(t),
        ],
        axis=1,
    )
    at = np.column_stack([inner + depth[:, None] * (outer - inner), u(-150, 150, n)])
    ahead = np.column_stack(
        [-muscle.axes[0] * np.sin(t), muscle.axes[1] * np.cos(t), u(-20, 20, n)]
    )
    axes = np.column_stack([u(4, 16, n), u(0.4, 1.6, n), u(6, 40, n)])
    turn = along(ahead) @ rotation_matrix(rng.normal(0, 0.25, n))
    ends = at[:, None] + turn[:, :, 0][:, None] * (axes[:, 0][:, None] * [-1, 1])[:, :, None]
    good = (
        (muscle.reach(ends.reshape(-1, 3), -2).reshape(n, 2) < 1)
        & (cavity.reach(ends.reshape(-1, 3), 13).reshape(n, 2) > 1)
    ).all(axis=1) & (np.abs(at[:, 0]) > 34)
    b.add((fat_layer.hu - muscle.hu) * u(0.3, 0.95, n)[good], at[good], axes[good], turn[good])

    n = 120
    t = u(0, 2 * np.pi, n)
    mid = (fat_layer.axes[:2] + muscle.axes[:2]) / 2
    centre_y = (fat_layer.centre[1] + muscle.centre[1]) / 2
    at = np.column_stack([mid[0] * np.cos(t), centre_y + mid[1] * np.sin(t), u(-150, 150, n)])
    ahead = np.column_stack([-mid[0] * np.sin(t), mid[1] * np.cos(t), u(-20, 20, n)])
    turn = along(ahead) @ rotation_matrix(rng.normal(0, 0.15, n))
    axes = np.column_stack([u(2, 14, n), u(0.3, 1.0, n), u(2, 25, n)])
    ends = at[:, None] + turn[:, :, 0][:, None] * (axes[:, 0][:, None] * [-1, 1])[:, :, None]
    good = (
        (fat_layer.reach(ends.reshape(-1, 3), -1).reshape(n, 2) < 1)
        & (muscle.reach(ends.reshape(-1, 3), 1).reshape(n, 2) > 1)
    ).all(axis=1)
    b.add(u(30, 130, n)[good], at[good], axes[good], turn[good])

    n = 600
    at = np.column_stack(
        [
            u(-1, 1, n) * body.axes[0],
            body.centre[1] + u(-1, 1, n) * body.axes[1],
            u(-150, 150, n),
        ]
    )
    axes = np.exp(u(np.log(1), np.log(9), (n, 1))) * u(0.6, 1.4, (n, 3))
    good = body.reach(at, -15) < 1
    value = rng.normal(0, u(4, 11), n)
    b.add(value[good], at[good], axes[good], rotation_matrix(u(0, np.pi, n))[good])


def _chest_lesions(
    b: Builder,
    rng: np.random.Generator,
    cavity: Organ,
    placed: Sequence[Organ],
    muscle: Organ,
    vessels: tuple[Float, Float],
) -> list[Lesion]:
    """Nodules clear of vessels in the lungs; faint balls in muscle."""
    u = rng.uniform
    found: list[Lesion] = []
    tree = cKDTree(vessels[0])

    def plant(site: str, centre: Float, radius: float, contrast: float) -> None:
        b.add(contrast, centre, np.full(3, radius), np.eye(3))
        found.append(Lesion(site, xyz(centre), float(radius), float(contrast)))

    def apart(centre: Float, radius: float) -> bool:
        return all(
            np.linalg.norm(centre - np.array(other.centre)) > radius + other.radius + 3
            for other in found
        )

    wanted = int(rng.integers(4, 11))
    for _ in range(600):
        if len(found) == wanted:
            break
        radius = float(np.exp(u(np.log(2.0), np.log(11.0))))
        centre = u(-1, 1, 3) * [cavity.axes[0], cavity.axes[1], 75]
        if not _in_lung(centre[None], cavity, placed, radius + 1.5)[0] or not apart(
            centre, radius
        ):
            continue
        distance, index = tree.query(centre, k=8)
        if np.min(distance - vessels[1][index]) < radius + 0.5:
            continue
        solid = rng.random() < 0.65
        plant("lung", centre, radius, (u(0, 70) - cavity.hu) if solid else u(150, 400))
    wanted += int(rng.integers(3, 8))
    for _ in range(400):
        if len(found) == wanted:
            break
        radius = u(3.0, 8.0)
        angle = u(0, 2 * np.pi)
        wall = muscle.centre[:2] + (muscle.axes[:2] - u(8, 24)) * [np.cos(angle), np.sin(angle)]
        centre = np.append(wall, u(-75, 75))
        ball = Organ(0.0, centre, np.full(3, radius))
        # Ribs end 15 mm outside the cavity; spine and sternum lie near the midline.
        if (
            abs(centre[0]) > 45
            and apart(centre, radius)
            and fits(ball, muscle, [replace(cavity, axes=cavity.axes + 15)], 150, 1.0)
        ):
            plant("muscle", centre, radius, float(rng.choice([-1, 1])) * u(20, 60))
    return found


def table(rng: np.random.Generator, y: float) -> Ellipsoids:
    """A couch below the patient: a hollow board, or a thin trough."""
    u = rng.uniform
    if rng.random() < 0.5:
        half, thick = u(190, 240), u(10, 18)
        skin = u(1.2, 2.5)
        axes = np.array([[half, thick, 900], [half - 2 * skin, thick - skin, 890]])
        value = u(250, 900)
        return Ellipsoids(
            np.array([value, u(30, 110) - value]),
            np.tile([u(-10, 10), y + thick + 1, 0], (2, 1)),
            axes,
            np.tile(np.eye(3), (2, 1, 1)),
        )
    bend = u(380, 800)
    pieces = 23
    t = np.linspace(-1, 1, pieces) * u(180, 220) / bend
    centre = np.column_stack([bend * np.sin(t), y + 3 - bend * (1 - np.cos(t)), np.zeros(pieces)])
    half = bend * (t[1] - t[0]) / 2 * 1.15
    deep = np.array([0.0, u(14, 24), 0.0])
    rotation = rotation_matrix(-t)
    axes = np.tile([half, u(1.2, 2.4), 900], (pieces, 1))
    return Ellipsoids(
        np.full(2 * pieces, u(200, 800)),
        np.concatenate([centre, centre + deep]),
        np.concatenate([axes, axes]),
        np.concatenate([rotation, rotation]),
    )


def _arms(rng: np.random.Generator, edge: float, fat: float) -> Ellipsoids:
    """Upper arms beside the trunk."""
    u = rng.uniform
    b = Builder()
    for side in (-1, 1):
        r = u(34, 44) + fat * 0.4
        tilt = rotation_matrix(u(0, 3), side * u(0.0, 0.08))
        at = np.array([side * (edge + r + u(22, 34)), u(-15, 25), 40.0])
        skin = b.organ(u(0, 40), None, at, [r, r * u(0.95, 1.1), 400], tilt)
        layer = b.organ(u(-115, -90), skin, at, skin.axes - [2, 2, 5], tilt)
        thin = 4 + fat * 0.3
        flesh = b.organ(u(40, 62), layer, at, layer.axes - [thin, thin, 5], tilt)
        shaft = b.organ(
            u(900, 1400),
            flesh,
            at + np.array([side * u(-4, 4), u(-4, 4), 0]),
            [11, 10.5, 380],
            tilt,
        )
        b.organ(u(-60, 120), shaft, shaft.centre, [u(5.5, 7.5), 6.5, 370], tilt)
    return b.build((), np.eye(3), np.zeros(3), None)
