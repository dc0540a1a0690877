"""A measured 8-coil brain: ``python -m phantoms.benchmarks.kspace FILE``.

FILE is a numpy array of k-space ``(coils, H, W)``, zeros where not measured, such as that of the
SigPy tutorial.  Written: a picture of the sampling, the calibrated maps and the reconstructions.
The bundled prior has seen brains without skull only; what it makes of a scalp is part of the test.
There is no reference image, so nothing here is a measure of quality but the residuals.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.classical import cg_sense, l1_wavelet, root_sum_of_squares, tv
from inverse.measurement import Measurement
from inverse.operators.coils import espirit, noise_level
from inverse.operators.mri import Sense
from inverse.priors import load_prior
from inverse.reconstruct import reconstruct


def measurement(path: Path) -> Measurement:
    """The scan with calibrated maps; the noise from the edge of k-space, an upper bound."""
    kspace = torch.from_numpy(np.load(path).astype(np.complex64))
    kspace /= kspace.abs().max()
    mask = (kspace != 0).any(dim=0)
    std = noise_level(kspace)[:, None, None]
    return Measurement(Sense(espirit(kspace).maps, mask), kspace[None], std, "MR", (1.0, 1.0))


def figure(m: Measurement, images: dict[str, Tensor], path: Path) -> None:
    """Sampling, maps and images, each image in the window of the first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    assert isinstance(m.operator, Sense)
    top = float(np.percentile(next(iter(images.values())).abs().numpy(), 99.7))
    panels: list[tuple[str, NDArray[Any], dict[str, Any]]] = [
        (f"sampling, {m.operator.acceleration:.1f}-fold", m.operator.mask.numpy(), {}),
        ("map of the first coil", m.operator.maps[0].abs().numpy(), {"vmin": 0, "vmax": 1}),
    ]
    panels += [(n, x[0].abs().numpy(), {"vmin": 0, "vmax": top}) for n, x in images.items()]
    *_, second, last = images.values()
    change = 3 * (last[0].abs() - second[0].abs()).numpy()
    panels.append(("prior minus total variation, x 3", change, {"vmin": -top, "vmax": top}))
    fig, axes = plt.subplots(2, 4, figsize=(12.8, 8.4))
    for axis, (title, array, window) in zip(axes.flat, panels, strict=True):
        axis.axis("off")
        axis.imshow(array, cmap="gray", **window)
        axis.set_title(title, fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    """Reconstruct, print the residuals, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images/kspace-8-coils.png"))
    given = parser.parse_args()
    m = measurement(given.file)
    print(f"{m.operator!r}; noise std {float(m.noise.min()):.2g} to {float(m.noise.max()):.2g}")
    methods = {
        "zero-filled, root sum of squares": root_sum_of_squares,
        "CG-SENSE": cg_sense,
        "L1-wavelet": l1_wavelet,
        "total variation": lambda scan: tv(scan).x,
        "prior brain-small": lambda scan: reconstruct(scan, load_prior("brain-small")).mean,
    }
    images = {}
    with torch.inference_mode():
        for name, solve in methods.items():
            start = time.monotonic()
            images[name] = solve(m)
            seconds = time.monotonic() - start
            chi2 = float(m.chi2(images[name])) if images[name].is_complex() else float("nan")
            print(f"{name:32s} residual χ² {chi2:8.3f}  {seconds:5.1f} s")
    figure(m, images, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
