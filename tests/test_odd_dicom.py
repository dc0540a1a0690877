"""Every unusual DICOM file has one clear outcome; docs/conformance.md shows the same table."""

from __future__ import annotations

from pathlib import Path

import pytest

from inverse.errors import ReconError
from inverse.io.series import read_series

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "conformance.md"

# file | what comes of it: an image with its shape and findings, or an exit code and the reason
TABLE = """
dcmqi/23x38x3/image/IMG0001.dcm | CT 1 x 38 x 23
dcmqi/23x38x3/image/IMG0002.dcm | CT 1 x 38 x 23
dcmqi/23x38x3/image/IMG0003.dcm | CT 1 x 38 x 23
dcmqi/23x38x3/multiframe/mf.dcm | CT 3 x 38 x 23
dcmqi/23x38x3/seg/label.seg | exit 5: Segmentation Storage
dcmqi/24x38x3/image/IMG0001.dcm | CT 1 x 38 x 24
dcmqi/24x38x3/image/IMG0002.dcm | CT 1 x 38 x 24
dcmqi/24x38x3/image/IMG0003.dcm | CT 1 x 38 x 24
dcmqi/24x38x3/multiframe/mf.dcm | CT 3 x 38 x 24
dcmqi/24x38x3/seg/label.seg | exit 5: Segmentation Storage
dcmqi/partial_overlaps.dcm | exit 5: Segmentation Storage
dcmqi/rwvm.dcm | exit 5: Real World Value Mapping Storage
dcmqi/sr.dcm | exit 5: Comprehensive SR Storage
pydicom-data/HTJ2KLossless_08_RGB.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/JLSL_08_07_0_1F.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/JLSL_16_15_1_1F.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/JLSL_RGB_ILV0.dcm | exit 3: not DICOM
pydicom-data/JLSL_RGB_ILV1.dcm | exit 3: not DICOM
pydicom-data/JLSL_RGB_ILV2.dcm | exit 3: not DICOM
pydicom-data/JLSN_RGB_ILV0.dcm | exit 3: not DICOM
pydicom-data/JPEG-LL.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/MR-SIEMENS-DICOM-WithOverlays.dcm | MR 1 x 484 x 484
pydicom-data/MR2_J2KI.dcm | MR 1 x 1024 x 1024 LOSSY MR_RESCALED
pydicom-data/OBXXXX1A_rle.dcm | exit 5: Ultrasound Image Storage
pydicom-data/OT-PAL-8-face.dcm | exit 3: not DICOM
pydicom-data/SC_rgb.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_16bit.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_2frame.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_dcmtk_ebcr_dcmd.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_dcmtk_ebcyn1_dcmd.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_dcmtk_ebcyn2_dcmd.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_dcmtk_ebcynp_dcmd.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_dcmtk_ebcys2_dcmd.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_dcmtk_ebcys4_dcmd.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_expb.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_expb_16bit.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_expb_2frame.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_rgb_gdcm2k_uncompressed.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/SC_ybr_full_uncompressed.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/bad_sequence.dcm | CT 1 x 512 x 512 NONSTANDARD_HEADER [needs a decoder]
pydicom-data/color-pl.dcm | exit 5: Ultrasound Image Storage
pydicom-data/color-px.dcm | exit 5: Ultrasound Image Storage
pydicom-data/eCT_Supplemental.dcm | exit 5: NOT_HU
pydicom-data/emri_small.dcm | exit 5: MULTIFRAME
pydicom-data/emri_small_RLE.dcm | exit 5: MULTIFRAME
pydicom-data/emri_small_big_endian.dcm | exit 5: MULTIFRAME
pydicom-data/emri_small_jpeg_2k_lossless.dcm | exit 5: MULTIFRAME
pydicom-data/emri_small_jpeg_2k_lossless_too_short.dcm | exit 5: MULTIFRAME
pydicom-data/emri_small_jpeg_ls_lossless.dcm | exit 5: MULTIFRAME
pydicom-data/explicit_VR-UN.dcm | CT 1 x 512 x 512 NO_THICKNESS
pydicom-data/liver.dcm | exit 5: Segmentation Storage
pydicom-data/liver_deflate.dcm | exit 5: Segmentation Storage
pydicom-data/liver_expb.dcm | exit 5: Segmentation Storage
pydicom-data/liver_j2k.dcm | exit 5: Segmentation Storage
pydicom-data/liver_nonbyte_aligned.dcm | exit 5: Segmentation Storage
pydicom-data/liver_nonbyte_aligned_deflate.dcm | exit 5: Segmentation Storage
pydicom-data/liver_nonbyte_aligned_j2k.dcm | exit 5: Segmentation Storage
pydicom-data/liver_nonbyte_aligned_rle.dcm | exit 5: Segmentation Storage
pydicom-data/liver_rle.dcm | exit 5: Segmentation Storage
pydicom-data/mlut_18.dcm | exit 5: Secondary Capture Image Storage
pydicom-data/parametric_map_double_float.dcm | exit 5: Parametric Map Storage
pydicom-data/parametric_map_float.dcm | exit 5: Parametric Map Storage
pydicom-data/vlut_04.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/CT_small.dcm | CT 1 x 128 x 128
pydicom-testfiles/ExplVR_BigEnd.dcm | exit 5: Ultrasound Image Storage
pydicom-testfiles/ExplVR_BigEndNoMeta.dcm | exit 3: not DICOM
pydicom-testfiles/ExplVR_LitEndNoMeta.dcm | exit 3: not DICOM
pydicom-testfiles/JPEG-lossy.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/JPEG2000.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/MR_small.dcm | MR 1 x 64 x 64
pydicom-testfiles/MR_small_RLE.dcm | MR 1 x 64 x 64
pydicom-testfiles/MR_small_bigendian.dcm | MR 1 x 64 x 64
pydicom-testfiles/MR_small_expb.dcm | MR 1 x 64 x 64
pydicom-testfiles/MR_small_implicit.dcm | MR 1 x 64 x 64
pydicom-testfiles/MR_small_jp2klossless.dcm | MR 1 x 64 x 64
pydicom-testfiles/MR_small_jpeg_ls_lossless.dcm | MR 1 x 64 x 64 [needs a decoder]
pydicom-testfiles/MR_small_padded.dcm | MR 1 x 64 x 64 EXCESS_PIXELS
pydicom-testfiles/MR_truncated.dcm | exit 4: pixel data are truncated
pydicom-testfiles/SC_rgb_dcmtk_+eb+cr.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_dcmtk_+eb+cy+n1.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_dcmtk_+eb+cy+n2.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_dcmtk_+eb+cy+np.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_dcmtk_+eb+cy+s2.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_dcmtk_+eb+cy+s4.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_gdcm_KY.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_jpeg_dcmtk.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_jpeg_gdcm.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_jpeg_lossy_gdcm.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_rle.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_rle_16bit.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_rle_16bit_2frame.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_rle_2frame.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_rle_32bit.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_rle_32bit_2frame.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_small_odd.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_rgb_small_odd_jpeg.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/SC_ybr_full_422_uncompressed.dcm | exit 5: Secondary Capture Image Storage
pydicom-testfiles/badVR.dcm | exit 5: RT Dose Storage
pydicom-testfiles/empty_charset_LEI.dcm | exit 4: the header names no SOP class
pydicom-testfiles/image_dfl.dcm | exit 5: deflated transfer syntax
pydicom-testfiles/liver_1frame.dcm | exit 5: Segmentation Storage
pydicom-testfiles/liver_expb_1frame.dcm | exit 5: Segmentation Storage
pydicom-testfiles/meta_missing_tsyntax.dcm | exit 4: the header names no SOP class
pydicom-testfiles/nested_priv_SQ.dcm | exit 4: the header names no SOP class
pydicom-testfiles/no_meta.dcm | exit 3: not DICOM
pydicom-testfiles/no_meta_group_length.dcm | exit 4: the header names no SOP class
pydicom-testfiles/priv_SQ.dcm | exit 4: the header names no SOP class
pydicom-testfiles/reportsi.dcm | exit 5: Basic Text SR Storage
pydicom-testfiles/reportsi_with_empty_number_tags.dcm | exit 5: Basic Text SR Storage
pydicom-testfiles/rtdose.dcm | exit 5: RT Dose Storage
pydicom-testfiles/rtdose_1frame.dcm | exit 5: RT Dose Storage
pydicom-testfiles/rtdose_expb.dcm | exit 5: RT Dose Storage
pydicom-testfiles/rtdose_expb_1frame.dcm | exit 5: RT Dose Storage
pydicom-testfiles/rtdose_rle.dcm | exit 5: RT Dose Storage
pydicom-testfiles/rtdose_rle_1frame.dcm | exit 5: RT Dose Storage
pydicom-testfiles/rtplan.dcm | exit 5: RT Plan Storage
pydicom-testfiles/rtplan_truncated.dcm | exit 5: RT Plan Storage
pydicom-testfiles/rtstruct.dcm | exit 3: not DICOM
pydicom-testfiles/test-SR.dcm | exit 5: Comprehensive SR Storage
"""
DECODER = " [needs a decoder]"
ROWS = [tuple(line.split(" | ")) for line in TABLE.strip().splitlines()]


def outcome(path: Path) -> str:
    """What reading a file gives, in the words of the table."""
    try:
        s = read_series(path)
    except ReconError as error:
        return f"exit {error.exit_code}: {error}"
    codes = sorted(note.code for note in s.warnings)
    return " ".join([s.modality, " x ".join(map(str, s.array.shape)), *codes])


def agrees(found: str, expected: str) -> bool:
    """Images agree word for word, errors in exit code and reason."""
    code, colon, reason = expected.partition(": ")
    return found.startswith(code + ":") and reason in found if colon else found == expected


@pytest.fixture(scope="module")
def odd(shared_data: Path) -> Path:
    return shared_data / "odd_dicom"


def test_the_table_names_every_file(odd: Path) -> None:
    there = {str(p.relative_to(odd)) for p in odd.rglob("*") if p.is_file()}
    assert there == {name for name, _ in ROWS}


@pytest.mark.parametrize(("name", "expected"), ROWS, ids=[name for name, _ in ROWS])
def test_outcome(odd: Path, name: str, expected: str) -> None:
    found = outcome(odd / name)
    if expected.endswith(DECODER) and "NO_DECODER" in found:
        assert found.startswith("exit 5:")
        return
    assert agrees(found, expected.removesuffix(DECODER)), found


def markdown() -> str:
    """The table of the document: equal outcomes of a folder share a row."""
    files: dict[tuple[str, str], list[str]] = {}
    for name, result in ROWS:
        folder, _, base = name.rpartition("/")
        files.setdefault((folder, result), []).append(f"`{base}`")
    rows = [f"| {d} | {', '.join(names)} | {r} |" for (d, r), names in files.items()]
    return "\n".join(["| folder | files | outcome |", "|---|---|---|", *rows])


def test_the_document_shows_the_table() -> None:
    assert markdown() in DOCUMENT.read_text()


def test_agreement_is_strict() -> None:
    """A wrong shape, code or reason does not agree."""
    assert agrees("CT 1 x 2 x 3", "CT 1 x 2 x 3")
    assert not agrees("CT 1 x 2 x 4", "CT 1 x 2 x 3")
    assert not agrees("exit 4: no such reason", "exit 5: no such reason")
    assert not agrees("exit 5: another reason", "exit 5: MULTIFRAME")
