"""The calibration of a card: the promised risk over 200 splits, and the way into the card."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import discs, tiny_prior
from scipy import stats

from inverse.priors import load_prior
from inverse.trust import CardCalibration, Conformal, Reference, Setting, shown
from phantoms.benchmarks import conformal as benchmark

SETTING = Setting("parallel CT", 0.1, 180.0, 0.01, "pnp_admm", {}, 4)


def population(count: int, seed: int = 0) -> list[benchmark.Found]:
    """Patients of unequal difficulty, whose spread is stated too small."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        hard = float(torch.randn((), generator=generator).mul(0.6).exp())
        body = torch.rand(12, 12, generator=generator) < 0.8
        found.append(
            benchmark.Found(
                truth=hard * torch.randn(12, 12, generator=generator),
                mean=torch.zeros(12, 12),
                spread=torch.full((12, 12), 0.5),
                body=body,
                values=torch.randn(2, 6, generator=generator, dtype=torch.float64),
                settings=(SETTING, SETTING),
            )
        )
    return found


def test_risk_outside_the_fit_is_the_promised_one_over_200_splits() -> None:
    alpha = benchmark.ALPHA
    means, exceeding = [], []
    for seed in range(3):
        outside = benchmark.splits(population(40, seed), count=200)
        assert outside is not None
        assert outside.patients == 20
        assert outside.guaranteed is None  # 20 patients are too few for alpha and delta of 0.1
        means.append(outside.mean)
        exceeding.append(outside.exceeding)
    error = float(np.std(means)) / math.sqrt(len(means))
    assert float(np.mean(means)) < alpha + 3 * error
    assert float(np.mean(means)) > 0.3 * alpha  # and not for nothing
    assert 0.0 < float(np.mean(exceeding)) < 0.6


def test_left_out_patients_have_the_promised_risk_and_more_than_those_of_smaller_fits() -> None:
    alpha, n = benchmark.ALPHA, 26
    alone = [benchmark.left_out(population(n, seed)) for seed in range(8)]
    found = [one for one in alone if one is not None]
    assert [one.patients for one in found] == 8 * [n - 1]
    means = np.array([one.mean for one in found])
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    assert means.mean() == pytest.approx((alpha * n - 1) / (n - 1), abs=3 * error + 0.01)
    halves = benchmark.splits(population(n), count=50)
    assert halves is not None
    assert halves.mean < means.mean()  # the budget of 13 patients is half that of 25
    assert found[0].mean + found[0].half < found[0].worst
    # a fit that knew the stranger would cover it
    stranger = [
        replace(f, truth=f.truth * (100 if k == 0 else 1)) for k, f in enumerate(population(10))
    ]
    lost = benchmark.left_out(stranger)
    assert lost is not None
    assert lost.worst > 0.5


def test_the_guarantee_holds_in_all_but_delta_of_200_splits() -> None:
    outside = benchmark.splits(population(120, 3), count=200)
    assert outside is not None
    delta = benchmark.DELTA
    assert outside.guaranteed is not None
    assert outside.guaranteed <= delta + 3 * math.sqrt(delta * (1 - delta) / 200)
    assert outside.guaranteed <= outside.exceeding


def test_the_stated_spread_is_judged_without_its_floor() -> None:
    """Truth and samples of one law: 90 % intervals hold 90 %; of half the spread they do not."""
    k, unit = 4, 1000.0
    generator = torch.Generator().manual_seed(1)
    t = stats.t(k - 1)
    for narrow in (1.0, 0.5):
        found = []
        for one in population(12):
            sd = torch.rand(64, 64, generator=generator) + 0.1
            truth, *draws = sd * torch.randn(k + 1, 64, 64, generator=generator)
            mean, spread = shown(narrow * torch.stack(draws))
            body = torch.ones(64, 64, dtype=torch.bool)
            found.append(replace(one, truth=truth, mean=mean, spread=spread, body=body))
        plain = benchmark.stated(found, unit)
        assert plain is not None
        assert plain.samples == k
        far = t.ppf(0.95) * narrow * math.sqrt(1 + 1 / k) / math.sqrt(1 + narrow**2 / k)
        assert plain.held == pytest.approx(1 - 2 * t.sf(far), abs=0.01)
        rms = unit * math.sqrt((1.1**3 - 0.1**3) / 3)  # of sd, uniform between 0.1 and 1.1
        assert plain.std == pytest.approx(narrow * rms, rel=0.02)
        assert plain.error == pytest.approx(rms * math.sqrt(1 + narrow**2 / k), rel=0.02)
    single = [replace(f, settings=(replace(SETTING, samples=1),) * 2) for f in found]
    assert benchmark.stated(single) is None


def test_too_few_patients_get_no_interval() -> None:
    assert benchmark.fit(population(8)) is None  # 1 / 9 is above a tenth
    assert isinstance(benchmark.fit(population(9)), Conformal)
    assert benchmark.splits(population(10)) is None
    assert benchmark.left_out(population(9)) is None


def test_calibration_goes_from_slices_into_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command; the second run reconstructs nothing and replaces its own entries only."""
    count = 10
    images = discs(count, 32)
    data = tmp_path / "hu.npz"
    np.savez(data, hu=images.astype(np.int16))
    lines = ["patient,pixel_mm"] + [f"p{k},{5 + 0.1 * (k % 2)}" for k in range(count)]
    data.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    prior = tiny_prior(tmp_path / "a.safetensors")
    monkeypatch.setattr(benchmark, "MATRIX", 32)
    arguments = [
        "conformal", "--prior", str(prior), "--data", str(data), "--amounts", "6",
        "--samples", "2", "--steps", "2", "--phantoms", "0", "--orientation", "axial",
        "--out", str(tmp_path / "conformal.json"), "--write",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", arguments)
    benchmark.main()
    assert capsys.readouterr().out.count(" s\n") == count
    card = load_prior(prior).card
    assert card.orientation == "axial"
    several, single = (CardCalibration.from_dict(e) for e in card.calibration)
    assert several.conformal is not None
    assert several.conformal.patients == count
    assert several.setting.samples == 2
    assert several.setting.operator == "parallel CT"
    assert several.reference.values.shape == (count, 8)
    assert (single.conformal, single.setting.samples) == (None, 1)
    assert single.source == f"{count} patients of hu.npz"
    page = (tmp_path / "conformal.md").read_text()
    assert f"{several.conformal.factor:.2f}" in page
    benchmark.main()
    assert " s\n" not in capsys.readouterr().out
    assert len(load_prior(prior).card.calibration) == 2
    monkeypatch.setattr("sys.argv", [*arguments, "--amounts", "12"])
    benchmark.main()
    assert len(load_prior(prior).card.calibration) == 4


def test_what_is_foreign_is_made_of_patients_and_tested_without_them() -> None:
    """Mistakes change what they say, each patient's copy is ranked among the other patients."""
    image = discs(1, 32)[0]
    image[4:6, 10:20] = 50.0  # neither symmetric up and down nor left and right
    ours = [benchmark.Subject(f"slice {k}", "patients", image, 5.0 + k) for k in range(6)]
    made: dict[str, list[benchmark.Subject]] = {}
    for subject in benchmark.foreign(ours, "CT", 2, {}):
        assert subject.foreign
        assert subject.image.dtype == np.float32
        made.setdefault(subject.group, []).append(subject)
    assert {len(members) for members in made.values()} == {2}
    assert {"abdomen phantoms", "test objects", "white noise", "metal"} <= set(made)
    for group, image_of, pixel_of in (
        ("upside down", np.flipud, lambda p: p),
        ("left and right exchanged", np.fliplr, lambda p: p),
        ("turned by 90 degrees", np.rot90, lambda p: p),
        ("pixel size times 0.6", np.asarray, lambda p: 0.6 * p),
        ("HU plus 100", lambda x: x + 100, lambda p: p),
        ("HU of slope 1.2", lambda x: 1.2 * x + 200, lambda p: p),
    ):
        first, last = made[group]
        assert (first.of, last.of) == (0, 5)
        np.testing.assert_allclose(last.image, image_of(image), atol=1e-3)
        assert last.pixel_mm == pytest.approx(pixel_of(10.0))
    assert {s.of for s in made["abdomen phantoms"]} == {None}
    assert not any(s.group == "white noise" for s in benchmark.foreign(ours, "MR", 1, {}))


def test_the_table_of_likeness_says_what_is_told_apart() -> None:
    found = population(20)
    references = [Reference(torch.stack([f.values[i] for f in found])) for i in (0, 1)]
    twin = replace(found[3], values=found[3].values)
    far = [replace(f, values=f.values + 40.0) for f in found[:4]]
    strange = {"twins": [(3, twin)], "far": [(k, f) for k, f in enumerate(far)]}
    table = benchmark._likeness({"patients": found}, strange, references)
    assert table["patients"]["slices"] == 20
    assert table["patients"]["doubted"] <= 0.15  # the farthest of 20 is doubted, by design
    assert table["patients"]["red"] == 0.0
    # a copy of a patient stands among the others where the patient does
    values = references[1].values
    others = Reference(torch.cat([values[:3], values[4:]])).rank(values[3])
    assert table["twins"]["median_p"] == pytest.approx(others.p)
    assert table["twins"]["distance"] == pytest.approx(others.distance)
    assert (table["far"]["doubted"], table["far"]["red"]) == (1.0, 1.0)
    assert table["far"]["auc"] == pytest.approx(1.0)
    assert table["far"]["distance"] > 100
