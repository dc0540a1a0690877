"""``recon convert``: raw data of every format to a measurement file that reconstructs."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from cli_tools import recon, series, tiny_prior
from test_raw_formats import (
    BINS,
    images,
    kspace,
    lines,
    oversampled,
    smooth_coils,
    write_bart,
    write_ctpd,
    write_dxchange,
    write_fastmri,
    write_ismrmrd,
    xml,
)

from inverse.io.dicom import read_series
from inverse.io.measurement_file import read_measurement, write_measurement


def raw_file(name: str, folder: Path) -> Path:
    """One coil, or a few slices of discs."""
    if name == "ismrmrd":
        header = xml(patient="CANARY")
        return write_ismrmrd(folder / "CANARY.h5", lines(oversampled(images())), header)
    if name == "fastmri":
        return write_fastmri(folder / "CANARY.h5", oversampled(images())[:, 0], None, xml())
    if name == "bart":
        return write_bart(folder / "CANARY", kspace(images()))
    if name == "ctpd":
        return write_ctpd(folder / "CANARY", views=24)
    write_dxchange(folder / "CANARY.h5")
    return folder / "CANARY.h5"


FORMATS = {
    "ismrmrd": (2, 12, 10),
    "fastmri": (2, 12, 10),
    "bart": (2, 12, 10),
    "ctpd": (1, 24, 96),
    "dxchange": (3, 60, BINS),
}
OPTIONS = {"bart": ("--pixel-mm", "2"), "ctpd": ("--matrix", "32"), "dxchange": ("--matrix", "32")}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_a_measurement_file(tmp_path, capsys, name):
    path, out = raw_file(name, tmp_path), tmp_path / "m.h5"
    assert recon("convert", path, "-o", out, "--json", *OPTIONS.get(name, ())) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert (told["format"], tuple(told["shape"])) == (name, FORMATS[name])
    file = read_measurement(out)
    assert tuple(file.measurement.data.shape) == FORMATS[name]
    assert "simulation" not in file.measurement.provenance
    # neither the file's name nor what it says of the patient goes further
    assert b"CANARY" not in out.read_bytes()
    assert "CANARY" not in json.dumps({k: v for k, v in told.items() if k != "out"})
    assert "CANARY" not in printed.err


def test_several_coils_are_stored_with_their_maps(tmp_path):
    n = 48
    v, u = np.mgrid[:n, :n] / n - 0.5
    x = (((u / 0.35) ** 2 + (v / 0.42) ** 2 < 1) * smooth_coils(n))[None]
    write_bart(tmp_path / "ksp", kspace(x))
    out = tmp_path / "m.h5"
    assert recon("convert", tmp_path / "ksp", "-o", out, "--pixel-mm", "4") == 0
    measurement = read_measurement(out).measurement
    assert measurement.data.shape == (1, 4, n, n)
    assert measurement.operator.spec() == {"type": "sense", "shape": [n, n], "coils": 4}


def test_converted_data_are_reconstructed_as_measured(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = 100 * rng.random((1, 1, 64, 64))
    write_bart(tmp_path / "ksp", kspace(x))
    prior = tiny_prior(tmp_path / "mr.safetensors", "MR")
    assert recon("convert", tmp_path / "ksp", "-o", tmp_path / "m.h5", "--pixel-mm", "6") == 0
    code = recon("reconstruct", tmp_path / "m.h5", "-o", tmp_path / "out", "--prior", prior,
                 "--steps", "2")  # fmt: skip
    assert code == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["settings"]["measurement"]["source"] == "BART"
    assert "Measured data" in capsys.readouterr().out


def test_slices_limits_and_overwriting(tmp_path, capsys):
    path, out = raw_file("dxchange", tmp_path), tmp_path / "m.h5"
    common = ("convert", path, "-o", out, "--matrix", "32")
    assert recon(*common, "--slices", "1:3", "--centre", "61.3") == 0
    file = read_measurement(out)
    assert file.z_mm == (1.5, 3.0)
    assert file.measurement.provenance["rotation_centre_from"] == "given"
    assert recon(*common) == 6
    assert recon(*common, "--overwrite", "--limits", "0.001") == 0
    assert recon(*common, "--overwrite", "--slices", "9") == 4
    assert recon(*common, "--overwrite", "--slices", "x") == 2
    with h5py.File(path, "r+") as f:  # a small file that claims gigabytes
        del f["exchange/data"]
        f.create_dataset("exchange/data", (60, 3, 10**7), np.float32, chunks=(1, 1, 1000))
    capsys.readouterr()
    assert recon(*common, "--overwrite", "--limits", "0.5") == 7
    assert "--limits" in capsys.readouterr().err


def test_template_gives_the_patient_and_the_place(tmp_path, capsys):
    source = series(tmp_path / "images", 2, modality="MR")
    write_bart(tmp_path / "ksp", kspace(np.ones((2, 1, 64, 64))))
    common = ("convert", tmp_path / "ksp", "-o", tmp_path / "m.h5", "--pixel-mm", "6")
    assert recon(*common, "--template", source) == 0
    assert len(read_measurement(tmp_path / "m.h5").template) == 2
    other = series(tmp_path / "two" / "other", 3, modality="MR")
    assert recon(*common, "--overwrite", "--template", other) == 4
    series(tmp_path / "two" / "more", 2, modality="MR", seed=2)
    capsys.readouterr()
    assert recon(*common, "--overwrite", "--template", tmp_path / "two") == 4
    assert "give the folder or file of one series" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "code", "text"),
    [
        ("bart", (), 2, "--pixel-mm"),
        ("fastmri", ("--format", "ismrmrd"), 4, "dataset/xml"),
        ("ismrmrd", ("--contrast", "3"), 4, "no contrast 3"),
    ],
)
def test_refusals(tmp_path, capsys, name, arguments, code, text):
    path, out = raw_file(name, tmp_path), tmp_path / "m.h5"
    assert recon("convert", path, "-o", out, *arguments) == code
    assert text in capsys.readouterr().err
    assert not out.exists()


def test_nothing_there(tmp_path, capsys):
    assert recon("convert", tmp_path / "absent.h5", "-o", tmp_path / "m.h5") == 3
    (tmp_path / "x.h5").write_text("not HDF5")
    assert recon("convert", tmp_path / "x.h5", "-o", tmp_path / "m.h5") == 4
    assert "raw formats" in capsys.readouterr().err


def test_helical_scans_are_refused_with_the_reason(tmp_path, capsys):
    folder = write_ctpd(tmp_path / "in", views=4,
                        change=lambda ds, k: ds.add_new(0x70371009, "CS", "HELICAL"))  # fmt: skip
    assert recon("convert", folder, "-o", tmp_path / "m.h5") == 5
    assert "helical" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ismrmrd", "fastmri", "bart", "dxchange"])
def test_inspect_names_raw_data_and_what_takes_them(tmp_path, capsys, name):
    path = raw_file(name, tmp_path)
    path = path.with_suffix(".cfl") if name == "bart" else path
    assert recon("inspect", path, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    (found,) = told["raw"]
    assert (found["kind"], found["command"]) == (name, "convert")
    assert recon("inspect", path) == 0
    assert "recon convert" in capsys.readouterr().out


def test_inspect_describes_a_measurement_file(tmp_path, capsys):
    path = raw_file("fastmri", tmp_path)
    assert recon("convert", path, "-o", tmp_path / "m.h5") == 0
    capsys.readouterr()
    assert recon("inspect", tmp_path / "m.h5", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)["raw"]
    assert (told["kind"], told["operator"], told["shape"]) == ("measurement", "mri", [2, 12, 10])
    assert (told["simulated"], told["has_truth"]) == (False, False)
    assert recon("inspect", tmp_path / "m.h5") == 0
    assert "recon reconstruct" in capsys.readouterr().out
    (tmp_path / "m.h5").write_bytes((tmp_path / "m.h5").read_bytes()[:300])
    assert recon("inspect", tmp_path / "m.h5") == 4


# --- what the results inherit, and what inspect tells ------------------------------------------


def test_ismrmrd_geometry_reaches_the_dicom_output(tmp_path):
    """A point of an oblique scan lies in the written series where the header says."""
    n = 64
    read, phase = np.array([0.8, 0.6, 0.0]), np.array([0.0, 0.0, 1.0])
    centre, step = np.array([10.0, -20.0, 30.0]), 5.0
    normal = np.cross(phase, read)
    x = np.full((2, 1, n, n), 0.02, complex)
    at = [(40, 20), (12, 50)]  # row along the readout, column along phase encoding
    for k, (i, j) in enumerate(at):
        x[k, 0, i, j] = 1.0
    k_space = oversampled(x)
    readouts = [
        (
            {
                "slice": z, "kspace_encode_step_1": c, "position": centre + z * step * normal,
                "read_dir": read, "phase_dir": phase, "slice_dir": normal,
            },
            k_space[z, :, :, c],
        )
        for z in range(2)
        for c in range(n)
    ]  # fmt: skip
    header = xml(centre=n // 2)
    for old, new in (("<x>24</x>", f"<x>{2 * n}</x>"), ("<x>12</x>", f"<x>{n}</x>"),
                     ("<y>10</y>", f"<y>{n}</y>"), ("<maximum>9", f"<maximum>{n - 1}"),
                     ("<y>15.0</y>", f"<y>{n * 5.0}</y>"), ("<x>48.0</x>", f"<x>{n * 8.0}</x>"),
                     ("<x>24.0</x>", f"<x>{n * 4.0}</x>")):  # fmt: skip
        assert old in header
        header = header.replace(old, new)
    raw, out = write_ismrmrd(tmp_path / "scan.h5", readouts, header), tmp_path / "out"
    prior = tiny_prior(tmp_path / "mr.safetensors", "MR")
    assert recon("convert", raw, "-o", tmp_path / "m.h5") == 0
    code = recon("reconstruct", tmp_path / "m.h5", "-o", out, "--prior", prior, "--steps", "2")
    assert code == 0
    written = read_series(out / "baseline-zero-filled")
    assert written.spacing == pytest.approx((5.0, 4.0, 5.0))
    r, c = np.array(written.orientation).reshape(2, 3)
    np.testing.assert_allclose([r, c], [phase, read], atol=1e-6)
    for k, (i, j) in enumerate(at):
        row, column = np.unravel_index(written.array[k].argmax(), (n, n))
        place = written.positions[k] + column * 5.0 * r + row * 4.0 * c
        expected = (
            centre + k * step * normal + (i - n // 2) * 4.0 * read + (j - n // 2) * 5.0 * phase
        )
        np.testing.assert_allclose(place, expected, atol=1e-4)
    run = json.loads((out / "run.json").read_text())
    (note,) = [w["text"] for w in run["warnings"] if w["code"] == "NO_TEMPLATE"]
    assert "in the place that the raw data tell" in note


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        ({"orientation": [1, 0, 0, 0, 1, 0]}, "entries 'orientation'"),
        ({"orientation": [1, 0, 0, 1, 0, 0], "positions": [[0, 0, 0]]}, "orthonormal"),
        ({"orientation": [1, 0, 0, 0, 1, 0], "positions": [[0, 0, 0]]}, "1 positions"),
        ({"orientation": [1, 0, 0, 0, 1, 0], "positions": [[0, 0, 1], [0, 0, 0]]}, "ascend"),
        ("nonsense", "entries 'orientation'"),
    ],
)
def test_frames_that_are_none_are_refused(tmp_path, capsys, frame, text):
    from dataclasses import replace

    assert recon("convert", raw_file("fastmri", tmp_path), "-o", tmp_path / "a.h5") == 0
    measurement = read_measurement(tmp_path / "a.h5").measurement
    wrong = replace(measurement, provenance={"patient_frame": frame})
    write_measurement(tmp_path / "m.h5", wrong)
    capsys.readouterr()
    assert recon("reconstruct", tmp_path / "m.h5", "-o", tmp_path / "out") == 4
    assert text in capsys.readouterr().err


def test_inspect_explains_a_mixed_folder(tmp_path, capsys):
    """Images, raw data of every format and what is neither; names that may be a patient's stay."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in FORMATS:
        (folder / name).mkdir()
        raw_file(name, folder / name)
    series(folder / "images", 2)
    write_ctpd(folder / "helix", views=4,
               change=lambda ds, k: ds.add_new(0x70371009, "CS", "HELICAL"))  # fmt: skip
    assert recon("convert", folder / "fastmri" / "CANARY.h5", "-o", folder / "m.h5") == 0
    (folder / "notes.txt").write_text("no image")
    (folder / "damaged.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    capsys.readouterr()
    assert recon("inspect", folder, "--json") == 0
    printed = capsys.readouterr()
    assert "CANARY" not in printed.out + printed.err
    told = json.loads(printed.out)
    assert [s["slices"] for s in told["stacks"]] == [2]
    assert told["skipped"] == {"not DICOM": 1}
    kinds = {(r["kind"], r["command"]) for r in told["raw"]}
    assert kinds == {
        ("bart", "convert"), ("ctpd", "convert"), ("ctpd", None), ("damaged", None),
        ("dxchange", "convert"), ("fastmri", "convert"), ("ismrmrd", "convert"),
        ("measurement", "reconstruct"),
    }  # fmt: skip
    about = {r["kind"]: r for r in told["raw"] if r["command"]}
    assert about["bart"]["dimensions"] == {"READ": 12, "PHS1": 10, "SLICE": 2}
    assert (about["ismrmrd"]["matrix"], about["ismrmrd"]["readouts"]) == ([12, 10, 1], 20)
    assert about["ctpd"]["files"] == 24
    assert recon("inspect", folder) == 0
    out = capsys.readouterr().out
    assert "helical scans are not served" in out
    assert "recon convert FILE -o MEAS.h5 --pixel-mm MM" in out


def test_projections_are_no_images(tmp_path, capsys):
    folder = write_ctpd(tmp_path / "in", views=3)
    assert recon("inspect", folder) == 0
    assert f"next: recon convert {folder} -o MEAS.h5" in capsys.readouterr().out
    assert recon("study", "ct", folder, "-o", tmp_path / "out") == 5
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "use recon convert" in line
