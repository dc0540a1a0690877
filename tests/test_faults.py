"""The fault table: full disks, kills at any moment, hostile text, patient data, failing devices.

The table of docs/conformance.md says which test holds which threat; those that are not here are
with the code that they threaten.  ``RECON_KILLS=50`` sets at how many random moments a run is
killed.
"""

from __future__ import annotations

import dataclasses
import errno
import html
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import SIZE, recon, series, tiny_prior
from test_cli_resume import content

from inverse.io.measurement_file import read_measurement, write_measurement
from inverse.priors import load_prior, save_prior
from recon_cli.report.build import build

KILLS = int(os.environ.get("RECON_KILLS", "3"))
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    tiny_prior(root / "tiny.safetensors")
    series(root / "ct", 2)
    arguments = ["-o", root / "scan.h5", "--views", 8, "--quiet"]
    assert recon("simulate", "ct", root / "ct", *arguments) == 0
    return root


def reconstruct(root: Path, out: Path, *more: object) -> list[object]:
    return [
        "reconstruct", root / "scan.h5", "-o", out, "--prior", root / "tiny.safetensors",
        "--steps", 2, "--batch", 1, "--quiet", *more,
    ]  # fmt: skip


def shell(*arguments: object, **settings: object) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "recon_cli.app", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **settings,
    )


# --- disks -------------------------------------------------------------------------------------


def full_after(monkeypatch: pytest.MonkeyPatch, writes: int, number: int = 28) -> list[int]:
    """A disk that takes a number of writes, each of which ends with ``fsync``, and no more."""
    left, fsync = [writes], os.fsync

    def limited(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", limited)
    return left


def test_disk_that_runs_full_at_any_write(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        left = full_after(patch, 10**6)
        assert recon(*reconstruct(root, tmp_path / "out")) == 0
        writes = 10**6 - left[0]
    assert writes > 20
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    for k in sorted({0, 1, 2, 3, *range(5, writes, 6), writes - 1}):
        with monkeypatch.context() as patch:
            full_after(patch, k)
            # the sync of the folder around the output comes when the output stands already
            assert recon(*reconstruct(root, tmp_path / "out")) == 7, k
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["recon: error: no space left for the output; free some disk space"]
        if k < writes - 1:
            assert list(tmp_path.iterdir()) == [], k


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES], ids=["EIO", "EACCES"])
def test_disk_that_fails_at_any_write(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    for k in (0, 1, 4, 9, 15):
        with monkeypatch.context() as patch:
            full_after(patch, k, number)
            assert recon(*reconstruct(root, tmp_path / "out")) == 6, k
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("recon: error: "), line
        assert list(tmp_path.iterdir()) == [], k


def test_disk_that_is_full_keeps_the_earlier_prior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a prior has its name only when it is on disk."""
    path = tiny_prior(tmp_path / "tiny.safetensors")
    before = path.read_bytes()
    prior = load_prior(path)
    with monkeypatch.context() as patch:
        full_after(patch, 0)
        with pytest.raises(OSError, match="No space left"):
            save_prior(path, prior.net, dataclasses.replace(prior.card, name="other"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.safetensors"]


@pytest.mark.slow
def test_disk_that_is_full_in_earnest(root: Path, tmp_path: Path) -> None:
    """A file system of 60 kB; HDF5 on it used to end the process with a signal."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare to mount a small file system")
    commands = (
        ["simulate", "ct", root / "ct", "-o", tmp_path / "disk" / "scan.h5", "--views", 60],
        reconstruct(root, tmp_path / "disk" / "out", "--resume"),
    )
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=60k none "$0" || exit 99; ls -A "$0"; '
    for command in commands:
        words = " ".join(f"'{word}'" for word in [sys.executable, "-m", "recon_cli.app", *command])
        script += f'{words}; echo "code $?"; ls -A "$0"; '
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(tmp_path / "disk")],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("this system does not let tests mount a small file system")
    assert done.stdout.splitlines()[:1] == ["code 7"]
    assert "code 7" in done.stdout.splitlines()[1:]
    assert set(done.stdout.splitlines()) <= {"code 7", ".out.recon-work"}
    assert done.stderr.count("no space left for the output; free some disk space") == 2


# --- kills -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_random_moments(root: Path, tmp_path: Path) -> None:
    """Whenever the process is killed: no output or a whole one, and ``--resume`` completes it."""
    whole = tmp_path / "whole" / "out"
    slow = ["--samples", 6, "--steps", 6]
    assert recon(*reconstruct(root, whole, *slow)) == 0
    start = time.monotonic()
    shell(*reconstruct(root, tmp_path / "timed", *slow)).communicate()
    duration = time.monotonic() - start
    rng = random.Random(7)
    found: list[int] = []
    for k in itertools.count():
        if len(found) == KILLS:
            break
        assert k < 4 * KILLS, "the run is over before it is killed"
        out = tmp_path / f"{k}" / "out"
        out.parent.mkdir()
        process = shell(*reconstruct(root, out, *slow, "--resume"))
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if out.exists():
            assert content(out) == content(whole)
            continue
        left = [p.name for p in out.parent.iterdir()]
        assert left in ([], [".out.recon-work"])
        found.append(len(list(out.parent.glob("*/saved/*.npz"))))
        assert recon(*reconstruct(root, out, *slow, "--resume")) == 0
        assert content(out) == content(whole)
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    print(f"\n{KILLS} kills, finished pieces then: {found}")  # noqa: T201


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_process_and_leave_nothing(
    root: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = shell(*reconstruct(root, tmp_path / "out", "--steps", 10**6))
    while not list(tmp_path.glob(".out.recon-work/saved/direct.npz")):
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# --- computing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA error: unspecified launch failure"), "the GPU failed"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
)
def test_device_that_fails_in_the_middle(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    words: str,
) -> None:
    """Nothing is written; with ``--resume`` the finished batch stays and is used."""
    from inverse.priors import NetworkPrior

    denoise, calls = NetworkPrior.denoise, [0]

    def failing(self: NetworkPrior, x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise error
        return denoise(self, x_t, t)

    monkeypatch.setattr(NetworkPrior, "denoise", failing)
    assert recon(*reconstruct(root, tmp_path / "out", "--method", "dds")) == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []
    calls[0] = 0
    assert recon(*reconstruct(root, tmp_path / "out", "--method", "dds", "--resume")) == 7
    assert recon(*reconstruct(root, tmp_path / "out", "--method", "dds", "--resume")) == 0
    assert calls[0] == 4 + 2, "the batch that was finished is not computed again"


def test_prior_of_nan_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = load_prior(root / "tiny.safetensors")
    with torch.no_grad():
        next(iter(prior.net.parameters())).fill_(float("nan"))
    folder = tmp_path / "nan"
    save_prior(folder / "tiny.safetensors", prior.net, prior.card)
    shutil.copy(root / "scan.h5", folder)
    assert recon(*reconstruct(folder, tmp_path / "out")) in (9, 10)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["nan"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_data_that_are_not_finite_write_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    import h5py

    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("scan.h5", "tiny.safetensors"):
        shutil.copy(root / name, folder)
    with h5py.File(folder / "scan.h5", "r+") as f:
        f["data"][0, 0, 0] = value
    assert recon(*reconstruct(folder, tmp_path / "out")) in (4, 9)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# --- hostile text ------------------------------------------------------------------------------

PAYLOADS = (
    "<script>alert(1)</script>", "<ScRiPt/x>alert(1)</sCrIpT>", "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>", "<svg><script>alert(1)</script></svg>", "<iframe src='//x'></iframe>",
    "<object data='//x'></object>", "<embed src='//x'>", "<link rel=stylesheet href='//x'>",
    "<style>*{display:none}</style>", "<meta http-equiv=refresh content='0;url=//x'>",
    "<base href='//x'>", "<form action='//x'><input name=q></form>",
    "<a href='javascript:x'>y</a>", "<body onload=alert(1)>", "<details open ontoggle=alert(1)>",
    "<math><mtext></mtext></math>",
    "<template><b>x</b></template>", "</td></table><script>x</script>", "--><script>x</script>",
    "<!--", "]]><script>x</script>", "\"><script>x</script>", "' onmouseover='alert(1)",
    "\" onmouseover=\"alert(1)", "</title><script>x</script>", "</style><script>x</script>",
    "{{7*7}}", "{% raw %}<script>", "&lt;script&gt;&#60;script&#62;",
)  # fmt: skip
TAGS = (
    "PatientName", "PatientID", "PatientComments", "StudyDescription", "SeriesDescription",
    "ProtocolName", "InstitutionName", "StationName", "ReferringPhysicianName",
    "AccessionNumber", "StudyID", "ImageComments",
)  # fmt: skip


class Page(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment in the page: {data}")


def test_payloads_in_the_report_are_text(root: Path, tmp_path: Path) -> None:
    """Whatever stands in a measurement file, prior or run log is shown, and none of it works."""
    file = read_measurement(root / "scan.h5")
    everything = dict(enumerate(PAYLOADS))
    measurement = dataclasses.replace(
        file.measurement,
        provenance={
            "label": "".join(PAYLOADS),
            "source": {f"{k}{text}": text for k, text in everything.items()},
        },
    )
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    write_measurement(hostile / "scan.h5", measurement, file.truth, file.template, file.z_mm)
    tiny_prior(
        hostile / "tiny.safetensors",
        name=PAYLOADS[0],
        training_data=tuple({"name": text, text: "x"} for text in PAYLOADS),
        limits=PAYLOADS,
    )
    assert recon(*reconstruct(root, tmp_path / "clean")) == 0
    assert recon(*reconstruct(hostile, tmp_path / "out")) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    run["warnings"] += [{"code": text, "text": text} for text in PAYLOADS]
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    build(tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page, clean = Page(text), Page((tmp_path / "clean" / "report.html").read_text())
    assert page.tags <= clean.tags
    assert page.attributes <= clean.attributes
    for payload in PAYLOADS:
        assert payload in page.text
    assert html.escape(PAYLOADS[0]) in text


# --- patient data ------------------------------------------------------------------------------

CANARY = "Qzwxecanary"


def hostile_series(folder: Path) -> Path:
    """A series of which every text header is a payload or a canary; its folder is named so too."""
    from pydicom import dcmread
    from pydicom.datadict import dictionary_VR

    path = series(folder / f"{CANARY} Anna", 2)
    for k, file in enumerate(sorted(path.iterdir())):
        ds = dcmread(file)
        for j, tag in enumerate(TAGS):
            text = CANARY + PAYLOADS[(len(TAGS) * k + j) % len(PAYLOADS)]
            setattr(ds, tag, text[: 16 if dictionary_VR(tag) == "SH" else 60])
        ds.PatientBirthDate = "19010203"
        ds.OtherPatientIDs = CANARY
        ds.private_block(0x0011, CANARY, create=True).add_new(1, "LO", CANARY)
        ds.save_as(file)
        file.rename(path / f"{CANARY}-{k}.dcm")
    return path


def pdf_text(content: bytes) -> str:
    """A PDF with its streams unpacked and the letters of its words put together."""
    parts = [content]
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL):
        with suppress(zlib.error):
            parts.append(zlib.decompress(stream))
    text = b"\n".join(parts).decode("latin1")
    text = re.sub(r"\)\s*-?[\d.]+\s*\(", "", text)  # kerning between letters
    assert "Research use only" in text
    return text


def test_patient_data_stay_in_dicom(root: Path, tmp_path: Path) -> None:
    """Canaries in headers, file and folder names reach no log, JSON, report, traceback or name."""
    from pydicom import dcmread

    path = hostile_series(tmp_path / "in")
    prior = root / "tiny.safetensors"
    work = tmp_path / "out"
    uid = dcmread(next(path.iterdir())).SeriesInstanceUID
    common = ["--prior", prior, "--steps", 2, "--verbose", "--debug", "--json"]
    commands: list[list[object]] = [
        ["simulate", "ct", path, "-o", work / "scan.h5", "--views", 8, "--json", "--debug"],
        [
            "study",
            "ct",
            path,
            "-o",
            work / "study",
            "--no-tv",
            "--views",
            8,
            "--pdf",
            "--series",
            uid,
            *common,
        ],
        ["reconstruct", work / "scan.h5", "-o", work / "raw", *common],
        ["inspect", path, "--json", "--debug"],
        ["study", "mri", path, "-o", work / "no", *common],
        ["study", "ct", path, "-o", work / "no", "--dry-run", "--views", 8, *common],
    ]
    program = (
        "import json, sys\n"
        "from recon_cli.app import main\n"
        "print('codes', [main(command) for command in json.loads(sys.argv[1])])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([[str(a) for a in c] for c in commands])],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # the user's own argument may be repeated to the user, and nothing else
    told = (done.stdout + done.stderr).replace(str(path), "IN")
    assert "codes [0, 0, 0, 0, 4, 0]" in told
    files = [p for p in work.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".h5", ".dcm", ".json", ".html", ".npy", ".pdf"}
    for file in files:
        assert CANARY not in str(file.relative_to(work))
        if file.suffix == ".pdf":
            told += pdf_text(file.read_bytes())
        elif file.suffix not in (".dcm", ".h5", ".npy"):
            told += file.read_text()
    assert not {"iframe", "object"} & Page((work / "study" / "report.html").read_text()).tags
    for canary in (CANARY, CANARY.upper(), "19010203", uid):
        assert canary not in told
    assert "Traceback" in told
    assert any(CANARY.encode() in p.read_bytes() for p in files if p.suffix == ".dcm"), "planted"


# --- a server ----------------------------------------------------------------------------------


def test_images_survive_a_picture_archive(root: Path, tmp_path: Path) -> None:
    """Sent by ``storescu`` to Orthanc on loopback and fetched over REST: the pixels are equal."""
    if not (shutil.which("Orthanc") and shutil.which("storescu")):
        pytest.skip("Orthanc or storescu is not installed (apt install orthanc dcmtk)")
    import socket
    import urllib.request

    from pydicom import dcmread

    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    dicom, rest = ports
    settings = {
        "StorageDirectory": str(tmp_path / "db"),
        "IndexDirectory": str(tmp_path / "db"),
        "DicomPort": dicom,
        "HttpPort": rest,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowStore": True,
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    assert recon(*reconstruct(root, tmp_path / "out")) == 0
    server = subprocess.Popen(
        ["Orthanc", str(tmp_path / "orthanc.json")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{rest}/{path}") as answer:
            return bytes(answer.read())

    try:
        for _ in range(100):
            try:
                get("system")
                break
            except OSError:
                time.sleep(0.1)
        send = ["storescu", "-aec", "ORTHANC", "127.0.0.1", str(dicom), "+sd"]
        subprocess.run([*send, str(tmp_path / "out" / "recon")], check=True)
        there = json.loads(get("instances"))
        assert len(there) == 2
        ours = {
            ds.SOPInstanceUID: ds.pixel_array
            for ds in map(dcmread, (tmp_path / "out" / "recon").iterdir())
        }
        for name in there:
            (tmp_path / "back.dcm").write_bytes(get(f"instances/{name}/file"))
            ds = dcmread(tmp_path / "back.dcm")
            np.testing.assert_array_equal(ds.pixel_array, ours[ds.SOPInstanceUID])
            assert ds.pixel_array.shape == (SIZE, SIZE)
    finally:
        server.terminate()
        server.wait(timeout=30)


# --- the document ------------------------------------------------------------------------------


def test_the_table_of_threats_names_tests_that_exist() -> None:
    text = (REPOSITORY / "docs" / "conformance.md").read_text()
    section = text[text.index("## 7. What goes wrong") :].split("\n## 8.")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 18
    for row in rows:
        files = re.split(r"`(test_\w+\.py)`: ", row[3])[1:]
        assert files, row
        for name, listed in zip(files[::2], files[1::2], strict=True):
            there = (REPOSITORY / "tests" / name).read_text()
            for test in re.findall(r"`(test_\w+)`", listed):
                assert f"def {test}(" in there, test
