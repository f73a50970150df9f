"""Numbers in code that a view keeps while a -1 beside them takes up what channels were removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, forward: Forward, into: int) -> None:
        super().__init__()
        self.run, self.into, self.out = forward, nn.Linear(5, into), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def regrouped(net: Any, x: Tensor) -> Tensor:
    return net.out(net.into(x).reshape(-1, 8).softmax(-1).view(len(x), -1))  # the line that is named


def apart(net: Any, x: Tensor) -> Tensor:
    return net.out(net.into(x).unflatten(-1, (-1, 8)).softmax(-1).flatten(-2))  # the line that is named


def heads(net: Any, x: Tensor) -> Tensor:
    q, k, v = (y.view(2, 6, -1, 8).transpose(1, 2) for y in net.into(x).chunk(3, -1))  # the line that is named
    return net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 6, -1))


LINES = [n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith("line that is named")]


@pytest.mark.parametrize(
    ("forward", "into", "number"),
    [(regrouped, 16, 8), (apart, 16, 8), (heads, 48, 8)],
    ids=["rows", "unflattened", "heads"],
)
def test_a_number_that_regroups_channels_is_named(forward: Forward, into: int, number: int) -> None:
    torch.manual_seed(0)
    net, x = Net(forward, into), torch.randn(2, 6, 5) if forward is heads else torch.randn(4, 5)
    small = intrafusion.compress(net, x, 0.5, restore=None)
    line = LINES[[regrouped, apart, heads].index(forward)]
    told = f"at test_regrouping.py:{line} {number} is written in the code, and a -1 beside it takes up what is missing"
    assert small.rolled_back
    assert all(told in why for why in small.rolled_back.values())


def test_a_view_that_is_right_is_not_named() -> None:
    """Maps of 2 by 2 that a linear layer gives; the number that is wrong is another's."""

    def maps(net: Any, x: Tensor) -> Tensor:
        h = net.into(x).view(len(x), -1, 2, 2).relu()
        return net.out(F.pad(h.mean((2, 3)), (0, 16 - h.shape[1])))

    torch.manual_seed(0)
    why = intrafusion.compress(Net(maps, 16), torch.randn(4, 5), 0.5, restore=None).rolled_back["into"]
    assert "does not run" in why
    assert "beside it" not in why
