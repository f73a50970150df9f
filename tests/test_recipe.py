from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import nn

from intrafusion import ChannelGroup, IntraFusion, Recipe, Select, inputs_of
from intrafusion.importance import IMPORTANCES, Magnitude, Random
from intrafusion.recipe import RecipeError
from intrafusion.reduce import REDUCERS, Pivot
from intrafusion.restore import LeastSquares


def through_yaml(recipe: Recipe) -> Recipe:
    return Recipe.from_yaml(recipe.to_yaml())


def test_the_default() -> None:
    recipe = Recipe.of()
    assert recipe == Recipe() == through_yaml(recipe) == Recipe.from_yaml("{}")
    assert recipe.reducer == Pivot()
    assert recipe.restore == ("auto",)
    assert recipe.importance == Magnitude(p=2.0)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_registered_method_survives_yaml_by_its_name(reducer: str, importance: str) -> None:
    recipe = Recipe.of(reducer=reducer, importance=importance)
    assert through_yaml(recipe) == recipe
    assert f"reducer: {reducer}\n" in recipe.to_yaml()
    assert f"importance: {importance}\n" in recipe.to_yaml()


@pytest.mark.parametrize(
    "change",
    [
        {"reducer": IntraFusion("function", p=2.0, source_marginal="radical", bias=False)},
        {"importance": Magnitude(p=3.0, reduction="prod", normalizer=None, bias=True)},
        {"importance": Magnitude(p=float("inf"), reduction="max")},
        {"importance": Random(seed=7)},
        {"target": {"macs": 0.5}, "min_channels": 4},
        {"restore": None},
        {"restore": ["closed_form", {"name": "least_squares", "rows": 500}]},
        {"keep": {"layer1.*": 0.5, "head": 1.0}},
        {"round_to": 8, "seed": 3, "order": "backward"},
        {"include": ("a.*", inputs_of("b")), "exclude": "c:inputs"},
        {"include": ()},
    ],
)
def test_changed_options_survive_yaml(change: dict[str, Any]) -> None:
    recipe = Recipe.of(**change)
    assert recipe != Recipe()
    assert through_yaml(recipe) == recipe
    assert through_yaml(recipe).to_yaml() == recipe.to_yaml()


def test_a_name_with_hyper_parameters_is_that_method() -> None:
    reducer = {"name": "intrafusion", "normalization": "function"}
    recipe = Recipe.of(reducer=reducer, importance={"name": "l2", "reduction": "max"})
    assert recipe.reducer == IntraFusion(normalization="function")
    assert recipe.importance == Magnitude(p=2.0, reduction="max")
    assert reducer == {"name": "intrafusion", "normalization": "function"}
    with pytest.raises(ValueError, match="unknown hyper-parameter 'normalisation'. Did you mean 'normalization'"):
        Recipe.of(reducer={"name": "intrafusion", "normalisation": "function"})
    with pytest.raises(ValueError, match="unknown reducer 'intrafuse'. Did you mean 'intrafusion'"):
        Recipe.of(reducer={"name": "intrafuse"})


def test_a_recipe_written_by_hand() -> None:
    recipe = Recipe.from_yaml(
        "keep: 0.5\nreducer: {name: intrafusion, normalization: target}\nexclude: [head, 'a:inputs']\n"
    )
    assert recipe == Recipe.of(keep=0.5, reducer=IntraFusion("target"), exclude=["head", inputs_of("a")])
    assert Recipe.from_yaml("reducer: select\nexclude: head\n") == Recipe.of(reducer=Select(), exclude=["head"])


def test_a_restorer_is_read_back_as_what_makes_it_again() -> None:
    read = through_yaml(Recipe.of(restore=LeastSquares(rows=500)))
    assert read.restore == (LeastSquares(rows=500),)


def test_keep_and_target_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="expected keep or target, got both"):
        Recipe.of(keep=0.5, target={"params": 0.5})


def own_importance(group: Any, weights: Any, observations: Any = None) -> Any:
    raise AssertionError("never called here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kep: 0.5", "recipe: unknown option 'kep'. Did you mean 'keep'"),
        ("reducer: intrafusio", "recipe: unknown reducer 'intrafusio'. Did you mean 'intrafusion'"),
        ("importance: l3", "recipe: unknown importance 'l3'. Did you mean 'l"),
        (
            "reducer: {name: intrafusion, pp: 2}",
            "recipe: reducer 'intrafusion': unknown hyper-parameter 'pp'. Did",
        ),
        ("reducer: {name: intrafusion, normalization: sorce}", "unknown normalization 'sorce'. Did you mean 'source'"),
        ("importance: {name: l1, p: -1}", "p: expected p > 0"),
        ("importance: {name: l1, p: two}", "importance 'l1'"),
        ("reducer: [1, 2]", r"recipe: reducer: expected a name, a mapping with a name or an object .*, got \[1, 2\]"),
        ("reducer: 3", "recipe: reducer: expected a name, a mapping with a name or an object .*, got 3"),
        ("order: sideways", "unknown order 'sideways'"),
        ("[1, 2]", "recipe: expected a mapping of options, got list"),
        ("", "recipe: expected a mapping of options, got NoneType"),
        ("keep: [0.5", "recipe: not YAML"),
        ("keep: !!python/object/apply:os.getcwd []", "recipe: not YAML"),
        ("exclude: [3]", "expected a name, a layer type or a function"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml(text)


def test_numbers_of_numpy_are_numbers() -> None:
    assert through_yaml(Recipe.of(keep=np.float32(0.5))) == Recipe.of(keep=0.5)
    assert through_yaml(Recipe.of(keep={"a": np.float64(0.25)})) == Recipe.of(keep={"a": 0.25})


def test_a_method_of_the_user_is_named_but_cannot_be_called() -> None:
    recipe = through_yaml(Recipe.of(importance=own_importance))
    assert "own_importance" in recipe.to_yaml()
    assert through_yaml(recipe) == recipe
    with pytest.raises(RecipeError, match="it was made with .*own_importance, which is not part of intrafusion"):
        recipe.importance(ChannelGroup("g", 2, ()), {})


def test_a_type_is_written_by_its_name_and_means_the_same_layers_when_read() -> None:
    recipe = Recipe.of(exclude=[nn.Conv2d])
    assert "- type:Conv2d:outputs" in recipe.to_yaml()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1))
    (read,) = Recipe.from_yaml(recipe.to_yaml()).exclude
    assert read.layers(model) == recipe.exclude[0].layers(model) == {"0"}


def test_names_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="unknown reducer 'slect'. Did you mean 'select'"):
        Recipe.of(reducer="slect")
    with pytest.raises(RecipeError, match="unknown order 'x'"):
        replace(Recipe(), order="x")
