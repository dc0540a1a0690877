"""The one deep entry: a measurement and a prior in, a reconstruction with its uncertainty out."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inverse.errors import CheckpointError, InputError, ResourceError, UnsupportedError
from inverse.measurement import CHI2_HIGH, Measurement
from inverse.memory import is_exhausted, peak_bytes
from inverse.operators.linop import (
    ComplexFromChannels,
    ComplexFromReal,
    CountedOperator,
    Diagonal,
    LinearOperator,
)
from inverse.operators.mri import Sense
from inverse.operators.phase import estimated_phase
from inverse.operators.resample import ThickSlices, Upsample
from inverse.posterior.methods import METHODS
from inverse.posterior.problem import Problem
from inverse.posterior.volume import (
    CorrelatedNoise,
    Coupling,
    CouplingKind,
    InChunks,
    SliceBySlice,
    check_positions,
)
from inverse.priors.checkpoint import NetworkPrior
from inverse.priors.denoiser import CountedDenoiser, Denoiser
from inverse.sampling import Noise
from inverse.volumes import SLAB, percentile

__all__ = ["Batch", "Plan", "Reconstruction", "Remark", "reconstruct"]

_log = logging.getLogger(__name__)


class Remark(NamedTuple):
    """One thing to know of a reconstruction.

    Attributes:
        code: what it is about, in capitals.
        text: a sentence for the user.
    """

    code: str
    text: str


@dataclass(frozen=True)
class Reconstruction:
    """Result of :func:`reconstruct`, in the measurement's physical units.

    Attributes:
        mean: mean of the samples, ``(slices, h, w)``.
        std: their standard deviation; zero with one sample (which says nothing of certainty).
        samples: ``(slices, samples, h, w)``.
        residual_chi2: reduced chi-square of the mean's residual, ``(slices,)``; see
            :meth:`inverse.measurement.Measurement.chi2`.
        remarks: what to know of it, each with a code.
        nfe: network calls a sample; with those for the halo of a coupling's windows.
        operator_calls: applications of the operator or its adjoint, a sample.
        seed: the seed.
        seconds: wall-clock time of the batches.
        settings: resolved method, options, prior, scale; plain JSON values.
    """

    mean: Tensor
    std: Tensor
    samples: Tensor
    residual_chi2: Tensor
    remarks: tuple[Remark, ...]
    nfe: int
    operator_calls: int
    seed: int
    seconds: float
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        chi2 = ", ".join(f"{value:.3g}" for value in self.residual_chi2[:4].tolist())
        more = ", ..." if len(self.residual_chi2) > 4 else ""
        return (
            f"Reconstruction(mean {tuple(self.mean.shape)}, samples {tuple(self.samples.shape)}, "
            f"method {self.settings.get('method')!r}, nfe {self.nfe}, chi2 [{chi2}{more}], "
            f"status {self.status!r})"
        )

    @property
    def status(self) -> str:
        """``"ok"``, or sentences that say what to look at."""
        return "; ".join(remark.text for remark in self.remarks) or "ok"


@dataclass(frozen=True)
class Batch:
    """Finished samples of one batch, ``(batch, h, w)`` in physical units, and what they cost.

    ``images`` is how many the network was given, ``operator_calls`` is of the batch.
    """

    samples: Tensor
    images: int
    operator_calls: int
    seconds: float


def reconstruct(
    measurement: Measurement,
    prior: Denoiser,
    *,
    method: str = "pnp_admm",
    steps: int | None = None,
    samples: int = 1,
    seed: int = 0,
    batch: int | None = None,
    device: str | torch.device | None = None,
    callback: Callable[[int, int], None] | None = None,
    phase: Literal["estimated", "zero"] = "estimated",
    options: Mapping[str, Any] | None = None,
    positions: Sequence[int] | None = None,
    saved: MutableMapping[int, Batch] | None = None,
    coupling: CouplingKind | Coupling = "none",
    z_mm: Sequence[float] | None = None,
    max_memory: int | None = None,
) -> Reconstruction:
    r"""Sample images that agree with the measurement and the prior.

    Args:
        measurement: operator, data and noise, physical units.
        prior: a denoiser of the same modality.
        method: a name of :data:`inverse.posterior.METHODS`.
        steps: sampler steps; default the method's.
        samples: samples a slice; 8 or more for a standard deviation worth showing.
        seed: each sample is seeded by (seed, position of the slice, sample): the result depends
            neither on ``batch`` nor, without coupling, on which other slices are there.
        batch: images a network call; default 8.
        device: default the measurement's.
        callback: progress, called as ``callback(done, total)`` in network steps.
        phase: how a prior of real images serves complex ones: as :math:`x = m\,e^{i\varphi}` with
            real m, the phase estimated from the data (see
            :func:`inverse.operators.phase.estimated_phase`) or known to be zero.  A prior of
            complex images needs neither.
        options: further options of the method.
        positions: index of each slice in its series, no two the same; default its index in the
            measurement.
        saved: finished batches by number.  Those that it holds are not computed again, and new
            ones are put into it, so that a run with equal arguments continues to the same bits.
        coupling: how neighbouring slices are made consistent; see
            :mod:`inverse.posterior.volume`.
        z_mm: position of each slice along z in mm, for coupling; default its position in the
            series times the pixel size.
        max_memory: bytes of memory (of the GPU, where there is one) within which to stay; smaller
            groups of images go to the network where ``batch`` would need more.

    Raises:
        CheckpointError: a prior of another modality.
        UnsupportedError: a prior whose channels do not fit the operator, or a coupling that does
            not go with the method or the slices.
        GeometryError: a prior of images of another size.
        InputError: an argument of another kind, an unknown method or option, a value out of its
            bounds, repeated positions, or positions along z that a coupling cannot use.
        ResourceError: not even one image at a time fits into memory.
        NumericalError: if sampling diverges.
    """
    plan = Plan(
        measurement,
        prior,
        method=method,
        steps=steps,
        samples=samples,
        seed=seed,
        batch=batch,
        device=device,
        phase=phase,
        options=options,
        positions=positions,
        coupling=coupling,
        z_mm=z_mm,
    )
    if max_memory is not None:
        plan.fit(max_memory)
    finished: MutableMapping[int, Batch] = {} if saved is None else saved
    plan.run(finished, callback=callback)
    return plan.result(finished)


@dataclass(frozen=True)
class _Part:
    """One batch: (slice, sample) pairs that are computed together, and those that are kept."""

    pairs: Sequence[tuple[int, int]]
    kept: range

    @property
    def results(self) -> list[tuple[int, int]]:
        """Pairs of its finished samples."""
        return [self.pairs[i] for i in self.kept]


class Plan:
    """What :func:`reconstruct` does, cut into parts that any process can compute.

    Parts depend on the arguments alone, and a part's bits on nothing but its number and
    :attr:`limit`: processes that share a ``saved`` mapping on disk divide the parts among them,
    and whichever merges them gets the bits of one process.

    Args:
        measurement: see :func:`reconstruct`, also for all others.
        prior: a denoiser of the same modality.
        method: a name of :data:`inverse.posterior.METHODS`.
        steps: sampler steps.
        samples: samples a slice.
        seed: seed.
        batch: images of a part; with a windowed coupling a part is a window instead.
        device: where to compute.
        phase: how a prior of real images serves complex ones.
        options: further options of the method.
        positions: index of each slice in its series.
        coupling: how neighbouring slices are made consistent.
        z_mm: position of each slice along z in mm.

    Attributes:
        parts: what to compute.
        limit: most images a network call; :meth:`fit` lowers it, as does running out of memory.
        settings: resolved settings, plain JSON values.
        remarks: what the user should know.
    """

    def __init__(
        self,
        measurement: Measurement,
        prior: Denoiser,
        *,
        method: str = "pnp_admm",
        steps: int | None = None,
        samples: int = 1,
        seed: int = 0,
        batch: int | None = None,
        device: str | torch.device | None = None,
        phase: Literal["estimated", "zero"] = "estimated",
        options: Mapping[str, Any] | None = None,
        positions: Sequence[int] | None = None,
        coupling: CouplingKind | Coupling = "none",
        z_mm: Sequence[float] | None = None,
    ) -> None:
        _check_types(measurement, prior, options, coupling)
        if method not in METHODS:
            raise InputError(f"no method '{method}'; there are {', '.join(METHODS)}")
        samples, seed = _whole("samples", samples, 1), _whole("seed", seed)
        batch = None if batch is None else _whole("batch", batch, 1)
        if phase not in ("estimated", "zero"):
            raise InputError(f"phase must be 'estimated' or 'zero', got {phase!r}")
        n = len(measurement)
        self.method, self.samples, self.seed = METHODS[method], samples, seed
        places = range(n) if positions is None else positions
        self.places = [_whole("positions", place) for place in places]
        if len(set(self.places)) != n or len(self.places) != n:
            raise InputError(
                f"positions must number the {n} slices, each another, since slices of one "
                f"position get the same noise, got {self.places}"
            )
        given = dict(options or {})
        if steps is not None:
            given["steps"] = steps
        self.options = self.method.resolve(given, measurement.modality)
        self.coupling = Coupling(coupling) if isinstance(coupling, str) else coupling
        self.device = measurement.data.device if device is None else _usable(device)
        self.target = measurement.to(self.device)
        if self.device != measurement.data.device:
            prior = copy.deepcopy(prior).to(self.device)  # the caller's prior stays where it is
        volumes = len(measurement.operator.in_shape) == 3
        prior, self._embedding, self.remarks = _adapt(prior, self.target)
        needs_phase = _needs_phase(prior, self.target.operator)
        self._phasors: dict[int, Tensor] | None = (
            {} if needs_phase and phase == "estimated" else None
        )
        self.z_mm = self._check_coupling(z_mm, prior, volumes)
        if samples > 1 and self.method.spread != "posterior":
            none = self.method.spread == "none"
            falls = "no uncertainty" if none else "smaller than the posterior's"
            self._remark(
                "SPREAD",
                f"the standard deviation of {method}'s samples is {falls}: for one that is right "
                "for exact priors choose mmps or pnpdm",
            )
        self.offset, self.scale = _affine(prior, self.target)
        operator = self.target.operator
        self._tally = [0]
        self._shape = operator.in_shape if self._embedding is None else self._embedding.in_shape
        self._counted = CountedDenoiser(prior)
        self._planes = {p: CountedDenoiser(d) for p, d in (self.coupling.planes or {}).items()}
        self.limit = 8 if batch is None else batch
        self._volumes = volumes
        self.parts = list(self._cut(n, self.limit))
        self.settings: dict[str, Any] = {
            "method": method,
            **self.options,
            "samples": samples,
            "batch": self.limit,
            "device": str(self.device),
            "prior": prior.card.name if isinstance(prior, NetworkPrior) else type(prior).__name__,
            "prior_sha256": prior.card.sha256 if isinstance(prior, NetworkPrior) else None,
            "offset": self.offset,
            "scale": self.scale,
            "phase": phase if needs_phase else None,
            **(self.coupling.settings() if self.coupling.kind != "none" else {}),
        }

    # --- how ---------------------------------------------------------------------------------

    def _remark(self, code: str, text: str) -> None:
        self.remarks.append(Remark(code, text))

    def _check_coupling(
        self, z_mm: Sequence[float] | None, prior: Denoiser, volumes: bool
    ) -> list[float]:
        """Positions along z in mm; refuses what cannot be coupled."""
        kind = self.coupling.kind
        pixel = float(self.target.pixel_mm[0])
        count = self.target.operator.in_shape[0] if volumes else len(self.target)
        places = range(count) if volumes else self.places
        z = [pixel * k for k in places] if z_mm is None else [float(v) for v in z_mm]
        if len(z) != count:
            raise InputError(f"z_mm must number the {count} slices, got {len(z)}")
        if kind == "none":
            return z
        check_positions(z)
        if kind == "tv" and self.method.jacobian:
            raise UnsupportedError(
                "coupling 'tv' has no gradient that a method through the network could use; "
                "choose coupling 'noise', or a method without one ('recon methods')"
            )
        if kind == "noise" and volumes:
            raise UnsupportedError(
                "coupling 'noise' serves slices that are measured one by one; for a volume that "
                "is measured as a whole choose 'tv'"
            )
        if count == 1:
            self._remark("ONE_SLICE", "one slice: there is nothing to couple it to")
        elif z_mm is None:
            self._remark(
                "NO_POSITIONS",
                "positions of slices are not known: coupled as if they were a pixel apart",
            )
        if kind == "planes":
            given = dict(self.coupling.planes or {})
            for plane, other in given.items():
                if isinstance(other, NetworkPrior) and isinstance(prior, NetworkPrior):
                    given[plane] = _of_plane(plane, other, prior, z)
            if self.device.type != "cpu":
                given = {p: copy.deepcopy(d).to(self.device) for p, d in given.items()}
            if len(given) == 1:
                self._remark("PLANES", f"coupling by axial and {next(iter(given))} priors only")
            self.coupling = replace(self.coupling, planes=given)
        return z

    def _cut(self, n: int, batch: int) -> Iterator[_Part]:
        """Parts: windows of slices a sample where neighbours are needed, else any few images."""
        if self.coupling.windowed and not self._volumes:
            for window in self.coupling.cut(n):
                first = window.kept.start - window.slices.start
                kept = range(first, first + len(window.kept))
                for k in range(self.samples):
                    yield _Part([(z, k) for z in window.slices], kept)
            return
        pairs = [(z, k) for z in range(n) for k in range(self.samples)]
        size = 1 if self.coupling.windowed else batch
        for first in range(0, len(pairs), size):
            chosen = pairs[first : first + size]
            yield _Part(chosen, range(len(chosen)))

    def _noise(self, pairs: Sequence[tuple[int, int]]) -> Noise:
        """Randomness of some samples, by seed and position only."""
        shape = self._shape
        if self.coupling.kind == "noise":
            places = [(self.z_mm[z], k) for z, k in pairs]
            length = self.coupling.length_mm
            return CorrelatedNoise(self.seed, places, shape, self.device, length_mm=length)
        return Noise([(self.seed, self.places[z], k) for z, k in pairs], shape, self.device)

    def _prior(self, pairs: Sequence[tuple[int, int]]) -> Denoiser:
        """The prior of some samples, in network calls of at most ``limit`` images."""
        chunked = InChunks(self._counted, self.limit)
        planes = {plane: InChunks(d, self.limit) for plane, d in self._planes.items()}
        coupling = replace(self.coupling, planes=planes)
        if self._volumes:
            return SliceBySlice(coupling.around(chunked, self.z_mm))
        return coupling.around(chunked, [self.z_mm[z] for z, _ in pairs])

    def _images(self) -> int:
        """Images that networks were given so far."""
        return sum(counted.images for counted in (self._counted, *self._planes.values()))

    def _sample(
        self,
        pairs: Sequence[tuple[int, int]],
        options: Mapping[str, Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Samples of some pairs together, physical units, on the CPU."""
        index = torch.tensor([z for z, _ in pairs], device=self.device)
        target, embedding = self.target.take(index), self._images_of(index)
        operator = target.operator if embedding is None else target.operator @ embedding
        before = self._tally[0]
        inner = replace(target, operator=CountedOperator(operator, self._tally))
        inner = inner.rescaled(self.offset, self.scale)
        self._tally[0] = before  # of what the method does
        problem = Problem(
            self._prior(pairs), inner, self._noise(pairs), progress, self.offset, self.scale
        )
        x = self.offset + self.scale * self.method.run(problem, **options)
        return (x if embedding is None else embedding(x)).cpu()

    def _images_of(self, index: Tensor) -> LinearOperator | None:
        """From the prior's images of some slices to theirs; ``None`` where they are the same.

        The phase of a slice is estimated when its first sample is drawn, by the process that
        draws it, and kept while its samples last.
        """
        embedding = None if self._embedding is None else self._embedding.take(index)
        if self._phasors is None:
            return embedding
        for z in set(index.tolist()) - self._phasors.keys():
            one = self.target.take(torch.tensor([z], device=self.device))
            self._phasors[z] = estimated_phase(one.operator, one.data).weight
        self._phasors = {z: self._phasors[z] for z in index.tolist()}
        phasors = torch.cat([self._phasors[z] for z in index.tolist()])
        phase = Diagonal(phasors, self.target.operator.in_shape, torch.complex64)
        return phase if embedding is None else phase @ embedding

    # --- computing ---------------------------------------------------------------------------

    def compute(self, number: int, progress: Callable[[int], None] | None = None) -> Batch:
        """One part; in smaller groups of images when memory runs out.

        Args:
            number: which.
            progress: called with the network steps done.

        Raises:
            ResourceError: memory runs out with one image at a time.
            NumericalError: if sampling diverges.
        """
        while True:
            try:
                with torch.inference_mode():
                    return self._compute(self.parts[number], progress)
            except (MemoryError, RuntimeError) as error:
                if not is_exhausted(error):
                    raise
                if self.limit == 1:
                    shape = " x ".join(map(str, self._shape))
                    raise ResourceError(
                        f"out of memory with one image of {shape} at a time; use a machine with "
                        "more, a method without the network's gradient, or a smaller image"
                    ) from None
            # here, where the traceback no longer holds what the failed attempt had allocated
            self.limit = max(1, self.limit // 2)
            _log.warning("out of memory; going on with %d images at a time", self.limit)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _compute(self, part: _Part, progress: Callable[[int], None] | None) -> Batch:
        begun, images = time.monotonic(), self._images()
        together = self.coupling.windowed
        size = len(part.pairs) if together else min(self.limit, len(part.pairs))
        done, calls, results = 0, 0, []
        for first in range(0, len(part.pairs), size):
            pairs = part.pairs[first : first + size]
            tally = self._tally[0]

            def step(i: int, _: int, done: int = done, count: int = len(pairs)) -> None:
                if progress is not None:
                    progress(done + i * count)

            results.append(self._sample(pairs, self.options, step))
            done += int(self.options["steps"]) * len(pairs)
            calls = max(calls, self._tally[0] - tally)
        return Batch(
            torch.cat(results)[part.kept.start : part.kept.stop],
            self._images() - images,
            calls,
            time.monotonic() - begun,
        )

    def fit(self, max_bytes: int) -> int:
        """Choose :attr:`limit` by a model of memory, measured by two short runs of the method.

        Memory is taken as linear in the images of a network call: what the process holds, and a
        slope that counts network, operator and method alike.

        Args:
            max_bytes: memory within which to stay.

        Returns:
            The limit.

        Raises:
            ResourceError: one image at a time needs more.
        """
        most = self.limit
        brief = {**self.options, "steps": min(2, int(self.options["steps"]))}
        pairs = self.parts[0].pairs if self.coupling.windowed else self.parts[0].pairs[:4]
        many = self.coupling.windowed or self._volumes  # one window or volume holds many images
        several = min(4, most) if many else min(most, len(pairs))

        def peak(count: int) -> int:
            self.limit = count
            chosen = pairs if self.coupling.windowed else pairs[: 1 if self._volumes else count]
            with torch.inference_mode():
                return peak_bytes(lambda: self._sample(chosen, brief), self.device)

        one = peak(1)
        each = max(peak(several) - one, 0) / (several - 1) if several > 1 else 0.0
        if one > max_bytes:
            raise ResourceError(
                f"one image at a time needs {one / 2**20:.0f} MiB, of which the limit allows "
                f"{max_bytes / 2**20:.0f} MiB; raise --max-memory or use a smaller image"
            )
        self.limit = most if each == 0 else min(most, 1 + int((max_bytes - one) / each))
        _log.info(
            "memory: %.0f MiB and %.1f MiB an image; %d images a network call",
            (one - each) / 2**20, each / 2**20, self.limit,
        )  # fmt: skip
        return self.limit

    def run(
        self,
        saved: MutableMapping[int, Batch],
        *,
        claim: Callable[[int], bool] = lambda number: True,
        callback: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute the parts that ``saved`` lacks and put them into it.

        Args:
            saved: finished parts by number.
            claim: whether to compute a part, or leave it to another process.
            callback: progress, called as ``callback(done, total)`` in network steps.
        """
        steps = int(self.options["steps"])
        total, before = steps * sum(len(part.pairs) for part in self.parts), 0
        for number, part in enumerate(self.parts):

            def progress(done: int, before: int = before) -> None:
                if callback is not None:
                    callback(before + done, total)

            if number in saved:
                progress(steps * len(part.pairs))
            elif claim(number):
                saved[number] = self.compute(number, progress)
            before += steps * len(part.pairs)

    def draws(self, saved: Mapping[int, Batch]) -> Iterator[tuple[int, Tensor]]:
        """Number of each slice and its samples ``(samples, *in_shape)``, as parts complete them.

        Args:
            saved: all parts by number; one is read at a time.
        """
        for _, slices in self._merged(saved):
            yield from slices

    def _merged(
        self, saved: Mapping[int, Batch]
    ) -> Iterator[tuple[Batch, list[tuple[int, Tensor]]]]:
        """Each part, and the slices that it completes, in ascending order, with their samples."""
        waiting: dict[int, dict[int, Tensor]] = {}
        for number, part in enumerate(self.parts):
            batch, complete = saved[number], []
            for (z, i), x in zip(part.results, batch.samples, strict=True):
                waiting.setdefault(z, {})[i] = x
                if len(waiting[z]) == self.samples:
                    found = waiting.pop(z)
                    complete.append((z, torch.stack([found[i] for i in range(self.samples)])))
            yield batch, complete

    def result(
        self,
        saved: Mapping[int, Batch],
        *,
        keep_samples: bool = True,
        sink: Callable[[slice, Tensor, Tensor], None] | None = None,
    ) -> Reconstruction:
        """Merge finished parts, one at a time.

        Args:
            saved: all parts by number; each is read once.
            keep_samples: without them ``samples`` of the result is empty, so that memory does not
                grow with their number.
            sink: takes the slices that are complete, a few at a time and in order: which they
                are, their mean and their standard deviation ``(slices, *in_shape)``, physical
                units, on the CPU.  ``mean``, ``std`` and ``samples`` of the result are then
                empty, so that memory does not grow with the slices.
        """
        n, k = len(self.target), self.samples
        shape, dtype = self.target.operator.in_shape, self.target.operator.dtype
        kept = n if sink is None else 0
        mean = torch.empty((kept, *shape), dtype=dtype)
        std = torch.from_numpy(np.zeros((kept, *shape), np.float32))  # no memory until written
        samples = torch.empty((kept, k if keep_samples else 0, *shape), dtype=dtype)
        images = calls = done = 0
        seconds = 0.0
        chi2: list[Tensor] = []
        waiting: list[tuple[Tensor, Tensor]] = []

        def take(few: Sequence[tuple[Tensor, Tensor]]) -> None:
            nonlocal done
            places = slice(done, done + len(few))
            means, stds = (torch.stack(part) for part in zip(*few, strict=True))
            index = torch.arange(places.start, places.stop, device=self.device)
            chi2.append(self.target.take(index).chi2(means.to(self.device)).cpu())
            if sink is None:
                mean[places], std[places] = means, stds
            else:
                sink(places, means, stds)
            done = places.stop

        with torch.inference_mode():
            for batch, slices in self._merged(saved):
                images, calls = images + batch.images, calls + batch.operator_calls
                seconds += batch.seconds
                for z, draws in slices:
                    if keep_samples and sink is None:
                        samples[z] = draws
                    waiting.append(_moments(draws))
                    if len(waiting) == SLAB:
                        take(waiting)
                        waiting.clear()
            if waiting:
                take(waiting)
        residual = torch.cat(chi2)
        return Reconstruction(
            mean=mean,
            std=std,
            samples=samples,
            residual_chi2=residual,
            remarks=(*self.remarks, *_unfitted(residual)),
            nfe=images // (n * k),
            operator_calls=calls // len(self.parts),
            seed=self.seed,
            seconds=seconds,
            settings={**self.settings, "notes": [remark.text for remark in self.remarks]},
        )


def _moments(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a slice's samples; the latter 0 of one sample."""
    mean = draws.mean(dim=0)
    if len(draws) == 1:
        return mean, torch.zeros(mean.shape)
    square = (draws - mean).abs().square().sum(dim=0)
    return mean, square.div(len(draws) - 1).sqrt()


def _of_plane(
    plane: str, prior: NetworkPrior, axial: NetworkPrior, z_mm: Sequence[float]
) -> NetworkPrior:
    """A prior of another plane at the pixel size of the axial one, which voxels must share.

    Raises:
        CheckpointError: a prior of another modality, unit or number of channels.
        UnsupportedError: voxels that are not cubes to 5 %.
    """
    card, other = axial.card, prior.card
    same = ("modality", "unit", "offset", "scale")
    if any(getattr(card, f) != getattr(other, f) for f in same) or (
        prior.net.config.channels != axial.net.config.channels
    ):
        raise CheckpointError(
            f"the {plane} prior '{other.name}' differs from the axial '{card.name}' in modality, "
            "units or channels; planes need priors of one kind"
        )
    if other.orientation not in ("", plane):
        raise CheckpointError(
            f"prior '{other.name}' is of {other.orientation} images, and was given for {plane} "
            "ones; give one of that plane"
        )
    gaps = np.abs(np.diff(z_mm))
    if len(gaps) and np.abs(gaps / axial.pixel_mm - 1).max() > 0.05:
        raise UnsupportedError(
            f"coupling 'planes' needs cubic voxels, got slices {gaps.min():.3g} to "
            f"{gaps.max():.3g} mm apart and pixels of {axial.pixel_mm:.3g} mm; resample the "
            "series, or choose coupling 'tv'"
        )
    return prior.at(pixel_mm=axial.pixel_mm, sde=axial.sde)


def _adapt(
    prior: Denoiser, measurement: Measurement
) -> tuple[Denoiser, LinearOperator | None, list[Remark]]:
    """Fit prior and measurement to each other: modality, pixel size and channels.

    Returns:
        The prior at the pixel size it will see; the operator from its images to those of the
        measurement but for their phase, ``None`` where they are the same; remarks for the user.
    """
    remarks: list[Remark] = []
    embedding: LinearOperator | None = None
    operator = measurement.operator
    sides = operator.in_shape
    channels = 1
    if isinstance(prior, NetworkPrior):
        card = prior.card
        if card.modality != measurement.modality:
            raise CheckpointError(
                f"prior '{card.name}' is for {card.modality}, the measurement is "
                f"{measurement.modality}; choose a prior of that modality ('recon priors list')"
            )
        channels = prior.net.config.channels
        pixel = float(np.mean(measurement.pixel_mm))
        low, high = card.pixel_mm_range
        plane = sides[-2:]  # the slices of a volume keep their distance
        fine = pixel < 0.95 * low
        # coarser pixels must be the prior's: beyond its range they lose detail for nothing
        factors = (k for k in (2, 3, 4) if low <= 1.05 * k * pixel <= 1.1 * high)
        factor = next((k for k in factors if fine and all(n % k == 0 for n in plane)), 1)
        if factor > 1:
            sides = (*sides[:-2], *(side // factor for side in plane))
            embedding = Upsample(sides, factor, operator.dtype)
            text = (
                f"reconstructed on pixels of {pixel * factor:.3g} mm and interpolated, since "
                f"those of {pixel:.3g} mm are finer than the prior's"
            )
            remarks.append(Remark("FINE_PIXELS", text))
            pixel *= factor
        elif not 0.95 * low <= pixel <= 1.05 * high:
            text = (
                f"pixels of {pixel:.3g} mm lie outside the prior's {low:.3g} to {high:.3g} mm: "
                "expect a worse image"
            )
            remarks.append(Remark("PIXEL_SIZE", text))
        prior = prior.at(pixel_mm=pixel)
    if operator.dtype.is_complex:
        if channels == 2 and len(sides) == 3:
            raise UnsupportedError(
                "a prior of complex slices cannot serve a complex volume measured as a whole; "
                "choose a prior of one channel"
            )
        split = ComplexFromChannels(sides) if channels == 2 else ComplexFromReal(sides)
        embedding = split if embedding is None else embedding @ split
        if isinstance(operator, Sense) and not bool(operator.support.all()):
            # else the prior would draw what it likes where no coil sees
            seen = operator.support.to(torch.complex64)
            embedding = Diagonal(seen, operator.in_shape, torch.complex64) @ embedding
    elif channels == 2:
        raise UnsupportedError(
            "a prior of complex images cannot serve a real operator; choose a prior of one channel"
        )
    return prior, embedding, remarks


def _needs_phase(prior: Denoiser, operator: LinearOperator) -> bool:
    """Whether a prior of real images is to serve complex ones."""
    real = not isinstance(prior, NetworkPrior) or prior.net.config.channels == 1
    return operator.dtype.is_complex and real


def _affine(prior: Denoiser, measurement: Measurement) -> tuple[float, float]:
    """``physical = offset + scale * prior`` in the measurement's units."""
    if prior.unit == "HU":
        mu = float(measurement.mu_water or 0.0)
        offset = mu * (1 + prior.offset / 1000.0)
        return offset, mu * prior.scale / 1000.0
    if prior.unit == "relative":
        # thick slices have the image's intensity, their adjoint that over the thickness
        thick = isinstance(measurement.operator, ThickSlices)
        magnitude = torch.cat(
            [
                (few.data if thick else few.operator.adjoint(few.data)).abs().float().cpu()
                for few in measurement.parts()
            ]
        )
        top = float(percentile(magnitude.numpy(), 99.5))
        return prior.offset * top, prior.scale * top
    return prior.offset, prior.scale


def _unfitted(chi2: Tensor) -> list[Remark]:
    """A remark where the data are not fitted to their noise."""
    worst = float(chi2.max())
    if worst <= CHI2_HIGH:
        return []
    text = (
        f"the residual's reduced chi-square is {worst:.3g} in the worst slice: the data are not "
        "fitted to their noise; check geometry, field of view, units and noise level, or raise "
        "the data weight"
    )
    return [Remark("RESIDUAL", text)]


def _check_types(measurement: object, prior: object, options: object, coupling: object) -> None:
    """Refuse arguments of another kind before they fail somewhere below.

    Raises:
        InputError: with what was expected.
    """
    if not isinstance(measurement, Measurement):
        raise InputError(
            f"reconstruct needs an inverse.Measurement of operator, data and noise, got a "
            f"{type(measurement).__name__}"
        )
    if not isinstance(prior, Denoiser):
        given = f"the text {prior!r}" if isinstance(prior, str) else f"a {type(prior).__name__}"
        raise InputError(
            f"reconstruct needs a prior that is an inverse.priors.Denoiser, got {given}; "
            "load_prior('ct-small') gives one, and a subclass with a method denoise is one"
        )
    if not (options is None or isinstance(options, Mapping)):
        raise InputError(f"options must map names to values, got {options!r}")
    if not isinstance(coupling, str | Coupling):
        raise InputError(
            f"coupling must be a name or an inverse.posterior.Coupling, got {coupling!r}"
        )


def _whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, of any library, as Python's own.

    Raises:
        InputError: another value, or one below ``least``.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise InputError(f"{name} must be a whole number{bound}, got {value!r}")
    return int(value)


def _usable(device: str | torch.device) -> torch.device:
    """The device, if it is there.

    Raises:
        InputError: an unknown or absent device.
    """
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, NotImplementedError, RuntimeError):
        raise InputError(
            f"device {str(device)!r} is not known or not there; choose 'cpu', or 'cuda' where "
            "there is a GPU"
        ) from None
