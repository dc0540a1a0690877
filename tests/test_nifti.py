"""NIfTI: every voxel keeps its place in the patient, in and out; nothing else is believed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import SIZE, discs, recon, tiny_prior

from inverse.errors import (
    GeometryError,
    InputError,
    NoInputError,
    NumericalError,
    OutputError,
    ReconError,
    ResourceError,
    UnsupportedError,
)
from inverse.io.nifti import is_nifti_template
from inverse.io.series import Derivation, inspect, read_series, write_series
from phantoms.series import write_phantom_series

nibabel = pytest.importorskip("nibabel", reason="NIfTI needs nibabel (the formats extra)")

SHAPE = (4, 5, 6)


def volume(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)


def rotation(degrees: float, axis: int) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    m = np.eye(3)
    a, b = [k for k in range(3) if k != axis]
    m[a, a], m[a, b], m[b, a], m[b, b] = c, -s, s, c
    return m


def affine(directions: np.ndarray, spacing=(0.8, 0.9, 3.0), origin=(-10.0, 20.0, 5.0)):
    m = np.eye(4)
    m[:3, :3] = directions * np.asarray(spacing)
    m[:3, 3] = origin
    return m


def save(path: Path, data: np.ndarray, matrix: np.ndarray, **sidecar: Any) -> Path:
    image = nibabel.Nifti1Image(data, matrix)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    if sidecar:
        path.with_name(path.name.split(".")[0] + ".json").write_text(json.dumps(sidecar))
    return path


ORIENTATIONS = {
    "RAS": np.eye(3),
    "LPS": np.diag([-1.0, -1.0, 1.0]),
    "LAS": np.diag([-1.0, 1.0, 1.0]),
    "upside down": np.diag([1.0, 1.0, -1.0]),
    "coronal": np.eye(3)[:, [0, 2, 1]],
    "sagittal": np.eye(3)[:, [1, 2, 0]],
    "rows and columns swapped": np.eye(3)[:, [1, 0, 2]],
    "oblique": rotation(20, 0) @ rotation(-15, 2),
    "oblique coronal": rotation(10, 2) @ np.eye(3)[:, [0, 2, 1]] @ np.diag([-1.0, 1.0, -1.0]),
}


def world(s: Any, z: int, y: int, x: int) -> np.ndarray:
    """Where a voxel of a series lies, LPS mm."""
    row, column = np.array(s.orientation[:3]), np.array(s.orientation[3:])
    return s.positions[z] + x * s.spacing[2] * row + y * s.spacing[1] * column


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_voxel_keeps_its_place(tmp_path, name):
    data, matrix = volume(), affine(ORIENTATIONS[name])
    s = read_series(save(tmp_path / "v.nii.gz", data, matrix), modality="MR")
    inverse = np.linalg.inv(matrix)
    for index in np.ndindex(s.array.shape):
        ras = world(s, *index) * [-1, -1, 1]
        voxel = inverse[:3, :3] @ ras + inverse[:3, 3]
        np.testing.assert_allclose(voxel, voxel.round(), atol=1e-4)
        assert s.array[index] == data[tuple(voxel.round().astype(int))]
    normal = np.cross(s.orientation[:3], s.orientation[3:])
    assert (np.diff(s.positions @ normal) > 0).all()
    assert s.spacing[0] == pytest.approx(3.0)
    assert s.warnings == []


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("RAS", (1, 0, 0), (0, 1, 0)),
        ("LPS", (1, 0, 0), (0, 1, 0)),
        ("rows and columns swapped", (1, 0, 0), (0, 1, 0)),
        ("coronal", (1, 0, 0), (0, 0, -1)),
        ("sagittal", (0, 1, 0), (0, 0, -1)),
    ],
)
def test_slices_are_shown_as_usual(tmp_path, name, row, column):
    """Axial: left and posterior; coronal: left and feet; sagittal: posterior and feet."""
    path = save(tmp_path / "v.nii", volume(), affine(ORIENTATIONS[name]))
    s = read_series(path, modality="MR")
    np.testing.assert_allclose(s.orientation, (*row, *column), atol=1e-6)
    np.testing.assert_allclose(inspect(path).stacks[0].orientation, s.orientation)


def derived(s: Any, out: Path, array: np.ndarray | None = None, **options: Any) -> Any:
    return write_series(
        out, s.array if array is None else array, s.templates, description="test",
        derivation=Derivation("dds", seed=3, prior="p"), unit=s.unit, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_round_trip_in_world_coordinates(tmp_path, name):
    data, matrix = volume(), affine(ORIENTATIONS[name])
    s = read_series(save(tmp_path / "v.nii.gz", data, matrix), modality="MR")
    written = derived(s, tmp_path / "recon")
    assert [p.name for p in written.paths] == ["recon.nii.gz"]
    image = nibabel.load(written.paths[0])
    out = image.get_fdata()
    move = np.linalg.inv(matrix) @ image.affine
    for index in np.ndindex(out.shape):
        source = (move @ [*index, 1])[:3]
        assert out[index] == data[tuple(source.round().astype(int))]
        np.testing.assert_allclose(source, source.round(), atol=1e-3)
    again = read_series(tmp_path / "recon")  # the sidecar tells the modality
    np.testing.assert_array_equal(again.array, s.array)
    np.testing.assert_allclose(again.positions, s.positions, atol=1e-4)
    assert (again.unit, again.synthetic) == ("signal", True)


def test_half_the_matrix_covers_the_same_field_of_view(tmp_path):
    s = read_series(save(tmp_path / "v.nii", volume((8, 6, 3)), affine(np.eye(3))), modality="MR")
    coarse = s.array.reshape(3, 3, 2, 4, 2).mean(axis=(2, 4))
    derived(s, tmp_path / "recon", coarse)
    t = read_series(tmp_path / "recon")
    assert t.spacing[1:] == pytest.approx((1.8, 1.6))
    corner = np.mean([world(s, 0, y, x) for y in (0, 1) for x in (0, 1)], axis=0)
    np.testing.assert_allclose(world(t, 0, 0, 0), corner, atol=1e-4)


def test_some_slices_keep_their_positions(tmp_path):
    s = read_series(save(tmp_path / "v.nii", volume((4, 5, 9)), affine(np.eye(3))), modality="MR")
    chosen = slice(1, 8, 3)
    write_series(tmp_path / "recon", s.array[chosen], s.templates[chosen], description="x",
                 derivation=Derivation("m"), unit="signal")  # fmt: skip
    np.testing.assert_allclose(
        read_series(tmp_path / "recon").positions, s.positions[chosen], atol=1e-4
    )
    uneven = [s.templates[k] for k in (0, 1, 3)]
    with pytest.raises(InputError, match="evenly spaced"):
        write_series(tmp_path / "b", s.array[:3], uneven, description="x",
                     derivation=Derivation("m"), unit="signal")  # fmt: skip


def test_scale_units_and_dtypes(tmp_path):
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = nibabel.Nifti1Image(data, affine(np.eye(3), (1e-3, 1e-3, 2e-3), (0, 0, 0)))
    image.header.set_xyzt_units("meter")
    image.header.set_slope_inter(0.5, -7)
    for kind, name in ((nibabel.Nifti1Image, "a.nii"), (nibabel.Nifti2Image, "b.nii.gz")):
        nibabel.save(kind(data, image.affine, image.header), tmp_path / name)
        s = read_series(tmp_path / name, modality="MR")
        assert s.spacing == pytest.approx((2, 1, 1))
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = np.array([0.5, -7], "<f4").tobytes()  # scl_slope, scl_inter
    (tmp_path / "a.nii").write_bytes(raw)
    s = read_series(tmp_path / "a.nii", modality="MR")
    # RAS to LPS turns rows and columns round
    np.testing.assert_array_equal(s.array, (0.5 * data - 7).transpose(2, 1, 0)[:, ::-1, ::-1])
    np.testing.assert_array_equal(s.rescale, [[0.5, -7]] * 5)


def test_modality_comes_from_the_caller_or_a_sidecar(tmp_path):
    path = save(tmp_path / "v.nii", volume(), affine(np.eye(3)))
    with pytest.raises(InputError, match='"Modality"'):
        read_series(path)
    assert inspect(path).stacks[0].modality == "unknown"
    assert {n.code for n in inspect(path).stacks[0].warnings} == {"NO_MODALITY"}
    save(path, volume(), affine(np.eye(3)), Modality="MR", PatientName="CANARY")
    assert read_series(path, modality="CT").modality == "MR"  # then the command refuses it
    path.with_name("v.json").write_text("[" * 100_000)
    assert inspect(path).stacks[0].modality == "unknown"


def test_hu_and_padding(tmp_path):
    data = volume() - 1000
    data[0, 0, 0], data[1, 1, 1] = np.nan, -3024
    s = read_series(save(tmp_path / "v.nii", data, affine(np.eye(3))), modality="CT")
    assert s.unit == "HU"
    assert int(s.mask.sum()) == 2
    assert (s.array[s.mask] == -1000).all()
    assert {n.code for n in s.warnings} == {"NAN_PADDING", "UNTAGGED_PADDING"}
    with pytest.raises(InputError, match="NOT_HU"):
        read_series(save(tmp_path / "w.nii", volume(), affine(np.eye(3))), modality="CT")
    data[2, 2, 2] = np.inf
    with pytest.raises(InputError, match="infinite"):
        read_series(save(tmp_path / "v.nii", data, affine(np.eye(3))), modality="CT")


def test_sheared_slices_are_flagged_as_tilt(tmp_path):
    matrix = affine(np.eye(3))
    matrix[1, 2] = 3.0 * np.tan(np.radians(10))
    s = read_series(save(tmp_path / "v.nii", volume(), matrix), modality="MR")
    assert s.tilt_deg == pytest.approx(10, abs=1e-3)
    assert s.spacing[0] == pytest.approx(3.0)
    assert {n.code for n in s.warnings} == {"TILT"}
    derived(s, tmp_path / "recon")
    np.testing.assert_allclose(read_series(tmp_path / "recon").positions, s.positions, atol=1e-4)


def test_series_of_volumes_and_folders_need_a_choice(tmp_path):
    path = save(tmp_path / "v.nii.gz", volume((4, 5, 6, 3)), affine(np.eye(3)))
    assert [s.slices for s in inspect(path).stacks] == [6, 6, 6]
    with pytest.raises(InputError, match="3 volumes found"):
        read_series(path, modality="MR")
    s = read_series(path, modality="MR", stack=2)
    np.testing.assert_array_equal(
        s.array, volume((4, 5, 6, 3))[..., 1].transpose(2, 1, 0)[:, ::-1, ::-1]
    )
    with pytest.raises(InputError, match="no volume matches --stack 4"):
        read_series(path, modality="MR", stack=4)
    save(tmp_path / "w.nii", volume(), affine(np.eye(3)))
    assert len(inspect(tmp_path).stacks) == 4
    # DICOM goes first where a folder holds both
    write_phantom_series(tmp_path / "d", volume((3, 4, 5)), (3, 1, 1), seed=1, modality="MR")
    assert [s.modality for s in inspect(tmp_path).stacks] == ["MR"]


def test_refusals(tmp_path):
    path = tmp_path / "v.nii"
    bare = nibabel.Nifti1Image(volume(), None)
    bare.header["qform_code"] = bare.header["sform_code"] = 0
    nibabel.save(bare, path)
    with pytest.raises(InputError, match="NO_GEOMETRY"):
        read_series(path, modality="MR")
    skewed = affine(np.eye(3))
    skewed[0, 1] = 0.5
    with pytest.raises(InputError, match="BAD_ORIENTATION"):
        read_series(save(path, volume(), skewed), modality="MR")
    with pytest.raises(UnsupportedError, match="real grey-scale"):
        read_series(save(path, volume().astype(np.complex64), affine(np.eye(3))), modality="MR")
    with pytest.raises(UnsupportedError, match="shape"):
        read_series(save(path, volume((4, 5)), affine(np.eye(3))), modality="MR")
    with pytest.raises(NoInputError):
        read_series(tmp_path / "absent.nii")


def test_cut_and_lying_files(tmp_path):
    path = save(tmp_path / "v.nii", volume(), affine(np.eye(3)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(InputError, match="480 bytes of voxels expected, got 473"):
        read_series(path, modality="MR")
    lie = bytearray(whole)
    lie[42:48] = np.array([30_000] * 3, "<i2").tobytes()  # dim
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(bytes(lie)))
    with pytest.raises(ResourceError, match="limit"):
        read_series(tmp_path / "bomb.nii.gz", modality="MR")
    path.write_bytes(whole)
    with pytest.raises(ResourceError, match="limit"):
        read_series(path, modality="MR", max_bytes=100)


def test_mutated_headers_give_images_or_our_errors(tmp_path):
    path = save(tmp_path / "v.nii", volume(), affine(np.eye(3)))
    whole = path.read_bytes()
    rng = np.random.default_rng(4)
    outcomes = set()
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            raw[int(rng.integers(4, 344))] = int(rng.integers(256))
        path.write_bytes(raw)
        try:
            s = read_series(path, modality="MR", max_bytes=1 << 24)
            assert np.isfinite(s.array).all()
            json.dumps(inspect(path).to_dict())
            outcomes.add("read")
        except ReconError as error:
            outcomes.add(type(error).__name__)
    assert outcomes >= {"read", "InputError", "UnsupportedError"}


def test_write_refusals_leave_nothing(tmp_path):
    s = read_series(save(tmp_path / "v.nii", volume(), affine(np.eye(3))), modality="MR")
    out = tmp_path / "recon"
    with pytest.raises(NumericalError, match="NaN"):
        derived(s, out, s.array * np.nan)
    with pytest.raises(GeometryError, match="templates"):
        derived(s, out, s.array[:2])
    assert not out.exists()
    derived(s, out)
    with pytest.raises(OutputError, match="not empty"):
        derived(s, out)
    assert sorted(p.name for p in out.iterdir()) == ["recon.json", "recon.nii.gz"]


def test_outputs_are_labelled_and_reproducible(tmp_path):
    s = read_series(save(tmp_path / "v.nii", volume(), affine(np.eye(3))), modality="MR")
    a, b = derived(s, tmp_path / "a" / "r"), derived(s, tmp_path / "b" / "r")
    assert a.paths[0].read_bytes() == b.paths[0].read_bytes()
    about = json.loads((tmp_path / "a" / "r" / "r.json").read_text())
    assert about["SyntheticData"] is True
    assert about["NotForDiagnosis"] is True
    assert about["GeneratedBy"][0]["method"] == "dds"
    assert b"RESEARCH ONLY" in bytes(nibabel.load(a.paths[0]).header["descrip"])


def test_nothing_of_the_header_names_a_patient(tmp_path):
    image = nibabel.Nifti1Image(volume(), affine(np.eye(3)))
    for name in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[name] = b"CANARY"
    path = tmp_path / "CANARY.nii"
    nibabel.save(image, path)
    raw = path.read_bytes()
    s = read_series(path, modality="MR")
    assert all(is_nifti_template(t) and b"CANARY" not in t for t in s.templates)
    derived(s, tmp_path / "recon")
    packed = gzip.decompress((tmp_path / "recon" / "recon.nii.gz").read_bytes())
    assert b"CANARY" not in packed
    assert "CANARY" not in (tmp_path / "recon" / "recon.json").read_text()
    assert "CANARY" not in str(inspect(path).to_dict())
    path.write_bytes(raw[:400])
    with pytest.raises(InputError) as caught:
        read_series(path, modality="MR")
    assert "CANARY" not in str(caught.value)


def test_patients_are_told_apart(tmp_path):
    keys = {
        read_series(
            save(tmp_path / f"{k}.nii", volume() + k, affine(np.eye(3))), modality="MR"
        ).patient_key
        for k in range(3)
    }
    assert len(keys) == 3


def test_study_of_a_nifti_image(tmp_path, capsys):
    """`recon study mri x.nii.gz` as for DICOM; what comes out is NIfTI on the same grid."""
    prior = tiny_prior(tmp_path / "mr.safetensors", "MR")
    data = (discs(4) + 1000).transpose(2, 1, 0)
    matrix = affine(np.diag([-1.0, -1.0, 1.0]), (6, 6, 5))
    path = save(tmp_path / "scan.nii.gz", data, matrix)
    common = ("--prior", prior, "--steps", "2", "--slices", "1:3")
    assert recon("study", "mri", path, "-o", tmp_path / "out", "--no-tv", *common) == 0
    image = nibabel.load(tmp_path / "out" / "recon" / "recon.nii.gz")
    assert image.shape == (SIZE, SIZE, 2)
    np.testing.assert_allclose(image.affine[:3, :3], matrix[:3, :3], atol=1e-4)
    np.testing.assert_allclose(image.affine[:3, 3], (matrix @ [0, 0, 1, 1])[:3], atol=1e-4)
    truth = nibabel.load(tmp_path / "out" / "truth" / "truth.nii.gz").get_fdata()
    np.testing.assert_allclose(truth, data[..., 1:3], rtol=1e-4)
    assert not list((tmp_path / "out").rglob("*.dcm"))
    # through a measurement file the templates travel along
    assert recon("simulate", "mri", path, "-o", tmp_path / "m.h5", "--slices", "1:3") == 0
    assert recon("reconstruct", tmp_path / "m.h5", "-o", tmp_path / "out2", *common[:4]) == 0
    again = nibabel.load(tmp_path / "out2" / "recon" / "recon.nii.gz")
    np.testing.assert_allclose(again.affine, image.affine, atol=1e-4)
    capsys.readouterr()
    assert recon("study", "inpaint", path, "-o", tmp_path / "out3", *common) == 4
    assert "Modality" in capsys.readouterr().err
    assert recon("inspect", path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["stacks"][0]["modality"] == "unknown"


def test_real_volume(shared_data):
    path = shared_data / "mr_brain" / "open_ms_patient04_study1_T1W.nii.gz"
    s = read_series(path, modality="MR")
    assert s.array.shape == (48, 256, 256)
    assert s.spacing == pytest.approx((3.0, 0.91, 0.91), abs=1e-3)
