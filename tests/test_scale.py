"""Volumes on the command line: coupling, and peak memory that does not grow with the slices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_tools import recon, series, tiny_prior

from inverse.io.dicom import read_series

REPOSITORY = Path(__file__).parent.parent
PROGRAM = """
import resource, sys
from pathlib import Path
import torch
from inverse.measurement import Measurement
from inverse.operators.mask import Mask
from inverse.priors.denoiser import Denoiser, expand
from inverse.reconstruct import Plan
from inverse.sde import VE
from recon_cli.output import Batches, working_folder

class Shrink(Denoiser):
    def denoise(self, x_t, t):
        return expand(1 / (1 + self.sde.sigma(t) ** 2), x_t) * x_t

torch.set_num_threads(1)
slices, side, folder = int(sys.argv[1]), 128, Path(sys.argv[2])
mask = torch.zeros(side, side, dtype=torch.bool)
mask[::2] = True
data = torch.zeros(()).expand(slices, side, side)
seen = Measurement(Mask(mask), data, torch.tensor(0.1), "MR", (1.0, 1.0))
plan = Plan(seen, Shrink(VE(0.01, 10.0)), method="diffpir", steps=2, samples=8, batch=8)
with working_folder(folder / "out", overwrite=False, resume=True) as work:
    batches = Batches(work.saved)
    plan.run(batches, claim=batches.claim)
    result = plan.result(batches, keep_samples=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, float(result.std.mean()))
"""


def peak_mib(slices: int, folder: Path) -> int:
    """Of a process that reconstructs some slices, eight samples each."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(slices), str(folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout.split()[0])


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """1024 samples are 67 MB; the data, mean and std of 112 more slices are 22 MB."""
    few = peak_mib(16, tmp_path / "few")
    many = peak_mib(128, tmp_path / "many")
    assert many - few < 45


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scale")
    tiny_prior(root / "tiny.safetensors")
    series(root / "ct", 4)
    arguments = ["-o", root / "scan.h5", "--views", 8, "--quiet"]
    assert recon("simulate", "ct", root / "ct", *arguments) == 0
    return root


def reconstruct(root: Path, out: Path, *more: object) -> int:
    return recon(
        "reconstruct", root / "scan.h5", "-o", out, "--prior", root / "tiny.safetensors",
        "--steps", 2, "--quiet", *more,
    )  # fmt: skip


def test_coupling_on_the_command_line(root: Path, tmp_path: Path) -> None:
    images = {}
    for kind in ("none", "noise", "tv"):
        assert reconstruct(root, tmp_path / kind, "--coupling", kind) == 0
        images[kind] = read_series(tmp_path / kind / "recon").array
        settings = json.loads((tmp_path / kind / "run.json").read_text())["settings"]
        assert settings["reconstruction"].get("coupling", "none") == kind
    assert not np.array_equal(images["none"], images["noise"])
    assert not np.array_equal(images["none"], images["tv"])
    steps = {kind: np.square(np.diff(image, axis=0)).sum() for kind, image in images.items()}
    assert steps["tv"] < steps["none"]


def test_planes_need_priors_and_cubes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = root / "tiny.safetensors"
    for more, code, word in (
        (["--coupling", "planes"], 2, "since those bundled know axial ones only"),
        (["--plane-prior", f"coronal={tiny}"], 2, "is for --coupling planes"),
        (["--coupling", "planes", "--plane-prior", f"oblique={tiny}"], 2, "got oblique"),
        (["--coupling", "planes", "--plane-prior", f"coronal={tiny}"], 5, "cubic voxels"),
    ):
        assert reconstruct(root, tmp_path / "out", *more) == code
        assert word in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_not_enough_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reconstruct(root, tmp_path / "out", "--max-memory", 0.02) == 7
    assert "one image at a time needs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert reconstruct(root, tmp_path / "out", "--max-memory", 1000) == 0
    assert reconstruct(root, tmp_path / "plain") == 0
    images = [read_series(tmp_path / name / "recon").array for name in ("out", "plain")]
    np.testing.assert_array_equal(*images)
