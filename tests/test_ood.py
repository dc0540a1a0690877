"""Out-of-distribution tests: exact laws on Gaussians, ranks that are uniform under the null."""

from __future__ import annotations

import math

import pytest
import torch
from affine import dense, field, parts, smooth_prior
from laws import random
from scipy import stats
from torch import Tensor

from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.linop import Identity
from inverse.priors import GaussianPrior
from inverse.priors.denoiser import Denoiser
from inverse.sde import VE, VP
from inverse.trust import Reference, auc, prior_predictive, statistics

SIDE = 8


def shifted(kind: str, size: float, slices: int) -> tuple[GaussianPrior, Measurement, Tensor]:
    """Prior and data of truths that all have one structure that the prior does not expect."""
    prior, measurement, _ = field(kind, SIDE, slices)
    bump = torch.zeros(SIDE, SIDE)
    bump[2:4, 3:6] = size
    change = measurement.operator(bump)
    moved = Measurement(
        measurement.operator, measurement.data + change, measurement.noise, "MR", (1.0, 1.0)
    )
    return prior, moved, change


# --- exact: prior-predictive chi-square --------------------------------------------------------


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_p_values_of_the_priors_own_data_are_uniform(kind: str) -> None:
    prior, measurement, _ = field(kind, SIDE, 400)
    seen = measurement.data.abs().amax(dim=0) > 0
    test = prior_predictive(prior, measurement)
    real = 2 if kind == "mri" else 1
    assert test.degrees == real * measurement.operator.measured
    if test.degrees == real * int(seen.sum()):  # rays beside the object carry no noise here
        assert stats.kstest(test.p.numpy(), "uniform").pvalue > 0.01
        assert float(test.value.mean()) == pytest.approx(
            test.degrees, abs=4 * math.sqrt(2 * test.degrees / 400)
        )


def test_power_is_that_of_the_non_central_chi_square() -> None:
    """Detection of a shift by T, against the law with non-centrality d^T S^-1 d."""
    prior, moved, change = shifted("mri", 1.5, 600)
    null = prior_predictive(prior, field("mri", SIDE, 600)[1])
    test = prior_predictive(prior, moved)
    a = dense(moved.operator).double()
    seen = a.any(dim=1) | (parts(change[None].flatten(1))[0] != 0)
    delta = parts(change[None].flatten(1))[0].double()
    noise = float(moved.noise)
    s = a @ prior.covariance_matrix @ a.T + noise**2 * torch.eye(len(a))
    centrality = float(delta[seen] @ torch.linalg.solve(s, delta)[seen])
    assert 5 < centrality < 100
    law = stats.ncx2(test.degrees, centrality)
    assert stats.kstest(test.value.numpy(), law.cdf).pvalue > 0.01
    area, low, high = auc(test.value, null.value)
    grid = torch.linspace(0, 6 * test.degrees, 20000, dtype=torch.float64).numpy()
    step = grid[1] - grid[0]
    exact = float((stats.chi2(test.degrees).cdf(grid) * law.pdf(grid)).sum() * step)
    assert 0.6 < exact < 0.999
    assert abs(area - exact) < (high - low) / 2


def test_chi_square_by_hand() -> None:
    """N(1, 4) seen with noise std 3: variance 13; two pixels, one unseen direction none."""
    prior = GaussianPrior(1.0, 4 * torch.eye(2), (1, 2))
    measurement = Measurement(
        Identity((1, 2)), torch.tensor([[[4.0, 1.0]]]), torch.tensor(3.0), "MR", (1.0, 1.0)
    )
    test = prior_predictive(prior, measurement)
    assert float(test.value) == pytest.approx(9 / 13)
    assert float(test.p) == pytest.approx(math.exp(-9 / 26))  # chi-square of two degrees
    per_pixel = Measurement(
        Identity((1, 2)), torch.tensor([[[4.0, 1.0]]]), torch.tensor([[3.0, 1.0]]), "MR", (1, 1)
    )
    assert float(prior_predictive(prior, per_pixel).value) == pytest.approx(9 / 13)
    with pytest.raises(GeometryError, match="prior is over"):
        prior_predictive(GaussianPrior(0.0, torch.eye(3), (1, 3)), measurement)


# --- statistics and ranks ----------------------------------------------------------------------


@pytest.mark.parametrize("sde", [VE(0.005, 50.0), VP()], ids=lambda s: type(s).__name__)
def test_score_norms_of_the_priors_images_are_its_fisher_information(sde) -> None:
    """E |sigma s|^2 / d = sigma^2 J / d = mean of sigma^2 / (lambda + sigma^2)."""
    prior = smooth_prior(SIDE, sde)
    truth = prior.sample(600, torch.Generator().manual_seed(0))
    blind = Measurement(Identity((SIDE, SIDE)), truth, torch.tensor(1.0), "MR", (1.0, 1.0))
    levels = (0.1, 0.5, 2.0)
    norms = torch.cat(
        [statistics(prior, blind, truth, levels=levels, seed=k)[:, :3].exp() for k in range(4)]
    )
    for level, norm in zip(levels, norms.T, strict=True):
        exact = float((level**2 / (prior.eigenvalues + level**2)).mean())
        error = 4 * exact * math.sqrt(2 / (4 * SIDE**2))  # four draws of the noise
        assert float(norm.mean()) == pytest.approx(exact, abs=error)


def test_residual_is_of_what_the_prior_leaves() -> None:
    """A prior that knows one image only: the data miss all the rest, in the data's unit."""

    class Only(Denoiser):
        def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
            return torch.ones_like(x_t)

    x = torch.tensor([[[3.0, 5.0]], [[5.0, 5.0]]])  # prior units -1, 0 and 0, 0
    measurement = Measurement(Identity((1, 2)), x, torch.tensor(0.5), "MR", (1.0, 1.0))
    found = statistics(Only(VE()), measurement, x, offset=5.0, scale=2.0, levels=(0.3,))
    # the prior's image is 5 + 2 * 1 = 7: residuals (-4, -2) and (-2, -2) over 0.5
    assert found[:, 1].exp().tolist() == pytest.approx([(64 + 16) / 2, 16.0], rel=1e-4)
    turned = Measurement(
        Identity((1, 2), torch.complex64), 1j * x, torch.tensor(0.5), "MR", (1.0, 1.0)
    )
    again = statistics(Only(VE()), turned, 1j * x, offset=5.0, scale=2.0, levels=(0.3,))
    assert (2 * again[:, 1].exp()).tolist() == pytest.approx([(64 + 16) / 2, 16.0], rel=1e-4)


def test_statistics_do_not_depend_on_the_batch() -> None:
    prior, measurement, truth = field("ct", SIDE, 10)
    many = statistics(prior, measurement, truth)
    few = statistics(prior, measurement.take(torch.tensor([9])), truth[9:])
    torch.testing.assert_close(many[9:], few, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patients", [8, 26])
def test_ranks_are_uniform_for_patients_like_the_references(patients: int) -> None:
    """On all n + 1 values alike, for statistics as uneven and dependent as these."""
    z = random((3000, patients + 1, 3), torch.float64, patients)
    values = torch.stack([z[..., 0], z[..., 0] + 0.1 * z[..., 1], z[..., 2].exp()], dim=-1)
    p = torch.tensor([Reference(v[:-1]).rank(v[-1]).p for v in values])
    index = (p * (patients + 1)).round().long() - 1
    counts = torch.bincount(index, minlength=patients + 1)
    assert int(counts.sum()) == 3000
    assert len(counts) == patients + 1
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_images_the_prior_does_not_know_rank_last() -> None:
    """Through data, reconstruction and ranks: the score's norm and the residual both tell."""
    prior, measurement, truth = field("ct", SIDE, 140)
    values = statistics(prior, measurement, truth)
    reference = Reference(values[:40])
    inside = [reference.rank(v) for v in values[40:]]
    rough = truth[40:] + torch.tensor([1.0, -1.0]).repeat(SIDE // 2)
    foreign = Measurement(
        measurement.operator, measurement.operator(rough), measurement.noise, "MR", (1.0, 1.0)
    )
    outside = [reference.rank(v) for v in statistics(prior, foreign, rough)]
    assert sum(r.p for r in inside) / 100 == pytest.approx(0.5, abs=0.2)
    assert all(r.p == pytest.approx(1 / 41) for r in outside)
    assert all(r.beyond > 1 for r in outside)
    assert all(r.patients == 40 for r in outside)


def test_rank_by_hand() -> None:
    reference = Reference(torch.tensor([[0.0], [1.0], [2.0]]))
    far = reference.rank(torch.tensor([5.0]))
    # mean 2, variance 3.5: distances 4, 1, 0 and 9 over 3.5
    assert far.distance == pytest.approx(9 / 3.5)
    assert far.p == pytest.approx(1 / 4)
    assert far.beyond == pytest.approx(9 / 4)
    assert reference.rank(torch.tensor([1.0])).p == pytest.approx(1.0)
    flat = Reference(torch.zeros(3, 1)).rank(torch.zeros(1))
    assert (flat.distance, flat.p) == (0.0, 1.0)


def test_ood_refuses_bad_input() -> None:
    prior, measurement, truth = field("ct", SIDE, 2)
    with pytest.raises(GeometryError, match="one image a slice"):
        statistics(prior, measurement, truth[:1])
    with pytest.raises(InputError, match="NaN"):
        statistics(prior, measurement, truth * torch.nan)
    for wrong in ({"levels": ()}, {"levels": (0.0,)}, {"scale": 0.0}):
        with pytest.raises(InputError, match="noise levels above 0"):
            statistics(prior, measurement, truth, **wrong)
    flat = Measurement(Identity((4,)), torch.zeros(1, 4), torch.tensor(1.0), "MR", (1.0, 1.0))
    with pytest.raises(UnsupportedError, match="2-D"):
        statistics(prior, flat, torch.zeros(1, 4))
    with pytest.raises(InputError, match="two patients"):
        Reference(torch.zeros(1, 3))
    with pytest.raises(InputError, match="NaN"):
        Reference(torch.full((3, 2), torch.nan))
    reference = Reference(torch.zeros(3, 2))
    with pytest.raises(GeometryError, match="2 statistics"):
        reference.rank(torch.zeros(3))
    with pytest.raises(InputError, match="NaN"):
        reference.rank(torch.tensor([0.0, torch.nan]))
