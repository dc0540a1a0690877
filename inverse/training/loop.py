"""Training of a network prior: one loop, exact resume, a JSON-lines log.

The batch, the noise levels and the noise of step ``k`` come from a generator seeded by
``(seed, k)``; the state file holds weights, their moving average, the optimiser's moments and the
state of the objective (persistent chains, a flow, a log-normaliser).  A killed run that is resumed
therefore ends in the weights of an uninterrupted one, bit for bit on one machine with one thread
count.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from inverse.errors import InputError, NumericalError, ReconError, UnsupportedError
from inverse.priors.checkpoint import PriorCard, save_prior
from inverse.priors.denoiser import expand
from inverse.priors.energy import edm_energy, energy_score
from inverse.priors.network import NetworkConfig, UNet, edm_denoise, position_channels
from inverse.training.data import Augmentation, Batch, ImageSet, draw_batch
from inverse.training.objectives import OBJECTIVES, Model, Objective, Perturbed, Setting

__all__ = ["TrainConfig", "train"]

logger = logging.getLogger(__name__)


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
    validate_every: int = 500
    save_every: int = 250


VALIDATION_LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


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
    callback: Callable[[int, int, Mapping[str, Any]], None] | None = None,
) -> PriorCard:
    """Train a prior by the chosen objective and write it.

    Args:
        sets: training images, in the physical units of the card.
        validation: images of other patients.
        network: shape of the network; ``sigma_data`` is measured here.
        config: settings.
        card: name, modality, offset, scale and texts; measured fields are filled in here.
        run: folder of the state and the log; an existing state is continued.
        out: prior file to write.
        augmentation: motions; default :class:`Augmentation` for the card's matrix.
        device: where to train.
        minutes: stop after this time, with the state kept for a resume; the prior written is
            the moving average so far.
        callback: called as ``callback(step, steps, record)`` after every step.

    Returns:
        The card with hash, losses and settings filled in.

    Raises:
        InputError: no images, images with NaN, or a state of other settings in ``run``.
        ReconError: an unknown objective, or noise levels that are not positive.
        UnsupportedError: an objective that does not serve these images or this network.
        NumericalError: if the loss is not finite or negatives diverge.
    """
    sets = [s for s in sets if len(s)]
    if not sets or not len(validation):
        raise InputError("training needs at least one image set and held-out images, got none")
    shared = {p for s in sets for p in s.patients} & set(validation.patients)
    if shared:
        raise InputError(
            f"{len(shared)} patients are in both training and validation images; split by patient"
        )
    if not all(np.isfinite(i).all() for s in (*sets, validation) for i in s.images):
        raise InputError("training images hold NaN or infinite values; remove those slices")
    run, device = Path(run), torch.device(device)
    run.mkdir(parents=True, exist_ok=True)
    moves = augmentation or Augmentation(size=card.shape[0], pixel_mm=card.pixel_mm_range)
    _check_objective(config, moves)
    if config.fine and not _fine_enough(sets, moves):
        raise InputError(
            f"fine={config.fine:g} needs images with pixels of at most "
            f"{moves.finer().pixel_mm[1]:g} mm, got none; leave it at 0 or add finer images"
        )
    held = _validation_batch(validation, moves, config.seed)
    start = draw_batch(sets, moves, 64, None, torch.Generator().manual_seed(config.seed))
    network = dataclasses.replace(network, sigma_data=_std(start, card))
    torch.manual_seed(config.seed)
    net = UNet(network).to(device).channels_last()
    ema = {name: value.detach().clone() for name, value in net.state_dict().items()}
    objective = _objective(sets, moves, card, config, network).to(device)
    groups: list[dict[str, Any]] = [{"params": list(net.parameters())}]
    if own := list(objective.parameters()):
        groups.append({"params": own, "weight_decay": 0.0})
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    state = run / "state.safetensors"
    done, seconds = _restore(state, net, ema, objective, optimiser, network, config)
    log = run / "log.jsonl"
    started = time.monotonic()
    record: dict[str, Any] = {}
    losses: dict[str, float] = {}
    step = done
    while step < config.steps:
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            break
        rate = _learning_rate(step, config)
        for group in optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        loss = _loss(net, objective, sets, moves, card, config, step, generator, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
        if own:
            torch.nn.utils.clip_grad_norm_(own, config.clip)
        value = float(loss.detach())
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            raise NumericalError(
                f"training loss is not finite at step {step} (loss {value}, gradient {norm}); "
                "lower the learning rate or check the images; the last state file is intact"
            )
        optimiser.step()
        step += 1
        _update_ema(ema, net, step, config)
        record = {
            "step": step,
            "loss": value,
            "lr": rate,
            "gradient": float(norm),
            "seconds": seconds + time.monotonic() - started,
        }
        if step % config.validate_every == 0 or step == config.steps:
            losses = _validate(network, ema, held, card, device, config)
            record["validation"] = losses
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if callback is not None:
            callback(step, config.steps, record)
        if step % config.save_every == 0 or step == config.steps:
            seconds_now = record["seconds"]
            _save(state, net, ema, objective, optimiser, network, config, step, seconds_now)
    total = seconds + time.monotonic() - started
    _save(state, net, ema, objective, optimiser, network, config, step, total)
    losses = losses or _validate(network, ema, held, card, device, config)
    final = UNet(network)
    final.load_state_dict(ema)
    images = [i for s in sets for i in s.images]
    card = dataclasses.replace(
        card,
        value_range=(float(min(i.min() for i in images)), float(max(i.max() for i in images))),
        sigma_range=config.sigma_range,
        network=config.network,
        training={
            **card.training,
            "steps": step,
            "minutes": round(total / 60, 1),
            "device": device.type,
            "settings": asdict(config),
            "validation_rmse": losses,
            "validation_patients": len(validation.patients),
            "validation_slices": len(validation),
        },
    )
    return save_prior(out, final, card)


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


def _objective(
    sets: Sequence[ImageSet],
    moves: Augmentation,
    card: PriorCard,
    config: TrainConfig,
    network: NetworkConfig,
) -> Objective:
    """The objective of a run; a stateful one starts from training images."""
    entry = OBJECTIVES[config.objective]
    generator = torch.Generator().manual_seed(config.seed)
    start = draw_batch(sets, moves, 512 if entry.whole else 1, None, generator)
    setting = Setting(
        sigma_range=config.sigma_range,
        p_mean=config.p_mean,
        p_std=config.p_std,
        levels=config.levels,
        langevin_steps=config.langevin_steps,
        langevin_step=config.langevin_step,
        chains=config.chains,
        sigma_data=network.sigma_data,
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


def _loss(
    net: UNet,
    objective: Objective,
    sets: Sequence[ImageSet],
    moves: Augmentation,
    card: PriorCard,
    config: TrainConfig,
    step: int,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Mean loss of the batch of ``step``."""
    if config.fine and float(torch.rand((), generator=generator)) < config.fine:
        sets, moves = _fine_enough(sets, moves), moves.finer()
    whole = (
        step >= config.whole_from * config.steps
        or float(torch.rand((), generator=generator)) < config.whole
        or config.crop >= moves.size
    )
    count = max(1, config.batch * config.crop**2 // moves.size**2) if whole else config.batch
    batch = draw_batch(sets, moves, count, None if whole else config.crop, generator)
    x0 = ((batch.images - card.offset) / card.scale).to(device)
    sigma = objective.levels(count, generator)
    z = torch.randn(x0.shape, generator=generator).to(device)
    images = Perturbed(x0, sigma.to(device), z, batch.pixel_mm.to(device))
    model = _model(net, batch.position.to(device), config)
    return objective.losses(model, images, generator).mean()


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


def _update_ema(ema: dict[str, Tensor], net: UNet, step: int, config: TrainConfig) -> None:
    """Moving average whose half-life is a share of the steps done (EDM2's ramp)."""
    keep = 0.5 ** (1 / max(1.0, config.ema * step))
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.dtype.is_floating_point:
                ema[name].lerp_(value, 1 - keep)


def _validation_batch(images: ImageSet, moves: Augmentation, seed: int, count: int = 16) -> Batch:
    """Fixed held-out images, no motion beyond the resampling to the grid."""
    still = dataclasses.replace(moves, rotation=0.0, shift_mm=0.0, zoom=0.0, flip=False)
    return draw_batch([images], still, count, None, torch.Generator().manual_seed(seed))


@torch.no_grad()
def _validate(
    network: NetworkConfig,
    ema: Mapping[str, Tensor],
    held: Batch,
    card: PriorCard,
    device: torch.device,
    config: TrainConfig,
) -> dict[str, float]:
    """Denoising RMSE on held-out images by noise level, prior units, with the averaged weights."""
    net = UNet(network).to(device).channels_last().eval()
    net.load_state_dict(dict(ema))
    x0 = ((held.images - card.offset) / card.scale).to(device)
    position = position_channels((x0.shape[-2], x0.shape[-1]), device)
    model = _model(net, position, config)
    low, high = config.sigma_range
    trained = [v for v in VALIDATION_LEVELS if low <= v <= high] or [math.sqrt(low * high)]
    result = {}
    for level in trained:
        z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).to(device)
        errors = []
        for i in range(0, len(x0), 4):
            s = torch.full((len(x0[i : i + 4]),), level, device=device)
            noisy = x0[i : i + 4] + level * z[i : i + 4]
            d = model.denoise(noisy, s, held.pixel_mm[i : i + 4].to(device))
            errors.append((d - x0[i : i + 4]).square().mean())
        result[f"{level:g}"] = round(float(torch.stack(errors).mean().sqrt()), 5)
    return result


def _save(
    path: Path,
    net: UNet,
    ema: Mapping[str, Tensor],
    objective: Objective,
    optimiser: torch.optim.Optimizer,
    network: NetworkConfig,
    config: TrainConfig,
    step: int,
    seconds: float,
) -> None:
    """State file by temporary and rename: a kill loses at most the steps since the last one."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()}
    tensors |= {f"objective.{k}": v for k, v in objective.state_dict().items()}
    for index, entry in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{k}": torch.as_tensor(v) for k, v in entry.items()}
    metadata = {
        "step": str(step),
        "seconds": repr(seconds),
        "network": json.dumps(asdict(network)),
        "seed": str(config.seed),
        "objective": config.objective,
        "kind": config.network,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
    temporary.replace(path)


def _restore(
    path: Path,
    net: UNet,
    ema: dict[str, Tensor],
    objective: Objective,
    optimiser: torch.optim.Optimizer,
    network: NetworkConfig,
    config: TrainConfig,
) -> tuple[int, float]:
    """Continue from a state file; ``(0, 0.0)`` where there is none."""
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = (
        json.loads(metadata["network"]),
        metadata["seed"],
        metadata.get("objective", "dsm"),
        metadata.get("kind", "score"),
    )
    wanted = (
        json.loads(json.dumps(asdict(network))),
        str(config.seed),
        config.objective,
        config.network,
    )
    if found != wanted:
        raise InputError(
            f"the state in '{path.parent.name}' is of another network, objective, data scale or "
            "seed; give the settings it was started with, or another run folder"
        )
    net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    objective.load_state_dict(
        {k.removeprefix("objective."): v for k, v in tensors.items() if k.startswith("objective.")}
    )
    for name, value in tensors.items():
        if name.startswith("ema."):
            ema[name[4:]].copy_(value)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": moments, "param_groups": groups})
    return int(metadata["step"]), float(metadata["seconds"])
