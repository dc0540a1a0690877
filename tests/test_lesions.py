"""Planted lesions: what was asked for is what is there, and what arrives is measured right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import tiny_prior

from inverse.errors import GeometryError, InputError
from inverse.operators.units import hu_to_mu
from inverse.priors import load_prior
from phantoms.anatomy import AIR_HU, thorax
from phantoms.benchmarks import lesions as benchmark
from phantoms.lesions import APART_MM, CONTRASTS, DIAMETERS, plant

PIXEL = 1.6


@pytest.fixture(scope="module")
def chest() -> np.ndarray:
    hu = thorax(50_000).slice(10.0).image((256, 256), PIXEL, 2) + AIR_HU
    return np.maximum(hu, AIR_HU).astype(np.float32)


def test_edits_are_what_they_say(chest) -> None:
    planted = plant(chest, PIXEL, np.random.default_rng(0))
    difference = planted.second - planted.first
    y, x = np.mgrid[:256, :256]
    assert {e.direction for e in planted.edits} == {"insertion", "removal"}
    assert {e.tissue for e in planted.edits} == {"lung", "soft"}
    covered = np.zeros(chest.shape, bool)
    for e in planted.edits:
        distance = np.hypot(y - e.row, x - e.column) * PIXEL
        near = distance < e.diameter / 2 + 5
        covered |= near
        if e.direction == "insertion":
            assert e.diameter in DIAMETERS
            assert e.contrast in CONTRASTS[e.tissue]
            mass = math.pi * (e.diameter / 2 / PIXEL) ** 2 * e.contrast
            assert float(difference[near].sum()) == pytest.approx(mass, rel=1e-2)
            around = planted.first[distance < e.diameter / 2 + 1]
            assert around.max() < -550 if e.tissue == "lung" else around.min() > -60
        else:
            assert float(difference[near].sum()) < 0
            assert difference[near].max() <= 0
        for other in planted.edits:
            if other is not e:
                gap = math.hypot(e.row - other.row, e.column - other.column) * PIXEL
                assert gap >= APART_MM
    assert np.array_equal(planted.first, chest)
    assert not difference[~covered].any()


def test_every_size_and_contrast_comes_equally_often(chest) -> None:
    kinds = [
        (e.tissue, e.diameter, e.contrast)
        for number in range(6)
        for e in plant(chest, PIXEL, np.random.default_rng(number), number=number).edits
        if e.direction == "insertion"
    ]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert len(counts) == 12
    assert max(counts.values()) - min(counts.values()) <= 2


def test_plant_refuses_what_is_no_slice(chest) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(GeometryError, match="square"):
        plant(chest[:100], PIXEL, rng)
    with pytest.raises(InputError, match="finite HU"):
        plant(chest * np.nan, PIXEL, rng)
    with pytest.raises(InputError, match="positive pixel"):
        plant(chest, 0.0, rng)
    assert plant(np.full((64, 64), -1000.0, np.float32), PIXEL, rng).edits == ()


def rows_of(chest, solve):
    one = benchmark.Slice("a", chest, PIXEL)
    plan = benchmark.Plan(views=(9,), phantoms=1, real=0, steps=1, matrix=128)
    found = list(benchmark.run(one, 0, 9, plan, {"m": solve}))
    assert found[0][0] == "m"
    return found[0][1]


def test_shares_of_images_that_are_known(chest) -> None:
    """The truth itself recovers all, half of the difference one half, a constant image nothing."""
    planted = plant(chest, PIXEL, np.random.default_rng([0, 7]))
    pair = torch.from_numpy(np.stack([planted.first, planted.second]))
    truth = hu_to_mu(torch.nn.functional.avg_pool2d(pair[:, None], 2)[:, 0])
    half = truth.mean(dim=0) + 0.5 * (truth - truth.mean(dim=0))
    for image, share in ((truth, 1.0), (half, 0.5), (truth[:1].expand(2, -1, -1), 0.0)):
        found = rows_of(chest, lambda _, image=image: image)
        assert len(found) == len(planted.edits)
        for row in found:
            assert row["share"] == pytest.approx(share, abs=1e-4)
            assert row["sfrc"] <= (0.0 if share == 1.0 else 1.0)
            assert len(row["with"]) == len(row["without"]) == benchmark.CHANNELS
    assert rows_of(chest, lambda _: torch.zeros_like(truth))[0]["sfrc"] > 0.9
    # false contrast: of the truth none, of a lesion that is always there all of it
    removed = truth[[0, 0]]
    for row in rows_of(chest, lambda _: removed):
        expected = 1.0 if row["direction"] == "removal" else 0.0
        assert row["false"] == pytest.approx(expected, abs=1e-4)


def made_up(count: int, shift: float, share: float) -> list[dict]:
    rng = np.random.default_rng(3)
    rows = []
    for k in range(count):
        noise = rng.standard_normal((2, benchmark.CHANNELS))
        rows.append({
            "slice": k, "views": 23, "method": "prior", "direction": "insertion",
            "tissue": "lung", "diameter": 6.0, "contrast": 100.0, "row": k, "column": 0,
            "share": share + 0.1 * float(rng.standard_normal()), "false": 0.2,
            "with": (noise[0] + shift * (np.arange(benchmark.CHANNELS) == 0)).tolist(),
            "without": noise[1].tolist(),
        })  # fmt: skip
    return rows


def test_curves_and_areas_are_those_of_the_population() -> None:
    rows = made_up(400, 1.5, 0.7)
    (point,) = benchmark.points(rows)
    assert point.share == pytest.approx(0.7, abs=0.02)
    assert point.error == pytest.approx(0.1 / 20, rel=0.15)
    assert point.false == pytest.approx(0.2)
    assert point.count == 400
    pooled, single = benchmark.seen(rows)
    assert (pooled.contrast, single.contrast) == (None, 100.0)
    exact = 0.5 * (1 + math.erf(1.5 / 2))  # Phi(d' / sqrt 2)
    assert pooled.detection.low < exact < pooled.detection.high
    assert pooled.detection.auc == pytest.approx(exact, abs=0.03)
    assert benchmark.seen(made_up(6, 1.5, 0.7))[0].detection is None  # too few to train on


def test_benchmark_continues_and_writes_its_page(
    chest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run computes nothing, one with another prior only its own rows."""
    plan = benchmark.Plan(views=(5,), phantoms=2, real=0, steps=1, matrix=64)
    calls: list[str] = []

    def solver(name: str):
        def solve(measurement):
            calls.append(name)
            return torch.full((2, 64, 64), 0.02)

        return solve

    slices = [benchmark.Slice(name, chest, PIXEL) for name in "ab"]
    monkeypatch.setattr(benchmark, "phantom_slices", lambda _: iter(slices))
    monkeypatch.setattr(benchmark, "solvers", lambda *_: {m: solver(m) for m in benchmark.COLOURS})
    path = tiny_prior(tmp_path / "a.safetensors")
    prior, out = load_prior(path), tmp_path / "lesions.json"
    state = benchmark.run_all(plan, prior, None, {}, out)
    assert sorted(calls) == ["fbp"] * 2 + ["prior"] * 2 + ["tv"] * 2
    again = benchmark.run_all(plan, prior, None, {}, out)
    assert len(calls) == 6
    assert again == json.loads(json.dumps(state))
    other = load_prior(path)
    other.card = replace(other.card, sha256="another")
    benchmark.run_all(plan, other, None, {}, out)
    assert calls[6:] == ["prior"] * 2
    out.write_text("{}")
    with pytest.raises(InputError, match="not of this benchmark"):
        benchmark.run_all(plan, prior, None, {}, out)
    page = benchmark.markdown(state, "images/lesions.png")
    assert "0.00 ± 0.00" in page  # a constant image shows no lesion
    assert "sha256" in page
    benchmark.draw(state["rows"], tmp_path / "lesions.png")
    assert (tmp_path / "lesions.png").stat().st_size > 10_000
