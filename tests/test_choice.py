"""reducer="auto": candidates are compared on inputs that they were not solved on, and the best is taken and named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion import Compressed, Recipe, choice
from intrafusion.errors import ModelError, RecipeError
from intrafusion.importance import Magnitude
from intrafusion.network.tensors import named_tensors
from intrafusion.plan import Plan
from intrafusion.reduce import Auto, Pivot
from intrafusion.restore import LeastSquares

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), norm or nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def compress(model: nn.Module | None = None, **options: Any) -> Compressed:
    options = {"keep": None if "target" in options else 0.5, "inputs": IMAGES, "progress": False, **options}
    return intrafusion.compress(model or network(), X, **options)


def auto(*names: str) -> dict[str, Any]:
    return {"name": "auto", "candidates": names}


def told(small: Compressed) -> str:
    (note,) = [w for w in small.plan.warnings if w.startswith("reducer auto: ")]
    assert " ".join(note.split()) in " ".join(str(small).split())
    return note


def are_same(a: Compressed, b: Compressed) -> bool:
    others = named_tensors(b.model)
    return all(torch.equal(t, others[name]) for name, t in named_tensors(a.model).items())


OTHERS: dict[str, dict[str, Any]] = {
    "pivot": {"reducer": "pivot"},
    "eliminate": {"reducer": "eliminate"},
    "fold": {"reducer": "fold"},
    "magnitude": {"reducer": "select", "importance": Magnitude(p=2.0, member_normalizer="mean", folded=True)},
}


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What candidates are off by, in their order."""
    given: list[float] = []
    left = iter(given)
    monkeypatch.setattr(choice._Contest, "measure", lambda self, plan: next(left))
    yield given
    assert list(left) == []


@pytest.mark.parametrize("winner", OTHERS)
def test_the_winner_is_what_compress_gives_with_it(winner: str, errors: list[float]) -> None:
    errors += [0.1 if name == winner else 0.3 for name in OTHERS]
    small = compress(reducer=auto(*OTHERS))
    assert are_same(small, compress(**OTHERS[winner]))
    assert f"reducer auto: {winner}, with which outputs are off by 10 % of their variance on 64 images" in told(small)
    assert all(f"{name} 30 %" in told(small) for name in OTHERS if name != winner)
    assert small.plan.recipe.reducer == Auto(tuple(OTHERS))


def test_an_error_that_is_no_number_does_not_win(errors: list[float]) -> None:
    errors += [float("nan"), 0.5]
    assert told(compress(reducer=auto("pivot", "magnitude"))).startswith("reducer auto: magnitude")


def test_candidates_are_solved_on_a_third_and_measured_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: apply, least squares on every third image, mean squared difference on the rest."""
    measured = list[tuple[Plan, float]]()
    measure = choice._Contest.measure
    monkeypatch.setattr(
        choice._Contest, "measure", lambda self, plan: measured.append((plan, measure(self, plan))) or measured[-1][1]
    )
    model = network()
    small = compress(model, reducer="auto")
    assert small.images is not None
    images = small.images.join().as_taken().tensors()[0]
    assert len(images) == 96
    third = torch.arange(96) % 3 == 0
    graph = intrafusion.inspect(model, X)
    for plan, error in measured:
        cut = intrafusion.apply(model, plan, X)
        LeastSquares(steps=1)(cut, model, graph, images[third])
        with torch.no_grad():
            wanted, found = model(images[~third]).double(), cut.model(images[~third]).double()
        own = float((found - wanted).square().mean() / wanted.var(0, correction=0).mean())
        assert error == pytest.approx(own, rel=1e-3)
    best = min(error for _, error in measured)
    assert len(measured) == 3
    shares = [float(share) for share in re.findall(r"([\d.]+) %", told(small))]
    assert shares[0] == min(shares) == pytest.approx(100 * best, rel=0.1)


def test_sizes_are_chosen_once(errors: list[float]) -> None:
    errors += [0.3, 0.2]
    first, other = compress(target={"macs": 0.5}), compress(target={"macs": 0.5}, reducer=auto("pivot", "magnitude"))
    assert told(other).startswith("reducer auto: magnitude")
    assert other.plan.sizes == first.plan.sizes
    assert other.plan.recipe.target == {"macs": 0.5}


def test_without_inputs_it_is_compared_on_what_was_made() -> None:
    small = compress(inputs=None, restore="noise", reducer=auto("pivot", "fold"))
    assert re.search(r"on 64 noise images that it was not solved on \(64 others\); ", told(small))
    assert are_same(small, compress(inputs=None, restore="noise", reducer=auto("pivot", "fold")))


def test_where_nothing_is_restored_candidates_are_compared_as_they_are() -> None:
    assert "images before restoring; " in told(compress(restore=None, reducer="auto"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"inputs": IMAGES[:30]}, "30 images are too few to compare candidates on"),
        ({"inputs": None, "restore": None}, "noise tells nothing of a network that is not solved on it; give inputs="),
        ({"keep": 1.0}, "there is nothing to choose"),
        ({"reducer": {"name": "auto", "candidates": ["magnitude"]}}, "there is nothing to choose"),
    ],
)
def test_where_nothing_can_be_compared_the_first_is_taken(options: dict[str, Any], why: str) -> None:
    small = compress(**{"reducer": "auto", **options})
    name = small.plan.recipe.reducer.candidates[0]  # type: ignore[attr-defined]
    assert told(small) == f"reducer auto: {name}, as {why}."
    assert are_same(small, compress(**{**options, **OTHERS[name]}))


def test_a_network_that_no_inputs_can_be_made_for() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.b((self.a(x) + y.mean()).relu())

    small = intrafusion.compress(Pair(), (torch.ones(2, 4), torch.ones(2, 4)), 0.5, reducer="auto", progress=False)
    assert told(small) == "reducer auto: pivot, as there are no inputs to compare candidates on."


def test_a_candidate_selects_where_channels_must_not_be_mixed_and_that_is_said(errors: list[float]) -> None:
    errors += [0.3, 0.1]
    model = network(nn.GroupNorm(1, 12))
    small = compress(model, reducer=auto("pivot", "fold"))
    selected = [d.group for d in small.plan.decisions if d.mixing.startswith("selected: ")]
    assert len(selected) == 1
    assert f"in groups that must not be mixed it selects: {selected[0]}" in told(small)
    assert are_same(small, compress(model, reducer="fold"))


def test_a_candidate_that_does_not_run_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([ModelError("broken"), None, None])
    restore = choice._Contest._restore

    def fail(self: Any, made: Any) -> Any:
        error = next(calls)
        if error is not None:
            raise error
        return restore(self, made)

    monkeypatch.setattr(choice._Contest, "_restore", fail)
    note = told(compress(reducer="auto"))
    assert not note.startswith("reducer auto: pivot")
    assert "pivot does not run" in note


def test_a_plan_alone_says_that_nothing_was_compared() -> None:
    model = network()
    graph = intrafusion.inspect(model, X)
    plan = intrafusion.decide(model, graph, Recipe.of(keep=0.5, reducer="auto"), X)
    assert "reducer auto: pivot, as candidates were not compared; compress() does." in plan.warnings
    assert plan.sizes == intrafusion.decide(model, graph, Recipe.of(keep=0.5), X).sizes


def test_beside_ranks_it_says_that_nothing_is_compared() -> None:
    note = told(compress(reducer="auto", ranks=0.5))
    assert note == "reducer auto: pivot, as candidates are not compared beside ranks; leave one of them out."


def test_candidates_are_read_back() -> None:
    recipe = Recipe.of(reducer=auto("fold", "pivot"))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(Recipe.of(reducer="auto").to_yaml()).reducer == Auto()
    assert Auto().selecting() == Pivot(unmerge=False)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (("pivot", "pivots"), "unknown candidate 'pivots'. Did you mean 'pivot'"),
        (("intrafusion",), "Valid: eliminate, fold, magnitude, pivot"),
        ((), "candidates: expected different names such as"),
        (("fold", "fold"), "candidates: expected different names such as .* got"),
        (3, "candidates: expected .* got 3"),
        ("pivot", "candidate"),
    ],
)
def test_candidates_that_are_none_are_refused(candidates: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.of(reducer={"name": "auto", "candidates": candidates})
