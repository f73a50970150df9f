"""Why a channel is alone: a parameter that has heads along one dimension and their dimensions along another."""

from __future__ import annotations

import torch
from gallery.attention import attention_of_parameters_with_a_dimension_of_heads

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
