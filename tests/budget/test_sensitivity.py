"""What heights are measured on, and what choices are compared on; batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion.budget.sensitivity import Sensitivity, fit_curve
from intrafusion.measure.closeness import Yardstick
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs
from intrafusion.observe.moments import measure_moments
from intrafusion.restore import Calibration, LeastSquares, calibrate

X = torch.randn(1, 6)
PICTURES = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.randn(120, 6, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def sensitivity(level: str = "images", *, solves: bool = False) -> Sensitivity:
    model, images = network(), IMAGES if level == "images" else None
    graph = intrafusion.inspect(model, X)
    calibration = calibrate(model, X, level, images)
    scores = {g.name: torch.ones(g.size).double() for g in graph.groups}
    moments = calibration.moments_of(graph)
    return Sensitivity(model, graph, scores, moments, calibration, Inputs.of(X), solves=solves)


def rows(calls: Iterable[Inputs]) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for call in calls for row in call.tensors()[0]}


@pytest.mark.parametrize("level", ["images", "noise"])
def test_nothing_is_measured_on_images_from_which_something_was_learnt(level: str) -> None:
    found = sensitivity(level)
    probe = found._probe
    parts = [rows(call for call, _ in seen) for seen in (probe.heights, probe.others)]
    assert probe.solved_on is not None
    parts.append(rows(probe.solved_on))
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert found.calibration is not None
    expected = measure_moments(found.calibration.original, found.graph, probe.solved_on)
    for name, moments in expected.items():
        assert torch.allclose(probe.moments[name].covariances, moments.covariances)


def test_heights_are_measured_once_for_one_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sensitivity()
    curves = found.list_curves(found.graph.reducible)
    monkeypatch.setattr(Sensitivity, "error", lambda self, sizes: pytest.fail("it was measured again"))
    again = replace(found)
    for before, after in zip(curves, again.list_curves(found.graph.reducible), strict=True):
        assert all(torch.equal(curve, before[name]) for name, curve in after.items())


def test_curves_pass_through_what_is_measured_at_half_and_at_seven_eighths() -> None:
    found = sensitivity()
    one, two = found.list_curves(found.graph.reducible)
    for g in found.graph.reducible:
        half, most = (g.size + 1) // 2, g.size - g.size // 8
        for curve, sizes in ((one[g.name], [half]), (two[g.name], [half, most])):
            for m in sizes:
                assert float(curve[m]) == pytest.approx(found.error({g.name: m}), rel=1e-6)
            assert bool((curve.diff() <= 0).all())
        assert float(one[g.name][most]) != pytest.approx(found.error({g.name: most}), rel=1e-2)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ({2: 3.0}, [12.0, 6.0, 3.0, 1.5, 0.0]),  # one: in proportion to what is lost
        ({2: 3.0, 3: 3.0}, [3.0 * 4**0.25, 3.0 * 2**0.25, 3.0, 3.0, 0.0]),  # off by all it can be, it seems
        ({2: 4.0, 3: 1.0}, [8.0 * 2, 4.0 * 2, 4.0, 1.0, 0.0]),  # faster than what is lost, further on only as fast
        ({2: 1.0, 3: 2.0}, [2.0 * 4**0.25, 2.0 * 2**0.25, 2.0, 2.0, 0.0]),  # more is not better for having less
    ],
)
def test_a_curve_is_a_power_of_what_is_lost_between_two_errors(
    heights: dict[int, float], expected: list[float]
) -> None:
    found = fit_curve(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0]), heights)
    assert found.tolist() == pytest.approx(expected)


def test_heights_on_noise_are_drawn_together() -> None:
    """Square roots of the errors, where batch norms have the statistics of the noise; else the errors themselves."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 8)
    graph = intrafusion.inspect(model, x)
    scores = {g.name: torch.ones(g.size).double() for g in graph.groups}
    for level, power in (("noise", 0.5), ("images", 1.0)):
        calibration = calibrate(model, x, level, torch.randn(64, 3, 8, 8) if level == "images" else None)
        found = Sensitivity(model, graph, scores, calibration.moments_of(graph), calibration, Inputs.of(x))
        for name, curve in found.list_curves(graph.reducible)[0].items():
            half = graph[name].size // 2
            assert float(curve[half]) == pytest.approx(found.error({name: half}) ** power, rel=1e-6)


def test_where_layers_are_solved_choices_are_compared_behind_it() -> None:
    """Against the same sizes compressed on the same images, measured on the same others."""
    found, sizes = sensitivity(solves=True), {"0": 12, "2": 8}
    probe, model = found._probe, found.model
    assert probe.solved_on is not None
    images = probe.solved_on.join().tensors()[0]
    small = intrafusion.compress(model, X, keep=0.5, reducer={"name": "pivot", "rotate": False}, restore=None)
    assert small.plan.sizes == sizes
    calibration = calibrate(model, X, "images", images)
    plan = intrafusion.decide(model, found.graph, small.plan.recipe, X, calibration=calibration)
    cut = intrafusion.apply(model, plan, X)
    calibration.restorer(cut, model, found.graph, images)
    expected = Yardstick(model, Batches.of(*(call for call, _ in probe.others))).measure(cut.model).error
    [solved] = found.compare(sizes)
    assert solved == pytest.approx(expected, rel=1e-3)
    assert solved < sensitivity().compare(sizes)[0]


def test_the_error_of_a_cut_does_not_depend_on_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 3)).double()
    graph = intrafusion.inspect(model.eval(), PICTURES[:1])
    scores = {g.name: torch.arange(float(g.size), dtype=torch.float64) for g in graph.reducible}
    errors = []
    for sizes in ([80], [50, 30], [1] * 80):
        images = Batches.of(*(Inputs((part,)) for part in PICTURES.split(sizes)))
        calibration = Calibration("images", images, model, LeastSquares())
        sensitivity = Sensitivity(
            model, graph, scores, calibration.moments_of(graph), calibration, Inputs((PICTURES[:1],))
        )
        errors.append(sensitivity.error({"0": 4, "2": 3}))
    assert errors[0] > 0.01
    assert errors[1:] == pytest.approx([errors[0]] * 2, rel=1e-8)
