"""Published architectures, from timm and from Hugging Face, with random weights: their groups are interchangeable."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from breadth import EXHAUSTIVE
from torch import nn
from vision import import_torchvision

from intrafusion.graph import ChannelGroup
from intrafusion.trace import trace

EXACT, CHANGED = 1e-9, 1e-8
CONTROLS = 3  # negative controls per network

pytestmark = pytest.mark.filterwarnings("ignore")

# Of a family, its network with fewer blocks than published, and for `make fuzz` the published one, which repeats them.
ONE_EACH = {"layers": (1, 1, 1, 1)}
# Name, image size, changes, number of reducible channel groups and of their channels. Counted by hand from the
# published widths: one group per residual stream, one per inner width, one per squeezed width, each convolution group
# apart, two per head.
TIMM = [
    ("resnet18", 64, {}, 12, 2880),
    ("resnet50", 64, ONE_EACH, 5 + 2 * 4, 3904 + 2 * 960),
    pytest.param("resnet50", 64, {}, 37, 11456, marks=EXHAUSTIVE),
    ("resnext50_32x4d", 64, ONE_EACH, 5 + 2 * 4 * 32, 3904 + 2 * 1920),
    pytest.param("resnext50_32x4d", 64, {}, 5 + 2 * 16 * 32, 19008, marks=EXHAUSTIVE),
    ("regnety_002", 64, {"depth": 7}, 5 + 2 * 1056 // 8 + 7, 632 + 2 * 1056 + 180),
    pytest.param("regnety_002", 64, {}, 5 + 2 * 3264 // 8 + 13, 7892, marks=EXHAUSTIVE),
    ("nf_resnet50", 64, {"depths": (1, 1, 1, 1)}, 5 + 2 * 4, 3904 + 2 * 960),
    pytest.param("nf_resnet50", 64, {}, 37, 11456, marks=EXHAUSTIVE),
    ("convnext_atto", 64, {}, 4 + 12, 7960),
    ("mobilenetv3_small_050", 64, {}, 7 + 10 + 9, 3072),
    pytest.param("efficientnet_b0", 64, {}, 9 + 15 + 16, 11404, marks=EXHAUSTIVE),
    pytest.param("ghostnet_050", 64, {}, 31, 4064, marks=EXHAUSTIVE),  # not counted by hand
    ("densenet121", 64, {"block_config": (2, 2, 2, 2)}, 1 + 2 * 8 + 3, 64 + 160 * 8 + 192),
    pytest.param("densenet121", 64, {}, 1 + 2 * 58 + 3, 64 + 160 * 58 + 896, marks=EXHAUSTIVE),
    pytest.param("inception_v3", 96, {}, 94, 17216, marks=EXHAUSTIVE),  # every convolution alone
    ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 4}, 1 + 4 + 2 * 12, 192 + 4 * 768 + 2 * 12 * 64),
    # all but the stream, which the token layers tie together
    pytest.param("mixer_s32_224", 224, {}, 2 * 8, 8 * (256 + 2048), marks=EXHAUSTIVE),
    (
        "swin_tiny_patch4_window7_224",
        112,
        {"img_size": 112, "depths": (2, 2), "num_heads": (3, 6)},
        2 + 4 + 2 * 18,
        288 + 2304 + 2 * 18 * 32,
    ),
    pytest.param("swin_tiny_patch4_window7_224", 224, {}, 4 + 12 + 2 * 138, 19104 + 2 * 138 * 32, marks=EXHAUSTIVE),
]


@pytest.mark.parametrize(("name", "size", "changes", "groups", "channels"), TIMM)
def test_timm(name: str, size: int, changes: dict[str, Any], groups: int, channels: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import_torchvision()
            timm = pytest.importorskip("timm")
        except ImportError as error:
            pytest.skip(f"needs timm and torchvision: {error}")
    model = timm.create_model(name, pretrained=False, num_classes=10, **changes).eval()
    found = check(model, torch.randn(1, 3, size, size))
    assert len(found) == groups
    assert sum(g.size for g in found) == channels


def check(model: nn.Module, inputs: oracle.Inputs) -> list[ChannelGroup]:
    """Permute all groups at once, channels and blocks; leave out one member of a few. Returns the channel groups."""
    graph = trace(oracle.randomise_(model.eval(), gain=1.2), inputs)
    model, inputs = copy.deepcopy(model).double(), oracle.double(inputs)
    usable = [g for g in graph.groups if g.reason is None and g.size > 1]
    for kind in ("channel", "block"):
        assert oracle.permutation_error(model, inputs, [g for g in usable if g.kind == kind]) <= EXACT
    controlled = [g for g in usable if len(g.members) > 1]
    draw = random.Random(0)
    for group in draw.sample(controlled, min(CONTROLS, len(controlled))):
        member = draw.choice(group.members)
        seen = oracle.control(model, inputs, group, member) > CHANGED
        assert seen or oracle.influence(model, inputs, member) <= EXACT, f"{group.name}: {member.tensor} is not needed"
    return [g for g in usable if g.is_channel]


# ---- Hugging Face ---------------------------------------------------------------------------------------------------

LLAMA = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
ENCODER = {"num_layers": 2, "num_heads": 3, "d_model": 24, "d_kv": 8, "d_ff": 40}


def llama(t: Any) -> tuple[Any, Any]:
    config = t.LlamaConfig(**LLAMA, num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=32)
    return t.LlamaForCausalLM, config


def llama_tied(t: Any) -> tuple[Any, Any]:
    return t.LlamaForCausalLM, t.LlamaConfig(**LLAMA, num_hidden_layers=1, tie_word_embeddings=True)


def qwen3(t: Any) -> tuple[Any, Any]:
    return t.Qwen3ForCausalLM, t.Qwen3Config(**LLAMA, num_hidden_layers=1, num_key_value_heads=2, head_dim=8)


def mixtral(t: Any) -> tuple[Any, Any]:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return t.MixtralForCausalLM, t.MixtralConfig(**LLAMA, num_hidden_layers=1, num_key_value_heads=2, **experts)


def bert(t: Any) -> tuple[Any, Any]:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    return t.BertForSequenceClassification, t.BertConfig(vocab_size=50, **sizes)


def gpt2(t: Any) -> tuple[Any, Any]:
    return t.GPT2LMHeadModel, t.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=3, n_positions=16)


def t5(t: Any) -> tuple[Any, Any]:
    return t.T5ForConditionalGeneration, t.T5Config(vocab_size=50, **ENCODER)


# Network, sizes of its groups that must be found: feed-forward widths, then the stream (and the pooler of BERT). The
# stream of T5 is an output (encoder_last_hidden_state); how much of a mixture of experts can be followed is left open.
HUGGING_FACE = [
    (llama, [48, 48, 32]),
    (llama_tied, [48, 32]),
    (qwen3, [48, 32]),
    (mixtral, []),
    (bert, [40, 40, 24, 24]),
    (gpt2, [96, 96, 24]),
    (t5, [40, 40, 40, 40]),
]


@pytest.mark.parametrize(("build", "expected"), HUGGING_FACE, ids=lambda x: getattr(x, "__name__", ""))
def test_hugging_face(build: Callable[[Any], tuple[Any, Any]], expected: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImportError):
            import_torchvision()
        transformers = pytest.importorskip("transformers")
        network, config = build(transformers)
    options = {} if build is t5 else {"attn_implementation": "sdpa"}
    model = network._from_config(config, **options)
    inputs: dict[str, Any] = {"input_ids": torch.randint(0, 50, (2, 7))}
    inputs |= {"decoder_input_ids": torch.randint(0, 50, (2, 5))} if build is t5 else {}
    inputs |= {"use_cache": False} if build is not bert else {}
    sizes = Counter(g.size for g in check(model, inputs))
    assert {n: sizes[n] for n in expected} == Counter(expected)
