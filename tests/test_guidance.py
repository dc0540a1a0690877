"""Methods that act on the estimate: against dense algebra, closed forms and exact posteriors."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.errors import ReconError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.linop import ComplexFromChannels, ComplexFromReal, LinearOperator
from inverse.operators.mask import Mask
from inverse.operators.mri import CartesianMRI, cartesian_mask, centred_fft
from inverse.posterior import (
    DPS,
    METHODS,
    MMPS,
    PRESETS,
    HalfQuadratic,
    PiGDM,
    ddnm_plus,
    multistep,
)
from inverse.priors import (
    GaussianPrior,
    MixturePrior,
    NetworkConfig,
    NetworkPrior,
    PriorCard,
    UNet,
)
from inverse.priors.denoiser import Denoiser
from inverse.reconstruct import reconstruct
from inverse.sampling import ancestral, ddim, renoise, time_grid
from inverse.sde import SDE, VE, VP, SubVP
from phantoms.benchmarks.calibration import dense

N = 6
D = N * N
SDES = (VE(0.005, 50.0), VP(), SubVP())
LEVEL = 0.7


def covariance() -> torch.Tensor:
    i = torch.arange(N, dtype=torch.float64)
    one = torch.exp(-((i[:, None] - i[None, :]) ** 2) / 8)
    return torch.kron(one, one) + 0.02 * torch.eye(D, dtype=torch.float64)


def gaussian(sde: SDE) -> GaussianPrior:
    return GaussianPrior(0.3, covariance(), (N, N), sde)


def operators() -> dict[str, LinearOperator]:
    """Real images to real or complex data, with and without a closed form."""
    kept = cartesian_mask((N, N), 2.0, 0.3, "random1d")
    return {
        "ct": RayTransform(ParallelBeam.sparse(3, (N, N), 1.0), (N, N), 1.0),
        "mri": CartesianMRI(kept) @ ComplexFromReal((N, N)),
        "mask": Mask(torch.rand(N, N, generator=torch.Generator().manual_seed(1)) < 0.5),
    }


def measured(name: str, slices: int = 2, noise_map: bool = False) -> Measurement:
    """Data of a constant image and noise, with noise that varies between data if asked to."""
    operator = operators()[name]
    generator = torch.Generator().manual_seed(2)
    noise = torch.tensor(0.4)
    if noise_map:
        noise = 0.2 + torch.rand(slices, *operator.out_shape, generator=generator)
    clean = operator(torch.ones(slices, *operator.in_shape))
    draws = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
    return Measurement(operator, clean + 0.4 * draws, noise, "MR", (1.0, 1.0))


def real(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def states(sde: SDE, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    t = sde.time(LEVEL)
    x = torch.randn(count, N, N, generator=torch.Generator().manual_seed(3))
    return float(sde.alpha(t)) * (1 + LEVEL) * x, t


def jacobian(prior: Denoiser, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Dense ``dD/dx_t`` of one state, float64."""
    with torch.inference_mode(False):
        full = torch.autograd.functional.jacobian(lambda x: prior.denoise(x, t), x_t[None].clone())
    return full.reshape(D, D).double()


def whitened_matrix(measurement: Measurement, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``A / sigma_y`` and ``y / sigma_y`` of slice ``k`` as real dense arrays."""
    a = dense(measurement.operator)
    y = real(measurement.data[k]).flatten().double()
    noise = measurement.noise
    if noise.ndim:
        noise = noise[k]
        if measurement.data.is_complex():
            noise = noise[..., None].expand(*noise.shape, 2)
        noise = noise.flatten()
    noise = noise.double().expand(len(y))
    return a / noise[:, None], y / noise


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("name", "noise_map"), [("ct", 0), ("ct", 1), ("mri", 1), ("mask", 0)])
def test_mmps_is_the_posterior_mean_of_a_gaussian_prior(
    sde: SDE, name: str, noise_map: int
) -> None:
    """E[x_0 | x_t, y]: x_t is one more measurement, of all pixels with noise sigma / alpha."""
    prior, seen = gaussian(sde), measured(name, noise_map=bool(noise_map))
    x_t, t = states(sde)
    with torch.inference_mode():
        got = MMPS(prior, seen, iterations=100, tol=1e-7).denoise(x_t, t)
    for k in range(2):
        a, y = whitened_matrix(seen, k)
        both = torch.cat([a, torch.eye(D, dtype=torch.float64) / LEVEL])
        data = torch.cat([y, x_t[k].flatten().double() / float(sde.alpha(t)) / LEVEL])
        exact = prior.posterior(both, data, 1.0).mean
        torch.testing.assert_close(got[k].flatten().double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ct", "mri", "mask"])
def test_pigdm_and_dps_are_their_equations(name: str) -> None:
    """On a mixture, whose Jacobian depends on the state."""
    sde = VP()
    means = torch.stack([torch.full((D,), -1.0), torch.full((D,), 1.0)])
    prior = MixturePrior(
        torch.tensor([0.4, 0.6]), means, torch.stack([covariance()] * 2), (N, N), sde
    )
    seen = measured(name, noise_map=name == "ct")
    x_t, t = states(sde)
    times = time_grid(sde, 4000)
    t = times[int((times - t).abs().argmin())]
    alpha, sigma = (float(c) for c in sde.marginal(t))
    with torch.inference_mode():
        pigdm = PiGDM(prior, seen, times, iterations=100, tol=1e-7).denoise(x_t, t)
        dps = DPS(prior, seen, times).denoise(x_t, t)
    r2 = float(prior.error(sigma / alpha)) ** 2
    x0 = prior.denoise(x_t, t).flatten(1).double()
    for k in range(2):
        a, y = whitened_matrix(seen, k)
        v = sigma**2 / alpha * jacobian(prior, x_t[k], t)
        residual = y - a @ x0[k]
        inverse = torch.linalg.inv(r2 * a @ a.T + torch.eye(len(y), dtype=torch.float64))
        expected = x0[k] + v @ a.T @ inverse @ residual
        torch.testing.assert_close(pigdm[k].flatten().double(), expected, rtol=1e-3, atol=1e-3)
        expected = x0[k] + v @ a.T @ residual
        torch.testing.assert_close(dps[k].flatten().double(), expected, rtol=1e-3, atol=1e-2)


def test_dps_does_not_step_past_the_data_however_steep_they_are() -> None:
    """Few times and little noise: the move along d ends at the least residual."""
    sde = VE(0.005, 50.0)
    prior = gaussian(sde)
    seen = measured("ct")
    steep = Measurement(seen.operator, seen.data, torch.tensor(1e-3), "MR", (1.0, 1.0))
    times = time_grid(sde, 2)
    x_t = torch.randn(2, N, N) * 50.0
    guided, x0 = DPS(prior, steep, times), prior.denoise(x_t, times[0])
    kappa = 1 - (0.005 / 50.0) ** 2
    moved = x0 + kappa * (guided.denoise(x_t, times[0]) - x0)
    along = (moved - x0).double()
    residual = (seen.data - seen.operator(moved)).double().flatten(1)
    slope = (residual * seen.operator(along.float()).double().flatten(1)).sum(dim=1)
    scale = residual.norm(dim=1) * seen.operator(along.float()).double().flatten(1).norm(dim=1)
    assert bool((slope.abs() < 1e-4 * scale).all())
    assert float(along.norm()) > 0.1
    result = reconstruct(steep, prior, method="dps", steps=30)
    assert bool(torch.isfinite(result.samples).all())


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_zeta_of_dps_moves_the_ancestral_step_down_the_gradient_of_the_norm(sde: SDE) -> None:
    prior, seen, zeta = gaussian(sde), measured("ct"), 0.3
    times = time_grid(sde, 50)
    t, s = times[30], times[31]
    x_t = torch.randn(2, N, N) * float(sde.sigma(t))
    z = torch.randn(2, N, N)
    guided = DPS(prior, seen, times, zeta=zeta).denoise(x_t, t)
    plain = prior.denoise(x_t, t)
    moved = ancestral(sde, x_t, guided, t, s, z) - ancestral(sde, x_t, plain, t, s, z)
    x = x_t.clone().requires_grad_(True)
    residual = seen.data - seen.operator(prior.denoise(x, t))
    (gradient,) = torch.autograd.grad(residual.flatten(1).norm(dim=1).sum(), x)
    expected = -zeta * gradient / seen.operator.norm()
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ReconError, match="zeta > 0"):
        DPS(prior, seen, times, zeta=0.0)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_half_quadratic_is_diffpirs_equation(sde: SDE) -> None:
    prior, seen, lam = gaussian(sde), measured("ct", noise_map=True), 7.0
    x_t, t = states(sde)
    guided = HalfQuadratic(prior, seen, weight=lam**-0.5, iterations=200, tol=1e-7)
    got = guided.denoise(x_t, t)
    for k in range(2):
        a, y = whitened_matrix(seen, k)
        x0 = prior.denoise(x_t, t)[k].flatten().double()
        rho = lam / LEVEL**2
        left = a.T @ a + rho * torch.eye(D, dtype=torch.float64)
        exact = torch.linalg.solve(left, a.T @ y + rho * x0)
        torch.testing.assert_close(got[k].flatten().double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("level", [1.5, 0.1])
@pytest.mark.parametrize("kind", ["mask", "mri"])
def test_ddnm_plus_is_the_papers_rule_for_a_singular_value(kind: str, level: float) -> None:
    """In the basis of the singular vectors, pixels or k-space; above and below the noise."""
    sde, eta, noise = VP(), 0.85, 0.4
    generator = torch.Generator().manual_seed(4)
    if kind == "mask":
        operator: LinearOperator = Mask(torch.rand(N, N, generator=generator) < 0.5)
        shape: tuple[int, ...] = (N, N)
        mask = operator.mask

        def spectrum(x: torch.Tensor) -> torch.Tensor:
            return x
    else:
        mask = cartesian_mask((N, N), 2.0, 0.3, "random1d")
        channels = ComplexFromChannels((N, N))
        operator = CartesianMRI(mask) @ channels
        shape = (2, N, N)

        def spectrum(x: torch.Tensor) -> torch.Tensor:
            return centred_fft(channels(x))

    x_t, x0, z, truth = (torch.randn(3, *shape, generator=generator) for _ in range(4))
    seen = Measurement(operator, operator(truth), torch.tensor(noise), "MR", (1.0, 1.0))
    t, s = sde.time(2 * level), sde.time(level)
    got = spectrum(ddnm_plus(seen, eta)(sde, x_t, x0, t, s, z))
    (a, sigma), (alpha, sigma_t) = ([float(c) for c in sde.marginal(u)] for u in (s, t))
    kept = math.sqrt(1 - eta**2)
    if level > noise:
        lam, nu = 1.0, math.sqrt(sigma**2 - (a * noise) ** 2)
    else:
        lam, nu = kept * sigma / (a * noise), eta * sigma
    d, w = spectrum(x0), spectrum(z)
    on = a * (d + lam * (seen.data - d)) + nu * w
    off = a * d + sigma * (kept * (spectrum(x_t) - alpha * d) / sigma_t + eta * w)
    torch.testing.assert_close(got, torch.where(mask, on, off), rtol=1e-4, atol=1e-4)
    # noise of the data and fresh noise on measured components add up to sigma^2
    assert (a * lam * noise) ** 2 + nu**2 == pytest.approx(sigma**2)


def test_ddnm_plus_says_what_it_cannot_serve() -> None:
    with pytest.raises(UnsupportedError, match="singular values of the operator"):
        ddnm_plus(measured("ct"), 0.85)
    with pytest.raises(UnsupportedError, match="noise"):  # mixed by the real part
        ddnm_plus(measured("mri", noise_map=True), 0.85)
    ddnm_plus(measured("mask", noise_map=True), 0.85)
    with pytest.raises(ReconError, match="eta"):
        ddnm_plus(measured("mask"), 1.5)


class Flat(Denoiser):
    """A prior whose mean never depends on its input."""

    def denoise(self, x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("method", ["dps", "pigdm", "mmps"])
def test_a_prior_without_a_derivative_is_refused(method: str) -> None:
    with pytest.raises(UnsupportedError, match="without a gradient"):
        reconstruct(measured("mask"), Flat(VE()), method=method, steps=2)


@pytest.mark.parametrize("step", [ddim(0.0), ancestral], ids=["ode", "sde"])
def test_multistep_is_of_second_order(step) -> None:
    """Variance of samples of N(0, 1): the error falls fourfold with half the step, not twofold.

    Denoiser and steps are linear, so the variance is carried exactly: through one unit of the
    start and one of each step's noise.
    """
    sde = VE(0.05, 5.0)
    prior = GaussianPrior(0.0, torch.ones(1, 1), (1, 1), sde)

    def error(steps: int, second: bool) -> float:
        times = time_grid(sde, steps)
        advance = multistep(step) if second else step
        # row 0 carries the start, row i + 1 the noise of step i
        x = torch.zeros(steps, 1, 1, dtype=torch.float64)
        x[0] = 5.0
        for i in range(steps - 1):
            z = torch.zeros_like(x)
            z[i + 1] = 1.0
            x0 = prior.denoise(x, times[i])
            x = advance(sde, x, x0, times[i], times[i + 1], z)
        # from start variance 25 instead of 26, which the SDE forgets by (level / 26)^2
        level = 1 + 0.05**2
        lost = level / 26.0 if step is not ancestral else (level / 26.0) ** 2
        return abs(float(x.square().sum()) - (level - lost))

    first = error(40, False) / error(80, False)
    second = error(40, True) / error(80, True)
    assert first == pytest.approx(2.0, abs=0.35)
    assert second > 3.2
    assert error(80, True) < 0.1 * error(80, False)


COUNTED = ("dds", "mmps", "pigdm", "dps", "ddnm", "diffpir")


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["ct", "mri", "mask"])
@pytest.mark.parametrize("method", COUNTED)
def test_one_network_call_a_step_whatever_the_operator_and_the_sde(
    method: str, name: str, sde: SDE
) -> None:
    seen = measured(name)
    if name == "mri":
        seen = Measurement(seen.operator.a, seen.data, seen.noise, "MR", (1.0, 1.0))
    steps = 12
    result = reconstruct(seen, gaussian(sde), method=method, steps=steps, samples=2)
    row = METHODS[method]
    assert row.calls_per_step == 1
    assert result.nfe == steps
    bound = eval(row.operator_calls, {}, dict(row.options))
    assert result.operator_calls <= steps * bound + 70  # preparations: starts and norms
    assert bool(torch.isfinite(real(result.samples)).all())
    # closer to the data than the prior's own mean is
    nothing = seen.chi2(0.3 * torch.ones(2, *seen.operator.in_shape, dtype=seen.operator.dtype))
    assert float(result.residual_chi2.mean()) < float(nothing.mean())


@pytest.mark.parametrize("method", COUNTED)
def test_a_batch_of_one_and_of_eight_give_the_same_samples(method: str) -> None:
    for seen in (measured("ct", noise_map=True), measured("mask", noise_map=True)):
        one, many = (
            reconstruct(
                seen, gaussian(VE(0.005, 50.0)), method=method, steps=15, samples=4, batch=b
            )
            for b in (1, 8)
        )
        torch.testing.assert_close(one.samples, many.samples, rtol=0.0, atol=1e-5)


def test_noise_free_data_are_the_limit() -> None:
    """Known pixels with next to no noise are reproduced, the others still vary."""
    seen = measured("mask")
    exact = Measurement(seen.operator, seen.data, torch.tensor(1e-3), "MR", (1.0, 1.0))
    known = seen.operator.mask
    for method in ("mmps", "pigdm", "dps", "ddnm", "diffpir"):
        result = reconstruct(exact, gaussian(VE(1e-3, 50.0)), method=method, samples=8, steps=100)
        off = (result.samples - exact.data[:, None])[..., known].abs().max()
        assert float(off) < 0.05, method
        assert float(result.std[:, ~known].mean()) > 0.03, method


def test_presets_are_the_authors_and_yield_to_the_caller() -> None:
    song = METHODS["song"]
    assert song.resolve({}, "MR")["snr"] == 0.517
    assert song.resolve({}, "CT")["lam"] == 0.841
    assert song.resolve({"snr": 0.1}, "MR") == {**song.options, "lam": 1.0, "snr": 0.1}
    for (method, modality), preset in PRESETS.items():
        assert modality in {"CT", "MR"}
        assert set(preset) <= set(METHODS[method].options)


def test_eta_one_renoises_ddnm_from_its_estimate() -> None:
    """With eta = 1 and no data both steps agree: x_s = alpha D + sigma z."""
    sde, z, x0 = VP(), torch.randn(2, N, N), torch.randn(2, N, N)
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[0, 0] = True
    seen = Measurement(Mask(mask), torch.zeros(2, N, N), torch.tensor(0.1), "MR", (1.0, 1.0))
    t, s = sde.time(1.0), sde.time(0.5)
    x_t = torch.randn(2, N, N)
    got, other = (f(sde, x_t, x0, t, s, z) for f in (ddnm_plus(seen, 1.0), renoise(1.0)))
    torch.testing.assert_close(got[:, ~mask], other[:, ~mask])


@pytest.mark.parametrize("method", ["mmps", "pigdm", "dps"])
def test_networks_are_differentiated_inside_inference_mode(method: str) -> None:
    """One forward pass a step through a network prior, real and complex images."""
    torch.manual_seed(0)
    for channels in (1, 2):
        net = UNet(NetworkConfig(channels=channels, widths=(8, 8), blocks=1, embedding=16))
        torch.nn.init.normal_(net.exit.weight, std=0.05)
        card = PriorCard(
            name="tiny",
            modality="MR",
            unit="relative",
            offset=0.0,
            scale=1.0,
            value_range=(0.0, 1.0),
            pixel_mm_range=(1.0, 2.0),
            shape=(16, 16),
            sigma_range=(0.01, 50.0),
        )
        operator = CartesianMRI(cartesian_mask((16, 16), 2.0, 0.2))
        image = torch.rand(2, 16, 16).to(torch.complex64)
        seen = Measurement(operator, operator(image), torch.tensor(0.05), "MR", (1.5, 1.5))
        prior = NetworkPrior(net, card, dtype=torch.float32)
        result = reconstruct(seen, prior, method=method, steps=4)
        assert result.nfe == 4
        assert bool(torch.isfinite(real(result.samples)).all()), channels
