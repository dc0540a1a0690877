"""Exact priors, Tweedie's formula, the network's preconditioning and the checkpoint."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inverse.errors import CheckpointError, GeometryError, InputError, ReconError
from inverse.priors import (
    GaussianPrior,
    MixturePrior,
    NetworkConfig,
    NetworkPrior,
    PriorCard,
    UNet,
    list_priors,
    load_prior,
    save_prior,
)
from inverse.priors.network import edm_denoise, position_channels
from inverse.sde import SDE, VE, VP, SubVP

SDES = [VE(0.01, 50.0), VP(), SubVP()]
CARD = PriorCard(
    name="tiny",
    modality="CT",
    unit="HU",
    offset=-500.0,
    scale=500.0,
    value_range=(-1024, 3071),
    pixel_mm_range=(1.0, 2.0),
    shape=(32, 32),
    sigma_range=(0.01, 50.0),
)


def covariance(d: int) -> torch.Tensor:
    i = torch.arange(d, dtype=torch.float64)
    return 0.7 * torch.exp(-((i[:, None] - i[None, :]) ** 2) / 8) + 0.05 * torch.eye(
        d, dtype=torch.float64
    )


def mixture(sde: SDE) -> MixturePrior:
    """Toy G: 0.3 N(-2, .25) + 0.7 N(2, .25)."""
    return MixturePrior(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([[-2.0], [2.0]]),
        torch.full((2, 1, 1), 0.25),
        (1,),
        sde,
    )


def perturbed_net(config: NetworkConfig) -> UNet:
    """A network whose zero-initialised layers are not zero, so that it does something."""
    torch.manual_seed(3)
    net = UNet(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_score_of_the_gaussian_prior_is_the_gradient_of_its_log_density(sde: SDE) -> None:
    d, t = 6, 0.4
    prior = GaussianPrior(0.3, covariance(d), (d,), sde)
    x = torch.randn(4, d, dtype=torch.float64, requires_grad=True)
    alpha, sigma = sde.marginal(t)
    density = torch.distributions.MultivariateNormal(
        alpha * prior.mean, alpha**2 * covariance(d) + sigma**2 * torch.eye(d, dtype=torch.float64)
    )
    (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    torch.testing.assert_close(prior.score(x.detach(), t), gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_score_of_the_mixture_is_the_gradient_of_its_log_density(sde: SDE) -> None:
    prior, t = mixture(sde), 0.3
    x = torch.linspace(-3, 3, 11, dtype=torch.float64)[:, None].requires_grad_(True)
    (gradient,) = torch.autograd.grad(prior.log_density(x, t).sum(), x)
    torch.testing.assert_close(prior.score(x.detach(), t), gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("sigma", "mmse"), [(0.5, 0.131518), (1.0, 0.453946), (2.0, 1.701136)])
def test_mmse_of_the_mixture_is_the_known_constant(sigma: float, mmse: float) -> None:
    """MMSE = sigma^2 (1 - sigma^2 J) of the two-component toy, by quadrature over x_t."""
    prior = mixture(VE(0.01, 50.0))
    t = prior.sde.time(sigma)
    x = torch.linspace(-16, 16, 8001, dtype=torch.float64)[:, None]
    density = prior.log_density(x, t).exp()
    fisher = (prior.score(x, t)[:, 0] ** 2 * density).sum() * (x[1, 0] - x[0, 0])
    assert float(sigma**2 * (1 - sigma**2 * fisher)) == pytest.approx(mmse, abs=5e-6)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_covariance_product_is_tweedies_second_formula(sde: SDE) -> None:
    d, t = 5, 0.5
    prior = GaussianPrior(0.0, covariance(d), (d,), sde)
    alpha, sigma = sde.marginal(t)
    exact = torch.linalg.inv(
        torch.linalg.inv(covariance(d)) + alpha**2 / sigma**2 * torch.eye(d, dtype=torch.float64)
    )
    v = torch.randn(3, d, dtype=torch.float64)
    x = torch.randn(3, d, dtype=torch.float64)
    torch.testing.assert_close(prior.covariance(x, t, v), v @ exact, rtol=1e-7, atol=1e-9)


def test_gaussian_posterior_equals_the_information_form() -> None:
    d, m, s = 6, 4, 0.3
    prior = GaussianPrior(0.5, covariance(d), (d,))
    a = torch.randn(m, d, dtype=torch.float64)
    y = torch.randn(m, dtype=torch.float64)
    post = prior.posterior(a, y, s)
    information = torch.linalg.inv(covariance(d)) + a.T @ a / s**2
    torch.testing.assert_close(post.covariance, torch.linalg.inv(information))
    mean = prior.mean + post.covariance @ a.T @ (y - a @ prior.mean) / s**2
    torch.testing.assert_close(post.mean, mean)
    # the two-dimensional fixture of the literature: mean (.917, .734), sd (.287, .643)
    two = GaussianPrior(0.0, torch.tensor([[1.0, 0.8], [0.8, 1.0]]), (2,))
    post = two.posterior(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]), 0.3)
    assert post.mean.tolist() == pytest.approx([0.917, 0.734], abs=5e-4)
    assert post.covariance.diagonal().sqrt().tolist() == pytest.approx([0.287, 0.643], abs=5e-4)
    assert post.kl(post.mean, post.covariance) == pytest.approx(0, abs=1e-12)


def test_arrays_make_priors_and_impossible_ones_are_refused() -> None:
    eye = np.eye(2)
    assert GaussianPrior(np.zeros(2), 2 * eye, (2,)).covariance_matrix.dtype == torch.float64
    assert MixturePrior(np.ones(1), np.zeros((1, 2)), eye[None], (2,)).weights.tolist() == [1.0]
    for bad in ([[1, 2], [2, 1]], [[1, 0.5], [0, 1]], [[1, 0], [0, 0]], [[-1, 0], [0, 1]]):
        with pytest.raises(InputError, match="symmetric and positive definite, got an asymmetry"):
            GaussianPrior(0.0, torch.tensor(bad), (2,))
    for mean, covariance in (
        (math.nan, eye),
        (0.0, np.full((2, 2), math.nan)),
        (0.0, np.full((2, 2), math.inf)),
    ):
        with pytest.raises(InputError, match="must be finite"):
            GaussianPrior(mean, covariance, (2,))
    for weights in ([0.5, 0.6], [1.5, -0.5], [math.nan, 1.0]):
        with pytest.raises(InputError, match="weights must be positive and sum to one"):
            MixturePrior(np.array(weights), np.zeros((2, 2)), np.stack([eye, eye]), (2,))
    two = MixturePrior(np.full(2, 0.5), np.zeros((2, 2)), np.stack([eye, eye]), (2,))
    for prior in (GaussianPrior(0.0, eye, (2,)), two):
        with pytest.raises(GeometryError, match=r"prior of images \(2,\), got \(3,\)"):
            prior.denoise(torch.zeros(1, 3), 0.5)


def test_mixture_posterior_weights_follow_the_evidence() -> None:
    weights, parts = mixture(VE()).posterior(torch.ones(1, 1), torch.tensor([0.0]), 1.0)
    # y = 0 is equally far from both modes: the prior weights stay
    assert weights.tolist() == pytest.approx([0.3, 0.7], abs=1e-12)
    assert [float(p.mean) for p in parts] == pytest.approx([-1.6, 1.6])


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_network_denoiser_is_the_same_function_under_every_sde(sde: SDE) -> None:
    config = NetworkConfig(widths=(8, 8), blocks=1, embedding=16, sigma_data=0.8)
    prior = NetworkPrior(perturbed_net(config), CARD, sde, dtype=torch.float32)
    level = 0.6
    x = torch.randn(2, 32, 32)
    t = sde.time(level)
    got = prior.denoise(x * float(sde.alpha(t)), t)
    reference = NetworkPrior(prior.net, CARD, VE(0.01, 50.0), dtype=torch.float32)
    torch.testing.assert_close(
        got, reference.denoise(x, reference.sde.time(level)), rtol=1e-4, atol=1e-5
    )


def test_preconditioning_is_edms() -> None:
    """With F = b constant: D = s_d^2/(s^2 + s_d^2) x + s s_d/sqrt(s^2 + s_d^2) b."""
    sd, s, b = 0.8, 0.6, 0.3
    net = UNet(NetworkConfig(widths=(8, 8), blocks=1, embedding=16, sigma_data=sd))
    net.requires_grad_(False)
    net.exit.bias.fill_(b)  # the exit's weights start at zero
    x = torch.randn(2, 1, 16, 16)
    got = edm_denoise(net, x, torch.full((2,), s), torch.ones(2), position_channels((16, 16)))
    total = s**2 + sd**2
    torch.testing.assert_close(got, sd**2 / total * x + s * sd / total**0.5 * b)


def test_preconditioning_limits() -> None:
    """D -> x as sigma -> 0 and D has the scale of data, not of noise, as sigma -> infinity."""
    net = perturbed_net(NetworkConfig(widths=(8, 8), blocks=1, embedding=16))
    x = torch.randn(1, 1, 16, 16)
    where = position_channels((16, 16))
    mm = torch.tensor([1.5])
    net.requires_grad_(False)
    near = edm_denoise(net, x, torch.tensor([1e-4]), mm, where)
    assert float((near - x).abs().max()) < 1e-2
    far = edm_denoise(net, 1e3 * x, torch.tensor([1e3]), mm, where)
    assert float(far.abs().max()) < 50


def test_network_pads_any_size_and_uses_pixel_size_and_position() -> None:
    net = perturbed_net(NetworkConfig(widths=(8, 8), blocks=1, embedding=16))
    prior = NetworkPrior(net, CARD, dtype=torch.float32)
    x = torch.randn(1, 30, 27)
    assert prior.denoise(x, 0.5).shape == x.shape
    assert not torch.allclose(prior.at(pixel_mm=0.7).denoise(x, 0.5), prior.denoise(x, 0.5))
    shifted = edm_denoise(
        net, x[:, None], torch.ones(1), torch.ones(1), position_channels((30, 27)) + 0.3
    )
    plain = edm_denoise(net, x[:, None], torch.ones(1), torch.ones(1), position_channels((30, 27)))
    assert not torch.allclose(shifted, plain)


def test_a_batch_element_does_not_depend_on_its_mates() -> None:
    prior = NetworkPrior(
        perturbed_net(NetworkConfig(widths=(8, 8), blocks=1, embedding=16)),
        CARD,
        dtype=torch.float32,
    )
    x = torch.randn(3, 32, 32)
    torch.testing.assert_close(
        prior.denoise(x, 0.4)[1:2], prior.denoise(x[1:2], 0.4), rtol=1e-4, atol=1e-6
    )


def test_denoiser_refuses_bad_calls() -> None:
    net = UNet(NetworkConfig(widths=(8, 8), blocks=1, embedding=16))
    where, mm = position_channels((16, 16)), torch.ones(1)
    with pytest.raises(GeometryError, match="two channels"):
        edm_denoise(net, torch.zeros(1, 2, 16, 16), torch.ones(1), mm, where)
    with pytest.raises(ReconError, match="must be positive"):
        edm_denoise(net, torch.zeros(1, 1, 16, 16), torch.zeros(1), mm, where)


@pytest.fixture
def prior_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_prior(path, perturbed_net(NetworkConfig(widths=(8, 8), blocks=1, embedding=16)), CARD)
    return path


def test_checkpoint_round_trip(prior_file: Path) -> None:
    prior = load_prior(prior_file)
    assert prior.card.name == "tiny"
    assert len(prior.card.sha256) == 64
    assert (prior.offset, prior.scale, prior.unit) == (-500.0, 500.0, "HU")
    assert prior.net.config.widths == (8, 8)
    original = perturbed_net(NetworkConfig(widths=(8, 8), blocks=1, embedding=16))
    for a, b in zip(prior.net.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(a, b.half().float())


def test_changed_weights_are_refused(prior_file: Path) -> None:
    from safetensors import safe_open

    with safe_open(prior_file, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(prior_file)
    tensors["exit.bias"] = tensors["exit.bias"] + 1
    save_file(tensors, prior_file, metadata)
    with pytest.raises(CheckpointError, match="sha256"):
        load_prior(prior_file)


def test_foreign_truncated_and_missing_files_are_refused(prior_file: Path) -> None:
    data = prior_file.read_bytes()
    prior_file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_prior(prior_file)
    save_file({"a": torch.zeros(1)}, prior_file)
    with pytest.raises(CheckpointError, match="not a prior of this toolkit"):
        load_prior(prior_file)
    with pytest.raises(CheckpointError, match="no prior 'nowhere'"):
        load_prior("nowhere")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (canary,))

    for name in ("prior.pt", "prior.safetensors"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            load_prior(path)
    assert not canary.exists()


def test_error_interpolates_the_cards_losses(tmp_path: Path) -> None:
    import dataclasses

    path = tmp_path / "p.safetensors"
    card = dataclasses.replace(CARD, training={"validation_rmse": {"0.1": 0.05, "1": 0.2}})
    save_prior(path, UNet(NetworkConfig(widths=(8, 8), blocks=1, embedding=16)), card)
    prior = load_prior(path)
    assert float(prior.error(0.1)) == pytest.approx(0.05)
    assert float(prior.error(0.1**0.5)) == pytest.approx(0.1)
    assert float(prior.error(0.001)) == pytest.approx(0.001)


def test_bundled_priors_load_and_are_small() -> None:
    total = 0
    for card in list_priors():
        prior = load_prior(card.name)
        assert prior.card == card
        assert card.training_data
        assert all(source["licence"] for source in card.training_data)
        json.dumps(card.__dict__)
        from inverse.priors.checkpoint import WEIGHTS

        total += (WEIGHTS / f"{card.name}.safetensors").stat().st_size
    assert 0 < total <= 24e6
