"""Sizes that a configuration can say: what save_pretrained writes opens as the same network, or is refused in words."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion import Compressed
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.network.sources import import_transformers
from intrafusion.network.tensors import named_tensors
from intrafusion.pipeline import explain_unsaid
from intrafusion.recipe import Recipe
from intrafusion.surgery.configuration import find_config, round_sizes, shrink_shapes, tie_by_config

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")

IDS = torch.arange(3, 13)[None] % 40
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
BOTH = {**TEXT, "decoder_input_ids": IDS[:, :5]}
PIXELS = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def build(kind: str, config: str, **sizes: Any) -> nn.Module:
    transformers = import_transformers()
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()


def make_llama(**sizes: Any) -> nn.Module:
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}
    return build("LlamaForCausalLM", "LlamaConfig", **{"hidden_size": 32, "intermediate_size": 48, **common, **sizes})


def make_gpt2() -> nn.Module:
    special = {"bos_token_id": 0, "eos_token_id": 39, "n_positions": 64}
    return build("GPT2LMHeadModel", "GPT2Config", vocab_size=40, n_embd=16, n_layer=2, n_head=2, **special)


def make_t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return build("T5ForConditionalGeneration", "T5Config", vocab_size=40, **sizes)


def make_bart() -> nn.Module:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 20, "max_position_embeddings": 64}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 39, "forced_eos_token_id": None}
    return build("BartForConditionalGeneration", "BartConfig", vocab_size=40, **layers, **widths, **special)


def make_bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return build("BertModel", "BertConfig", vocab_size=40, max_position_embeddings=32, **sizes)


def make_vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return build("ViTForImageClassification", "ViTConfig", image_size=16, patch_size=8, **sizes)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, int | None]]] = {
    "llama": (make_llama, TEXT, {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8}),
    "gpt2": (make_gpt2, TEXT, {"n_inner": 32, "n_embd": 16}),
    "t5": (make_t5, BOTH, {"d_ff": 12, "d_model": 16}),
    "bart": (make_bart, BOTH, {"encoder_ffn_dim": 12, "decoder_ffn_dim": 10}),
    "bert": (make_bert, TEXT, {"intermediate_size": 12, "hidden_size": 16}),
    "vit": (make_vit, PIXELS, {"intermediate_size": 12, "hidden_size": 16}),
}
"""A network, an example, and what its configuration says once everything that it can say is half as large."""


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[nn.Module, Compressed]]:
    return {}


def halve(made: dict[str, tuple[nn.Module, Compressed]], name: str) -> tuple[nn.Module, Compressed]:
    if name not in made:
        make, example, _ = NETWORKS[name]
        model = make()
        made[name] = model, intrafusion.compress(model, example, 0.5, restore=None, uniform=True)
    return made[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_save_pretrained_writes_what_from_pretrained_opens(
    made: dict[str, tuple[nn.Module, Compressed]], name: str, tmp_path: Path
) -> None:
    model, small = halve(made, name)
    _, example, says = NETWORKS[name]
    assert {key: getattr(small.model.config, key) for key in says} == says
    assert small.after.params < small.before.params
    small.model.save_pretrained(tmp_path)
    found, told = type(small.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    with torch.no_grad():
        a, b = found.eval()(**example), small.model(**example)
    assert torch.equal(a[0], b[0])
    assert getattr(model.config, next(iter(says))) != says[next(iter(says))], "the original says what it is"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_generation_with_and_without_a_cache_agree(
    made: dict[str, tuple[nn.Module, Compressed]], name: str, tmp_path: Path
) -> None:
    model, small = halve(made, name)
    small.model.save_pretrained(tmp_path)
    found = type(small.model).from_pretrained(tmp_path).eval()
    for network in (model, small.model, found):
        said = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        cached, plain = (network.generate(**TEXT, **said, use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain)
        if network is found:
            assert torch.equal(cached, small.model.generate(**TEXT, **said))


def test_a_past_goes_on_after_compression(made: dict[str, tuple[nn.Module, Compressed]]) -> None:
    _, small = halve(made, "llama")
    with torch.no_grad():
        whole = small.model(IDS).logits[:, -1]
        past = small.model(IDS[:, :-1], use_cache=True).past_key_values
        step = small.model(IDS[:, -1:], past_key_values=past).logits[:, -1]
    torch.testing.assert_close(step, whole)


def test_uniform_makes_one_size_of_what_one_number_sets() -> None:
    """A target alone gives each layer a size of its own; the largest layer is made the least sensitive."""
    model = make_bert()
    graph = intrafusion.inspect(model, TEXT)
    keep = {"encoder.layer.0.*": 0.25, "*": 0.75}
    plain = intrafusion.decide(model, graph, Recipe.of(keep=keep), TEXT).sizes
    uniform = intrafusion.decide(model, graph, Recipe.of(keep=keep, uniform=True), TEXT)
    widths = [f"encoder.layer.{i}.intermediate.dense" for i in (0, 1)]
    assert [plain[name] for name in widths] == [6, 18]
    assert uniform.sizes == dict.fromkeys(widths, 18)
    head = next(d for d in uniform.decisions if d.group.endswith("query#0"))
    assert head.reason == "no number of the BertConfig sets these channels alone, as uniform asks for"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_uniform_holds_for_a_target_in_steps_and_in_place(tmp_path: Path) -> None:
    model = make_bert()
    small = intrafusion.compress(model, TEXT, target={"params": 0.8}, restore=None, uniform=True)
    steps = intrafusion.compress_in_steps(make_bert(), TEXT, 0.5, 2, restore=None, uniform=True)
    here = intrafusion.compress(model, TEXT, 0.5, restore=None, uniform=True, inplace=True)
    assert here.model is model
    for found, size in ((small, None), (steps, 12), (here, 12)):
        width = found.model.config.intermediate_size
        assert len(set(found.plan.sizes.values())) == 1
        assert width == next(iter(found.plan.sizes.values())) == (size or width)
        found.model.save_pretrained(tmp_path / str(id(found)))
        opened = type(model).from_pretrained(tmp_path / str(id(found))).eval()
        with torch.no_grad():
            assert torch.equal(opened(**TEXT)[0], found.model(**TEXT)[0])
        found.save(tmp_path / "net")
        assert intrafusion.load(tmp_path / "net").config.intermediate_size == width


def test_twins_of_what_is_excluded_stay_too() -> None:
    model = make_llama()
    recipe = Recipe.of(keep=0.5, exclude=["model.layers.0.mlp.gate_proj"], uniform=True)
    plan = intrafusion.decide(model, intrafusion.inspect(model, TEXT), recipe, TEXT)
    assert plan.sizes == {"model.embed_tokens": 16}
    reasons = {d.group: d.reason for d in plan.decisions}
    assert str(reasons["model.layers.1.mlp.gate_proj"]).startswith("like model.layers.0.mlp.gate_proj: ")


def test_sizes_that_no_number_of_heads_divides_are_rounded() -> None:
    """A LlamaConfig takes widths that its 4 heads divide: 32 * 0.7 = 22 becomes 24, and with multiples of 6, 24."""
    model = make_llama()
    graph = tie_by_config(intrafusion.inspect(model, TEXT), model)
    asked = dict.fromkeys([g.name for g in graph.reducible], 22)
    found, told = round_sizes(asked, graph, None)
    assert found["model.embed_tokens"] == 24
    assert found["model.layers.0.mlp.gate_proj"] == 22
    assert told == ("uniform: sizes that no configuration can say were rounded: model.embed_tokens 22 -> 24",)
    assert round_sizes(asked, graph, 6)[0]["model.embed_tokens"] == 24
    small = intrafusion.compress(model, TEXT, 0.7, restore=None, uniform=True)
    assert any("were rounded" in note for note in small.plan.warnings)
    assert small.model.config.hidden_size == 24


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    small = intrafusion.compress(model, TEXT, 0.5, restore=None, uniform=True)
    small.model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path).eval()
    assert found.config.hidden_size == 16
    assert found.lm_head.weight is found.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, small.model(IDS).logits)


def test_what_no_configuration_says_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = make_bert()
    small = intrafusion.compress(model, TEXT, {"encoder.layer.0.*": 0.25, "*": 0.75}, restore=None)
    assert any("intrafusion.load is needed, not from_pretrained: no BertConfig gives these" in n for n in small.notes)
    copies = [small.model, copy.deepcopy(small.model), pickle.loads(pickle.dumps(small.model))]
    small.save(tmp_path / "net")
    copies.append(intrafusion.load(tmp_path / "net"))
    for network in copies:
        with pytest.raises(
            ModelError, match=r"save_pretrained: no BertConfig gives these sizes: 16 -> 4, 12; 24 -> 6, 18 .as in"
        ):
            network.save_pretrained(tmp_path / "refused")
        torch.testing.assert_close(network(**TEXT)[0], small.model(**TEXT)[0])
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ModelError, match="from_pretrained would fail"):
        small.save(tmp_path / "other", pretrained=tmp_path / "net")
    assert not (tmp_path / "other").exists()


def test_a_second_compression_lifts_the_refusal(tmp_path: Path) -> None:
    model = make_bert()
    small = intrafusion.compress(model, TEXT, {"encoder.layer.0.*": 0.5, "*": 1.0}, restore=None)
    keep = {"encoder.layer.1.intermediate.dense": 0.5, "*": 1.0}
    heads = ["encoder.layer.0.attention.self.*"]
    again = intrafusion.compress(model, TEXT, {"*intermediate.dense": 0.5}, restore=None)
    assert again.model.config.intermediate_size == 12
    with pytest.raises(ModelError, match="save_pretrained"):
        small.model.save_pretrained(tmp_path)
    first = intrafusion.compress(model, TEXT, {"encoder.layer.0.intermediate.dense": 0.5}, restore=None)
    second = intrafusion.compress(first.model, TEXT, keep, exclude=heads, restore=None)
    second.model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.intermediate_size == 12


def test_a_network_that_computes_otherwise_is_not_taken_for_the_configuration_s(tmp_path: Path) -> None:
    model = make_bert()
    model.encoder.layer[0].attention.self.scaling = 0.5  # not what the configuration says, and no shape shows it
    small = intrafusion.compress(model, TEXT, {"*intermediate.dense": 0.5}, restore=None)
    for network in (small.model, small.model):
        with pytest.raises(ModelError, match="built from its BertConfig, gives other outputs"):
            network.save_pretrained(tmp_path)
    small.save(tmp_path / "net")
    loaded = intrafusion.load(tmp_path / "net", model)
    with pytest.raises(ModelError, match="save_pretrained"):
        loaded.save_pretrained(tmp_path)


def test_parts_of_a_network_say_their_sizes_too(made: dict[str, tuple[nn.Module, Compressed]], tmp_path: Path) -> None:
    _, llama = halve(made, "llama")
    llama.model.model.save_pretrained(tmp_path / "llama")
    found = type(llama.model.model).from_pretrained(tmp_path / "llama").eval()
    assert torch.equal(found(IDS)[0], llama.model.model(IDS)[0])
    _, t5 = halve(made, "t5")
    assert t5.model.encoder.config.d_ff == 12
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**vision, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 39}
    pictures = {**vision, "image_size": 16, "patch_size": 8, "intermediate_size": 20}
    clip = build("CLIPModel", "CLIPConfig", text_config=text, vision_config=pictures, projection_dim=8)
    small = intrafusion.compress(clip, {**TEXT, **PIXELS}, {"*fc1": 0.5}, restore=None)
    parts = small.model.config.text_config, small.model.config.vision_config
    assert [part.intermediate_size for part in parts] == [12, 10]
    assert small.model.vision_model.config is parts[1]


def test_the_shapes_and_the_reason_are_known_before_the_work() -> None:
    model = make_bert()
    graph = intrafusion.inspect(model, TEXT)
    say = lambda **options: explain_unsaid(Recipe.of(**options), model, graph)  # noqa: E731
    assert "no BertConfig gives these sizes: 16 -> 8" in str(say(keep=0.5))
    assert say(keep={"*intermediate.dense": 0.5}) is None
    assert say(keep=0.5, uniform=True) is None
    assert say(target={"params": 0.5}) == "a target chooses the size of every group by itself"
    plain = nn.Linear(3, 3)
    assert explain_unsaid(Recipe(), plain, intrafusion.inspect(plain, torch.zeros(1, 3))) is None
    small = intrafusion.compress(model, TEXT, 0.5, restore=None)
    expected = {name: tuple(t.shape) for name, t in named_tensors(small.model).items()}
    found = shrink_shapes(graph, small.plan.sizes)
    assert {name: expected[name] for name in found} == found


def test_the_search_names_what_is_in_the_way() -> None:
    model = make_bert()
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    same, why = find_config(model, shapes)
    assert same.to_dict() == model.config.to_dict()
    assert why == ""
    name = "encoder.layer.1.intermediate.dense.weight"
    config, why = find_config(model, {**shapes, name: (7, 16)})
    assert config is None
    assert "24 -> 7 (as in encoder.layer.1.intermediate.dense.weight" in why


@pytest.mark.parametrize("change", [lambda m: nn.Sequential(m), lambda m: m])
def test_uniform_needs_a_network_that_is_what_its_configuration_says(change: Callable[[nn.Module], nn.Module]) -> None:
    model = make_bert()
    model.encoder.layer[0].intermediate.dense = nn.Linear(16, 20)
    model.encoder.layer[0].output.dense = nn.Linear(20, 16)
    wrapped = change(model)
    example: Any = (IDS,)
    expected = (
        "has other tensors than its BertConfig says" if wrapped is model else "expected a network of transformers"
    )
    with pytest.raises(ModelError, match=f"uniform: .*{expected}"):
        intrafusion.compress(wrapped, example, 0.5, uniform=True)


def test_a_graph_is_tied_once() -> None:
    model = make_bert()
    graph = intrafusion.inspect(model, TEXT)
    tied = tie_by_config(graph, model)
    assert isinstance(tied, ChannelGraph)
    assert tie_by_config(tied, model) is tied
    assert replace(tied, groups=graph.groups) is not tied


def test_what_code_derives_from_a_size_that_is_uniform_stays() -> None:
    """Gemma multiplies its embeddings with the root of the width of its stream."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    widths = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "max_position_embeddings": 32}
    gemma = build("GemmaForCausalLM", "GemmaConfig", use_cache=False, **sizes, **widths)
    options = {"keep": 0.5, "restore": None, "uniform": True, "outputs": "logits"}
    small = intrafusion.compress(gemma, TEXT, **options)
    assert not any("intrafusion.load is needed" in note for note in small.notes)
    assert (small.model.config.hidden_size, small.model.config.intermediate_size) == (16, 12)
    [(name, why)] = small.rolled_back.items()
    assert [d.reason for d in small.plan.decisions if d.group == name] == [why]
    assert why == (
        "uniform: with fewer of these, a network of these sizes, built from its GemmaConfig, gives other outputs"
    )
    apart = intrafusion.compress(gemma, TEXT, exclude="model.embed_tokens", **options)
    assert all(torch.equal(a, b) for a, b in zip(small.model.parameters(), apart.model.parameters(), strict=True))


def test_a_transformers_that_is_there_but_does_not_work_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts are imported as they are asked for, and fail then where torchvision, say, does not load."""
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils", raising=False)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert intrafusion.compress(model, torch.randn(2, 3), 0.5, restore=None).model.get_submodule("0").out_features == 4
