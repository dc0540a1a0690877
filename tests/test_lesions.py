"""Planted lesions: what was asked for is what is there, and what arrives is measured right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_tools import tiny_prior

from inverse.errors import GeometryError, InputError
from inverse.operators.units import hu_to_mu
from inverse.priors import load_prior
from phantoms.anatomy import AIR_HU, thorax
from phantoms.benchmarks import lesions as benchmark
from phantoms.benchmarks.page import with_section
from phantoms.benchmarks.problems import brains
from phantoms.lesions import APART_MM, BRAIN, CHEST, plant

PIXEL = 1.6


@pytest.fixture(scope="module")
def chest() -> np.ndarray:
    hu = thorax(50_000).slice(10.0).image((256, 256), PIXEL, 2) + AIR_HU
    return np.maximum(hu, AIR_HU).astype(np.float32)


@pytest.fixture(scope="module")
def brain() -> tuple[np.ndarray, float]:
    images, pixel = brains(1, 50_000, 256)
    return images[0], pixel


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
            assert e.diameter in CHEST.diameters
            assert e.contrast in CHEST.contrasts[e.tissue]
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
    with pytest.raises(InputError, match="finite values"):
        plant(chest * np.nan, PIXEL, rng)
    with pytest.raises(InputError, match="positive pixel"):
        plant(chest, 0.0, rng)
    assert plant(np.full((64, 64), -1000.0, np.float32), PIXEL, rng).edits == ()


def test_lesions_of_a_brain_lie_in_white_matter(brain) -> None:
    """The phantom's white matter is known: everything else is darker than 0.6."""
    image, pixel = brain
    y, x = np.mgrid[:256, :256]
    kinds = set()
    for number in (0, 9):
        planted = plant(image, pixel, np.random.default_rng(number), BRAIN, number=number)
        assert len(planted.edits) >= 4
        for e in planted.edits:
            difference = planted.second - planted.first
            distance = np.hypot(y - e.row, x - e.column) * pixel
            assert e.direction == "insertion"
            assert e.contrast in BRAIN.contrasts[e.tissue]
            assert (e.contrast < 0) == (e.tissue == "dark")
            assert planted.first[distance < e.diameter / 2 + 0.5].min() > 0.6
            mass = math.pi * (e.diameter / 2 / pixel) ** 2 * e.contrast
            found = float(difference[distance < e.diameter / 2 + 2].sum())
            assert found == pytest.approx(mass, rel=2e-2)
            kinds.add((e.tissue, e.diameter))
        assert planted.second.min() > -1e-6
    assert {t for t, _ in kinds} == {"dark", "bright"}
    assert {d for _, d in kinds} == set(BRAIN.diameters)


def test_what_white_matter_encloses_can_be_taken_out() -> None:
    """A dark disc goes and leaves white matter; one at its border, or a long one, stays."""
    y, x = np.mgrid[:128, :128].astype(float)
    r = np.hypot(y - 64, x - 64)
    image = np.where(r < 50, 0.8, np.where(r < 56, 0.5, 0.0)).astype(np.float32)
    hole = np.hypot(y - 64, x - 50) < 4
    image[hole] = 0.2
    image[60:64, 70:100] = 0.2
    image[np.hypot(y - 64, x - 110) < 4] = 0.2
    planted = plant(image, 1.0, np.random.default_rng(0), BRAIN)
    (edit,) = [e for e in planted.edits if e.direction == "removal"]
    assert (edit.row, edit.column) == pytest.approx((64, 50), abs=0.2)
    assert edit.diameter == pytest.approx(8, abs=1.5)
    assert edit.contrast < -0.35
    np.testing.assert_allclose(planted.second[hole], 0.8, atol=1e-5)


NINE = benchmark.CTScan(9)


def rows_of(image, scan, solve, pixel=PIXEL, matrix=128, modality="CT"):
    subject = benchmark.SUBJECTS[modality]
    made = benchmark._make(benchmark.Slice("a", image, pixel), 0, scan, matrix, subject)
    return benchmark._rows(lambda: made, solve)


def test_shares_of_images_that_are_known(chest) -> None:
    """The truth itself recovers all, half of the difference one half, a constant image nothing."""
    planted = plant(chest, PIXEL, np.random.default_rng([0, 7]))
    pair = torch.from_numpy(np.stack([planted.first, planted.second]))
    truth = hu_to_mu(torch.nn.functional.avg_pool2d(pair[:, None], 2)[:, 0])
    half = truth.mean(dim=0) + 0.5 * (truth - truth.mean(dim=0))
    for image, share in ((truth, 1.0), (half, 0.5), (truth[:1].expand(2, -1, -1), 0.0)):
        found = rows_of(chest, NINE, lambda _, image=image: image)
        assert len(found) == len(planted.edits)
        for row in found:
            assert row["share"] == pytest.approx(share, abs=1e-4)
            assert row["sfrc"] <= (0.0 if share == 1.0 else 1.0)
            assert len(row["with"]) == len(row["without"]) == benchmark.CHANNELS
    assert rows_of(chest, NINE, lambda _: torch.zeros_like(truth))[0]["sfrc"] > 0.9
    # false contrast: of the truth none, of a lesion that is always there all of it
    removed = truth[[0, 0]]
    for row in rows_of(chest, NINE, lambda _: removed):
        expected = 1.0 if row["direction"] == "removal" else 0.0
        assert row["false"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("coils", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_shares_of_brains_that_are_known(brain, coils) -> None:
    """As of chests: the magnitude, whatever phase the object has, and inside the coils' maps."""
    image, pixel = brain
    planted = plant(image, pixel, np.random.default_rng([0, 7]), BRAIN)
    first = torch.from_numpy(planted.first)
    pair = torch.stack([first, torch.from_numpy(planted.second)])
    if coils > 1:
        pair[:, :20, :20] = 5.0
    scan = benchmark.MRScan(4.0, coils)
    for solved, share in ((1j * pair, 1.0), (pair.mean(0, True).expand(2, -1, -1), 0.0)):
        for row in rows_of(image, scan, lambda _, x=solved: x, pixel, 256, "MR"):
            assert row["share"] == pytest.approx(share, abs=1e-4)
            assert row["sfrc"] <= 0.02 * (1 - share)
    with pytest.raises(InputError, match="own grid of 256"):
        rows_of(image, benchmark.MRScan(4.0), torch.abs, pixel, 128, "MR")


def test_zero_filling_keeps_what_the_measured_lines_keep(brain) -> None:
    """Its share of a lesion is the share of the lesion's energy on the measured lines."""
    image, pixel = brain
    planted = plant(image, pixel, np.random.default_rng([0, 7]), BRAIN)
    scan = benchmark.MRScan(2.0)
    pair = np.stack([planted.first, planted.second])
    mask = scan.measure(pair, pixel, 256, 0).scan.measurement.operator.mask
    largest = max(planted.edits, key=lambda e: e.diameter)
    alone = planted.first * 0
    y, x = np.mgrid[:256, :256]
    near = np.hypot(y - largest.row, x - largest.column) * pixel < largest.diameter / 2 + 3
    alone = np.where(near, planted.second - planted.first, 0)
    energy = np.abs(np.fft.fftshift(np.fft.fft2(alone))) ** 2
    expected = float(energy[np.broadcast_to(mask.numpy(), energy.shape)].sum() / energy.sum())
    solve = scan.solvers()["zero-filled"]
    (row,) = [
        r for r in rows_of(image, scan, solve, pixel, 256, "MR")
        if (r["row"], r["column"]) == (largest.row, largest.column)
    ]  # fmt: skip
    assert row["share"] == pytest.approx(expected, abs=0.05)


def test_scans_are_those_of_the_modality() -> None:
    plan = benchmark.Plan(1, 0, 1, views=(9, 30), accelerations=(4.0, 8.0), coils=(1, 8))
    assert [s.label for s in plan.scans("CT")] == ["9 views", "30 views"]
    assert [s.label for s in plan.scans("MR")] == [
        "4x, 1 coil", "8x, 1 coil", "4x, 8 coils", "8x, 8 coils"
    ]  # fmt: skip
    single, several = plan.scans("MR")[0].solvers(), plan.scans("MR")[-1].solvers()
    assert list(single) == ["zero-filled", "l1-wavelet", "tv"]
    assert list(several) == ["cg-sense", "l1-wavelet", "tv"]


def test_a_page_keeps_the_sections_of_other_priors(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    for section in ("## `a`\n\none\n\n### deep\n\nx", "## `b`\n\ntwo", "## `a`\n\nthree"):
        page.write_text(with_section(page, "# Title\n\nwords\n", section))
    assert page.read_text() == "# Title\n\nwords\n\n## `a`\n\nthree\n\n## `b`\n\ntwo\n"
    assert with_section(page, "# Another", "## `c`\n\nx") == "# Another\n\n## `c`\n\nx\n"


def made_up(count: int, shift: float, share: float) -> list[dict]:
    rng = np.random.default_rng(3)
    rows = []
    for k in range(count):
        noise = rng.standard_normal((2, benchmark.CHANNELS))
        rows.append({
            "slice": k, "scan": "23 views", "method": "prior", "direction": "insertion",
            "tissue": "lung", "diameter": 6.0, "contrast": 100.0, "row": k, "column": 0,
            "share": share + 0.1 * float(rng.standard_normal()), "false": 0.2,
            "with": (noise[0] + shift * (np.arange(benchmark.CHANNELS) == 0)).tolist(),
            "without": noise[1].tolist(),
        })  # fmt: skip
    return rows


def test_curves_and_areas_are_those_of_the_population() -> None:
    rows = made_up(400, 1.5, 0.7)
    (point,) = benchmark.points(rows, CHEST)
    assert point.share == pytest.approx(0.7, abs=0.02)
    assert point.error == pytest.approx(0.1 / 20, rel=0.15)
    assert point.false == pytest.approx(0.2)
    assert point.count == 400
    pooled, single = benchmark.seen(rows, CHEST)
    assert (pooled.contrast, single.contrast) == (None, 100.0)
    exact = 0.5 * (1 + math.erf(1.5 / 2))  # Phi(d' / sqrt 2)
    assert pooled.detection.low < exact < pooled.detection.high
    assert pooled.detection.auc == pytest.approx(exact, abs=0.03)
    assert benchmark.seen(made_up(6, 1.5, 0.7), CHEST)[0].detection is None  # too few to train on


def test_benchmark_continues_and_writes_its_page(
    chest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run computes nothing, one with another prior only its own rows."""
    plan = benchmark.Plan(phantoms=2, real=0, steps=1, views=(5,), matrix=64)
    calls: list[str] = []

    def solver(name: str):
        def solve(measurement):
            calls.append(name)
            return torch.full((2, 64, 64), 0.02)

        return solve

    slices = [benchmark.Slice(name, chest, PIXEL) for name in "ab"]
    monkeypatch.setattr(benchmark, "phantom_slices", lambda *_: iter(slices))
    classical = {m: solver(m) for m in ("fbp", "tv")}
    monkeypatch.setattr(benchmark.CTScan, "solvers", lambda _: classical)
    by_prior = solver("prior")
    monkeypatch.setattr(
        benchmark, "reconstruct", lambda m, *_, **__: SimpleNamespace(mean=by_prior(m))
    )
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
    page = benchmark.markdown(state, "images/lesions-ct-small.png")
    assert "0.00 ± 0.00" in page  # a constant image shows no lesion
    assert "sha256" in page
    benchmark.draw(state["rows"], benchmark.SUBJECTS["CT"], tmp_path / "lesions.png")
    assert (tmp_path / "lesions.png").stat().st_size > 10_000
