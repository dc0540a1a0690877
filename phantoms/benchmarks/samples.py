"""Unconditional samples beside real slices: ``python -m phantoms.benchmarks.samples``.

What a prior knows when nothing is measured.  Samples come from the probability-flow ODE by Heun's
method; the slices are of patients whom the prior has not seen, evenly spread over the data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.priors import NetworkPrior, load_prior
from inverse.sampling import SAMPLERS, Noise
from inverse.training.data import load_images

__all__ = ["draw_samples", "figure"]

WINDOWS = {"CT": (-1000.0, 500.0), "MR": (0.0, 1.1)}


def draw_samples(
    prior: NetworkPrior, count: int, shape: tuple[int, int], pixel_mm: float, seed: int = 0
) -> Tensor:
    """Samples ``(count, *shape)`` in the prior's physical unit, each by its own generator."""
    low, high = prior.card.sigma_range
    prior = prior.at(pixel_mm=pixel_mm)
    with torch.inference_mode():
        images = [
            SAMPLERS["heun"].run(prior, Noise([(seed, k)], shape, "cpu"), levels=(high, low))
            for k in range(count)
        ]
    return torch.cat(images) * prior.scale + prior.offset


def figure(
    path: Path, real: list[NDArray[np.float32]], samples: Tensor, title: str, modality: str
) -> None:
    """Two rows: real slices, samples."""
    from matplotlib.figure import Figure

    low, high = WINDOWS[modality]
    canvas = Figure(figsize=(2.4 * len(real), 5.3), dpi=110, layout="constrained")
    axes = canvas.subplots(2, len(real), squeeze=False)
    for row, name, images in ((0, "held-out slices", real), (1, title, list(samples.numpy()))):
        for axis, image in zip(axes[row], images, strict=True):
            axis.imshow(image, cmap="gray", vmin=low, vmax=high)
            axis.set_axis_off()
        axes[row, 0].set_title(name, loc="left", fontsize=9)
    canvas.savefig(path)


def main() -> None:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prior", default="ct-small")
    parser.add_argument("--data", type=Path, required=True, help="held-out slices")
    parser.add_argument("--select", help="COLUMN=A,B of the table beside an npz")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    prior = load_prior(arguments.prior)
    card = prior.card
    column, _, values = (arguments.select or "").partition("=")
    select = {column: values.split(",")} if column else {}
    images = load_images(arguments.data, "CT" if card.modality == "CT" else "MR", select=select)
    chosen = np.linspace(0, len(images) - 1, arguments.count + 2)[1:-1].round().astype(int)
    real = [images.images[i] for i in chosen]
    pixel = float(np.mean([images.pixel_mm[i] for i in chosen]))
    samples = draw_samples(prior, arguments.count, card.shape, pixel, arguments.seed)
    title = f"unconditional samples of {card.name}, images of no patient"
    figure(arguments.out, real, samples, title, card.modality)
    print(arguments.out)


if __name__ == "__main__":
    main()
