"""Every method held to its class: against exact posteriors, published values, recorded biases."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.measurement import Measurement
from inverse.posterior import METHODS, Proximal
from inverse.priors import GaussianPrior
from inverse.priors.denoiser import Denoiser
from inverse.reconstruct import reconstruct
from inverse.sampling import renoise, sample, time_grid
from inverse.sde import VE, VP, SubVP
from phantoms.benchmarks.calibration import (
    DRAWS,
    SETTINGS,
    TOYS,
    Row,
    Toy,
    _Draws,
    binomial,
    calibration,
    dense,
    field,
    held,
    interval,
    markdown,
    measure,
    measure_field,
    mixture,
    moments,
    one_dimensional,
    run,
    two_dimensional,
    variation,
)


def posterior_draws(toy: Toy, data: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """``count`` draws of the exact posterior of each of ``data``."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for y in data:
        weights, parts = Toy(toy.name, toy.prior, toy.operator, toy.noise, y[None]).exact
        which = torch.multinomial(weights, count, replacement=True, generator=generator)
        draws = torch.stack([p.sample(count, generator) for p in parts])
        out.append(draws[which, torch.arange(count)])
    return torch.cat(out)


# --- the instruments: what they show of exact draws, and of draws that are wrong


@pytest.mark.parametrize("toy", TOYS, ids=lambda t: t.__name__)
def test_exact_draws_pass_every_measure(toy) -> None:
    problem = toy()
    shown = moments(problem, posterior_draws(problem, problem.data, 20000, 0))
    assert shown["mean_error"] < 0.02
    assert shown["sd_ratio"] == pytest.approx(1.0, abs=0.015)
    assert shown["kl"] is None or shown["kl"] < 6e-4  # d (d + 3) / 4N is its mean
    if shown["modes"] is not None:
        assert shown["modes"][0] == pytest.approx(shown["modes"][1], abs=0.01)
    truth, data = problem.simulate(400, 1)
    over = calibration(problem, truth, data, posterior_draws(problem, data, DRAWS, 2))
    assert over["sbc_p"] > 0.01
    assert over["chi2"] == pytest.approx(1.0, abs=0.12)
    for level, share in over["coverage"].items():
        se = math.sqrt(level / 100 * (1 - level / 100) / 400)
        assert share == pytest.approx(level / 100, abs=3.5 * se)


def test_draws_of_the_prior_and_overconfident_draws_are_caught() -> None:
    toy = two_dimensional()
    truth, data = toy.simulate(400, 1)
    prior = toy.prior.sample(400 * DRAWS, torch.Generator().manual_seed(3)).flatten(1).double()
    ignorant = calibration(toy, truth, data, prior)
    assert ignorant["sbc_p"] < 1e-6  # by the rank of the likelihood: the marginals are right
    assert ignorant["chi2"] > 5
    exact = posterior_draws(toy, data, DRAWS, 2).reshape(400, DRAWS, 2)
    narrow = exact.mean(dim=1, keepdim=True) + 0.7 * (exact - exact.mean(dim=1, keepdim=True))
    shown = calibration(toy, truth, data, narrow.reshape(-1, 2))
    assert shown["sbc_p"] < 1e-3
    assert shown["coverage"][80] < 0.7
    assert shown["coverage"][95] < 0.9


def test_coverage_of_exact_draws_varies_as_stated() -> None:
    """Of independent draws as a binomial; of a field's correlated pixels by a good deal more."""
    assert binomial(0.5, 96) == pytest.approx(0.1, abs=1e-4)
    fixture, samples = field("ct", 8, 4), 16
    half = variation(fixture, samples, (50, 90), repeats=200)
    again = variation(fixture, samples, (50, 90), repeats=200, seed=1)
    for level, h in half.items():
        assert h > 1.2 * binomial(level / 100, 4 * 64)
        assert again[level] == pytest.approx(h, rel=0.25)
    # another seed's truths and draws lie within twice that of the level
    factor = torch.linalg.cholesky(fixture.exact[0].covariance)
    z = torch.randn(17, 4, 64, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    truth, *draws = z @ factor.T
    x = torch.stack(draws)
    for level, share in held(truth, x.mean(dim=0), x.std(dim=0), samples, (50, 90)).items():
        assert share == pytest.approx(level / 100, abs=2 * half[level])


def test_the_table_says_how_many_draws_and_what_exact_ones_vary_by() -> None:
    row = Row("2-D mixture", "mmps", 100, 20000, 0.026, 0.982, None, None, (0.421, 0.407), 320,
              {50: 0.512}, {50: binomial(0.5, 320)}, 1.0, 1.22, 18.3)  # fmt: skip
    header, rule, line = markdown([row]).splitlines()
    cells = dict(
        zip(*([c.strip() for c in x.split("|")[1:-1]] for x in (header, line)), strict=True)
    )
    assert len(rule.split("|")) == len(header.split("|"))
    assert (cells["n"], cells["pairs"], cells["network calls"]) == ("20000", "320", "100")
    assert "| 0.421 (0.407) | 0.007 | 320 | 50: 51.2 | 5.5 |" in line


def test_the_interval_of_sixteen_samples_holds_the_truth_as_often_as_it_says() -> None:
    draws = torch.randn(17, 200000, generator=torch.Generator().manual_seed(0))
    samples, truth = draws[:16], draws[16]
    for level in (0.5, 0.9):
        low, high = interval(samples.mean(dim=0), samples.std(dim=0), 16, level)
        covered = ((truth > low) & (truth < high)).double().mean()
        assert float(covered) == pytest.approx(level, abs=0.004)


def test_posteriors_of_the_fixtures_are_the_published_ones() -> None:
    """METHODS section 4: .917, .734; .287, .643; .358 and 1.200/.447."""
    _, (two,) = two_dimensional().exact
    sd = two.covariance.diagonal().sqrt()
    assert two.mean.tolist() == pytest.approx([0.917, 0.734], abs=5e-4)
    assert sd.tolist() == pytest.approx([0.287, 0.643], abs=5e-4)
    assert float(two.covariance[0, 1] / sd.prod()) == pytest.approx(0.358, abs=5e-4)
    _, (one,) = one_dimensional().exact
    assert float(one.mean) == pytest.approx(1.2)
    assert float(one.covariance) == pytest.approx(0.2)
    # mode weights by Bayes' rule in the one coordinate that is seen
    toy = mixture()
    evidence = [
        w * math.exp(-((-0.2 - m) ** 2) / (2 * (v + 1))) / math.sqrt(v + 1)
        for w, m, v in ((0.3, -1.5, 0.4), (0.7, 1.5, 0.3))
    ]
    assert toy.exact[0].tolist() == pytest.approx([e / sum(evidence) for e in evidence], rel=1e-5)


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_posterior_of_a_field_is_that_of_its_normal_equations(kind: str) -> None:
    fixture = field(kind, 8, 2, seed=3)
    matrix = dense(fixture.measurement.operator) if kind == "ct" else None
    noise = float(fixture.measurement.noise)
    for k, exact in enumerate(fixture.exact):
        if matrix is not None:
            information = matrix.T @ matrix
            back = matrix.T @ fixture.measurement.data[k].flatten().double()
        else:  # Re F^H M F, column by column
            operator = fixture.measurement.operator
            eye = torch.eye(64).reshape(64, 8, 8).to(torch.complex64)
            information = operator.adjoint(operator(eye)).real.reshape(64, 64).double()
            back = operator.adjoint(fixture.measurement.data[k]).real.flatten().double()
        precision = torch.linalg.inv(fixture.prior.covariance_matrix) + information / noise**2
        mean = torch.linalg.solve(precision, back / noise**2)
        torch.testing.assert_close(exact.mean, mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            exact.covariance, torch.linalg.inv(precision), rtol=1e-3, atol=1e-3
        )


# --- published values of METHODS section 4 on the two-dimensional Gaussian, 20 000 samples


class White(GaussianPrior):
    """The Gaussian prior with the paper's r^2 = sigma^2 / (1 + sigma^2)."""

    def error(self, noise_level: float | torch.Tensor) -> torch.Tensor:
        return Denoiser.error(self, noise_level)


PUBLISHED = {
    "dps": ((0.999, 0.961), (0.211, 0.562), 0.115, 0.17),
    "diffpir": ((0.912, 0.692), (0.199, 0.459), 0.377, 0.20),
    "pigdm": ((0.897, 0.707), (0.305, 0.665), 0.393, 0.007),
    "mmps": ((0.919, 0.733), (0.290, 0.642), 0.360, 1e-4),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_moments_are_reproduced(method: str) -> None:
    toy = two_dimensional()
    prior = White(0.0, toy.prior.covariance_matrix, (1, 2), toy.prior.sde)
    steps = {"dps": 1000, "pigdm": 300}.get(method, 100)
    count = 3000 if method == "dps" else 8000
    draws = run(prior, toy.measurement(), count, method, {"steps": steps})
    mean, sd, correlation, kl = PUBLISHED[method]
    shown = moments(toy, draws)
    assert draws.mean(dim=0).tolist() == pytest.approx(list(mean), abs=0.04)
    assert draws.std(dim=0).tolist() == pytest.approx(list(sd), abs=0.02)
    assert shown["correlation"][0] == pytest.approx(correlation, abs=0.04)
    assert shown["kl"] == pytest.approx(kl, rel=0.2, abs=3e-3)


def test_published_dds_and_ddnm_lie_between_ours_of_100_and_1000_steps() -> None:
    """DDNM 1.000, .755; 0, .532 and DDS with gamma 5 1.000, .740; .001, .534, of 100 steps.

    The schedule is not stated and decides the unseen coordinate (noise-free truth .8, .6), as the
    share of fresh noise is one a step.
    """
    toy, n = two_dimensional(VE(0.01, 50.0)), 1500
    hard = Measurement(toy.operator, toy.data, torch.tensor(1e-4), "MR", (1.0, 1.0))

    class Constant(Proximal):
        def radius(self, t: float | torch.Tensor) -> torch.Tensor:
            return torch.tensor(0.3 * math.sqrt(5.0), dtype=torch.float64)

    def dds(steps: int) -> torch.Tensor:
        seen = toy.measurement().take(torch.zeros(n, dtype=torch.long))
        guided = Constant(toy.prior, seen, iterations=5)
        times = time_grid(toy.prior.sde, steps)
        return sample(guided, times, renoise(0.85), _Draws(n, (1, 2), 0)).flatten(1)

    def ddnm(steps: int) -> torch.Tensor:
        return run(toy.prior, hard, n, "ddnm", {"steps": steps})

    for method, published in ((ddnm, 0.755), (dds, 0.740)):
        few, many = method(100), method(1000)
        assert float(few[:, 1].mean()) < published < float(many[:, 1].mean())
        for draws in (few, many):
            assert float(draws[:, 0].mean()) == pytest.approx(1.0, abs=2e-3)
            assert float(draws[:, 0].std()) < 0.02
            assert float(draws[:, 1].std()) == pytest.approx(0.55, abs=0.05)


# --- classes


@pytest.mark.parametrize("sde", [VE(0.005, 50.0), VP(), SubVP()], ids=lambda s: type(s).__name__)
def test_mmps_is_exact_for_gaussians_in_a_hundred_calls(sde) -> None:
    """Better than the KL of 0.0005 to 0.0014 that MomentMatching of deepinv has with 500."""
    toy = two_dimensional(sde)
    shown = moments(toy, run(toy.prior, toy.measurement(), 16000, "mmps", {}, seed=1))
    assert METHODS["mmps"].options["steps"] == 100
    assert shown["kl"] < 4e-4  # 1.6e-4 is the Monte-Carlo mean of 16 000 samples
    assert shown["mean_error"] < 0.02


@pytest.mark.parametrize("toy", [two_dimensional, one_dimensional], ids=lambda t: t.__name__)
def test_mmps_is_calibrated_on_gaussians(toy) -> None:
    row = measure(toy(), "mmps", count=500, simulations=200)
    assert row.calls == 100
    assert row.sbc_p > 0.01
    assert row.chi2 == pytest.approx(1.0, abs=0.15)
    for level, share in row.coverage.items():
        se = math.sqrt(level / 100 * (1 - level / 100) / 200)
        assert share == pytest.approx(level / 100, abs=4 * se)


# Mean error and sd ratio of 20 000 samples (song: fewer).  A change beyond 10 %, or beyond the
# Monte-Carlo error of 4000, is a change of the method and has to be looked at.
RECORDED = {
    ("two_dimensional", "pigdm"): (0.009, 0.954),
    ("two_dimensional", "diffpir"): (0.043, 0.695),
    ("two_dimensional", "ddnm"): (0.072, 0.718),
    ("two_dimensional", "dds"): (0.238, 0.517),
    ("two_dimensional", "dds, weight 1"): (0.225, 0.908),
    ("two_dimensional", "song"): (0.280, 0.535),
    ("two_dimensional", "pnp_admm"): (0.209, 0.065),
    ("two_dimensional", "daps"): (0.043, 1.012),
    ("two_dimensional", "mcg"): (0.173, 0.663),
    ("two_dimensional", "score_mri"): (0.265, 0.528),
    ("two_dimensional", "red_diff"): (0.219, 0.243),
    ("one_dimensional", "pigdm"): (0.002, 0.963),
    ("one_dimensional", "dps"): (0.599, 0.788),
    ("one_dimensional", "diffpir"): (0.017, 0.690),
    ("one_dimensional", "ddnm"): (0.170, 0.472),
    ("one_dimensional", "dds"): (0.647, 0.155),
    ("one_dimensional", "dds, weight 1"): (0.002, 0.845),
    ("mixture", "mmps"): (0.026, 0.982),
    ("mixture", "pigdm"): (0.120, 0.975),
    ("mixture", "diffpir"): (0.181, 0.900),
    ("mixture", "ddnm"): (0.091, 0.803),
    ("mixture", "dds"): (0.214, 0.560),
    ("mixture", "dds, weight 1"): (0.155, 0.901),
}


@pytest.mark.parametrize(("problem", "label"), RECORDED)
def test_biases_are_the_recorded_ones(problem: str, label: str) -> None:
    toy = next(make for make in TOYS if make.__name__ == problem)()
    method, options = SETTINGS[label]
    count = {"pnp_admm": 500, "song": 1000, "score_mri": 1000, "mcg": 1000, "dps": 2000}.get(
        label, 4000
    )
    shown = moments(toy, run(toy.prior, toy.measurement(), count, method, options, seed=4))
    mean_error, sd_ratio = RECORDED[problem, label]
    assert shown["mean_error"] == pytest.approx(mean_error, rel=0.1, abs=0.035)
    assert shown["sd_ratio"] == pytest.approx(sd_ratio, rel=0.1)
    assert METHODS[method].exactness == "biased" or label == "mmps"
    if label == "song" and problem == "two_dimensional":
        assert shown["kl"] == math.inf  # no spread where the data are: it fits their noise


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_ninety_per_cent_intervals_of_sixteen_mmps_samples_hold_ninety_per_cent(kind: str) -> None:
    fixture = field(kind, 16, 4)
    row = measure_field(fixture, "mmps")
    assert row.calls == 100
    assert 0.88 < row.coverage[90] < 0.92
    assert row.sd_ratio == pytest.approx(1.0, abs=0.03)
    assert row.chi2 == pytest.approx(1.0, abs=0.15)
    # the mean of 16 samples errs by 1/4 of the spread
    assert row.mean_error < 0.33
    some = {"method": "mmps", "samples": 2, "steps": 10, "phase": "zero"}
    one = reconstruct(fixture.measurement, fixture.prior, batch=1, **some)
    eight = reconstruct(fixture.measurement, fixture.prior, batch=8, **some)
    torch.testing.assert_close(one.samples, eight.samples, rtol=0.0, atol=1e-5)
    assert one.nfe == eight.nfe == 10
