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
from inverse.trust.ood import TURNS
from inverse.trust.verdict import likeness

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
def test_errors_on_the_priors_images_are_what_its_fisher_information_leaves(sde) -> None:
    """E |D - x|^2 / (sigma^2 d) = 1 - sigma^2 J / d = mean of lambda / (lambda + sigma^2)."""
    prior = smooth_prior(SIDE, sde)
    truth = prior.sample(600, torch.Generator().manual_seed(0))
    blind = Measurement(Identity((SIDE, SIDE)), truth, torch.tensor(1.0), "MR", (1.0, 1.0))
    levels = (0.1, 0.5, 2.0)
    errors = torch.cat(
        [statistics(prior, blind, truth, levels=levels, seed=k)[:, :3].exp() for k in range(4)]
    )
    for level, error in zip(levels, errors.T, strict=True):
        shrunk = prior.eigenvalues / (prior.eigenvalues + level**2)
        # four draws of the noise, shared by all images
        tolerance = 4 * math.sqrt(2 * float(shrunk.square().sum()) / 4) / SIDE**2
        assert float(error.mean()) == pytest.approx(float(shrunk.mean()), abs=tolerance)


def test_a_prior_prefers_its_images_as_they_lie_and_only_if_it_knows_how() -> None:
    """Errors of the image turned over its own: none for a symmetric law; both signs else."""
    prior, measurement, truth = field("ct", SIDE, 20)  # its law knows no direction
    turned = statistics(prior, measurement, truth)[:, -len(TURNS) :]
    torch.testing.assert_close(turned, torch.zeros_like(turned), rtol=0, atol=1e-4)
    slope = torch.linspace(-1, 1, SIDE)
    mean = 0.2 * slope[:, None] + 0.3 * slope[None, :].abs()  # top differs from bottom
    upright = GaussianPrior(mean, 0.01 * torch.eye(SIDE**2), (SIDE, SIDE))
    image = upright.sample(50, torch.Generator().manual_seed(2))

    def of(x: Tensor) -> Tensor:
        seen = Measurement(Identity((SIDE, SIDE)), x, torch.tensor(1.0), "MR", (1.0, 1.0))
        return statistics(upright, seen, x)[:, -2:].mean(dim=0)

    over, quarter = of(image).tolist()
    assert over > 0.3
    assert quarter > 0.3
    # upside down the image fares as badly as it fared well, by symmetry of the ratio
    assert of(image.flip(-2)).tolist()[0] == pytest.approx(-over, abs=0.05)


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
    # its error in prior units: (2, 1) and (1, 1) over the level
    assert found[:, 0].exp().tolist() == pytest.approx([2.5 / 0.09, 1.0 / 0.09], rel=1e-4)
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


def uneven(count: int, patients: int, seed: int) -> Tensor:
    """Statistics that depend on each other and have a long tail, ``(count, patients, 3)``."""
    z = random((count, patients, 3), torch.float64, seed)
    return torch.stack([z[..., 0], z[..., 0] + 0.1 * z[..., 1], z[..., 2].exp()], dim=-1)


@pytest.mark.parametrize("patients", [8, 26])
def test_ranks_are_uniform_for_patients_like_the_references(patients: int) -> None:
    """On all n + 1 values alike, for statistics as uneven and dependent as these."""
    count = 600
    values = uneven(count, patients + 1, patients)
    ranks = [Reference(v[:-1]).rank(v[-1]) for v in values]
    p = torch.tensor([r.p for r in ranks])
    index = (p * (patients + 1)).round().long() - 1
    counts = torch.bincount(index, minlength=patients + 1)
    assert int(counts.sum()) == count
    assert len(counts) == patients + 1
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    # red is rare even where the bound's assumption is far off
    red = sum(likeness(r) == "red" for r in ranks) / count
    assert red < 0.01


def test_distance_is_hotellings_where_patients_are_many() -> None:
    """T n (n - q) / ((n + 1) (n - 1)) follows F(q, n - q); shrinkage is then next to nothing."""
    n, q = 60, 3
    mix = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.7, 0.5, 0.5]], dtype=torch.float64)
    values = random((200, n + 1, q), torch.float64, 3) @ mix.T
    own = []
    for v in values:
        reference = Reference(v[:-1])
        usual = float(reference.distances.log().mean().exp())
        own.append(reference.rank(v[-1]).distance * usual)
    law = stats.f(q, n - q)
    scaled = torch.tensor(own) * n * (n - q) / ((n + 1) * (n - 1))
    assert stats.kstest(scaled.numpy(), law.cdf).pvalue > 0.01


def test_what_breaks_the_pattern_is_far_though_each_number_is_usual() -> None:
    z = random((26, 2), torch.float64, 5)
    reference = Reference(torch.stack([z[:, 0], z[:, 0] + 0.1 * z[:, 1]], dim=1))
    along = reference.rank(torch.tensor([1.5, 1.5]))
    across = reference.rank(torch.tensor([1.5, -1.5]))
    assert along.p > 0.05
    assert along.tail > 0.02
    assert across.p == pytest.approx(1 / 27)
    assert likeness(across) == "red"


def test_one_far_patient_does_not_hide_what_is_farther() -> None:
    """The patient stays among the references; the bound widens by a logarithm only."""
    values = random((26, 4), torch.float64, 6)
    values[7] *= 8
    reference = Reference(values)
    assert reference.distances.argmax() == 7
    found = reference.rank(torch.full((4,), 30.0))
    assert likeness(found) == "red"
    assert likeness(reference.rank(values[7] * 1.2)) == "amber"  # as far as one that is known


def test_ranks_are_uniform_where_the_exact_test_is() -> None:
    """On data of a Gaussian prior, by statistics of them and by the prior-predictive law."""
    groups, patients = 60, 19
    prior, measurement, truth = field("mri", SIDE, groups * (patients + 1))
    exact = prior_predictive(prior, measurement).p
    values = statistics(prior, measurement, truth)
    sets = values.unflatten(0, (groups, patients + 1))
    ranks = [Reference(v[:-1]).rank(v[-1]) for v in sets]
    fifths = [min(int(5 * (r.p - 1e-9)), 4) for r in ranks]
    assert stats.chisquare([fifths.count(k) for k in range(5)]).pvalue > 0.01
    assert stats.kstest(exact.numpy(), "uniform").pvalue > 0.01
    assert not any(likeness(r) == "red" for r in ranks)


def test_images_the_prior_does_not_know_rank_last() -> None:
    """Through data, reconstruction and ranks: the error and the residual both tell."""
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
    assert all(likeness(r) == "red" for r in outside)
    assert all(r.patients == 40 for r in outside)


def test_rank_by_hand() -> None:
    reference = Reference(torch.tensor([[0.0], [1.0], [3.0]]))
    # 0 of {1, 3}: mean 2, variance 2; 1 of {0, 3}: 1.5 and 4.5; 3 of {0, 1}: 0.5 and 0.5
    assert reference.distances.tolist() == pytest.approx([2.0, 1 / 18, 12.5])
    far = reference.rank(torch.tensor([5.0]))
    # of all three: mean 4/3, variance 7/3
    logs = [math.log(t) for t in (2.0, 1 / 18, 12.5)]
    mean = sum(logs) / 3
    spread = math.sqrt(sum((v - mean) ** 2 for v in logs) / 2)
    assert far.distance == pytest.approx(121 / 21 / math.exp(mean))
    t = (math.log(121 / 21) - mean) / (spread * math.sqrt(4 / 3))
    assert far.tail == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t**2)))  # two degrees
    assert far.p == pytest.approx(1 / 4)
    # 0 of {1, 3, 2}: 4; 1 of {0, 3, 2}: 2/7; 3 of {0, 1, 2}: 4; 2 of {0, 1, 3}: 4/21
    assert reference.rank(torch.tensor([2.0])).p == pytest.approx(1.0)
    flat = Reference(torch.zeros(3, 1)).rank(torch.zeros(1))
    assert (flat.distance, flat.p, flat.tail) == pytest.approx((1.0, 1.0, 0.5))
    moved = Reference(torch.zeros(3, 1)).rank(torch.ones(1))
    assert (moved.p, moved.tail) == (0.25, pytest.approx(0.0, abs=1e-6))


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
    with pytest.raises(InputError, match="three patients"):
        Reference(torch.zeros(2, 3))
    with pytest.raises(InputError, match="NaN"):
        Reference(torch.full((3, 2), torch.nan))
    reference = Reference(torch.zeros(3, 2))
    with pytest.raises(GeometryError, match="2 statistics"):
        reference.rank(torch.zeros(3))
    with pytest.raises(InputError, match="NaN"):
        reference.rank(torch.tensor([0.0, torch.nan]))
