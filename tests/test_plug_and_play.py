"""The default method: its iteration by hand, its independence, its start."""

from __future__ import annotations

import pytest
import torch

from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.linop import LinearOperator
from inverse.operators.mask import Mask
from inverse.posterior import METHODS
from inverse.posterior.plug_and_play import pnp_admm, warm_start
from inverse.posterior.problem import Problem
from inverse.priors import GaussianPrior
from inverse.reconstruct import reconstruct
from inverse.sampling import Noise
from inverse.sde import VE, VP

SIDE = 8
D = SIDE**2


def field(sde=None) -> GaussianPrior:
    i = torch.arange(SIDE, dtype=torch.float64)
    one = torch.exp(-((i[:, None] - i) ** 2) / 8)
    covariance = torch.kron(one, one) + 0.05 * torch.eye(D, dtype=torch.float64)
    return GaussianPrior(0.3, covariance, (SIDE, SIDE), sde or VE(0.005, 50.0))


def problem(seeds=(0,), *, prior=None, operator: LinearOperator | None = None) -> Problem:
    prior = prior or field()
    operator = operator or RayTransform(
        ParallelBeam.sparse(3, (SIDE, SIDE), 1.0), (SIDE, SIDE), 1.0
    )
    g = torch.Generator().manual_seed(5)
    truth = prior.sample(1, g)
    data = operator(truth)
    data = data + 0.3 * torch.randn(data.shape, generator=g)
    measurement = Measurement(operator, data, torch.tensor(0.3), "MR", (1.0, 1.0))
    index = torch.zeros(len(seeds), dtype=torch.long)
    return Problem(prior, measurement.take(index), Noise([(s,) for s in seeds], (SIDE, SIDE)))


@pytest.mark.parametrize("sde", [VE(0.005, 50.0), VP()], ids=repr)
def test_three_steps_are_those_of_the_equations(sde) -> None:
    """Dense algebra in float64, written from the docstring."""
    prior = field(sde)
    given = problem((3,), prior=prior)
    levels, weight, damping = (0.5, (0.5 * 0.08) ** 0.5, 0.08), 2.0, 0.6
    found = pnp_admm(
        given, steps=3, start_level=0.5, end_level=0.08, weight=weight, damping=damping,
        relaxation=1.3, cg_iterations=400,
    )  # fmt: skip
    a = given.measurement.operator(torch.eye(D).reshape(D, SIDE, SIDE)).flatten(1).T.double()
    y = given.measurement.data.flatten().double()
    covariance, mean = prior.covariance_matrix, prior.mean
    x = warm_start(given.measurement, 0.0, 1.0).flatten().double()
    u = torch.zeros(D, dtype=torch.float64)
    draws = Noise([(3,)], (SIDE, SIDE))
    first, second = draws().flatten().double(), draws().flatten().double()
    for level, z in zip(levels, (first, -first, second), strict=True):
        noisy = x - u + level * z
        gain = covariance @ torch.linalg.inv(covariance + level**2 * torch.eye(D))
        x0 = mean + gain @ (noisy - mean)
        r2 = weight**2 * float((covariance - gain @ covariance).diagonal().mean())
        v = 1.3 * x0 - 0.3 * x + u
        system = a.T @ a / 0.09 + torch.eye(D) / r2
        x = torch.linalg.solve(system, a.T @ y / 0.09 + v / r2)
        u = damping * (v - x)
    torch.testing.assert_close(found.flatten().double(), x, rtol=2e-3, atol=2e-3)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    alone = pnp_admm(problem((7,)), steps=5)
    among = pnp_admm(problem((4, 7, 9)), steps=5)
    torch.testing.assert_close(among[1:2], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(among[0], among[1], atol=1e-3)


def test_opposite_noise_cancels() -> None:
    """Samples of several seeds differ less than with independent noise."""

    seeds = tuple(range(40))
    given = problem(seeds)
    opposite = pnp_admm(given, steps=8, end_level=0.3, start_level=0.5)

    class Fresh(torch.Tensor):
        """Noise whose negative is a new draw."""

        draws = Noise([(100 + s,) for s in seeds], (SIDE, SIDE))

        def __neg__(self):
            return Fresh.draws().as_subclass(Fresh)

    base = Noise([(s,) for s in seeds], (SIDE, SIDE))
    independent = Problem(given.prior, given.measurement, lambda: base().as_subclass(Fresh))
    other = pnp_admm(independent, steps=8, end_level=0.3, start_level=0.5)
    assert float(opposite.std(dim=0).mean()) < 0.8 * float(
        other.as_subclass(torch.Tensor).std(dim=0).mean()
    )


def test_one_network_call_a_step_and_the_default() -> None:
    given = problem()
    result = reconstruct(given.measurement, given.prior, steps=6)
    assert result.settings["method"] == "pnp_admm"
    assert result.nfe == 6
    assert next(iter(METHODS)) == "pnp_admm"


def test_the_image_is_near_the_posterior_mean() -> None:
    given = problem(tuple(range(8)))
    a = given.measurement.operator(torch.eye(D).reshape(D, SIDE, SIDE)).flatten(1).T
    exact = given.prior.posterior(a, given.measurement.data[0].flatten(), 0.3)
    sd = exact.covariance.diagonal().sqrt()
    found = pnp_admm(given, steps=20, weight=1.0).mean(dim=0).flatten().double()
    start = warm_start(given.measurement, 0.0, 1.0)[0].flatten().double()
    error, before = (float(((x - exact.mean) / sd).square().mean().sqrt()) for x in (found, start))
    assert error < 0.1 < 0.5 * before


def test_the_start_of_ct_is_not_negative_in_physical_units() -> None:
    operator = RayTransform(ParallelBeam.sparse(5, (16, 16), 10.0), (16, 16), 10.0)
    mu = torch.zeros(1, 16, 16)
    mu[:, 4:12, 5:11] = 0.02
    data = operator(mu) + 0.02 * torch.randn(
        1, *operator.out_shape, generator=torch.Generator().manual_seed(0)
    )
    measured = Measurement(operator, data, torch.tensor(0.02), "CT", (10.0, 10.0), 0.0206)
    offset, scale = 0.0103, 0.0103
    x = offset + scale * warm_start(measured.rescaled(offset, scale), offset, scale)
    assert float(x.min()) > -1e-6
    assert float((x - mu).square().mean().sqrt()) < 0.004


def test_a_start_of_one_dimension_is_tikhonovs() -> None:
    mask = Mask(torch.tensor([True, True, False]))
    measured = Measurement(mask, torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor(0.1), "MR", (1, 1))
    x = warm_start(measured, 0.0, 1.0)
    torch.testing.assert_close(x, torch.tensor([[100.0, 200.0, 0.0]]) / 101, rtol=1e-3, atol=1e-5)
