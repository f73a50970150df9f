"""Widths of heads that hang on one number are cut alike, and the number follows."""

from __future__ import annotations

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
        self.head_dim = 8 if kind == "number" else 0
        self.qkv = nn.Linear(32, 96) if kind == "fused" else None
        self.q, self.k, self.v = (None if kind == "fused" else nn.Linear(32, 32) for _ in range(3))
        self.o = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        if self.qkv is not None:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            shape = (-1, self.head_dim) if self.kind == "number" else (4, -1)
            q, k, v = (layer(x).unflatten(-1, shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


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
    ],
)
def test_queries_are_twins_of_the_values_only_where_one_width_serves_both(kind, expected):
    assert families(intrafusion.inspect(make(kind), X[:2])) == expected


@pytest.mark.parametrize("kind", ["number", "fused", "shape"])
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
    if kind == "number":
        assert small.model.attn.head_dim == heads[0].m
    assert small.model(X).shape == (64, 3)


def test_saved_heads_load_with_their_width(tmp_path):
    small = intrafusion.compress(make("number"), X[:2], keep=0.5, exclude=["stem"], images=X)
    small.save(tmp_path / "small")
    loaded = intrafusion.load(tmp_path / "small", make("number")).eval()
    assert loaded.attn.head_dim == 4
    assert torch.equal(loaded(X), small.model(X))
