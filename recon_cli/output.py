"""Output folders that are complete or absent, and runs that continue where they were cut short.

While a command runs, everything lies in a hidden folder beside the output::

    .NAME.recon-work/
        lock            held by the running process; the system lets go of it however that ends
        manifest.json   what the run is: options, hashes of inputs, prior and data, versions
        saved/*.npz     finished pieces, each whole on disk before the next is begun
        claims/*        pieces that a process of this run computes, or has computed
        out/            the output, which takes the name NAME in one step at the very end

A run that ends by itself, be it by an error or Ctrl-C, takes the hidden folder away, unless
``--resume`` asked to keep finished pieces.  A killed one cannot; the next run finds them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import threading
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from recon_cli.console import log, plain_json
from recon_cli.runlog import sync, whole_file, write_whole

if TYPE_CHECKING:
    from inverse.reconstruct import Batch
    from inverse.volumes import Allocate, Volume

__all__ = [
    "NOTHING_SAVED",
    "Batches",
    "Saved",
    "Work",
    "check_file",
    "output_folder",
    "working_folder",
]


def _refuse(text: str) -> Exception:
    from inverse.errors import OutputError

    return OutputError(text)


def check_file(path: Path, overwrite: bool) -> None:
    """Refuse an output file that exists.

    Raises:
        OutputError: it exists and ``overwrite`` is false, or is not a file.
    """
    if path.is_dir():
        raise _refuse(f"output '{path}' is a folder; give a file name")
    if path.exists() and not overwrite:
        raise _refuse(f"output file '{path}' exists; give another -o, or --overwrite")
    _check_place(path)


def _check_place(out: Path) -> None:
    """Refuse an output whose folder cannot be made or written, before any work is done."""
    folder = next((p for p in out.absolute().parents if p.exists()), Path("/"))
    if not folder.is_dir():
        raise _refuse(f"output '{out}' cannot be written ('{folder}' is a file); give another -o")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refuse(
            f"output '{out}' cannot be written (no permission in '{folder}'); give another -o"
        )


def _check_folder(out: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse what must not be replaced, before any work is done."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise _refuse(f"output '{out}' exists and is not a folder; give another -o")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise _refuse(f"output folder '{out}' is not empty; give another -o, or --overwrite")
    if not (out / "run.json").is_file():
        raise _refuse(
            f"output folder '{out}' was not made by recon (it has no run.json), so --overwrite "
            "does not touch it; give another -o"
        )
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise _refuse(
                f"the input '{path}' lies in the output folder '{out}', which --overwrite would "
                "remove; give another -o"
            )


# --- finished pieces ---------------------------------------------------------------------------


class Saved:
    """Finished pieces of a run: arrays and plain JSON values by name.

    Args:
        folder: the hidden folder; ``None`` for a run that keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 0 if self.folder is None else len(list(self.folder.glob("saved/*.npz")))

    def agree(self, manifest: Mapping[str, Any], started: datetime) -> datetime:
        """Write down what this run is; of one that continues, check that it is the same.

        Args:
            manifest: whatever the bits of the result depend on; plain JSON values.
            started: when this run began.

        Returns:
            When the run that it continues began; ``started`` where there is none.

        Raises:
            OutputError: the pieces are of a run of other settings, inputs or versions.
        """
        if self.folder is None:
            return started
        path = self.folder / "manifest.json"
        mine = plain_json(manifest)
        if not path.is_file() and not len(self):
            text = json.dumps({"started": started.isoformat(), "run": mine}, indent=2)
            write_whole(path, text.encode())
            return started
        try:
            there = json.loads(path.read_text())
            theirs, begun = dict(there["run"]), datetime.fromisoformat(there["started"])
        except (OSError, ValueError, KeyError, TypeError):
            raise _refuse(
                f"'{path}' is damaged, so the run cannot be continued; start over with --overwrite"
            ) from None
        differing = [k for k in sorted(mine | theirs) if mine.get(k) != theirs.get(k)]
        if differing:
            raise _refuse(
                f"cannot continue the run that was cut short, since it differs in "
                f"{', '.join(_difference(k, theirs.get(k), mine.get(k)) for k in differing)}; "
                "repeat its command line with --resume, or start over with --overwrite"
            )
        return begun

    def get(
        self, name: str, allocate: Allocate | None = None
    ) -> tuple[dict[str, Volume], Any] | None:
        """A piece, or ``None`` where it is absent or damaged.

        Args:
            name: of the piece.
            allocate: where its volumes go, arrays of three axes; memory by default.
        """
        if self.folder is None:
            return None
        try:
            # members carry checksums, which reading to their ends compares
            with zipfile.ZipFile(self.folder / "saved" / f"{name}.npz") as archive:
                arrays = {
                    member.filename.removesuffix(".npy"): _read_member(archive, member, allocate)
                    for member in archive.infolist()
                }
            return arrays, json.loads(arrays.pop("meta")[:].tobytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            log(f"the finished piece '{name}' is damaged and is computed again")
            return None

    def put(self, name: str, arrays: Mapping[str, Volume], meta: Any) -> None:
        """Keep a piece; it is on disk when this returns."""
        import numpy as np

        if self.folder is None:
            return
        text = np.frombuffer(json.dumps(meta, allow_nan=False).encode(), np.uint8)
        with (
            whole_file(self.folder / "saved" / f"{name}.npz") as stream,
            zipfile.ZipFile(stream, "w") as archive,
        ):
            for key, array in {"meta": text, **arrays}.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    write_npy(member, array)

    def claim(self, name: str) -> bool:
        """Whether this process is the first of the run's to ask for a piece."""
        if self.folder is None:
            return True
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            os.close(os.open(self.folder / "claims" / name, flags, 0o600))
        except FileExistsError:
            return False
        return True


def _read_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, allocate: Allocate | None
) -> Volume:
    """An array of a piece, slice by slice."""
    import numpy as np

    with archive.open(member) as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        array: Volume
        if allocate is not None and len(shape) == 3:
            array = allocate(shape, dtype)
            each = dtype.itemsize * math.prod(shape[1:])
            for k in range(shape[0]):
                array[k] = np.frombuffer(stream.read(each), dtype).reshape(shape[1:])
        else:
            content = stream.read(dtype.itemsize * math.prod(shape))
            array = np.frombuffer(bytearray(content), dtype).reshape(shape)
        if stream.read(1):
            raise ValueError("longer than its header says")
    return array


def write_npy(stream: IO[bytes], array: Volume, dtype: str | None = None) -> None:
    """Write an array of at least one axis in NumPy's format, slice by slice."""
    import numpy as np

    kind = array.dtype if dtype is None else np.dtype(dtype)
    descr = np.lib.format.dtype_to_descr(kind)
    header = {"descr": descr, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for part in array if array.ndim > 1 else [array]:
        stream.write(np.asarray(part, kind, order="C").tobytes())


NOTHING_SAVED = Saved(None)


def _difference(name: str, before: Any, now: Any) -> str:
    """What differs, with its values where they are short."""
    short = all(
        isinstance(v, str | int | float | bool) and len(str(v)) < 24 for v in (before, now)
    )
    return f"{name} ({before} then, {now} now)" if short else name


class Batches(MutableMapping[int, "Batch"]):
    """The finished batches of `inverse.reconstruct`, as pieces of a run.

    They lie on disk, not in memory, unless the run keeps nothing.  One is written while the next
    is computed; what went wrong is told when that one comes, or by :meth:`finish`.
    """

    def __init__(self, saved: Saved) -> None:
        self._saved = saved
        self._here: dict[int, Batch] = {}  # where nothing is kept on disk
        self._writing: tuple[int, Future[None]] | None = None

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self._find(number) is not None

    def __getitem__(self, number: int) -> Batch:
        from inverse.memory import trim

        trim()  # of what was done with the one before
        found = self._find(number)
        if found is None:
            raise KeyError(number)
        return found

    def __setitem__(self, number: int, batch: Batch) -> None:
        from inverse.memory import trim

        trim()  # of what its computation has freed
        if self._saved.folder is None:
            self._here[number] = batch
            return
        self.finish()
        meta = [batch.images, batch.operator_calls, batch.seconds]
        samples = batch.samples.resolve_conj().numpy()
        writer = ThreadPoolExecutor(1)
        piece = writer.submit(self._saved.put, self._name(number), {"samples": samples}, meta)
        writer.shutdown(wait=False)
        self._writing = number, piece

    def finish(self) -> None:
        """Wait until all pieces are on disk.

        Raises:
            BaseException: whatever ended the writing of the last one.
        """
        if self._writing is not None:
            (_, piece), self._writing = self._writing, None
            piece.result()

    def __delitem__(self, number: int) -> None:
        raise TypeError("finished batches are not taken back")

    def __iter__(self) -> Iterator[int]:
        self.finish()
        if self._saved.folder is None:
            return iter(self._here)
        names = (path.stem for path in self._saved.folder.glob("saved/batch-*.npz"))
        return iter(sorted(int(name.removeprefix("batch-")) for name in names))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def claim(self, number: int) -> bool:
        """Whether this process shall compute a batch, which no other of the run does then."""
        return self._saved.claim(self._name(number))

    def _name(self, number: int) -> str:
        return f"batch-{number:06d}"

    def _find(self, number: int) -> Batch | None:
        import torch

        from inverse.reconstruct import Batch

        if self._saved.folder is None:
            return self._here.get(number)
        if self._writing is not None and self._writing[0] == number:
            self.finish()
        piece = self._saved.get(self._name(number))
        if piece is None:
            return None
        arrays, (images, calls, seconds) = piece
        samples = torch.from_numpy(arrays["samples"])
        return Batch(samples, int(images), int(calls), float(seconds))


# --- the hidden folder -------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Where a command puts its output, and what it has finished already."""

    folder: Path
    saved: Saved


def _check_left(out: Path, found: int, resume: bool | None, overwrite: bool) -> None:
    """Refuse to pass over what a run that was cut short left."""
    if found and not resume and not overwrite:
        raise _refuse(
            f"a run to '{out}' was cut short and left finished pieces; continue it with "
            "--resume, or start over with --overwrite"
        )


@contextmanager
def working_folder(
    out: Path,
    *,
    overwrite: bool,
    inputs: Sequence[Path] = (),
    resume: bool | None = None,
    dry: bool = False,
) -> Iterator[Work]:
    """A hidden folder beside ``out`` that takes its name when the block ends without an error.

    Args:
        out: the folder that the user asked for.
        overwrite: replace an earlier output there, at the very end, and drop what a run that was
            cut short left.
        inputs: paths that must not lie inside a folder that is replaced.
        resume: continue a run that was cut short, and keep finished pieces if this one is;
            ``None`` for commands that cannot.
        dry: refuse what would be refused, and touch nothing; the folder is not there.

    Raises:
        OutputError: ``out`` is not empty and may not be replaced, or cannot be written; a run
            that was cut short is there; or one that goes on.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow links in the parents
    hidden = out.with_name(f".{out.name}.recon-work")
    _check_place(out)
    if dry:
        _check_folder(out, overwrite, inputs)
        _check_left(out, len(Saved(hidden)), resume, overwrite)
        yield Work(hidden / "out", NOTHING_SAVED)
        return
    made = [p for p in (hidden, *hidden.parents) if not p.exists()]
    with _uninterrupted():
        lock = _claim(hidden, out, made)
    keep = True
    try:
        _restore(hidden, out)
        _check_folder(out, overwrite, inputs)
        found, stale = len(Saved(hidden)), (hidden / "out").exists()
        _check_left(out, found, resume, overwrite)
        if found and resume:
            log(f"continuing a run that was cut short, with {found} finished pieces")
        elif stale:
            log("removing what a run that was cut short had left")
        keep = bool(resume)
        _prepare(hidden, keep)
        yield Work(hidden / "out", Saved(None if resume is None else hidden))
        with _uninterrupted():
            _publish(hidden, out)
        made, keep = [], False
    finally:
        with _uninterrupted():
            if not (keep and len(Saved(hidden))):
                shutil.rmtree(hidden, ignore_errors=True)
            elif resume:
                for name in ("out", "claims"):
                    shutil.rmtree(hidden / name, ignore_errors=True)
                log("finished pieces are kept; repeat the command with --resume to continue")
            os.close(lock)
            _remove_empty(made)


@contextmanager
def output_folder(out: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """As `working_folder`, for commands that are over too soon to be continued."""
    with working_folder(out, overwrite=overwrite, inputs=inputs) as work:
        yield work.folder


def _claim(hidden: Path, out: Path, made: Sequence[Path]) -> int:
    """Make the hidden folder, or take over one that nobody holds; the lock's descriptor."""
    try:
        hidden.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir(mode=0o700, exist_ok=True)
        if hidden.is_symlink():
            raise OSError(errno.ELOOP, f"'{hidden.name}' beside it is a link")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(hidden / "lock", flags, 0o600)
    except OSError as error:
        _remove_empty(made)
        raise _refuse(
            f"output folder '{out}' cannot be written ({error.strerror}); give another -o"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), (hidden / "lock").stat()):
            return lock
    except OSError:
        pass
    os.close(lock)
    raise _refuse(f"another run is writing '{out}' now; wait for it, or give another -o")


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that hold nothing, innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _prepare(hidden: Path, keep: bool) -> None:
    """An empty place for the output; finished pieces stay or go."""
    for name in ("out", "claims"):
        shutil.rmtree(hidden / name, ignore_errors=True)
    if not keep:
        shutil.rmtree(hidden / "saved", ignore_errors=True)
        (hidden / "manifest.json").unlink(missing_ok=True)
    (hidden / "saved").mkdir(exist_ok=True)
    (hidden / "claims").mkdir()
    (hidden / "out").mkdir()


def _publish(hidden: Path, out: Path) -> None:
    """Give the output its name; an earlier output is whole until the new one stands."""
    folder, old = hidden / "out", hidden / "old"
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
    if not out.exists():
        folder.rename(out)
    elif not _exchange(folder, out):
        out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            old.rename(out)
            raise
    sync(out.parent)


def _restore(hidden: Path, out: Path) -> None:
    """Undo half of the two renames of `_publish`, where a kill came between them."""
    if not out.exists() and (hidden / "old").is_dir():
        (hidden / "old").rename(out)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; false where the system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    return bool(swap(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Pass over Ctrl-C and SIGTERM in the moment in which an output appears or goes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
