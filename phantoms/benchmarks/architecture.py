"""Which network: cost of a call against denoising error after the same training.

Every variant is trained from scratch with the same images, seed and number of steps, so that the
errors rank architectures at that budget and not beyond it; a larger network gains more from a
longer one.  What each is worth in a reconstruction, a sparse-view scan of the slices that judge
says.  A call is one image under the arithmetic that reconstruction uses here (bfloat16
where the processor has it), on one thread; its time is the least processor time of several runs,
which other work on the machine does not lengthen much.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from inverse.operators.ct import ParallelBeam
from inverse.priors import NetworkConfig, NetworkPrior, PriorCard, UNet, load_prior
from inverse.reconstruct import reconstruct
from inverse.training.data import Augmentation, ImageSet, load_images
from inverse.training.loop import TrainConfig, train
from phantoms.benchmarks import harness
from phantoms.benchmarks.harness import Benchmark, Task, check, table
from phantoms.benchmarks.problems import hu_case
from phantoms.simulate import simulate_ct
from phantoms.slices import chest_slices

VARIANTS: Mapping[str, NetworkConfig] = {
    "ct-small": NetworkConfig(widths=(32, 64, 96, 144)),
    "narrow": NetworkConfig(widths=(24, 48, 72, 96)),
    "one block a level": NetworkConfig(widths=(32, 64, 96, 144), blocks=1),
    "three levels": NetworkConfig(widths=(32, 64, 128)),
    "no patches": NetworkConfig(widths=(16, 32, 64, 96, 144), patch=1),
    "patches of 4": NetworkConfig(widths=(64, 96, 144), patch=4),
    "wide, patches of 4": NetworkConfig(widths=(80, 128, 192), patch=4),
    "base": NetworkConfig(widths=(64, 128, 192, 256), blocks=3),
}
"""Networks that are compared; all but where the name says so have two blocks and patches of 2."""

TRAINING = ("TCGA-LUAD", "LIDC-IDRI", "COVID-19-NY-SBU")
HELD_OUT = ("TCGA-LUSC", "ACRIN-FLT-Breast", "RIDER Pilot", "Lung-Fused-CT-Pathology")
"""Collections of the development data that train, and that judge."""

LEVELS = ("0.05", "0.2", "0.5", "1", "2")
"""Noise levels that are shown, prior units of 500 HU."""

VIEWS, CALLS = 23, 20
"""Views and network calls of the reconstructions."""

_CARD = PriorCard(
    name="architecture",
    modality="CT",
    unit="HU",
    offset=-500.0,
    scale=500.0,
    value_range=(0.0, 0.0),
    pixel_mm_range=(1.1, 2.0),
    shape=(256, 256),
    sigma_range=TrainConfig.sigma_range,
)


@dataclass(frozen=True)
class Settings:
    """Settings of ``architecture``.

    Attributes:
        variants: keys of :data:`VARIANTS`.
        steps: training steps of each; 0 measures cost alone.
        batch: crops a step.
        crop: side of a crop.
        data: stack with a table of collections (see :data:`TRAINING`); empty for random chests.
        chests: random chests that train where there is no ``data``; a quarter as many judge.
        runs: calls that are timed.
        patients: patients of those that judge, a slice of each is reconstructed from
            :data:`VIEWS` views.
        seed: of training.
    """

    variants: tuple[str, ...] = tuple(VARIANTS)
    steps: int = 100
    batch: int = 8
    crop: int = 128
    data: str = ""
    chests: int = 40
    runs: int = 3
    patients: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.variants) - set(VARIANTS)
        check(not unknown, f"no {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
        check(self.steps >= 0, f"steps must be at least 0, got {self.steps}")
        check(self.runs >= 1, f"runs must be at least 1, got {self.runs}")
        check(self.chests >= 4, f"chests must be at least 4, got {self.chests}")
        check(self.patients >= 1, f"patients must be at least 1, got {self.patients}")


def flops(net: UNet, side: int) -> int:
    """Floating-point operations of one call on ``side`` x ``side`` (a multiply-add is two)."""
    prior = NetworkPrior(net, _CARD, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prior.denoise(torch.zeros(1, side, side), 0.5)
    return int(counter.get_total_flops())


def seconds(net: UNet, side: int, runs: int) -> float:
    """Least processor time of one call on ``side`` x ``side`` with one thread."""
    prior = NetworkPrior(net, _CARD)
    x = torch.randn(1, side, side, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    try:
        with torch.inference_mode():
            for _ in range(runs + 1):
                start = time.process_time()
                prior.denoise(x, 0.5)
                times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times[1:])


@functools.cache
def images(data: str, chests: int) -> tuple[ImageSet, ImageSet]:
    """Images that train and images that judge, of different patients."""
    if data:
        own = load_images(data, "CT", select={"collection": TRAINING})
        return own, load_images(data, "CT", select={"collection": HELD_OUT})
    first = 20_000
    judges = range(first + chests, first + chests + max(2, chests // 4))
    return chest_slices(range(first, first + chests)), chest_slices(judges)


@dataclass(frozen=True)
class Quality:
    """What a network is worth after ``Settings.steps`` training steps.

    Attributes:
        rmse: held-out denoising error by noise level, prior units.
        seconds: processor time of the training, validation included.
        psnr: of the patients' slices from :data:`VIEWS` views and :data:`CALLS` network calls,
            in dB inside the body.
    """

    rmse: Mapping[str, float]
    seconds: float
    psnr: tuple[float, ...]


def trained(config: NetworkConfig, settings: Settings) -> Quality:
    """Train a network and judge it."""
    own, held = images(settings.data, settings.chests)
    training = TrainConfig(
        steps=settings.steps,
        batch=settings.batch,
        crop=settings.crop,
        warmup=max(1, settings.steps // 10),
        validate_every=settings.steps,
        save_every=settings.steps,
        seed=settings.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "prior.safetensors")
        moves = Augmentation(pixel_mm=_CARD.pixel_mm_range)
        start = time.process_time()
        done = train([own], held, config, training, _CARD, folder, out, augmentation=moves)
        spent = time.process_time() - start
        psnr = sparse_view(load_prior(out), held, settings.patients)
    return Quality(dict(done.training["validation_rmse"]), spent, psnr)


def sparse_view(prior: NetworkPrior, held: ImageSet, patients: int) -> tuple[float, ...]:
    """PSNR of one slice each of the first patients, :data:`VIEWS` views, 1e5 photons a bin."""
    found = []
    for patient in held.patients[:patients]:
        members = held.members[patient]
        k = members[len(members) // 2]
        hu, pixel = held.images[k], float(held.pixel_mm[k])
        beam = ParallelBeam.sparse(VIEWS, hu.shape, pixel)
        scan = simulate_ct(hu[None], pixel, beam, matrix=hu.shape[0], photons=1e5)
        case = hu_case(patient, scan, prior)
        result = reconstruct(case.measurement, case.prior, steps=CALLS)
        found += case.quality(result.mean)["psnr"]
    return tuple(found)


def tasks(settings: Settings) -> Iterator[Task]:
    """One row a variant."""

    def row(name: str) -> harness.Row:
        config = VARIANTS[name]
        torch.manual_seed(0)
        net = UNet(config)
        parameters = sum(p.numel() for p in net.parameters())
        done = trained(config, settings) if settings.steps else None
        rmse = done.rmse if done else {}
        return {
            "widths": list(config.widths),
            "blocks": config.blocks,
            "patch": config.patch,
            "parameters": parameters,
            "bytes_fp16": 2 * parameters,
            "flops": {str(side): flops(net, side) for side in (256, 512)},
            "seconds": {str(side): seconds(net, side, settings.runs) for side in (256, 512)},
            "rmse": rmse,
            "mean_rmse": math.exp(sum(map(math.log, rmse.values())) / len(rmse)) if rmse else None,
            "training_seconds": done.seconds if done else None,
            "psnr": list(done.psnr) if done else [],
        }

    for name in settings.variants:
        yield name, functools.partial(row, name)


def markdown(rows: Mapping[str, harness.Row]) -> str:
    """Cost, and error by noise level."""
    cost = [
        [name, ", ".join(map(str, r["widths"])), str(r["blocks"]), str(r["patch"]),
         f"{r['parameters'] / 1e6:.2f}", f"{r['bytes_fp16'] / 1e6:.1f}",
         f"{r['flops']['256'] / 1e9:.1f}", f"{r['flops']['512'] / 1e9:.1f}",
         f"{1e3 * r['seconds']['256']:.0f}", f"{1e3 * r['seconds']['512']:.0f}"]
        for name, r in rows.items()
    ]  # fmt: skip
    head = ("network", "widths", "blocks", "patch", "10⁶ weights", "MB float16", "GFLOP, 256²",
            "GFLOP, 512²", "ms, 256²", "ms, 512²")  # fmt: skip
    text = table(head, cost, text=2)
    judged = {name: r for name, r in rows.items() if r["rmse"]}
    if judged:
        errors = [
            [name, *(f"{r['rmse'][v]:.4f}" for v in LEVELS), f"{r['mean_rmse']:.4f}",
             f"{sum(r['psnr']) / len(r['psnr']):.2f}", f"{r['training_seconds']:.0f}"]
            for name, r in judged.items()
        ]  # fmt: skip
        title = ("network", *(f"σ = {v}" for v in LEVELS), "geometric mean",
                 f"dB, {VIEWS} views", "training, s")  # fmt: skip
        text += (
            "\nHeld-out denoising RMSE in prior units of 500 HU, mean PSNR of held-out slices in "
            f"the body ({CALLS} network calls), and processor time of the training:\n\n"
            + table(title, errors)
        )
    return text


BENCHMARK = Benchmark(
    name="architecture",
    title="Networks: cost and error",
    about="""
One call of each network (one image, one thread), and its held-out denoising error after the same
small number of training steps from the same seed: a ranking at that budget, not beyond it.
""",
    quick=Settings(variants=("ct-small", "patches of 4"), steps=30),
    full=Settings(steps=3000),
    tasks=tasks,
    markdown=markdown,
)
