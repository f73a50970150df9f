"""Bytes of weights and results, counted by hand and by what is freed when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from intrafusion.errors import ModelError
from intrafusion.measure.memory import list_live_results, memory_mb, weigh


def test_results_are_alive_as_long_as_something_refers_to_them() -> None:
    """Weights 4 (10 * 20 + 20 + 20 * 5 + 5); on 3 rows the input, the hidden layer and its ReLU are alive together."""
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    weights, alive = 4 * (10 * 20 + 20 + 20 * 5 + 5), 4 * 3 * (10 + 20 + 20)
    assert weigh(model) == weights
    assert memory_mb(model, torch.zeros(3, 10)) == (weights + alive) / 1e6


class Waits(nn.Module):
    """Holds its first result until the end, with views and in-place writes on the way."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.repeat(1, 4)
        second = first.view(-1).exp()
        second.mul_(2)
        third = second.sum()
        del second
        return first + third


def test_views_and_writes_in_place_are_no_results() -> None:
    live = list_live_results(Waits(), torch.zeros(2, 8))
    assert live.results == ((2, 8, 4), (2, 32, 4), (64, 4), (4,), (2, 32, 4))
    assert live.moments == (frozenset({0, 1, 2, 3}), frozenset({0, 1, 3, 4}))
    assert live.most == 4 * (16 + 64 + 64 + 1)


def test_shared_weights_count_once_and_buffers_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(10, dtype=torch.float64))
    assert weigh(model) == 4 * 16 + 80


def test_a_network_stays_as_it_was_and_one_that_does_not_run_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    memory_mb(model, torch.randn(3, 4))
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        memory_mb(model, torch.randn(3, 5))
