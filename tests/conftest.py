"""What every test shares: one thread, fixed seeds, no hub, and the folder of real data where there is one."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any import of numpy, and for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of a hub client: a test never goes online

import numpy as np
import pytest
import torch
from torch import nn

from intrafusion.measure import comparison

comparison._RUNS = 3  # of the thirty for each network that is made smaller: a tenth of the time of all tests
torch.set_num_threads(1)  # tiny tensors run twice as fast on one thread, and the workers share the cores


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the legacy state is what third-party code draws from


@pytest.fixture(scope="session")
def digits_network() -> nn.Module:
    """The digits network, trained once; a test that writes to it takes a copy."""
    from intrafusion.lab import zoo

    return zoo.train_digits()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data and trained networks; skips where INTRAFUSION_DATA names none."""
    folder = os.environ.get("INTRAFUSION_DATA")
    if not folder:
        pytest.skip("needs real data: INTRAFUSION_DATA is not set")
    if not Path(folder).is_dir():
        pytest.fail(f"INTRAFUSION_DATA is {folder!r}, which is not a folder")
    return Path(folder)


@pytest.fixture(autouse=True)
def imports_stay() -> Iterator[None]:
    """What was imported is not looked through again each time that objects are searched or collected."""
    yield
    if len(sys.modules) > _frozen[0] + 100:
        _freeze()


def pytest_collection_finish() -> None:
    _freeze()


_frozen = [0]  # modules that were loaded when objects were frozen last


def _freeze() -> None:
    gc.collect()
    gc.freeze()
    _frozen[0] = len(sys.modules)
