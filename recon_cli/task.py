"""What to reconstruct and how: the tasks and recipes of the commands, and the checks of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recon_cli.errors import usage
from recon_cli.options import DEFAULT_METHOD, parse_pairs
from recon_cli.processes import local_rank

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from inverse.measurement import Measurement
    from inverse.posterior import Method
    from inverse.posterior.volume import CouplingKind
    from inverse.priors import NetworkPrior
    from inverse.volumes import Volume

    Image = NDArray[np.float32]

__all__ = [
    "BASELINES",
    "Outcome",
    "Recipe",
    "Task",
    "check_baselines",
    "check_method",
    "choose_planes",
    "choose_prior",
    "named_prior",
    "pick_device",
]

Kind = Literal["ct", "mri", "inpaint"]
BASELINES = {
    "cgls": "CGLS",
    "os-sart": "OS-SART",
    "poisson": "Poisson likelihood",
    "sirt": "SIRT",
    "tv": "TV",
}
"""Classical images on request, by name: the title of each."""


@dataclass(frozen=True)
class Task:
    """A measurement to reconstruct.

    Attributes:
        measurement: operator, data, noise.
        truth: the image it was simulated from, ``(items, *in_shape)``, on the reconstruction grid,
            physical units; in memory or on disk.
        templates: DICOM headers, one a slice.
        label: what was measured, in words.
        simulated: computed from images or phantoms, not by a scanner.
        slices: index of each slice in its source.
        phantom: the data are exact line integrals of a phantom.
        z_mm: position of each slice along z in mm; empty where it is not known.
        plane: of the slices, see `inverse.trust.plane`; empty where it is not known.
    """

    measurement: Measurement
    truth: Tensor | Volume | None
    templates: Sequence[bytes]
    label: str
    simulated: bool
    slices: Sequence[int]
    phantom: bool = False
    z_mm: Sequence[float] = ()
    plane: str = ""

    @property
    def kind(self) -> Kind:
        """Which family of operator measured."""
        from inverse.operators.ct import RayTransform
        from inverse.operators.mask import Mask
        from inverse.operators.resample import ThickSlices

        operator = self.measurement.operator
        if isinstance(operator, RayTransform):
            return "ct"
        return "inpaint" if isinstance(operator, Mask | ThickSlices) else "mri"

    @property
    def depth(self) -> int:
        """Slices of one measured item: one, or those of a volume."""
        return self.measurement.slices // len(self.measurement)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(slices, rows, columns)`` of its images."""
        rows, columns = self.measurement.operator.in_shape[-2:]
        return self.measurement.slices, rows, columns

    def groups(self) -> Iterator[slice]:
        """Its items a few at a time, which bounds the memory; a volume is one item."""
        from inverse.memory import trim
        from inverse.volumes import slabs

        for items in slabs(len(self.measurement)):
            yield items
            trim()

    def part(self, items: slice) -> Measurement:
        """The measurement of some items."""
        import torch

        if items == slice(0, len(self.measurement)):
            return self.measurement
        return self.measurement.take(torch.arange(items.start, items.stop))

    def places(self, items: slice) -> slice:
        """The slices of some items."""
        return slice(items.start * self.depth, items.stop * self.depth)

    def with_truth_in(self, folder: Path) -> Task:
        """The same task, whose truth lies on disk rather than in memory."""
        from inverse.volumes import DiskVolume

        if self.truth is None:
            return self
        truth = DiskVolume(folder, tuple(self.truth.shape), str(self.truth.dtype).split(".")[-1])
        for items in self.groups():
            truth[items] = self.truth[items]
        return replace(self, truth=truth)

    def true_image(self, items: slice) -> Image:
        """The truth of some items in the written unit, ``(slices, rows, columns)``."""
        import torch

        assert self.truth is not None
        return self.image(torch.as_tensor(self.truth[items]))

    def each_slice(self, value: Tensor) -> NDArray[np.float64]:
        """One number an item as one a slice; slices of a volume share its number."""
        return value.double().repeat_interleave(self.depth).numpy()

    @property
    def origin(self) -> str:
        """Where the data come from, in words."""
        if self.phantom:
            return "simulation of a mathematical phantom"
        return (
            "retrospective simulation from processed images" if self.simulated else "measured data"
        )

    @property
    def unit(self) -> Literal["HU", "signal"]:
        """Unit of the images that are written."""
        return "HU" if self.measurement.modality == "CT" else "signal"

    def image(self, x: Tensor) -> Image:
        """Physical units to the written unit: HU, or the magnitude of the signal."""
        from inverse.operators.units import mu_to_hu

        x = x.reshape(-1, *x.shape[-2:])
        if self.unit == "signal":
            return x.abs().float().numpy()
        return mu_to_hu(x, float(self.measurement.mu_water or 0.0)).float().numpy()

    def spread(self, std: Tensor) -> Image:
        """A standard deviation in the written unit."""
        scale = 1000.0 / float(self.measurement.mu_water or 1.0) if self.unit == "HU" else 1.0
        return (std.float() * scale).reshape(-1, *std.shape[-2:]).numpy()


@dataclass(frozen=True)
class Recipe:
    """How to reconstruct; ``None`` leaves the method's default, as does an option not given.

    ``also`` names files to write on request (`recon_cli.options.companions`), ``baselines``
    further classical images (`BASELINES`); ``planes`` holds priors of coronal and sagittal images;
    ``max_memory`` is in GiB.
    """

    prior: NetworkPrior
    method: str = DEFAULT_METHOD
    steps: int | None = None
    samples: int = 1
    seed: int = 0
    batch: int = 8
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    tv_weight: float | None = None
    tv: bool = True
    also: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    coupling: CouplingKind = "none"
    planes: Mapping[str, NetworkPrior] = field(default_factory=dict)
    max_memory: float | None = None


@dataclass(frozen=True)
class Outcome:
    """One reconstruction in the written unit.

    Attributes:
        name: key in ``metrics.json``.
        title: name for readers.
        volume: ``(slices, rows, columns)``.
        chi2: reduced residual chi-square a slice.
        seconds: wall-clock time.
        network_calls: a slice and sample.
        std: standard deviation over samples, where there are several.
        settings: resolved settings, for the DICOM provenance.
        fit: chi-square by view or ring of k-space, ``(slices, groups)``.
        maps: further images of the report, by name.
    """

    name: str
    title: str
    volume: Volume
    chi2: NDArray[np.float64]
    seconds: float
    network_calls: int = 0
    std: Volume | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fit: NDArray[np.float64] | None = None
    maps: Mapping[str, Volume] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Folder of its DICOM series in the output."""
        return "recon" if self.name == "prior" else f"baseline-{self.name}"


def check_method(name: str) -> Method:
    """The method of a name; an unknown one is a usage error.

    Raises:
        typer.BadParameter: with the names that exist.
    """
    from inverse.posterior.methods import METHODS

    if name not in METHODS:
        raise usage(f"no method '{name}'; there are {', '.join(METHODS)} ('recon methods')")
    return METHODS[name]


def check_baselines(names: Sequence[str] | None) -> tuple[str, ...]:
    """The classical images asked for, each once.

    Raises:
        typer.BadParameter: a name that is none; with those that exist.
    """
    wanted = tuple(dict.fromkeys(names or ()))
    for name in wanted:
        if name not in BASELINES:
            raise usage(f"no baseline '{name}'; there are {', '.join(BASELINES)}")
    return wanted


def named_prior(name: str | None) -> NetworkPrior | None:
    """The prior asked for, before the input is read; ``None`` where the input is to tell.

    Raises:
        CheckpointError: there is none, or a file that is refused.
    """
    from inverse.priors import load_prior

    return None if name is None else load_prior(name)


def choose_prior(asked: NetworkPrior | None, modality: str) -> NetworkPrior:
    """The prior asked for, or the first bundled one of the modality.

    Raises:
        CheckpointError: none of that modality, or a wrong one.
    """
    from inverse.errors import CheckpointError
    from inverse.priors import list_priors, load_prior

    prior = asked
    if prior is None:
        cards = list_priors()
        fitting = [card.name for card in cards if card.modality == modality]
        if not fitting:
            there = ", ".join(f"{c.name} ({c.modality})" for c in cards) or "none"
            raise CheckpointError(
                f"no bundled prior for {modality} images (bundled: {there}); give one with "
                f"--prior FILE, or train one with 'recon train --modality {modality.lower()}'"
            )
        prior = load_prior(fitting[0])
    if prior.card.modality != modality:
        raise CheckpointError(
            f"prior '{prior.card.name}' is for {prior.card.modality} images, the input is "
            f"{modality}; choose another --prior ('recon priors list')"
        )
    return prior


def choose_planes(coupling: str, given: Sequence[str], modality: str) -> dict[str, NetworkPrior]:
    """Priors of ``PLANE=NAME|FILE`` texts, by plane.

    Raises:
        typer.BadParameter: another plane, or priors of planes without the coupling that uses them.
        CheckpointError: a prior that is refused.
    """
    pairs = parse_pairs(given, "--plane-prior", "coronal=my.safetensors")
    if not set(pairs) <= {"coronal", "sagittal"}:
        raise usage(f"--plane-prior takes coronal and sagittal, got {', '.join(pairs)}")
    if pairs and coupling != "planes":
        raise usage(f"--plane-prior is for --coupling planes, got --coupling {coupling}")
    if coupling == "planes" and not pairs:
        raise usage(
            "--coupling planes needs a prior of coronal or sagittal images, since those bundled "
            "know axial ones only; give --plane-prior coronal=FILE, or choose --coupling tv"
        )
    return {plane: choose_prior(named_prior(name), modality) for plane, name in pairs.items()}


def pick_device(name: str) -> str:
    """``auto`` becomes the GPU where there is one; another name is checked.

    Raises:
        ResourceError: the device is not there.
    """
    import torch

    from inverse.errors import ResourceError

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    place = local_rank()
    if name == "cuda" and place is not None and torch.cuda.is_available():
        return f"cuda:{place % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ResourceError(
            f"device '{name}' is not available here; give --device cpu ('recon doctor' lists "
            "devices)"
        ) from None
    return name
