"""What the tests of the command line share: tiny priors, tiny series, and a way to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from inverse.priors import NetworkConfig, PriorCard, UNet, save_prior
from phantoms.series import write_phantom_series
from recon_cli.app import main

SIZE = 64


def tiny_prior(path: Path, modality: str = "CT", **card: Any) -> Path:
    """An untrained network of a few thousand weights."""
    torch.manual_seed(1)
    ct = modality == "CT"
    values: dict[str, Any] = {
        "name": f"tiny-{modality.lower()}",
        "modality": modality,
        "unit": "HU" if ct else "relative",
        "offset": -500.0 if ct else 0.5,
        "scale": 500.0 if ct else 0.5,
        "value_range": (-1000.0, 1000.0),
        "pixel_mm_range": (4.0, 8.0),
        "shape": (SIZE, SIZE),
        "sigma_range": (0.005, 80.0),
        "training_data": ({"name": "nothing at all", "patients": 0, "licence": "none"},),
        "limits": ("it was never trained",),
    }
    save_prior(path, UNet(NetworkConfig(widths=(8, 8, 8))), PriorCard(**values | card))
    return path


def discs(slices: int = 3, size: int = SIZE) -> np.ndarray:
    """A body of 0 HU with lungs of -800 HU and a spine of 400 HU, ``(slices, size, size)``."""
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) / (size / 2)
    image = np.full((size, size), -1000.0)
    image[(x / 0.8) ** 2 + (y / 0.6) ** 2 < 1] = 0.0
    image[((np.abs(x) - 0.38) / 0.27) ** 2 + (y / 0.4) ** 2 < 1] = -800.0
    image[x**2 + (y - 0.4) ** 2 < 0.01] = 400.0
    return np.stack([image + 5 * k * (image > -500) for k in range(slices)]).astype(np.float32)


def series(path: Path, slices: int = 3, *, modality: str = "CT", seed: int = 1) -> Path:
    """A DICOM series of ``discs`` with pixels of 6 mm."""
    volume = discs(slices)
    if modality == "MR":
        volume = volume + 1000
    write_phantom_series(path, volume, (5.0, 6.0, 6.0), seed=seed, modality=modality)
    return path


def recon(*arguments: object) -> int:
    """Run the command line in this process; its exit code."""
    return main([str(a) for a in arguments])
