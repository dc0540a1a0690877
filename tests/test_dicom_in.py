"""Reading DICOM: geometry fails closed, units are right, nothing leaks."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from test_dicom_enhanced import enhanced

from inverse.errors import (
    InputError,
    NoInputError,
    ReconError,
    ResourceError,
    UnsupportedError,
)
from inverse.io import dicom_headers
from inverse.io.dicom import Derivation, inspect, read_series, write_series
from inverse.io.dicom_files import guarded
from inverse.io.dicom_read import codestream_size
from phantoms.series import write_phantom_series

SPACING = (2.5, 0.8, 0.7)


def body(shape=(5, 20, 16), seed=0) -> np.ndarray:
    """Random whole HU values, so that a CT series holds them without rounding."""
    rng = np.random.default_rng(seed)
    return rng.integers(-1000, 2000, shape).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_phantom_series(tmp_path / "in", body(), SPACING, seed=1)
    return tmp_path / "in"


def edit(path: Path, change) -> None:
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path)


def edit_all(folder: Path, change) -> None:
    for path in sorted(folder.iterdir()):
        edit(path, change)


def setter(**values):
    def change(ds):
        for name, value in values.items():
            setattr(ds, name, value)

    return change


def codes(notes) -> set[str]:
    return {note.code for note in notes}


# --- values and geometry -----------------------------------------------------------------------


def test_phantom_comes_back_exactly(folder):
    s = read_series(folder)
    np.testing.assert_array_equal(s.array, body())
    assert s.array.dtype == np.float32
    assert (s.modality, s.unit, s.spacing) == ("CT", "HU", SPACING)
    assert s.orientation == (1, 0, 0, 0, 1, 0)
    assert len(s.templates) == 5
    assert s.synthetic
    assert not s.mask.any()
    assert s.warnings == []
    # centred: the mean of all voxel centres is the origin
    rows, columns = 20, 16
    middle = s.positions.mean(axis=0) + np.array(
        [(columns - 1) / 2 * 0.7, (rows - 1) / 2 * 0.8, 0]
    )
    np.testing.assert_allclose(middle, 0, atol=1e-9)
    np.testing.assert_allclose(np.diff(s.positions[:, 2]), 2.5)


def test_ct_small_has_the_values_that_pydicom_documents(shared_data):
    # CT_small.dcm of pydicom's test files: 128 x 128, slope 1, intercept -1024.
    path = shared_data / "odd_dicom" / "pydicom-testfiles" / "CT_small.dcm"
    s = read_series(path)
    raw = path.read_bytes()
    stored = np.frombuffer(raw[raw.rindex(struct.pack("<HH", 0x7FE0, 0x10)) + 12 :][:32768], "<i2")
    np.testing.assert_array_equal(s.array.ravel(), stored.astype(np.float32) - 1024)
    assert s.spacing == (5.0, 0.661468, 0.661468)


def test_order_is_by_position_not_by_name_or_instance_number(folder, tmp_path):
    other = tmp_path / "shuffled"
    (other / "deep").mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        target = other / ("deep" if i % 2 else ".") / f"{(i * 3) % 5}.img"
        shutil.copy(path, target)
        edit(target, setter(InstanceNumber=(i * 2) % 5, SliceLocation=-i))
    np.testing.assert_array_equal(read_series(other).array, body())


def test_pixel_spacing_is_row_then_column(folder):
    stack = inspect(folder).stacks[0]
    assert stack.spacing == (2.5, 0.8, 0.7)  # 0.8 between rows (y), 0.7 between columns (x)


def test_oblique_and_reversed_stacks(folder):
    r, c = np.array([0.8, 0.6, 0.0]), np.array([0.0, 0.0, -1.0])
    n = np.cross(r, c)

    def turn(ds):
        k = float(ds.ImagePositionPatient[2])
        ds.ImageOrientationPatient = [*r, *c]
        ds.ImagePositionPatient = [round(float(v), 9) for v in -k * n]

    edit_all(folder, turn)
    s = read_series(folder)
    np.testing.assert_array_equal(s.array, body()[::-1])
    np.testing.assert_allclose(np.diff(s.positions @ n), 2.5, atol=1e-6)


def test_single_slice_takes_its_spacing_from_the_thickness(folder):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    s = read_series(next(folder.iterdir()))
    assert s.array.shape == (1, 20, 16)
    assert s.spacing == SPACING
    edit_all(folder, setter(SliceThickness=None, SpacingBetweenSlices=None))
    assert codes(read_series(folder).warnings) == {"NO_THICKNESS"}


def test_slope_is_applied_by_slice(folder):
    for k, path in enumerate(sorted(folder.iterdir())):
        edit(path, setter(RescaleSlope=1 + k / 4, RescaleIntercept=-1000 + k))
    s = read_series(folder)
    stored = body() + 1024
    expected = np.stack([stored[k] * (1 + k / 4) - 1000 + k for k in range(5)])
    np.testing.assert_allclose(s.array, expected, rtol=1e-6)
    np.testing.assert_array_equal(s.rescale[:, 0], 1 + np.arange(5) / 4)


def test_padding_is_masked_on_stored_values(folder):
    def pad(ds):
        pixels = ds.pixel_array.copy()
        pixels[:3] = 63536  # -2000 as a bit pattern
        pixels[-1] = 7
        ds.PixelData = pixels.tobytes()
        ds.PixelRepresentation = 1
        ds.add_new("PixelPaddingValue", "SS", -2000)
        ds.RescaleIntercept = 1500  # padding at -500 HU: only the tag tells
        ds.BitsStored, ds.HighBit = 16, 15

    edit_all(folder, pad)
    s = read_series(folder)
    assert s.mask[:, :3].all()
    assert not s.mask[:, 3:].any()
    assert (s.array[:, :3] == -1000).all()
    np.testing.assert_array_equal(s.array[:, 3:-1], body()[:, 3:-1] + 2524)


def test_padding_range(folder):
    def pad(ds):
        pixels = ds.pixel_array.copy()
        pixels[0], pixels[1], pixels[2:] = 5, 9, 500
        ds.PixelData = pixels.tobytes()
        ds.add_new("PixelPaddingValue", "US", 9)
        ds.add_new("PixelPaddingRangeLimit", "US", 5)

    edit_all(folder, pad)
    mask = read_series(folder).mask
    assert mask[:, :2].all()
    assert not mask[:, 2:].any()


def test_untagged_padding_is_air_and_is_reported(folder):
    edit_all(folder, setter(RescaleIntercept=-3024))
    s = read_series(folder)
    assert "UNTAGGED_PADDING" in codes(s.warnings)
    low = body() - 2000 < -1024
    np.testing.assert_array_equal(s.mask, low)
    assert (s.array[low] == -1000).all()


def test_mr_keeps_the_scanners_signal(tmp_path):
    signal = np.abs(body())
    write_phantom_series(tmp_path / "mr", signal, SPACING, seed=1, modality="MR")
    s = read_series(tmp_path / "mr")
    assert (s.modality, s.unit) == ("MR", "signal")
    np.testing.assert_allclose(
        s.array * signal.max() / 4095, signal, atol=0.51 * signal.max() / 4095
    )
    edit_all(tmp_path / "mr", setter(RescaleSlope=2, RescaleIntercept=1))
    scaled = read_series(tmp_path / "mr")
    np.testing.assert_array_equal(scaled.array, 2 * s.array + 1)
    assert "MR_RESCALED" in codes(scaled.warnings)


# --- geometry that fails closed ----------------------------------------------------------------


def test_missing_slice_is_an_error_with_its_position(folder):
    sorted(folder.iterdir())[2].unlink()
    with pytest.raises(InputError, match=r"1 missing slices at 0\.00 mm.*MISSING_SLICES"):
        read_series(folder)
    assert codes(inspect(folder).stacks[0].problems) == {"MISSING_SLICES"}


def test_uneven_spacing_is_an_error(folder):
    def shift(ds):
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x, y, z + 0.9]

    edit(sorted(folder.iterdir())[2], shift)
    with pytest.raises(InputError, match="UNEVEN_SPACING"):
        read_series(folder)


def test_jitter_of_four_micrometres_is_fine(folder):
    for k, path in enumerate(sorted(folder.iterdir())):
        edit(path, lambda ds, k=k: setattr(
            ds, "ImagePositionPatient",
            [*ds.ImagePositionPatient[:2], float(ds.ImagePositionPatient[2]) + 0.004 * (-1) ** k],
        ))  # fmt: skip
    assert read_series(folder).spacing[0] == pytest.approx(2.5, abs=0.01)


def test_identical_copy_is_dropped_and_a_different_one_is_an_error(folder):
    first = sorted(folder.iterdir())[0]
    shutil.copy(first, folder / "copy.dcm")
    s = read_series(folder)
    np.testing.assert_array_equal(s.array, body())
    assert "DUPLICATES_DROPPED" in codes(s.warnings)

    def change(ds):
        pixels = ds.pixel_array.copy()
        pixels[0, 0] += 1
        ds.PixelData = pixels.tobytes()

    edit(folder / "copy.dcm", change)
    with pytest.raises(InputError, match="two different slices"):
        read_series(folder)


@pytest.mark.parametrize(
    ("degrees", "flagged"), [(0.0, False), (0.05, False), (0.5, True), (15.0, True)]
)
def test_tilt_is_measured_as_an_angle(folder, degrees, flagged):
    shear = np.tan(np.radians(degrees))

    def tilt(ds):
        x, y, z = map(float, ds.ImagePositionPatient)
        ds.ImagePositionPatient = [x, y + shear * z, z]

    edit_all(folder, tilt)
    s = read_series(folder)
    np.testing.assert_array_equal(s.array, body())  # slices stay as they are
    assert s.tilt_deg == pytest.approx(degrees if flagged else 0.0, abs=1e-4)
    assert ("TILT" in codes(s.warnings)) == flagged


def test_two_series_need_a_choice(folder, tmp_path):
    write_phantom_series(tmp_path / "b", body(seed=7), SPACING, seed=2)
    edit_all(tmp_path / "b", setter(SeriesNumber=2))
    shutil.move(tmp_path / "b", folder / "b")
    with pytest.raises(InputError, match=r"2 stacks found.*--series or --stack(.|\n)*20x16"):
        read_series(folder)
    found = inspect(folder)
    assert [s.series_number for s in found.stacks] == [1, 2]
    for choice in (
        {"stack": 2},
        {"stack": "2"},
        {"series": "2"},
        {"series": found.stacks[1].series},
    ):
        np.testing.assert_array_equal(read_series(folder, **choice).array, body(seed=7))
    with pytest.raises(InputError, match="no stack matches --stack 3"):
        read_series(folder, stack=3)


def test_mixed_orientation_splits(folder):
    edit(sorted(folder.iterdir())[0], setter(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]))
    assert len(inspect(folder).stacks) == 2


def test_two_echoes_split_but_slicewise_acquisition_numbers_do_not(folder, tmp_path):
    for k, path in enumerate(sorted(folder.iterdir())):
        edit(path, setter(AcquisitionNumber=k // 3 + 1, TriggerTime=100 * k))
    assert read_series(folder).array.shape == (5, 20, 16)
    for path in sorted(folder.iterdir()):
        copy = folder / f"echo2-{path.name}"
        shutil.copy(path, copy)
        edit(copy, setter(EchoTime=80.0))
        edit(path, setter(EchoTime=20.0))
    assert [s.slices for s in inspect(folder).stacks] == [5, 5]


def test_localizer_is_dropped_with_a_warning(folder):
    extra = folder / "scout.dcm"
    shutil.copy(sorted(folder.iterdir())[0], extra)
    edit(extra, setter(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SOPInstanceUID="1.2.3"))
    s = read_series(folder)
    np.testing.assert_array_equal(s.array, body())
    assert [n.text for n in s.warnings] == ["1 localizer images were left out"]


def test_dicomdir_is_skipped_and_its_neighbours_are_found_by_content(folder):
    """Files of a medium have no extension; the directory is counted, not believed."""
    for k, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"IM{k}")
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.1.3.10", "1.2.3"
    ds.FileSetID = "DISK"
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.save_as(folder / "DICOMDIR", enforce_file_format=True)
    assert inspect(folder).skipped == {"DICOMDIR": 1}
    np.testing.assert_array_equal(read_series(folder).array, body())


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        (setter(PhotometricInterpretation="MONOCHROME1"), UnsupportedError, "MONOCHROME1"),
        (setter(PhotometricInterpretation="RGB", SamplesPerPixel=3), UnsupportedError, "COLOUR"),
        (setter(NumberOfFrames=4), UnsupportedError, "MULTIFRAME"),
        (setter(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), UnsupportedError, "MOSAIC"),
        (setter(RescaleType="EDW"), UnsupportedError, "NOT_HU"),
        (setter(RescaleSlope=0), InputError, "NO_RESCALE"),
        (lambda ds: ds.__delattr__("RescaleSlope"), InputError, "NO_RESCALE"),
        (lambda ds: ds.__delattr__("ImagePositionPatient"), InputError, "NO_GEOMETRY"),
        (setter(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), InputError, "BAD_ORIENTATION"),
        (setter(PixelSpacing=[0, 1]), InputError, "BAD_SPACING"),
        (setter(BitsAllocated=12), InputError, "BAD_BITS"),
    ],
)  # fmt: skip
def test_refusals(folder, change, error, code):
    edit_all(folder, change)
    with pytest.raises(error, match=code) as caught:
        read_series(folder)
    assert type(caught.value) is error


def test_missing_decoder_names_what_to_install(folder):
    def compress(ds):
        ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
        ds.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])

    edit_all(folder, compress)
    error = InputError if not inspect(folder).stacks[0].problems else UnsupportedError
    with pytest.raises(error) as caught:
        read_series(folder)
    if error is UnsupportedError:
        assert "pip install pylibjpeg pylibjpeg-libjpeg" in str(caught.value)


def test_truncated_pixels_are_an_error(folder):
    path = sorted(folder.iterdir())[3]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="640 bytes expected, got 540"):
        read_series(folder)


def test_header_that_claims_more_than_the_limit(folder):
    with pytest.raises(ResourceError, match="5 x 20 x 16"):
        read_series(folder, max_bytes=1000)
    edit_all(folder, setter(Rows=65535, Columns=65535))
    with pytest.raises(ResourceError, match="--limits"):
        read_series(folder)


def test_nothing_to_read(tmp_path):
    with pytest.raises(NoInputError, match="does not exist"):
        inspect(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoInputError, match="holds no files"):
        read_series(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    assert inspect(tmp_path / "empty").skipped == {"not DICOM": 1}
    with pytest.raises(NoInputError, match="1 x not DICOM"):
        read_series(tmp_path / "empty")


def test_other_objects_are_counted_and_left_out(folder):
    (folder / "readme.txt").write_text("x")
    report = folder / "report.dcm"
    shutil.copy(sorted(folder.iterdir())[0], report)
    edit(report, setter(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33"))
    skipped = inspect(folder).skipped
    assert skipped == {"not DICOM": 1, "not a CT or MR image: Comprehensive SR Storage": 1}
    np.testing.assert_array_equal(read_series(folder).array, body())


def test_damaged_header_is_an_error(folder):
    path = sorted(folder.iterdir())[4]
    path.write_bytes(path.read_bytes()[:135] + b"\xff" * 40)
    assert codes(inspect(folder).warnings) == {"UNREADABLE_FILES"}
    with pytest.raises(InputError, match=r"file 5 of 5 by path \(0005.dcm\)"):
        read_series(folder)


@pytest.mark.parametrize("depth", [400, 10_000])
def test_deep_nesting_is_an_error_or_harmless(folder, depth):
    path = sorted(folder.iterdir())[0]
    ds = pydicom.dcmread(path)
    ds.remove_private_tags()
    raw = path.read_bytes()
    item = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    at = raw.index(struct.pack("<HH", 0x0010, 0x0010) + b"PN")
    path.write_bytes(raw[:at] + item * depth + raw[at:])
    with pytest.raises(ReconError):
        read_series(path)


# --- archives and links ------------------------------------------------------------------------


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"../../etc/{path.name}")
    return target


def test_zip_equals_folder(folder, tmp_path):
    a, b = read_series(folder), read_series(zipped(folder, tmp_path / "in.zip"))
    np.testing.assert_array_equal(a.array, b.array)
    np.testing.assert_array_equal(a.positions, b.positions)
    assert a.templates == b.templates
    assert inspect(folder).to_dict() == inspect(tmp_path / "in.zip").to_dict()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "in.zip"]  # nothing unpacked


def test_zip_limits(folder, tmp_path):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.dcm", bytes(80 << 20))
    with pytest.raises(InputError, match="ratio"):
        inspect(bomb)
    with pytest.raises(InputError, match="limit"):
        inspect(zipped(folder, tmp_path / "in.zip"), max_bytes=1000)
    damaged = tmp_path / "damaged.zip"
    raw = bytearray((tmp_path / "in.zip").read_bytes())
    raw[60:200] = bytes(140)
    damaged.write_bytes(raw)
    with pytest.raises(ReconError):
        read_series(damaged)


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in sorted(folder.iterdir())[3:]:
        shutil.move(path, outside)
        path.symlink_to(outside / path.name)
    (folder / "more").symlink_to(outside)
    os.mkfifo(folder / "pipe")
    found = inspect(folder)
    assert found.stacks[0].slices == 3
    assert found.skipped == {"link, not followed": 3, "not a regular file": 1}


# --- patient data ------------------------------------------------------------------------------

CANARY = ("CANARY", "19470101", "9988776655")


def test_patient_data_stay_out_of_every_message(folder, caplog):
    caplog.set_level(logging.DEBUG)
    for k, path in enumerate(sorted(folder.iterdir())):
        edit(path, setter(PatientName="CANARY^ANNA", PatientID="9988776655", StudyID="CANARY",
                          PatientBirthDate="19470101", SeriesDescription="CANARY",
                          AccessionNumber="CANARY", ReferringPhysicianName="CANARY"))  # fmt: skip
        # values that make pydicom warn with the value itself
        raw = path.read_bytes().replace(b"19470101", b"CANARYXX").replace(b"12      ", b"CANARY  ")
        path.write_bytes(raw)
        path.rename(folder / f"CANARY_ANNA_19470101_{k}.dcm")
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts += [
            json.dumps(inspect(folder).to_dict()),
            inspect(folder).table(),
            repr(inspect(folder)),
        ]
        texts.append(str(read_series(folder).warnings))
        paths = sorted(folder.iterdir())
        whole = paths[2].read_bytes()
        for damage in (
            whole[:-300],
            whole[:400],
            whole.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00XX"),
        ):
            paths[2].write_bytes(damage)
            try:
                texts.append(str(read_series(folder).warnings))
            except ReconError as error:
                texts.append(str(error))
                texts.append("".join(traceback.format_exception(error)))
    assert caught == []
    texts.append(caplog.text)
    for text in texts:
        for canary in CANARY:
            assert canary not in text


def test_mutated_files_give_images_or_our_errors(folder, shared_data, tmp_path):
    """Bit flips, cuts and lying lengths: never a foreign exception or warning."""
    extra = shared_data / "odd_dicom" / "pydicom-testfiles"
    seeds = [sorted(folder.iterdir())[0].read_bytes(), (extra / "MR_small_RLE.dcm").read_bytes()]
    rng = np.random.default_rng(3)
    path, outcomes = tmp_path / "mutant.dcm", set()
    for i in range(400):
        raw = bytearray(seeds[i % 2])
        at = int(rng.integers(132, 1500))
        if i % 4 == 0:
            raw[at] = int(rng.integers(256))
        elif i % 4 == 1:
            raw[at : at + 4] = b"\xfe\xff\xff\x7f"
        elif i % 4 == 2:
            raw[at:at] = rng.bytes(7)
        else:
            raw = raw[: int(rng.integers(133, len(raw)))]
        path.write_bytes(raw)
        try:
            read_series(path)
            outcomes.add("read")
        except ReconError as error:
            outcomes.add(type(error).__name__)
    assert outcomes >= {"read", "InputError", "UnsupportedError"}


def test_foreign_exceptions_lose_their_text():
    class PanicException(BaseException):
        """As a decoder written in Rust raises it."""

    def fail(error):
        raise error

    for error in (ValueError("CANARY"), PanicException("CANARY"), RecursionError("CANARY")):
        with pytest.raises(InputError, match="the file: cannot look") as caught:
            guarded(partial(fail, error), "the file", "look")
        assert "CANARY" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(KeyboardInterrupt):
        guarded(partial(fail, KeyboardInterrupt()), "the file", "look")
    with pytest.raises(ResourceError, match="memory"):
        guarded(partial(fail, MemoryError()), "the file", "look")


def test_malformed_values_are_neither_fatal_nor_shown(folder, caplog):
    """An unknown character set makes pydicom warn and log its value."""
    caplog.set_level(logging.DEBUG)
    edit_all(folder, setter(SpecificCharacterSet="ISO_IR 100", PatientWeight=70))
    for path in folder.iterdir():
        raw = path.read_bytes().replace(b"ISO_IR 100", b"CANARY 100")
        path.write_bytes(raw.replace(b"DS\x04\x0070.0", b"DS\x04\x00kg.0"))
    s = read_series(folder)
    np.testing.assert_array_equal(s.array, body())
    template = pydicom.dcmread(io.BytesIO(s.templates[0]))
    assert "SpecificCharacterSet" not in template
    assert template.PatientName == "PHANTOM^SEED 1"
    assert "CANARY" not in caplog.text


def test_damaged_transfer_syntax_is_unsupported(folder):
    for path in folder.iterdir():
        path.write_bytes(
            path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.1000q.1.2.1\0")
        )
    with pytest.raises(UnsupportedError, match="transfer syntax that is not read"):
        read_series(folder)


def test_labels_show_only_numbered_names(folder):
    path = sorted(folder.iterdir())[3]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"file 4 of 5 by path \(0004.dcm\)"):
        read_series(folder)
    path.rename(folder / "0004_Smith.dcm")
    with pytest.raises(InputError, match=r"file 4 of 5 by path: ") as caught:
        read_series(folder)
    assert "Smith" not in str(caught.value)


def test_template_holds_no_pixels_and_no_private_data(folder):
    def private(ds):
        ds.private_block(0x0011, "SECRET", create=True).add_new(1, "LO", "SECRET")
        ds.InstitutionName = "SECRET HOSPITAL"

    edit_all(folder, private)
    template = read_series(folder).templates[0]
    assert b"SECRET" not in template
    ds = pydicom.dcmread(io.BytesIO(template))
    assert "PixelData" not in ds
    assert ds.PatientID == "PHANTOM-1"
    assert Tag("RescaleSlope") not in ds


# --- real files --------------------------------------------------------------------------------


def test_odd_files_give_images_or_our_errors(shared_data):
    paths = [p for p in sorted((shared_data / "odd_dicom").rglob("*")) if p.is_file()]
    assert len(paths) > 80
    read = 0
    for path in paths:
        try:
            json.dumps(inspect(path).to_dict())
            read += np.isfinite(read_series(path).array).all()
        except ReconError:
            continue
    assert read >= 15


def test_same_image_in_six_encodings(shared_data):
    folder = shared_data / "odd_dicom" / "pydicom-testfiles"
    reference = read_series(folder / "MR_small.dcm").array
    for name in ("RLE", "bigendian", "expb", "implicit", "padded", "jp2klossless"):
        try:
            other = read_series(folder / f"MR_small_{name}.dcm").array
        except UnsupportedError:
            assert name == "jp2klossless"  # needs a decoder
            continue
        np.testing.assert_array_equal(reference, other)


@pytest.mark.parametrize(
    ("name", "shape", "spacing"),
    [
        ("ct_dicom/LungFCP-01-0001_40slices.zip", (40, 512, 512), (1.0, 0.759765625, 0.759765625)),
        ("mr_dicom/TCGA-BC-4073_haste_coronal.zip", (30, 256, 256), (8.75, 1.5625, 1.5625)),
        ("mr_dicom/QIN-PROSTATE-01-0001_ADC.zip", (20, 256, 256), (3.0, 0.7031, 0.7031)),
    ],
)
def test_real_series(shared_data, name, shape, spacing):
    s = read_series(shared_data / name)
    assert s.array.shape == shape
    assert s.spacing == pytest.approx(spacing, abs=1e-3)


# --- many files, hostile files -----------------------------------------------------------------


@pytest.mark.slow
def test_two_thousand_slices_are_inspected_without_their_pixels(tmp_path, monkeypatch, capsys):
    for k in range(4):
        volume = np.zeros((500, 8, 8), np.float32)
        write_phantom_series(tmp_path / f"{k}", volume, SPACING, seed=k)
    real = dicom_headers.open_dicom

    def no_pixels(source, *, pixels):
        assert not pixels
        return real(source, pixels=pixels)

    monkeypatch.setattr(dicom_headers, "open_dicom", no_pixels)
    start = time.monotonic()
    found = inspect(tmp_path)
    with capsys.disabled():
        print(  # noqa: T201 - the figure is the point
            f"\n2000 slices inspected in {time.monotonic() - start:.1f} s"
        )
    assert [s.slices for s in found.stacks] == [500] * 4


def limited(*paths: Path, memory: int = 2 << 30) -> tuple[list[str], int]:
    """Read files in one process of bounded memory: what came of each, and its growth in MiB."""
    program = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))\n"
        "from inverse.errors import ReconError\n"
        "from inverse.io.series import read_series\n"
        "def peak():\n"
        "    told = open('/proc/self/status').read()\n"  # getrusage counts the parent as well
        "    return int(told.partition('VmHWM:')[2].split()[0]) >> 10\n"
        "before = peak()\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(read_series(path, modality='MR').array.shape)\n"
        "    except ReconError as error: print(type(error).__name__, error)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, paths)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, grown = done.stdout.splitlines()
    return said, int(grown)


def deflated_bomb(clean: Path, bomb: Path) -> Path:
    """A short file whose data set inflates to 128 MiB."""
    raw = clean.read_bytes()
    length = struct.unpack("<I", raw[140:144])[0]  # of the meta group
    meta, rest = raw[144 : 144 + length], raw[144 + length :]
    meta = meta.replace(b"\x14\x001.2.840.10008.1.2.1\0", b"\x16\x001.2.840.10008.1.2.1.99")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    pieces = [packer.compress(rest)]
    pieces += [packer.compress(bytes(1 << 24)) for _ in range(8)] + [packer.flush()]
    bomb.write_bytes(raw[:140] + struct.pack("<I", len(meta)) + meta + b"".join(pieces))
    assert bomb.stat().st_size < 1 << 19
    return bomb


def gigabytes(clean: Path, lie: Path, syntax: str) -> Path:
    """Rows and columns of 65535 over a few bytes, in a transfer syntax."""
    ds = pydicom.dcmread(clean)
    if syntax not in ("1", "2"):
        ds.PixelData = pydicom.encaps.encapsulate([bytes(64)])
        ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2.{syntax}"
    ds.Rows = ds.Columns = 65535
    little = syntax != "2"
    pydicom.dcmwrite(lie, ds, implicit_vr=False, little_endian=little, force_encoding=True)
    return lie


def test_bombs_and_lies_under_a_memory_limit(folder, tmp_path):
    """A deflated bomb, a gzip bomb, and headers of 4 gigapixels in every encoding."""
    nibabel = pytest.importorskip("nibabel", reason="NIfTI needs nibabel (the formats extra)")
    clean = sorted(folder.iterdir())[0]
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.diag([1, 1, 2, 1]))
    gzipped = tmp_path / "bomb.nii.gz"
    with gzip.open(gzipped, "wb") as stream:
        stream.write(image.to_bytes())
        for _ in range(8):
            stream.write(bytes(1 << 24))
    syntaxes = ("5", "4.90", "4.80", "4.70", "1", "2")
    said, grown = limited(
        deflated_bomb(clean, tmp_path / "bomb.dcm"),
        gzipped,
        *(gigabytes(clean, tmp_path / f"lie{s}.dcm", s) for s in syntaxes),
    )
    assert "UnsupportedError" in said[0]
    assert "deflated transfer syntax" in said[0]
    assert said[1] == "(4, 4, 4)"
    for syntax, text in zip(syntaxes, said[2:], strict=True):
        assert "ResourceError" in text or "NO_DECODER" in text, syntax
    assert grown < 100


HOSTILE = (
    "../../../etc/pwn", "/etc/passwd", "..\\..\\x", "a/b/c", ".", "..", "~root", "$(touch x)",
    "1.2.3;rm -rf", "1.2.\n3", "1.2.3\x00", "%2e%2e%2f", "1." * 40, "-1.2.3", "con", "nul.dcm",
    "<script>", "{{7*7}}", "1..2", "0.01.2",
)  # fmt: skip


@pytest.mark.parametrize("uid", HOSTILE, ids=repr)
def test_hostile_uids_name_no_file_and_are_not_passed_on(folder, tmp_path, uid):
    names = ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
    for path in sorted(folder.iterdir()):
        ds = pydicom.dcmread(path)
        for name in names:
            tag = Tag(name)
            del ds[tag]
            raw = uid.encode() + b"\0" * (len(uid) % 2)
            ds._dict[tag] = RawDataElement(tag, "UI", len(raw), raw, 0, False, True)
        ds.save_as(path)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    s = read_series(folder)
    written = write_series(tmp_path / "out", s.array, s.templates, description="x",
                           derivation=Derivation("m"))  # fmt: skip
    after = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    made = [p for p in after if p not in before]
    assert made == [Path("out"), *(Path("out", f"{k:04d}.dcm") for k in range(1, 6))]
    ds = pydicom.dcmread(written.paths[0])
    assert all(ds[name].value.is_valid for name in names)


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_hostile_names_in_archives_write_nothing(folder, tmp_path, name):
    archive = tmp_path / "in.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for k, path in enumerate(sorted(folder.iterdir())):
            target.writestr(zipfile.ZipInfo(f"{k}/{name}"), path.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    np.testing.assert_array_equal(read_series(archive).array, body())
    assert sorted(tmp_path.rglob("*")) == before


MUTANTS = int(os.environ.get("RECON_MUTANTS", "1000"))
SYNTAXES = {
    "explicit": pydicom.uid.ExplicitVRLittleEndian,
    "implicit": pydicom.uid.ImplicitVRLittleEndian,
    "RLE": pydicom.uid.RLELossless,
    "JPEG-LS": pydicom.uid.JPEGLSLossless,
    "JPEG 2000": pydicom.uid.JPEG2000Lossless,
}


def j2k(image: np.ndarray) -> bytes:
    """One image as a lossless JPEG 2000 codestream."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
    return stream.getvalue()


def clean_file(folder: Path, kind: str, path: Path) -> bytes:
    """An image file of a kind, for mutants."""
    ds = pydicom.dcmread(sorted(folder.iterdir())[0])
    if kind == "enhanced":
        ds = enhanced(folder, [0, 1])
    elif kind == "JPEG 2000":
        ds.PixelData = pydicom.encaps.encapsulate([j2k(ds.pixel_array)])
        ds["PixelData"].is_undefined_length = True
    elif kind == "JPEG-LS":
        pytest.importorskip("jpeg_ls", reason="JPEG-LS needs pyjpegls (the formats extra)")
        ds.compress(SYNTAXES[kind])
    elif kind == "RLE":
        ds.compress(SYNTAXES[kind])
    ds.file_meta.TransferSyntaxUID = SYNTAXES.get(kind, ds.file_meta.TransferSyntaxUID)
    ds.save_as(path, enforce_file_format=True)
    return path.read_bytes()


@contextmanager
def processor_time(seconds: float, late: list[int]):
    """Interrupt what computes longer; time that other processes take does not count."""

    def stop(*_):
        late.append(1)
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SYNTAXES, "enhanced"])
def test_mutants_give_images_or_exit_codes(folder, tmp_path, kind, capsys):
    """Bit flips, cuts, inserts, lying lengths: no crash, no hang, no code but those of bad input.

    ``RECON_MUTANTS`` sets the number of files of all kinds together.
    """
    path = tmp_path / "mutant.dcm"
    clean = clean_file(folder, kind, path)
    assert read_series(path).array.shape[1:] == (20, 16)
    rng = np.random.default_rng(len(kind))
    outcomes: Counter[str] = Counter()
    late: list[int] = []
    count = -(-MUTANTS // (len(SYNTAXES) + 1))
    for i in range(count):
        raw = bytearray(clean)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(132, len(raw)))
            if i % 4 == 0:
                raw[at] ^= 1 << int(rng.integers(8))
            elif i % 4 == 1:
                raw[at : at + 4] = rng.bytes(4)
            elif i % 4 == 2:
                raw[at:at] = rng.bytes(int(rng.integers(1, 9)))
            else:
                raw = raw[: max(at, 140)]
        path.write_bytes(raw)
        try:
            with processor_time(5, late):
                s = read_series(path, max_bytes=1 << 26)
            assert np.isfinite(s.array).all()
            outcomes["image"] += 1
        except ReconError as error:
            outcomes[f"exit {error.exit_code}"] += 1
    with capsys.disabled():
        print(f"\n{count} mutants, {kind}: {dict(sorted(outcomes.items()))}")  # noqa: T201
    assert late == []
    assert set(outcomes) <= {"image", "exit 3", "exit 4", "exit 5", "exit 7"}
    assert min(outcomes["image"], outcomes["exit 4"]) > count // 50
    assert {p.name for p in tmp_path.iterdir()} == {"in", "mutant.dcm"}


def sof(marker: int, rows: int, columns: int, components: int) -> bytes:
    """The start of a JPEG image: a comment, fill bytes, then the frame header."""
    frame = struct.pack(">BHHB", 16, rows, columns, components) + bytes(3 * components)
    return (
        b"\xff\xd8\xff\xfe\x00\x04hi\xff\xff"
        + struct.pack(">BH", marker, 2 + len(frame))
        + frame
        + bytes(8)
    )


def test_size_of_a_compressed_image_is_read_before_it_is_decoded():
    image = np.zeros((20, 16), np.uint16)
    assert codestream_size(j2k(image)) == (20, 16, 1)
    stream = io.BytesIO()
    Image.fromarray(np.zeros((20, 16, 3), np.uint8)).save(stream, "JPEG")
    assert codestream_size(stream.getvalue()) == (20, 16, 3)
    for marker in (0xC0, 0xC3, 0xF7):  # baseline, lossless, JPEG-LS
        assert codestream_size(sof(marker, 300, 200, 1)) == (300, 200, 1)
    for other in (b"", b"\xff\xd8", b"\xff\xd8\xff\xc4\xff\xff", bytes(64), j2k(image)[:30]):
        assert codestream_size(other) is None


@pytest.mark.parametrize("syntax", [pydicom.uid.JPEG2000Lossless, pydicom.uid.JPEGLSLossless])
def test_compressed_images_that_are_larger_than_their_header(folder, syntax):
    """A few bytes that claim 4 gigapixels would have a decoder ask for 8 GiB."""
    path = sorted(folder.iterdir())[0]
    ds = pydicom.dcmread(path)
    if syntax == pydicom.uid.JPEG2000Lossless:
        lie = bytearray(j2k(ds.pixel_array))
        at = lie.index(b"\xff\x51") + 6
        lie[at : at + 8] = struct.pack(">2I", 65535, 65535)
    else:
        pytest.importorskip("jpeg_ls", reason="JPEG-LS needs pyjpegls (the formats extra)")
        lie = bytearray(sof(0xF7, 65535, 65535, 1))
    ds.PixelData = pydicom.encaps.encapsulate([bytes(lie)])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path)
    with pytest.raises(InputError, match="the compressed image is 65535 x 65535"):
        read_series(path)
