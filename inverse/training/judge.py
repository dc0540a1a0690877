"""What a network is judged by: denoising errors on held-out images, and what they say.

The images are fixed slices of held-out and of as many training patients, without motion beyond
the resampling to a grid: to that of the settings, and where the run is trained on the finer one
too, to that as well.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inverse.errors import NumericalError
from inverse.priors.denoiser import Denoiser, expand
from inverse.priors.energy import edm_energy, energy_score
from inverse.priors.network import UNet, edm_denoise, position_channels
from inverse.training.data import Augmentation, Batch, ImageSet, draw_batch, fine_enough, on_grid
from inverse.training.memorisation import gap, nearest_neighbours
from inverse.training.objectives import Model
from inverse.training.state import RunState

if TYPE_CHECKING:
    from inverse.training.loop import Task, TrainConfig

__all__ = ["Judge", "choose_average", "model_of"]

logger = logging.getLogger(__name__)

VALIDATION_LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_CHUNK = 4
"""Images of a network call."""


def model_of(net: UNet, position: Tensor, config: TrainConfig) -> Model:
    """The network as denoiser, and as energy if it is one, at pixels of these positions."""
    dtype = torch.bfloat16 if config.bfloat16 else torch.float32

    def energy(x: Tensor, sigma: Tensor, pixel_mm: Tensor) -> Tensor:
        return edm_energy(net, x[:, None], sigma, pixel_mm, position, dtype)

    def direct(x: Tensor, sigma: Tensor, pixel_mm: Tensor) -> Tensor:
        return edm_denoise(net, x[:, None], sigma, pixel_mm, position, dtype)[:, 0]

    def by_gradient(x: Tensor, sigma: Tensor, pixel_mm: Tensor) -> Tensor:
        score = energy_score(lambda u: energy(u, sigma, pixel_mm), x)
        return x + expand(sigma**2, x) * score

    denoise = by_gradient if config.network == "energy" else direct
    return Model(denoise, energy, net.config.sigma_data)


@dataclass(frozen=True)
class _Grid:
    """Images of one grid.

    Attributes:
        suffix: what its entries of the log end in.
        held: held-out images.
        own: images of training patients, where there are comparable ones.
    """

    suffix: str
    held: Batch
    own: Batch | None


class Judge:
    """Judges the weights of a run.

    Training images are compared with held-out ones of their kind only: simulated images are
    easier than patients.

    Args:
        task: the run.
        count: images of each kind and grid.
    """

    def __init__(self, task: Task, count: int = 16) -> None:
        self._task, config = task, task.config

        def fixed(sets: Sequence[ImageSet], moves: Augmentation) -> Batch:
            generator = torch.Generator().manual_seed(config.seed)
            return draw_batch(sets, moves.still(), count, None, generator)

        def grid(suffix: str, held: ImageSet, own: Sequence[ImageSet], a: Augmentation) -> _Grid:
            return _Grid(suffix, fixed([held], a), fixed(own, a) if own else None)

        alike = [s for s in task.sets if s.natural == task.validation.natural]
        self._grids = [grid("", task.validation, alike, task.moves)]
        if config.fine:
            if held := fine_enough([task.validation], task.moves):
                own = fine_enough(alike, task.moves)
                self._grids.append(grid("_fine", held[0], own, task.moves.finer()))
            else:
                logger.warning(
                    "held-out images are too coarse for the finer grid; no error is measured there"
                )
        low, high = config.sigma_range
        self.levels = [v for v in VALIDATION_LEVELS if low <= v <= high] or [math.sqrt(low * high)]

    def report(self, weights: Mapping[str, Tensor], exact: Denoiser | None) -> dict[str, Any]:
        """Denoising RMSE by noise level, prior units, and the memorisation gap, a grid."""
        record: dict[str, Any] = {}
        for grid in self._grids:
            held = self.errors(weights, grid.held)
            record[f"validation{grid.suffix}"] = self._rmse(held)
            if grid.own is None:
                continue
            own = self.errors(weights, grid.own)
            record[f"training{grid.suffix}"] = self._rmse(own)
            found = gap(held, own)
            record[f"memorisation{grid.suffix}"] = found.record()
            if found.alarm:
                logger.warning(
                    "held-out error%s is %.2f times the training error: memorisation, or "
                    "held-out images of another kind",
                    " on the finer grid" if grid.suffix else "",
                    found.ratio,
                )
        if exact is not None:
            floor = [float(exact.error(v)) for v in self.levels]
            record["floor"] = {
                f"{v:g}": round(e, 5) for v, e in zip(self.levels, floor, strict=True)
            }
        return record

    def score(self, weights: Mapping[str, Tensor]) -> float:
        """Geometric mean over noise levels and grids of the held-out RMSE."""
        errors = torch.stack([self.errors(weights, g.held).mean(dim=1) for g in self._grids])
        return float(errors.log().mean().mul(0.5).exp())

    def seconds(
        self, weights: Mapping[str, Tensor], clock: Callable[[], float]
    ) -> tuple[float, float]:
        """What :meth:`report` and :meth:`score` take, by a few images of each grid."""
        reports = scores = 0.0
        for grid in self._grids:
            few = Batch(*(part[:_CHUNK] for part in vars(grid.held).values()))
            start = clock()
            self.errors(weights, few)
            each = (clock() - start) / len(few.images)
            scores += each * len(grid.held.images)
            reports += each * len(grid.held.images) * (1 if grid.own is None else 2)
        return reports, scores

    def _rmse(self, errors: Tensor) -> dict[str, float]:
        values = errors.mean(dim=1).sqrt().tolist()
        return {f"{v:g}": round(e, 5) for v, e in zip(self.levels, values, strict=True)}

    @torch.no_grad()
    def errors(self, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Mean squared denoising errors ``(levels, slices)`` with these weights."""
        device, card, config = self._task.crew.device, self._task.card, self._task.config
        net = UNet(self._task.network).to(device).channels_last().eval()
        net.load_state_dict(dict(weights))
        x0 = ((batch.images - card.offset) / card.scale).to(device)
        position = position_channels((x0.shape[-2], x0.shape[-1]), device)
        model = model_of(net, position, config)
        rows = []
        for level in self.levels:
            z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).to(device)
            errors = []
            for i in range(0, len(x0), _CHUNK):
                part = x0[i : i + _CHUNK]
                s = torch.full((len(part),), level, device=device)
                noisy = part + level * z[i : i + _CHUNK]
                d = model.denoise(noisy, s, batch.pixel_mm[i : i + _CHUNK].to(device))
                errors.append((d - part).square().mean(dim=(1, 2)))
            rows.append(torch.cat(errors))
        result = torch.stack(rows).cpu().double()
        if not bool(torch.isfinite(result).all()):
            raise NumericalError(
                "the denoising error of the averaged weights is not finite; lower the learning "
                "rate, or leave bfloat16 out"
            )
        return result

    def neighbours(self, samples: Tensor) -> dict[str, Any]:
        """The nearest-neighbour check of samples in physical units, for the card."""
        still = self._task.moves.still()
        training = torch.cat([on_grid(s, still) for s in self._task.sets])
        held = on_grid(self._task.validation, still)
        found = nearest_neighbours(samples.cpu().float(), training, held)
        if found.p_value < 0.01:
            logger.warning(
                "samples are closer to training images than held-out images are (p = %.2g): the "
                "prior repeats them",
                found.p_value,
            )
        return found.record()


def choose_average(
    state: RunState, run: Path, judge: Judge, config: TrainConfig
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The moving average; of ``config.averages`` and it, the one with the least held-out error."""
    best: Mapping[str, Tensor] = state.averages["ema"].weights
    if not config.averages:
        return best, {}
    scores = {"ema": judge.score(best)}
    profile_error = {}
    name = "ema"
    for width in config.averages:
        weights, error = state.average(run, width)
        scores[f"{width:g}"], profile_error[f"{width:g}"] = judge.score(weights), round(error, 4)
        if scores[f"{width:g}"] < scores[name]:
            best, name = weights, f"{width:g}"
    found = {
        "chosen": name,
        "held_out_rmse": {k: round(v, 6) for k, v in scores.items()},
        "profile_error": profile_error,
    }
    return best, {"average": found}
