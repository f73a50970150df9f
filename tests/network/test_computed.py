"""Weights that are computed anew in each call: told of, and not written where that would be lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, remove_spectral_norm, spectral_norm, weight_norm

import intrafusion


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


@pytest.mark.parametrize("place", [2, 4])
def test_a_masked_bias_takes_up_no_constant(place: int) -> None:
    """Written into what a mask computes anew, it was lost; where the layer itself is cut, that did not fit."""
    net, x = layers(), torch.randn(64, 6)
    prune.l1_unstructured(net[place], "bias", 2)
    small = intrafusion.compress(net, x[:4], 0.5, inputs=x)
    assert small.plan.sizes == {"0": 8, "2": 6}
    call = "torch.nn.utils.prune.remove(module, 'bias')"
    assert any(f"{place}.bias: computed anew in each call by a mask" in w and call in w for w in small.plan.warnings)
    layer = small.model[place]  # type: ignore[index]
    small.model(x)
    torch.testing.assert_close(layer.bias, layer.bias_orig * layer.bias_mask)


@pytest.mark.parametrize("kind", [prune.identity, weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_smaller_network_holds_what_its_next_call_computes(kind: Callable[[nn.Module, str], nn.Module]) -> None:
    """Until then there was what the original had computed, in its size, of which layers were solved on noise."""
    net, x = layers(), torch.randn(4, 6)
    kind(net[2], "weight")
    prune.l1_unstructured(net[2], "bias", 2)
    small = intrafusion.compress(net, x, 0.5, restore="noise", progress=False).model
    layer: nn.Linear = small[2]  # type: ignore[index]
    held = layer.weight.detach().clone(), layer.bias.detach().clone()
    assert held[0].shape == (6, 8)
    small(x)
    torch.testing.assert_close((layer.weight.detach(), layer.bias.detach()), held)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (spectral_norm, "{0,2}.weight: computed anew in each call by a spectral norm"),
        (parametrizations.orthogonal, "{0,2}.weight: computed anew in each call by a parametrization"),
        (weight_norm, None),
        (parametrizations.weight_norm, None),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_what_can_be_folded_in_is_told(kind: Callable[[nn.Module], nn.Module], told: str | None) -> None:
    net = nn.Sequential(kind(nn.Conv2d(3, 8, 3)), nn.ReLU(), kind(nn.Conv2d(8, 8, 3)), nn.Flatten(), nn.Linear(32, 3))
    warnings = intrafusion.inspect(net.eval(), torch.randn(2, 3, 6, 6)).warnings
    assert [w.partition(";")[0] for w in warnings] == ([told] if told else [])
    if kind is spectral_norm:
        assert "torch.nn.utils.remove_spectral_norm(module, 'weight')" in warnings[0]
        remove_spectral_norm(net[0]), remove_spectral_norm(net[2])
        again = intrafusion.inspect(net, torch.randn(2, 3, 6, 6))
        assert not again.warnings
        assert again["0"].reducible
