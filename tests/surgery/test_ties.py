"""Widths of heads that hang on one number are cut alike, and the number follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion
from intrafusion.graph import ChannelGraph


class Attention(nn.Module):
    """Four heads of eight; where their width comes from is what differs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.head_dim = 8 if kind in ("number", "product", "rotary", "apart") else 0
        self.width = 32 if kind == "product" else -1  # that of the stream, too
        self.qkv = nn.Linear(32, 96) if kind == "fused" else None
        self.q, self.k, self.v = (None if kind == "fused" else nn.Linear(32, 32) for _ in range(3))
        self.o = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        if self.qkv is not None:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            shape = (-1, self.head_dim) if self.head_dim else (4, -1)
            q, k = (layer(x).unflatten(-1, shape).transpose(1, 2) for layer in (self.q, self.k))
            v = self.v(x).unflatten(-1, (q.shape[1], -1) if self.kind == "apart" else shape).transpose(1, 2)
        if self.kind == "rotary":
            q, k = turn(q), turn(k)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o(x.reshape(*x.shape[:2], self.width if self.kind == "product" else -1))


def turn(x: Tensor) -> Tensor:
    """A rotary embedding, which tells the halves of a head apart and every pair of it."""
    angle = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125]).repeat(2)
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.norm, self.attn, self.head = (
            nn.Linear(6, 32),
            nn.LayerNorm(32),
            Attention(kind),
            nn.Linear(32, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.attn(self.norm(x))).mean(1))


X = torch.randn(64, 5, 6, generator=torch.Generator().manual_seed(0))


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(kind).eval()


def families(graph: ChannelGraph) -> set[tuple[str, ...]]:
    """Layers whose heads are of one family."""
    found: dict[int, set[str]] = {}
    for group in graph.reducible:
        if group.is_channel and group.name.startswith("attn"):
            found.setdefault(group.family, set()).update(group.producers)
    return {tuple(sorted(names)) for names in found.values()}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("number", {("attn.k", "attn.q", "attn.v")}),
        ("fused", {("attn.qkv",)}),
        ("shape", {("attn.k", "attn.q"), ("attn.v",)}),
        ("apart", {("attn.k", "attn.q"), ("attn.v",)}),
    ],
)
def test_queries_are_twins_of_the_values_only_where_one_width_serves_both(kind, expected):
    assert families(intrafusion.inspect(make(kind), X[:2])) == expected


@pytest.mark.parametrize("kind", ["number", "fused", "shape", "product"])
@pytest.mark.parametrize(
    "how", [{"keep": {"attn*": 0.5, "*": 1.0}}, {"target": {"params": 0.6}}], ids=["keep", "target"]
)
def test_heads_are_cut_and_run_and_are_proved(kind, how):
    small = intrafusion.compress(make(kind), X[:2], exclude=["stem"], images=X, **how)
    assert small.rolled_back == {}
    heads = [d for d in small.plan.decisions if d.group.startswith("attn") and d.n == 8]
    assert all(d.proof == "function" for d in heads if d.reduced)
    assert any(d.reduced for d in heads)
    if kind != "shape":
        assert len({d.m for d in heads}) == 1
    if kind in ("number", "product"):
        assert small.model.attn.head_dim == heads[0].m
    assert small.model(X).shape == (64, 3)


@pytest.mark.parametrize("stream", [0.5, 0.75])
def test_numbers_that_go_together_follow_beside_the_stream(stream):
    """`width` is heads times `head_dim`, and as large as the stream, which is cut to another size."""
    small = intrafusion.compress(make("product"), X[:2], keep={"attn.[qkv]*": 0.25, "*": stream}, restore=None)
    assert small.rolled_back == {}
    assert (small.model.attn.head_dim, small.model.attn.width) == (2, 8)
    assert small.model.norm.weight.shape == (32 * stream,)
    assert {d.proof for d in small.plan.decisions if d.reduced} == {"function"}  # the stream is rotated


def test_values_go_without_the_queries_where_only_these_are_shaped_by_the_number(tmp_path: Path) -> None:
    small = intrafusion.compress(make("apart"), X[:2], keep={"attn.q*": 0.75, "attn.v*": 0.25, "*": 1.0}, restore=None)
    assert small.rolled_back == {}
    attn = small.model.attn
    assert (attn.head_dim, attn.q.out_features, attn.k.out_features, attn.v.out_features) == (6, 24, 24, 8)
    assert {d.proof for d in small.plan.decisions if d.reduced} == {"function"}
    small.save(tmp_path / "small")
    assert torch.equal(intrafusion.load(tmp_path / "small", make("apart")).eval()(X), small.model(X))


def test_heads_are_halved_beside_the_stream_where_fewer_heads_of_the_old_width_would_run_too():
    """Four heads of four are as wide as two of eight; they are not the same function."""
    small = intrafusion.compress(make("number"), X[:2], keep=0.5, reducer="select", restore=None)
    assert small.rolled_back == {}
    assert small.model.attn.head_dim == 4
    assert small.model.attn.q.weight.shape == (16, 16)


def test_values_that_share_their_number_with_turned_queries_say_so():
    small = intrafusion.compress(make("rotary"), X[:2], keep=0.5, exclude=["stem"], restore=None)
    values = [small.rolled_back[d.group] for d in small.plan.decisions if d.group in small.rolled_back]
    assert len(values) == 4
    assert all("attn.head_dim is the width of attn.k and attn.q too, which stay: " in why for why in values)
    torch.testing.assert_close(small.model(X), make("rotary")(X))


def test_saved_heads_load_with_their_width(tmp_path):
    small = intrafusion.compress(make("number"), X[:2], keep=0.5, exclude=["stem"], images=X)
    small.save(tmp_path / "small")
    loaded = intrafusion.load(tmp_path / "small", make("number")).eval()
    assert loaded.attn.head_dim == 4
    assert torch.equal(loaded(X), small.model(X))
