"""Methods that act on the iterate: projections, annealed Langevin, manifold constraints."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from affine import (
    CountingPrior,
    Run,
    check_batch,
    check_calls,
    dense,
    field,
    law,
    operator,
    parts,
    plane,
    plane_posterior,
    problem,
)

from inverse.errors import NumericalError, ReconError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.mri import CartesianMRI, centred_fft, centred_ifft
from inverse.posterior.projection import ald, mcg, pocs, score_mri
from inverse.priors.denoiser import Denoiser
from inverse.sde import VE, VP, SubVP

RUNS: dict[str, tuple[Run, int]] = {
    "score_mri": (partial(score_mri, steps=12), 23),
    "ald": (partial(ald, steps=8, inner=2), 17),
    "mcg": (partial(mcg, steps=12), 23),
}


def test_pocs_replaces_what_was_measured_and_keeps_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.complex64)
    mask = torch.rand(8, 8, generator=generator) < 0.4
    data = torch.where(mask, centred_fft(y), 0)
    measurement = Measurement(CartesianMRI(mask), data, torch.tensor(0.1), "MR", (1.0, 1.0))
    sde, t = VP(), torch.tensor(0.3)
    got = pocs(measurement, sde)(x, t)
    replaced = torch.where(mask, float(sde.alpha(t)) * data, centred_fft(x))
    torch.testing.assert_close(got, centred_ifft(replaced), rtol=1e-4, atol=1e-5)


def test_pocs_finds_the_nearest_image_that_fits_a_general_operator() -> None:
    op, noise = operator("ct", 8)
    generator = torch.Generator().manual_seed(0)
    x, truth = torch.randn(2, 1, 8, 8, generator=generator)
    y = op(truth)
    measurement = Measurement(op, y, torch.tensor(noise), "MR", (1.0, 1.0))
    project = pocs(measurement, VE(), iterations=300, tol=1e-7)
    got = project(x, torch.tensor(0.5))
    a = dense(op).double()
    r = (y - op(x)).flatten().double()
    nearest = x.flatten().double() + torch.linalg.pinv(a, rtol=1e-6) @ r
    torch.testing.assert_close(got.flatten().double(), nearest, rtol=0, atol=2e-2)
    half = pocs(measurement, VE(), lam=0.5, iterations=300, tol=1e-7)(x, torch.tensor(0.5))
    rho = op.norm() ** 2
    exact = torch.linalg.solve(
        a.T @ a + rho * torch.eye(64), a.T @ y.flatten().double() + rho * x.flatten().double()
    )
    torch.testing.assert_close(half.flatten().double(), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(ReconError, match="lambda must lie in"):
        pocs(measurement, VE(), lam=1.5)


def test_score_mri_ends_on_the_data_and_approaches_their_noise_free_posterior() -> None:
    """x_1 = 1 is kept; x_2 | x_1 has mean .8 and sd .6, which more corrections approach."""
    prior, measurement = plane()
    laws = [law(partial(score_mri, steps=200, snr=snr), prior, measurement) for snr in (0.0, 0.4)]
    for mean, covariance in laws:
        assert float(mean[0]) == pytest.approx(1.0, abs=1e-5)
        assert float(covariance[0, 0]) < 1e-8
    assert abs(float(laws[1][0][1]) - 0.8) < 0.5 * abs(float(laws[0][0][1]) - 0.8)
    assert float(laws[1][1][1, 1]) ** 0.5 == pytest.approx(0.6, rel=0.08)


def test_ald_approaches_the_posterior() -> None:
    exact = plane_posterior()
    coarse, fine = (exact.kl(*law(partial(ald, steps=n), *plane())) for n in (100, 300))
    assert coarse < 0.05
    assert fine < 0.006
    assert fine < 0.4 * coarse


def test_ald_is_stable_for_every_noise_and_operator() -> None:
    """Noise far below and above the level of the iterate, an operator of norm 10, noise maps."""
    prior, measurement, _ = field("ct", side=8)
    spread = 10 ** torch.linspace(-3, 2, measurement.operator.out_shape[-1])
    noisy = replace(measurement, noise=spread.expand(measurement.data.shape))
    with torch.inference_mode():
        x = ald(problem(prior, noisy, 4), steps=60)
    assert float(x.abs().max()) < 10


def test_vjp_is_that_of_the_dense_jacobian_inside_inference_mode() -> None:
    prior, _, _ = field("ct", side=4)
    v = torch.randn(2, 4, 4)
    t = prior.sde.time(0.6)
    with torch.inference_mode():
        x = torch.randn(2, 4, 4)
        x0, pull_back = prior.linearise(x, t)
        product = pull_back(v)
        expected = prior.denoise(x, t)
    torch.testing.assert_close(x0, expected)
    lam, basis = prior.eigenvalues, prior.basis
    jacobian = basis @ torch.diag(lam / (lam + 0.36)) @ basis.T
    torch.testing.assert_close(
        product.flatten(1).double(), v.flatten(1).double() @ jacobian, rtol=1e-4, atol=1e-5
    )


def test_mcg_bias_is_the_recorded_one_and_its_gradient_helps() -> None:
    """Projection of data taken as noise-free: overconfident in x_1; the gradient mends x_2."""
    prior, measurement = plane()
    mean, covariance = law(partial(mcg, steps=200), prior, measurement)
    sd = covariance.diagonal().sqrt()
    assert [*mean.tolist(), *sd.tolist()] == pytest.approx([0.986, 0.696, 0.090, 0.648], rel=0.05)
    without, _ = law(partial(mcg, steps=200, zeta=0.0), prior, measurement)
    exact = plane_posterior().mean
    assert abs(float(mean[1] - exact[1])) < 0.5 * abs(float(without[1] - exact[1]))


@pytest.mark.parametrize("kind", ["ct", "mri"])
@pytest.mark.parametrize("name", RUNS)
def test_methods_use_the_data_of_every_operator(name: str, kind: str) -> None:
    """Nearly noise-free data: near the exact posterior mean, which the prior's mean is not."""
    prior, measurement, truth = field(kind, side=12)
    y = measurement.operator(truth)
    measurement = replace(measurement, data=y, noise=torch.tensor(0.02))
    run = partial({"ald": ald, "mcg": mcg, "score_mri": score_mri}[name], steps=60)
    with torch.inference_mode():
        x = run(problem(prior, measurement, 8)).flatten(1).mean(dim=0).double()
    rows = parts(y.flatten(1))[0]
    exact = prior.posterior(dense(measurement.operator), rows, 0.02).mean
    assert float((x - exact).norm()) < 0.25 * float(exact.norm())


@pytest.mark.parametrize("sde", [VP(), SubVP()], ids=repr)
@pytest.mark.parametrize("name", RUNS)
def test_methods_run_on_other_sdes(name: str, sde: VP | SubVP) -> None:
    prior, measurement = plane(sde=sde)
    run = partial({"ald": ald, "mcg": mcg, "score_mri": score_mri}[name], steps=100)
    mean, _ = law(run, prior, measurement)
    assert float(mean[0]) == pytest.approx(0.95, abs=0.08)
    assert 0.4 < float(mean[1]) < 0.9


@pytest.mark.parametrize("name", RUNS)
def test_network_calls_are_those_stated(name: str) -> None:
    check_calls(*RUNS[name])


@pytest.mark.parametrize("kind", ["ct", "mri"])
@pytest.mark.parametrize("name", RUNS)
def test_a_sample_does_not_depend_on_its_batch(name: str, kind: str) -> None:
    check_batch(RUNS[name][0], kind)


class Flat(Denoiser):
    """A prior whose image does not depend on its input."""

    def denoise(self, x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        return torch.zeros(x_t.shape)


class Exploding(CountingPrior):
    """A prior that blows up."""

    def denoise(self, x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        return 1e20 * super().denoise(x_t, t)


def test_failures_say_what_to_do() -> None:
    prior, measurement = plane()
    with pytest.raises(UnsupportedError, match="without a gradient"):
        mcg(problem(Flat(VE()), measurement, 1), steps=3)
    for run, _ in RUNS.values():
        with pytest.raises(NumericalError, match=r"diverged at step|left the finite numbers"):
            run(problem(Exploding(prior), measurement, 2))
