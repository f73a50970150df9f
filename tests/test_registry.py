"""One way to say a method: refused at once, with the nearest of all that is valid, as an error of the library."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import intrafusion
from intrafusion import BudgetError, IntraFusion, IntrafusionError, Recipe, compress, compress_in_steps
from intrafusion.errors import RecipeError
from intrafusion.importance import LAMP, Magnitude
from intrafusion.importance.observation import ImportanceTraits
from intrafusion.reduce import Fold, Pivot, ReducerTraits, ReductionMap, Select, selecting_form
from intrafusion.reduce.select import selection_map
from intrafusion.registry import Foreign, Registry, Traits, registry_of
from intrafusion.restore import ClosedForm, LeastSquares, Noise


class Untouchable(nn.Module):
    """Whoever looks at this network was too late to refuse."""

    def forward(self, x: Any) -> Any:
        raise AssertionError("traced before the options were looked at")


REFUSED = [
    ({"reducer": "pivto"}, "unknown reducer 'pivto'. Did you mean 'pivot'"),
    (
        {"reducer": {"name": "fold", "ninit": 3}},
        "'fold': unknown hyper-parameter 'ninit'. Did you mean 'n_init'",
    ),
    ({"reducer": {"name": "fold", "n_init": "3"}}, "reducer 'fold': n_init: expected a whole number, got '3'"),
    ({"reducer": {"name": "fold", "bias": 1}}, "reducer 'fold': bias: expected True or False, got 1"),
    ({"reducer": {"name": "fold", "n_init": 0}}, "reducer 'fold': n_init: expected at least 1 start"),
    ({"reducer": {"name": "intrafusion", "epsilon": 0}}, "reducer 'intrafusion': epsilon: expected a number > 0"),
    ({"reducer": {"name": "intrafusion", "p": 0.5}}, "reducer 'intrafusion': p: expected 1 <= p"),
    ({"reducer": {"n_init": 3}}, "reducer: expected a mapping such as"),
    ({"reducer": Select}, "reducer: expected a name, a mapping with a name or an object with `mixes`"),
    ({"reducer": None}, "reducer: expected .*, got None"),
    ({"importance": "tailor"}, "unknown importance 'tailor'. Did you mean 'taylor'"),
    ({"importance": {"name": "l1", "normaliser": None}}, "Did you mean 'normalizer'"),
    ({"importance": {"name": "l1", "normalizer": 3}}, "importance 'l1': normalizer: expected a name or None, got 3"),
    ({"importance": {"name": "lamp", "p": 0}}, "importance 'lamp': p: expected p > 0"),
    ({"restore": "atuo"}, "unknown restorer 'atuo'. Did you mean 'auto'"),
    ({"restore": "sinthetic"}, "Did you mean 'synthetic'"),
    ({"restore": "imges"}, "Did you mean 'images'"),
    ({"restore": "nois"}, "Did you mean 'noise'"),
    ({"restore": "non"}, "Did you mean 'none'"),
    ({"restore": ["auto", "closed_from"]}, "Did you mean 'closed_form'"),
    ({"restore": ["auto", "noise"]}, "restore: expected at most one of auto"),
    ({"restore": ["closed_form", "none"]}, "restore: 'none' stands alone"),
    ({"restore": ["closed_form", None]}, "restorer: expected a name, .*, got None"),
    ({"restore": {"name": "images", "rows": 3}}, "restorer 'images': it takes no hyper-parameters, got rows"),
    ({"restore": {"name": "least_squares", "row": 3}}, "unknown hyper-parameter 'row'. Did you mean 'rows'"),
    ({"restore": LeastSquares}, "restorer: expected a name, .* an object with `needs_data`"),
    ({"order": "bakward"}, "unknown order 'bakward'. Did you mean 'backward'"),
    ({"seed": 1.5}, "seed: expected a whole number .*, got 1.5"),
    ({"keep": 1.5}, r"keep: expected a fraction in \(0, 1\], got 1.5"),
    ({"keep": {"a.*": "half"}}, r"keep\['a.\*'\]: expected a fraction"),
    ({"target": {"macs": -1}}, r"target\['macs'\]: expected a number above 0"),
    ({"target": 0.5}, "target: expected limits of params, macs, latency_ms"),
    ({"round_to": 0}, "round_to: expected a whole number >= 1"),
    ({"min_channels": None}, "min_channels: expected a whole number >= 1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_before_the_network_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(IntrafusionError, match=message):
        compress(Untouchable(), torch.zeros(1, 3), **options)


def test_an_option_that_does_not_exist() -> None:
    with pytest.raises(RecipeError, match=r"^unknown option 'kep'. Did you mean 'keep'\?"):
        Recipe.of(kep=0.5)
    with pytest.raises(
        RecipeError, match=r"^compress_in_steps: unknown option 'kep'. Did you mean 'keep'\? Valid: .*steps"
    ):
        compress_in_steps(Untouchable(), torch.zeros(1, 3), kep=0.5)
    with pytest.raises(RecipeError, match=r"^compress_in_steps: unknown option 'inplace'"):
        compress_in_steps(Untouchable(), torch.zeros(1, 3), inplace=True)


def test_by_name_by_mapping_or_as_an_object() -> None:
    said = Recipe.of(reducer={"name": "intrafusion", "p": np.float32(2)}, restore=["closed_form", {"name": "noise"}])
    assert said.reducer == IntraFusion(p=2.0)
    assert type(said.reducer.p) is float  # type: ignore[attr-defined]
    assert said.restore == (ClosedForm(), Noise())
    assert Recipe.of(restore=(ClosedForm(), Noise())) == Recipe.of(restore=said.restore)
    assert Recipe.of(restore="none").restore == Recipe.of(restore=None).restore == ()
    assert Recipe.of(restore={"name": "auto"}).restore == ("auto",)


def test_a_restorer_that_shares_its_name_with_a_word_is_read_back_as_the_restorer() -> None:
    recipe = Recipe.of(restore=[Noise(), "closed_form"])
    assert "- name: noise\n- closed_form\n" in recipe.to_yaml()
    assert Recipe.from_yaml(recipe.to_yaml()).restore == (Noise(), ClosedForm())


def test_what_version_0_1_wrote_is_read() -> None:
    text = "restore:\n- name: LeastSquares\n  rows: 500\n- name: Mine\n  layer: '7'\n"
    recipe = Recipe.from_yaml(text)
    assert recipe.restore == (LeastSquares(rows=500), Foreign("Mine"))
    with pytest.raises(RecipeError, match="it was made with Mine, which is not part of intrafusion"):
        recipe.refuse_foreign()


@dataclass(frozen=True)
class Bare:
    """Says only what it must."""

    mixes = True
    needs_data = False

    def __call__(self, problem: Any) -> ReductionMap:
        return selection_map(torch.arange(problem.size), len(problem.importance))


def test_what_a_method_does_not_say_is_the_default() -> None:
    assert ReducerTraits.of(Bare()) == ReducerTraits(mixes=True)
    assert ReducerTraits.of(Pivot(unmerge=False)) == ReducerTraits(mixes=False, needs_moments=True)
    assert ReducerTraits.of(Fold()).absorbs_duplicates
    assert ImportanceTraits.of(lambda group, weights, observations: weights) == ImportanceTraits()
    assert not Recipe.of(reducer=Bare()).needs_moments
    assert Recipe.of(reducer=Bare(), target={"macs": 0.5}).needs_moments
    assert selecting_form(Bare()) == Select()
    assert selecting_form(Pivot()) == Pivot(unmerge=False)
    assert selecting_form(Select()) == Select()


def test_a_reducer_of_somebody_else_works_without_the_optional_words() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    small = compress(model, torch.randn(2, 3), 0.5, reducer=Bare(), restore=None)
    assert torch.equal(small.model[0].weight, model[0].weight[:4])  # type: ignore[index]


@pytest.mark.parametrize("flag", [None, 1, "yes"])
def test_what_a_method_must_say_is_true_or_false(flag: Any) -> None:
    method = Bare()
    object.__setattr__(method, "mixes", flag)
    with pytest.raises(RecipeError, match="an object with `mixes`"):
        Recipe.of(reducer=method)


def test_values_of_types_that_nobody_can_check_are_left_to_the_method() -> None:
    @dataclass(frozen=True)
    class Listed:
        parts: list[int] = field(default_factory=list)
        rate: int | float | None = None

        def __call__(self) -> None: ...

    registry = Registry("thing", {"listed": Listed}, "a callable", 0, Traits)
    assert registry.resolve({"name": "listed", "parts": (1, 2)}).parts == (1, 2)
    with pytest.raises(RecipeError, match="thing 'listed': rate: expected a whole number or a number or None, got 'x'"):
        registry.resolve({"name": "listed", "rate": "x"})


@pytest.mark.parametrize("kind", ["reducer", "importance", "restorer"])
def test_every_registered_method_is_written_and_read(kind: str) -> None:
    registry = registry_of(kind)
    for name in registry.methods:
        method = registry.resolve(name)
        assert registry.resolve(registry.to_data(method)) == method
        assert registry.traits.are_told_by(method)


def test_a_bad_hyper_parameter_is_an_error_of_the_library_without_a_recipe_too() -> None:
    for make in (lambda: Magnitude(p=-1), lambda: LAMP(p=0), lambda: IntraFusion("sorce"), lambda: ClosedForm(floor=2)):
        with pytest.raises(IntrafusionError):
            make()


def test_an_option_of_the_recipe_is_an_argument_of_compress_with_the_same_default() -> None:
    arguments, default = signature(compress).parameters, Recipe()
    own = {"model", "example_inputs", "inputs", "images", "tokenizer", "memory", "inplace", "progress"}
    own |= {"evaluate", "max_drop", "lower_is_better", "max_error", "of"}  # by which a recipe's sizes are found
    assert set(arguments) - own == {f.name for f in fields(Recipe)}
    assert Recipe.of(**{name: arguments[name].default for name in Recipe.options()}) == default


def test_min_channels_holds_with_keep() -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    example = torch.randn(2, 3)
    sizes = lambda **options: compress(model, example, 0.25, restore=None, **options).plan.sizes  # noqa: E731
    assert sizes() == {"0": 4, "2": 1}
    assert sizes(min_channels=6) == {"0": 6}  # five channels are fewer than six: all of them stay
    assert sizes(min_channels=3, round_to=4) == {"0": 4, "2": 4}
    in_steps = compress_in_steps(model, example, 0.25, 3, restore=None, min_channels=3)
    assert in_steps.plan.sizes == {"0": 4, "2": 3}
    with pytest.raises(BudgetError, match="min_channels: expected a whole number >= 1, got 0"):
        intrafusion.compress(model, example, 0.5, min_channels=0)
