"""Heads that share the weight of an embedding: untied where asked, with the same function, and counted honestly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vision import import_torchvision

import intrafusion
from intrafusion.network.inputs import Inputs
from intrafusion.network.sources import import_transformers
from intrafusion.surgery.untie import undo_ties

IDS = torch.arange(48).reshape(4, 12) % 29


class Tied(nn.Module):
    """An embedding, a norm and a head of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.up, self.down = nn.Embedding(29, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 29, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        return self.head(self.norm2(x + self.down(torch.relu(self.up(self.norm1(x))))))


def make_language_model(kind: str, **options: Any) -> Any:
    pytest.importorskip("transformers")
    import_torchvision()  # where its compiled part does not load, transformers does not import either
    transformers = import_transformers()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 29, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}
    if kind == "Llama":
        sizes |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 2}
    else:
        sizes |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    name = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[kind]
    config = getattr(transformers, f"{kind}Config")(tie_word_embeddings=True, **sizes)
    return getattr(transformers, name)(config).eval()


def test_the_head_gets_a_weight_of_its_own_and_the_rest_is_shared() -> None:
    model = Tied().eval()
    untied = undo_ties(model, Inputs.of(IDS))
    assert untied.head.weight is not untied.tokens.weight  # type: ignore[union-attr]
    torch.testing.assert_close(untied.head.weight, model.tokens.weight)  # type: ignore[union-attr, arg-type]
    assert untied.up.weight is model.up.weight  # type: ignore[union-attr]
    assert model.head.weight is model.tokens.weight
    torch.testing.assert_close(untied(IDS), model(IDS), rtol=0, atol=0)
    assert undo_ties(untied, Inputs.of(IDS)) is untied


def test_layers_that_share_a_weight_and_are_no_embedding_stay_so() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    assert undo_ties(model, Inputs.of(torch.randn(2, 6))) is model


def test_an_untied_stream_is_rotated_counted_saved_and_loaded(tmp_path: Path) -> None:
    model = Tied().eval()
    inputs = torch.randint(0, 29, (64, 12), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"keep": {"tokens": 0.5, "*": 1.0}, "inputs": inputs, "restore": None}
    reasons = [str(g.unmixable) for g in intrafusion.inspect(model, IDS).groups]
    assert any("untie=True (--untie) gives the head a weight of its own" in why for why in reasons)
    small = intrafusion.compress(model, IDS, untie=True, **options)
    (row,) = (d for d in small.plan.decisions if d.group == "tokens")
    assert (row.mixing, row.m, row.proof) == ("rotated", 8, "function")
    distinct = sum(p.numel() for p in model.parameters())
    assert (small.before.params, small.after.params) == (distinct, sum(p.numel() for p in small.model.parameters()))
    assert f"head.weight had the weight of tokens.weight, and has one of its own now, {29 * 16} parameters" in str(
        small.notes
    )
    small.save(tmp_path / "small")
    again = intrafusion.load(tmp_path / "small", Tied)
    torch.testing.assert_close(again(IDS), small.model(IDS))
    anew = intrafusion.apply(model, small.plan, IDS)
    torch.testing.assert_close(anew.model(IDS), small.model(IDS))
    assert anew.before == small.before
    assert anew.notes == small.notes


def test_steps_untie_once_and_count_the_original() -> None:
    from intrafusion.iterate import compress_in_steps

    model = Tied().eval()
    inputs = torch.randint(0, 29, (64, 12), generator=torch.Generator().manual_seed(0))
    small = compress_in_steps(model, IDS, {"tokens": 0.5, "*": 1.0}, 2, inputs=inputs, restore=None, untie=True)
    assert small.model.get_parameter("head.weight").shape == (29, 8)
    assert small.before.params == sum(p.numel() for p in model.parameters())
    assert sum("untied: head.weight" in note for note in small.notes) == 1


def test_a_network_without_ties_says_that_nothing_was_untied() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    small = intrafusion.compress(model, torch.randn(2, 6), 0.5, restore=None, untie=True)
    assert any("nothing was untied" in note for note in small.notes)


def test_untying_in_place_is_refused() -> None:
    with pytest.raises(intrafusion.RecipeError, match="untie: expected a copy to be made, got inplace=True too"):
        intrafusion.compress(Tied(), IDS, 0.5, untie=True, inplace=True)


@pytest.mark.parametrize(
    ("kind", "stream", "others"), [("Llama", "model.embed_tokens", 1.0), ("GPT2", "transformer.wte", 0.5)]
)
def test_language_models_come_back_from_their_folder_untied_and_generate(
    kind: str, stream: str, others: float, tmp_path: Path
) -> None:
    model = make_language_model(kind)
    model.save_pretrained(tmp_path / "original")
    example = {"input_ids": IDS, "use_cache": False}
    inputs = {"input_ids": torch.randint(0, 29, (64, 12), generator=torch.Generator().manual_seed(0))}
    keep = {stream: 0.5, "*:blocks": 1.0, "*": others}
    small = intrafusion.compress(model, example, keep, inputs=inputs, restore=None, untie=True, outputs="logits")
    assert small.plan.sizes[stream] == 8
    assert "rotated" in str(small.plan)
    assert small.model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    assert model.config.tie_word_embeddings is True
    opened = [lambda: intrafusion.load(tmp_path / "small")]
    if kind == "Llama":  # a configuration of GPT-2 has no width of heads: it says another scale than they had
        opened.append(lambda: type(model).from_pretrained(tmp_path / "small"))
    small.save(tmp_path / "small", pretrained=tmp_path / "original" if kind == "Llama" else None)
    for network in opened:
        again: Any = network()
        assert again.lm_head.weight.shape == (29, 8)
        assert again.lm_head.weight is not again.get_input_embeddings().weight
        torch.testing.assert_close(again(input_ids=IDS).logits, small.model(input_ids=IDS).logits)
        found = again.generate(IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, small.model.generate(IDS, max_new_tokens=4, do_sample=False))  # type: ignore[operator]


def test_a_forward_that_asks_whether_weights_are_tied_is_refused() -> None:
    model = make_language_model("Llama")

    class Asking(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor) -> Tensor:
            logits = super().forward(input_ids=input_ids, use_cache=False).logits
            return logits / 4 if self.config.tie_word_embeddings else logits

    with pytest.raises(intrafusion.ModelError, match="gives other outputs where its configuration says"):
        intrafusion.compress(Asking(model.config).eval(), IDS, 0.5, restore=None, untie=True)
