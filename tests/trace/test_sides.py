"""Queries make channels, keys match them; what is linear is proved by a random matrix, in both directions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from breadth import EXHAUSTIVE
from gallery.attention import attention_of_parameters_with_a_dimension_of_heads
from torch import Tensor, nn

import intrafusion
from intrafusion.graph import ChannelGraph, ChannelGroup, Role


class Attention(nn.Module):
    """Two heads of four, and what is done to queries and keys before they meet."""

    def __init__(self, *, bent: str = "", fused: bool = False, keys: int = 2) -> None:
        super().__init__()
        self.bent, self.fused, self.keys = bent, fused, keys
        self.stem = nn.Linear(3, 8)
        if fused:
            self.qkv = nn.Linear(8, 24)
        else:
            self.k, self.q, self.v = nn.Linear(8, 4 * keys), nn.Linear(8, 8), nn.Linear(8, 4 * keys)
        self.o, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.fused:
            return self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        k, q, v = self.k(x), self.q(x), self.v(x)
        return tuple(t.unflatten(-1, (h, -1)).transpose(1, 2) for t, h in ((q, 2), (k, self.keys), (v, self.keys)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = self.split(x)
        if self.bent == "k":
            k = F.elu(k)
        if self.bent == "q":
            q = q.relu()
        if self.bent == "v":
            v = F.gelu(v)
        k, v = (t.repeat_interleave(2 // self.keys, 1) for t in (k, v))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(-1)
        return self.head(F.gelu(x + self.o((weights @ v).transpose(1, 2).flatten(2))))


def inspect(**options: object) -> ChannelGraph:
    torch.manual_seed(0)
    model = Attention(**options).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return intrafusion.inspect(model, torch.randn(2, 5, 3))


def find_queries(graph: ChannelGraph) -> list[ChannelGroup]:
    return [g for g in graph.groups if g.with_role(Role.MATCHES)]


def roles(group: ChannelGroup) -> dict[str, str]:
    return {f"{m.tensor} {m.positions.ravel().tolist()}": "+".join(sorted(m.roles)) for m in group.members}


def test_what_is_computed_first_makes_the_channels_and_the_other_side_matches_them() -> None:
    first, second = find_queries(inspect())
    assert roles(first) == {
        "k.weight [0, 1, 2, 3]": "produces",
        "k.bias [0, 1, 2, 3]": "shifts",
        "q.weight [0, 1, 2, 3]": "matches",
        "q.bias [0, 1, 2, 3]": "matches",
    }
    assert first.linear
    assert second.linear
    assert first.unmixable is None
    assert first.family == second.family


def test_a_fused_layer_has_a_member_for_each_side() -> None:
    first, _ = find_queries(inspect(fused=True))
    assert roles(first) == {
        "qkv.weight [0, 1, 2, 3]": "produces",
        "qkv.bias [0, 1, 2, 3]": "shifts",
        "qkv.weight [8, 9, 10, 11]": "matches",
        "qkv.bias [8, 9, 10, 11]": "matches",
    }


def test_keys_that_several_heads_of_queries_share() -> None:
    (only,) = find_queries(inspect(keys=1))
    found = roles(only)
    assert found["k.weight [0, 1, 2, 3]"] == "produces"
    assert found["q.weight [0, 4, 1, 5, 2, 6, 3, 7]"] == "matches"
    assert only.linear


def test_values_that_one_weight_of_all_heads_is_multiplied_with_lie_on_one_side() -> None:
    """The channels of queries that have heads and dimensions apart are one, and so is what softmax makes of them."""
    model, example = attention_of_parameters_with_a_dimension_of_heads()
    graph = intrafusion.inspect(model, example)
    assert roles(graph["v"]) == {
        "v.weight [0, 4, 1, 5, 2, 6, 3, 7]": "produces",
        "v.bias [0, 4, 1, 5, 2, 6, 3, 7]": "shifts",
        "o.weight [0, 4, 1, 5, 2, 6, 3, 7]": "consumes",
    }
    assert graph["v"].linear  # as a random matrix has proved
    assert graph["v"].unmixable is None


@pytest.mark.parametrize("bent", ["q", "k"])
def test_sides_that_are_bent_are_selected(bent: str) -> None:
    for group in find_queries(inspect(bent=bent)):
        assert group.reducible
        assert not group.linear
        assert "not linear" in (group.unmixable or "")


def test_values_that_are_bent_are_mixed_but_not_as_one_likes() -> None:
    plain, bent = ([g for g in inspect(bent=b).groups if g.producers == ("v",)] for b in ("", "v"))
    assert [g.linear for g in plain] == [True, True]
    assert [(g.linear, g.unmixable) for g in bent] == [(False, None)] * 2


@pytest.mark.parametrize(
    "reducer", ["select", "pivot", *(pytest.param(r, marks=EXHAUSTIVE) for r in ("intrafusion", "fold"))]
)
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"keys": 1}, {"bent": "k"}], ids=str)
def test_what_is_redundant_goes_without_loss(options: dict[str, object], reducer: str) -> None:
    """Of every head, two of four directions of the keys are zero, and of the values: half of each head is enough."""
    torch.manual_seed(0)
    model = Attention(**options).eval()  # type: ignore[arg-type]
    layers = [(model.qkv, 8)] if model.fused else [(model.k, 0), (model.v, 0)]
    with torch.no_grad():
        for layer, start in layers:
            for parameter in layer.parameters():
                parameter[start + 1 :: 2] = 0
    x = torch.randn(64, 5, 3)
    groups = intrafusion.inspect(model, x[:2]).groups
    names = [g.name for g in groups if g.is_channel and set(g.producers) <= {"q", "k", "v", "qkv"}]
    assert len(names) == (4 if model.fused or model.keys == 2 else 2)
    keep = {**dict.fromkeys(names, 0.5), "*": 1.0}
    small = intrafusion.compress(model, x[:2], keep=keep, reducer=reducer, images=x, restore=None)
    assert {d.group: d.m for d in small.plan.decisions if d.reduced} == dict.fromkeys(names, 2), small.rolled_back
    torch.testing.assert_close(small.model(x), model(x), atol=1e-5, rtol=1e-5)
