"""Energy priors: gradients of one scalar, exact in closed form, and of use in a reconstruction."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from inverse.classical import tv
from inverse.errors import CheckpointError, GeometryError, ReconError
from inverse.measurement import Measurement
from inverse.operators.mask import Mask
from inverse.priors import (
    Denoiser,
    FunctionEnergy,
    MixturePrior,
    NetworkConfig,
    NetworkEnergyPrior,
    NetworkPrior,
    PriorCard,
    UNet,
    load_prior,
    save_prior,
)
from inverse.priors.denoiser import expand
from inverse.priors.network import position_channels
from inverse.reconstruct import reconstruct
from inverse.sde import SDE, VE, VP, SubVP
from inverse.training.loop import TrainConfig, train
from phantoms.slices import chest_slices

CARD = PriorCard(
    name="tiny",
    modality="CT",
    unit="HU",
    offset=-500.0,
    scale=500.0,
    value_range=(-1024, 3071),
    pixel_mm_range=(1.0, 2.0),
    shape=(16, 16),
    sigma_range=(0.01, 50.0),
    network="energy",
)
CONFIG = NetworkConfig(widths=(8, 8), blocks=1, embedding=16, patch=1, sigma_data=0.8)


def unet(config: NetworkConfig = CONFIG) -> UNet:
    torch.manual_seed(0)
    net = UNet(config)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def prior(**changes) -> NetworkEnergyPrior:
    return NetworkEnergyPrior(unet(), CARD, **changes)


def mixture(sde: SDE) -> MixturePrior:
    """The toy 0.3 N(-2, .25) + 0.7 N(2, .25)."""
    return MixturePrior(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-2.0], [2.0]]),
        torch.full((2, 1, 1), 0.25),
        (1,),
        sde,
    )


def energy_of_mixture(sde: SDE) -> FunctionEnergy:
    """Its energy, written out, with a constant of the level that no difference may show."""
    means, weights = torch.tensor([-2.0, 2.0]).double(), torch.tensor([0.3, 0.7]).double()

    def energy(x: Tensor, sigma: Tensor) -> Tensor:
        v = 0.25 + expand(sigma, x) ** 2
        logs = weights.log() - (x - means) ** 2 / (2 * v)
        return -torch.logsumexp(logs, dim=1) + sigma.to(x.dtype) ** 2

    return FunctionEnergy(energy, sde)


@pytest.mark.parametrize("sde", [VE(0.01, 50.0), VP(), SubVP()])
def test_closed_form_energy_is_the_mixture(sde: SDE) -> None:
    """Score, denoiser, and Delta E = -Delta log p, under every SDE."""
    exact, toy = mixture(sde), energy_of_mixture(sde)
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)[:, None]
    for level in (0.05, 0.5, 3.0):
        t = sde.time(level)
        x_t = sde.alpha(t) * x
        torch.testing.assert_close(toy.score(x_t, t), exact.score(x_t, t), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            toy.denoise(x_t, t), exact.denoise(x_t, t), rtol=1e-6, atol=1e-6
        )
        gap = toy.log_density(x_t, t) - exact.log_density(x_t, t)
        torch.testing.assert_close(gap, gap[:1].expand(41), rtol=1e-6, atol=1e-6)


def test_covariance_of_an_energy_prior_is_that_of_the_mixture() -> None:
    """The second derivative, through the gradient."""
    sde = VE(0.01, 50.0)
    exact, toy = mixture(sde), energy_of_mixture(sde)
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    v, t = torch.ones_like(x), sde.time(0.7)
    torch.testing.assert_close(
        toy.covariance(x, t, v), exact.covariance(x, t, v), rtol=1e-5, atol=1e-6
    )


def test_untrained_network_energy_is_the_exact_gaussian() -> None:
    net = UNet(CONFIG)  # puts out zero
    p = NetworkEnergyPrior(net, CARD)
    x = torch.randn(3, 16, 16)
    total = 0.7**2 + 0.8**2
    expected = x.square().sum(dim=(1, 2)) / 2 / total
    torch.testing.assert_close(p.energy(x, torch.full((3,), 0.7)), expected)
    t = p.sde.time(0.7)
    torch.testing.assert_close(p.score(x, t), -x / total)
    torch.testing.assert_close(p.denoise(x, t), 0.64 / total * x)


def test_denoiser_is_edms_with_the_residual_of_the_inner_product() -> None:
    """D = c_skip x + c_out (F + J_F^T u), with F called here by its own interface."""
    p, sigma, sd = prior(), 0.6, 0.8
    x = torch.randn(2, 1, 16, 16)
    total = math.sqrt(sigma**2 + sd**2)
    u = (x / total).requires_grad_(True)
    f = p.net(
        u, torch.full((2,), math.log(sigma) / 4), torch.zeros(2), position_channels((16, 16))
    )
    (transposed,) = torch.autograd.grad(f, u, u)
    expected = sd**2 / total**2 * x + sigma * sd / total * (f + transposed)
    got = p.denoise(x[:, 0], p.sde.time(sigma))
    torch.testing.assert_close(got, expected[:, 0].detach(), rtol=1e-4, atol=1e-5)
    value = u.square().sum(dim=(1, 2, 3)) / 2 - sd / sigma * (u * f).sum(dim=(1, 2, 3))
    energy = p.energy(x[:, 0], torch.full((2,), sigma))
    torch.testing.assert_close(energy, value.detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("level", [0.02, 0.5, 10.0])
def test_the_score_of_an_energy_has_no_curl(size: tuple[int, int], level: float) -> None:
    """|J - J^T| < 1e-5 |J|, padded sizes too; a score network of the same weights fails this."""
    x = torch.randn(1, *size) * math.sqrt(0.64 + level**2)
    d = x.numel()

    def curl(p: Denoiser) -> float:
        t = p.sde.time(level)
        j = torch.autograd.functional.jacobian(lambda u: p.score(u, t), x).reshape(d, d)
        return float((j - j.T).norm() / j.norm())

    assert curl(prior()) < 1e-5
    if level == 0.5:
        assert curl(NetworkPrior(unet(), CARD, dtype=torch.float32)) > 1e-3


def test_the_closed_loop_integral_of_the_score_vanishes() -> None:
    """On a circle through image space, by the trapezoid rule, which is spectral there."""
    a, b = torch.randn(2, 8, 8)
    angle = torch.arange(256) * (2 * math.pi / 256)
    path = angle.cos()[:, None, None] * a + angle.sin()[:, None, None] * b
    tangent = angle.cos()[:, None, None] * b - angle.sin()[:, None, None] * a

    def loop(p: Denoiser) -> float:
        work = p.score(path, p.sde.time(0.5)) * tangent
        return float(work.sum() / work.sum(dim=(1, 2)).abs().sum())

    assert abs(loop(prior())) < 1e-5
    assert abs(loop(NetworkPrior(unet(), CARD, dtype=torch.float32))) > 1e-4


def test_energy_differences_are_path_integrals_of_the_score() -> None:
    p = prior()
    x, y = torch.randn(2, 16, 16)
    nodes = (torch.arange(400) + 0.5) / 400
    path = x + nodes[:, None, None] * (y - x)
    t = p.sde.time(0.5)
    work = (p.score(path, t) * (y - x)).sum(dim=(1, 2)).mean()
    e = p.log_density(torch.stack([x, y]), t)
    assert float(work) == pytest.approx(float(e[1] - e[0]), rel=1e-3)


def test_results_are_plain_and_the_same_in_every_gradient_mode() -> None:
    p = prior()
    x = torch.randn(2, 16, 16)
    plain = p.denoise(x, 0.5)
    assert not plain.requires_grad, "nothing here is trained"
    with torch.no_grad():
        torch.testing.assert_close(p.denoise(x, 0.5), plain)
    with torch.inference_mode():
        inner = x.clone()
        torch.testing.assert_close(p.denoise(inner, torch.tensor([0.5, 0.5])), plain)
        torch.testing.assert_close(p.score(inner, 0.5), p.score(x, 0.5))
        toy = FunctionEnergy(lambda u, s: u.square().sum(dim=1) / s, VE())
        times = torch.full((5,), 0.5)  # autograd keeps the level that is derived from them
        assert bool(torch.isfinite(toy.score(torch.ones(5, 1).double(), times)).all())
    followed = x.clone().requires_grad_(True)
    p.denoise(followed, 0.5).sum().backward()
    assert bool((followed.grad != 0).any())


def test_a_trainable_energy_passes_gradients_to_its_parameters() -> None:
    class Quadratic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return self.a * x.square().sum(dim=1) / 2

    p = FunctionEnergy(Quadratic(), VE())
    p.score(torch.ones(1, 3), 0.5).sum().backward()
    assert float(p.function.a.grad) == pytest.approx(-3)


def test_energy_prior_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "energy.safetensors"
    net = unet()
    card = save_prior(path, net, CARD)
    loaded = load_prior(path)
    assert isinstance(loaded, NetworkEnergyPrior)
    assert loaded.card == card
    assert loaded.card.network == "energy"
    half = UNet(CONFIG)
    half.load_state_dict({k: v.half().float() for k, v in net.state_dict().items()})
    x, s = torch.randn(2, 16, 16), torch.full((2,), 0.5)
    torch.testing.assert_close(loaded.energy(x, s), NetworkEnergyPrior(half, CARD).energy(x, s))
    other = loaded.at(pixel_mm=0.7)
    assert isinstance(other, NetworkEnergyPrior)
    assert not torch.allclose(other.energy(x, s), loaded.energy(x, s))
    rated = dataclasses.replace(CARD, training={"validation_rmse": {"0.1": 0.05, "1": 0.3}})
    assert float(NetworkEnergyPrior(net, rated).error(1.0)) == pytest.approx(0.3)
    assert isinstance(loaded.at(sde=VP()).sde, VP)


def rewrite(path: Path, change) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    card = json.loads(metadata["card"])
    change(card)
    save_file(tensors, path, metadata | {"card": json.dumps(card)})


def test_files_from_before_energies_load_as_scores_and_unknown_kinds_are_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "old.safetensors"
    save_prior(path, unet(), CARD)
    rewrite(path, lambda card: card.pop("network"))
    assert type(load_prior(path)) is NetworkPrior
    rewrite(path, lambda card: card.update(network="flow"))
    with pytest.raises(CheckpointError, match="kind 'flow'"):
        load_prior(path)


def test_a_prior_of_one_level_has_a_process_around_it() -> None:
    p = prior()
    one = NetworkEnergyPrior(p.net, dataclasses.replace(CARD, sigma_range=(0.5, 0.5)))
    x = torch.randn(1, 16, 16)
    torch.testing.assert_close(
        one.denoise(x, one.sde.time(0.5)), p.denoise(x, p.sde.time(0.5)), rtol=1e-4, atol=1e-5
    )


def test_complex_images_have_two_channels_and_bad_calls_are_refused() -> None:
    config = dataclasses.replace(CONFIG, channels=2)
    p = NetworkEnergyPrior(unet(config), CARD)
    x = torch.randn(3, 2, 16, 16)
    assert p.energy(x, torch.ones(3)).shape == (3,)
    assert p.denoise(x, 0.5).shape == x.shape
    with pytest.raises(GeometryError, match="two channels"):
        prior().energy(torch.zeros(3, 2, 16, 16), torch.ones(3))
    with pytest.raises(ReconError, match="must be positive"):
        prior().energy(torch.zeros(3, 16, 16), torch.zeros(3))
    with pytest.raises(ReconError, match="one number a batch element"):
        FunctionEnergy(lambda x, _: x**2, VE()).denoise(torch.zeros(2, 3), 0.5)


@pytest.mark.slow
def test_a_trained_energy_prior_fills_in_a_masked_phantom(tmp_path: Path) -> None:
    """DSM on 16 x 16 phantoms; half of the pixels missing; better than TV's filling."""
    pixel, size = (20.0, 22.0), 16
    card = dataclasses.replace(CARD, pixel_mm_range=pixel, shape=(size, size))
    path = tmp_path / "energy.safetensors"
    train(
        [chest_slices(range(1, 41), size=size, pixel_mm=pixel)],
        chest_slices(range(100, 104), size=size, pixel_mm=pixel),
        NetworkConfig(widths=(16, 24), blocks=1, embedding=32, patch=1),
        TrainConfig(
            steps=120, network="energy", batch=16, crop=16, lr=3e-3, warmup=20, validate_every=120
        ),
        card,
        tmp_path / "run",
        path,
    )
    p = load_prior(path)
    truth = chest_slices(range(200, 204), size=size, pixel_mm=pixel)
    hu = torch.stack([torch.from_numpy(i) for i in truth.images])
    mu = 0.0206
    x = mu * (1 + hu / 1000)
    generator = torch.Generator().manual_seed(0)
    mask = Mask(torch.rand(size, size, generator=generator) > 0.5)
    noise = 0.01 * mu
    data = torch.where(mask.mask, x + noise * torch.randn(x.shape, generator=generator), 0)
    measurement = Measurement(mask, data, torch.tensor(noise), "CT", (21.0, 21.0), mu)
    found = reconstruct(measurement, p, steps=30, samples=4)

    def rmse(image: Tensor) -> float:
        return float((image - x).square().mean().sqrt()) * 1000 / mu

    assert bool(torch.isfinite(found.samples).all())
    assert found.settings["prior"] == "tiny"
    assert rmse(found.mean) < 0.5 * rmse(tv(measurement).x)
    t = p.sde.time(0.3)
    u = (hu[:1] + 500) / 500
    j = torch.autograd.functional.jacobian(lambda v: p.score(v, t), u).reshape(256, 256)
    assert float((j - j.T).norm() / j.norm()) < 1e-5
