"""`outputs=`: what a network returns besides, and nobody wants, ties no channels; what is wanted stays proved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import ModelError, Recipe, RecipeError
from intrafusion.network.outputs import pick_outputs


class Wide(nn.Module):
    """Returns its hidden layer too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x).relu()
        return {"logits": self.last(hidden), "hidden": hidden}


class Listed(Wide):
    def forward(self, x: Tensor) -> Any:
        return tuple(super().forward(x).values())


X = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))


def test_an_output_that_nobody_wants_ties_nothing() -> None:
    model = Wide().eval()
    with pytest.raises(ModelError, match="output of the network"):
        intrafusion.compress(model, X[:2], 0.5)
    small = intrafusion.compress(model, X[:2], 0.5, outputs="logits", inputs=X)
    assert small.plan.sizes == {"first": 8}
    assert small.plan.decisions[0].proof == "function"
    found = {name: t.detach() for name, t in small.model(X).items()}
    assert (found["logits"].shape, found["hidden"].shape) == ((60, 3), (60, 8))
    assert "only logits was kept; the others may have other values and shapes" in " ".join(str(small).split())
    assert small.comparison is not None
    assert small.comparison.held_out is not None
    plain = float((found["logits"][2::5] - model(X)["logits"].detach()[2::5]).square().sum())
    logits = model(X)["logits"].detach()[2::5]
    error = plain / float((logits - logits.mean(0)).square().sum())
    assert small.comparison.held_out.after.error == pytest.approx(error, rel=1e-3)


def test_by_index_and_in_steps() -> None:
    model = Listed().eval()
    small = intrafusion.compress_in_steps(model, X[:2], 0.5, 2, outputs=0, inputs=X)
    assert small.plan.sizes == {"first": 8}
    assert small.model(X)[0].shape == (60, 3)


def test_the_choice_is_saved_with_the_plan_and_loaded(tmp_path: Path) -> None:
    model = Wide().eval()
    small = intrafusion.compress(model, X[:2], 0.5, outputs=["logits"])
    small.save(tmp_path / "small")
    again = intrafusion.load(tmp_path / "small", Wide())
    torch.testing.assert_close(again(X)["logits"], small.model(X)["logits"])
    recipe = Recipe.from_yaml((tmp_path / "small" / "recipe.yaml").read_text())
    assert recipe.outputs == ("logits",)
    redone = intrafusion.apply(model, small.plan, X[:2])
    assert redone.plan.sizes == small.plan.sizes


def test_a_choice_that_is_none_is_told_of() -> None:
    model = Wide().eval()
    with pytest.raises(ModelError, match=r"outputs: expected names .* returns \(logits, hidden\), got 'scores'"):
        intrafusion.compress(model, X[:2], 0.5, outputs="scores")
    with pytest.raises(ModelError, match=r"outputs: .* \(logits, hidden\), got 2; choose of these"):
        intrafusion.compress(model, X[:2], 0.5, outputs=2)
    with pytest.raises(RecipeError, match="outputs: expected names or indices of what the network returns, got 1.5"):
        intrafusion.compress(model, X[:2], 0.5, outputs=1.5)
    with pytest.raises(RecipeError, match="outputs: expected names or indices"):
        intrafusion.compress(model, X[:2], 0.5, outputs=[])


def test_outputs_are_picked_by_name_from_whatever_has_names() -> None:
    from collections import namedtuple

    pair = namedtuple("pair", "a b")(1, 2)
    assert pick_outputs(pair, ["b"]) == {"b": 2}
    assert pick_outputs(pair, [-1, 0]) == (2, 1)
    only = torch.zeros(2)
    assert pick_outputs(only, [0])[0] is only


def test_the_cache_of_a_language_model_ties_no_heads() -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from intrafusion.network.sources import import_transformers

    assert transformers is not None
    t = import_transformers()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=30, use_cache=True, **small)).eval()
    example = {"input_ids": torch.randint(30, (2, 7))}
    plain = intrafusion.inspect(model, example)
    freed = intrafusion.inspect(model, Recipe(outputs=("logits",)).call_of(example))
    values = [
        next(g for g in graph.groups if g.name.startswith("model.layers.0.self_attn.v_proj"))
        for graph in (plain, freed)
    ]
    assert values[0].reason is not None
    assert "output" in values[0].reason
    assert values[1].reason is None
