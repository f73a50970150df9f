"""Whole blocks, such as heads: asked for by name, selected, proved, beside the dimensions inside them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion
from intrafusion.errors import BudgetError

HEADS, DIM, WIDTH = 4, 6, 10


class Attention(nn.Module):
    """Heads whose number is held in one place or another; key/value heads that several query heads share."""

    def __init__(self, kind: str = "number", shared: int = 1) -> None:
        super().__init__()
        self.kind, self.shared = kind, shared
        if kind == "number":
            self.num_heads, self.width = HEADS, HEADS * DIM
        self.stem = nn.Linear(5, WIDTH)
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k, self.v = (nn.Linear(WIDTH, HEADS // shared * DIM) for _ in range(2))
        self.o, self.head = nn.Linear(HEADS * DIM, WIDTH), nn.Linear(WIDTH, 3)

    def split(self, x: Tensor, layer: nn.Module) -> Tensor:
        if self.kind == "number":
            heads = self.num_heads if layer is self.q else self.num_heads // self.shared
            return layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        return layer(x).unflatten(-1, (-1, DIM)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        q, k, v = (self.split(x, layer) for layer in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.o(y.reshape(*y.shape[:2], self.width) if self.kind == "number" else y))


X = torch.randn(48, 7, 5, generator=torch.Generator().manual_seed(1))


def make(*args: Any, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    model = Attention(*args).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def find_kept(small: nn.Module, model: nn.Module, layer: str, size: int) -> list[int]:
    """Which blocks of rows of a layer were kept."""
    ours, theirs = (m.get_submodule(layer).weight.unflatten(0, (-1, size)) for m in (small, model))  # type: ignore[union-attr,operator]
    return [next(k for k in range(len(theirs)) if torch.equal(theirs[k], rows)) for rows in ours]


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("kind", ["number", "shape"])
def test_whole_heads_go_with_their_keys_and_values(kind: str, shared: int) -> None:
    """Against the original whose output layer finds zeros where the other heads come in."""
    model = make(kind, shared)
    small = intrafusion.compress(model, X[:2], keep={"*:blocks": 0.5}, restore=None)
    (decision,) = (d for d in small.plan.decisions if d.reduced)
    assert (decision.group, decision.n, decision.m) == ("q:blocks", HEADS // shared, HEADS // shared // 2)
    assert (decision.kind, decision.proof) == ("block", "function")
    kept = find_kept(small.model, model, "k", DIM)
    assert kept == find_kept(small.model, model, "v", DIM)
    assert kept == find_kept(small.model, model, "q", shared * DIM)
    reference = copy.deepcopy(model)
    gone = [k for k in range(HEADS // shared) if k not in kept]
    reference.o.weight.data.unflatten(1, (-1, shared * DIM))[:, gone] = 0
    torch.testing.assert_close(small.model(X), reference(X))
    if kind == "number":
        assert (small.model.num_heads, small.model.width) == (2, 2 * DIM)
    assert "4 -> 2 blocks" in str(small.plan) or shared == 2


@pytest.mark.parametrize("blocks", [1.0, 0.5])
def test_query_heads_go_from_those_that_share_a_key(blocks: float) -> None:
    """As many of each key's; also together with whole groups of them."""
    model = make("shape", 2)
    small = intrafusion.compress(model, X[:2], keep={"*:sharing": 0.5, "*:blocks": blocks}, restore=None)
    assert small.rolled_back == {}
    assert {d.group: d.m for d in small.plan.decisions if d.group.startswith("q:sharing")} == {
        "q:sharing#0": 1,
        "q:sharing#1": 1,
    }
    kept = find_kept(small.model, model, "q", DIM)
    keys = find_kept(small.model, model, "k", DIM)
    assert [k // 2 for k in kept] == keys
    assert len(keys) == 2 * blocks
    assert small.model.shared == 1
    reference = copy.deepcopy(model)
    reference.o.weight.data.unflatten(1, (-1, DIM))[:, [k for k in range(HEADS) if k not in kept]] = 0
    torch.testing.assert_close(small.model(X), reference(X))


def test_without_data_the_heads_with_the_smallest_weights_go() -> None:
    model = make()
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            layer.weight[DIM : 2 * DIM] /= 10
            layer.weight[3 * DIM :] /= 10
    small = intrafusion.compress(model, X[:2], keep={"*:blocks": 0.5}, restore=None)
    assert find_kept(small.model, model, "v", DIM) == [0, 2]


def test_with_data_a_head_goes_that_others_tell() -> None:
    """Two heads are the same but for a factor: the larger one's weights say more than its absence does."""
    model = make("shape")
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            layer.weight[DIM : 2 * DIM] = layer.weight[:DIM]
            layer.bias[DIM : 2 * DIM] = layer.bias[:DIM]
        for layer in (model.v,):
            layer.weight[DIM : 2 * DIM] *= 3
            layer.bias[DIM : 2 * DIM] *= 3
    small = intrafusion.compress(model, X[:2], keep={"*:blocks": 0.75}, images=X, restore="images")
    kept = find_kept(small.model, model, "k", DIM)
    assert len(kept) == 3
    assert {2, 3} < set(kept)
    with torch.no_grad():
        assert float((small.model(X) - model(X)).var()) < 1e-3 * float(model(X).var())


@pytest.mark.parametrize("images", [None, X])
@pytest.mark.parametrize("reducer", ["select", "pivot", "intrafusion", "fold"])
def test_heads_and_the_dimensions_inside_them_go_together(reducer: str, images: Tensor | None) -> None:
    """Two heads give nothing, and of the others half of all dimensions are zero: nothing is lost."""
    model = make()
    with torch.no_grad():
        model.o.weight[:, DIM : 3 * DIM] = 0
        for layer in (model.k, model.v):
            for parameter in layer.parameters():
                parameter[1::2] = 0
    keep = {"q:blocks": 0.5, "[qkv]*": 0.5, "*": 1.0}
    small = intrafusion.compress(model, X[:2], keep=keep, reducer=reducer, images=images, restore=None)
    assert {(d.n, d.m) for d in small.plan.decisions if d.reduced} == {(HEADS, 2), (DIM, DIM // 2)}
    assert small.model.q.weight.shape == small.model.v.weight.shape == (DIM, WIDTH)
    assert (small.model.num_heads, small.model.width) == (2, DIM)
    torch.testing.assert_close(small.model(X), model(X))


def test_blocks_are_only_cut_where_they_are_asked_for() -> None:
    for keep in (0.5, {"*": 0.5}, {"q": 0.5, "*": 0.75}):
        small = intrafusion.compress(make(), X[:2], keep=keep, restore=None)
        assert not any(d.kind == "block" for d in small.plan.decisions)


def test_sizes_of_blocks_are_counts_of_heads() -> None:
    small = intrafusion.compress(
        make(), X[:2], keep={"q:blocks": 0.75, "*": 1.0}, round_to=8, min_channels=4, restore=None
    )
    assert small.plan.sizes == {"q:blocks": 3}


def test_a_pattern_that_no_block_goes_by_is_refused() -> None:
    with pytest.raises(BudgetError, match="q:blocks"):
        intrafusion.compress(make(), X[:2], keep={"p:blocks": 0.5}, restore=None)


def test_the_table_says_how_to_ask() -> None:
    graph = intrafusion.inspect(make(), X[:2])
    assert 'keep={"*:blocks": 0.5}' in str(graph).replace("\n", " ")
    assert [g.kind for g in graph.groups if g.name == "q:blocks"] == ["block"]


def test_smaller_counts_are_saved_and_loaded(tmp_path: Path) -> None:
    small = intrafusion.compress(make(), X[:2], keep={"*:blocks": 0.5, "*": 0.5}, restore=None)
    small.save(tmp_path / "small")
    loaded = intrafusion.load(tmp_path / "small", make())
    assert loaded.num_heads == 2
    assert torch.equal(loaded(X), small.model(X))
