"""Card, noise-level split, verdict: closed forms, the right doubt for each fault, round trips."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from affine import dense, field, smooth_prior
from cli_tools import recon, series, tiny_prior
from laws import random

from inverse.errors import CheckpointError, GeometryError, InputError
from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.linop import CountedOperator, Identity
from inverse.operators.mri import CartesianMRI, cartesian_mask
from inverse.priors import NetworkPrior, PriorCard, load_prior, update_card
from inverse.reconstruct import reconstruct
from inverse.trust import (
    CardCalibration,
    Concern,
    Conformal,
    Evidence,
    Examination,
    Rank,
    Reference,
    Setting,
    Verdict,
    check_card,
    crc,
    examine,
    judge,
    noise_split,
    plane,
    prior_part,
    risk,
    shown,
    split,
    statistics,
    verdict,
)
from inverse.trust.card import VERSION
from inverse.trust.verdict import Maps, _worst_of

SIDE = 8
CARD = PriorCard(
    "a", "CT", "HU", -500.0, 500.0, (-1000.0, 2000.0), (1.0, 2.0), (16, 16), (0.01, 10.0),
    orientation="axial",
)  # fmt: skip


def ct(side: int = SIDE, noise: float = 0.3, slices: int = 1) -> Measurement:
    operator = RayTransform(ParallelBeam.sparse(6, (side, side), 1.0), (side, side), 1.0)
    data = random((slices, *operator.out_shape), torch.float32, 0)
    return Measurement(operator, data, torch.tensor(noise), "MR", (1.0, 1.0))


# --- the split at the noise level --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_noise_split_is_tikhonovs_resolution(kind: str) -> None:
    """(A^H W A + 1/tau^2)^-1 A^H W A x; for CT with noise that differs from datum to datum."""
    tau, d = 0.7, SIDE**2
    if kind == "ct":
        measurement, x = ct(), random((3, SIDE, SIDE), torch.float32, 2)
        noise = 0.2 + random(measurement.operator.out_shape, torch.float32, 1).abs()
        measurement = replace(measurement, noise=noise)
        a = dense(measurement.operator).double() / noise.flatten()[:, None]
    else:
        operator = CartesianMRI(cartesian_mask((SIDE, SIDE), 2.0, 0.25))
        x = random((3, SIDE, SIDE), torch.complex64, 2)
        measurement = Measurement(operator, operator(x), torch.tensor(0.4), "MR", (1.0, 1.0))
        eye = torch.eye(d, dtype=torch.complex64).reshape(d, SIDE, SIDE)
        a = operator(eye).flatten(1).T.to(torch.complex128) / 0.4
    part = noise_split(measurement, x, tau, tol=1e-3)
    normal = a.mH @ a
    ridge = torch.eye(d, dtype=a.dtype) / tau**2
    exact = torch.linalg.solve(normal + ridge, normal @ x.flatten(1).to(a.dtype).T).T
    error = (part.measured.flatten(1) - exact).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert bool(part.converged.all())
    assert bool((error <= part.error + 1e-6).all())  # the bound is one
    assert float(part.error.max()) <= 1e-3
    torch.testing.assert_close(part.measured + part.null, x)


def test_noise_split_tends_to_the_exact_one_and_gives_way_to_noise() -> None:
    measurement, x = ct(), random((2, SIDE, SIDE), torch.float32, 3)
    exact = split(measurement.operator, x)
    shares = []
    for noise in (0.01, 0.3, 3.0, 300.0):
        part = noise_split(replace(measurement, noise=torch.tensor(noise)), x, 1.0, max_iter=2000)
        shares.append(float(part.detail_share.mean()))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0, abs=1e-3)
    assert shares[0] == pytest.approx(float(exact.detail_share.mean()), abs=0.05)
    # half of a pixel whose structure is as large as its noise
    alone = Measurement(Identity((1, 1)), torch.zeros(1, 1, 1), torch.tensor(2.0), "MR", (1, 1))
    part = noise_split(alone, torch.full((1, 1, 1), 3.0), 2.0)
    assert float(part.measured) == pytest.approx(1.5)
    assert float(part.share) == pytest.approx(0.5)


def test_cost_of_the_noise_split_is_bounded_and_its_error_stated() -> None:
    measurement, x = ct(16, 1e-4), random((1, 16, 16), torch.float32, 4)
    part = noise_split(measurement, x, 1.0, max_iter=5)
    assert part.iterations == 5
    assert not bool(part.converged.any())
    a = dense(measurement.operator).double()
    normal = a.T @ a / 1e-8
    exact = torch.linalg.solve(normal + torch.eye(256), normal @ x.flatten().double())
    true = float((part.measured.flatten() - exact).norm() / x.norm())
    assert float(part.error) >= true > 0.05


@pytest.mark.parametrize("noise", [0.3, 0.003])
def test_stated_error_bounds_the_true_one_at_every_iteration(noise: float) -> None:
    """And is not ten times as large on average, so that the iteration stops in time."""
    measurement, x = ct(16, noise), random((2, 16, 16), torch.float32, 6)
    x = x + 3  # broad features, as images have
    a = dense(measurement.operator).double() / noise
    normal = a.T @ a
    null = torch.linalg.solve(normal + torch.eye(256), x.flatten(1).double().T).T
    ratios = []
    for iterations in range(1, 40, 2):
        part = noise_split(measurement, x, 1.0, tol=1e-6, max_iter=iterations)
        true = (part.null.flatten(1) - null).norm(dim=1) / x.flatten(1).norm(dim=1)
        assert bool((part.error >= true - 1e-7).all())
        ratios += [float(r) for t, r in zip(true, part.error / true, strict=True) if t > 1e-5]
    assert len(ratios) > 10
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 10


def test_rounding_is_part_of_the_stated_error() -> None:
    """Where float32 no longer resolves the noise, the recursion's residual is not the true one."""
    measurement, x = ct(16, 1e-5), random((1, 16, 16), torch.float32, 4) + 3
    normal = dense(measurement.operator).double()
    normal = normal.T @ normal / 1e-10
    null = torch.linalg.solve(normal + torch.eye(256), x.flatten().double())
    part = noise_split(measurement, x, 1.0, max_iter=1000)
    true = float((part.null.flatten() - null).norm() / x.norm())
    assert float(part.error) >= true
    assert not bool(part.converged.any())


def test_null_std_at_the_noise_level_on_the_gaussian_fixture() -> None:
    """sd((I - M) x) = sqrt(diag((I - M) C (I - M)^T))."""
    measurement, prior = ct(), smooth_prior(SIDE)
    a = dense(measurement.operator).double()
    exact = prior.posterior(a, torch.zeros(len(a)), 0.3)
    d = SIDE**2
    root = torch.linalg.cholesky(exact.covariance + 1e-10 * torch.eye(d)).T
    draws = math.sqrt((2 * d - 1) / 2) * torch.cat([root, -root])
    part = prior_part(
        partial(noise_split, measurement, contrast=1.0, tol=1e-3),
        draws.float().reshape(2 * d, SIDE, SIDE).split(40),
    )
    normal = a.T @ a / 0.09
    rest = torch.eye(d) - torch.linalg.solve(normal + torch.eye(d), normal)
    sd = (rest @ exact.covariance @ rest.T).diagonal().sqrt().reshape(SIDE, SIDE)
    torch.testing.assert_close(part.std, sd, rtol=2e-2, atol=1e-4)


def test_noise_split_refuses_bad_input() -> None:
    measurement, x = ct(), torch.ones(1, SIDE, SIDE)
    for wrong in ({"contrast": 0.0}, {"contrast": math.inf}, {"contrast": 1.0, "tol": 0.0}):
        with pytest.raises(InputError, match="positive contrast"):
            noise_split(measurement, x, **wrong)
    with pytest.raises(GeometryError, match="needs images"):
        noise_split(measurement, x[..., 1:], 1.0)
    zero = noise_split(measurement, 0 * x, 1.0)
    assert float(zero.measured.abs().max()) == 0.0
    assert bool(zero.converged.all())


# --- the prior's card --------------------------------------------------------------------------


def on(side: int, pixel: float, modality: str = "CT") -> Measurement:
    return Measurement(
        Identity((side, side)), torch.zeros(1, side, side), torch.tensor(1.0), modality,
        (pixel, pixel), 0.02,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("side", "pixel", "modality", "value", "plane_of", "said"),
    [
        (16, 1.5, "CT", 0.02, "axial", None),
        (16, 1.5, "CT", 0.02, "", None),
        (16, 0.97, "CT", 0.02, "axial", None),
        (16, 1.5, "MR", 0.02, "axial", "the prior is for CT, the data are MR"),
        (16, 0.8, "CT", 0.02, "axial", "pixels of 0.8 mm"),
        (40, 1.5, "CT", 0.02, "axial", "a field of 60 x 60 mm"),
        (16, 1.5, "CT", 0.02, "coronal", "coronal slices"),
        (16, 1.5, "CT", 0.1, "axial", "100.0 % of pixels outside"),
    ],
)
def test_each_mismatch_with_the_card_is_said(side, pixel, modality, value, plane_of, said) -> None:
    x = torch.full((1, side, side), value)
    found = check_card(
        CARD, on(side, pixel, modality), x, offset=0.01, scale=0.01, orientation=plane_of
    )
    assert [c.text for c in found if said and said in c.text] == [c.text for c in found]
    assert bool(found) == (said is not None)
    if modality == "MR":
        assert found[0].light == "red"


def test_planes_by_their_normals() -> None:
    assert plane([1, 0, 0, 0, 1, 0]) == "axial"
    assert plane([1, 0, 0, 0, 0, -1]) == "coronal"
    assert plane([0, 1, 0, 0, 0, -1]) == "sagittal"
    c, s = math.cos(0.3), math.sin(0.3)
    assert plane([1, 0, 0, 0, c, s]) == "axial"
    c = s = math.sqrt(0.5)
    assert plane([1, 0, 0, 0, c, s]) == "oblique"
    assert plane(None) == plane([0] * 6) == plane([1.0]) == ""


def setting(**changes: object) -> Setting:
    return replace(
        Setting("parallel CT", 0.13, 180.0, 0.01, "pnp_admm", {"steps": 20}, 8), **changes
    )


def test_a_setting_says_in_what_another_differs() -> None:
    one = setting()
    assert one.differences(one) == ()
    assert one.differences(setting(sampling=0.135, noise=0.013, arc=176.0)) == ()
    for change, said in (
        ({"sampling": 0.3}, "0.3 data an unknown for 0.13"),
        ({"arc": 90.0}, "an arc of 90 degrees for 180"),
        ({"noise": 0.03}, "relative noise 0.03 for 0.01"),
        ({"samples": 1}, "samples 1 for 8"),
        ({"method": "mmps"}, "method mmps for pnp_admm"),
        ({"options": {"steps": 8}}, "steps 8 for 20"),
        ({"operator": "fan CT"}, "operator fan CT for parallel CT"),
        ({"pattern": "lines"}, "pattern lines for none"),
        ({"radius": 0.5}, "an RMS frequency of 0.5 for 1"),
    ):
        assert one.differences(setting(**change)) == (said,)


@pytest.mark.parametrize("acceleration", [3.0, 6.0])
def test_a_setting_tells_patterns_of_k_space_apart(acceleration: float) -> None:
    """Lines at equal steps alias into copies, others into noise."""

    def found(mask: torch.Tensor) -> Setting:
        operator = CartesianMRI(mask)
        data = operator(torch.ones(1, *mask.shape, dtype=torch.complex64))
        measurement = Measurement(operator, data, torch.tensor(0.01), "MR", (1.0, 1.0))
        return Setting.of(measurement, {"method": "pnp_admm", "samples": 8})

    radii: dict[str, list[float]] = {}
    for kind, pattern in (
        ("uniform1d", "regular lines"),
        ("random1d", "lines"),
        ("gaussian1d", "lines"),
        ("poisson", "points"),
        ("random2d", "points"),
    ):
        for seed in range(8):
            one = found(cartesian_mask((256, 256), acceleration, 0.06, kind, seed))
            assert one.pattern == pattern, (kind, seed)
            radii.setdefault(kind, []).append(one.radius)
            across = found(cartesian_mask((256, 256), acceleration, 0.06, kind, seed).T)
            assert (across.pattern, across.radius) == (pattern, pytest.approx(one.radius))
    # variable density is told by the frequencies that it prefers
    assert np.median(radii["gaussian1d"]) < 0.7 * np.median(radii["random1d"])
    full = found(torch.ones(16, 16, dtype=torch.bool))
    assert (full.pattern, full.radius) == ("", 1.0)


def test_calibration_goes_into_the_card_and_comes_back(tmp_path: Path) -> None:
    path = tiny_prior(tmp_path / "a.safetensors")
    before = load_prior(path)
    entry = CardCalibration(
        setting(),
        "12 patients",
        Conformal(2.5, 0.1, None, 12, 0.03),
        Conformal(4.5, 0.1, 0.1, 12, 0.01),
        Reference(random((12, 8), torch.float64, 0), (0.1, 0.2, 0.3), 5),
    )
    update_card(path, calibration=(entry.to_dict(), {"version": 99}), orientation="axial")
    after = load_prior(path)  # verifies the hash of the weights
    assert after.card.sha256 == before.card.sha256
    assert after.card.orientation == "axial"
    for (name, a), (_, b) in zip(
        before.net.state_dict().items(), after.net.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name, rtol=0, atol=0)
    known, why = CardCalibration.find(after.card, setting(noise=0.012))
    assert why == ""
    assert known is not None
    assert known.setting == entry.setting
    assert known.conformal == entry.conformal
    assert known.guaranteed == entry.guaranteed
    torch.testing.assert_close(known.reference.values, entry.reference.values, rtol=0, atol=1e-6)
    assert (known.reference.levels, known.reference.seed) == ((0.1, 0.2, 0.3), 5)
    none, why = CardCalibration.find(after.card, setting(samples=1))
    assert none is None
    assert why == "calibrated for another setting (samples 1 for 8)"
    assert "no calibration" in CardCalibration.find(before.card, setting())[1]
    with pytest.raises(CheckpointError, match="no field colour"):
        update_card(path, colour="red")
    with pytest.raises(CheckpointError, match="no field sha256"):
        update_card(path, sha256="0")
    with pytest.raises(CheckpointError, match="version 99"):
        CardCalibration.from_dict({"version": 99})
    with pytest.raises(CheckpointError, match="damaged"):
        CardCalibration.from_dict({"version": VERSION, "setting": {}})


# --- the verdict -------------------------------------------------------------------------------

FINE = Evidence(0.9, "view", 3, 1.1, 1.2, 0.1, -1, 0.2, 0.01, Rank(1.0, 0.6, 0.5, 26))


@pytest.mark.parametrize(
    ("change", "light", "said"),
    [
        ({}, "green", "no cause for doubt"),
        ({"chi2": 3.0}, "amber", "the data are not fitted"),
        ({"chi2": 8.0}, "red", "geometry, units or noise"),
        ({"chi2": math.nan}, "red", "geometry, units or noise"),
        ({"chi2": 0.001}, "amber", "the noise was fitted"),
        ({"group_chi2": 9.0, "group_excess": 8.0}, "amber", "view 3 disagrees"),
        ({"group_chi2": 9.0, "group_excess": 2.0}, "green", "no cause"),
        ({"correlation": -0.7}, "amber", "correlate by -0.7 along axis -1"),
        ({"detail_share": 0.69}, "amber", "69 % of the detail is the prior's"),
        ({"detail_share": 0.95}, "red", "95 % of the detail"),
        ({"ood": Rank(4.0, 1 / 27, 0.03, 26)}, "amber", "unlike the prior's held-out patients"),
        ({"ood": Rank(31.0, 1 / 27, 1e-4, 26)}, "red", "31 times the usual distance"),
        ({"ood": Rank(31.0, 2 / 27, 1e-4, 26)}, "green", "no cause"),
        ({"ood": Rank(4.0, 1 / 9, 0.03, 8)}, "amber", "the least with 8"),
        ({"ood": Rank(4.0, 3 / 81, 0.03, 80)}, "amber", "p 0.037 with 80"),
        ({"ood": Rank(2.0, 2 / 9, 0.1, 8)}, "green", "no cause"),
        ({"ood": None, "ood_note": "no card"}, "green", "not tested (no card)"),
        ({"concerns": (Concern("amber", "coronal"),)}, "amber", "coronal"),
    ],
)  # fmt: skip
def test_each_fault_lights_its_lamp_and_says_why(change, light, said) -> None:
    found = judge(replace(FINE, **change))
    assert found.light == light
    assert any(said in reason for reason in found.reasons)
    assert str(found).startswith(f"{light}: ")


def test_a_verdict_is_never_bare_and_the_gravest_comes_first() -> None:
    with pytest.raises(InputError, match="at least one reason"):
        Verdict("green", ())
    found = judge(replace(FINE, chi2=9.0, concerns=(Concern("amber", "coronal"),)))
    assert found.light == "red"
    assert "chi-square" in found.reasons[0]
    assert found.reasons[1] == "coronal"


def test_slices_that_differ_in_one_matter_give_one_reason() -> None:
    found = [
        Concern("amber", "pixels"),
        Concern("amber", "3 % out", "range", 0.03),
        Concern("amber", "pixels"),
        Concern("amber", "5 % out", "range", 0.05),
        Concern("amber", "4 % out", "range", 0.04),
    ]
    assert [c.text for c in _worst_of(found)] == ["pixels", "5 % out"]


def examined(kind: str, samples: int, slices: int = 3):
    """A Gaussian field with exact posterior samples, examined."""
    prior, measurement, _ = field(kind, SIDE, slices)
    a = dense(measurement.operator).double()
    seen = a.any(dim=1)
    noise = float(measurement.noise)
    generator = torch.Generator().manual_seed(5)
    draws = []
    for y in measurement.data:
        parts = torch.cat([y.real.flatten(), y.imag.flatten()]) if y.is_complex() else y.flatten()
        exact = prior.posterior(a[seen], parts[seen], noise)
        cov = exact.covariance + 1e-9 * torch.eye(SIDE**2)
        z = torch.randn(samples, SIDE**2, generator=generator, dtype=torch.float64)
        draws.append((exact.mean + z @ torch.linalg.cholesky(cov).T).float())
    x = torch.stack(draws).reshape(slices, samples, SIDE, SIDE)
    settings = {"method": "exact", "samples": samples, "offset": 0.0, "scale": 1.0, "steps": 1}
    return prior, measurement, x, settings


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_examination_of_posterior_samples_finds_no_fault_in_the_residual(kind: str) -> None:
    prior, measurement, x, settings = examined(kind, 4)
    found = examine(measurement, prior, x, settings)
    # rays beside the object carry no noise in this fixture
    assert 0.3 < found.evidence.chi2 < 1.6
    assert not any("residual" in r for r in found.verdict.reasons if "no cause" not in r)
    assert found.share.shape == (3, SIDE, SIDE)
    assert found.null_std.shape == (3, SIDE, SIDE)
    assert found.interval is None
    assert found.evidence.ood_note == "the prior has no card"
    assert found.evidence.interval_note == "uncalibrated: the prior has no card"
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["light"] == found.verdict.light
    # slices by number in any order give the same
    again = examine(measurement, prior, [(z, x[z]) for z in (2, 0, 1)], settings)
    torch.testing.assert_close(again.share, found.share)
    assert again.to_dict() == found.to_dict()
    single = examine(measurement, prior, x[:, :1], settings | {"samples": 1})
    assert single.null_std is None


def images_of(found: Examination | Maps) -> list[torch.Tensor]:
    """Those that there are."""
    ends = () if found.interval is None else (found.interval.low, found.interval.high)
    return [image for image in (found.share, found.null_std, *ends) if image is not None]


@pytest.mark.parametrize("samples", [1, 3])
def test_a_sink_takes_the_maps(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slice by slice, in the order of the samples, with the bits that else are returned."""
    prior, measurement, x, settings = examined("ct", samples, slices=10)
    known = CardCalibration(
        Setting.of(measurement, settings), "test", Conformal(1.3, 0.2, None, 9, 0.2)
    )
    monkeypatch.setattr(verdict, "_known", lambda prior, setting: (known, ""))
    order = (2, 0, 1, 9, 3, 4, 8, 7, 5, 6)
    whole = examine(measurement, prior, [(z, x[z]) for z in order], settings)
    taken: list[tuple[int, Maps]] = []
    lean = examine(
        measurement,
        prior,
        [(z, x[z]) for z in order],
        settings,
        sink=lambda z, maps: taken.append((z, maps)),
    )
    assert tuple(z for z, _ in taken) == order
    assert len(images_of(whole)) == (1 if samples == 1 else 4)
    one_by_one = [images_of(dict(taken)[z]) for z in range(10)]
    for image, parts, empty in zip(
        images_of(whole), zip(*one_by_one, strict=True), images_of(lean), strict=True
    ):
        assert torch.equal(image, torch.stack(parts))
        assert empty.shape == (0, SIDE, SIDE)
    assert lean.to_dict() == whole.to_dict()


@pytest.mark.parametrize("samples", [1, 3])
def test_slices_together_are_examined_as_alone(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number at a time, with a noise of their own; and for the price of one."""
    prior, measurement, x, settings = examined("ct", samples, slices=10)
    noise = (0.5 + torch.arange(10.0)).reshape(-1, 1, 1) * measurement.noise
    noise = noise.expand(measurement.data.shape)
    counted = CountedOperator(measurement.operator)
    whole = replace(measurement, operator=counted, noise=noise)
    together = examine(whole, prior, x, settings)
    shared = counted.tally[0]
    monkeypatch.setattr(verdict, "COLUMNS", 1)
    alone = examine(whole, prior, x, settings)
    assert 3 * shared < counted.tally[0] - shared
    torch.testing.assert_close(together.share, alone.share, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.chi2.value, alone.chi2.value)
    assert together.evidence.chi2 == pytest.approx(alone.evidence.chi2)
    assert together.evidence.detail_share == pytest.approx(alone.evidence.detail_share, abs=1e-4)
    assert together.evidence.split_error == pytest.approx(alone.evidence.split_error, rel=1e-2)
    if samples > 1:
        torch.testing.assert_close(together.null_std, alone.null_std, rtol=1e-3, atol=1e-5)
    with pytest.raises(GeometryError, match="as many of all"):
        examine(whole, prior, [*enumerate(x[:9]), (9, x[9].repeat(2, 1, 1))], settings)


def test_large_images_go_through_the_operator_alone() -> None:
    assert [verdict._columns(s) for s in ((64, 64), (512, 512), (1024, 1024), (64, 256, 256))] == [
        8, 8, 2, 1,
    ]  # fmt: skip


def test_examination_sees_wrong_geometry_and_spoiled_views() -> None:
    prior, measurement, x, settings = examined("ct", 1)
    wrong = examine(measurement, prior, x.flip(-1) + 0.5, settings)
    assert wrong.verdict.light == "red"
    assert "chi-square" in wrong.verdict.reasons[0]
    data = measurement.data.clone()
    data[:, 4] += 3 * measurement.noise
    spoiled = examine(replace(measurement, data=data), prior, x, settings)
    assert spoiled.evidence.worst_group == 4
    assert any("view 4 disagrees" in r for r in spoiled.verdict.reasons)
    with pytest.raises(GeometryError, match="each of 3 slices"):
        examine(measurement, prior, [(0, x[0])], settings)
    with pytest.raises(GeometryError, match="samples"):
        examine(measurement, prior, x[..., 1:], settings)


def test_spread_has_a_floor_and_is_of_magnitudes() -> None:
    real = torch.tensor([[1.0, 4.0], [3.0, 4.0]])  # variances 2 and 0
    mean, spread = shown(real)
    assert mean.tolist() == [2.0, 4.0]
    assert spread.tolist() == pytest.approx([math.sqrt(3.0), 1.0])
    turned = torch.tensor([[3.0 + 4.0j], [5.0j]])
    mean, spread = shown(turned)
    assert mean.tolist() == pytest.approx([math.hypot(1.5, 4.5)])
    assert spread.tolist() == [0.0]  # both of magnitude 5
    with pytest.raises(InputError, match="at least 2 samples"):
        shown(real[:1])


# --- a calibrated card, end to end -------------------------------------------------------------


def test_a_calibrated_card_gives_intervals_that_hold_and_a_rank(tmp_path: Path) -> None:
    """Fitted on some images, used on others of the same law, through `reconstruct`."""
    path = tiny_prior(tmp_path / "a.safetensors")
    prior = load_prior(path)
    card = prior.card
    side, count, samples = 16, 10, 2
    pixel = card.pixel_mm_range[0]
    operator = RayTransform(ParallelBeam.sparse(5, (side, side), pixel), (side, side), pixel)
    law = smooth_prior(side)
    truth = 0.02 + 0.004 * law.sample(2 * count, torch.Generator().manual_seed(0))
    data = operator(truth)
    data = data + 0.05 * torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    whole = Measurement(operator, data, torch.tensor(0.05), "CT", (pixel, pixel), 0.02)

    def run(index: range, of: NetworkPrior):
        part = whole.take(torch.tensor(list(index)))
        return part, reconstruct(part, of, steps=3, samples=samples, batch=32)

    fitted, result = run(range(count), prior)
    pairs = [shown(x) for x in result.samples]
    mean, std = (torch.stack(part) for part in zip(*pairs, strict=True))
    conformal = crc(truth[:count], mean, std, alpha=0.2)
    s = result.settings
    values = statistics(
        prior.at(pixel_mm=pixel), fitted, result.mean, offset=s["offset"], scale=s["scale"]
    )
    known = CardCalibration(
        Setting.of(fitted, s), "10 fields", conformal, reference=Reference(values)
    )
    update_card(path, calibration=(known.to_dict(),))

    calibrated = load_prior(path)
    seen, result = run(range(count, 2 * count), calibrated)
    found = examine(seen, calibrated, result.samples, result.settings)
    assert found.evidence.interval_note == "calibrated"
    assert found.interval.level == pytest.approx(0.8)
    outside = (truth[count:] < found.interval.low) | (truth[count:] > found.interval.high)
    assert float(outside.double().mean()) < 0.3  # 0.2 on average over fits
    pairs = [shown(x) for x in result.samples]
    mean, std = (torch.stack(part) for part in zip(*pairs, strict=True))
    assert float(outside.double().mean()) == pytest.approx(
        risk(truth[count:], mean, std, conformal.factor)
    )
    assert found.evidence.ood.patients == count
    at, s = calibrated.at(pixel_mm=pixel), result.settings
    values = statistics(at, seen, result.mean, offset=s["offset"], scale=s["scale"])
    ranks = sorted((known.reference.rank(v) for v in values), key=lambda r: r.distance)
    assert found.evidence.ood.p == pytest.approx(ranks[count // 2].p)
    assert found.evidence.ood.distance == pytest.approx(ranks[count // 2].distance, rel=1e-3)
    entry = found.to_dict()["interval"]
    assert entry == {"level": pytest.approx(0.8), "factor": pytest.approx(conformal.factor)}
    # another setting: nothing is said
    fewer = reconstruct(seen, calibrated, steps=2, samples=samples, batch=32)
    other = examine(seen, calibrated, fewer.samples, fewer.settings)
    assert other.interval is None
    assert "steps 2 for 3" in other.evidence.interval_note
    assert other.evidence.interval_note.startswith("uncalibrated")
    assert other.evidence.ood is None


def test_commands_end_with_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with reasons on stdout, the evidence in metrics.json, maps for the report."""
    scan, out, prior = tmp_path / "ct", tmp_path / "out", tiny_prior(tmp_path / "a.safetensors")
    series(scan, 2)
    quick = ("--prior", prior, "--steps", 2, "--no-tv", "--views", 12)
    assert recon("study", "ct", scan, "-o", out, *quick, "--samples", 2) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Verdict: ")]
    metrics = json.loads((out / "metrics.json").read_text())
    trust = metrics["trust"]
    assert told == [f"Verdict: {trust['light']}: {'; '.join(trust['reasons'])}"]
    assert trust["reasons"]
    assert trust["interval_note"].startswith("uncalibrated")
    assert 0 <= trust["detail_share"] <= 1
    assert len(trust["chi2"]["value"]) == 2
    assert len(trust["chi2"]["groups"]) == 12
    assert trust["setting"]["operator"] == "parallel CT"
    verdict = json.loads((out / "run.json").read_text())["settings"]["verdict"]
    assert verdict == {"light": trust["light"], "reasons": trust["reasons"]}
    for name in ("prior-share", "null-std"):
        volume = np.load(out / "maps" / f"{name}.npy")
        assert volume.shape == (2, 64, 64)
        assert np.isfinite(volume).all()
        assert volume.any(axis=(1, 2)).all(), "the map of each slice in its place"
