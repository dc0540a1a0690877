"""Data consistency against dense algebra; the methods' bias against exact posteriors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from inverse.errors import InputError
from inverse.measurement import Measurement
from inverse.operators.mri import CartesianMRI, centred_fft, centred_ifft
from inverse.posterior import METHODS, Proximal, song_projection
from inverse.sde import VE, VP
from phantoms.benchmarks.calibration import field, measure_field, run, two_dimensional


def test_song_projection_is_the_papers_closed_form_where_t_is_orthonormal() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(2, 8, 8, generator=generator, dtype=torch.complex64)

    mask = torch.rand(8, 8, generator=generator) < 0.4
    y = torch.where(mask, centred_fft(draw()), 0)
    x, z, sde, t, lam = draw(), draw(), VP(), 0.4, 0.7
    measurement = Measurement(CartesianMRI(mask), y, torch.tensor(0.1), "MR", (1.0, 1.0))
    got = song_projection(measurement, sde, lambda: z, lam=lam)(x, torch.tensor(t))
    alpha, sigma = (float(c) for c in sde.marginal(t))
    y_t = alpha * y + sigma * torch.where(mask, centred_fft(z), 0)
    k = centred_fft(x)
    paper = centred_ifft(torch.where(mask, lam * y_t + (1 - lam) * k, k))
    torch.testing.assert_close(got, paper, rtol=1e-4, atol=1e-5)


def test_hard_song_projection_replaces_measured_and_keeps_the_rest() -> None:
    toy = two_dimensional()
    x = torch.tensor([[[3.0, -2.0]]])
    project = song_projection(toy.measurement(), toy.prior.sde, lambda: 0 * x, lam=1.0)
    torch.testing.assert_close(project(x, torch.tensor(0.5)), torch.tensor([[[1.0, -2.0]]]))
    with pytest.raises(InputError, match="lambda must lie in"):
        song_projection(toy.measurement(), VE(), lambda: x, lam=0.0)


def test_proximal_solves_its_equation() -> None:
    fixture = field(side=8)
    white = fixture.measurement.whitened()
    a = white.operator(torch.eye(64).reshape(64, 8, 8)).flatten(1).T.double()
    prior, t = fixture.prior, fixture.prior.sde.time(0.8)
    x_t = torch.randn(1, 8, 8)
    x0 = prior.denoise(x_t, t).double()
    rho = float(prior.error(0.8)) ** -2
    exact = torch.linalg.solve(
        a.T @ a + rho * torch.eye(64, dtype=torch.float64),
        a.T @ white.data.flatten().double() + rho * x0.flatten(),
    )
    got = Proximal(prior, fixture.measurement, iterations=200, tol=1e-7).denoise(x_t, t)
    torch.testing.assert_close(got.flatten().double(), exact, rtol=1e-3, atol=1e-3)


def test_song_approaches_the_truth_of_noise_free_data_with_its_corrector() -> None:
    """x_1 = 1 known exactly: x_2 | x_1 ~ N(.8, .36); without corrections it is far off."""
    toy = two_dimensional()

    def second(snr: float) -> torch.Tensor:
        options = {"steps": 300, "lam": 1.0, "snr": snr}
        return run(toy.prior, toy.measurement(), 2000, "song", options)[:, 1]

    none, some, much = second(0.0), second(0.16), second(0.4)
    assert float(none.mean()) < float(some.mean()) < float(much.mean())
    assert float(much.mean()) == pytest.approx(0.8, abs=0.08)
    assert float(much.std()) == pytest.approx(0.6, rel=0.05)


def test_dds_fits_the_data_to_their_noise_on_gaussian_fields() -> None:
    """Over four truths and noises: chi-square near 1, a mean within the posterior's spread."""
    row = measure_field(field(slices=4), "dds, weight 1")
    assert row.chi2 == pytest.approx(1.0, abs=0.2)
    assert row.mean_error < 0.6
    assert 0.8 < row.sd_ratio < 1.0


def test_every_method_states_its_cost_and_class() -> None:
    for name, method in METHODS.items():
        assert method.exactness in {
            "asymptotically exact",
            "exact for Gaussian priors",
            "biased",
        }, name
        assert "steps" in method.options
        assert method.reference
        assert method.name == name
        with pytest.raises(InputError, match=rf"method '{name}' has no option nonsense; besides"):
            method.resolve({"nonsense": 1})


@pytest.mark.parametrize(
    ("name", "option", "values", "needs"),
    [
        ("pnp_admm", "weight", (0, -1, math.nan, math.inf, "6", None, True), "a number above 0"),
        ("pnp_admm", "damping", (-0.1, 1.5), r"a number in \[0, 1\]"),
        ("pnp_admm", "relaxation", (0.0, 2.0, 9), r"a number in \(0, 2\)"),
        ("pnp_admm", "steps", (0, 4.5, "20"), "a whole number of at least 1"),
        ("dds", "weight", (-2.0,), "a number above 0"),
        ("dds", "cg_iterations", (0, -1, 1.5), "a whole number of at least 1"),
        ("dds", "eta", (1.01,), r"a number in \[0, 1\]"),
        ("song", "lam", (0.0, 1.1), r"a number in \(0, 1\]"),
        ("song", "snr", (-0.1,), "a number of at least 0"),
        ("dps", "zeta", (0.0, "a"), "a number above 0 or None"),
        ("daps", "variance", ("other", 1), "'error' or 'level'"),
        ("smc", "particles", (0,), "a whole number of at least 1"),
        ("pnpdm", "balanced", (1, "true"), "True or False"),
        ("ald", "step", (2.0,), r"a number in \(0, 2\)"),
    ],
)
def test_options_keep_to_their_bounds(name: str, option: str, values: tuple, needs: str) -> None:
    for value in values:
        says = rf"option {option} of method '{name}' must be {needs}, got"
        with pytest.raises(InputError, match=says):
            METHODS[name].resolve({option: value})


def test_options_within_their_bounds_become_plain_numbers() -> None:
    options = METHODS["dds"].resolve({"weight": np.float32(0.5), "steps": np.int64(3), "eta": 1})
    assert json.loads(json.dumps(options)) == {**METHODS["dds"].options, **options}
    assert options["weight"] == 0.5
    assert METHODS["dps"].resolve({"zeta": None})["zeta"] is None
    for method in METHODS.values():
        assert method.resolve(method.options) == method.options
        assert set(method.accepts) == set(method.options)
