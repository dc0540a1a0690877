"""Shared fixtures: the optional development data, and seeds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the development data, which is never committed; skip where it is absent."""
    root = Path(__file__).resolve().parent.parent
    for candidate in (os.environ.get("RECON_SHARED_DATA"), root.parent / "shared" / "data"):
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    pytest.skip("development data absent (set RECON_SHARED_DATA to its folder to run this test)")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
