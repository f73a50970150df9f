"""Which groups are twins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import intrafusion


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.RNNBase, *, states: bool = False) -> None:
        super().__init__()
        self.stem, self.rnn, self.states = nn.Linear(5, 7), rnn, states
        self.head = nn.Linear((rnn.proj_size or rnn.hidden_size) * (1 + rnn.bidirectional), 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs, states = self.rnn(self.stem(x))
        return (self.head(outputs[:, -1]), *([states[0]] if self.states else []))


X = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize(("layers", "both"), [(2, False), (1, True), (2, True)])
def test_layers_and_directions_of_a_recurrent_module_are_twins(
    kind: Callable[..., nn.RNNBase], layers: int, both: bool
) -> None:
    """It has one hidden size: `nn.GRU(..., num_layers=2)` with layers of 5 and of 4 does not exist."""
    graph = intrafusion.inspect(Recurrent(kind(7, 6, layers, batch_first=True, bidirectional=both)), X)
    found = [g for g in graph.groups if g.name.startswith("rnn")]
    assert [g.size for g in found] == [6] * layers * (1 + both)
    assert len({g.family for g in found}) == 1
    assert found[0].family not in {g.family for g in graph.groups if g not in found}


def test_a_projection_has_a_size_of_its_own() -> None:
    graph = intrafusion.inspect(Recurrent(nn.LSTM(7, 6, 2, batch_first=True, proj_size=3)), X)
    found = [g for g in graph.groups if g.name.startswith("rnn")]
    assert sorted(g.size for g in found) == [3, 3, 6, 6]
    assert len({(g.size, g.family) for g in found}) == len({g.family for g in found}) == 2


def test_a_layer_that_cannot_be_smaller_holds_the_others() -> None:
    graph = intrafusion.inspect(Recurrent(nn.GRU(7, 6, 2, batch_first=True), states=True), X)
    found = [g for g in graph.groups if g.name.startswith("rnn")]
    assert [g.reason for g in found] == ["output of the network"] * 2
