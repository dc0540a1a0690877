"""The Poisson likelihood's classical solver: surrogates, monotony, limits and low counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inverse.classical import fbp, poisson
from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.ct import ConeBeam, ParallelBeam, RayTransform
from inverse.operators.linop import Identity
from inverse.operators.metal import UnspoiledRays
from inverse.operators.noise import TransmissionPoisson, count_photons, generator, line_integrals
from inverse.operators.units import MU_WATER

N, PX = 24, 6.0


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECON_CACHE_DIR", "off")


def body(slices: int = 1) -> torch.Tensor:
    """Water with an inset of bone, 1/mm."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, N)] * 2, indexing="ij")
    mu = torch.where(x**2 / 0.8 + y**2 / 0.6 < 1, MU_WATER, 0.0)
    mu = torch.where((x - 0.3) ** 2 + (y + 0.2) ** 2 < 0.03, 2 * MU_WATER, mu)
    return mu.expand(slices, N, N).contiguous()


def scan(
    photons: float, electronic: float = 0.0, *, exact: bool = False, views: int = 40
) -> tuple[Measurement, torch.Tensor]:
    """Counts of the body by another kernel than the one that reconstructs, or without noise."""
    geometry = ParallelBeam.sparse(views, (N, N), PX)
    operator, truth = RayTransform(geometry, (N, N), PX), body()
    if exact:
        counts = photons * torch.exp(-operator(truth).double()) + 0.0
    else:
        line = RayTransform(geometry, (N, N), PX, "strip")(truth)
        counts = count_photons(line, photons, [generator(3)], electronic)
    data, std = line_integrals(counts, photons, electronic)
    likelihood = TransmissionPoisson(counts, photons, electronic)
    return (
        Measurement(operator, data, std, "CT", (PX, PX), MU_WATER, counts=likelihood),
        truth,
    )


def nrmse(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


@pytest.mark.parametrize("electronic", [0.0, 5.0])
def test_parabolas_lie_above_and_touch(electronic: float) -> None:
    counts = torch.tensor([0.0, 1.0, 40.0, 900.0, 1500.0], dtype=torch.float64)
    likelihood = TransmissionPoisson(counts, 1000.0, electronic)
    every = torch.linspace(0.0, 9.0, 400, dtype=torch.float64)[:, None]
    for at in (0.0, 1e-4, 0.02, 1.0, 6.0):
        here = torch.full((5,), at, dtype=torch.float64)
        curve = likelihood.curvature(here)
        assert bool((curve >= 0).all())
        step = every - here
        parabola = likelihood.value(here) + likelihood.gradient(here) * step + curve * step**2 / 2
        excess = parabola - likelihood.value(every)
        assert float(excess.min()) > -1e-6 * 1000
        # the least such curvature touches at zero, where it is positive
        touched = (excess[0].abs() < 1e-6 * 1000) | (curve == 0.0)
        assert bool(touched.all())
    # f'' by differences, where it fits the count
    line, h = torch.tensor([1.7], dtype=torch.float64), 1e-4
    fit = TransmissionPoisson(1000.0 * torch.exp(-line), 1000.0, electronic)
    bend = (fit.gradient(line + h) - fit.gradient(line - h)) / (2 * h)
    torch.testing.assert_close(fit.curvature(), bend, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("weight", "electronic"), [(0.0, 0.0), (5.0, 3.0), (500.0, 0.0)])
def test_one_subset_never_grows_and_stays_positive(weight: float, electronic: float) -> None:
    m, _ = scan(50.0, electronic)
    found = poisson(m, weight, iterations=25, subsets=1)
    assert found.objective.shape == (26, 1)
    assert float(found.objective.diff(dim=0).max()) <= 0.0
    assert float(found.objective[-1]) < 0.8 * float(found.objective[0])
    assert float(found.x.min()) >= 0.0


def test_a_pass_over_eight_subsets_is_worth_eight() -> None:
    m, _ = scan(1e3)
    slow = poisson(m, 2.0, iterations=64, subsets=1).objective
    fast = poisson(m, 2.0, iterations=8, subsets=8).objective
    assert float(fast[-1]) == pytest.approx(float(slow[-1]), rel=0.02)
    assert float(slow[8]) > 1.1 * float(slow[-1])


def test_noise_free_counts_give_the_truth() -> None:
    m, truth = scan(1e4, exact=True)
    errors = [nrmse(poisson(m, 0.0, iterations=k).x, truth) for k in (0, 20, 160)]
    assert errors[0] > 0.1
    assert errors[1] < 0.08
    assert errors[2] < 0.035
    still = poisson(m, 0.0, iterations=3, start=truth)
    assert nrmse(still.x, truth) < 1e-5
    assert float(still.objective.max()) < 1e-4


@pytest.mark.parametrize(
    ("photons", "electronic", "share"), [(200.0, 0.0, 0.65), (200.0, 10.0, 0.65), (20.0, 0.0, 0.9)]
)
def test_low_counts_are_better_than_backprojected(
    photons: float, electronic: float, share: float
) -> None:
    m, truth = scan(photons, electronic)
    if photons < 100:  # the darkest rays catch nothing
        assert int((m.counts.counts < 1).sum()) > 20
    found = poisson(m)
    best = min(nrmse(fbp(m, "hann", cutoff), truth) for cutoff in (0.3, 0.5, 0.7, 1.0))
    assert nrmse(found.x, truth) < share * best
    assert bool(torch.isfinite(found.x).all())


def test_spoiled_rays_are_not_used() -> None:
    m, _ = scan(1e3)
    trace = torch.zeros(m.operator.out_shape, dtype=torch.bool)
    trace[:, 16:20] = True
    kept = replace(m, operator=UnspoiledRays(m.operator, trace))
    nonsense = replace(m.counts, counts=torch.where(trace, 1e6, m.counts.counts))
    spoiled = replace(kept, counts=nonsense)
    torch.testing.assert_close(
        poisson(spoiled, iterations=2).x, poisson(kept, iterations=2).x, rtol=0, atol=0
    )


def test_cone_beams_too() -> None:
    shape, spacing = (3, 8, 8), (8.0, 8.0, 8.0)
    geometry = ConeBeam.sparse(12, shape, spacing)
    operator = RayTransform(geometry, shape, spacing)
    truth = torch.zeros(1, *shape)
    truth[:, :, 2:6, 2:6] = MU_WATER
    counts = TransmissionPoisson(1e5 * torch.exp(-operator(truth).double()), 1e5)
    data, std = line_integrals(counts.counts, 1e5)
    m = Measurement(operator, data, std, "CT", (8.0, 8.0), MU_WATER, counts=counts)
    assert nrmse(poisson(m, 0.0, iterations=40, subsets=4).x, truth) < 0.02


def test_counts_follow_their_slices() -> None:
    m, _ = scan(1e3)
    two = replace(
        m,
        data=m.data.repeat(2, 1, 1),
        noise=m.noise.repeat(2, 1, 1),
        counts=replace(m.counts, counts=m.counts.counts * torch.tensor([1, 2])[:, None, None]),
    )
    second = two.take(torch.tensor([1]))
    assert torch.equal(second.counts.counts, 2 * m.counts.counts)
    assert m.rescaled(0.0, 2.0).counts is None
    assert m.whitened().counts is None


def test_refusals() -> None:
    m, _ = scan(1e3)
    with pytest.raises(InputError, match="needs photon counts"):
        poisson(replace(m, counts=None))
    with pytest.raises(InputError, match="weight"):
        poisson(m, -1.0)
    for subsets in (0, 41):
        with pytest.raises(InputError, match="1 to 40 subsets"):
            poisson(m, subsets=subsets)
    with pytest.raises(GeometryError, match="shape of the data"):
        replace(m, counts=replace(m.counts, counts=m.counts.counts[:, 1:]))
    image = Identity((4, 4))
    plain = Measurement(image, torch.zeros(1, 4, 4), torch.ones(()), "CT", (1.0, 1.0), MU_WATER)
    with pytest.raises(UnsupportedError, match="RayTransform"):
        poisson(plain)
