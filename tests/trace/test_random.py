"""Networks that draw random numbers in evaluation mode: proved at their mean, selected, or left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery.core import Wired
from torch import Tensor, nn

import intrafusion
from intrafusion import compress, inspect
from intrafusion.trace.random import Draws

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

EXACT: dict[str, tuple[Callable[[Tensor], Any], float]] = {
    "dropout": (lambda x: F.dropout(x, 0.5, training=True), 2.0),
    "bernoulli_": (lambda x: torch.empty_like(x).bernoulli_(0.25), 0.25),
    "bernoulli": (lambda x: torch.bernoulli(x / 8), 0.25),
    "rand_like": (torch.rand_like, 0.5),
    "randn_like": (torch.randn_like, 0.0),
    "normal_": (lambda x: x.clone().normal_(mean=3.0, std=2.0), 3.0),
    "uniform_": (lambda x: x.clone().uniform_(1, 5), 3.0),
    "exponential_": (lambda x: x.clone().exponential_(lambd=2.0), 0.5),
    "poisson": (torch.poisson, 2.0),
    "normal": (lambda x: torch.normal(x, 1.0), 2.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_means(name: str) -> None:
    draw, mean = EXACT[name]
    x = torch.full((3, 2), 2.0)
    with torch.no_grad(), Draws(mean=True) as draws:
        found = draw(x)
    assert found.tolist() == [[mean] * 2] * 3
    assert len(draws.names) == 1
    with torch.no_grad(), Draws() as draws:
        samples = torch.stack([draw(x.expand(500, 3, 2).contiguous()) for _ in range(4)])
    assert abs(float(samples.mean()) - mean) < 0.2
    assert len(draws.names) == 1


def net(noise: Callable[[Tensor], Tensor]) -> nn.Module:
    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.c(noise(F.relu(net.b(F.relu(net.a(x))))))

    return Wired(wiring, a=nn.Linear(8, 32), b=nn.Linear(32, 32), c=nn.Linear(32, 3))


@pytest.mark.parametrize(
    "noise",
    [
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: x + 0.1 * torch.randn_like(x),
        lambda x: x * torch.empty(len(x), 1).bernoulli_(0.5),
    ],
    ids=["dropout", "noise", "whole rows"],
)
def test_random_numbers_of_each_channel_are_no_obstacle(noise: Callable[[Tensor], Tensor]) -> None:
    model, state = net(noise), torch.get_rng_state()
    small = compress(model, X, 0.5, restore=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert (small.model.a.out_features, small.model.b.out_features) == (16, 16)
    assert "draws random numbers" in str(small)


def test_channels_with_numbers_of_their_own_are_selected() -> None:
    graph = inspect(net(lambda x: F.dropout(x, 0.5, training=True)), X)
    assert (graph["a"].unmixable, graph["b"].unmixable) == (None, "random numbers are drawn for each of its channels")


class Latent(nn.Module):
    """The middle of a variational autoencoder."""

    def __init__(self, draw: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.draw, self.mean, self.spread, self.out = draw, nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.draw(self.mean(x), self.spread(x).exp()))


def draw_behind_a_norm(mean: Tensor, deviation: Tensor) -> Tensor:
    drawn = mean + deviation * torch.randn_like(mean)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def test_what_is_random_for_each_channel_is_not_rotated() -> None:
    """At their mean the numbers hide what their size does to a rotation: the deviations are not linear."""
    group = inspect(Latent(draw_behind_a_norm), X)["mean"]
    assert (group.reason, group.rotation) == (None, None)
    assert (group.unmixable or "").endswith("not rotated: random numbers are drawn for each of its channels")


@pytest.mark.parametrize("independent", [False, True])
def test_checks_of_a_distribution_are_no_obstacle(independent: bool) -> None:
    def draw(mean: Tensor, deviation: Tensor) -> Tensor:
        found = torch.distributions.Normal(mean, deviation, validate_args=True)
        return (torch.distributions.Independent(found, 1) if independent else found).rsample()

    small = compress(Latent(draw), X, 0.5, restore=None)
    assert small.rolled_back == {}
    assert [small.model.mean.out_features, small.model.spread.out_features, small.model.out.in_features] == [3, 3, 3]


def test_random_numbers_in_a_shape_of_their_own_are_named() -> None:
    graph = inspect(net(lambda x: x + torch.randn(4, 32)), X)
    assert graph["a"].reason is None
    assert not any(g.reason is None and "b" in g.producers for g in graph.groups if g.size > 1)
    assert any("draws random numbers in evaluation mode too (randn)" in warning for warning in graph.warnings)


def test_the_result_does_not_depend_on_the_state_outside() -> None:
    model = net(lambda x: F.dropout(x, 0.5, training=True))
    plans = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        plans.append(compress(model, X, 0.5, images=X.repeat(10, 1)).model.b.weight.tolist())
    assert plans[0] == plans[1]


def test_what_draws_nothing_is_told_nothing() -> None:
    assert intrafusion.trace.trace(nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 2)), X).warnings == ()
