"""As small as possible, with at most so much lost: what is found, what is told, and what means nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import Compressed
from intrafusion.errors import ArgumentError, BudgetError, IntrafusionError, ModelError, RecipeError
from intrafusion.network.tensors import named_tensors
from intrafusion.smallest import SEARCHED, bisect, count_tries

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(1))
OTHERS = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


WHOLE = network()
with torch.no_grad():
    WANTED = WHOLE(OTHERS)


def closeness(model: nn.Module) -> float:
    """1 for the original, 0 for a constant."""
    with torch.no_grad():
        return float(1 - (model(OTHERS) - WANTED).square().mean() / WANTED.var(0).mean())


def distance(model: nn.Module) -> float:
    return 1 - closeness(model)


def compress(**options: Any) -> Compressed:
    return intrafusion.compress(WHOLE, X, inputs=IMAGES, progress=False, **options)


@pytest.mark.parametrize("of", ["channels", "macs"])
def test_the_smallest_size_that_passes_is_found_and_is_what_compress_gives(of: str) -> None:
    small = compress(evaluate=closeness, max_drop=0.2, of=of)
    assert small.trials is not None
    found, tried = small.trials.found, small.trials.tried
    assert len(tried) <= 6
    assert all(trial.passes == (1 - trial.value <= 0.2 + 1e-9) for trial in tried)
    assert closeness(small.model) == pytest.approx(found.value)
    assert found.value >= 0.8
    share = float(found.asked.removeprefix(f"{of} "))
    below = SEARCHED[SEARCHED.index(share) + 1]
    asked = {"keep": share} if of == "channels" else {"target": {of: share}}
    alone = compress(**asked)
    assert all(torch.equal(t, named_tensors(alone.model)[name]) for name, t in named_tensors(small.model).items())
    assert small.plan.recipe == alone.plan.recipe
    assert [t.passes for t in tried if t.asked == f"{of} {below:g}"] == [False]  # the next smaller one does not pass


@pytest.mark.parametrize("ranks", [True, "only"])
def test_ranks_are_chosen_at_the_sizes_that_are_tried(ranks: bool | str) -> None:
    small = compress(max_error=0.3, ranks=ranks)
    assert small.trials is not None
    share = float(small.trials.found.asked.removeprefix("macs "))
    same = named_tensors(compress(target={"macs": share}, ranks=ranks).model)
    assert small.trials.found.macs == small.after.macs
    assert all(torch.equal(tensor, same[name]) for name, tensor in named_tensors(small.model).items())


def test_all_tries_are_reported(tmp_path: Path) -> None:
    small = compress(evaluate=distance, max_drop=0.1, lower_is_better=True, of="channels", restore=None)
    assert small.trials is not None
    for shown in (str(small), str(small.plan), small._repr_html_()):
        flat = " ".join(shown.replace("<wbr>", "").split())
        assert f"{small.trials.found.asked} is the smallest of 38 sizes that loses at most 0.1 of the score 0 (" in flat
        assert all(f"{trial.asked}: {trial.value:.4g}" in flat for trial in small.trials.tried)
    assert f"score       {small.trials.original:.4g} -> {small.trials.found.value:.4g}" in str(small)
    small.save(tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    enough = {True: "yes", False: "no"}
    rows = [(t.asked, f"{t.params:,}", f"{t.macs:,}", f"{t.value:.4g}", enough[t.passes]) for t in small.trials.tried]
    assert "\n".join(f"| {' | '.join(row)} |" for row in rows) in card
    assert small.trials.found.asked in (tmp_path / "small" / "plan.json").read_text()
    again = intrafusion.load(tmp_path / "small", network)
    assert torch.equal(again(OTHERS), small.model(OTHERS))


def test_without_a_function_the_output_error_counts() -> None:
    small = compress(max_error=0.15, of="channels")
    assert small.trials is not None
    assert small.comparison is not None
    assert small.comparison.held_out is not None
    assert small.trials.found.value == small.comparison.held_out.after.error
    assert small.trials.found.value <= 0.15
    assert [t.passes for t in small.trials.tried] == [t.value <= 0.15 for t in small.trials.tried]
    assert {t.passes for t in small.trials.tried} == {True, False}
    text = " ".join(str(small).split())
    assert "of 38 sizes with output error at most 15 %, on 16 unseen images; tried: channels 0.5:" in text


def test_the_original_itself_can_be_made_smaller() -> None:
    model = network()
    small = intrafusion.compress(
        model, X, inputs=IMAGES, evaluate=closeness, max_drop=0.2, of="channels", inplace=True, progress=False
    )
    assert small.model is model
    assert small.trials is not None
    assert closeness(model) == pytest.approx(small.trials.found.value)


def test_a_drop_of_exactly_what_is_allowed_passes() -> None:
    scores = iter([0.92, 0.1, *[0.91] * 20])
    small = compress(evaluate=lambda model: next(scores), max_drop=0.01, of="channels", restore=None)
    assert small.trials is not None
    assert 0.92 - 0.91 > 0.01  # by rounding
    assert [trial.passes for trial in small.trials.tried] == [True] * len(small.trials.tried)


@pytest.mark.parametrize(
    "make", [lambda v: v, torch.tensor, lambda v: torch.tensor([v], requires_grad=True), lambda v: IMAGES.new_tensor(v)]
)
def test_a_tensor_of_one_number_is_a_number(make: Callable[[float], Any]) -> None:
    small = compress(evaluate=lambda model: make(closeness(model)), max_drop=0.3, of="channels", restore=None)
    assert small.trials is not None
    assert small.trials.original == pytest.approx(1.0)
    assert small.trials.nothing == pytest.approx(closeness(_empty()))


def _empty() -> nn.Module:
    model = network()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def test_what_an_evaluation_does_to_the_network_is_undone_and_told() -> None:
    def evaluate(model: nn.Module) -> float:
        assert not model.training
        score = closeness(model)
        model.train()
        for parameter in model.parameters():
            parameter.data.mul_(2)
        return score

    before = {name: t.clone() for name, t in named_tensors(WHOLE).items()}
    small = compress(evaluate=evaluate, max_drop=0.2, of="channels")
    assert all(torch.equal(t, before[name]) for name, t in named_tensors(WHOLE).items())
    assert not WHOLE.training
    assert not small.model.training
    assert small.trials is not None
    assert closeness(small.model) == pytest.approx(small.trials.found.value)
    assert "note: evaluate changes the weights" in " ".join(str(small).split())


def test_where_a_network_without_weights_cannot_be_scored_the_search_goes_on() -> None:
    def evaluate(model: nn.Module) -> float:
        return closeness(model) / float(next(model.parameters()).abs().sum() > 0)

    small = compress(evaluate=evaluate, max_drop=0.2, of="channels", restore=None)
    assert small.trials is not None
    assert small.trials.nothing is None


def _raise(model: nn.Module) -> Any:
    raise OSError("no such data")


def _fails_on_smaller(model: nn.Module) -> float:
    assert next(model.parameters()).shape[0] == 12, "twelve channels only"
    return closeness(model)


def _first_channels(model: nn.Module) -> Tensor:
    return torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("evaluate", "error", "message"),
    [
        (_raise, ArgumentError, "evaluate: raised OSError: no such data; of the original network. It is"),
        (
            _fails_on_smaller,
            ArgumentError,
            "(?s)AssertionError: twelve channels only.*; of the network at channels",
        ),
        (
            lambda model: float("nan"),
            ArgumentError,
            "expected it to return a finite number, got nan; check what it does",
        ),
        (lambda model: float("inf"), ArgumentError, "expected it to return a finite number, got inf"),
        (
            lambda model: "0.93",
            ArgumentError,
            "expected it to return a number, got '0.93'; return one, as of the original",
        ),
        (lambda model: None, ArgumentError, "got None; return one"),
        (_first_channels, ArgumentError, r"got a tensor float32\[2\]; return one"),
        (lambda model: 3 + 1j, ArgumentError, r"got \(3\+1j\); return one"),
        (lambda model: 10**400, ArgumentError, "expected it to return a number, got a whole number of"),
        (lambda model, loader: 1.0, ArgumentError, "evaluate: raised TypeError: .*missing 1 required positional"),
        (0.93, ArgumentError, "evaluate: expected a function of a network, got 0.93; pass one, or None"),
        (lambda model: 0.93, ArgumentError, "0.93 for the same with all weights zero; it must look at"),
        (distance, ArgumentError, "got 0 for the network and .* is higher better.* say lower_is_better=True if not"),
    ],
)
def test_an_evaluation_that_tells_nothing_is_refused(evaluate: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compress(evaluate=evaluate, max_drop=0.01, of="channels", restore=None)


def test_a_higher_score_where_lower_is_better_is_noticed() -> None:
    with pytest.raises(ArgumentError, match="is lower better.* leave lower_is_better out"):
        compress(evaluate=closeness, max_drop=0.01, lower_is_better=True)


def test_an_interrupt_is_none_of_its_errors() -> None:
    def interrupt(model: nn.Module) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(evaluate=interrupt, max_drop=0.1)


def test_where_no_size_passes_the_least_harmful_is_named() -> None:
    expected = r"loses at most 0 of 1, got none of 6 tried; the least harmful, channels 0.9\d*, has 0.9\d*. Allow more"
    with pytest.raises(BudgetError, match=expected):
        compress(evaluate=closeness, max_drop=0, of="channels", restore=None)
    with pytest.raises(BudgetError, match=r"at most 1e-07 %, got none of 6 tried; the least.* is off by"):
        compress(max_error=1e-9, of="channels")


def test_a_size_at_which_nothing_is_smaller_is_none(recwarn: pytest.WarningsRecorder) -> None:
    """Nor is anybody told that the targets that were tried on the way were missed."""
    with pytest.raises(BudgetError, match=r"at most 1e-07 %, got none of 6 tried; the least.* macs 0.\d*, is off by"):
        compress(max_error=1e-9)
    small = compress(max_error=0.02)
    assert small.after.macs < small.before.macs
    assert not any("target missed" in text for text in (*map(str, recwarn), str(small), *small.plan.warnings))
    with pytest.raises(BudgetError, match="max_error: expected a size at which the network is smaller, got none of"):
        compress(max_error=0.1, min_channels=16)


def test_more_than_there_is_to_lose_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"expected less than there is to lose, got 1e\+06: evaluate gives 1 for"):
        compress(evaluate=closeness, max_drop=1e6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_drop": 0.01}, RecipeError, "max_drop: expected evaluate= too"),
        ({"evaluate": closeness}, RecipeError, "evaluate: goes with max_drop="),
        ({"lower_is_better": True, "keep": 0.5}, RecipeError, "lower_is_better: goes with max_drop="),
        ({"of": "macs"}, RecipeError, "of: goes with max_drop="),
        ({"evaluate": closeness, "max_drop": -0.1}, BudgetError, "max_drop: expected a number of at least 0, got -0.1"),
        ({"evaluate": closeness, "max_drop": float("nan")}, BudgetError, "max_drop: expected a number .* got nan"),
        ({"evaluate": closeness, "max_drop": float("inf")}, BudgetError, "max_drop: expected a number .* got inf"),
        ({"evaluate": closeness, "max_drop": True}, BudgetError, "max_drop: expected a number .* got True"),
        ({"evaluate": closeness, "max_drop": "1 %"}, BudgetError, "max_drop: expected a number .* got '1 %'"),
        ({"evaluate": closeness, "max_drop": 0.1, "keep": 0.5}, RecipeError, "goes without keep, .*of= says what is"),
        (
            {"evaluate": closeness, "max_drop": 0.1, "target": {"macs": 0.5}},
            RecipeError,
            "max_drop: goes without target, as it finds the size itself",
        ),
        ({"max_error": 0.1, "merge_heads": 1}, RecipeError, "max_error: goes without merge_heads"),
        ({"max_error": 0.1, "max_drop": 0.1}, RecipeError, "max_drop: goes without max_error"),
        ({"max_error": 0.1, "evaluate": closeness}, RecipeError, "max_error: goes without evaluate"),
        ({"max_error": 0}, BudgetError, "max_error: expected a fraction between 0 and 1, got 0"),
        ({"max_error": 1}, BudgetError, "max_error: expected a fraction between 0 and 1, got 1"),
        ({"max_error": "a"}, BudgetError, "max_error: expected a fraction between 0 and 1, got 'a'"),
        ({"max_error": 0.1, "of": "weights"}, BudgetError, "of: unknown measure 'weights'"),
        ({"max_error": 0.1, "of": 3}, BudgetError, "of: unknown measure 3"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: dict[str, Any], error: type[IntrafusionError], message: str
) -> None:
    with pytest.raises(error, match=message):
        compress(**options)


@pytest.mark.parametrize(
    ("ranks", "of", "message"),
    [
        (0.5, None, "sizes in macs choose ranks themselves, got 0.5; give ranks=True, or of='channels'"),
        (0.5, "params", "sizes in params choose ranks themselves, got 0.5"),
        (True, "channels", "got of='channels' beside True; leave of= out, or give a fraction, such as ranks=0.5"),
        ("only", "channels", "got of='channels' beside 'only'"),
    ],
)
def test_ranks_that_the_sizes_cannot_choose_are_refused_with_what_can_be_asked(
    ranks: Any, of: str | None, message: str
) -> None:
    with pytest.raises(RecipeError, match=f"^ranks: .*{message}"):
        compress(max_error=0.3, ranks=ranks, of=of)


def test_an_error_needs_something_to_be_measured_on() -> None:
    with pytest.raises(RecipeError, match="max_error: expected inputs to measure outputs on, got none; give inputs="):
        intrafusion.compress(WHOLE, X, max_error=0.1, of="channels", restore=None, reducer="select", progress=False)


def test_no_network_is_refused_as_everywhere() -> None:
    with pytest.raises(ModelError, match="model: expected"):
        intrafusion.compress(3, X, evaluate=closeness, max_drop=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 5, 38])
def test_bisection_finds_every_place_in_the_tries_that_it_says(count: int) -> None:
    for place in range(count + 1):
        tried: list[int] = []
        assert bisect(count, lambda k, p=place, t=tried: t.append(k) or k < p) == place  # type: ignore[misc]
        assert len(tried) == len(set(tried)) <= count_tries(count)
