"""Copies of networks that share tensors."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from torch import nn

from intrafusion.network.tensors import copy_model, named_tensors


@pytest.mark.parametrize("share", [False, True, {"0.weight", "1.running_mean"}])
def test_the_tensors_that_are_named_are_the_same_ones(share: bool | set[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    copied = named_tensors(copy_model(model, share=share))
    same = {name for name, tensor in named_tensors(model).items() if copied[name] is tensor}
    assert same == (share if isinstance(share, set) else set(copied) if share else set())


def test_empty_dicts_of_a_copy_are_its_own_and_of_the_same_class() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    marked: OrderedDict[str, int] = OrderedDict()
    marked.mark = 3  # type: ignore[attr-defined]
    model.cache, model.shared, model[0].shared, model.marked = {}, {}, None, marked
    model[0].shared = model.shared
    copied: Any = copy_model(model)
    copied.register_forward_hook(lambda *_: None)
    copied.cache["x"], copied.shared["y"] = 1, 2
    assert (model.cache, model.shared, dict(model._forward_hooks)) == ({}, {}, {})
    assert copied[0].shared is copied.shared
    assert type(copied._forward_hooks) is OrderedDict
    assert (copied.marked.mark, copied.marked is marked) == (3, False)
