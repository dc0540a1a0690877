"""Shared fixtures: the optional development data, and seeds."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """System matrices of tests are not left in the user's cache."""
    os.environ["RECON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)  # small problems: a second thread costs more than it gives


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Seed torch; undo the log levels that a command's --quiet sets."""
    torch.manual_seed(0)
    yield
    for name in ("inverse", "phantoms"):
        logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger(name).handlers.clear()
