"""The probability-flow ODE: latents, likelihoods and their errors, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.errors import GeometryError, NumericalError, ReconError, UnsupportedError
from inverse.priors import (
    Denoiser,
    GaussianPrior,
    MixturePrior,
    NetworkConfig,
    NetworkPrior,
    PriorCard,
    UNet,
)
from inverse.sampling import (
    RK45,
    Heun,
    Noise,
    bits_per_dim,
    decode,
    dequantise,
    encode,
    log_likelihood,
    slerp,
)
from inverse.sde import SDE, VE, VP, SubVP

SDES = [VE(0.01, 50.0), VP(), SubVP()]
LOG_2PI = math.log(2 * math.pi)


def mixture(sde: SDE) -> MixturePrior:
    """Toy G: 0.3 N(-2, 0.25) + 0.7 N(2, 0.25)."""
    return MixturePrior(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([[-2.0], [2.0]]),
        torch.full((2, 1, 1), 0.25),
        (1,),
        sde,
    )


def log_g(x: torch.Tensor) -> torch.Tensor:
    """``log p`` of G, written anew."""
    parts = [
        math.log(w / 0.5) - 0.5 * ((x[:, 0] - m) / 0.5) ** 2 for w, m in ((0.3, -2), (0.7, 2))
    ]
    return torch.logaddexp(*parts) - 0.5 * LOG_2PI


def correlated(sde: SDE, d: int = 8) -> GaussianPrior:
    i = torch.arange(d, dtype=torch.float64)
    covariance = torch.exp(-(i[:, None] - i).abs() / 3) + 0.1 * torch.eye(d)
    return GaussianPrior(0.4, covariance, (d,), sde)


def log_normal(prior: GaussianPrior, x: torch.Tensor, t: float) -> torch.Tensor:
    """``log p_t`` of a Gaussian prior."""
    alpha, sigma = (float(c) for c in prior.sde.marginal(t))
    d = len(prior.mean)
    covariance = alpha**2 * prior.covariance_matrix + sigma**2 * torch.eye(d, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(alpha * prior.mean, covariance).log_prob(x)


# --- latents -----------------------------------------------------------------------------------


def test_the_flow_of_a_gaussian_under_ve_is_a_scaling() -> None:
    """x_0 = x_T sqrt((v + s_min^2) / (v + s_max^2))."""
    sde, v = VE(0.01, 50.0), 0.49
    prior = GaussianPrior(0.0, v * torch.eye(3, dtype=torch.float64), (3,), sde)
    z = 50 * torch.randn(5, 3, dtype=torch.float64)
    low, high = float(sde.sigma(sde.t_min)), 50.0
    expected = z * math.sqrt((v + low**2) / (v + high**2))
    x = decode(prior, z, solver=RK45(1e-7, 1e-7))
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encode(prior, x, solver=RK45(1e-7, 1e-7)), z, rtol=1e-5, atol=1e-4)
    # the Tweedie step takes out the noise of t_min
    clean = decode(prior, z, solver=RK45(1e-7, 1e-7), tweedie=True)
    torch.testing.assert_close(clean, expected * v / (v + low**2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_the_flow_obeys_the_papers_equation(sde: SDE) -> None:
    """dx/dt = f x - g^2 score / 2, by finite differences of the solution in t."""
    prior = mixture(sde)
    start = torch.tensor([[-1.1], [0.4], [2.3]], dtype=torch.float64) * float(sde.sigma(0.7))
    t, dt = 0.4, 2e-3

    def at(time: float) -> torch.Tensor:
        levels = float(sde.noise_level(0.7)), float(sde.noise_level(time))
        return decode(prior, start, solver=Heun(300), levels=levels)

    middle, slope = at(t), (at(t + dt) - at(t - dt)) / (2 * dt)
    f, g = float(sde.f(t)), float(sde.diffusion(t))
    expected = f * middle - 0.5 * g**2 * prior.score(middle, t)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_encode_and_decode_are_inverse_to_the_tolerance(sde: SDE) -> None:
    prior = mixture(sde)
    x = torch.tensor([-2.8, -2.0, -1.5, 1.5, 2.5], dtype=torch.float64)[:, None]
    errors = []
    for tolerance in (1e-4, 1e-6):
        solver = RK45(tolerance, tolerance)
        back = decode(prior, encode(prior, x, solver=solver), solver=solver)
        errors.append(float((back - x).abs().max()))
        # the errors of some steps add up and are stretched (600-fold between the modes, left out)
        assert errors[-1] < 50 * tolerance
    assert errors[1] < errors[0] / 20


def test_latents_of_the_priors_images_are_normal() -> None:
    sde = VE(0.01, 50.0)
    prior = correlated(sde, 4)
    x = prior.sample(500, torch.Generator().manual_seed(0))
    z = encode(prior, x, solver=RK45(1e-4, 1e-4)) / 50
    assert z.dtype == torch.float32
    assert float(z.mean()) == pytest.approx(0.4 / 50, abs=0.1)
    covariance = torch.cov(z.double().T)
    torch.testing.assert_close(
        covariance, torch.eye(4, dtype=torch.float64), rtol=0, atol=4 * math.sqrt(2 / 500)
    )


# --- likelihood --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sde", "mismatch"),
    [(VE(0.01, 50.0), 0.054), (VP(), 0.017), (SubVP(), 0.017), (VE(0.01, 5.0), 1.04)],
    ids=str,
)
def test_the_error_of_the_mixtures_likelihood_is_prior_mismatch(sde: SDE, mismatch) -> None:
    """Three errors, told apart: the prior of x_T, the solver, and nothing else."""
    prior = mixture(sde)
    x = torch.linspace(-3.5, 3.5, 15, dtype=torch.float64)[:, None]

    usual, fine = (
        log_likelihood(prior, x, divergence="exact", solver=RK45(tolerance, tolerance))
        for tolerance in (1e-5, 1e-7)
    )
    assert not fine.standard_error.any()
    error = float((fine.nats - log_g(x)).abs().max())
    assert error == pytest.approx(mismatch, rel=0.05)
    # unchanged by the solver
    assert float((usual.nats - fine.nats).abs().max()) < 5e-4
    # nothing is left with the true density of x_T, against p at t_min, which the flow speaks of
    torch.testing.assert_close(fine.nats, fine.log_prior + fine.volume)
    true = prior.log_density(fine.latent, 1.0) + fine.volume
    torch.testing.assert_close(true, prior.log_density(x, sde.t_min), rtol=0, atol=2e-5)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_likelihood_of_a_correlated_gaussian(sde: SDE) -> None:
    """With the true density of x_T the exact trace gives log p at t_min."""
    prior = correlated(sde)
    x = prior.sample(3, torch.Generator().manual_seed(1)).double()
    result = log_likelihood(
        prior, x, divergence="exact", log_prior=lambda z: log_normal(prior, z, 1.0),
        solver=RK45(1e-7, 1e-7),
    )  # fmt: skip
    truth = log_normal(prior, x, sde.t_min)
    torch.testing.assert_close(result.nats, truth, rtol=0, atol=1e-4)


def test_heuns_likelihood_converges_with_order_two() -> None:
    prior = correlated(VE(0.01, 50.0))
    x = prior.sample(2, torch.Generator().manual_seed(1)).double()
    truth = log_normal(prior, x, prior.sde.t_min)

    def error(n: int) -> float:
        result = log_likelihood(
            prior, x, divergence="exact", solver=Heun(n),
            log_prior=lambda z: log_normal(prior, z, 1.0),
        )  # fmt: skip
        assert result.evaluations.tolist() == [2 * n + 1] * 2
        return float((result.nats - truth).abs().max())

    assert math.log2(error(40) / error(80)) == pytest.approx(2.0, abs=0.3)
    assert error(80) < 0.05


def test_rademacher_probes_are_exact_on_a_diagonal_jacobian() -> None:
    variances = torch.linspace(0.2, 3.0, 12, dtype=torch.float64)
    prior = GaussianPrior(0.0, torch.diag(variances), (3, 4), VE(0.01, 50.0))
    x = prior.sample(2, torch.Generator().manual_seed(1)).double()
    noise = [Noise([(k, 0), (k, 1)], (3, 4)) for k in range(2)]
    solver = Heun(10)
    exact = log_likelihood(prior, x, divergence="exact", solver=solver)
    rademacher = log_likelihood(prior, x, noise[0], probes=4, solver=solver)
    torch.testing.assert_close(rademacher.nats, exact.nats)
    assert float(rademacher.standard_error.max()) < 1e-9
    gaussian = log_likelihood(prior, x, noise[1], probes=4, divergence="gaussian", solver=solver)
    assert float(gaussian.standard_error.min()) > 0.1


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_is_unbiased(kind: str) -> None:
    """Within three standard errors of the exact trace, and the standard error is honest."""
    prior = correlated(VE(0.01, 50.0))
    x = prior.sample(1, torch.Generator().manual_seed(1)).double().expand(40, 8)
    solver = Heun(12)
    exact = log_likelihood(prior, x[:1], divergence="exact", solver=solver).nats
    noise = Noise([(5, k) for k in range(40)], (8,))
    many = log_likelihood(prior, x, noise, divergence=kind, probes=25, solver=solver)
    errors = many.nats - exact
    assert abs(float(errors.mean())) < 3 * float(errors.std()) / math.sqrt(40)
    assert float(many.standard_error.mean()) == pytest.approx(float(errors.std()), rel=0.35)
    assert float(many.standard_error.min()) > 0
    one = log_likelihood(prior, x[:1], Noise([(5, 0)], (8,)), divergence=kind, solver=solver)
    assert one.standard_error is None


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    """Each has its own steps, probes and error control."""
    prior = mixture(VE(0.01, 50.0))
    x = torch.tensor([[0.0], [2.0], [30.0]], dtype=torch.float64)
    noise = [Noise([(1, k) for k in ks], (1,)) for ks in ((0, 1, 2), (1,))]
    together = log_likelihood(prior, x, noise[0], divergence="gaussian")
    alone = log_likelihood(prior, x[1:2], noise[1], divergence="gaussian")
    assert len(set(together.evaluations.tolist())) > 1
    assert int(together.evaluations[1]) == int(alone.evaluations)
    torch.testing.assert_close(together.nats[1:2], alone.nats, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.latent[1:2], alone.latent, rtol=1e-12, atol=1e-12)


def test_rk45_has_order_five() -> None:
    """The error follows the tolerance; the cost grows with its fifth root."""
    sde = VE(0.01, 50.0)
    prior = GaussianPrior(0.0, torch.eye(1, dtype=torch.float64), (1,), sde)
    x = torch.ones(1, 1, dtype=torch.float64)
    calls, errors = [], []
    for tolerance in (1e-6, 1e-10):
        result = log_likelihood(
            prior, x, divergence="exact", solver=RK45(tolerance, tolerance),
            log_prior=lambda z: log_normal(prior, z, 1.0),
        )  # fmt: skip
        calls.append(int(result.evaluations))
        errors.append(float((result.nats - log_normal(prior, x, sde.t_min)).abs()))
    assert errors[0] < 1e-5
    assert errors[1] < 1e-9
    assert math.log(calls[1] / calls[0]) / math.log(1e4) == pytest.approx(1 / 5, abs=0.05)


# --- networks ----------------------------------------------------------------------------------


def network(dtype: torch.dtype | None = None) -> NetworkPrior:
    torch.manual_seed(3)
    net = UNet(NetworkConfig(widths=(8, 8), patch=1))
    torch.nn.init.normal_(net.exit.weight, std=0.05)
    card = PriorCard("tiny", "CT", "HU", 0.0, 1.0, (-1, 1), (1, 2), (4, 4), (0.05, 10.0))
    return NetworkPrior(net, card, dtype=dtype)


def test_likelihood_of_a_network_under_inference_mode_and_bfloat16() -> None:
    """Jacobian products run in float32, whatever the caller's mode and the prior's dtype."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4)
    for solver in (Heun(6), RK45(1e-3, 1e-3)):
        plain = log_likelihood(network(torch.float32), x, divergence="exact", solver=solver)
        with torch.inference_mode():
            prior = network(torch.bfloat16)
            inside = log_likelihood(
                prior, x.clone(), Noise([(0, 0), (0, 1)], (4, 4)), probes=3, solver=solver
            )
            z = encode(prior, x.clone(), solver=solver)
        assert prior.dtype == torch.bfloat16
        assert torch.isfinite(inside.nats).all()
        bound = 5 * inside.standard_error + 1e-3
        assert bool(((inside.nats - plain.nats).abs() < bound).all())
        if isinstance(solver, RK45):
            same = encode(network(torch.float32), x, solver=solver)
            torch.testing.assert_close(z, same, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_bundled_prior_prefers_images_to_their_shuffled_pixels() -> None:
    from inverse.priors import load_prior
    from phantoms.slices import chest_slices

    prior = load_prior("ct-small").at(pixel_mm=1.5)
    image = torch.from_numpy(chest_slices([7], each=1).images[0])[96:160, 64:128]
    order = torch.randperm(image.numel(), generator=torch.Generator().manual_seed(0))
    shuffled = image.flatten()[order].reshape(image.shape)
    x = dequantise(torch.stack([image, shuffled]), 1.0, Noise([(0,), (1,)], image.shape))
    noise = Noise([(2,), (3,)], image.shape)
    x = (x - prior.offset) / prior.scale
    result = log_likelihood(prior, x, noise, solver=Heun(12))
    bits = bits_per_dim(result.nats, image.numel(), bin_width=1.0, scale=prior.scale)
    assert torch.isfinite(bits).all()
    assert 1 < float(bits[0]) < 8
    assert float(bits[1]) > float(bits[0]) + 1


# --- bits, quantisation, interpolation ---------------------------------------------------------


def test_a_uniform_density_on_256_levels_is_eight_bits() -> None:
    nats = torch.zeros(3, dtype=torch.float64)
    assert bits_per_dim(nats, 10).tolist() == [8.0] * 3
    # the same images in other units: 256 levels from -1024 to 1024 HU under a prior on [-1, 1]
    wide = torch.full((1,), -10 * math.log(2), dtype=torch.float64)
    assert float(bits_per_dim(wide, 10, bin_width=8.0, scale=1024.0)) == pytest.approx(8.0)
    # +7 for data in [-1, 1]
    assert float(bits_per_dim(nats, 10, bin_width=2 / 256)[0]) == pytest.approx(7.0)
    for bad in ({"bin_width": 0.0}, {"scale": -1.0}):
        with pytest.raises(ReconError, match="above 0"):
            bits_per_dim(nats, 10, **bad)


def test_bits_of_a_wide_normal_are_its_entropy() -> None:
    """Dequantised integers of a normal much wider than a bin: h(x) / ln 2 bits each."""
    sde, v, d = VE(0.01, 200.0), 400.0, 64
    prior = GaussianPrior(0.0, v * torch.eye(d, dtype=torch.float64), (d,), sde)
    x = prior.sample(20, torch.Generator().manual_seed(0)).round().double()
    x = dequantise(x, 1.0, Noise([(k,) for k in range(20)], (d,)))
    result = log_likelihood(
        prior, x, divergence="exact", solver=RK45(1e-4, 1e-4),
        log_prior=lambda z: log_normal(prior, z, 1.0),
    )  # fmt: skip
    bits = bits_per_dim(result.nats, d, bin_width=1.0)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * v)
    assert float(bits.mean()) == pytest.approx(entropy, abs=0.07)


def test_dequantisation_is_uniform_over_the_bin() -> None:
    x = torch.full((2, 20_000), 3.0)
    noise = Noise([(0,), (1,)], (20_000,))
    u = dequantise(x, 0.5, noise) - 3
    assert float(u.abs().max()) <= 0.25
    assert float(u.mean()) == pytest.approx(0.0, abs=0.003)
    assert float(u.std()) == pytest.approx(0.5 / math.sqrt(12), rel=0.01)
    alone = dequantise(x[1:], 0.5, Noise([(1,)], (20_000,))) - 3
    assert torch.equal(alone[0], u[1])


def test_slerp_keeps_ends_norm_and_angle() -> None:
    z0, z1 = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    z1 = z1 * (z0.flatten(1).norm(dim=1) / z1.flatten(1).norm(dim=1))[:, None, None]
    torch.testing.assert_close(slerp(z0, z1, 0.0), z0)
    torch.testing.assert_close(slerp(z0, z1, 1.0), z1)
    weights = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    between = slerp(z0, z1, weights).flatten(1)
    torch.testing.assert_close(between.norm(dim=1), z0.flatten(1).norm(dim=1))

    def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.acos((a * b).sum(dim=1) / a.norm(dim=1) / b.norm(dim=1))

    whole = angle(z0.flatten(1), z1.flatten(1))
    torch.testing.assert_close(angle(z0.flatten(1), between), weights * whole)
    torch.testing.assert_close(slerp(z0, z0, 0.4), z0)
    with pytest.raises(NumericalError, match="opposite"):
        slerp(z0, -z0, 0.5)
    with pytest.raises(NumericalError, match="opposite or zero"):
        slerp(z0, 0 * z0, 0.5)
    with pytest.raises(GeometryError, match="one shape"):
        slerp(z0, z1[:2], 0.5)


# --- bad input ---------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    prior = mixture(VE(0.01, 50.0))
    x = torch.zeros(2, 1, dtype=torch.float64)
    for call in (encode, decode, lambda p, v: log_likelihood(p, v, divergence="exact")):
        with pytest.raises(GeometryError, match="batch axis"):
            call(prior, torch.zeros(3))
        with pytest.raises(NumericalError, match="not finite"):
            call(prior, torch.full((1, 1), math.nan))
    with pytest.raises(ReconError, match="no noise"):
        log_likelihood(prior, x)
    with pytest.raises(ReconError, match="at least 1 probe"):
        log_likelihood(prior, x, Noise([(0,), (1,)], (1,)), probes=0)
    with pytest.raises(ReconError, match="divergence is"):
        log_likelihood(prior, x, divergence="skilling")
    with pytest.raises(GeometryError, match="do not fit"):
        log_likelihood(prior, x, Noise([(0,), (1,)], (2,)))
    with pytest.raises(UnsupportedError, match="rademacher"):
        log_likelihood(prior, torch.zeros(1, 70, 70), divergence="exact")
    with pytest.raises(NumericalError, match="tolerances above 0"):
        RK45(atol=0.0)
    with pytest.raises(ReconError, match="at least 1 step"):
        encode(prior, x, solver=Heun(0))
    with pytest.raises(NumericalError, match="above 0 and fall"):
        decode(prior, x, levels=(1.0, 0.0))
    with pytest.raises(NumericalError, match="raise the tolerances"):
        encode(prior, x, solver=RK45(1e-9, 1e-9, max_steps=5))


@pytest.mark.parametrize("solver", [Heun(4), RK45()], ids=["heun", "rk45"])
def test_a_flow_that_is_not_finite_is_an_error(solver: RK45 | Heun) -> None:
    class Broken(Denoiser):
        def denoise(self, x_t, t):
            return x_t * torch.where(torch.as_tensor(t) > 0.5, math.nan, 0.5).to(x_t)

    with pytest.raises(NumericalError, match="finite"):
        encode(Broken(VE(0.01, 50.0)), torch.ones(1, 1), solver=solver)
