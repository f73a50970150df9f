"""Why a channel is alone: a parameter that has heads along one dimension and their dimensions along another."""

from __future__ import annotations

import torch
from gallery.attention import attention_of_parameters_with_a_dimension_of_heads
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import intrafusion


def test_a_parameter_with_a_dimension_of_heads_is_named_as_the_reason() -> None:
    """As in XLNet; the channels of its heads do not move together, but they are none of either dimension."""
    model, example = attention_of_parameters_with_a_dimension_of_heads()
    graph = intrafusion.inspect(model, example)
    assert graph["q"].reason == "q gives it along two dimensions at once, as heads and dimensions of each"
    with torch.no_grad():
        before = model(*example) if isinstance(example, tuple) else model(example)
        for name in "qk":
            model.get_parameter(name).copy_(model.get_parameter(name)[..., [2, 0, 3, 1]])
        after = model(*example) if isinstance(example, tuple) else model(example)
    torch.testing.assert_close(after, before)


def test_what_a_spectral_norm_of_a_convolution_holds_says_how_to_be_free_of_it() -> None:
    model, x = (
        nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), spectral_norm(nn.Conv2d(8, 4, 3))),
        (2, 3, 9, 9),
    )
    reasons = [g.reason for g in intrafusion.inspect(model.eval(), torch.randn(x)).groups]
    assert (
        "2.parametrizations.weight.original is seen as one matrix: div in 2.parametrizations.weight.0; after training, "
        "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') folds that in (module: 2)"
    ) in reasons
    for layer in (model[0], model[2]):
        parametrize.remove_parametrizations(layer, "weight")
    assert intrafusion.inspect(model, torch.randn(x))["0"].reason is None
