"""Streams that must be as wide as all heads together shrink in step with them, at any share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion
from intrafusion.graph import ChannelGraph

X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    def __init__(self, width: int = 40, heads: int = 4, hidden: int = 48, *, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True, norm_first=norm_first)
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.core = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(self.stem(x)).mean(1))


class Decoder(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.core = nn.Transformer(width, heads, 1, 1, 32, batch_first=True)
        self.stem, self.other, self.head = nn.Linear(6, width), nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(self.stem(x), self.other(x[:, :4])))


class Attention(nn.Module):
    """Its output is shaped as its input was (`kept`), or as wide as the heads are."""

    def __init__(self, width: int, heads: int, *, kept: bool) -> None:
        super().__init__()
        self.heads, self.kept = heads, kept
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o(y.reshape(x.shape) if self.kept else y.flatten(2))


class ByHand(nn.Module):
    """Two attentions of different head counts on one stream."""

    def __init__(self, width: int = 24, *, kept: bool = True) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.first, self.second = (Attention(width, heads, kept=kept) for heads in (2, 3))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(self.norm(x))
        return self.head((x + self.second(x)).tanh())


def make(kind: type[nn.Module], *args: int, **options: bool) -> Any:
    torch.manual_seed(0)
    return kind(*args, **options).eval()


def multiples(graph: ChannelGraph, name: str) -> dict[str, int]:
    """Of the groups that are cut in step with this one."""
    return {g.name: g.multiple for g in graph.groups if g.family == graph[name].family and g.reducible}


def test_a_stream_is_a_multiple_of_the_heads_that_must_fill_it() -> None:
    assert set(multiples(intrafusion.inspect(make(Encoder), X), "stem").items()) == {
        ("stem", 4),
        *((f"core.layers.{i}.self_attn#{k}", 1) for i in range(2) for k in range(8)),
    }


def test_the_least_step_is_that_of_all_attentions_on_a_stream() -> None:
    found = multiples(intrafusion.inspect(make(ByHand), X), "stem")
    assert {n.partition("#")[0]: m for n, m in found.items()} == {"stem": 6, "first.qkv": 3, "second.qkv": 2}


def test_heads_with_a_width_of_their_own_are_left_alone() -> None:
    assert multiples(intrafusion.inspect(make(ByHand, kept=False), X), "stem") == {"stem": 1}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("keep", "width"), [(0.75, 28), (0.61, 24), (0.37, 12), (0.99, 36)])
def test_an_encoder_of_torch_is_one_of_the_smaller_sizes(norm_first: bool, keep: float, width: int) -> None:
    small = intrafusion.compress(make(Encoder, norm_first=norm_first), X, keep=keep, restore=None)
    assert small.rolled_back == {}
    rebuilt = Encoder(width, 4, int(48 * keep), norm_first=norm_first).eval()
    rebuilt.load_state_dict(small.model.state_dict())
    torch.testing.assert_close(small.model(X), rebuilt(X))
    heads = [d for d in small.plan.decisions if "self_attn" in d.group]
    assert {(d.m, d.proof) for d in heads} == {(width // 4, "function")}


@pytest.mark.parametrize("keep", [0.7, 0.4])
def test_encoder_and_decoder_of_torch_are_those_of_the_smaller_sizes(keep: float) -> None:
    small = intrafusion.compress(make(Decoder), X, keep=keep, restore=None)
    assert small.rolled_back == {}
    core = small.model.core
    assert (core.d_model, core.nhead) == (4 * int(8 * keep), 4)
    assert core.decoder.layers[0].multihead_attn.head_dim == int(8 * keep)


def test_attentions_of_several_head_counts_and_what_is_written_by_hand() -> None:
    small = intrafusion.compress(make(ByHand), X, keep=0.8, restore=None)
    assert small.rolled_back == {}
    sizes = {d.group.partition("#")[0]: (d.n, d.m) for d in small.plan.decisions if d.n > 3}
    assert sizes == {"stem": (24, 18), "first.qkv": (12, 9), "second.qkv": (8, 6)}


def test_the_larger_share_counts_and_is_said() -> None:
    both = intrafusion.compress(make(Encoder), X, keep={"*self_attn#*": 0.2, "*": 0.75}, restore=None)
    assert both.model.stem.out_features == 28
    assert "cut in step with stem, of which 75% were asked for" in " ".join(both.plan.warnings)
    rounded = intrafusion.compress(make(Encoder, 64, 4), X, keep=0.7, round_to=8, restore=None)
    assert (rounded.model.stem.out_features, rounded.rolled_back) == (32, {})


def test_what_is_not_included_holds_the_other_with_a_reason() -> None:
    small = intrafusion.compress(make(Encoder), X, keep=0.5, include=["stem", "core.layers.?.linear1"], restore=None)
    assert "embed_dim 20 not divisible by" in small.rolled_back["stem"] or "multiply" in small.rolled_back["stem"]
    assert small.model.core.layers[0].linear1.out_features == 24


@pytest.mark.parametrize("target", [{"params": 0.6}, {"macs": 0.6}])
def test_a_target_is_met_in_step(target: dict[str, float], tmp_path: Path) -> None:
    images = torch.randn(64, 7, 6, generator=torch.Generator().manual_seed(1))
    small = intrafusion.compress(make(Encoder), X, target=target, inputs=images)
    kind = next(iter(target))
    share = getattr(small.after, kind) / getattr(small.before, kind)
    even = any("about the same share" in note for note in small.plan.warnings)
    assert share == pytest.approx(0.6, abs=0.02) or (even and 0.5 < share < 0.6)
    sizes = {d.group: d.m for d in small.plan.decisions}
    assert sizes["stem"] == 4 * sizes["core.layers.0.self_attn#0"] < 40
    small.save(tmp_path / "small")
    loaded = intrafusion.load(tmp_path / "small", make(Encoder)).eval()
    assert torch.equal(loaded(X), small.model(X))
