"""Enhanced multi-frame CT and MR: the same volume as the classic series, frame by frame."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from inverse.errors import InputError, ResourceError, UnsupportedError
from inverse.io.dicom import Derivation, inspect, read_series, write_series
from phantoms.series import write_phantom_series

SPACING = (2.5, 0.8, 0.7)
ENHANCED = {"CT": "1.2.840.10008.5.1.4.1.1.2.1", "MR": "1.2.840.10008.5.1.4.1.1.4.1"}
CREATOR = "Philips MR Imaging DD 001"


def item(**values: Any) -> list[Dataset]:
    ds = Dataset()
    for name, value in values.items():
        setattr(ds, name, value)
    return [ds]


def groups(**values: Any) -> Dataset:
    return item(**values)[0]


def body(shape=(5, 20, 16)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 2000, shape).astype(np.float32)


def enhanced(folder: Path, order: list[int] | None = None) -> Dataset:
    """The classic series of a folder as one enhanced data set, frames in the given order."""
    files = [pydicom.dcmread(p) for p in sorted(folder.iterdir())]
    files = [files[k] for k in order or range(len(files))]
    first = files[0]
    ds = Dataset()
    ds.update({e.tag: e for e in first})
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
                 "SliceThickness", "RescaleSlope", "RescaleIntercept", "RescaleType",
                 "EchoTime", "AcquisitionNumber"):  # fmt: skip
        if name in ds:
            del ds[name]
    modality = str(first.Modality)
    ds.SOPClassUID = ENHANCED[modality]
    ds.SOPInstanceUID = "1.2.3.4"
    ds.NumberOfFrames = len(files)
    ds.PixelData = b"".join(f.PixelData for f in files)
    ds.SharedFunctionalGroupsSequence = [
        groups(
            PixelMeasuresSequence=item(
                PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness
            ),
            PlaneOrientationSequence=item(ImageOrientationPatient=first.ImageOrientationPatient),
            PixelValueTransformationSequence=item(
                RescaleSlope=1, RescaleIntercept=-1024 if modality == "CT" else 0,
                RescaleType="HU" if modality == "CT" else "US",
            ),
        )
    ]  # fmt: skip
    ds.PerFrameFunctionalGroupsSequence = [
        groups(
            PlanePositionSequence=item(ImagePositionPatient=f.ImagePositionPatient),
            FrameContentSequence=item(FrameAcquisitionNumber=1),
        )
        for f in files
    ]
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def save(ds: Dataset, path: Path) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def classic(tmp_path: Path) -> Path:
    write_phantom_series(tmp_path / "classic", body(), SPACING, seed=1)
    return tmp_path / "classic"


@pytest.fixture
def mr(tmp_path: Path) -> Path:
    write_phantom_series(tmp_path / "mr", np.abs(body()), SPACING, seed=1, modality="MR")
    return tmp_path / "mr"


def test_equals_the_classic_series_in_any_order_of_frames(classic, tmp_path):
    expected = read_series(classic)
    for order in (None, [3, 0, 4, 2, 1]):
        path = save(enhanced(classic, order), tmp_path / "e.dcm")
        s = read_series(path)
        np.testing.assert_array_equal(s.array, expected.array)
        np.testing.assert_allclose(s.positions, expected.positions)
        assert (s.spacing, s.orientation, s.unit) == (expected.spacing, (1, 0, 0, 0, 1, 0), "HU")
        assert s.warnings == []
        stack = inspect(path).stacks[0]
        assert (stack.slices, stack.spacing, stack.modality) == (5, SPACING, "CT")


def test_a_frame_overrides_what_is_shared(classic, tmp_path):
    ds = enhanced(classic)
    ds.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence = item(
        RescaleSlope=2, RescaleIntercept=7, RescaleType="HU"
    )
    s = read_series(save(ds, tmp_path / "e.dcm"))
    np.testing.assert_array_equal(s.array[2], 2 * (body()[2] + 1024) + 7)
    np.testing.assert_array_equal(s.array[[0, 1, 3, 4]], body()[[0, 1, 3, 4]])
    np.testing.assert_array_equal(s.rescale[:, 0], [1, 1, 2, 1, 1])


def test_compressed_frames_are_decoded_one_by_one(classic, tmp_path):
    ds = enhanced(classic, [1, 0, 2, 4, 3])
    ds.compress(RLELossless)
    np.testing.assert_array_equal(read_series(save(ds, tmp_path / "e.dcm")).array, body())


def test_gaps_and_duplicates_between_frames(classic, tmp_path):
    with pytest.raises(InputError, match=r"1 missing slices at 0\.00 mm"):
        read_series(save(enhanced(classic, [0, 1, 3, 4]), tmp_path / "gap.dcm"))
    s = read_series(save(enhanced(classic, [0, 1, 2, 2, 3, 4]), tmp_path / "copy.dcm"))
    np.testing.assert_array_equal(s.array, body())
    assert {n.code for n in s.warnings} == {"DUPLICATES_DROPPED"}


def test_echoes_of_one_file_are_stacks_to_choose_from(mr, tmp_path):
    ds = enhanced(mr, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        frame.MREchoSequence = item(EffectiveEchoTime=20.0 if k < 5 else 80.0)
    path = save(ds, tmp_path / "e.dcm")
    assert [s.slices for s in inspect(path).stacks] == [5, 5]
    with pytest.raises(InputError, match="2 stacks found"):
        read_series(path)
    chosen = read_series(path, stack=2)
    np.testing.assert_array_equal(chosen.array, read_series(mr).array)
    template = pydicom.dcmread(io.BytesIO(chosen.templates[0]))
    assert (template.EchoTime, template.ReferencedFrameNumber) == (80.0, 6)


def test_philips_values_are_the_scans_own(mr, tmp_path):
    """FP = SV / SS + RI / (RS SS), with the scale slope SS of the private group."""
    stored = read_series(mr).array
    slope, intercept, scale = 2.5, 3.0, 0.004
    ds = enhanced(mr)
    for frame in ds.PerFrameFunctionalGroupsSequence:
        frame.PixelValueTransformationSequence = item(
            RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="US"
        )
        private = Dataset()
        private.add_new(0x20050010, "LO", CREATOR)
        private.add_new(0x2005100E, "FL", scale)
        frame.add_new(0x20050014, "LO", "Philips MR Imaging DD 005")
        frame.add_new(0x2005140F, "SQ", [private])
    s = read_series(save(ds, tmp_path / "e.dcm"))
    expected = (stored * slope + intercept) / (slope * scale)
    np.testing.assert_allclose(s.array, expected, rtol=1e-5)
    assert {n.code for n in s.warnings} == {"PHILIPS_SCALE"}
    for path in sorted(mr.iterdir()):  # classic: the same elements at the top level
        one = pydicom.dcmread(path)
        one.RescaleSlope, one.RescaleIntercept = slope, intercept
        one.add_new(0x20050010, "LO", CREATOR)
        one.add_new(0x2005100E, "UN", struct.pack("<f", scale))
        one.save_as(path)
    np.testing.assert_allclose(read_series(mr).array, expected, rtol=1e-5)


def test_maps_that_are_not_hu_are_refused(classic, tmp_path):
    ds = enhanced(classic)
    ds.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence = item(
        MeasurementUnitsCodeSequence=item(CodeValue="ml/100ml/s")
    )
    with pytest.raises(UnsupportedError, match="NOT_HU"):
        read_series(save(ds, tmp_path / "e.dcm"))


def test_headers_that_lie(classic, tmp_path):
    ds = enhanced(classic)
    ds.NumberOfFrames = 2_000_000_000
    path = save(ds, tmp_path / "e.dcm")
    assert {n.code for n in inspect(path).warnings} == {"UNREADABLE_FILES"}
    with pytest.raises(InputError, match="claims 2000000000 frames and describes 5"):
        read_series(path)
    ds = enhanced(classic)
    ds.PixelData = ds.PixelData[:-2]
    with pytest.raises(InputError, match="3200 bytes expected, got 3198"):
        read_series(save(ds, path))
    ds = enhanced(classic)
    ds.Rows = ds.Columns = 65535
    with pytest.raises(ResourceError, match="5 x 65535 x 65535"):
        read_series(save(ds, path))
    ds = enhanced(classic)
    del ds.PerFrameFunctionalGroupsSequence
    with pytest.raises(UnsupportedError, match="MULTIFRAME"):
        read_series(save(ds, path))


def test_derived_series_points_to_the_frames(classic, tmp_path):
    s = read_series(save(enhanced(classic, [4, 3, 2, 1, 0]), tmp_path / "e.dcm"))
    out = write_series(
        tmp_path / "out", s.array, s.templates, description="x", derivation=Derivation("fbp")
    )
    written = [pydicom.dcmread(p) for p in out.paths]
    references = [ds.SourceImageSequence[0] for ds in written]
    assert [r.ReferencedFrameNumber for r in references] == [5, 4, 3, 2, 1]
    assert {r.ReferencedSOPInstanceUID for r in references} == {"1.2.3.4"}
    assert {str(ds.SOPClassUID) for ds in written} == {"1.2.840.10008.5.1.4.1.1.2"}
    assert len({ds.SOPInstanceUID for ds in written}) == 5
    assert all("ReferencedFrameNumber" not in ds for ds in written)
    np.testing.assert_array_equal(read_series(tmp_path / "out").array, body())


def test_legacy_converted_file_equals_its_classic_source(shared_data):
    for name in ("23x38x3", "24x38x3"):
        folder = shared_data / "odd_dicom" / "dcmqi" / name
        a, b = read_series(folder / "image"), read_series(folder / "multiframe")
        np.testing.assert_array_equal(a.array, b.array)
        np.testing.assert_allclose(a.positions, b.positions)
        assert a.spacing == pytest.approx(b.spacing)
