"""Raw data: each reader gets back what a writer of its format stored, on analytic objects."""

from __future__ import annotations

import math
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from inverse.errors import InputError, NoInputError, ReconError, ResourceError, UnsupportedError
from inverse.io.bart import read_bart
from inverse.io.ctpd import read_ctpd
from inverse.io.dxchange import read_dxchange
from inverse.io.fastmri import read_fastmri
from inverse.io.ismrmrd import read_ismrmrd
from inverse.io.kspace import KSpace, crop_readout
from inverse.io.measurement_file import read_measurement
from inverse.io.raw import detect_raw
from inverse.operators.ct import FanBeam, ParallelBeam
from inverse.operators.mri import CartesianMRI, Sense

H, W = 12, 10  # rows (readout), columns (phase encoding)


# --- k-space by explicit sums, not by the operator that reconstructs ---------------------------


def dft(n: int) -> np.ndarray:
    """Centred orthonormal DFT matrix."""
    j = np.arange(n) - n // 2
    return np.exp(-2j * np.pi * np.outer(j, j) / n) / math.sqrt(n)


def kspace(x: np.ndarray) -> np.ndarray:
    """k-space of images ``(..., H, W)``."""
    return dft(x.shape[-2]) @ x @ dft(x.shape[-1]).T


def oversampled(x: np.ndarray) -> np.ndarray:
    """k-space over twice the field of view along the readout."""
    h = x.shape[-2]
    wide = np.zeros((*x.shape[:-2], 2 * h, x.shape[-1]), complex)
    wide[..., h - h // 2 : 2 * h - h // 2, :] = x
    return kspace(wide)


def images(slices: int = 2, coils: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(slices, coils, H, W)) + 1j * rng.normal(size=(slices, coils, H, W))


def xml(*, bandwidth: float = 1.0, trajectory: str = "cartesian", partitions: int = 1,
        centre: int = W // 2, patient: str = "") -> str:  # fmt: skip
    def space(name: str, nx: int, fov: float) -> str:
        return (
            f"<{name}><matrixSize><x>{nx}</x><y>{W}</y><z>{partitions}</z></matrixSize>"
            f"<fieldOfView_mm><x>{fov}</x><y>{W * 1.5}</y><z>5</z></fieldOfView_mm></{name}>"
        )

    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        f"<subjectInformation><patientName>{patient}</patientName></subjectInformation>"
        "<acquisitionSystemInformation><relativeReceiverNoiseBandwidth>"
        f"{bandwidth}</relativeReceiverNoiseBandwidth></acquisitionSystemInformation><encoding>"
        + space("encodedSpace", 2 * H, 48.0)
        + space("reconSpace", H, 24.0)
        + "<encodingLimits><kspace_encoding_step_1><minimum>0</minimum>"
        f"<maximum>{W - 1}</maximum><center>{centre}</center></kspace_encoding_step_1>"
        f"</encodingLimits><trajectory>{trajectory}</trajectory></encoding></ismrmrdHeader>"
    )


# --- ISMRMRD -----------------------------------------------------------------------------------

INDEX = [(n, "<u2") for n in ("kspace_encode_step_1", "kspace_encode_step_2", "average", "slice",
                              "contrast", "phase", "repetition", "set", "segment")]  # fmt: skip
HEAD = np.dtype(
    [("version", "<u2"), ("flags", "<u8"), ("number_of_samples", "<u2"),
     ("active_channels", "<u2"), ("discard_pre", "<u2"), ("discard_post", "<u2"),
     ("center_sample", "<u2"), ("sample_time_us", "<f4"), ("position", "<f4", 3),
     ("read_dir", "<f4", 3), ("phase_dir", "<f4", 3), ("slice_dir", "<f4", 3),
     ("idx", INDEX)]
)  # fmt: skip
Line = tuple[dict[str, Any], np.ndarray]


def write_ismrmrd(path: Path, lines: Sequence[Line], header: str) -> Path:
    """Readouts ``(coils, samples)`` with the header values that differ from the default."""
    floats = h5py.vlen_dtype(np.float32)
    dtype = np.dtype([("head", HEAD), ("traj", floats), ("data", floats)])
    rows = np.zeros(len(lines), dtype)
    for row, (values, line) in zip(rows, lines, strict=True):
        head = row["head"]
        head["active_channels"], head["number_of_samples"] = line.shape
        head["center_sample"], head["sample_time_us"] = line.shape[1] // 2, 5.0
        head["slice_dir"], head["read_dir"] = (0, 0, 1), (1, 0, 0)
        head["phase_dir"] = (0, 1, 0)
        for name, value in values.items():
            (head["idx"] if name in HEAD["idx"].names else head)[name] = value
        row["traj"] = np.zeros(0, np.float32)
        row["data"] = np.ascontiguousarray(line, np.complex64).view(np.float32).ravel()
    with h5py.File(path, "w") as f:
        f.create_dataset("dataset/data", data=rows)
        f.create_dataset("dataset/xml", data=[header], dtype=h5py.string_dtype())
    return path


def lines(k: np.ndarray, **values: Any) -> list[Line]:
    """One readout a column of ``(slices, coils, readout, phase)``; slice 0 is the higher one."""
    return [
        (
            {"slice": z, "kspace_encode_step_1": c, "position": (3, 4, -5.0 * z), **values},
            k[z, :, :, c],
        )
        for z in range(k.shape[0])
        for c in range(k.shape[3])
    ]


def test_ismrmrd_round_trip(tmp_path):
    x = images(coils=3)
    raw = read_ismrmrd(write_ismrmrd(tmp_path / "a.h5", lines(oversampled(x)), xml()))
    # slices come out by position along the image's normal, phase times read: feet first here
    np.testing.assert_allclose(raw.data, kspace(x), atol=1e-5)
    assert raw.mask.all()
    assert raw.mask.shape == (H, W)
    assert raw.pixel_mm == (2.0, 1.5)
    assert raw.z_mm == (0.0, 5.0)
    assert raw.frame is not None
    assert raw.frame.orientation == (0, 1, 0, 1, 0, 0)
    # the first pixel is H // 2 rows of 2 mm and W // 2 columns of 1.5 mm from the centre
    x0, y0 = 3 - H // 2 * 2.0, 4 - W // 2 * 1.5
    assert raw.frame.positions == ((x0, y0, 0), (x0, y0, -5))
    assert raw.provenance["oversampling_removed"] == 2


def test_ismrmrd_undersampled_shifted_and_reversed_readouts(tmp_path):
    k = oversampled(images())
    chosen = [0, 3, 4, 5, 6, 9]
    some = [line for line in lines(k) if line[0]["kspace_encode_step_1"] in chosen]
    raw = read_ismrmrd(write_ismrmrd(tmp_path / "a.h5", some, xml()))
    np.testing.assert_array_equal(np.flatnonzero(raw.mask[0]), chosen)
    np.testing.assert_allclose(raw.data[..., chosen], kspace(images())[..., chosen],
                               atol=1e-5)  # fmt: skip
    assert not raw.data[..., [1, 2, 7, 8]].any()
    # encoding steps that count from another centre
    shifted = [(v | {"kspace_encode_step_1": v["kspace_encode_step_1"] - 3}, d) for v, d in some
               if v["kspace_encode_step_1"] >= 3]  # fmt: skip
    moved = read_ismrmrd(write_ismrmrd(tmp_path / "b.h5", shifted, xml(centre=W // 2 - 3)))
    np.testing.assert_array_equal(moved.data[..., 3:], raw.data[..., 3:])
    # every second line read backwards, and a sample at each end to discard
    turned: list[Line] = []
    for i, (v, d) in enumerate(lines(k)):
        wide = np.pad(d, [(0, 0), (1, 2)], constant_values=99.0)
        ends = {"discard_pre": 1, "discard_post": 2, "center_sample": H + 1}
        if i % 2:
            wide = wide[:, ::-1]
            ends = {"discard_pre": 2, "discard_post": 1, "center_sample": H + 1, "flags": 1 << 21}
        turned.append((v | ends, wide))
    back = read_ismrmrd(write_ismrmrd(tmp_path / "c.h5", turned, xml()))
    np.testing.assert_allclose(back.data, kspace(images()), atol=1e-5)
    echo = [(v | {"center_sample": H - 4}, d[:, 4:]) for v, d in lines(k)]
    with pytest.raises(UnsupportedError, match="asymmetric"):
        read_ismrmrd(write_ismrmrd(tmp_path / "d.h5", echo, xml()))


def test_ismrmrd_averages_and_what_is_no_image(tmp_path):
    k = oversampled(images())
    extra = [({"flags": 1 << (n - 1)}, np.full((1, 2 * H), 99.0)) for n in (23, 24, 26, 27)]
    both = lines(k * 0.5) + lines(k * 1.5) + extra
    raw = read_ismrmrd(write_ismrmrd(tmp_path / "a.h5", both, xml()))
    np.testing.assert_allclose(raw.data, kspace(images()), atol=1e-5)
    assert raw.provenance["averages"] == 2
    assert raw.provenance["readouts_left_out"] == 4
    uneven = lines(k) + lines(k)[:3]
    with pytest.raises(UnsupportedError, match="averaged more often"):
        read_ismrmrd(write_ismrmrd(tmp_path / "b.h5", uneven, xml()))


def test_ismrmrd_noise_scan_gives_the_covariance_of_the_scan(tmp_path):
    rng = np.random.default_rng(3)
    mix = np.array([[2.0, 0, 0], [1.0, 1.0, 0], [0, 0.5j, 3.0]])
    n = mix @ (rng.normal(size=(3, 40_000)) + 1j * rng.normal(size=(3, 40_000)))
    noise = [
        ({"flags": 1 << 18, "sample_time_us": 10.0}, part) for part in np.split(n, 20, axis=1)
    ]
    path = tmp_path / "a.h5"
    raw = read_ismrmrd(
        write_ismrmrd(path, noise + lines(oversampled(images(coils=3))), xml(bandwidth=0.8))
    )
    assert raw.covariance is not None
    # half the dwell time is twice the bandwidth, of which the receiver passes 0.8
    np.testing.assert_allclose(raw.covariance, 2 / 0.8 * mix @ mix.conj().T, rtol=0.05, atol=0.2)
    white = raw.whitened()
    whitening = np.linalg.inv(np.linalg.cholesky(raw.covariance))
    np.testing.assert_allclose(
        white.data, np.einsum("cd,zdhw->zchw", whitening, raw.data), rtol=1e-4, atol=1e-4
    )
    assert float(white.noise()[0].max()) == pytest.approx(1.0)


def test_ismrmrd_choices_and_refusals(tmp_path):
    k = oversampled(images())
    path = tmp_path / "a.h5"
    two = lines(k) + lines(2 * k, contrast=1)
    with pytest.raises(InputError, match=r"2 contrasts \(0, 1\); choose one with --contrast"):
        read_ismrmrd(write_ismrmrd(path, two, xml()))
    np.testing.assert_allclose(
        read_ismrmrd(path, contrast=1).data, 2 * read_ismrmrd(path, contrast=0).data, rtol=1e-6
    )
    with pytest.raises(InputError, match="no contrast 7"):
        read_ismrmrd(path, contrast=7)
    wrong = [({"kspace_encode_step_1": W}, k[0, :, :, 0])]
    short = [({}, k[0, :, : H + 3, 0]), ({"number_of_samples": 99}, k[0, :, :, 0])]
    cases: list[tuple[list[Line], str, type[ReconError], str]] = [
        (lines(k), xml(trajectory="spiral"), UnsupportedError, "spiral"),
        (lines(k), xml(partitions=8), UnsupportedError, "8 partitions"),
        (lines(k), "<ismrmrdHeader/>", UnsupportedError, "0 encodings"),
        (lines(k), "<x", InputError, "damaged"),
        (lines(k), '<!DOCTYPE x [<!ENTITY a "b">]><x/>', InputError, "entities"),
        (lines(k), xml().replace(f"<x>{H}</x>", "<x>nan</x>"), InputError, "no number"),
        (lines(k)[:1] + wrong, xml(), InputError, "does not fit"),
        (lines(k)[:1] + short[1:], xml(), InputError, "expected"),
        ([({"flags": 1 << 18}, k[0, :, :, 0])], xml(), InputError, "no imaging readout"),
        (lines(k) + lines(k, set=1), xml(), UnsupportedError, "set"),
        (lines(k)[:-1], xml(), UnsupportedError, "sampled differently"),
    ]
    for content, header, error, text in cases:
        with pytest.raises(error, match=text):
            read_ismrmrd(write_ismrmrd(path, content, header))
    write_ismrmrd(path, lines(k), xml())
    with pytest.raises(ResourceError, match="cap"):
        read_ismrmrd(path, max_bytes=2000)


def test_ismrmrd_generator(tmp_path):
    """The format's own generator: its phantom and coil maps against what is read."""
    program = shutil.which("ismrmrd_generate_cartesian_shepp_logan")
    if program is None:
        pytest.skip("ismrmrd_generate_cartesian_shepp_logan is not installed (ismrmrd-tools)")
    path = tmp_path / "generated.h5"
    subprocess.run([program, "-m", "64", "-c", "4", "-n", "0.01", "-C", "-o", path],
                   check=True, capture_output=True)  # fmt: skip
    raw = read_ismrmrd(path)
    assert raw.data.shape == (1, 4, 64, 64)
    assert raw.pixel_mm == (4.6875, 4.6875)
    with h5py.File(path) as f:
        phantom, maps = (
            f[f"dataset/{n}"][()]["real"] + 1j * f[f"dataset/{n}"][()]["imag"]
            for n in ("phantom", "csm")
        )
    coil_images = (maps[0] * phantom).transpose(0, 2, 1)  # ours run the readout along rows
    x = dft(64).conj().T @ raw.data[0] @ dft(64).conj()
    error = np.linalg.norm(x - coil_images) / np.linalg.norm(coil_images)
    assert error < 0.1
    measurement = raw.measurement().measurement
    assert isinstance(measurement.operator, Sense)
    assert measurement.provenance["noise"] == "noise scan"
    # coils combined with the maps of ESPIRiT give the phantom, weighted by the true coils
    maps_found = measurement.operator.maps[0].numpy()
    whitened = measurement.data[0].numpy()
    x = dft(64).conj().T @ whitened @ dft(64).conj()
    combined = np.abs((maps_found.conj() * x).sum(0))
    weight = np.sqrt((np.abs(coil_images) ** 2).sum(0))
    scale = (combined * weight).sum() / (weight**2).sum()
    inside = weight > 0.1 * weight.max()
    error = np.linalg.norm((combined - scale * weight)[inside]) / np.linalg.norm(combined[inside])
    assert error < 0.1


# --- fastMRI -----------------------------------------------------------------------------------


def write_fastmri(path: Path, k: np.ndarray, mask: np.ndarray | None, header: str) -> Path:
    with h5py.File(path, "w") as f:
        f["kspace"] = k.astype(np.complex64)
        if mask is not None:
            f["mask"] = mask.astype(np.float32)
        f.create_dataset("ismrmrd_header", data=header, dtype=h5py.string_dtype())
        f.attrs["patient_id"] = "CANARY"
        f.attrs["acquisition"] = "CORPD_FBK"
    return path


@pytest.mark.parametrize("coils", [1, 3])
def test_fastmri_round_trip(tmp_path, coils):
    x = images(coils=coils)
    k = oversampled(x)
    stored = k[:, 0] if coils == 1 else k
    mask = np.array([1, 0, 1, 1, 1, 1, 1, 0, 0, 1])
    raw = read_fastmri(write_fastmri(tmp_path / "a.h5", stored * mask, mask, xml()))
    np.testing.assert_allclose(raw.data, kspace(x) * mask, atol=1e-5)
    np.testing.assert_array_equal(raw.mask, np.broadcast_to(mask == 1, (H, W)))
    assert raw.pixel_mm == (2.0, 1.5)
    full = read_fastmri(write_fastmri(tmp_path / "b.h5", stored, None, xml()))
    assert full.mask.all()
    assert "CANARY" not in str(raw.provenance)


def test_fastmri_columns_outside_the_limits_were_not_measured(tmp_path):
    header = xml().replace(f"<maximum>{W - 1}</maximum><center>{W // 2}</center>",
                           "<maximum>5</maximum><center>3</center>")  # fmt: skip
    raw = read_fastmri(write_fastmri(tmp_path / "a.h5", oversampled(images()), None, header))
    np.testing.assert_array_equal(np.flatnonzero(raw.mask[0]), range(2, 8))
    assert not raw.data[..., ~raw.mask[0]].any()


def test_fastmri_refusals(tmp_path):
    k = oversampled(images())[:, 0]
    path = tmp_path / "a.h5"
    with pytest.raises(InputError, match="mask has 4 columns"):
        read_fastmri(write_fastmri(path, k, np.ones(4), xml()))
    with pytest.raises(InputError, match="NaN"):
        read_fastmri(write_fastmri(path, k * np.nan, None, xml()))
    with pytest.raises(InputError, match="no k-space sample"):
        read_fastmri(write_fastmri(path, k, np.zeros(W), xml()))
    with h5py.File(path, "w") as f:
        f["kspace"] = np.zeros((2, H, W))
    with pytest.raises(InputError, match="type float64"):
        read_fastmri(path)


# --- BART --------------------------------------------------------------------------------------


def write_bart(stem: Path, k: np.ndarray, dims: dict[int, int] | None = None) -> Path:
    """k-space ``(slices, coils, READ, PHS1)`` as BART stores it."""
    sizes = [1] * 16
    sizes[0], sizes[1], sizes[3], sizes[13] = k.shape[2], k.shape[3], k.shape[1], k.shape[0]
    for axis, size in (dims or {}).items():
        sizes[axis] = size
    stem.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, sizes)) + " \n")
    k.transpose(2, 3, 1, 0).astype("<c8").ravel(order="F").tofile(stem.with_suffix(".cfl"))
    return stem


def test_bart_round_trip(tmp_path):
    k = kspace(images(slices=2, coils=3))
    mask = np.random.default_rng(1).random((H, W)) < 0.6
    stem = write_bart(tmp_path / "ksp", k * mask)
    for name in (stem, stem.with_suffix(".cfl"), stem.with_suffix(".hdr")):
        raw = read_bart(name, (1.5, 2.0))
        np.testing.assert_array_equal(raw.data, (k * mask).astype(np.complex64))
        np.testing.assert_array_equal(raw.mask, mask)
        assert raw.pixel_mm == (1.5, 2.0)


def test_bart_refusals(tmp_path):
    k = kspace(images())
    with pytest.raises(NoInputError, match=r"ksp\.hdr"):
        read_bart(tmp_path / "ksp", (1, 1))
    stem = write_bart(tmp_path / "ksp", k)
    with pytest.raises(ResourceError, match="limit"):
        read_bart(stem, (1, 1), max_bytes=100)
    with pytest.raises(UnsupportedError, match="TE has 4 entries"):
        read_bart(write_bart(stem, k, {5: 4}), (1, 1))
    with pytest.raises(InputError, match="asks for"):
        read_bart(write_bart(stem, k, {13: 4}), (1, 1))
    stem.with_suffix(".hdr").write_text("# Dimensions\nten -3\n")
    with pytest.raises(InputError, match="no dimensions"):
        read_bart(stem, (1, 1))
    with pytest.raises(InputError, match="positive"):
        read_bart(write_bart(stem, k), (0.0, 1.0))


def test_bart_phantom(tmp_path):
    """BART's own k-space and its own Fourier transform against ours."""
    if shutil.which("bart") is None:
        pytest.skip("bart is not installed")

    def bart(*arguments: str) -> None:
        subprocess.run(["bart", *arguments], check=True, capture_output=True, cwd=tmp_path)

    bart("phantom", "-k", "-x", "32", "ksp")
    bart("fft", "-u", "-i", "3", "ksp", "image")
    raw = read_bart(tmp_path / "ksp", (1, 1))
    image = read_bart(tmp_path / "image", (1, 1)).data[0, 0]
    operator = CartesianMRI(torch.from_numpy(raw.mask))
    ours = operator.adjoint(torch.from_numpy(raw.data[0]))[0].numpy()
    np.testing.assert_allclose(ours, image, atol=1e-5 * np.abs(image).max())


# --- several coils -----------------------------------------------------------------------------


def smooth_coils(n: int, coils: int = 4) -> np.ndarray:
    """Smooth complex maps of unit root-sum-of-squares."""
    v, u = np.mgrid[:n, :n] / n - 0.5
    maps = np.stack([
        np.exp(-((u - math.cos(a)) ** 2 + (v - math.sin(a)) ** 2) + 1j * (u + a) * v)
        for a in 2 * np.pi * np.arange(coils) / coils
    ])  # fmt: skip
    return maps / np.sqrt((np.abs(maps) ** 2).sum(0))


def test_several_coils_make_a_sense_measurement(tmp_path):
    n = 48
    v, u = np.mgrid[:n, :n] / n - 0.5
    x = ((u / 0.35) ** 2 + (v / 0.42) ** 2 < 1) * (1.0 + 0.5 * (np.hypot(u, v - 0.1) < 0.12))
    k = kspace(smooth_coils(n) * x)[None]
    columns = (np.arange(n) % 2 == 0) | (np.abs(np.arange(n) - n // 2) < 10)
    rng = np.random.default_rng(0)
    k = k + 1e-3 * (rng.normal(size=k.shape) + 1j * rng.normal(size=k.shape))
    file = read_bart(write_bart(tmp_path / "k", k * columns), (1, 1)).measurement()
    operator = file.measurement.operator
    assert isinstance(operator, Sense)
    assert operator.out_shape == (4, n, n)
    assert "ESPIRiT" in str(file.measurement.provenance)
    # the maps explain the data: least squares leaves little residual and finds the object
    b = operator.adjoint(file.measurement.data)
    solved = operator.normal_solve(b, 1e-3, max_iter=60).x[0]
    assert float((solved.abs() - torch.from_numpy(x).float()).abs().mean()) < 0.02
    assert float(file.measurement.noise.min()) > 1e-3  # an upper bound
    with pytest.raises(ReconError, match="centre"):
        read_bart(write_bart(tmp_path / "k", k * (np.arange(n) % 2 == 0)), (1, 1)).measurement()


def test_real_eight_coil_scan(tmp_path, shared_data):
    """A brain, 8-fold undersampled: one image behind 8 coils explains what zeros cannot."""
    k = np.load(shared_data / "mr_kspace" / "sigpy_tutorial_cartesian_ksp_8ch.npy")
    m = read_bart(write_bart(tmp_path / "ksp", k[None]), (1, 1)).measurement().measurement
    operator = m.operator
    assert isinstance(operator, Sense)
    assert operator.acceleration == pytest.approx(8.04, abs=0.01)
    zero_filled = operator.adjoint(m.data)
    sense = operator.normal_solve(zero_filled, 0.02, max_iter=30).x

    def residual(x: torch.Tensor) -> float:
        return float((m.data - operator(x)).norm() / m.data.norm())

    assert residual(sense) < 0.06
    assert residual(sense) < 0.5 * residual(zero_filled)


def test_crop_readout_keeps_odd_and_even_sizes_centred():
    for n, size in ((8, 5), (9, 4), (7, 3), (8, 8)):
        x = np.zeros(n, complex)
        x[n // 2 - size // 2 : n // 2 - size // 2 + size] = np.arange(1, size + 1)
        k = crop_readout(dft(n) @ x, size)
        np.testing.assert_allclose(dft(size).conj().T @ k, np.arange(1, size + 1), atol=1e-5)


# --- CT: exact line integrals of discs ---------------------------------------------------------

# centre (x, y) and radius in mm, attenuation in 1/mm; y downwards as in images
DISCS = ((10.0, -20.0, 60.0, 0.02), (35.0, 5.0, 12.0, 0.01), (-20.0, -45.0, 8.0, -0.015))


def through_discs(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Line integrals along rays ``(..., 2)``."""
    total = np.zeros(origin.shape[:-1])
    for x, y, radius, mu in DISCS:
        to = np.array([x, y]) - origin
        distance = to[..., 0] * direction[..., 1] - to[..., 1] * direction[..., 0]
        total += 2 * mu * np.sqrt(np.maximum(radius**2 - distance**2, 0))
    return total


def along(geometry: ParallelBeam | FanBeam) -> np.ndarray:
    """Line integrals that a geometry's own rays measure, ``(views, bins)``."""
    origin, direction = geometry.rays()
    return through_discs(origin[:, :, 0], direction[:, :, 0])


RHO, DSD, DU, CHANNELS, CENTRE = 500.0, 900.0, 3.0, 96, 47.75


def ctpd_reading(phi: float, *, curved: bool) -> np.ndarray:
    """One view in the format's coordinates: y upwards, source at rho (-sin phi, cos phi)."""
    c, s = math.cos(phi), math.sin(phi)
    source = RHO * np.array([-s, c])
    inwards, sideways = np.array([s, -c]), np.array([c, s])
    u = (np.arange(1, CHANNELS + 1) - CENTRE) * DU
    gamma = u / DSD if curved else np.arctan(u / DSD)
    direction = np.cos(gamma)[:, None] * inwards + np.sin(gamma)[:, None] * sideways
    flip = np.array([1, -1])  # to image coordinates, y downwards
    return through_discs(np.broadcast_to(source * flip, direction.shape), direction * flip)


def write_ctpd(
    folder: Path,
    views: int = 90,
    *,
    curved: bool = True,
    reverse: bool = False,
    transpose: bool = False,
    raw: bool = False,
    tables: Sequence[float] = (12.5,),
    change: Callable[[Dataset, int], None] = lambda ds, k: None,
) -> Path:
    """An axial fan-beam scan, one file a view."""
    folder.mkdir()
    for t, z in enumerate(tables):
        for k in range(views):
            phi = 0.3 + 2 * math.pi * k / views
            p = ctpd_reading(phi, curved=curved)
            slope = float(f"{max(p.max(), 1e-3) / 65535:.9e}")
            stored = np.rint(p / slope).clip(0, 65535).astype("<u2")[:: -1 if reverse else 1]
            ds = Dataset()
            ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", f"1.2.{t + 1}.{k + 1}"
            ds.PatientName, ds.PatientID, ds.Modality = "CANARY^ANNA", "CANARY", "CT"
            ds.InstanceNumber = k + 1
            ds.Rows, ds.Columns = (CHANNELS, 1) if transpose else (1, CHANNELS)
            ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
            ds.BitsAllocated = ds.BitsStored = 16
            ds.HighBit, ds.PixelRepresentation = 15, 0
            ds.RescaleSlope, ds.RescaleIntercept = slope, 0
            ds.add_new("PixelData", "OW", stored.tobytes())
            centre = CHANNELS + 1 - CENTRE if reverse else CENTRE
            values = {
                0x70291002: DU, 0x70291006: 1.0, 0x70311001: phi, 0x70311002: z, 0x70311003: RHO,
                0x70311031: DSD, 0x70311033: [centre, 1.0], 0x70331065: [1e5] * CHANNELS,
            }  # fmt: skip
            for tag, value in values.items():
                number = np.asarray(value, "<f4")
                vr, content = ("UN", number.tobytes()) if raw else ("FL", value)
                ds.add_new(tag, vr, content)
            for tag, value in ((0x70291010, 1), (0x70291011, CHANNELS)):
                ds.add_new(tag, "US", value)
            ds.add_new(0x7029100B, "CS", "CYLINDRICAL" if curved else "FLAT")
            ds.add_new(0x70371009, "CS", "AXIAL")
            ds.add_new(0x7037100A, "CS", "FANBEAM")
            ds.add_new(0x70411001, "DS", "0.192")
            for group in (0x7029, 0x7031, 0x7033, 0x7037, 0x7041):
                ds.add_new((group << 16) | 0x10, "LO", "DICOM-CT-PD")
            change(ds, k)
            ds.file_meta = FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            ds.save_as(folder / f"{views * t + k:04d}.dcm", enforce_file_format=True)
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"curved": False}, {"reverse": True}, {"transpose": True, "raw": True},
     {"tables": (20.0, 10.0)}],
    ids=str,
)  # fmt: skip
def test_ctpd_round_trip(tmp_path, options):
    raw = read_ctpd(write_ctpd(tmp_path / "in", **options))
    tables = sorted(options.get("tables", (12.5,)))
    assert raw.data.shape == (len(tables), 90, CHANNELS)
    assert raw.z_mm == pytest.approx(tables)
    assert raw.geometry.curved == options.get("curved", True)
    assert raw.mu_water == pytest.approx(0.0192)
    # the geometry's own rays, in image coordinates, see what the file's coordinates meant
    expected = along(raw.geometry)
    np.testing.assert_allclose(raw.data[0], expected, atol=2e-3 * expected.max())
    assert raw.provenance["channels_reversed"] == options.get("reverse", False)
    assert raw.photons is not None
    np.testing.assert_allclose(raw.photons, 1e5 * np.exp(-raw.data), rtol=1e-4)
    sigma, origin = raw.noise()
    np.testing.assert_allclose(sigma, np.exp(raw.data / 2) / math.sqrt(1e5), rtol=1e-4)
    assert origin == "photon statistics"
    assert "CANARY" not in str(raw.provenance)


def test_ctpd_from_a_zip(tmp_path):
    folder = write_ctpd(tmp_path / "in", views=20)
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    np.testing.assert_array_equal(
        read_ctpd(tmp_path / "in.zip").data, read_ctpd(tmp_path / "in").data
    )


def put(tag: int, vr: str, value: Any) -> Callable[[Dataset, int], None]:
    return lambda ds, k: ds.add_new(tag, vr, value)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (put(0x70371009, "CS", "HELICAL"), UnsupportedError, "helical.*rebinned"),
        (lambda ds, k: ds.add_new(0x70311002, "FL", 0.5 * k), UnsupportedError, "table moves"),
        (put(0x7033100B, "FL", 0.002), UnsupportedError, "flying focal spot"),
        (put(0x7029100B, "CS", "SPHERICAL"), UnsupportedError, "SPHERICAL"),
        (lambda ds, k: ds.add_new(0x70311003, "FL", RHO + k), UnsupportedError, "'rho' changes"),
        (lambda ds, k: ds.__delitem__(0x70311001), InputError, r"\(7031,1001\)"),
        (lambda ds, k: ds.__delitem__(0x70311033), InputError, "central detector"),
        (lambda ds, k: ds.__delattr__("RescaleSlope"), InputError, "rescale"),
        (lambda ds, k: setattr(ds, "Columns", 7), InputError, "1 x 7"),
        (lambda ds, k: setattr(ds, "PixelData", b"\0\0"), InputError, "192 bytes"),
        (lambda ds, k: ds.__delitem__(0x70291011), NoInputError, "no projection data"),
    ],
)
def test_ctpd_refusals(tmp_path, change, error, text):
    write_ctpd(tmp_path / "in", views=4, change=change)
    with pytest.raises(error, match=text) as caught:
        read_ctpd(tmp_path / "in")
    assert type(caught.value) is error
    assert "CANARY" not in str(caught.value)


def test_ctpd_slices_must_share_their_views(tmp_path):
    write_ctpd(tmp_path / "in", views=6, tables=(0.0, 5.0))
    (tmp_path / "in" / "0003.dcm").unlink()
    with pytest.raises(UnsupportedError, match="different view angles"):
        read_ctpd(tmp_path / "in")
    with pytest.raises(ResourceError, match="MiB"):
        read_ctpd(tmp_path / "in", max_bytes=1000)


# --- Data Exchange -----------------------------------------------------------------------------

BINS, PIXEL, AXIS = 128, 1.5, 61.3


def write_dxchange(
    path: Path, *, rows: int = 3, flats: int = 10, noise: bool = True, **extra: Any
) -> ParallelBeam:
    """Counts behind the discs, each row with its own beam intensity; the scan's geometry."""
    rng = np.random.default_rng(0)
    angles = tuple(math.pi * k / 60 for k in range(60))
    beam = ParallelBeam(angles, BINS, PIXEL, ((BINS - 1) / 2 - AXIS) * PIXEL)
    gain, dark = 4.0, 100.0
    bright = 2e5 * (1 + np.arange(rows))[:, None] * np.linspace(0.8, 1.2, BINS)

    def counts(mean: np.ndarray) -> np.ndarray:
        photons = rng.poisson(mean) if noise else mean
        return (photons * gain + dark).astype(np.float32)

    p = along(beam)[:, None, :]
    with h5py.File(path, "w") as f:
        f["exchange/data"] = counts(bright * np.exp(-p))
        f["exchange/data_white"] = counts(np.broadcast_to(bright, (flats, rows, BINS)))
        f["exchange/data_dark"] = np.full((2, rows, BINS), dark, np.float32)
        f["exchange/theta"] = np.degrees(angles)
        f["measurement/instrument/detection_system/objective/resolution"] = 1000 * PIXEL
        f["measurement/sample/experimenter/name"] = "CANARY"
        for name, value in extra.items():
            f[name.replace("__", "/")] = value
    return beam


def test_dxchange_round_trip(tmp_path):
    path = tmp_path / "a.h5"
    beam = write_dxchange(path, noise=False)
    raw = read_dxchange(path, centre=AXIS)
    np.testing.assert_allclose(raw.data, np.broadcast_to(along(beam), raw.data.shape), atol=2e-5)
    assert raw.geometry.angles == pytest.approx(beam.angles)
    assert raw.geometry.offset_mm == pytest.approx(beam.offset_mm)
    assert raw.z_mm == (0.0, 1.5, 3.0)
    picked = read_dxchange(path, centre=AXIS, rows=lambda n: range(n)[1:])
    np.testing.assert_array_equal(picked.data, raw.data[1:])
    assert picked.z_mm == (1.5, 3.0)
    assert "CANARY" not in str(raw.provenance)


def test_dxchange_rotation_centre(tmp_path):
    path = tmp_path / "a.h5"
    write_dxchange(path)
    raw = read_dxchange(path)
    assert raw.provenance["rotation_centre"] == pytest.approx(AXIS, abs=0.05)
    assert raw.provenance["rotation_centre_from"] == "fit to the centre of mass"
    write_dxchange(path, process__rotation_center=60.0)
    assert read_dxchange(path).provenance["rotation_centre"] == 60.0
    with pytest.raises(InputError, match="column 400"):
        read_dxchange(path, centre=400)


def test_dxchange_noise_is_that_of_the_photons(tmp_path):
    path = tmp_path / "a.h5"
    beam = write_dxchange(path, flats=40)
    raw = read_dxchange(path, centre=AXIS)
    assert raw.provenance["counts_per_photon"] == pytest.approx(4.0, rel=0.05)
    sigma, _ = raw.noise()
    z = (raw.data - along(beam)) / sigma
    assert float((z**2).mean()) == pytest.approx(1.0, abs=0.1)


def test_dxchange_refusals(tmp_path):
    path = tmp_path / "a.h5"

    def spoil(name: str, value: Any) -> None:
        write_dxchange(path, noise=False)
        with h5py.File(path, "r+") as f:
            del f[name]
            if value is not None:
                f[name] = value

    for name, value, text in (
        ("exchange/theta", np.arange(7.0), "60 views"),
        ("exchange/data_white", None, "data_white"),
        ("exchange/data_white", np.zeros((2, 3, BINS)), "flat field"),
        ("exchange/data_white", np.ones((2, 3, 5)), "real numbers"),
        ("exchange/data", np.ones((3, BINS)), "views, rows, columns"),
        ("measurement/instrument/detection_system/objective/resolution", None, "--pixel-mm"),
    ):
        spoil(name, value)
        with pytest.raises(InputError, match=text):
            read_dxchange(path)
    write_dxchange(path)
    with pytest.raises(ResourceError, match="cap"):
        read_dxchange(path, max_bytes=10_000)


# --- hostile and foreign files -----------------------------------------------------------------

READERS: dict[str, tuple[Callable[..., Any], str]] = {
    "ismrmrd": (read_ismrmrd, "dataset/data"),
    "fastmri": (read_fastmri, "kspace"),
    "dxchange": (read_dxchange, "exchange/data"),
}


def example(name: str, path: Path) -> None:
    if name == "ismrmrd":
        write_ismrmrd(path, lines(oversampled(images())), xml())
    elif name == "fastmri":
        write_fastmri(path, oversampled(images()), None, xml())
    else:
        write_dxchange(path)


@pytest.mark.parametrize("name", READERS)
def test_links_out_of_hdf5_files_are_refused(tmp_path, name):
    read, place = READERS[name]
    path, secret = tmp_path / "a.h5", tmp_path / "secret.bin"
    secret.write_bytes(bytes(10_000))
    size = (2, 3, 4)

    def external(f: h5py.File) -> None:
        f[place] = h5py.ExternalLink(str(secret), "x")

    def soft(f: h5py.File) -> None:
        f[place] = h5py.SoftLink("/elsewhere")

    def raw(f: h5py.File) -> None:
        f.create_dataset(place, size, np.float32, external=[(str(secret), 0, 96)])

    def virtual(f: h5py.File) -> None:
        layout = h5py.VirtualLayout(size, np.float32)
        layout[:] = h5py.VirtualSource(str(secret), "x", size)
        f.create_virtual_dataset(place, layout)

    for make in (external, soft, raw, virtual):
        example(name, path)
        with h5py.File(path, "r+") as f:
            del f[place]
            make(f)
        with pytest.raises(InputError, match=r"link to elsewhere|values in other files"):
            read(path)


@pytest.mark.parametrize("name", READERS)
def test_mutated_hdf5_gives_data_or_our_errors(tmp_path, name):
    read, _ = READERS[name]
    path = tmp_path / "a.h5"
    example(name, path)
    clean = path.read_bytes()
    kind = type(read(path))
    rng = np.random.default_rng(5)
    refused = 0
    for i in range(60):
        raw = bytearray(clean)
        for _ in range(3):
            raw[int(rng.integers(min(len(raw), 6000)))] = int(rng.integers(256))
        path.write_bytes(raw[: len(raw) if i % 3 else int(rng.integers(9, len(raw)))])
        try:
            assert type(read(path)) is kind
        except ReconError:
            refused += 1
    assert 20 <= refused < 60, "a file that was cut short is refused, and not every other"


def test_formats_are_told_by_their_content(tmp_path):
    for name in READERS:
        path = tmp_path / f"{name}.h5"
        example(name, path)
        assert detect_raw(path) == name
    stem = write_bart(tmp_path / "ksp", kspace(images()))
    assert {detect_raw(p) for p in (stem, stem.with_suffix(".cfl"))} == {"bart"}
    assert detect_raw(write_ctpd(tmp_path / "views", views=1)) == "ctpd"
    assert detect_raw(tmp_path / "views" / "0000.dcm") == "ctpd"
    (tmp_path / "x.txt").write_text("no raw data")
    with pytest.raises(InputError, match="none of the raw formats"):
        detect_raw(tmp_path / "x.txt")
    (tmp_path / "meas.dat").write_bytes(bytes(100))
    with pytest.raises(InputError, match="siemens_to_ismrmrd"):
        detect_raw(tmp_path / "meas.dat")
    with pytest.raises(NoInputError):
        detect_raw(tmp_path / "absent")


def test_headers_that_claim_gigabytes_are_refused(tmp_path):
    """A text dataset of two kilobytes that declares many strings, or one of a gigabyte."""
    for shape, kind in (((10**8,), h5py.string_dtype()), ((1,), "S1000000000")):
        path = tmp_path / "lie.h5"
        with h5py.File(path, "w") as f:
            f.create_dataset("dataset/xml", shape, kind, chunks=(1,))
            f.create_dataset("dataset/data", (1,), np.float32)
        assert path.stat().st_size < 10_000
        with pytest.raises(ReconError, match=r"one text|cap"):
            read_ismrmrd(path, max_bytes=1 << 20)


def test_noise_of_one_coil_without_a_noise_scan():
    """The edge of k-space: the noise itself where there is no signal."""
    rng = np.random.default_rng(0)
    noise = 0.3 * (rng.normal(size=(1, 1, 64, 64)) + 1j * rng.normal(size=(1, 1, 64, 64)))
    raw = KSpace(noise.astype(np.complex64), np.ones((64, 64), bool), (1.0, 1.0))
    m = raw.measurement().measurement
    assert float(m.noise) == pytest.approx(0.3, rel=0.06)


# --- the documented file -----------------------------------------------------------------------


def test_documented_examples_write_files_that_are_read(tmp_path, monkeypatch):
    """The code of docs/measurement-file.md, run as it stands without this toolkit."""
    text = (Path(__file__).parent.parent / "docs" / "measurement-file.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        assert "inverse" not in block.replace("inverse orthonormal", "")
        exec(compile(block, "docs/measurement-file.md", "exec"), {})
    ct = read_measurement(tmp_path / "ct.h5").measurement
    water = torch.zeros(ct.operator.in_shape)
    y, x = np.mgrid[:64, :64] - 63 / 2
    water[torch.from_numpy(x**2 + y**2 < 25**2)] = 0.0206
    # the data are exact line integrals, the operator's image of the disc has pixel steps
    assert float((ct.operator(water) - ct.data[0]).abs().mean()) < 0.02 * float(ct.data.max())
    mri = read_measurement(tmp_path / "mri.h5").measurement
    box = torch.zeros(mri.operator.in_shape, dtype=torch.complex64)
    box[20:44, 24:40] = 100
    torch.testing.assert_close(mri.operator(box), mri.data[0], atol=1e-3, rtol=1e-4)
