"""Writing DICOM: values, geometry, labels, and complete or nothing; outside programs agree."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pydicom
import pytest

from inverse.errors import GeometryError, InputError, NumericalError, OutputError
from inverse.io import dicom_write
from inverse.io.dicom import Derivation, deterministic_uid, read_series, write_series
from phantoms.series import write_phantom_series

SPACING = (2.5, 0.8, 0.7)
DERIVATION = Derivation("dds", text="parallel beam, 23 views", seed=4, settings={"steps": 50},
                        prior="ct", prior_sha256="0" * 64)  # fmt: skip
NOW = datetime(2024, 5, 6, 7, 8, 9, tzinfo=timezone.utc)  # noqa: UP017


def body(shape=(4, 24, 16), seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(-1000, 2000, shape).astype(np.float32)


@pytest.fixture
def source(tmp_path: Path):
    write_phantom_series(tmp_path / "in", body(), SPACING, seed=1)
    return read_series(tmp_path / "in")


@pytest.fixture
def mr_source(tmp_path: Path):
    write_phantom_series(
        tmp_path / "mr", np.abs(body()), SPACING, seed=1, modality="MR", body_part="BRAIN"
    )
    return read_series(tmp_path / "mr")


def write(out, volume, templates, **options):
    options = {"description": "DDS 23 views", "derivation": DERIVATION, "created": NOW} | options
    return write_series(out, volume, templates, **options)


def datasets(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


# --- values ------------------------------------------------------------------------------------


def test_round_trip_within_half_a_unit_and_exact_geometry(tmp_path, source):
    volume = source.array + np.random.default_rng(1).uniform(-0.5, 0.5, source.array.shape)
    written = write(tmp_path / "out", volume.astype(np.float32), source.templates)
    back = read_series(tmp_path / "out")
    assert np.abs(back.array - volume).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(back.positions, source.positions)
    assert (back.spacing, back.orientation) == (source.spacing, source.orientation)
    assert written.saturated == 0
    assert [p.name for p in written.paths] == ["0001.dcm", "0002.dcm", "0003.dcm", "0004.dcm"]


def test_saturated_voxels_are_clipped_and_counted(tmp_path, source):
    volume = source.array.copy()
    volume[0, 0, :3] = [1e6, -1e6, 32767]
    assert write(tmp_path / "out", volume, source.templates).saturated == 2
    back = read_series(tmp_path / "out")
    assert back.array[0, 0, 0] == 32767


@pytest.mark.parametrize(("top", "slope"), [(90.0, 0.01), (900.0, 0.1), (9000.0, 1.0)])
def test_std_map_has_the_finest_step_that_holds_it(tmp_path, source, top, slope):
    std = np.random.default_rng(2).uniform(0, top, source.array.shape).astype(np.float32)
    std[0, 0, 0] = top
    written = write(tmp_path / "std", std, source.templates, kind="std")
    assert (written.slope, written.saturated) == (slope, 0)
    assert np.abs(read_series(tmp_path / "std").array - std).max() <= slope / 2 * 1.01
    assert datasets(tmp_path / "std")[0].SeriesDescription.endswith(" STD (HU)")


def test_mr_values_come_back_through_the_real_world_mapping(tmp_path, mr_source):
    volume = mr_source.array / 1e4
    write(tmp_path / "out", volume, mr_source.templates, unit="signal")
    back = read_series(tmp_path / "out")
    assert back.array.max() == 4095
    for ds, image in zip(datasets(tmp_path / "out"), volume, strict=True):
        assert "RescaleSlope" not in ds
        assert (ds.BitsStored, ds.PixelRepresentation) == (12, 0)
        item = ds.RealWorldValueMappingSequence[0]
        real = ds.pixel_array * item.RealWorldValueSlope + item.RealWorldValueIntercept
        np.testing.assert_allclose(real, image, atol=volume.max() / 4095 * 0.51)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_is_never_written(tmp_path, source, bad):
    volume = source.array.copy()
    volume[2, 3, 4] = bad
    with pytest.raises(NumericalError, match="1 voxels"):
        write(tmp_path / "out", volume, source.templates)
    assert not (tmp_path / "out").exists()


# --- geometry ----------------------------------------------------------------------------------


def test_golden_geometry_on_half_the_matrix(tmp_path, source):
    coarse = source.array.reshape(4, 12, 2, 8, 2).mean((2, 4))
    write(tmp_path / "out", coarse, source.templates)
    ds = datasets(tmp_path / "out")[0]
    assert [float(v) for v in ds.PixelSpacing] == [1.6, 1.4]
    # first pixel of the source at (-5.25, -9.2, -3.75): half a pixel further, not at the corner
    assert [float(v) for v in ds.ImagePositionPatient] == pytest.approx([-4.9, -8.8, -3.75])
    assert (ds.Rows, ds.Columns) == (12, 8)
    assert ds.SourceImageSequence[0].SpatialLocationsPreserved == "NO"


@pytest.mark.parametrize("matrix", [(12, 8), (24, 8), (8, 16), (48, 32), (16, 12)])
def test_centre_of_the_field_of_view_stays(tmp_path, source, matrix):
    """On any matrix the mean of all voxel centres, and the field of view, are the source's."""
    r, c = np.array([0.8, 0.6, 0.0]), np.array([0.0, 0.0, -1.0])
    for path in (tmp_path / "in").iterdir():
        ds = pydicom.dcmread(path)
        z = float(ds.ImagePositionPatient[2])
        ds.ImageOrientationPatient = [*r, *c]
        ds.ImagePositionPatient = [round(float(v), 6) for v in z * np.cross(r, c) + [10, 20, 30]]
        ds.save_as(path)
    source = read_series(tmp_path / "in")
    volume = np.zeros((4, *matrix), np.float32)
    write(tmp_path / "out", volume, source.templates)
    back = read_series(tmp_path / "out")

    def centre(s):
        _, rows, columns = s.array.shape
        _, dy, dx = s.spacing
        return s.positions + (columns - 1) / 2 * dx * r + (rows - 1) / 2 * dy * c

    np.testing.assert_allclose(centre(back), centre(source), atol=1e-6)
    for axis in (1, 2):
        assert back.array.shape[axis] * back.spacing[axis] == pytest.approx(
            source.array.shape[axis] * source.spacing[axis]
        )


def test_landmark_stays_in_place_on_the_coarse_grid(tmp_path, source):
    """The centre of mass of a block, in patient space, is the same after 2 x 2 averaging."""
    fine = np.full(source.array.shape, -1000, np.float32)
    fine[1, 8:12, 4:6] = 0
    write(tmp_path / "fine", fine, source.templates)
    write(tmp_path / "coarse", fine.reshape(4, 12, 2, 8, 2).mean((2, 4)), source.templates)

    def centroid(folder):
        s = read_series(folder)
        weight = s.array + 1000.0
        k, i, j = np.indices(weight.shape)
        x = s.positions[k, 0] + j * s.spacing[2]
        y = s.positions[k, 1] + i * s.spacing[1]
        return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()

    np.testing.assert_allclose(
        centroid(tmp_path / "fine"), centroid(tmp_path / "coarse"), atol=1e-9
    )


def test_tilted_source_keeps_every_slice_position(tmp_path, source):
    for path in (tmp_path / "in").iterdir():
        ds = pydicom.dcmread(path)
        x, y, z = map(float, ds.ImagePositionPatient)
        ds.ImagePositionPatient = [x, round(y + 0.2 * z, 6), z]
        ds.save_as(path)
    tilted = read_series(tmp_path / "in")
    write(tmp_path / "out", tilted.array, tilted.templates)
    np.testing.assert_array_equal(read_series(tmp_path / "out").positions, tilted.positions)


# --- attributes --------------------------------------------------------------------------------


INHERITED = """PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID StudyID StudyDate
StudyTime AccessionNumber ReferringPhysicianName FrameOfReferenceUID PositionReferenceIndicator
PatientPosition BodyPartExamined ImageOrientationPatient ImagePositionPatient PixelSpacing
SliceThickness KVP AcquisitionDate AcquisitionTime AcquisitionNumber LossyImageCompression"""
GONE = "InstitutionName ConvolutionKernel SmallestImagePixelValue CTDIvol"
VENDORS = "SI GE HI ME PH TO CA CP UI BR MR HY"  # how dcm2niix guesses a vendor


def test_what_is_inherited_what_is_new_and_what_is_gone(tmp_path, source):
    def more(ds):
        ds.Manufacturer = "SIEMENS"
        ds.ManufacturerModelName = "Scanner 9"
        ds.InstitutionName = "Hospital"
        ds.ConvolutionKernel = "B31f"
        ds.add_new("SmallestImagePixelValue", "US", 0)
        ds.WindowCenter = 77
        ds.CTDIvol = 3.0
        ds.LossyImageCompression = "01"
        ds.SyntheticData = "NO"
        ds.QualityControlImage = "NO"
        ds.private_block(0x0011, "X", create=True).add_new(1, "LO", "private")

    for path in (tmp_path / "in").iterdir():
        ds = pydicom.dcmread(path)
        more(ds)
        ds.save_as(path)
    templates = read_series(tmp_path / "in").templates
    write(tmp_path / "out", source.array, templates)
    old, new = datasets(tmp_path / "in"), datasets(tmp_path / "out")
    for a, b in zip(old, new, strict=True):
        for name in INHERITED.split():
            assert b[name].value == a[name].value, name
        for name in GONE.split():
            assert name not in b
        assert not [e for e in b if e.tag.is_private]
        assert b.SOPInstanceUID != a.SOPInstanceUID
        assert b.SeriesInstanceUID != a.SeriesInstanceUID
        assert b.file_meta.MediaStorageSOPInstanceUID == b.SOPInstanceUID
        assert b.SourceImageSequence[0].ReferencedSOPInstanceUID == a.SOPInstanceUID
        assert b.SourceImageSequence[0].SpatialLocationsPreserved == "YES"
    b = new[0]
    assert list(b.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
    assert (b.SyntheticData, b.ContentQualification) == ("YES", "RESEARCH")
    assert (b.RescaleSlope, b.RescaleIntercept, b.RescaleType) == (1, 0, "HU")
    assert (b.QualityControlImage, b.BurnedInAnnotation) == ("NO", "NO")
    assert (b.SeriesNumber, b.SeriesDescription) == (9001, "RESEARCH ONLY - DDS 23 views")
    assert (b.ContentDate, b.ContentTime) == ("20240506", "070809")
    assert [ds.InstanceNumber for ds in new] == [1, 2, 3, 4]
    assert "not for diagnosis" in b.ImageComments
    assert "remove or invent anatomy" in b.ImageComments
    scanner, ours = b.ContributingEquipmentSequence
    assert scanner.Manufacturer == "Scanner: SIEMENS"
    assert scanner.PurposeOfReferenceCodeSequence[0].CodeValue == "109101"
    assert ours.PurposeOfReferenceCodeSequence[0].CodeValue == "109100"
    for name in (b.Manufacturer, scanner.Manufacturer, ours.Manufacturer):
        assert name[:2].upper() not in VENDORS.split()
    text = b.DerivationDescription
    assert all(part in text for part in ("dds", "23 views", "seed 4", '"steps": 50', "0" * 64))


def test_classical_results_are_not_called_synthetic_unless_the_source_is(tmp_path, source):
    write(tmp_path / "a", source.array, source.templates, synthetic=False)
    assert datasets(tmp_path / "a")[0].SyntheticData == "YES"  # inherited from the phantom
    for path in (tmp_path / "in").iterdir():
        ds = pydicom.dcmread(path)
        del ds.SyntheticData
        ds.save_as(path)
    templates = read_series(tmp_path / "in").templates
    write(tmp_path / "b", source.array, templates, synthetic=False)
    ds = datasets(tmp_path / "b")[0]
    assert "SyntheticData" not in ds
    purpose = ds.ContributingEquipmentSequence[-1].PurposeOfReferenceCodeSequence[0]
    assert purpose.CodeValue == "109102"


def test_uids_are_reproducible_and_depend_on_content(tmp_path, source):
    base = write(tmp_path / "a", source.array, source.templates)
    assert write(tmp_path / "b", source.array, source.templates).series_uid == base.series_uid
    for a, b in zip(base.paths, sorted((tmp_path / "b").iterdir()), strict=True):
        assert a.read_bytes() == b.read_bytes()
    changed = source.array.copy()
    changed[0, 0, 0] += 1
    others = [
        write(tmp_path / "c", changed, source.templates),
        write(tmp_path / "d", source.array, source.templates, uid_seed="x"),
        write(tmp_path / "e", source.array, source.templates, derivation=Derivation("fbp")),
        write(tmp_path / "f", source.array, source.templates, kind="std"),
    ]
    assert len({w.series_uid for w in [base, *others]}) == 5
    sops = {str(ds.SOPInstanceUID) for f in "acdef" for ds in datasets(tmp_path / f)}
    assert len(sops) == 20
    assert all(pydicom.uid.UID(uid).is_valid for uid in sops)


def test_uid_of_uuid_matches_the_standard_library():
    assert deterministic_uid("a", 1) == deterministic_uid("a", "1")
    assert deterministic_uid("a", 1) != deterministic_uid("a1")
    assert int(deterministic_uid("a").removeprefix("2.25.")) >> 76 & 0xF == 5  # UUID version


def test_long_and_odd_texts_fit(tmp_path, source):
    derivation = Derivation("dds", text="σ ≤ 3 \\ " * 300)
    write(tmp_path / "out", source.array, source.templates, description="a\\b \n ü" * 30,
          derivation=derivation, kind="std")  # fmt: skip
    ds = datasets(tmp_path / "out")[0]
    assert len(ds.DerivationDescription) <= 1024
    assert isinstance(ds.SeriesDescription, str)
    assert len(ds.SeriesDescription) <= 64
    assert ds.SeriesDescription.endswith("STD (HU)")
    assert ds.SeriesDescription.isascii()


def test_names_in_other_character_sets_survive(tmp_path, source):
    for path in (tmp_path / "in").iterdir():
        ds = pydicom.dcmread(path)
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.PatientName = "Müller^Jörg=山田^太郎"
        ds.save_as(path)
    templates = read_series(tmp_path / "in").templates
    write(tmp_path / "out", source.array, templates)
    assert datasets(tmp_path / "out")[0].PatientName == "Müller^Jörg=山田^太郎"


def test_time_is_in_the_zone_of_the_source(tmp_path, source):
    for path in (tmp_path / "in").iterdir():
        ds = pydicom.dcmread(path)
        ds.TimezoneOffsetFromUTC = "-0530"
        ds.save_as(path)
    write(tmp_path / "out", source.array, read_series(tmp_path / "in").templates)
    ds = datasets(tmp_path / "out")[0]
    assert (ds.TimezoneOffsetFromUTC, ds.ContentTime) == ("-0530", "013809")


# --- complete or nothing -----------------------------------------------------------------------


def test_existing_output_is_refused_and_kept(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep")
    with pytest.raises(OutputError, match="not empty"):
        write(out, source.array, source.templates)
    assert [p.name for p in out.iterdir()] == ["precious.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="no folder"):
        write(tmp_path / "file", source.array, source.templates)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(OutputError, match="no folder"):
        write(tmp_path / "link", source.array, source.templates)


def test_empty_folder_and_new_parents_are_fine(tmp_path, source):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", source.array, source.templates)
    write(tmp_path / "x" / "y" / "out", source.array, source.templates)
    assert len(list((tmp_path / "x" / "y" / "out").iterdir())) == 4


@pytest.mark.parametrize("fail_at", [1, 3, 4])
def test_a_failed_write_leaves_nothing(tmp_path, source, monkeypatch, fail_at):
    real, calls = dicom_write._write_file, []

    def full_disk(path, content):
        calls.append(path)
        if len(calls) == fail_at:
            path.write_bytes(content[:300])
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(dicom_write, "_write_file", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        write(tmp_path / "out", source.array, source.templates)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_interrupt_leaves_nothing(tmp_path, source, monkeypatch):
    def interrupt(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(dicom_write, "_write_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", source.array, source.templates)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_wrong_inputs(tmp_path, source, mr_source):
    with pytest.raises(GeometryError, match=r"\(4, rows, columns\).*\(3, 24, 16\)"):
        write(tmp_path / "o", source.array[:3], source.templates)
    with pytest.raises(InputError, match="no template"):
        write(tmp_path / "o", source.array[:0], [])
    with pytest.raises(InputError, match="needs templates of CT images"):
        write(tmp_path / "o", source.array, mr_source.templates)
    with pytest.raises(InputError, match="damaged"):
        write(tmp_path / "o", source.array[:1], [b"no DICOM"])
    assert not (tmp_path / "o").exists()


def test_phantom_series_is_reproducible_to_the_byte(tmp_path):
    a = write_phantom_series(tmp_path / "a", body(), SPACING, seed=5)
    b = write_phantom_series(tmp_path / "b", body(), SPACING, seed=5)
    c = write_phantom_series(tmp_path / "c", body(), SPACING, seed=6)
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]
    assert pydicom.dcmread(a[0]).SOPInstanceUID != pydicom.dcmread(c[0]).SOPInstanceUID
    with pytest.raises(InputError, match="at least -1024"):
        write_phantom_series(tmp_path / "d", body() - 2000, SPACING, seed=5)
    with pytest.raises(GeometryError, match="positive"):
        write_phantom_series(tmp_path / "d", body(), (1, 0, 1), seed=5)
    with pytest.raises(NumericalError):
        write_phantom_series(tmp_path / "d", body() * np.nan, SPACING, seed=5)


# --- outside programs --------------------------------------------------------------------------


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian packages dicom3tools, dcm2niix)")
    return path


def run(command) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def everything(tmp_path, source, mr_source) -> list[Path]:
    """Every kind of series that the toolkit writes."""
    coarse = source.array.reshape(4, 12, 2, 8, 2).mean((2, 4))
    std = np.abs(coarse) / 100
    write(tmp_path / "ct", source.array, source.templates)
    write(tmp_path / "coarse", coarse, source.templates, series_number=9002)
    write(tmp_path / "std", std, source.templates, kind="std", series_number=9003)
    write(tmp_path / "fbp", coarse, source.templates, synthetic=False,
          derivation=Derivation("fbp"), series_number=9004)  # fmt: skip
    write(tmp_path / "mr-out", mr_source.array, mr_source.templates, unit="signal")
    write(tmp_path / "mr-std", mr_source.array / 9, mr_source.templates, unit="signal", kind="std")
    names = ("in", "ct", "coarse", "std", "fbp", "mr", "mr-out", "mr-std")
    return [tmp_path / name for name in names]


# Tables older than 2023 do not know SyntheticData.
def is_known(line: str) -> bool:
    return "(0008,001c)" in line.lower()


def test_dciodvfy_finds_no_error(tmp_path, source, mr_source):
    checker = program("dciodvfy")
    for folder in everything(tmp_path, source, mr_source):
        for path in sorted(folder.iterdir())[:2]:
            lines = run([checker, "-new", path])[1].splitlines()
            assert any(line.strip() in ("CTImage", "MRImage") for line in lines)
            found = [line for line in lines if line.startswith(("Error", "Warning"))]
            assert [line for line in found if not is_known(line)] == []


def test_dcentvfy_finds_the_series_consistent(tmp_path, source, mr_source):
    checker = program("dcentvfy")
    folders = everything(tmp_path, source, mr_source)
    for group in (folders[:5], folders[5:]):
        files = [path for folder in group for path in sorted(folder.iterdir())]
        assert run([checker, *files]) == (0, "")


def test_dcm2niix_reads_the_same_volume(tmp_path, source, mr_source):
    converter = program("dcm2niix")
    nibabel = pytest.importorskip("nibabel")
    coarse = everything(tmp_path, source, mr_source)[2]
    (tmp_path / "nii").mkdir()
    code, text = run([converter, "-o", tmp_path / "nii", "-f", "x", coarse])
    assert code == 0, text
    image = nibabel.load(tmp_path / "nii" / "x.nii")
    back = read_series(coarse)
    # NIfTI is x, y, z with y flipped by the converter, and in RAS instead of LPS
    volume = np.asarray(image.dataobj).transpose(2, 1, 0)[:, ::-1]
    np.testing.assert_array_equal(volume, back.array)
    first = np.diag([-1, -1, 1, 1]) @ image.affine @ [0, back.array.shape[1] - 1, 0, 1]
    np.testing.assert_allclose(first[:3], back.positions[0], atol=1e-3)
    sidecar = json.loads((tmp_path / "nii" / "x.json").read_text())
    assert "Manufacturer" not in sidecar  # no vendor guessed


def test_derived_series_of_a_real_scan(tmp_path, shared_data):
    s = read_series(shared_data / "ct_dicom" / "LungFCP-01-0001_40slices.zip")
    coarse = s.array[:3].reshape(3, 256, 2, 256, 2).mean((2, 4))
    write(tmp_path / "a", s.array[:3], s.templates[:3])
    write(tmp_path / "b", coarse, s.templates[:3])
    fine, back = read_series(tmp_path / "a"), read_series(tmp_path / "b")
    np.testing.assert_array_equal(fine.array, s.array[:3])
    assert np.abs(back.array - coarse).max() <= 0.5
    # -189.1201171875 + 0.759765625 / 2: half a source pixel towards the centre
    assert back.positions[0][0] == pytest.approx(-188.740234375, abs=1e-9)
    checker = program("dciodvfy")
    for folder in ("a", "b"):
        lines = run([checker, "-new", tmp_path / folder / "0002.dcm"])[1].splitlines()
        errors = [x for x in lines if x.startswith("Error") and not is_known(x)]
        assert errors == []
