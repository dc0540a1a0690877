"""How fast the operators are, in ratios.

Every row is a ratio of two times of one process, so that it means the same on any machine that is
otherwise idle; each time is the least of several runs after a first one.

CT rows compare a batch of 16 slices by the cached matrix with the same slices by ASTRA's CPU
projectors one at a time (this toolkit's path without a matrix; a tenth of it or so is transfer),
and with 16 times scikit-image's ``radon`` and unfiltered ``iradon``.  Loading the matrix is not
counted, being done once a scan.  The rows of MRI compare with ``torch.fft`` on data of the same
shape, without shifts, maps and masks.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from inverse.operators.ct import Kernel, ParallelBeam, RayTransform
from inverse.operators.linop import LinearOperator
from inverse.operators.mri import Sense, cartesian_mask
from inverse.priors import load_prior
from phantoms.benchmarks import harness
from phantoms.benchmarks.harness import Benchmark, Task, check, table
from phantoms.coils import CoilArray

SLICES = 16
CG_STEPS = 5
NOISE_LEVEL = 0.3  # of the network call, in prior units; its time does not depend on it


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what is measured.
        seconds: ours.
        reference: what it is measured against.
        reference_seconds: theirs, for the same work.
        ratio: theirs over ours where ``target`` is a least value, ours over theirs where it is a
            greatest one.
        target: the bound of the ratio.
        at_least: whether the target is a least value.
    """

    name: str
    seconds: float
    reference: str
    reference_seconds: float
    target: float
    at_least: bool = True

    @property
    def ratio(self) -> float:
        """The figure that the target bounds."""
        faster = self.reference_seconds / self.seconds
        return faster if self.at_least else 1 / faster

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


def best_of(work: Callable[[], object], runs: int) -> float:
    """Least time of ``runs`` calls in seconds, after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _both(operator: LinearOperator, x: Tensor, y: Tensor) -> Callable[[], object]:
    return lambda: (operator(x), operator.adjoint(y))


def _skimage(x: Tensor, geometry: ParallelBeam) -> Callable[[], object]:
    """Projection and unfiltered backprojection of one slice."""
    from skimage.transform import iradon, radon

    image = x.numpy()
    theta = np.rad2deg(geometry.angles)
    sinogram = radon(image, theta, circle=False)
    size = image.shape[0]

    def work() -> object:
        radon(image, theta, circle=False)
        return iradon(sinogram, theta, filter_name=None, output_size=size, circle=False)

    return work


def projection(side: int, views: int, target: float, runs: int) -> list[Row]:
    """Forward and adjoint of a batch against the same work by others, a slice at a time."""
    geometry = ParallelBeam.sparse(views, (side, side), 1.0)
    ours = RayTransform(geometry, (side, side), 1.0)
    x = torch.rand(SLICES, side, side, generator=torch.Generator().manual_seed(0))
    y = ours(x)
    name = f"forward + adjoint, {SLICES} slices of {side} x {side}, {views} views"
    mine = best_of(_both(ours, x, y), runs)
    rows = []
    kernels: tuple[Kernel, ...] = ("linear", "line")
    for kernel in kernels:
        theirs = RayTransform(geometry, (side, side), 1.0, kernel, max_bytes=0)
        seconds = best_of(_both(theirs, x, y), max(1, runs // 5))
        rows.append(Row(name, mine, f"ASTRA CPU, {kernel}", seconds, target))
    slice_seconds = best_of(_skimage(x[0], geometry), max(1, runs // 5))
    rows.append(Row(name, mine, "scikit-image", slice_seconds * SLICES, target))
    return rows


def data_consistency(runs: int, side: int = 256, views: int = 23) -> list[Row]:
    """Five CG steps of a ridge problem against one call of the bundled network, same batch."""
    geometry = ParallelBeam.sparse(views, (side, side), 1.5)
    operator = RayTransform(geometry, (side, side), 1.5)
    x = torch.rand(SLICES, side, side, generator=torch.Generator().manual_seed(0))
    b = operator.adjoint(operator(x))
    mine = best_of(lambda: operator.normal_solve(b, 1.0, x, tol=0.0, max_iter=CG_STEPS), runs)
    prior = load_prior("ct-small")
    at = float(prior.sde.time(NOISE_LEVEL))
    with torch.inference_mode():
        network = best_of(lambda: prior.denoise(x, at), max(1, runs // 10))
    name = f"{CG_STEPS} CG steps, {SLICES} slices of {side} x {side}, {views} views"
    return [Row(name, mine, "one call of ct-small", network, 0.25, at_least=False)]


def ct(runs: int) -> list[Row]:
    """The rows of CT."""
    return [
        *projection(256, 23, 8.0, runs),
        *projection(512, 60, 4.0, max(3, runs // 4)),
        *data_consistency(runs),
    ]


def mri(runs: int, side: int = 256, coils: int = 8) -> list[Row]:
    """Forward and adjoint of several coils against the bare transforms that they need.

    A large array is made and dropped first: from then on the C library keeps what is freed
    instead of returning it between calls, which would be timed too.
    """
    torch.empty(30 * 2**20, dtype=torch.uint8)
    maps = torch.from_numpy(CoilArray(coils, 250.0).maps((side, side), (1.0, 1.0)))
    operator = Sense(maps, cartesian_mask((side, side), 4.0, 0.08, "poisson"))
    rows = []
    for slices in (1, SLICES):
        x = torch.randn(slices, side, side, dtype=torch.complex64)
        y = operator(x)

        def bare(y: Tensor = y) -> object:
            return torch.fft.fft2(y, norm="ortho"), torch.fft.ifft2(y, norm="ortho")

        with torch.inference_mode():
            mine = best_of(_both(operator, x, y), runs)
            seconds = best_of(bare, runs)
        many = "1 slice" if slices == 1 else f"{slices} slices"
        name = f"forward + adjoint, {many} of {side} x {side}, {coils} coils"
        rows.append(Row(name, mine, "bare torch FFTs", seconds, 1.3, at_least=False))
    return rows


def matrices() -> dict[str, int]:
    """Memory of system matrices with their transposes, bytes."""
    found = {}
    for side, views in ((256, 23), (256, 180), (512, 60)):
        operator = RayTransform(ParallelBeam.sparse(views, (side, side), 1.0), (side, side), 1.0)
        found[f"{views} views of {side} x {side}"] = operator.held_bytes
    return found


MODALITIES: dict[str, Callable[[int], list[Row]]] = {"ct": ct, "mri": mri}
"""What can be measured: a function of the number of runs for each modality."""


@dataclass(frozen=True)
class Settings:
    """Settings of ``speed``.

    Attributes:
        modalities: keys of :data:`MODALITIES`.
        runs: runs of the shortest work.
    """

    modalities: tuple[str, ...] = tuple(MODALITIES)
    runs: int = 5

    def __post_init__(self) -> None:
        unknown = set(self.modalities) - set(MODALITIES)
        check(not unknown, f"no {', '.join(unknown)}; there are {', '.join(MODALITIES)}")
        check(self.runs >= 1, f"runs must be at least 1, got {self.runs}")


def tasks(settings: Settings) -> Iterator[Task]:
    """The comparisons of a modality, and the memory of CT matrices."""

    def row(name: str) -> harness.Row:
        found = MODALITIES[name](settings.runs)
        rows = [{**asdict(r), "ratio": r.ratio, "met": r.met} for r in found]
        return {"rows": rows, "matrix_bytes": matrices() if name == "ct" else {}}

    for name in settings.modalities:
        yield name, functools.partial(row, name)


def markdown(rows: Mapping[str, harness.Row]) -> str:
    """Times, ratios and their targets; memory."""
    cells = []
    for part in rows.values():
        for r in part["rows"]:
            bound = f"{'≥' if r['at_least'] else '≤'} {r['target']:g}"
            cells.append(
                [r["name"], r["reference"], f"{1e3 * r['seconds']:.1f}",
                 f"{1e3 * r['reference_seconds']:.1f}", f"{r['ratio']:.2f}",
                 bound if r["met"] else f"{bound}, missed"]
            )  # fmt: skip
    head = ("work", "against", "ms", "theirs, ms", "ratio", "target")
    text = table(head, cells, text=2)
    memory = {k: v for part in rows.values() for k, v in part["matrix_bytes"].items()}
    if memory:
        sizes = [[name, f"{size / 2**20:.0f}"] for name, size in memory.items()]
        text += "\n" + table(("matrix and transpose", "MiB"), sizes)
    return text


BENCHMARK = Benchmark(
    name="speed",
    title="Speed of the operators",
    about="""
Every row is a ratio of two times of one process, so that it means the same on any machine that is
otherwise idle; each time is the least of several runs after a first one.
""",
    quick=Settings(),
    full=Settings(runs=20),
    tasks=tasks,
    markdown=markdown,
)
