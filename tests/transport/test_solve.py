from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from intrafusion.errors import IntrafusionError
from intrafusion.transport import entropic_coupling, optimal_coupling


def random_problem(n: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = np.random.default_rng(seed)
    a, b = draw.random(n) + 0.05, draw.random(m) + 0.05
    return torch.from_numpy(draw.random((n, m))), torch.from_numpy(a / a.sum()), torch.from_numpy(b / b.sum())


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_square_uniform_problem_is_an_assignment(n):
    cost, _, _ = random_problem(n, n, seed=n)
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    coupling = optimal_coupling(cost, uniform, uniform)
    rows, columns = linear_sum_assignment(cost.numpy())
    expected = torch.zeros(n, n, dtype=torch.float64)
    expected[rows, columns] = 1 / n
    torch.testing.assert_close(coupling, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 9, 40])
def test_equal_masses_of_large_problems_are_assigned_to_the_same_bytes(n, monkeypatch):
    cost, _, _ = random_problem(n, n, seed=n)
    uniform = torch.full((n,), 0.3 / n, dtype=torch.float64)
    expected = optimal_coupling(cost, uniform, uniform)
    monkeypatch.setattr("intrafusion.transport.solve._LARGE", 1)
    monkeypatch.setattr("ot.emd", None)  # not used
    assert torch.equal(optimal_coupling(cost, uniform, uniform), expected)


def test_unequal_masses_of_large_problems_are_not_assigned(monkeypatch):
    cost, a, b = random_problem(7, 7, seed=1)
    expected = optimal_coupling(cost, a, b)
    monkeypatch.setattr("intrafusion.transport.solve._LARGE", 1)
    assert torch.equal(optimal_coupling(cost, a, b), expected)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 1), (5, 3), (7, 6)])
def test_unequal_problem_equals_the_linear_program(n, m):
    cost, a, b = random_problem(n, m, seed=10 * n + m)
    coupling = optimal_coupling(cost, a, b)
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    program = linprog(cost.numpy().ravel(), A_eq=sums, b_eq=[*a, *b])
    assert program.status == 0
    torch.testing.assert_close(coupling.flatten(), torch.from_numpy(program.x), rtol=1e-9, atol=1e-9)


def test_marginals_and_sparsity_of_a_large_plan():
    cost, a, b = random_problem(120, 50, seed=3)
    coupling = optimal_coupling(cost, a, b)
    torch.testing.assert_close(coupling.sum(1), a, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(coupling.sum(0), b, rtol=1e-10, atol=1e-14)
    assert (coupling >= 0).all()
    assert int((coupling > 0).sum()) <= 120 + 50 - 1


def test_a_solver_that_stops_early_is_an_error():
    cost, a, b = random_problem(60, 40, seed=4)
    with pytest.raises(
        IntrafusionError, match=r"60 onto 40 channels stopped before the optimum: .*raise max_iterations"
    ):
        optimal_coupling(cost, a, b, max_iterations=1)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 1), (6, 6), (40, 15)])
def test_the_entropic_plan_approaches_the_exact_one(n, m):
    cost, a, b = random_problem(n, m, seed=n + m)
    exact = optimal_coupling(cost, a, b)
    excess = []
    for epsilon in (1.0, 0.1, 0.01):
        coupling = entropic_coupling(cost, a, b, epsilon=epsilon, max_iterations=100_000)
        torch.testing.assert_close(coupling.sum(1), a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(coupling.sum(0), b, rtol=1e-9, atol=1e-12)
        assert (coupling >= 0).all()
        excess.append(float((coupling * cost).sum() / (exact * cost).sum()) - 1)
    assert all(e >= -1e-9 for e in excess)
    assert excess[2] < 0.02
    assert excess[0] >= excess[1] >= excess[2] - 1e-3
    if n > 1 and m > 1:
        assert excess[0] > 0.1


def test_the_entropic_plan_minimises_cost_and_entropy():
    """Its logarithm is a row term plus a column term minus the cost: the condition for the one minimum."""
    cost, a, b = random_problem(7, 5, seed=2)
    coupling = entropic_coupling(cost, a, b, epsilon=0.5, tolerance=1e-12)
    left = coupling.log() + cost / (0.5 * cost.mean())
    left = left - left.mean(0) - left.mean(1, keepdim=True) + left.mean()
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-8)


def test_the_entropic_plan_scales_with_the_mass_and_not_with_the_cost():
    cost, a, b = random_problem(6, 4, seed=7)
    plan = entropic_coupling(cost, a, b)
    torch.testing.assert_close(entropic_coupling(1e6 * cost, 3 * a, 3 * b), 3 * plan, rtol=1e-6, atol=1e-9)


def test_masses_of_zero_stay_without_mass():
    cost, a, b = random_problem(5, 4, seed=9)
    a[1], b[2] = 0.0, 0.0
    b = b * a.sum() / b.sum()
    for coupling in (entropic_coupling(cost, a, b), optimal_coupling(cost, a, b)):
        assert not coupling[1].any()
        assert not coupling[:, 2].any()
        torch.testing.assert_close(coupling.sum(1), a)


def test_no_cost_at_all_spreads_the_mass():
    a, b = torch.tensor([0.25, 0.75]).double(), torch.tensor([0.5, 0.5]).double()
    assert entropic_coupling(torch.zeros(2, 2), a, b).tolist() == [[0.125, 0.125], [0.375, 0.375]]


def test_no_convergence_is_an_error():
    cost, a, b = random_problem(60, 40, seed=4)
    with pytest.raises(
        IntrafusionError,
        match=r"60 onto 40 channels did not converge: after 12 iterations .*raise epsilon \(now 0.001\)",
    ):
        entropic_coupling(cost, a, b, epsilon=1e-3, max_iterations=12)
    with pytest.raises(ValueError, match="epsilon: expected a number > 0"):
        entropic_coupling(cost, a, b, epsilon=0.0)
    with pytest.raises(ValueError, match="same mass"):
        entropic_coupling(cost, a, 2 * b)


def test_errors():
    cost, half = torch.zeros(2, 2), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"got \(2, 2\), \(2,\), \(3,\)"):
        optimal_coupling(cost, half, torch.ones(3) / 3)
    with pytest.raises(ValueError, match="expected finite distances"):
        optimal_coupling(cost + torch.nan, half, half)
    with pytest.raises(ValueError, match="b: expected finite masses >= 0, got -0.5"):
        optimal_coupling(cost, half, torch.tensor([1.5, -0.5]))
    with pytest.raises(ValueError, match="a: expected finite masses >= 0, got nan"):
        optimal_coupling(cost, half * torch.nan, half)
    with pytest.raises(ValueError, match="same mass, got 1.0 and 2.0"):
        optimal_coupling(cost, half, torch.ones(2))
