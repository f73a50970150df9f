"""A tiny random network of each kind of attention: what is cut, that it is exact, and why the rest stays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vision import import_torchvision

import intrafusion
from intrafusion.graph import READS, ChannelGroup
from intrafusion.network.inputs import Inputs
from intrafusion.pipeline import follow

with contextlib.suppress(ImportError):
    import_torchvision()  # where its compiled part does not load, transformers and timm do not import either
transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": TOKENS, "use_cache": False}


class Tokens(nn.Module):
    """Something on tokens between two layers, so that its channels are neither input nor output."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(5, width), inner, nn.Linear(width, 3)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x), *map(self.stem, others)).tanh())


def make_bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertModel(transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))


def make_bert_classifier() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config)


def make_segformer() -> nn.Module:
    sizes = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [2], "hidden_sizes": [16], "patch_sizes": [3]}
    more = {"strides": [4], "num_attention_heads": [2], "mlp_ratios": [2], "num_labels": 3}
    return transformers.SegformerForImageClassification(transformers.SegformerConfig(**sizes, **more))


def make_t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def make_gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    return transformers.GPT2Model(config)


def make_bloom() -> nn.Module:
    return transformers.BloomModel(transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2))


def make_llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, max_position_embeddings=16, **sizes)
    return transformers.LlamaModel(config)


def make_mixtral() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=40, num_local_experts=4, num_key_value_heads=2, **sizes)
    return transformers.MixtralModel(config)


def make_swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4, hidden_size=8
    )
    return transformers.SwinModel(config)


def make_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Any, str, int, str]] = {
    # network, example, heads by the names of their groups, how many of these groups are cut, why others are not
    "BERT": (make_bert, {"input_ids": TOKENS}, "attention", 4, ""),
    "GPT-2, fused": (make_gpt2, TEXT, "attn", 4, ""),
    "BLOOM, ALiBi": (make_bloom, TEXT, "attention", 4, ""),
    "timm's ViT, class token": (make_vit, PIXELS, "attn", 6, ""),
    "Swin, windows and their biases": (make_swin, PIXELS, "attention", 8, ""),
    "T5, biases by distance": (make_t5, {"input_ids": TOKENS}, "SelfAttention", 4, ""),
    "Llama, rotary": (make_llama, TEXT, "self_attn.v_proj", 0, "head_dim is the width of"),
    "Mixtral": (make_mixtral, TEXT, "self_attn.v_proj", 0, "head_dim is the width of"),
    "nn.TransformerEncoderLayer": (
        lambda: Tokens(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 16),
        torch.randn(2, 6, 5),
        "self_attn",
        0,
        "cut in step with stem, of which 100% were asked for",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of(family: str) -> None:
    """Where every other channel of the heads is a copy that nothing reads, half of them give the same."""
    make, example, heads, count, why = FAMILIES[family]
    torch.manual_seed(0)
    model = make().eval()
    graph = intrafusion.inspect(model, example)
    groups = [g for g in graph.reducible if g.is_channel and heads in g.name and g.together is None]
    names = {g.name for g in groups}
    _copy_every_other_channel_(model, groups)
    expected = Inputs.of(example).call(model)
    recipe = intrafusion.Recipe.of(keep={**dict.fromkeys(names, 0.5), "*": 1.0}, restore=None)
    small = follow(recipe, model, graph, example)
    reduced = {d.group for d in small.plan.decisions if d.reduced}
    assert reduced <= names
    assert len(reduced) == count, small.rolled_back
    assert all(d.proof == "function" for d in small.plan.decisions if d.reduced)
    said = [small.rolled_back.get(name, " ".join(small.plan.warnings)) for name in names - reduced]
    assert all(why in text for text in said)
    assert reduced or why
    assert all("whole heads or groups may go instead: keep={'*:blocks': 0.5}" in text for text in said)
    if reduced:
        for found, wanted in zip(Inputs.of(example).call(small.model), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


WHOLE: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "BERT": (make_bert_classifier, {"input_ids": TOKENS}),
    "Segformer": (make_segformer, PIXELS),
    "nn.TransformerEncoderLayer": (FAMILIES["nn.TransformerEncoderLayer"][0], torch.randn(2, 6, 5)),
    "nn.TransformerEncoderLayer, norms first": (
        lambda: Tokens(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True), 16),
        torch.randn(2, 6, 5),
    ),
}


@pytest.mark.parametrize("family", WHOLE)
def test_stream_and_heads_of(family: str) -> None:
    """Where every other channel is a copy that nothing reads, what is left after half is gone gives the same."""
    make, example = WHOLE[family]
    torch.manual_seed(0)
    model = make().eval()
    graph = intrafusion.inspect(model, example)
    groups = [g for g in graph.reducible if g.is_channel]
    _copy_every_other_channel_(model, groups)
    expected = Inputs.of(example).call(model)
    small = follow(intrafusion.Recipe.of(keep=0.5, reducer="select", restore=None), model, graph, example)
    assert not small.rolled_back
    assert {d.group for d in small.plan.decisions if d.reduced} == {g.name for g in groups}
    for found, wanted in zip(Inputs.of(example).call(small.model), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def _copy_every_other_channel_(model: nn.Module, groups: list[ChannelGroup]) -> None:
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for member in (m for group in groups for m in group.members):
            tensor, odd, even = tensors[member.tensor], member.positions[1::2].ravel(), member.positions[::2].ravel()
            copied = tensor.index_select(member.dim, torch.from_numpy(even)) * (not member.roles & READS)
            tensor.index_copy_(member.dim, torch.from_numpy(odd), copied)


def test_attention_of_torch_says_its_sizes_and_runs_its_fast_path() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5)
    small = intrafusion.compress(FAMILIES["nn.TransformerEncoderLayer"][0]().eval(), x, keep=0.5, restore=None).model
    attn = small.get_submodule("inner.self_attn")
    assert (attn.embed_dim, attn.kdim, attn.vdim, attn.num_heads, attn.head_dim) == (8, 8, 8, 2, 4)
    rebuilt = Tokens(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 8).eval()
    rebuilt.load_state_dict(small.state_dict())
    with torch.no_grad():  # the fast path; with gradients, the other
        torch.testing.assert_close(small(x), rebuilt(x))
    torch.testing.assert_close(small(x), rebuilt(x))
