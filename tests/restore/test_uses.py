"""What reads the output of a layer: only where an activation function alone does, its outputs are what counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.network.layers import Layer, watch_calls
from intrafusion.restore.activation import Activation
from intrafusion.restore.uses import UseWatcher


class One(nn.Module):
    """A layer and what is done with its output."""

    def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.then = nn.Linear(4, 4), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x), x)


def activations(model: nn.Module, x: Tensor) -> dict[str, Activation]:
    layers = {"layer": Layer("layer", model.layer)}
    uses = UseWatcher(layers, after_sum=lambda found, total: found[0][1])
    with torch.no_grad(), watch_calls({"layer": model.layer}, lambda name, x, y: uses.watch(y, name)), uses:
        model(x)
    return uses.activations


def added_in_place(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y.relu_()


@pytest.mark.parametrize(
    ("then", "function", "slope"),
    [
        (lambda y, x: y.relu(), F.relu, 1.0),
        (lambda y, x: F.relu(y, inplace=True) * x, F.relu, 1.0),
        (lambda y, x: F.gelu(y, approximate="tanh"), lambda y: F.gelu(y, approximate="tanh"), 1.129),
        (lambda y, x: F.silu(y).sum(), F.silu, 1.0998),
        (lambda y, x: F.hardswish(y), F.hardswish, 1.5),
        (lambda y, x: F.relu6(y), F.relu6, 1.0),
        (lambda y, x: F.leaky_relu(y, 0.3), lambda y: F.leaky_relu(y, 0.3), 1.0),
        (lambda y, x: torch.sigmoid(y) * x, torch.sigmoid, 0.25),
        (lambda y, x: F.elu(y, 2.0), lambda y: F.elu(y, 2.0), 2.0),
        (lambda y, x: F.relu(y + x), F.relu, 1.0),
        (added_in_place, F.relu, 1.0),
    ],
)
def test_the_function_that_alone_reads_the_output(
    then: Callable[[Tensor, Tensor], Tensor], function: Callable[[Tensor], Tensor], slope: float
) -> None:
    found = activations(One(then), torch.randn(3, 4))["layer"]
    values = torch.linspace(-9, 9, 50)
    kept = values.clone()
    torch.testing.assert_close(found(values), function(kept))
    assert torch.equal(values, kept)
    assert found.slope == pytest.approx(slope, rel=0.01)


@pytest.mark.parametrize(
    "then",
    [
        lambda y, x: y.relu() + y,
        lambda y, x: y.relu() + y.sigmoid(),
        lambda y, x: y.neg() + y.relu(),
        lambda y, x: y.neg(),
        lambda y, x: y.clamp(min=x),
        lambda y, x: F.prelu(y, x[0, :1]),
        lambda y, x: y.softmax(1),
        lambda y, x: (y + x).relu() + (y + x),
        lambda y, x: (lambda total: total.relu() + total)(y + x),
    ],
)
def test_what_something_else_reads_too_must_be_right_itself(then: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert activations(One(then), torch.rand(3, 4)) == {}
