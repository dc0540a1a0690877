"""Training of a network prior: one loop, exact resume, one or many processes, a JSON-lines log.

The batch, the noise levels and the noise of step ``k`` come from a generator seeded by
``(seed, k)``, and the state holds all else that a step depends on.  A killed run that is resumed
therefore ends in the weights of an uninterrupted one, bit for bit on one machine with one thread
count; several processes (:mod:`inverse.training.parallel`) end in the same weights to rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import math
import statistics
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

from inverse.errors import InputError, NumericalError, UnsupportedError
from inverse.priors.checkpoint import NetworkPrior, PriorCard, load_prior, save_prior, update_card
from inverse.priors.denoiser import Denoiser
from inverse.priors.network import NetworkConfig, UNet
from inverse.training.budget import Plan, Progress
from inverse.training.data import Augmentation, Batch, ImageSet, draw_batch, fine_enough
from inverse.training.ema import Average, half_life, power
from inverse.training.judge import Judge, choose_average, model_of
from inverse.training.objectives import OBJECTIVES, Objective, Perturbed, Setting
from inverse.training.parallel import Team, team
from inverse.training.state import SNAPSHOTS, RunState, read_state

__all__ = ["TrainConfig", "train"]

logger = logging.getLogger(__name__)

FEWEST, FEW = 4, 50
"""Training slices below which a run is refused, and below which it is warned of."""
TRIALS = 3
"""Timed trial steps of each kind, whose median counts."""
SLOW_AVERAGE = 0.2
"""Relative width of the second average that is tracked; see :mod:`inverse.training.ema`."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        steps: optimiser steps of the whole run; ``None`` for as many as a time holds.
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
        warmup: steps; at most a tenth of those that a time holds.
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

    steps: int | None = 10_000
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
    clock: Callable[[], float] = time.monotonic,
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
        minutes: with ``config.steps``: stop after this time, with the state kept for a resume;
            the prior written is the moving average so far.  Without: the time of the whole run,
            its resumptions, validations and the choice of an average included (``draw`` comes on
            top), which the steps are made to fill, and to exceed by 5 % at most
            (:mod:`inverse.training.budget`).  The card's settings then tell the steps and the
            warm-up; a run of these has the same weights, which no second run of that time will
            have.
        exact: the images' own distribution where it is known; its error by noise level, the least
            possible, is logged beside the held-out one.
        draw: samples ``(n, h, w)`` in physical units from the finished prior, for the
            nearest-neighbour check on the card.
        callback: called as ``callback(step, steps, record)`` after every step, on every process;
            of a run whose length is not settled yet, ``steps`` is an estimate and
            ``record["open"]`` true.
        clock: seconds.

    Returns:
        The card with hash, losses and settings filled in.

    Raises:
        InputError: too few images, images with NaN, or a state of other settings in ``run``.
        InputError: an unknown objective, noise levels that are not positive, or neither steps nor
            minutes.
        UnsupportedError: an objective that does not serve these images, this network, several
            processes or compilation.
        NumericalError: if the loss is not finite or negatives diverge.
    """
    sets = [s for s in sets if len(s)]
    moves = augmentation or Augmentation(size=card.shape[0], pixel_mm=card.pixel_mm_range)
    _check_images(sets, validation)
    _check_config(config, moves, minutes)
    if config.fine and not fine_enough(sets, moves):
        raise InputError(
            f"fine={config.fine:g} needs images with pixels of at most "
            f"{moves.finer().pixel_mm[1]:g} mm, got none; leave it at 0 or add finer images"
        )
    for width in config.averages:
        power(width)
    with team(torch.device(device)) as crew:
        start = draw_batch(sets, moves, 64, None, torch.Generator().manual_seed(config.seed))
        network = dataclasses.replace(network, sigma_data=_std(start, card))
        task = Task(sets, validation, moves, card, config, network, crew)
        budget = math.inf if minutes is None else 60 * minutes
        return _train(task, Path(run), Path(out), budget, exact, draw, callback, clock)


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and by which processes."""

    sets: Sequence[ImageSet]
    validation: ImageSet
    moves: Augmentation
    card: PriorCard
    config: TrainConfig
    network: NetworkConfig
    crew: Team

    def planned(self, plan: Plan) -> Task:
        """The run with the length and the warm-up of a plan."""
        config = dataclasses.replace(self.config, steps=plan.steps, warmup=plan.warmup)
        return dataclasses.replace(self, config=config)


def _train(
    task: Task,
    run: Path,
    out: Path,
    budget: float,
    exact: Denoiser | None,
    draw: Callable[[NetworkPrior], Tensor] | None,
    callback: Callable[[int, int, Mapping[str, Any]], None] | None,
    clock: Callable[[], float],
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
    judge = Judge(task)
    log = run / "log.jsonl"
    before = state.seconds
    started = clock() - before
    checked: dict[str, Any] = {}

    def advance(drawn: _Drawn, rate: float) -> tuple[float, float]:
        """One step of the optimiser; the loss and the norm of its gradient."""
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        loss = _loss(net, objective, drawn, task)
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
        return value, norm

    plan: Plan | None = None
    if config.steps is None:
        if state.plan is None:
            with _untouched(net, objective, optimiser):
                state.plan = crew.from_first(_plan(task, judge, state, advance, budget, clock))
        plan = state.plan
        task = task.planned(plan)
    with _Feed(config.workers) as feed:
        while (end := task.config.steps) is None or state.step < end:
            done = Progress(state.step, clock() - started, state.expected)
            if plan and end is None and crew.any(plan.due(budget, done)):
                plan = state.plan = crew.from_first(plan.settle(budget, done))
                task = task.planned(plan)
                continue
            over = plan.over(budget, done) if plan else done.seconds - before > budget
            if budget < math.inf and crew.any(over):
                break
            begun = clock()
            rate = _learning_rate(state.step, task.config)
            drawn = feed(task, state.step)
            value, norm = advance(drawn, rate)
            state.step += 1
            for average in averages.values():
                average.update(net, state.step)
            now = clock()
            record: dict[str, Any] = {
                "step": state.step,
                "steps": end,
                "loss": value,
                "lr": rate,
                "gradient": norm,
                "seconds": now - started,
                "images": drawn.count,
                "images_per_second": drawn.count / max(now - begun, 1e-9),
            }
            if plan:
                state.expected += plan.costs[drawn.kind]
            if plan and end is None:
                done = Progress(state.step, now - started, state.expected)
                steps = math.ceil(plan.length(budget, done))
                record |= {"steps": steps, "open": True, "warmup": plan.warmup}
            steps = int(record["steps"])
            last = state.step == end
            validates = first and (last or state.step % config.validate_every == 0)
            checked = judge.report(averages["ema"].weights, exact) if validates else {}
            record |= checked
            if first:
                with log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            if callback is not None:
                callback(state.step, steps, record)
            state.seconds = clock() - started
            length = plan.length(budget) if plan and end is None else steps
            if first and state.step % max(1, length // SNAPSHOTS) == 0 and not last:
                state.snapshot(run)
            if first and state.step % config.save_every == 0 and not last:
                state.save(run)
    if plan and state.step < (task.config.steps or math.inf):
        logger.warning(
            "the time was over at step %d of %d, before the learning rate was at zero: the "
            "machine has slowed down; give the steps in place of the minutes to finish the run",
            state.step,
            task.config.steps,
        )
    if first:
        state.seconds = clock() - started
        state.save(run)
        weights, chosen = choose_average(state, run, judge, config)
        if not checked or chosen:
            checked = judge.report(weights, exact)
        card = _write_prior(task, state, weights, {**checked, **chosen}, out)
        if draw is not None:
            neighbours = judge.neighbours(draw(load_prior(out)))
            card = update_card(out, training={**card.training, "neighbours": neighbours})
    return crew.from_first(card if first else task.card)


@contextmanager
def _untouched(
    net: UNet, objective: Objective, optimiser: torch.optim.Optimizer
) -> Iterator[None]:
    """Leave them as they were."""
    parts: tuple[Any, ...] = (net, objective, optimiser)
    kept = [copy.deepcopy(part.state_dict()) for part in parts]
    yield
    for part, state in zip(parts, kept, strict=True):
        part.load_state_dict(state)


def _plan(
    task: Task,
    judge: Judge,
    state: RunState,
    advance: Callable[[_Drawn, float], tuple[float, float]],
    budget: float,
    clock: Callable[[], float],
) -> Plan:
    """What a run costs, by trial steps at the learning rate 0 and a few validation images."""
    config, start = task.config, clock()
    generator = torch.Generator().manual_seed(config.seed)

    def cost(fine: bool, whole: bool) -> float:
        """Seconds of a step; the first one allocates and compiles."""
        seconds = []
        for _ in range(1 + TRIALS):
            begun = clock()
            advance(_draw_kind(task, fine, whole, generator), 0.0)
            seconds.append(clock() - begun)
        return statistics.median(seconds[1:])

    costs: dict[str, float] = {}
    mixed = late = 0.0
    for fine, share in ((False, 1 - config.fine), (True, config.fine)):
        if share:
            crops, whole = cost(fine, False), cost(fine, True)
            costs |= {Plan.kind(fine, False): crops, Plan.kind(fine, True): whole}
            mixed += share * (config.whole * whole + (1 - config.whole) * crops)
            late += share * whole
    report, score = judge.seconds(state.averages["ema"].weights, clock)
    count = len(config.averages)
    choice = (1 + count) * score + report if count else 0.0
    plan = Plan(
        costs=costs,
        mixed=mixed,
        whole=late,
        validation=report,
        every=config.validate_every,
        end=report + choice,
        setup=clock() - start,
        whole_from=config.whole_from,
        free=max(0.0, min(1 - config.decay, config.whole_from)),
        warmup=config.warmup,
    )
    steps = plan.length(budget)
    if steps < FEW:
        logger.warning("%.3g minutes hold %d steps only; give more", budget / 60, steps)
    return dataclasses.replace(plan, warmup=max(1, min(config.warmup, int(steps / 10))))


def _write_prior(
    task: Task,
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
        "validation_fine": "validation_rmse_fine",
        "training_fine": "training_rmse_fine",
        "memorisation_fine": "memorisation_fine",
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


def _check_config(config: TrainConfig, moves: Augmentation, minutes: float | None) -> None:
    """Refuse a run without an end, or an objective that cannot train this network."""
    if config.steps is None and minutes is None:
        raise InputError("a run needs a number of steps, or the minutes that it may take")
    low, high = config.sigma_range
    if not 0 < low <= high < math.inf:
        raise InputError(
            f"sigma_range must be positive and increasing (equal for one level), got "
            f"{config.sigma_range}"
        )
    if config.objective not in OBJECTIVES:
        raise InputError(f"no objective '{config.objective}'; there are {', '.join(OBJECTIVES)}")
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


def _objective(task: Task) -> Objective:
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
    """Linear warm-up, constant, linear decay to zero; of a run of open length before its decay."""
    left = 1.0
    if config.steps is not None:
        left = (config.steps - step) / max(1.0, config.decay * config.steps)
    return config.lr * min(1.0, (step + 1) / config.warmup, left)


@dataclass(frozen=True)
class _Drawn:
    """This process's part of the batch of a step, and the generator for what comes next.

    Attributes:
        batch: the part.
        count: images of the whole batch.
        share: which of them the part has.
        kind: name of its kind; see :meth:`inverse.training.budget.Plan.kind`.
        generator: where the images left it.
    """

    batch: Batch
    count: int
    kind: str
    share: slice
    generator: torch.Generator


def _draw(task: Task, step: int) -> _Drawn:
    """The images of ``step``."""
    config = task.config
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    fine = config.fine > 0 and float(torch.rand((), generator=generator)) < config.fine
    late = config.steps is not None and step >= config.whole_from * config.steps
    whole = late or float(torch.rand((), generator=generator)) < config.whole
    return _draw_kind(task, fine, whole, generator)


def _draw_kind(task: Task, fine: bool, whole: bool, generator: torch.Generator) -> _Drawn:
    """A batch of crops, or of as many pixels in whole images, of either grid."""
    sets, moves, config = task.sets, task.moves, task.config
    kind = Plan.kind(fine, whole)
    if fine:
        sets, moves = fine_enough(sets, moves), moves.finer()
    whole = whole or config.crop >= moves.size
    count = max(1, config.batch * config.crop**2 // moves.size**2) if whole else config.batch
    share = task.crew.share(count)
    batch = draw_batch(sets, moves, count, None if whole else config.crop, generator, share)
    return _Drawn(batch, count, kind, share, generator)


class _Feed:
    """The batches of a run in order, prepared ahead by the threads of the settings."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers) if workers > 0 else None
        self._queue: deque[Future[_Drawn]] = deque()
        self._task: Task | None = None
        self._ahead: Iterator[int] = iter(())

    def __enter__(self) -> _Feed:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, task: Task, step: int) -> _Drawn:
        """The images of ``step``; another task than before begins anew."""
        if self._pool is None:
            return _draw(task, step)
        if task is not self._task:
            self._task = task
            self._queue.clear()
            end = task.config.steps
            self._ahead = itertools.count(step) if end is None else iter(range(step, end))
        for k in itertools.islice(self._ahead, self._workers + 1 - len(self._queue)):
            self._queue.append(self._pool.submit(_draw, task, k))
        return self._queue.popleft().result()


def _loss(
    net: UNet,
    objective: Objective,
    drawn: _Drawn,
    task: Task,
) -> Tensor:
    """This process's part of the mean loss of a batch; a plain zero where it has no image."""
    batch, device = drawn.batch, task.crew.device
    x0 = ((batch.images - task.card.offset) / task.card.scale).to(device)
    sigma = objective.levels(drawn.count, drawn.generator)[drawn.share]
    z = torch.randn((drawn.count, *x0.shape[1:]), generator=drawn.generator)[drawn.share]
    if not len(x0):
        return torch.zeros((), device=device)
    images = Perturbed(x0, sigma.to(device), z.to(device), batch.pixel_mm.to(device))
    model = model_of(net, batch.position.to(device), task.config)
    return objective.losses(model, images, drawn.generator).sum() / drawn.count
