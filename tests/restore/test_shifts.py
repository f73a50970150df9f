"""Moments against what is really read, constants against the full network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import Recipe
from intrafusion.network.inputs import Inputs
from intrafusion.observe.moments import measure_moments, shrink
from intrafusion.restore import calibrate


class Net(nn.Module):
    """conv bn act conv (bn) act pool linear; unpadded, so that constants reach every place alike."""

    def __init__(self, activation: nn.Module, second_norm: bool = True, second_bias: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10)
        self.act = activation
        self.second = nn.Conv2d(10, 6, 3, bias=second_bias)
        self.norm2 = nn.BatchNorm2d(6) if second_norm else nn.Identity()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        return self.head(F.relu(self.norm2(self.second(x))).mean((2, 3)))


def made(*args: object) -> Net:
    return randomise_(Net(*args)).eval()  # type: ignore[arg-type, return-value]


X = Inputs.of(torch.zeros(1, 3, 9, 9))
IMAGES = torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(3))


def plan_for(model: nn.Module, **options: object) -> tuple[intrafusion.ChannelGraph, intrafusion.Plan]:
    graph = intrafusion.inspect(model, IMAGES[:1])
    recipe = Recipe.of(reducer="pivot", **options)
    return graph, intrafusion.decide(model, graph, recipe, calibration=calibrate(model, X, "images", IMAGES))


def test_measured_moments_are_those_of_what_is_read() -> None:
    model = made(nn.ReLU())
    graph, _ = plan_for(model)
    with torch.no_grad():
        h = F.relu(model.norm(model.first(IMAGES))).movedim(1, -1).reshape(-1, 10).double()
    found = measure_moments(model, graph, IMAGES, rows=10**6)["first"]
    mean, covariance = found.overall
    np.testing.assert_allclose(mean, h.mean(0), atol=1e-6)
    np.testing.assert_allclose(covariance, shrink(torch.cov(h.T, correction=0), len(h)), atol=1e-5)


@pytest.mark.parametrize(("norm", "bias"), [(True, False), (False, True), (True, True)])
def test_constant_channels_are_replaced_by_shifts(norm: bool, bias: bool) -> None:
    """Channels that never change can be dropped without loss once their constant is passed on."""
    model = made(nn.ReLU(), norm, bias)
    model.norm.weight.data[6:] = 0.0
    graph, plan = plan_for(model, keep=0.6, include="first")
    bare = replace(plan, maps={name: replace(m, shift=None) for name, m in plan.maps.items()})
    with torch.no_grad():
        expected = model(IMAGES)
        missing, found = (intrafusion.apply(model, p, IMAGES[:1], graph=graph).model(IMAGES) for p in (bare, plan))
    assert float((missing - expected).norm()) > 0.01 * float(expected.norm())
    assert float((found - expected).norm()) < 0.005 * float(expected.norm())


def test_a_consumer_with_no_place_for_a_constant_gets_none() -> None:
    model = made(nn.ReLU(), False, False)
    graph, plan = plan_for(model, keep=0.5, include="first")
    bare = replace(plan, maps={name: replace(m, shift=None) for name, m in plan.maps.items()})
    assert plan.maps["first"].shift is not None
    found, expected = (intrafusion.apply(model, p, IMAGES[:1], graph=graph).model.state_dict() for p in (plan, bare))
    assert all(torch.equal(t, found[n]) for n, t in expected.items())
