"""Classical MRI: wavelets, pixelwise unfolding, certificates of optimality, and a phantom."""

from __future__ import annotations

import math

import laws
import numpy as np
import pytest
import torch

from inverse.classical import (
    cg_sense,
    cgls,
    l1_wavelet,
    phased,
    root_sum_of_squares,
    tikhonov,
    zero_filled,
)
from inverse.classical.mri import inverse_wavelet, shrink, wavelet
from inverse.errors import InputError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.linop import Identity
from inverse.operators.mri import CartesianMRI, Sense, centred_ifft
from phantoms.coils import CoilArray
from phantoms.shapes import shepp_logan
from phantoms.simulate import simulate_mri

N = 64
IMAGE = shepp_logan(220.0).image((N, N), 220.0 / N)[None]


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def denoising(y: torch.Tensor, std: float) -> Measurement:
    return Measurement(
        Identity(y.shape[1:], torch.complex64), y, torch.tensor(std), "MR", (1.0, 1.0)
    )


def test_wavelet_is_orthonormal_and_kills_ramps() -> None:
    x = laws.random((2, 48, 32), torch.complex64, 0)
    c = wavelet(x, 3)
    assert laws.norm(c) == pytest.approx(laws.norm(x), rel=1e-5)
    torch.testing.assert_close(inverse_wavelet(c, 3), x, rtol=1e-4, atol=1e-5)
    d = laws.random((2, 48, 32), torch.complex64, 1)
    assert laws.inner(c, d) == pytest.approx(laws.inner(x, inverse_wavelet(d, 3)), rel=1e-4)
    # two vanishing moments: details of a plane vanish where it does not wrap around
    row, col = torch.arange(48.0)[:, None], torch.arange(32.0)
    plane = wavelet((1.0 + 0.3 * row - 0.2 * col)[None], 1)[0]
    assert float(plane[24:47, 16:31].abs().max()) < 1e-5
    assert float(plane[:23, 16:31].abs().max()) < 1e-5
    # coarse part: mean times 2 a level
    assert float(wavelet(torch.ones(1, 16, 16), 2)[0, 0, 0]) == pytest.approx(4.0, rel=1e-5)


def test_shrinkage_is_the_proximal_map() -> None:
    x, t = laws.random((1, 32, 32), torch.complex64, 0), 0.7
    before, after = wavelet(x, 4)[0], wavelet(shrink(x, t), 4)[0]
    torch.testing.assert_close(after[:2, :2], before[:2, :2], rtol=1e-4, atol=1e-5)
    details = torch.ones(32, 32, dtype=torch.bool)
    details[:2, :2] = False
    length = (before.abs() - t).clamp_min(0)
    expected = length * torch.sgn(before)
    torch.testing.assert_close(after[details], expected[details], rtol=1e-4, atol=1e-5)


def test_denoising_keeps_constants_and_kills_what_is_below_the_threshold() -> None:
    y = torch.full((1, 32, 32), 2.0 + 1.0j)
    small = 0.05 * laws.random((1, 32, 32), torch.complex64, 0)
    found = l1_wavelet(denoising(y + small, 0.5), 1.0) - y
    assert laws.norm(found) < 0.15 * laws.norm(small)


def test_l1_is_near_the_minimum() -> None:
    # the image of the last steps is hardly improved by many more
    m = simulate_mri(IMAGE, (3.4, 3.4), acceleration=3.0, kind="gaussian2d", seed=1).measurement

    def objective(x: torch.Tensor) -> float:
        weight = 0.2 * float(m.noise)
        shifts = [(i, j) for i in (0, 3, 8, 13) for j in (0, 5, 10, 15)]
        details = 0.0
        for s in shifts:
            c = wavelet(x.roll(s, (-2, -1)), 4).abs()
            details += float(c.sum() - c[..., :4, :4].sum()) / len(shifts)
        residual = (m.operator(x) - m.data).abs().square().sum()
        return 0.5 * float(residual) + weight * details

    short, long = (objective(l1_wavelet(m, iterations=n)) for n in (60, 300))
    assert short < 1.03 * long
    assert short < 0.85 * objective(zero_filled(m))


def test_cg_sense_is_pixelwise_unfolding_for_regular_undersampling() -> None:
    # every second column: pixel j folds onto j + N/2; Pruessmann's 2 x 2 systems
    maps = torch.from_numpy(CoilArray(6, 190.0).maps((N, N), (220.0 / N, 220.0 / N)))
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[:, ::2] = True
    op = Sense(maps, mask)
    truth = torch.from_numpy(IMAGE).to(torch.complex64)
    y = op(truth) + 1e-3 * torch.where(mask, laws.random((1, 6, N, N), torch.complex64, 0), 0)
    m = Measurement(op, y, torch.tensor(1e-3 / math.sqrt(2)), "MR", (1.0, 1.0))
    folded = centred_ifft(y)[0] * 2  # one period of the folded coil images
    half = N // 2
    system = torch.stack([maps[..., :half], maps[..., half:]], dim=-1).permute(1, 2, 0, 3)
    fold = folded[..., :half].permute(1, 2, 0)[..., None]
    unfolded = torch.linalg.lstsq(system, fold).solution[..., 0]
    expected = torch.cat([unfolded[..., 0], unfolded[..., 1]], dim=-1)[None]
    found = cg_sense(m, iterations=25, discrepancy=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert error(found, truth) < 0.02


def test_root_sum_of_squares_of_full_sampling_is_the_magnitude() -> None:
    scan = simulate_mri(
        IMAGE, (3.4, 3.4), acceleration=1.0, coils=5, phase=1.0, noise=1e-3, seed=2
    )
    rss = root_sum_of_squares(scan.measurement)
    assert not rss.is_complex()
    assert error(rss, scan.truth.abs()) < 0.03  # noise where there is no signal, and the rim
    single = simulate_mri(IMAGE, (3.4, 3.4), acceleration=2.0)
    m = single.measurement
    torch.testing.assert_close(root_sum_of_squares(m), zero_filled(m).abs())


@pytest.mark.parametrize(
    ("coils", "kind", "noise"),
    [(1, "gaussian2d", 0.01), (1, "gaussian2d", 0.03), (6, "poisson", 0.01)],
)
def test_each_step_beats_the_last_on_a_phantom(coils: int, kind, noise: float) -> None:
    # 4-fold with a centre wide enough for calibration
    scan = simulate_mri(
        np.repeat(IMAGE, 2, 0) * [[[1.0]], [[0.7]]],
        (3.4, 3.4),
        acceleration=4.0,
        kind=kind,
        centre_fraction=0.2,
        coils=coils,
        noise=noise,
        phase=0.8,
    )
    m, truth = scan.measurement, scan.truth
    plain = zero_filled(m)
    sparse = l1_wavelet(m)
    assert sparse.shape == truth.shape
    assert error(sparse, truth) < 0.6 * error(plain, truth)
    if coils > 1:
        linear = cg_sense(m)
        assert error(linear, truth) < 0.8 * error(plain, truth)
        assert error(sparse, truth) < 0.8 * error(linear, truth)
        ridge = tikhonov(m, 1.0).x
        assert error(linear, truth) < error(ridge, truth) * 1.2
    alone = l1_wavelet(m.take(torch.tensor([1])))
    torch.testing.assert_close(alone[0], sparse[1], rtol=1e-4, atol=1e-5)


def test_sizes_that_are_no_multiple_of_a_block() -> None:
    image = IMAGE[:, 3:58, 1:62]
    scan = simulate_mri(image, (3.4, 3.4), acceleration=3.0, kind="gaussian2d")
    sparse = l1_wavelet(scan.measurement)
    assert sparse.shape == (1, 55, 61)
    assert error(sparse, scan.truth) < 0.6 * error(zero_filled(scan.measurement), scan.truth)


def test_refusals() -> None:
    y = torch.zeros(1, 8, 8, dtype=torch.complex64)
    with pytest.raises(InputError, match="weight"):
        l1_wavelet(denoising(y, 1.0), 0.0)
    with pytest.raises(UnsupportedError, match="Cartesian"):
        root_sum_of_squares(denoising(y, 1.0))
    volume = CartesianMRI(torch.ones(4, 4, 4, dtype=torch.bool))
    m = Measurement(
        volume, volume.H.H(torch.ones(1, 4, 4, 4) + 0j), torch.tensor(1.0), "MR", (1.0, 1.0)
    )
    with pytest.raises(UnsupportedError, match="two-dimensional"):
        l1_wavelet(m)


def test_a_known_phase_gives_the_opposite_samples() -> None:
    """Half of k-space and its centre determine an image without phase, and no complex one."""
    rows = torch.arange(33) - 16
    mask = (rows <= 4)[:, None].expand(33, 33)
    u = rows / 33
    truth = torch.exp(-40 * ((u[:, None] - 0.1) ** 2 + u**2)) * (
        1 + 0.5 * torch.sin(70 * u)[:, None]
    )
    operator = CartesianMRI(mask)
    data = operator(truth[None].to(torch.complex64))
    measurement = Measurement(operator, data, torch.tensor(1e-3), "MR", (1.0, 1.0))
    wrong = (cgls(measurement)[0] - truth).abs().max()
    right = (phased(cgls)(measurement)[0] - truth).abs().max()
    assert wrong > 0.05
    assert right < 2e-3
