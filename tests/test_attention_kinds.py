"""Attention to another sequence, with a scale of its own, of other widths: nothing is lost that was not there.

Of every head half of the dimensions of queries and keys tell what the others do, or are zero, and so for values: the
smaller network, of which nothing is solved, must give what the original gives, on inputs and lengths it never saw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion

HEADS, DIM, WIDTH = 2, 6, 12
MEMORY = {"kdim": 7, "vdim": 5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Cross(nn.Module):
    """Queries from one sequence, keys and values from another of another width; the scores as `form` says."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.stem = nn.Linear(5, WIDTH)
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k, self.v = nn.Linear(7, HEADS * DIM), nn.Linear(7, HEADS * DIM)
        self.o, self.head = nn.Linear(HEADS * DIM, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.stem(x)
        split = lambda t: t.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(self.q(x)), split(self.k(memory)), split(self.v(memory))
        if self.form == "by hand":
            mixed = (q @ k.mT / math.sqrt(DIM)).softmax(-1) @ v
        elif self.form == "scale of the width":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.head(F.gelu(x + self.o(mixed.transpose(1, 2).flatten(2))))


class CrossPacked(nn.Module):
    """`nn.MultiheadAttention`, of keys and values of widths of their own, or of the stream's."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **widths)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if self.attention.in_proj_weight is not None:
            keys, values = self.stem(keys), self.stem(values)
        return self.head(F.gelu(self.attention(self.stem(x), keys, values, need_weights=False)[0]))


def count_wide(small: nn.Module, *layers: str) -> list[int]:
    return [len(small.get_parameter(f"{layer}.weight")) for layer in layers]


@pytest.mark.parametrize("form", ["by hand", "scale of the width", "scale of its own"])
@pytest.mark.parametrize("keep", [{"q*": 0.5, "*": 1.0}, {"v*": 0.5, "*": 1.0}, {"[qv]*": 0.5, "*": 1.0}])
def test_what_heads_have_twice_is_lost_without_loss(form: str, keep: Mapping[str, float]) -> None:
    """Keys see three directions of six; the values that are read span three: no dimension is zero."""
    torch.manual_seed(0)
    model = Cross(form).eval()
    with torch.no_grad():
        for head in range(HEADS):
            rows = slice(DIM * head, DIM * head + DIM)
            mixed = draw(DIM, 3, seed=head) @ draw(3, DIM, seed=10 + head)
            for layer in (model.k, model.v):
                layer.weight[rows] = mixed @ layer.weight[rows] / 3
                layer.bias[rows] = mixed @ layer.bias[rows] / 3
    example, inputs = (draw(2, 4, 5), draw(2, 6, 7)), [(draw(64, 4, 5, seed=1), draw(64, 6, 7, seed=2))]
    small = intrafusion.compress(model, example, keep, inputs=inputs, restore=None, reducer="pivot")
    expected = [DIM * HEADS // 2 if pattern in "".join(keep) else DIM * HEADS for pattern in "qqv"]
    assert count_wide(small.model, "q", "k", "v") == expected
    assert {d.proof for d in small.plan.decisions if d.reduced} == {"function"}
    unseen = draw(3, 9, 5, seed=5), draw(3, 2, 7, seed=6)
    torch.testing.assert_close(small.model(*unseen), model(*unseen), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("widths", [{}, MEMORY])
def test_dimensions_that_are_zero_go_from_attention_of_torch(widths: Mapping[str, Any]) -> None:
    """With the channels of its stream that they are as many as, of which the others are zero, too."""
    torch.manual_seed(0)
    model = CrossPacked(**widths).eval()
    attention, kdim, vdim = model.attention, widths.get("kdim", 5), widths.get("vdim", 5)
    packed = attention.in_proj_weight is not None
    weights = attention.in_proj_weight.chunk(3) if packed else (
        attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    )  # fmt: skip
    with torch.no_grad():
        for weight, bias in zip(weights, attention.in_proj_bias.chunk(3), strict=True):
            weight[1::2], bias[1::2] = 0, 0
            bias += draw(WIDTH, seed=4) * (torch.arange(WIDTH) % 2 == 0)
        for layer in (model.stem, attention.out_proj):
            layer.weight[1::2] = 0
            layer.bias[1::2] = 0
    example = draw(2, 4, 5), draw(2, 6, kdim), draw(2, 6, vdim)
    small = intrafusion.compress(model, example, 0.5, reducer="select", restore=None)
    assert small.model.attention.head_dim == DIM // 2
    unseen = draw(3, 9, 5, seed=5), draw(3, 2, kdim, seed=6), draw(3, 2, vdim, seed=7)
    torch.testing.assert_close(small.model(*unseen), model(*unseen), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("widths", [{}, MEMORY])
def test_what_heads_of_torch_have_twice_is_lost_without_loss(widths: Mapping[str, Any]) -> None:
    """Of queries, keys and values no dimension is zero, half of them tell the others; of its stream half is zero."""
    torch.manual_seed(0)
    model = CrossPacked(**widths).eval()
    attention, kdim, vdim = model.attention, widths.get("kdim", 5), widths.get("vdim", 5)
    packed = attention.in_proj_weight is not None
    rows = attention.in_proj_weight.chunk(3) if packed else (attention.k_proj_weight, attention.v_proj_weight)
    keys = rows[-2:], attention.in_proj_bias.chunk(3)[-2:]
    with torch.no_grad():
        attention.in_proj_bias.copy_(draw(3 * WIDTH, seed=4))
        for head in range(HEADS):
            own = slice(DIM * head, DIM * head + DIM)
            mixed = draw(DIM, 3, seed=head) @ draw(3, DIM, seed=10 + head) / 3
            for weight, bias in zip(*keys, strict=True):
                weight[own], bias[own] = mixed @ weight[own], mixed @ bias[own]
        for layer in (model.stem, attention.out_proj):
            layer.weight[1::2], layer.bias[1::2] = 0, 0
    example = draw(2, 4, 5), draw(2, 6, kdim), draw(2, 6, vdim)
    inputs = [(draw(64, 4, 5, seed=1), draw(64, 6, kdim, seed=2), draw(64, 6, vdim, seed=3))]
    small = intrafusion.compress(model, example, 0.5, inputs=inputs, restore=None)
    assert small.model.attention.head_dim == DIM // 2
    assert {d.mixing for d in small.plan.decisions if d.group.startswith("attention#")} == {"mixed"}
    unseen = draw(3, 9, 5, seed=5), draw(3, 2, kdim, seed=6), draw(3, 2, vdim, seed=7)
    torch.testing.assert_close(small.model(*unseen), model(*unseen), rtol=1e-3, atol=1e-4)
