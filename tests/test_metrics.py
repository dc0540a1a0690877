"""Image metrics: closed forms, an outside implementation, and required arguments."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from inverse.errors import GeometryError, InputError
from inverse.metrics import body_mask, ci95, nrmse, psnr, ssim


def test_psnr_and_nrmse_of_a_constant_error(rng: np.random.Generator) -> None:
    truth = rng.normal(size=(2, 8, 8))
    mask = np.ones((8, 8), bool)
    x = truth + np.array([0.1, -0.01])[:, None, None]
    np.testing.assert_allclose(psnr(x, truth, data_range=1.0, mask=mask), [20.0, 40.0])
    np.testing.assert_allclose(nrmse(x, truth, data_range=2.0, mask=mask), [0.05, 0.005])


def test_psnr_and_ssim_agree_with_scikit_image(rng: np.random.Generator) -> None:
    truth = rng.uniform(size=(1, 40, 40))
    x = truth + 0.1 * rng.normal(size=truth.shape)
    everywhere = np.ones((40, 40), bool)
    assert psnr(x, truth, data_range=1.0, mask=everywhere)[0] == pytest.approx(
        peak_signal_noise_ratio(truth[0], x[0], data_range=1.0)
    )
    # scikit-image averages over the interior only, where the window fits
    interior = np.zeros((40, 40), bool)
    interior[5:-5, 5:-5] = True
    outside = structural_similarity(
        x[0], truth[0], data_range=1.0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert ssim(x, truth, data_range=1.0, mask=interior)[0] == pytest.approx(outside)


def test_only_the_mask_counts(rng: np.random.Generator) -> None:
    truth = rng.normal(size=(1, 8, 8))
    x = truth.copy()
    x[0, 0, 0] += 100
    mask = np.ones((8, 8), bool)
    mask[0, 0] = False
    assert psnr(x, truth, data_range=1.0, mask=mask)[0] > 300
    with pytest.raises(InputError, match="mask is empty"):
        psnr(x, truth, data_range=1.0, mask=~np.ones((8, 8), bool))
    with pytest.raises(GeometryError, match="two stacks"):
        psnr(x, truth[:, :4], data_range=1.0, mask=mask)
    with pytest.raises(TypeError):
        psnr(x, truth)  # type: ignore[call-arg]


def test_interval_is_students(rng: np.random.Generator) -> None:
    # t(0.975, 1) = 12.7062, t(0.975, 2) = 4.30265 of the tables
    assert ci95([30.0, 32.0]) == pytest.approx((31 - 12.7062, 31 + 12.7062), abs=1e-4)
    assert ci95([3.0, 4.0, 5.0]) == pytest.approx((4 - 2.48414, 4 + 2.48414), abs=1e-5)
    assert ci95([30.0]) is None
    values = rng.normal(30.0, 1.0, 400)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert ci95(values) == pytest.approx((low, high))


@pytest.mark.parametrize("n", [2, 3, 8])
def test_interval_of_few_slices_holds_the_mean_as_often_as_it_says(n: int) -> None:
    draws = np.random.default_rng(0).normal(size=(4000, n))
    ends = np.array([ci95(values) for values in draws])
    held = ((ends[:, 0] < 0) & (ends[:, 1] > 0)).mean()
    assert held == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 4000))


def test_body_mask_fills_lungs_and_drops_the_table() -> None:
    hu = np.full((1, 64, 64), -1000.0, np.float32)
    yy, xx = np.mgrid[:64, :64] - 31.5
    hu[0][(yy / 20) ** 2 + (xx / 26) ** 2 < 1] = 40.0
    hu[0][(yy / 8) ** 2 + ((xx - 10) / 8) ** 2 < 1] = -850.0  # a lung
    hu[0, 58:60] = 200.0  # the table
    mask = body_mask(hu, -500.0)[0]
    assert mask[32, 41]
    assert not mask[58:60].any()
    assert mask.sum() == pytest.approx(np.pi * 20 * 26, rel=0.05)
