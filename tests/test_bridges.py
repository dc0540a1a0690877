"""Operators and networks of other toolkits: laws of operators, and exact denoisers in disguise."""

from __future__ import annotations

import pytest
import torch
from laws import check_all
from torch import Tensor

from inverse.bridges import DeepinvDenoiser, DeepinvOperator, DiscreteVP, NetworkDenoiser
from inverse.errors import InputError, UnsupportedError
from inverse.priors import GaussianPrior
from inverse.reconstruct import Measurement
from inverse.sde import VE

SHAPE = (4, 5)


def exact_prior(sde) -> GaussianPrior:
    factor = torch.randn(20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return GaussianPrior(0.3, factor @ factor.T / 20 + 0.05 * torch.eye(20), SHAPE, sde)


def schedule(steps: int = 100) -> Tensor:
    beta = torch.linspace(1e-4, 0.1, steps, dtype=torch.float64)
    return torch.cumprod(1 - beta, 0)


class Matrix:
    """A physics as deepinv's are: batches with channels, and an adjoint, right or wrong."""

    def __init__(self, right: bool = True) -> None:
        seed = torch.Generator().manual_seed(2)
        self.matrix = torch.randn(7, 20, generator=seed)
        self.right = right

    def A(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T)[:, None, :]

    def A_adjoint(self, y: Tensor) -> Tensor:
        factor = 1.0 if self.right else 1.1
        return (factor * y[:, 0] @ self.matrix).reshape(-1, 1, *SHAPE)


@pytest.mark.parametrize("adjoint", ["given", "autograd"])
@pytest.mark.parametrize("shape", [SHAPE, (1, *SHAPE)])
def test_a_physics_obeys_the_laws_of_operators(adjoint, shape):
    check_all(DeepinvOperator(Matrix(), shape, adjoint=adjoint))


def test_a_wrong_adjoint_is_refused_and_autograd_mends_it():
    with pytest.raises(InputError, match="adjoint='autograd'"):
        DeepinvOperator(Matrix(right=False), SHAPE)
    check_all(DeepinvOperator(Matrix(right=False), SHAPE, adjoint="autograd"))
    with pytest.raises(UnsupportedError, match="LinearPhysics"):
        DeepinvOperator(object(), SHAPE)


def test_a_wrapped_physics_serves_in_a_measurement():
    physics = Matrix()
    operator = DeepinvOperator(physics, SHAPE)
    x = torch.randn(3, *SHAPE)
    scan = Measurement(operator, operator(x), torch.tensor(0.1), "MR", (1.0, 1.0))
    torch.testing.assert_close(scan.data, physics.A(x[:, None]))
    assert float(scan.chi2(x).max()) < 1e-6


def test_prior_as_a_denoiser_of_deepinv():
    prior = exact_prior(VE(0.01, 50.0))
    x = torch.randn(3, 1, *SHAPE)
    for sigma in (0.5, torch.tensor([0.1, 1.0, 5.0])):
        levels = torch.as_tensor(sigma, dtype=torch.float64).expand(3)
        # The Wiener estimate at that level, by hand.
        c, mean = prior.covariance_matrix, prior.mean
        for k in range(3):
            gain = c @ torch.linalg.inv(c + levels[k] ** 2 * torch.eye(20))
            by_hand = mean + gain @ (x[k].flatten().double() - mean)
            got = DeepinvDenoiser(prior)(x, sigma)[k].flatten().double()
            torch.testing.assert_close(got, by_hand, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="channels=True"):
        DeepinvDenoiser(prior)(torch.zeros(1, 2, *SHAPE), 0.1)
    with pytest.raises(InputError, match="empty"):
        DeepinvDenoiser(prior, 1.0, 1.0)


def test_range_of_images_is_an_affine_map():
    prior = exact_prior(VE(0.01, 50.0))
    v = torch.rand(2, 1, *SHAPE)
    plain = DeepinvDenoiser(prior)(-1 + 4 * v, 4 * 0.2)
    torch.testing.assert_close(DeepinvDenoiser(prior, -1.0, 3.0)(v, 0.2), (plain + 1) / 4)


def test_levels_beyond_the_priors_are_moved_to_its_nearest():
    prior = exact_prior(VE(0.01, 50.0))
    x = torch.randn(1, 1, *SHAPE)
    wrapped = DeepinvDenoiser(prior)
    assert bool(torch.isfinite(wrapped(x, 1e-6)).all())
    torch.testing.assert_close(wrapped(x, 1e4), wrapped(x, 50.0))


def test_schedule_passes_through_its_steps():
    bar = schedule()
    sde = DiscreteVP(bar)
    for i in (0, 1, 37, 99):
        t = (i + 1) / 100
        assert float(sde.alpha(t) ** 2) == pytest.approx(float(bar[i]), rel=1e-12)
        assert float(sde.alpha(t) ** 2 + sde.sigma(t) ** 2) == pytest.approx(1, rel=1e-12)
        assert float(sde.step(t)) == pytest.approx(i, abs=1e-9)
    assert float(sde.alpha(0.0)) == 1
    t = sde.time(torch.tensor([0.05, 0.7, 2.0]))
    torch.testing.assert_close(
        sde.noise_level(t), torch.tensor([0.05, 0.7, 2.0], dtype=torch.float64)
    )
    # f and g^2 of the derived SDE: beta = -d log(alpha-bar)/dt, f = -beta/2, g^2 = beta.
    beta = -float(bar[41].log() - bar[40].log()) * 100
    assert float(sde.f(0.415)) == pytest.approx(-beta / 2, rel=1e-9)
    assert float(sde.diffusion(0.415)) == pytest.approx(beta**0.5, rel=1e-9)


class Output:
    """What a model of diffusers returns."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("whole_steps", [False, True])
def test_every_prediction_is_the_same_denoiser(prediction, whole_steps):
    bar = schedule()
    exact = exact_prior(DiscreteVP(bar))

    def network(x: Tensor, step: Tensor) -> Output:
        assert step.shape == (len(x),)
        assert step.dtype == (torch.long if whole_steps else torch.float32)
        t = (step.double() + 1) / 100
        alpha, sigma = (c[:, None, None, None].float() for c in exact.sde.marginal(t))
        x0 = exact.denoise(x[:, 0], t)[:, None]
        noise = (x - alpha * x0) / sigma
        return Output(
            {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[
                prediction
            ]
        )

    wrapped = NetworkDenoiser(network, bar, prediction, whole_steps=whole_steps)
    x = torch.randn(3, *SHAPE)
    for t in (0.02, 0.5, torch.tensor([0.1, 0.4, 1.0], dtype=torch.float64)):
        torch.testing.assert_close(
            wrapped.denoise(x, t), exact.denoise(x, t), atol=2e-4, rtol=2e-4
        )
    torch.testing.assert_close(wrapped.score(x, 0.5), exact.score(x, 0.5), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: DiscreteVP([0.5, 0.6]), InputError),
        (lambda: DiscreteVP([0.9, 0.0]), InputError),
        (lambda: DiscreteVP([0.9]), InputError),
        (lambda: NetworkDenoiser(lambda x, t: x, schedule(), "noise"), UnsupportedError),
        (lambda: NetworkDenoiser(lambda x, t: x, schedule(), scale=0.0), InputError),
    ],
)
def test_impossible_schedules(make, error):
    with pytest.raises(error):
        make()


def test_real_physics_and_algorithm_of_deepinv():
    deepinv = pytest.importorskip("deepinv", reason="deepinv is not installed (extra 'bridges')")
    physics = deepinv.physics.Tomography(8, img_width=16, normalize=False)
    operator = DeepinvOperator(physics, (16, 16), adjoint="autograd")
    check_all(operator)
    x = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(operator(x[:, 0]), physics.A(x))
    prior = GaussianPrior(0.5, 0.1 * torch.eye(256), (16, 16))
    y = physics.A(x)
    model = deepinv.optim.optim_builder(
        "PGD",
        prior=deepinv.optim.prior.PnP(denoiser=DeepinvDenoiser(prior)),
        data_fidelity=deepinv.optim.data_fidelity.L2(),
        max_iter=20,
        params_algo={"stepsize": 0.5 / float(operator.norm()) ** 2, "g_param": 0.05},
    )
    found = model(y, physics)
    assert float((physics.A(found) - y).norm()) < 0.5 * float(y.norm())


def test_a_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    unet = diffusers.UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler()
    prior = NetworkDenoiser(unet, scheduler.alphas_cumprod)
    assert prior.denoise(torch.randn(2, 16, 16), 0.5).shape == (2, 16, 16)
