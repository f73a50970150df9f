"""Accelerate is wanted where it has something to do, and gives the same bytes as doing without it."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from intrafusion import IntrafusionError
from intrafusion.lab.zoo import Images
from intrafusion.train import Training, train_

START = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def trained(how: Training) -> dict[str, torch.Tensor]:
    model, generator = copy.deepcopy(START), torch.Generator().manual_seed(0)
    train_(model, Images(torch.randn(40, 4, generator=generator), torch.arange(40) % 3), how)
    return model.state_dict()


@pytest.mark.parametrize("options", [{}, {"clip": 0.1}, {"accumulate": 3, "trainable": "full+lora"}])
def test_accelerate_for_one_process_changes_no_byte(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    how = Training(epochs=3, batch_size=10, lr=0.01, **options)
    alone = trained(how)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` does
    launched = trained(how)
    assert {name for name in alone if not torch.equal(alone[name], launched[name])} == set()


def test_accelerate_is_asked_for_only_where_it_has_something_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as if it were not installed
    trained(Training(epochs=1))
    with pytest.raises(IntrafusionError, match=r"precision 'bf16'.*pip install 'intrafusion\[train\]'"):
        trained(Training(epochs=1, precision="bf16"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(IntrafusionError, match="several processes need Accelerate"):
        trained(Training(epochs=1))
