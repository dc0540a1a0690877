"""Report and std map as further objects of the study: exact, of the same patient, valid."""

from __future__ import annotations

import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pydicom
import pytest

from inverse.errors import GeometryError, InputError, NumericalError, OutputError, UnsupportedError
from inverse.io.dicom import (
    Derivation,
    check_highdicom,
    patient_of,
    read_series,
    write_parametric_map,
    write_pdf,
)
from phantoms.series import write_phantom_series

SPACING = (2.5, 0.8, 0.7)
DERIVATION = Derivation("mmps", text="parallel beam, 23 views", seed=4, prior="ct")
NOW = datetime(2024, 5, 6, 7, 8, 9, tzinfo=timezone.utc)  # noqa: UP017
PDF = b"%PDF-1.4\n% a document of an odd number of bytes\n%%EOF"
assert len(PDF) % 2


@pytest.fixture
def source(tmp_path: Path):
    volume = np.random.default_rng(0).integers(-1000, 2000, (4, 24, 16)).astype(np.float32)
    # de-identified as public archives do it, with a sequence of what was done
    done = {"CodeValue": "113100", "CodingSchemeDesignator": "DCM",
            "CodeMeaning": "Basic Application Confidentiality Profile"}  # fmt: skip
    write_phantom_series(
        tmp_path / "in",
        volume,
        SPACING,
        seed=1,
        attributes={"PatientIdentityRemoved": "YES", "DeidentificationMethodCodeSequence": [done]},
    )
    return read_series(tmp_path / "in")


def pdf(out: Path, templates, **options):
    defaults = {"title": "a \\ report – of a study", "derivation": DERIVATION, "created": NOW}
    options = defaults | options
    return write_pdf(out, options.pop("content", PDF), templates, **options)


def std_map(out: Path, volume, templates, **options):
    options = {"description": "MMPS 23 views", "derivation": DERIVATION, "created": NOW} | options
    return write_parametric_map(out, volume, templates, **options)


def findings(path: Path) -> list[str]:
    """What dciodvfy says, without the tag that its tables do not know."""
    checker = shutil.which("dciodvfy")
    if checker is None:
        pytest.skip("dciodvfy is not installed (Debian package dicom3tools)")
    done = subprocess.run([checker, "-new", path], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert any(line.strip() in ("EncapsulatedPDF", "ParametricMap") for line in lines)
    return [x for x in lines if x.startswith("Error") and "(0008,001c)" not in x.lower()]


# --- the report --------------------------------------------------------------------------------


def test_pdf_comes_back_and_belongs_to_the_patient(tmp_path, source):
    written = pdf(tmp_path / "out", source.templates)
    (path,) = written.paths
    ds, image = pydicom.dcmread(path), pydicom.dcmread(tmp_path / "in" / "0001.dcm")
    assert ds.SOPClassUID.name == "Encapsulated PDF Storage"
    assert ds.EncapsulatedDocument == PDF + b"\n", "padded to an even length by white space"
    assert ds.MIMETypeOfEncapsulatedDocument == "application/pdf"
    for name in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "StudyDate"):
        assert ds[name].value == image[name].value
    assert ds.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    assert ds.SeriesInstanceUID == written.series_uid != image.SeriesInstanceUID
    assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
    assert (ds.Modality, ds.SyntheticData, ds.BurnedInAnnotation) == ("DOC", "YES", "NO")
    assert ds.DocumentTitle == "RESEARCH ONLY - a / report ? of a study"
    assert len(ds.SourceInstanceSequence) == 4
    assert ds.SourceInstanceSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID
    assert "FrameOfReferenceUID" not in ds
    assert findings(path) == []


def test_pdf_is_reproducible_and_says_what_it_names(tmp_path, source):
    a, b = (pdf(tmp_path / n, source.templates).paths[0] for n in "ab")
    assert a.read_bytes() == b.read_bytes()
    other = pdf(tmp_path / "c", source.templates, content=PDF + b" ")
    assert pydicom.dcmread(other.paths[0]).SOPInstanceUID != pydicom.dcmread(a).SOPInstanceUID
    named = pdf(tmp_path / "d", source.templates, names_patient=True, synthetic=False)
    ds = pydicom.dcmread(named.paths[0])
    assert (ds.BurnedInAnnotation, ds.SyntheticData) == ("YES", "YES"), "inherited"


def test_pdf_refusals_leave_nothing(tmp_path, source):
    with pytest.raises(InputError, match="no PDF"):
        pdf(tmp_path / "out", source.templates, content=b"<html>")
    with pytest.raises(InputError, match="no template"):
        pdf(tmp_path / "out", ())
    with pytest.raises(InputError, match="damaged"):
        pdf(tmp_path / "out", (b"nothing",))
    with pytest.raises(OutputError, match="not empty"):
        pdf(tmp_path / "in", source.templates)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_pdf_by_another_program(tmp_path, source):
    program = shutil.which("dcm2pdf")
    if program is None:
        pytest.skip("dcm2pdf is not installed (Debian package dcmtk)")
    (path,) = pdf(tmp_path / "out", source.templates).paths
    subprocess.run([program, path, tmp_path / "back.pdf"], check=True, capture_output=True)
    assert (tmp_path / "back.pdf").read_bytes() == PDF + b"\n"


# --- the map -----------------------------------------------------------------------------------


def test_map_holds_the_values_at_their_places(tmp_path, source):
    pytest.importorskip("highdicom", reason="a Parametric Map needs highdicom (extra maps)")
    volume = np.random.default_rng(1).gamma(2.0, 3.7, (4, 12, 8)).astype(np.float32)
    (path,) = std_map(tmp_path / "a", volume, source.templates).paths
    ds = pydicom.dcmread(path)
    assert ds.SOPClassUID.name == "Parametric Map Storage"
    pixels = np.frombuffer(ds.FloatPixelData, "<f4").reshape(4, 12, 8)
    places = [
        [float(v) for v in item.PlanePositionSequence[0].ImagePositionPatient]
        for item in ds.PerFrameFunctionalGroupsSequence
    ]
    # half the matrix: the first pixel lies half a source pixel further in, as in the series
    expected = source.positions + np.array([0.5 * 0.7, 0.5 * 0.8, 0])
    for frame, place in zip(pixels, places, strict=True):
        k = int(np.abs(expected[:, 2] - place[2]).argmin())
        np.testing.assert_allclose(place, expected[k], atol=1e-6)
        np.testing.assert_array_equal(frame, volume[k])
    shared = ds.SharedFunctionalGroupsSequence[0]
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == [1.6, 1.4]
    item = shared.RealWorldValueMappingSequence[0]
    assert (item.RealWorldValueSlope, item.RealWorldValueIntercept) == (1, 0)
    assert item.MeasurementUnitsCodeSequence[0].CodeValue == "[hnsf'U]"
    assert ds.SeriesDescription == "RESEARCH ONLY - MMPS 23 views STD (HU)"
    assert (ds.SyntheticData, ds.ContentQualification) == ("YES", "RESEARCH")
    assert ds.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    # no vendor is guessed from the maker of the file
    makers = [i.Manufacturer for i in ds.ContributingEquipmentSequence]
    assert not [m for m in [ds.Manufacturer, *makers] if m[:2].upper() == "HI"]
    assert findings(path) == []
    again = std_map(tmp_path / "b", volume, source.templates).paths[0]
    assert again.read_bytes() == path.read_bytes()


def test_map_of_mr_has_no_unit(tmp_path):
    pytest.importorskip("highdicom", reason="a Parametric Map needs highdicom (extra maps)")
    volume = np.ones((2, 8, 8), np.float32)
    write_phantom_series(tmp_path / "in", volume, SPACING, seed=1, modality="MR")
    templates = read_series(tmp_path / "in").templates
    (path,) = std_map(tmp_path / "out", volume, templates, unit="signal").paths
    item = pydicom.dcmread(path).SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    assert item.MeasurementUnitsCodeSequence[0].CodeValue == "1"
    assert findings(path) == []


def test_map_refusals(tmp_path, source):
    pytest.importorskip("highdicom", reason="a Parametric Map needs highdicom (extra maps)")
    volume = np.ones((4, 12, 8), np.float32)
    with pytest.raises(GeometryError, match=r"\(4, rows, columns\)"):
        std_map(tmp_path / "out", volume[:3], source.templates)
    with pytest.raises(NumericalError, match="96 voxels"):
        std_map(tmp_path / "out", np.where(np.arange(4)[:, None, None] == 1, np.nan, volume),
                source.templates)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_without_highdicom_a_map_is_unsupported(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(UnsupportedError, match="pip install highdicom"):
        check_highdicom()


# --- who is imaged -----------------------------------------------------------------------------


def test_patient_of_a_template(source):
    told = patient_of(source.templates[0])
    assert told["PatientName"] == "PHANTOM^SEED 1"
    assert told["PatientID"] == "PHANTOM-1"
    assert patient_of(bytes(400)) == {}
