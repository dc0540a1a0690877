"""Volumes on disk behave as arrays, hold no memory, leave nothing behind and tell a full disk."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest

from inverse.errors import GeometryError, ResourceError
from inverse.volumes import DiskVolume, extent, order_statistics, percentile, slabs


@pytest.fixture
def image(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(37, 5, 7)).astype(np.float32)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def on_disk(folder: Path, image: np.ndarray) -> DiskVolume:
    volume = DiskVolume(folder, image.shape, image.dtype)
    for part in slabs(len(image)):
        volume[part] = image[part]
    return volume


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64", "bool"])
def test_what_is_written_comes_back(tmp_path: Path, image: np.ndarray, dtype: str) -> None:
    image = (image > 0) if dtype == "bool" else image.astype(dtype)
    volume = on_disk(tmp_path, image)
    assert (volume.shape, volume.dtype, volume.ndim) == (image.shape, image.dtype, 3)
    for index in (0, -1, slice(3, 21), slice(None), slice(9, 2), slice(1, 30, 4), [5, 5, 2]):
        np.testing.assert_array_equal(volume[index], image[index])
    np.testing.assert_array_equal(np.asarray(volume), image)
    np.testing.assert_array_equal(list(volume), image)


def test_slices_are_written_in_any_order(tmp_path: Path, image: np.ndarray) -> None:
    volume = DiskVolume(tmp_path, image.shape)
    assert not volume[:].any(), "zero where nothing was written"
    for k in reversed(range(len(image))):
        volume[k] = image[k]
    volume[4:6] = 7.0
    image[4:6] = 7.0
    np.testing.assert_array_equal(volume[:], image)
    for wrong in (37, -38):
        with pytest.raises(IndexError, match="of a volume of 37"):
            volume[wrong]
    with pytest.raises(ValueError, match="broadcast"):
        volume[0] = np.zeros((7, 5))
    with pytest.raises(GeometryError, match="shape"):
        DiskVolume(tmp_path, ())


def test_nothing_is_left(tmp_path: Path, image: np.ndarray) -> None:
    """The file has no name, so that not even a killed process leaves it."""
    before = open_files()
    volume = on_disk(tmp_path, image)
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before + 1
    del volume
    assert open_files() == before


def test_npy_files_are_read_where_they_are(tmp_path: Path, image: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", image)
    volume = DiskVolume.of_npy(tmp_path / "a.npy")
    np.testing.assert_array_equal(volume[3:30], image[3:30])
    content = (tmp_path / "a.npy").read_bytes()
    fortran = io.BytesIO()
    np.save(fortran, np.asfortranarray(image))
    for damaged in (content[:-1], content[:40], b"no array", fortran.getvalue()):
        (tmp_path / "b.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b\.npy|magic|EOF|header"):
            DiskVolume.of_npy(tmp_path / "b.npy")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_full_disk_is_told(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError, match="no space left for a volume"):
        on_disk(tmp_path, image)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_short_writes_and_reads_are_continued(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:100], at))
    monkeypatch.setattr(os, "preadv", lambda file, into, at: read(file, [into[0][:64]], at))
    np.testing.assert_array_equal(on_disk(tmp_path, image)[:], image)


@pytest.mark.parametrize("make", ["normal", "ties", "zeros", "one"])
def test_percentiles_are_those_of_numpy(
    tmp_path: Path, rng: np.random.Generator, make: str
) -> None:
    image = rng.normal(scale=100, size=(1 if make == "one" else 40, 3, 5)).astype(np.float32)
    if make == "ties":
        image = np.round(image / 50)
    if make == "zeros":
        image[image < 0] = -0.0
    volume = on_disk(tmp_path, image)
    for q in (0, 0.5, 50, 99.7, 100, (1.0, 99.7)):
        np.testing.assert_allclose(percentile(volume, q), np.percentile(image, q), rtol=1e-6)
        found, right = percentile(volume, q, magnitude=True), np.percentile(np.abs(image), q)
        np.testing.assert_allclose(found, right, rtol=1e-6)
    ranks = np.array([0, 7, 7, image.size - 1])
    found = order_statistics(lambda: iter(volume), ranks)
    np.testing.assert_array_equal(found, np.sort(image, axis=None)[ranks])
    assert extent(volume) == (image.min(), image.max())
