"""What an output folder holds, as the page and the figures show it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inverse.volumes import (
    DiskVolume,
    Volume,
    order_statistics,
    percentile,
    slabs,
)
from recon_cli.report.figures import SHARE_MAP, SIGNED_MAP, STD_MAP, Window

__all__ = ["SCORES", "Coverage", "Map", "Output", "load"]

CT_WINDOWS = (
    Window("Lung", -1350.0, 150.0),
    Window("Mediastinum", -160.0, 240.0),
    Window("Bone", -770.0, 1730.0),
    Window("Brain", 0.0, 80.0),
)
CT_ERROR_TOP = 200.0
CT_BODY = -500.0
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
GROUPS = 10
SCORES = {"psnr": "PSNR in dB", "ssim": "SSIM", "nrmse": "NRMSE"}


@dataclass(frozen=True)
class Map:
    """A map that the page lays over the prior's image.

    Attributes:
        title: for readers.
        volume: ``(slices, rows, columns)``.
        unit: its unit.
        step: resolution of the file it comes from.
        low: start of the colour scale; below 0 for signed maps.
        high: its end.
        palette: colour map.
        note: what it means.
    """

    title: str
    volume: Volume
    unit: str
    step: float
    low: float
    high: float
    palette: str
    note: str = ""


@dataclass(frozen=True)
class Coverage:
    """Whether the spread of the samples is as large as the error, where the truth is known.

    Attributes:
        nominal: promised shares of pixels, percent.
        covered: shares whose truth lies inside, percent.
        std: root mean square of the std in groups of rising std, in the unit of the image.
        rmse: root mean square error of each group.
        where: which pixels count.
        conformal: what the card's conformal intervals promise and hold, percent; ``None`` where
            there are none.
    """

    nominal: list[float]
    covered: list[float]
    std: list[float]
    rmse: list[float]
    where: str
    conformal: tuple[float, float] | None


@dataclass(frozen=True)
class Output:
    """What an output folder holds.

    Attributes:
        run: ``run.json``.
        metrics: ``metrics.json``.
        truth: the reference, where there is one.
        images: reconstructions by method; the prior's is last.
        steps: resolution of truth and images in their files.
        maps: by name.
        spacing: row and column spacing, mm.
        interval: ends of the conformal interval, where the prior's card has one.
    """

    run: Mapping[str, Any]
    metrics: Mapping[str, Any]
    truth: Volume | None
    images: Mapping[str, Volume]
    steps: Mapping[str, float]
    maps: Mapping[str, Map]
    spacing: tuple[float, float]
    interval: tuple[Volume, Volume] | None = None

    @property
    def unit(self) -> str:
        """``"HU"`` or ``"signal"``."""
        return str(self.metrics["unit"])

    @property
    def std(self) -> Volume | None:
        """Standard deviation of the prior's image, where there are several samples."""
        return self.maps["std"].volume if "std" in self.maps else None

    @property
    def reference(self) -> Volume:
        """The truth, or the prior's image where there is none."""
        return self.truth if self.truth is not None else list(self.images.values())[-1]

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """Display windows: fixed for CT, from the values for MR."""
        if self.unit == "HU":
            return CT_WINDOWS
        low, high = percentile(self.reference, (1.0, 99.7))
        return (Window("Auto", float(low), float(high)), Window("Signal", 0.0, float(high)))

    @cached_property
    def error_top(self) -> float:
        """End of the error scale: fixed for CT, so that reports compare."""
        return CT_ERROR_TOP if self.unit == "HU" else 0.25 * self.windows[0].high

    @property
    def titles(self) -> dict[str, str]:
        """Title of each reconstruction."""
        return {name: str(self.metrics["methods"][name]["title"]) for name in self.images}

    @cached_property
    def styles(self) -> dict[str, str]:
        """Colour class of the truth and of each method."""
        baselines = [name for name in self.images if name != "prior"]
        found = {name: f"s-{k % 5}" for k, name in enumerate(baselines)}
        return {"truth": "s-truth", **found, "prior": "s-prior"}

    @property
    def source(self) -> list[int]:
        """Index of each slice in its source."""
        return [int(entry["slice"]) for entry in self.metrics["per_slice"]]

    def score(self, name: str) -> dict[str, list[float]]:
        """A metric of each slice, by method; of those judged in every slice."""
        return {
            method: [entry[method][name] for entry in self.metrics["per_slice"]]
            for method in self.images
            if self.metrics["methods"][method].get(name)
            and all(name in entry.get(method, ()) for entry in self.metrics["per_slice"])
        }

    @property
    def trust(self) -> Mapping[str, Any]:
        """What `inverse.trust.examine` found; empty where it was not asked."""
        return self.metrics.get("trust") or {}

    @property
    def residual(self) -> dict[str, Any] | None:
        """Chi-square by view or frequency: of each method, and of one sample with its interval."""
        found = self.metrics.get("residual_by_group")
        if not found:
            return None
        methods = [
            {"key": name, "title": self.titles[name], "style": self.styles[name], "value": value}
            for name, value in found["methods"].items()
            if name in self.images
        ]
        chi2 = self.trust.get("chi2") or {}
        expected = None
        if len(chi2.get("groups") or ()) == len(found["at"]):
            expected = [list(map(float, end)) for end in chi2["expected"]]
            value = np.mean(np.asarray(chi2["value"], np.float64), axis=0).tolist()
            methods.append(
                {"key": "sample", "title": "One sample", "style": "s-prior", "value": value,
                 "dashed": True}
            )  # fmt: skip
        return {"axis": found["axis"], "at": found["at"], "methods": methods, "expected": expected}

    @cached_property
    def coverage(self) -> Coverage | None:
        """Coverage of the intervals of the std, and std against error; inside the body."""
        import torch

        from inverse.trust import interval

        if self.truth is None or self.std is None or "prior" not in self.images:
            return None
        pixels = _Pixels(self.truth, self.images["prior"], self.std, self.unit)
        if pixels.count < GROUPS:
            return None
        samples = int((self.run["settings"].get("reconstruction") or {}).get("samples", 2))
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        factors = [float(interval(zero, one, samples, level)[1]) for level in LEVELS]
        inside = np.zeros(len(factors), np.int64)
        for error, std in pixels.pairs():
            inside += [int((error <= factor * std).sum()) for factor in factors]
        conformal = None
        if self.interval is not None and self.trust.get("interval"):
            promised = 100 * float(self.trust["interval"]["level"])
            conformal = promised, 100 * pixels.share_between(*self.interval)
        std_rms, rmse = pixels.by_rising_std(GROUPS)
        return Coverage(
            [100 * level for level in LEVELS],
            [100 * (int(n) / pixels.count) for n in inside],
            std_rms,
            rmse,
            "inside the body",
            conformal,
        )

    def captions(self, k: int) -> dict[str, str]:
        """PSNR of slice ``k`` by title."""
        return {
            self.titles[name]: f"{entry['psnr']:.1f} dB"
            for name, entry in self.metrics["per_slice"][k].items()
            if name in self.images and entry.get("psnr") is not None
        }


class _Pixels:
    """Error and std of the pixels inside the body, a few slices at a time.

    Args:
        truth: reference.
        image: the prior's.
        std: standard deviation of its samples; pixels where it is 0 do not count.
        unit: of all.
    """

    def __init__(self, truth: Volume, image: Volume, std: Volume, unit: str) -> None:
        from inverse.metrics import body_mask

        body = CT_BODY if unit == "HU" else 0.1 * float(percentile(truth, 99))
        self._truth, self._image, self._std = truth, image, std
        self._mask = DiskVolume(None, truth.shape, np.bool_)
        self.count = 0
        for part in slabs(len(truth)):
            mask = body_mask(truth[part], body) & (std[part] > 0)
            self._mask[part] = mask
            self.count += int(mask.sum())

    def pairs(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Absolute error and std."""
        for part in slabs(len(self._truth)):
            mask = self._mask[part]
            error = np.abs(self._image[part] - self._truth[part])[mask]
            yield error.astype(np.float64), self._std[part][mask].astype(np.float64)

    def share_between(self, low: Volume, high: Volume) -> float:
        """Share of them whose truth lies between two volumes."""
        inside = 0
        for part in slabs(len(self._truth)):
            truth = self._truth[part]
            found = (truth >= low[part]) & (truth <= high[part])
            inside += int(found[self._mask[part]].sum())
        return inside / self.count

    def by_rising_std(self, groups: int) -> tuple[list[float], list[float]]:
        """Root mean squares of std and error in groups of rising std, equally large.

        Equal values go to groups in the order of the pixels, as a stable sort has it.
        """
        sizes = self.count // groups + (np.arange(groups) < self.count % groups)
        starts = np.cumsum(sizes)[:-1]
        firsts = order_statistics(lambda: (std for _, std in self.pairs()), starts)
        # rank of the next pixel that equals the first one of a group
        ranks = dict.fromkeys(firsts.tolist(), 0)
        for _, std in self.pairs():
            for value in ranks:
                ranks[value] += int((std < value).sum())
        squares = np.zeros((2, groups))
        for error, std in self.pairs():
            group = np.searchsorted(firsts, std, side="left")
            for value, rank in ranks.items():
                equal = np.flatnonzero(std == value)
                group[equal] = np.searchsorted(starts, rank + np.arange(len(equal)), side="right")
                ranks[value] += len(equal)
            for total, values in zip(squares, (std, error), strict=True):
                total += np.bincount(group, values**2, groups)
        std_rms, rmse = np.sqrt(squares / sizes).tolist()
        return std_rms, rmse


# --- reading -----------------------------------------------------------------------------------


def _json(path: Path) -> Any:
    from inverse.errors import InputError, NoInputError

    if not path.is_file():
        raise NoInputError(
            f"'{path.parent}' holds no {path.name}, so it is no output of recon; give the folder "
            "that 'recon study', 'demo' or 'reconstruct' wrote"
        )
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise InputError(f"'{path}' is not valid JSON; run the reconstruction again") from None


@dataclass(frozen=True)
class _Series:
    volume: Volume
    step: float
    spacing: tuple[float, float]


def _series(
    folder: Path, name: str, run: Mapping[str, Any], scratch: Path | None
) -> _Series | None:
    """A series of the output in its unit; MR files hold steps, whose size the run log knows."""
    from inverse.io.series import read_series

    if not (folder / name).is_dir():
        return None
    series = read_series(folder / name, allocate=partial(DiskVolume, scratch))
    step = float(run["outputs"][name]["slope"])
    if series.unit != "HU":
        for k, image in enumerate(series.array):
            series.array[k] = image * np.float32(step)
    return _Series(series.array, step, (series.spacing[1], series.spacing[2]))


def _top(volume: Volume, least: float = 1e-12) -> float:
    """End of the colour scale of a map."""
    return max(float(percentile(volume, 99.7, magnitude=True)), least)


def _array(path: Path, shape: Sequence[int]) -> Volume:
    """A map that `recon_cli.evidence.write_maps` wrote."""
    from inverse.errors import InputError

    try:
        array = DiskVolume.of_npy(path)
    except (OSError, ValueError):
        raise InputError(f"'{path}' is no NumPy array; run the reconstruction again") from None
    whole = array.shape == tuple(shape) and array.dtype.kind == "f"
    if not (whole and all(np.isfinite(image).all() for image in array)):
        raise InputError(
            f"'{path}' must hold finite values of shape {tuple(shape)}, got {array.dtype} "
            f"{array.shape}; run the reconstruction again"
        )
    return array


def _maps(folder: Path, unit: str, std: _Series | None, shape: Sequence[int]) -> dict[str, Map]:
    found = {}
    if std is not None:
        found["std"] = Map(
            "Std of samples", std.volume, unit, std.step, 0.0, _top(std.volume), STD_MAP
        )
    for name, title, note in (
        (
            "prior-share",
            "Share of the prior",
            "share of each pixel's value that the data do not determine at their noise and the "
            "prior has filled in, 0 to 1.",
        ),
        (
            "null-std",
            "Std of the prior's part",
            "standard deviation over samples of the part that the data do not determine.",
        ),
        (
            "residual",
            "Residual",
            "gradient of the log likelihood, Aᴴ(y − Ax)/σ², over its size for noise alone; within "
            "3 is noise, structure beyond is data that the image does not explain.",
        ),
    ):
        path = folder / "maps" / f"{name}.npy"
        if not path.is_file():
            continue
        volume = _array(path, shape)
        if name == "residual":
            top = _top(volume, 5.0)
            found[name] = Map(title, volume, "sd of noise", 2**-6, -top, top, SIGNED_MAP, note)
        elif name == "prior-share":
            found[name] = Map(title, volume, "", 2**-8, 0.0, 1.0, SHARE_MAP, note)
        else:
            top = _top(volume)
            found[name] = Map(title, volume, unit, top / 2**10, 0.0, top, STD_MAP, note)
    return found


def _interval(folder: Path, shape: Sequence[int]) -> tuple[Volume, Volume] | None:
    low, high = (folder / "maps" / f"interval-{end}.npy" for end in ("low", "high"))
    if not (low.is_file() and high.is_file()):
        return None
    return _array(low, shape), _array(high, shape)


def load(folder: Path) -> Output:
    """Read an output folder.

    Raises:
        NoInputError: no output of this toolkit.
        InputError: a damaged one.
    """
    from inverse.errors import InputError

    run, metrics = _json(folder / "run.json"), _json(folder / "metrics.json")
    try:
        names = ["truth", *metrics["methods"], "std"]
        where = {name: name if name in ("truth", "std") else f"baseline-{name}" for name in names}
        where["prior"] = "recon"
        # what the images take goes beside them, or to the system's place where that is read-only
        scratch = folder if os.access(folder, os.W_OK) else None
        series = {name: _series(folder, where[name], run, scratch) for name in names}
        truth, std = series.pop("truth"), series.pop("std")
        there = {name: found for name, found in series.items() if found is not None}
        if not there:
            raise InputError(f"'{folder}' holds no image series; run the reconstruction again")
        first = next(iter(there.values()))
        shape = first.volume.shape
        for name, found in {**there, "truth": truth, "std": std}.items():
            if found is not None and found.volume.shape != shape:
                raise InputError(
                    f"'{folder}': the series of '{name}' has shape {found.volume.shape}, others "
                    f"{shape}; run the reconstruction again"
                )
        if len(metrics["per_slice"]) != shape[0]:
            raise InputError(
                f"'{folder}': metrics.json tells of {len(metrics['per_slice'])} slices, the "
                f"series hold {shape[0]}; run the reconstruction again"
            )
        steps = {name: found.step for name, found in there.items()}
        if truth is not None:
            steps["truth"] = truth.step
        return Output(
            run,
            metrics,
            None if truth is None else truth.volume,
            {name: found.volume for name, found in there.items()},
            steps,
            _maps(folder, str(metrics["unit"]), std, shape),
            first.spacing,
            _interval(folder, shape),
        )
    except KeyError as error:
        raise InputError(
            f"the JSON files in '{folder}' lack {error}; run the reconstruction again"
        ) from None
