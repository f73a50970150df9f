"""Several sizes of one network: each is what compress gives, and what is shared is found out once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion.budget.sensitivity import Sensitivity
from intrafusion.errors import ArgumentError, BudgetError, RecipeError
from intrafusion.frontiers import Point
from intrafusion.network.tensors import named_tensors
from intrafusion.restore import calibration

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def same(a: nn.Module, b: nn.Module) -> bool:
    others = named_tensors(b)
    return all(torch.equal(t, others[name]) for name, t in named_tensors(a).items())


@pytest.mark.parametrize(("of", "said"), [("macs", "target"), ("params", "target"), ("channels", "keep")])
def test_every_size_is_what_compress_gives(of: str, said: str) -> None:
    model = network()
    found = intrafusion.frontier(model, X, IMAGES, (0.8, 0.5), of=of)
    for point, size in zip(found, (0.8, 0.5), strict=True):
        options: dict[str, Any] = {said: {of: size} if said == "target" else size}
        alone = intrafusion.compress(model, X, inputs=IMAGES, **options)
        assert point.compressed.plan == alone.plan
        assert same(point.model, alone.model)
        assert point.cost == alone.after
        assert alone.comparison is not None
        assert alone.comparison.held_out is not None
        assert point.error == alone.comparison.held_out.after.error


def test_memory_is_that_of_compress() -> None:
    with pytest.raises(RecipeError, match="memory: expected at least .*, got 10 kB"):
        print(intrafusion.frontier(network(), X, IMAGES, (0.5,), memory=10_000))
    found = intrafusion.frontier(network(), X, IMAGES, (0.5,), of="channels", memory="20MB")
    assert same(found[0].model, intrafusion.compress(network(), X, 0.5, inputs=IMAGES, memory="20MB").model)


def test_nothing_is_carried_out_before_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, heights = [], []
    measure, height = calibration.measure_moments, Sensitivity.error
    monkeypatch.setattr(calibration, "measure_moments", lambda *a, **k: measured.append(1) or measure(*a, **k))
    monkeypatch.setattr(Sensitivity, "error", lambda self, sizes: heights.append(1) or height(self, sizes))
    found = intrafusion.frontier(network(), X, IMAGES, (0.9, 0.7, 0.5))
    assert [point.is_done for point in found] == [False] * 3
    assert "0 of 3 sizes are carried out" in repr(found)
    assert found[1].error is not None
    assert [point.is_done for point in found] == [False, True, False]
    once = len(measured), len(heights)
    found.carry_out()
    assert [point.is_done for point in found] == [True] * 3
    assert (len(measured), len(heights)) == once  # what is read of channels, and what cutting groups costs, was known


def test_the_channels_of_a_smaller_size_are_among_those_of_a_larger_one() -> None:
    found = intrafusion.frontier(network(), X, IMAGES, (0.75, 0.5), of="channels", restore=None)
    for name, smaller in found[1].compressed.plan.maps.items():
        kept = [set(m.merge.argmax(1).tolist()) for m in (found[0].compressed.plan.maps[name], smaller)]
        assert kept[1] < kept[0]


def test_the_table_has_a_row_for_each_size_and_the_picture_a_point(tmp_path: Path) -> None:
    found = intrafusion.frontier(network(), X, IMAGES, (0.8, 0.5), lambda model: model(IMAGES).var(), of="channels")
    lines = str(found).splitlines()
    assert lines[0].split()[-1] == "score"
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["original", "2,274"],
        ["channels", "0.8"],
        ["channels", "0.5"],
    ]
    assert f"{found[1].cost.params:,} ({found[1].cost.params / 2274:.1%})" in lines[4]
    assert lines[3].split()[-1] == f"{float(found[0].model(IMAGES).var().detach()):.4g}"
    assert "<table" in found._repr_html_()
    found.draw(tmp_path / "f.svg")
    assert "<svg" in (tmp_path / "f.svg").read_text()
    unscored = intrafusion.frontier(network(), X, IMAGES, (0.8,), of="channels")
    unscored.draw(tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_finished_is_kept_where_it_is_interrupted() -> None:
    calls = []

    def evaluate(model: nn.Module) -> float:
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return float(len(calls))

    found = intrafusion.frontier(network(), X, IMAGES, (0.8, 0.6, 0.5), evaluate, of="channels", restore=None)
    with pytest.raises(KeyboardInterrupt):
        found.carry_out()
    first = found[0].model
    assert [point.is_done for point in found] == [True, True, False]
    found.carry_out()
    assert found[0].model is first
    assert [point.score for point in found] == [1.0, 3.0, 4.0]
    assert found.score == 5.0


def test_the_smallest_that_passes_is_found_in_few_tries() -> None:
    found = intrafusion.frontier(network(), X, sizes=[k / 12 for k in range(12, 4, -1)], of="channels", restore=None)
    tried: list[Point] = []

    def passes(point: Point) -> bool:
        tried.append(point)
        return point.cost.params >= found[5].cost.params

    assert found.find_smallest(passes) is found[5]
    assert len(tried) <= 4
    assert found.find_smallest(lambda point: False) is None
    assert found.find_smallest(lambda point: True) is found[7]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sizes": ()}, BudgetError, r"sizes: expected fractions such as .*, got \(\); give at least one"),
        ({"sizes": 0.5}, BudgetError, "sizes: expected fractions such as"),
        ({"sizes": (0.5, 1.5)}, BudgetError, r"expected a fraction in \(0, 1\], got 1.5"),
        ({"sizes": (0.5, 0.7, 0.5)}, BudgetError, "expected each size once, got 0.5 twice"),
        ({"sizes": ({"speed": 2},)}, BudgetError, "unknown measure 'speed'"),
        ({"of": "weights"}, BudgetError, "of: unknown measure 'weights'. Valid: channels, macs, params"),
        ({"keep": 0.5}, RecipeError, r"frontier: unknown option 'keep'.* Sizes are said in sizes="),
        ({"reducr": "select"}, RecipeError, "unknown option 'reducr'. Did you mean 'reducer'?"),
        ({"evaluate": 3}, ArgumentError, "evaluate: expected a function of a network, got 3"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        intrafusion.frontier(network(), X, **options)


@pytest.mark.parametrize(
    ("returned", "shown"), [("good", "'good'"), (None, "None"), (float("nan"), "nan"), ("1.0", "'1.0'")]
)
def test_an_evaluation_that_is_no_number_is_told(returned: Any, shown: str) -> None:
    found = intrafusion.frontier(network(), X, sizes=(0.5,), evaluate=lambda _: returned, restore=None)
    with pytest.raises(ArgumentError, match=f"evaluate: expected it to return a (finite )?number, got {shown}"):
        _ = found[0].score


def test_several_limits_are_a_size_too(recwarn: pytest.WarningsRecorder) -> None:
    found = intrafusion.frontier(network(), X, sizes=[{"macs": 0.6, "params": 0.7}, 0.4], restore=None)
    assert [point.asked for point in found] == ["macs 0.6, params 0.7", "macs 0.4"]
    assert found[0].cost.macs <= 0.61 * found[0].compressed.before.macs
    assert found[0].cost.params <= 0.71 * found[0].compressed.before.params
    smallest = found.find_smallest(lambda point: True)
    assert smallest is found[1]
