"""Pivoting against brute force and regression; moments against samples; shifts against the full network."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import Recipe
from intrafusion.errors import BudgetError
from intrafusion.reduce.pivot import least_squares_map, pivots
from intrafusion.restore import Pivot, add_shifts_
from intrafusion.restore.moments import gaussian, measured


def spd(n: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(n, rank or n, dtype=torch.float64)
    return factor @ factor.T


def missing(covariance: Tensor, reader: Tensor, kept: list[int]) -> float:
    """tr(Q Cov(h | h_S)) / tr(Q C) by the Schur complement."""
    c, s = covariance.numpy(), np.array(kept)
    left = c - c[:, s] @ np.linalg.solve(c[np.ix_(s, s)], c[s]) if kept else c
    return float(np.trace(reader.numpy() @ left) / np.trace(reader.numpy() @ c))


def test_every_pick_is_the_best_next_one_and_its_error_is_right() -> None:
    covariance, reader = spd(6), spd(6)
    found = pivots([covariance], [reader], 6)
    for k in range(6):
        picked = found.order[:k].tolist()
        rest = [j for j in range(6) if j not in picked]
        best = min(rest, key=lambda j: missing(covariance, reader, [*picked, j]))
        assert int(found.order[k]) == best
        assert float(found.missing[k]) == pytest.approx(missing(covariance, reader, picked), abs=1e-9)
    assert float(found.missing[6]) == pytest.approx(0, abs=1e-9)


def test_two_points_weigh_the_same() -> None:
    a, b, reader = spd(5), spd(5), spd(5)
    assert torch.equal(pivots([a, b], [reader] * 2, 3).order, pivots([1000 * a, b], [reader] * 2, 3).order)


def test_known_channels_are_picked_last() -> None:
    """Rank 3: after three picks nothing is missing, and what is left is picked once each."""
    found = pivots([spd(5, 3)], [torch.eye(5, dtype=torch.float64)], 5)
    assert float(found.missing[3]) == pytest.approx(0, abs=1e-9)
    assert sorted(found.order.tolist()) == list(range(5))


@pytest.mark.parametrize("m", [0, 6])
def test_sizes_are_checked(m: int) -> None:
    with pytest.raises(BudgetError, match=f"cannot keep {m} of 5"):
        pivots([spd(5)], [spd(5)], m)


def test_least_squares_map_is_the_regression_on_samples() -> None:
    rows = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    kept = torch.tensor([1, 4, 5])
    found, shift = least_squares_map(rows.mean(0), torch.cov(rows.T, correction=0), kept, strength=0.0)
    design = np.concatenate([rows[:, kept].numpy(), np.ones((500, 1))], axis=1)
    expected = np.linalg.lstsq(design, rows.numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.unmerge.numpy(), expected[:3].T, atol=1e-8)
    np.testing.assert_allclose(shift.numpy(), expected[3], atol=1e-8)
    assert torch.equal(found.merge, torch.eye(6, dtype=torch.float64)[kept])


# ---- on networks ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """conv bn act conv (bn) act pool linear; unpadded, so that constants reach every place alike."""

    def __init__(self, activation: nn.Module, second_norm: bool = True, second_bias: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10)
        self.act = activation
        self.second = nn.Conv2d(10, 6, 3, bias=second_bias)
        self.norm2 = nn.BatchNorm2d(6) if second_norm else nn.Identity()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        return self.head(F.relu(self.norm2(self.second(x))).mean((2, 3)))


def made(*args: object) -> Net:
    return randomise_(Net(*args)).eval()  # type: ignore[arg-type, return-value]


IMAGES = torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(3))


def plan_for(model: nn.Module, **options: object) -> tuple[intrafusion.ChannelGraph, intrafusion.Plan]:
    graph = intrafusion.inspect(model, IMAGES[:1])
    return graph, intrafusion.decide(model, graph, Recipe.of(reducer="select", **options))


def test_measured_moments_are_those_of_what_is_read() -> None:
    model = made(nn.ReLU())
    graph, _ = plan_for(model)
    with torch.no_grad():
        h = F.relu(model.norm(model.first(IMAGES))).movedim(1, -1).reshape(-1, 10).double()
    found = measured(model, graph, IMAGES, rows=10**6)["first"]
    mean, covariance = found.overall
    np.testing.assert_allclose(mean, h.mean(0), atol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(h.numpy().T, bias=True), atol=1e-5)


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.Hardtanh(0.0, 0.5), nn.Identity()], ids=str)
def test_gaussian_moments_follow_the_activation(activation: nn.Module) -> None:
    """Mean of act(z) for z ~ N(beta, gamma^2), by quadrature."""
    model = made(activation)
    graph, _ = plan_for(model)
    mean, covariance = gaussian(model, graph, IMAGES[:1], samples=200_000)["first"].overall
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z = torch.from_numpy(nodes)[:, None] * model.norm.weight.detach().abs() + model.norm.bias.detach()
    w = torch.from_numpy(weights / weights.sum())[:, None]
    h = activation(z.clone())
    expected = (w * h).sum(0)
    np.testing.assert_allclose(mean, expected, atol=0.02)
    np.testing.assert_allclose(covariance.diagonal(), (w * (h - expected) ** 2).sum(0), atol=0.04)


def test_gaussian_correlation_has_the_spatial_prior() -> None:
    model = made(nn.Identity())
    graph, _ = plan_for(model)
    _, covariance = gaussian(model, graph, IMAGES[:1], samples=200_000, reach=2.0)["first"].overall
    w = model.first.weight.detach().double().numpy()
    expected = np.zeros((10, 10))
    for (a, b), (c, d) in itertools.product(itertools.product(range(3), repeat=2), repeat=2):
        expected += w[:, :, a, b] @ w[:, :, c, d].T * np.exp(-np.hypot(a - c, b - d) / 2.0)
    size = np.sqrt(expected.diagonal())
    correlation = expected / np.outer(size, size)
    signs = np.ones_like(size) * model.norm.weight.detach().abs().numpy()
    np.testing.assert_allclose(covariance, correlation * np.outer(signs, signs), atol=0.05)


@pytest.mark.parametrize(("norm", "bias"), [(True, False), (False, True), (True, True)])
def test_constant_channels_are_replaced_by_shifts(norm: bool, bias: bool) -> None:
    """Channels that never change can be dropped without loss once their constant is passed on."""
    model = made(nn.ReLU(), norm, bias)
    model.norm.weight.data[6:] = 0.0
    graph, plan = plan_for(model, keep=0.6, include="first")
    pivoted = Pivot()(plan, model, graph, IMAGES[:1], IMAGES)
    small = intrafusion.carry_out(model, pivoted.plan, graph, IMAGES[:1])
    with torch.no_grad():
        expected = model(IMAGES)
        assert float((small.model(IMAGES) - expected).norm()) > 0.01 * float(expected.norm())
        add_shifts_(small, model, graph, pivoted.shifts)
        assert float((small.model(IMAGES) - expected).norm()) < 0.005 * float(expected.norm())


def test_a_consumer_with_no_place_for_a_constant_gets_none() -> None:
    model = made(nn.ReLU(), False, False)
    graph, plan = plan_for(model, keep=0.5, include="first")
    pivoted = Pivot()(plan, model, graph, IMAGES[:1])
    small = intrafusion.carry_out(model, pivoted.plan, graph, IMAGES[:1])
    before = {n: t.clone() for n, t in small.model.state_dict().items()}
    add_shifts_(small, model, graph, pivoted.shifts)
    assert all(torch.equal(t, before[n]) for n, t in small.model.state_dict().items())


def test_it_loses_less_than_pruning_and_the_plan_is_left_as_it_was() -> None:
    model = made(nn.ReLU())
    graph, plan = plan_for(model, keep=0.5)
    maps = dict(plan.maps)
    errors = {}
    for images in (None, IMAGES):
        pivoted = Pivot()(plan, model, graph, IMAGES[:1], images)
        small = intrafusion.carry_out(model, pivoted.plan, graph, IMAGES[:1])
        add_shifts_(small, model, graph, pivoted.shifts)
        with torch.no_grad():
            errors[images is None] = float((small.model(IMAGES) - model(IMAGES)).norm())
    pruned = intrafusion.carry_out(model, plan, graph, IMAGES[:1])
    with torch.no_grad():
        loss = float((pruned.model(IMAGES) - model(IMAGES)).norm())
    assert errors[True] < loss
    assert errors[False] < loss
    assert plan.maps == maps
    assert {n: len(m.merge) for n, m in pivoted.plan.maps.items()} == plan.sizes


def test_groups_without_a_norm_keep_their_maps_without_images() -> None:
    model = made(nn.ReLU(), False, True)
    graph, plan = plan_for(model, keep=0.5)
    pivoted = Pivot()(plan, model, graph, IMAGES[:1])
    assert set(pivoted.shifts) == {"first"}
    assert pivoted.plan.maps["second"] is plan.maps["second"]
    assert set(Pivot()(plan, model, graph, IMAGES[:1], IMAGES).shifts) == {"first", "second"}
