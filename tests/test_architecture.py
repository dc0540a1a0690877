"""Who may import whom: read from the code, so that the structure stays what the design says."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("inverse", "recon_cli", "phantoms")

# room of `inverse` -> rooms it may import
ALLOWED = {
    "errors": set(),
    "sde": {"errors"},
    "metrics": {"errors"},
    "priors": {"errors", "sde"},
    "sampling": {"errors", "sde", "priors"},
    "launch": set(),
    "memory": set(),
    "volumes": {"errors"},
    "training": {"errors", "launch", "sde", "priors", "io"},
    "bridges": {"errors", "sde", "priors", "operators"},
    "operators": {"errors"},
    "measurement": {"errors", "operators", "volumes"},
    "classical": {"errors", "operators", "measurement"},
    "io": {"errors", "operators", "measurement", "volumes"},
    "trust": {"errors", "sde", "priors", "operators", "measurement", "metrics"},
    "posterior": {
        "errors",
        "sde",
        "priors",
        "sampling",
        "operators",
        "measurement",
        "classical",
    },
    "reconstruct": {
        "errors",
        "memory",
        "sde",
        "priors",
        "sampling",
        "operators",
        "measurement",
        "posterior",
        "volumes",
    },
}
# third-party package -> the only files that may import it
CONFINED = {
    "astra": ("inverse/operators/ct.py",),
    "pydicom": ("inverse/io/dicom", "inverse/io/ctpd.py"),
    "typer": ("recon_cli/",),
    "rich": ("recon_cli/",),
    "jinja2": ("recon_cli/",),
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_design(path: Path) -> None:
    relative = path.relative_to(ROOT)
    package = relative.parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        if package == "inverse":
            assert top not in {"recon_cli", "phantoms"}, name
            room = relative.parts[1].removesuffix(".py")
            target = name.split(".")[1] if name.startswith("inverse.") else None
            if room != "__init__" and target in ALLOWED and target != room:
                assert target in ALLOWED[room], f"{room} imports {name}"
        if package == "phantoms":
            assert top != "recon_cli", name
        for confined, homes in CONFINED.items():
            if top == confined:
                assert any(str(relative).startswith(home) for home in homes), name


@pytest.mark.parametrize(
    "module",
    [
        "inverse",
        "inverse.priors",
        "inverse.sampling",
        "inverse.posterior",
        "inverse.classical",
        "inverse.training",
        "inverse.trust",
        "phantoms",
        "inverse.io.dicom",
    ],
)
def test_public_names_exist(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", []):
        assert hasattr(loaded, name), f"{module}.{name}"


def test_heavy_optional_packages_are_imported_when_needed() -> None:
    """Training and sampling run where astra, pydicom and typer are absent."""
    import subprocess
    import sys

    code = (
        "import sys\n"
        "import inverse, inverse.training.loop, inverse.operators.mri, inverse.io.dicom\n"
        "heavy = {'astra', 'pydicom', 'typer', 'h5py', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
