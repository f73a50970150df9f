"""Copies of networks that share tensors."""

from __future__ import annotations

import pytest
from torch import nn

from intrafusion.network.tensors import copy_model, named_tensors


@pytest.mark.parametrize("share", [False, True, {"0.weight", "1.running_mean"}])
def test_the_tensors_that_are_named_are_the_same_ones(share: bool | set[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    copied = named_tensors(copy_model(model, share=share))
    same = {name for name, tensor in named_tensors(model).items() if copied[name] is tensor}
    assert same == (share if isinstance(share, set) else set(copied) if share else set())
