"""Measurement files: round trips, damage, and files that reach for other files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import laws
import numpy as np
import pytest
import torch

from inverse.errors import (
    InputError,
    NoInputError,
    OutputError,
    ReconError,
    ResourceError,
    UnsupportedError,
)
from inverse.io.measurement_file import read_measurement, write_measurement
from inverse.measurement import Measurement
from inverse.operators.ct import FanBeam, ParallelBeam, RayTransform
from inverse.operators.linop import Identity, LinearOperator
from inverse.operators.mask import Mask
from inverse.operators.mri import CartesianMRI, Sense, cartesian_mask

SHAPE = (12, 10)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECON_CACHE_DIR", "off")


def operators() -> dict[str, LinearOperator]:
    known = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) > 0.3
    return {
        "parallel": RayTransform(ParallelBeam.sparse(5, SHAPE, 2.0), SHAPE, 2.0),
        "fan": RayTransform(FanBeam.sparse(5, SHAPE, 2.0), SHAPE, 2.0, "strip"),
        "mri": CartesianMRI(cartesian_mask(SHAPE, 2.0, 0.1)),
        "sense": Sense(laws.random((3, 2, *SHAPE), torch.complex64, 5), known),
        "mask": Mask(known),
        "complex mask": Mask(known, torch.complex64),
    }


def measurement(name: str, per_slice: bool = False) -> Measurement:
    op = operators()[name]
    data = laws.random((3, *op.out_shape), op.out_dtype, 1)
    noise = torch.rand(3, *op.out_shape) + 0.5 if per_slice else torch.tensor(0.25)
    ct = isinstance(op, RayTransform)
    return Measurement(
        op,
        data,
        noise,
        "CT" if ct else "MR",
        (2.0, 2.5),
        0.0206 if ct else None,
        {"simulation": "random numbers", "seed": 3},
    )


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "m.h5"
    write_measurement(path, measurement("mri"), template=[b"a", b"", b"ccc"])
    return path


@pytest.mark.parametrize("name", ["parallel", "fan", "mri", "sense", "mask", "complex mask"])
@pytest.mark.parametrize("per_slice", [False, True])
def test_round_trip(tmp_path: Path, name: str, per_slice: bool) -> None:
    m = measurement(name, per_slice)
    truth = laws.random((3, *SHAPE), m.operator.dtype, 2)
    template = [b"DICM" + bytes(range(256)), b"", b"\x00\x01"]
    path = tmp_path / "new folder" / "m.h5"
    write_measurement(path, m, truth, template, [0.0, 2.5, 5.0])
    got = read_measurement(path)
    assert torch.equal(got.measurement.data, m.data)
    assert torch.equal(got.measurement.noise, m.noise)
    assert got.truth is not None
    assert torch.equal(got.truth, truth)
    assert list(got.template) == template
    assert got.z_mm == (0.0, 2.5, 5.0)
    for field in ("modality", "pixel_mm", "mu_water", "provenance"):
        assert getattr(got.measurement, field) == getattr(m, field)
    assert type(got.measurement.operator) is type(m.operator)
    assert torch.equal(got.measurement.operator(truth), m.operator(truth))
    assert [p.name for p in path.parent.iterdir()] == ["m.h5"]


def test_parts_may_be_absent(tmp_path: Path) -> None:
    write_measurement(tmp_path / "m.h5", measurement("mask"))
    got = read_measurement(tmp_path / "m.h5")
    assert got.truth is None
    assert got.template == ()
    assert got.z_mm == ()


def test_many_views_fit(tmp_path: Path) -> None:
    # more JSON than an HDF5 attribute holds
    op = RayTransform(ParallelBeam.sparse(6000, (2, 2), 1.0), (2, 2), 1.0)
    m = Measurement(op, torch.ones(1, *op.out_shape), torch.tensor(1.0), "CT", (1.0, 1.0), 0.02)
    write_measurement(tmp_path / "m.h5", m)
    assert read_measurement(tmp_path / "m.h5").measurement.operator.geometry == op.geometry


def test_existing_files_are_kept(stored: Path) -> None:
    before = stored.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        write_measurement(stored, measurement("mask"))
    assert stored.read_bytes() == before
    write_measurement(stored, measurement("mask"), overwrite=True)
    assert isinstance(read_measurement(stored).measurement.operator, Mask)


def test_failed_writes_leave_nothing(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stored.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space"):
        write_measurement(stored, measurement("mask"), overwrite=True)
    assert stored.read_bytes() == before
    assert [p.name for p in stored.parent.iterdir()] == [stored.name]


def test_write_refusals(tmp_path: Path) -> None:
    m = measurement("mask")
    with pytest.raises(InputError, match="truth"):
        write_measurement(tmp_path / "m.h5", m, torch.zeros(2, *SHAPE))
    with pytest.raises(InputError, match="templates"):
        write_measurement(tmp_path / "m.h5", m, template=[b"a"])
    with pytest.raises(InputError, match="positions"):
        write_measurement(tmp_path / "m.h5", m, z_mm=[0.0])
    other = Measurement(
        Identity((2, 2)), torch.zeros(1, 2, 2), torch.tensor(1.0), "MR", (1.0, 1.0)
    )
    with pytest.raises(UnsupportedError, match="Identity"):
        write_measurement(tmp_path / "m.h5", other)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_measurement(tmp_path / "file" / "m.h5", m)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="no measurement file"):
        read_measurement(tmp_path / "none.h5")
    with pytest.raises(NoInputError):
        read_measurement(tmp_path)
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(InputError, match="not a readable"):
        read_measurement(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as f:
        f["kspace"] = np.zeros(3)
    with pytest.raises(InputError, match="lacks header"):
        read_measurement(tmp_path / "other.h5")


def test_cut_files(stored: Path) -> None:
    whole = stored.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        stored.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_measurement(stored)


def test_flipped_bits_never_change_the_data_silently(stored: Path) -> None:
    whole = bytearray(stored.read_bytes())
    good = read_measurement(stored)
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(whole), 150):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        stored.write_bytes(damaged)
        try:
            got = read_measurement(stored)
        except ReconError:
            refused += 1
            continue
        assert torch.equal(got.measurement.data, good.measurement.data)
        assert got.template == good.template
    assert refused > 20


def tamper(path: Path, name: str, make) -> None:
    with h5py.File(path, "r+") as f:
        del f[name]
        make(f)


def test_links_out_of_the_file_are_refused(stored: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as f:
        f["data"] = np.zeros((3, *SHAPE), np.complex64)

    def external(f: h5py.File) -> None:
        f["data"] = h5py.ExternalLink(str(secret), "data")

    def soft(f: h5py.File) -> None:
        f["data"] = h5py.SoftLink("/elsewhere")

    def raw(f: h5py.File) -> None:
        size = 3 * SHAPE[0] * SHAPE[1] * 8
        f.create_dataset("data", (3, *SHAPE), np.complex64, external=[(str(secret), 0, size)])

    def virtual(f: h5py.File) -> None:
        layout = h5py.VirtualLayout((3, *SHAPE), np.complex64)
        layout[:] = h5py.VirtualSource(str(secret), "data", (3, *SHAPE))
        f.create_virtual_dataset("data", layout)

    def group(f: h5py.File) -> None:
        f.create_group("data")

    clean = stored.read_bytes()
    for make, text in (
        (external, "link"),
        (soft, "link"),
        (raw, "other files"),
        (virtual, "other files"),
        (group, "must be a dataset"),
    ):
        stored.write_bytes(clean)
        tamper(stored, "data", make)
        with pytest.raises(InputError, match=text):
            read_measurement(stored)


def test_sizes_are_checked_before_reading(stored: Path) -> None:
    tamper(
        stored,
        "data",
        lambda f: f.create_dataset("data", (10**6, *SHAPE), np.complex64, chunks=(1, *SHAPE)),
    )
    assert stored.stat().st_size < 100_000
    with pytest.raises(ResourceError, match="cap"):
        read_measurement(stored, max_bytes=2**20)


def test_wrong_types_and_shapes(stored: Path) -> None:
    clean = stored.read_bytes()
    for name, value, error in (
        ("data", np.zeros((3, *SHAPE)), InputError),
        ("data", np.zeros((3, 5, 5), np.complex64), ReconError),
        ("data", np.full((3, *SHAPE), np.nan, np.complex64), InputError),
        ("data", np.zeros((3, *SHAPE), np.float32), InputError),
        ("noise", np.zeros((), np.float32), InputError),
        ("noise", np.ones(7, np.float32), InputError),
        ("mask", np.ones((3, 3), np.uint8), InputError),
        ("mask", np.zeros(SHAPE, np.uint8), ReconError),
        ("ends", np.array([1, 5, 2]), InputError),
        ("ends", np.array([-5, 0, 4]), InputError),
        ("ends", np.array([4]), InputError),
        ("header", np.frombuffer(b"{", np.uint8), InputError),
        ("header", np.frombuffer(b"[" * 100_000, np.uint8), InputError),
        ("header", np.frombuffer(b"[]", np.uint8), InputError),
    ):
        stored.write_bytes(clean)
        tamper(stored, name, lambda f, n=name, v=value: f.create_dataset(n, data=v))
        with pytest.raises(error):
            read_measurement(stored)


def test_headers_that_lie(stored: Path) -> None:
    with h5py.File(stored, "r") as f:
        header = json.loads(f["header"][()].tobytes())
    clean = stored.read_bytes()
    ct = operators()["parallel"].spec()
    for change, error in (
        ({"version": 99}, UnsupportedError),
        ({"format": "other"}, InputError),
        ({"operator": {"type": "pet"}}, UnsupportedError),
        ({"operator": {"type": "sense"}}, InputError),
        ({"operator": {"type": "sense", "shape": [12, 10]}}, InputError),
        ({"operator": {}}, InputError),
        ({"operator": 7}, InputError),
        ({"operator": ct}, ReconError),
        ({"operator": {**ct, "shape": [10**9, 10**9]}}, ReconError),
        ({"operator": {**ct, "geometry": {**ct["geometry"], "bins": -1}}}, ReconError),
        ({"operator": {**ct, "geometry": {**ct["geometry"], "angles": []}}}, ReconError),
        ({"modality": "US"}, InputError),
        ({"pixel_mm": [0, 1]}, InputError),
        ({"pixel_mm": 3}, InputError),
        ({"provenance": 5}, InputError),
    ):
        stored.write_bytes(clean)
        text = json.dumps({**header, **change}).encode()
        tamper(
            stored,
            "header",
            lambda f, t=text: f.create_dataset("header", data=np.frombuffer(t, np.uint8)),
        )
        with pytest.raises(error):
            read_measurement(stored)
