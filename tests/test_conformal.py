"""The calibration of a card: the promised risk over 200 splits, and the way into the card."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import discs, tiny_prior

from inverse.priors import load_prior
from inverse.trust import CardCalibration, Conformal, Setting
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


def test_the_guarantee_holds_in_all_but_delta_of_200_splits() -> None:
    outside = benchmark.splits(population(120, 3), count=200)
    assert outside is not None
    delta = benchmark.DELTA
    assert outside.guaranteed is not None
    assert outside.guaranteed <= delta + 3 * math.sqrt(delta * (1 - delta) / 200)
    assert outside.guaranteed <= outside.exceeding


def test_too_few_patients_get_no_interval() -> None:
    assert benchmark.fit(population(8)) is None  # 1 / 9 is above a tenth
    assert isinstance(benchmark.fit(population(9)), Conformal)
    assert benchmark.splits(population(10)) is None


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
    assert several.reference.values.shape == (count, 6)
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
