"""Coils: whitening, compression, ESPIRiT against known maps and against BART."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import laws
import numpy as np
import pytest
import torch

from inverse.errors import GeometryError, InputError
from inverse.operators.coils import (
    combine_coils,
    compression_matrix,
    espirit,
    mix_coils,
    noise_covariance,
    noise_level,
    whitening_matrix,
)
from inverse.operators.mri import cartesian_mask, centred_fft, centred_ifft
from phantoms.coils import CoilArray, loop_field
from phantoms.shapes import shepp_logan

N = 64


def scan(coils: int = 6, noise: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """Full k-space ``(coils, N, N)`` of a head and the true maps, of unit sum of squares."""
    image = torch.from_numpy(shepp_logan(220.0).image((N, N), 220.0 / N)).to(torch.complex64)
    maps = torch.from_numpy(CoilArray(coils, 190.0).maps((N, N), (220.0 / N, 220.0 / N)))
    k = centred_fft(maps * image)
    return k + noise * laws.random(tuple(k.shape), torch.complex64, 1), maps


# --- channels ----------------------------------------------------------------------------------


def coloured(samples: int = 40_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise ``(3, samples)`` and its covariance of real (and imaginary) parts."""
    mix = torch.tensor([[2.0, 0, 0], [1j, 1.0, 0], [0.3, 0.2 - 0.4j, 0.5]], dtype=torch.complex128)
    white = math.sqrt(2) * laws.random((3, samples), torch.complex128, 0)  # std 1 in each part
    return mix @ white, mix @ mix.mH


def test_covariance_and_whitening() -> None:
    noise, psi = coloured()
    found = noise_covariance(noise)
    torch.testing.assert_close(found, psi, rtol=0.03, atol=0.03)
    matrix = whitening_matrix(found)
    white = mix_coils(matrix, noise, axis=0)
    eye = torch.eye(3, dtype=torch.complex128)
    torch.testing.assert_close(noise_covariance(white), eye, rtol=0, atol=1e-10)
    assert float(white.real.std()) == pytest.approx(1.0, rel=0.02)
    torch.testing.assert_close(matrix @ psi @ matrix.mH, eye, rtol=0.03, atol=0.03)


def test_dead_channels_are_refused() -> None:
    noise, _ = coloured(100)
    noise[2] = noise[1]
    with pytest.raises(InputError, match="positive definite"):
        whitening_matrix(noise_covariance(noise))
    with pytest.raises(InputError, match="at least 6 samples"):
        noise_covariance(noise[:, :5])
    with pytest.raises(InputError, match="NaN"):
        noise_covariance(noise * math.nan)


def test_compression_keeps_what_has_rank() -> None:
    signal = laws.random((3, 500), torch.complex64, 0)
    data = laws.random((8, 3), torch.complex64, 1) @ signal
    matrix = compression_matrix(data, 3)
    eye = torch.eye(3, dtype=torch.complex128)
    torch.testing.assert_close(matrix @ matrix.mH, eye)
    virtual = mix_coils(matrix, data.reshape(8, 20, 25))
    assert virtual.shape == (3, 20, 25)
    assert laws.norm(virtual) == pytest.approx(laws.norm(data), rel=1e-5)
    energy = virtual.abs().square().sum((1, 2))
    assert bool((energy.diff() < 0).all())
    singular = torch.linalg.svdvals(data)[:3]
    torch.testing.assert_close(energy.sqrt(), singular, rtol=1e-4, atol=1e-4)
    back = mix_coils(matrix.mH, virtual, axis=0).reshape(8, 500)
    torch.testing.assert_close(back, data, rtol=1e-4, atol=1e-4)
    with pytest.raises(GeometryError, match="1 to 8"):
        compression_matrix(data, 9)


def test_noise_level_from_the_edge() -> None:
    k, _ = scan(noise=0.0)
    sigma = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    noise = math.sqrt(2) * laws.random(tuple(k.shape), torch.complex64, 2)
    noisy = k + sigma[:, None, None] * noise
    torch.testing.assert_close(noise_level(noisy), sigma, rtol=0.15, atol=0)
    mask = cartesian_mask((N, N), 3.0, 0.1, "gaussian2d")
    torch.testing.assert_close(noise_level(torch.where(mask, noisy, 0)), sigma, rtol=0.4, atol=0)
    with pytest.raises(InputError, match="too few"):
        noise_level(torch.ones(2, 8, 8, dtype=torch.complex64))


# --- sensitivities -----------------------------------------------------------------------------


def test_espirit_finds_the_true_maps() -> None:
    k, true = scan()
    found = espirit(k)
    assert found.maps.shape == (6, N, N)
    assert found.eigenvalue.shape == (N, N)
    inside = torch.from_numpy(shepp_logan(220.0).image((N, N), 220.0 / N)) > 0.05
    power = found.maps.abs().square().sum(0)
    torch.testing.assert_close(power[inside], torch.ones(int(inside.sum())))
    # equal up to one phase a pixel: |<s, s'>| = 1
    aligned = (true.conj() * found.maps).sum(0).abs()[inside]
    assert float(aligned.min()) > 0.995
    assert float(found.eigenvalue[inside].min()) > 0.97
    assert float(found.eigenvalue.max()) < 1.001
    # far outside the object nothing is known
    assert float((power == 0).float().mean()) > 0.1


def test_espirit_maps_explain_the_data_that_did_not_calibrate_them() -> None:
    k, _ = scan()
    maps = espirit(k).maps
    images = centred_ifft(k)
    rest = images - maps * combine_coils(images, maps)
    assert laws.norm(rest) < 0.02 * laws.norm(images)


def test_espirit_uses_the_centre_only_and_any_slice_alone() -> None:
    k, _ = scan()
    mask = cartesian_mask((N, N), 4.0, 0.38, "poisson")
    full, under = espirit(k), espirit(torch.where(mask, k, 0))
    assert torch.equal(full.maps, under.maps)
    two = espirit(torch.stack([k, 2.0 * k]))
    assert two.maps.shape == (2, 6, N, N)
    torch.testing.assert_close(two.maps[0], full.maps)
    torch.testing.assert_close(two.maps[1], full.maps, rtol=1e-3, atol=1e-3)
    assert two.kernels == full.kernels * 2


def test_espirit_phase_is_that_of_the_first_virtual_coil() -> None:
    k, _ = scan()
    maps = espirit(k).maps
    turned = espirit(
        k * np.exp(1j)
    ).maps  # a global phase of the data is the image's, not the maps'
    torch.testing.assert_close(turned, maps, rtol=1e-3, atol=1e-3)
    middle = slice(N // 2 - 12, N // 2 + 12)
    virtual = mix_coils(compression_matrix(k[:, middle, middle], 1), maps)[0]
    seen = maps.abs().sum(0) > 0
    assert float(virtual.imag[seen].abs().max()) < 1e-4
    assert float(virtual.real[seen].min()) > 0


def test_espirit_refusals() -> None:
    k, _ = scan()
    with pytest.raises(GeometryError, match="too small to calibrate"):
        espirit(torch.where(cartesian_mask((N, N), 4.0, 0.06), k, 0))
    with pytest.raises(InputError, match="NaN"):
        espirit(k * math.nan)
    with pytest.raises(InputError, match="no signal"):
        espirit(torch.zeros_like(k))
    with pytest.raises(GeometryError, match="coils, H, W"):
        espirit(k[0])


def _bart(folder: Path, *arguments: str) -> None:
    subprocess.run(["bart", *arguments], cwd=folder, check=True, capture_output=True)


def test_espirit_agrees_with_bart(tmp_path: Path) -> None:
    """Within 1 % in 99 % of the object (its rim aside); BART's threshold is of squared values."""
    if shutil.which("bart") is None:
        pytest.skip("bart is not installed (Debian package 'bart')")
    k, _ = scan()
    # BART's arrays are column-major: (x, y, z, coil) reversed
    (tmp_path / "k.hdr").write_text(f"# Dimensions\n{N} {N} 1 {len(k)}\n")
    k.numpy().tofile(tmp_path / "k.cfl")
    options = ["-t", "0.0009", "-k", "6", "-r", "24", "-m", "1", "-c", "0.8"]
    _bart(tmp_path, "ecalib", *options, "k", "maps", "ev")
    theirs = torch.from_numpy(np.fromfile(tmp_path / "maps.cfl", np.complex64)).reshape(k.shape)
    value = torch.from_numpy(np.fromfile(tmp_path / "ev.cfl", np.complex64).real.reshape(N, N))
    ours = espirit(k, threshold=0.03, kernel=6, calibration=24, crop=0.8)
    inside = torch.from_numpy(shepp_logan(220.0).image((N, N), 220.0 / N)) > 0.05
    torch.testing.assert_close(ours.eigenvalue, value, rtol=0, atol=0.03)
    # each pixel's phase is free (ours refers to our virtual coil, BART's to its own)
    phase = torch.sgn((theirs.conj() * ours.maps).sum(0))
    difference = (ours.maps - phase * theirs).abs().square().sum(0).sqrt()[inside]
    assert float(difference.median()) < 1e-3
    assert float(difference.quantile(0.99)) < 0.01


# --- Biot-Savart -------------------------------------------------------------------------------


def test_field_on_the_axis_of_a_loop() -> None:
    # B = a^2 / (2 (a^2 + z^2)^{3/2}) along the axis (Jackson, sec. 5.5)
    a, z = 40.0, np.array([-60.0, 0.0, 10.0, 120.0])
    axis = np.array([1.0, 2.0, -2.0]) / 3.0
    centre = np.array([5.0, -3.0, 8.0])
    field = loop_field(centre + z[:, None] * axis, centre, 7.0 * axis, a)
    expected = a**2 / (2 * (a**2 + z**2) ** 1.5)
    np.testing.assert_allclose(field, expected[:, None] * axis, rtol=1e-9, atol=1e-12)


def test_far_field_is_a_dipole() -> None:
    # m = pi a^2; B = (3 (m.r) r - m) / (4 pi r^3)
    a, r = 5.0, np.array([300.0, 400.0, -120.0])
    length = np.linalg.norm(r)
    m = np.pi * a**2 * np.array([0.0, 0.0, 1.0])
    expected = (3 * (m @ r) * r / length**2 - m) / (4 * np.pi * length**3)
    field = loop_field(r[None], np.zeros(3), np.array([0.0, 0.0, 1.0]), a)[0]
    np.testing.assert_allclose(field, expected, rtol=2e-3)


def test_array_of_coils() -> None:
    maps = CoilArray(8, 200.0).maps((32, 32), (6.0, 6.0))
    np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1.0, rtol=1e-5)
    # a quarter turn of the array turns the magnitudes: coil c + 2 sees what coil c saw
    np.testing.assert_allclose(
        np.abs(maps[2]), np.rot90(np.abs(maps[0]), -1), rtol=1e-3, atol=1e-4
    )
    # on the axis a loop's field points inwards: B_x - i B_y turns by minus the coils' angle
    middle = CoilArray(8, 200.0).maps((1, 1), (1.0, 1.0))[:, 0, 0]
    np.testing.assert_allclose(middle[1:] / middle[:-1], np.exp(-0.25j * np.pi), rtol=1e-4)
    raw = CoilArray(4, 200.0).maps((8, 8), (6.0, 6.0), normalised=False)
    assert np.abs(raw[0]).argmax() % 8 == 7  # coil 0 lies towards +x, +y
    with pytest.raises(GeometryError, match="larger ring"):
        CoilArray(8, 100.0).maps((64, 64), (4.0, 4.0))
    with pytest.raises(GeometryError, match="at least one coil"):
        CoilArray(0, 100.0)
