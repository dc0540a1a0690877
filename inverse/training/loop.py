"""Training of a network prior: one loop, exact resume, one or many processes, a JSON-lines log.

The batch, the noise levels and the noise of step ``k`` come from a generator seeded by
``(seed, k)``, and the state holds all else that a step depends on.  A killed run that is resumed
therefore ends in the weights of an uninterrupted one, bit for bit on one machine with one thread
count; several processes (:mod:`inverse.training.parallel`) end in the same weights to rounding.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from inverse.errors import InputError, NumericalError, ReconError, UnsupportedError
from inverse.priors.checkpoint import NetworkPrior, PriorCard, load_prior, save_prior, update_card
from inverse.priors.denoiser import Denoiser, expand
from inverse.priors.energy import edm_energy, energy_score
from inverse.priors.network import NetworkConfig, UNet, edm_denoise, position_channels
from inverse.training.data import Augmentation, Batch, ImageSet, draw_batch, on_grid
from inverse.training.ema import Average, half_life, power
from inverse.training.memorisation import gap, nearest_neighbours
from inverse.training.objectives import OBJECTIVES, Model, Objective, Perturbed, Setting
from inverse.training.parallel import Team, team
from inverse.training.state import SNAPSHOTS, RunState, read_state

__all__ = ["TrainConfig", "train"]

logger = logging.getLogger(__name__)

VALIDATION_LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
FEWEST, FEW = 4, 50
"""Training slices below which a run is refused, and below which it is warned of."""
SLOW_AVERAGE = 0.2
"""Relative width of the second average that is tracked; see :mod:`inverse.training.ema`."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        steps: optimiser steps of the whole run.
        objective: a name of :data:`inverse.training.objectives.OBJECTIVES`.
        network: what the network puts out: ``"score"`` (a denoiser), or ``"energy"``, whose
            gradient is the score.
        batch: crops a step; whole images are batched to the same number of pixels.
        crop: side of crops.
        whole: share of steps on whole images.
        whole_from: share of the run after which all steps are on whole images.
        fine: share of steps on the grid of twice the side and half the pixel size, drawn from
            the images that are fine enough for it.
        lr: learning rate of Adam after ``warmup`` steps; over the last ``decay`` share of the run
            it falls linearly to zero.
        warmup: steps.
        decay: share.
        ema: half-life of the weights' moving average, as a share of the steps done so far.
        averages: relative widths of other averages (:func:`inverse.training.ema.power`); the one
            with the smallest held-out error, or the moving average, is written.
        p_mean: mean of ln sigma.
        p_std: standard deviation of ln sigma.
        sigma_range: noise levels are clipped to it (prior units); equal ends for one level.
        levels: length of the ladder of ``ncsn``.
        langevin_steps: steps of Langevin a negative of ``cd`` and ``pcd``.
        langevin_step: their size relative to sigma^2.
        chains: persistent chains of ``pcd``, at least the images of a batch.
        clip: largest gradient norm.
        seed: seed of everything.
        bfloat16: network arithmetic in bfloat16.
        compile: compile the network (``torch.compile``), once for each shape of batch.
        workers: threads that prepare the next batches; 0 prepares each when its step begins.
        validate_every: steps between validations.
        save_every: steps between state files.
    """

    steps: int = 10_000
    objective: str = "dsm"
    network: Literal["score", "energy"] = "score"
    batch: int = 16
    crop: int = 128
    whole: float = 0.25
    whole_from: float = 0.8
    fine: float = 0.0
    lr: float = 1e-3
    warmup: int = 200
    decay: float = 0.4
    ema: float = 0.05
    averages: tuple[float, ...] = ()
    p_mean: float = -1.4
    p_std: float = 1.6
    sigma_range: tuple[float, float] = (0.005, 80.0)
    levels: int = 10
    langevin_steps: int = 5
    langevin_step: float = 0.1
    chains: int = 256
    clip: float = 1.0
    seed: int = 0
    bfloat16: bool = False
    compile: bool = False
    workers: int = 0
    validate_every: int = 500
    save_every: int = 250


def train(
    sets: Sequence[ImageSet],
    validation: ImageSet,
    network: NetworkConfig,
    config: TrainConfig,
    card: PriorCard,
    run: str | Path,
    out: str | Path,
    *,
    augmentation: Augmentation | None = None,
    device: str | torch.device = "cpu",
    minutes: float | None = None,
    exact: Denoiser | None = None,
    draw: Callable[[NetworkPrior], Tensor] | None = None,
    callback: Callable[[int, int, Mapping[str, Any]], None] | None = None,
) -> PriorCard:
    """Train a prior by the chosen objective and write it.

    Under ``torchrun`` all processes call this with the same arguments; the first writes.

    Args:
        sets: training images, in the physical units of the card.
        validation: images of other patients.
        network: shape of the network; ``sigma_data`` is measured here.
        config: settings.
        card: name, modality, offset, scale and texts; measured fields are filled in here.
        run: folder of the state and the log; an existing state is continued.
        out: prior file to write.
        augmentation: motions; default :class:`Augmentation` for the card's matrix.
        device: where to train; under ``torchrun``, ``cuda`` is the process's own GPU.
        minutes: stop after this time, with the state kept for a resume; the prior written is
            the moving average so far.
        exact: the images' own distribution where it is known; its error by noise level, the least
            possible, is logged beside the held-out one.
        draw: samples ``(n, h, w)`` in physical units from the finished prior, for the
            nearest-neighbour check on the card.
        callback: called as ``callback(step, steps, record)`` after every step, on every process.

    Returns:
        The card with hash, losses and settings filled in.

    Raises:
        InputError: too few images, images with NaN, or a state of other settings in ``run``.
        ReconError: an unknown objective, or noise levels that are not positive.
        UnsupportedError: an objective that does not serve these images, this network, several
            processes or compilation.
        NumericalError: if the loss is not finite or negatives diverge.
    """
    sets = [s for s in sets if len(s)]
    moves = augmentation or Augmentation(size=card.shape[0], pixel_mm=card.pixel_mm_range)
    _check_images(sets, validation)
    _check_objective(config, moves)
    if config.fine and not _fine_enough(sets, moves):
        raise InputError(
            f"fine={config.fine:g} needs images with pixels of at most "
            f"{moves.finer().pixel_mm[1]:g} mm, got none; leave it at 0 or add finer images"
        )
    for width in config.averages:
        power(width)
    with team(torch.device(device)) as crew:
        start = draw_batch(sets, moves, 64, None, torch.Generator().manual_seed(config.seed))
        network = dataclasses.replace(network, sigma_data=_std(start, card))
        task = _Task(sets, validation, moves, card, config, network, crew)
        return _train(task, Path(run), Path(out), minutes, exact, draw, callback)


@dataclass(frozen=True)
class _Task:
    """What is trained, on what, and by which processes."""

    sets: Sequence[ImageSet]
    validation: ImageSet
    moves: Augmentation
    card: PriorCard
    config: TrainConfig
    network: NetworkConfig
    crew: Team


def _train(
    task: _Task,
    run: Path,
    out: Path,
    minutes: float | None,
    exact: Denoiser | None,
    draw: Callable[[NetworkPrior], Tensor] | None,
    callback: Callable[[int, int, Mapping[str, Any]], None] | None,
) -> PriorCard:
    """:func:`train` on one of the processes, after the checks that need no network."""
    config, crew = task.config, task.crew
    first, device = crew.rank == 0, crew.device
    if crew.size > 1 and OBJECTIVES[config.objective].make.together:
        raise UnsupportedError(
            f"objective '{config.objective}' needs a whole batch on one process, got {crew.size} "
            "processes; run it without torchrun, or use 'dsm'"
        )
    torch.manual_seed(config.seed)
    net = UNet(task.network).to(device).channels_last()
    objective = _objective(task).to(device)
    groups: list[dict[str, Any]] = [{"params": list(net.parameters())}]
    if own := list(objective.parameters()):
        groups.append({"params": own, "weight_decay": 0.0})
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    averages = {
        "ema": Average.of(net, half_life(config.ema)),
        "slow": Average.of(net, power(SLOW_AVERAGE)),
    }
    identity = {
        "network": asdict(task.network),
        "objective": config.objective,
        "kind": config.network,
        "seed": config.seed,
        "ema": config.ema,
    }
    state = RunState(net, averages, objective, optimiser, identity)
    if first:
        run.mkdir(parents=True, exist_ok=True)
    if (found := crew.from_first(read_state(run) if first else None)) is not None:
        state.restore(found)
    if first:
        state.tidy(run)
    if config.compile:
        net.compile(dynamic=False)
    judge = _Judge(task)
    log = run / "log.jsonl"
    before, started = state.seconds, time.monotonic()
    checked: dict[str, Any] = {}
    with _batches(task, state.step) as batches:
        while state.step < config.steps:
            if minutes is not None and crew.any(time.monotonic() - started > 60 * minutes):
                break
            begun = time.monotonic()
            rate = _learning_rate(state.step, config)
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
            images = next(batches)
            loss = _loss(net, objective, images, task)
            if loss.requires_grad:
                loss.backward()
            value = float(crew.add(loss.detach(), net.parameters()))
            norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip))
            if own:
                torch.nn.utils.clip_grad_norm_(own, config.clip)
            if not math.isfinite(value) or not math.isfinite(norm):
                raise NumericalError(
                    f"training loss is not finite at step {state.step} (loss {value}, gradient "
                    f"{norm}); lower the learning rate or check the images; the last state file "
                    "is intact"
                )
            optimiser.step()
            state.step += 1
            for average in averages.values():
                average.update(net, state.step)
            now = time.monotonic()
            state.seconds = before + now - started
            record: dict[str, Any] = {
                "step": state.step,
                "loss": value,
                "lr": rate,
                "gradient": norm,
                "seconds": state.seconds,
                "images": images.count,
                "images_per_second": images.count / max(now - begun, 1e-9),
            }
            last = state.step == config.steps
            validates = first and (last or state.step % config.validate_every == 0)
            checked = judge.report(averages["ema"].weights, exact) if validates else {}
            record |= checked
            if first:
                with log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            if callback is not None:
                callback(state.step, config.steps, record)
            if first and state.step % max(1, config.steps // SNAPSHOTS) == 0 and not last:
                state.snapshot(run)
            if first and state.step % config.save_every == 0 and not last:
                state.save(run)
    if first:
        state.seconds = before + time.monotonic() - started
        state.save(run)
        weights, chosen = _choose_average(state, run, judge, config)
        if not checked or chosen:
            checked = judge.report(weights, exact)
        card = _write_prior(task, state, weights, {**checked, **chosen}, out)
        if draw is not None:
            neighbours = judge.neighbours(draw(load_prior(out)))
            card = update_card(out, training={**card.training, "neighbours": neighbours})
    return crew.from_first(card if first else task.card)


def _write_prior(
    task: _Task,
    state: RunState,
    weights: Mapping[str, Tensor],
    measured: Mapping[str, Any],
    out: Path,
) -> PriorCard:
    """Write the prior with its card filled in."""
    final = UNet(task.network)
    final.load_state_dict({name: value.cpu() for name, value in weights.items()})
    images = [i for s in task.sets for i in s.images]
    names = {
        "validation": "validation_rmse",
        "training": "training_rmse",
        "memorisation": "memorisation",
        "floor": "floor_rmse",
        "average": "average",
    }
    card = dataclasses.replace(
        task.card,
        value_range=(float(min(i.min() for i in images)), float(max(i.max() for i in images))),
        sigma_range=task.config.sigma_range,
        network=task.config.network,
        training={
            **task.card.training,
            "steps": state.step,
            "minutes": round(state.seconds / 60, 1),
            "device": task.crew.device.type,
            "processes": task.crew.size,
            "settings": asdict(task.config),
            **{name: measured[key] for key, name in names.items() if key in measured},
            "validation_patients": len(task.validation.patients),
            "validation_slices": len(task.validation),
        },
    )
    return save_prior(out, final, card)


def _check_images(sets: Sequence[ImageSet], validation: ImageSet) -> None:
    """Refuse images that no prior can be trained on; warn of few."""
    if not sets or not len(validation):
        raise InputError("training needs at least one image set and held-out images, got none")
    shared = {p for s in sets for p in s.patients} & set(validation.patients)
    if shared:
        raise InputError(
            f"{len(shared)} patients are in both training and validation images; split by patient"
        )
    if not all(np.isfinite(i).all() for s in (*sets, validation) for i in s.images):
        raise InputError("training images hold NaN or infinite values; remove those slices")
    count = sum(map(len, sets))
    if count < FEWEST:
        raise InputError(
            f"training needs at least {FEWEST} slices beside the held-out ones, got {count}; add "
            "images"
        )
    if count < FEW:
        logger.warning("%d training slices are few; the prior may memorise them", count)


def _check_objective(config: TrainConfig, moves: Augmentation) -> None:
    """Refuse an objective that cannot train this network on these images."""
    low, high = config.sigma_range
    if not 0 < low <= high < math.inf:
        raise ReconError(
            f"sigma_range must be positive and increasing (equal for one level), got "
            f"{config.sigma_range}"
        )
    if config.objective not in OBJECTIVES:
        raise ReconError(f"no objective '{config.objective}'; there are {', '.join(OBJECTIVES)}")
    entry = OBJECTIVES[config.objective]
    if entry.network == "energy" and config.network != "energy":
        raise UnsupportedError(
            f"objective '{config.objective}' needs the energy itself, which a score network does "
            "not have; train an energy network (--network energy)"
        )
    if config.compile and (config.network == "energy" or entry.make.second_order):
        raise UnsupportedError(
            f"objective '{config.objective}' with a network of kind '{config.network}' takes "
            "second derivatives, which compiled networks do not give; leave compile out"
        )
    whole = config.crop >= moves.size
    if entry.whole and not whole:
        raise UnsupportedError(
            f"objective '{config.objective}' needs whole images of one size, got crops of "
            f"{config.crop} from {moves.size}; set crop to at least {moves.size} or use 'cd'"
        )
    some_whole = whole or config.whole > 0 or config.whole_from < 1
    side = moves.size if some_whole else config.crop
    if entry.limit is not None and side**2 > entry.limit:
        raise UnsupportedError(
            f"objective '{config.objective}' takes images of at most {entry.limit} pixels, got "
            f"{side} x {side}; train on smaller images, or use 'ssm-vr' or 'dsm'"
        )


def _objective(task: _Task) -> Objective:
    """The objective of a run; a stateful one starts from training images."""
    config, card = task.config, task.card
    entry = OBJECTIVES[config.objective]
    generator = torch.Generator().manual_seed(config.seed)
    start = draw_batch(task.sets, task.moves, 512 if entry.whole else 1, None, generator)
    setting = Setting(
        sigma_range=config.sigma_range,
        p_mean=config.p_mean,
        p_std=config.p_std,
        levels=config.levels,
        langevin_steps=config.langevin_steps,
        langevin_step=config.langevin_step,
        chains=config.chains,
        sigma_data=task.network.sigma_data,
    )
    images = (start.images - card.offset) / card.scale
    return entry.make(setting, images, start.pixel_mm, generator)


def _std(batch: Batch, card: PriorCard) -> float:
    """Standard deviation of training images in prior units (sigma_data of EDM)."""
    return round(float(((batch.images - card.offset) / card.scale).std()), 4)


def _learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay to zero."""
    left = (config.steps - step) / max(1.0, config.decay * config.steps)
    return config.lr * min(1.0, (step + 1) / config.warmup, left)


def _fine_enough(sets: Sequence[ImageSet], moves: Augmentation) -> list[ImageSet]:
    """The images whose own pixels lie within the finer grid's range."""
    largest = moves.finer().pixel_mm[1]
    kept = [s.where([p <= largest for p in s.pixel_mm]) for s in sets]
    return [s for s in kept if len(s)]


@dataclass(frozen=True)
class _Drawn:
    """This process's part of the batch of a step, and the generator for what comes next.

    Attributes:
        batch: the part.
        count: images of the whole batch.
        share: which of them the part has.
        generator: where the images left it.
    """

    batch: Batch
    count: int
    share: slice
    generator: torch.Generator


def _draw(task: _Task, step: int) -> _Drawn:
    """The images of ``step``."""
    sets, moves, config = task.sets, task.moves, task.config
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    if config.fine and float(torch.rand((), generator=generator)) < config.fine:
        sets, moves = _fine_enough(sets, moves), moves.finer()
    whole = (
        step >= config.whole_from * config.steps
        or float(torch.rand((), generator=generator)) < config.whole
        or config.crop >= moves.size
    )
    count = max(1, config.batch * config.crop**2 // moves.size**2) if whole else config.batch
    share = task.crew.share(count)
    batch = draw_batch(sets, moves, count, None if whole else config.crop, generator, share)
    return _Drawn(batch, count, share, generator)


@contextmanager
def _batches(task: _Task, step: int) -> Iterator[Iterator[_Drawn]]:
    """The batches from ``step`` on, prepared ahead by the threads of the settings."""
    steps, workers = range(step, task.config.steps), task.config.workers
    if workers < 1:
        yield (_draw(task, k) for k in steps)
        return
    with ThreadPoolExecutor(workers) as pool:

        def ahead() -> Iterator[_Drawn]:
            queue: deque[Future[_Drawn]] = deque()
            for k in steps:
                queue.append(pool.submit(_draw, task, k))
                if len(queue) > workers:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()

        try:
            yield ahead()
        finally:
            pool.shutdown(cancel_futures=True)


def _loss(
    net: UNet,
    objective: Objective,
    drawn: _Drawn,
    task: _Task,
) -> Tensor:
    """This process's part of the mean loss of a batch; a plain zero where it has no image."""
    batch, device = drawn.batch, task.crew.device
    x0 = ((batch.images - task.card.offset) / task.card.scale).to(device)
    sigma = objective.levels(drawn.count, drawn.generator)[drawn.share]
    z = torch.randn((drawn.count, *x0.shape[1:]), generator=drawn.generator)[drawn.share]
    if not len(x0):
        return torch.zeros((), device=device)
    images = Perturbed(x0, sigma.to(device), z.to(device), batch.pixel_mm.to(device))
    model = _model(net, batch.position.to(device), task.config)
    return objective.losses(model, images, drawn.generator).sum() / drawn.count


def _model(net: UNet, position: Tensor, config: TrainConfig) -> Model:
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


class _Judge:
    """What a network is judged by: fixed slices of held-out and of as many training patients.

    The slices have no motion beyond the resampling to the grid.  Simulated images take no part in
    the comparison, since they are easier than patients.
    """

    def __init__(self, task: _Task, count: int = 16) -> None:
        self._task, self._still = task, task.moves.still()
        config = task.config

        def fixed(chosen: Sequence[ImageSet]) -> Batch:
            generator = torch.Generator().manual_seed(config.seed)
            return draw_batch(chosen, self._still, count, None, generator)

        natural = [s for s in task.sets if s.natural]
        self._held, self._own = fixed([task.validation]), fixed(natural) if natural else None
        low, high = config.sigma_range
        self.levels = [v for v in VALIDATION_LEVELS if low <= v <= high] or [math.sqrt(low * high)]

    def report(self, weights: Mapping[str, Tensor], exact: Denoiser | None) -> dict[str, Any]:
        """Denoising RMSE by noise level, prior units, and the memorisation gap."""
        held = self.errors(weights, self._held)
        record: dict[str, Any] = {"validation": self._rmse(held)}
        if self._own is not None:
            own = self.errors(weights, self._own)
            record["training"] = self._rmse(own)
            found = gap(held, own)
            record["memorisation"] = found.record()
            if found.alarm:
                logger.warning(
                    "held-out error is %.2f times the training error: memorisation, or held-out "
                    "images of another kind",
                    found.ratio,
                )
        if exact is not None:
            floor = [float(exact.error(v)) for v in self.levels]
            record["floor"] = {
                f"{v:g}": round(e, 5) for v, e in zip(self.levels, floor, strict=True)
            }
        return record

    def score(self, weights: Mapping[str, Tensor]) -> float:
        """Geometric mean over noise levels of the held-out RMSE."""
        return float(self.errors(weights, self._held).mean(dim=1).log().mean().mul(0.5).exp())

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
        model = _model(net, position, config)
        rows = []
        for level in self.levels:
            z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).to(device)
            errors = []
            for i in range(0, len(x0), 4):
                s = torch.full((len(x0[i : i + 4]),), level, device=device)
                noisy = x0[i : i + 4] + level * z[i : i + 4]
                d = model.denoise(noisy, s, batch.pixel_mm[i : i + 4].to(device))
                errors.append((d - x0[i : i + 4]).square().mean(dim=(1, 2)))
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
        training = torch.cat([on_grid(s, self._still) for s in self._task.sets])
        held = on_grid(self._task.validation, self._still)
        found = nearest_neighbours(samples.cpu().float(), training, held)
        if found.p_value < 0.01:
            logger.warning(
                "samples are closer to training images than held-out images are (p = %.2g): the "
                "prior repeats them",
                found.p_value,
            )
        return found.record()


def _choose_average(
    state: RunState, run: Path, judge: _Judge, config: TrainConfig
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
