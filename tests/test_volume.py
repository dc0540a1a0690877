"""Coupling across slices: exact proximal steps, white noise, known posteriors, bounded memory."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from inverse.errors import (
    CheckpointError,
    GeometryError,
    InputError,
    ReconError,
    ResourceError,
    UnsupportedError,
)
from inverse.measurement import Measurement
from inverse.operators.mask import Mask
from inverse.posterior import METHODS, Problem
from inverse.posterior.volume import (
    CorrelatedNoise,
    Coupling,
    InChunks,
    PlanesInTurn,
    SliceBySlice,
    ThroughPlaneTV,
    windows,
)
from inverse.priors import GaussianPrior, NetworkConfig, NetworkPrior, PriorCard, UNet
from inverse.priors.denoiser import Denoiser
from inverse.reconstruct import Batch, Plan, reconstruct
from inverse.sampling import Noise
from inverse.sde import VE

N, SIDE = 8, 6


def exponential(n: int, length: float) -> Tensor:
    """Covariance of a Markov field on a line."""
    i = torch.arange(n, dtype=torch.float64)
    return torch.exp(-(i[:, None] - i).abs() / length)


IN_PLANE = torch.kron(exponential(SIDE, 2.0), exponential(SIDE, 2.0))
ALONG = exponential(N, 6.0)


def slices_prior() -> GaussianPrior:
    return GaussianPrior(0.0, IN_PLANE, (SIDE, SIDE), VE(0.005, 20.0))


def toy(noise: float = 0.3) -> tuple[Measurement, GaussianPrior, Tensor]:
    """Half the pixels of a field, correlated in all directions, and its exact posterior mean."""
    volume = GaussianPrior(0.0, torch.kron(ALONG, IN_PLANE), (N, SIDE, SIDE), VE(0.005, 20.0))
    truth = volume.sample(1, torch.Generator().manual_seed(3))[0]
    mask = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(4)) < 0.5
    operator = Mask(mask)
    y = operator(
        truth + noise * torch.randn(truth.shape, generator=torch.Generator().manual_seed(5))
    )
    seen = Measurement(operator, y, torch.tensor(noise), "MR", (1.0, 1.0))
    rows = torch.eye(N * SIDE * SIDE)[mask.expand(N, SIDE, SIDE).flatten()]
    exact = volume.posterior(rows, y.flatten()[mask.expand(N, SIDE, SIDE).flatten()], noise)
    return seen, slices_prior(), exact.mean.reshape(N, SIDE, SIDE).float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


# --- total variation along z -------------------------------------------------------------------


def prox(x: Tensor, bound: Tensor, sweeps: int = 300) -> Tensor:
    made = ThroughPlaneTV(slices_prior(), range(len(x)), sweeps=sweeps)
    return made.prox(x, bound)


def test_proximal_step_meets_its_optimality_conditions() -> None:
    """v is optimal iff D^T p = x - v for a p with |p| <= b and p (Dv) = b |Dv|."""
    n = 20
    x = torch.randn(n, 50).cumsum(dim=0) * 0.1 + 0.1 * torch.randn(n, 50)
    bound = torch.linspace(0.02, 0.3, n - 1, dtype=torch.float64)
    v = prox(x, bound)
    p = -(x - v).double().cumsum(dim=0)
    assert float(p[-1].abs().max()) < 1e-5, "the mean along z is kept"
    p, steps, b = p[:-1], torch.diff(v.double(), dim=0), bound[:, None]
    assert float((p.abs() / b).max()) < 1.001
    assert float((b * steps.abs() - p * steps).sum() / (b * steps.abs()).sum()) < 1e-3
    assert float((x - v).abs().max()) > 0.1


def test_proximal_step_of_two_slices_in_closed_form() -> None:
    """They move towards each other by the bound, and meet where they are closer than twice it."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.3]])
    v = prox(x, torch.tensor([0.2], dtype=torch.float64))
    torch.testing.assert_close(v, torch.tensor([[0.2, 0.15], [0.8, 0.15]]), atol=1e-5, rtol=0)


def test_proximal_step_of_a_staircase() -> None:
    """Value from outside: skimage's Chambolle, which solves the same problem in one dimension."""
    from skimage.restoration import denoise_tv_chambolle

    x = torch.tensor([0.0, 0.1, -0.1, 1.0, 1.2, 0.9, 0.5])
    known = denoise_tv_chambolle(x.double().numpy(), weight=0.15, eps=1e-14, max_num_iter=100_000)
    v = prox(x[:, None], torch.full((6,), 0.15, dtype=torch.float64), sweeps=1000)[:, 0]
    torch.testing.assert_close(v, torch.from_numpy(known).float(), atol=2e-4, rtol=0)


def test_kept_state_makes_few_sweeps_enough() -> None:
    x = torch.randn(12, 40).cumsum(dim=0) * 0.2
    bound = torch.full((11,), 0.2, dtype=torch.float64)
    exact = prox(x, bound)
    tv = ThroughPlaneTV(slices_prior(), range(12), sweeps=4)
    errors = [distance(tv.prox(x, bound), exact) for _ in range(8)]
    assert errors[-1] < 1e-3 < 0.01 < errors[0]
    assert errors == sorted(errors, reverse=True)


def test_unequal_distances_weigh_by_their_length() -> None:
    """The bound is r^2 / (g h): a gap twice as long is worth half as much."""
    prior = slices_prior()
    tv = ThroughPlaneTV(prior, [0.0, 1.0, 3.0], gradient=0.5, sweeps=300)
    torch.testing.assert_close(tv.rate, torch.tensor([2.0, 1.0], dtype=torch.float64))
    level = 0.4
    x0 = torch.zeros(3, SIDE, SIDE)
    x0[1] = 5.0
    tv.prior = _Given(x0, prior)
    moved = tv.denoise(x0, prior.sde.time(level))
    r2 = float(prior.error(level)) ** 2
    torch.testing.assert_close(moved[0], torch.full((SIDE, SIDE), 2 * r2), atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[2], torch.full((SIDE, SIDE), 1 * r2), atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[1], torch.full((SIDE, SIDE), 5 - 3 * r2), atol=1e-4, rtol=0)


class _Given(Denoiser):
    """Whatever it is asked, the same image."""

    def __init__(self, x0: Tensor, like: Denoiser) -> None:
        super().__init__(like.sde)
        self.x0, self.like = x0, like

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        return self.x0

    def error(self, noise_level: float | Tensor) -> Tensor:
        return self.like.error(noise_level)


# --- noise -------------------------------------------------------------------------------------


def test_correlated_noise_is_white_in_each_slice_and_turns_with_distance() -> None:
    z = [0.0, 1.5, 2.5, 7.5, 12.5, 40.0]
    draws = CorrelatedNoise(1, [(v, 0) for v in z], (200, 200), length_mm=10.0)()
    covariance = torch.cov(draws.flatten(1))
    wanted = torch.eye(len(z))
    for i, a in enumerate(z):
        for j, b in enumerate(z):
            if a // 10 == b // 10:
                wanted[i, j] = math.cos(math.pi * (a - b) / 20)
    # across an anchor only the noise of that anchor is shared
    for i, a in enumerate(z[:4]):
        wanted[i, 4] = wanted[4, i] = math.sin(math.pi * a / 20) * math.cos(math.pi * 0.25 / 2)
    torch.testing.assert_close(covariance, wanted, atol=0.02, rtol=0)


def test_correlated_noise_depends_on_position_alone() -> None:
    whole = CorrelatedNoise(1, [(float(z), k) for z in range(-4, 30) for k in range(2)], (3, 3))
    some = CorrelatedNoise(1, [(7.0, 1), (25.0, 0)], (3, 3))
    for _ in range(3):
        draws, few = whole(), some()
        assert torch.equal(few[0], draws[2 * 11 + 1])
        assert torch.equal(few[1], draws[2 * 29])
    assert not torch.equal(draws[0], draws[1]), "samples have noise of their own"


# --- planes ------------------------------------------------------------------------------------


def test_planes_take_turns_on_their_own_sections() -> None:
    """Each prior sees images whose first axis is z, or y where it is axial; none is mirrored."""
    sde = VE(0.01, 10.0)
    shapes = {"axial": (4, 5), "coronal": (3, 5), "sagittal": (3, 4)}
    priors = {
        name: GaussianPrior(0.0, torch.kron(exponential(h, 3.0), exponential(w, 9.0)), (h, w), sde)
        for name, (h, w) in shapes.items()
    }
    turns = PlanesInTurn(priors)  # type: ignore[arg-type]
    x = torch.randn(3, 4, 5)
    t = sde.time(0.5)
    axial, coronal, sagittal, again = (turns.denoise(x, t) for _ in range(4))
    assert torch.equal(axial, priors["axial"].denoise(x, t))
    assert torch.equal(axial, again)
    for y in range(4):
        alone = priors["coronal"].denoise(x[None, :, y], t)[0]
        torch.testing.assert_close(coronal[:, y], alone)
    for column in range(5):
        alone = priors["sagittal"].denoise(x[None, :, :, column], t)[0]
        torch.testing.assert_close(sagittal[:, :, column], alone)
    pairs = torch.stack([x, -x], dim=1)  # two channels
    both = _Channels(priors["coronal"])
    turned = PlanesInTurn({"coronal": both}).denoise(pairs, t)
    torch.testing.assert_close(turned, torch.stack([coronal, -coronal], dim=1))


class _Channels(Denoiser):
    """A prior of one channel on each of several."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.sde)
        self.inner = inner

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        return self.inner.denoise(x_t.flatten(0, 1), t).unflatten(0, x_t.shape[:2])


# --- windows and shapes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size", "halo"), [(1, 16, 4), (16, 16, 4), (37, 8, 3), (5, 2, 9)]
)
def test_windows_keep_every_slice_once(count: int, size: int, halo: int) -> None:
    cut = windows(count, size, halo)
    assert [z for w in cut for z in w.kept] == list(range(count))
    for w in cut:
        assert w.slices.start == max(w.kept.start - halo, 0)
        assert w.slices.stop == min(w.kept.start + size + halo, count)


def test_chunks_and_volumes_denoise_the_same() -> None:
    prior, x = slices_prior(), torch.randn(7, SIDE, SIDE)
    times = torch.linspace(0.2, 0.6, 7, dtype=torch.float64)
    torch.testing.assert_close(InChunks(prior, 3).denoise(x, times), prior.denoise(x, times))
    volumes = torch.randn(2, 7, SIDE, SIDE)
    got = SliceBySlice(prior).denoise(volumes, times[:2])
    torch.testing.assert_close(got[1], prior.denoise(volumes[1], times[1]))


# --- reconstruction ----------------------------------------------------------------------------


def test_without_coupling_nothing_changes() -> None:
    """The same bits as the method on batches of slices, each with its own noise."""
    seen, prior, _ = toy()
    inner = seen.rescaled(0.0, 1.0)
    for method in ("pnp_admm", "dds"):
        expected = []
        for first in range(0, 2 * N, 5):
            pairs = [(z, k) for z in range(N) for k in range(2)][first : first + 5]
            index = torch.tensor([z for z, _ in pairs])
            noise = Noise([(7, z, k) for z, k in pairs], (SIDE, SIDE))
            with torch.inference_mode():
                problem = Problem(prior, inner.take(index), noise)
                expected.append(METHODS[method].run(problem, steps=4))
        got = reconstruct(seen, prior, method=method, steps=4, samples=2, seed=7, batch=5)
        draws = torch.cat(expected).unflatten(0, (N, 2))
        assert torch.equal(got.samples, draws)
        assert torch.equal(got.mean, draws.mean(dim=1))
        torch.testing.assert_close(got.std, draws.std(dim=1))


@pytest.mark.parametrize("kind", ["noise", "tv"])
def test_results_do_not_depend_on_the_batch(kind: str) -> None:
    seen, prior, _ = toy()
    kwargs: dict[str, Any] = {"steps": 4, "samples": 2}
    coupling = Coupling(kind, window=3, halo=2)  # type: ignore[arg-type]
    one = reconstruct(seen, prior, batch=1, coupling=coupling, **kwargs)
    many = reconstruct(seen, prior, batch=7, coupling=coupling, **kwargs)
    torch.testing.assert_close(one.samples, many.samples, rtol=1e-4, atol=1e-5)
    alone = reconstruct(seen, prior, **kwargs)
    assert distance(alone.samples, one.samples) > 0.01
    assert one.settings["coupling"] == kind
    assert "coupling" not in alone.settings


def test_noise_leaves_each_slice_its_own_law() -> None:
    """A slice alone and in its series: the same bits, since the noise depends on z only."""
    seen, prior, _ = toy()
    whole = reconstruct(seen, prior, method="dds", steps=4, coupling="noise", batch=1)
    some = torch.tensor([2, 5])
    part = reconstruct(
        seen.take(some), prior, method="dds", steps=4, coupling="noise", positions=[2, 5], batch=1
    )
    assert torch.equal(part.samples, whole.samples[some])


def test_noise_makes_neighbours_alike_without_changing_their_spread() -> None:
    """Exact sampler, Gaussian prior: mean and variance of a slice are the posterior's."""
    seen, prior, _ = toy()
    two = seen.take(torch.tensor([3, 4]))
    kwargs: dict[str, Any] = {"method": "mmps", "steps": 30, "samples": 200, "batch": 400}
    coupled = reconstruct(two, prior, coupling="noise", z_mm=[0.0, 0.5], **kwargs)
    mask = seen.operator.mask.flatten()  # type: ignore[union-attr]
    exact = prior.posterior(torch.eye(SIDE**2)[mask], two.data[0].flatten()[mask], 0.3)
    spread = coupled.samples.std(dim=1)
    wanted = exact.covariance.diagonal().sqrt().reshape(SIDE, SIDE).float()
    assert float((spread[0] / wanted).log().abs().mean()) < 0.1
    assert distance(coupled.mean[0], exact.mean.reshape(SIDE, SIDE).float()) < 0.1
    apart = coupled.samples - coupled.mean[:, None]
    correlation = (apart[0] * apart[1]).mean() / (apart[0].std() * apart[1].std())
    assert float(correlation) > 0.9


def test_total_variation_comes_closer_to_the_posterior_of_the_volume() -> None:
    seen, prior, exact = toy(noise=1.0)
    kwargs: dict[str, Any] = {"method": "diffpir"}
    alone = reconstruct(seen, prior, **kwargs)
    coupled = reconstruct(seen, prior, coupling=Coupling("tv", gradient=0.4), **kwargs)
    # the mean absolute difference of neighbours is sqrt(2 (1 - e^{-1/6})) sqrt(2/pi) = 0.44
    assert distance(coupled.mean, exact) < 0.8 * distance(alone.mean, exact)
    steps = [float(torch.diff(x, dim=0).square().mean()) for x in (coupled.mean, alone.mean)]
    assert steps[0] < 0.9 * steps[1]


def test_weak_total_variation_is_none() -> None:
    seen, prior, _ = toy()
    weak = reconstruct(seen, prior, coupling=Coupling("tv", gradient=1e6))
    torch.testing.assert_close(weak.mean, reconstruct(seen, prior).mean, rtol=1e-3, atol=1e-4)


def test_windows_agree_with_the_whole_away_from_their_ends() -> None:
    seen, prior, _ = toy(noise=1.0)
    kwargs: dict[str, Any] = {"method": "diffpir"}
    alone = reconstruct(seen, prior, **kwargs)
    whole = reconstruct(seen, prior, coupling=Coupling("tv", gradient=0.4), **kwargs)
    cut = Coupling("tv", gradient=0.4, window=2, halo=3)
    parts = reconstruct(seen, prior, coupling=cut, **kwargs)
    no_halo = reconstruct(seen, prior, coupling=dataclasses.replace(cut, halo=0), **kwargs)
    error = distance(parts.mean, whole.mean)
    assert error < 0.2 * distance(alone.mean, whole.mean)
    assert error < 0.5 * distance(no_halo.mean, whole.mean)
    assert parts.nfe > whole.nfe == 100, "halos are paid for"


def test_planes_come_closer_to_the_posterior_of_the_volume() -> None:
    seen, prior, exact = toy(noise=1.0)
    kwargs: dict[str, Any] = {"method": "diffpir"}
    side = torch.kron(ALONG, exponential(SIDE, 2.0))
    other = GaussianPrior(0.0, side, (N, SIDE), prior.sde)
    alone = reconstruct(seen, prior, **kwargs)
    three = Coupling("planes", planes={"coronal": other, "sagittal": other})
    coupled = reconstruct(seen, prior, coupling=three, **kwargs)
    assert distance(coupled.mean, exact) < 0.8 * distance(alone.mean, exact)
    two = reconstruct(seen, prior, steps=4, coupling=Coupling("planes", planes={"coronal": other}))
    assert "axial and coronal priors only" in two.status
    assert two.nfe == (2 * N + 2 * SIDE) // N, "two calls of 8 axial images, two of 6 coronal ones"


def test_a_volume_measured_as_a_whole_takes_a_prior_of_slices() -> None:
    """One operator on (z, y, x): the prior serves its slices, coupled or not."""
    seen, prior, exact = toy(noise=1.0)
    kwargs: dict[str, Any] = {"method": "diffpir", "samples": 4}
    mask = seen.operator.mask.expand(N, SIDE, SIDE).clone()  # type: ignore[union-attr]
    whole = Measurement(Mask(mask), seen.data[None], seen.noise, "MR", (1.0, 1.0))
    alone = reconstruct(whole, prior, **kwargs)
    assert alone.samples.shape == (1, 4, N, SIDE, SIDE)
    coupled = reconstruct(whole, prior, coupling=Coupling("tv", gradient=0.4), **kwargs)
    errors = [distance(result.samples[0, 0], exact) for result in (coupled, alone)]
    assert errors[0] < 0.8 * errors[1]
    with pytest.raises(UnsupportedError, match="measured as a whole"):
        reconstruct(whole, prior, coupling="noise")


# --- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [Coupling(), Coupling("tv", window=3, halo=1)])
def test_parts_computed_by_different_processes_merge_to_the_same_bits(coupling: Coupling) -> None:
    seen, prior, _ = toy()
    kwargs: dict[str, Any] = {"steps": 3, "samples": 2, "batch": 3, "coupling": coupling}
    whole = reconstruct(seen, prior, **kwargs)
    on_disk: dict[int, Batch] = {}
    for worker in (2, 0, 1):
        plan = Plan(seen, prior, **kwargs)
        plan.run(on_disk, claim=lambda number, worker=worker: number % 3 == worker)
    merged = Plan(seen, prior, **kwargs).result(on_disk)
    assert torch.equal(merged.samples, whole.samples)
    assert torch.equal(merged.mean, whole.mean)
    assert (merged.nfe, merged.operator_calls) == (whole.nfe, whole.operator_calls)
    lean = Plan(seen, prior, **kwargs).result(on_disk, keep_samples=False)
    assert lean.samples.shape == (N, 0, SIDE, SIDE)
    assert torch.equal(lean.mean, whole.mean)
    assert torch.equal(lean.std, whole.std)


# --- memory ------------------------------------------------------------------------------------


class _Hungry(Denoiser):
    """Memory runs out above a number of images."""

    def __init__(self, inner: Denoiser, most: int, error: Exception) -> None:
        super().__init__(inner.sde)
        self.inner, self.most, self.error_raised, self.seen = inner, most, error, []  # type: ignore[var-annotated]

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        self.seen.append(len(x_t))
        if len(x_t) > self.most:
            raise self.error_raised
        return self.inner.denoise(x_t, t)

    def error(self, noise_level: float | Tensor) -> Tensor:
        return self.inner.error(noise_level)


OUT = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
)


@pytest.mark.parametrize("error", OUT, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("kind", ["none", "tv"])
def test_smaller_groups_where_memory_runs_out(error: Exception, kind: str) -> None:
    seen, prior, _ = toy()
    hungry = _Hungry(prior, 2, error)
    kwargs: dict[str, Any] = {"steps": 3, "coupling": kind}
    got = reconstruct(seen, hungry, batch=8, **kwargs)
    torch.testing.assert_close(
        got.mean, reconstruct(seen, prior, batch=8, **kwargs).mean, rtol=1e-4, atol=1e-5
    )
    assert hungry.seen[:3] == [8, 4, 2]
    assert max(hungry.seen[3:]) == 2
    with pytest.raises(ResourceError, match="one image of 6 x 6 at a time"):
        reconstruct(seen, _Hungry(prior, 0, error), **kwargs)


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    seen, prior, _ = toy()
    hungry = _Hungry(prior, 2, RuntimeError("some other failure"))
    with pytest.raises(RuntimeError, match="some other"):
        reconstruct(seen, hungry, batch=8)


def test_batch_is_chosen_by_the_measured_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 100 MiB and 10 MiB an image, 145 MiB hold four images."""
    seen, prior, _ = toy()
    plan = Plan(seen, prior, batch=8)
    mib = 2**20
    monkeypatch.setattr(
        sys.modules["inverse.reconstruct"],
        "peak_bytes",
        lambda action, device: (100 + 10 * plan.limit) * mib,
    )
    assert plan.fit(145 * mib) == 4
    plan.limit = 8
    assert plan.fit(1000 * mib) == 8, "never more than the batch"
    with pytest.raises(ResourceError, match=r"needs 110 MiB, of which the limit allows 109 MiB"):
        plan.fit(109 * mib)


def test_need_is_measured_on_the_process() -> None:
    """A denoiser that holds 40 MiB an image is found out, also beside what is held already."""
    seen, prior, _ = toy()

    class Holds(_Hungry):
        def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
            held = torch.ones(len(x_t), 10 * 2**20)
            return self.inner.denoise(x_t, t) * held[:, 0, None, None]

    plan = Plan(seen, Holds(prior, 9, MemoryError()), batch=8, steps=1)
    from inverse.memory import peak_bytes

    base = peak_bytes(lambda: None, torch.device("cpu"))
    with pytest.raises(ResourceError):
        plan.fit(base // 2)
    plan.limit = 8
    assert plan.fit(base + 180 * 2**20) in (3, 4, 5)
    reconstruct(seen, prior, max_memory=1 << 50)


# --- refusals ----------------------------------------------------------------------------------


def test_what_cannot_be_coupled_is_refused() -> None:
    seen, prior, _ = toy()
    with pytest.raises(ReconError, match="no coupling 'glue'; there are none, noise, tv, planes"):
        reconstruct(seen, prior, coupling="glue")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="choose coupling 'noise'"):
        reconstruct(seen, prior, method="mmps", coupling="tv")
    with pytest.raises(ReconError, match="needs priors of coronal or sagittal"):
        Coupling("planes")
    with pytest.raises(ReconError, match="coronal and sagittal, got oblique"):
        Coupling("planes", planes={"oblique": prior})  # type: ignore[dict-item]
    for wrong in ({"gradient": 0.0}, {"length_mm": -1.0}, {"sweeps": 0}, {"window": 0}):
        with pytest.raises(ReconError, match=r"must be positive|needs at least"):
            Coupling("tv", **wrong)  # type: ignore[arg-type]
    for z in ([0, 1, 2, 2, 3, 4, 5, 6], [0, 2, 1, 3, 4, 5, 6, 7], [math.nan] * 8):
        with pytest.raises(InputError, match="ascend"):
            reconstruct(seen, prior, coupling="tv", z_mm=z)
    with pytest.raises(ReconError, match="number the 8 slices, got 2"):
        reconstruct(seen, prior, coupling="tv", z_mm=[0.0, 1.0])
    tv = ThroughPlaneTV(prior, [0.0, 1.0])
    with pytest.raises(GeometryError, match="2 slices, got 3"):
        tv.denoise(torch.zeros(3, SIDE, SIDE), 0.5)


def test_descending_positions_and_one_slice_are_served() -> None:
    seen, prior, _ = toy()
    up = reconstruct(seen, prior, steps=3, coupling="tv", z_mm=[float(z) for z in range(N)])
    down = reconstruct(seen, prior, steps=3, coupling="tv", z_mm=[float(-z) for z in range(N)])
    torch.testing.assert_close(up.mean, down.mean)
    one = seen.take(torch.tensor([3]))
    for kind in ("noise", "tv"):
        result = reconstruct(one, prior, steps=3, coupling=kind)  # type: ignore[arg-type]
        assert "one slice" in result.status
    alone = reconstruct(one, prior, steps=3)
    assert torch.equal(reconstruct(one, prior, steps=3, coupling="tv").mean, alone.mean)


CARD = PriorCard(
    name="tiny",
    modality="MR",
    unit="relative",
    offset=0.0,
    scale=1.0,
    value_range=(0.0, 2.0),
    pixel_mm_range=(0.5, 2.0),
    shape=(8, 8),
    sigma_range=(0.01, 50.0),
)


def network(channels: int = 1, **changes: Any) -> NetworkPrior:
    net = UNet(NetworkConfig(channels=channels, widths=(8,), blocks=1, embedding=8))
    return NetworkPrior(net, dataclasses.replace(CARD, **changes), dtype=torch.float32)


def test_networks_of_planes_must_fit_each_other_and_the_voxels() -> None:
    seen, _, _ = toy()

    def run(other: NetworkPrior, z: Sequence[float] = range(N)) -> str:
        coupling = Coupling("planes", planes={"coronal": other})
        return reconstruct(seen, network(), steps=2, coupling=coupling, z_mm=z).status

    assert "axial and coronal" in run(network(orientation="coronal"))
    with pytest.raises(UnsupportedError, match="cubic voxels, got slices 3 to 3 mm apart"):
        run(network(), [3.0 * z for z in range(N)])
    with pytest.raises(CheckpointError, match="differs from the axial"):
        run(network(scale=2.0))
    with pytest.raises(CheckpointError, match="of sagittal images"):
        run(network(orientation="sagittal"))
