"""The one entry: units, batches, seeds, counts, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from inverse import VE, Measurement, reconstruct
from inverse.errors import CheckpointError, GeometryError, InputError, ReconError, UnsupportedError
from inverse.measurement import CHI2_HIGH
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.linop import Identity
from inverse.operators.mask import Mask
from inverse.operators.mri import CartesianMRI, Sense, centred_fft
from inverse.operators.resample import Upsample
from inverse.priors import Denoiser, GaussianPrior, NetworkConfig, NetworkPrior, PriorCard, UNet
from inverse.reconstruct import _unfitted
from inverse.trust.verdict import Evidence, judge

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


def network(channels: int = 1, **changes) -> NetworkPrior:
    torch.manual_seed(0)
    net = UNet(NetworkConfig(channels=channels, widths=(8, 8), blocks=1, embedding=16))
    torch.nn.init.normal_(net.exit.weight, std=0.05)
    return NetworkPrior(net, dataclasses.replace(CARD, **changes), dtype=torch.float32)


def ct(slices: int = 3, pixel: float = 1.5, n: int = 32) -> Measurement:
    operator = RayTransform(ParallelBeam.sparse(6, (n, n), pixel), (n, n), pixel)
    generator = torch.Generator().manual_seed(5)
    truth = 0.02 * torch.rand(slices, n, n, generator=generator)
    return Measurement(operator, operator(truth), torch.tensor(0.01), "CT", (pixel, pixel), 0.0206)


def test_result_does_not_depend_on_the_batch_and_repeats_with_the_seed() -> None:
    one = reconstruct(ct(), network(), steps=4, samples=2, batch=1)
    many = reconstruct(ct(), network(), steps=4, samples=2, batch=6)
    torch.testing.assert_close(one.samples, many.samples, rtol=1e-4, atol=1e-6)
    again = reconstruct(ct(), network(), steps=4, samples=2, batch=6)
    assert torch.equal(many.samples, again.samples)
    other = reconstruct(ct(), network(), steps=4, samples=2, batch=6, seed=1)
    assert not torch.allclose(other.samples, many.samples)
    assert not torch.allclose(many.samples[:, 0], many.samples[:, 1])


def test_shapes_moments_and_counts() -> None:
    result = reconstruct(ct(), network(), steps=5, samples=3, batch=4)
    assert result.samples.shape == (3, 3, 32, 32)
    torch.testing.assert_close(result.mean, result.samples.mean(dim=1))
    torch.testing.assert_close(result.std, result.samples.std(dim=1))
    assert result.residual_chi2.shape == (3,)
    assert result.nfe == 5
    assert result.operator_calls > 10
    assert result.settings["method"] == "pnp_admm"
    assert result.settings["steps"] == 5


def test_callback_ends_at_the_total() -> None:
    seen: list[tuple[int, int]] = []
    reconstruct(ct(), network(), steps=3, batch=2, callback=lambda i, n: seen.append((i, n)))
    assert seen[-1] == (9, 9)
    assert [i for i, _ in seen] == sorted(i for i, _ in seen)


def test_attenuation_in_gives_attenuation_out() -> None:
    """A full, nearly noise-free measurement fixes the image in 1/mm whatever the network says."""
    n = 16
    truth = 0.0206 * torch.rand(2, n, n)
    seen = Measurement(
        Mask(torch.ones(n, n, dtype=torch.bool)),
        truth,
        torch.tensor(1e-7),
        "CT",
        (1.5, 1.5),
        0.0206,
    )
    result = reconstruct(seen, network(), steps=3)
    torch.testing.assert_close(result.mean, truth, rtol=1e-3, atol=1e-6)
    # HU -500 +- 500: prior 0 is half the attenuation of water
    assert result.settings["offset"] == pytest.approx(0.0103)
    assert result.settings["scale"] == pytest.approx(0.0103)


def test_white_prior_gives_the_ridge_solution() -> None:
    """Gaussian prior N(1, v I), fully measured with noise s: mean (v y + s^2) / (v + s^2)."""
    n, v, s = 6, 0.5, 0.4
    prior = GaussianPrior(1.0, v * torch.eye(n * n, dtype=torch.float64), (n, n), VE(0.005, 40.0))
    y = torch.randn(1, n, n)
    seen = Measurement(Identity((n, n)), y, torch.tensor(s), "MR", (1.0, 1.0))
    result = reconstruct(
        seen,
        prior,
        samples=300,
        batch=300,
        options={"steps": 60, "start_level": 30.0, "end_level": 0.006, "weight": 1.0},
    )
    exact = (v * y + s**2) / (v + s**2)
    assert float((result.mean - exact).abs().mean()) < 0.08


def test_fine_pixels_are_reconstructed_on_the_priors_grid() -> None:
    result = reconstruct(ct(slices=1, pixel=0.75), network(), steps=3)
    assert result.mean.shape == (1, 32, 32)
    assert "finer than the prior's" in result.status
    up = Upsample((16, 16), 2)
    # the image lies in the range of the interpolation
    coarse = torch.linalg.pinv(up.rows) @ result.mean[0] @ torch.linalg.pinv(up.columns).T
    torch.testing.assert_close(up(coarse), result.mean[0], rtol=1e-3, atol=1e-6)


def test_pixels_are_not_coarsened_beyond_the_priors_grid() -> None:
    """Of 0.9 mm, where the prior knows 1.0 to 1.6: twice as coarse would be 1.8."""
    prior = network(pixel_mm_range=(1.0, 1.6))
    result = reconstruct(ct(slices=1, pixel=0.9), prior, steps=2)
    assert "finer than the prior's" not in result.status
    assert "lie outside the prior's" in result.status


def test_upsampling_keeps_constants_and_ramps_of_pixel_centres() -> None:
    up = Upsample((8, 8), 2)
    torch.testing.assert_close(up(torch.ones(8, 8)), torch.ones(16, 16))
    coarse, fine = (torch.arange(8) + 0.5) / 8, (torch.arange(16) + 0.5) / 16
    got = up(coarse[:, None].expand(8, 8))[:, 5]
    torch.testing.assert_close(got[1:-1], fine[1:-1])


def test_complex_data_with_real_and_complex_priors() -> None:
    n = 16
    mask = torch.ones(n, n, dtype=torch.bool)
    image = torch.randn(1, n, n, dtype=torch.complex64)
    seen = Measurement(
        CartesianMRI(mask), centred_fft(image), torch.tensor(1e-5), "MR", (1.5, 1.5)
    )
    prior = network(2, modality="MR", unit="relative", offset=0.0, scale=1.0)
    result = reconstruct(seen, prior, steps=3)
    assert result.mean.is_complex()
    torch.testing.assert_close(result.mean, image, rtol=1e-2, atol=1e-2)
    real = reconstruct(
        seen,
        network(1, modality="MR", unit="relative", offset=0.0, scale=1.0),
        steps=3,
        phase="zero",
        options={"cg_iterations": 20},
    )
    torch.testing.assert_close(real.mean.real, image.real, rtol=1e-2, atol=1e-2)
    assert not bool(real.mean.imag.any())
    assert real.settings["phase"] == "zero"
    assert result.settings["phase"] is None


def test_real_prior_serves_complex_images_by_their_phase() -> None:
    # two slices of different phase: x = m e^{i phi} with real m, whatever the batch
    n = 32
    row = (torch.arange(n) - n / 2)[:, None] / n
    magnitude = torch.exp(-8 * (row**2 + row.T**2)) * (1 + 0.2 * torch.randn(2, n, n))
    turn = torch.stack([1.0 + 0.8 * torch.cos(3 * row).expand(n, n), -0.7 + 0.5 * row.T * row])
    image = torch.polar(magnitude, turn)
    mask = torch.ones(n, n, dtype=torch.bool)
    seen = Measurement(
        CartesianMRI(mask), centred_fft(image), torch.tensor(1e-4), "MR", (1.5, 1.5)
    )
    prior = network(1, modality="MR", unit="relative", offset=0.0, scale=1.0)
    kwargs = {"steps": 3, "options": {"cg_iterations": 20}}
    whole = reconstruct(seen, prior, **kwargs)
    error = float((whole.mean - image).norm() / image.norm())
    assert error < 0.1
    assert whole.settings["phase"] == "estimated"
    flat = reconstruct(seen, prior, phase="zero", **kwargs)
    assert float((flat.mean - image).norm() / image.norm()) > 0.5
    alone = reconstruct(seen, prior, batch=1, **kwargs)
    torch.testing.assert_close(alone.mean, whole.mean, rtol=1e-3, atol=1e-3)
    assert alone.operator_calls == whole.operator_calls
    with pytest.raises(ReconError, match="phase"):
        reconstruct(seen, prior, phase="guessed")


@pytest.mark.parametrize("channels", [1, 2])
def test_nothing_is_drawn_where_no_coil_sees(channels: int) -> None:
    n = 32
    maps = torch.ones(2, 2, n, n, dtype=torch.complex64) / 2**0.5
    maps[0, :, :8], maps[1, :, 20:] = 0, 0
    operator = Sense(maps, torch.ones(n, n, dtype=torch.bool))
    image = torch.ones(2, n, n, dtype=torch.complex64)
    seen = Measurement(operator, operator(image), torch.tensor(1e-4), "MR", (1.5, 1.5))
    prior = network(channels, modality="MR", unit="relative", offset=0.5, scale=0.5)
    found = reconstruct(seen, prior, steps=2).mean
    assert not bool(found[~operator.support].any())
    assert float((found - image)[operator.support].abs().max()) < 0.1


def test_unfitted_data_are_flagged() -> None:
    seen = ct(slices=1)
    result = reconstruct(seen, network(), steps=2, options={"weight": 1e-6, "cg_iterations": 1})
    assert "not fitted" in result.status


@pytest.mark.parametrize(("times", "flagged"), [(0.99, False), (1.01, True)])
def test_the_status_warns_where_the_verdict_does(times: float, flagged: bool) -> None:
    chi2 = times * CHI2_HIGH
    assert bool(_unfitted(torch.tensor([1.0, chi2]))) == flagged
    assert (judge(Evidence(chi2=chi2)).light == "amber") == flagged


def test_every_remark_is_one() -> None:
    seen = ct(slices=1, pixel=0.75)
    result = reconstruct(
        seen, network(), steps=2, coupling="tv", options={"weight": 1e-6, "cg_iterations": 1}
    )
    codes = [remark.code for remark in result.remarks]
    assert codes == ["FINE_PIXELS", "ONE_SLICE", "RESIDUAL"]
    assert result.status == "; ".join(remark.text for remark in result.remarks)


def test_refusals() -> None:
    with pytest.raises(CheckpointError, match="is for MR, the measurement is CT"):
        reconstruct(ct(), network(modality="MR"))
    with pytest.raises(ReconError, match="no method 'magic'; there are pnp_admm"):
        reconstruct(ct(), network(), method="magic")
    with pytest.raises(ReconError, match="no option speed"):
        reconstruct(ct(), network(), options={"speed": 11})
    with pytest.raises(ReconError, match="at least 1"):
        reconstruct(ct(), network(), samples=0)
    with pytest.raises(UnsupportedError, match="one channel"):
        reconstruct(ct(), network(2))


class Cropping(Denoiser):
    """A denoiser of an author who forgot the padding."""

    def denoise(self, x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        return x_t[..., 1:]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prior": "ct-small"}, r"got the text 'ct-small'; load_prior\('ct-small'\) gives one"),
        ({"prior": None}, "that is an inverse.priors.Denoiser, got a NoneType"),
        ({"prior": lambda x, t: x}, "that is an inverse.priors.Denoiser, got a function"),
        ({"measurement": torch.zeros(1, 4, 4)}, "needs an inverse.Measurement .* got a Tensor"),
        ({"device": "gpu"}, "device 'gpu' is not known or not there"),
        ({"device": "cuda:77"}, "device 'cuda:77' is not known or not there"),
        ({"options": "weight"}, "options must map names to values"),
        ({"options": {"weight": "a"}}, "weight of method 'pnp_admm' must be a number above 0"),
        ({"options": {"weight": 0}}, "weight of method 'pnp_admm' must be a number above 0"),
        ({"options": {"lam": 1}}, "method 'pnp_admm' has no option lam"),
        ({"steps": 4.5}, "steps of method 'pnp_admm' must be a whole number of at least 1"),
        ({"steps": 0}, "steps of method 'pnp_admm' must be a whole number of at least 1"),
        ({"samples": 1.5}, "samples must be a whole number of at least 1, got 1.5"),
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"coupling": 3}, "coupling must be a name"),
        ({"coupling": "glue"}, "no coupling 'glue'"),
        ({"positions": [0, 0]}, "get the same noise"),
        ({"positions": [0]}, "must number the 2 slices"),
        ({"positions": [0, 1.5]}, "positions must be a whole number, got 1.5"),
        ({"z_mm": [0.0]}, "must number the 2 slices"),
    ],
)
def test_slips_are_told_in_a_sentence(changes: dict, says: str) -> None:
    given = {"measurement": ct(slices=2, n=8), "prior": network(), **changes}
    with pytest.raises(InputError, match=says):
        reconstruct(**given)


def test_priors_of_another_size_are_named() -> None:
    seen = Measurement(Identity((4, 4)), torch.zeros(1, 4, 4), 0.1, "MR", (1, 1))
    small = GaussianPrior(0.0, torch.eye(9), (3, 3))
    with pytest.raises(GeometryError, match=r"prior of images \(3, 3\), got \(4, 4\)"):
        reconstruct(seen, small, steps=2)
    with pytest.raises(GeometryError, match=r"Cropping must return images .* got \(1, 4, 3\)"):
        reconstruct(seen, Cropping(VE()), steps=2)


def test_positions_of_any_integer_type_name_the_same_noise() -> None:
    seen, kwargs = ct(slices=2, n=8), {"steps": 2, "seed": np.int64(3)}
    a = reconstruct(seen, network(), positions=np.array([7, -1]), **kwargs)
    b = reconstruct(seen, network(), positions=[7, -1], **kwargs)
    assert torch.equal(a.mean, b.mean)


def test_a_result_shows_shapes_and_status_not_values() -> None:
    result = reconstruct(ct(slices=6, n=8), network(), steps=2, samples=2)
    shown = repr(result)
    assert shown.startswith(
        "Reconstruction(mean (6, 8, 8), samples (6, 2, 8, 8), method 'pnp_admm'"
    )
    assert f"chi2 [{result.residual_chi2[0]:.3g}, " in shown
    assert "...]" in shown
    assert f"status {result.status!r}" in shown
    assert "tensor" not in shown
