"""The benchmarks of CT: what they find in data that are known, and how they report."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from inverse.errors import ReconError
from inverse.operators.ct import ParallelBeam
from phantoms.benchmarks import neutron, speed
from phantoms.benchmarks.harness import run
from phantoms.shapes import Ellipses

COLUMNS, VIEWS = 120, 181
ROD = (60.0, 20.0, 5.0, 8.0, 7.0, 0.4)
CAN = (20.0, 3.0, -4.0, 40.0, 38.0, 0.0)


def sinogram(axis: float, turn: float = 2 * math.pi, parts=(CAN, ROD)) -> np.ndarray:
    """A rod in a can about a known axis, in equal steps that exceed the turn by one view."""
    angles = tuple(np.arange(VIEWS) * turn / (VIEWS - 1))
    beam = ParallelBeam(angles, COLUMNS, 1.0, (COLUMNS - 1) / 2 - axis)
    return 1e-3 * Ellipses.of(parts).line_integrals(*beam.rays(4)).mean(-1)


@pytest.mark.parametrize("axis", [59.5, 52.3, 63.77])
def test_mirror_finds_axis_and_half_turn(axis: float) -> None:
    p = sinogram(axis) + 0.005 * np.random.default_rng(0).standard_normal((VIEWS, COLUMNS))
    half, found = neutron.mirror(p)
    assert found == pytest.approx(axis, abs=0.03)
    assert half == pytest.approx((VIEWS - 1) / 2, abs=0.1)
    # steps that are not whole parts of a half turn
    half, found = neutron.mirror(sinogram(axis, turn=6.35))
    assert found == pytest.approx(axis, abs=0.03)
    assert half == pytest.approx((VIEWS - 1) * math.pi / 6.35, abs=0.1)


def test_columns_are_judged() -> None:
    rng = np.random.default_rng(1)
    # no can: its edge would turn about the axis nearly, and be taken for a stripe in part
    p = sinogram(60.0, parts=(ROD,)) + 0.01 * rng.standard_normal((VIEWS, COLUMNS))
    p[:, 41] += 0.03
    p[:, 80] = 3.0 * rng.random(VIEWS)
    found = np.flatnonzero(neutron.dead_columns(p))
    assert 80 in found
    assert np.abs(found - 80).max() <= 2  # neighbours of a wild column may be taken with it
    error = neutron.column_error(p, np.arange(COLUMNS) == 80)
    assert error[41] == pytest.approx(0.03, abs=0.005)
    assert np.abs(np.delete(error, 41)).max() < 0.01
    noise = 0.02 * rng.standard_normal((VIEWS, COLUMNS))
    assert neutron.noise_std(sinogram(60.0) + noise) == pytest.approx(0.02, rel=0.03)


def test_scan_of_the_sinogram_reconstructs_it() -> None:
    from inverse.classical import fbp

    axis = 57.2
    angles = np.arange(VIEWS - 1) * 2 * math.pi / (VIEWS - 1)
    dead = np.zeros(COLUMNS, dtype=bool)
    dead[70] = True
    m = neutron.scan(sinogram(axis)[:-1], angles, axis, dead, 1, 96)
    image = fbp(m)[0].numpy() * 1e3
    g = np.arange(96) - 47.5
    rod = np.hypot(g - 20.0, g[:, None] - 5.0) < 5
    assert image[rod].mean() == pytest.approx(80.0, rel=0.03)


@pytest.mark.slow
def test_axis_of_the_measured_sinogram(shared_data: Path) -> None:
    from skimage.io import imread

    path = shared_data / "ct_sinogram" / "sinogram_360_neutron_image.tif"
    raw = neutron.line_integrals(imread(path))
    dead = neutron.dead_columns(raw)
    assert np.flatnonzero(dead).tolist() == [139, 314, 346]
    half, axis = neutron.mirror(np.where(dead, np.nan, raw - neutron.column_error(raw, dead)))
    assert axis == pytest.approx(244.94, abs=0.2)
    assert half == pytest.approx(228.7, abs=0.5)


def test_rows_and_their_targets() -> None:
    faster = speed.Row("a", 1.0, "b", 9.0, 8.0)
    assert (faster.ratio, faster.met) == (9.0, True)
    share = speed.Row("a", 1.0, "b", 2.0, 0.25, at_least=False)
    assert (share.ratio, share.met) == (0.5, False)


def test_speed_stores_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "MODALITIES", {"ct": lambda runs: speed.projection(24, 3, 8, runs)})
    monkeypatch.setattr(speed, "matrices", lambda: {"tiny": 2**20})
    settings = speed.Settings(("ct",), runs=1)
    rows = run(speed.BENCHMARK, settings, tmp_path).rows["ct"]["rows"]
    assert [row["reference"] for row in rows] == [
        "ASTRA CPU, linear",
        "ASTRA CPU, line",
        "scikit-image",
    ]
    assert all(row["ratio"] > 0 for row in rows)
    assert "| tiny | 1 |" in (tmp_path / "speed.md").read_text()
    with pytest.raises(ReconError, match="runs must be"):
        speed.Settings(("ct",), runs=0)
