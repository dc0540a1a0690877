"""Trust: uncertainty, hallucination and detectability against closed forms and promised rates."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from affine import dense, field, parts, smooth_prior
from laws import inner, norm, random
from scipy import stats
from torch import Tensor

from inverse.errors import GeometryError, InputError, NumericalError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.linop import ComplexFromReal, Identity, LinearOperator
from inverse.operators.mask import Mask
from inverse.operators.metal import UnspoiledRays
from inverse.operators.mri import CartesianMRI, Sense, cartesian_mask
from inverse.trust import (
    Moments,
    auc,
    by_first_axis,
    by_frequency,
    contrast_recovery,
    crc,
    d_prime,
    hallucination_maps,
    hotelling,
    interval,
    laguerre_gauss,
    prior_part,
    rcps,
    residual_chi2,
    risk,
    split,
    whiteness,
)

SIDE = 8
PIXELS = 20


def operators() -> dict[str, LinearOperator]:
    mask = cartesian_mask((SIDE, SIDE), 2.0, 0.25)
    maps = random((2, SIDE, SIDE), torch.complex64, 5)
    return {
        "ct": RayTransform(ParallelBeam.sparse(4, (SIDE, SIDE), 1.0), (SIDE, SIDE), 1.0),
        "mri": CartesianMRI(mask),
        "mri, real": CartesianMRI(mask) @ ComplexFromReal((SIDE, SIDE)),
        "coils": Sense(maps, cartesian_mask((SIDE, SIDE), 4.0, 0.25)),
    }


OPERATORS = operators()


def matrix(operator: LinearOperator) -> Tensor:
    """On flattened images; complex where the images are, else real."""
    if not operator.dtype.is_complex:
        return dense(operator).double()
    d = math.prod(operator.in_shape)
    columns = operator(torch.eye(d, dtype=operator.dtype).reshape(d, *operator.in_shape))
    return columns.flatten(1).T.to(torch.complex128)


def projector(operator: LinearOperator) -> Tensor:
    """``A^+ A`` by the dense SVD, without singular values at the rounding of float32."""
    a = matrix(operator)
    return torch.linalg.pinv(a, rtol=1e-5) @ a


# --- moments and intervals --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_streamed_moments_are_those_of_all_samples(dtype: torch.dtype) -> None:
    x = random((11, 3, 4), dtype, 0) + 1000.0
    moments = Moments()
    for part in (x[:1], x[1:5], x[5:6], x[6:]):
        moments.add(part)
    wide = x.to(torch.complex128 if dtype.is_complex else torch.float64)
    assert moments.count == 11
    torch.testing.assert_close(moments.mean, wide.mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.std, wide.std(dim=0), rtol=1e-10, atol=0)


def test_moments_refuse_what_has_no_answer() -> None:
    moments = Moments()
    with pytest.raises(InputError, match="at least 1"):
        _ = moments.mean
    with pytest.raises(GeometryError, match="k at least 1"):
        moments.add(torch.zeros(0, 2))
    moments.add(torch.zeros(1, 2))
    with pytest.raises(InputError, match="at least 2"):
        _ = moments.std
    with pytest.raises(GeometryError, match="holds samples of shape"):
        moments.add(torch.zeros(1, 3))
    with pytest.raises(InputError, match="NaN"):
        moments.add(torch.tensor([[0.0, torch.nan]]))
    assert moments.count == 1


@pytest.mark.parametrize("samples", [2, 4, 16])
def test_interval_holds_one_more_draw_as_often_as_it_says(samples: int) -> None:
    draws = 3 + 2 * random((samples + 1, 40000), torch.float64, samples)
    x, truth = draws[:-1], draws[-1]
    low, high = interval(x.mean(dim=0), x.std(dim=0), samples, 0.8)
    held = float(((low < truth) & (truth < high)).double().mean())
    assert abs(held - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 40000)


def test_interval_of_many_samples_is_the_normal_one() -> None:
    low, high = interval(torch.ones(1), torch.full((1,), 2.0), 10**9, 0.95)
    assert float(high) == pytest.approx(1 + 2 * 1.959964, abs=1e-5)
    assert float(low) == pytest.approx(1 - 2 * 1.959964, abs=1e-5)


def test_interval_refuses_bad_input() -> None:
    one = torch.ones(1)
    for args, match in (
        ((one, one, 1, 0.9), "at least 2 samples"),
        ((one, one, 4, 1.0), "between 0 and 1"),
        ((one, -one, 4, 0.9), "at least 0"),
        ((one, one * torch.nan, 4, 0.9), "at least 0"),
        ((one + 0j, one, 4, 0.9), "real values"),
    ):
        with pytest.raises(InputError, match=match):
            interval(*args)


# --- residuals --------------------------------------------------------------------------------


def joint(kind: str, pairs: int, seed: int = 0) -> tuple[Measurement, Tensor, Tensor]:
    """Pairs of truth and data, and an exact posterior sample and the posterior mean of each."""
    prior, blank, truth = field(kind, SIDE, pairs, seed)
    clean, noise = blank.operator(truth), float(blank.noise)
    n = noise * random(tuple(clean.shape), torch.float32, seed + 2)
    if clean.is_complex():
        n = torch.complex(n, noise * random(tuple(clean.shape), torch.float32, seed + 3))
        n = torch.where(clean.abs().sum(dim=0) > 0, n, 0)
    measurement = replace(blank, data=clean + n)  # noise in rays beside the object, too
    a = dense(measurement.operator).double()
    seen = a.any(dim=1)
    y = parts(measurement.data.flatten(1))
    exact = prior.posterior(a[seen], y[0, seen], noise)
    gain = exact.covariance @ a[seen].T / noise**2
    mean = y[:, seen].double() @ gain.T
    factor = torch.linalg.cholesky(exact.covariance + 1e-10 * torch.eye(SIDE**2))
    z = random((pairs, SIDE**2), torch.float64, seed + 1)
    images = [x.float().reshape(pairs, SIDE, SIDE) for x in (mean + z @ factor.T, mean)]
    return measurement, images[0], images[1]


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_residuals_of_posterior_samples_are_noise(kind: str) -> None:
    """p-values of chi-square are uniform over problems, and intervals hold at their level."""
    measurement, sample, mean = joint(kind, 400)
    shape = measurement.operator.out_shape
    groups = [None, by_first_axis(shape) if kind == "ct" else by_frequency(shape, 3)]
    for group in groups:
        test = residual_chi2(measurement, sample, group, level=0.9)
        inside = ((test.low < test.value) & (test.value < test.high)).double().mean(dim=0)
        assert bool(((inside - 0.9).abs() < 4 * math.sqrt(0.09 / 400)).all())
        for column in test.p.T:
            assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
        assert bool((test.p_slice <= 1).all())
        parts = 2 if kind == "mri" else 1
        assert int(test.degrees.sum()) == parts * measurement.operator.measured
    assert float(residual_chi2(measurement, mean).value.mean()) < 0.95  # the mean fits noise


def test_chi2_by_view_finds_the_bad_view() -> None:
    measurement, sample, _ = joint("ct", 1)
    data = measurement.data.clone()
    data[:, 4] += 4 * measurement.noise
    bad = Measurement(measurement.operator, data, measurement.noise, "MR", (1.0, 1.0))
    test = residual_chi2(bad, sample, by_first_axis(measurement.operator.out_shape))
    assert int(test.p[0].argmin()) == 4
    assert float(test.p_slice) < 1e-4
    assert float(test.value[0, 4]) > float(test.high[4])


def test_chi2_in_numbers() -> None:
    """Two groups of a Gaussian residual whose sums are known."""
    data = torch.tensor([[[3.0, 4.0, 0.0], [6.0, 0.0, 0.0]]])
    measurement = Measurement(Identity((2, 3)), data, torch.tensor(2.0), "MR", (1.0, 1.0))
    test = residual_chi2(measurement, torch.zeros_like(data), by_first_axis((2, 3)), level=0.9)
    torch.testing.assert_close(test.value, torch.tensor([[6.25 / 3, 3.0]], dtype=torch.float64))
    p = [2 * float(stats.chi2.sf(t, 3)) for t in (6.25, 9.0)]
    torch.testing.assert_close(test.p, torch.tensor([p], dtype=torch.float64))
    assert float(test.high[0]) == pytest.approx(7.814728 / 3, abs=1e-6)  # chi-square tables
    assert float(test.low[0]) == pytest.approx(0.351846 / 3, abs=1e-6)
    assert float(test.p_slice) == pytest.approx(2 * p[1])


def test_unmeasured_data_do_not_count() -> None:
    """Masks, spoiled rays and coils; rays beside the object are measured though A x is zero."""
    scan = RayTransform(ParallelBeam((0.0, 1.0), 40, 1.0), (SIDE, SIDE), 1.0)
    trace = torch.zeros(2, 40, dtype=torch.bool)
    trace[1, 18:22] = True
    rays = UnspoiledRays(scan, trace)
    noise = 0.1 * random((1, 2, 40), torch.float32, 0)
    test = residual_chi2(
        Measurement(rays, torch.where(rays.good, noise, 0), torch.tensor(0.1), "CT", (1, 1), 0.02),
        torch.zeros(1, SIDE, SIDE),
        by_first_axis((2, 40)),
    )
    assert test.degrees.tolist() == [40, 36]
    coils = OPERATORS["coils"]
    data = torch.where(coils.mask, random((1, 2, SIDE, SIDE), torch.complex64, 1), 0)
    seen = Measurement(coils, data, torch.tensor(1.0), "MR", (1.0, 1.0))
    test = residual_chi2(seen, torch.zeros(1, SIDE, SIDE) + 0j, by_first_axis((2, SIDE, SIDE)))
    assert test.degrees.tolist() == [coils.measured] * 2
    hidden = Measurement(
        Mask(torch.eye(SIDE, dtype=torch.bool)), torch.ones(1, SIDE, SIDE), torch.tensor(1.0),
        "MR", (1.0, 1.0),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="set the data"):
        residual_chi2(hidden, torch.zeros(1, SIDE, SIDE))


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_whiteness_has_its_null_variance(kind: str, axis: int) -> None:
    measurement, sample, _ = joint(kind, 1500, seed=7)
    test = whiteness(measurement, sample, axis)
    ratio = float(test.value.square().mean()) / test.variance
    assert abs(ratio - 1) < 4 * math.sqrt(2 / 1500)
    assert abs(float(test.value.mean())) < 4 * math.sqrt(test.variance / 1500)
    assert float((test.p < 0.05).double().mean()) == pytest.approx(0.05, abs=0.025)


def test_whiteness_finds_stripes_along_their_axis_only() -> None:
    stripes = random((1, 20, 1), torch.float32, 3).expand(1, 20, 30)
    data = stripes + random((1, 20, 30), torch.float32, 4)
    measurement = Measurement(Identity((20, 30)), data, torch.tensor(1.0), "MR", (1.0, 1.0))
    x = torch.zeros(1, 20, 30)
    along, across = whiteness(measurement, x, -1), whiteness(measurement, x, -2)
    assert float(along.value) > 0.25
    assert float(along.p) < 1e-10
    assert float(across.p) > 1e-3
    # a 1-2-1 residual by hand: (1*2 + 2*1) / (1 + 4 + 1), P = 2 pairs of N = 3
    hand = Measurement(
        Identity((1, 3)), torch.tensor([[[1.0, 2.0, 1.0]]]), torch.tensor(3.0), "MR", (1, 1)
    )
    test = whiteness(hand, torch.zeros(1, 1, 3), -1)
    assert float(test.value) == pytest.approx(4 / 6)
    assert test.variance == pytest.approx(2 / 15)
    assert float(test.p) == pytest.approx(2 * stats.norm.sf(4 / 6 / math.sqrt(2 / 15)))


def test_residual_tests_refuse_bad_input() -> None:
    measurement, x, _ = joint("ct", 2)
    shape = measurement.operator.out_shape
    with pytest.raises(GeometryError, match="one sample a slice"):
        residual_chi2(measurement, x[:1])
    with pytest.raises(InputError, match="NaN"):
        whiteness(measurement, x * torch.nan, -1)
    with pytest.raises(GeometryError, match="groups must have"):
        residual_chi2(measurement, x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match="integers"):
        residual_chi2(measurement, x, torch.zeros(shape))
    with pytest.raises(InputError, match="between 0 and 1"):
        residual_chi2(measurement, x, level=0.0)
    with pytest.raises(GeometryError, match="no axis"):
        whiteness(measurement, x, 2)
    lines = Mask(torch.arange(SIDE).expand(SIDE, SIDE) % 2 == 0)
    seen = Measurement(lines, lines(x), torch.tensor(1.0), "MR", (1.0, 1.0))
    with pytest.raises(InputError, match="no two neighbours"):
        whiteness(seen, torch.zeros_like(x), -1)
    with pytest.raises(InputError, match="fits the noise exactly"):
        whiteness(seen, x, -2)


def test_rings_of_k_space() -> None:
    rings = by_frequency((2, 8, 6), 4)
    assert int(rings[0, 4, 3]) == 0
    assert int(rings[1, 4, 0]) == 3  # |k| = 1/2
    assert int(rings[0, 0, 0]) == 3  # the corner
    assert int(rings[0, 6, 3]) == 2  # |k| = 1/4: 4 * (1/4) / (1/2)
    with pytest.raises(InputError, match="one ring"):
        by_frequency((8, 8), 0)
    with pytest.raises(GeometryError):
        by_frequency((8,), 2)
    with pytest.raises(GeometryError):
        by_first_axis(())


# --- conformal intervals ----------------------------------------------------------------------


def test_conformal_factors_by_hand() -> None:
    """100 images of 10 pixels whose errors are 1 to 1000 standard deviations."""
    truth = (1 + torch.arange(1000.0)).reshape(100, 10)
    mean, std = torch.zeros(100, 10), torch.ones(100, 10)
    # e P(Bin(100, 0.3) <= 21) = 0.0783 and that of 22 is 0.130: at most 210 of 1000 outside
    fit = rcps(truth, mean, std, alpha=0.3, delta=0.1)
    assert fit.factor == 1000 - 210
    assert fit.risk == pytest.approx(0.21)
    # 26 patients: 26 h(r, 0.1) = ln 10 at r = 0.00385, and e P(Bin(26, 0.1) = 0) is above 0.1
    few = (1 + torch.arange(26 * 1000.0)).reshape(26, 1000)
    fit = rcps(few, torch.zeros_like(few), torch.ones_like(few), alpha=0.1, delta=0.1)
    assert fit.factor == 26000 - 100
    # budget (0.3 * 101 - 1) / 100 = 0.293
    fit = crc(truth, mean, std, alpha=0.3)
    assert fit.factor == 1000 - 293
    assert risk(truth, mean, std, fit.factor) == pytest.approx(0.293)
    assert risk(truth, mean, std, fit.factor - 1) == pytest.approx(0.294)
    low, high = fit.interval(torch.ones(2), torch.full((2,), 2.0))
    assert low.tolist() == [1 - 1414] * 2
    assert high.tolist() == [1 + 1414] * 2
    torch.testing.assert_close(crc(truth, mean, 2 * std, alpha=0.3).factor, 707 / 2)


def test_a_budget_of_nothing_takes_the_largest_ratio() -> None:
    """Nine patients leave no pixel outside at a tenth, however many pixels they have."""
    truth = random((9, 30000), torch.float32, 0)
    fit = crc(truth, torch.zeros_like(truth), torch.full_like(truth, 0.3), alpha=0.1)
    assert fit.factor == pytest.approx(float(truth.abs().max()) / 0.3)
    assert fit.risk == 0.0


def test_patients_count_once_whatever_they_bring() -> None:
    """One patient of 19 bad slices beside 19 good ones of a slice each."""
    truth = torch.cat([torch.full((19, 4), 5.0), torch.zeros(19, 4)])
    mean, std = torch.zeros_like(truth), torch.ones_like(truth)
    patients = [0] * 19 + list(range(1, 20))
    assert crc(truth, mean, std, alpha=0.1, patients=patients).factor == 0
    assert crc(truth, mean, std, alpha=0.1).factor == 5
    assert risk(truth, mean, std, 1.0, patients=patients) == pytest.approx(1 / 20)
    mask = torch.tensor([True, False, False, False])
    truth[:, 1:] = 100.0
    assert crc(truth, mean, std, alpha=0.1, mask=mask).factor == 5


def population(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, some much harder than others, with a spread that is too small."""
    hard = torch.distributions.LogNormal(0.0, 0.8)
    torch.manual_seed(seed)
    scale = hard.sample((count, 1))
    truth = scale * torch.randn(count, PIXELS)
    return truth, torch.zeros(count, PIXELS), torch.full((count, PIXELS), 0.5)


def test_promised_risk_over_200_random_splits() -> None:
    """RCPS fails in at most delta of the fits, CRC errs by alpha on average over them."""
    alpha, delta, n, splits = 0.2, 0.2, 100, 200
    pool = population(2000, 0)
    generator = torch.Generator().manual_seed(1)
    rates: dict[str, list[float]] = {"rcps": [], "crc": []}
    for _ in range(splits):
        order = torch.randperm(2000, generator=generator)
        fit, new = ([x[i] for x in pool] for i in (order[:n], order[n:]))
        for name, result in (
            ("rcps", rcps(*fit, alpha=alpha, delta=delta)),
            ("crc", crc(*fit, alpha=alpha)),
        ):
            rates[name].append(risk(*new, result.factor))
    failed = torch.tensor([r > alpha for r in rates["rcps"]]).double().mean()
    assert float(failed) <= delta + 3 * math.sqrt(delta * (1 - delta) / splits)
    mean, error = torch.tensor(rates["crc"]).mean(), torch.tensor(rates["crc"]).std()
    assert float(mean) <= alpha + 3 * float(error) / math.sqrt(splits)
    assert float(mean) > alpha - 2 / n - 3 * float(error) / math.sqrt(splits)  # and no slacker
    # without the price of the guarantee the fit itself holds alpha, and half of them fail
    assert float(torch.tensor([r > alpha for r in rates["crc"]]).double().mean()) > 0.3


def test_conformal_fits_refuse_what_cannot_be_promised() -> None:
    truth, mean, std = population(20, 0)
    with pytest.raises(InputError, match="at least 22 patients"):
        rcps(truth, mean, std, alpha=0.1, delta=0.1)
    with pytest.raises(InputError, match="at least 99 patients"):
        crc(truth, mean, std, alpha=0.01)
    with pytest.raises(InputError, match="zero at too many"):
        crc(truth, mean, torch.zeros_like(std))
    assert crc(mean, mean, torch.zeros_like(std)).factor == 0
    with pytest.raises(InputError, match="between 0 and 1"):
        rcps(truth, mean, std, alpha=0.0)
    with pytest.raises(InputError, match="delta"):
        rcps(truth, mean, std, delta=1.0)
    with pytest.raises(GeometryError, match="alike"):
        crc(truth[:3], mean, std)
    with pytest.raises(GeometryError, match="broadcast"):
        crc(truth, mean, std, mask=torch.ones(7))
    with pytest.raises(GeometryError, match="name one for each"):
        crc(truth, mean, std, patients=[1])
    with pytest.raises(InputError, match="without pixels"):
        crc(truth, mean, std, mask=torch.zeros(PIXELS))
    with pytest.raises(InputError, match="NaN"):
        crc(truth * torch.nan, mean, std)
    with pytest.raises(InputError, match="at least 0"):
        risk(truth, mean, std, -1.0)


# --- measured part and null space -------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_split_is_that_of_the_dense_svd(name: str) -> None:
    operator = OPERATORS[name]
    x = random((3, *operator.in_shape), operator.dtype, 0)
    part = split(operator, x)
    exact = (x.flatten(1).to(projector(operator).dtype) @ projector(operator).T).reshape(x.shape)
    true_error = (part.measured - exact).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert bool(part.converged.all())
    assert bool((true_error <= part.error).all())  # the estimate is honest
    assert float(true_error.max()) < 1e-5
    assert float(part.error.max()) < 1e-4
    torch.testing.assert_close(part.measured + part.null, x)
    leak = (
        operator(part.null).flatten(1).norm(dim=1) / operator(x).flatten(1).norm(dim=1)
    ).double()
    torch.testing.assert_close(part.leak, leak, rtol=1e-2, atol=1e-8)
    assert float(leak.max()) <= 1e-5
    single = split(operator, x[1])
    torch.testing.assert_close(single.null, part.null[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_null_part_is_an_orthogonal_projection(name: str) -> None:
    """P0 P0 = P0, <P0 x, z> = <x, P0 z>, and the parts are orthogonal."""
    operator = OPERATORS[name]
    x, z = (random(operator.in_shape, operator.dtype, seed) for seed in (1, 2))
    part = split(operator, x)
    twice = split(operator, part.null)
    assert norm(twice.null - part.null) < 2e-5 * norm(x)
    again = split(operator, part.measured)
    assert norm(again.null) < 2e-5 * norm(x)
    assert bool(twice.converged)
    assert bool(again.converged)
    assert abs(inner(part.null, z) - inner(x, split(operator, z).null)) < 2e-5 * norm(x) * norm(z)
    assert abs(inner(part.null, part.measured)) < 2e-5 * norm(x) ** 2
    assert 0.1 < norm(part.null) / norm(x) < 0.99


def test_split_of_what_is_seen_wholly_or_not_at_all() -> None:
    x = random((2, 3, 3), torch.float32, 0)
    part = split(Identity((3, 3)), x)
    torch.testing.assert_close(part.measured, x)
    mask = Mask(torch.tensor([[True, False]]))
    part = split(mask, torch.tensor([[[0.0, 3.0]], [[2.0, 3.0]], [[0.0, 0.0]]]))
    assert part.null.tolist() == [[[0.0, 3.0]], [[0.0, 3.0]], [[0.0, 0.0]]]
    assert part.error.tolist()[::2] == [0.0, 0.0]
    assert bool(part.converged.all())


def test_a_split_that_did_not_converge_says_so() -> None:
    """Stopped early, or by rounding in directions that the operator hardly sees."""
    operator = RayTransform(ParallelBeam.sparse(6, (16, 16), 1.0), (16, 16), 1.0)
    i = torch.linspace(-1, 1, 16)
    smooth = torch.exp(-3 * ((i[:, None] - 0.2) ** 2 + i**2))
    x = torch.stack([random((16, 16), torch.float32, 0), smooth])
    exact = (x.flatten(1).double() @ projector(operator).T).reshape(x.shape)

    def true_error(measured: Tensor) -> Tensor:
        return (measured - exact).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)

    part = split(operator, x, max_iter=60)
    assert part.iterations == 60
    assert not bool(part.converged.any())
    assert bool((part.error > true_error(part.measured) / 2).all())
    part = split(operator, x, tol=5e-5)
    assert part.iterations < 1000
    assert not bool(part.converged[1])
    assert float(part.leak[1]) < 5e-6  # though the data agree
    assert float(true_error(part.measured)[1]) > 5e-5
    assert bool((part.error >= true_error(part.measured)).all())
    # an image that is nearly all null: its parts are right to a hundredth, the data are not
    parts = split(operator, x[:1])
    part = split(operator, 1000 * parts.null + parts.measured, tol=1e-2, max_iter=3)
    assert float(part.error) < 1e-2
    assert float(part.leak) > 1e-2
    assert not bool(part.converged)


def test_hallucination_maps_name_the_culprit() -> None:
    """A change of what is measured shows in one map, of what is not in the other."""
    operator = OPERATORS["mri"]
    truth, change = (random((1, SIDE, SIDE), torch.complex64, seed) for seed in (3, 4))
    seen = projector(operator).to(torch.complex64)
    inside = (change.flatten(1) @ seen.T).reshape(change.shape)
    invented = hallucination_maps(operator, truth + change - inside, truth)
    assert norm(invented.measured) < 1e-5 * norm(change)
    torch.testing.assert_close(invented.null, change - inside, rtol=0, atol=1e-5)
    against = hallucination_maps(operator, truth + inside, truth)
    torch.testing.assert_close(against.measured, inside, rtol=0, atol=1e-5)
    assert norm(against.null) < 1e-5 * norm(change)
    both = hallucination_maps(operator, truth + change, truth)
    torch.testing.assert_close(both.measured + both.null, change, rtol=0, atol=1e-5)
    with pytest.raises(GeometryError, match="one shape"):
        hallucination_maps(operator, truth, truth[0])


@pytest.mark.parametrize("name", ["ct", "mri, real"])
def test_prior_part_on_the_gaussian_fixture(name: str) -> None:
    """sd(P0 x) = sqrt(diag(P0 C P0)), by samples whose covariance is C exactly."""
    operator, prior = OPERATORS[name], smooth_prior(SIDE)
    a = dense(operator).double()
    a = a[a.any(dim=1)]
    exact = prior.posterior(a, a @ random((SIDE**2,), torch.float64, 0), 0.3)
    d = SIDE**2
    columns = torch.linalg.cholesky(exact.covariance + 1e-9 * torch.eye(d)).T
    columns = math.sqrt((2 * d - 1) / 2) * torch.cat([columns, -columns])
    samples = (exact.mean + columns).float().reshape(2 * d, SIDE, SIDE)
    part = prior_part(partial(split, operator), torch.split(samples, 50))
    p0 = torch.eye(d) - projector(operator)
    sd = (p0 @ exact.covariance @ p0).diagonal().clamp_min(0).sqrt().reshape(SIDE, SIDE)
    assert part.converged
    assert part.error < 1e-4
    assert part.leak < 1e-5
    torch.testing.assert_close(part.std, sd, rtol=1e-3, atol=1e-4)
    seen = (torch.eye(d) - p0) @ exact.covariance @ (torch.eye(d) - p0)
    rest = seen.diagonal().sqrt().reshape(SIDE, SIDE)
    torch.testing.assert_close(part.measured_std, rest, rtol=1e-3, atol=1e-4)
    null = (p0 @ exact.mean).abs().reshape(SIDE, SIDE)
    measured = (exact.mean - p0 @ exact.mean).abs().reshape(SIDE, SIDE)
    torch.testing.assert_close(part.share, null / (null + measured), rtol=0, atol=2e-3)
    assert float(part.std.mean()) > 0.05


def test_share_of_the_prior_in_numbers() -> None:
    operator = Mask(torch.tensor([[True, False, True]]))
    samples = torch.tensor([[[1.0, 2.0, 0.0]], [[3.0, 2.0, 0.0]]])
    part = prior_part(partial(split, operator), [samples])
    assert part.share.tolist() == [[0.0, 1.0, 0.0]]
    assert part.std.tolist() == [[0.0, 0.0, 0.0]]
    assert float(part.measured_std[0, 0]) == pytest.approx(math.sqrt(2))


def test_split_refuses_bad_input() -> None:
    operator = OPERATORS["ct"]
    x = torch.ones(1, SIDE, SIDE)
    with pytest.raises(GeometryError, match="needs images"):
        split(operator, x[..., 1:])
    with pytest.raises(GeometryError, match="needs images"):
        split(operator, x[:0])
    with pytest.raises(InputError, match="NaN"):
        split(operator, x * torch.nan)
    for wrong in (x + 0j, x.double(), x.long()):
        with pytest.raises(InputError, match="convert"):
            split(operator, wrong)
    with pytest.raises(InputError, match="convert"):
        split(OPERATORS["mri"], x)
    for options in ({"tol": 0.0}, {"max_iter": 0}):
        with pytest.raises(InputError, match="positive tol"):
            split(operator, x, **options)
    with pytest.raises(InputError, match="at least 2"):
        prior_part(partial(split, operator), [x])
    with pytest.raises(GeometryError, match="batches"):
        prior_part(partial(split, operator), [x[0]])
    with pytest.raises(InputError, match="at least 1"):
        prior_part(partial(split, operator), [])


# --- detectability ----------------------------------------------------------------------------


def blob(side: int, width: float = 2.0) -> Tensor:
    i = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    return torch.exp(-(i[:, None] ** 2 + i**2) / (2 * width**2))


def test_channels_are_orthonormal_in_the_plane() -> None:
    u = laguerre_gauss((65, 65), 12.0, 5).flatten(1)
    torch.testing.assert_close(u @ u.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    first = laguerre_gauss((9, 9), 5.0, 2)
    assert float(first[0, 4, 4]) == pytest.approx(math.sqrt(2) / 5)
    t = 2 * math.pi * 4 / 25
    assert float(first[1, 4, 6]) == pytest.approx(math.sqrt(2) / 5 * math.exp(-t / 2) * (1 - t))
    moved = laguerre_gauss((9, 9), 5.0, 1, centre=(2.0, 3.0))
    assert divmod(int(moved[0].argmax()), 9) == (2, 3)


def test_observer_in_white_noise_is_the_closed_form() -> None:
    """d' = |U^T s| / sigma with orthonormal channels, from moments and from images."""
    side, sigma, n = 33, 2.0, 4000
    u = torch.linalg.qr(laguerre_gauss((side, side), 8.0, 5).flatten(1).T).Q.T
    s = blob(side)
    exact = float((u @ s.flatten()).norm()) / sigma
    assert d_prime(u @ s.flatten(), sigma**2 * torch.eye(5)) == pytest.approx(exact)
    noise = sigma * random((2, n, side, side), torch.float32, 0)
    seen = hotelling(noise[0] + s, noise[1], u.reshape(5, side, side))
    assert seen.d_prime == pytest.approx(exact, abs=0.12)  # 4 sd at 2000 test images
    ideal = float(stats.norm.cdf(exact / math.sqrt(2)))
    assert seen.low < ideal < seen.high
    assert seen.auc == pytest.approx(ideal, abs=0.02)
    assert len(seen.present) == n // 2


def test_observer_whitens_correlated_noise() -> None:
    """Where noise is correlated the template is not the signal: d'^2 = dv^T S^-1 dv."""
    cov = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    delta = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert d_prime(delta, cov) == pytest.approx(math.sqrt(1 / 0.19))
    factor = torch.linalg.cholesky(cov)
    z = random((2, 6000, 2), torch.float64, 0) @ factor.T
    images = (z + torch.stack([delta, torch.zeros(2)])[:, None]).reshape(2, 6000, 1, 2)
    seen = hotelling(images[0], images[1], torch.eye(2).reshape(2, 1, 2))
    assert seen.d_prime == pytest.approx(math.sqrt(1 / 0.19), abs=0.12)


def test_an_observer_is_not_tested_on_its_training() -> None:
    """In pure noise the area is a half, whatever the training found."""
    images = random((2, 90, 16, 16), torch.float32, 1)
    areas = []
    for seed in range(30):
        images = random((2, 90, 16, 16), torch.float32, seed)
        areas.append(hotelling(images[0], images[1], laguerre_gauss((16, 16), 8.0, 5)).auc)
    values = torch.tensor(areas)
    assert abs(float(values.mean()) - 0.5) < 4 * float(values.std()) / math.sqrt(30)


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_reconstruction_adds_no_information(kind: str) -> None:
    """d' of a channelised observer is at most that of the data, |A s| / sigma."""
    prior, measurement, _ = field(kind, SIDE)
    a, noise = dense(measurement.operator).double(), float(measurement.noise)
    a = a[a.any(dim=1)]
    exact = prior.posterior(a, torch.zeros(len(a)), noise)
    gain = exact.covariance @ a.T / noise**2  # the posterior mean is gain @ y
    s = blob(SIDE, 1.0).flatten()
    ideal = float((a @ s).norm()) / noise
    u = laguerre_gauss((SIDE, SIDE), 4.0, 4).flatten(1)
    seen = d_prime(u @ gain @ a @ s, noise**2 * u @ gain @ gain.T @ u.T)
    assert 0.2 * ideal < seen <= ideal * (1 + 1e-9)
    # and contrast recovery of the mean is s^T K A s / s^T s, in each pair of equal noise
    clean = random((4, SIDE**2), torch.float64, 2)
    draws = noise * random((4, len(a)), torch.float64, 3)
    with_lesion = ((clean + s) @ a.T + draws) @ gain.T
    without = (clean @ a.T + draws) @ gain.T
    value, error = contrast_recovery(with_lesion, without, s)
    assert value == pytest.approx(float(s @ gain @ a @ s / (s @ s)))
    assert error < 1e-9
    assert 0.0 < value < 1.0


def test_contrast_recovery_has_its_standard_error() -> None:
    s = blob(5)
    shares = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    value, error = contrast_recovery(shares[:, None, None] * s + 3, torch.full((3, 5, 5), 3.0), s)
    assert value == pytest.approx(1.0)
    assert error == pytest.approx(0.5 / math.sqrt(3))


def test_area_and_its_interval() -> None:
    one = torch.tensor([2.0, 3.0, 5.0])
    assert auc(one, torch.tensor([1.0, 2.0]))[0] == pytest.approx(5.5 / 6)
    assert auc(one, one)[0] == 0.5
    value, low, high = auc(10 + torch.arange(20.0), torch.arange(10.0))
    assert (value, high) == (1.0, 1.0)
    assert 0.8 < low < 0.95
    value, low, high = auc(torch.arange(10.0), 10 + torch.arange(20.0))
    assert (value, low) == (0.0, 0.0)
    # the ends solve Newcombe's equation
    torch.manual_seed(0)
    value, low, high = auc(1 + torch.randn(30), torch.randn(50), 0.95)
    for end in (low, high):
        n = 39
        v = end * (1 - end) / 1500 * (1 + n * (1 - end) / (2 - end) + n * end / (1 + end))
        assert abs(value - end) == pytest.approx(1.959964 * math.sqrt(v), rel=1e-5)


def test_area_interval_covers() -> None:
    exact = float(stats.norm.cdf(1.5 / math.sqrt(2)))
    torch.manual_seed(1)
    held = 0
    for _ in range(600):
        _, low, high = auc(1.5 + torch.randn(25), torch.randn(25))
        held += low < exact < high
    assert held / 600 == pytest.approx(0.95, abs=0.03)


def test_detectability_refuses_bad_input() -> None:
    u = laguerre_gauss((6, 6), 3.0, 2)
    x = random((40, 6, 6), torch.float32, 0)
    for args in ((0, 5), (5,)):
        with pytest.raises(GeometryError):
            laguerre_gauss(args, 3.0)
    for width, count, centre in ((0.0, 2, None), (3.0, 0, None), (3.0, 2, (9.0, 1.0))):
        with pytest.raises(InputError):
            laguerre_gauss((6, 6), width, count, centre)
    with pytest.raises(GeometryError, match="one size"):
        hotelling(x[:, 1:], x, u)
    with pytest.raises(InputError, match="real finite"):
        hotelling(x + 0j, x, u)
    with pytest.raises(InputError, match="at least 15 training images"):
        hotelling(x[:20], x[20:], u)
    with pytest.raises(InputError, match="2 more to test"):
        hotelling(x, x, u, train=39)
    with pytest.raises(NumericalError, match="positive definite"):
        hotelling(torch.zeros_like(x), torch.zeros_like(x), u)
    with pytest.raises(GeometryError, match="difference"):
        d_prime(torch.ones(2), torch.eye(3))
    with pytest.raises(InputError, match="finite scores"):
        auc(torch.zeros(0), torch.ones(2))
    with pytest.raises(InputError, match="between 0 and 1"):
        auc(torch.ones(2), torch.ones(2), 1.0)
    with pytest.raises(GeometryError, match="pairs"):
        contrast_recovery(x, x[1:], x[0])
    with pytest.raises(InputError, match="not zero"):
        contrast_recovery(x, x, torch.zeros(6, 6))
    with pytest.raises(InputError, match="real finite"):
        contrast_recovery(x * torch.nan, x, x[0])
