"""Fake quantisation: one grid for a tensor is element-wise; one for each channel is left alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    disable_observer,
    get_default_qat_qconfig,
    prepare_qat,
)

from gallery.core import Inputs, Wired, case, chain

Built = tuple[nn.Module, Inputs]


def quantised(operation: Any, **parts: Any) -> Built:
    """linear -> operation -> linear, with a weight that is rounded too."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_tensor_affine(net.a.weight, 0.01, 0, -128, 127)
        h = nn.functional.linear(x, weight, net.a.bias).relu()
        return net.head(operation(net, h))

    net = Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(6, 2), **parts)
    return net, torch.randn(3, 4)


@case({"a": 6}, blocked={"head": "output"}, unmixable=("a",))
def one_grid_for_all() -> Built:
    return quantised(lambda net, h: torch.fake_quantize_per_tensor_affine(h, 0.02, 3, 0, 255))


class Int8(nn.Module):
    """A layer whose weight is kept as numbers from -127 to 127, with a scale for each row."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(outputs, 1) / 100)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


@case({"b": 7}, partial=True, blocked={"a": "multiplied by a constant matrix", "head": "output"})
def a_layer_with_integers_for_weights() -> Built:
    """What it reads and gives is left alone, the layers behind it are not."""
    layers = {"a": nn.Linear(4, 6), "quantised": Int8(6, 5), "act": nn.ReLU()}
    return chain(**layers, b=nn.Linear(5, 7), more=nn.Tanh(), head=nn.Linear(7, 2)), torch.randn(3, 4)


@case({"a": 6}, blocked={"head": "output"}, unmixable=("a",))
def a_module_whose_observer_is_off() -> Built:
    grid: Any = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    grid(torch.rand(4, 6))
    grid.apply(disable_observer)
    return quantised(lambda net, h: grid(h))


@case(blocked={"a": "the extremes of all channels", "head": "output"})
def a_module_whose_observer_is_on() -> Built:
    grid: Any = FakeQuantize(MinMaxObserver, quant_min=0, quant_max=255)
    grid(torch.rand(4, 6))
    return quantised(lambda net, h: net.grid(h), grid=grid)


@case(blocked={"a": "a zero point for each channel", "head": "output"})
def a_grid_for_each_channel() -> Built:
    scale, zero = torch.linspace(0.01, 0.02, 6), torch.arange(6, dtype=torch.int32)
    return quantised(lambda net, h: torch.fake_quantize_per_channel_affine(h, scale, zero, 1, 0, 255))


@case({"a": 6}, blocked={"head": "output"}, unmixable=("a",))
def a_network_prepared_for_quantised_training() -> Built:
    """Every layer rounds its weight and what it gives, observed and rounded in one step; the observers are off."""
    net = chain(a=nn.Linear(4, 6), act=nn.ReLU(), head=nn.Linear(6, 2)).train()
    net.qconfig = get_default_qat_qconfig("qnnpack")  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        prepare_qat(net, inplace=True)
    x = torch.randn(3, 4)
    net(x)
    return net.apply(disable_observer), x
