"""``run.json``: everything needed to tell what was run and to run it again.

It names no patient, unless the user asks with ``--include-phi``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from recon_cli.console import log, plain_json, print_json

if TYPE_CHECKING:
    from inverse.priors import NetworkPrior

__all__ = ["ASIDE", "RunLog", "nameless", "sha256_of", "sync", "versions", "whole_file",
           "write_json", "write_whole"]  # fmt: skip

SCHEMA_VERSION = 1
ARGV: list[str] = []
"""The arguments of the running command, as the shell gave them."""
ASIDE = ("out", "overwrite", "resume", "limits", "prior", "device", "max-memory")
"""Options that the result does not depend on, or that are compared by what they name."""
OPTIONS: dict[str, Any] = {}
"""Its options with their values, from the command line, ``--config`` or defaults."""


def versions() -> dict[str, str]:
    """Versions of the toolkit and of what its numbers depend on."""
    from inverse import __version__

    found = {"recon-sde": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "scipy", "astra-toolbox", "pydicom"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is complete or absent, also after a loss of power."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by :func:`whole_file`."""
    with whole_file(path) as stream:
        stream.write(content)


def sha256_of(path: Path) -> dict[str, Any]:
    """Hash of a file, or of a folder's files (contents only, so that names do not matter)."""
    if path.is_file():
        return {"files": 1, "sha256": _file_hash(path)}
    digests = sorted(_file_hash(p) for p in path.rglob("*") if p.is_file() and not p.is_symlink())
    return {
        "files": len(digests),
        "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
    }


def nameless(text: str) -> str:
    """A value without what may tell patients: a path's last part, the hash of a UID.

    Hashes are those of ``recon inspect``, which ``--series`` takes too.
    """
    if re.fullmatch(r"[0-2](\.\d+){2,}", text):
        return hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path(text).name if "/" in text else text


def write_json(path: Path, value: Any) -> None:
    """Write JSON with non-finite numbers as null; the file is complete or absent."""
    write_whole(path, (json.dumps(plain_json(value), indent=2) + "\n").encode())


class RunLog:
    """Collects what ``run.json`` holds while a command runs.

    Args:
        command: name of the command.
        paths: paths among the arguments and what to write in their place, since folder names
            often hold patients' names.
    """

    def __init__(self, command: str, paths: Mapping[Path, str]) -> None:
        self.command = command
        self.started = datetime.now(UTC)
        self.resumed = False
        self.options = dict(OPTIONS)
        self.warnings: list[dict[str, str]] = []
        self.timings: dict[str, float] = {}
        self.settings: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.prior: dict[str, Any] | None = None
        self.seed = 0
        self.device = "cpu"
        self.simulation = False
        self.patient: dict[str, str] = {}
        self._paths = dict(paths)

    @property
    def include_phi(self) -> bool:
        """Whether patient data may be written."""
        return bool(self.options.get("include-phi"))

    def identify(self, template: bytes) -> None:
        """Keep who is imaged, if the user asked for it."""
        from inverse.io.dicom import patient_of

        if self.include_phi:
            self.patient = patient_of(template)

    def is_complete(
        self, out: Path, source: Path, prior: NetworkPrior | None, *, as_json: bool
    ) -> bool:
        """Whether a folder holds the finished output of this very run already, and say so.

        Args:
            out: the folder.
            source: the input, whose content counts.
            prior: the prior asked for.
            as_json: print the result.
        """
        try:
            there = json.loads((out / "run.json").read_text())
            metrics = json.loads((out / "metrics.json").read_text())
            mine = dict(plain_json(self.options))
            same = there["command"] == self.command and there["versions"] == versions()
            for name in mine.keys() | there["options"].keys():
                aside = name in ASIDE and (name != "prior" or prior is not None)
                same &= aside or mine.get(name) == there["options"].get(name)
            same &= prior is None or there["prior"]["sha256"] == prior.card.sha256
            same = same and list(there["inputs"].values()) == [sha256_of(source)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if not same:
            return False
        log(f"'{out}' is already complete: nothing to do")
        if as_json:
            print_json({"out": str(out), **metrics, "warnings": there["warnings"]})
        return True

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the run, after which freed memory goes back to the system."""
        from inverse.memory import trim

        start = time.monotonic()
        try:
            yield
        finally:
            trim()
            self.timings[name] = round(self.timings.get(name, 0.0) + time.monotonic() - start, 3)

    def warn(self, code: str, text: str) -> None:
        """Record a warning and show it."""
        self.warnings.append({"code": code, "text": text})
        log(f"warning: {text} [{code}]")

    def notes(self, notes: Sequence[tuple[str, str]]) -> None:
        """Record the (code, text) findings of a reader."""
        for code, text in notes:
            self.warn(code, text)

    def _argument(self, argument: str) -> str:
        """A known path (``DIR``, ``--option=DIR``, ``-oDIR``) by its word, another by its name."""
        for path, word in self._paths.items():
            for prefix in ("", "-o", argument.partition("=")[0] + "="):
                rest = argument.removeprefix(prefix)
                if argument.startswith(prefix) and rest and Path(rest) == path:
                    return prefix + word
        option, equals, value = argument.rpartition("=")
        return f"{option}{equals}{nameless(value)}"

    def to_dict(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        result = {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "argv": ["recon", *(a if self.include_phi else self._argument(a) for a in ARGV)],
            "options": self.options,
            "started": self.started.isoformat(timespec="seconds"),
            "resumed": self.resumed,
            "retrospective_simulation": self.simulation,
            "versions": versions(),
            "platform": f"{platform.system()} {platform.machine()}",
            "device": self.device,
            "seed": self.seed,
            "settings": self.settings,
            "inputs": self.inputs,
            "prior": self.prior,
            "outputs": self.outputs,
            "warnings": self.warnings,
            "timings_seconds": self.timings,
        }
        if self.patient:
            result["patient"] = self.patient
        return dict(plain_json(result))
